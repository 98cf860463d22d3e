"""train.py with a clock on each part of a step: `python clocked.py OUT.json --config ...`, in a process of its own."""

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
from pocketlm.training import step_callback

parts: dict[str, list[float]] = {
    name: [] for name in ("data", "forward", "backward", "clip", "optimizer", "logging")
}
begins: list[float] = []  # of the steps, as time.time() tells it
megabytes: list[float] = []  # of private memory, from the first step to the verdict


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(owner: type, name: str, part: str) -> None:
    """Note how long each call of a method takes."""
    plain = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*args, **kwargs)
        finally:
            wait()
            parts[part].append(time.perf_counter() - begin)

    setattr(owner, name, clocked)


def clock_batches() -> None:
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
    """The optimizer's step without its closure, which is the forward and the backward pass and the clip."""
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
            wait()
            parts["optimizer"].append(time.perf_counter() - begin - inside)

        optimizer.step = clocked
        return optimizer

    train.LitTransformer.configure_optimizers = configure_optimizers


def watch_memory() -> None:
    """Until the verdict, which counts its baselines and draws its picture when training is over."""
    over = threading.Event()
    process = psutil.Process()
    verdict = train.print_verdict

    def print_verdict(*args: Any) -> None:
        over.set()
        megabytes.append(
            private_memory(process) / 1e6
        )  # of a run that was over before the first look
        verdict(*args)

    def watch() -> None:
        while not over.wait(0.5):
            if begins:
                megabytes.append(private_memory(process) / 1e6)

    train.print_verdict = print_verdict
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    watch_memory()
    clock_batches()
    clock_optimizer()
    clock(train.LitTransformer, "training_step", "forward")
    clock(torch.Tensor, "backward", "backward")
    clock(train.LitTransformer, "configure_gradient_clipping", "clip")
    clock(step_callback.StepCallback, "on_train_batch_end", "logging")
    status = train.main(sys.argv[2:])
    started = psutil.Process().create_time()
    seconds = [after - before for before, after in zip(begins, begins[1:], strict=False)]
    Path(sys.argv[1]).write_text(
        json.dumps(
            {
                "parts": parts,
                "steps": seconds,
                "first": begins[0] - started,
                "megabytes": max(megabytes),
            }
        )
    )
    sys.exit(status)
