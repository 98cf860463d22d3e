"""A run of train.py with a clock on each part of a step.

`python clocked.py OUT.json --config ...` runs in a process of its own: it replaces methods by timed
ones, trains, and writes the times to OUT.json.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import train
from benchmarks.measure import private_memory
from pocketlm.data import samplers
from pocketlm.training.module import StepCallback

parts: dict[str, list[float]] = {
    name: [] for name in ("data", "forward", "backward", "clip", "optimizer", "logging")
}
begins: list[float] = []  # time.time() at the start of each step
megabytes: list[float] = []  # private memory, from the first step to the verdict


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(owner: type, name: str, part: str) -> None:
    """Record how long each call of a method takes."""
    plain = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            synchronize()
            parts[part].append(time.perf_counter() - begin)

    setattr(owner, name, clocked)


def clock_batches() -> None:
    """Record when each training batch is requested and how long it takes."""
    plain = samplers.ResumableLoader.__iter__

    def clocked(self: samplers.ResumableLoader) -> Any:
        batches = plain(self)
        training = not isinstance(self.batch_sampler, samplers.ValidationBatchSampler)
        while True:
            now, begin = time.time(), time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if training:
                begins.append(now)
                parts["data"].append(time.perf_counter() - begin)
            yield batch

    samplers.ResumableLoader.__iter__ = clocked


def clock_optimizer() -> None:
    """Record the optimizer's step without its closure (forward, backward, clip)."""
    plain = train.LitTransformer.configure_optimizers

    def configure_optimizers(self: train.LitTransformer) -> torch.optim.Optimizer:
        optimizer = plain(self)
        step = optimizer.step

        def clocked(closure: Any) -> None:
            inside = 0.0

            def clocked_closure() -> Any:
                nonlocal inside
                begin = time.perf_counter()
                loss = closure()
                inside = time.perf_counter() - begin
                return loss

            begin = time.perf_counter()
            step(clocked_closure)
            synchronize()
            parts["optimizer"].append(time.perf_counter() - begin - inside)

        optimizer.step = clocked
        return optimizer

    train.LitTransformer.configure_optimizers = configure_optimizers


def watch_memory() -> None:
    """Sample memory until the verdict, which counts baselines and draws a picture."""
    over = threading.Event()
    process = psutil.Process()
    verdict = train.print_verdict

    def print_verdict(*args: Any) -> Path:
        over.set()
        # A run may end before its first sample.
        megabytes.append(private_memory(process) / 1e6)
        return verdict(*args)

    def watch() -> None:
        while not over.wait(0.5):
            if begins:
                megabytes.append(private_memory(process) / 1e6)

    train.print_verdict = print_verdict
    threading.Thread(target=watch, daemon=True).start()


def main(out: str, arguments: list[str]) -> int:
    """Train with clocks and write the times."""
    imports = private_memory(psutil.Process()) / 1e6
    watch_memory()
    clock_batches()
    clock_optimizer()
    clock(train.LitTransformer, "training_step", "forward")
    clock(torch.Tensor, "backward", "backward")
    clock(train.LitTransformer, "configure_gradient_clipping", "clip")
    clock(StepCallback, "on_train_batch_end", "logging")
    status = train.main(arguments)
    times = {
        "parts": parts,
        "steps": [after - before for before, after in zip(begins, begins[1:], strict=False)],
        "first": begins[0] - psutil.Process().create_time(),
        "megabytes": max(megabytes),
        "imports": imports,
    }
    Path(out).write_text(json.dumps(times))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
