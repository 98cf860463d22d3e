"""Settings of text generation: how each token is drawn and when a sample ends."""

import math
from dataclasses import dataclass

from pocketlm.errors import FieldError

# Limits of every request, also of those in a config. With them a decoding step takes about as long
# whatever is asked, and all logits stay finite. serving/limits.py has the server's own.
MAX_NEW_TOKENS = 1_000_000
MAX_SAMPLES = 1_000
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_PENALTY = 2.0  # of frequency_penalty and presence_penalty, as in OpenAI's API
MAX_NO_REPEAT_NGRAM = 100  # tokens
MAX_LOGIT_BIAS = 1e6
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1_000  # characters


def as_number(value: float) -> str:
    """Return a limit as a message shows it.

    >>> as_number(1000000), as_number(0.01)
    ('1,000,000', '0.01')
    """
    return f"{value:,.0f}" if value == int(value) else f"{value:,}"


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
    # subtracted from a token's logit for each time it was generated; 0: disabled
    frequency_penalty: float = 0.0
    # subtracted from a token's logit if it was generated before; 0: disabled
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0  # length of token sequences that may not occur twice; 0: disabled
    # values added to tokens' logits: [[id, value], ...]
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()  # strings that end a sample and are not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that end a sample, as the end of a document does
    seed: int | None = None  # random seed; None: another text every time; validation uses 0
    num_samples: int = 1  # samples per prompt

    def __post_init__(self) -> None:
        self._require_range("max_new_tokens", 1, MAX_NEW_TOKENS)
        self._require("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite")
        self._require("top_k", self.top_k >= 0, "0 or more")
        self._require("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._require_range("min_p", 0, 1)
        self._require_range("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY)
        self._require_range("frequency_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._require_range("presence_penalty", -MAX_PENALTY, MAX_PENALTY)
        self._require_range("no_repeat_ngram", 0, MAX_NO_REPEAT_NGRAM)
        biases_fit = all(i >= 0 and bias <= MAX_LOGIT_BIAS for i, bias in self.logit_bias)
        meaning = f"pairs of a token id and a number of at most {MAX_LOGIT_BIAS:,.0f}"
        self._require("logit_bias", biases_fit, meaning)
        self._require_range("num_samples", 1, MAX_SAMPLES)
        self._require("stop", all(self.stop), "strings that are not empty")
        few_stops = len(self.stop) <= MAX_STOP_STRINGS
        self._require("stop", few_stops, f"a list of at most {MAX_STOP_STRINGS} strings")
        short_stops = all(len(text) <= MAX_STOP_LENGTH for text in self.stop)
        self._require("stop", short_stops, f"strings of at most {MAX_STOP_LENGTH:,} characters")
        self._require("stop_ids", all(i >= 0 for i in self.stop_ids), "token ids, 0 or more")
        seed_fits = self.seed is None or 0 <= self.seed < 2**63
        self._require("seed", seed_fits, "from 0 to 2^63 - 1")

    def _require_range(self, name: str, smallest: float, largest: float) -> None:
        """Raise FieldError unless the value of a field is from `smallest` to `largest`."""
        valid = smallest <= getattr(self, name) <= largest
        self._require(name, valid, f"from {as_number(smallest)} to {as_number(largest)}")

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
