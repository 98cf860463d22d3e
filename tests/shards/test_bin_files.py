"""Token files of nanoGPT and llm.c, read and written."""

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
from pocketlm.data import prepare as prepare_module
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.shards.bin_files import LLMC_FORMATS, read_bin, write_bin
from pocketlm.shards.builder import BuildSettings
from pocketlm.tokenizer.bytes import ByteTokenizer
from tests.support.code_points import CodePointTokenizer
from tests.support.preparation import byte_config, shard_folders
from tests.support.rows import write_shard

DATA = Path(__file__).parents[2] / "data"


# ---- reading ----


def nanogpt(path: Path, ids: list[int]) -> None:
    """Write ids as nanoGPT's data/openwebtext/prepare.py does."""
    np.array(ids, dtype=np.uint16).tofile(path)


def llmc(path: Path, ids: list[int], dtype: type = np.uint16, version: int | None = None) -> None:
    """Write ids as `write_datafile` of llm.c's dev/data/data_common.py does."""
    header = np.zeros(256, dtype=np.int32)
    header[0] = {np.uint16: 20240520, np.uint32: 20240801}[dtype]
    header[1] = version or {np.uint16: 1, np.uint32: 7}[dtype]
    header[2] = len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())


WRITERS = {"nanogpt": nanogpt, "llmc": llmc, "llmc32": lambda path, ids: llmc(path, ids, np.uint32)}


def config(folder: Path, **changes: object) -> DataConfig:
    return byte_config(folder, **{"path": str(folder / "train.bin"), **changes})


def with_val(folder: Path, **changes: object) -> DataConfig:
    """Return a config in which all of train.bin is for training."""
    nanogpt(folder / "val.bin", [*b"other", 256])
    return config(folder, **{"val_path": str(folder / "val.bin"), **changes})


@pytest.mark.parametrize("write", WRITERS)
def test_a_token_file_is_read_as_it_is_and_its_end_is_validation(tmp_path, write):
    ids = [*b"one", 256, *b"two!", 256, *b"three", 256, *b"four", 256, *b"fi"]
    WRITERS[write](tmp_path / "train.bin", ids)
    data = prepare(config(tmp_path, val_share=0.25))
    (train,), (val,) = data.train.shards, data.val.shards
    assert len(ids) == 22
    assert train.tokens.tolist() == [*ids[:16], 256]  # each split ends with an eos
    assert train.offsets.tolist() == [0, 3, 8, 14]
    assert val.tokens.tolist() == [*ids[16:], 256]
    assert val.offsets.tolist() == [0, 3]
    assert (train.header.bytes, val.header.bytes) == (13, 5)


@pytest.mark.parametrize("ids, documents", [
    ([*b"ab", 256, *b"c", 256], [0, 2]),  # nanoGPT: an eos after each
    ([256, *b"ab", 256, *b"c"], [0, 3]),  # llm.c: one before each
    ([256, *b"ab", 256, *b"c", 256], [0, 3]),
    ([*b"ab", 256, 256, *b"c", 256], [0, 2, 3]),
])  # fmt: skip
def test_an_eos_starts_a_document_and_the_last_one_only_ends_it(tmp_path, ids, documents):
    nanogpt(tmp_path / "train.bin", ids)
    (shard,) = prepare(with_val(tmp_path)).train.shards
    assert shard.tokens.tolist() == (ids if ids[-1] == 256 else [*ids, 256])
    assert shard.offsets.tolist() == documents


def test_with_bos_a_document_starts_at_each(tmp_path):
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
def test_the_batches_of_a_token_file_do_not_show_in_the_shards(
    tmp_path_factory, texts, batch, share, files
):
    """A batch or a file may end anywhere, even inside a character."""
    folder = tmp_path_factory.mktemp("tokens")
    ids = [i for text in ["begin", *texts, "the end"] for i in [*text.encode(), 256]]
    (folder / "part").mkdir()
    for number, part in enumerate(np.array_split(np.array(ids), files)):
        nanogpt(folder / "part" / f"{number}.bin", part.tolist())
    small_batches = BuildSettings(batch_size=batch)
    data = prepare(config(folder, path=str(folder / "part"), val_share=share), small_batches)
    border = int(len(ids) * (1 - share))
    for shard, part in ((data.train.shards[0], ids[:border]), (data.val.shards[0], ids[border:])):
        inner = part[:-1] if part[-1] == 256 else part
        assert shard.tokens.tolist() == [*inner, 256]
        ends = {i for i, token in enumerate(inner) if token == 256}
        assert shard.offsets.tolist() == sorted({0} | ends)
        text = bytes(i for i in inner if i < 256).decode(errors="replace")
        assert shard.header.bytes == len(text.encode())


@pytest.mark.parametrize("write", WRITERS)
def test_an_id_outside_the_vocabulary_is_named_with_its_position(tmp_path, write):
    WRITERS[write](tmp_path / "train.bin", [*b"one two", 256, 257, 3])
    message = (
        "train.bin holds the id 257 as its token 8, but the vocabulary of the tokenizer 'byte' "
        "has 257 ids; set data.tokenizer"
    )
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path), BuildSettings(batch_size=4))
    assert shard_folders(tmp_path / "cache") == []


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
    assert again.path.read_bytes() == shard.path.read_bytes()
    with pytest.raises(UserError, match="train.bin was made with another tokenizer than 'byte'"):
        prepare(with_val(tmp_path, bos=True))


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
@pytest.mark.parametrize("val", [False, True])
def test_no_tokenizer_is_trained_on_tokens(tmp_path, kind, val):
    nanogpt(tmp_path / "train.bin", [*b"one", 256])
    (tmp_path / "text.txt").write_text("some text")
    paths = {}
    if val:
        paths = {"path": str(tmp_path / "text.txt"), "val_path": str(tmp_path / "train.bin")}
    message = f"train.bin holds tokens, from which no tokenizer '{kind}' can be trained"
    with pytest.raises(UserError, match=message):
        prepare(config(tmp_path, tokenizer=kind, **paths))


# ---- writing ----


def nanogpt_loads(path: Path) -> np.ndarray:
    """Load a file as nanoGPT's train.py does."""
    return np.memmap(path, dtype=np.uint16, mode="r")


def llmc_loads(
    path: Path, magic: int = 20240520, version: int = 1, dtype: type = np.uint16
) -> np.ndarray:
    """Load a file as llm.c's train_gpt2.py does."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert (header[0], header[1]) == (magic, version)
        tokens = np.frombuffer(file.read(), dtype=dtype)
    assert len(tokens) == header[2]
    assert not header[3:].any()
    return tokens


def test_the_other_programs_load_what_is_written(tmp_path):
    shard = write_shard(tmp_path / "x.bin", ByteTokenizer(), ["once", "upon a time"])
    tokens = [256, *b"once", 256, *b"upon a time", 256]
    write_bin(tmp_path / "new" / "train.bin", shard, "nanogpt")
    assert nanogpt_loads(tmp_path / "new" / "train.bin").tolist() == tokens
    write_bin(tmp_path / "new" / "train.bin", shard, "llmc")
    assert llmc_loads(tmp_path / "new" / "train.bin").tolist() == tokens
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train.bin"]


def test_a_larger_vocabulary_is_written_in_32_bits_and_refused_for_nanogpt(tmp_path):
    shard = write_shard(tmp_path / "x.bin", CodePointTokenizer(2**17), ["a\U00010000"])
    write_bin(tmp_path / "train.bin", shard, "llmc")
    assert llmc_loads(tmp_path / "train.bin", 20240801, 7, np.uint32).tolist() == [97, 2**16]
    with pytest.raises(UserError, match="ids up to 65,535.*write val as llmc"):
        write_bin(tmp_path / "val.bin", shard, "nanogpt")
    assert not (tmp_path / "val.bin").exists()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_shard_is_as_wide_as_the_vocabulary_and_not_as_the_file(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(
        prepare_module, "build_tokenizer", lambda *_, **__: CodePointTokenizer(2**17, eos_id=2)
    )
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

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_bin(tmp_path / "out" / "train.bin", shard, "llmc")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [
        ("train.bin", b"old")
    ]


@pytest.mark.parametrize("program", ["nanogpt", "llmc"])
@pytest.mark.parametrize("ends", [{}, {"bos": True}, {"bos": True, "eos": False}])
def test_a_text_in_another_programs_file_has_the_same_shard(tmp_path, program, ends):
    texts = ["naïve 😀", "two", "the third one"]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    (tmp_path / "val.txt").write_text("x")
    text = config(
        tmp_path, path=str(tmp_path / "text.jsonl"), val_path=str(tmp_path / "val.txt"), **ends
    )
    (first,) = prepare(text).train.shards
    write_bin(tmp_path / "train.bin", first, program)
    (second,) = prepare(dataclasses.replace(text, path=str(tmp_path / "train.bin"))).train.shards
    assert second.path != first.path
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.header.bytes == sum(len(text.encode()) for text in texts)


def test_the_magic_numbers_are_those_of_llmc():
    """dev/data/data_common.py: HEADERS_INFO of gpt-2 and llama-3."""
    assert {dtype: struct.pack("<2i", *numbers) for dtype, numbers in LLMC_FORMATS.items()} == {
        "<u2": np.array([20240520, 1], "<i4").tobytes(),
        "<u4": np.array([20240801, 7], "<i4").tobytes(),
    }
