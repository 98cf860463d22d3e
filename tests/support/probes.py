"""What the tests of probe scoring share: a small random model, and scores from plain loops."""

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from pocketlm.evaluation.cases import Case, Suite, load_suite
from pocketlm.evaluation.scoring import Score, encode_case, score_cases
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer

ROUNDING = 1e-5  # nats; a sum of up to 20 float32 log-probabilities, measured: 1e-6
BPE = JsonTokenizer.train_bpe(["abc abc abc xyz one two three three"] * 50, 275)
NO_PREFIX = ByteTokenizer(bos=False, eos=False)


def make_model(vocab_size: int = 257, **sizes: Any) -> Transformer:
    """Return a random model; its weights are scaled by 5, so that scores differ."""
    torch.manual_seed(0)
    small = dict(max_seq_len=64, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2)
    model = Transformer(ModelConfig(vocab_size=vocab_size, **small | sizes)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(5)
    return model


@torch.no_grad()
def logprobs_of(model: torch.nn.Module, ids: list[int], start: int) -> list[float]:
    """Return the log-probabilities of ids[start:], from one forward pass over all ids."""
    out = model(torch.tensor([ids]))
    logits = out if isinstance(out, Tensor) else out.logits
    return [logits[0, t - 1].log_softmax(-1)[ids[t]].item() for t in range(start, len(ids))]


def scores_of(
    model: Transformer, tokenizer: Tokenizer, cases: list[Case], top_k: int = 5
) -> list[Score]:
    """Encode and score the cases."""
    max_seq_len = model.config.max_seq_len
    encoded = [encode_case(tokenizer, case, max_seq_len) for case in cases]
    return score_cases(model, tokenizer, encoded, top_k)


def read_suite(text: str, name: str = "s.yaml") -> Suite:
    """Write a suite to a file in the current folder, and read it."""
    Path(name).write_text(text, encoding="utf-8")
    return load_suite(name)


# A suite for `make_checkpoint` of tests/support/bigrams.py: is "A" more likely than "B" after each
# of 24 letters? The first twelve are one category, the others another.
LETTER_CASES = ascii_lowercase[:24]
LETTER_SUITE = (
    "schema: 1\nname: letters\ndefaults: {type: choice, joined: true, echo: true}\ncases:\n"
)
for letter in LETTER_CASES:
    category = "first" if letter < "m" else "second"
    LETTER_SUITE += (
        f"- {{id: {letter}, category: {category}, prompt: {letter}, "
        "answers: [A], distractors: [B]}\n"
    )

# every type of case, for two such checkpoints
MIXED_SUITE = """\
schema: 1
name: mixed
cases:
- {id: pair, type: minimal_pair, good: "aA", bad: "aB"}
- {id: open, prompt: "b", answers: ["A"], joined: true, group: "g, 1"}
- {id: text, type: text, text: zzzz}
- {id: made, type: generate, prompt: c, match: A, max_new_tokens: 3}
- {id: tied, type: choice, joined: true, prompt: x, answers: [A], distractors: [B]}
"""
