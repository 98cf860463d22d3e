"""A program that saves a checkpoint again and again, each time killed one event later.

Events are the beginning and the end of every write, flush to the disk and rename. For each of them
it prints the sum of the weights that are then in x.ckpt: 0 for the old file, 3 for the new one.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint

PATH = Path("x.ckpt")
KIT = {"format": 1, "config": {}, "tokenizer": {}, "tokens": 0, "val_loss": None}
OLD = {"state_dict": {"w": torch.zeros(3)}, "global_step": 0, "kit": KIT}
NEW = {"state_dict": {"w": torch.ones(3)}, "global_step": 0, "kit": KIT}
torch_save = torch.save


class Killer:
    """Kills this process at its last event."""

    def __init__(self, last: int):
        self.last, self.events = last, 0

    def event(self) -> None:
        self.events += 1
        if self.events == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable) -> Callable:
        """Return `function` with an event before it and one after it."""

        def with_events(*args: Any, **kwargs: Any) -> Any:
            self.event()
            result = function(*args, **kwargs)
            self.event()
            return result

        return with_events


class SlowFile:
    """A file that writes every piece of data in two halves, with events around the first."""

    def __init__(self, file: Any, killer: Killer):
        self.file, self.killer = file, killer

    def write(self, data: Any) -> int:
        data = bytes(data)
        half = len(data) // 2
        self.killer.event()
        self.file.write(data[:half])
        self.file.flush()
        self.killer.event()
        return half + self.file.write(data[half:])

    def flush(self) -> None:
        self.file.flush()


def save_and_die(last: int) -> None:
    killer = Killer(last)
    os.fsync, os.replace = killer.around(os.fsync), killer.around(os.replace)
    torch.save = lambda state, file: torch_save(state, SlowFile(file, killer))
    save_checkpoint(NEW, PATH)
    os._exit(0)


def main() -> None:
    for last in range(1, 1000):
        for unfinished in Path().glob(".*"):
            unfinished.unlink()
        torch_save(OLD, PATH)
        child = os.fork()
        if child == 0:
            save_and_die(last)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(int(read_checkpoint(PATH)["state_dict"]["w"].sum()))
        if status != -signal.SIGKILL:
            break


if __name__ == "__main__":
    main()
