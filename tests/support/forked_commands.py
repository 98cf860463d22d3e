"""Commands in processes of their own, without importing torch for each of them.

A server process imports what the commands import, which takes seconds, and then forks a child for
each command, which takes milliseconds. The server itself never trains, so that it has no threads,
whose locks a fork would copy. A child is a new process in every respect that a run can notice:
working directory, environment, arguments, output files, signal handlers, exit status. Only what a
module reads of the environment when it is imported is the server's.

The server reads a JSON object a line from its standard input, and answers with the exit status. An
empty line ends it.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOR_COMMANDS = ("data", "evaluate_checkpoints", "infer", "tests.support.training")


class ForkedCommands:
    """The server process, as its client sees it. It imports `modules`."""

    def __init__(self, threads: int, modules: Sequence[str] = FOR_COMMANDS):
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked_commands", *modules],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        *arguments: str,
        program: str = "train.py",
        interrupt: tuple[int, int] | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> subprocess.CompletedProcess:
        """Run `program arguments` in the working directory; `interrupt` is a step and a signal."""
        command = {
            "folder": os.getcwd(),
            "program": str(ROOT / program),
            "arguments": arguments,
            "interrupt": interrupt,
            "environment": dict(environment),
        }
        self.server.stdin.write(json.dumps(command) + "\n")
        self.server.stdin.flush()
        status = json.loads(self.server.stdout.readline())
        output = [Path(name).read_text() for name in ("stdout.txt", "stderr.txt")]
        return subprocess.CompletedProcess(arguments, status, *output)

    def close(self) -> None:
        """End the server by an empty line: a data worker forked meanwhile keeps the pipe open."""
        self.server.stdin.write("\n")
        self.server.stdin.close()
        self.server.wait()


def serve(modules: list[str]) -> None:
    """Answer commands until an empty line, or the end of the standard input."""
    for name in modules:
        import_module(name)
    gc.freeze()  # a collection in a child would copy every page of the server
    for line in sys.stdin:
        if not line.strip():
            return
        child = os.fork()
        if child == 0:
            run_command(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def run_command(
    folder: str,
    program: str,
    arguments: list[str],
    interrupt: list[int] | None,
    environment: dict[str, str],
) -> None:
    """Run a command in this child process, and exit."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [program, *arguments]
    status: int | str | None = 0
    try:
        with interruption(*interrupt) if interrupt else nullcontext():
            runpy.run_path(program, run_name="__main__")
    except SystemExit as exit:
        status = exit.code
    except BaseException:
        traceback.print_exc()
        status = 1
    leave(status)


def interruption(step: int, number: int) -> AbstractContextManager[None]:
    """Return the context whose run gets a signal after a step."""
    from tests.support.training import signal_after  # imports train.py

    return signal_after(step, number)


def leave(status: int | str | None) -> None:
    """Exit as the interpreter does, without freeing every object, which copies its page first."""
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    serve(sys.argv[1:])
