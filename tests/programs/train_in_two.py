"""train.py, of which Lightning starts the second process as a fork of this one.

The fork is made before anything else and waits for Lightning's launcher, whose command and
environment it then takes. So the second process need not import torch and Lightning again.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from lightning.pytorch.strategies.launchers import subprocess_script


class WaitingProcess:
    """A fork of this process, with the methods of `subprocess.Popen` that Lightning calls."""

    def __init__(self) -> None:
        command, self.to_process = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.to_process)
            become(command)
        os.close(command)

    def start(
        self, command: list[str], env: dict[str, str], cwd: str | None = None
    ) -> "WaitingProcess":
        with open(self.to_process, "w") as pipe:
            json.dump([command, env], pipe)
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def become(pipe: int) -> None:
    """Wait for a command, and become its process; exit if the other process ends before."""
    with open(pipe) as file:
        text = file.read()
    if not text:
        raise SystemExit
    [_, *sys.argv], environment = json.loads(text)
    os.environ.clear()
    os.environ.update(environment)
    runpy.run_path(sys.argv[0], run_name="__main__")
    raise SystemExit


if __name__ == "__main__":
    sys.argv[0] = str(Path(__file__).parents[2] / "train.py")
    second = WaitingProcess()
    with patch.object(subprocess_script, "subprocess", SimpleNamespace(Popen=second.start)):
        runpy.run_path(sys.argv[0], run_name="__main__")
