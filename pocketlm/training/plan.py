"""The plan of a run, printed before its first step: device, data, model, steps, memory and time.

A dry run also prints the memory, time and cost on several devices, here or on cards elsewhere.
"""

import pickle
from dataclasses import replace
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no types
import torch
from rich.console import Group
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
from pocketlm.errors import UserError
from pocketlm.hardware.devices import Hardware
from pocketlm.hardware.measure import device_name, matmul_rate
from pocketlm.hardware.memory import (
    available_memory,
    estimate_memory,
    gigabytes,
    memory_advice,
    optimizer_bytes,
    run_bytes,
)
from pocketlm.hardware.scaling import (
    STRATEGIES,
    Target,
    card_target,
    device_memory,
    forecast,
)
from pocketlm.model import kernels
from pocketlm.tokenizer.build import declared_size

# share of the measured matmul rate that a whole training step reaches, roughly
MATMUL_SHARE = 0.5
SCALING_ROWS = (
    "memory of each device",
    "  parameters, gradients, optimizer",
    "  activations and temporary tensors",
    "  communication",
    "fits",
    "tokens/s in all",
    "sending, of a step",
    "days",
    "cost",
)
OTHER_STATE = 200_000  # bytes of a checkpoint's config, counters and random state, roughly


def training_rate(config: Config, hardware: Hardware) -> float:
    """Return the floating-point operations per second that training reaches on all devices."""
    rate = matmul_rate(hardware.accelerator, hardware.precision) * MATMUL_SHARE
    return rate * config.hardware.world_size


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
    if natively and model.is_llama:
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
    # what the process has already is not free any more
    if estimate_memory(config, hardware.accelerator, hardware.precision).total > room.free:
        text += f", of which only {gigabytes(room.free)} are free now: {memory_advice(config)}"
    return text


def checkpoint_sizes(config: Config, tokenizer_state: dict[str, Any]) -> list[int]:
    """Return the bytes of the most checkpoint files that a run has at a time.

    They are the numbered ones, an older best one, a copy of the last one, and one being written.
    """
    training = config.training
    weights, moments = (
        4 * config.model.n_parameters,
        optimizer_bytes(config.model, training.optimizer, average=training.ema_decay > 0),
    )
    tokenizer = len(pickle.dumps(tokenizer_state))
    kept = training.keep_checkpoints or -(-training.steps // training.save_every_steps)
    files = min(kept, training.steps) + 3
    return [weights + moments + tokenizer + OTHER_STATE] * files


def tokens_per_step(config: Config) -> int:
    return rows_per_step(config) * config.training.seq_len


def step_text(config: Config) -> str:
    return f"{config.training.steps:,} of {tokens_per_step(config):,} tokens"


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
        ("steps", f"{step_text(config)}: {passes(config, data)}"),
        ("memory", memory_row(config, hardware)),
        ("time", f"about {minutes:.1f} minutes, estimated from the speed of a matmul"),
    ]


# ---- several devices ----


def this_machine(config: Config, hardware: Hardware, rate: float | None) -> Target:
    """Return this machine to plan for; on a CPU, all processes share its memory and speed.

    rate: measured tokens/s of one device; None: an estimate from the speed of a matmul.
    """
    room, count = available_memory(hardware.accelerator), 1
    used = 0
    if hardware.accelerator == "cpu":
        count, used = config.hardware.devices, psutil.Process().memory_info().rss
    one = replace(config, hardware=replace(config.hardware, devices=1, num_nodes=1))
    flops = config.model.flops_per_token(config.training.seq_len)
    estimated = training_rate(one, hardware) / flops / count
    return Target(
        name="this machine",
        accelerator=hardware.accelerator,
        precision=hardware.precision,
        memory=room.total / count - used,
        rate=rate or estimated,
        rate_source="given" if rate else "estimated from the speed of a matmul",
    )


def scaling_table(config: Config, target: Target, price: float | None) -> Group:
    """Return the memory, time and cost of a run under each strategy. Raises UserError.

    price: of a device-hour.
    """
    hardware = config.hardware
    count = hardware.world_size
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    columns: list[list[str]] = []
    for strategy in STRATEGIES if count > 1 else STRATEGIES[:1]:
        devices = 1 if strategy == "single" else count
        table.add_column("one device" if devices == 1 else f"{strategy} on {count}")
        memory = device_memory(config, target.accelerator, target.precision, strategy)
        time = forecast(config, strategy, target)
        columns.append(
            [
                gigabytes(memory.total),
                gigabytes(memory.persistent),
                gigabytes(memory.activations + memory.temporary),
                gigabytes(memory.communication),
                "yes" if memory.total <= target.memory else "no",
                f"{time.tokens_per_second:,.0f}",
                f"{time.communication_share:.0%}" if target.link else "not known",
                f"{time.days:,.3g}",
                "not asked" if price is None else f"{time.cost(price, devices):,.0f}",
            ]
        )
    for name, values in zip(SCALING_ROWS, zip(*columns, strict=True), strict=True):
        table.add_row(name, *values)
    where = "" if hardware.num_nodes == 1 else f" on {hardware.num_nodes} machines"
    heading = (
        f"{count} x {target.name}{where}, {gigabytes(target.memory)} each; {target.rate:,.0f} "
        f"tokens/s on one ({target.rate_source}); {target.precision}; "
        f"{time.tokens:,} tokens in all"
    )
    return Group(heading, table)


def card_plan(config: Config, card: str, rate: float | None, price: float | None) -> Group:
    """Plan a run on cards that are not here, without reading its data. Raises UserError."""
    if config.training.max_epochs is not None:
        raise UserError(
            "--card reads no data, and training.max_epochs counts passes over it; "
            "set training.max_steps instead"
        )
    if config.training.micro_batch_size == "auto":
        raise UserError("--card chooses no batch; set training.micro_batch_size to a number")
    config = with_declared_vocabulary(config)
    target = card_target(config, card, rate)
    config = config.with_auto_steps(target.precision)
    rows = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in [*model_rows(config), ("steps", step_text(config))]:
        rows.add_row(name, escape(value))
    return Group(rows, scaling_table(config, target, price))


def with_declared_vocabulary(config: Config) -> Config:
    """Return the config with the vocabulary that its tokenizer's name tells. Raises UserError."""
    size = declared_size(config.data.tokenizer)
    if config.model.vocab_size is None and size is None:
        raise UserError(
            f"--card reads no data, and the tokenizer {config.data.tokenizer!r} does not tell the "
            "size of its vocabulary; set model.vocab_size"
        )
    return config if config.model.vocab_size else config.with_vocab_size(size or 0)


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
