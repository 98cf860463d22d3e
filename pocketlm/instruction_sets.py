"""The instruction set of the CPU: what this process uses, and how to make it use less.

    POCKETLM_ISA=avx2 python train.py ...    # as on a CPU that has AVX2 and no more

With POCKETLM_ISA, torch, oneDNN, MKL and decode.c all keep to the named set. Without it, decode.c
is compiled for this machine, and the libraries choose for themselves; ATEN_CPU_CAPABILITY, torch's
own variable, limits the choices of this project too.
"""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pocketlm.errors import UserError

VARIABLE = "POCKETLM_ISA"
LIBRARY_VARIABLES = (
    "ATEN_CPU_CAPABILITY",  # torch's kernels, and the vectors of torch.compile's
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "TORCHINDUCTOR_CPP_MARCH",  # else torch.compile's kernels are compiled with -march=native
)


@dataclass(frozen=True)
class InstructionSet:
    """A set of vector instructions: a compiler's flags for it and the libraries' names."""

    name: str
    flags: tuple[str, ...]  # of gcc and clang
    torch: str = ""  # value of ATEN_CPU_CAPABILITY
    onednn: str = ""  # value of ONEDNN_MAX_CPU_ISA
    mkl: str = ""  # value of MKL_ENABLE_INSTRUCTIONS
    multiplies_bfloat16: bool = False


X86_SETS = (  # from the oldest to the newest; each level is x86-64's psABI's
    InstructionSet("sse2", ("-march=x86-64",), "default", "SSE41", "SSE4_2"),
    InstructionSet("avx2", ("-march=x86-64-v3",), "avx2", "AVX2", "AVX2"),
    InstructionSet("avx_vnni", ("-march=x86-64-v3", "-mavxvnni"), "avx2", "AVX2_VNNI", "AVX2"),
    InstructionSet("avx512", ("-march=x86-64-v4",), "avx512", "AVX512_CORE", "AVX512"),
    InstructionSet(
        "avx512_vnni",
        ("-march=x86-64-v4", "-mavx512vnni"),
        "avx512",
        "AVX512_CORE_VNNI",
        "AVX512",
    ),
    InstructionSet(
        "avx512_bf16",
        ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
        "avx512",
        "AVX512_CORE_BF16",
        "AVX512",
        multiplies_bfloat16=True,
    ),
)
ARM_SETS = (
    InstructionSet("neon", ("-march=armv8-a",)),
    InstructionSet("neon_dotprod", ("-march=armv8.2-a+dotprod",)),
)
INSTRUCTION_SETS = {isa.name: isa for isa in (*X86_SETS, *ARM_SETS)}
PLAIN = InstructionSet("plain C", ())  # of any other machine


def limit_libraries() -> None:
    """Make torch, oneDNN and MKL keep to POCKETLM_ISA, if it is set, in this process and children.

    They read these variables at their first computation. A wrong name is refused later, by
    `instruction_set`, where it can be reported.
    """
    isa = INSTRUCTION_SETS.get(os.environ.get(VARIABLE, ""))
    if isa is not None and isa.torch:
        values = (isa.torch, isa.onednn, isa.mkl, isa.flags[0].removeprefix("-march="))
        for variable, value in zip(LIBRARY_VARIABLES, values, strict=True):
            os.environ.setdefault(variable, value)


@cache
def instruction_set() -> InstructionSet:
    """Return the set that this process uses: POCKETLM_ISA, else the newest that the CPU has.

    Raises UserError if POCKETLM_ISA is unknown, or names a set that this CPU lacks.
    """
    available = available_sets()
    name = os.environ.get(VARIABLE)
    if not name:
        return available[-1]
    for isa in available:
        if isa.name == name:
            return isa
    names = ", ".join(isa.name for isa in available)
    if name in INSTRUCTION_SETS:
        raise UserError(f"{VARIABLE}={name}: this CPU has {names}; use one of them, or unset it")
    raise UserError(
        f"{VARIABLE}={name} is no instruction set; this CPU has {names}: use one of them, "
        "or unset it"
    )


def limited_set() -> InstructionSet | None:
    """Return the set that POCKETLM_ISA or ATEN_CPU_CAPABILITY limits this process to, or None."""
    limited = os.environ.get(VARIABLE) or os.environ.get("ATEN_CPU_CAPABILITY")
    return instruction_set() if limited else None


def available_sets() -> list[InstructionSet]:
    """Return the sets of this CPU within torch's ATEN_CPU_CAPABILITY, from the oldest on."""
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return list(ARM_SETS if has_dot_products() else ARM_SETS[:1])
    if machine not in ("x86_64", "amd64"):
        return [PLAIN]
    import torch  # takes a second, which `import pocketlm` should not

    flags = cpu_flags()
    has = {
        "sse2": True,
        "avx2": torch.cpu._is_avx2_supported(),
        "avx_vnni": "avx_vnni" in flags,
        "avx512": torch.cpu._is_avx512_supported(),
        "avx512_vnni": torch.cpu._is_vnni_supported(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
    }
    levels = ["default", "avx2", "avx512"]
    limit = os.environ.get("ATEN_CPU_CAPABILITY", levels[-1])
    within = levels[: levels.index(limit) + 1] if limit in levels else levels
    return [isa for isa in X86_SETS if has[isa.name] and isa.torch in within]


def has_dot_products() -> bool:
    """Return whether an ARM CPU multiplies bytes four at a time; all of Apple's do."""
    return platform.system() == "Darwin" or "asimddp" in cpu_flags()


def cpu_flags() -> set[str]:
    """Return the flags of Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.is_file() else set()


def multiplies_bfloat16(device_type: str) -> bool:
    """Return whether a device multiplies bfloat16 in hardware; false on MPS, where it is no faster.

    Elsewhere bfloat16 is emulated: on a CPU, up to a hundred times slower than float32.
    """
    import torch

    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device_type == "cpu" and instruction_set().multiplies_bfloat16
