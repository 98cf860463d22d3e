"""Loaders: the rows, order and batches that a config means, and the bytes that are validated."""

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from pocketlm.corpus.chunks import is_validation
from pocketlm.data.datasets import PackedLMDataset, PaddedLMDataset, RowFormat
from pocketlm.data.loaders import build_loaders, build_train_sampler, validation_target_bytes
from pocketlm.data.samplers import DataShard, MixtureBatchSampler, ShuffledBatchSampler
from pocketlm.data.streaming import StreamLoader, StreamOptions
from pocketlm.errors import UserError
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.corpora import LINES, LINES_CONFIG, TRAIN, VAL, prepare_config
from tests.support.rows import kept_targets, rows_of_batch, stream_rows

pytestmark = pytest.mark.usefixtures("lines_folder")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def counts_of(documents: list[str]) -> Counter[int]:
    """Return how often each byte and the eos are targets, in an epoch over the documents."""
    return Counter("".join(documents).encode()) + Counter({256: len(documents)})


def limit_to_one_epoch(loader: StreamLoader) -> None:
    stream = loader.stream
    stream.options = dataclasses.replace(stream.options, epochs=1)


# ---- prepared data ----


def test_the_text_that_comes_out_is_the_text_that_went_in():
    """It goes all the way from a file to rows."""
    text = "a rose is a rose is a rose.\n" * 30
    Path("text.txt").write_text(text)
    options = ["data.path=text.txt", "data.tokenizer=char", "data.val_share=0.1"]
    _, data = prepare_config(*options)
    assert isinstance(data.tokenizer, CharTokenizer)
    assert data.name == "text.txt"
    rows = PackedLMDataset(data.train.shards[0], 16)
    train = data.tokenizer.decode(kept_targets([rows.__getitems__(range(len(rows)))]))
    val = data.tokenizer.decode(data.val.shards[0].tokens.tolist())
    assert train + val == text


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("mask", [True, False])
def test_the_loaders_are_the_datasets_in_their_orders(packing, mask):
    options = [f"data.packing={packing}", f"data.document_mask={json.dumps(mask)}"]
    config, data = prepare_config(*LINES_CONFIG, *options, "training.seed=7")
    shards = data.train.shards[0], data.val.shards[0]
    if packing == "padded":
        train, val = (PaddedLMDataset(shard, 16, ends_shared=True) for shard in shards)
        assert (len(train), len(val)) == (len(TRAIN), len(VAL))
    else:
        train, val = (PackedLMDataset(shard, 16, document_mask=mask) for shard in shards)
    two = replace(config, hardware=replace(config.hardware, devices=2))
    for rank in (DataShard(0, 2), DataShard(1, 2)):
        train_loader, _ = build_loaders(two, data, rank)
        sampler = ShuffledBatchSampler(len(train), 2, 7, rank)
        for batch, indices in islice(zip(train_loader, sampler, strict=False), 10):
            assert equal(batch, train.__getitems__(indices))
    _, val_loader = build_loaders(config, data)
    assert kept_targets(val_loader) == kept_targets([val.__getitems__(range(len(val)))])
    assert {batch["targets"].shape for batch in val_loader} == {(4, 16)}


def test_a_mixture_is_loaded_in_its_proportions():
    """The two sources have no character in common, so that a row tells its source."""
    for name, letters, count in (("small", "abc", 20), ("large", "xyz", 200)):
        lines = [f"{letters * (i % 9 + 3)}\n" for i in range(count)]
        Path(f"{name}.txt").write_text("".join(lines))
    mixture = (
        "[{path: small.txt, separator: line, weight: 3},"
        " {path: large.txt, separator: line, weight: 1}]"
    )
    config, data = prepare_config(
        f"data.mixture={mixture}", "data.tokenizer=byte", "data.val_share=0.2"
    )
    train_loader, val_loader = build_loaders(config, data)
    rows = [set(row) for batch in islice(train_loader, 500) for row in batch["input_ids"].tolist()]
    small, large = ([bool(row & set(letters)) for row in rows] for letters in (b"abc", b"xyz"))
    assert [sum(small[:1000]), sum(small[1000:])] == [750, 750]
    assert [a + b for a, b in zip(small, large, strict=True)] == [1] * 2000
    sampler = build_train_sampler(config, data)
    assert isinstance(sampler, MixtureBatchSampler)
    first = sum(small[:1234])
    assert sampler.rows_per_dataset(1234) == [first, 1234 - first]
    val = [i for shard in data.val.shards for i in shard.tokens[1:].tolist()]
    assert kept_targets(val_loader) == val


# ---- streams ----


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_stream_trains_on_the_training_documents_and_validates_on_the_others(packing):
    options = [f"data.packing={packing}", "training.seq_len=24", "data.shuffle_buffer=9"]
    config, data = prepare_config(*LINES_CONFIG, "data.streaming=true", *options)
    train_loader, val_loader = build_loaders(config, data)
    assert isinstance(train_loader, StreamLoader)
    limit_to_one_epoch(train_loader)
    assert Counter(kept_targets(train_loader)) == counts_of(TRAIN)
    assert Counter(kept_targets(val_loader)) == counts_of(VAL)


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("mask", [True, False])
def test_a_stream_has_the_order_that_the_config_says(packing, mask):
    options = ["data.streaming=true", "data.shuffle_buffer=9", "training.seed=7"]
    options += [f"data.packing={packing}", f"data.document_mask={json.dumps(mask)}"]
    config, data = prepare_config(*LINES_CONFIG, *options)
    row_format = RowFormat(16, packing == "padded", mask)
    stream_options = StreamOptions(val_share=0.2, seed=7, shuffle_buffer=9)
    expected = stream_rows(LINES, data.tokenizer, row_format, stream_options)
    train_loader, _ = build_loaders(config, data)
    batches = list(islice(train_loader, 6))
    assert all("doc_ids" in batch for batch in batches) == (mask and packing == "packed")
    rows = [tokens for batch in batches for tokens, _ in rows_of_batch(batch)]
    assert rows == [tokens for tokens, _ in expected[:24]]


def test_a_stream_with_val_path_trains_on_every_document():
    Path("other.txt").write_text("another text\n")
    options = ["data.streaming=true", "data.val_path=other.txt"]
    train_loader, val_loader = build_loaders(*prepare_config(*LINES_CONFIG, *options))
    limit_to_one_epoch(train_loader)
    assert Counter(kept_targets(train_loader)) == counts_of(LINES)
    assert kept_targets(val_loader) == [*b"another text", 256]


def test_a_hugging_face_stream_is_read_by_the_process_that_trains():
    """In worker processes, the library would divide the rows a second time."""
    from datasets import Dataset  # takes 1 s

    Dataset.from_dict({"text": LINES}).save_to_disk("saved")
    options = ["data.path=saved", "data.tokenizer=byte", "data.val_share=0.2"]
    options.append("data.streaming=true")
    train_loader, _ = build_loaders(*prepare_config(*options))
    limit_to_one_epoch(train_loader)
    assert Counter(kept_targets(train_loader)) == counts_of(TRAIN)
    message = (
        "saved, split train is streamed by the process that trains; "
        "set hardware.num_workers to 0, not 2"
    )
    with pytest.raises(UserError, match=message):
        build_loaders(*prepare_config(*options, "hardware.num_workers=2"))


# ---- the bytes that are validated ----


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", ["byte", "char"])
def test_the_bytes_of_padded_rows_are_those_of_the_characters_that_begin_in_their_targets(
    name, bos, eos
):
    """They are counted character by character. Without bos and eos, nothing predicts the first."""
    documents = [f"{i} " + "naïve 😀 € " * (i % 4) for i in range(60)]
    Path("wide.txt").write_text("".join(f"{document}\n" for document in documents))
    options = [f"data.bos={json.dumps(bos)}", f"data.eos={json.dumps(eos)}"]
    options += ["data.path=wide.txt", "data.separator=line", f"data.tokenizer={name}"]
    options += ["data.val_share=0.3", "data.packing=padded", "training.seq_len=10"]
    config, data = prepare_config(*options)
    first = 0 if bos or eos else 1  # the first token of the text that is a target
    last = 10 if bos or eos else 11
    expected = 0
    for document in documents:
        if is_validation(document, 0.3):
            token = 0
            for character in document:
                size = len(character.encode())
                if first <= token < last:
                    expected += size
                token += size if name == "byte" else 1
    assert validation_target_bytes(config, data) == expected < data.val.n_bytes


def test_the_bytes_of_packed_rows_are_all():
    assert validation_target_bytes(*prepare_config(*LINES_CONFIG)) == len("".join(VAL))
