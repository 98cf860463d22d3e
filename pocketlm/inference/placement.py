"""A model on a device, in a dtype."""

import torch

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.errors import UserError
from pocketlm.hardware.devices import choose_accelerator, has_bfloat16_cpu
from pocketlm.hardware.measure import keep_freed_memory
from pocketlm.hardware.mps_check import check_mps
from pocketlm.inference.native import native_unavailable_reason
from pocketlm.model.quantization import QUANTIZED, quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def place(checkpoint: Checkpoint, device: str, dtype: str | None) -> str:
    """Put the model where `--device` and `--dtype` say; tell where that is. Raises UserError for a pair that cannot be."""
    accelerator, _ = choose_accelerator(device)
    keep_freed_memory()
    dtype = dtype or checkpoint.quantized or "float32"
    if checkpoint.quantized not in (None, dtype):
        raise UserError(
            f"--dtype {dtype}: {checkpoint.path} is {checkpoint.quantized} already; leave --dtype out"
        )
    if dtype == "float16" and accelerator == "cpu":
        raise UserError(
            "--dtype float16 is 27 times slower than float32 on a CPU; use bfloat16 or float32"
        )
    if dtype in QUANTIZED and not checkpoint.quantized:
        quantize(checkpoint.model, dtype)
    half = accelerator == "cuda" or accelerator == "cpu" and has_bfloat16_cpu()
    compute = DTYPES.get(dtype, torch.bfloat16 if half else torch.float32)
    check_mps(accelerator, compute, checkpoint.config.model)
    checkpoint.model.to(device=accelerator, dtype=compute)
    why = native_unavailable_reason(checkpoint.model) if accelerator == "cpu" else ""
    return (
        f"{dtype} on {accelerator}{why and f', every step by torch, several times slower: {why}'}"
    )
