"""A checkpoint as an ONNX graph with a key/value cache, in float32 or int8.

Inputs and outputs have the names that Hugging Face's optimum and transformers.js use:

    input_ids, position_ids   (batch, sequence)
    attention_mask            (batch, past + sequence): 0 hides a token, as padding
    past_key_values.N.key     (batch, K, past, D) of layer N, and .value; past may be 0
    logits                    (batch, sequence, V)
    present.N.key             (batch, K, past + sequence, D), and .value: the next past_key_values

The tokenizer.json, the ids that begin and end a text, and the chat template are in its metadata.

    python -m pocketlm.export.onnx.graph CHECKPOINT FILE

conversion.py runs it, since torch's exporter keeps 200 MB. A file that cannot be written ends it
with the number of the error on stdout.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.errors import run_main
from pocketlm.export.huggingface import generation_values
from pocketlm.export.onnx.files import Weight, quiet, write_model
from pocketlm.export.proof import Array
from pocketlm.export.tokenizers import library_tokenizer

EXAMPLE = 2, 3, 4  # batch, sequence and past of the export; any other works


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


def cache_names(config: ModelConfig, kind: str) -> list[str]:
    return [f"{kind}.{n}.{part}" for n in range(config.n_layers) for part in ("key", "value")]


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
    import onnx_ir

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
        weights = [weight_of(*each) for each in program.model.graph.initializers.items()]
        program.model.graph.initializers.clear()
        write_model(onnx_ir.to_proto(program.model), weights, path)


def weight_of(name: str, value: Any) -> Weight:
    """Return the weight of a value of onnx_ir, which may be a view of one of the model's."""
    stored = value.const_value

    def read() -> Array:
        return np.ascontiguousarray(stored.numpy())

    return Weight(name, int(stored.dtype), tuple(stored.shape), stored.nbytes, read)


def main(argv: list[str] | None = None) -> int:
    path, output = sys.argv[1:] if argv is None else argv
    checkpoint = load_checkpoint(path, mapped=True)
    try:
        export_graph(checkpoint.model, metadata_of(checkpoint), Path(output))
    except OSError as error:
        print(error.errno, end="")
    return 0


if __name__ == "__main__":
    run_main(main)
