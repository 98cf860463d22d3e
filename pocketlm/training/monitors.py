"""Monitors of a run: sample texts, probe suites, and the guard against non-finite gradients."""

import json
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model import Transformer
from pocketlm.checkpoint.runs import Run
from pocketlm.config.sections import Config
from pocketlm.data.prepare import PreparedData
from pocketlm.distributed.sharding import ShardedStrategy, whole_model
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import load_suite, merge_suites
from pocketlm.evaluation.exports import scalars
from pocketlm.evaluation.results import Result
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.hardware.processes import print_note
from pocketlm.inference.engine import GenerationRequest, validate_request
from pocketlm.inference.generate import generate_texts
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.streaming import complete_text
from pocketlm.training.metrics import MetricsLogger
from pocketlm.training.module import TrainableModule, TrainingProgress, non_finite
from pocketlm.training.tensorboard import VALIDATION, TensorBoard


class Monitor(L.Callback):
    """Looks at the model after every validation, once the step is saved."""

    model: Transformer

    def look(self, step: int) -> None:
        """Look at the model after optimizer step `step`."""
        raise NotImplementedError

    def look_safely(self, step: int) -> None:
        """Look, leaving the random state as it is; print what goes wrong, and go on.

        A run is not to end, and a resumed run not to differ, for a sample.
        """
        self.model.eval()
        try:
            with torch.random.fork_rng():
                self.look(step)
        except Exception as error:  # of a compiler, a cache folder, a log, a suite
            name = type(self).__name__.lower()
            print_note(f"no {name} at step {step}: {type(error).__name__}: {error}")
        finally:
            self.model.train()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        divided = self.model
        if isinstance(trainer.strategy, ShardedStrategy):
            self.model = whole_model(divided) or divided  # for the first process, from all
        if trainer.is_global_zero:
            self.look_safely(trainer.global_step)
        self.model = divided


class Samples(Monitor):
    """Continues prompts at every validation, and writes the texts to TensorBoard.

    The prompts are `sampling.prompts`, or else the openings of a few validation documents.
    """

    def __init__(
        self, config: Config, data: PreparedData, model: Transformer, tensorboard: TensorBoard
    ):
        self.model, self.tensorboard, self.tokenizer = model, tensorboard, data.tokenizer
        assert model.config.max_seq_len is not None
        assert model.config.vocab_size is not None
        self.params = replace(config.sampling, seed=config.sampling.seed or 0)
        if config.sampling.prompts:
            self.prompts = [self.encode(prompt) for prompt in config.sampling.prompts]
        else:
            self.prompts = [ids.tolist() for ids in openings(data, model.config.max_seq_len)]
        self.latest: list[tuple[str, str]] = []  # prompts and texts of the last validation
        try:
            validate_request(
                GenerationRequest(self.prompts[0], self.params), model.config.vocab_size
            )
        except ValueError as error:
            raise UserError(f"sampling.{error}") from None

    def encode(self, prompt: str) -> list[int]:
        """Return the prompt's token ids. Raises UserError if there are none."""
        ids = self.tokenizer.document_prefix + self.tokenizer.encode(prompt)
        if not ids:
            raise UserError(
                f"sampling.prompts holds {prompt!r}, and in {self.tokenizer.name!r} no token "
                "begins a document; write a text"
            )
        return ids

    def look(self, step: int) -> None:
        texts = generate_texts(self.model, self.tokenizer, self.prompts, self.params)
        self.latest = [
            (complete_text(self.tokenizer, self.prompts[n % len(self.prompts)]), text)
            for n, text in enumerate(texts)
        ]
        text = "\n\n".join(f"**{prompt}**{continuation}" for prompt, continuation in self.latest)
        self.tensorboard.add_text(VALIDATION, "samples", text, step)


def openings(data: PreparedData, context: int, count: int = 3) -> list[NDArray[np.int64]]:
    """Return the first ids of some validation documents.

    They are the token before the text and eight tokens of it, or half of a shorter context.
    """
    shard = data.val.shards[0]
    length = max(1, min(9, context // 2, shard.header.tokens))
    last = shard.header.tokens - length
    starts = shard.offsets[: np.searchsorted(shard.offsets, last, side="right")]
    if len(starts) < count:  # too few documents: take positions within them
        starts = np.arange(0, max(1, last), max(1, last // count))
    chosen = starts[:: len(starts) // count or 1][:count]
    return [shard.tokens[start : start + length].astype(np.int64) for start in chosen]


class Probes(Monitor):
    """Scores the cases of `training.probe_cases` at every validation.

    The scores of each category go to TensorBoard, and the mean over the categories to
    metrics.csv too.
    """

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        model: Transformer,
        progress: TrainingProgress,
        metrics: MetricsLogger,
    ):
        self.model, self.progress, self.metrics = model, progress, metrics
        self.training, self.tokenizer = config.training, data.tokenizer
        context = model.config.max_seq_len
        assert context is not None
        suite = merge_suites(load_suite(path) for path in config.training.probe_cases)
        self.encoded = [encode_case(data.tokenizer, case, context) for case in suite.cases]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        step = trainer.global_step
        if step and self.training.validates(step):  # a kill may have come after it was saved
            self.on_validation_end(trainer, module)

    def look(self, step: int) -> None:
        if self.metrics.has_row(step, "probe/macro"):
            return
        scores = score_cases(self.model, self.tokenizer, self.encoded, top_k=1)
        tokens = self.progress.validated_tokens
        val_loss = self.progress.validation["loss"]
        result = Result([], step, tokens, val_loss, "", self.tokenizer.fingerprint, scores)
        by_tag = scalars(result)
        by_tag.pop("probes/macro", None)  # written below, with its row of metrics.csv
        self.metrics.tensorboard.add_scalars(VALIDATION, by_tag, step)
        if result.graded:
            self.metrics.write(step, tokens, {"probe/macro": result.macro})
            low, high = result.macro_interval
            self.metrics.print_status(
                step,
                f"probes {result.macro:.1%} [{low:.1%}, {high:.1%}] of {len(result.graded)} cases",
                permanent=True,
            )


class NonFiniteGuard:
    """Stops a run at a gradient that is not finite, or leaves the step out.

    `training.on_nonfinite` says which. The documents of the step are written beside the
    checkpoints.
    """

    MAX_SKIPPED = 10  # steps in a row; more are not an accident of the data
    MAX_FILES = 10

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.training, self.tokenizer = config.training, tokenizer
        self.folder = Run(config.run.name).checkpoints
        self.skipped = 0  # steps in a row that were left out

    def allows_step(self, module: TrainableModule, norm: Tensor) -> bool:
        """Return whether to apply the step with this gradient norm; otherwise drop its gradient.

        Raises UserError if the run is to stop.
        """
        skips = self.training.on_nonfinite == "skip"
        # in float16 the loss scaler skips steps by itself; reading the norm waits for the device
        unchecked = module.trainer.precision == "16-mixed" or not (
            skips or module.device.type == "cpu"
        )
        if unchecked or torch.isfinite(norm):
            self.skipped = 0
            return True
        step = module.trainer.global_step + 1
        path = self.write_documents(module, step)
        place = f"Its documents are in {path}. " if path else ""
        rate = module.trainer.optimizers[0].param_groups[0]["lr"]
        self.skipped += 1
        if not skips or self.skipped > self.MAX_SKIPPED:
            problem = "the gradient is not finite"
            raise UserError(non_finite(problem, step, rate, self.training.lr, place))
        print_note(
            f"step {step} is left out: the gradient is not finite, with the learning rate "
            f"{rate:.3g}. {place}".rstrip()
        )
        for parameter in module.model.parameters():
            parameter.grad = None  # which every optimizer passes over
        return False

    def write_documents(self, module: TrainableModule, step: int) -> Path | None:
        """Write the rows of the step to a file of JSON lines; None if that is not possible."""
        rank = module.trainer.global_rank
        suffix = f"-rank{rank}" if rank else ""
        path = self.folder / f"nonfinite-{step:08d}{suffix}.jsonl"
        if len(list(self.folder.glob("nonfinite-*.jsonl"))) >= self.MAX_FILES:
            return None
        lines = [
            json.dumps(
                {"micro_batch": number, "loss": float(loss), "text": self.tokenizer.decode(ids)},
                ensure_ascii=False,
            )
            for number, (loss, _, rows) in enumerate(module.progress.step)
            for ids in rows.tolist()
        ]
        try:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError:
            return None
        return path
