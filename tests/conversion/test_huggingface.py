"""Converted Hugging Face folders against transformers: logits, token ids, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.conversion import huggingface
from pocketlm.errors import UserError
from tests.support.pretrained import (
    ROUNDING,
    TEMPLATE,
    TEXTS,
    VOCAB,
    converted,
    edit,
    gpt2,
    llama,
    refusal,
    save,
    worst_logit,
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True),
        dict(
            tie_word_embeddings=False, num_key_value_heads=2, rope_theta=54_321.0, rms_norm_eps=1e-3
        ),
        dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=16),
    ],
    ids=["tied", "grouped", "bias"],
)
def test_a_llama_has_its_logits(tmp_path: Path, changes: dict) -> None:
    theirs = llama(**changes)
    ours = converted(save(theirs, tmp_path / "llama"))
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert ours.config.model.n_parameters == sum(p.numel() for p in theirs.parameters())
    assert (ours.config.model.max_seq_len, ours.step, ours.tokens, ours.val_loss) == (
        48,
        0,
        0,
        None,
    )


def test_one_in_many_files_is_the_same_model(tmp_path: Path) -> None:
    theirs = llama(num_key_value_heads=2)
    folder = save(theirs, tmp_path / "llama", max_shard_size="100KB")
    assert len([*folder.glob("model-0000*-of-0000*.safetensors")]) > 2
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_a_config_of_older_transformers_says_rope_theta_by_itself(tmp_path: Path) -> None:
    theirs = llama(rope_theta=777.0)
    folder = save(theirs, tmp_path / "llama")
    edit(
        folder / "config.json",
        rope_parameters=None,
        rope_theta=777.0,
        head_dim=None,
        attention_bias=None,
        mlp_bias=None,
    )
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_bfloat16_becomes_the_same_numbers_in_float32(tmp_path: Path) -> None:
    folder = save(llama().bfloat16(), tmp_path / "llama")
    ours, theirs = converted(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    assert worst_logit(ours.model, theirs) < ROUNDING


@pytest.mark.parametrize(
    "changes",
    [{}, dict(n_inner=80, layer_norm_epsilon=1e-3, tie_word_embeddings=False)],
    ids=["tied", "untied"],
)
def test_a_gpt2_has_its_logits(tmp_path: Path, changes: dict) -> None:
    theirs = gpt2(**changes)
    ours = converted(save(theirs, tmp_path / "gpt2"))
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert ours.config.model.n_parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "model, part",
    [(llama(tie_word_embeddings=True), "model"), (gpt2(), "transformer")],
    ids=["llama", "gpt2"],
)
def test_a_file_without_the_head_has_names_without_a_prefix(
    tmp_path: Path, model: torch.nn.Module, part: str
) -> None:
    folder = save(getattr(model, part), tmp_path / part)
    assert not any(name.startswith(part) for name in load_file(folder / "model.safetensors"))
    assert worst_logit(converted(folder).model, model) < ROUNDING


def test_buffers_and_a_second_copy_of_the_tied_head_are_left_behind(tmp_path: Path) -> None:
    theirs = gpt2()
    folder = save(theirs, tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    more = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 48, 48)
        for i in range(2)
        for name in ("bias", "masked_bias")
    }
    save_file(
        tensors | more | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
        folder / "model.safetensors",
    )
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_llamas_old_buffers_are_left_behind(tmp_path: Path) -> None:
    theirs = llama()
    file = save(theirs, tmp_path / "llama") / "model.safetensors"
    more = {
        f"model.{part}rotary_emb.inv_freq": torch.ones(8)
        for part in ("", "layers.0.self_attn.", "layers.1.self_attn.")
    }
    save_file(load_file(file) | more, file)
    assert worst_logit(converted(file.parent).model, theirs) < ROUNDING


def test_the_tokenizer_has_transformers_ids_and_special_text_stays_text(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "llama")
    ours, theirs = converted(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert (
            ours.encode(text)
            == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        assert not {0, 1} & set(ours.encode(text))
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert ours.vocab_size < VOCAB


@pytest.mark.parametrize(
    "where", ["tokenizer_config.json", "chat_template.jinja", "one of several"]
)
def test_the_chat_template_is_kept(tmp_path: Path, where: str) -> None:
    folder = save(gpt2(), tmp_path / "gpt2")
    converted(folder)
    assert "chat_template" not in read_checkpoint(tmp_path / "new/model.ckpt")["kit"]
    (tmp_path / "new/model.ckpt").unlink()
    several = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "other"}]
    if where == "chat_template.jinja":
        (folder / where).write_text(TEMPLATE)
    else:
        edit(
            folder / "tokenizer_config.json",
            chat_template=several if where == "one of several" else TEMPLATE,
        )
    converted(folder)
    assert read_checkpoint(tmp_path / "new/model.ckpt")["kit"]["chat_template"] == TEMPLATE


LLAMA_CANNOT = {
    "model_type": (
        "phi3",
        "is of a model of type 'phi3'; those that can be converted are llama, mistral, qwen2, "
        "qwen3, gpt2",
    ),
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "head_dim": (
        32,
        "self_attn.q_proj.weight is torch.float32 of (64, 64), which does not make",
    ),
    "attention_bias": (
        True,
        "has no tensor model.layers.0.self_attn.q_proj.bias, which its config requires",
    ),
    "rope_parameters": (
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0},
        "rope_parameters: rope_type is 'dynamic', which this model cannot express; it must be "
        "'default' or 'linear' or 'llama3' or 'yarn'",
    ),
    "rope_scaling": (
        {"type": "yarn", "factor": -2.0},
        "model.rope_scaling.factor is -2.0; it must be above 0",
    ),
    "quantization_config": ({"bits": 4}, "quantization_config is"),
    "hidden_size": (
        62,
        "model.embed_tokens.weight is torch.float32 of (384, 64), which does not make",
    ),
    "num_attention_heads": (
        0,
        "num_attention_heads is 0, but a model needs a whole number above 0",
    ),
    "num_key_value_heads": (3, "n_heads 4 is not divisible by n_kv_heads 3"),
    "rms_norm_eps": ("small", "model.norm_eps is 'small'; it should be"),
    "num_hidden_layers": (
        1,
        "unexpected tensor model.layers.1.input_layernorm.weight: this architecture has no such",
    ),
    "intermediate_size": (
        97,
        "mlp.gate_proj.weight is torch.float32 of (96, 64), which does not make",
    ),
    "vocab_size": (100, "tokens and that of the model 100; save the two that belong together"),
}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("mistakes") / "llama")


@pytest.mark.parametrize("key", LLAMA_CANNOT)
def test_a_llama_that_cannot_be_expressed_is_refused_by_key(
    llama_folder: Path, key: str, capsys: pytest.CaptureFixture
) -> None:
    value, words = LLAMA_CANNOT[key]
    file = llama_folder / "config.json"
    before = file.read_text()
    without_rope = {"rope_parameters": None} if key == "rope_scaling" else {}
    edit(file, **without_rope, **{key: value})
    try:
        assert words in refusal(capsys, llama_folder)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
    ],
)
def test_a_gpt2_that_cannot_be_expressed_is_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(
        UserError, match=f"config.json: {key} is {value!r}, which this model cannot express"
    ):
        huggingface.gpt2_settings({key: value}, "config.json")


def test_a_tensor_that_is_missing_left_over_or_of_whole_numbers_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(gpt2(), tmp_path / "gpt2")
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "transformer.h.1.attn.c_attn.weight"
    save_file({key: p for key, p in tensors.items() if key != name}, file)
    assert f"has no tensor {name}, which its config requires" in refusal(capsys, folder)
    save_file(tensors | {"score.weight": torch.zeros(2)}, file)
    assert "unexpected tensor score.weight: this architecture has no such parameter" in refusal(
        capsys, folder
    )
    for wrong in (
        torch.zeros(64, 2),
        torch.zeros(192),
        torch.zeros(()),
        tensors[name].to(torch.int8),
    ):
        save_file(tensors | {name: wrong}, file)
        assert (
            f"the tensor {name} is {wrong.dtype} of {tuple(wrong.shape)}, which does not make"
            in refusal(capsys, folder)
        )


def test_an_incomplete_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save(llama(), tmp_path / "llama", max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    assert f"{shard.name} is damaged or not a safetensors file (" in refusal(capsys, folder)
    shard.unlink()
    assert f"there is no {shard}, which model.safetensors.index.json lists; download" in refusal(
        capsys, folder
    )
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is truncated, damaged or not a file of torch.save" in refusal(
        capsys, folder
    )
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json; save its fast tokenizer in it" in refusal(capsys, folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON: " in refusal(capsys, folder)
