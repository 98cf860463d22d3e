"""TensorBoard's view of a run: two sub-runs, `train` and `validation`, that share their tags.

TensorBoard draws a tag of several runs as one chart, so the training and the validation loss,
both tagged `loss`, are two curves in the first chart. It groups charts by the part of the tag
before the slash and sorts the groups by name: loss, optimizer, performance, probes, summary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import to_yaml
from pocketlm.config.sections import TENSORBOARD_RUNS, Config
from pocketlm.evaluation.exports import add_picture
from pocketlm.hardware.processes import print_note

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRAIN, VALIDATION = TENSORBOARD_RUNS
TAGS = {  # column of metrics.csv -> sub-run and tag
    "train/loss": (TRAIN, "loss"),
    "train/bpb": (TRAIN, "loss/bits_per_byte"),
    "train/lr": (TRAIN, "optimizer/learning_rate"),
    "train/grad_norm": (TRAIN, "optimizer/gradient_norm"),
    "perf/tokens_per_second": (TRAIN, "performance/tokens_per_second"),
    "perf/memory_mb": (TRAIN, "performance/memory_mb"),
    "val/loss": (VALIDATION, "loss"),
    "val/bpb": (VALIDATION, "loss/bits_per_byte"),
    "val/perplexity": (VALIDATION, "loss/perplexity"),
    "probe/macro": (VALIDATION, "probes/macro"),
}


class TensorBoard:
    """The event files of a run. Only the first process of a run may write."""

    def __init__(self, run: Run, first_step: int):
        self.folder, self.first_step = run.logs, first_step
        self.writers: dict[str, SummaryWriter] = {}

    def open(self, config: Config) -> None:
        """Begin the event files with the config; drop earlier points beyond the first step."""
        with self.giving_up():
            from torch.utils.tensorboard import SummaryWriter  # 1 s

            self.writers = {
                name: SummaryWriter(
                    self.folder / name,
                    purge_step=self.first_step + 1 if self.first_step else None,
                    flush_secs=10,  # the page shows a point after at most this time
                )
                for name in TENSORBOARD_RUNS
            }
            self.add_text(TRAIN, "config", f"```yaml\n{to_yaml(config)}```", self.first_step)
            self._add_hparams(config)

    @contextmanager
    def giving_up(self) -> Iterator[None]:
        """Write no more events after an error of the operating system, which costs no step."""
        try:
            yield
        except OSError as error:
            self.writers = {}
            print_note(f"no more TensorBoard files in {self.folder}: {error}; training goes on")

    def _add_hparams(self, config: Config) -> None:
        """List the config in the HPARAMS tab, with the validation loss as the runs' result."""
        from torch.utils.tensorboard.summary import hparams  # 1 s

        keys = {
            f"{section}.{key}": value if isinstance(value, int | float | str) else str(value)
            for section, values in config.to_dict().items()
            for key, value in values.items()
        }
        metrics = {"loss": None, "loss/bits_per_byte": None}
        summaries = hparams(keys, metrics)  # type: ignore[no-untyped-call]
        if VALIDATION in self.writers:
            file_writer: Any = self.writers[VALIDATION].file_writer  # torch annotates it as None
            for summary in summaries:
                file_writer.add_summary(summary)

    def add_columns(self, columns: dict[str, float], step: int) -> None:
        """Add a point of each column of metrics.csv."""
        for column, value in columns.items():
            name, tag = TAGS[column]
            self.add_scalars(name, {tag: value}, step)

    def add_scalars(self, name: str, scalars: dict[str, float], step: int) -> None:
        """Add a point of each tag to the sub-run `name`."""
        with self.giving_up():
            for tag, value in scalars.items():
                if writer := self.writers.get(name):
                    writer.add_scalar(tag, value, step)

    def add_text(self, name: str, tag: str, text: str, step: int) -> None:
        with self.giving_up():
            if writer := self.writers.get(name):
                writer.add_text(tag, text, step)

    def add_loss_picture(self, path: Path, step: int) -> None:
        """Add loss.png, which is drawn when training is over."""
        with self.giving_up():
            if writer := self.writers.get(VALIDATION):
                add_picture(writer, "summary/loss", path, step)
        self.close()

    def close(self) -> None:
        """Write what is pending; a later addition begins a new file."""
        with self.giving_up():
            for writer in self.writers.values():
                writer.close()
