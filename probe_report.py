"""What evaluate_checkpoints.py says: tables on a terminal, JSON, CSV, markdown, a picture, TensorBoard."""

import csv
import dataclasses
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import intervals
from cases import Suite
from errors import UserError
from intervals import Interval, mcnemar, spearman
from results import Result, Summary, emerged, flips, mean, summarise

SCHEMA = 2  # of the JSON; 1 was a list of cases without categories
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
    out.width = max(out.width, out.measure(made, options=out.options.update(max_width=10_000)).minimum)
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
    columns = ["", "checkpoint", "step", "tokens", "val loss", "accuracy", "95 % interval", "p(correct)", "log-prob", "bits per byte"]
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
    tied = [(other, *first.ahead_of(other)) for other in others]
    close = [(other, apart, interval) for other, apart, interval in tied if interval[0] <= 0]
    if not close:
        other, apart, interval = tied[0]
        wins, losses, p = mcnemar(first.correct, other.correct)
        return (
            f"best: {first.names[0]}, ahead of {other.names[0]} by {apart:.1%} {between(interval)}; "
            f"{wins} cases won, {losses} lost, McNemar p = {p:.3g}\n"
        )
    said = ", ".join(f"{other.names[0]} (behind by {apart:.1%} {between(interval)})" for other, apart, interval in close)
    return f"{first.names[0]} is tied with {said}: the paired 95 % interval holds zero\n"


def category_tables(result: Result, top_k: int) -> list[Table]:
    """All that is known of each category, under one checkpoint: what is right, and how sure the model is of it."""
    scorings = ("sum", "token", "byte", "pmi")
    found = rows_by_category(result, top_k)
    right = [
        [name, str(s.n), str(s.ties), f"{percent(s.accuracy)} {between(s.interval)}", percent(s.chance), f"{s.centred:+.2f}"]
        + [percent(s.by.get(scoring)) for scoring in scorings]
        for name, s in found.items()
    ]
    right.append(["macro", str(len(result.graded)), "", f"{percent(result.macro)} {between(result.macro_interval)}", *[""] * 6])
    sure = [
        [name, f"{number(s.p_correct)} {between(s.p_correct_interval, '.2f')}".strip(), number(s.margin, "+.2f"), number(s.brier)]
        + [number(s.logprob, ".2f"), percent(s.greedy), percent(s.top1), percent(s.topk), number(s.mrr)]
        for name, s in found.items()
    ]
    columns = ["category", "n", "ties", "accuracy, 95 %", "chance", "centred", *(f"by {name}" for name in scorings)]
    others = ["category", "p(correct), 95 %", "margin", "Brier", "log-prob", "greedy", "first token: top-1", f"top-{top_k}", "MRR"]
    title = f"{result.names[0]}, by category"
    return [table(title, columns, right), table(f"{title}: probabilities", others, sure)]


def case_table(result: Result, top_k: int) -> Table:
    merged = sum(score.merged for score in result.scores)
    note = f"; in {merged} cases the tokenizer joins the prompt's end and the answer's begin in one token" if merged else ""
    rows = []
    for score in result.scores:
        case = score.case
        right = case.answers[0] if case.answers else case.good or case.continuation or case.match or case.file or case.text[:40]
        mark = {None: "", 0.0: "·", 1.0: "✓"}.get(score.correct, "=")
        rank = score.rank or score.first_token_rank
        shown = repr(score.generated) if score.generated else "  ".join(f"{token!r} {p:.2f}" for token, p in score.top)
        if score.bits_per_byte is not None:
            shown = f"{score.bits_per_byte:.4f} bits per byte over {score.bytes:,} bytes"
        rows.append([case.id, repr(right), mark, shown, number(score.logprob, ".2f"), f"{rank:,}" if rank else ""])
    columns = ["case", "right", "", f"top {top_k} next tokens, or what was generated", "log-prob", "rank"]
    return table(f"{result.names[0]}, case by case{note}", columns, rows, left=4)


def steps_table(results: list[Result]) -> Table:
    """Accuracy of every category against steps."""
    ordered = by_step(results)
    categories = categories_of(results[0])
    steps = [r.step for r in ordered]
    accuracy = {c: [summarise(r, c, 1).accuracy for r in ordered] for c in categories}
    rows = [
        [f"{r.step:,}", f"{r.tokens:,}", percent(r.macro), *(percent(accuracy[c][i]) for c in categories)] for i, r in enumerate(ordered)
    ]
    rising = [spearman(steps, values) for values in ([r.macro for r in ordered], *accuracy.values())]
    rows.append(["rank correlation", "with step", *(number(x, "+.2f") for x in rising)])
    firsts = [emerged(results, c) for c in categories]
    rows.append(["above chance", "from step", "", *("never" if step is None else f"{step:,}" for step in firsts)])
    return table("over training", ["step", "tokens", "macro", *categories], rows)


def flip_lines(results: list[Result]) -> list[str]:
    """What the last checkpoint learned and forgot since the one before it."""
    before, after = by_step(results)[-2:]
    learned, forgotten = flips(before, after)
    lines = []
    for word, ids in (("learned", learned), ("forgotten", forgotten)):
        named = ", ".join(ids[:EXAMPLES]) + (" and others" if len(ids) > EXAMPLES else "")
        lines.append(f"{word} from step {before.step:,} to {after.step:,}: {len(ids)}" + (f" ({named})" if ids else ""))
    return lines


def baseline_table(results: list[Result], baseline: Result) -> Table:
    """Differences to the baseline over the same cases, with paired intervals; a star where one excludes zero."""
    categories = categories_of(baseline)
    rows = []
    for r in results:
        apart, interval = r.ahead_of(baseline)
        wins, losses, p = mcnemar(r.correct, baseline.correct)
        difference, of = r.correct - baseline.correct, np.array(r.categories)
        cells = []
        for category in categories:
            low, high = r.resamples.mean(difference, np.flatnonzero(of == category))
            cells.append(f"{difference[of == category].mean():+.1%}{'*' if low > 0 or high < 0 else ''}")
        rows.append([r.names[0], f"{apart:+.1%} {between(interval)}", str(wins), str(losses), f"{p:.3g}", *cells])
    columns = ["checkpoint", "macro, paired 95 %", "won", "lost", "McNemar p", *categories]
    return table(f"against {baseline.names[0]}; * is a paired interval that excludes zero", columns, rows)


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_json(results: list[Result], suite: Suite, top_k: int, baseline: Result | None) -> dict[str, Any]:
    """Everything, with what it was made from."""
    pairs = [(results[0], other) for other in results[1:]] + [(result, baseline) for result in results if baseline]
    return {
        "schema": SCHEMA,
        "suite": {"name": suite.name, "sha256": suite.sha256, "cases": len(suite.cases), "skipped": 0},
        "made_with": {
            "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(), "device": "cpu",
            "dtype": "float32", "bootstrap_draws": intervals.DRAWS, "bootstrap_seed": intervals.SEED, "top_k": top_k,
        },
        "cases": [filled(dataclasses.asdict(case)) for case in suite.cases],
        "checkpoints": [checkpoint_json(result, top_k) for result in results],
        "comparisons": [
            {"first": first.names[0], "second": second.names[0], "difference": apart, "interval": interval,
             "mcnemar": dict(zip(("won", "lost", "p"), mcnemar(first.correct, second.correct), strict=True))}
            for first, second in pairs if first.graded
            for apart, interval in [first.ahead_of(second)]
        ],
    }  # fmt: skip


def checkpoint_json(result: Result, top_k: int) -> dict[str, Any]:
    return {
        "names": result.names,
        "step": result.step,
        "tokens": result.tokens,
        "val_loss": result.val_loss,
        "weights_sha256": result.weights_sha256,
        "tokenizer_sha256": result.tokenizer_sha256,
        "macro": {"accuracy": result.macro, "interval": result.macro_interval} if result.graded else None,
        "mean_logprob": result.mean_logprob,
        "categories": {name: dataclasses.asdict(summary) for name, summary in rows_by_category(result, top_k).items()},
        "scores": [
            {"id": score.case.id} | {f.name: getattr(score, f.name) for f in dataclasses.fields(score) if f.name != "case"}
            for score in result.scores
        ],
    }


def filled(case: dict[str, Any]) -> dict[str, Any]:
    """The fields of a case that say something."""
    return {key: value for key, value in case.items() if value not in ("", (), False)}


def print_json(results: list[Result], suite: Suite, top_k: int, baseline: Result | None) -> None:
    json.dump(as_json(results, suite, top_k, baseline), sys.stdout, indent=1, ensure_ascii=False)
    print()


CSV_FIELDS = [
    "correct", "tie", "logprob", "tokens", "bytes", "greedy", "first_token_rank", "rank", "p_correct", "margin", "brier",
    "bits_per_byte", "merged", "generated",
]  # fmt: skip


def print_csv(results: list[Result]) -> None:
    """A row for each checkpoint and case."""
    writer = csv.writer(sys.stdout)
    writer.writerow(["checkpoint", "step", "trained_tokens", "case", "type", "category", "group", *CSV_FIELDS])
    for r in results:
        for s in r.scores:
            values = [getattr(s, name) for name in CSV_FIELDS]
            cells = [int(v) if isinstance(v, bool) else f"{v:.6g}" if isinstance(v, float) else v for v in values]
            writer.writerow([r.names[0], r.step, r.tokens, s.case.id, s.case.type, s.case.category, s.case.group, *cells])


def print_markdown(results: list[Result], top_k: int) -> None:
    """A row a checkpoint, a column a category."""
    categories = categories_of(results[0])
    print("| checkpoint | step | accuracy | " + " | ".join(categories) + " |")
    print("| --- | ---: | ---: |" + " ---: |" * len(categories))
    for r in results:
        cells = [f"{percent(s.accuracy)} {between(s.interval)}" for s in (summarise(r, c, top_k) for c in categories)]
        headline = f"**{percent(r.macro)}** {between(r.macro_interval)}" if r.graded else ""
        print(f"| {r.names[0]} | {r.step:,} | {headline} | " + " | ".join(cells) + " |")
    if results[0].graded:
        chances = [percent(summarise(results[0], c, top_k).chance) for c in categories]
        print("| guessing | | | " + " | ".join(chances) + " |")


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(results: list[Result], path: str) -> None:
    """Accuracy against steps: a panel for each category with its line, its interval as a band and chance dotted; their mean first."""
    import matplotlib  # 0.5 s

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ordered = [result for result in by_step(results) if result.graded]
    lines = {"mean over categories": [(r.step, r.macro, r.macro_interval, None) for r in ordered]}
    for category in categories_of(ordered[0]) if ordered else []:
        summaries = [(r.step, summarise(r, category, 1)) for r in ordered]
        lines[category] = [(step, s.accuracy, s.interval, s.chance) for step, s in summaries]
    columns = min(5, len(lines))
    rows = -(-len(lines) // columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(2.2 * columns + 0.4, 1.9 * rows + 0.4),
        dpi=120,
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for axes, (name, points) in zip(grid.flat, lines.items(), strict=False):
        steps, accuracy, interval, chance = zip(*points, strict=True) if points else ((), (), (), (None,))
        color = "#1f4e79" if chance[0] is not None else "black"
        axes.plot(steps, accuracy, color=color, marker="o", markersize=3, linewidth=1.4)
        axes.fill_between(steps, [low for low, _ in interval], [high for _, high in interval], color=color, alpha=0.15, linewidth=0)
        if chance[0] is not None:
            axes.axhline(chance[0], color="#808080", linestyle=":", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_ylim(-0.02, 1.02)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(lines) :]:
        axes.set_visible(False)
    figure.supxlabel("optimizer steps", fontsize=9)
    figure.supylabel("accuracy", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from None
    plt.close(figure)
    print(f"picture: {path}", file=sys.stderr)


def scalars(result: Result, top_k: int = 5) -> dict[str, float]:
    """What is logged of a checkpoint: the mean over categories, and each category's accuracy and p(correct)."""
    found = {"probe/macro": result.macro} if result.graded else {}
    for category in categories_of(result):
        s = summarise(result, category, top_k)
        found[f"probe/{category}/accuracy"] = s.accuracy
        if s.p_correct is not None:
            found[f"probe/{category}/p_correct"] = s.p_correct
    texts = mean([score.bits_per_byte for score in result.scores])
    return found | ({"probe/bits_per_byte": texts} if texts is not None else {})


def to_tensorboard(results: list[Result], folder: str, top_k: int) -> None:
    from torch.utils.tensorboard import SummaryWriter  # 1 s

    with SummaryWriter(folder) as writer:
        for result in by_step(results):
            for name, value in scalars(result, top_k).items():
                if math.isfinite(value):
                    writer.add_scalar(name, value, result.step)
    print(f"TensorBoard: tensorboard --logdir {folder}", file=sys.stderr)
