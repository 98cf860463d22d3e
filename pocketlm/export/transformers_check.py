"""A Hugging Face folder loaded as anyone would, and compared with a reference.

    python -m pocketlm.export.transformers_check FOLDER REFERENCE.npz

It prints a `Check` as JSON. huggingface.py runs it in a new process, so that nothing of our model
takes part.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.proof import Array, Parity, Reference, Step, compare


@dataclass(frozen=True)
class Check:
    """Comparison of what transformers computes from a folder with the reference."""

    parity: Parity
    n_texts: int
    different_texts: list[str]  # of which AutoTokenizer has other ids

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Check":
        values = json.loads(text)
        return cls(**values | {"parity": Parity(**values["parity"])})


def transformers_step(folder: Path) -> Step:
    """Return the forward pass of AutoModelForCausalLM."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()

    @torch.inference_mode()
    def step(ids: Array, cache: Any) -> tuple[Array, Any]:
        output = model(torch.from_numpy(ids), past_key_values=cache, use_cache=True)
        return output.logits.numpy(), output.past_key_values

    return step


def check_folder(folder: Path, reference: Reference, texts: dict[str, list[int]]) -> Check:
    """Compare the folder with the reference, and its tokenizer with the ids of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    different = [
        text
        for text, ids in texts.items()
        if tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) != ids
    ]
    return Check(compare(transformers_step(folder), reference), len(texts), different)


def main() -> None:
    folder, file = map(Path, sys.argv[1:])
    with np.load(file) as arrays:
        reference = Reference(arrays["ids"], arrays["logits"], arrays["greedy"])
        texts = json.loads(str(arrays["texts"]))
    print(check_folder(folder, reference, texts).to_json())


if __name__ == "__main__":
    main()
