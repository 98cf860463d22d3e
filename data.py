"""From a config to batches: prepared shards or a stream, packed into rows, dealt out in an order that can be resumed.

    prepare.py                 packing.py                  order.py
    documents -> TokenShard -> PackedLMDataset ---------> TrainingOrder, ResumableLoader -> {input_ids (B, T), targets (B, T)}
    documents ---------------> StreamingPackedLMDataset -> StreamLoader (stream.py) ------>  and doc_ids (B, T)

    python data.py --config config.yaml                           # prepare, and print what is in the data
    python data.py --config config.yaml data.path=books/ --json
    python data.py --config config.yaml --export nanogpt --to folder

No Lightning in any of these: worker processes import them.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from config import Config
from config_file import load_config
from errors import UserError, run_main
from order import MixtureOrder, ResumableLoader, TrainingOrder, ValidationOrder
from packing import JoinedDataset, PackedLMDataset, PaddedLMDataset
from prepare import PreparedData, prepare
from shards import TokenShard, write_bin
from sources import RowsSource
from stream import StreamingPackedLMDataset, StreamLoader


def rows_of(data: PreparedData, config: Config, validation: bool) -> PackedLMDataset | JoinedDataset:
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
                for lost in (shard.tokens[start : start + 1], shard.tokens[start + config.training.seq_len + 1 : end]):
                    text = data.tokenizer.decode(lost.tolist())  # of a bos or eos nothing
                    size -= len(text.lstrip("\ufffd").encode())  # the end of a character that the row begins
    return size


def loaders(
    config: Config, data: PreparedData, *, pin_memory: bool = False, rank: int = 0, world_size: int = 1
) -> tuple[ResumableLoader | StreamLoader, ResumableLoader]:
    """The endless training loader and the validation loader of one rank."""
    t, workers = config.training, config.hardware.num_workers
    val = rows_of(data, config, validation=True)
    val_loader = ResumableLoader(val, ValidationOrder(len(val), t.micro_batch_size, rank, world_size), 0, pin_memory)
    if data.stream is None:
        train = rows_of(data, config, validation=False)
        return ResumableLoader(train, training_order(config, data, rank, world_size), workers, pin_memory), val_loader
    if isinstance(data.stream, RowsSource) and workers:
        raise UserError(f"{data.stream.name} is streamed by the process that trains; set hardware.num_workers to 0, not {workers}")
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
        raise UserError(f"training.max_epochs is {epochs:g}, but how long a stream is, is not known; set training.max_steps instead")
    rows = len(rows_of(data, config, validation=False))
    return config.with_max_steps(max(1, math.ceil(epochs * rows / rows_per_step(config))))


def document_ends(data: PreparedData, shard: TokenShard) -> np.ndarray:
    """(documents,) where each one ends: where the next begins, or the eos that only closes the last."""
    return np.append(shard.offsets[1:], shard.header.tokens - len(data.tokenizer.final))


def longer_than_a_row(data: PreparedData, config: Config) -> int:
    """Training documents that a row does not hold: under packing they go on in the next, padded they are cut off."""
    row = config.training.seq_len + 1 - len(data.tokenizer.final)
    return sum(int((document_ends(data, shard) - shard.offsets > row).sum()) for shard in data.train.shards)


def training_order(config: Config, data: PreparedData, rank: int = 0, world_size: int = 1) -> TrainingOrder:
    """The order of the rows to train on."""
    rows, t = rows_of(data, config, validation=False), config.training
    if isinstance(rows, JoinedDataset):
        return MixtureOrder(list(map(len, rows.parts)), data.weights, t.micro_batch_size, t.seed, rank, world_size)
    return TrainingOrder(len(rows), t.micro_batch_size, t.seed, rank, world_size)


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepare the data of a config, and report what is in it.")
    parser.add_argument("--config", default="config.yaml", help="a YAML file with what differs from the defaults (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument("--export", choices=["nanogpt", "llmc"], help="write the tokens as train.bin and val.bin of that program, too")
    parser.add_argument("--to", default=".", metavar="FOLDER", help="where to (default: here)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes a key, for example data.path=book.txt")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    from data_report import print_report, report  # which imports this file

    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    if args.export and config.data.mixture:
        raise UserError("a mixture is drawn row by row while training; export its sources one at a time")
    if args.export and config.data.streaming:
        raise UserError("a stream keeps no tokens to export; set data.streaming to false")
    data = prepare(config.data)
    if args.export:
        for name, part in (("train", data.train), ("val", data.val)):
            write_bin(Path(args.to) / f"{name}.bin", part.shards[0], args.export)
    print_report(report(config, data), as_json=args.json)
    return 0


if __name__ == "__main__":
    run_main(main)
