"""The functions of training.c, for tensors; where it cannot be compiled, torch does their work."""

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.native_build import NativeUnavailable, load_native

SOURCE = Path(__file__).with_name("training.c")
C_TYPES = {bool: c_int, int: c_int64, float: c_float}


@cache
def load() -> Any:
    """Return training.c as a library, or the reason why there is none, as a clause."""
    try:
        return load_native(SOURCE)
    except NativeUnavailable as reason:
        return str(reason)


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether training.c computes with tensors of this device and dtype.

    It does not while torch.compile traces: the compiler fuses torch's own operations.
    """
    if torch.compiler.is_compiling() or device.type != "cpu":
        return False
    return dtype in (torch.float32, torch.bfloat16) and not isinstance(load(), str)


def call(name: str, *arguments: Tensor | bool | int | float | None) -> None:
    """Call a function of training.c; its last parameter is the number of threads."""
    values = [
        c_void_p(x.data_ptr() if isinstance(x, Tensor) else None)
        if x is None or isinstance(x, Tensor)
        else C_TYPES[type(x)](x)
        for x in arguments
    ]
    getattr(load(), name)(*values, c_int(torch.get_num_threads()))


def cross_entropy_(logits: Tensor, vocab_size: int, targets: Tensor) -> Tensor:
    """Replace logits (N, V or more) by the gradient of their summed loss; return the losses (N).

    A target below 0 has no loss. Logits after the V-th get the gradient 0.
    """
    losses = torch.empty(len(logits))
    N, stride = logits.shape
    half = logits.dtype == torch.bfloat16
    call("cross_entropy", N, vocab_size, stride, half, logits, targets, losses)
    return losses
