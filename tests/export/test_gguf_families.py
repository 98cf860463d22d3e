"""GGUF files of Llama's relatives: the same model read again, by us and by transformers."""

import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.conversion.gguf import read_gguf
from pocketlm.errors import UserError
from pocketlm.model.rope import RopeScaling
from pocketlm.tokenizer.bpe import JsonTokenizer
from tests.support.exports import (
    a_checkpoint,
    architecture,
    export_refusal,
    exported,
    same_weights,
)
from tests.support.families import FAMILIES, SIZES
from tests.support.models import random_ids
from tests.support.tokenizer_families import qwen

ROUNDING = 1e-4
SCALES_DIFFERENTLY = ("yarn, all keys",)
NOT_OF_LLAMA_CPP = ("qwen3, biases", *SCALES_DIFFERENTLY)
# transformers reads neither the biases of a Llama nor the scaling of RoPE from GGUF
READ_BY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # it reads no other
    "smollm": {},
}
QWEN = JsonTokenizer(qwen().to_str(), "qwen", None, 0)


def checkpoint_of(name: str, folder: Path, **more: Any) -> Path:
    return a_checkpoint(folder, tokenizer=QWEN, **SIZES | FAMILIES[name].ours | more)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - NOT_OF_LLAMA_CPP))
def test_a_file_read_again_is_the_same_model_to_the_last_bit(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(name, tmp_path)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf")
    again = exported(file, "ckpt", tmp_path / "again.ckpt")
    assert same_weights(checkpoint, again)
    assert architecture(again) == architecture(checkpoint)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_has_our_logits_of_a_file(tmp_path: Path, name: str) -> None:
    checkpoint = checkpoint_of(name, tmp_path, **READ_BY_TRANSFORMERS[name])
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    ids = random_ids(length=48, vocab_size=SIZES["vocab_size"])
    with torch.no_grad():
        assert (load_checkpoint(checkpoint).model(ids) - theirs(ids).logits).abs().max() < ROUNDING


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3, biases": ({}, "attention_bias 'all' beside qk_norm"),
    "yarn, all keys": ({}, "rope_scaling.beta_slow 0.5, rope_scaling.beta_fast 3.0, rope_scaling."),
    "qwen2": ({"head_dim": 12}, "head_dim 12 beside biases as Qwen2's"),
    "qwen3": (FAMILIES["llama 3"].ours, "rope_scaling of llama3 in a qwen3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    more, words = REFUSED[name]
    message = export_refusal(capsys, checkpoint_of(name, tmp_path, **more), "gguf")
    assert "is a model that llama.cpp cannot compute, because of " in message
    assert words in message


# ---- files of others ----


def with_factors(path: Path, factors: list[float], **keys: Any) -> Path:
    """Write a copy of a file of llama.cpp with other factors of RoPE, and without our key."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("other.gguf"), "llama")
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "pocketlm.")):
            writer.add_key_value(name, entry.contents(), entry.types[0], *entry.types[1:2])
    for key, value in keys.items():
        writer.add_float32(f"llama.rope.scaling.{key}", value)
    for tensor in reader.tensors:
        if tensor.name != "rope_freqs.weight":
            writer.add_tensor(tensor.name, tensor.data.copy())
    writer.add_tensor("rope_freqs.weight", torch.tensor(factors).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("other.gguf")


def test_factors_without_our_key_are_those_of_llama_3_or_none_or_refused(tmp_path: Path) -> None:
    """The factors of Llama 3.1 by hand, with the base 500,000 and heads of 8.

    The wavelengths are 6.3, 167, 4443 and 118,143 tokens, which turn 8192 / wavelength times: more
    than 4, more than 4, 1.844 and less than 1. Of the third, (1.844 - 1) / (4 - 1) is kept.
    """
    sizes = SIZES | dict(rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", 2.0, 9))
    plain = exported(a_checkpoint(tmp_path, tokenizer=QWEN, **sizes), "gguf", tmp_path / "m.gguf")
    kept = (8192 / (2 * math.pi * 500_000**0.5) - 1) / 3
    third = 1 / ((1 - kept) / 8 + kept)
    found = read_gguf(with_factors(plain, [1.0, 1.0, third, 8.0]), "m").config.model.rope_scaling
    assert found == RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    assert read_gguf(with_factors(plain, [1.0] * 4), "m").config.model.rope_scaling is None
    for factors, keys in (([1.0, 2.0, 3.0, 8.0], {}), ([1.0, 1.0, third, 8.0], {"factor": 2.0})):
        with pytest.raises(UserError, match="rope_freqs.weight"):
            read_gguf(with_factors(plain, factors, **keys), "m")
