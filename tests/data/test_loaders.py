"""From a config to batches: which rows and order it means, what is validated, the command line, and its report."""

import json
import statistics
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from pocketlm.config.loading import load_config
from pocketlm.config.sections import Config
from pocketlm.corpus.chunks import is_validation
from pocketlm.data import loaders
from pocketlm.data.datasets import PackedLMDataset, PaddedLMDataset
from pocketlm.data.prepare import PreparedData, prepare
from pocketlm.data.report import BINS, build_report
from pocketlm.data.samplers import MixtureBatchSampler, ShuffledBatchSampler
from pocketlm.data.streaming import StreamLoader
from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.rows import as_rows, plain_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with an empty config and a text of 100 documents."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("training: {seq_len: 16, micro_batch_size: 4}\n")
    (tmp_path / "lines.txt").write_text("".join(f"{line}\n" for line in LINES))
    return tmp_path


LINES = [f"{i} times {i} is {i * i}" for i in range(100)]
BYTES = ["data.path=lines.txt", "data.separator=line", "data.tokenizer=byte", "data.val_share=0.2"]
TRAIN = [line for line in LINES if not is_validation(line, 0.2)]
VAL = [line for line in LINES if is_validation(line, 0.2)]


def prepared(*overrides: str) -> tuple[Config, PreparedData]:
    config = load_config("config.yaml", overrides)
    return config, prepare(config.data)


def kept(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    """All targets there are, in order."""
    return [
        target
        for batch in batches
        for target in batch["targets"][batch["targets"] != -100].tolist()
    ]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- loaders ---------------------------------------------------------------------------------------------------------


def test_the_text_that_comes_out_is_the_text_that_went_in(folder):
    """The whole way, from a file to windows."""
    text = "a rose is a rose is a rose.\n" * 30
    Path("text.txt").write_text(text)
    _, found = prepared("data.path=text.txt", "data.tokenizer=char", "data.val_share=0.1")
    assert isinstance(found.tokenizer, CharTokenizer)
    assert found.name == "text.txt"
    windows = PackedLMDataset(found.train.shards[0], 16)
    targets = kept([windows.__getitems__(range(len(windows)))])
    assert (
        found.tokenizer.decode(targets)
        + found.tokenizer.decode(found.val.shards[0].tokens.tolist())
        == text
    )


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("mask", [True, False])
def test_the_loaders_are_the_datasets_in_their_orders(folder, packing, mask):
    config, found = prepared(
        *BYTES,
        f"data.packing={packing}",
        f"data.document_mask={json.dumps(mask)}",
        "training.seed=7",
    )
    shards = found.train.shards[0], found.val.shards[0]
    if packing == "padded":
        train, val = (PaddedLMDataset(shard, 16, ends_shared=True) for shard in shards)
        assert (len(train), len(val)) == (len(TRAIN), len(VAL))
    else:
        train, val = (PackedLMDataset(shard, 16, document_mask=mask) for shard in shards)
    for rank in (0, 1):
        train_loader, _ = loaders.loaders(config, found, rank=rank, world_size=2)
        order = ShuffledBatchSampler(len(train), 4, 7, rank, 2)
        for batch, indices in islice(zip(train_loader, order, strict=False), 10):
            assert equal(batch, train.__getitems__(indices))
    _, val_loader = loaders.loaders(config, found)
    assert kept(val_loader) == kept([val.__getitems__([*range(len(val))])])
    assert {batch["targets"].shape for batch in val_loader} == {(4, 16)}


def test_a_mixture_is_dealt_in_its_proportions(folder):
    """Sources that share no character tell where a row is from."""
    for name, letters in (("small", "abc"), ("large", "xyz")):
        Path(f"{name}.txt").write_text(
            "".join(f"{letters * (i % 9 + 3)}\n" for i in range(20 if name == "small" else 200))
        )
    config, found = prepared(
        "data.mixture=[{path: small.txt, separator: line, weight: 3}, {path: large.txt, separator: line, weight: 1}]",
        "data.tokenizer=byte",
        "data.val_share=0.2",
    )
    train_loader, val_loader = loaders.loaders(config, found)
    rows = [set(row) for batch in islice(train_loader, 500) for row in batch["input_ids"].tolist()]
    small, large = ([bool(row & set(letters)) for row in rows] for letters in (b"abc", b"xyz"))
    assert [sum(small[:1000]), sum(small[1000:])] == [750, 750]
    assert [a + b for a, b in zip(small, large, strict=True)] == [1] * 2000
    order = loaders.training_order(config, found)
    assert isinstance(order, MixtureBatchSampler) and order.rows_per_dataset(1234) == [
        sum(small[:1234]),
        1234 - sum(small[:1234]),
    ]
    val = [i for shard in found.val.shards for i in shard.tokens[1:].tolist()]
    assert kept(val_loader) == val


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_stream_trains_on_the_training_documents_and_validates_on_the_others(folder, packing):
    config, found = prepared(
        *BYTES,
        "data.streaming=true",
        f"data.packing={packing}",
        "training.seq_len=24",
        "data.shuffle_buffer=9",
    )
    train_loader, val_loader = loaders.loaders(config, found)
    assert isinstance(train_loader, StreamLoader)
    train_loader.dataset.epochs = 1
    assert Counter(kept(train_loader)) == Counter("".join(TRAIN).encode()) + Counter(
        {256: len(TRAIN)}
    )
    assert Counter(kept(val_loader)) == Counter("".join(VAL).encode()) + Counter({256: len(VAL)})


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("mask", [True, False])
def test_a_stream_is_dealt_out_as_the_config_says(folder, packing, mask):
    options = ["data.streaming=true", "data.shuffle_buffer=9", "training.seed=7"]
    config, found = prepared(
        *BYTES, *options, f"data.packing={packing}", f"data.document_mask={json.dumps(mask)}"
    )
    for rank in (0, 1):
        plain = plain_rows(
            LINES,
            found.tokenizer,
            16,
            seed=7,
            shuffle_buffer=9,
            padded=packing == "padded",
            shard=rank,
            shards=2,
            val_share=0.2,
        )
        batches = list(islice(loaders.loaders(config, found, rank=rank, world_size=2)[0], 6))
        assert all("doc_ids" in batch for batch in batches) == (mask and packing == "packed")
        assert [tokens for batch in batches for tokens, _ in as_rows(batch)] == [
            tokens for tokens, _ in plain[:24]
        ]


def test_a_stream_with_val_path_trains_on_every_document(folder):
    Path("other.txt").write_text("another text\n")
    config, found = prepared(*BYTES, "data.streaming=true", "data.val_path=other.txt")
    train_loader, val_loader = loaders.loaders(config, found)
    train_loader.dataset.epochs = 1
    assert Counter(kept(train_loader)) == Counter("".join(LINES).encode()) + Counter(
        {256: len(LINES)}
    )
    assert kept(val_loader) == [*b"another text", 256]


def test_a_hugging_face_stream_is_read_by_the_process_that_trains(folder):
    """In worker processes the library would deal the rows out once more."""
    from datasets import Dataset  # 1 s

    Dataset.from_dict({"text": LINES}).save_to_disk("saved")
    options = [
        "data.path=saved",
        "data.tokenizer=byte",
        "data.val_share=0.2",
        "data.streaming=true",
    ]
    config, found = prepared(*options)
    train_loader, _ = loaders.loaders(config, found)
    train_loader.dataset.epochs = 1
    assert Counter(kept(train_loader)) == Counter("".join(TRAIN).encode()) + Counter(
        {256: len(TRAIN)}
    )
    config, found = prepared(*options, "hardware.num_workers=2")
    with pytest.raises(
        UserError,
        match=r"saved, split train is streamed by the process that trains; set hardware.num_workers to 0, not 2",
    ):
        loaders.loaders(config, found)


# ---- what is validated -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos, eos", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("name", ["byte", "char"])
def test_the_bytes_of_padded_rows_are_those_of_the_characters_that_begin_in_their_targets(
    folder, name, bos, eos
):
    """Counted over characters; without bos and eos the first one is given, and none predicts it."""
    documents = [f"{i} " + "naïve 😀 € " * (i % 4) for i in range(60)]
    Path("wide.txt").write_text("".join(f"{document}\n" for document in documents))
    options = [
        f"data.bos={json.dumps(bos)}",
        f"data.eos={json.dumps(eos)}",
        "data.val_share=0.3",
        f"data.tokenizer={name}",
    ]
    config, found = prepared(
        *options,
        "data.path=wide.txt",
        "data.separator=line",
        "data.packing=padded",
        "training.seq_len=10",
    )
    size = 0
    for document in documents:
        if is_validation(document, 0.3):
            first = 0 if bos or eos else 1  # tokens of the text that are no targets
            last = 10 if bos or eos else 11
            place = 0
            for character in document:
                size += len(character.encode()) if first <= place < last else 0
                place += len(character.encode()) if name == "byte" else 1
    assert loaders.validated_bytes(found, config) == size < found.val.n_bytes


def test_the_bytes_of_packed_rows_are_all(folder):
    config, found = prepared(*BYTES)
    assert loaders.validated_bytes(found, config) == len("".join(VAL))


# ---- the report ------------------------------------------------------------------------------------------------------


def plain_part(documents: list[str], tokenizer: Tokenizer, row: int | None) -> dict:
    """What is to be said of a part, counted with dictionaries; `row` is how many tokens of a document a padded row holds."""
    ids = [
        [*tokenizer.prefix, *tokenizer.encode(document), *tokenizer.closing]
        for document in documents
    ]
    tokens = [i for document in ids for i in document] + tokenizer.final
    lengths = [len(document) for document in ids]
    facts = {
        "documents": len(documents),
        "bytes": sum(len(document.encode()) for document in documents),
        "tokens": len(tokens),
        "entries_used": len(set(tokens)),
        "unknown": 0 if tokenizer.unk_id is None else tokens.count(tokenizer.unk_id),
        "duplicates": len(documents) - len(set(documents)),
        "lengths": {
            "shortest": min(lengths),
            "median": statistics.median(lengths),
            "longest": max(lengths),
        },
    }
    facts["bytes_per_token"] = facts["bytes"] / facts["tokens"]
    bins = zip(BINS, BINS[1:], strict=False)
    facts["histogram"] = [
        {
            "from": low,
            "below": high if high < 2**63 else None,
            "documents": sum(low <= n < high for n in lengths),
        }
        for low, high in bins
    ]
    if nul := "".join(documents).count("\0"):
        facts["nul"] = nul
    if row is not None:
        facts["cut_off"] = sum(n > row for n in lengths)
    return facts


ODD = [
    *(f"{i} " + "x" * (i * i % 70) for i in range(60)),
    *["again and again"] * 3,
    *["nul \0 and \0 nul"] * 2,
    "x" * 700,
]


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("last", ["again and again", "fourteen chars", "e" * 39])
def test_the_report_is_what_plain_counting_finds(folder, packing, bos, last):
    """Equal documents, characters that training has not seen, NULs, a long document. The eos behind the last is none of it."""
    documents = [*ODD, *(f"é{i}" for i in range(40) if is_validation(f"é{i}", 0.3)), last]
    Path("odd.txt").write_text("".join(f"{document}\n" for document in documents))
    options = [
        f"data.packing={packing}",
        f"data.bos={json.dumps(bos)}",
        "data.path=odd.txt",
        "data.separator=line",
        "data.tokenizer=char",
    ]
    config, found = prepared(*options, "data.val_share=0.3", "training.seq_len=40")
    train, val = (
        [d for d in documents if is_validation(d, 0.3) == which] for which in (False, True)
    )
    tokenizer = CharTokenizer("".join(sorted(set("".join(train)))), bos)
    said = build_report(config, found)
    row = (
        None if packing == "packed" else 41 if bos else 40
    )  # without bos an eos stands behind it too, as a target
    assert said["train"] == plain_part(train, tokenizer, row)
    assert said["validation"] == plain_part(val, tokenizer, row)
    assert (
        said["validation"]["unknown"] >= 10
        and said["train"]["duplicates"] + said["validation"]["duplicates"] >= 3
    )
    assert said["overlap"] == 0
    assert said["tokenizer"]["entries"] == len(set("".join(train))) + 2 + bos
    assert ("cut_off" in said["train"]) == (packing == "padded")


def test_the_report_finds_training_documents_in_val_path(folder):
    """Each that is in both is counted once, wherever it stands; here the last of one and in the middle of the other."""
    Path("val.txt").write_text(
        "".join(f"{line}\n" for line in [LINES[99], "new", LINES[3], LINES[3], "newer", LINES[50]])
    )
    config, found = prepared(*BYTES, "data.val_path=val.txt")
    assert build_report(config, found)["overlap"] == 3


def test_the_report_of_a_mixture_says_what_a_run_draws(folder):
    """The rows of the run are counted by what is in them."""
    for name, letters, count in (("small", "abc", 20), ("large", "xyz", 200)):
        Path(f"{name}.txt").write_text(
            "".join(f"{letters * (i % 9 + 3)} {i}\n" for i in range(count))
        )
    config, found = prepared(
        "data.mixture=[{path: small.txt, separator: line, weight: 2}, {path: large.txt, separator: line, weight: 1}]",
        "data.tokenizer=byte",
        "data.val_share=0.2",
        "training.max_steps=77",
        "training.grad_accum_steps=3",
    )
    train_loader, _ = loaders.loaders(config, found)
    rows = [row for batch in islice(train_loader, 77 * 3) for row in batch["input_ids"].tolist()]
    small = sum(bool(set(row) & set(b"abc")) for row in rows)
    sizes = [-(-(shard.header.tokens - 1) // 16) for shard in found.train.shards]
    parts = zip(("small.txt", "large.txt"), (2, 1), (small, len(rows) - small), sizes, strict=True)
    assert build_report(config, found)["mixture"] == [
        {
            "source": name,
            "weight": weight / 3,
            "rows": count,
            "share": count / 924,
            "epochs": count / size,
        }
        for name, weight, count, size in parts
    ]


def test_the_report_of_a_stream_says_that_it_is_of_the_first_documents(folder):
    config, found = prepared(*BYTES, "data.streaming=true")
    said = build_report(config, found)
    assert said["streamed"] == "the counts are those of the first documents"
    assert (said["train"]["documents"], said["validation"]["documents"], said["overlap"]) == (
        len(TRAIN),
        len(VAL),
        0,
    )


@pytest.mark.parametrize("options", [[], ["data.streaming=true"], ["data.packing=padded"]])
def test_the_row_of_the_report_is_the_first_that_is_trained_on(folder, options):
    config, found = prepared(*BYTES, *options)
    batch = next(iter(loaders.loaders(config, found)[0]))
    count = int((batch["targets"][0] != -100).sum())
    texts = bytes(i % 256 for i in batch["input_ids"][0, :count].tolist()).decode().split("\0")
    assert [text for text in build_report(config, found)["row"] if text] == [
        text for text in texts if text
    ]


# ---- the command line ------------------------------------------------------------------------------------------------


def in_new_process(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "data.py", "--config", "config.yaml", *arguments],
        capture_output=True,
        text=True,
    )


def test_the_command_prints_the_report_and_as_json_the_same_numbers(folder, capsys):
    done = in_new_process(*BYTES, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    config, found = prepared(*BYTES)
    assert said == json.loads(json.dumps(build_report(config, found)))
    assert data.main(["--config", "config.yaml", *BYTES]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for name in ("documents", "bytes", "tokens"):
        assert f"{name} {said['train'][name]:,} {said['validation'][name]:,}" in lines
    assert (
        f"duplicate documents {said['train']['duplicates']} {said['validation']['duplicates']}"
        in lines
    )
    assert "documents in both train and validation: 0" in lines
    assert lines[0] == "lines.txt"
    assert not Path("checkpoints").exists() and not Path("logs").exists()


@pytest.mark.parametrize("form", ["nanogpt", "llmc"])
def test_an_export_holds_the_tokens_of_both_parts(folder, form, capsys):
    assert data.main(["--config", "config.yaml", *BYTES, "--export", form, "--to", "out/here"]) == 0
    assert "documents in both" in capsys.readouterr().out
    for name, documents in (("train", TRAIN), ("val", VAL)):
        raw = Path(f"out/here/{name}.bin").read_bytes()
        tokens = [256, *(i for document in documents for i in [*document.encode(), 256])]
        head = (
            b""
            if form == "nanogpt"
            else np.array([20240520, 1, len(tokens)] + [0] * 253, "<i4").tobytes()
        )
        assert raw == head + np.array(tokens, "<u2").tobytes()
    assert sorted(p.name for p in Path("out/here").iterdir()) == ["train.bin", "val.bin"]


@pytest.mark.parametrize("arguments, message", [
    (["data.path=missing.txt"], "error: missing.txt is not a file, a folder or a pattern that fits one"),
    ([*BYTES, "--export", "llmc", "--to", "lines.txt"], "error: lines.txt"),
    ([*BYTES, "data.streaming=true", "--export", "llmc"], "error: a stream keeps no tokens to export; set data.streaming to false"),
    (["data.mixture=[{path: lines.txt}]", "--export", "llmc"], "error: a mixture is drawn row by row while training; export its sources"),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_status_2(folder, arguments, message):
    done = in_new_process(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
    assert not list(folder.glob("*.bin"))
