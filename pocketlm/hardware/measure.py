"""Measurements of the hardware: the rate of a matmul, the memory in use, the device's name."""

import ctypes
import platform
import time
from functools import cache

import psutil  # type: ignore[import-untyped]  # ships no types
import torch

from pocketlm.instruction_sets import instruction_set


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the kernel.

    The kernel would clear it again at every step. A step over a vocabulary of 50,257 frees and
    takes hundreds of megabytes; the page faults were half of its time on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
        never = -1
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, never)
        libc.mallopt(M_TOP_PAD, 2**26)


@cache
def matmul_rate(accelerator: str, precision: str, size: int = 1024) -> float:
    """Measure the floating-point operations per second of a square matmul, the best of six."""
    dtypes = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    a = torch.zeros(size, size, dtype=dtypes[precision], device=accelerator)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def memory_in_use(accelerator: str) -> float:
    """Return the megabytes of this process: the peak on CUDA, else the current value."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if accelerator == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    resident: int = psutil.Process().memory_info().rss
    return resident / 1e6


def device_name(accelerator: str) -> str:
    """Return the name of the device, for the plan; of a CPU also what it computes with."""
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    if accelerator == "mps":
        return platform.machine()
    processor = platform.processor() or platform.machine()
    return f"{processor}, {instruction_set().name}, {torch.get_num_threads()} threads"
