"""Callbacks that look at the model at every validation: sample texts and probe suites."""

from dataclasses import replace

import lightning as L
import numpy as np
from numpy.typing import NDArray

from model import Transformer
from pocketlm.config.sections import Config
from pocketlm.data.prepare import PreparedData
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import load_suite, merge_suites
from pocketlm.evaluation.exports import scalars
from pocketlm.evaluation.results import Result
from pocketlm.evaluation.scoring import encode_case, score_cases
from pocketlm.inference.engine import GenerationRequest, validate_request
from pocketlm.inference.generate import generate_texts
from pocketlm.training.metrics import MetricsLogger
from pocketlm.training.module import TrainingProgress
from pocketlm.training.tensorboard import VALIDATION, TensorBoard


class Samples(L.Callback):
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

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.model.eval()
        texts = generate_texts(self.model, self.tokenizer, self.prompts, self.params)
        self.model.train()
        self.latest = [
            (self.tokenizer.decode(self.prompts[n % len(self.prompts)]), text)
            for n, text in enumerate(texts)
        ]
        text = "\n\n".join(f"**{prompt}**{continuation}" for prompt, continuation in self.latest)
        self.tensorboard.add_text(VALIDATION, "samples", text, trainer.global_step)


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


class Probes(L.Callback):
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
        self.tokenizer = data.tokenizer
        context = model.config.max_seq_len
        assert context is not None
        suite = merge_suites(load_suite(path) for path in config.training.probe_cases)
        self.encoded = [encode_case(data.tokenizer, case, context) for case in suite.cases]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.model.eval()
        scores = score_cases(self.model, self.tokenizer, self.encoded, top_k=1)
        self.model.train()
        step, tokens = trainer.global_step, self.progress.tokens_so_far()
        val_loss = self.progress.validation["loss"]
        result = Result([], step, tokens, val_loss, "", self.tokenizer.fingerprint, scores)
        by_tag = scalars(result)
        by_tag.pop("probes/macro", None)  # written below, with its row of metrics.csv
        self.metrics.tensorboard.add_scalars(VALIDATION, by_tag, step)
        if result.graded:
            self.metrics.write(trainer, step, tokens, {"probe/macro": result.macro})
            low, high = result.macro_interval
            self.metrics.print_status(
                step,
                f"probes {result.macro:.1%} [{low:.1%}, {high:.1%}] of {len(result.graded)} cases",
                permanent=True,
            )
