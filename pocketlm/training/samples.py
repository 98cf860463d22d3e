"""Texts that a run writes at every validation."""

from dataclasses import replace

import lightning as L
import numpy as np

from pocketlm.config.sections import Config
from pocketlm.data.prepare import PreparedData
from pocketlm.errors import UserError
from pocketlm.inference.engine import GenerationRequest, validate_request
from pocketlm.inference.generate import generate_texts


class Samples(L.Callback):
    """At every validation, how `sampling.prompts` go on, or else the openings of a few validation documents; to TensorBoard."""

    def __init__(self, config: Config, data: PreparedData):
        self.tokenizer, self.params = (
            data.tokenizer,
            replace(config.sampling, seed=config.sampling.seed or 0),
        )
        if config.sampling.prompts:
            self.prompts = [self.ids(prompt) for prompt in config.sampling.prompts]
        else:
            self.prompts = [ids.tolist() for ids in openings(data, config.model.max_seq_len)]
        self.latest: list[tuple[str, str]] = []
        try:
            validate_request(
                GenerationRequest(self.prompts[0], self.params), config.model.vocab_size
            )
        except ValueError as error:
            raise UserError(f"sampling.{error}") from None

    def ids(self, prompt: str) -> list[int]:
        ids = self.tokenizer.prefix + self.tokenizer.encode(prompt)
        if not ids:
            raise UserError(
                f"sampling.prompts holds {prompt!r}, and in {self.tokenizer.name!r} no token begins a document; write a text"
            )
        return ids

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        module.model.eval()
        texts = generate_texts(module.model, self.tokenizer, self.prompts, self.params)
        self.latest = [
            (self.tokenizer.decode(self.prompts[n % len(self.prompts)]), text)
            for n, text in enumerate(texts)
        ]
        module.model.train()
        text = "\n\n".join(f"**{prompt}**{continuation}" for prompt, continuation in self.latest)
        trainer.logger.experiment.add_text("samples", text, trainer.global_step)


def openings(data: PreparedData, context: int, count: int = 3) -> list[np.ndarray]:
    """The first ids of some validation documents: the token before the text, and eight of it."""
    shard = data.val.shards[0]
    length = max(1, min(9, context // 2, shard.header.tokens))
    last = shard.header.tokens - length
    begins = shard.offsets[: np.searchsorted(shard.offsets, last, side="right")]
    if len(begins) < count:  # few documents: anywhere in them
        begins = np.arange(0, max(1, last), max(1, last // count))
    return [
        shard.tokens[b : b + length].astype(np.int64)
        for b in begins[:: len(begins) // count or 1][:count]
    ]
