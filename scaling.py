"""Measure how the loss falls with compute: train a series, fit a law, predict the next size.

    python scaling.py                                  # presets/series/: five widths and the next
    python scaling.py --seeds 2 --budget 1h
    python scaling.py --configs 'mine/*.yaml' run.name=mine

The largest config is the one to predict: the law is fitted to the others, the prediction is
printed, and then it is trained. The same command again goes on where it was stopped, and prints
the result when all is done. Outputs are written to sweeps/<run.name>/ (default: sweeps/scaling/).
"""

from pocketlm.startup import fast_imports

with fast_imports():
    import argparse
    import math
    from dataclasses import dataclass

    from rich.console import Console

    from pocketlm.config.sections import Config
    from pocketlm.errors import UserError, run_main
    from pocketlm.evaluation.tables import Column, cells_of, labels_of, make_table, print_table
    from pocketlm.files import expand_globs
    from pocketlm.hardware.processes import print_note
    from pocketlm.sweeps.pictures import draw_scaling
    from pocketlm.sweeps.power_law import MIN_SIZES, Forecast, forecast
    from pocketlm.sweeps.runs import stopping_on_signals
    from pocketlm.sweeps.search import BudgetSpent, Clock, Search, parse_duration, resolve
    from pocketlm.sweeps.space import Configuration, require_few
    from pocketlm.sweeps.study import Study, identity
    from pocketlm.sweeps.summary import mean_and_error, write_csv
    from pocketlm.training.loop import quiet_libraries
    from pocketlm.training.plan import tokens_per_step

SERIES = "presets/series/*.yaml"
METRIC = "final_loss"  # of a schedule that has ended: the loss of that many tokens
FAILED = 1  # exit status if a run has failed


@dataclass(frozen=True)
class Size:
    """One config of the series, and the final losses of its seeds."""

    name: str
    parameters: int
    tokens: int
    compute: float  # floating-point operations
    losses: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return math.fsum(self.losses) / len(self.losses)

    @property
    def loss_text(self) -> str | None:
        if not self.losses:
            return None
        mean, error = mean_and_error(self.losses)
        return f"{mean:.4f}" if error is None else f"{mean:.4f} ± {error:.4f}"


COLUMNS: list[Column[Size]] = [
    Column("size", lambda size: size.name),
    Column("parameters", lambda size: size.parameters, ","),
    Column("tokens", lambda size: size.tokens, ","),
    Column("tokens per parameter", lambda size: size.tokens / size.parameters, ".1f"),
    Column("compute", lambda size: size.compute, ".2e"),
    Column("runs", lambda size: len(size.losses)),
    Column("loss", lambda size: size.loss_text),
]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fit and check how the loss falls with compute.")
    parser.add_argument(
        "--configs",
        default=SERIES,
        metavar="PATTERN",
        help="pattern of configs, of which the one with the most compute is predicted "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs of each size, with training.seed, training.seed + 1, ... (default: %(default)s)",
    )
    parser.add_argument(
        "--budget", metavar="TIME", help="time for all runs, such as 20m or 2h (default: no limit)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="keys to change in all configs"
    )
    return parser.parse_intermixed_args(argv)


# ---- sizes ----


def compute_of(config: Config) -> float:
    """Return the floating-point operations of a run."""
    return float(tokens_of(config) * config.model.flops_per_token(config.training.seq_len))


def tokens_of(config: Config) -> int:
    return config.training.steps * tokens_per_step(config)


def series(args: argparse.Namespace) -> tuple[list[Configuration], list[float]]:
    """Return the configurations by their compute, and the estimated seconds of a run of each."""
    paths = expand_globs([args.configs], "config", lambda: "name some with --configs")
    if len(paths) <= MIN_SIZES:
        raise UserError(
            f"{len(paths)} configs are too few: a law and its intervals need {MIN_SIZES}, and one "
            "more is predicted"
        )
    loaded = [Configuration(path, {}, tuple(args.overrides)).loaded() for path in paths]
    quiet_libraries()
    resolved = sorted(map(resolve, loaded), key=lambda pair: compute_of(pair[0].config))
    found = [configuration for configuration, _ in resolved]
    for smaller, larger in zip(found, found[1:], strict=False):
        if compute_of(smaller.config) == compute_of(larger.config):
            raise UserError(f"{smaller.path} and {larger.path} take the same compute; remove one")
    return found, [seconds for _, seconds in resolved]


def sizes_of(study: Study) -> list[Size]:
    """Return the sizes with the losses of their finished runs."""
    sizes = []
    for number, configuration in enumerate(study.configurations, 1):
        records = [record for key, record in sorted(study.records.items()) if key[0] == number]
        losses = [getattr(r.losses, METRIC) for r in records if r.finished]
        config = configuration.config
        sizes.append(
            Size(
                configuration.label,
                config.model.n_parameters,
                tokens_of(config),
                compute_of(config),
                tuple(losses),
            )
        )
    return sizes


def predict(sizes: list[Size]) -> Forecast:
    """Return the forecast of the last size from the others that have been trained."""
    trained = [size for size in sizes[:-1] if size.losses]
    compute, losses = [size.compute for size in trained], [size.mean for size in trained]
    return forecast(compute, losses, sizes[-1].compute)


# ---- the report ----


def forecast_lines(target: Size, found: Forecast) -> list[str]:
    """Return the law, why its form was chosen, and the prediction."""
    low, high = found.exponent
    errors = ", ".join(f"{name} by {error:+.4f}" for name, error in found.errors.items())
    return [
        f"law: {found.law.text}; exponent 95 % [{low:.3f}, {high:.3f}]",
        f"the largest of these sizes, predicted from the smaller ones, is missed: {errors}",
        f"prediction for {target.name}: {found.loss:.4f} [{found.interval[0]:.4f}, "
        f"{found.interval[1]:.4f}]",
    ]


def verdict(target: Size, found: Forecast) -> str:
    """Say how far off the prediction was."""
    low, high = found.interval
    off = target.mean - found.loss
    place = "inside" if low <= target.mean <= high else "outside"
    return (
        f"measured: {target.mean:.4f}, off by {off:+.4f} ({off / found.loss:+.2%}), {place} the "
        "95 % interval"
    )


def report(study: Study) -> int:
    """Print the table, the law and the verdict; draw the picture."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    sizes = sizes_of(study)
    target = sizes[-1]
    title = f"{study.name}: validation loss after the last step, in nats per token"
    print_table(console, make_table(title, labels_of(COLUMNS), cells_of(COLUMNS, sizes)))
    write_csv(study, study.folder / "runs.csv")
    found = predict(sizes)
    lines = forecast_lines(target, found)
    lines.append(verdict(target, found) if target.losses else f"{target.name} is not trained yet")
    console.print("\n".join(lines), markup=False)
    shown = [size for size in sizes if size.losses or size is target]
    picture = study.folder / "loss.png"
    draw_scaling([size.compute for size in shown], [size.losses for size in shown], found, picture)
    print_note(f"picture: {picture}\nevery run: {study.folder / 'runs.csv'}")
    failed = [record for record in study.records.values() if record.problem]
    for record in failed:
        key = (record.number, record.seed)
        print_note(f"{study.run(key).name} failed ({study.log(key)}): {record.problem}")
    return FAILED if failed else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}; it must be at least 1")
    require_few(args.seeds, "seeds")
    budget = math.inf if args.budget is None else parse_duration(args.budget)
    found, seconds = series(args)
    names = [each.partition("=")[2] for each in args.overrides if each.startswith("run.name=")]
    study = Study(names[-1] if names else "scaling", found, [])
    same = {
        f"{each.label} {key}": value
        for each in found
        for key, value in identity(each.loaded().config, []).items()
    }
    first = found[0].config.training.seed
    seeds = range(first, first + args.seeds)
    study.check_runs(seeds)
    with stopping_on_signals(), study.open(same):
        search = Search(
            study,
            seeds,
            Clock(study, dict(enumerate(seconds, 1)), budget),
            METRIC,
        )
        try:
            search.grid(search.numbers[:-1])
            sizes = sizes_of(study)
            print_note("\n".join(forecast_lines(sizes[-1], predict(sizes))))
            search.grid(search.numbers[-1:])
        except BudgetSpent as reason:
            print_note(f"stopped: {reason}; a larger --budget goes on")
        except SystemExit:
            print_note("stopped; the same command goes on")
            raise
        return report(study)


if __name__ == "__main__":
    run_main(main)
