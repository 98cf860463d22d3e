"""Files of a model whose values have another type or meaning than their format says."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from pocketlm.conversion.folder_weights import read_weights
from pocketlm.conversion.gguf import read_chat_template, read_gguf
from pocketlm.conversion.gguf_tokenizer import read_tokenizer
from pocketlm.conversion.huggingface import read_chat_template as read_template_of_folder
from pocketlm.conversion.huggingface import read_folder
from pocketlm.conversion.stored import is_finite
from pocketlm.conversion.torch_files import require_tensors
from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import read_special_tokens
from pocketlm.tokenizer.bpe import JsonTokenizer
from tests.support.pretrained import byte_level_bpe, edit, gpt2, llama, save, write_gguf

SPEC = byte_level_bpe().to_str()
WRONG_TOKENS: dict[str, tuple[str, dict[str, Any]]] = {
    "bos_token is 5": ("tokenizer_config", {"bos_token": 5}),
    "eos_token is [1]": ("special_tokens_map", {"eos_token": [1]}),
    "have {'x': 1} in place of a token": ("tokenizer_config", {"bos_token": {"x": 1}}),
    "added_tokens_decoder is [1]": ("tokenizer_config", {"added_tokens_decoder": [1]}),
    "has the id 'x'": ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    "has the id '1.5'": ("added_tokens", {"a": 1.5}),
    "have 7 in place": ("tokenizer_config", {"added_tokens_decoder": {"5": 7}}),
    "special_tokens is 5": ("tokenizer_config", {"additional_special_tokens": 5}),
    "add_bos_token is 'no'": ("tokenizer_config", {"add_bos_token": "no"}),
    "eos_token_id of its": ("generation_config", {"eos_token_id": [[1]]}),
    "bos_token_id of its": ("config", {"bos_token_id": True}),
}


@pytest.mark.parametrize("words", WRONG_TOKENS)
def test_special_tokens_of_another_type_are_refused_by_name(tmp_path: Path, words: str) -> None:
    name, values = WRONG_TOKENS[words]
    file = tmp_path / f"{name}.json"
    file.write_text("{}")
    edit(file, **values)
    with pytest.raises(UserError) as refused:
        read_special_tokens(tmp_path, SPEC)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model_type": ["llama"]}, "is of a model of type ['llama']"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', but a model needs true"),
        ({"attention_bias": 1}, "attention_bias is 1, but a model needs true or false"),
        ({"rope_parameters": []}, "rope_parameters is [], but a model needs an object"),
        ({"head_dim": 0}, "model.head_dim is 0"),
    ],
)
def test_a_config_of_another_type_is_refused_by_key(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    folder = save(llama(), tmp_path / "model")
    edit(folder / "config.json", **values)
    with pytest.raises(UserError) as refused:
        read_folder(folder)
    assert words in str(refused.value)


@pytest.mark.parametrize("name", [["a"], {"a": 1}, "a\0b"])
def test_an_index_that_names_no_file_is_refused(tmp_path: Path, name: Any) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text("{}")
    edit(file, weight_map={"x": name})
    with pytest.raises(UserError, match="which is no file name"):
        read_weights(tmp_path)


def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="chat_template.jinja is not UTF-8 at byte 0"):
        read_template_of_folder(tmp_path)
    with pytest.raises(UserError, match="tokenizer.chat_template is 5, but a model needs"):
        read_chat_template({"tokenizer.chat_template": 5}, "file")


PLAIN = torch.ones(4)
NOT_PLAIN = {
    "sparse": PLAIN.to_sparse(),
    "without values": torch.ones(4, device="meta"),
    "nested": torch.nested.nested_tensor([PLAIN, torch.ones(2)], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_tensor_that_has_no_plain_values_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="the tensor b is sparse, nested, quantised or without"):
        require_tensors({"a": PLAIN, "b": NOT_PLAIN[kind]}, Path("file"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(value: float) -> None:
    weight = torch.linspace(-3, 3, 24).view(4, 6)
    assert is_finite(weight) and is_finite(weight.T)
    weight[2, 3] = value
    assert not is_finite(weight)


# ---- GGUF ----

KEYS: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["a", "b", "ab"],
    "merges": ["a b"],
}
SENTENCEPIECE = {"model": "llama", "scores": [0.0, 0.0, 0.0]}
WRONG_KEYS: dict[str, dict[str, Any]] = {
    "ggml.tokens has no value": {"tokens": ["a", 5, "ab"]},
    "ggml.token_type has no value": {"token_type": [1, 1]},
    "ggml.scores has no value": SENTENCEPIECE | {"scores": [0.0, float("nan"), 0.0]},
    "has the token 'a' twice": {"tokens": ["a", "b", "a"], "merges": []},
    "add_bos_token is 'x'": {"add_bos_token": "x"},
    "add_space_prefix is 'x'": SENTENCEPIECE | {"add_space_prefix": "x"},
}


def tokenizer_of(keys: dict[str, Any]) -> JsonTokenizer:
    values = {f"tokenizer.ggml.{key}": value for key, value in (KEYS | keys).items()}
    return read_tokenizer(values, "name", "file")


@pytest.mark.parametrize("words", WRONG_KEYS)
def test_a_gguf_tokenizer_of_another_type_is_refused(words: str) -> None:
    with pytest.raises(UserError) as refused:
        tokenizer_of(WRONG_KEYS[words])
    assert words in str(refused.value)


@pytest.mark.parametrize("i", [-1, 2**32 - 1])
def test_an_id_outside_the_vocabulary_names_no_token(i: int) -> None:
    found = tokenizer_of({"bos_token_id": i, "eos_token_id": 2, "eot_token_id": i})
    assert (found.bos_id, found.eos_id, found.end_ids) == (None, 2, ())
    assert f"bos_token_id is {i}, beyond the vocabulary" in found.note


@pytest.mark.parametrize("offset", [1, 2**64 - 64])
def test_a_tensor_at_an_impossible_offset_is_refused(tmp_path: Path, offset: int) -> None:
    path = write_gguf(tmp_path / "model.gguf", gpt2())
    entry = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    content = path.read_bytes()
    # name, number of dimensions (4 bytes), one dimension (8), type (4), offset (8)
    where = content.index(entry.name.encode()) + len(entry.name) + 16
    path.write_bytes(content[:where] + np.uint64(offset).tobytes() + content[where + 8 :])
    with pytest.raises(UserError, match="is damaged|truncated or damaged"):
        read_gguf(path, "name")


def test_a_split_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_string("split.count", "x")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="split.count is 'x'"):
        read_gguf(tmp_path / "model.gguf", "name")


def test_a_key_or_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """json and safetensors take one of the two."""
    save(llama(), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    text, data = config.read_text(), weights.read_bytes()
    config.write_text(text.replace("{", '{"hidden_size": 8,', 1))
    with pytest.raises(UserError, match="it has 'hidden_size' twice"):
        read_folder(tmp_path)
    config.write_text(text)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = f'"model.norm.weight": {json.dumps(header["model.norm.weight"])}, '.encode()
    twice = b"{" + entry + data[9 : 8 + length]
    weights.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    with pytest.raises(UserError, match="it has 'model.norm.weight' twice"):
        read_folder(tmp_path)


def test_an_id_of_bos_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    for i in (99_999, -3):
        (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": i}))
        special, _ = read_special_tokens(tmp_path, SPEC)
        assert f"begin a text with id {i}, which is no token" in "; ".join(special.notes)
