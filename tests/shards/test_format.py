"""Token shards: what they hold, how a damaged one is refused, and a writer that resumes."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from pocketlm.errors import UserError
from pocketlm.shards import format
from pocketlm.shards.format import EncodedBatch, ShardWriter, TokenShard
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.code_points import CodePointTokenizer
from tests.support.rows import write_shard

DATA = Path(__file__).parents[2] / "data"


# ---- what they hold ----


@pytest.mark.parametrize("bos, eos, tokens, offsets", [
    (None, None, [97, 98, 99, 100], [0, 2, 2]),
    (1, None, [1, 97, 98, 1, 1, 99, 100], [0, 3, 4]),
    (None, 2, [2, 97, 98, 2, 2, 99, 100, 2], [0, 3, 4]),  # an eos starts the first document too
    (1, 2, [1, 97, 98, 2, 1, 2, 1, 99, 100, 2], [0, 4, 6]),
])  # fmt: skip
def test_a_shard_holds_the_documents_and_where_each_begins(tmp_path, bos, eos, tokens, offsets):
    shard = write_shard(
        tmp_path / "x.bin", CodePointTokenizer(bos_id=bos, eos_id=eos), ["ab", ""], ["cd"]
    )
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
    shard = write_shard(tmp_path / "x.bin", CodePointTokenizer(vocab_size), ["a" + last])
    assert shard.tokens.tolist() == [97, vocab_size - 1]
    assert shard.tokens.dtype == dtype
    assert shard.offsets.tolist() == [0]


# ---- what is refused ----


def read_shard(path: Path) -> tuple:
    """Return everything that a shard holds."""
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
    """No bit of the tokens, the offsets and the header may change unnoticed."""
    path = tmp_path / "train.bin"
    write_shard(path, ByteTokenizer(), ["abc" * 20, "def"])
    raw, good = path.read_bytes(), read_shard(path)
    used = [*range(12 + int.from_bytes(raw[8:12], "little")), *range(1024, len(raw))]
    refused = []
    for i in used:
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 7]) + raw[i + 1 :])
        try:
            content = read_shard(path)
        except UserError as error:
            refused.append((i, str(path) in str(error)))
            continue
        assert content == good, f"byte {i} was {raw[i : i + 1]!r}"
    assert all(is_named for _, is_named in refused)
    assert set(range(1024, len(raw))) < {i for i, _ in refused}


def test_a_foreign_and_a_missing_shard_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="gone.bin is missing"):
        TokenShard(tmp_path / "gone.bin")
    (tmp_path / "text.bin").write_text("once upon a time " * 100)
    with pytest.raises(UserError, match="text.bin is not a token shard"):
        TokenShard(tmp_path / "text.bin")


def resealed(path: Path, **changes: object) -> Path:
    """Write values into the header of a shard, and the hash that fits its content; return it."""
    raw = path.read_bytes()
    fields = json.loads(raw[12 : 12 + int.from_bytes(raw[8:12], "little")])
    fields |= changes | {"sha256": ""}
    fields["sha256"] = hashlib.sha256(raw[1024:] + json.dumps(fields).encode()).hexdigest()
    text = json.dumps(fields).encode()
    head = (b"TOKSHARD" + len(text).to_bytes(4, "little") + text).ljust(1024, b"\0")
    path.write_bytes(head + raw[1024:])
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "O"},  # numpy would take the tokens for addresses of objects
        {"dtype": "<f2"},
        {"dtype": "<u4"},
        {"dtype": None},
        {"tokens": -1},
        {"tokens": 2**62},
        {"tokens": 4.0},
        {"tokens": True},
        {"documents": 2**40},
        {"documents": 3},
        {"bytes": -5},
        {"tokenizer": 1},
    ],
    ids=str,
)
def test_a_header_that_no_writer_writes_is_refused_even_with_the_right_hash(tmp_path, changes):
    path = tmp_path / "x.bin"
    write_shard(path, ByteTokenizer(), ["abc", "de"])
    content = read_shard(path)
    assert read_shard(resealed(path)) == content  # the seal itself is right
    with pytest.raises(UserError, match="x.bin is damaged"):
        TokenShard(resealed(path, **changes))


@pytest.mark.parametrize("offsets", [[-1, 4], [4, 0], [0, 99]], ids=str)
def test_documents_that_begin_outside_the_tokens_are_refused(tmp_path, offsets):
    path = tmp_path / "x.bin"
    write_shard(path, ByteTokenizer(), ["abc", "de"])
    path.write_bytes(path.read_bytes()[:-16] + np.array(offsets, "<i8").tobytes())
    with pytest.raises(UserError, match="x.bin is damaged"):
        TokenShard(resealed(path))


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


# ---- a writer that resumes ----


BATCHES = [EncodedBatch(np.arange(n, n + 5) % 7, np.array([0, 2]), n) for n in range(6)]


def write_and_kill(path: Path, before: int, after: int, close: bool = False) -> dict[str, int]:
    """Write batches, take the state, and write more; return the state, as after a kill."""
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
def test_a_writer_resumes_from_a_state_as_if_nothing_had_happened(tmp_path, before, after, close):
    write_and_kill(tmp_path / "once.bin", 6, 6, close=True)
    path = tmp_path / "twice.bin"
    state = write_and_kill(path, before, after, close)
    with ShardWriter(path, ByteTokenizer(), json.loads(json.dumps(state))) as writer:
        for batch in BATCHES[before:]:
            writer.write(batch)
        writer.close()
    assert path.read_bytes() == (tmp_path / "once.bin").read_bytes()


@pytest.mark.parametrize("file", ["x.bin", "x.offsets"])
def test_a_writer_does_not_resume_if_less_is_on_the_disk(tmp_path, file):
    state = write_and_kill(tmp_path / "x.bin", 3, 3)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} has lost its end"):
        ShardWriter(tmp_path / "x.bin", ByteTokenizer(), state)


def test_a_state_is_returned_once_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    sizes = []
    with ShardWriter(tmp_path / "x.bin", ByteTokenizer()) as writer:
        writer.write(BATCHES[0])
        monkeypatch.setattr(format.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
        assert writer.state() == {"tokens": 5, "documents": 2, "bytes": 0}
    assert sizes == [1024 + 5 * 2, 2 * 8]


def test_a_shard_is_on_the_disk_when_it_is_closed(tmp_path, monkeypatch):
    sizes = []
    with ShardWriter(tmp_path / "x.bin", ByteTokenizer()) as writer:
        writer.write(BATCHES[0])
        monkeypatch.setattr(format.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
        writer.close()
    assert sizes == [(tmp_path / "x.bin").stat().st_size]


def test_a_writer_without_a_state_starts_again(tmp_path):
    write_and_kill(tmp_path / "once.bin", 0, 1, close=True)
    write_and_kill(tmp_path / "again.bin", 0, 6, close=True)
    write_and_kill(tmp_path / "again.bin", 0, 1, close=True)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "once.bin").read_bytes()
