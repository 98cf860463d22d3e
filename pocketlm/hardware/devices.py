"""Choice of the device, the precision and torch.compile, each with a reason for the plan.

`choose_hardware` decides device and precision from the config and the machine; `with_compile`
decides on torch.compile once the length of the run is known.
"""

import os
import shutil
from dataclasses import dataclass, replace

import torch

from model import MPS_INNER_LIMIT, ModelConfig
from pocketlm.config.sections import HardwareConfig
from pocketlm.errors import UserError
from pocketlm.instruction_sets import instruction_set, multiplies_bfloat16

COMPILE_SECONDS = 25  # longest first compilation measured; 4 s when torch's cache still has it
COMPILE_SAVES = 0.2  # share of the time outside the head; measured on a CPU: 0.13 to 0.27


@dataclass(frozen=True)
class Hardware:
    """The choices for a run."""

    accelerator: str  # cpu, mps or cuda
    precision: str  # 32-true, bf16-mixed or 16-mixed
    compile: bool
    reasons: dict[str, str]  # by choice: accelerator, precision, compile, strategy
    strategy: str = "single"  # single, ddp or fsdp


def available_accelerators() -> list[str]:
    """Return the device types of this machine, best first."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names.insert(0, "cuda")
    if torch.backends.mps.is_available():
        names.insert(0, "mps")
    return names


def choose_accelerator(requested: str) -> tuple[str, str]:
    """Return the device type and the reason. Raises UserError if this machine lacks it."""
    available = available_accelerators()
    if requested == "auto":
        best = "the best device of this machine"
        return available[0], best if len(available) > 1 else "no MPS and no CUDA device here"
    name = "cuda" if requested == "gpu" else requested
    if name not in available:
        raise UserError(
            f"hardware.accelerator is {requested!r}, and this machine has "
            f"{' and '.join(available)}; use one of them, or auto"
        )
    return name, "as configured"


def choose_precision(requested: str, accelerator: str) -> tuple[str, str]:
    """Return Lightning's name of the precision and the reason.

    Raises UserError if the accelerator cannot train in the requested precision.
    """
    if requested == "16-mixed" and accelerator != "cuda":
        raise UserError(
            f"training.precision 16-mixed is for CUDA; on {accelerator} it is wrong or slow: "
            "use 32-true or bf16-mixed"
        )
    native = multiplies_bfloat16(accelerator)
    if requested == "bf16-mixed" and accelerator == "cpu" and not native:
        found = instruction_set().name
        return requested, (
            f"as configured, but the CPU has {found}, which does not multiply bfloat16: "
            "32-true is up to a hundred times faster"
        )
    if requested != "auto":
        return requested, "as configured"
    if accelerator == "mps":
        return "32-true", "half precision is not faster on MPS, and its kernels have been wrong"
    if accelerator == "cuda":
        if native:
            return "bf16-mixed", "the GPU has bfloat16"
        return "16-mixed", "the GPU has no bfloat16"
    found = instruction_set().name
    if native:
        return (
            "bf16-mixed",
            f"the CPU has {found}, which multiplies bfloat16 twice as fast; attention and sums "
            "stay in float32",
        )
    return "32-true", f"the CPU has {found}, which does not multiply bfloat16"


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which torch.compile calls."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang", "cl"]
    return any(shutil.which(name) for name in names if name)


def choose_compile(requested: str, accelerator: str, seconds: float) -> tuple[bool, str]:
    """Return whether to torch.compile, and the reason.

    `seconds` is the estimated part of the run that compiling shortens; see `compilable_seconds`.
    """
    saved = seconds * COMPILE_SAVES
    if requested == "off":
        return False, "as configured"
    if accelerator == "mps":
        return False, "torch.compile for MPS is a prototype"
    if requested == "auto" and accelerator == "cpu" and saved < 2 * COMPILE_SECONDS:
        return (
            False,
            f"it would save about {saved:.0f} s of this run and take up to {COMPILE_SECONDS} s; "
            "set hardware.compile=on to try it",
        )
    if not has_compiler():
        return False, "there is no C++ compiler on the PATH, which torch.compile needs"
    if requested == "on":
        return True, "as configured"
    return True, f"saves about {saved / 60:.0f} minutes; takes up to {COMPILE_SECONDS} s first"


def check_matmul_sizes(accelerator: str, tokens: int) -> None:
    """Raise UserError if a forward pass on MPS has too many tokens.

    The matmul of a weight's gradient sums over the tokens.
    """
    if accelerator == "mps" and tokens >= MPS_INNER_LIMIT:
        raise UserError(
            f"training.micro_batch_size x training.seq_len is {tokens:,}; on MPS sums of "
            f"{MPS_INNER_LIMIT:,} terms or more have been silently wrong: "
            "take a smaller micro_batch_size and a larger grad_accum_steps"
        )


def check_recomputation(accelerator: str, model: ModelConfig) -> None:
    """Raise UserError for dropout with gradient checkpointing on MPS.

    On MPS, torch draws other dropout masks when it recomputes a block.
    """
    if accelerator == "mps" and model.gradient_checkpointing and model.dropout:
        raise UserError(
            f"model.gradient_checkpointing with model.dropout {model.dropout} has wrong gradients "
            "on MPS, where the backward pass draws other dropout masks: "
            "set one of them to false or 0"
        )


def choose_strategy(config: HardwareConfig, accelerator: str) -> tuple[str, str]:
    """Return single, ddp or fsdp, and the reason.

    Raises UserError for devices that this machine lacks, or a strategy that MPS does not have.
    """
    counts = {"cuda": torch.cuda.device_count(), "mps": 1}  # on a CPU, each one is a process
    count = counts.get(accelerator, config.devices)
    if config.devices > count:
        raise UserError(
            f"hardware.devices is {config.devices}, and this machine has {count} of {accelerator}"
        )
    if accelerator == "mps" and (config.strategy != "auto" or config.num_nodes > 1):
        key = "strategy" if config.strategy != "auto" else "num_nodes"
        raise UserError(
            f"hardware.{key} is {getattr(config, key)}, and MPS trains on one device only: "
            "remove it, or take hardware.accelerator=cpu"
        )
    if config.strategy != "auto":
        return config.strategy, "as configured"
    if config.world_size == 1:
        return "single", "one device"
    return "ddp", "each device has the whole model"


def choose_hardware(config: HardwareConfig, precision: str) -> Hardware:
    """Return the device, precision and strategy; `with_compile` decides the rest."""
    accelerator, accelerator_reason = choose_accelerator(config.accelerator)
    precision, precision_reason = choose_precision(precision, accelerator)
    strategy, strategy_reason = choose_strategy(config, accelerator)
    if (strategy, precision) == ("fsdp", "16-mixed"):
        raise UserError(
            "training.precision 16-mixed scales the loss, which hardware.strategy=fsdp does not do "
            "here; use 32-true or bf16-mixed, or hardware.strategy=ddp"
        )
    reasons = {
        "accelerator": accelerator_reason,
        "precision": precision_reason,
        "strategy": strategy_reason,
    }
    return Hardware(accelerator, precision, False, reasons, strategy)


def with_compile(hardware: Hardware, requested: str, seconds: float) -> Hardware:
    """Return the hardware with the choice of `choose_compile`; what FSDP puts together is eager."""
    if hardware.strategy == "fsdp":
        compiles, reason = False, "the blocks of hardware.strategy=fsdp are not compiled"
    else:
        compiles, reason = choose_compile(requested, hardware.accelerator, seconds)
    return replace(hardware, compile=compiles, reasons=hardware.reasons | {"compile": reason})
