"""A checkpoint as a GGUF file, for llama.cpp and what is built on it."""

import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType, TokenType

from model import ModelConfig
from pocketlm.checkpoint.format import WEIGHT_PREFIX, hash_weights
from pocketlm.checkpoint.loading import Checkpoint, load_model
from pocketlm.conversion.gguf import (
    LAYOUTS,
    ROPE_FACTORS,
    ROPE_SCALING_KEY,
    read_gguf,
    rope_factors,
)
from pocketlm.errors import UserError
from pocketlm.export.huggingface import suitable_class
from pocketlm.export.proof import (
    Reference,
    compare,
    our_step,
    require_parity,
    require_same_ids,
)
from pocketlm.export.tensors import ForeignTensor, computed, foreign_tensors
from pocketlm.export.tokenizers import GGUFTokenizer, gguf_tokenizer
from pocketlm.files import atomic_write
from pocketlm.model.rope import RopeScaling

F32, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0
DTYPES = {  # of --dtype
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
EMBEDDINGS = ("token_embd.weight", "output.weight")
POSITIONS = "position_embd.weight"


def write_file(checkpoint: Checkpoint, reference: Reference, path: Path, dtype: str) -> list[str]:
    """Write a new file and read it back; return the lines of its proof.

    Raises UserError if llama.cpp has no such model or tokenizer, or if what is read back differs.
    """
    kind = architecture(checkpoint)
    tokenizer = gguf_tokenizer(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as unfinished:
        writer = gguf.GGUFWriter(unfinished, kind)
        add_model(writer, checkpoint, path.stem)
        writer.add_file_type(DTYPES[dtype][1])
        add_tokenizer(writer, tokenizer, checkpoint)
        tensors = foreign_tensors(checkpoint.model, LAYOUTS[kind])
        tensors += factor_tensors(checkpoint.model.config)
        types = {tensor.name: stored_type(tensor, dtype) for tensor in tensors}
        write_tensors(writer, tensors, types)
        notes = tokenizer.notes
        del tokenizer, writer  # lists of all tokens, beside which a second model is read
        lines = read_back(unfinished, checkpoint, reference, dtype)
    half = sum(kind == GGMLQuantizationType.F16 for kind in types.values())
    if dtype.startswith("q") and half:
        lines.append(f"{half} matrices are f16, since blocks of 32 weights do not fit their rows")
    return [*lines, *notes]


def read_back(path: Path, checkpoint: Checkpoint, reference: Reference, dtype: str) -> list[str]:
    """Return the lines of the proof of a file, and free the weights of its checkpoint.

    Raises UserError if what is read back differs.
    """
    sha256 = checkpoint.weights_sha256 if dtype == "f32" else None
    checkpoint.free_weights()
    again = read_gguf(path, checkpoint.tokenizer.name)
    if sha256 is not None and hash_weights(again.weights) != sha256:
        raise UserError(
            "the weights are not read back as they were written; nothing was kept. "
            "Please report this as a bug"
        )
    weights = {WEIGHT_PREFIX + name: tensor for name, tensor in again.weights.items()}
    model = load_model(again.config.model, None, weights, path, assign=True)
    parity = compare(our_step(model), reference)
    if dtype == "f32":
        require_parity(parity, reference)
    n_texts = require_same_ids(checkpoint.tokenizer, again.tokenizer.encode)
    return [f"read back: {parity}", f"read back: the same ids for {n_texts} texts"]


def architecture(checkpoint: Checkpoint) -> str:
    """Return llama.cpp's name of the architecture. Raises UserError if it has none for the model.

    It computes Mistral as a Llama; its Qwens have none of Llama's options.
    """
    config, path = checkpoint.model.config, str(checkpoint.path)
    kind: str = suitable_class(config, path).config["model_type"]
    kind = {"mistral": "llama"}.get(kind, kind)
    scaling, problems = config.rope_scaling, []
    if config.mlp == "gelu_exact":
        problems.append(f"mlp {config.mlp!r}")
    if kind == "qwen3" and config.attention_bias != "none":
        problems.append(f"attention_bias {config.attention_bias!r} beside qk_norm")
    if kind == "qwen2" and config.n_heads * (config.head_dim or 0) != config.d_model:
        problems.append(f"head_dim {config.head_dim} beside biases as Qwen2's")
    if scaling is not None and scaling.kind == "llama3" and kind != "llama":
        problems.append(f"rope_scaling of llama3 in a {kind}")
    if scaling is not None and scaling.kind == "yarn":
        usual = RopeScaling("yarn", scaling.factor, scaling.original_max_seq_len)
        for name in (field.name for field in fields(RopeScaling)):
            if (value := getattr(scaling, name)) != getattr(usual, name):
                problems.append(f"rope_scaling.{name} {value!r}")
    if problems:
        raise UserError(
            f"{path} is a model that llama.cpp cannot compute, because of {', '.join(problems)}; "
            "convert it to hf, onnx or safetensors"
        )
    return kind


def factor_tensors(config: ModelConfig) -> list[ForeignTensor]:
    """Return llama.cpp's tensor of the scaling of Llama 3; none if there is another or none."""
    scaling, head_dim, theta = config.rope_scaling, config.head_dim, config.rope_theta
    if scaling is None or scaling.kind != "llama3" or head_dim is None:
        return []
    compute = partial(rope_factors, scaling, head_dim, theta)
    return [ForeignTensor(ROPE_FACTORS, (head_dim // 2,), compute)]


def stored_type(tensor: ForeignTensor, dtype: str) -> GGMLQuantizationType:
    """Return the type in which a tensor is stored, as llama.cpp's own converter chooses it.

    Vectors and positions are float32. The embedding and the head have at least 8 bits. Blocks have
    32 weights of a row; a row that they do not divide is float16.
    """
    kind: GGMLQuantizationType = DTYPES[dtype][0]
    if len(tensor.shape) == 1 or tensor.name == POSITIONS:
        return F32
    if dtype == "q4_0" and tensor.name in EMBEDDINGS:
        kind = Q8_0
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F16


def add_model(writer: gguf.GGUFWriter, checkpoint: Checkpoint, name: str) -> None:
    """Add the keys of the architecture."""
    model = checkpoint.model.config
    assert model.vocab_size and model.max_seq_len and model.d_ff and model.n_kv_heads
    assert model.head_dim
    writer.add_name(name)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.n_layers)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(model.n_kv_heads)
    if model.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(model.norm_eps)
    else:
        writer.add_layer_norm_eps(model.norm_eps)
    if model.position == "rope":
        writer.add_rope_freq_base(model.rope_theta)
        writer.add_rope_dimension_count(model.head_dim)
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)
    if model.rope_scaling is not None:
        add_scaling(writer, model.rope_scaling)


def add_scaling(writer: gguf.GGUFWriter, scaling: RopeScaling) -> None:
    """Add the keys of the scaling of RoPE; for Llama 3's, llama.cpp has a tensor instead."""
    if scaling.kind == "llama3":
        writer.add_string(ROPE_SCALING_KEY, json.dumps(asdict(scaling)))
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.original_max_seq_len is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: GGUFTokenizer, checkpoint: Checkpoint
) -> None:
    """Add the keys of the tokenizer; ids of the model beyond it are unused tokens."""
    size = checkpoint.model.config.vocab_size
    tokens = [tokenizer.tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(size or 0)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.splitter)
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_merges(tokenizer.merges)
    writer.add_add_bos_token(tokenizer.adds_bos)
    for key, i in tokenizer.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", i)
    if checkpoint.chat_template is not None:
        writer.add_chat_template(checkpoint.chat_template)


def write_tensors(
    writer: gguf.GGUFWriter, tensors: list[ForeignTensor], types: dict[str, GGMLQuantizationType]
) -> None:
    """Write the header, the keys and the tensors, one at a time, and close the file."""
    for tensor in tensors:
        kind = types[tensor.name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = tensor.n_bytes // 4 // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype("f4"), n_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, values in computed(tensors):
        writer.write_tensor_data(gguf.quantize(values.numpy(), types[tensor.name]))
    writer.close()
