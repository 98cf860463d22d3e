"""decode.c as a library: its structures, and its compilation for this machine.

The structures mirror those of decode.c, field by field; native.py fills them.
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

import torch

from pocketlm.instruction_sets import VARIABLE, InstructionSet, instruction_set

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

# The enumerations of decode.c
FLOAT, BFLOAT16, INT8, INT4 = range(4)
KINDS = {torch.float32: FLOAT, torch.bfloat16: BFLOAT16}
POSITIONS = ("rope", "learned")
MLPS = ("swiglu", "gelu", "relu", "relu2")


class NativeUnavailable(Exception):
    """The native backend cannot run a model; the text is the reason, as a clause."""


# ---- the structures of decode.c ----


class Linear(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("kind", "n_in", "n_out")),
        *((name, c_void_p) for name in ("weight", "scale", "bias")),
    ]


class Norm(ctypes.Structure):
    _fields_ = [("present", c_int64), ("weight", c_void_p), ("bias", c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("norm1", Norm),
        *((name, Linear) for name in ("q", "k", "v", "o")),
        ("norm2", Norm),
        *((name, Linear) for name in ("gate", "up", "down")),
    ]


SIZES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size")
VARIANTS = ("mlp", "position", "layernorm", "cache_kind", "weights_kind")


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in (*SIZES, *VARIANTS)),
        ("norm_eps", c_double),
        *((name, Linear) for name in ("embed", "embed_positions", "head")),
        *((name, Norm) for name in ("embed_norm", "norm")),
        *((name, c_void_p) for name in ("cos", "sin")),
        ("layers", POINTER(Layer)),
    ]


# ---- compiling ----


def load_library(isa: InstructionSet | None = None) -> ctypes.CDLL:
    """Load decode.c, compiled on first use, which takes a few seconds.

    It is compiled for the given instruction set; by default, for POCKETLM_ISA, or, if that is not
    set, for this very CPU. Raises NativeUnavailable if there is no compiler, or if it fails.
    """
    if isa is None and os.environ.get(VARIABLE):
        isa = instruction_set()
    compiler = find_compiler()
    try:
        library = ctypes.CDLL(str(compiled_library(compiler, isa)))
    except OSError as error:
        raise NativeUnavailable(f"decode.c could not be compiled or loaded: {error}") from error
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


def find_compiler() -> str:
    """Return the path of $CC, gcc, clang or cc. Raises NativeUnavailable if there is none."""
    for name in (os.environ.get("CC"), "gcc", "clang", "cc"):
        if name and (path := shutil.which(name)):
            return path
    raise NativeUnavailable("there is no C compiler on the PATH (gcc or clang)")


def compiled_library(compiler: str, isa: InstructionSet | None) -> Path:
    """Return the shared library in the user's cache folder, compiled if it is not there.

    Its name is a hash of the source and of whatever else could change the machine code.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decode_c"
    parts = [SOURCE.read_text(), compiler, *FLAGS, *machine_flags(isa)]
    parts += [torch.__version__, platform.processor(), platform.node()]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    library = folder / f"{digest}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            os.replace(compile_library(compiler, isa, Path(temporary)), library)
    return library


def machine_flags(isa: InstructionSet | None) -> tuple[str, ...]:
    """Return the compiler's flags for an instruction set; None: for this CPU."""
    if isa is not None:
        return isa.flags
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return ("-march=native",) if is_x86 else ("-mcpu=native",)


def compile_library(compiler: str, isa: InstructionSet | None, folder: Path) -> Path:
    """Compile decode.c in a folder; use threads if the compiler has OpenMP.

    OpenMP is not linked: torch has loaded its own, and two would compete for the cores.
    """
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    compiled, linked = folder / "decode.o", folder / "decode.so"
    for threads in (["-fopenmp"], ["-Xclang", "-fopenmp"], []):
        options = [*FLAGS, *machine_flags(isa), *threads, "-c", str(SOURCE), "-o", str(compiled)]
        done = run_compiler(compiler, options)
        if done.returncode == 0:
            break
    else:
        target = f" for {isa.name}" if isa else ""
        raise NativeUnavailable(
            f"{compiler} does not compile decode.c{target}: {first_line(done.stderr)}"
        )
    done = run_compiler(compiler, ["-shared", *undefined, str(compiled), "-o", str(linked), "-lm"])
    if done.returncode:
        raise NativeUnavailable(f"{compiler} does not link decode.c: {first_line(done.stderr)}")
    return linked


def run_compiler(compiler: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([compiler, *options], capture_output=True, text=True)


def first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]
