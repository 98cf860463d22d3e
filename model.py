"""A decoder-only Transformer in the Llama style: RMSNorm, RoPE, grouped-query attention, SwiGLU.

`ModelConfig` also describes its older relatives: GPT-2, microgpt, randyGPT and nn.zig.

    model = Transformer(ModelConfig(vocab_size=50_257, max_seq_len=256))
    logits = model(input_ids)

This file imports torch and no training code, and touches no files. Parameters have the names of
Hugging Face's Llama, and RoPE has its half-split layout, so an export only adds a prefix.

Letters in the shape comments: B batch, T tokens, C d_model, H query heads, K key/value heads,
D head_dim, V vocab_size, S all tokens so far (those in the cache and the T new ones).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pocketlm.errors import FieldError
from pocketlm.limits import MODEL_SIZES
from pocketlm.model.attention import attend, document_mask, positions_in_document
from pocketlm.model.block import Documents, Options, native_block, native_norm, trains_natively
from pocketlm.model.initialization import SkipInitialization
from pocketlm.model.rope import RopeScaling, rope_tables
from pocketlm.model.sizes import check_heads, default_d_ff

# Apple M1/M2, torch 2.13: a matmul whose inner dimension reaches this is silently wrong.
MPS_INNER_LIMIT = 32_767

# what the parameters begin with that are neither matrices, biases nor norms' gains
FIRST_VALUES = {"value_mix": [0.5, 0.5], "input_mix": [1.0, 0.0], "shift_gain": [0.0]}

Rotary = tuple[Tensor, Tensor] | None  # cosine and sine of each position's angles; None: no RoPE


@dataclass(frozen=True)
class ModelConfig:
    """Architecture and sizes of the model. The defaults are those of config.yaml.

    Raises FieldError, which names the field, if a value is invalid or two values do not fit.
    """

    vocab_size: int | None = None  # size of the vocabulary; None: the tokenizer's
    max_seq_len: int | None = None  # tokens of context; None: training.seq_len
    n_layers: int = 4  # number of blocks
    d_model: int = 128  # width of the residual stream
    n_heads: int = 4  # query heads
    # key/value heads; fewer than n_heads: grouped-query attention; None: n_heads
    n_kv_heads: int | None = 2
    head_dim: int | None = None  # width of a head; None: d_model / n_heads
    # hidden width of the MLP; None: 4 d_model, or, for swiglu, 8/3 d_model rounded up to a multiple
    # of 64
    d_ff: int | None = None
    # swiglu; gelu (tanh approximation): GPT-2; gelu_exact: nanoGPT; relu: microgpt;
    # relu2 (squared ReLU): randyGPT
    mlp: Literal["swiglu", "gelu", "gelu_exact", "relu", "relu2"] = "swiglu"
    position: Literal["rope", "learned"] = "rope"  # rope; learned: GPT-2, microgpt, randyGPT
    rope_theta: float = 10_000.0  # base of the RoPE wavelengths
    # RoPE for a context longer than that of pretraining: kind (linear, llama3, yarn), factor,
    # original_max_seq_len and others (docs/convert.md); None: as it is
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # RMSNorm of each head's queries and keys before RoPE; true: Qwen3
    # blocks after the first mix its values with their own, by trained weights (ResFormer)
    value_residual: bool = False
    # blocks after the first mix the embeddings with their input, by trained weights
    embedding_shortcut: bool = False
    # a token's embedding plus that of the token before it, by a trained gain in each channel (RWKV)
    token_shift: bool = False
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # rmsnorm; layernorm: GPT-2
    norm_gain: bool = True  # a trained gain in each norm; false: microgpt, randyGPT
    norm_eps: float = 1e-5  # added to the mean square (RMSNorm) or the variance (LayerNorm)
    embed_norm: bool = False  # normalise the embeddings; true: microgpt
    final_norm: bool = True  # normalise before the output head; false: microgpt, randyGPT
    bias: bool = False  # biases in linear layers and LayerNorm; true: GPT-2
    # biases in attention: none; qkv: queries, keys and values, as in Qwen2; all; None: all if bias
    attention_bias: Literal["none", "qkv", "all"] | None = None
    tie_embeddings: bool = True  # the output head shares the embedding matrix
    # standard deviation of the initial matrices; 0.08: microgpt; divided by sqrt(2 n_layers) for
    # those that write to the residual stream
    init_std: float = 0.02
    dropout: float = 0.0  # dropout probability in training
    # recompute each block in the backward pass: less memory, a third more time
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        d_ff = default_d_ff(self.d_model, self.mlp) if self.d_ff is None else self.d_ff
        object.__setattr__(self, "n_kv_heads", n_kv_heads)  # how to set a field of a frozen class
        object.__setattr__(self, "d_ff", d_ff)
        if self.attention_bias is None:
            object.__setattr__(self, "attention_bias", "all" if self.bias else "none")
        head_dim = check_heads(
            self.d_model, self.n_heads, n_kv_heads, self.head_dim, rope=self.position == "rope"
        )
        object.__setattr__(self, "head_dim", head_dim)
        if self.rope_scaling is not None:
            self.rope_scaling.check(self.position, self.rope_theta)
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"is {self.dropout}; it is a probability from 0 to below 1")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise FieldError(name, f"is {getattr(self, name)}; it must be above 0 and finite")

    def _check_sizes(self) -> None:
        for name, largest in MODEL_SIZES.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= largest:
                raise FieldError(name, f"is {value}; it must be from 1 to {largest:,}")

    @property
    def is_llama(self) -> bool:
        """Return whether the blocks have Llama's norm, positions and MLP, and no biases."""
        kind = self.mlp, self.position, self.norm, self.norm_gain
        plain = not self.bias and self.attention_bias == "none"
        return plain and kind == ("swiglu", "rope", "rmsnorm", True)

    @property
    def n_parameters(self) -> int:
        """Number of trainable parameters; a tied head counts once."""
        return self._count(lambda model: sum(p.numel() for p in model.parameters()))

    def flops_per_token(self, seq_len: int) -> int:
        """Return the floating-point operations of training on one token.

        They are 6 per weight used in a matmul, and those of causal attention.
        """
        assert self.head_dim is not None
        attention = 6 * self.n_layers * self.n_heads * self.head_dim * seq_len
        return 6 * self._count(count_matmul_weights) + attention

    def _count(self, count: "Callable[[Transformer], int]") -> int:
        """Return the count for this model, from those of one and two layers: all are alike."""
        one, two = (count(replace(self, n_layers=n).on_meta_device()) for n in (1, 2))
        return one + (self.n_layers - 1) * (two - one)

    def on_meta_device(self) -> "Transformer":
        """Return the model on the meta device: shapes only, no storage."""
        with torch.device("meta"), SkipInitialization():
            return Transformer(self)


def count_matmul_weights(model: "Transformer") -> int:
    """Return the number of weights in the head and the matrices of the blocks."""
    matrices = [model.head_weight, *(p for p in model.layers.parameters() if p.dim() == 2)]
    return sum(matrix.numel() for matrix in matrices)


class KVCache:
    """Keys and values of the tokens so far, preallocated and owned by the caller.

    keys, values: (n_layers, B, K, max_len, D); the first `length` positions are filled. tokens
    (B, max_len): their ids, for `token_shift`.
    `SlotCache` in pocketlm/inference/backend.py has rows of different lengths.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        assert config.n_kv_heads is not None and config.head_dim is not None
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.keys = self.zeros(shape, dtype, device)
        self.values = self.zeros(shape, dtype, device)
        self.tokens = self.zeros((batch_size, max_len), torch.long, device)
        self.length = 0

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate keys, values or tokens; subclasses may allocate them in another way."""
        return torch.zeros(shape, dtype=dtype, device=device)

    @property
    def max_len(self) -> int:
        return self.keys.size(3)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new (B, K, T, D) to `layer`; return all of its (B, K, S, D) in their dtype."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end].to(k), self.values[layer, :, :, :end].to(v)

    def previous_tokens(self, input_ids: Tensor) -> Tensor:
        """Append input_ids (B, T); return the token before each of them, -1 if there is none."""
        start, end = self.length, self.length + input_ids.size(1)
        self.tokens[:, start:end] = input_ids
        if start == 0:
            return tokens_before(input_ids)
        return self.tokens[:, start - 1 : end - 1]

    def mask(self, T: int) -> Tensor | None:
        """Return the mask (T, S) of T new tokens for `attend`, or None if it needs none."""
        if self.length == 0 or T == 1:
            return None
        visible = torch.ones(T, self.length + T, dtype=torch.bool, device=self.keys.device)
        return visible.tril(self.length)  # is_causal would align the first tokens, not the last

    def advance(self, T: int) -> None:
        """Count T more tokens as cached, once every layer has stored them."""
        self.length += T


def tokens_before(input_ids: Tensor) -> Tensor:
    """Return the token before each of a row's (B, T); -1 before the first.

    >>> tokens_before(torch.tensor([[5, 6, 7]])).tolist()
    [[-1, 5, 6]]
    """
    return F.pad(input_ids[:, :-1], (1, 0), value=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, or without the weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float, gain: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            x = x.to(self.weight.dtype)  # autocast's queries and keys are bfloat16
            if x.dtype == torch.float32 and trains_natively(self.weight):
                return native_norm(x, self.weight, self.eps)
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, config.norm_eps, config.norm_gain, config.bias)
    return RMSNorm(config.d_model, config.norm_eps, config.norm_gain)


def make_head_norm(config: ModelConfig) -> nn.Module:
    """Return the norm of each head's queries or keys (..., D); the identity without `qk_norm`."""
    if not config.qk_norm:
        return nn.Identity()
    assert config.head_dim is not None
    return RMSNorm(config.head_dim, config.norm_eps, config.norm_gain)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) of x (B, heads, T, D) by its position's angle.

    cos, sin: (T, D), or (B, 1, T, D) where each row of the batch has its own positions.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads, and with RoPE if `rotary` is given.

    Grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245. QK-norm: Henry et al. 2020,
    arXiv 2010.04245; with a trained gain, Dehghani et al. 2023, arXiv 2302.05442. Value residual:
    Zhou et al. 2024, arXiv 2410.17897.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        assert config.n_kv_heads is not None and config.head_dim is not None
        C, D, bias = config.d_model, config.head_dim, config.attention_bias != "none"
        self.layer, self.head_dim, self.dropout = layer, D, config.dropout
        self.q_proj = nn.Linear(C, config.n_heads * D, bias=bias)
        self.k_proj = nn.Linear(C, config.n_kv_heads * D, bias=bias)
        self.v_proj = nn.Linear(C, config.n_kv_heads * D, bias=bias)
        self.o_proj = nn.Linear(config.n_heads * D, C, bias=config.attention_bias == "all")
        self.q_norm, self.k_norm = (make_head_norm(config) for _ in "qk")
        # of the block's own values and of those of the first block
        mixes = config.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.tensor([0.5, 0.5])) if mixes else None

    def values(self, x: Tensor) -> Tensor:
        """Return the block's own values (B, K, T, D)."""
        values: Tensor = self.v_proj(x).view(*x.shape[:2], -1, self.head_dim)
        return values.transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        cache: KVCache | None,
        first_values: Tensor | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, K, D)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), self.values(x)  # (B, H or K, T, D)
        if self.value_mix is not None:
            assert first_values is not None
            v = self.value_mix[0] * v + self.value_mix[1] * first_values
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)  # (B, H, T, D)
        output: Tensor = self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        return output


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
}


class MLP(nn.Module):
    """down(act(up(x))), or SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.d_ff is not None
        C, d_ff, bias = config.d_model, config.d_ff, config.bias
        self.activation = ACTIVATIONS[config.mlp]
        self.gate_proj = nn.Linear(C, d_ff, bias=bias) if config.mlp == "swiglu" else None
        self.up_proj = nn.Linear(C, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            h = self.activation(self.up_proj(x))  # (B, T, d_ff)
        else:
            h = self.activation(self.gate_proj(x)) * self.up_proj(x)
        output: Tensor = self.down_proj(h)
        return output


class FromFirst(NamedTuple):
    """Input (B, T, C) and values (B, K, T, D) of the first block, which later ones read."""

    embedded: Tensor
    values: Tensor | None


class Block(nn.Module):
    """Attention and an MLP; each normalises its input and adds to the residual stream.

    Embedding shortcut: x0 of modded-nanogpt (Jordan et al. 2024).
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.norm_eps = config.norm_eps
        self.mlp = MLP(config)
        # of the block's input and of the embeddings
        mixes = config.embedding_shortcut and layer > 0
        self.input_mix = nn.Parameter(torch.tensor([1.0, 0.0])) if mixes else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        mask: Tensor | None,
        cache: KVCache | None,
        documents: Documents | None = None,
        first: FromFirst | None = None,
    ) -> Tensor:
        """Return the output (B, T, C); training.c computes it from `documents`, if given.

        There is then neither rotary nor mask nor cache. first: with `value_residual` or
        `embedding_shortcut`.
        """
        first_values = first.values if first is not None else None
        if self.input_mix is not None:
            assert first is not None
            x = self.input_mix[0] * x + self.input_mix[1] * first.embedded
        if documents is not None:
            attention, mlp = self.self_attn, self.mlp
            modules: tuple[Any, ...] = (
                *(self.input_layernorm, self.post_attention_layernorm),
                *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
                *(mlp.gate_proj, mlp.up_proj, mlp.down_proj, attention.q_norm, attention.k_norm),
            )
            weights = [getattr(module, "weight", None) for module in modules]
            mix = attention.value_mix
            first_values = None if mix is None else first_values
            probability = self.dropout.p if self.training else 0.0
            options = Options.draw(self.norm_eps, probability)
            return native_block(x, documents, options, first_values, [*weights, mix])
        attended = self.self_attn(self.input_layernorm(x), rotary, mask, cache, first_values)
        x = x + self.dropout(attended)
        output: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return output

    def values(self, x: Tensor) -> Tensor:
        """Return the attention's values (B, K, T, D) of the block's input (B, T, C)."""
        return self.self_attn.values(self.input_layernorm(x))


class Embedding(nn.Embedding):
    """Token ids (B, T) -> vectors (B, T, C). `tied`: the head uses the same matrix."""

    def __init__(self, vocab_size: int, d_model: int, tied: bool):
        super().__init__(vocab_size, d_model)
        self.tied = tied

    def forward(self, input: Tensor) -> Tensor:
        # A sparse gradient has only the rows in use. Adding it to the dense gradient of a tied head
        # saves a matrix of zeros. The compiler has no sparse tensors; a GPU gains nothing.
        on_cpu = self.weight.device.type == "cpu"
        sparse = self.tied and on_cpu and not torch.compiler.is_compiling()
        return F.embedding(input, self.weight, sparse=sparse)


class Transformer(nn.Module):
    """Token ids (B, T) -> logits (B, T, V).

    `hidden` computes everything but the head, for a loss that never holds all logits at once.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        V, C, context = config.vocab_size, config.d_model, config.max_seq_len
        assert V and context, "vocab_size and max_seq_len come from the tokenizer and training"
        self.config, self.max_seq_len = config, context
        self.embed_tokens = Embedding(V, C, config.tie_embeddings)
        self.embed_positions = nn.Embedding(context, C) if config.position == "learned" else None
        self.embed_norm = make_norm(config) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.lm_head = None if config.tie_embeddings else nn.Linear(C, V, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.shift_gain = nn.Parameter(torch.zeros(C)) if config.token_shift else None
        self.reset_tables()
        self.reset_parameters()

    def reset_tables(self) -> None:
        """Compute the rotary tables. No checkpoint stores them: call it after `to_empty`."""
        if self.config.position == "rope":
            c = self.config
            assert c.head_dim is not None
            if self.device.type == "meta":  # computing there would import for 0.8 s
                cos = sin = torch.empty(self.max_seq_len, c.head_dim, device="meta")
            else:
                cos, sin = rope_tables(c.head_dim, self.max_seq_len, c.rope_theta, c.rope_scaling)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    def reset_parameters(self) -> None:
        """Draw all parameters, in their order; on the meta device there is nothing to draw."""
        if self.device.type != "meta":
            for name, p in self.named_parameters():
                self.draw(name, p)

    def draw(self, name: str, p: Tensor) -> None:
        """Set `p` to first values of the parameter `name`.

        Every matrix is drawn from N(0, init_std^2). The matrices that write to the residual stream
        have a standard deviation smaller by sqrt(2 n_layers), as in GPT-2.
        """
        if p.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            smaller = math.sqrt(2 * self.config.n_layers) if residual else 1
            nn.init.normal_(p, std=self.config.init_std / smaller)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            first = FIRST_VALUES.get(name.rpartition(".")[2], [1.0])
            with torch.no_grad():
                p.copy_(torch.tensor(first).expand(p.shape))

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the hidden states."""
        # A quantised embedding has the attribute `dtype`, since its weight has integers.
        dtype: torch.dtype = getattr(self.embed_tokens, "dtype", self.embed_tokens.weight.dtype)
        return dtype

    @property
    def head_weight(self) -> Tensor:
        """The (V, C) matrix that maps a hidden state to logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the final hidden states (B, T, C) of input_ids (B, T).

        positions (B, T): position ids; by default they continue from the cache.
        doc_ids (B, T): tokens attend only to equal ids, and positions restart in each document.
        cache: holds the tokens before these; these are appended to it.
        """
        T = input_ids.size(1)
        start = cache.length if cache is not None else 0
        if start + T > self.max_seq_len:
            raise ValueError(f"{start + T} tokens do not fit the context of {self.max_seq_len}")
        assert doc_ids is None or cache is None, "a cache holds one document per row"
        natively = positions is None and cache is None and self._trains_natively()
        if doc_ids is not None and positions is None:
            positions = positions_in_document(doc_ids)
        previous: Tensor | None = None
        if self.shift_gain is not None:
            before = tokens_before(input_ids) if cache is None else cache.previous_tokens(input_ids)
            previous = before
            if doc_ids is not None:
                previous = before.masked_fill(tokens_before(doc_ids) != doc_ids, -1)
        x = self._embed(input_ids, previous, positions, start)
        context: tuple[Rotary, Tensor | None, KVCache | None, Documents | None]
        if natively:
            one_document = torch.zeros_like(input_ids, dtype=torch.long)
            starts = one_document if positions is None else torch.arange(T) - positions
            context = None, None, None, Documents(self.rope_cos, self.rope_sin, starts)
        else:
            mask = cache.mask(T) if cache is not None else None
            if doc_ids is not None:
                mask = document_mask(doc_ids)  # (B, 1, T, T)
            context = self._rotary(positions, start, T), mask, cache, None
        first = self._from_first(x)
        for layer in self.layers:
            if self.config.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, *context, first, use_reentrant=False)
            else:
                x = layer(x, *context, first)
        if cache is not None:
            cache.advance(T)
        output: Tensor = self.norm(x)
        return output

    def _from_first(self, x: Tensor) -> FromFirst | None:
        """Return what blocks after the first read of it, for the embeddings x (B, T, C)."""
        first_block = self.layers[0]
        assert isinstance(first_block, Block)
        values = first_block.values(x) if self.config.value_residual else None
        return (
            FromFirst(x, values) if values is not None or self.config.embedding_shortcut else None
        )

    def set_dropout(self, probability: float) -> None:
        """Drop out with another probability than the config's from here on."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability
            elif isinstance(module, Attention):
                module.dropout = probability

    def _trains_natively(self) -> bool:
        """Return whether training.c computes the blocks: those of the Llama family, on a CPU."""
        llama = self.config.is_llama and self.rope_cos.dtype == torch.float32
        return llama and trains_natively(self.embed_tokens.weight)

    def _embed(
        self, input_ids: Tensor, previous: Tensor | None, positions: Tensor | None, start: int
    ) -> Tensor:
        """Return the vectors (B, T, C) that enter the first block; previous: for `token_shift`."""
        x = self.embed_tokens(input_ids)
        if previous is not None:
            before = self.embed_tokens(previous.clamp(min=0))
            x = x + self.shift_gain * before.masked_fill((previous < 0)[..., None], 0)
        if self.embed_positions is not None and positions is None:
            x = x + self.embed_positions.weight[start : start + input_ids.size(1)]
        elif self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        output: Tensor = self.dropout(self.embed_norm(x))
        return output

    def _rotary(self, positions: Tensor | None, start: int, T: int) -> Rotary:
        """Return the cosines and sines for `rotate`, or None if positions are learned."""
        if self.embed_positions is not None:
            return None
        if positions is None:
            return self.rope_cos[start : start + T], self.rope_sin[start : start + T]  # (T, D)
        return self.rope_cos[positions][:, None], self.rope_sin[positions][:, None]  # (B, 1, T, D)

    def logits(self, hidden: Tensor) -> Tensor:
        """Apply the head: hidden (..., C) -> logits (..., V)."""
        if not isinstance(self.lm_head, nn.Linear | None):  # quantize() has replaced it
            return self.lm_head(hidden)  # type: ignore[unreachable]
        if hidden.device.type == "mps":  # V is the inner dimension of the backward matmul
            parts = torch.split(self.head_weight, MPS_INNER_LIMIT // 2)
            return torch.cat([F.linear(hidden, part) for part in parts], dim=-1)
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V). The arguments are those of `hidden`."""
        hidden = self.hidden(input_ids, positions=positions, doc_ids=doc_ids, cache=cache)
        return self.logits(hidden)
