"""Data report: counts, lengths, duplicates and overlap of prepared data, and a row of the run.

    build_report(config, data) -> DataReport
        .as_json()           plain types, for `data.py --json`
        print_report(report) tables, for a person

Reads every token once.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pocketlm.config.sections import Config
from pocketlm.data.datasets import JoinedDataset
from pocketlm.data.loaders import (
    build_rows,
    build_train_loader,
    build_train_sampler,
    bytes_without_target,
    document_ends,
    rows_in_run,
)
from pocketlm.data.prepare import PreparedData, PreparedSplit
from pocketlm.data.samplers import MixtureBatchSampler
from pocketlm.errors import UserError
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.shards.builder import SourceAccount
from pocketlm.shards.format import TokenShard
from pocketlm.tokenizer.base import Tokenizer

BLOCK_TOKENS = 2**22  # tokens counted at a time

# Bounds of the histogram, in tokens per document, its special tokens included; the last is open.
BINS = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 2**63]


# ---- the report ----


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer of the data."""

    name: str
    vocab_size: int
    bos: int | None
    eos: int | None
    fingerprint: str
    note: str

    def as_json(self) -> dict[str, Any]:
        """Return the facts under their JSON keys."""
        return {
            "name": self.name,
            "entries": self.vocab_size,
            "bos": self.bos,
            "eos": self.eos,
            "fingerprint": self.fingerprint,
            "note": self.note,
        }


@dataclass(frozen=True)
class Lengths:
    """Tokens per document, special tokens included."""

    shortest: int
    median: float
    longest: int


@dataclass(frozen=True)
class Bin:
    """One bar of the histogram: documents with `low` tokens or more, and fewer than `high`."""

    low: int
    high: int | None  # None: no upper bound
    documents: int

    def as_json(self) -> dict[str, Any]:
        """Return the bar under its JSON keys."""
        return {"from": self.low, "below": self.high, "documents": self.documents}


@dataclass(frozen=True)
class SplitFacts:
    """The documents of a split, counted."""

    documents: int
    bytes: int
    tokens: int
    ids_used: int  # ids of the vocabulary that occur
    unknown: int  # unknown tokens
    duplicates: int  # documents that are equal to an earlier one
    lengths: Lengths
    histogram: list[Bin]
    nul: int  # NUL characters, which text seldom has
    truncated: int | None  # documents cut off at the end of their row; None: rows are packed
    not_predicted: int  # bytes of text whose tokens are never a target

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""
        return self.bytes / self.tokens

    def as_json(self) -> dict[str, Any]:
        """Return the facts under their JSON keys."""
        facts: dict[str, Any] = {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes_per_token,
            "entries_used": self.ids_used,
            "unknown": self.unknown,
            "duplicates": self.duplicates,
            "lengths": asdict(self.lengths),
            "histogram": [bar.as_json() for bar in self.histogram],
        }
        if self.nul:
            facts["nul"] = self.nul
        if self.truncated is not None:
            facts["cut_off"] = self.truncated
        if self.not_predicted:
            facts["not_predicted"] = self.not_predicted
        return facts


@dataclass(frozen=True)
class MixtureFacts:
    """One source of a mixture, and how much of the run's rows it gives."""

    source: str
    weight: float  # share of the rows that the config asks for
    rows: int
    share: float  # of the rows
    epochs: float


@dataclass(frozen=True)
class DataReport:
    """Everything that data.py reports."""

    source: str
    streamed: bool
    tokenizer: TokenizerFacts
    train: SplitFacts
    validation: SplitFacts
    overlap: int  # different documents that are in both splits
    row: list[str]
    mixture: list[MixtureFacts]
    accounts: tuple[SourceAccount, ...]
    remarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report in plain types."""
        report: dict[str, Any] = {
            "source": self.source,
            "tokenizer": self.tokenizer.as_json(),
            "train": self.train.as_json(),
            "validation": self.validation.as_json(),
            "overlap": self.overlap,
            "row": self.row,
        }
        if self.streamed:
            report["streamed"] = STREAMED_NOTE
        if self.mixture:
            report["mixture"] = [asdict(source) for source in self.mixture]
        report["sources"] = [asdict(account) for account in self.accounts]
        report["remarks"] = list(self.remarks)
        return report


STREAMED_NOTE = "the counts are those of the first documents"


# ---- counting ----


def build_report(config: Config, data: PreparedData) -> DataReport:
    """Count what is in the data."""
    train, val = document_digests(data, data.train), document_digests(data, data.val)
    tokenizer = data.tokenizer
    return DataReport(
        source=data.name,
        streamed=data.stream is not None,
        tokenizer=TokenizerFacts(
            tokenizer.name,
            tokenizer.vocab_size,
            tokenizer.bos_id if tokenizer.adds_bos else None,
            tokenizer.eos_id,
            tokenizer.fingerprint,
            tokenizer.note,
        ),
        train=split_facts(config, data, data.train, train),
        validation=split_facts(config, data, data.val, val),
        overlap=int(np.isin(np.unique(val), train).sum()),
        row=first_row(config, data),
        mixture=mixture_facts(config, data),
        accounts=data.accounts,
        remarks=data.remarks,
    )


def split_facts(
    config: Config, data: PreparedData, split: PreparedSplit, digests: np.ndarray
) -> SplitFacts:
    """Count a split; `digests` are those of its documents."""
    tokenizer = data.tokenizer
    counts = token_counts(split, tokenizer.vocab_size)
    lengths = np.concatenate([document_ends(data, shard) - shard.offsets for shard in split.shards])
    truncated = None
    if config.data.packing == "padded":
        limit = config.training.seq_len + 1 - len(tokenizer.corpus_suffix)
        truncated = int((lengths > limit).sum())
    return SplitFacts(
        documents=split.n_documents,
        bytes=split.n_bytes,
        tokens=split.n_tokens,
        ids_used=int((counts > 0).sum()),
        unknown=0 if tokenizer.unk_id is None else int(counts[tokenizer.unk_id]),
        duplicates=len(digests) - len(np.unique(digests)),
        lengths=Lengths(int(lengths.min()), float(np.median(lengths)), int(lengths.max())),
        histogram=histogram(lengths),
        nul=count_nul(tokenizer, counts),
        truncated=truncated,
        not_predicted=bytes_without_target(config, data, split),
    )


def token_counts(split: PreparedSplit, vocab_size: int) -> np.ndarray:
    """Return how often each id occurs (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for shard in split.shards:
        for start in range(0, shard.header.tokens, BLOCK_TOKENS):
            block = shard.tokens[start : start + BLOCK_TOKENS]
            counts += np.bincount(block, minlength=vocab_size)
    return counts


def histogram(lengths: np.ndarray) -> list[Bin]:
    """Return the number of documents in each of BINS."""
    counts = np.histogram(lengths, BINS)[0]
    bars = []
    for low, high, count in zip(BINS, BINS[1:], counts, strict=False):
        bars.append(Bin(low, high if high != BINS[-1] else None, int(count)))
    return bars


def count_nul(tokenizer: Tokenizer, counts: np.ndarray) -> int:
    """Return how often the NUL character occurs; 0 if the tokenizer has no id for it."""
    try:
        ids = tokenizer.encode("\0")
    except UserError:  # the vocabulary was made of the bytes that occur, and NUL does not
        return 0
    return int(counts[ids[0]]) if len(ids) == 1 and ids[0] != tokenizer.unk_id else 0


def document_digests(data: PreparedData, split: PreparedSplit) -> np.ndarray:
    """Return a hash of 64 bits of each document's ids (documents,)."""
    digests = (digest for shard in split.shards for digest in shard_digests(data, shard))
    return np.fromiter(digests, np.uint64, split.n_documents)


def shard_digests(data: PreparedData, shard: TokenShard) -> Iterator[int]:
    """Yield a hash of 64 bits of each document's ids."""
    for start, end in zip(shard.offsets.tolist(), document_ends(data, shard).tolist(), strict=True):
        digest = hashlib.blake2b(digest_size=8)
        for block in range(start, end, BLOCK_TOKENS):
            digest.update(shard.tokens[block : min(block + BLOCK_TOKENS, end)].data)
        yield int.from_bytes(digest.digest(), "big")


def first_row(config: Config, data: PreparedData) -> list[str]:
    """Return the first row of the run, decoded: one text for each document in it."""
    with_ids = replace(config, data=replace(config.data, document_mask=True))
    batch = next(iter(build_train_loader(with_ids, data)))
    count = int((batch["targets"][0] != IGNORE_INDEX).sum())
    ids = batch["input_ids"][0, :count].numpy()
    parts = [ids]
    if "doc_ids" in batch:  # a padded row is one document
        doc_ids = batch["doc_ids"][0, :count].numpy()
        parts = np.split(ids, np.flatnonzero(np.diff(doc_ids)) + 1)
    return [data.tokenizer.decode(part.tolist()) for part in parts]


def mixture_facts(config: Config, data: PreparedData) -> list[MixtureFacts]:
    """Return how much each source of a mixture gives to the run; nothing for a single source."""
    sampler, rows = build_train_sampler(config, data), build_rows(config, data, "train")
    if not isinstance(sampler, MixtureBatchSampler):
        return []
    assert isinstance(rows, JoinedDataset)
    total, total_weight = rows_in_run(config), sum(data.weights)
    counts = sampler.rows_per_dataset(total)
    facts = []
    for name, weight, count, dataset in zip(
        data.sources, data.weights, counts, rows.datasets, strict=True
    ):
        share, epochs = count / total, count / len(dataset)
        facts.append(MixtureFacts(name, weight / total_weight, count, share, epochs))
    return facts


BAR_WIDTH = 40  # characters of the longest bar


def print_report(report: DataReport) -> None:
    """Print the report to stdout."""
    out = Console(highlight=False, emoji=False, soft_wrap=True)
    out.print(count_table(report))
    print_tokenizer(out, report)
    print_accounts(out, report)
    out.print(f"documents in both train and validation: {report.overlap:,}")
    for source in report.mixture:
        out.print(
            f"{source.source}: {source.share:.2%} of the rows (weight {source.weight:.2%}), "
            f"{source.epochs:.2f} epochs"
        )
    print_histogram(out, report.train.histogram)
    out.print("\nThe first row of the run, one line per document:")
    for number, text in enumerate(report.row, 1):
        out.print(Text.assemble((f"{number:>3} ", "bold"), text.replace("\n", "⏎")))


def count_table(report: DataReport) -> Table:
    """Return the counts of both splits side by side."""
    title = f"{report.source}\n{STREAMED_NOTE}" if report.streamed else report.source
    table = Table(box=None, title=title, title_justify="left")
    table.add_column("")
    table.add_column("train", justify="right")
    table.add_column("validation", justify="right")
    columns = [count_cells(report, split) for split in (report.train, report.validation)]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def count_cells(report: DataReport, split: SplitFacts) -> dict[str, str]:
    """Return the cells of one split, by the label of their row."""
    cells = {
        "documents": f"{split.documents:,}",
        "bytes": f"{split.bytes:,}",
        "tokens": f"{split.tokens:,}",
        "bytes per token": f"{split.bytes_per_token:.3f}",
        f"ids used, of {report.tokenizer.vocab_size:,}": f"{split.ids_used:,}",
        "unknown tokens": f"{split.unknown:,} ({split.unknown / split.tokens:.3%})",
        "duplicate documents": f"{split.duplicates:,}",
        "tokens per document: shortest": f"{split.lengths.shortest:,}",
        "    median": f"{split.lengths.median:,.0f}",
        "    longest": f"{split.lengths.longest:,}",
    }
    if split.truncated is not None:
        cells["documents truncated to a row"] = f"{split.truncated:,}"
    if report.train.not_predicted or report.validation.not_predicted:
        cells["bytes never predicted"] = f"{split.not_predicted:,}"
    if report.train.nul or report.validation.nul:
        cells["NUL characters (is this text?)"] = f"{split.nul:,}"
    return cells


def print_tokenizer(out: Console, report: DataReport) -> None:
    """Print the tokenizer's name and special tokens."""
    tokenizer = report.tokenizer
    bos = "no bos" if tokenizer.bos is None else f"bos is id {tokenizer.bos}"
    eos = "no eos" if tokenizer.eos is None else f"eos is id {tokenizer.eos}"
    out.print(f"\ntokenizer: {tokenizer.name}; {bos}, {eos}")
    if tokenizer.note:
        out.print(tokenizer.note, markup=False)


def print_accounts(out: Console, report: DataReport) -> None:
    """Print how many bytes each source has, and those that are in no document, by the reason."""
    for account in report.accounts:
        out.print(f"bytes of {account.name}: {account.bytes:,}", markup=False)
        for reason, size in account.left_out.items():
            out.print(f"    not in the text above: {size:,} of {reason}", markup=False)
    for remark in report.remarks:
        out.print(f"note: {remark}", markup=False)


def print_histogram(out: Console, bars: list[Bin]) -> None:
    """Print the number of training documents by their length."""
    out.print("\ntokens per document  train documents")
    largest = max(bar.documents for bar in bars)
    for bar in bars:
        to = "or more" if bar.high is None else f"to {bar.high - 1:>6,}"
        label = f"{bar.low:>6,} {to}"
        width = round(BAR_WIDTH * bar.documents / largest)
        out.print(f"{label:<19}{bar.documents:>10,} {'█' * width}")
