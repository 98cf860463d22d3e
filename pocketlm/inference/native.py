"""Native decode backend: decode.c over a model's own weights.

If it cannot run (no C compiler, another device or dtype), `select_backend` returns the torch
backend with the reason.
"""

import ctypes
from ctypes import c_int64
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer
from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.backend import Chunk, DecodeBackend, SlotCache, TorchBackend
from pocketlm.inference.native_library import (
    FLOAT,
    INT4,
    INT8,
    KINDS,
    MLPS,
    POSITIONS,
    SIZES,
    Layer,
    Linear,
    Model,
    Norm,
    load_library,
)
from pocketlm.inference.sampling import divisor
from pocketlm.instruction_sets import multiplies_bfloat16
from pocketlm.native_build import NativeUnavailable

NATIVE_PREFILL_MAX = 128  # tokens of a prompt chunk up to which decode.c is faster than torch


class NativeBackend(TorchBackend):
    """Decoding, sampling and short prefills in C, with logits in float32.

    Long prefills run in torch if the weights are float32 or the CPU multiplies bfloat16; otherwise
    torch would have to widen all weights first. The weights are not copied: C reads the model's
    own tensors.
    """

    name = "C"

    def __init__(self, model: Transformer, library: ctypes.CDLL | None = None):
        """Load decode.c for this CPU if no library is given.

        Raises NativeUnavailable if decode.c cannot run this model.
        """
        check_supported(model)
        super().__init__(model)
        self.library = library or load_library()
        self.tensors: list[Tensor] = []  # keeps alive what C points into
        self.weights_kind = KINDS[model.dtype]
        layers = [self.layer(layer) for layer in model.layers]
        self.layers = (Layer * len(layers))(*layers)
        config = model.config
        self.struct = Model(
            **{name: getattr(config, name) for name in SIZES},
            mlp=MLPS.index(config.mlp),
            position=POSITIONS.index(config.position),
            cache_kind=KINDS[model.dtype],
            norm_eps=config.norm_eps,
            embed=self.linear(model.embed_tokens),
            embed_positions=self.linear(model.embed_positions),
            head=self.linear(model.embed_tokens if model.lm_head is None else model.lm_head),
            embed_norm=self.norm(model.embed_norm),
            norm=self.norm(model.norm),
            layers=self.layers,
        )
        if config.position == "rope":
            self.struct.cos = self.float_pointer(model.rope_cos)
            self.struct.sin = self.float_pointer(model.rope_sin)
        self.struct.weights_kind = self.weights_kind  # known once all matrices have been seen
        in_torch = self.weights_kind == FLOAT or multiplies_bfloat16("cpu")
        self.prefill_max = NATIVE_PREFILL_MAX if in_torch else model.max_seq_len

    def prefill(self, cache: SlotCache, chunks: list[Chunk]) -> None:
        """Run chunks of up to `prefill_max` tokens in one call of C, longer ones by torch."""
        super().prefill(cache, [chunk for chunk in chunks if len(chunk[1]) > self.prefill_max])
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        for slot, ids in chunks:
            if len(ids) <= self.prefill_max:
                begin = int(cache.lengths[slot])
                tokens += ids
                slots += [slot] * len(ids)
                positions += range(begin, begin + len(ids))
                cache.lengths[slot] += len(ids)
        if tokens:
            self.run(cache, tokens, slots, positions, None)

    def decode(self, cache: SlotCache, tokens: list[int]) -> Tensor:
        """Append a token to each of the first slots; return the next logits (B, V)."""
        n = len(tokens)
        logits = torch.empty(n, self.struct.head.n_out)
        self.run(cache, tokens, list(range(n)), cache.lengths[:n].tolist(), logits)
        cache.lengths[:n] += 1
        return logits

    def run(
        self,
        cache: SlotCache,
        tokens: list[int],
        slots: list[int],
        positions: list[int],
        logits: Tensor | None,
    ) -> None:
        """Call `step` of decode.c, which writes the cache, and the logits unless they are None."""
        array = c_int64 * len(tokens)
        self.library.step(
            ctypes.byref(self.struct),
            len(tokens),
            array(*tokens),
            array(*slots),
            array(*positions),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            cache.keys.size(1),
            cache.max_len,
            None if logits is None else logits.data_ptr(),
        )

    def sample(self, logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
        """Return what `sampling.sample_in_torch` does, in a tenth of its time."""
        logits, chosen = logits.contiguous(), torch.empty(len(logits), dtype=torch.long)
        assert logits.dtype == torch.float32 and draws.dtype == torch.float64
        self.library.choose(
            *logits.shape,
            logits.data_ptr(),
            divisor(params),
            params.top_k,
            params.top_p,
            params.min_p,
            draws.data_ptr(),
            chosen.data_ptr(),
        )
        return chosen

    # ---- modules to structures ----

    def pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def float_pointer(self, tensor: Tensor | None) -> int | None:
        """Return the address of the tensor in float32, which is a copy in other dtypes."""
        return None if tensor is None else self.pointer(tensor.detach().float().contiguous())

    def norm(self, module: Any) -> Norm:
        """Describe an nn.LayerNorm, a model.RMSNorm or an nn.Identity."""
        if isinstance(module, nn.Identity):
            return Norm()
        weight, bias = module.weight, getattr(module, "bias", None)
        centred = isinstance(module, nn.LayerNorm)
        return Norm(1, centred, self.float_pointer(weight), self.float_pointer(bias))

    def linear(self, module: Any) -> Linear:
        """Describe the matrix of an nn.Linear, an nn.Embedding, a quantised layer or None."""
        if module is None:
            return Linear()
        weight = module.weight.detach()
        bias = self.float_pointer(getattr(module, "bias", None))
        scale = getattr(module, "scale", None)
        kind = {torch.int8: INT8, torch.int16: INT4}.get(weight.dtype, KINDS.get(weight.dtype))
        n_out, n_in = weight.size(0), weight.size(1)
        if kind == INT4:
            n_in *= 4  # four in each int16
        if kind in (INT8, INT4):
            self.weights_kind = kind
        return Linear(kind, n_in, n_out, self.pointer(weight), self.pointer(scale), bias)

    def layer(self, block: Any) -> Layer:
        """Describe a model.Block."""
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            norm1=self.norm(block.input_layernorm),
            q=self.linear(attention.q_proj),
            k=self.linear(attention.k_proj),
            v=self.linear(attention.v_proj),
            o=self.linear(attention.o_proj),
            q_norm=self.norm(attention.q_norm),
            k_norm=self.norm(attention.k_norm),
            norm2=self.norm(block.post_attention_layernorm),
            gate=self.linear(mlp.gate_proj),
            up=self.linear(mlp.up_proj),
            down=self.linear(mlp.down_proj),
        )


def select_backend(model: Transformer) -> DecodeBackend:
    """Return the native backend, or the torch backend with the reason if C cannot run the model."""
    try:
        return NativeBackend(model)
    except NativeUnavailable as reason:
        return TorchBackend(model, fallback_reason=str(reason))


def native_unavailable_reason(model: Transformer) -> str:
    """Return why `select_backend` would fall back to torch; empty if it would not.

    Compiles decode.c if this machine has not yet, but builds no backend.
    """
    try:
        check_supported(model)
        load_library()
    except NativeUnavailable as reason:
        return str(reason)
    return ""


def check_supported(model: Transformer) -> None:
    """Raise NativeUnavailable for a device, dtype or architecture that decode.c does not have."""
    for name in ("value_residual", "embedding_shortcut", "token_shift"):
        if getattr(model.config, name):
            raise NativeUnavailable(f"decode.c has no {name}")
    if model.device.type != "cpu" or model.dtype not in KINDS:
        raise NativeUnavailable(
            "decode.c supports float32 and bfloat16 on a CPU, "
            f"but the model is {model.dtype} on {model.device.type}"
        )
