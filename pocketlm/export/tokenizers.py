"""Our tokenizers as those of the `tokenizers` library, which AutoTokenizer loads, and of llama.cpp.

A byte is spelt by its letter in GPT-2's vocabulary. Bytes and characters are a byte-pair encoding
without a merge.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers as hf
from gguf import TokenType
from tokenizers import decoders, models, pre_tokenizers

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.conversion.gguf_tokenizer import NORMALIZERS, SPLITTERS
from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import new_token, vocabulary
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer, SeenBytesTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from pocketlm.tokenizer.streaming import byte_letters

UNKNOWN = "<unk>"  # no character, so no symbol of a vocabulary of characters


@dataclass(frozen=True)
class LibraryTokenizer:
    """A tokenizer.json, and the tokens that begin and end a text."""

    spec: dict[str, Any]  # content of the tokenizer.json
    bos_id: int | None  # what stands before a text, which may be the eos
    eos_id: int | None
    end_ids: tuple[int, ...]  # that end a generated text besides eos
    names: dict[str, str]  # bos_token, eos_token, ...
    adds_bos: bool

    @property
    def json_text(self) -> str:
        return json.dumps(self.spec, ensure_ascii=False)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids by spelling, of the vocabulary and of tokens added to it."""
        added = {token["content"]: token["id"] for token in self.spec["added_tokens"]}
        return vocabulary(self.spec) | added


def library_tokenizer(tokenizer: Tokenizer) -> LibraryTokenizer:
    """Return the tokenizer.json of any tokenizer, with the same ids for the same text.

    A tokenizer.json that does not say what stands before a text gets that of `document_prefix`.
    """
    spec = tokenizer_json(tokenizer)
    spelling = {i: token for token, i in vocabulary(spec).items()}
    spelling |= {token["id"]: token["content"] for token in spec["added_tokens"]}
    opens_with_eos = tokenizer.document_prefix == [tokenizer.eos_id]
    bos_id = tokenizer.eos_id if opens_with_eos else tokenizer.bos_id
    special = {"bos_token": bos_id, "eos_token": tokenizer.eos_id, "unk_token": tokenizer.unk_id}
    names = {name: spelling[i] for name, i in special.items() if i is not None}
    if isinstance(tokenizer, JsonTokenizer):
        others = tokenizer.special_tokens.items()
        names |= {name: token for name, token in others if name not in special}
    add_special(spec, {spelling[i]: i for i in special.values() if i is not None})
    if spec["post_processor"] is None and bos_id is not None and tokenizer.adds_bos:
        spec["post_processor"] = prefix_template(names["bos_token"], bos_id)
    return LibraryTokenizer(
        spec, bos_id, tokenizer.eos_id, tokenizer.end_ids, names, tokenizer.adds_bos
    )


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a tokenizer.json without a post-processor, unless it has its own."""
    if isinstance(tokenizer, JsonTokenizer):
        return dict(json.loads(tokenizer.backend.to_str()))
    ends = {BEGIN_OF_TEXT: tokenizer.bos_id, END_OF_TEXT: tokenizer.eos_id}
    vocab = {token: i for token, i in ends.items() if i is not None}
    if isinstance(tokenizer, CharTokenizer):
        vocab |= {UNKNOWN: tokenizer.unk_id} | tokenizer.ids
        backend = hf.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
        backend.decoder = decoders.Fuse()
    else:
        assert isinstance(tokenizer, ByteTokenizer | SeenBytesTokenizer)
        seen = range(256) if isinstance(tokenizer, ByteTokenizer) else tokenizer.seen.tolist()
        letters = byte_letters()
        vocab |= {letters[byte]: i for i, byte in enumerate(seen)}
        backend = hf.Tokenizer(models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    return dict(json.loads(backend.to_str()))


def add_special(spec: dict[str, Any], ids: dict[str, int]) -> None:
    """Put tokens among the special ones of a tokenizer.json."""
    added = {token["content"]: token for token in spec["added_tokens"]}
    for token, i in ids.items():
        added.setdefault(token, new_token(token, i))["special"] = True
    spec["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


def prefix_template(bos: str, bos_id: int) -> dict[str, Any]:
    """Return the post-processor that puts a token before every text."""
    first, text, second = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


# ---- llama.cpp's byte-level BPE ----

END_KEYS = ("eot", "eom")  # of tokens besides eos that end a text
TOKEN_KEYS = {"unk_token": "unknown", "pad_token": "padding"}

# llama.cpp refuses a file without merges. Bytes have none: this one is of letters that spell no
# byte, so it never applies.
NO_MERGE = "\u2400 \u2400"


@dataclass(frozen=True)
class GGUFTokenizer:
    """A byte-level BPE as the keys `tokenizer.ggml.*` describe it."""

    tokens: dict[int, tuple[str, TokenType]]  # by id
    merges: list[str]
    splitter: str  # llama.cpp's name of the splitting of a text before the merges
    ids: dict[str, int]  # by KEY of KEY_token_id
    adds_bos: bool
    notes: tuple[str, ...] = ()  # what is lost


def gguf_tokenizer(checkpoint: Checkpoint) -> GGUFTokenizer:
    """Return the tokenizer of a checkpoint. Raises UserError if llama.cpp has none with its ids."""
    tokenizer = library_tokenizer(checkpoint.tokenizer)
    spec, name = tokenizer.spec, checkpoint.tokenizer.name
    if isinstance(checkpoint.tokenizer, ByteTokenizer):
        splitter, merges = "gpt-2", [NO_MERGE]
    else:
        splitter = splitter_of(spec, name)
        merges = [" ".join(pair) for pair in spec["model"]["merges"]]
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    kinds = {True: TokenType.CONTROL, False: TokenType.USER_DEFINED, None: TokenType.NORMAL}
    tokens = {i: (token, kinds[special.get(token)]) for token, i in tokenizer.ids.items()}
    ids, notes = special_ids(tokenizer)
    if splitter in NORMALIZERS:
        form = spec["normalizer"]["type"]
        notes += (f"llama.cpp does not normalise a text to {form}, as this tokenizer does",)
    prefix = checkpoint.tokenizer.document_prefix
    adds_bos = checkpoint.tokenizer.adds_bos and prefix == [tokenizer.bos_id]
    return GGUFTokenizer(tokens, merges, splitter, ids, adds_bos, notes)


def splitter_of(spec: dict[str, Any], name: str) -> str:
    """Return the name of the splitting of a byte-level BPE. Raises UserError if it is none."""
    model, found = spec["model"], spec["pre_tokenizer"] or {}
    if model["type"] == "BPE" and model["merges"]:
        for splitter, steps in SPLITTERS.items():
            known = json.loads(pre_tokenizers.Sequence(steps).__getstate__())["pretokenizers"]
            normalizer = NORMALIZERS.get(splitter)
            form = None if normalizer is None else json.loads(normalizer.__getstate__())
            same = without_offsets(found.get("pretokenizers", [found])) == without_offsets(known)
            if same and spec["normalizer"] == form:
                return splitter
    raise UserError(
        f"llama.cpp has no tokenizer with the ids of {name!r}; it has those of byte, bpe:SIZE, "
        f"gpt2, gpt2:SIZE, and of byte-level BPEs that split text as {', '.join(SPLITTERS)}; "
        "convert to hf, onnx or safetensors, or train with another data.tokenizer"
    )


def without_offsets(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps of a splitting without the key that changes no id."""
    return [{key: each for key, each in step.items() if key != "trim_offsets"} for step in steps]


def special_ids(tokenizer: LibraryTokenizer) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the ids of special tokens by key, and a note on those that have no key."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    ids |= dict(zip(END_KEYS, tokenizer.end_ids, strict=False))
    for name, key in TOKEN_KEYS.items():
        ids[key] = tokenizer.ids.get(tokenizer.names.get(name, ""))
    notes = []
    if lost := tokenizer.end_ids[len(END_KEYS) :]:
        notes.append(f"GGUF has no key for the end ids {', '.join(map(str, lost))}: left out")
    return {key: i for key, i in ids.items() if i is not None}, tuple(notes)
