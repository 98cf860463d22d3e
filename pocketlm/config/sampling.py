"""Settings of text generation: how each token is drawn and when a sample ends."""

import math
from dataclasses import dataclass

from pocketlm.errors import FieldError

# a request beyond these limits is taken for a mistake
MAX_NEW_TOKENS = 1_000_000
MAX_SAMPLES = 1_000
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1_000  # characters


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request. Raises FieldError for a value out of range."""

    max_new_tokens: int = 100  # maximum number of tokens in a sample
    temperature: float = 0.8  # divides the logits; 0: always the most likely token
    top_k: int = 0  # sample only from the k most likely tokens; 0: disabled
    # sample only from the most likely tokens whose probabilities sum to top_p; 1: disabled
    top_p: float = 0.95
    # sample only from tokens at least min_p times as likely as the most likely token; 0: disabled
    min_p: float = 0.0
    # above 1: tokens of the context become less likely; 1: disabled
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0  # length of token sequences that may not occur twice; 0: disabled
    # values added to tokens' logits: [[id, value], ...]
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()  # strings that end a sample and are not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that end a sample, as the end of a document does
    seed: int | None = None  # random seed; None: another text every time; validation uses 0
    num_samples: int = 1  # samples per prompt

    def __post_init__(self) -> None:
        new_tokens_fit = 1 <= self.max_new_tokens <= MAX_NEW_TOKENS
        self._require("max_new_tokens", new_tokens_fit, f"from 1 to {MAX_NEW_TOKENS:,}")
        self._require("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite")
        self._require("top_k", self.top_k >= 0, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require("min_p", 0 <= self.min_p <= 1, "from 0 to 1")
        penalty_fits = 0 < self.repetition_penalty < math.inf
        self._require("repetition_penalty", penalty_fits, "above 0, and finite")
        self._require("no_repeat_ngram", self.no_repeat_ngram >= 0, "0 or more")
        biases_fit = all(i >= 0 and not math.isnan(bias) for i, bias in self.logit_bias)
        self._require("logit_bias", biases_fit, "pairs of a token id and a number")
        samples_fit = 1 <= self.num_samples <= MAX_SAMPLES
        self._require("num_samples", samples_fit, f"from 1 to {MAX_SAMPLES:,}")
        self._require("stop", all(self.stop), "strings that are not empty")
        few_stops = len(self.stop) <= MAX_STOP_STRINGS
        self._require("stop", few_stops, f"a list of at most {MAX_STOP_STRINGS} strings")
        short_stops = all(len(text) <= MAX_STOP_LENGTH for text in self.stop)
        self._require("stop", short_stops, f"strings of at most {MAX_STOP_LENGTH:,} characters")
        self._require("stop_ids", all(i >= 0 for i in self.stop_ids), "token ids, 0 or more")
        seed_fits = self.seed is None or 0 <= self.seed < 2**63
        self._require("seed", seed_fits, "from 0 to 2^63 - 1")

    def _require(self, name: str, valid: bool, meaning: str) -> None:
        """Raise FieldError unless the value of a field is valid."""
        if valid:
            return
        value = repr(getattr(self, name))
        if len(value) >= 100:
            value = value[:100] + "..."
        raise FieldError(name, f"is {value}; it must be {meaning}")


@dataclass(frozen=True)
class SamplingConfig(SamplingParams):
    """Defaults of infer.py, and of the samples that a run writes at each validation."""

    # prompts to continue at each validation; "" begins a document; []: the openings of held-out
    # documents
    prompts: tuple[str, ...] = ()
