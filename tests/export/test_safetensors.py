"""Checkpoints as safetensors files: every command reads them, and damage is found."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.conversion.pretrained import read_pretrained
from pocketlm.conversion.torch_checkpoints import TokenizerSource
from pocketlm.errors import UserError
from tests.support.exports import INEXPRESSIBLE, MODELS, a_checkpoint, exported, same_weights


@pytest.mark.parametrize("sizes", (MODELS | INEXPRESSIBLE).values(), ids=MODELS | INEXPRESSIBLE)
def test_any_model_is_the_same_in_safetensors(tmp_path: Path, sizes: dict) -> None:
    checkpoint = a_checkpoint(tmp_path, **sizes)
    file = exported(checkpoint, "safetensors", tmp_path / "model.safetensors")
    assert same_weights(checkpoint, file)
    before, after = load_checkpoint(checkpoint), load_checkpoint(file)
    assert after.weights_sha256 == before.weights_sha256
    assert (after.step, after.val_loss, after.config) == (before.step, 1.0, before.config)
    assert read_checkpoint(file)["kit"] == read_checkpoint(checkpoint)["kit"]
    library = load_file(file)  # of the library's own reader
    ours = read_checkpoint(checkpoint)["state_dict"]
    assert all(torch.equal(library[name], ours[name]) for name in ours) and len(library) == len(
        ours
    )


def test_infer_generates_the_same_from_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = a_checkpoint(tmp_path)
    file = exported(checkpoint, "safetensors", tmp_path / "model.safetensors")
    texts = []
    for path in (checkpoint, file):
        capsys.readouterr()
        assert infer.main(["--ckpt", str(path), "--prompt", "a", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_a_changed_weight_or_a_file_without_our_metadata_is_damaged(tmp_path: Path) -> None:
    file = exported(a_checkpoint(tmp_path), "safetensors", tmp_path / "model.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # of a weight's exponent or sign
    file.write_bytes(raw)
    with pytest.raises(UserError, match="the weights of .* are damaged"):
        load_checkpoint(file)
    file.write_bytes(raw[:-4])
    with pytest.raises(UserError, match="is damaged or not a safetensors file"):
        load_checkpoint(file)
    torch_file = tmp_path / "other.safetensors"
    save_file({"model.norm.weight": torch.ones(3)}, torch_file)
    with pytest.raises(UserError, match="has weights only"):
        load_checkpoint(torch_file)


def test_it_is_a_checkpoint_already_for_convert(tmp_path: Path) -> None:
    file = exported(a_checkpoint(tmp_path), "safetensors", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is a safetensors file; one of this program is a check"):
        read_pretrained(str(file), TokenizerSource(str(tmp_path)))
