"""Results for programs: JSON, CSV, markdown, pictures, TensorBoard."""

import csv
import dataclasses
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from pocketlm.errors import UserError
from pocketlm.evaluation import statistics as intervals
from pocketlm.evaluation.cases import Suite
from pocketlm.evaluation.results import Result, mean, summarise
from pocketlm.evaluation.statistics import mcnemar
from pocketlm.evaluation.tables import between, by_step, categories_of, percent, rows_by_category

SCHEMA = 2  # of the JSON; 1 was a list of cases without categories


# ---- for programs ----------------------------------------------------------------------------------------------------


def as_json(
    results: list[Result], suite: Suite, top_k: int, baseline: Result | None
) -> dict[str, Any]:
    """Everything, with what it was made from."""
    pairs = [(results[0], other) for other in results[1:]] + [
        (result, baseline) for result in results if baseline
    ]
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
            for apart, interval in [first.difference_from(second)]
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
        "macro": {"accuracy": result.macro, "interval": result.macro_interval}
        if result.graded
        else None,
        "mean_logprob": result.mean_logprob,
        "categories": {
            name: dataclasses.asdict(summary)
            for name, summary in rows_by_category(result, top_k).items()
        },
        "scores": [
            {"id": score.case.id}
            | {
                f.name: getattr(score, f.name)
                for f in dataclasses.fields(score)
                if f.name != "case"
            }
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
    writer.writerow(
        ["checkpoint", "step", "trained_tokens", "case", "type", "category", "group", *CSV_FIELDS]
    )
    for r in results:
        for s in r.scores:
            values = [getattr(s, name) for name in CSV_FIELDS]
            cells = [
                int(v) if isinstance(v, bool) else f"{v:.6g}" if isinstance(v, float) else v
                for v in values
            ]
            writer.writerow(
                [
                    r.names[0],
                    r.step,
                    r.tokens,
                    s.case.id,
                    s.case.type,
                    s.case.category,
                    s.case.group,
                    *cells,
                ]
            )


def print_markdown(results: list[Result], top_k: int) -> None:
    """A row a checkpoint, a column a category."""
    categories = categories_of(results[0])
    print("| checkpoint | step | accuracy | " + " | ".join(categories) + " |")
    print("| --- | ---: | ---: |" + " ---: |" * len(categories))
    for r in results:
        cells = [
            f"{percent(s.accuracy)} {between(s.interval)}"
            for s in (summarise(r, c, top_k) for c in categories)
        ]
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
        steps, accuracy, interval, chance = (
            zip(*points, strict=True) if points else ((), (), (), (None,))
        )
        color = "#1f4e79" if chance[0] is not None else "black"
        axes.plot(steps, accuracy, color=color, marker="o", markersize=3, linewidth=1.4)
        axes.fill_between(
            steps,
            [low for low, _ in interval],
            [high for _, high in interval],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
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
