"""A stand-in for train.py that takes milliseconds: the same arguments, outputs and endings.

Its loss has its minimum at the rate 1e-2 and falls with the step:
|log10(lr) + 2| + seed / 1000 + 1 / step. A step that a run takes is a line of trained.txt. With a
rate above 1 it ends as a run whose loss is not finite. If kill.txt has "NAME STEP", the run NAME
sends the signal KILL_SIGNAL to the process that started it after that step.
"""

import math
import os
import re
import signal
import sys
import time
from pathlib import Path

VAL_EVERY = 10


def main(arguments: list[str]) -> None:
    settings = dict(each.split("=", 1) for each in arguments if "=" in each)
    in_file = re.search(r"max_steps: (\d+)", Path(arguments[1]).read_text())
    name, steps = settings["run.name"], int(settings.get("training.max_steps", in_file[1]))
    rate, seed = float(settings["training.lr"]), int(settings["training.seed"])
    checkpoint, metrics = Path("checkpoints", name, "last"), Path("logs", name, "metrics.csv")
    for path in (checkpoint, metrics):
        path.parent.mkdir(parents=True, exist_ok=True)
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    if start == steps:
        raise ValueError(f"the run in {checkpoint.parent} is finished: {start} of {steps} steps")
    received = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    if not metrics.exists():
        metrics.write_text("step,val/loss,val/bpb\n")
    for step in range(start + 1, steps + 1):
        with Path("trained.txt").open("a") as file:
            file.write(f"{name} {step}\n")
        if rate > 1:
            raise ValueError(f"the training loss is not finite at step {step}")
        if step % VAL_EVERY == 0:
            loss = abs(math.log10(rate) + 2) + seed / 1000 + 1 / step
            with metrics.open("a") as file:
                file.write(f"{step},{loss},{loss / 2}\n")
        checkpoint.write_text(str(step))
        print(f"step {step}/{steps}", flush=True)
        if Path("kill.txt").exists() and Path("kill.txt").read_text() == f"{name} {step}":
            Path("kill.txt").unlink()
            parent = os.getppid()
            os.kill(parent, int(os.environ["KILL_SIGNAL"]))
            while not received and os.getppid() == parent:
                time.sleep(0.01)
            received = received or [signal.SIGPIPE]  # train.py finds its stderr closed
        if received and step < steps:
            sys.exit(128 + received[0])
    print(f"session {os.getsid(0)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}")
        sys.exit(2)
