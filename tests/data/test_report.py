"""The report on prepared data, against plain counting."""

import json
import statistics
from itertools import islice
from pathlib import Path

import pytest

from pocketlm.corpus.chunks import is_validation
from pocketlm.data.loaders import build_loaders
from pocketlm.data.report import BINS, build_report
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.corpora import LINES, LINES_CONFIG, TRAIN, VAL, prepare_config

pytestmark = pytest.mark.usefixtures("lines_folder")


def expected_split(documents: list[str], tokenizer: Tokenizer, limit: int | None) -> dict:
    """Return the facts of a split, counted document by document.

    `limit` is the number of tokens of a document that a padded row holds.
    """
    prefix, suffix = tokenizer.document_prefix, tokenizer.document_suffix
    ids = [[*prefix, *tokenizer.encode(document), *suffix] for document in documents]
    tokens = [i for document in ids for i in document] + tokenizer.corpus_suffix
    lengths = [len(document) for document in ids]
    size = sum(len(document.encode()) for document in documents)
    histogram = []
    for low, high in zip(BINS, BINS[1:], strict=False):
        count = sum(low <= length < high for length in lengths)
        below = high if high < 2**63 else None
        histogram.append({"from": low, "below": below, "documents": count})
    facts = {
        "documents": len(documents),
        "bytes": size,
        "tokens": len(tokens),
        "bytes_per_token": size / len(tokens),
        "entries_used": len(set(tokens)),
        "unknown": 0 if tokenizer.unk_id is None else tokens.count(tokenizer.unk_id),
        "duplicates": len(documents) - len(set(documents)),
        "lengths": {
            "shortest": min(lengths),
            "median": statistics.median(lengths),
            "longest": max(lengths),
        },
        "histogram": histogram,
    }
    if nul := "".join(documents).count("\0"):
        facts["nul"] = nul
    if limit is not None:
        facts["cut_off"] = sum(length > limit for length in lengths)
        if lost := sum(len(tokenizer.decode(document[41:]).encode()) for document in ids):
            facts["not_predicted"] = lost
    return facts


ODD = [
    *(f"{i} " + "x" * (i * i % 70) for i in range(60)),
    *["again and again"] * 3,
    *["nul \0 and \0 nul"] * 2,
    "x" * 700,
]
UNSEEN = [f"é{i}" for i in range(40) if is_validation(f"é{i}", 0.3)]


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("last", ["again and again", "fourteen chars", "e" * 39])
def test_the_report_is_what_plain_counting_gives(packing, bos, last):
    """Documents are equal, long, with NULs, and with characters that training has not seen.

    The eos after the last document is not a part of it.
    """
    documents = [*ODD, *UNSEEN, last]
    Path("odd.txt").write_text("".join(f"{document}\n" for document in documents))
    options = [f"data.packing={packing}", f"data.bos={json.dumps(bos)}", "data.path=odd.txt"]
    options += ["data.separator=line", "data.tokenizer=char", "data.val_share=0.3"]
    config, data = prepare_config(*options, "training.seq_len=40")
    train = [document for document in documents if not is_validation(document, 0.3)]
    val = [document for document in documents if is_validation(document, 0.3)]
    characters = sorted(set("".join(train)))
    tokenizer = CharTokenizer("".join(characters), bos)
    # Without bos, an eos follows the document, as a target.
    limit = None if packing == "packed" else 41 if bos else 40
    report = build_report(config, data).as_json()
    assert report["train"] == expected_split(train, tokenizer, limit)
    assert report["validation"] == expected_split(val, tokenizer, limit)
    assert report["validation"]["unknown"] >= 10
    assert report["train"]["duplicates"] + report["validation"]["duplicates"] >= 3
    assert report["overlap"] == 0
    assert report["tokenizer"]["entries"] == len(characters) + 2 + bos
    assert ("cut_off" in report["train"]) == (packing == "padded")


def test_the_report_finds_training_documents_in_val_path():
    """A document that is in both is counted once, wherever it is."""
    val = [LINES[99], "new", LINES[3], LINES[3], "newer", LINES[50]]
    Path("val.txt").write_text("".join(f"{line}\n" for line in val))
    config, data = prepare_config(*LINES_CONFIG, "data.val_path=val.txt")
    assert build_report(config, data).overlap == 3


def test_the_report_of_a_mixture_says_what_a_run_draws():
    """The rows of the run are counted by the characters in them."""
    for name, letters, count in (("small", "abc", 20), ("large", "xyz", 200)):
        lines = [f"{letters * (i % 9 + 3)} {i}\n" for i in range(count)]
        Path(f"{name}.txt").write_text("".join(lines))
    mixture = (
        "[{path: small.txt, separator: line, weight: 2},"
        " {path: large.txt, separator: line, weight: 1}]"
    )
    options = [f"data.mixture={mixture}", "data.tokenizer=byte", "data.val_share=0.2"]
    options += ["training.max_steps=77", "training.grad_accum_steps=3"]
    config, data = prepare_config(*options)
    train_loader, _ = build_loaders(config, data)
    batches = islice(train_loader, 77 * 3)
    rows = [row for batch in batches for row in batch["input_ids"].tolist()]
    assert len(rows) == 924
    small = sum(bool(set(row) & set(b"abc")) for row in rows)
    sizes = [-(-(shard.header.tokens - 1) // 16) for shard in data.train.shards]
    expected = []
    for name, weight, count, size in (
        ("small.txt", 2, small, sizes[0]),
        ("large.txt", 1, 924 - small, sizes[1]),
    ):
        facts = {"source": name, "weight": weight / 3, "rows": count}
        expected.append({**facts, "share": count / 924, "epochs": count / size})
    assert build_report(config, data).as_json()["mixture"] == expected


def test_the_report_of_a_stream_says_that_it_is_of_the_first_documents():
    report = build_report(*prepare_config(*LINES_CONFIG, "data.streaming=true")).as_json()
    assert report["streamed"] == "the counts are those of the first documents"
    assert report["train"]["documents"] == len(TRAIN)
    assert report["validation"]["documents"] == len(VAL)
    assert report["overlap"] == 0


@pytest.mark.parametrize(
    "options",
    [[], ["data.streaming=true"], ["data.packing=padded"], ["data.document_mask=false"]],
    ids=["packed", "streamed", "padded", "without a mask"],
)
def test_the_row_of_the_report_is_the_first_that_is_trained_on(options):
    config, data = prepare_config(*LINES_CONFIG, *options)
    batch = next(iter(build_loaders(config, data)[0]))
    count = int((batch["targets"][0] != IGNORE_INDEX).sum())
    row = bytes(i % 256 for i in batch["input_ids"][0, :count].tolist()).decode()
    texts = [text for text in row.split("\0") if text]
    assert [text for text in build_report(config, data).row if text] == texts


def test_the_row_is_divided_into_documents_even_without_special_tokens():
    options = ["data.bos=false", "data.eos=false", "training.seq_len=200"]
    report = build_report(*prepare_config(*LINES_CONFIG, *options))
    assert len(report.row) > 5
    assert set(report.row[1:-1]) <= set(TRAIN)
