"""Shard builder: an interruption, errors in threads and in the text, and memory."""

import dataclasses
import signal
import threading
import time
import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from pocketlm.config.sections import DataConfig
from pocketlm.corpus.chunks import Chunk
from pocketlm.data import shard_builder
from pocketlm.data.prepare import prepare
from pocketlm.data.shard_builder import BuildSettings, EncodedSplits, encode_chunks
from pocketlm.data.shards import ShardWriter
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from tests.support.preparation import byte_config, shard_folders, write_jsonl, write_text

DOCUMENTS = [f"document {i} " * 3 for i in range(40)]
THREADS = 9
WAIT_SECONDS = 30  # a test fails if an event has not come by then


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


class ObservedPool(ThreadPoolExecutor):
    """A pool that says when its queue is full, and when what waits in it has been cancelled."""

    def __init__(self, threads: int):
        super().__init__(threads)
        self.submitted = 0
        self.full, self.cancelled = threading.Event(), threading.Event()
        ObservedPool.last = self

    def submit(self, *arguments: object) -> Future:
        self.submitted += 1
        future = super().submit(*arguments)
        if self.submitted > 2 * THREADS:  # the builder now waits for the first result
            self.full.set()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=cancel_futures)
        self.cancelled.set()
        super().shutdown(wait=wait)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="Ctrl-C is sent as POSIX does")
def test_ctrl_c_cancels_the_batches_that_wait(tmp_path, corpus, small, monkeypatch):
    monkeypatch.setattr(shard_builder, "ThreadPoolExecutor", ObservedPool)
    calls, one_at_a_time = [], threading.Lock()

    def interrupting_encode(batch: list[Chunk], tokenizer: Tokenizer) -> EncodedSplits:
        with one_at_a_time:  # so that only one is the third
            calls.append(1)
            number = len(calls)
        pool = ObservedPool.last
        if number == 3:
            assert pool.full.wait(WAIT_SECONDS)
            # CPython notices a signal that comes just before a wait only after the wait.
            time.sleep(0.2)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert pool.cancelled.wait(WAIT_SECONDS)
        return encode_chunks(batch, tokenizer)

    settings = dataclasses.replace(small(2**20, 30), threads=THREADS, encode=interrupting_encode)
    # A shell starts a background process with the signal ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare(byte_config(tmp_path, path=corpus), settings)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ObservedPool.last.submitted == 2 * THREADS + 1
    assert len(calls) <= THREADS


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
