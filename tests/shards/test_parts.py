"""A corpus that is prepared in parts is, joined, what one process would have prepared."""

import dataclasses
import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketlm.config.sections import DataConfig
from pocketlm.corpus.pieces import Part
from pocketlm.data.datasets import PackedLMDataset, PaddedLMDataset
from pocketlm.data.prepare import PreparedData, prepare, prepare_part
from pocketlm.errors import UserError
from pocketlm.shards.builder import BuildSettings
from pocketlm.shards.format import JoinedArray, TokenShard
from pocketlm.shards.joined import JoinedShard
from tests.support.preparation import (
    CountingEncoder,
    byte_config,
    only_shard,
    shard_folders,
    write_jsonl,
    write_text,
)

DOCUMENTS = [f"document {i} " * (1 + i % 7) + "ü" for i in range(60)]


def lines(folder: Path) -> dict[str, object]:
    return {
        "path": write_text(folder / "x.txt", "\n".join(DOCUMENTS)),
        "separator": "line",
        "val_share": 0.2,
    }


def single_document(folder: Path) -> dict[str, object]:
    """A text that is cut in the middle of parts, into training and validation."""
    return {"path": write_text(folder / "x.txt", "\n".join(DOCUMENTS)), "val_share": 0.3}


def many_files(folder: Path) -> dict[str, object]:
    """Files of several kinds and sizes, one empty, with bytes that are in no document."""
    for number in range(3):
        write_jsonl(folder / "texts" / f"{number}.jsonl", DOCUMENTS[20 * number :][:17])
    packed = "\n".join(json.dumps({"text": text, "n": 1}) for text in DOCUMENTS[:20])
    (folder / "texts" / "0b.jsonl.gz").write_bytes(gzip.compress(packed.encode()))
    rows = "".join(f"row {i},1\n" for i in range(30))
    write_text(folder / "texts" / "1b.csv", f"text,n\n{rows}")
    write_text(folder / "texts" / "2b.txt", "")
    write_text(folder / "texts" / "3.txt", "  \nlast")
    return {"path": str(folder / "texts"), "val_share": 0.2}


def with_left_out(folder: Path) -> dict[str, object]:
    """A text with characters that the tokenizer has no entry for, and separators."""
    path = write_text(folder / "x.txt", "\r\n".join(DOCUMENTS))
    keys = {"path": path, "separator": "line", "val_share": 0.2}
    return keys | {"tokenizer": "bpe:300", "bos": True}


SOURCES = [lines, single_document, many_files, with_left_out]


def contents(shard: TokenShard) -> tuple[list[int], list[int]]:
    return np.asarray(shard.tokens).tolist(), shard.offsets.tolist()


def accounts(data: PreparedData) -> list[tuple]:
    return [
        (one.name, one.bytes, dict(one.left_out), dict(one.characters)) for one in data.accounts
    ]


def prepare_parts(config: DataConfig, settings: BuildSettings, count: int) -> None:
    for index in reversed(range(count)):  # the order is free
        prepare_part(config, Part(index, count), settings)


@pytest.mark.parametrize("count", [2, 3, 11])
@pytest.mark.parametrize("keys", SOURCES)
def test_joined_parts_are_token_for_token_what_one_process_prepares(tmp_path, small, keys, count):
    settings = dataclasses.replace(small(64, 64), threads=2)
    config = byte_config(tmp_path / "one", **keys(tmp_path))
    config = dataclasses.replace(
        config, val_share=config.val_share if "0.3" in str(config) else 0.2
    )
    one = prepare(config, settings)
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "parts"))
    prepare_parts(config, settings, count)
    joined = prepare(config, settings)
    for split in ("train", "val"):
        mine, other = only_shard(joined.split(split)), only_shard(one.split(split))
        assert isinstance(mine, JoinedShard) and not isinstance(other, JoinedShard)
        assert contents(mine) == contents(other)
        assert mine.header == other.header  # with the SHA-256 of a single file
        assert mine.path.parent.name == other.path.parent.name  # the key
    assert joined.sha256 == one.sha256
    assert accounts(joined) == accounts(one)
    encoder = CountingEncoder()
    prepare(config, dataclasses.replace(settings, encode=encoder))
    assert encoder.calls == 0


def test_each_part_tokenises_its_own_text_only(tmp_path, small):
    config = byte_config(tmp_path, **many_files(tmp_path))
    sizes = []
    for index in range(4):
        prepare_part(config, Part(index, 4), small(64, 64))
    for folder in sorted((tmp_path / "cache" / "shards").glob("parts-*/[0-9]")):
        sizes.append(TokenShard(folder / "train.bin").header.bytes)
    # a block of the reader is 64 bytes, a line up to 120, a file that is not divided 250
    assert len(sizes) == 4 and min(sizes) > sum(sizes) / 4 - 1000


@pytest.fixture
def joined(tmp_path, small: Callable) -> JoinedShard:
    config = byte_config(tmp_path, **lines(tmp_path))
    prepare_parts(config, small(64, 64), 3)
    shard = only_shard(prepare(config).train)
    assert isinstance(shard, JoinedShard)
    return shard


def test_rows_of_a_joined_shard_are_those_of_the_same_tokens_in_one_array(joined):
    whole = np.asarray(joined.tokens)
    indices = [0, 5, 2, len(PackedLMDataset(whole, 16)) - 1, -1]
    for name, rows in PackedLMDataset(joined, 16).__getitems__(indices).items():
        assert rows.equal(PackedLMDataset(whole, 16).__getitems__(indices)[name]), name
    masked = PackedLMDataset(joined, 16, document_mask=True).__getitems__([0, 3])["doc_ids"]
    ends = np.searchsorted(joined.offsets, [3 * 16, 3 * 16 + 15], side="right")
    assert masked[1, [0, -1]].tolist() == ends.tolist()
    padded = PaddedLMDataset(joined, 16, ends_shared=True)
    assert len(padded) == joined.header.documents
    assert padded[7]["input_ids"][:5].tolist() == whole[joined.offsets[7] :][:5].tolist()


def test_a_worker_process_maps_the_files_itself(joined):
    joined.tokens, joined.offsets  # noqa: B018  # cached
    pickled = pickle.dumps(joined)
    assert len(pickled) < 2000  # no tokens in it
    assert contents(pickle.loads(pickled)) == contents(joined)


def test_a_joined_array_reads_across_its_arrays():
    arrays = [np.arange(0), np.arange(5), np.arange(5, 5), np.arange(5, 9), np.arange(0)]
    array, whole = JoinedArray(arrays), np.arange(9)
    for first in range(10):
        for end in range(12):
            assert array[first:end].tolist() == whole[first:end].tolist()
    index = np.array([[8, 0, 5], [4, 4, 6]])
    assert (array[index] == whole[index]).all()
    assert len(array) == 9 and array[-3:].tolist() == [6, 7, 8]


def test_shards_of_one_file_that_were_made_before_are_found(tmp_path):
    config = byte_config(tmp_path, **lines(tmp_path))
    one = prepare(config)
    (part,) = prepare_part(config, Part(1, 4))
    assert part.complete
    assert only_shard(prepare(config).train).path == only_shard(one.train).path
    assert len(shard_folders(tmp_path / "cache")) == 1


# ---- what is refused ----


def refusal(config: DataConfig) -> str:
    with pytest.raises(UserError) as raised:
        prepare(config)
    return str(raised.value)


def test_a_missing_part_is_named_with_the_command_that_makes_it(tmp_path):
    config = byte_config(tmp_path, **lines(tmp_path))
    for index in (0, 1, 3):
        prepare_part(config, Part(index, 4))
    message = refusal(config)
    assert f"part 3 of 4 of {config.path} is not prepared; run python data.py --part 3/4" in message
    prepare_part(config, Part(2, 4))
    assert isinstance(only_shard(prepare(config).train), JoinedShard)


@pytest.mark.parametrize("changes, named", [
    ({"val_share": 0.3}, "data.val_share 0.2, not 0.3"),
    ({"tokenizer": "char"}, "data.tokenizer 'byte', not 'char'"),
    ({"bos": True}, "another tokenizer of the same name"),
    ({"separator": "blank_line"}, "data.separator 'line', not 'blank_line'"),
    ({}, "another content of the files"),
])  # fmt: skip
def test_parts_prepared_with_other_settings_are_refused_and_the_difference_named(
    tmp_path, changes, named
):
    config = byte_config(tmp_path, **lines(tmp_path))
    prepare_parts(config, BuildSettings(), 2)
    if not changes:
        write_text(Path(config.path), "\n".join([*DOCUMENTS, "more"]))
    changed = dataclasses.replace(config, **changes)
    assert f"were prepared with {named}" in refusal(changed)
    # one of two machines had the other settings
    prepare_part(changed, Part(0, 2))
    message = refusal(changed)
    assert "part 2 of 2" in message and f"has it with {named}" in message


def test_parts_of_another_version_are_refused(tmp_path):
    config = byte_config(tmp_path, **lines(tmp_path))
    prepare_parts(config, BuildSettings(), 2)
    (folder,) = shard_folders(tmp_path / "cache")
    settings = json.loads((folder / "settings.json").read_text()) | {"version": 1}
    (folder / "settings.json").write_text(json.dumps(settings))
    folder.rename(folder.with_name(f"parts-{'0' * 16}-of-2"))  # a version is part of the key
    assert "were prepared with version 1 of the preparation" in refusal(config)


@pytest.mark.parametrize("file", ["2/train.bin", "2/val.bin", "2/account.json"])
@pytest.mark.parametrize("damage", ["a byte", "cut off", "gone"])
def test_a_damaged_part_is_named_and_can_be_prepared_again(tmp_path, small, file, damage):
    config, settings = byte_config(tmp_path, **lines(tmp_path)), small(64, 64)
    expected = prepare(dataclasses.replace(config, cache_dir=str(tmp_path / "one"))).sha256
    prepare_parts(config, settings, 3)
    (folder,) = shard_folders(tmp_path / "cache")
    damage_file(folder / file, damage)
    assert str(folder / file) in (message := refusal(config))
    assert "delete its folder to prepare it again" in message
    for path in (folder / "2").iterdir():
        path.unlink()
    (folder / "2").rmdir()
    prepare_part(config, Part(1, 3), settings)
    assert prepare(config).sha256 == expected


@pytest.mark.parametrize("file", ["2/train.bin", "train.json", "train.offsets"])
@pytest.mark.parametrize("damage", ["a byte", "cut off", "gone"])
def test_damage_after_joining_is_found_when_the_shard_is_opened(joined, file, damage):
    damage_file(joined.path.parent / file, damage)
    with pytest.raises(UserError, match=f"{file} is|{file.replace('json', 'bin')} is"):
        JoinedShard(joined.path)


def damage_file(path: Path, damage: str) -> None:
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut off":
        path.write_bytes(raw[: len(raw) // 2])
    else:
        raw[-1] ^= 1
        path.write_bytes(raw)


def test_parts_without_any_text_are_refused_as_one_process_refuses_them(tmp_path):
    config = byte_config(tmp_path, path=write_text(tmp_path / "x.txt", " \n \n"), separator="line")
    message = refusal(dataclasses.replace(config, cache_dir=str(tmp_path / "one")))
    prepare_parts(config, BuildSettings(), 2)
    assert refusal(config) == message


def test_a_stream_has_no_parts(tmp_path):
    config = byte_config(tmp_path, **lines(tmp_path), streaming=True)
    with pytest.raises(UserError, match="a stream is not prepared, so that it has no parts"):
        prepare_part(config, Part(0, 2))


def test_a_source_that_cannot_be_divided_is_prepared_whole(tmp_path):
    tokens = np.arange(600, dtype="<u2") % 256
    write_text(tmp_path / "x.bin", tokens.tobytes())
    (part,) = prepare_part(byte_config(tmp_path, path=str(tmp_path / "x.bin")), Part(0, 2))
    assert part.complete


def test_rows_of_a_dataset_are_divided(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(tmp_path / "saved")
    config = byte_config(tmp_path / "one", path=str(tmp_path / "saved"), val_share=0.2)
    expected = prepare(config)
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "parts"))
    documents = [prepare_part(config, Part(index, 7))[0].documents for index in range(7)]
    assert sorted(documents) == [8, 8, 8, 9, 9, 9, 9]
    assert prepare(config).sha256 == expected.sha256
