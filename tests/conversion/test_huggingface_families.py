"""Folders of Llama's relatives: transformers' logits, the same weights back, refusals by key."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from model import Transformer
from pocketlm.conversion.huggingface import llama_settings, read_folder
from pocketlm.errors import UserError
from tests.support.exports import (
    architecture,
    exported,
    quick_check,  # noqa: F401  a fixture
    same_weights,
)
from tests.support.families import FAMILIES, ORIGINAL, SIZES, their_model
from tests.support.models import random_ids, random_model
from tests.support.pretrained import ROUNDING, converted, edit
from tests.support.tokenizer_families import TOKENIZERS, write_tokenizer

pytestmark = pytest.mark.usefixtures("quick_check")
ROWS = random_ids(length=48, vocab_size=SIZES["vocab_size"])

CLASSES = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3, biases": "Qwen3"}


def folder_of(name: str, folder: Path, how: dict[str, Any] | None = None, **more: Any) -> Path:
    """Write the model of a family, with `more` fields, as `save_pretrained` does."""
    family = replace(FAMILIES[name], ours=FAMILIES[name].ours | more)
    theirs = their_model(family, random_model(**SIZES | family.ours))
    theirs.save_pretrained(folder, **how or {})
    return write_tokenizer(name if name in TOKENIZERS else "smollm", folder)


@torch.no_grad()
def worst_logit(ours: Transformer, folder: Path) -> float:
    """Return the largest difference from the model that transformers loads from the folder."""
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    return (ours.eval()(ROWS) - theirs(ROWS).logits).abs().max().item()


def read(folder: Path) -> Transformer:
    """Return the model of a folder."""
    pretrained = read_folder(folder)
    model = Transformer(pretrained.config.model)
    model.load_state_dict(pretrained.weights)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_logits_and_comes_back_with_the_same_weights(
    tmp_path: Path, name: str
) -> None:
    """The vocabulary of the model is larger than that of its tokenizer."""
    folder = folder_of(name, tmp_path / "theirs")
    assert worst_logit(converted(folder).model, folder) < ROUNDING
    first, back = tmp_path / "new" / "model.ckpt", tmp_path / "back"
    exported(first, "hf", back)  # proven by transformers
    values = json.loads((back / "config.json").read_text())
    assert values["architectures"] == [f"{CLASSES.get(name, 'Llama')}ForCausalLM"]
    again = tmp_path / "again.ckpt"
    exported(back, "ckpt", again)
    assert same_weights(first, again)
    assert architecture(first) == architecture(again)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_one_in_many_files_is_the_same_model(tmp_path: Path, name: str, tied: bool) -> None:
    how = {"max_shard_size": "30KB"}
    folder = folder_of(name, tmp_path / "theirs", how, tie_embeddings=tied)
    assert len([*folder.glob("model-0000*-of-0000*.safetensors")]) > 2
    assert worst_logit(read(folder), folder) < ROUNDING


# ---- config.json as older versions and other programs write it ----

YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = YARN | {"low_freq_factor": 1.0, "high_freq_factor": 3.0}
OLDER = {"rope_parameters": None, "rope_theta": 500.0}
SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "older yarn": ("smollm", OLDER | {"rope_scaling": {"type": "yarn", "finetuned": True, **YARN}}),
    "older llama 3": ("smollm", OLDER | {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "older linear": ("qwen3", OLDER | {"rope_scaling": {"type": "linear", "factor": 2}}),
    "both keys": ("qwen2", {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", **YARN}}),
    "mscale": (
        "smollm",
        {"rope_parameters": {"rope_type": "yarn", "mscale": 2, "mscale_all_dim": 0.5, **YARN}},
    ),
    "the context of pretraining is the whole": (
        "smollm",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "the factor follows": (
        "smollm",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0, **YARN, "factor": None}},
    ),
    "the context of pretraining beside": (
        "smollm",
        {"original_max_position_embeddings": 8, "rope_parameters": {"rope_type": "yarn", **YARN}},
    ),
    "no rope at all": ("qwen3", {"rope_parameters": None}),
    "a window as long as the context": ("mistral", {"sliding_window": 48}),
    "a window that is off": ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    "a window above all layers": (
        "qwen3",
        dict(use_sliding_window=True, sliding_window=8, max_window_layers=2, layer_types=None),
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("families")
    return {name: folder_of(name, parent / name) for name, _ in SPELLINGS.values()}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_of_config_json_has_the_meaning_of_transformers(
    folders: dict[str, Path], spelling: str
) -> None:
    name, changes = SPELLINGS[spelling]
    file = folders[name] / "config.json"
    before = file.read_text()
    edit(file, **changes)
    try:
        assert worst_logit(read(file.parent), file.parent) < ROUNDING
    finally:
        file.write_text(before)


def test_options_of_rope_that_nothing_reads_are_named(folders: dict[str, Path]) -> None:
    file = folders["smollm"] / "config.json"
    before = file.read_text()
    edit(file, rope_parameters={"rope_type": "yarn", "finetuned": True, **YARN})
    try:
        [note] = [note for note in read_folder(file.parent).notes if "keys" in note]
    finally:
        file.write_text(before)
    assert note == f"{file} has keys that are not read: rope_parameters.finetuned"


def rope(**options: Any) -> dict[str, Any]:
    return {"rope_parameters": options}


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": (rope(rope_type="dynamic", factor=2.0), "rope_type is 'dynamic', which this model"),
    "longrope": (rope(type="longrope"), "rope_parameters: type is 'longrope', which this model"),
    "partial": (rope(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "partial beside": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "of each layer": (rope(full_attention={"rope_theta": 1.0}), "full_attention is {'rope_theta'"),
    "no object": ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', but a model needs an object"),
    "no factor": (rope(rope_type="linear"), "rope_parameters has no factor, which 'linear' needs"),
    "no range": (rope(rope_type="llama3", factor=8.0), "has no low_freq_factor, which 'llama3'"),
    "mscale": (
        rope(rope_type="yarn", factor=2.0, mscale="a", mscale_all_dim=1.0),
        "mscale is 'a', but a model needs a number",
    ),
    "window": (
        {"model_type": "mistral", "sliding_window": 47},
        "sliding_window is 47, and .* it must be null, or at least max_position_embeddings, 48",
    ),
    "the window that a missing key means": (
        {"model_type": "mistral", "max_position_embeddings": 4097},
        "sliding_window is 4096",
    ),
    "window of the top layer": (
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        "sliding_window is 8",
    ),
    "window of a layer": (
        {
            "model_type": "qwen3",
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "sliding_window is 8",
    ),
    "another kind of layer": (
        {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]},
        "layer type chunked_attention is 'chunked_attention'",
    ),
    "neighbours": ({"rope_interleaved": True}, "rope_interleaved is True"),
    "activation": ({"model_type": "qwen3", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_this_model_cannot_express_is_refused_by_key(case: str) -> None:
    sizes = dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"), 2
    )
    changes, words = CANNOT[case]
    values = {"vocab_size": 9, "max_position_embeddings": 48, **sizes, **changes}
    with pytest.raises(UserError, match=f"config.json.*{words}"):
        llama_settings(values, "config.json")
