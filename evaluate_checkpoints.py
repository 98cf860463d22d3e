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
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import intervals
from cases import Suite, joined, load_suite, problems, read_blimp
from checkpoint import best_checkpoint, known_checkpoints, load_checkpoint
from errors import UserError, run_main
from intervals import Interval
from scoring import Encoded, Score, encode_case, score_cases

FAILED = 3  # exit status where --fail-under was not reached


@dataclass(frozen=True)
class Result:
    """A checkpoint and its scores. `names` are all the files with these weights."""

    names: list[str]
    step: int
    tokens: int
    val_loss: float | None
    weights_sha256: str
    tokenizer_sha256: str
    scores: list[Score]

    @property
    def finite(self) -> bool:
        return all(score.finite for score in self.scores)

    @cached_property
    def graded(self) -> list[Score]:
        """The scores that are right or wrong: all but those of texts."""
        return [score for score in self.scores if score.correct is not None]

    @cached_property
    def correct(self) -> np.ndarray:
        return np.array([score.correct for score in self.graded])

    @cached_property
    def categories(self) -> list[str]:
        """Of each graded case."""
        return [score.case.category for score in self.graded]

    @cached_property
    def resamples(self) -> intervals.Resamples:
        return intervals.resamples(tuple(self.categories), tuple(score.case.group for score in self.graded))

    @cached_property
    def macro(self) -> float:
        """Accuracy, the mean over categories: the headline."""
        return intervals.macro_mean(self.correct, self.categories) if self.graded else math.nan

    @cached_property
    def macro_interval(self) -> Interval:
        of = np.array(self.categories)
        return intervals.mean_of_proportions([self.share(of == category) for category in dict.fromkeys(self.categories)])

    def share(self, of: np.ndarray) -> tuple[float, float]:
        """(right, n) of the graded cases `of`, for an interval: n is of independent cases."""
        groups = [score.case.group for score, inside in zip(self.graded, of, strict=True) if inside]
        n = intervals.independent(self.correct[of], groups)
        return float(self.correct[of].mean()) * n, n

    @cached_property
    def mean_logprob(self) -> float:
        """Nats of the right continuations, where there are such."""
        return mean([score.logprob for score in self.scores])

    def ahead_of(self, other: "Result") -> tuple[float, Interval]:
        """Difference of the two headlines, and its interval over the same cases, drawn in pairs."""
        apart = self.correct - other.correct
        return self.macro - other.macro, self.resamples.macro(apart)


@dataclass(frozen=True)
class Summary:
    """A category, or all cases together, under one checkpoint. None: no case there has such a number."""

    n: int
    ties: int
    accuracy: float
    interval: Interval  # of the accuracy: Wilson's, with the groups' dependence
    chance: float  # what guessing scores; 0 where there is nothing to choose from
    centred: float  # (accuracy - chance) / (1 - chance): 0 is guessing, 1 is perfect
    by: dict[str, float]  # accuracy where candidates are compared by sum, token, byte, pmi
    p_correct: float | None
    p_correct_interval: Interval | None  # by cluster bootstrap
    margin: float | None
    brier: float | None
    logprob: float | None
    greedy: float | None
    mrr: float | None  # of the right continuation's first token, among all tokens
    top1: float | None
    topk: float | None


def summarise(result: Result, category: str | None, top_k: int) -> Summary:
    """Of one category, or of all graded cases (the micro average)."""
    of = np.array([category in (None, each) for each in result.categories])
    scores = [score for score, inside in zip(result.graded, of, strict=True) if inside]
    accuracy, chance = float(result.correct[of].mean()), mean([score.case.chance or 0.0 for score in scores])
    p = np.array([math.nan if score.p_correct is None else score.p_correct for score in result.graded])
    chosen = np.flatnonzero(of & ~np.isnan(p))
    ranks = [score.first_token_rank for score in scores if score.first_token_rank]
    return Summary(
        n=len(scores),
        ties=sum(score.tie for score in scores),
        accuracy=accuracy,
        interval=intervals.wilson(*result.share(of)),
        chance=chance,
        centred=(accuracy - chance) / (1 - chance),
        by={name: mean(values) for name in ("sum", "token", "byte", "pmi") if (values := correct_by(scores, name))},
        p_correct=mean([score.p_correct for score in scores]),
        p_correct_interval=result.resamples.mean(p, chosen) if len(chosen) else None,
        margin=mean([score.margin for score in scores]),
        brier=mean([score.brier for score in scores]),
        logprob=mean([score.logprob for score in scores]),
        greedy=mean([score.greedy for score in scores]),
        mrr=mean([1 / rank for rank in ranks]),
        top1=mean([rank == 1 for rank in ranks]),
        topk=mean([rank <= top_k for rank in ranks]),
    )


def correct_by(scores: list[Score], name: str) -> list[float]:
    return [score.correct_by[name] for score in scores if name in score.correct_by]


def mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


# ---- checkpoints -> results ------------------------------------------------------------------------------------------


def evaluate(paths: list[str], suite: Suite, tokenizer_name: str | None = None, top_k: int = 5) -> list[Result]:
    """A result for each set of weights, the best first and those with numbers that are not finite last.

    Files with the same weights and tokenizer share one; cases are encoded once for each tokenizer.
    """
    results: dict[tuple[str, str], Result] = {}
    encoded: dict[tuple[str, int], list[Encoded]] = {}
    for path in paths:
        checkpoint = load_checkpoint(path, tokenizer_name)
        identity = checkpoint.weights_sha256, checkpoint.tokenizer.fingerprint
        if same := results.get(identity):
            same.names.append(path)
            continue
        print(f"scoring {path}", file=sys.stderr)
        tokenizer, context = checkpoint.tokenizer, checkpoint.model.config.max_seq_len
        if (key := (tokenizer.fingerprint, context)) not in encoded:
            encoded[key] = [encode_case(tokenizer, case, context) for case in suite.cases]
        scores = score_cases(checkpoint.model, tokenizer, encoded[key], top_k)
        results[identity] = Result([path], checkpoint.step, checkpoint.tokens, checkpoint.val_loss, *identity, scores)
    return sorted(results.values(), key=standing)


def standing(result: Result) -> tuple:
    """What results are sorted by: accuracy over categories, then the log-probability of what is right, then bits per byte."""
    if not result.finite:
        return (1,)
    bits = mean([score.bits_per_byte for score in result.scores])
    return 0, -(result.macro if result.graded else 0.0), -(result.mean_logprob or 0.0), bits or 0.0


def emerged(results: list[Result], category: str) -> int | None:
    """The first step at which the interval of a category's accuracy lies above chance, and stays there."""
    first = None
    for result in sorted(results, key=lambda r: r.step):
        summary = summarise(result, category, 1)
        above = summary.interval[0] > summary.chance
        first = (result.step if first is None else first) if above else None
    return first


def flips(before: Result, after: Result) -> tuple[list[str], list[str]]:
    """Ids of the cases that were learned from one checkpoint to the next, and of those that were forgotten."""
    pairs = list(zip(before.graded, after.graded, strict=True))
    return [b.case.id for a, b in pairs if a.correct < b.correct], [b.case.id for a, b in pairs if a.correct > b.correct]


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score checkpoints on probes.")
    parser.add_argument("--checkpoints", nargs="+", help="files or quoted patterns; by default the unnamed run's, else the best run's")
    parser.add_argument("--cases", nargs="+", default=[], help="suites: YAML or JSON files, or quoted patterns")
    parser.add_argument("--blimp", metavar="DIR_OR_ZIP", help="BLiMP's own JSONL files, as a suite more")
    parser.add_argument("--tokenizer", help="checked against each checkpoint's own; never needed")
    parser.add_argument("--top-k", type=int, default=5, help="next tokens shown and counted (default %(default)s)")
    parser.add_argument("--baseline", metavar="CKPT", help="compare each checkpoint with this one, category by category")
    parser.add_argument("--validate-only", action="store_true", help="look for what is wrong with the suites, and score nothing")
    parser.add_argument("--fail-under", action="append", default=[], metavar="CATEGORY=SCORE", help=f"exit status {FAILED} below it")
    parser.add_argument("--plot", metavar="FILE", help="a picture of accuracy against steps")
    parser.add_argument("--tensorboard", metavar="DIR", help="scalars at each checkpoint's step")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV, a row for each checkpoint and case")
    form.add_argument("--markdown", action="store_true", help="print a table for a README")
    return parser.parse_args(argv)


def default_pattern() -> str:
    """The checkpoints of the unnamed run, or of the named one with the lowest validation loss, which is then said."""
    if glob.glob("checkpoints/*.ckpt"):
        return "checkpoints/*.ckpt"
    pattern = str(best_checkpoint().parent / "*.ckpt")
    print(f"scoring {pattern}", file=sys.stderr)
    return pattern


def found(patterns: list[str], what: str) -> list[str]:
    """The files of the patterns, once each. Raises UserError for a pattern without one."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        matching = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not matching:
            raise UserError(f"no {what} matches {pattern!r}" + (f"; {known_checkpoints()}" if what == "checkpoint" else ""))
        paths |= dict.fromkeys(matching)
    return list(paths)


def read_thresholds(given: list[str], suite: Suite) -> dict[str, float]:
    """category (or macro, micro) -> least accuracy."""
    known = ["macro", "micro", *dict.fromkeys(case.category for case in suite.cases if case.type != "text")]
    if given and len(known) == 2:
        raise UserError("--fail-under looks at accuracies, and a text has none; leave it out")
    thresholds = {}
    for each in given:
        name, _, value = each.rpartition("=")
        try:
            thresholds[name] = float(value)
        except ValueError:
            raise UserError(f"--fail-under {each!r}: write CATEGORY=SCORE, for example {known[-1]}=0.5") from None
        if name not in known:
            raise UserError(f"--fail-under {each!r}: there is no category {name!r}; there are {', '.join(known)}")
        if not 0 <= thresholds[name] <= 1:
            raise UserError(f"--fail-under {each!r}: an accuracy lies from 0 to 1")
    return thresholds


def below(results: list[Result], thresholds: dict[str, float]) -> list[str]:
    """What the best checkpoint does not reach, in sentences."""
    said = []
    for name, least in thresholds.items():
        value = results[0].macro if name == "macro" else summarise(results[0], None if name == "micro" else name, 1).accuracy
        if value < least:
            said.append(f"{results[0].names[0]}: {name} is {value:.3f}, below {least:g}")
    return said


def main(argv: list[str] | None = None) -> int:
    import probe_report as report

    args = parse_args(argv)
    if args.top_k < 1:
        raise UserError(f"--top-k is {args.top_k}; it must be 1 or more")
    if not args.cases and not args.blimp:
        raise UserError("there is nothing to ask; give --cases FILE, for example cases/wiki_basics.yaml, or --blimp DIR_OR_ZIP")
    suites = [load_suite(path) for path in found(args.cases, "suite")] + ([read_blimp(args.blimp)] if args.blimp else [])
    suite = joined(suites)
    wrong = list(problems(suite))
    if args.validate_only:
        print("\n".join([*wrong, f"{len(suite.cases)} cases, {len(wrong)} problems"]))
        return 2 if wrong else 0
    if wrong:
        print(f"{suite.name} has {len(wrong)} problems; --validate-only names them", file=sys.stderr)
    thresholds = read_thresholds(args.fail_under, suite)
    results = evaluate(found(args.checkpoints or [default_pattern()], "checkpoint"), suite, args.tokenizer, args.top_k)
    if not results[0].finite:
        raise UserError(f"{', '.join(results[0].names)}: the log-probabilities are not finite, so the weights are broken; nothing to rank")
    ranked = [result for result in results if result.finite]
    baseline = evaluate([args.baseline], suite, args.tokenizer, args.top_k)[0] if args.baseline else None
    if baseline and not baseline.finite:
        raise UserError(f"--baseline {args.baseline}: the log-probabilities are not finite, so the weights are broken; take another one")
    if args.json:
        report.print_json(ranked, suite, args.top_k, baseline)
    elif args.csv:
        report.print_csv(ranked)
    elif args.markdown:
        report.print_markdown(ranked, args.top_k)
    else:
        report.print_tables(ranked, suite, args.top_k, baseline)
    if args.plot:
        report.draw(ranked, args.plot)
    if args.tensorboard:
        report.to_tensorboard(ranked, args.tensorboard, args.top_k)
    if broken := results[len(ranked) :]:
        print(f"not ranked, as log-probabilities are not finite: {', '.join(n for r in broken for n in r.names)}", file=sys.stderr)
    if missed := below(ranked, thresholds):
        print("\n".join(missed), file=sys.stderr)
        return FAILED
    return 1 if broken else 0


if __name__ == "__main__":
    run_main(main)
