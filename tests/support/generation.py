"""Generated tokens as one list per sample."""

import dataclasses

from torch import Tensor

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.generate import generate

PLAIN = SamplingParams(temperature=1.0, top_p=1.0)  # no filter


def tokens_of(
    model: Transformer, ids: Tensor, eos_id: int | None = None, **params: object
) -> list[list[int | None]]:
    """Return the tokens that follow the prompts `ids` (B, T), for each sample by its index."""
    steps = generate(model, ids, dataclasses.replace(PLAIN, **params), eos_id)
    return [list(tokens) for tokens in zip(*steps, strict=True)]
