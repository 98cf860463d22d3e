"""Streaming: the rows of a stream, which worker has which documents, their order, and memory."""

import json
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus import pieces, readers
from pocketlm.corpus.chunks import is_validation
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.sources import open_source
from pocketlm.data import streaming
from pocketlm.data.datasets import PackedLMDataset, PaddedLMDataset, RowFormat
from pocketlm.data.samplers import DataShard
from pocketlm.data.streaming import (
    StepShare,
    StreamingPackedLMDataset,
    StreamLoader,
    StreamOptions,
    StreamPosition,
)
from pocketlm.errors import UserError
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.loaders import Texts
from tests.support.rows import Row, kept_targets, rows_of_batch, stream_rows, write_shard

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"  # more workers than cores
)


def rows_of(dataset: StreamingPackedLMDataset) -> list[Row]:
    """Return the rows of a stream that ends; list() would ask for its length."""
    return [row for _, _, batch in dataset for row in rows_of_batch(batch)]


# ---- the rows ----


@pytest.fixture
def small_pieces(monkeypatch):
    """Documents come in pieces of 16 characters, and 30 characters are tokenised at a time."""
    monkeypatch.setattr(pieces, "PIECE_CHARACTERS", 16)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 16)
    monkeypatch.setattr(streaming, "STREAM_BATCH", 30)


DOCUMENT = st.text(alphabet="abé😀\n ", min_size=1, max_size=40).filter(str.strip)
ROW_FORMAT = st.builds(RowFormat, st.integers(1, 9), st.booleans(), st.just(True))
OPTIONS = st.builds(
    StreamOptions,
    seed=st.integers(0, 2**32 - 1),
    shuffle_buffer=st.integers(1, 5),
    epochs=st.just(2),
)
TOKENIZER = st.builds(ByteTokenizer, st.booleans(), st.booleans())
DOCUMENTS = st.lists(DOCUMENT, min_size=1, max_size=8)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(DOCUMENT, min_size=1, max_size=8), TOKENIZER, ROW_FORMAT, st.integers(1, 4), OPTIONS
)
def test_rows_are_those_of_a_plain_loop_and_resume_at_every_position(
    small_pieces, documents, tokenizer, row_format, batch_size, options
):
    """There are two epochs, and documents longer than pieces, batches and blocks."""
    source = Texts(documents)
    dataset = StreamingPackedLMDataset(source, tokenizer, row_format, batch_size, options)
    expected = []
    for epoch in (0, 1):
        expected += stream_rows(documents, tokenizer, row_format, options, epoch=epoch)
    if not expected:
        with pytest.raises(UserError, match="too few documents"):
            rows_of(dataset)
        return
    steps = list(iter(dataset))
    full, rest = divmod(len(expected), batch_size)
    sizes = [len(batch["targets"]) for _, _, batch in steps]
    assert sizes == [batch_size] * full + [rest] * bool(rest)
    assert [row for _, _, batch in steps for row in rows_of_batch(batch)] == expected
    done = 0
    for _, position, batch in steps:
        done += len(rows_of_batch(batch))
        saved = json.dumps(asdict(position))
        dataset.positions = [StreamPosition(**json.loads(saved))]
        assert rows_of(dataset) == expected[done:]


@pytest.mark.parametrize("kind", ["char", "bpe:300", "gpt2"])
def test_rows_of_any_tokenizer_are_those_of_a_plain_loop(kind):
    documents = [f"{'word ' * (i % 7)}number {i} costs {i * i}.\n" for i in range(50)]
    if kind == "gpt2":
        tokenizer = JsonTokenizer.gpt2(ROOT / "data")
    elif kind == "char":
        tokenizer = CharTokenizer.train(documents)
    else:
        tokenizer = JsonTokenizer.train_bpe(documents, 300)
    options = StreamOptions(val_share=0.2, seed=3, shuffle_buffer=7, epochs=1)
    row_format = RowFormat(16, document_mask=True)
    dataset = StreamingPackedLMDataset(Texts(documents), tokenizer, row_format, 4, options)
    assert rows_of(dataset) == stream_rows(documents, tokenizer, row_format, options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (False, True), (True, True)])
def test_a_workers_rows_are_the_rows_of_a_shard_of_its_documents(tmp_path, padded, bos, eos):
    documents = [f"document {i} " + "x" * (i * 7 % 30) for i in range(40)]
    tokenizer = ByteTokenizer(bos, eos)
    row_format, options = RowFormat(12, padded, True), StreamOptions(shuffle_buffer=4, epochs=1)
    dataset = StreamingPackedLMDataset(Texts(documents), tokenizer, row_format, 5, options)
    batches = (batch for _, _, batch in dataset.batches(worker=1, workers=3))
    streamed = [row for batch in batches for row in rows_of_batch(batch)]
    shard = write_shard(tmp_path / "x.bin", tokenizer, documents[1::3])
    if padded:
        whole = PaddedLMDataset(shard, 12, bool(tokenizer.corpus_suffix))
    else:
        whole = PackedLMDataset(shard, 12, document_mask=True)
    in_order = rows_of_batch(whole.__getitems__(range(len(whole))))
    assert sorted(streamed) == sorted(in_order)
    assert streamed != in_order


# ---- which worker has which documents ----

CHARACTERS = [chr(0x4E00 + i) for i in range(1200)]
# 50 documents that have no character in common.
DISTINCT = ["".join(CHARACTERS[start : start + 24]) for start in range(0, 1200, 24)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_every_training_token_is_a_target_once_an_epoch_and_no_validation_token_ever(
    world_size, workers, padded
):
    """However many ranks share the rows, and worker processes the documents."""
    tokenizer = CharTokenizer.train(DISTINCT)
    options = StreamOptions(val_share=0.3, shuffle_buffer=3, epochs=1)
    targets: Counter[int] = Counter()
    for rank in range(world_size):
        dataset = StreamingPackedLMDataset(
            Texts(DISTINCT), tokenizer, RowFormat(30, padded), 6, options
        )
        step = StepShare(batches=2, rows=2, rank=DataShard(rank, world_size))
        targets.update(kept_targets(StreamLoader(dataset, workers, step=step)))
    train = [document for document in DISTINCT if not is_validation(document, 0.3)]
    assert 0 < len(train) < len(DISTINCT)
    assert targets.pop(tokenizer.eos_id) == len(train)
    assert targets == Counter(i for document in train for i in tokenizer.encode(document))


def test_workers_take_turns_and_yield_what_each_would_alone():
    tokenizer = CharTokenizer.train(DISTINCT)
    row_format, options = RowFormat(8, document_mask=True), StreamOptions(seed=5, shuffle_buffer=3)
    dataset = StreamingPackedLMDataset(Texts(DISTINCT), tokenizer, row_format, 4, options)
    batches = [rows_of_batch(batch) for batch in islice(iter(StreamLoader(dataset, 3)), 9)]
    alone = [
        stream_rows(DISTINCT, tokenizer, row_format, options, DataShard(worker, 3))
        for worker in range(3)
    ]
    expected = [alone[worker][start : start + 4] for start in (0, 4, 8) for worker in range(3)]
    assert batches == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranks_of_a_stream_have_the_rows_of_each_step_of_one(workers):
    """Three of them, two rows at a time; in the order of `ShuffledBatchSampler`."""
    tokenizer, options = CharTokenizer.train(DISTINCT), StreamOptions(shuffle_buffer=3)

    def rows(step: StepShare | None = None) -> list[Row]:
        dataset = StreamingPackedLMDataset(Texts(DISTINCT), tokenizer, RowFormat(8), 6, options)
        loader = StreamLoader(dataset, workers, step=step)
        return [row for batch in islice(iter(loader), 8) for row in rows_of_batch(batch)]

    one = rows()  # 4 steps of 2 batches of 6 rows
    three = [rows(StepShare(2, 2, DataShard(rank, 3))) for rank in range(3)]
    assert one[:24] == [
        row for p in range(4) for rank in range(3) for row in three[rank][2 * p : 2 * p + 2]
    ]


# ---- order ----


def epochs_of(seed: int, shuffle_buffer: int, count: int = 2) -> list[list[Row]]:
    """Return the rows of each of the first epochs."""
    options = StreamOptions(seed=seed, shuffle_buffer=shuffle_buffer, epochs=count)
    rows = rows_of(
        StreamingPackedLMDataset(Texts(DISTINCT), ByteTokenizer(), RowFormat(20), 4, options)
    )
    size = len(rows) // count
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def test_a_seed_is_an_order_and_each_epoch_has_its_own():
    """Two orders of 184 rows in blocks of 50 are never equal by chance."""
    orders = [order for seed in (0, 1, 2, 42) for order in epochs_of(seed, 50, count=3)]
    assert len({str(order) for order in orders}) == len(orders) == 12
    assert {str(sorted(order)) for order in orders} == {str(sorted(orders[0]))}
    assert epochs_of(42, 50, count=3) == orders[-3:]


def test_shuffle_buffer_1_keeps_the_order_and_a_larger_one_moves_a_row_within_its_block_only():
    in_order, _ = epochs_of(0, 1)
    targets = b"".join(bytes(i % 256 for i in tokens[1:]) for tokens, _ in in_order)
    assert targets == "".join(f"{text}\0" for text in DISTINCT).encode()
    shuffled, _ = epochs_of(0, 50)
    assert shuffled != in_order
    for start in range(0, len(in_order), 50):
        assert sorted(shuffled[start : start + 50]) == sorted(in_order[start : start + 50])


def test_the_last_row_of_an_epoch_is_short_and_the_next_epoch_starts_in_the_same_batch():
    options = StreamOptions(shuffle_buffer=1)
    dataset = StreamingPackedLMDataset(
        Texts(["abcdef", "gh"]), ByteTokenizer(), RowFormat(4), 4, options
    )
    # Rows, with e for the eos: e a b c d | d e f e g | g h e, and of the next epoch e a b c d.
    _, position, batch = next(iter(dataset))
    assert batch["targets"].tolist() == [
        [97, 98, 99, 100],
        [101, 102, 256, 103],
        [104, 256, IGNORE_INDEX, IGNORE_INDEX],
        [97, 98, 99, 100],
    ]
    assert position.epoch == 1


# ---- memory ----


class Many(Source):
    """A source of `count` documents of 1,000 characters, which are made as they are read."""

    name = "many"

    def __init__(self, count: int):
        self.count = count

    def documents(self) -> Iterator[str]:
        return (f"{i:09d} " * 100 for i in range(self.count))


def peak(source: Source, padded: bool) -> int:
    """Return the most bytes that are allocated during an epoch."""
    options = StreamOptions(shuffle_buffer=100, epochs=1)
    dataset = StreamingPackedLMDataset(source, ByteTokenizer(), RowFormat(512, padded), 8, options)
    tracemalloc.start()
    try:
        counts = (int((batch["targets"] != IGNORE_INDEX).sum()) for _, _, batch in dataset)
        assert sum(counts) > 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("padded", [False, True])
def test_memory_does_not_grow_with_the_corpus(padded):
    peak(Many(10), padded)  # warms up what is loaded once
    assert peak(Many(8_000), padded) < 1.2 * peak(Many(1_000), padded)


@pytest.mark.parametrize("padded", [False, True])
def test_memory_does_not_grow_with_a_document(tmp_path, padded):
    """The text of a document of any length comes in pieces of a million characters."""
    peaks = []
    for size in (4, 16):
        path = tmp_path / f"{size}.txt"
        path.write_text("short<e>" + "0123456789" * (size * 100_000))
        source = open_source(SourceConfig(path=str(path), separator="<e>"), "data")
        peaks.append(peak(source, padded))
    few, many = peaks
    assert many < 1.2 * few


# ---- errors, and pickle ----


@pytest.mark.parametrize("workers, enough", [(3, True), (0, True), (5, False)])
def test_too_few_documents_for_the_workers_are_refused_before_the_first_batch(workers, enough):
    """Of three documents for training and one for validation, a fourth worker would have none."""
    texts = [text for text in map(str, range(100)) if not is_validation(text, 0.2)][:3]
    texts.append(next(text for text in map(str, range(100)) if is_validation(text, 0.2)))
    options = StreamOptions(val_share=0.2)
    dataset = StreamingPackedLMDataset(Texts(texts), ByteTokenizer(), RowFormat(4), 2, options)
    if enough:
        assert next(iter(StreamLoader(dataset, workers)))
        return
    message = (
        f"texts has too few documents to train on for {workers} workers; lower hardware.num_workers"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        StreamLoader(dataset, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_without_a_target_do_not_loop_for_ever(workers):
    tokenizer = ByteTokenizer(eos=False)
    texts = Texts(["a", "b"][: workers or 1])  # one for each worker
    dataset = StreamingPackedLMDataset(texts, tokenizer, RowFormat(4), 2)
    message = (
        f"^texts has too few documents to train on for {workers or 1} workers; lower [a-z_.]*$"
    )
    with pytest.raises(UserError, match=message):
        next(iter(StreamLoader(dataset, workers)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_with_a_wrong_byte_far_on_is_one_sentence(tmp_path, workers):
    (tmp_path / "x.txt").write_bytes(b"good text\n" * 200_000 + b"\xff\n")
    source = open_source(SourceConfig(path=str(tmp_path / "x.txt"), separator="line"), "data")
    options = StreamOptions(shuffle_buffer=10)
    dataset = StreamingPackedLMDataset(source, ByteTokenizer(), RowFormat(1000), 10, options)
    batches = 0
    with pytest.raises(UserError) as error:
        for _ in StreamLoader(dataset, workers):
            batches += 1
    assert batches > 10
    assert str(error.value) == (
        f"{tmp_path / 'x.txt'} is not UTF-8: byte 2000000 is 0xff; "
        "data.errors=replace reads such bytes as U+FFFD, and a text in another encoding is "
        "converted with iconv -f ENCODING -t UTF-8"
    )


@pytest.mark.parametrize("kind", ["byte", "char", "bpe:300"])
def test_a_dataset_can_be_pickled_even_after_use(kind):
    """It must be where worker processes are not forks."""
    tokenizers = {
        "byte": ByteTokenizer(),
        "char": CharTokenizer.train(DISTINCT),
        "bpe:300": JsonTokenizer.train_bpe(DISTINCT, 300),
    }
    source, options = Texts(DISTINCT), StreamOptions(epochs=1)
    dataset = StreamingPackedLMDataset(source, tokenizers[kind], RowFormat(20), 4, options)
    before = rows_of(dataset)
    assert rows_of(pickle.loads(pickle.dumps(dataset))) == before
