"""Documents to batches: split, tokenise into shards on disk, pack into windows, deal them out in a resumable order.

    read_documents -> split by document -> Tokenizer, fitted on the training part -> TokenShard, keyed by content
        -> PackedLMDataset -> ResumableLoader -> {input_ids (B, T), targets (B, T)}, and doc_ids under document_mask

No Lightning here: worker processes import this file.
"""

import hashlib
import json
import os
import shutil
import signal
import struct
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from config import DataConfig
from corpora import describe, read_documents
from errors import UserError
from loss import IGNORE
from tokenizer import Tokenizer, build_tokenizer, from_state, is_trained

MAGIC = b"TOKSHARD"
HEADER_BYTES = 1024
ENDLESS = 2**40  # batches in a training order: the step count ends a run, never the data


# ---- documents -> train and validation -------------------------------------------------------------------------------


def is_validation(document: str, share: float) -> bool:
    """Whether a hash of the text falls into the validation share: the same everywhere, and for equal texts."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split_documents(documents: Iterable[str], count: int, share: float) -> Iterator[tuple[bool, str]]:
    """(belongs to validation, text) for each of `count` documents; a single one gives its last `share` of bytes."""
    for document in documents:
        if count > 1:
            yield is_validation(document, share), document
            continue
        raw = document.encode()
        cut = int(len(raw) * (1 - share))
        while cut and raw[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        yield False, raw[:cut].decode()
        yield True, raw[cut:].decode()


# ---- token shards ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardHeader:
    """What stands before the tokens; `sha256` is that of the tokens, the offsets behind them, and the other fields."""

    dtype: str  # uint16, or uint32 for a vocabulary above 65,536
    tokens: int
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text
    sha256: str
    tokenizer: str  # fingerprint
    version: int = 1

    def digest(self, content: "hashlib._Hash") -> str:
        """The SHA-256 of a shard of this header, given that of its tokens and offsets so far."""
        content.update(json.dumps(asdict(self) | {"sha256": ""}).encode())
        return content.hexdigest()


class TokenShard:
    """A file of tokens: magic, header, tokens, and for each document the index (int64) of the token it begins with.

    A document begins with the token that stands before its text: bos, or else the eos of the document before it.
    Raises UserError by name for a file that is missing, foreign, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                head = file.read(HEADER_BYTES)
                if head[:8] != MAGIC:
                    raise UserError(f"{path} is not a token shard; delete it to prepare it again")
                (length,) = struct.unpack("<I", head[8:12])
                fields = json.loads(head[12 : 12 + length])
                if fields["version"] != ShardHeader.version:
                    raise UserError(f"{path} is a token shard of version {fields['version']}; this program reads {ShardHeader.version}")
                self.header = ShardHeader(**fields)
                whole = self.header.digest(hashlib.file_digest(file, "sha256")) == self.header.sha256
        except FileNotFoundError:
            raise UserError(f"the token shard {path} is missing") from None
        except (struct.error, ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise UserError(f"the token shard {path} is damaged or truncated; delete its folder to prepare it again")

    def __getstate__(self) -> dict:
        return {"path": self.path, "header": self.header}  # a worker maps the file itself

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,) memory-mapped."""
        return np.memmap(self.path, self.header.dtype, "r", HEADER_BYTES, (self.header.tokens,))

    @cached_property
    def offsets(self) -> np.ndarray:
        """(documents,) memory-mapped: where each document begins."""
        start = HEADER_BYTES + self.header.tokens * np.dtype(self.header.dtype).itemsize
        return np.memmap(self.path, "<i8", "r", start, (self.header.documents,))


class ShardWriter:
    """Appends documents to a shard; `close` makes it whole."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.tokenizer, self.file = tokenizer, path.open("wb")
        self.dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
        self.tokens = self.bytes = 0
        self.offsets: list[int] = []
        self.digest = hashlib.sha256()
        self.file.write(bytes(HEADER_BYTES))
        self.leads = tokenizer.bos_id is None and bool(tokenizer.prefix)  # an eos leads the first document in
        if self.leads:
            self._put(tokenizer.prefix)

    def write(self, texts: list[str]) -> None:
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            self.offsets.append(self.tokens - self.leads)
            self.bytes += len(text.encode())
            self._put(self.tokenizer.document(ids))

    def _put(self, ids: list[int]) -> None:
        data = np.asarray(ids, self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.tokens += len(ids)

    def close(self) -> None:
        data = np.asarray(self.offsets, "<i8").tobytes()
        self.file.write(data)
        self.digest.update(data)
        header = ShardHeader(self.dtype, self.tokens, len(self.offsets), self.bytes, "", self.tokenizer.fingerprint)
        header = replace(header, sha256=header.digest(self.digest))
        text = json.dumps(asdict(header)).encode()
        self.file.seek(0)
        self.file.write(MAGIC + struct.pack("<I", len(text)) + text)
        self.file.close()


@dataclass(frozen=True)
class PreparedData:
    """A corpus ready to train on."""

    source: str
    tokenizer: Tokenizer
    train: TokenShard
    val: TokenShard


def prepare(data: DataConfig) -> PreparedData:
    """Shards of the corpus under `data.cache_dir`, made unless the same text, split and tokenizer made them before."""
    count, digest = 0, hashlib.sha256()
    for document in read_documents(data):
        raw = document.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
        count += 1
    if not count:
        raise UserError(f"{describe(data)} holds no text")

    def part(validation: bool) -> Iterator[str]:
        return (text for is_val, text in split_documents(read_documents(data), count, data.val_share) if is_val == validation)

    tokenizer = None if is_trained(data.tokenizer) else build_tokenizer(data.tokenizer, data.cache_dir)
    key = [ShardHeader.version, digest.hexdigest(), data.val_share, tokenizer.fingerprint if tokenizer else data.tokenizer]
    folder = Path(data.cache_dir) / "shards" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if not folder.is_dir():
        tokenizer = tokenizer or build_tokenizer(data.tokenizer, data.cache_dir, part(validation=False))
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=folder.parent))
        try:
            for name, validation in (("train", False), ("val", True)):
                writer = ShardWriter(unfinished / f"{name}.bin", tokenizer)
                for texts in in_batches(part(validation), 1000):
                    writer.write(texts)
                writer.close()
                if not writer.bytes:
                    raise UserError(
                        f"data.val_share {data.val_share} leaves nothing for the {name} part of {count} documents; "
                        "change it, or give more text"
                    )
            (unfinished / "tokenizer.json").write_text(json.dumps(tokenizer.state()))
            try:
                os.replace(unfinished, folder)
            except OSError:  # another run prepared the same meanwhile
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    if tokenizer is None:
        try:
            tokenizer = from_state(json.loads((folder / "tokenizer.json").read_text()))
        except (FileNotFoundError, ValueError):
            raise UserError(f"{folder / 'tokenizer.json'} is missing or damaged; delete {folder} to prepare it again") from None
    return PreparedData(describe(data), tokenizer, TokenShard(folder / "train.bin"), TokenShard(folder / "val.bin"))


def in_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- windows and their order -----------------------------------------------------------------------------------------


class PackedLMDataset(Dataset):
    """Windows of T + 1 tokens at stride T over a shard, so that every token but the first is a target exactly once.

    Item i is {input_ids (T,), targets (T,)}, and doc_ids (T,) under document_mask. The last window is short: its missing
    targets are -100.

    >>> tokens = np.arange(6)  # T = 4: the windows 0 1 2 3 | 4 . . .
    >>> {k: v.tolist() for k, v in PackedLMDataset(tokens, 4)[1].items()}
    {'input_ids': [4, 0, 0, 0], 'targets': [5, -100, -100, -100]}
    """

    def __init__(self, source: TokenShard | np.ndarray, seq_len: int, document_mask: bool = False):
        self.source, self.seq_len, self.document_mask = source, seq_len, document_mask
        self.size = len(self.tokens)

    @property
    def tokens(self) -> np.ndarray:
        return self.source.tokens if isinstance(self.source, TokenShard) else self.source

    def __len__(self) -> int:
        return max(0, -(-(self.size - 1) // self.seq_len))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: rows[0] for name, rows in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """The rows at `indices` as one batch, {name: (B, T)}; an index of -1 is a row without targets."""
        T = self.seq_len
        windows = np.zeros((len(indices), T + 1), np.int64)
        lengths = np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            if index >= 0:
                window = self.tokens[index * T : index * T + T + 1]
                windows[row, : len(window)] = window
                lengths[row] = len(window) - 1
        rows = torch.from_numpy(windows)
        past_the_end = torch.arange(T) >= torch.from_numpy(lengths)[:, None]
        batch = {"input_ids": rows[:, :-1].masked_fill(past_the_end, 0), "targets": rows[:, 1:].masked_fill(past_the_end, IGNORE)}
        if self.document_mask:
            positions = np.asarray(indices)[:, None] * T + np.arange(T)
            batch["doc_ids"] = torch.from_numpy(np.searchsorted(self.source.offsets, positions, side="right"))
        return batch


class TrainingOrder:
    """Batches of dataset indices without end: each epoch a new permutation, a pure function of (seed, epoch, index).

    Rank r of w takes rows r*B to (r+1)*B of every w*B, so that more devices see the same tokens in the same order.
    """

    def __init__(self, size: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.seed, self.rank, self.world_size = size, batch_size, seed, rank, world_size
        self.start = 0  # batches that this rank has had
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.long)

    def index(self, position: int) -> int:
        """The dataset index at a position counted over all ranks and epochs."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.size, generator=generator)
        return int(self._permutation[place])

    def __len__(self) -> int:
        return ENDLESS

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.start, ENDLESS):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [self.index(first + row) for row in range(self.batch_size)]


class ValidationOrder:
    """Every index once, in order, in batches of one shape: the last is filled up with -1."""

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1):
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(len(self)):
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield [i if i < self.size else -1 for i in range(first, first + self.batch_size)]


class ResumableLoader(DataLoader):
    """A DataLoader over a TrainingOrder or ValidationOrder whose state is the number of batches it handed out."""

    def __init__(self, dataset: PackedLMDataset, order: TrainingOrder | ValidationOrder, num_workers: int = 0, pin_memory: bool = False):
        self.handed_out = 0
        super().__init__(
            dataset,
            batch_sampler=order,
            num_workers=num_workers,
            collate_fn=as_is,
            worker_init_fn=leave_signals_to_the_run,
            pin_memory=pin_memory,
            generator=torch.Generator(),
        )  # its own: the default would draw from the global generator

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if isinstance(self.batch_sampler, ValidationOrder):
            yield from super().__iter__()
            return
        self.batch_sampler.start = self.handed_out
        for batch in super().__iter__():
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.handed_out = state["handed_out"]


def leave_signals_to_the_run(_: int) -> None:
    """A worker process ends when its loader does; Ctrl-C is for the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def as_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The dataset makes whole batches."""
    return batch
