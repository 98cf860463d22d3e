"""How a token is drawn: the settings of generation."""

import math
from dataclasses import dataclass

from pocketlm.errors import FieldError

MOST_NEW_TOKENS, MOST_SAMPLES, MOST_STOPS, LONGEST_STOP = (
    1_000_000,
    1_000,
    64,
    1_000,
)  # beyond these a request is a slip


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Raises ValueError that names the field."""

    max_new_tokens: int = 100
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 0.95  # keep the most likely up to this probability in sum; 1: all
    min_p: float = 0.0  # keep those at least this share as likely as the most likely; 0: all
    repetition_penalty: float = 1.0  # above 1: make tokens of the context less likely
    no_repeat_ngram: int = 0  # never write the same so many tokens twice; 0: may be
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token's id, what is added to its logit)
    stop: tuple[str, ...] = ()  # texts that end the completion and are not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that do, as the end of a document does
    seed: int | None = None  # None: another text every time
    num_samples: int = 1  # completions of one prompt

    def __post_init__(self) -> None:
        checks = [
            (
                "max_new_tokens",
                1 <= self.max_new_tokens <= MOST_NEW_TOKENS,
                f"from 1 to {MOST_NEW_TOKENS:,}",
            ),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or more"),
            (
                "logit_bias",
                all(i >= 0 and not math.isnan(nats) for i, nats in self.logit_bias),
                "pairs of an id and a number",
            ),
            ("num_samples", 1 <= self.num_samples <= MOST_SAMPLES, f"from 1 to {MOST_SAMPLES:,}"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("stop", len(self.stop) <= MOST_STOPS, f"a list of at most {MOST_STOPS} texts"),
            (
                "stop",
                all(len(text) <= LONGEST_STOP for text in self.stop),
                f"texts of at most {LONGEST_STOP:,} characters",
            ),
            ("stop_ids", all(i >= 0 for i in self.stop_ids), "ids of tokens, 0 or more"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ]
        for name, good, meaning in checks:
            if not good:
                value = repr(getattr(self, name))
                raise FieldError(
                    name,
                    f"is {value if len(value) < 100 else value[:100] + '...'}; it must be {meaning}",
                )


@dataclass(frozen=True)
class SamplingConfig(SamplingParams):
    """What infer.py does unless told otherwise, and how a run shows what it has learned."""

    prompts: tuple[
        str, ...
    ] = ()  # continued at every validation; "" begins a document; none: the openings of validation documents
