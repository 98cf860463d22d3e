"""Documents to shards: the split, the tokens, a preparation that is killed, the key, what is refused, and memory."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import DataConfig, MixtureConfig
from pocketlm.corpus import chunks, pieces, readers
from pocketlm.corpus.chunks import is_validation, split, split_source
from pocketlm.corpus.named import CORPORA
from pocketlm.corpus.sources import open_source
from pocketlm.data import prepare as prepare_module
from pocketlm.data import shard_builder
from pocketlm.data.loaders import rows_of
from pocketlm.data.prepare import PreparedData, prepare
from pocketlm.data.shards import ShardWriter, TokenShard
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.build import build_tokenizer

DATA = Path(__file__).parents[2] / "data"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wiki() -> list[str]:
    return list(CORPORA["wiki"](str(DATA)))


@pytest.fixture
def small(monkeypatch):
    """Small pieces and batches, so that short texts have many."""

    def use(piece: int, batch: int) -> None:
        monkeypatch.setattr(pieces, "PIECE", piece)
        monkeypatch.setattr(readers, "BLOCK", piece)
        monkeypatch.setattr(shard_builder, "BATCH", batch)
        monkeypatch.setattr(chunks, "UNCUT", 4 * batch)

    return use


def jsonl(path: Path, documents: Iterable[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


def text_file(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def byte_config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(**{"tokenizer": "byte", "cache_dir": str(folder / "cache"), **changes})


def only(part: prepare_module.Part) -> TokenShard:
    (shard,) = part.shards
    return shard


def texts(data: PreparedData) -> list[str]:
    """All text of train, and all of validation."""
    return [data.tokenizer.decode(only(part).tokens.tolist()) for part in (data.train, data.val)]


def shard_folders(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "shards").iterdir() if path.is_dir())


# ---- the split -------------------------------------------------------------------------------------------------------


def whole(documents: list[str]) -> list[tuple[str, bool]]:
    return [(document, True) for document in documents]


def test_the_validation_documents_of_wiki_never_change():
    """Losses of different versions compare only while these are the same documents."""
    chunks = list(split_source(open_source(DataConfig(source="wiki"), str(DATA)), 0.05))
    val = [chunk.text for chunk in chunks if chunk.validation]
    assert all(chunk.begins and chunk.ends for chunk in chunks)
    assert (len(chunks) - len(val), len(val)) == (9_281, 496)
    digests = sorted(hashlib.sha256(document.encode()).hexdigest() for document in val)
    assert (
        hashlib.sha256("".join(digests).encode()).hexdigest()
        == "eb64931d8848540b8d4defd8ef6dc7b7b7b51285ca2f75001f87e5c39be21417"
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(), min_size=2, max_size=20), st.floats(0.01, 0.99))
def test_every_document_is_in_one_part_and_equal_ones_in_the_same(documents, share):
    chunks = list(split(whole(documents * 2), share, None))
    assert [chunk.text for chunk in chunks] == documents * 2
    train, val = (
        {chunk.text for chunk in chunks if chunk.validation == which} for which in (False, True)
    )
    assert not train & val


def test_the_share_is_the_share_and_a_larger_one_contains_it():
    documents = [str(i) for i in range(4000)]
    few, many = (
        {document for document in documents if is_validation(document, share)}
        for share in (0.05, 0.2)
    )
    assert few < many
    assert (
        0.2 * 4000 - 100 < len(many) < 0.2 * 4000 + 100
    )  # four standard deviations of a fair draw


def test_the_pieces_of_a_document_stay_together():
    """Its first piece decides."""
    first = next(str(i) for i in range(100) if is_validation(str(i), 0.3))
    other = next(str(i) for i in range(100) if not is_validation(str(i), 0.3))
    chunks = list(
        split(
            [(first, False), (other, True), (other, False), (first, False), ("", True)], 0.3, None
        )
    )
    assert [chunk.validation for chunk in chunks] == [True, True, False, False, False]
    assert [chunk.begins for chunk in chunks] == [True, False, True, False, False]
    assert [chunk.ends for chunk in chunks] == [False, True, False, False, True]


def test_a_tenth_of_tiny_shakespeares_bytes():
    """nanoGPT's char run keeps 1,003,854 of 1,115,394 characters for training."""
    train, val = split([("a" * 1_115_394, True)], 0.1, 1_115_394)
    assert (train.validation, len(train.text), val.validation, len(val.text)) == (
        False,
        1_003_854,
        True,
        111_540,
    )


LONE = "aé€😀\nb€€a😀"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text(alphabet="aé€😀\n", min_size=1, max_size=6), min_size=1, max_size=6),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
)
@example(["a" * 10], 1e-17)  # of which 1 - share is 1
@example(["ab", "cd", ""], 0.5)
@example(["ab", "€"], 0.4)
def test_a_single_document_gives_its_end_and_is_cut_between_characters(pieces, share):
    text, last = "".join(pieces), len(pieces) - 1
    raw = text.encode()
    chunks = list(split([(piece, i == last) for i, piece in enumerate(pieces)], share, len(raw)))
    train, val = (
        [chunk for chunk in chunks if chunk.validation == which] for which in (False, True)
    )
    assert chunks == train + val
    ideal = int(len(raw) * (1 - share))
    border = next(i for i in range(ideal, -1, -1) if i == len(raw) or raw[i] & 0xC0 != 0x80)
    assert "".join(chunk.text for chunk in train) == raw[:border].decode()
    assert "".join(chunk.text for chunk in val) == raw[border:].decode()
    for part in (train, val):
        assert [chunk.begins for chunk in part] == [True, *[False] * (len(part) - 1)][: len(part)]
        assert (
            [chunk.ends for chunk in part] == [*[False] * (len(part) - 1), True][-len(part) :]
            if part
            else True
        )
    assert bool(train) == (border > 0)


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 100])
def test_wherever_pieces_end_a_lone_file_is_its_two_parts(tmp_path, small, piece):
    """A border before, in and behind each character, with blocks that end before, in and behind it."""
    small(piece, 4)
    path, raw = text_file(tmp_path / "text.txt", LONE), LONE.encode()
    for border in range(1, len(raw)):
        data = prepare(byte_config(tmp_path, path=path, val_share=1 - (border + 0.5) / len(raw)))
        start = len(raw[:border].decode(errors="ignore").encode())
        assert only(data.train).tokens.tolist() == [256, *raw[:start], 256]
        assert only(data.val).tokens.tolist() == [256, *raw[start:], 256]
        assert [only(part).offsets.tolist() for part in (data.train, data.val)] == [[0], [0]]
        assert (data.train.n_bytes, data.val.n_bytes) == (start, len(raw) - start)


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_a_trained_tokenizer_sees_the_training_part_only(kind, tmp_path):
    documents = [f"word {i} and more" for i in range(60)]
    secret = next(f"{i} ßß ßß ßß" for i in range(1000) if is_validation(f"{i} ßß ßß ßß", 0.2))
    path = jsonl(tmp_path / "text.jsonl", [*documents, *[secret] * 30])
    data = prepare(byte_config(tmp_path, path=path, tokenizer=kind, val_share=0.2))
    seen = "".join(document for document in documents if not is_validation(document, 0.2))
    if kind == "char":
        assert set(data.tokenizer.symbols) == set(seen)
        assert 0 in only(data.val).tokens
        assert 0 not in only(data.train).tokens
    else:
        assert (
            len(data.tokenizer.encode("ß")) == 2
        )  # no merge of its two bytes, which 30 documents would have made the first
        assert len(data.tokenizer.encode(" and more")) < len(" and more")


# ---- the tokens ------------------------------------------------------------------------------------------------------


def plain(
    documents: list[str], encode: Callable[[str], Iterable[int]], bos: int | None, eos: int | None
) -> tuple[list[int], list[int], int]:
    """The tokens, where each document begins, and the bytes of the text, said as a loop."""
    tokens: list[int] = []
    begins = []
    for document in documents:
        begins.append(len(tokens))
        if bos is not None or eos is not None:
            tokens.append(eos if bos is None else bos)
        tokens.extend(encode(document))
        if bos is not None and eos is not None:
            tokens.append(eos)
    if bos is None and eos is not None:
        tokens.append(eos)
    return tokens, begins, sum(len(document.encode()) for document in documents)


def read(shard: TokenShard) -> tuple[list[int], list[int], int]:
    assert (shard.header.tokens, shard.header.documents) == (len(shard.tokens), len(shard.offsets))
    return shard.tokens.tolist(), shard.offsets.tolist(), shard.header.bytes


DOCUMENTS = st.lists(st.text(alphabet="ab é😀\n", max_size=12), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    documents=DOCUMENTS,
    bos=st.booleans(),
    eos=st.booleans(),
    piece=st.integers(1, 9),
    batch=st.integers(1, 30),
)
@example(documents=[" ", "\n"], bos=False, eos=True, piece=4, batch=9)
def test_shards_are_what_a_plain_loop_makes(tmp_path_factory, documents, bos, eos, piece, batch):
    folder = tmp_path_factory.mktemp("plain")
    path = jsonl(folder / "x.jsonl", documents)
    kept = [document for document in documents if document.strip()]
    parts: list[list[str]] = [[], []]
    for document in kept:
        draw = hashlib.sha256(document[:piece].encode()).digest()  # of the first piece
        parts[int.from_bytes(draw[:8], "big") / 2**64 < 0.5].append(document)
    if len(kept) == 1:
        raw = kept[0].encode()
        border = len(raw[: len(raw) // 2].decode(errors="ignore").encode())
        parts = [[text] if text else [] for text in (raw[:border].decode(), raw[border:].decode())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        patch.setattr(readers, "BLOCK", piece)
        patch.setattr(shard_builder, "BATCH", batch)
        patch.setattr(chunks, "UNCUT", 4 * batch)
        config = byte_config(folder, path=path, bos=bos, eos=eos, val_share=0.5)
        if not all(parts):
            with pytest.raises(UserError, match="leaves nothing" if kept else "holds no text"):
                prepare(config)
            return
        data = prepare(config)
    ids = (256 if bos else None, 256 + bos if eos else None)
    assert read(only(data.train)) == plain(parts[0], str.encode, *ids)
    assert read(only(data.val)) == plain(parts[1], str.encode, *ids)
    assert data.train.n_targets == data.train.n_tokens - 1


@pytest.mark.parametrize("kind", ["byte", "char", "bpe:300", "gpt2"])
@pytest.mark.parametrize("piece, batch", [(150, 100), (997, 4000), (2**20, 2**20)])
def test_documents_in_pieces_have_the_ids_that_they_have_whole(
    tmp_path, small, wiki, kind, piece, batch
):
    small(piece, batch)
    odd = "Spaces   and\n\n\ttabs, 12 345,  naïve café 中文字 😀😀 end   " * 40
    documents = ["\n\n".join(wiki[:15]), odd, "short", "\n\n".join(wiki[15:30])]
    val = jsonl(tmp_path / "val.jsonl", ["x"])
    config = byte_config(
        tmp_path, path=jsonl(tmp_path / "x.jsonl", documents), val_path=val, tokenizer=kind
    )
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "wheels").symlink_to(DATA / "wheels")
    data = prepare(config)
    assert max(map(len, documents)) > 4 * piece or piece == 2**20
    assert read(only(data.train)) == plain(
        documents, data.tokenizer.encode, None, data.tokenizer.eos_id
    )


def test_a_lone_text_in_pieces_has_the_ids_of_its_two_parts(tmp_path, small, wiki):
    small(200, 300)
    text = "\n\n".join(wiki[:40])
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "wheels").symlink_to(DATA / "wheels")
    data = prepare(
        byte_config(
            tmp_path, path=text_file(tmp_path / "x.txt", text), tokenizer="gpt2", val_share=0.3
        )
    )
    gpt2, raw = build_tokenizer("gpt2", DATA), text.encode()
    train = raw[: int(len(raw) * 0.7)].decode(errors="ignore")
    assert read(only(data.train)) == plain([train], gpt2.encode, None, 50_256)
    assert read(only(data.val)) == plain([text.removeprefix(train)], gpt2.encode, None, 50_256)


def test_a_text_file_is_its_bytes(tmp_path):
    """Windows' line ends too: what a file counts as bytes, bits per byte must count as well."""
    path = text_file(tmp_path / "text.txt", b"one\r\ntwo\rthree\n")
    assert (
        "".join(texts(prepare(byte_config(tmp_path, path=path, val_share=0.4)))).encode()
        == b"one\r\ntwo\rthree\n"
    )


def test_a_word_of_megabytes_is_cut_all_the_same(tmp_path, small):
    small(7, 10)
    path = text_file(tmp_path / "x.txt", "x" * 1000)
    data = prepare(byte_config(tmp_path, path=path, tokenizer="bpe:300", val_share=0.1))
    assert texts(data) == ["x" * 900, "x" * 100]
    assert len(data.train.shards[0].tokens) > len(data.tokenizer.encode("x" * 900)) + 2


def test_a_corpus_shorter_than_a_row_is_a_row(tmp_path):
    data = prepare(byte_config(tmp_path, path=text_file(tmp_path / "x.txt", "ab"), val_share=0.5))
    assert [read(only(part)) for part in (data.train, data.val)] == [
        ([256, 97, 256], [0], 1),
        ([256, 98, 256], [0], 1),
    ]
    config = SimpleNamespace(data=byte_config(tmp_path), training=SimpleNamespace(seq_len=256))
    assert [len(rows_of(data, config, validation)) for validation in (False, True)] == [1, 1]


# ---- a part of its own for validation, several sources, a stream -----------------------------------------------------


def test_with_val_path_all_of_it_is_validation_and_val_share_says_nothing(tmp_path):
    one, two = [f"one {i}" for i in range(30)], [f"two {i}" for i in range(20)]
    paths = {"path": jsonl(tmp_path / "1.jsonl", one), "val_path": jsonl(tmp_path / "2.jsonl", two)}
    data, again = (
        prepare(byte_config(tmp_path, **paths, val_share=share)) for share in (0.05, 0.9)
    )
    assert read(only(data.train)) == plain(one, str.encode, None, 256)
    assert read(only(data.val)) == plain(two, str.encode, None, 256)
    assert [only(part).path for part in (again.train, again.val)] == [
        only(part).path for part in (data.train, data.val)
    ]
    assert only(data.train).path.parent != only(data.val).path.parent


def test_a_trained_tokenizer_does_not_see_val_path(tmp_path):
    paths = {
        "path": text_file(tmp_path / "1.txt", "abc"),
        "val_path": text_file(tmp_path / "2.txt", "abcd"),
    }
    assert prepare(byte_config(tmp_path, **paths, tokenizer="char")).tokenizer.symbols == "abc"


def test_seen_bytes_are_those_of_all_documents_since_it_knows_no_other(tmp_path):
    """Each document has a letter of its own, so that validation's would be unseen; and so has val_path's."""
    documents = [f"{letter}x" for letter in "abcdefghijklmnopqrstuvw"]
    path, other = jsonl(tmp_path / "a.jsonl", documents), jsonl(tmp_path / "b.jsonl", ["zx"])
    assert {is_validation(document, 0.3) for document in documents} == {True, False}
    for val_path, letters in (
        (None, "abcdefghijklmnopqrstuvwx"),
        (other, "abcdefghijklmnopqrstuvwxz"),
    ):
        data = prepare(
            byte_config(
                tmp_path, tokenizer="seen-bytes", path=path, val_path=val_path, val_share=0.3
            )
        )
        assert bytes(data.tokenizer.seen) == letters.encode()


def test_what_a_vocabulary_leaves_out_is_told_again_when_it_is_read_back(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [f"{letter}xyz" for letter in "abcdefghijklmnopqrstuvw"])
    notes = [
        prepare(byte_config(tmp_path, tokenizer="char:5", path=path)).tokenizer.note
        for _ in range(2)
    ]
    assert notes[0] == notes[1] and "char:5 keeps the 3 commonest" in notes[0]


def test_the_same_text_for_both_parts_has_a_shard_of_each(tmp_path):
    paths = {
        "path": text_file(tmp_path / "1.txt", "abc"),
        "val_path": text_file(tmp_path / "2.txt", "abc"),
    }
    data = prepare(byte_config(tmp_path, **paths))
    assert [only(part).path.name for part in (data.train, data.val)] == ["train.bin", "val.bin"]
    assert [read(only(part)) for part in (data.train, data.val)] == [
        plain(["abc"], str.encode, None, 256)
    ] * 2


def test_a_mixture_has_a_shard_of_each_source_and_one_tokenizer_of_all(tmp_path):
    one, two = [f"one {i}" for i in range(40)], [f"deux {i} é" for i in range(40)]
    parts = (
        MixtureConfig(path=jsonl(tmp_path / "1.jsonl", one), weight=3.0),
        MixtureConfig(path=jsonl(tmp_path / "2.jsonl", two)),
        MixtureConfig(
            path=text_file(tmp_path / "3.txt", "xyz"),
            val_path=text_file(tmp_path / "4.txt", "qqq"),
            weight=0.5,
        ),
    )
    data = prepare(
        DataConfig(
            mixture=parts, tokenizer="char", cache_dir=str(tmp_path / "cache"), val_share=0.3
        )
    )
    assert data.sources == tuple(part.path for part in parts)
    assert data.name == " + ".join(part.path for part in parts)
    assert data.weights == (3.0, 1.0, 0.5)
    expected = [
        [[d for d in documents if is_validation(d, 0.3) == which] for documents in (one, two)]
        for which in (False, True)
    ]
    expected[0].append(["xyz"])
    expected[1].append(["qqq"])
    tokenizer = data.tokenizer
    assert set(tokenizer.symbols) == set("".join("".join(documents) for documents in expected[0]))
    for part, of_sources in zip((data.train, data.val), expected, strict=True):
        assert [read(shard) for shard in part.shards] == [
            plain(d, tokenizer.encode, None, tokenizer.eos_id) for d in of_sources
        ]
        assert part.n_documents == sum(map(len, of_sources))
        assert part.n_bytes == sum(
            len(document.encode()) for documents in of_sources for document in documents
        )
        assert part.n_targets == part.n_tokens - 3
    swapped = dataclasses.replace(parts[0], weight=2.0), *parts[1:]
    other = prepare(
        DataConfig(
            mixture=swapped, tokenizer="char", cache_dir=str(tmp_path / "cache"), val_share=0.3
        )
    )
    assert [shard.path for shard in other.train.shards] == [
        shard.path for shard in data.train.shards
    ]
    assert other.sha256 != data.sha256


def streamed(folder: Path, documents: list[str], **changes: object) -> PreparedData:
    config = {
        "path": jsonl(folder / "x.jsonl", documents),
        "streaming": True,
        "val_share": 0.3,
        **changes,
    }
    return prepare(byte_config(folder, **config))


def test_a_stream_prepares_its_first_documents_only(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "HEAD_DOCUMENTS", 25)
    documents = [f"document {i}" for i in range(100)]
    data = streamed(tmp_path, documents, tokenizer="char")
    for part, which in ((data.train, False), (data.val, True)):
        expected = [
            document for document in documents[:25] if is_validation(document, 0.3) == which
        ]
        assert read(only(part)) == plain(
            expected, data.tokenizer.encode, None, data.tokenizer.eos_id
        )
    assert [text for text, _ in data.stream.pieces()] == documents
    assert data.sources == (data.stream.name,) == (str(tmp_path / "x.jsonl"),)


@pytest.mark.parametrize("size, kept", [(35, 4), (40, 4), (41, 5), (1, 2)])
def test_the_first_documents_are_few_where_they_are_long_but_two_at_least(
    tmp_path, monkeypatch, small, size, kept
):
    monkeypatch.setattr(pieces, "HEAD_CHARACTERS", size)
    documents = [f"document {i}" for i in range(9)]
    head = pieces.Head(open_source(DataConfig(path=jsonl(tmp_path / "x.jsonl", documents)), ""))
    assert list(head.pieces()) == list(head.pieces()) == whole(documents[:kept])
    small(7, 100)
    head = pieces.Head(head.source)
    assert "".join(text + "|" * ends for text, ends in head.pieces()) == "".join(
        document + "|" for document in documents[:kept]
    )


def test_what_cannot_be_streamed_is_named(tmp_path):
    with pytest.raises(
        UserError, match="data.streaming deals out documents, and .*x.jsonl is a single one"
    ):
        streamed(tmp_path, ["one document"])
    np.arange(8, dtype="<u2").tofile(tmp_path / "x.bin")
    with pytest.raises(UserError, match="x.bin is tokens already; set data.streaming to false"):
        streamed(tmp_path, [], path=str(tmp_path / "x.bin"))


# ---- killed, interrupted, at once ------------------------------------------------------------------------------------

FORKS = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
from pocketlm import errors
from pocketlm.config.sections import DataConfig
from pocketlm.corpus import pieces, readers
from pocketlm.data import prepare, shard_builder, shards

shard_builder.JOURNAL_SECONDS, shard_builder.BATCH, pieces.PIECE, readers.BLOCK = -1, 2**14, 2**14, 2**14
settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
calls = []

def counted(*arguments, encode=shard_builder.encode):
    calls.append(1)
    return encode(*arguments)

shard_builder.encode = counted

def run(cache):
    '''Prepare into a cache, and note how many batches were tokenised.'''
    data = prepare.prepare(DataConfig(**settings, cache_dir=str(cache)))
    Path(f"{cache}.json").write_text(json.dumps([len(calls), data.train.shards[0].path.parent.name]))

def fork(work, *arguments):
    if (child := os.fork()) == 0:
        try:
            work(*arguments)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def kill_at(owner, name, number, before, fits=lambda *_: True):
    '''SIGKILL before or after the call of that number.'''
    function, made = getattr(owner, name), []
    def call(*arguments, **options):
        count = fits(*arguments)
        made.extend([1] * count)
        if before and count and len(made) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **options)
        if count and len(made) == number:
            for writer in arguments[:1] * (name == "write"):
                writer.file.flush()
                writer.offsets.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

def result(cache):
    count, name = json.loads(Path(f"{cache}.json").read_text())
    made = cache / "shards" / name
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made.iterdir()}
    return {"calls": count, "files": files, "folders": sorted(path.name for path in made.parent.iterdir() if path.is_dir())}
"""


def forks(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script behind FORKS, whose children are processes of their own."""
    command = [sys.executable, "-c", FORKS + script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


KILLS = {  # owner, name, number, before: what is killed where
    "the first write": ("shards.ShardWriter", "write", 1, False),
    "a write": ("shards.ShardWriter", "write", 9, False),
    "a later write": ("shards.ShardWriter", "write", 19, False),
    "a half-written journal": ("os", "replace", 12, True),
    "a written journal": ("os", "replace", 12, False),
    "closing train": ("shards.ShardHeader", "digest", 1, True),
    "closing val": ("shards.ShardHeader", "digest", 2, True),
    "both are closed": ("shards.ShardWriter", "close", 2, False),
    "the journal is gone": ("prepare.Path", "unlink", 2, False),
    "an offsets file is gone": ("prepare.Path", "unlink", 3, False),
    "the folder is there": ("os.path", "isdir", 0, False),  # never called: nothing is killed
}

KILLED = """
kills = json.loads(sys.argv[3])
found = {"": None}
assert ended(fork(run, folder / "once")) == 0
found[""] = result(folder / "once")

def killed(cache, owner, name, number, before):
    kill_at(eval(owner, {"os": os, "shards": shards, "prepare": prepare}), name, number, before)
    run(cache)

for number, (what, kill) in enumerate(kills.items()):
    cache = folder / str(number)
    status = ended(fork(killed, cache, *kill))
    journals = list(cache.glob("shards/unfinished-*/journal.json"))
    batches = json.loads(journals[0].read_text())["batches"] if journals else 0
    assert ended(fork(run, cache)) == 0
    found[what] = {"status": status, "batches": batches, **result(cache)}
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
@pytest.mark.parametrize("form", ["documents", "lone"])
def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(tmp_path, wiki, form):
    """A process of its own each time, so that nothing but the disk remembers."""
    if form == "documents":
        settings = {
            "path": jsonl(tmp_path / "x.jsonl", wiki[:2000]),
            "tokenizer": "byte",
            "val_share": 0.3,
        }
    else:
        settings = {
            "path": text_file(tmp_path / "x.txt", "\n".join(wiki[:700])),
            "tokenizer": "byte",
            "val_share": 0.3,
            "bos": True,
        }
    ran = forks(KILLED, json.dumps(settings), tmp_path, json.dumps(KILLS))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    once = found.pop("")
    assert list(found) == list(KILLS)
    assert once["calls"] >= 20
    assert set(once["files"]) == {"train.bin", "val.bin"}
    for what, run in found.items():
        assert run["status"] == (0 if what == "the folder is there" else -9), what
        assert run["files"] == once["files"], what
        assert run["folders"] == once["folders"], what
        assert run["calls"] == (
            0 if what == "the folder is there" else once["calls"] - run["batches"]
        ), what
    assert found["a written journal"]["batches"] == 12
    assert found["closing val"]["batches"] == once["calls"]
    assert found["the journal is gone"]["batches"] == 0


FULL = """
import resource

def limited(cache):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    errors.run_main(lambda: run(cache))

assert ended(fork(run, folder / "once")) == 0
status = ended(fork(limited, folder / "full"))
assert ended(fork(run, folder / "full")) == 0
print(json.dumps([status, result(folder / "once"), result(folder / "full")]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the limit on a file's size is POSIX")
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on_later(tmp_path, wiki):
    settings = {"path": jsonl(tmp_path / "x.jsonl", wiki[:1000]), "tokenizer": "byte"}
    ran = forks(FULL, json.dumps(settings), tmp_path)
    assert ran.returncode == 0, ran.stderr
    status, once, full = json.loads(ran.stdout)
    assert status == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith(
        f"error: cannot write token shards to {tmp_path / 'full' / 'shards'}: File too large, with "
    )
    assert line.endswith(
        " MB free; make room, or set data.cache_dir, and run the same command again"
    )
    assert full["files"] == once["files"]
    assert 0 < full["calls"] < once["calls"]


TWO = """
cache = folder / "cache"

def slow():
    write = shard_builder.Preparation.write
    def held(self):
        (folder / "begun").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        write(self)
    shard_builder.Preparation.write = held
    run(cache)

def second():
    os.dup2(os.open(folder / "said", os.O_WRONLY | os.O_CREAT), 2)
    data = prepare.prepare(DataConfig(**settings, cache_dir=str(cache)))
    (folder / "second").write_text(json.dumps([len(calls), data.train.shards[0].path.parent.name]))

def until(holds):
    while not holds():
        time.sleep(0.01)

first = fork(slow)
until((folder / "begun").exists)
other = fork(second)
until(lambda: (folder / "said").exists() and (folder / "said").read_text().endswith("\\n"))
(folder / "go").touch()
print(json.dumps([ended(first), ended(other), result(cache), json.loads((folder / "second").read_text()), (folder / "said").read_text()]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the children are forks")
def test_of_two_that_prepare_the_same_at_once_one_waits_and_both_succeed(tmp_path, wiki):
    settings = {"path": jsonl(tmp_path / "x.jsonl", wiki[:200]), "tokenizer": "byte"}
    ran = forks(TWO, json.dumps(settings), tmp_path)
    assert ran.returncode == 0, ran.stderr
    *statuses, made, (calls, name), said = json.loads(ran.stdout)
    assert statuses == [0, 0]
    assert made["calls"] > 0
    assert (calls, [name]) == (0, made["folders"])
    assert said == "another process is preparing the same data; waiting for it\n"


CORPUS = [f"document {i} " * 3 for i in range(40)]


@pytest.fixture
def corpus(tmp_path) -> str:
    return jsonl(tmp_path / "corpus.jsonl", CORPUS)


@pytest.fixture
def interrupted(tmp_path, corpus, small, monkeypatch):
    """A preparation that was interrupted after 5 of 40 batches, of which the journal has 4; its config, and its unfinished folder."""
    small(2**20, 30)
    monkeypatch.setattr(shard_builder, "JOURNAL_SECONDS", -1)
    config, write, writes = (
        byte_config(tmp_path, path=corpus, val_path=text_file(tmp_path / "val.txt", "x")),
        ShardWriter.write,
        [],
    )

    def interrupt(self: ShardWriter, *arguments: object) -> None:
        write(self, *arguments)
        writes.append(1)
        if len(writes) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    (unfinished,) = shard_folders(tmp_path / "cache")
    assert unfinished.name.startswith("unfinished-")
    return config, unfinished


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches are tokenised from here on: the length of this list."""
    calls, encode = [], shard_builder.encode

    def count(*arguments: object) -> dict:
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(shard_builder, "encode", count)
    return calls


def test_an_interrupted_preparation_goes_on(interrupted, monkeypatch):
    config, unfinished = interrupted
    assert json.loads((unfinished / "journal.json").read_text())["batches"] == 4
    calls = counted(monkeypatch)
    data = prepare(config)
    assert len(calls) == 40 - 4 + 1  # and one of the validation text
    assert read(only(data.train)) == plain(CORPUS, str.encode, None, 256)
    assert not unfinished.exists()


@pytest.mark.parametrize("journal", [
    None, "", "{", "[]", "{}", "null", '{"batches": 4, "size": 30}', '{"batches": 4, "size": 30, "parts": {"train": {}}}',
    '{"batches": 4, "size": 31, "parts": {"train": {"tokens": 0, "documents": 0, "bytes": 0}}}',
    '{"batches": 4, "size": 30, "parts": {"train": {"tokens": 9999, "documents": 4, "bytes": 0}}}',
    '{"batches": 4, "size": 30, "parts": {"train": {"tokens": 0, "documents": 9999, "bytes": 0}}}',
])  # fmt: skip
def test_without_a_journal_that_fits_a_preparation_begins_anew(interrupted, monkeypatch, journal):
    config, unfinished = interrupted
    (unfinished / "journal.json").unlink()
    if journal is not None:
        (unfinished / "journal.json").write_text(journal)
    calls = counted(monkeypatch)
    assert read(only(prepare(config).train)) == plain(CORPUS, str.encode, None, 256)
    assert len(calls) == 40 + 1


@pytest.mark.parametrize("file", ["train.bin", "train.offsets"])
@pytest.mark.parametrize("how", ["gone", "shorter"])
def test_without_the_files_of_the_journal_a_preparation_begins_anew(
    interrupted, monkeypatch, file, how
):
    config, unfinished = interrupted
    path = unfinished / file
    raw = path.read_bytes()
    path.unlink()
    if how == "shorter":
        path.write_bytes(raw[: len(raw) // 2])
    calls = counted(monkeypatch)
    assert read(only(prepare(config).train)) == plain(CORPUS, str.encode, None, 256)
    assert len(calls) == 40 + 1


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Ctrl-C is sent as POSIX does")
def test_ctrl_c_ends_a_preparation_at_once(tmp_path, corpus, small, monkeypatch):
    small(2**20, 30)
    calls, encode = [], shard_builder.encode

    def slow(*arguments: object) -> dict:
        calls.append(1)
        if len(calls) == 3:
            time.sleep(0.1)  # until as many batches wait as may
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)
        return encode(*arguments)

    monkeypatch.setattr(shard_builder, "encode", slow)
    monkeypatch.setattr(prepare_module.os, "cpu_count", lambda: 8)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts what is in the background with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(byte_config(tmp_path, path=corpus))
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) <= 12  # those that had begun, on 9 threads; 10 more were waiting


def test_an_exception_in_a_thread_is_shown_at_once(tmp_path, corpus, small, monkeypatch):
    small(2**20, 30)
    calls = []

    def broken(*_: object) -> dict:
        calls.append(1)
        raise ZeroDivisionError("in a thread")

    monkeypatch.setattr(shard_builder, "encode", broken)
    monkeypatch.setattr(prepare_module.os, "cpu_count", lambda: 1)
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        prepare(byte_config(tmp_path, path=corpus))
    assert len(calls) < 10


def test_an_error_in_the_text_leaves_nothing_behind(tmp_path, small, monkeypatch):
    small(100, 100)
    monkeypatch.setattr(shard_builder, "JOURNAL_SECONDS", -1)
    journalled, state = [], ShardWriter.state
    monkeypatch.setattr(ShardWriter, "state", lambda self: journalled.append(1) or state(self))
    path = text_file(
        tmp_path / "text.txt", b"line of text\n" * 100 + b"\xff" + b"line of text\n" * 100
    )
    with pytest.raises(UserError, match="text.txt is not UTF-8: byte 1300 is 0xff"):
        prepare(byte_config(tmp_path, path=path, separator="line"))
    assert len(journalled) > 1
    assert shard_folders(tmp_path / "cache") == []
    text_file(tmp_path / "text.txt", b"line of text\n" * 100 + b"other line")
    data = prepare(byte_config(tmp_path, path=path, separator="line", val_share=0.5))
    assert data.train.n_documents + data.val.n_documents == 101


# ---- the key ---------------------------------------------------------------------------------------------------------


def test_whatever_decides_the_tokens_is_in_the_key(tmp_path):
    text = "".join(f"line {i}\n\n" for i in range(40))
    config = byte_config(
        tmp_path, path=text_file(tmp_path / "x.txt", text), separator="line", val_share=0.3
    )
    changed = text_file(tmp_path / "y.txt", text.replace("line 7", "line_7"))
    configs = [
        config,
        *(
            dataclasses.replace(config, **change)
            for change in (
                {"path": changed},
                {"separator": "blank_line"},
                {"separator": "\n\n"},
                {"separator": None},
                {"errors": "replace"},
                {"val_share": 0.31},
                {"tokenizer": "char"},
                {"tokenizer": "bpe:260"},
                {"bos": True},
                {"eos": False},
                {"bos": True, "eos": False},
            )
        ),
    ]
    made = [prepare(config) for config in configs]
    assert (
        len({only(data.train).path for data in made})
        == len(configs)
        == len(shard_folders(tmp_path / "cache"))
    )
    assert len({data.tokenizer.fingerprint for data in made}) == 6
    assert [only(prepare(config).train).path for config in configs] == [
        only(data.train).path for data in made
    ]


def test_the_same_content_elsewhere_and_at_another_time_shares_the_shards(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = "".join(f"line {i}\n" for i in range(40))
    first, second = (
        text_file(tmp_path / folder / name, text)
        for folder, name in (("a", "x.txt"), ("b", "y.txt"))
    )
    os.utime(second, (0, 0))
    kinds = ["byte", "char", "bpe:260"]
    made = [
        prepare(byte_config(tmp_path, path=first, separator="line", tokenizer=kind, val_share=0.3))
        for kind in kinds
    ]
    monkeypatch.setattr(shard_builder, "ShardWriter", None)  # the second time nothing is written
    monkeypatch.setattr(
        prepare_module, "build_tokenizer", lambda name, *_, **__: {"byte": made[0].tokenizer}[name]
    )  # or trained
    again = [
        prepare(byte_config(tmp_path, path=second, separator="line", tokenizer=kind, val_share=0.3))
        for kind in kinds
    ]
    for one, other in zip(made, again, strict=True):
        assert only(one.train).path == only(other.train).path
        assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
        assert one.sha256 == other.sha256


def test_a_trained_tokenizer_is_kept_for_the_documents_that_trained_it(tmp_path, corpus):
    folder = tmp_path / "cache" / "tokenizers"
    config = byte_config(tmp_path, path=corpus, tokenizer="char", val_share=0.3)

    def kept() -> int:
        return len(list(folder.glob("*.json")))

    assert prepare(config).tokenizer.fingerprint == only(prepare(config).train).header.tokenizer
    assert kept() == 1
    prepare(dataclasses.replace(config, tokenizer="bpe:300"))
    assert kept() == 2
    prepare(dataclasses.replace(config, val_share=0.6))  # other training documents
    assert kept() == 3
    jsonl(Path(corpus), [*CORPUS, "ß"])
    prepare(config)
    assert kept() == 4
    prepare(dataclasses.replace(config, tokenizer="byte"))
    assert kept() == 4


def test_of_two_that_train_the_same_tokenizer_at_once_one_does(tmp_path, corpus, monkeypatch):
    trained, waits, build = [], threading.Event(), build_tokenizer

    def slow(*arguments: object) -> Tokenizer:
        trained.append(1)
        assert waits.wait(10)
        return build(*arguments)

    monkeypatch.setattr(prepare_module, "build_tokenizer", slow)
    monkeypatch.setattr(
        shard_builder, "print", lambda *_, **__: waits.set(), raising=False
    )  # that another is waited for
    with ThreadPoolExecutor(2) as both:
        config = byte_config(tmp_path, path=corpus, tokenizer="char", val_share=0.3)
        one, other = both.map(prepare, [config] * 2)
    assert trained == [1]
    assert only(one.train).path == only(other.train).path


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_a_damaged_tokenizer_is_named(tmp_path, corpus, kind):
    config = byte_config(tmp_path, path=corpus, tokenizer=kind)
    first = prepare(config)
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    raw = path.read_text()
    changed = (
        raw.replace('"symbols": " ', '"symbols": "!')
        if kind == "char"
        else raw.replace('"eos_id": 0', '"eos_id": 1')
    )
    assert changed != raw
    for damaged in ("", raw[:-9], "[]", "{}", raw.replace('"kind": "', '"kind": "x'), changed):
        path.write_text(damaged)
        with pytest.raises(
            UserError, match=f"the tokenizer {path} is damaged; delete it to train it again"
        ):
            prepare(config)
    path.unlink()
    assert prepare(config).tokenizer.fingerprint == first.tokenizer.fingerprint


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw, share, said", [
    (b"", 0.1, "text.txt holds no text"), (b" \n\n", 0.1, "text.txt holds no text"),
    (b"abcde\xff", 0.1, "text.txt is not UTF-8: byte 5 is 0xff"),
    (b"a", 0.1, "val_share 0.1 leaves nothing for the train part of"), ("é".encode() * 3, 0.9, "leaves nothing for the train part"),
    (b"a" * 10, 1e-17, "leaves nothing for the val part"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["byte", "char"])
def test_a_text_that_cannot_be_split_says_why(tmp_path, raw, share, said, kind):
    path = text_file(tmp_path / "text.txt", raw)
    with pytest.raises(UserError) as error:
        prepare(byte_config(tmp_path, path=path, val_share=share, tokenizer=kind))
    assert said in str(error.value)
    assert not (tmp_path / "cache" / "shards").exists() or shard_folders(tmp_path / "cache") == []


@pytest.mark.parametrize("which, name", [(False, "val"), (True, "train")])
def test_documents_that_all_fall_into_one_part_say_so(tmp_path, which, name):
    documents = [str(i) for i in range(400) if is_validation(str(i), 0.5) == which]
    path = jsonl(tmp_path / "x.jsonl", documents)
    said = rf"val_share 0.5 leaves nothing for the {name} part of {path} \(documents: {len(documents)}\); change it, or give more text"
    with pytest.raises(UserError, match=said):
        prepare(byte_config(tmp_path, path=path, val_share=0.5))
    assert shard_folders(tmp_path / "cache") == []


@pytest.mark.parametrize("kind", ["byte", "char"])
def test_an_empty_val_path_is_named(tmp_path, kind):
    paths = {
        "path": text_file(tmp_path / "x.txt", "text"),
        "val_path": text_file(tmp_path / "y.txt", "\n"),
    }
    with pytest.raises(UserError, match="y.txt holds no text"):
        prepare(byte_config(tmp_path, **paths, tokenizer=kind))


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_shard_that_is_gone_or_another_tokenizers_is_named(tmp_path, corpus, name):
    config = byte_config(tmp_path, path=corpus)
    other = prepare(dataclasses.replace(config, bos=True))
    shard = only(prepare(config).train).path.with_name(name)
    shard.write_bytes(only(other.train).path.with_name(name).read_bytes())
    with pytest.raises(
        UserError,
        match=f"the token shard {shard} was made with another tokenizer; delete its folder",
    ):
        prepare(config)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"the token shard {shard} is damaged or truncated"):
        prepare(config)
    shard.unlink()
    with pytest.raises(UserError, match=f"the token shard {shard} is missing"):
        prepare(config)


def test_a_corpus_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="gone.txt is not a file"):
        prepare(byte_config(tmp_path, path="gone.txt"))
    with pytest.raises(UserError, match="'wikii'.*did you mean wiki?"):
        prepare(byte_config(tmp_path, source="wikii"))


# ---- how it goes -----------------------------------------------------------------------------------------------------


def peak(config: DataConfig) -> int:
    """Bytes that Python and numpy held at once while they prepared."""
    tracemalloc.start()
    prepare(config)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


@pytest.mark.parametrize(
    "form", [{"separator": "line"}, {}, {"tokenizer": "bpe:300"}], ids=["lines", "lone", "bpe"]
)
def test_eight_times_the_text_takes_no_more_memory(tmp_path, small, monkeypatch, form):
    small(2**14, 2**14)
    monkeypatch.setattr(prepare_module.os, "cpu_count", lambda: 1)

    def text(lines: int) -> str:
        return text_file(
            tmp_path / f"{lines}.txt",
            "".join(f"a line of text, which is number {i:07}\n" for i in range(lines)),
        )

    one, eight = text(10_000), text(80_000)  # 25 and 200 batches
    prepare(byte_config(tmp_path / "warm", path=text(1000), **form))
    few, many = (
        peak(byte_config(tmp_path / name, path=path, **form))
        for name, path in (("1", one), ("8", eight))
    )
    more = Path(eight).stat().st_size - Path(one).stat().st_size
    assert many - few < more / 5  # what is in flight when is left to chance


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_names_the_source_as_it_is_spelt(monkeypatch, capsys, terminal):
    """Brackets are markup to rich, and a pattern may hold them."""
    monkeypatch.setenv("COLUMNS", "150")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(shard_builder.time, "monotonic", iter(range(0, 1000, 6)).__next__)
    source = SimpleNamespace(name="[/x] [red].txt", size=4_000_000, position=0)
    with shard_builder.progress(source, 3) as advance:
        advance(1_000_000, 500_000)
        source.position = 1_000_000
        advance(1_000_000, 500_000)
    said = capsys.readouterr().err
    if terminal:
        assert "tokenising [/x] [red].txt" in said
    else:
        first, second = said.splitlines()
        assert first.startswith(
            "tokenising [/x] [red].txt: going on after 3 batches, 1 MB, 0.5 M tokens, "
        )
        assert second.startswith(
            "tokenising [/x] [red].txt: 25%, going on after 3 batches, 2 MB, 1.0 M tokens, "
        )
