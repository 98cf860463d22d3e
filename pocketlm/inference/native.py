"""decode.c from Python: compiled once for this machine, filled with a model's own weights, called for every step and draw.

Where it cannot be (no C compiler, another device, a width that does not fit), the reason is told and torch steps instead.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from model import Transformer
from pocketlm.config.sampling import SamplingParams

SOURCE = Path(__file__).with_name("decode.c")


FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-std=gnu11",
    "-fPIC",
)


FLOAT, BFLOAT16, INT8, INT4 = range(4)


KINDS = {torch.float32: FLOAT, torch.bfloat16: BFLOAT16}


POSITIONS, MLPS = ("rope", "learned"), ("swiglu", "gelu", "relu", "relu2")


class NativeUnavailable(Exception):
    """Why this model cannot be stepped in C, as the end of a sentence."""


class Linear(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("kind", "n_in", "n_out")] + [
        (name, c_void_p) for name in ("weight", "scale", "bias")
    ]


class Norm(ctypes.Structure):
    _fields_ = [("there", c_int64), ("weight", c_void_p), ("bias", c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [("norm1", Norm), *((name, Linear) for name in "qkvo"), ("norm2", Norm)]
    _fields_ += [(name, Linear) for name in ("gate", "up", "down")]


class Model(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "n_layers",
            "d_model",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "vocab_size",
            "mlp",
        )
    ]
    _fields_ += [(name, c_int64) for name in ("position", "layernorm", "cache_kind", "weights")] + [
        ("norm_eps", c_double)
    ]
    _fields_ += [(name, Linear) for name in ("embed", "places", "head")] + [
        ("embed_norm", Norm),
        ("norm", Norm),
    ]
    _fields_ += [("cos", c_void_p), ("sin", c_void_p), ("layers", POINTER(Layer))]


class NativeStep:
    """Takes what `engine.step_in_torch` takes and gives the same logits, in float32. The weights are not copied."""

    def __init__(self, model: Transformer):
        """Raises CannotStep."""
        if model.device.type != "cpu" or model.dtype not in KINDS:
            raise NativeUnavailable(
                f"decode.c is for float32 and bfloat16 on a CPU, and this is {model.dtype} on {model.device.type}"
            )
        self.kept: list[Any] = []  # the tensors that C points into
        c, self.weights = model.config, KINDS[model.dtype]
        of_layers = [self.layer(layer) for layer in model.layers]
        self.layers = (Layer * len(of_layers))(*of_layers)
        nothing = Linear()
        rope = (
            [self.floats(table) for table in (model.rope_cos, model.rope_sin)]
            if c.position == "rope"
            else [None, None]
        )
        fields = dict(
            n_layers=c.n_layers, d_model=c.d_model, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, head_dim=c.head_dim, d_ff=c.d_ff,
            vocab_size=c.vocab_size, mlp=MLPS.index(c.mlp), position=POSITIONS.index(c.position), layernorm=c.norm == "layernorm",
            cache_kind=KINDS[model.dtype], norm_eps=c.norm_eps, embed=self.linear(model.embed_tokens),
            places=nothing if model.embed_positions is None else self.linear(model.embed_positions),
            head=self.linear(model.embed_tokens if model.lm_head is None else model.lm_head),
            embed_norm=self.norm(model.embed_norm), norm=self.norm(model.norm), cos=rope[0], sin=rope[1], layers=self.layers,
        )  # fmt: skip
        self.model = Model(**fields, weights=self.weights)
        self.library = library()

    def __call__(self, model: Transformer, cache: Any, tokens: list[int]) -> Tensor:
        """Take a token into each of the first rows of the cache; logits (B, V) of what follows."""
        n = len(tokens)
        logits = torch.empty(n, model.config.vocab_size)
        self.take(cache, tokens, list(range(n)), cache.lengths[:n].tolist(), logits)
        cache.lengths[:n] += 1
        return logits

    def read(self, cache: Any, pieces: list[tuple[int, list[int]]]) -> None:
        """Take the ids of each piece into its row, behind what that has."""
        tokens = [
            (i, b, int(cache.lengths[b]) + place)
            for b, ids in pieces
            for place, i in enumerate(ids)
        ]
        if tokens:
            self.take(cache, *map(list, zip(*tokens, strict=True)), None)

    def take(
        self,
        cache: Any,
        tokens: list[int],
        rows: list[int],
        positions: list[int],
        logits: Tensor | None,
    ) -> None:
        many, out = c_int64 * len(tokens), None if logits is None else logits.data_ptr()
        self.library.step(
            ctypes.byref(self.model), len(tokens), many(*tokens), many(*rows), many(*positions),
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.keys.size(1), cache.max_len, out,
        )  # fmt: skip

    def choose(self, logits: Tensor, params: SamplingParams, draws: Tensor) -> Tensor:
        """What `sampling.choose_in_torch` does, in a tenth of its time."""
        logits, chosen = logits.contiguous(), torch.empty(len(logits), dtype=torch.long)
        assert logits.dtype == torch.float32 and draws.dtype == torch.float64
        p, ends = params, (draws.data_ptr(), chosen.data_ptr())
        self.library.choose(
            *logits.shape, logits.data_ptr(), p.temperature, p.top_k, p.top_p, p.min_p, *ends
        )
        return chosen

    def pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else self.pointer(tensor.detach().float().contiguous())

    def norm(self, module: nn.Module) -> Norm:
        if isinstance(module, nn.Identity):
            return Norm()
        return Norm(1, self.floats(module.weight), self.floats(getattr(module, "bias", None)))

    def linear(self, module: nn.Module | None) -> Linear:
        """A matrix of nn.Linear, nn.Embedding or quantize.py."""
        if module is None:
            return Linear()
        weight, bias = module.weight.detach(), self.floats(getattr(module, "bias", None))
        kind = {torch.int8: INT8, torch.int16: INT4}.get(weight.dtype, KINDS.get(weight.dtype))
        n_out, n_in = weight.size(0), weight.size(1) * (4 if kind == INT4 else 1)
        if kind in (INT8, INT4):
            self.weights = kind
        return Linear(
            kind,
            n_in,
            n_out,
            self.pointer(weight),
            self.pointer(getattr(module, "scale", None)),
            bias,
        )

    def layer(self, block: nn.Module) -> Layer:
        a, f = block.self_attn, block.mlp
        return Layer(
            self.norm(block.input_layernorm), *map(self.linear, (a.q_proj, a.k_proj, a.v_proj, a.o_proj)),
            self.norm(block.post_attention_layernorm), *map(self.linear, (f.gate_proj, f.up_proj, f.down_proj)),
        )  # fmt: skip


def native_unavailable_reason(model: Transformer) -> str:
    """Why this model is not stepped in C; empty where it is."""
    try:
        NativeStep(model)
    except NativeUnavailable as reason:
        return str(reason)
    return ""


def library() -> ctypes.CDLL:
    """decode.c, compiled for this machine the first time (a second or two) and kept. Raises CannotStep."""
    compiler = next(
        (
            path
            for name in (os.environ.get("CC"), "gcc", "clang", "cc")
            if name and (path := shutil.which(name))
        ),
        None,
    )
    if compiler is None:
        raise NativeUnavailable("there is no C compiler on the PATH (gcc or clang)")
    native = (
        "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decode_c"
    try:
        made_of = " ".join(
            [
                SOURCE.read_text(),
                compiler,
                *FLAGS,
                torch.__version__,
                platform.processor(),
                platform.node(),
            ]
        )
        built = folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.so"
        if not built.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                compile_into(compiler, native, Path(work))
                os.replace(Path(work) / "decode.so", built)
        loaded = ctypes.CDLL(str(built))
    except OSError as error:
        raise NativeUnavailable(f"decode.c could not be compiled or loaded: {error}") from error
    loaded.step.argtypes = [POINTER(Model), c_int64, *[c_void_p] * 5, c_int64, c_int64, c_void_p]
    loaded.choose.argtypes = [
        c_int64,
        c_int64,
        c_void_p,
        c_double,
        c_int64,
        c_double,
        c_double,
        c_void_p,
        c_void_p,
    ]
    loaded.step.restype = loaded.choose.restype = None
    return loaded


def compile_into(compiler: str, native: str, work: Path) -> None:
    """With threads where the compiler has OpenMP. It is not linked: torch has brought its own, and two would be in each other's way."""
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    for threads in (["-fopenmp"], ["-Xclang", "-fopenmp"], []):
        command = [
            compiler,
            *FLAGS,
            native,
            *threads,
            "-c",
            str(SOURCE),
            "-o",
            str(work / "decode.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        raise NativeUnavailable(
            f"{compiler} does not compile decode.c: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
        )
    link = [
        compiler,
        "-shared",
        *undefined,
        str(work / "decode.o"),
        "-o",
        str(work / "decode.so"),
        "-lm",
    ]
    done = subprocess.run(link, capture_output=True, text=True)
    if done.returncode:
        raise NativeUnavailable(
            f"{compiler} does not link decode.c: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
        )
