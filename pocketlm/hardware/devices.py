"""What this machine has, and what follows: the device, the precision, whether to compile. Every choice has its reason."""

import os
import platform
import shutil
from dataclasses import dataclass, replace

import torch

from model import MPS_INNER_LIMIT, ModelConfig
from pocketlm.config.sections import HardwareConfig
from pocketlm.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """The choices for a run, each with the sentence that says why."""

    accelerator: str  # cpu, mps or cuda
    precision: str  # 32-true, bf16-mixed or 16-mixed
    compile: bool
    reasons: dict[str, str]


def available_accelerators() -> list[str]:
    """Best first."""
    return [
        name
        for name, there in [
            ("mps", torch.backends.mps.is_available()),
            ("cuda", torch.cuda.is_available()),
        ]
        if there
    ] + ["cpu"]


def choose_accelerator(asked: str) -> tuple[str, str]:
    """The device type and the reason. Raises UserError for one that is not there."""
    there = available_accelerators()
    if asked == "auto":
        return there[0], "the best there is here" if len(
            there
        ) > 1 else "no MPS and no CUDA device here"
    name = "cuda" if asked == "gpu" else asked
    if name not in there:
        raise UserError(
            f"hardware.accelerator is {asked!r}, and this machine has {' and '.join(there)}; use one of them, or auto"
        )
    return name, "as asked"


def choose_precision(asked: str, accelerator: str) -> tuple[str, str]:
    """Lightning's word for the precision and the reason. Raises UserError for a pair that cannot work."""
    if asked == "16-mixed" and accelerator != "cuda":
        raise UserError(
            f"training.precision 16-mixed is for CUDA; on {accelerator} it is wrong or slow: use 32-true or bf16-mixed"
        )
    if asked != "auto":
        return asked, "as asked"
    if accelerator == "cuda":
        return (
            ("bf16-mixed", "the GPU has bfloat16")
            if torch.cuda.is_bf16_supported(False)
            else ("16-mixed", "the GPU has no bfloat16")
        )
    if accelerator == "mps":
        return "32-true", "half precision is not faster on MPS, and its kernels have been wrong"
    if has_bfloat16_cpu():
        return (
            "bf16-mixed",
            "the CPU multiplies bfloat16 twice as fast; attention and sums stay in float32",
        )
    return "32-true", "the CPU has no bfloat16 instructions"


def has_bfloat16_cpu() -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX512_BF16 or AMX)."""
    return platform.machine() in ("x86_64", "AMD64") and torch.cpu._is_avx512_bf16_supported()


COMPILE_SECONDS = 25  # that compiling a step has taken here at most, the first time; 4 when its cache still had it


COMPILE_SAVES = 0.2  # of the time outside the head, measured on a CPU: 0.13 to 0.27


def choose_compile(asked: str, accelerator: str, seconds: float) -> tuple[bool, str]:
    """Whether to torch.compile, and the reason. `seconds` is what the run would take without, the head left out."""
    if asked == "off":
        return False, "as asked"
    if accelerator == "mps":
        return False, "torch.compile for MPS is a prototype"
    if asked == "auto" and accelerator == "cpu" and seconds * COMPILE_SAVES < 2 * COMPILE_SECONDS:
        return (
            False,
            f"it would save some {seconds * COMPILE_SAVES:.0f} s of this run and take up to {COMPILE_SECONDS}; hardware.compile=on to try",
        )
    compilers = (
        os.environ.get("CXX"),
        os.environ.get("CC"),
        "g++",
        "gcc",
        "clang++",
        "clang",
        "cl",
    )
    if not any(shutil.which(name) for name in compilers if name):
        return False, "there is no C++ compiler on the PATH, which torch.compile needs"
    return (
        True,
        "as asked"
        if asked == "on"
        else f"saves about {seconds * COMPILE_SAVES / 60:.0f} minutes; takes up to {COMPILE_SECONDS} s first",
    )


def check_matmul_sizes(accelerator: str, tokens: int) -> None:
    """Raise UserError for more tokens in a forward pass than a matmul on MPS sums rightly (in a weight's gradient)."""
    if accelerator == "mps" and tokens >= MPS_INNER_LIMIT:
        raise UserError(
            f"training.micro_batch_size x training.seq_len is {tokens:,}; on MPS sums of {MPS_INNER_LIMIT:,} terms or more have "
            "been silently wrong: take a smaller micro_batch_size and a larger grad_accum_steps"
        )


def check_recomputation(accelerator: str, model: ModelConfig) -> None:
    """Raise UserError for dropout in blocks that are recomputed on MPS: torch draws other masks there the second time."""
    if accelerator == "mps" and model.gradient_checkpointing and model.dropout:
        raise UserError(
            f"model.gradient_checkpointing with model.dropout {model.dropout} has wrong gradients on MPS, where the masks are drawn anew "
            "in the backward pass: set one of them to false or 0"
        )


def choose_hardware(config: HardwareConfig, precision: str) -> Hardware:
    """Device and precision; whether to compile is for `with_compile`, which has to know how long the run is."""
    accelerator, why_accelerator = choose_accelerator(config.accelerator)
    precision, why_precision = choose_precision(precision, accelerator)
    there = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": os.cpu_count() or 1}[accelerator]
    if config.devices > there:
        raise UserError(
            f"hardware.devices is {config.devices}, and this machine has {there} of {accelerator}"
        )
    return Hardware(
        accelerator, precision, False, {"accelerator": why_accelerator, "precision": why_precision}
    )


def with_compile(hardware: Hardware, asked: str, seconds: float) -> Hardware:
    compiles, why = choose_compile(asked, hardware.accelerator, seconds)
    return replace(hardware, compile=compiles, reasons=hardware.reasons | {"compile": why})
