"""Pictures of a sweep and of a scaling study, and TensorBoard's table of hyper-parameters."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketlm.files import atomic_write
from pocketlm.sweeps.power_law import Forecast
from pocketlm.sweeps.space import LOG_RATIO, Axis, number
from pocketlm.sweeps.study import Study
from pocketlm.sweeps.summary import Summary, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, LIGHT, RED, GRAY = "#1f4e79", "#9db8d2", "#b03030", "#808080"
MAX_TICKS = 8  # of a key's axis


@contextmanager
def figure_to(path: Path, columns: int) -> Iterator[list["Axes"]]:
    """Yield panels beside each other, which are written to a PNG file at the end."""
    import matplotlib  # 0.5 s, needed once at the end

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (4.2 * columns + 0.6, 3.8)
    figure, panels = plt.subplots(
        1, columns, figsize=size, dpi=110, layout="constrained", squeeze=False, sharey=True
    )
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    yield list(panels.flat)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, format="png")
    plt.close(figure)


# ---- a sweep ----


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether values of a key belong on a log axis: positive, and more even by factors.

    >>> is_logarithmic([1e-3, 2e-3, 4e-3]), is_logarithmic([1, 2, 3]), is_logarithmic([0, 1, 10])
    (True, False, False)
    """
    distinct = sorted(set(values))
    if len(distinct) < 2 or distinct[0] <= 0:
        return False
    if len(distinct) == 2:
        return distinct[1] / distinct[0] >= LOG_RATIO
    steps, factors = np.diff(distinct), np.diff(np.log(distinct))
    return bool(factors.std() / factors.mean() < steps.std() / steps.mean())


def draw_sweep(study: Study, rows: Sequence[Summary], label: str, path: Path) -> None:
    """Draw the metric against each key: a dot for each run, and means with standard errors.

    The line joins the configurations that have the best one's values of the other keys. A run that
    failed is a cross at the top.
    """
    with figure_to(path, len(study.axes)) as panels:
        for axes, axis in zip(panels, study.axes, strict=True):
            draw_axis(axes, axis, rows)
        panels[0].set_ylabel(label, fontsize=8)


def draw_axis(axes: "Axes", axis: Axis, rows: Sequence[Summary]) -> None:
    """Draw the metric against one key."""
    texts = list(dict.fromkeys(row.settings[axis.key] for row in rows))
    values = numbers(texts)
    if values:
        place = dict(zip(texts, values, strict=True))
        if is_logarithmic(values):
            axes.set_xscale("log")
            axes.minorticks_off()
        shown = values[:: max(1, len(values) // MAX_TICKS)]
        axes.set_xticks(shown, [f"{value:g}" for value in shown])  # as they are typed
    else:
        texts = list(axis.values)
        place = {text: float(i) for i, text in enumerate(texts)}
        axes.set_xticks(range(len(texts)), texts)
        axes.margins(x=0.2)
    for row in rows:
        x = place[row.settings[axis.key]]
        axes.plot(
            [x] * len(row.by_seed), list(row.by_seed.values()), "o", color=LIGHT, markersize=4
        )
        for _ in row.failed:
            axes.plot([x], [0.97], "x", color=RED, transform=axes.get_xaxis_transform())
    on_line = [row for row in rows if row.by_seed and others_equal(row, rows[0], axis)]
    on_line.sort(key=lambda row: place[row.settings[axis.key]])
    xs = [place[row.settings[axis.key]] for row in on_line]
    axes.plot(xs, [row.mean for row in on_line], "-", color=BLUE, linewidth=1.2)
    for row in rows:
        if row.by_seed:
            x = place[row.settings[axis.key]]
            axes.errorbar([x], [row.mean], yerr=row.error or 0, fmt="s", color=BLUE, markersize=4)
    axes.set_xlabel(axis.key)


def others_equal(row: Summary, best: Summary, axis: Axis) -> bool:
    """Return whether a configuration differs from the best one only in this key."""
    return all(
        value == best.settings[key] for key, value in row.settings.items() if key != axis.key
    )


# ---- a scaling study ----


def draw_scaling(
    compute: Sequence[float], losses: Sequence[Sequence[float]], found: Forecast, path: Path
) -> None:
    """Draw loss against compute in log-log axes: the sizes, the law, and the prediction.

    losses: of each size's seeds, in the order of `compute`; those of the largest size, which was
    predicted, may be missing.
    """
    sizes = len(compute) - 1
    with figure_to(path, 1) as [axes]:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        x = np.geomspace(compute[0] / 1.5, compute[-1] * 1.5, 200)
        axes.plot(x, found.law.loss(x), "-", color=LIGHT, linewidth=1.2, label=found.law.text)
        low, high = found.interval
        error = [[found.loss - low], [high - found.loss]]
        target = compute[-1]
        axes.errorbar(
            [target], [found.loss], yerr=error, fmt="s", color=GRAY, capsize=3, label="predicted"
        )
        for i, values in enumerate(losses):
            style, label = ("o", "trained") if i < sizes else ("*", "trained afterwards")
            shown = label if i in (0, sizes) else None
            color = BLUE if i < sizes else RED
            axes.plot([compute[i]] * len(values), values, style, color=color, label=shown)
        axes.set_xticks(compute, [f"{value:.0e}" for value in compute], rotation=30)
        ticks = np.linspace(min(low, *losses[-1], found.loss), max(losses[0]), 6)
        axes.set_yticks(ticks, [f"{tick:.2f}" for tick in ticks])
        axes.set_xlabel("compute (floating-point operations)")
        axes.set_ylabel("validation loss (nats per token)")
        axes.legend(frameon=False, fontsize=7)


# ---- TensorBoard ----


def write_hparams(study: Study, folder: Path) -> None:
    """Write a run of TensorBoard's HPARAMS tab for each run that has ended, with its losses."""
    from torch.utils.tensorboard import SummaryWriter  # 1 s
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder, ignore_errors=True)
    for key, record in study.records.items():
        if not record.losses:
            continue
        metrics = {
            "best/loss": record.losses.best_loss,
            "best/bits_per_byte": record.losses.best_bpb,
            "last/loss": record.losses.final_loss,
            "last/bits_per_byte": record.losses.final_bpb,
        }
        settings: dict[str, Any] = {}
        for name, text in study.configuration(key[0]).settings.items():
            settings[name] = number(text) if numbers([text]) else text
        with SummaryWriter(folder / study.run(key).name) as writer:
            summaries = hparams(settings | {"seed": key[1]}, metrics)  # type: ignore[no-untyped-call]
            file_writer: Any = writer.file_writer  # torch annotates it as None
            for summary in summaries:
                file_writer.add_summary(summary)
            for tag, value in metrics.items():
                writer.add_scalar(tag, value, record.losses.step)
