"""Commands of train.py in processes of their own, without importing torch for each of them.

A server process imports train.py once, which takes seconds, and then forks a child for each
command, which takes milliseconds. The server itself never trains, so that it has no threads, whose
locks a fork would copy. A child is a new process in every respect that a run can notice: working
directory, arguments, output files, signal handlers, exit status.

The server reads a JSON object a line from its standard input, and answers with the exit status.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import train
from pocketlm.errors import run_main
from tests.support.training import signal_after

ROOT = Path(__file__).parents[2]


class ForkedCommands:
    """The server process, as its client sees it."""

    def __init__(self, threads: int):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_commands"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, *arguments: str, interrupt: tuple[int, int] | None = None
    ) -> subprocess.CompletedProcess:
        """Run `train.py arguments` in the working directory; `interrupt` is a step and a signal."""
        command = {"folder": os.getcwd(), "arguments": arguments, "interrupt": interrupt}
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        status = json.loads(self.server.stdout.readline())
        output = [Path(name).read_text() for name in ("stdout.txt", "stderr.txt")]
        return subprocess.CompletedProcess(arguments, status, *output)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()


def serve() -> None:
    """Answer commands until the standard input ends."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run_command(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def run_command(folder: str, arguments: list[str], interrupt: list[int] | None) -> None:
    """Run a command in this child process, and exit."""
    os.chdir(folder)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["train.py", *arguments]
    with signal_after(*interrupt) if interrupt else nullcontext():
        run_main(train.main)


if __name__ == "__main__":
    serve()
