"""Frequencies of RoPE, as they are or scaled to contexts longer than those of pretraining.

RoPE: Su et al. 2021, arXiv 2104.09864. The scalings are those of Hugging Face's Llama.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from pocketlm.errors import FieldError

# what each kind of scaling reads besides `factor`
OPTIONS = {
    "linear": (),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_seq_len", "attention_factor", "beta_fast", "beta_slow", "truncate"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of RoPE's frequencies, for a context longer than that of pretraining.

    linear: all are divided by `factor` (Chen et al. 2023, arXiv 2306.15595). llama3: those with few
    turns in the original context are (Llama 3.1, arXiv 2407.21783). yarn: too, and attention is
    sharper (Peng et al. 2023, arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int | None = None  # context of pretraining; llama3 and yarn need it
    # turns in the original context: frequencies with fewer than the first are divided by `factor`,
    # those with more than the second are kept, and those between are in between
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0  # yarn
    beta_fast: float = 32.0
    truncate: bool = True  # yarn: round the limits of the range outwards, to whole pairs
    # yarn: factor on the cosines and sines; None: 0.1 ln(factor) + 1
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        positive = ["factor", "low_freq_factor", "high_freq_factor", "beta_slow", "beta_fast"]
        if self.attention_factor is not None:
            positive.append("attention_factor")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise FieldError(name, f"is {getattr(self, name)}; it must be above 0 and finite")
        for field in fields(self):
            value, is_read = getattr(self, field.name), ("kind", "factor", *OPTIONS[self.kind])
            if field.name not in is_read and value != field.default:
                raise FieldError(field.name, f"is {value}; {self.kind} does not read it")
        if self.kind == "linear":
            return
        if self.original_max_seq_len is None or self.original_max_seq_len < 1:
            raise FieldError(
                "original_max_seq_len",
                f"is {self.original_max_seq_len}; {self.kind} needs the context of pretraining, "
                "at least 1",
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not getattr(self, low) < getattr(self, high):
                raise FieldError(
                    low, f"is {getattr(self, low)}; it must be below {high} {getattr(self, high)}"
                )
        if self.kind == "yarn" and self.attention_factor is None:
            object.__setattr__(self, "attention_factor", yarn_attention_factor(self.factor))

    def check(self, position: str, theta: float) -> None:
        """Raise FieldError if a model with these positions and base cannot be scaled."""
        if position != "rope":
            raise FieldError("rope_scaling", f"scales RoPE, and position is {position!r}")
        if self.kind == "yarn" and theta <= 1:
            raise FieldError("rope_theta", f"is {theta}; yarn needs one above 1")

    def scaled(self, frequencies: Tensor, theta: float) -> Tensor:
        """Return the frequencies (D / 2) in this scaling; `theta` is the base of them."""
        interpolated = frequencies / self.factor
        if self.kind == "linear":
            return interpolated
        if self.kind == "llama3":
            kept = self.kept_by_llama3(frequencies)
        else:
            kept = self.kept_by_yarn(len(frequencies), theta)
        return interpolated * (1 - kept) + frequencies * kept

    def kept_by_llama3(self, frequencies: Tensor) -> Tensor:
        """Return the share, 0 to 1, to which each frequency is kept; linear in its turns."""
        assert self.original_max_seq_len is not None
        turns = self.original_max_seq_len * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        return ((turns - self.low_freq_factor) / span).clamp(0, 1)

    def kept_by_yarn(self, n_pairs: int, theta: float) -> Tensor:
        """Return the share, 0 to 1, to which each frequency is kept; linear in its index."""
        first = self.pair_with_turns(self.beta_fast, n_pairs, theta)
        last = self.pair_with_turns(self.beta_slow, n_pairs, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * n_pairs - 1)
        if first == last:
            last += 0.001
        pairs = torch.arange(n_pairs, dtype=torch.float32)
        return 1 - ((pairs - first) / (last - first)).clamp(0, 1)

    def pair_with_turns(self, turns: float, n_pairs: int, theta: float) -> float:
        """Return the index of the pair of dimensions that makes so many turns, as a real number."""
        assert self.original_max_seq_len is not None
        wavelength = self.original_max_seq_len / turns
        return n_pairs * math.log(wavelength / (2 * math.pi)) / math.log(theta)


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's factor on the cosines and sines for a context longer by `factor`."""
    return 0.1 * mscale * math.log(max(1.0, factor)) + 1.0


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """Return the frequency of each pair of dimensions (D / 2), in radians per token, in float32."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))


def rope_tables(
    head_dim: int, length: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of every position's angles, each (length, D), in the default dtype.

    The frequencies are rounded to float32, as in Hugging Face's Llama, whatever the dtype of the
    angles.
    """
    frequencies = rope_frequencies(head_dim, theta)
    if scaling is not None:
        frequencies = scaling.scaled(frequencies, theta)
    positions = torch.arange(length, dtype=torch.get_default_dtype())
    angles = torch.outer(positions, frequencies.to(positions.dtype)).repeat(1, 2)
    factor = scaling.attention_factor if scaling is not None else None
    if factor is None:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor
