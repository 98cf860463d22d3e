"""The special tokens of a folder's files, against transformers on the same folder."""

import json
from pathlib import Path

import pytest
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig

from pocketlm.tokenizer.bpe import JsonTokenizer

END = "<|endoftext|>"
TOKENS = [END, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>"]  # their ids are 0 to 5
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def backend(
    special: list[str] = TOKENS, post_processor: processors.PostProcessor | None = None
) -> hf.Tokenizer:
    """Return a tokenizer of bytes with these special tokens first."""
    vocab = {token: i for i, token in enumerate([*TOKENS, *LETTERS])}
    made = hf.Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    made.post_processor = post_processor
    return made


def folder_of(tmp_path: Path, made: hf.Tokenizer, **files: object) -> Path:
    """Write a tokenizer.json, and JSON files by their names without the ending."""
    made.save(str(tmp_path / "tokenizer.json"))
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return tmp_path


def bos_first(token: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, TOKENS.index(token))]
    )


def as_object(token: str) -> dict[str, object]:
    """Return a token as older versions of transformers write it."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"__type": "AddedToken", "content": token} | flags


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
CHAT = FAST | {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": END}
FOLDERS = {
    "GPT-2 as it is distributed": dict(
        tokenizer_config={"model_max_length": 1024}, config={"model_type": "gpt2"}
    ),
    "tokenizer_class names them": dict(
        tokenizer_config={"tokenizer_class": "GPT2Tokenizer"}, config={"model_type": "llama"}
    ),
    "names as objects": dict(
        tokenizer_config=FAST | {"bos_token": as_object("<s>"), "eos_token": as_object("</s>")}
    ),
    "special_tokens_map alone": dict(
        tokenizer_config=FAST, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"}
    ),
    "special_tokens_map is newer than an old tokenizer_config": dict(
        tokenizer_config=FAST | {"eos_token": "</s>"},
        special_tokens_map={"eos_token": {"content": "<|im_end|>"}},
    ),
    "special_tokens_map beside a tokenizer_config with added_tokens_decoder": dict(
        tokenizer_config=FAST
        | {
            "eos_token": "</s>",
            "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
        },
        special_tokens_map={"bos_token": "<s>", "eos_token": "<|im_end|>"},
    ),
    "a chat model": dict(tokenizer_config=CHAT),
    "eos alone, null for bos": dict(
        tokenizer_config=FAST | {"bos_token": None, "eos_token": END}, config={"model_type": "gpt2"}
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_bos_eos_and_their_names_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, backend(), **FOLDERS[kind])
    ours, theirs = JsonTokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos_id == theirs.eos_token_id
    bos_id = theirs.bos_token_id
    assert ours.bos_id == (None if bos_id == theirs.eos_token_id else bos_id)
    assert ours.note == ""


@pytest.mark.parametrize("token", ["<s>", "<|im_start|>"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_post_processor_decides_whether_bos_is_in_front(
    tmp_path: Path, token: str, adds: bool
) -> None:
    processor = bos_first(token) if adds else processors.ByteLevel(trim_offsets=False)
    config = FAST | {"bos_token": token, "eos_token": "</s>"}
    folder = folder_of(tmp_path, backend(post_processor=processor), tokenizer_config=config)
    ours, theirs = JsonTokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)
    in_front = [TOKENS.index(token)] * adds
    assert theirs("a").input_ids == [*in_front, *ours.encode("a")]
    assert ours.bos_id == theirs.bos_token_id and ours.adds_bos == adds
    assert (ours.document_prefix == in_front) == adds


@pytest.mark.parametrize("says", [True, False, None])
def test_add_bos_token_is_heeded(tmp_path: Path, says: bool | None) -> None:
    """What separates the documents of such a model begins them: not the end of a turn."""
    config = CHAT | ({} if says is None else {"add_bos_token": says})
    tokenizer = JsonTokenizer.from_file(folder_of(tmp_path, backend(), tokenizer_config=config))
    bos, end_of_turn, end_of_text = (
        TOKENS.index(token) for token in ("<|im_start|>", "<|im_end|>", END)
    )
    assert tokenizer.bos_id == bos and tokenizer.eos_id == end_of_turn
    if says is False:
        assert tokenizer.document_prefix == tokenizer.corpus_suffix == [end_of_text]
        assert tokenizer.document_suffix == [] and tokenizer.end_ids == (end_of_text,)
    else:
        assert tokenizer.document_prefix == [bos] and tokenizer.document_suffix == [end_of_turn]
    with_bos = tokenizer.with_bos_eos(True, None)
    assert with_bos.document_prefix == [bos] and with_bos.corpus_suffix == []


@pytest.mark.parametrize("ends", [2, [4], [2, 4, 0], None])
@pytest.mark.parametrize("where", ["config", "generation_config"])
def test_every_end_of_generation_config_and_config_ends_a_text(
    tmp_path: Path, where: str, ends: int | list[int] | None
) -> None:
    named = FAST | {"eos_token": "</s>"}
    values = {"model_type": "llama", "eos_token_id": ends}
    folder = folder_of(tmp_path, backend(), tokenizer_config=named, **{where: values})
    tokenizer = JsonTokenizer.from_file(folder)
    theirs = GenerationConfig.from_pretrained(folder, f"{where}.json").eos_token_id
    listed = theirs if isinstance(theirs, list) else [theirs] * (theirs is not None)
    assert {tokenizer.eos_id, *tokenizer.end_ids} == {2, *listed}
    assert tokenizer.eos_id == 2  # which the tokenizer names


def test_ends_that_only_the_model_names_are_the_tokenizers(tmp_path: Path) -> None:
    values = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": [4, 2]}
    folder = folder_of(tmp_path, backend(), tokenizer_config=FAST, config=values)
    tokenizer = JsonTokenizer.from_file(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (1, 4, (2,))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def test_an_end_that_is_an_ordinary_letter_is_said_and_ends_nothing(tmp_path: Path) -> None:
    """LlamaConfig writes the ids of Llama's own tokenizer, whatever the tokenizer is."""
    folder = folder_of(
        tmp_path, backend(), tokenizer_config=CHAT, generation_config={"eos_token_id": [4, 9]}
    )
    tokenizer = JsonTokenizer.from_file(folder)
    assert tokenizer.end_ids == ()
    assert "end a text at id 9, which is no special token" in tokenizer.note


def test_added_tokens_that_tokenizer_json_lacks_are_added_as_transformers_adds_them(
    tmp_path: Path,
) -> None:
    new = {"content": "<|tool|>", "special": True, "normalized": False}
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    last = len(TOKENS) + len(LETTERS)
    decoder = {str(last): new | flags, str(last + 7): new | flags | {"content": "<|gap|>"}}
    folder = folder_of(
        tmp_path, backend(), tokenizer_config=CHAT | {"added_tokens_decoder": decoder}
    )
    ours, theirs = JsonTokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.backend.token_to_id("<|tool|>") == theirs.convert_tokens_to_ids("<|tool|>") == last
    assert "the added token '<|gap|>' cannot have the id" in ours.note
    (tmp_path / "older").mkdir()
    older = folder_of(
        tmp_path / "older", backend(), tokenizer_config=FAST, added_tokens={"<|tool|>": last}
    )
    ours, theirs = JsonTokenizer.from_file(older), AutoTokenizer.from_pretrained(older)
    assert ours.backend.token_to_id("<|tool|>") == theirs.convert_tokens_to_ids("<|tool|>") == last


def test_tokens_that_a_file_calls_special_are_special(tmp_path: Path) -> None:
    """Also if tokenizer.json has them in its vocabulary alone, or does not say so."""
    made = backend(["<s>"])
    made.add_tokens(["<|im_end|>"])
    config = FAST | {"eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]}
    folder = folder_of(tmp_path, made, tokenizer_config=config)
    added = JsonTokenizer.from_file(folder).backend.get_added_tokens_decoder()
    assert {token.content for token in added.values() if token.special} == {
        "<s>",
        "</s>",
        "<|im_end|>",
    }


def test_a_name_that_the_vocabulary_lacks_is_said(tmp_path: Path) -> None:
    config = FAST | {"eos_token": "</s>", "pad_token": "[PAD]"}
    tokenizer = JsonTokenizer.from_file(folder_of(tmp_path, backend(), tokenizer_config=config))
    assert "lacks the pad_token '[PAD]', which is ignored" in tokenizer.note
    assert tokenizer.special_tokens == {"eos_token": "</s>"}


def test_a_tokenizer_json_alone_has_the_usual_tokens_and_keeps_its_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, backend())
    tokenizer = JsonTokenizer.from_file(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (1, 2, ())
    assert tokenizer.json_text == (folder / "tokenizer.json").read_text()
