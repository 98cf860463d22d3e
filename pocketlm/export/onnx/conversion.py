"""A checkpoint as an ONNX file, in float32 or int8, which onnxruntime runs as its proof."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from model import ModelConfig
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.errors import UserError
from pocketlm.export.onnx.files import mapped_model, quantize_file
from pocketlm.export.onnx.graph import cache_names
from pocketlm.export.proof import (
    Array,
    Reference,
    Step,
    compare,
    our_step,
    require_parity,
)
from pocketlm.files import atomic_write
from pocketlm.tokenizer.base import Tokenizer

Shape = tuple[int, int, int]  # batch, length, and length of the cache before it

ROOT = Path(__file__).parents[3]
DTYPES = ("f32", "int8")
WINDOW = 512  # most tokens at a time in which the cost of int8 is measured
MAX_BYTES = 2 * 10**9  # of an ONNX file, which is a protobuf message
OTHER_SHAPES: tuple[Shape, ...] = ((1, 1, 0), (3, 5, 0), (2, 7, 6))  # of the graph's check
# Some tokens have values of 25,000 in SmolLM2-135M, which float32 rounds to 0.002. At one of 15
# positions onnxruntime is then 20e-6 of the largest logit from float64, and 2e-6 at the others.
LARGE_VALUES = 5


def write_file(
    checkpoint: Checkpoint, reference: Reference, path: Path, dtype: str, texts: list[str]
) -> list[str]:
    """Write a new file and run it; return the lines of its proof. Raises UserError.

    texts: of int8, to measure what it costs.
    """
    model = checkpoint.model
    n_bytes = 4 * sum(p.numel() for p in model.parameters())
    if n_bytes > MAX_BYTES:
        raise UserError(
            f"{checkpoint.path} has {n_bytes / 1e9:.1f} GB of weights, and an ONNX file holds "
            f"{MAX_BYTES / 1e9:.0f} GB at most; convert it to hf, gguf or safetensors"
        )
    if model.config.token_shift:
        raise UserError(
            f"{checkpoint.path} has token_shift, which reads the id of the token before, and the "
            "graph's cache has keys and values only; convert it to safetensors"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        others = other_shapes(our_step(model), reference, model.max_seq_len)
        checkpoint.free_weights()
        export_in_new_process(checkpoint.path, unfinished)
        lines = prove(unfinished, model.config, reference, others)
        if dtype == "int8":
            before = bits_per_byte(onnx_step(unfinished, model.config), checkpoint, texts)
            quantize_file(unfinished)
            after = bits_per_byte(onnx_step(unfinished, model.config), checkpoint, texts)
            lines.append(
                f"int8: {after:.4f} bits per byte, float32 {before:.4f} ({after - before:+.4f})"
            )
    return lines


def export_in_new_process(checkpoint: Path, path: Path) -> None:
    """Write the graph of a checkpoint in a process that ends with the memory of torch's exporter.

    Raises UserError if it fails, and OSError if the file cannot be written.
    """
    module = "pocketlm.export.onnx.graph"
    command = [sys.executable, "-P", "-m", module, str(checkpoint), str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.stdout:
        raise OSError(int(done.stdout), os.strerror(int(done.stdout)))
    if done.returncode:
        raise UserError(
            f"torch's exporter ended with status {done.returncode}; nothing was written. "
            "Please report this as a bug"
        )


# ---- the proof ----


def prove(
    path: Path, config: ModelConfig, reference: Reference, others: dict[Shape, Array]
) -> list[str]:
    """Return the lines of the proof of a file in float32. Raises UserError."""
    step = onnx_step(path, config)
    parity = compare(step, reference)
    require_parity(parity, reference)
    assert config.max_seq_len is not None
    again = other_shapes(step, reference, config.max_seq_len)
    return [f"onnxruntime: {parity}", compare_shapes(again, others, reference)]


def onnx_step(path: Path, config: ModelConfig) -> Step:
    """Return the forward pass of a file in onnxruntime.

    The graph is run as it is written, and its weights are mapped: optimised or packed ones would be
    copies of those in the file, and an arena would keep all memory that it ever had.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
    mapped = path.with_name(f"{path.name}.mapped")  # names its weights by a path in its folder
    try:
        mapped.write_bytes(mapped_model(path).SerializeToString())
        session = onnxruntime.InferenceSession(mapped, options, providers=["CPUExecutionProvider"])
    finally:
        mapped.unlink(missing_ok=True)
    names = cache_names(config, "past_key_values")

    def step(ids: Any, cache: list[Any] | None) -> tuple[Any, list[Any]]:
        B, T = ids.shape
        empty = np.zeros((B, config.n_kv_heads or 0, 0, config.head_dim or 0), np.float32)
        past = [empty for _ in names] if cache is None else cache
        n_past = past[0].shape[2]
        inputs = {
            "input_ids": ids,
            "attention_mask": np.ones((B, n_past + T), np.int64),
            "position_ids": np.tile(np.arange(n_past, n_past + T), (B, 1)),
            **dict(zip(names, past, strict=True)),
        }
        logits, *present = session.run(None, inputs)
        return logits, present

    return step


def other_shapes(step: Step, reference: Reference, context: int) -> dict[Shape, Array]:
    """Return the logits (batch, length, V) at those of OTHER_SHAPES that a context has room for."""
    logits = {}
    for batch, length, n_past in OTHER_SHAPES:
        if length + n_past <= context:
            row = np.resize(reference.ids, (batch, n_past + length))
            _, cache = step(row[:, :n_past], None) if n_past else (None, None)
            logits[batch, length, n_past] = step(row[:, n_past:], cache)[0]
    return logits


def compare_shapes(
    logits: dict[Shape, Array], expected: dict[Shape, Array], reference: Reference
) -> str:
    """Return the line that tells the largest difference. Raises UserError if it is no rounding."""
    differences = [np.abs(logits[shape] - expected[shape]).max() for shape in expected]
    worst = float(np.max(differences))  # NaN if one is, which Python's max may pass over
    if not worst <= LARGE_VALUES * reference.tolerance:
        raise UserError(
            f"the graph differs by {worst:.1e} at lengths other than that of its export; nothing "
            "was written. Please report this as a bug"
        )
    listed = ", ".join(f"{batch}x{length} after {n_past}" for batch, length, n_past in expected)
    return f"onnxruntime at other shapes ({listed}): largest logit difference {worst:.1e}"


def bits_per_byte(step: Step, checkpoint: Checkpoint, texts: list[str]) -> float:
    """Return the mean bits per byte of texts, in windows of the context, or of WINDOW tokens."""
    window = min(checkpoint.model.max_seq_len, WINDOW)
    nats = sum(text_nats(step, checkpoint.tokenizer, text, window) for text in texts)
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def text_nats(step: Step, tokenizer: Tokenizer, text: str, length: int) -> float:
    """Return the summed cross-entropy of a text's tokens after the document's prefix."""
    ids = np.array(tokenizer.document_prefix + tokenizer.encode(text), np.int64)
    nats = 0.0
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length + 1]
        logits = step(window[None, :-1], None)[0][0]
        for row, target in zip(logits, window[1:], strict=True):  # all in float64 would be large
            shifted = row.astype(np.float64) - row.max()
            nats += float(np.log(np.exp(shifted).sum()) - shifted[target])
    return nats
