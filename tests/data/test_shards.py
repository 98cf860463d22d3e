"""Tokens on disk: what a shard holds, how a damaged one is refused, and the files of nanoGPT and llm.c."""

import dataclasses
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import DataConfig
from pocketlm.corpus import chunks
from pocketlm.corpus.chunks import Chunk
from pocketlm.data import bin_files, shard_builder, shards
from pocketlm.data import prepare as prepare_module
from pocketlm.data.bin_files import read_bin, write_bin
from pocketlm.data.prepare import prepare
from pocketlm.data.shard_builder import encode
from pocketlm.data.shards import EncodedBatch, ShardWriter, TokenShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer

DATA = Path(__file__).parents[2] / "data"


class Odd(Tokenizer):
    """A character's code point, with what a test wants around a document."""

    kind = name = "odd"

    def __init__(
        self, vocab_size: int = 2**16, bos_id: int | None = None, eos_id: int | None = None
    ):
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i not in (self.bos_id, self.eos_id))

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name}


def write_shard(path: Path, tokenizer: Tokenizer, *batches: list[str]) -> TokenShard:
    with ShardWriter(path, tokenizer) as writer:
        for batch in batches:
            writer.write(encode([Chunk(False, document) for document in batch], tokenizer)[False])
        writer.close()
    return TokenShard(path)


# ---- what they hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos, eos, tokens, offsets", [
    (None, None, [97, 98, 99, 100], [0, 2, 2]),
    (1, None, [1, 97, 98, 1, 1, 99, 100], [0, 3, 4]),
    (None, 2, [2, 97, 98, 2, 2, 99, 100, 2], [0, 3, 4]),  # the first document is led in by an eos too
    (1, 2, [1, 97, 98, 2, 1, 2, 1, 99, 100, 2], [0, 4, 6]),
])  # fmt: skip
def test_a_shard_holds_the_documents_and_where_each_begins(tmp_path, bos, eos, tokens, offsets):
    shard = write_shard(tmp_path / "x.bin", Odd(bos_id=bos, eos_id=eos), ["ab", ""], ["cd"])
    assert (shard.tokens.tolist(), shard.offsets.tolist()) == (tokens, offsets)
    assert (shard.header.tokens, shard.header.documents, shard.header.bytes) == (len(tokens), 3, 4)


@pytest.mark.parametrize(
    "tokenizer, eos", [(ByteTokenizer(), 256), ("gpt2", 50_256)], ids=["byte", "gpt2"]
)
def test_the_text_between_the_offsets_is_the_documents(tmp_path, tokenizer, eos):
    tokenizer = JsonTokenizer.gpt2(DATA) if tokenizer == "gpt2" else tokenizer
    documents = ["Once upon a time", "naïve 😀", " \n中文"]
    shard = write_shard(tmp_path / "x.bin", tokenizer, documents)
    tokens, ends = shard.tokens.tolist(), [*shard.offsets.tolist()[1:], shard.header.tokens - 1]
    for document, begin, end in zip(documents, shard.offsets.tolist(), ends, strict=True):
        assert tokens[begin] == eos
        assert tokens[begin + 1 : end] == tokenizer.encode(document)
    assert tokens[-1] == eos
    assert shard.header.bytes == sum(len(document.encode()) for document in documents)


@pytest.mark.parametrize("vocab_size, dtype", [(65_536, "uint16"), (65_537, "uint32")])
def test_a_vocabulary_above_65536_is_stored_in_32_bits(tmp_path, vocab_size, dtype):
    last = chr(vocab_size - 1)
    shard = write_shard(tmp_path / "x.bin", Odd(vocab_size), ["a" + last])
    assert shard.tokens.tolist() == [97, vocab_size - 1]
    assert shard.tokens.dtype == dtype
    assert shard.offsets.tolist() == [0]


# ---- what is refused -------------------------------------------------------------------------------------------------


def whole(path: Path) -> tuple:
    shard = TokenShard(path)
    return shard.header, shard.tokens.tolist(), shard.offsets.tolist()


def test_a_shard_cut_off_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "train.bin"
    write_shard(path, ByteTokenizer(), ["abc", "def"])
    raw = path.read_bytes()
    for size in [*range(0, 300, 7), 1000, 1023, *range(1024, len(raw))]:
        path.write_bytes(raw[:size])
        with pytest.raises(UserError, match="train.bin"):
            TokenShard(path)
    path.write_bytes(raw + b"\0")
    with pytest.raises(UserError, match="train.bin is damaged"):
        TokenShard(path)


def test_a_flipped_bit_in_a_shard_is_refused_or_harmless(tmp_path):
    """Tokens, offsets and the header that says how many there are: none of them may change unnoticed."""
    path = tmp_path / "train.bin"
    write_shard(path, ByteTokenizer(), ["abc" * 20, "def"])
    raw, good = path.read_bytes(), whole(path)
    used = [*range(12 + int.from_bytes(raw[8:12], "little")), *range(1024, len(raw))]
    refused = []
    for place in used:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << place % 7]) + raw[place + 1 :])
        try:
            read = whole(path)
        except UserError as error:
            refused.append((place, str(path) in str(error)))
            continue
        assert read == good, f"byte {place} was {raw[place : place + 1]!r}"
    assert all(named for _, named in refused)
    assert set(range(1024, len(raw))) < {place for place, _ in refused}


def test_a_foreign_and_a_missing_shard_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="gone.bin is missing"):
        TokenShard(tmp_path / "gone.bin")
    (tmp_path / "text.bin").write_text("once upon a time " * 100)
    with pytest.raises(UserError, match="text.bin is not a token shard"):
        TokenShard(tmp_path / "text.bin")


def test_a_shard_of_a_newer_version_is_refused_by_name(tmp_path):
    path = tmp_path / "x.bin"
    header = dataclasses.asdict(write_shard(path, ByteTokenizer(), ["abc"]).header)
    text = json.dumps({**header, "version": 99, "something": "new"}).encode()
    path.write_bytes(
        (b"TOKSHARD" + len(text).to_bytes(4, "little") + text).ljust(1024, b"\0")
        + path.read_bytes()[1024:]
    )
    with pytest.raises(UserError, match="x.bin.*version 99"):
        TokenShard(path)


# ---- a writer that goes on -------------------------------------------------------------------------------------------


BATCHES = [EncodedBatch(np.arange(n, n + 5) % 7, np.array([0, 2]), n) for n in range(6)]


def continued(path: Path, before: int, after: int, close: bool = False) -> dict[str, int]:
    """Write, take the state, and write more, which a killed process would have; the state."""
    with ShardWriter(path, ByteTokenizer()) as writer:
        for batch in BATCHES[:before]:
            writer.write(batch)
        state = writer.state()
        for batch in BATCHES[before:after]:
            writer.write(batch)
        if close:
            writer.close()
    return state


@pytest.mark.parametrize(
    "before, after, close",
    [(0, 0, False), (2, 2, False), (2, 5, False), (6, 6, True), (1, 6, True)],
)
def test_a_writer_goes_on_from_a_state_as_if_nothing_had_happened(tmp_path, before, after, close):
    continued(tmp_path / "once.bin", 6, 6, close=True)
    path = tmp_path / "twice.bin"
    state = continued(path, before, after, close)
    with ShardWriter(path, ByteTokenizer(), json.loads(json.dumps(state))) as writer:
        for batch in BATCHES[before:]:
            writer.write(batch)
        writer.close()
    assert path.read_bytes() == (tmp_path / "once.bin").read_bytes()


@pytest.mark.parametrize("file", ["x.bin", "x.offsets"])
def test_a_writer_does_not_go_on_where_less_is_on_the_disk(tmp_path, file):
    state = continued(tmp_path / "x.bin", 3, 3)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} has lost its end"):
        ShardWriter(tmp_path / "x.bin", ByteTokenizer(), state)


def test_a_state_is_told_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    sizes = []
    with ShardWriter(tmp_path / "x.bin", ByteTokenizer()) as writer:
        writer.write(BATCHES[0])
        monkeypatch.setattr(shards.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
        assert writer.state() == {"tokens": 5, "documents": 2, "bytes": 0}
    assert sizes == [1024 + 5 * 2, 2 * 8]


def test_a_writer_without_a_state_begins_anew(tmp_path):
    continued(tmp_path / "once.bin", 0, 1, close=True)
    continued(tmp_path / "again.bin", 0, 6, close=True)
    continued(tmp_path / "again.bin", 0, 1, close=True)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "once.bin").read_bytes()


# ---- other programs' files -------------------------------------------------------------------------------------------


def nanogpt(path: Path, ids: list[int]) -> None:
    """As nanoGPT's data/openwebtext/prepare_module.py writes them."""
    np.array(ids, dtype=np.uint16).tofile(path)


def llmc(path: Path, ids: list[int], dtype: type = np.uint16, version: int | None = None) -> None:
    """As `write_datafile` of llm.c's dev/data/data_common.py writes them."""
    header = np.zeros(256, dtype=np.int32)
    header[0] = {np.uint16: 20240520, np.uint32: 20240801}[dtype]
    header[1] = version or {np.uint16: 1, np.uint32: 7}[dtype]
    header[2] = len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())


WRITERS = {"nanogpt": nanogpt, "llmc": llmc, "llmc32": lambda path, ids: llmc(path, ids, np.uint32)}


def config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(
        **{
            "path": str(folder / "train.bin"),
            "tokenizer": "byte",
            "cache_dir": str(folder / "cache"),
            **changes,
        }
    )


def with_val(folder: Path, **changes: object) -> DataConfig:
    """All of train.bin is for training."""
    nanogpt(folder / "val.bin", [*b"other", 256])
    return config(folder, **{"val_path": str(folder / "val.bin"), **changes})


@pytest.mark.parametrize("write", WRITERS)
def test_a_token_file_is_read_as_it_is_and_its_end_is_validation(tmp_path, write):
    ids = [*b"one", 256, *b"two!", 256, *b"three", 256, *b"four", 256, *b"fi"]
    WRITERS[write](tmp_path / "train.bin", ids)
    data = prepare(config(tmp_path, val_share=0.25))
    (train,), (val,) = data.train.shards, data.val.shards
    assert len(ids) == 22
    assert train.tokens.tolist() == [*ids[:16], 256]  # every part ends as a document does
    assert train.offsets.tolist() == [0, 3, 8, 14]
    assert val.tokens.tolist() == [*ids[16:], 256]
    assert val.offsets.tolist() == [0, 3]
    assert (train.header.bytes, val.header.bytes) == (13, 5)


@pytest.mark.parametrize("ids, documents", [
    ([*b"ab", 256, *b"c", 256], [0, 2]),  # nanoGPT's: an eos behind each
    ([256, *b"ab", 256, *b"c"], [0, 3]),  # llm.c's: one before each
    ([256, *b"ab", 256, *b"c", 256], [0, 3]),
    ([*b"ab", 256, 256, *b"c", 256], [0, 2, 3]),
])  # fmt: skip
def test_an_eos_opens_a_document_and_the_last_one_only_closes(tmp_path, ids, documents):
    nanogpt(tmp_path / "train.bin", ids)
    (shard,) = prepare(with_val(tmp_path)).train.shards
    assert shard.tokens.tolist() == (ids if ids[-1] == 256 else [*ids, 256])
    assert shard.offsets.tolist() == documents


def test_with_bos_a_document_begins_at_each(tmp_path):
    ids = [256, *b"ab", 257, 256, *b"c", 257]
    nanogpt(tmp_path / "train.bin", ids)
    (shard,) = prepare(with_val(tmp_path, bos=True)).train.shards
    assert (shard.tokens.tolist(), shard.offsets.tolist(), shard.header.bytes) == (ids, [0, 4], 3)


def test_without_bos_and_eos_a_file_is_one_document(tmp_path):
    nanogpt(tmp_path / "train.bin", [*b"abcdef"])
    nanogpt(tmp_path / "val.bin", [*b"gh"])
    (shard,) = prepare(config(tmp_path, val_path=str(tmp_path / "val.bin"), eos=False)).train.shards
    assert (shard.tokens.tolist(), shard.offsets.tolist()) == ([*b"abcdef"], [0])


TEXTS = st.lists(st.text(alphabet="aé中😀 ", min_size=1, max_size=8), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(texts=TEXTS, batch=st.integers(1, 12), share=st.floats(0.1, 0.9), files=st.integers(1, 3))
def test_batches_of_a_token_file_are_seen_nowhere(tmp_path_factory, texts, batch, share, files):
    """Wherever a batch or a file ends, in the middle of a character too: the tokens, the documents, the bytes of the text."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = [i for text in ["begin", *texts, "the end"] for i in [*text.encode(), 256]]
    (folder / "part").mkdir()
    for number, part in enumerate(np.array_split(np.array(ids), files)):
        nanogpt(folder / "part" / f"{number}.bin", part.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_builder, "BATCH", batch)
        patch.setattr(chunks, "UNCUT", 4 * batch)
        data = prepare(config(folder, path=str(folder / "part"), val_share=share))
    border = int(len(ids) * (1 - share))
    for shard, part in ((data.train.shards[0], ids[:border]), (data.val.shards[0], ids[border:])):
        inner = part[:-1] if part[-1] == 256 else part
        assert shard.tokens.tolist() == [*inner, 256]
        assert shard.offsets.tolist() == sorted(
            {0} | {i for i, token in enumerate(inner) if token == 256}
        )
        assert shard.header.bytes == len(
            bytes(i for i in inner if i < 256).decode(errors="replace").encode()
        )


@pytest.mark.parametrize("write", WRITERS)
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path, monkeypatch, write):
    monkeypatch.setattr(shard_builder, "BATCH", 4)
    monkeypatch.setattr(chunks, "UNCUT", 4 * 4)
    WRITERS[write](tmp_path / "train.bin", [*b"one two", 256, 257, 3])
    with pytest.raises(
        UserError,
        match=r"train.bin holds the id 257 as its token 8, but the tokenizer 'byte' has 257 entries",
    ):
        prepare(config(tmp_path))
    assert [path for path in (tmp_path / "cache" / "shards").iterdir() if path.is_dir()] == []


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_bin(path, ByteTokenizer())
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_broken_token_file_is_refused_by_name(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"abc")
    assert "3 bytes, an odd number" in refusal(path)
    llmc(path, [1, 2, 3])
    raw = path.read_bytes()
    path.write_bytes(raw[:-2])
    assert "its header says 3 tokens, 1030 bytes; it has 1028" in refusal(path)
    path.write_bytes(raw + b"\0\0")
    assert "it has 1032" in refusal(path)
    path.write_bytes(raw[:600])
    assert "it has 600" in refusal(path)
    llmc(path, [1, 2, 3], version=2)
    assert "llm.c file of version 2; this program reads 1" in refusal(path)
    llmc(path, [1, 2, 3], np.uint32, version=1)
    assert "llm.c file of version 1; this program reads 7" in refusal(path)


def test_a_compressed_token_file_is_refused(tmp_path):
    path = tmp_path / "x.bin.gz"
    path.write_bytes(b"abcd")
    assert "is compressed" in refusal(path)


def test_an_empty_token_file_holds_no_text(tmp_path):
    for write in WRITERS.values():
        write(tmp_path / "train.bin", [])
        with pytest.raises(UserError, match="train.bin holds no text"):
            prepare(config(tmp_path))


def test_a_shard_of_ours_is_read_with_its_own_tokenizer_only(tmp_path):
    shard = write_shard(tmp_path / "train.bin", ByteTokenizer(), ["one", "two"])
    (again,) = prepare(with_val(tmp_path)).train.shards
    assert whole(again.path) == whole(shard.path)
    with pytest.raises(UserError, match="train.bin was made with another tokenizer than 'byte'"):
        prepare(with_val(tmp_path, bos=True))


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
@pytest.mark.parametrize("val", [False, True])
def test_no_tokenizer_is_trained_on_tokens(tmp_path, kind, val):
    nanogpt(tmp_path / "train.bin", [*b"one", 256])
    (tmp_path / "text.txt").write_text("some text")
    paths = (
        {"path": str(tmp_path / "text.txt"), "val_path": str(tmp_path / "train.bin")} if val else {}
    )
    with pytest.raises(
        UserError, match=f"train.bin holds tokens, from which no tokenizer '{kind}' can be trained"
    ):
        prepare(config(tmp_path, tokenizer=kind, **paths))


# nanoGPT's and llm.c's own loaders, as train.py and train_gpt2.py have them


def nanogpt_loads(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=np.uint16, mode="r")


def llmc_loads(
    path: Path, magic: int = 20240520, version: int = 1, dtype: type = np.uint16
) -> np.ndarray:
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert (header[0], header[1]) == (magic, version)
        tokens = np.frombuffer(file.read(), dtype=dtype)
    assert len(tokens) == header[2]
    assert not header[3:].any()
    return tokens


def test_what_is_written_is_what_the_other_programs_load(tmp_path):
    shard = write_shard(tmp_path / "x.bin", ByteTokenizer(), ["once", "upon a time"])
    tokens = [256, *b"once", 256, *b"upon a time", 256]
    write_bin(tmp_path / "new" / "train.bin", shard, "nanogpt")
    assert nanogpt_loads(tmp_path / "new" / "train.bin").tolist() == tokens
    write_bin(tmp_path / "new" / "train.bin", shard, "llmc")
    assert llmc_loads(tmp_path / "new" / "train.bin").tolist() == tokens
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train.bin"]


def test_a_larger_vocabulary_is_written_in_32_bits_and_refused_for_nanogpt(tmp_path):
    shard = write_shard(tmp_path / "x.bin", Odd(2**17), ["a\U00010000"])
    write_bin(tmp_path / "train.bin", shard, "llmc")
    assert llmc_loads(tmp_path / "train.bin", 20240801, 7, np.uint32).tolist() == [97, 2**16]
    with pytest.raises(UserError, match="ids up to 65,535.*write val as llmc"):
        write_bin(tmp_path / "val.bin", shard, "nanogpt")
    assert not (tmp_path / "val.bin").exists()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_of_32_bits_go_into_a_shard_as_wide_as_the_vocabulary_asks(
    tmp_path, dtype, monkeypatch
):
    monkeypatch.setattr(prepare_module, "build_tokenizer", lambda *_, **__: Odd(2**17, eos_id=2))
    ids = [97, 2, 98, 2] if dtype is np.uint16 else [97, 2, 2**17 - 1, 2]
    llmc(tmp_path / "train.bin", ids, dtype)
    (shard,) = prepare(with_val(tmp_path)).train.shards
    assert shard.tokens.tolist() == ids
    assert (shard.tokens.dtype, shard.header.bytes) == (np.uint32, 2 if dtype is np.uint16 else 5)


def test_more_tokens_than_llmc_can_count_are_refused(tmp_path):
    shard = write_shard(tmp_path / "x.bin", ByteTokenizer(), ["a"])
    shard.header = dataclasses.replace(shard.header, tokens=2**31)
    with pytest.raises(
        UserError, match="llm.c's header counts up to 2,147,483,647 tokens; train has 2,147,483,648"
    ):
        write_bin(tmp_path / "train.bin", shard, "llmc")
    assert not (tmp_path / "train.bin").exists()


def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "x.bin", ByteTokenizer(), ["a"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.bin").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_bin(tmp_path / "out" / "train.bin", shard, "llmc")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [
        ("train.bin", b"old")
    ]


@pytest.mark.parametrize("form", ["nanogpt", "llmc"])
@pytest.mark.parametrize("ends", [{}, {"bos": True}, {"bos": True, "eos": False}])
def test_a_text_that_went_through_another_programs_file_has_the_same_shard(tmp_path, form, ends):
    texts = ["naïve 😀", "two", "the third one"]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    (tmp_path / "val.txt").write_text("x")
    text = config(
        tmp_path, path=str(tmp_path / "text.jsonl"), val_path=str(tmp_path / "val.txt"), **ends
    )
    (first,) = prepare(text).train.shards
    write_bin(tmp_path / "train.bin", first, form)
    (second,) = prepare(dataclasses.replace(text, path=str(tmp_path / "train.bin"))).train.shards
    assert second.path != first.path
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.header.bytes == sum(len(text.encode()) for text in texts)


def test_the_magic_numbers_are_those_of_llmc():
    """dev/data/data_common.py: HEADERS_INFO of gpt-2 and llama-3."""
    assert {dtype: struct.pack("<2i", *numbers) for dtype, numbers in bin_files.LLMC.items()} == {
        "<u2": np.array([20240520, 1], "<i4").tobytes(),
        "<u4": np.array([20240801, 7], "<i4").tobytes(),
    }
