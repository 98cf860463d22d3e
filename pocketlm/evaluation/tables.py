"""What evaluate_checkpoints.py says: tables on a terminal, JSON, CSV, markdown, a picture, TensorBoard."""

import sys

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocketlm.evaluation.cases import Suite
from pocketlm.evaluation.results import (
    Result,
    Summary,
    first_step_above_chance,
    learned_and_forgotten,
    mean,
    summarise,
)
from pocketlm.evaluation.statistics import Interval, mcnemar, spearman

EXAMPLES = 6  # flipped cases named in a line


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def between(interval: Interval | None, form: str = ".1%") -> str:
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def categories_of(result: Result) -> list[str]:
    return list(dict.fromkeys(result.categories))


def rows_by_category(result: Result, top_k: int) -> dict[str, Summary]:
    """The summary of each category, and of all cases together as "micro"."""
    rows = {category: summarise(result, category, top_k) for category in categories_of(result)}
    return rows | ({"micro": summarise(result, None, top_k)} if result.graded else {})


def by_step(results: list[Result]) -> list[Result]:
    return sorted(results, key=lambda result: result.step)


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def print_tables(results: list[Result], suite: Suite, top_k: int, baseline: Result | None) -> None:
    """The ranking, the categories and cases of the first, what was learned over the steps, the comparison with a baseline."""
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 160)
    first = results[0]
    show(out, ranking_table(results, suite))
    out.print(verdict(results), markup=False, soft_wrap=True)
    if first.graded:
        for part in category_tables(first, top_k):
            show(out, part)
    show(out, case_table(first, top_k))
    if len({result.step for result in results}) > 1 and first.graded:
        show(out, steps_table(results))
        for line in flip_lines(results):
            out.print(line, markup=False, soft_wrap=True)
    if baseline is not None and first.graded:
        show(out, baseline_table(results, baseline))


def show(out: Console, made: Table) -> None:
    """Print a table; where the numbers do not fit the terminal its lines are too long, but no number is cut."""
    out.width = max(
        out.width, out.measure(made, options=out.options.update(max_width=10_000)).minimum
    )
    out.print(made)


def table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> Table:
    """The first `left` columns hold text, the others numbers; a column without any content is left out."""
    made = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    shown = [i for i, _ in enumerate(columns) if any(row[i] for row in rows)]
    for i in shown:
        widest = max(len(line) for row in [columns, *rows] for line in row[i].split("\n"))
        number = dict(justify="right", no_wrap=True, min_width=widest) if i >= left else {}
        made.add_column(columns[i], **number)
    for row in rows:
        made.add_row(*(escape(row[i]) for i in shown))
    return made


def ranking_table(results: list[Result], suite: Suite) -> Table:
    first = results[0]
    ties = sum(score.tie for score in first.graded)
    counts = f"{len(first.graded)} right or wrong, in {len(set(first.categories))} categories; 0 skipped, {ties} ties"
    columns = [
        "",
        "checkpoint",
        "step",
        "tokens",
        "val loss",
        "accuracy",
        "95 % interval",
        "p(correct)",
        "log-prob",
        "bits per byte",
    ]
    rows = [
        [
            str(place),
            "\n= ".join(r.names),
            f"{r.step:,}",
            f"{r.tokens:,}",
            number(r.val_loss, ".4f"),
            percent(r.macro) if r.graded else "",
            between(r.macro_interval) if r.graded else "",
            number(mean([score.p_correct for score in r.scores])),
            number(r.mean_logprob),
            number(mean([score.bits_per_byte for score in r.scores]), ".4f"),
        ]
        for place, r in enumerate(results, 1)
    ]
    return table(f"{suite.name}: {len(suite.cases)} cases, {counts}", columns, rows, left=2)


def verdict(results: list[Result]) -> str:
    """Which is best, in a sentence that says no more than the paired intervals do."""
    first, others = results[0], results[1:]
    if not first.graded or not others:
        return "accuracy is the mean over categories; its interval is made of those of the categories, which are Wilson's\n"
    tied = [(other, *first.difference_from(other)) for other in others]
    close = [(other, apart, interval) for other, apart, interval in tied if interval[0] <= 0]
    if not close:
        other, apart, interval = tied[0]
        wins, losses, p = mcnemar(first.correct, other.correct)
        return (
            f"best: {first.names[0]}, ahead of {other.names[0]} by {apart:.1%} {between(interval)}; "
            f"{wins} cases won, {losses} lost, McNemar p = {p:.3g}\n"
        )
    said = ", ".join(
        f"{other.names[0]} (behind by {apart:.1%} {between(interval)})"
        for other, apart, interval in close
    )
    return f"{first.names[0]} is tied with {said}: the paired 95 % interval holds zero\n"


def category_tables(result: Result, top_k: int) -> list[Table]:
    """All that is known of each category, under one checkpoint: what is right, and how sure the model is of it."""
    scorings = ("sum", "token", "byte", "pmi")
    found = rows_by_category(result, top_k)
    right = [
        [
            name,
            str(s.n),
            str(s.ties),
            f"{percent(s.accuracy)} {between(s.interval)}",
            percent(s.chance),
            f"{s.centred:+.2f}",
        ]
        + [percent(s.by.get(scoring)) for scoring in scorings]
        for name, s in found.items()
    ]
    right.append(
        [
            "macro",
            str(len(result.graded)),
            "",
            f"{percent(result.macro)} {between(result.macro_interval)}",
            *[""] * 6,
        ]
    )
    sure = [
        [
            name,
            f"{number(s.p_correct)} {between(s.p_correct_interval, '.2f')}".strip(),
            number(s.margin, "+.2f"),
            number(s.brier),
        ]
        + [
            number(s.logprob, ".2f"),
            percent(s.greedy),
            percent(s.top1),
            percent(s.topk),
            number(s.mrr),
        ]
        for name, s in found.items()
    ]
    columns = [
        "category",
        "n",
        "ties",
        "accuracy, 95 %",
        "chance",
        "centred",
        *(f"by {name}" for name in scorings),
    ]
    others = [
        "category",
        "p(correct), 95 %",
        "margin",
        "Brier",
        "log-prob",
        "greedy",
        "first token: top-1",
        f"top-{top_k}",
        "MRR",
    ]
    title = f"{result.names[0]}, by category"
    return [table(title, columns, right), table(f"{title}: probabilities", others, sure)]


def case_table(result: Result, top_k: int) -> Table:
    merged = sum(score.merged for score in result.scores)
    note = (
        f"; in {merged} cases the tokenizer joins the prompt's end and the answer's begin in one token"
        if merged
        else ""
    )
    rows = []
    for score in result.scores:
        case = score.case
        right = (
            case.answers[0]
            if case.answers
            else case.good or case.continuation or case.match or case.file or case.text[:40]
        )
        mark = {None: "", 0.0: "·", 1.0: "✓"}.get(score.correct, "=")
        rank = score.rank or score.first_token_rank
        shown = (
            repr(score.generated)
            if score.generated
            else "  ".join(f"{token!r} {p:.2f}" for token, p in score.top)
        )
        if score.bits_per_byte is not None:
            shown = f"{score.bits_per_byte:.4f} bits per byte over {score.bytes:,} bytes"
        rows.append(
            [
                case.id,
                repr(right),
                mark,
                shown,
                number(score.logprob, ".2f"),
                f"{rank:,}" if rank else "",
            ]
        )
    columns = [
        "case",
        "right",
        "",
        f"top {top_k} next tokens, or what was generated",
        "log-prob",
        "rank",
    ]
    return table(f"{result.names[0]}, case by case{note}", columns, rows, left=4)


def steps_table(results: list[Result]) -> Table:
    """Accuracy of every category against steps."""
    ordered = by_step(results)
    categories = categories_of(results[0])
    steps = [r.step for r in ordered]
    accuracy = {c: [summarise(r, c, 1).accuracy for r in ordered] for c in categories}
    rows = [
        [
            f"{r.step:,}",
            f"{r.tokens:,}",
            percent(r.macro),
            *(percent(accuracy[c][i]) for c in categories),
        ]
        for i, r in enumerate(ordered)
    ]
    rising = [
        spearman(steps, values) for values in ([r.macro for r in ordered], *accuracy.values())
    ]
    rows.append(["rank correlation", "with step", *(number(x, "+.2f") for x in rising)])
    firsts = [first_step_above_chance(results, c) for c in categories]
    rows.append(
        [
            "above chance",
            "from step",
            "",
            *("never" if step is None else f"{step:,}" for step in firsts),
        ]
    )
    return table("over training", ["step", "tokens", "macro", *categories], rows)


def flip_lines(results: list[Result]) -> list[str]:
    """What the last checkpoint learned and forgot since the one before it."""
    before, after = by_step(results)[-2:]
    learned, forgotten = learned_and_forgotten(before, after)
    lines = []
    for word, ids in (("learned", learned), ("forgotten", forgotten)):
        named = ", ".join(ids[:EXAMPLES]) + (" and others" if len(ids) > EXAMPLES else "")
        lines.append(
            f"{word} from step {before.step:,} to {after.step:,}: {len(ids)}"
            + (f" ({named})" if ids else "")
        )
    return lines


def baseline_table(results: list[Result], baseline: Result) -> Table:
    """Differences to the baseline over the same cases, with paired intervals; a star where one excludes zero."""
    categories = categories_of(baseline)
    rows = []
    for r in results:
        apart, interval = r.difference_from(baseline)
        wins, losses, p = mcnemar(r.correct, baseline.correct)
        difference, of = r.correct - baseline.correct, np.array(r.categories)
        cells = []
        for category in categories:
            low, high = r.resamples.mean(difference, np.flatnonzero(of == category))
            cells.append(
                f"{difference[of == category].mean():+.1%}{'*' if low > 0 or high < 0 else ''}"
            )
        rows.append(
            [
                r.names[0],
                f"{apart:+.1%} {between(interval)}",
                str(wins),
                str(losses),
                f"{p:.3g}",
                *cells,
            ]
        )
    columns = ["checkpoint", "macro, paired 95 %", "won", "lost", "McNemar p", *categories]
    return table(
        f"against {baseline.names[0]}; * is a paired interval that excludes zero", columns, rows
    )
