"""A decoder-only Transformer in the Llama style: RMSNorm, RoPE, grouped-query attention, SwiGLU; and its older relatives.

A config and tensors go in, logits come out. Nothing here knows of files, of training or of Lightning. The parameters
carry the names of Hugging Face's Llama and RoPE is its half-split layout, so that an export is a prefix and no more.

Letters in the shape comments: B batch, T tokens, C d_model, H heads, K key/value heads, D head_dim, V vocab_size,
S tokens seen so far (those in the cache and the T new ones).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pocketlm.errors import FieldError
from pocketlm.model.attention import attend

Rotary = (
    tuple[Tensor, Tensor] | None
)  # cosine and sine of the positions' angles, where RoPE is used


MPS_INNER_LIMIT = (
    32_767  # Apple M1/M2, torch 2.13: a matmul whose inner dimension reaches this is silently wrong
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; the defaults are the default run's. `None` means: derived, as the comment says.

    Raises ValueError with a sentence for a person where the sizes do not fit together.
    """

    vocab_size: int | None = None  # entries; from the tokenizer
    max_seq_len: int | None = None  # tokens of context; training.seq_len
    n_layers: int = 4
    d_model: int = 128  # width of the residual stream
    n_heads: int = 4  # query heads; head_dim = d_model / n_heads
    n_kv_heads: int | None = (
        2  # key/value heads; fewer than n_heads is grouped-query attention; None: n_heads
    )
    d_ff: int | None = (
        None  # width inside the MLP; swiglu: 8/3 d_model rounded up to a multiple of 64, else 4 d_model
    )
    mlp: Literal["swiglu", "gelu", "relu", "relu2"] = (
        "swiglu"  # gelu (by tanh): GPT-2; relu: microgpt; relu2, its square: randyGPT
    )
    position: Literal["rope", "learned"] = "rope"  # learned: GPT-2, microgpt, randyGPT
    rope_theta: float = 10_000.0  # base of the rotary wavelengths
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # layernorm: GPT-2
    norm_gain: bool = True  # a trained factor behind each norm; false: microgpt, randyGPT
    norm_eps: float = 1e-5
    embed_norm: bool = False  # normalise what comes out of the embedding: microgpt
    final_norm: bool = True  # false: microgpt, randyGPT
    bias: bool = False  # in linear layers and layernorm: GPT-2
    tie_embeddings: bool = True  # the head shares the embedding's matrix
    init_std: float = 0.02  # of the matrices; what is added to the residual stream is smaller by sqrt(2 n_layers); 0.08: microgpt
    dropout: float = 0.0  # probability, while training
    gradient_checkpointing: bool = (
        False  # recompute each block in the backward pass: less memory, a third more time
    )

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        if self.d_ff is None:
            object.__setattr__(
                self,
                "d_ff",
                64 * math.ceil(self.d_model * 8 / 3 / 64)
                if self.mlp == "swiglu"
                else 4 * self.d_model,
            )
        for name in (
            "vocab_size",
            "max_seq_len",
            "n_layers",
            "d_model",
            "n_heads",
            "n_kv_heads",
            "d_ff",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FieldError(name, f"is {value}; it must be 1 or more")
        if self.d_model % self.n_heads:
            raise FieldError(
                "d_model",
                f"{self.d_model} is not divisible by n_heads {self.n_heads}; "
                f"take d_model {self.d_model // self.n_heads * self.n_heads or self.n_heads} or another n_heads",
            )
        if self.n_heads % self.n_kv_heads:
            divisors = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            raise FieldError(
                "n_heads",
                f"{self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}; take one of {divisors}",
            )
        if self.position == "rope" and self.head_dim % 2:
            raise FieldError(
                "d_model",
                f"/ n_heads is {self.head_dim}; RoPE rotates pairs and needs an even number",
            )
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"is {self.dropout}; it is a probability from 0 to below 1")
        for name in ("rope_theta", "norm_eps", "init_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise FieldError(name, f"is {getattr(self, name)}; it must be above 0 and finite")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Count of trainable numbers; a tied head counts once."""
        return sum(p.numel() for p in self._on_meta().parameters())

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token: 6 per weight used in a matmul, and causal attention's own."""
        model = self._on_meta()
        matmul_weights = model.head_weight.numel() + sum(
            p.numel() for p in model.layers.parameters() if p.dim() == 2
        )
        return 6 * matmul_weights + 6 * self.n_layers * self.d_model * seq_len

    def _on_meta(self) -> "Transformer":
        """The model without its numbers."""
        with torch.device("meta"):
            return Transformer(self)


class KVCache:
    """Keys and values of the tokens seen so far, preallocated and owned by the caller.

    keys, values: (n_layers, B, K, max_len, D); the first `length` positions are filled. engine.py has rows of different lengths.
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
        shape = (config.n_layers, batch_size, config.n_kv_heads, max_len, config.head_dim)
        self.keys, self.values = (self.zeros(shape, dtype, device) for _ in range(2))
        self.length = 0

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    @property
    def max_len(self) -> int:
        return self.keys.size(3)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new (B, K, T, D) behind the filled part; return all (B, K, S, D) of the layer."""
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def mask(self, T: int) -> Tensor | None:
        """What T new tokens may attend to, for `attend`."""
        if self.length == 0 or T == 1:
            return None
        return torch.ones(T, self.length + T, dtype=torch.bool, device=self.keys.device).tril(
            self.length
        )  # is_causal would align the ends

    def advance(self, T: int) -> None:
        """Count the T tokens that every layer has taken in."""
        self.length += T


class RMSNorm(nn.Module):
    """x / rms(x) * weight, or without the weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float, gain: bool = True):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.dim,), self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, config.norm_eps, config.norm_gain, config.bias)
    return RMSNorm(config.d_model, config.norm_eps, config.norm_gain)


def rope_tables(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, each (length, D), in the default dtype (Su et al., arXiv 2104.09864).

    The frequencies are rounded to float32 as in Hugging Face's Llama, whatever the dtype of the angles.
    """
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    positions = torch.arange(length, dtype=torch.get_default_dtype())
    angles = torch.outer(positions, frequencies.to(positions.dtype)).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, heads, T, D) by its position's angle; cos, sin end in (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (Ainslie et al. 2023, arXiv 2305.13245), and RoPE where given."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.q_proj = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.k_proj = nn.Linear(
            config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias
        )
        self.v_proj = nn.Linear(
            config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias
        )
        self.o_proj = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
}


class MLP(nn.Module):
    """down(act(up(x))), or SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.mlp]
        self.gate_proj = (
            nn.Linear(config.d_model, config.d_ff, bias=config.bias)
            if config.mlp == "swiglu"
            else None
        )
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(x)))
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), rotary, mask, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Embedding(nn.Embedding):
    """Ids (B, T) -> rows (B, T, C). `tied`: the head is the same matrix."""

    def __init__(self, vocab_size: int, d_model: int, tied: bool):
        super().__init__(vocab_size, d_model)
        self.tied = tied

    def forward(self, input: Tensor) -> Tensor:
        # added to the gradient of a tied head, the few rows in use save a matrix of zeros; only where eager, on a CPU
        sparse = (
            self.tied and self.weight.device.type == "cpu" and not torch.compiler.is_compiling()
        )
        return F.embedding(input, self.weight, sparse=sparse)


class Transformer(nn.Module):
    """Token ids (B, T) -> logits (B, T, V). `hidden` is all but the head, for a loss that never holds all logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        assert config.vocab_size and config.max_seq_len, (
            "vocab_size and max_seq_len come from the tokenizer and training"
        )
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.d_model, config.tie_embeddings)
        self.embed_positions = (
            nn.Embedding(config.max_seq_len, config.d_model)
            if config.position == "learned"
            else None
        )
        self.embed_norm = make_norm(config) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config) if config.final_norm else nn.Identity()
        self.lm_head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.reset_tables()
        self.reset_parameters()

    def reset_tables(self) -> None:
        """Compute the rotary tables, which no checkpoint carries; call it after building the model on the meta device."""
        config = self.config
        if config.position != "rope":
            return
        cos, sin = rope_tables(config.head_dim, config.max_seq_len, config.rope_theta)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def reset_parameters(self) -> None:
        """Draw every matrix from N(0, init_std); what is added to the residual stream is smaller by sqrt(2 n_layers) (GPT-2)."""
        std = self.config.init_std
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    p, std=std / math.sqrt(2 * self.config.n_layers) if residual else std
                )
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden states; a quantised embedding says it, since its weight is of integers."""
        return getattr(self.embed_tokens, "dtype", self.embed_tokens.weight.dtype)

    @property
    def head_weight(self) -> Tensor:
        """The (V, C) matrix that turns a hidden state into logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states (B, T, C) of input_ids (B, T).

        positions (B, T): places in the context; by default they count on from the cache.
        doc_ids (B, T): tokens attend only within equal ids, and positions restart with each document.
        cache: holds the tokens before these and takes these in.
        """
        B, T = input_ids.shape
        start = cache.length if cache is not None else 0
        if start + T > self.config.max_seq_len:
            raise ValueError(
                f"{start + T} tokens do not fit the context of {self.config.max_seq_len}"
            )
        assert doc_ids is None or cache is None, "a cache holds one document a row"
        mask = cache.mask(T) if cache is not None else None
        if doc_ids is not None:
            same = doc_ids[:, None, :, None] == doc_ids[:, None, None, :]
            mask = (
                same & torch.ones(T, T, dtype=torch.bool, device=input_ids.device).tril()
            )  # (B, 1, T, T)
            if positions is None:
                positions = positions_in_document(doc_ids)
        x, rotary = self.embed_tokens(input_ids), None
        if self.embed_positions is not None:
            x = x + (
                self.embed_positions.weight[start : start + T]
                if positions is None
                else self.embed_positions(positions)
            )
        elif positions is None:
            rotary = self.rope_cos[start : start + T], self.rope_sin[start : start + T]  # (T, D)
        else:
            rotary = (
                self.rope_cos[positions][:, None],
                self.rope_sin[positions][:, None],
            )  # (B, 1, T, D)

        x = self.dropout(self.embed_norm(x))
        for layer in self.layers:
            if self.config.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, cache)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: hidden (..., C) -> (..., V)."""
        if not isinstance(self.lm_head, nn.Linear | None):  # a quantised one
            return self.lm_head(hidden)
        if (
            hidden.device.type == "mps"
        ):  # keep the inner dimension of the backward matmul, V, under the limit
            return torch.cat(
                [F.linear(hidden, part) for part in self.head_weight.split(MPS_INNER_LIMIT // 2)],
                dim=-1,
            )
        return F.linear(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); the arguments are those of `hidden`."""
        return self.logits(
            self.hidden(input_ids, positions=positions, doc_ids=doc_ids, cache=cache)
        )


def positions_in_document(doc_ids: Tensor) -> Tensor:
    """Each token's distance from its document's first token in the row.

    >>> positions_in_document(torch.tensor([[7, 7, 7, 8, 8]])).tolist()
    [[0, 1, 2, 0, 1]]
    """
    index = torch.arange(doc_ids.size(1), device=doc_ids.device).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return index - torch.where(begins, index, 0).cummax(dim=1).values
