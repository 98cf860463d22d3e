"""Sources read twice, the position while reading, and the memory and work of reading."""

import json
import pickle
import random
import tracemalloc
from pathlib import Path

import datasets
import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus import pieces, readers
from pocketlm.corpus.input_files import InputFiles
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.readers import FileSource
from pocketlm.corpus.sources import open_source
from tests.support.sources import (
    SUFFIXES,
    documents_of,
    open_path,
    small_pieces,
    write_file,
)

DATA = Path(__file__).parents[2] / "data"


# ---- reading again, and the position ----


def write_every_kind(folder: Path) -> list[Path]:
    """Write a file of 400 documents in each format and compression."""
    texts = ["".join(random.Random(i).choices("abcdefghijklmnop", k=2000)) for i in range(400)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    table = "".join(f'"{text}"\n' for text in ["text", *texts]).encode()
    plain = "\n".join(texts).encode()
    parquet.write_table(pa.table({"text": texts}), folder / "x.parquet", row_group_size=150)
    named = {"x.txt": plain, "x.jsonl": lines, "x.csv": table}
    paths = [folder / "x.parquet"]
    for name, raw in named.items():
        paths += [write_file(folder, name + suffix, raw) for suffix in SUFFIXES]
    return paths


def test_the_position_goes_from_nothing_to_the_size(tmp_path):
    paths = write_every_kind(tmp_path)
    for path in [*paths, tmp_path]:
        files = paths if path == tmp_path else [path]
        source = open_path(path, separator="line")
        assert source.size == sum(file.stat().st_size for file in files)
        for _ in range(2):
            with small_pieces(10_000, rows=100):
                positions = [source.position for _ in source.pieces()]
            assert positions == sorted(positions)
            assert len(positions) == 400 * len(files)
            assert source.position == source.size
            assert len({*positions}) >= 4
            assert positions[0] < source.size / 2


def test_a_source_is_read_the_same_twice_at_once_and_in_another_process(tmp_path):
    paths = write_every_kind(tmp_path)
    datasets.Dataset.from_dict({"text": ["a", "b", "c"]}).save_to_disk(tmp_path / "saved")
    named = open_source(SourceConfig(source="names"), str(DATA))
    unnamed = [open_path(path, separator="line") for path in [*paths, tmp_path / "saved"]]
    for source in [*unnamed, named]:
        first = list(source.pieces())
        assert len(first) >= 3
        assert list(source.pieces()) == first
        at_once = zip(source.pieces(), source.pieces(), first, strict=True)
        assert all(a == b == c for a, b, c in at_once)
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy.pieces()) == first
        assert (copy.name, copy.size, copy.digest()) == (source.name, source.size, source.digest())


def test_the_rows_of_a_dataset_are_not_pickled(tmp_path):
    datasets.Dataset.from_dict({"text": ["a" * 1_000_000]}).save_to_disk(tmp_path / "saved")
    source = open_path(tmp_path / "saved")
    documents_of(source)
    assert "rows" in vars(source)
    assert vars(pickle.loads(pickle.dumps(source))).keys() == vars(source).keys() - {"rows"}


def test_a_reader_that_stops_early_leaves_the_file_closed(tmp_path):
    def open_files() -> list[str]:
        files = (file.path for file in psutil.Process().open_files())
        return [path for path in files if path.startswith(str(tmp_path))]

    for path in write_every_kind(tmp_path):
        reading = open_path(path, separator="line").pieces()
        next(reading)
        assert open_files() == [str(path)]
        reading.close()
        assert open_files() == []


# ---- memory and work ----


def size_and_peak(source: Source) -> tuple[int, int]:
    """Return the characters of a source, and the most bytes allocated while it is read."""
    tracemalloc.start()
    try:
        return sum(len(text) for text, _ in source.pieces()), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("separator", [None, "line", "blank_line", "<|endoftext|>"])
def test_a_line_of_64_mb_takes_memory_for_a_few_pieces(tmp_path, separator):
    with (tmp_path / "x.txt").open("wb") as file:
        for _ in range(64):
            file.write(b"one line, " * 100_000)
    size, peak = size_and_peak(open_path(tmp_path / "x.txt", separator=separator))
    assert size == 64_000_000
    assert peak < 20_000_000


def test_dialogues_are_read_some_lines_at_a_time(tmp_path):
    line = "one utterance , " * 30 + "__eou__ another . __eou__\n"
    with (tmp_path / "x.txt").open("w") as file:
        for _ in range(64):
            file.write(line * 1000)
    size, peak = size_and_peak(open_path(tmp_path / "x.txt"))
    assert size == 64_000 * (len(line) - len(" __eou__ __eou__ ") + len("A: B: ") + 1)
    assert (tmp_path / "x.txt").stat().st_size > 30_000_000
    assert peak < 10_000_000


def test_a_table_is_read_some_rows_at_a_time(tmp_path):
    """All rows are 60 MB here, and 100 rows are 10 MB."""
    texts = ["one text, " * 10_000 for _ in range(600)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    parquet.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    for name in ("saved", "x.parquet"):
        size, peak = size_and_peak(open_path(tmp_path / name))
        assert size == 60_000_000
        assert peak < 35_000_000


LINES = "one line, "
FORMS = {  # form: the separator, the name of the file, and how a text is written to it
    "text": (None, "x.txt", str),
    "line": ("line", "x.txt", str),
    "blank_line": ("blank_line", "x.txt", str),
    "<|endoftext|>": ("<|endoftext|>", "x.txt", str),
    "lines": ("line", "x.txt", lambda text: text.replace(", ", "\n")),
    "blank lines": ("blank_line", "x.txt", lambda text: text.replace(", ", "\n\n")),
    "jsonl": (None, "x.jsonl", lambda text: json.dumps({"text": text})),
    "csv": (None, "x.csv", lambda text: f'text\n"{text}"'),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_work_grows_with_the_text_and_not_with_its_square(folder, form, monkeypatch):
    """Counted in characters that are joined: a square would be 256 times as many for 16 times."""
    separator, name, written = FORMS[form]
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 1024)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1024)  # so that there are 512 pieces, and 8,192
    joined_characters = 0

    def count_joined(texts: list[str]) -> str:
        nonlocal joined_characters
        joined = "".join(texts)
        joined_characters += len(joined)
        return joined

    monkeypatch.setattr(pieces, "join_texts", count_joined)
    monkeypatch.setattr(readers, "join_texts", count_joined)

    def work(length: int) -> int:
        nonlocal joined_characters
        text = written(LINES * (length // len(LINES)))
        source = open_path(write_file(folder, name, text.encode()), separator=separator)
        joined_characters = 0
        assert sum(len(text) for text, _ in source.pieces()) > 0.6 * length
        return joined_characters

    assert work(500_000) >= 450_000
    assert work(8_000_000) <= 17 * work(500_000)


def test_a_file_source_has_pieces_alone():
    with pytest.raises(NotImplementedError):
        FileSource(InputFiles("none"), SourceConfig()).documents()
