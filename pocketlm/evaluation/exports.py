"""Results in other formats: JSON, CSV, Markdown, a plot, and TensorBoard."""

import csv
import dataclasses
import json
import math
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, Suite
from pocketlm.evaluation.results import (
    Result,
    by_step,
    mean,
    summaries_by_category,
    summarise,
)
from pocketlm.evaluation.scoring import Score
from pocketlm.evaluation.statistics import DRAWS, SEED, Interval, mcnemar
from pocketlm.evaluation.tables import format_interval, format_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.utils.tensorboard import SummaryWriter

SCHEMA = 2  # version of the JSON; version 1 was a list of cases without categories

JSON_FIELDS = ["correct", "correct_by", "tie", "merged", "logprob", "tokens", "bytes", "greedy"]
JSON_FIELDS += ["first_token_rank", "top", "rank", "p_correct", "margin", "brier", "generated"]
JSON_FIELDS += ["bits_per_byte"]

CSV_FIELDS = ["correct", "tie", "logprob", "tokens", "bytes", "greedy", "first_token_rank", "rank"]
CSV_FIELDS += ["p_correct", "margin", "brier", "bits_per_byte", "merged", "generated"]


# ---- JSON ----


def print_json(results: list[Result], suite: Suite, top_k: int, baseline: Result | None) -> None:
    """Print everything: the suite, how it was scored, each checkpoint, and paired comparisons."""
    report = {
        "schema": SCHEMA,
        "suite": {
            "name": suite.name,
            "sha256": suite.sha256,
            "cases": len(suite.cases),
            "skipped": 0,
        },
        "made_with": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "device": "cpu",
            "dtype": "float32",
            "bootstrap_draws": DRAWS,
            "bootstrap_seed": SEED,
            "top_k": top_k,
        },
        "cases": [case_json(case) for case in suite.cases],
        "checkpoints": [checkpoint_json(result, top_k) for result in results],
        "comparisons": comparisons_json(results, baseline),
    }
    json.dump(report, sys.stdout, indent=1, ensure_ascii=False)
    print()


def case_json(case: Case) -> dict[str, Any]:
    """Return the fields of a case that are not empty."""
    fields = dataclasses.asdict(case)
    return {name: value for name, value in fields.items() if value not in ("", (), False)}


def checkpoint_json(result: Result, top_k: int) -> dict[str, Any]:
    """Return the identity, the summaries and the scores of a checkpoint."""
    macro = None
    if result.graded:
        macro = {"accuracy": result.macro, "interval": result.macro_interval}
    summaries = summaries_by_category(result, top_k)
    return {
        "names": result.names,
        "step": result.step,
        "tokens": result.tokens,
        "val_loss": result.val_loss,
        "weights_sha256": result.weights_sha256,
        "tokenizer_sha256": result.tokenizer_sha256,
        "macro": macro,
        "mean_logprob": result.mean_logprob,
        "categories": {name: dataclasses.asdict(summary) for name, summary in summaries.items()},
        "scores": [score_json(score) for score in result.scores],
    }


def score_json(score: Score) -> dict[str, Any]:
    """Return the fields of a score."""
    return {"id": score.case.id} | {name: getattr(score, name) for name in JSON_FIELDS}


def comparisons_json(results: list[Result], baseline: Result | None) -> list[dict[str, Any]]:
    """Return paired comparisons: the first checkpoint with the others, all with the baseline."""
    if not results[0].graded:
        return []
    pairs = [(results[0], other) for other in results[1:]]
    if baseline:
        pairs += [(result, baseline) for result in results]
    comparisons = []
    for first, second in pairs:
        difference, interval = first.difference_from(second)
        won, lost, p = mcnemar(first.correct, second.correct)
        comparisons.append(
            {
                "first": first.names[0],
                "second": second.names[0],
                "difference": difference,
                "interval": interval,
                "mcnemar": {"won": won, "lost": lost, "p": p},
            }
        )
    return comparisons


# ---- CSV and Markdown ----


def print_csv(results: list[Result]) -> None:
    """Print a row for each checkpoint and case."""
    writer = csv.writer(sys.stdout)
    labels = ["checkpoint", "step", "trained_tokens", "case", "type", "category", "group"]
    writer.writerow([*labels, *CSV_FIELDS])
    for result in results:
        checkpoint = [result.names[0], result.step, result.tokens]
        for score in result.scores:
            case = score.case
            cells = [csv_cell(getattr(score, name)) for name in CSV_FIELDS]
            writer.writerow([*checkpoint, case.id, case.type, case.category, case.group, *cells])


def csv_cell(value: Any) -> Any:
    """Return a flag as 0 or 1, a number with six digits, and other values unchanged."""
    if isinstance(value, bool):
        return int(value)
    return f"{value:.6g}" if isinstance(value, float) else value


def print_markdown(results: list[Result], top_k: int) -> None:
    """Print a table with a row for each checkpoint and a column for each category."""
    names = results[0].category_names
    print_markdown_row(["checkpoint", "step", "accuracy", *names])
    print("| --- | ---: | ---: |" + " ---: |" * len(names))
    for result in results:
        accuracy = ""
        if result.graded:
            accuracy = (
                f"**{format_percent(result.macro)}** {format_interval(result.macro_interval)}"
            )
        summaries = [summarise(result, name, top_k) for name in names]
        cells = [f"{format_percent(s.accuracy)} {format_interval(s.interval)}" for s in summaries]
        print_markdown_row([result.names[0], f"{result.step:,}", accuracy, *cells])
    if results[0].graded:
        chances = [format_percent(summarise(results[0], name, top_k).chance) for name in names]
        print("| guessing | | | " + " | ".join(chances) + " |")


def print_markdown_row(cells: list[str]) -> None:
    """Print a row; without categories it ends in an empty cell."""
    fixed, categories = cells[:3], cells[3:]
    print(f"| {' | '.join(fixed)} | {' | '.join(categories)} |")


# ---- a plot ----


@dataclasses.dataclass
class Panel:
    """A curve of the plot: an accuracy by step with its interval, and the accuracy of guessing."""

    title: str
    steps: list[int]
    accuracies: list[float]
    intervals: list[Interval]
    chance: float | None = None


def panels_of(results: list[Result]) -> list[Panel]:
    """Return a panel for the macro accuracy, and one for each category."""
    ordered = [result for result in by_step(results) if result.graded]
    steps = [result.step for result in ordered]
    macro = [result.macro for result in ordered]
    intervals = [result.macro_interval for result in ordered]
    panels = [Panel("mean over categories", steps, macro, intervals)]
    for name in ordered[0].category_names if ordered else []:
        summaries = [summarise(result, name, 1) for result in ordered]
        accuracies = [summary.accuracy for summary in summaries]
        intervals = [summary.interval for summary in summaries]
        panels.append(Panel(name, steps, accuracies, intervals, summaries[0].chance))
    return panels


def draw_panel(axes: "Axes", panel: Panel) -> None:
    """Draw a curve with its interval as a band and chance as a dotted line."""
    color = "black" if panel.chance is None else "#1f4e79"
    lows, highs = [low for low, _ in panel.intervals], [high for _, high in panel.intervals]
    axes.plot(panel.steps, panel.accuracies, color=color, marker="o", markersize=3, linewidth=1.4)
    axes.fill_between(panel.steps, lows, highs, color=color, alpha=0.15, linewidth=0)
    if panel.chance is not None:
        axes.axhline(panel.chance, color="#808080", linestyle=":", linewidth=1)
    axes.set_title(panel.title, fontsize=9)
    axes.set_ylim(-0.02, 1.02)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def plot_accuracies(results: list[Result], path: str) -> None:
    """Plot accuracy against steps, a panel for each category, to a file.

    Raises UserError if matplotlib cannot write the file's format.
    """
    import matplotlib  # 0.5 s

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = panels_of(results)
    columns = min(5, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (2.2 * columns + 0.4, 1.9 * rows + 0.4)
    figure = plt.figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel)
    for axes in grid.flat[len(panels) :]:
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


# ---- TensorBoard ----


def scalars(result: Result, top_k: int = 5) -> dict[str, float]:
    """Return the values to log, by tag: accuracies, p(correct), and bits per byte."""
    values = {"probes/macro": result.macro} if result.graded else {}
    for name in result.category_names:
        summary = summarise(result, name, top_k)
        values[f"probes/{name}/accuracy"] = summary.accuracy
        if summary.p_correct is not None:
            values[f"probes/{name}/p_correct"] = summary.p_correct
    bits_per_byte = mean([score.bits_per_byte for score in result.scores])
    if bits_per_byte is not None:
        values["probes/bits_per_byte"] = bits_per_byte
    return values


def add_picture(writer: "SummaryWriter", tag: str, path: str | Path, step: int) -> None:
    """Show a PNG file in TensorBoard."""
    from matplotlib.image import imread  # 0.5 s, needed once at the end

    writer.add_image(tag, imread(path), step, dataformats="HWC")


def write_tensorboard(
    results: list[Result], folder: str, top_k: int, picture: str | None = None
) -> None:
    """Write the scalars of each checkpoint at its step, and the plot if it is a PNG file."""
    from torch.utils.tensorboard import SummaryWriter  # 1 s

    with SummaryWriter(folder) as writer:
        for result in by_step(results):
            for tag, value in scalars(result, top_k).items():
                if math.isfinite(value):
                    writer.add_scalar(tag, value, result.step)
        if picture and picture.endswith(".png"):
            add_picture(writer, "summary/probes", picture, by_step(results)[-1].step)
    print(f"TensorBoard: tensorboard --logdir {folder}", file=sys.stderr)
