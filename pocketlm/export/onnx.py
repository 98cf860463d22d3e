"""A checkpoint as an ONNX graph with a key/value cache, in float32 or int8.

Inputs and outputs have the names that Hugging Face's optimum and transformers.js use:

    input_ids, position_ids   (batch, sequence)
    attention_mask            (batch, past + sequence): 0 hides a token, as padding
    past_key_values.N.key     (batch, K, past, D) of layer N, and .value; past may be 0
    logits                    (batch, sequence, V)
    present.N.key             (batch, K, past + sequence, D), and .value: the next past_key_values

The tokenizer.json, the ids that begin and end a text, and the chat template are in its metadata.
"""

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.conversion.stored import progress_bar
from pocketlm.errors import UserError
from pocketlm.export.huggingface import generation_values
from pocketlm.export.proof import (
    Array,
    Reference,
    Step,
    compare,
    our_step,
    require_parity,
)
from pocketlm.export.tokenizers import library_tokenizer
from pocketlm.files import atomic_write
from pocketlm.tokenizer.base import Tokenizer

Shape = tuple[int, int, int]  # batch, length, and length of the cache before it

DTYPES = ("f32", "int8")
WINDOW = 512  # most tokens at a time in which the cost of int8 is measured
MAX_BYTES = 2 * 10**9  # of an ONNX file, which is a protobuf message
EXAMPLE = 2, 3, 4  # batch, sequence and past of the export; any other works
OTHER_SHAPES: tuple[Shape, ...] = ((1, 1, 0), (3, 5, 0), (2, 7, 6))  # of the graph's check
# Some tokens have values of 25,000 in SmolLM2-135M, which float32 rounds to 0.002. At one of 15
# positions onnxruntime is then 20e-6 of the largest logit from float64, and 2e-6 at the others.
LARGE_VALUES = 5


class GrowingCache(KVCache):
    """A cache whose arrays grow, for one forward pass: a graph has no memory to write to."""

    def __init__(self, past: list[Tensor], visible: Tensor):
        self.past, self.visible, self.length = past, visible, 0
        self.present: list[Tensor] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (
            torch.cat((old, new), dim=2)
            for old, new in zip(self.past[2 * layer : 2 * layer + 2], (k, v), strict=True)
        )
        self.present += [k, v]
        return k, v

    def mask(self, T: int) -> Tensor:
        return self.visible

    def advance(self, T: int) -> None:
        """Do nothing: the caller has the new arrays."""


class Graph(nn.Module):
    """The forward pass that is exported."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        T, n_past = input_ids.size(1), past[0].size(2)
        queries, keys = torch.arange(T) + n_past, torch.arange(n_past + T)
        causal = keys[None, :] <= queries[:, None]  # (T, S)
        cache = GrowingCache(past, causal & (attention_mask[:, None, None, :] != 0))
        logits = self.model(input_ids, positions=position_ids, cache=cache)
        return logits, *cache.present


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        others = other_shapes(our_step(model), reference, model.max_seq_len)
        export_graph(model, metadata_of(checkpoint), unfinished)
        checkpoint.free_weights()
        gc.collect()  # of the exported program, whose parts refer to each other
        step = onnx_step(unfinished, model.config)
        parity = compare(step, reference)
        require_parity(parity, reference)
        again = other_shapes(step, reference, model.max_seq_len)
        lines = [f"onnxruntime: {parity}", compare_shapes(again, others, reference)]
        if dtype == "int8":
            before = bits_per_byte(step, checkpoint, texts)
            quantize_file(unfinished)
            after = bits_per_byte(onnx_step(unfinished, model.config), checkpoint, texts)
            lines.append(
                f"int8: {after:.4f} bits per byte, float32 {before:.4f} ({after - before:+.4f})"
            )
    return lines


# ---- the graph ----


def cache_names(config: ModelConfig, kind: str) -> list[str]:
    return [f"{kind}.{n}.{part}" for n in range(config.n_layers) for part in ("key", "value")]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter and the quantiser, which warn of what does not concern a user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def metadata_of(checkpoint: Checkpoint) -> dict[str, str]:
    tokenizer = library_tokenizer(checkpoint.tokenizer)
    template = checkpoint.chat_template
    return {
        "tokenizer.json": tokenizer.json_text,
        "generation_config.json": json.dumps(generation_values(tokenizer)),
        **({} if template is None else {"chat_template.jinja": template}),
    }


def export_graph(model: Transformer, metadata: dict[str, str], path: Path) -> None:
    """Write the graph by torch's exporter."""
    config, (B, T, P) = model.config, EXAMPLE
    names = cache_names(config, "past_key_values")
    assert config.n_kv_heads is not None and config.head_dim is not None
    shape = (B, config.n_kv_heads, P, config.head_dim)
    example = (
        torch.zeros(B, T, dtype=torch.long),
        torch.ones(B, P + T, dtype=torch.long),
        torch.arange(T).repeat(B, 1),
        [torch.zeros(shape) for _ in names],
    )
    new, past = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
    axes = (new, {0: "batch", 1: "past_and_sequence"}, new, [past for _ in names])
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Graph(model).eval(),
            example,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=["input_ids", "attention_mask", "position_ids", *names],
            output_names=["logits", *cache_names(config, "present")],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(metadata)
        write_graph(program.model, path)


def write_graph(model: Any, path: Path) -> None:
    """Write a model of onnx_ir, one weight at a time: its own writer copies all of them twice.

    Fields of a protobuf message may come in any order, so the weights are behind all others:
    https://protobuf.dev/programming-guides/encoding
    """
    import onnx
    import onnx_ir

    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    model.graph.initializers.clear()
    whole = onnx_ir.to_proto(model)
    graph = whole.graph.SerializeToString()
    whole.ClearField("graph")
    heads = []
    for name, weight in weights.items():
        tensor = onnx.TensorProto(name=name, dims=list(weight.shape), data_type=weight.dtype)
        head = tensor.SerializeToString()
        head += field_head(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, weight.nbytes)
        n_bytes = len(head) + weight.nbytes
        heads.append(field_head(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, n_bytes) + head)
    n_bytes = len(graph) + sum(map(len, heads)) + sum(weight.nbytes for weight in weights.values())
    shapes = [list(weight.shape) for weight in weights.values()]
    with path.open("wb") as file, progress_bar("writing", shapes) as advance:
        file.write(whole.SerializeToString())
        file.write(field_head(onnx.ModelProto.GRAPH_FIELD_NUMBER, n_bytes) + graph)
        for head, weight in zip(heads, weights.values(), strict=True):
            file.write(head)
            file.write(np.ascontiguousarray(weight.numpy()).reshape(-1).view(np.uint8).data)
            advance(weight.nbytes)


def field_head(number: int, n_bytes: int) -> bytes:
    """Return what stands before the bytes of a field of a protobuf message."""
    head = bytearray([number << 3 | 2])
    while n_bytes > 127:
        head.append(n_bytes & 127 | 128)
        n_bytes >>= 7
    return bytes(head) + bytes([n_bytes])


def quantize_file(path: Path) -> None:
    """Quantise the matrices of a file to 8 bits by onnxruntime, one scale per column.

    Weights are unsigned: with signed ones, sums overflow on x86 CPUs without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_name(f"{path.name}.int8")
    try:
        with quiet():
            quantize_dynamic(path, quantized, weight_type=QuantType.QUInt8, per_channel=True)
        os.replace(quantized, path)
    finally:
        quantized.unlink(missing_ok=True)


# ---- the proof ----


def onnx_step(path: Path, config: ModelConfig) -> Step:
    """Return the forward pass of a file in onnxruntime.

    The graph is run as it is written: optimised weights would be copies of those in the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
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
