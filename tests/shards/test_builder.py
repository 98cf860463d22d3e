"""Shard builder: an interruption, errors in threads and in the text, and memory."""

import dataclasses
import signal
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from pocketlm.config.sections import DataConfig
from pocketlm.data import prepare as prepare_module
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.shards.builder import BuildSettings, EncodedSplits
from pocketlm.shards.format import ShardWriter
from tests.support.preparation import byte_config, shard_folders, write_jsonl, write_text

DOCUMENTS = [f"document {i} " * 3 for i in range(40)]
THREADS = 9
WAIT_SECONDS = 30  # a test fails if an event has not come by then


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Ctrl-C is sent as POSIX does")
@pytest.mark.parametrize("busy", ["tokenising", "training the tokenizer"])
def test_ctrl_c_waits_for_no_library(tmp_path, corpus, small, monkeypatch, busy):
    """The encoding of a text without spaces, or training on it, may take many seconds."""
    calls, main_thread, released = [], threading.main_thread().ident, threading.Event()

    def blocked(*_: object) -> None:
        calls.append(1)
        if len(calls) == 1:
            # CPython notices a signal that comes just before a wait only after the wait.
            time.sleep(0.2)
            signal.pthread_kill(main_thread, signal.SIGINT)
        assert released.wait(WAIT_SECONDS)

    settings = dataclasses.replace(small(2**20, 30), threads=THREADS, encode=blocked)
    monkeypatch.setattr(prepare_module, "build_tokenizer", blocked)
    config = byte_config(tmp_path, path=corpus)
    if busy != "tokenising":
        config = dataclasses.replace(config, tokenizer="bpe:300")
    else:
        monkeypatch.undo()
    # A shell starts a background process with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(config, settings)
        assert not released.is_set()
        assert len(calls) <= (THREADS if busy == "tokenising" else 1)
    finally:
        signal.signal(signal.SIGINT, handler)
        released.set()


def test_an_exception_in_a_thread_is_raised_at_once(tmp_path, corpus, small):
    calls = []

    def broken_encode(*_: object) -> EncodedSplits:
        calls.append(1)
        raise ZeroDivisionError("in a thread")

    settings = dataclasses.replace(small(2**20, 30), threads=2, encode=broken_encode)
    with pytest.raises(ZeroDivisionError, match="in a thread"):
        prepare(byte_config(tmp_path, path=corpus), settings)
    assert len(calls) < 10


def test_an_error_in_the_text_leaves_nothing_on_the_disk(tmp_path, small, monkeypatch):
    settings = dataclasses.replace(small(100, 100), journal_seconds=-1)
    journalled, state = [], ShardWriter.state
    monkeypatch.setattr(ShardWriter, "state", lambda self: journalled.append(1) or state(self))
    lines = b"line of text\n" * 100
    path = write_text(tmp_path / "text.txt", lines + b"\xff" + lines)
    config = byte_config(tmp_path, path=path, separator="line", val_share=0.5)
    with pytest.raises(UserError, match="text.txt is not UTF-8: byte 1300 is 0xff"):
        prepare(config, settings)
    assert len(journalled) > 1
    assert shard_folders(tmp_path / "cache") == []
    write_text(tmp_path / "text.txt", lines + b"other line")
    data = prepare(config, settings)
    assert data.train.n_documents + data.val.n_documents == 101


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_missing_damaged_or_foreign_shard_is_named(tmp_path, corpus, name):
    config = byte_config(tmp_path, path=corpus)
    foreign = prepare(dataclasses.replace(config, bos=True)).train.shards[0]
    shard = prepare(config).train.shards[0].path.with_name(name)
    shard.write_bytes(foreign.path.with_name(name).read_bytes())
    message = f"the token shard {shard} was made with another tokenizer; delete its folder"
    with pytest.raises(UserError, match=message):
        prepare(config)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"the token shard {shard} is damaged or truncated"):
        prepare(config)
    shard.unlink()
    with pytest.raises(UserError, match=f"the token shard {shard} is missing"):
        prepare(config)


# ---- memory ----


def peak(config: DataConfig, settings: BuildSettings) -> int:
    """Return the most bytes that Python and numpy had allocated during a preparation."""
    tracemalloc.start()
    prepare(config, settings)
    size = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return size


def write_lines(folder: Path, count: int) -> str:
    lines = [f"a line of text, which is number {i:07}\n" for i in range(count)]
    return write_text(folder / f"{count}.txt", "".join(lines))


@pytest.mark.parametrize(
    "keys", [{"separator": "line"}, {}, {"tokenizer": "bpe:300"}], ids=["lines", "single", "bpe"]
)
def test_eight_times_the_text_takes_no_more_memory(tmp_path, small, keys):
    settings = dataclasses.replace(small(2**14, 2**14), threads=2)
    one, eight = write_lines(tmp_path, 10_000), write_lines(tmp_path, 80_000)  # 25 and 200 batches
    warm_up = byte_config(tmp_path / "warm", path=write_lines(tmp_path, 1000), **keys)
    prepare(warm_up, settings)
    few = peak(byte_config(tmp_path / "1", path=one, **keys), settings)
    many = peak(byte_config(tmp_path / "8", path=eight, **keys), settings)
    difference = Path(eight).stat().st_size - Path(one).stat().st_size
    # The number of batches in flight at the peak is left to chance.
    assert many - few < difference / 5
