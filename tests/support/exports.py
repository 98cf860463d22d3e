"""Checkpoints converted by the command, and what it prints and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

import convert
from model import ModelConfig
from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import run_main
from pocketlm.export import huggingface
from pocketlm.export.proof import Reference, ids_of_texts
from pocketlm.export.transformers_check import Check, check_folder
from pocketlm.tokenizer.base import Tokenizer
from tests.support.checkpoints import write_checkpoint

GPT2: dict[str, Any] = dict(
    mlp="gelu", position="learned", norm="layernorm", bias=True, n_kv_heads=None
)
MODELS: dict[str, dict[str, Any]] = {
    "grouped, tied": {},
    "head of its own": dict(tie_embeddings=False, n_kv_heads=1, rope_theta=54_321.0, norm_eps=1e-3),
    "with biases": dict(bias=True, n_kv_heads=4, d_ff=40),
    "gpt2": GPT2,
    "gpt2, head of its own": GPT2 | dict(tie_embeddings=False, d_ff=40, norm_eps=1e-3),
}
# what neither class of transformers has, and the fields that a refusal names
INEXPRESSIBLE: dict[str, dict[str, Any]] = {
    "norm": dict(norm="layernorm"),
    "mlp": dict(mlp="relu2"),
    "embed_norm": dict(embed_norm=True),
    "final_norm": dict(final_norm=False),
    "norm_gain": dict(norm_gain=False),
    "value_residual": dict(value_residual=True),
    "embedding_shortcut": dict(embedding_shortcut=True),
    "token_shift": dict(token_shift=True),
    "position": GPT2 | dict(position="rope"),
}


def in_this_process(folder: Path, reference: Reference, tokenizer: Tokenizer) -> Check:
    """Return what the new process would: it takes seconds to import transformers again."""
    return check_folder(folder, reference, ids_of_texts(tokenizer))


@pytest.fixture
def quick_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "check_in_new_process", in_this_process)
    disable_progress_bar()  # that transformers draws


def a_checkpoint(folder: Path, **sizes: Any) -> Path:
    """Write a checkpoint with room for the proof's 64 greedy tokens."""
    return write_checkpoint(folder / "model.ckpt", **{"max_seq_len": 96} | sizes)


def exported(checkpoint: Path, output_format: str, output: Path, *more: str) -> Path:
    """Convert by the command; assert that nothing else remains beside the output."""
    before = {each for each in output.parent.iterdir() if each != output}
    assert convert.main([str(checkpoint), "--to", output_format, str(output), *more]) == 0
    assert {each for each in output.parent.iterdir() if each != output} == before
    return output


def export_refusal(
    capsys: pytest.CaptureFixture, checkpoint: Path, output_format: str, *more: str
) -> str:
    """Return the sentence on stderr; assert status 2 and that no file is new or changed."""
    output = checkpoint.parent / "new" / "output"
    before = contents(checkpoint.parent)
    capsys.readouterr()
    arguments = [str(checkpoint), "--to", output_format, str(output), *more]
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: convert.main(arguments))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert contents(checkpoint.parent) == before
    return message.removeprefix("error: ").strip()


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def changed_checkpoint(path: Path, **metadata: Any) -> Path:
    """Change entries of a checkpoint's metadata."""
    state = read_checkpoint(path)
    state["state_dict"] = {name: each.clone() for name, each in state["state_dict"].items()}
    state["kit"] |= metadata
    save_checkpoint(state, path)
    return path


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_checkpoint(path).model.state_dict() for path in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def architecture(path: Path) -> ModelConfig:
    return load_checkpoint(path).config.model
