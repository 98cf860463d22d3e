"""What the hardware gives: the rate of a matmul, memory in use."""

import ctypes
import platform
import time
from functools import cache

import psutil
import torch


def keep_freed_memory() -> None:
    """Let glibc keep what is freed instead of giving it back to the kernel, which would clear it again at every step.

    A step over 50,257 entries frees and takes hundreds of megabytes; the page faults were half of its time on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
        never = -1
        for option, value in [
            (M_MMAP_THRESHOLD, 2**30),
            (M_TRIM_THRESHOLD, never),
            (M_TOP_PAD, 2**26),
        ]:
            libc.mallopt(option, value)


@cache
def matmul_rate(accelerator: str, precision: str, size: int = 1024) -> float:
    """Measured floating-point operations a second of one square matmul, the best of five."""
    dtype = (
        torch.float32
        if precision == "32-true"
        else torch.float16
        if precision == "16-mixed"
        else torch.bfloat16
    )
    a = torch.zeros(size, size, dtype=dtype, device=accelerator)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def memory_in_use(accelerator: str) -> float:
    """Megabytes this process holds: on the GPU at its peak, else resident now."""
    if accelerator == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if accelerator == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def device_name(accelerator: str) -> str:
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        if accelerator == "cpu"
        else platform.machine()
    )
