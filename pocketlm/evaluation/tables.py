"""Tables of results for a terminal.

A table is made of `Column`s, each a label, a getter and a format, and of one row per checkpoint,
category or case. `print_tables` prints all of them.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pocketlm.evaluation.cases import Case, Suite
from pocketlm.evaluation.results import (
    SCORINGS,
    Result,
    Summary,
    by_step,
    first_step_above_chance,
    learned_and_forgotten,
    mean,
    summaries_by_category,
    summarise,
)
from pocketlm.evaluation.scoring import Score
from pocketlm.evaluation.statistics import Interval, mcnemar, spearman

MAX_EXAMPLES = 6  # cases named in a line
WIDTH = 160  # columns where the output is not a terminal

T = TypeVar("T")


# ---- cells, columns and tables ----


def format_percent(value: float | None) -> str:
    """Return a share as a percentage; an empty text for None."""
    return "" if value is None else f"{value:.1%}"


def format_number(value: float | None, form: str = ".3f") -> str:
    """Return a number in the format; an empty text for None."""
    return "" if value is None else format(value, form)


def format_interval(interval: Interval | None, form: str = ".1%") -> str:
    """Return "[low, high]" in the format; an empty text for None."""
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column: its label, the value of a row, and the format of the value."""

    label: str
    value: Callable[[T], Any]
    form: str = ""

    def cell(self, row: T) -> str:
        """Return the text of a row in this column, which is empty if the value is None."""
        value = self.value(row)
        return "" if value is None else format(value, self.form)


def cells_of(columns: Sequence[Column[T]], rows: Iterable[T]) -> list[list[str]]:
    """Return the text of each row in each column."""
    return [[column.cell(row) for column in columns] for row in rows]


def labels_of(columns: Iterable[Column[Any]]) -> list[str]:
    """Return the labels of the columns."""
    return [column.label for column in columns]


def make_table(title: str, labels: list[str], rows: list[list[str]], n_text: int = 1) -> Table:
    """Return a table without its empty columns. The first `n_text` columns hold text."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    shown = [i for i, _ in enumerate(labels) if any(row[i] for row in rows)]
    for i in shown:
        if i < n_text:
            table.add_column(labels[i])
            continue
        lines: list[str] = []
        for row in [labels, *rows]:
            lines += row[i].split("\n")
        widest = max(len(line) for line in lines)
        table.add_column(labels[i], justify="right", no_wrap=True, min_width=widest)
    for row in rows:
        table.add_row(*(escape(row[i]) for i in shown))
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table; if it is wider than the terminal, widen the console and cut no number."""
    options = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=options).minimum)
    console.print(table)


# ---- the report ----


def print_tables(results: list[Result], suite: Suite, top_k: int, baseline: Result | None) -> None:
    """Print the ranking, the best checkpoint's categories and cases, and all comparisons."""
    console = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
    first = results[0]
    print_table(console, ranking_table(results, suite))
    console.print(verdict(results), markup=False, soft_wrap=True)
    if first.graded:
        for table in category_tables(first, top_k):
            print_table(console, table)
    print_table(console, case_table(first, top_k))
    if len({result.step for result in results}) > 1 and first.graded:
        print_table(console, steps_table(results))
        for line in flip_lines(results):
            console.print(line, markup=False, soft_wrap=True)
    if baseline is not None and first.graded:
        print_table(console, baseline_table(results, baseline))


def headline(result: Result) -> float | None:
    """Return the macro accuracy, or None without graded cases."""
    return result.macro if result.graded else None


def headline_interval(result: Result) -> str:
    """Return the interval of the macro accuracy as text."""
    return format_interval(result.macro_interval if result.graded else None)


RANKING: list[Column[Result]] = [
    Column("checkpoint", lambda r: "\n= ".join(r.names)),
    Column("step", lambda r: r.step, ","),
    Column("tokens", lambda r: r.tokens, ","),
    Column("val loss", lambda r: r.val_loss, ".4f"),
    Column("accuracy", headline, ".1%"),
    Column("95 % interval", headline_interval),
    Column("p(correct)", lambda r: mean([score.p_correct for score in r.scores]), ".3f"),
    Column("log-prob", lambda r: r.mean_logprob, ".3f"),
    Column("bits per byte", lambda r: mean([score.bits_per_byte for score in r.scores]), ".4f"),
]


def ranking_table(results: list[Result], suite: Suite) -> Table:
    """Return a table with a row for each checkpoint, the best first."""
    first = results[0]
    ties = sum(score.tie for score in first.graded)
    title = (
        f"{suite.name}: {len(suite.cases)} cases, {len(first.graded)} right or wrong, "
        f"in {len(first.category_names)} categories; 0 skipped, {ties} ties"
    )
    rows = [[str(i), *cells] for i, cells in enumerate(cells_of(RANKING, results), 1)]
    return make_table(title, ["", *labels_of(RANKING)], rows, n_text=2)


def verdict(results: list[Result]) -> str:
    """Name the best checkpoint, or those tied with the first by their paired intervals."""
    first, others = results[0], results[1:]
    if not first.graded or not others:
        return (
            "accuracy is the mean over categories; its interval combines the categories' Wilson "
            "intervals (MOVER)\n"
        )
    comparisons = [(other, *first.difference_from(other)) for other in others]
    tied = [
        f"{other.names[0]} (behind by {difference:.1%} {format_interval(interval)})"
        for other, difference, interval in comparisons
        if interval[0] <= 0
    ]
    if tied:
        names = ", ".join(tied)
        return f"{first.names[0]} is tied with {names}: the paired 95 % interval includes zero\n"
    other, difference, interval = comparisons[0]
    wins, losses, p = mcnemar(first.correct, other.correct)
    return (
        f"best: {first.names[0]}, ahead of {other.names[0]} by {difference:.1%} "
        f"{format_interval(interval)}; {wins} cases won, {losses} lost, McNemar p = {p:.3g}\n"
    )


# ---- one checkpoint ----

ACCURACY: list[Column[Summary]] = [
    Column("n", lambda s: s.n),
    Column("ties", lambda s: s.ties),
    Column("accuracy, 95 %", lambda s: accuracy_text(s.accuracy, s.interval)),
    Column("chance", lambda s: s.chance, ".1%"),
    Column("centred", lambda s: s.centred, "+.2f"),
]


def probability_columns(top_k: int) -> list[Column[Summary]]:
    """Return the columns of the table of probabilities."""
    return [
        Column("p(correct), 95 %", p_correct_text),
        Column("margin", lambda s: s.margin, "+.2f"),
        Column("Brier", lambda s: s.brier, ".3f"),
        Column("log-prob", lambda s: s.logprob, ".2f"),
        Column("greedy", lambda s: s.greedy, ".1%"),
        Column("first token: top-1", lambda s: s.top1, ".1%"),
        Column(f"top-{top_k}", lambda s: s.topk, ".1%"),
        Column("MRR", lambda s: s.mrr, ".3f"),
    ]


def accuracy_text(accuracy: float, interval: Interval) -> str:
    """Return an accuracy with its interval."""
    return f"{accuracy:.1%} {format_interval(interval)}"


def p_correct_text(summary: Summary) -> str:
    """Return the probability of the right candidates with its interval."""
    interval = format_interval(summary.p_correct_interval, ".2f")
    return f"{format_number(summary.p_correct)} {interval}".strip()


def category_tables(result: Result, top_k: int) -> list[Table]:
    """Return two tables with a row for each category: accuracies, and probabilities."""
    summaries = summaries_by_category(result, top_k)
    by_scoring = [scoring_column(scoring) for scoring in SCORINGS]
    accuracy, probability = [*ACCURACY, *by_scoring], probability_columns(top_k)
    rows = named_rows(summaries, accuracy)
    macro = accuracy_text(result.macro, result.macro_interval)
    rows.append(["macro", str(len(result.graded)), "", macro, "", "", *[""] * len(SCORINGS)])
    title = f"{result.names[0]}, by category"
    return [
        make_table(title, ["category", *labels_of(accuracy)], rows),
        make_table(
            f"{title}: probabilities",
            ["category", *labels_of(probability)],
            named_rows(summaries, probability),
        ),
    ]


def scoring_column(scoring: str) -> Column[Summary]:
    """Return the column of the accuracy under one scoring."""
    return Column(f"by {scoring}", lambda s: s.by.get(scoring), ".1%")


def named_rows(
    summaries: dict[str, Summary], columns: Sequence[Column[Summary]]
) -> list[list[str]]:
    """Return the cells of each summary after its name."""
    rows = cells_of(columns, summaries.values())
    return [[name, *cells] for name, cells in zip(summaries, rows, strict=True)]


def case_columns(top_k: int) -> list[Column[Score]]:
    """Return the columns of the table of cases."""
    return [
        Column("case", lambda score: score.case.id),
        Column("right", lambda score: repr(right_text(score.case))),
        Column("", lambda score: {None: "", 0.0: "·", 1.0: "✓"}.get(score.correct, "=")),
        Column(f"top {top_k} next tokens, or what was generated", output_text),
        Column("log-prob", lambda score: score.logprob, ".2f"),
        Column("rank", lambda score: score.rank or score.first_token_rank, ","),
    ]


def right_text(case: Case) -> str:
    """Return the right continuation of a case, or what it is recognised by."""
    if case.answers:
        return case.answers[0]
    return case.good or case.continuation or case.match or case.file or case.text[:40]


def output_text(score: Score) -> str:
    """Return the text that was generated, the most likely next tokens, or the bits per byte."""
    if score.bits_per_byte is not None:
        return f"{score.bits_per_byte:.4f} bits per byte over {score.bytes:,} bytes"
    if score.generated:
        return repr(score.generated)
    return "  ".join(f"{token!r} {p:.2f}" for token, p in score.top)


def case_table(result: Result, top_k: int) -> Table:
    """Return a table with a row for each case."""
    title = f"{result.names[0]}, case by case"
    merged = sum(score.merged for score in result.scores)
    if merged:
        title += f"; in {merged} cases one token spans the prompt's end and the answer's start"
    columns = case_columns(top_k)
    return make_table(title, labels_of(columns), cells_of(columns, result.scores), n_text=4)


# ---- several checkpoints ----


def steps_table(results: list[Result]) -> Table:
    """Return a table of each category's accuracy by step, with its rank correlation with it."""
    ordered, names = by_step(results), results[0].category_names
    steps = [result.step for result in ordered]
    macro = [result.macro for result in ordered]
    accuracies = [[summarise(result, name, 1).accuracy for result in ordered] for name in names]
    rows = []
    for i, result in enumerate(ordered):
        cells = [format_percent(values[i]) for values in (macro, *accuracies)]
        rows.append([f"{result.step:,}", f"{result.tokens:,}", *cells])
    correlations = [spearman(steps, values) for values in (macro, *accuracies)]
    cells = [format_number(value, "+.2f") for value in correlations]
    rows.append(["rank correlation", "with step", *cells])
    first_steps = [first_step_above_chance(results, name) for name in names]
    cells = ["never" if step is None else f"{step:,}" for step in first_steps]
    rows.append(["above chance", "from step", "", *cells])
    return make_table("over training", ["step", "tokens", "macro", *names], rows)


def flip_lines(results: list[Result]) -> list[str]:
    """Return the cases that were learned and forgotten between the last two checkpoints."""
    before, after = by_step(results)[-2:]
    learned, forgotten = learned_and_forgotten(before, after)
    lines = []
    for word, ids in (("learned", learned), ("forgotten", forgotten)):
        line = f"{word} from step {before.step:,} to {after.step:,}: {len(ids)}"
        if ids:
            others = " and others" if len(ids) > MAX_EXAMPLES else ""
            line += f" ({', '.join(ids[:MAX_EXAMPLES])}{others})"
        lines.append(line)
    return lines


def baseline_table(results: list[Result], baseline: Result) -> Table:
    """Return a table of paired differences from the baseline, by category.

    A star marks a paired interval that excludes zero.
    """
    names = baseline.category_names
    rows = []
    for result in results:
        macro, interval = result.difference_from(baseline)
        wins, losses, p = mcnemar(result.correct, baseline.correct)
        differences = result.correct - baseline.correct
        row = [result.names[0], f"{macro:+.1%} {format_interval(interval)}"]
        row += [str(wins), str(losses), f"{p:.3g}"]
        for name in names:
            mask = result.mask(name)
            low, high = result.bootstrap.mean(differences, np.flatnonzero(mask))
            star = "*" if low > 0 or high < 0 else ""
            row.append(f"{differences[mask].mean():+.1%}{star}")
        rows.append(row)
    title = f"against {baseline.names[0]}; * is a paired interval that excludes zero"
    labels = ["checkpoint", "macro, paired 95 %", "won", "lost", "McNemar p", *names]
    return make_table(title, labels, rows)
