"""Score checkpoints on probe cases and compare them, with intervals.

    python evaluate_checkpoints.py --cases cases/wiki_basics.yaml
    python evaluate_checkpoints.py --cases 'cases/*.yaml' --plot probes.png
    python evaluate_checkpoints.py --cases 'cases/*.yaml' --baseline checkpoints/best.ckpt
    python evaluate_checkpoints.py --cases cases/grammar.yaml --fail-under grammar=0.6
    python evaluate_checkpoints.py --cases cases/grammar.yaml --validate-only

Checkpoints are ranked by accuracy, the mean over the categories. One is called best only if the
interval of its paired difference from each other one excludes zero.

Exit status 1: a checkpoint has numbers that are not finite. 2: wrong arguments, or --validate-only
found a problem. 3: an accuracy is below --fail-under.
"""

import argparse
import glob
import sys

from pocketlm.errors import UserError, run_main
from pocketlm.startup import fast_imports

with fast_imports():
    from pocketlm.checkpoint.format import known_checkpoints
    from pocketlm.checkpoint.loading import best_checkpoint
    from pocketlm.evaluation.cases import (
        Suite,
        known_suites,
        lint,
        load_suite,
        merge_suites,
        read_blimp,
    )
    from pocketlm.evaluation.exports import (
        plot_accuracies,
        print_csv,
        print_json,
        print_markdown,
        write_tensorboard,
    )
    from pocketlm.evaluation.results import Result, evaluate, summarise
    from pocketlm.evaluation.tables import print_tables
    from pocketlm.files import expand_globs

BROKEN = 1  # exit status if a checkpoint has numbers that are not finite
INVALID = 2  # exit status if --validate-only finds a problem
MISSED = 3  # exit status if an accuracy is below --fail-under


# ---- command line ----


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score checkpoints on probe cases.")
    add = parser.add_argument
    add(
        "--checkpoints",
        nargs="+",
        help="files or quoted patterns (default: the unnamed run's, else the best run's)",
    )
    add("--cases", nargs="+", default=[], help="suites: YAML or JSON files, or quoted patterns")
    add("--blimp", metavar="DIR_OR_ZIP", help="additional suite: BLiMP's own JSONL files")
    add(
        "--tokenizer",
        help="name of the tokenizer the checkpoints must have (default: each its own)",
    )
    add(
        "--top-k",
        type=int,
        default=5,
        help="number of next tokens to show and count (default: %(default)s)",
    )
    add("--baseline", metavar="CKPT", help="checkpoint to compare with, by category")
    add("--validate-only", action="store_true", help="check the suites and score nothing")
    add(
        "--fail-under",
        action="append",
        default=[],
        metavar="CATEGORY=SCORE",
        help=f"minimum accuracy of the best checkpoint; exit status {MISSED} below it",
    )
    add_output_options(parser)
    args = parser.parse_args(argv)
    if args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}; it must be 1 or more")
    if not args.cases and not args.blimp:
        raise UserError(
            "there are no cases; pass --cases FILE, for example cases/wiki_basics.yaml, "
            "or --blimp DIR_OR_ZIP"
        )
    return args


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for files to write and for the form of the results."""
    parser.add_argument("--plot", metavar="FILE", help="picture to write: accuracy against steps")
    parser.add_argument(
        "--tensorboard", metavar="DIR", help="folder for scalars at each checkpoint's step"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV, a row per checkpoint and case")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def load_suites(args: argparse.Namespace) -> Suite:
    """Return all suites as one. Raise UserError for a mistake or a duplicate."""
    suites = [load_suite(path) for path in expand_globs(args.cases, "suite", known_suites)]
    if args.blimp:
        suites.append(read_blimp(args.blimp))
    return merge_suites(suites)


def default_pattern() -> str:
    """Return the pattern of the unnamed run's checkpoints, or else of the best run's, and print it.

    The best run is the one with the lowest validation loss.
    """
    if glob.glob("checkpoints/*.ckpt"):
        return "checkpoints/*.ckpt"
    pattern = str(best_checkpoint().parent / "*.ckpt")
    print(f"scoring {pattern}", file=sys.stderr)
    return pattern


# ---- thresholds ----


def read_thresholds(options: list[str], suite: Suite) -> dict[str, float]:
    """Return the minimum accuracy of each category, macro or micro that an option names.

    Raises UserError for an unknown category or a value that is not an accuracy.
    """
    categories = [case.category for case in suite.cases if case.type != "text"]
    known = ["macro", "micro", *dict.fromkeys(categories)]
    if options and not categories:
        raise UserError("--fail-under needs accuracies, and texts have none; leave it out")
    thresholds = {}
    for option in options:
        name, _, value = option.rpartition("=")
        try:
            threshold = float(value)
        except ValueError:
            raise UserError(
                f"--fail-under {option!r}: write CATEGORY=SCORE, for example {known[-1]}=0.5"
            ) from None
        if name not in known:
            raise UserError(
                f"--fail-under {option!r}: there is no category {name!r}; "
                f"there are {', '.join(known)}"
            )
        if not 0 <= threshold <= 1:
            raise UserError(f"--fail-under {option!r}: an accuracy is between 0 and 1")
        thresholds[name] = threshold
    return thresholds


def missed_thresholds(result: Result, thresholds: dict[str, float]) -> list[str]:
    """Return a sentence for each accuracy of the checkpoint that is below its threshold."""
    sentences = []
    for name, threshold in thresholds.items():
        if name == "macro":
            accuracy = result.macro
        else:
            accuracy = summarise(result, None if name == "micro" else name, 1).accuracy
        if accuracy < threshold:
            sentences.append(f"{result.names[0]}: {name} is {accuracy:.3f}, below {threshold:g}")
    return sentences


# ---- scoring and output ----


def print_problems(suite: Suite, problems: list[str]) -> None:
    """Print what --validate-only found."""
    print("\n".join([*problems, f"{len(suite.cases)} cases, {len(problems)} problems"]))


def evaluate_baseline(args: argparse.Namespace, suite: Suite) -> Result | None:
    """Return the result of --baseline. Raise UserError if its numbers are not finite."""
    if not args.baseline:
        return None
    baseline = evaluate([args.baseline], suite, args.tokenizer, args.top_k)[0]
    if not baseline.finite:
        raise UserError(
            f"--baseline {args.baseline}: the log-probabilities are not finite, "
            "so the weights are broken; choose another one"
        )
    return baseline


def write_outputs(
    args: argparse.Namespace, ranked: list[Result], suite: Suite, baseline: Result | None
) -> None:
    """Print the results in the chosen form, and write the plot and the scalars."""
    if args.json:
        print_json(ranked, suite, args.top_k, baseline)
    elif args.csv:
        print_csv(ranked)
    elif args.markdown:
        print_markdown(ranked, args.top_k)
    else:
        print_tables(ranked, suite, args.top_k, baseline)
    if args.plot:
        plot_accuracies(ranked, args.plot)
    if args.tensorboard:
        write_tensorboard(ranked, args.tensorboard, args.top_k, picture=args.plot)


def score(args: argparse.Namespace, suite: Suite) -> int:
    """Score the checkpoints, print the results, and return the exit status."""
    thresholds = read_thresholds(args.fail_under, suite)
    patterns = args.checkpoints or [default_pattern()]
    paths = expand_globs(patterns, "checkpoint", known_checkpoints)
    results = evaluate(paths, suite, args.tokenizer, args.top_k)
    ranked = [result for result in results if result.finite]
    if not ranked:
        raise UserError(
            f"{', '.join(results[0].names)}: the log-probabilities are not finite, "
            "so the weights are broken; nothing to rank"
        )
    write_outputs(args, ranked, suite, evaluate_baseline(args, suite))
    missed = missed_thresholds(ranked[0], thresholds)
    broken = results[len(ranked) :]
    if broken:
        names = ", ".join(", ".join(result.names) for result in broken)
        print(f"not ranked, as log-probabilities are not finite: {names}", file=sys.stderr)
    for sentence in missed:
        print(sentence, file=sys.stderr)
    if missed:
        return MISSED
    return BROKEN if broken else 0


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    suite = load_suites(args)
    problems = list(lint(suite))
    if args.validate_only:
        print_problems(suite, problems)
        return INVALID if problems else 0
    if problems:
        print(
            f"{problems[0]} (1 of {len(problems)} problems; --validate-only lists all)",
            file=sys.stderr,
        )
    return score(args, suite)


if __name__ == "__main__":
    run_main(main)
