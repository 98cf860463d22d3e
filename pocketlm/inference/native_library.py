"""decode.c as a library: its structures and functions.

The structures mirror those of decode.c, field by field; native.py fills them.
"""

import ctypes
from ctypes import POINTER, c_double, c_int64, c_void_p
from pathlib import Path

import torch

from pocketlm.instruction_sets import InstructionSet
from pocketlm.native_build import load_native

SOURCE = Path(__file__).with_name("decode.c")

# The enumerations of decode.c
FLOAT, BFLOAT16, INT8, INT4 = range(4)
KINDS = {torch.float32: FLOAT, torch.bfloat16: BFLOAT16}
POSITIONS = ("rope", "learned")
MLPS = ("swiglu", "gelu", "relu", "relu2", "gelu_exact")


# ---- the structures of decode.c ----


class Linear(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("kind", "n_in", "n_out")),
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
    ]


class Norm(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("present", "centred")),
        *((name, c_void_p) for name in ("weight", "bias")),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("norm1", Norm),
        *((name, Linear) for name in ("q", "k", "v", "o")),
        *((name, Norm) for name in ("q_norm", "k_norm")),
        ("norm2", Norm),
        *((name, Linear) for name in ("gate", "up", "down")),
    ]


SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
VARIANTS = ("mlp", "position", "cache_kind", "weights_kind")


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in (*SIZES, *VARIANTS)),
        ("norm_eps", c_double),
        *((name, Linear) for name in ("embed", "embed_positions", "head")),
        *((name, Norm) for name in ("embed_norm", "norm")),
        *((name, c_void_p) for name in ("cos", "sin")),
        ("layers", POINTER(Layer)),
    ]


def load_library(isa: InstructionSet | None = None) -> ctypes.CDLL:
    """Load decode.c with the types of its functions.

    The arguments and errors are those of `load_native`.
    """
    library = load_native(SOURCE, isa)
    library.step.argtypes = [
        POINTER(Model),
        c_int64,  # B
        *[c_void_p] * 3,  # tokens, slots, positions
        *[c_void_p] * 2,  # keys, values
        *[c_int64] * 2,  # n_slots, max_len
        c_void_p,  # logits
    ]
    library.choose.argtypes = [
        *[c_int64] * 2,  # B, V
        c_void_p,  # logits
        c_double,  # temperature
        c_int64,  # top_k
        *[c_double] * 2,  # top_p, min_p
        *[c_void_p] * 2,  # draws, chosen
    ]
    library.step.restype = library.choose.restype = None
    return library
