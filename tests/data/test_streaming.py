"""Rows without shards: which worker has which document, the rows they become, their order, and going on exactly."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus import pieces, readers
from pocketlm.corpus.chunks import is_validation
from pocketlm.corpus.pieces import Source
from pocketlm.corpus.sources import open_source
from pocketlm.data import streaming
from pocketlm.data.datasets import PackedLMDataset, PaddedLMDataset
from pocketlm.data.streaming import StreamingPackedLMDataset, StreamLoader, StreamPosition
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.rows import Row, as_rows, plain_rows, write_shard

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more workers than cores


class Texts(Source):
    """These documents."""

    name = "texts"

    def __init__(self, texts: list[str]):
        self.texts = texts

    def documents(self) -> Iterator[str]:
        return iter(self.texts)


def rows_from(dataset: StreamingPackedLMDataset, place: StreamPosition) -> list[Row]:
    dataset.places = [place]
    return [row for _, _, batch in dataset for row in as_rows(batch)]


documents_of_a_source = st.lists(
    st.text(alphabet="abé😀\n ", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=8
)


@pytest.fixture
def small_pieces(monkeypatch):
    """Documents come in pieces of 16 characters, and 30 characters are tokenised at a time."""
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(readers, "BLOCK", 16)
    monkeypatch.setattr(streaming, "STREAM_BATCH", 30)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents_of_a_source,
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_rows_are_those_of_the_plain_way_and_go_on_from_every_place(
    small_pieces, documents, seq_len, batch_size, shuffle_buffer, padded, bos, eos, data
):
    """Two epochs, documents longer than pieces, batches and blocks; whatever stands around them."""
    tokenizer, seed = ByteTokenizer(bos, eos), data.draw(st.integers(0, 2**32 - 1))
    settings = {"seed": seed, "shuffle_buffer": shuffle_buffer, "padded": padded}
    dataset = StreamingPackedLMDataset(
        Texts(documents), tokenizer, seq_len, batch_size, epochs=2, document_mask=True, **settings
    )
    plain = [
        row
        for epoch in (0, 1)
        for row in plain_rows(documents, tokenizer, seq_len, epoch=epoch, **settings)
    ]
    if not plain:
        with pytest.raises(UserError, match="too few documents"):
            rows_from(dataset, StreamPosition())
        return
    steps = list(iter(dataset))  # not list(dataset), which would ask for its length
    counts = [len(batch["targets"]) for _, _, batch in steps]
    assert counts == [batch_size] * (len(plain) // batch_size) + [len(plain) % batch_size] * (
        len(plain) % batch_size > 0
    )
    plain = [
        row for row in plain if len(row[0]) > 1
    ]  # a padded document of one token has no target
    assert [row for _, _, batch in steps for row in as_rows(batch)] == plain
    after = 0
    for _, place, batch in steps:
        after += len(as_rows(batch))
        assert (
            rows_from(dataset, StreamPosition(**json.loads(json.dumps(place.__dict__))))
            == plain[after:]
        )


@pytest.mark.parametrize("kind", ["char", "bpe:300", "gpt2"])
def test_rows_of_any_tokenizer_are_those_of_the_plain_way(kind):
    documents = [f"{'word ' * (i % 7)}number {i} costs {i * i}.\n" for i in range(50)]
    if kind == "gpt2":
        tokenizer = JsonTokenizer.gpt2(ROOT / "data")
    else:
        tokenizer = (
            CharTokenizer.train(documents)
            if kind == "char"
            else JsonTokenizer.train_bpe(documents, 300)
        )
    settings = {"seed": 3, "shuffle_buffer": 7, "val_share": 0.2}
    dataset = StreamingPackedLMDataset(
        Texts(documents), tokenizer, 16, 4, epochs=1, document_mask=True, **settings
    )
    assert [row for _, _, batch in dataset for row in as_rows(batch)] == plain_rows(
        documents, tokenizer, 16, **settings
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (False, True), (True, True)])
def test_a_workers_rows_are_the_rows_of_a_shard_of_its_documents(tmp_path, padded, bos, eos):
    documents = [f"document {i} " + "x" * (i * 7 % 30) for i in range(40)]
    tokenizer = ByteTokenizer(bos, eos)
    dataset = StreamingPackedLMDataset(
        Texts(documents),
        tokenizer,
        12,
        5,
        shuffle_buffer=4,
        padded=padded,
        document_mask=True,
        rank=1,
        world_size=3,
        epochs=1,
    )
    streamed = [row for _, _, batch in dataset for row in as_rows(batch)]
    shard = write_shard(tmp_path / "x.bin", tokenizer, documents[1::3])
    whole = (
        PaddedLMDataset(shard, 12, bool(tokenizer.final))
        if padded
        else PackedLMDataset(shard, 12, document_mask=True)
    )
    assert sorted(streamed) == sorted(as_rows(whole.__getitems__(range(len(whole)))))
    assert streamed != as_rows(whole.__getitems__(range(len(whole))))


# ---- who has what ----------------------------------------------------------------------------------------------------

LETTERS = [chr(0x4E00 + i) for i in range(1200)]
ONCE = [
    "".join(LETTERS[begin : begin + 24]) for begin in range(0, 1200, 24)
]  # 50 documents that share no character


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_every_training_token_is_a_target_once_an_epoch_and_no_validation_token_ever(
    world_size, workers, padded
):
    """However many ranks and worker processes share the documents."""
    tokenizer = CharTokenizer.train(ONCE)
    targets: Counter[int] = Counter()
    for rank in range(world_size):
        settings = {
            "val_share": 0.3,
            "shuffle_buffer": 3,
            "padded": padded,
            "rank": rank,
            "world_size": world_size,
        }
        dataset = StreamingPackedLMDataset(Texts(ONCE), tokenizer, 30, 4, epochs=1, **settings)
        for batch in StreamLoader(dataset, workers):
            targets.update(batch["targets"][batch["targets"] != -100].tolist())
    train = [document for document in ONCE if not is_validation(document, 0.3)]
    assert 0 < len(train) < len(ONCE)
    assert targets.pop(tokenizer.eos_id) == len(train)
    assert targets == Counter(i for document in train for i in tokenizer.encode(document))


def test_workers_take_turns_and_give_what_each_would_alone():
    settings = {"seed": 5, "shuffle_buffer": 3}
    tokenizer = CharTokenizer.train(ONCE)
    dataset = StreamingPackedLMDataset(
        Texts(ONCE), tokenizer, 8, 4, rank=1, world_size=2, document_mask=True, **settings
    )
    got = [as_rows(batch) for batch in islice(iter(StreamLoader(dataset, 3)), 9)]
    alone = [
        plain_rows(ONCE, tokenizer, 8, shard=3 + worker, shards=6, **settings)
        for worker in range(3)
    ]
    assert got == [alone[worker][begin : begin + 4] for begin in (0, 4, 8) for worker in range(3)]


# ---- order -----------------------------------------------------------------------------------------------------------


def epochs_of(seed: int, shuffle_buffer: int, count: int = 2) -> list[list[Row]]:
    """The rows of each of the first epochs."""
    dataset = StreamingPackedLMDataset(
        Texts(ONCE), ByteTokenizer(), 20, 4, seed=seed, shuffle_buffer=shuffle_buffer, epochs=count
    )
    rows = [row for _, _, batch in dataset for row in as_rows(batch)]
    size = len(rows) // count
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def test_a_seed_is_an_order_and_each_epoch_has_its_own():
    """Of 184 rows in blocks of 50: two orders are never equal by chance."""
    orders = [order for seed in (0, 1, 2, 42) for order in epochs_of(seed, 50, count=3)]
    assert len({str(order) for order in orders}) == len(orders) == 12
    assert {str(sorted(order)) for order in orders} == {str(sorted(orders[0]))}
    assert epochs_of(42, 50, count=3) == orders[-3:]


def test_shuffle_buffer_1_keeps_the_order_and_a_larger_one_moves_a_row_within_its_block_only():
    in_order, _ = epochs_of(0, 1)
    assert (
        b"".join(bytes(i % 256 for i in tokens[1:]) for tokens, _ in in_order)
        == "".join(f"{text}\0" for text in ONCE).encode()
    )
    shuffled, _ = epochs_of(0, 50)
    assert shuffled != in_order
    for begin in range(0, len(in_order), 50):
        assert sorted(shuffled[begin : begin + 50]) == sorted(in_order[begin : begin + 50])


def test_the_last_row_of_an_epoch_is_short_and_the_next_epoch_begins_in_the_same_batch():
    dataset = StreamingPackedLMDataset(
        Texts(["abcdef", "gh"]), ByteTokenizer(), 4, 4, shuffle_buffer=1
    )
    _, place, batch = next(iter(dataset))  # e a b c d | d e f e g | g h e || e a b c d
    assert batch["targets"].tolist() == [
        [97, 98, 99, 100],
        [101, 102, 256, 103],
        [104, 256, -100, -100],
        [97, 98, 99, 100],
    ]
    assert place.epoch == 1


# ---- size ------------------------------------------------------------------------------------------------------------


class Many(Source):
    """So many documents of 1,000 characters, made as they are asked for."""

    name = "many"

    def __init__(self, count: int):
        self.count = count

    def documents(self) -> Iterator[str]:
        return (f"{i:09d} " * 100 for i in range(self.count))


def peak(source: Source, seq_len: int, **settings: int | bool) -> int:
    """Bytes held at most while an epoch goes by."""
    dataset = StreamingPackedLMDataset(
        source, ByteTokenizer(), seq_len, 8, epochs=1, shuffle_buffer=100, **settings
    )
    tracemalloc.start()
    try:
        assert sum(int((batch["targets"] != -100).sum()) for _, _, batch in dataset) > 0
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("padded", [False, True])
def test_memory_does_not_grow_with_the_corpus(padded):
    peak(Many(10), 512, padded=padded)  # what is loaded once
    assert peak(Many(8_000), 512, padded=padded) < 1.2 * peak(Many(1_000), 512, padded=padded)


@pytest.mark.parametrize("padded", [False, True])
def test_memory_does_not_grow_with_a_document(tmp_path, padded):
    """Text of one document, however long, comes in pieces of a million characters."""
    files = []
    for size in (4, 16):
        files.append(tmp_path / f"{size}.txt")
        files[-1].write_text("short<e>" + "0123456789" * (size * 100_000))
    few, many = (
        peak(open_source(SourceConfig(path=str(file), separator="<e>"), "data"), 512, padded=padded)
        for file in files
    )
    assert many < 1.2 * few


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "world_size, workers, enough",
    [(1, 3, True), (3, 0, True), (3, 1, True), (2, 2, False), (1, 5, False)],
)
def test_too_few_documents_for_the_workers_are_refused_before_the_first_batch(
    world_size, workers, enough
):
    """Three to train on and one for validation: the fourth worker, and the fifth, would have none."""
    texts = [text for text in map(str, range(100)) if not is_validation(text, 0.2)][:3]
    texts.append(next(text for text in map(str, range(100)) if is_validation(text, 0.2)))
    dataset = StreamingPackedLMDataset(
        Texts(texts), ByteTokenizer(), 4, 2, val_share=0.2, world_size=world_size
    )
    if enough:
        assert next(iter(StreamLoader(dataset, workers)))
        return
    message = f"texts has too few documents to train on for {world_size * workers} workers; lower hardware.num_workers or hardware.devices"
    with pytest.raises(UserError, match=f"^{message}$"):
        StreamLoader(dataset, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_documents_without_a_target_do_not_go_round_for_ever(workers):
    ranks = {"rank": 0, "world_size": 1} if workers else {"rank": 1, "world_size": 2}
    dataset = StreamingPackedLMDataset(Texts(["a", "b"]), ByteTokenizer(eos=False), 4, 2, **ranks)
    with pytest.raises(
        UserError, match="^texts has too few documents to train on for 2 workers; lower [a-z_. ]*$"
    ):
        next(iter(StreamLoader(dataset, workers)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_on_is_one_sentence(tmp_path, workers):
    (tmp_path / "x.txt").write_bytes(b"good text\n" * 200_000 + b"\xff\n")
    source = open_source(SourceConfig(path=str(tmp_path / "x.txt"), separator="line"), "data")
    loader = StreamLoader(
        StreamingPackedLMDataset(source, ByteTokenizer(), 1000, 10, shuffle_buffer=10), workers
    )
    seen = 0
    with pytest.raises(UserError) as refused:
        for _ in loader:
            seen += 1
    assert seen > 10
    assert (
        str(refused.value)
        == f"{tmp_path / 'x.txt'} is not UTF-8: byte 2000000 is 0xff; data.errors=replace puts U+FFFD in such places"
    )


@pytest.mark.parametrize("kind", ["byte", "char", "bpe:300"])
def test_a_dataset_goes_through_pickle(kind):
    """As it must where worker processes are not forks; also once it has been in use."""
    tokenizer = {
        "byte": ByteTokenizer(),
        "char": CharTokenizer.train(ONCE),
        "bpe:300": JsonTokenizer.train_bpe(ONCE, 300),
    }[kind]
    dataset = StreamingPackedLMDataset(Texts(ONCE), tokenizer, 20, 4, epochs=1)
    before = [as_rows(batch) for _, _, batch in dataset]
    assert [as_rows(batch) for _, _, batch in pickle.loads(pickle.dumps(dataset))] == before


# ---- resuming --------------------------------------------------------------------------------------------------------


def loader(workers: int, padded: bool = False, rank: int = 0, world_size: int = 1) -> StreamLoader:
    """40 documents, some longer than a block of 3 rows, in batches of 4: blocks and epochs end anywhere in them."""
    documents = [f"document {i} " + "long " * (i % 10 * 2) for i in range(40)]
    settings = {
        "val_share": 0.2,
        "seed": 11,
        "shuffle_buffer": 3,
        "padded": padded,
        "rank": rank,
        "world_size": world_size,
    }
    return StreamLoader(
        StreamingPackedLMDataset(Texts(documents), ByteTokenizer(), 16, 4, **settings), workers
    )


def take(loader: StreamLoader, count: int) -> list[list[Row]]:
    return [as_rows(batch) for batch in islice(iter(loader), count)]


NEW_PROCESS = """
import json, sys
import tests.data.test_streaming as t
for workers, padded, state in json.load(sys.stdin):
    loader = t.loader(workers, padded)
    loader.load_state_dict(state)
    print(json.dumps(t.take(loader, 4)))
"""


def test_a_stream_goes_on_in_a_new_process():
    """After each of many batches, in the middle of blocks and across the ends of epochs, with 0, 1 and 3 workers."""
    cases, expected, epochs, inside = [], [], set(), 0
    for workers, padded, counts in (
        (0, False, range(40)),
        (0, True, range(0, 40, 5)),
        (1, False, range(0, 40, 7)),
        (3, False, range(7, 50, 8)),
        (3, True, (10,)),
    ):
        one = loader(workers, padded)
        whole = take(loader(workers, padded), max(counts) + 4)
        batches = iter(one)
        for k in range(max(counts) + 1):
            if k in counts:
                state = one.state_dict()
                cases.append([workers, padded, state])
                expected.append(whole[k : k + 4])
                epochs |= {place["epoch"] for place in state["ranks"][0]["places"]}
                inside += any(0 < place["row"] < 3 for place in state["ranks"][0]["places"])
            next(batches)
    assert max(epochs) >= 1 and inside > 10
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NEW_PROCESS],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert [
        [[tuple(row) for row in batch] for batch in json.loads(line)]
        for line in done.stdout.splitlines()
    ] == expected


def test_a_new_iterator_of_the_same_stream_goes_on_too():
    for workers in (0, 2):
        one = loader(workers)
        assert take(one, 3) + take(one, 5) == take(loader(workers), 8)


@pytest.mark.parametrize("before, now, message", [
    ((2, 1), (0, 1), "set hardware.num_workers to 2, not 0"),
    ((0, 1), (1, 1), "set hardware.num_workers to 0, not 1"),
    ((0, 1), (0, 2), "set hardware.devices to 1, not 2"),
])  # fmt: skip
def test_a_stream_is_not_dealt_out_anew_in_the_middle(before, now, message):
    """Other workers or ranks would have other documents: some text twice, and some never."""
    one = loader(before[0], world_size=before[1])
    take(one, 3)
    another = loader(now[0], world_size=now[1])
    with pytest.raises(UserError, match=f"^a stream goes on only as it was dealt out: {message}$"):
        another.load_state_dict(json.loads(json.dumps(one.state_dict())))


def test_a_stream_leaves_the_global_generators_alone():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist()
    for workers in (0, 1):
        torch.manual_seed(1)
        np.random.seed(1)
        take(loader(workers), 3)
        assert (torch.rand(2).tolist(), np.random.rand(2).tolist()) == expected
