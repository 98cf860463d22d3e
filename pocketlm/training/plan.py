"""The plan of a run, printed before its first step: device, data, model, steps, memory and time."""

import pickle
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from pocketlm.config.sections import Config
from pocketlm.data.datasets import JoinedDataset
from pocketlm.data.loaders import (
    build_rows,
    build_train_sampler,
    documents_longer_than_row,
    rows_in_run,
    rows_per_step,
)
from pocketlm.data.prepare import PreparedData
from pocketlm.data.samplers import MixtureBatchSampler
from pocketlm.hardware.devices import Hardware
from pocketlm.hardware.measure import device_name, matmul_rate
from pocketlm.hardware.memory import (
    available_memory,
    gigabytes,
    memory_advice,
    optimizer_bytes,
    run_bytes,
)
from pocketlm.model import kernels

# share of the measured matmul rate that a whole training step reaches, roughly
MATMUL_SHARE = 0.5
OTHER_STATE = 200_000  # bytes of a checkpoint's config, counters and random state, roughly


def training_rate(config: Config, hardware: Hardware) -> float:
    """Return the floating-point operations per second that training reaches on all devices."""
    rate = matmul_rate(hardware.accelerator, hardware.precision) * MATMUL_SHARE
    return rate * config.hardware.devices


def estimated_seconds(config: Config, data: PreparedData, hardware: Hardware) -> float:
    """Estimate the time of the steps and validations from the measured rate of one matmul."""
    training = config.training
    validations = -(-training.steps // training.val_every_steps)
    # a validation has no backward pass, which is two thirds of a training step
    tokens = training.steps * tokens_per_step(config) + validations * data.val.n_tokens / 3
    flops = tokens * config.model.flops_per_token(training.seq_len)
    return flops / training_rate(config, hardware)


def compilable_seconds(config: Config, hardware: Hardware) -> float:
    """Estimate the part of the training time that compiling shortens: all but the head's matmuls.

    The head has three of them: one in the forward pass and two in the backward pass. Where
    training.c computes the blocks, compiled ones are no faster.
    """
    model, training = config.model, config.training
    natively = kernels.available(torch.device(hardware.accelerator), torch.float32)
    if natively and model.is_llama and not model.dropout:
        return 0.0
    assert model.vocab_size is not None
    flops = model.flops_per_token(training.seq_len) - 6 * model.vocab_size * model.d_model
    tokens = training.steps * tokens_per_step(config)
    return tokens * flops / training_rate(config, hardware)


def memory_row(config: Config, hardware: Hardware) -> str:
    """Return the estimated memory beside what there is."""
    needed = run_bytes(config, hardware.accelerator, hardware.precision)
    room = available_memory(hardware.accelerator)
    text = f"about {gigabytes(needed)}; {room.limited_by} {gigabytes(room.total)}"
    if needed > room.free:
        text += f", of which only {gigabytes(room.free)} are free now: {memory_advice(config)}"
    return text


def checkpoint_sizes(config: Config, tokenizer_state: dict[str, Any]) -> list[int]:
    """Return the bytes of the most checkpoint files that a run has at a time.

    They are the numbered ones, an older best one, a copy of the last one, and one being written.
    """
    training = config.training
    weights, moments = (
        4 * config.model.n_parameters,
        optimizer_bytes(config.model, training.optimizer),
    )
    tokenizer = len(pickle.dumps(tokenizer_state))
    kept = training.keep_checkpoints or -(-training.steps // training.save_every_steps)
    files = min(kept, training.steps) + 3
    return [weights + moments + tokenizer + OTHER_STATE] * files


def tokens_per_step(config: Config) -> int:
    return rows_per_step(config) * config.training.seq_len


def passes(config: Config, data: PreparedData) -> str:
    """Describe how often the run reads its data.

    For a mixture, it is the share of the rows and the epochs of each source.
    """
    if data.stream:
        documents = data.train.n_documents + data.val.n_documents
        return f"a stream, of which the first {documents:,} documents have been looked at"
    rows, train = rows_in_run(config), build_rows(config, data, "train")
    order = build_train_sampler(config, data)
    if not isinstance(order, MixtureBatchSampler):
        return f"{rows / len(train):.2f} epochs"
    assert isinstance(train, JoinedDataset)
    drawn = zip(data.sources, order.rows_per_dataset(rows), train.datasets, strict=True)
    return "; ".join(
        f"{name} {count / rows:.1%} of the rows, {count / len(part):.2f} epochs"
        for name, count, part in drawn
    )


def plan(config: Config, data: PreparedData, hardware: Hardware) -> Table:
    """Return the table printed before the first step."""
    rows = [
        *hardware_rows(hardware),
        *data_rows(data),
        *model_rows(config),
        *cost_rows(config, data, hardware),
    ]
    if long := documents_longer_than_row(config, data):
        padded = config.data.packing == "padded"
        result = "each is cut off there" if padded else "each continues in the next row"
        rows.append(
            (
                "long documents",
                f"{long:,} of {data.train.n_documents:,} do not fit a row of "
                f"{config.training.seq_len:,} tokens: {result}",
            )
        )
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def hardware_rows(hardware: Hardware) -> list[tuple[str, str]]:
    name, reasons = device_name(hardware.accelerator), hardware.reasons
    compiled = "on" if hardware.compile else "off"
    return [
        ("device", f"{hardware.accelerator} ({name}): {reasons['accelerator']}"),
        ("precision", f"{hardware.precision}: {reasons['precision']}"),
        ("compile", f"{compiled}: {reasons['compile']}"),
    ]


def data_rows(data: PreparedData) -> list[tuple[str, str]]:
    train, val, tokenizer = data.train, data.val, data.tokenizer
    documents = f"{train.n_documents:,} training and {val.n_documents:,} validation documents"
    tokens = f"{train.n_tokens:,} and {val.n_tokens:,}"
    size = f"{train.n_bytes / train.n_tokens:.2f} bytes each"
    rows = [
        ("corpus", f"{data.name}: {documents}"),
        ("tokens", f"{tokens}, {size} ({tokenizer.name}, vocabulary {tokenizer.vocab_size:,})"),
    ]
    if tokenizer.note:
        rows.append(("vocabulary", tokenizer.note))
    rows += [("note", remark) for remark in data.remarks]
    return rows


def model_rows(config: Config) -> list[tuple[str, str]]:
    model = config.model
    heads = f"{model.n_heads} heads, {model.n_kv_heads} key/value heads"
    return [
        ("parameters", f"{model.n_parameters:,}"),
        (
            "model",
            f"{model.n_layers} layers, d_model {model.d_model}, {heads}, d_ff {model.d_ff}, "
            f"context {model.max_seq_len}",
        ),
    ]


def cost_rows(config: Config, data: PreparedData, hardware: Hardware) -> list[tuple[str, str]]:
    minutes = estimated_seconds(config, data, hardware) / 60
    return [
        (
            "steps",
            f"{config.training.steps:,} of {tokens_per_step(config):,} tokens: "
            f"{passes(config, data)}",
        ),
        ("memory", memory_row(config, hardware)),
        ("time", f"about {minutes:.1f} minutes, estimated from the speed of a matmul"),
    ]


def run_header(config: Config, data: PreparedData) -> str:
    """Return three numbers to compare runs by: documents, vocabulary size, parameters.

    Two people who train the same model on the same documents get the same numbers. microgpt
    prints them in this form.
    """
    documents = data.train.n_documents + data.val.n_documents
    return (
        f"num docs: {documents}\n"
        f"vocab size: {config.model.vocab_size}\n"
        f"num params: {config.model.n_parameters}"
    )
