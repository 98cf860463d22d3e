"""Search for the best values of some keys: a training run for each, with several seeds.

    python sweep.py --config presets/microgpt.yaml training.lr=3e-3,1e-2,3e-2 --seeds 3 --budget 2h
    python sweep.py --config presets/nnzig.yaml training.lr=1e-4..1e-2 --search random --trials 12
    python sweep.py --config presets/nnzig.yaml training.lr=3e-4,1e-3,3e-3,1e-2 --search halving

A key with alternatives is swept; one with a single value is the same in all runs. Each run is
train.py in a process of its own, one at a time. The same command again goes on where it was
stopped, and prints the table when all is done. Outputs are written to sweeps/<run.name>/.
"""

from pocketlm.startup import fast_imports

with fast_imports():
    import argparse
    import math
    from collections.abc import Sequence

    from rich.console import Console

    from pocketlm.config.loading import load_config
    from pocketlm.errors import UserError, run_main
    from pocketlm.evaluation.tables import print_table
    from pocketlm.hardware.processes import print_note
    from pocketlm.sweeps.pictures import draw_sweep, write_hparams
    from pocketlm.sweeps.runs import stopping_on_signals
    from pocketlm.sweeps.search import BudgetSpent, Clock, Search, parse_duration, resolve
    from pocketlm.sweeps.space import (
        Axis,
        Configuration,
        configurations,
        draw,
        grid,
        parse_overrides,
        require_few,
    )
    from pocketlm.sweeps.study import Study, identity
    from pocketlm.sweeps.summary import METRICS, edges, summaries, table, verdict, write_csv
    from pocketlm.training.loop import quiet_libraries

WIDTH = 200  # columns of the table where the output is not a terminal
FAILED = 1  # exit status if a run has failed
# keys that decide which text is held out: losses on different texts cannot be compared
HELD_OUT_KEYS = (
    *("source", "path", "optional_path", "mixture", "text_field", "separator", "errors"),
    *("config_name", "split", "revision", "val_share", "val_path", "val_split"),
)
TOKEN_KEYS = ("data.tokenizer", "data.bos", "data.eos")  # a loss per token depends on them


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search for the best values of some keys.")
    parser.add_argument(
        "--config", default="config.yaml", help="YAML file of all runs (default: %(default)s)"
    )
    parser.add_argument(
        "--search",
        choices=["grid", "random", "halving"],
        default="grid",
        help="grid: all combinations; random: --trials of them; halving: the better half of the "
        "configurations goes on at each doubling of the steps (default: %(default)s)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="configurations that random draws, or halving begins with (default of halving: all "
        "combinations)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs of each configuration, with training.seed, training.seed + 1, ... "
        "(default: %(default)s, which gives no interval and no winner)",
    )
    parser.add_argument(
        "--budget",
        metavar="TIME",
        help="time for all runs together, for example 20m or 2h (default: no limit)",
    )
    parser.add_argument(
        "--metric",
        choices=list(METRICS),
        default="best_loss",
        help="validation loss that is compared (default: %(default)s)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="config keys: alternatives a,b,c or a range LOW..HIGH to sweep, or a single value",
    )
    return parser.parse_intermixed_args(argv)


# ---- checks ----


def check_arguments(args: argparse.Namespace) -> None:
    """Raise UserError for options that have no meaning together or a value that cannot be."""
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}; it must be at least 1")
    require_few(args.seeds, "seeds")
    if args.trials is not None and args.trials < 2:
        raise UserError(f"--trials is {args.trials}; it must be at least 2, to compare them")
    if args.search == "random" and args.trials is None:
        raise UserError("--search random draws configurations; say how many with --trials N")
    if args.search == "grid" and args.trials is not None:
        raise UserError("--trials is for --search random or halving; a grid has all combinations")


def check_axes(args: argparse.Namespace, axes: Sequence[Axis], fixed: Sequence[str]) -> None:
    """Raise UserError for keys that cannot be swept."""
    keys = [axis.key for axis in axes]
    if not keys:
        raise UserError(
            "no key has alternatives; give one or more, for example training.lr=1e-3,2e-3,4e-3"
        )
    given_twice = [key for key in keys if any(each.startswith(f"{key}=") for each in fixed)]
    if given_twice:
        raise UserError(f"{given_twice[0]} has a single value and alternatives; remove one")
    for key, reason in (
        ("run.name", "names the sweep"),
        ("training.seed", "is what --seeds varies; give the first one, or leave it out"),
    ):
        if key in keys:
            raise UserError(f"{key} {reason}, and cannot be swept")
    has_own_validation = any(
        each.startswith(("data.val_path=", "data.val_split=")) for each in fixed
    )
    for key in keys:
        section, _, name = key.partition(".")
        if section == "data" and name in HELD_OUT_KEYS and not has_own_validation:
            raise UserError(
                f"{key} decides which text is held out, so that the losses of its values cannot be "
                "compared; hold out one text for all with data.val_path=FILE"
            )
        if key in TOKEN_KEYS and args.metric.endswith("loss"):
            raise UserError(
                f"{key} changes what a token is, so that a loss per token cannot be compared; add "
                "--metric best_bpb"
            )


def check_halving(all_configurations: Sequence[Configuration]) -> None:
    """Raise UserError if runs cannot be compared at the same steps."""
    for name in ("max_steps", "val_every_steps"):
        values = {getattr(each.config.training, name) for each in all_configurations}
        if len(values) > 1:
            raise UserError(
                f"--search halving compares runs at the same step, and training.{name} differs "
                f"between the configurations ({', '.join(map(str, sorted(values)))})"
            )


# ---- the sweep ----


def plan(args: argparse.Namespace) -> tuple[list[Axis], list[Configuration], list[float]]:
    """Return the swept keys, the configurations, and the estimated seconds of a run of each."""
    check_arguments(args)
    fixed, axes = parse_overrides(args.overrides)
    load_config(args.config, fixed)  # its mistakes are in every run
    check_axes(args, axes, fixed)
    settings = draw(axes, args.trials) if args.trials else grid(axes)
    found = configurations(args.config, fixed, settings)
    quiet_libraries()
    resolved = [resolve(configuration) for configuration in found]
    found = [configuration for configuration, _ in resolved]
    if args.search == "halving":
        check_halving(found)
    return axes, found, [seconds for _, seconds in resolved]


def report(study: Study, metric: str) -> int:
    """Print the table and the verdict, write the picture and the other files."""
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    rows = summaries(study, metric)
    print_table(
        console, table(f"{study.name}: {METRICS[metric]}; mean ± standard error", study.axes, rows)
    )
    for line in [verdict(rows), *edges(study.axes, rows)]:
        console.print(line, markup=False, soft_wrap=True)
    write_csv(study, study.folder / "runs.csv")
    picture, tensorboard = study.folder / "loss.png", study.folder / "tensorboard"
    draw_sweep(study, rows, METRICS[metric], picture)
    write_hparams(study, tensorboard)
    failed = [record for record in study.records.values() if record.problem]
    for record in failed:
        key = (record.number, record.seed)
        print_note(f"{study.run(key).name} failed ({study.log(key)}): {record.problem}")
    print_note(f"picture: {picture}\nevery run: {study.folder / 'runs.csv'}")
    print_note(f"TensorBoard: tensorboard --logdir {tensorboard}")
    return FAILED if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    budget = math.inf if args.budget is None else parse_duration(args.budget)
    axes, found, seconds = plan(args)
    base = found[0].config
    study = Study(base.run.name or "sweep", found, axes)
    same = identity(load_config(args.config, found[0].overrides), axes) | {"--search": args.search}
    if args.search == "halving":
        same |= {"--seeds": args.seeds, "--trials": args.trials}
    seeds = range(base.training.seed, base.training.seed + args.seeds)
    study.check_runs(seeds)
    with stopping_on_signals(), study.open(same):
        search = Search(
            study, seeds, Clock(study, dict(enumerate(seconds, 1)), budget), args.metric
        )
        try:
            search.halving() if args.search == "halving" else search.grid()
        except BudgetSpent as reason:
            print_note(f"stopped: {reason}; a larger --budget goes on")
        except SystemExit:
            print_note("stopped; the same command goes on")
            raise
        return report(study, args.metric)


if __name__ == "__main__":
    run_main(main)
