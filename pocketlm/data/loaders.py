"""From a config to batches."""

import math

import numpy as np

from pocketlm.config.sections import Config
from pocketlm.corpus.sources import RowsSource
from pocketlm.data.datasets import JoinedDataset, PackedLMDataset, PaddedLMDataset
from pocketlm.data.prepare import PreparedData
from pocketlm.data.samplers import (
    MixtureBatchSampler,
    ResumableLoader,
    ShuffledBatchSampler,
    ValidationBatchSampler,
)
from pocketlm.data.shards import TokenShard
from pocketlm.data.streaming import StreamingPackedLMDataset, StreamLoader
from pocketlm.errors import UserError


def rows_of(
    data: PreparedData, config: Config, validation: bool
) -> PackedLMDataset | JoinedDataset:
    """The rows to train on, or to validate on."""
    T, shards = config.training.seq_len, (data.val if validation else data.train).shards
    if config.data.packing == "padded":
        parts = [PaddedLMDataset(shard, T, bool(data.tokenizer.final)) for shard in shards]
    else:
        parts = [PackedLMDataset(shard, T, config.data.document_mask) for shard in shards]
    return parts[0] if len(parts) == 1 else JoinedDataset(parts)


def validated_bytes(data: PreparedData, config: Config) -> int:
    """UTF-8 bytes of the validation text whose tokens are targets: all but a padded row's first token and what it cuts off."""
    size = data.val.n_bytes
    if config.data.packing == "padded":
        for shard in data.val.shards:
            ends = np.append(shard.offsets[1:], shard.header.tokens)
            for start, end in zip(shard.offsets, ends, strict=True):
                for lost in (
                    shard.tokens[start : start + 1],
                    shard.tokens[start + config.training.seq_len + 1 : end],
                ):
                    text = data.tokenizer.decode(lost.tolist())  # of a bos or eos nothing
                    size -= len(
                        text.lstrip("\ufffd").encode()
                    )  # the end of a character that the row begins
    return size


def loaders(
    config: Config,
    data: PreparedData,
    *,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[ResumableLoader | StreamLoader, ResumableLoader]:
    """The endless training loader and the validation loader of one rank."""
    t, workers = config.training, config.hardware.num_workers
    val = rows_of(data, config, validation=True)
    val_loader = ResumableLoader(
        val, ValidationBatchSampler(len(val), t.micro_batch_size, rank, world_size), 0, pin_memory
    )
    if data.stream is None:
        train = rows_of(data, config, validation=False)
        return ResumableLoader(
            train, training_order(config, data, rank, world_size), workers, pin_memory
        ), val_loader
    if isinstance(data.stream, RowsSource) and workers:
        raise UserError(
            f"{data.stream.name} is streamed by the process that trains; set hardware.num_workers to 0, not {workers}"
        )
    stream = StreamingPackedLMDataset(
        data.stream,
        data.tokenizer,
        t.seq_len,
        t.micro_batch_size,
        val_share=0.0 if config.data.val_path or config.data.val_split else config.data.val_share,
        seed=t.seed,
        shuffle_buffer=config.data.shuffle_buffer,
        document_mask=config.data.document_mask,
        padded=config.data.packing == "padded",
        rank=rank,
        world_size=world_size,
    )
    return StreamLoader(stream, workers, pin_memory), val_loader


def rows_per_step(config: Config) -> int:
    """Rows that one optimizer step is made of, on all devices."""
    t = config.training
    return t.micro_batch_size * t.grad_accum_steps * config.hardware.devices


def with_steps(config: Config, data: PreparedData) -> Config:
    """The config with max_steps put in for max_epochs, if there is one: the steps of so many passes over the rows."""
    epochs = config.training.max_epochs
    if epochs is None:
        return config
    if data.stream:
        raise UserError(
            f"training.max_epochs is {epochs:g}, but how long a stream is, is not known; set training.max_steps instead"
        )
    rows = len(rows_of(data, config, validation=False))
    return config.with_max_steps(max(1, math.ceil(epochs * rows / rows_per_step(config))))


def document_ends(data: PreparedData, shard: TokenShard) -> np.ndarray:
    """(documents,) where each one ends: where the next begins, or the eos that only closes the last."""
    return np.append(shard.offsets[1:], shard.header.tokens - len(data.tokenizer.final))


def longer_than_a_row(data: PreparedData, config: Config) -> int:
    """Training documents that a row does not hold: under packing they go on in the next, padded they are cut off."""
    row = config.training.seq_len + 1 - len(data.tokenizer.final)
    return sum(
        int((document_ends(data, shard) - shard.offsets > row).sum()) for shard in data.train.shards
    )


def training_order(
    config: Config, data: PreparedData, rank: int = 0, world_size: int = 1
) -> ShuffledBatchSampler:
    """The order of the rows to train on."""
    rows, t = rows_of(data, config, validation=False), config.training
    if isinstance(rows, JoinedDataset):
        return MixtureBatchSampler(
            list(map(len, rows.parts)), data.weights, t.micro_batch_size, t.seed, rank, world_size
        )
    return ShuffledBatchSampler(len(rows), t.micro_batch_size, t.seed, rank, world_size)


def rows_in_run(config: Config) -> int:
    return config.training.max_steps * rows_per_step(config)
