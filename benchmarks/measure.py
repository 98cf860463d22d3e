"""Running a contender in a process of its own, and measuring its time and memory."""

import os
import platform
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from pocketlm.errors import UserError
from pocketlm.instruction_sets import instruction_set

ROOT = Path(__file__).parent.parent
OUT = Console(highlight=False, emoji=False, soft_wrap=True, width=200)


@dataclass(frozen=True)
class Measured:
    """One run of a contender."""

    seconds: float
    work_seconds: float  # the part of it after the imports, by the process's own clock
    megabytes: float  # highest private memory
    tokens: int


@dataclass(frozen=True)
class Finished:
    """A process that has ended, or that was ended after enough output."""

    seconds: float
    megabytes: float  # highest private memory
    stdout: str


def private_memory(process: psutil.Process) -> int:
    """Return the bytes of anonymous memory of a process and its children.

    Where the system does not report it (outside Linux), return all resident memory.
    """
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
            total += int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
        except (OSError, TypeError):
            if one.is_running() and not Path("/proc").is_dir():
                total += one.memory_info().rss
    return total


@contextmanager
def watch_memory(process: subprocess.Popen, every: float):
    """Sample the memory of a process every so many seconds; yield a function that returns the peak.

    A sample takes 5 ms of a core, which delays a program that uses all cores.
    """
    highest, watched = 0, psutil.Process(process.pid)

    def watch() -> None:
        nonlocal highest
        while process.poll() is None:
            try:
                highest = max(highest, private_memory(watched))
            except psutil.NoSuchProcess:
                return
            time.sleep(every)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest
    finally:
        watcher.join()


def run_watched(
    command: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    enough: tuple[str, int] | None = None,
    every: float = 1.0,
) -> Finished:
    """Run a command and sample its memory every `every` seconds.

    `enough` is a pattern and a count: the process is ended after so many matching output lines.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        with watch_memory(process, every) as highest:
            lines, left = [], enough[1] if enough else -1
            for line in process.stdout:
                lines.append(line)
                left -= bool(enough and re.search(enough[0], line))
                if left == 0:
                    process.kill()
                    break
            process.wait()
            process.stdout.close()
            seconds = time.perf_counter() - begin
        if process.returncode and left != 0:
            stderr.seek(0)
            raise UserError(
                f"{' '.join(command)[:200]} ended with status {process.returncode}: "
                f"{stderr.read().strip()[-400:]}"
            )
    return Finished(seconds, highest() / 1e6, "".join(lines))


def measure(
    command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> Measured:
    """Run a command whose last line is `<seconds after the imports> <tokens>`."""
    finished = run_watched(command, folder, environment, every=0.05)
    work, tokens = finished.stdout.strip().splitlines()[-1].split()
    return Measured(finished.seconds, float(work), finished.megabytes, int(tokens))


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Return the seconds that a call takes, and its result."""
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def absolute_path(path: str) -> str:
    """Return an absolute path, or pattern, with the user's home folder for `~`."""
    return os.path.abspath(os.path.expanduser(path))


def commit_of(checkout: Path) -> str:
    """Return the short commit of a checkout."""
    shown = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return shown.stdout.strip() or "of no known commit"


def parse_peers(arguments: list[str]) -> dict[str, str]:
    """Return {name: absolute path} of `--peer NAME=PATH`; an empty path if there is none."""
    peers = dict(argument.partition("=")[::2] for argument in arguments)
    return {name: absolute_path(path) if path else "" for name, path in peers.items()}


def machine() -> str:
    """Describe the system, the cores and the instruction set that all contenders keep to."""
    return f"{platform.platform()}, {os.cpu_count()} cores, {instruction_set().name}"
