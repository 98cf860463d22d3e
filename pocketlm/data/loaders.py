"""Loaders: a config and prepared data to batches, and the counts of rows that follow from both.

    config, PreparedData -> build_loaders -> training batches, validation batches

Training batches are endless; validation batches hold each row once.
"""

import math
from collections import Counter

import numpy as np

from pocketlm.config.sections import Config
from pocketlm.corpus.chunks import Split
from pocketlm.corpus.sources import DatasetSource
from pocketlm.data.datasets import JoinedDataset, RowDataset, RowFormat, build_row_dataset
from pocketlm.data.prepare import PreparedData, PreparedSplit
from pocketlm.data.samplers import (
    ONLY_PROCESS,
    DataShard,
    MixtureBatchSampler,
    ResumableLoader,
    ShuffledBatchSampler,
    ValidationBatchSampler,
)
from pocketlm.data.streaming import StepShare, StreamingPackedLMDataset, StreamLoader, StreamOptions
from pocketlm.errors import UserError
from pocketlm.shards.format import TokenShard
from pocketlm.tokenizer.base import Tokenizer

# ---- batches ----


def build_loaders(
    config: Config,
    data: PreparedData,
    rank: DataShard = ONLY_PROCESS,
    *,
    pin_memory: bool = False,
) -> tuple[ResumableLoader | StreamLoader, ResumableLoader]:
    """Return the endless training loader and the validation loader of one rank."""
    train_loader = build_train_loader(config, data, rank, pin_memory=pin_memory)
    rows = build_rows(config, data, "val")
    batch_size = config.on_each_device().training.micro_batch
    sampler = ValidationBatchSampler(len(rows), batch_size, rank)
    return train_loader, ResumableLoader(rows, sampler, 0, pin_memory)


def build_train_loader(
    config: Config,
    data: PreparedData,
    rank: DataShard = ONLY_PROCESS,
    *,
    pin_memory: bool = False,
) -> ResumableLoader | StreamLoader:
    """Return the endless training loader of one rank."""
    workers = config.hardware.num_workers
    if data.stream is None:
        rows = build_rows(config, data, "train")
        sampler = build_train_sampler(config, data, rank)
        return ResumableLoader(rows, sampler, workers, pin_memory)
    if isinstance(data.stream, DatasetSource) and workers:
        raise UserError(
            f"{data.stream.name} is streamed by the process that trains; "
            f"set hardware.num_workers to 0, not {workers}"
        )
    has_val_source = config.data.val_path or config.data.val_split
    options = StreamOptions(
        val_share=0.0 if has_val_source else config.data.val_share,
        seed=config.training.seed,
        shuffle_buffer=config.data.shuffle_buffer,
    )
    training, share = config.training, config.on_each_device().training
    dataset = StreamingPackedLMDataset(
        data.stream, data.tokenizer, row_format(config), training.micro_batch, options
    )
    step = StepShare(training.grad_accum_steps, share.micro_batch, rank)
    return StreamLoader(dataset, workers, pin_memory, step)


def row_format(config: Config) -> RowFormat:
    """Return the row format of a config."""
    padded = config.data.packing == "padded"
    return RowFormat(config.training.seq_len, padded, config.data.document_mask)


def build_rows(config: Config, data: PreparedData, split: Split) -> RowDataset:
    """Return the rows of a split."""
    ends_shared = bool(data.tokenizer.corpus_suffix)
    return build_row_dataset(data.split(split).shards, row_format(config), ends_shared)


def build_train_sampler(
    config: Config, data: PreparedData, rank: DataShard = ONLY_PROCESS
) -> ShuffledBatchSampler:
    """Return the sampler of the rows to train on."""
    rows, training = build_rows(config, data, "train"), config.on_each_device().training
    batch_size, seed = training.micro_batch, training.seed
    if isinstance(rows, JoinedDataset):
        sizes = list(map(len, rows.datasets))
        return MixtureBatchSampler(sizes, data.weights, batch_size, seed, rank)
    return ShuffledBatchSampler(len(rows), batch_size, seed, rank)


# ---- counts ----


def rows_per_step(config: Config) -> int:
    """Return the rows of one optimizer step, on all devices."""
    return config.training.micro_batch * config.training.grad_accum_steps


def rows_in_run(config: Config) -> int:
    """Return the rows of the whole run."""
    return config.training.steps * rows_per_step(config)


def resolve_max_steps(config: Config, data: PreparedData, precision: str) -> Config:
    """Return the config with a number of steps, which `max_epochs` or the precision may decide.

    Raises UserError for a stream, whose length is not known.
    """
    epochs = config.training.max_epochs
    if epochs is None:
        return config.with_auto_steps(precision)
    if data.stream:
        raise UserError(
            f"training.max_epochs is {epochs:g}, but the length of a stream is not known; "
            "set training.max_steps instead"
        )
    rows = len(build_rows(config, data, "train"))
    return config.with_max_steps(max(1, math.ceil(epochs * rows / rows_per_step(config))))


def document_ends(data: PreparedData, shard: TokenShard) -> np.ndarray:
    """Return where each document ends (documents,).

    That is where the next one starts or, for the last, at the eos that only closes it.
    """
    return np.append(shard.offsets[1:], shard.header.tokens - len(data.tokenizer.corpus_suffix))


def documents_longer_than_row(config: Config, data: PreparedData) -> int:
    """Return the number of training documents that do not fit a row.

    Packed, they continue in the next row; padded, they are truncated.
    """
    limit = config.training.seq_len + 1 - len(data.tokenizer.corpus_suffix)
    count = 0
    for shard in data.train.shards:
        count += int((document_ends(data, shard) - shard.offsets > limit).sum())
    return count


CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # of UTF-8: those after a character's first


def validation_target_bytes(config: Config, data: PreparedData) -> int:
    """Return the UTF-8 bytes of the validation text whose tokens are targets.

    Raises UserError if there are none, because bits per byte divide by them.
    """
    size = data.val.n_bytes - bytes_without_target(config, data, data.val)
    if size < 1:
        raise UserError(
            f"no token to predict in the validation part of {data.name} has any text; "
            "give more text, or change data.val_share"
        )
    return size


def bytes_without_target(config: Config, data: PreparedData, split: PreparedSplit) -> int:
    """Return the UTF-8 bytes of a split's text whose tokens are never predicted.

    They are the first token of a row, unless it is a bos or eos: of every padded row, and of the
    first packed one. Of a padded row, they are also what is cut off.
    """
    tokenizer, size = data.tokenizer, 0
    row_tokens = config.training.seq_len + 1
    for shard in split.shards:
        tokens, starts = shard.tokens, shard.offsets
        if config.data.packing != "padded":
            size += 0 if tokenizer.document_prefix else text_bytes(tokenizer, tokens[:1])
            continue
        lengths = shard.row_lengths(bool(tokenizer.corpus_suffix))
        if not tokenizer.document_prefix:
            for i, count in Counter(tokens[starts[lengths > 0]].tolist()).items():
                size += count * len(tokenizer.token_bytes(i))
        for document in np.flatnonzero(lengths > row_tokens):
            start = starts[document]
            size += text_bytes(tokenizer, tokens[start + row_tokens : start + lengths[document]])
    return size


def text_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int:
    """Return the UTF-8 bytes of tokens, without the end of a character that begins before them."""
    text = b"".join(map(tokenizer.token_bytes, ids.tolist()))
    return len(text.lstrip(CONTINUATION_BYTES))
