"""Folders that convert.py writes, loaded by transformers: logits, greedy text, refusals."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
import quantize
from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.export import huggingface, proof
from pocketlm.export.proof import our_step
from pocketlm.hub.special_tokens import SpecialTokens
from pocketlm.inference.conversation import Conversation
from pocketlm.tokenizer.bpe import JsonTokenizer
from tests.support.checkpoints import byte_ids
from tests.support.exports import (
    GPT2,
    INEXPRESSIBLE,
    MODELS,
    a_checkpoint,
    architecture,
    changed_checkpoint,
    export_refusal,
    exported,
    quick_check,  # noqa: F401  a fixture
    same_weights,
)
from tests.support.pretrained import TEMPLATE, byte_level_bpe
from tests.support.tokenizer_kinds import named

pytestmark = pytest.mark.usefixtures("quick_check")

ROUNDING = 1e-4  # logits are as large as 10; measured: 5e-6
EXACT_GELU = GPT2 | dict(mlp="gelu_exact")  # as nanoGPT's; llama.cpp lacks it


@pytest.mark.parametrize("sizes", [*MODELS.values(), EXACT_GELU], ids=[*MODELS, "exact gelu"])
def test_a_folder_has_our_logits_and_greedy_text_and_is_the_same_read_again(
    tmp_path: Path, sizes: dict
) -> None:
    checkpoint = a_checkpoint(tmp_path, **sizes)
    folder = exported(checkpoint, "hf", tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = load_checkpoint(checkpoint).model
    ids = byte_ids(80, batch=2)
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < ROUNDING
    prompt = ids[:1, :20]
    greedy = proof.greedy_tokens(our_step(ours), prompt.numpy(), 64)
    theirs.generation_config.eos_token_id = None  # our loop does not stop either
    answer = theirs.generate(prompt, do_sample=False, max_new_tokens=64)[0, 20:]
    assert answer.tolist() == greedy.tolist()
    again = tmp_path / "again.ckpt"
    assert convert.main([str(folder), "--to", "ckpt", str(again)]) == 0
    assert same_weights(checkpoint, again)
    assert architecture(again) == architecture(checkpoint)


def test_a_reader_of_before_rope_parameters_finds_the_same_angles(tmp_path: Path) -> None:
    """transformers 4 reads the key rope_theta, and not the object that version 5 reads."""
    checkpoint = a_checkpoint(tmp_path, rope_theta=500.0)
    file = exported(checkpoint, "hf", tmp_path / "hf") / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("rope_parameters")["rope_theta"] == values["rope_theta"] == 500.0
    file.write_text(json.dumps(values))
    again = tmp_path / "again.ckpt"
    assert convert.main([str(file.parent), "--to", "ckpt", str(again)]) == 0
    assert load_checkpoint(again).config.model.rope_theta == 500.0


@pytest.mark.slow
def test_the_proof_of_a_new_process_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of quick_check
    exported(a_checkpoint(tmp_path), "hf", tmp_path / "hf")
    _, model, tokenizer = capsys.readouterr().out.splitlines()
    assert model.startswith("LlamaForCausalLM in a new process: largest logit difference ")
    assert model.endswith("greedy 64 of 64 tokens")
    assert tokenizer == "AutoTokenizer in a new process: the same ids for 9 texts"


@pytest.mark.parametrize("field", INEXPRESSIBLE)
def test_a_model_that_no_class_expresses_is_refused_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture, field: str
) -> None:
    checkpoint = a_checkpoint(tmp_path, **INEXPRESSIBLE[field])
    value = getattr(architecture(checkpoint), field)
    for output_format in ("hf", "gguf"):
        message = export_refusal(capsys, checkpoint, output_format)
        assert f"{field} {value!r}" in message
        nearest = "GPT2LMHeadModel" if field == "position" else "LlamaForCausalLM"
        assert f"it differs from the nearest, {nearest}, by " in message
        assert ("onnx" in message) == (field != "token_shift")  # which onnx has not either


def test_a_large_model_is_in_several_files_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface, "MAX_SHARD_BYTES", 30_000)
    checkpoint = a_checkpoint(tmp_path)
    folder = exported(checkpoint, "hf", tmp_path / "hf")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2 and not (folder / "model.safetensors").exists()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {file.name for file in files}
    again = tmp_path / "again.ckpt"
    assert convert.main([str(folder), "--to", "ckpt", str(again)]) == 0
    assert same_weights(checkpoint, again)


def test_every_end_id_and_the_chat_template_are_kept(tmp_path: Path) -> None:
    special = SpecialTokens(end_ids=(5, 7), names={"bos_token": "<|begin|>"})
    tokenizer = JsonTokenizer(byte_level_bpe().to_str(), "chat", 0, 1, special=special)
    checkpoint = changed_checkpoint(
        a_checkpoint(tmp_path, tokenizer=tokenizer), chat_template=TEMPLATE
    )
    folder = exported(checkpoint, "hf", tmp_path / "hf")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (0, [1, 5, 7])
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [1, 5, 7]
    theirs = AutoTokenizer.from_pretrained(folder)
    conversation = Conversation(tokenizer, TEMPLATE)
    conversation.add("user", "The fox jumps.")
    messages = [{"role": "user", "content": "The fox jumps."}]
    rendered = theirs.apply_chat_template(messages, return_dict=False)
    assert rendered == conversation.prompt(96)


# ---- what is refused ----


def test_an_output_that_exists_is_kept_unless_forced(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = a_checkpoint(tmp_path)
    output = tmp_path / "new" / "output"
    output.mkdir(parents=True)
    (output / "precious.txt").write_text("precious")
    assert "exists already; name another, or pass --force" in export_refusal(
        capsys, checkpoint, "hf"
    )
    assert "is a folder, and gguf is a file" in export_refusal(
        capsys, checkpoint, "gguf", "--force"
    )
    exported(checkpoint, "hf", output, "--force")
    assert not (output / "precious.txt").exists() and (output / "config.json").exists()


@pytest.mark.parametrize("output_format", ["hf", "safetensors"])
def test_a_link_to_nothing_is_kept_unless_forced(tmp_path: Path, output_format: str) -> None:
    checkpoint, link = a_checkpoint(tmp_path), tmp_path / "link"
    link.symlink_to("nowhere")
    arguments = [str(checkpoint), "--to", output_format, str(link)]
    with pytest.raises(UserError, match="exists already"):
        convert.main(arguments)
    assert link.is_symlink()
    assert convert.main([*arguments, "--force"]) == 0
    assert link.exists() and not link.is_symlink()


def test_a_disk_that_fills_leaves_nothing_and_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = a_checkpoint(tmp_path)
    (tmp_path / "new").mkdir()
    exported(checkpoint, "hf", tmp_path / "new" / "output")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface, "write_tokenizer", full)  # after the weights
    message = export_refusal(capsys, checkpoint, "hf", "--force")
    assert "No space left on device" in message and "what was there is untouched" in message


def test_a_model_that_computes_something_else_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, right = a_checkpoint(tmp_path), huggingface.llama_config
    fields = vars(architecture(checkpoint))
    monkeypatch.setitem(huggingface.SETTINGS, "llama", lambda values, origin: fields)
    monkeypatch.setitem(
        huggingface.CONFIGS, "llama", lambda config: right(replace(config, norm_eps=0.1))
    )
    message = export_refusal(capsys, checkpoint, "hf")
    assert "the converted model is not the same: largest logit difference" in message


def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = a_checkpoint(tmp_path)
    state = read_checkpoint(checkpoint)
    weights = {name: each.clone() for name, each in state["state_dict"].items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_checkpoint(state | {"state_dict": weights}, checkpoint)
    assert "layers.1.mlp.up_proj.weight has weights that are not finite" in export_refusal(
        capsys, checkpoint, "hf"
    )


def test_options_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoint = a_checkpoint(tmp_path)

    def refused(output_format: str, *more: str) -> str:
        return export_refusal(capsys, checkpoint, output_format, *more)

    assert refused("xml") == (
        "--to xml is not a format; the formats are: ckpt, hf, gguf, onnx, safetensors"
    )
    assert refused("hf", "--dtype", "q4_0") == "--dtype q4_0 is no data type of hf, which has: f32"
    assert refused("gguf", "--dtype", "int8").endswith("has: f32, f16, bf16, q8_0, q4_0")
    assert refused("hf", "--text", "x.txt").startswith("--text measures what")


def test_what_is_no_checkpoint_of_float32_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "llama"
    folder.mkdir()
    assert "is not a checkpoint; make one first" in export_refusal(capsys, folder, "gguf")
    checkpoint = a_checkpoint(tmp_path, d_model=64, tokenizer=named("byte"))
    small = tmp_path / "small.ckpt"
    assert quantize.main([str(checkpoint), "--dtype", "int8", "--to", str(small)]) == 0
    assert "is int8 already; use the checkpoint" in export_refusal(capsys, small, "hf")


def test_a_qwen2_with_another_tokenizer_than_qwens_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """AutoTokenizer of transformers 5 takes Qwen2's class, whatever the folder says."""
    checkpoint = a_checkpoint(tmp_path, attention_bias="qkv")
    message = export_refusal(capsys, checkpoint, "hf")
    assert "AutoTokenizer splits the texts of every Qwen2 as Qwen's tokenizer does" in message
