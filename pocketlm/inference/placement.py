"""Placement of a model: its device and the data type of its weights."""

import torch

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.errors import UserError
from pocketlm.hardware.devices import choose_accelerator
from pocketlm.hardware.measure import keep_freed_memory
from pocketlm.hardware.mps_check import check_mps
from pocketlm.inference.native import native_unavailable_reason
from pocketlm.instruction_sets import instruction_set, multiplies_bfloat16
from pocketlm.model.quantization import QUANTIZED_DTYPES, quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def move_to_device(checkpoint: Checkpoint, device: str, dtype: str | None) -> str:
    """Move the model to `device` and `dtype`, quantising it on request.

    `dtype` is by default that of a quantised checkpoint, else float32. Returns a description for
    the log. Raises UserError for an unsupported combination.
    """
    accelerator, _ = choose_accelerator(device)
    keep_freed_memory()
    dtype = dtype or checkpoint.quantized or "float32"
    if checkpoint.quantized not in (None, dtype):
        raise UserError(
            f"--dtype {dtype}: {checkpoint.path} is {checkpoint.quantized} already; "
            "leave --dtype out"
        )
    if dtype == "float16" and accelerator == "cpu":
        raise UserError(
            "--dtype float16 is 27 times slower than float32 on a CPU; use bfloat16 or float32"
        )
    if dtype in QUANTIZED_DTYPES and not checkpoint.quantized:
        quantize(checkpoint.model, dtype)
    activations = DTYPES.get(dtype) or quantized_activations(accelerator)
    check_mps(accelerator, activations, checkpoint.config.model)
    checkpoint.model.to(device=accelerator, dtype=activations)
    reason = native_unavailable_reason(checkpoint.model) if accelerator == "cpu" else ""
    description = f"{dtype} on {accelerator}"
    if accelerator == "cpu":
        description += f" ({instruction_set().name})"
    if reason:
        description += f", decoding in torch, several times slower: {reason}"
    return description


def quantized_activations(accelerator: str) -> torch.dtype:
    """Return the dtype of activations over quantised weights: bfloat16 where it is native."""
    return torch.bfloat16 if multiplies_bfloat16(accelerator) else torch.float32
