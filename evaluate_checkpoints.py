"""Which checkpoint is better, at what, and how sure is that? Scores checkpoints on probe cases.

    python evaluate_checkpoints.py --cases cases/wiki_basics.yaml
    python evaluate_checkpoints.py --checkpoints 'checkpoints/*.ckpt' --cases 'cases/*.yaml' --plot probes.png
    python evaluate_checkpoints.py --cases cases/grammar.yaml --baseline checkpoints/step-00000100.ckpt --fail-under grammar=0.6
    python evaluate_checkpoints.py --cases cases/grammar.yaml --validate-only

Checkpoints are ranked by accuracy, the mean over the categories; one is called best only where the interval of its paired
difference to each other one excludes zero. Exit status 1: a checkpoint's numbers are not finite; 3: --fail-under was not reached.
"""

import argparse
import glob
import sys

from pocketlm.checkpoint.format import known_checkpoints
from pocketlm.checkpoint.loading import best_checkpoint
from pocketlm.errors import UserError, run_main
from pocketlm.evaluation.cases import (
    Suite,
    known_suites,
    lint,
    load_suite,
    merge_suites,
    read_blimp,
)
from pocketlm.evaluation.exports import draw, print_csv, print_json, print_markdown, to_tensorboard
from pocketlm.evaluation.results import Result, evaluate, summarise
from pocketlm.evaluation.tables import print_tables
from pocketlm.files import expand_globs

FAILED = 3  # exit status where --fail-under was not reached


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score checkpoints on probes.")
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        help="files or quoted patterns; by default the unnamed run's, else the best run's",
    )
    parser.add_argument(
        "--cases", nargs="+", default=[], help="suites: YAML or JSON files, or quoted patterns"
    )
    parser.add_argument(
        "--blimp", metavar="DIR_OR_ZIP", help="BLiMP's own JSONL files, as a suite more"
    )
    parser.add_argument("--tokenizer", help="checked against each checkpoint's own; never needed")
    parser.add_argument(
        "--top-k", type=int, default=5, help="next tokens shown and counted (default %(default)s)"
    )
    parser.add_argument(
        "--baseline",
        metavar="CKPT",
        help="compare each checkpoint with this one, category by category",
    )
    parser.add_argument(
        "--validate-only",
        action="store_true",
        help="look for what is wrong with the suites, and score nothing",
    )
    parser.add_argument(
        "--fail-under",
        action="append",
        default=[],
        metavar="CATEGORY=SCORE",
        help=f"exit status {FAILED} below it",
    )
    parser.add_argument("--plot", metavar="FILE", help="a picture of accuracy against steps")
    parser.add_argument("--tensorboard", metavar="DIR", help="scalars at each checkpoint's step")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument(
        "--csv", action="store_true", help="print CSV, a row for each checkpoint and case"
    )
    form.add_argument("--markdown", action="store_true", help="print a table for a README")
    return parser.parse_args(argv)


def default_pattern() -> str:
    """The checkpoints of the unnamed run, or of the named one with the lowest validation loss, which is then said."""
    if glob.glob("checkpoints/*.ckpt"):
        return "checkpoints/*.ckpt"
    pattern = str(best_checkpoint().parent / "*.ckpt")
    print(f"scoring {pattern}", file=sys.stderr)
    return pattern


def read_thresholds(given: list[str], suite: Suite) -> dict[str, float]:
    """Category (or macro, micro) -> least accuracy."""
    known = [
        "macro",
        "micro",
        *dict.fromkeys(case.category for case in suite.cases if case.type != "text"),
    ]
    if given and len(known) == 2:
        raise UserError("--fail-under looks at accuracies, and a text has none; leave it out")
    thresholds = {}
    for each in given:
        name, _, value = each.rpartition("=")
        try:
            thresholds[name] = float(value)
        except ValueError:
            raise UserError(
                f"--fail-under {each!r}: write CATEGORY=SCORE, for example {known[-1]}=0.5"
            ) from None
        if name not in known:
            raise UserError(
                f"--fail-under {each!r}: there is no category {name!r}; there are {', '.join(known)}"
            )
        if not 0 <= thresholds[name] <= 1:
            raise UserError(f"--fail-under {each!r}: an accuracy lies from 0 to 1")
    return thresholds


def below(results: list[Result], thresholds: dict[str, float]) -> list[str]:
    """What the best checkpoint does not reach, in sentences."""
    said = []
    for name, least in thresholds.items():
        value = (
            results[0].macro
            if name == "macro"
            else summarise(results[0], None if name == "micro" else name, 1).accuracy
        )
        if value < least:
            said.append(f"{results[0].names[0]}: {name} is {value:.3f}, below {least:g}")
    return said


def main(argv: list[str] | None = None) -> int:

    args = parse_args(argv)
    if args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}; it must be 1 or more")
    if not args.cases and not args.blimp:
        raise UserError(
            "there is nothing to ask; give --cases FILE, for example cases/wiki_basics.yaml, or --blimp DIR_OR_ZIP"
        )
    suites = [load_suite(path) for path in expand_globs(args.cases, "suite", known_suites)] + (
        [read_blimp(args.blimp)] if args.blimp else []
    )
    suite = merge_suites(suites)
    wrong = list(lint(suite))
    if args.validate_only:
        print("\n".join([*wrong, f"{len(suite.cases)} cases, {len(wrong)} problems"]))
        return 2 if wrong else 0
    if wrong:
        print(
            f"{wrong[0]} (1 of {len(wrong)} remarks; --validate-only has them all)", file=sys.stderr
        )
    thresholds = read_thresholds(args.fail_under, suite)
    results = evaluate(
        expand_globs(args.checkpoints or [default_pattern()], "checkpoint", known_checkpoints),
        suite,
        args.tokenizer,
        args.top_k,
    )
    if not results[0].finite:
        raise UserError(
            f"{', '.join(results[0].names)}: the log-probabilities are not finite, so the weights are broken; nothing to rank"
        )
    ranked = [result for result in results if result.finite]
    baseline = (
        evaluate([args.baseline], suite, args.tokenizer, args.top_k)[0] if args.baseline else None
    )
    if baseline and not baseline.finite:
        raise UserError(
            f"--baseline {args.baseline}: the log-probabilities are not finite, so the weights are broken; take another one"
        )
    if args.json:
        print_json(ranked, suite, args.top_k, baseline)
    elif args.csv:
        print_csv(ranked)
    elif args.markdown:
        print_markdown(ranked, args.top_k)
    else:
        print_tables(ranked, suite, args.top_k, baseline)
    if args.plot:
        draw(ranked, args.plot)
    if args.tensorboard:
        to_tensorboard(ranked, args.tensorboard, args.top_k)
    if broken := results[len(ranked) :]:
        print(
            f"not ranked, as log-probabilities are not finite: {', '.join(n for r in broken for n in r.names)}",
            file=sys.stderr,
        )
    if missed := below(ranked, thresholds):
        print("\n".join(missed), file=sys.stderr)
        return FAILED
    return 1 if broken else 0


if __name__ == "__main__":
    run_main(main)
