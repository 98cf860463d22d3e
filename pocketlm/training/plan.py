"""What a run says about itself: the plan before it, the baselines and the verdict after it, the picture of its loss."""

from rich.markup import escape
from rich.table import Table

from pocketlm.config.sections import Config
from pocketlm.data.loaders import longer_than_a_row, rows_per_step
from pocketlm.data.prepare import PreparedData
from pocketlm.hardware.devices import Hardware
from pocketlm.hardware.measure import device_name, matmul_rate
from pocketlm.training.verdict import passes

MATMUL_SHARE = 0.5  # of the measured matmul rate that a whole training step reaches here, roughly


def estimated_seconds(config: Config, data: PreparedData, hardware: Hardware) -> float:
    """From the measured rate of one matmul: training at half of it, and the validations."""
    training = config.training
    tokens = training.max_steps * tokens_per_step(config)
    validations = -(-training.max_steps // training.val_every_steps)
    tokens += validations * data.val.n_tokens / 3  # no backward pass
    rate = matmul_rate(hardware.accelerator, hardware.precision) * MATMUL_SHARE
    return tokens / config.hardware.devices * config.model.flops_per_token(training.seq_len) / rate


def seconds_outside_head(config: Config, hardware: Hardware) -> float:
    """The part of the training that compiling makes shorter: all but the head's three matmuls."""
    model, training = config.model, config.training
    flops = model.flops_per_token(training.seq_len) - 6 * model.vocab_size * model.d_model
    rate = matmul_rate(hardware.accelerator, hardware.precision) * MATMUL_SHARE
    return training.max_steps * tokens_per_step(config) / config.hardware.devices * flops / rate


def estimated_memory(config: Config) -> float:
    """Megabytes on a device: weights, gradients and two moments in float32, kept activations, a chunk of logits, the imports."""
    model, training = config.model, config.training
    tokens = training.micro_batch_size * training.seq_len
    kept = (
        2 if model.gradient_checkpointing else 16 + 5 * model.d_ff / model.d_model
    )  # activations of d_model numbers a layer
    activations = tokens * model.d_model * model.n_layers * kept * 4
    logits = min(training.loss_chunk or 4 * tokens, 4 * tokens) * model.vocab_size * 6
    return (model.n_parameters * 22 + activations + logits) / 1e6 + 600


def tokens_per_step(config: Config) -> int:
    return rows_per_step(config) * config.training.seq_len


def plan(config: Config, data: PreparedData, hardware: Hardware) -> Table:
    """The table printed before the first step."""
    model, training, train, val = config.model, config.training, data.train, data.val
    step_tokens = tokens_per_step(config)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    entries = f"{data.tokenizer.name}, {data.tokenizer.vocab_size:,} entries"
    heads = f"{model.n_heads} heads, {model.n_kv_heads} key/value heads"
    rows = [
        (
            "device",
            f"{hardware.accelerator} ({device_name(hardware.accelerator)}): {hardware.reasons['accelerator']}",
        ),
        ("precision", f"{hardware.precision}: {hardware.reasons['precision']}"),
        ("compile", f"{'on' if hardware.compile else 'off'}: {hardware.reasons['compile']}"),
        (
            "corpus",
            f"{data.name}: {train.n_documents:,} documents to train on, {val.n_documents:,} to validate on",
        ),
        (
            "tokens",
            f"{train.n_tokens:,} and {val.n_tokens:,}, {train.n_bytes / train.n_tokens:.2f} bytes each ({entries})",
        ),
        ("parameters", f"{model.n_parameters:,}"),
        (
            "model",
            f"{model.n_layers} layers, d_model {model.d_model}, {heads}, d_ff {model.d_ff}, context {model.max_seq_len}",
        ),
        ("steps", f"{training.max_steps:,} of {step_tokens:,} tokens: {passes(config, data)}"),
        ("memory", f"about {estimated_memory(config) / 1000:.1f} GB"),
        (
            "time",
            f"about {estimated_seconds(config, data, hardware) / 60:.1f} minutes, from the speed of a matmul",
        ),
    ]
    if data.tokenizer.note:
        rows.insert(5, ("vocabulary", data.tokenizer.note))
    if long := longer_than_a_row(data, config):
        becomes = (
            "each cut off there"
            if config.data.packing == "padded"
            else "each going on in the next row"
        )
        rows.append(
            (
                "long documents",
                f"{long:,} of {train.n_documents:,} do not fit a row of {training.seq_len:,} tokens: {becomes}",
            )
        )
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def run_header(config: Config, data: PreparedData) -> str:
    """The three numbers by which two people see that they train the same model on the same documents, as microgpt prints them."""
    documents = data.train.n_documents + data.val.n_documents
    return f"num docs: {documents}\nvocab size: {config.model.vocab_size}\nnum params: {config.model.n_parameters}"
