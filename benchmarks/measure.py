"""Running a contender in a process of its own, and what it took."""

import os
import re
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from pocketlm.errors import UserError

ROOT = Path(__file__).parent.parent
OUT = Console(highlight=False, emoji=False, soft_wrap=True, width=200)


@dataclass(frozen=True)
class Measured:
    """One run of a process."""

    seconds: float
    work_seconds: float  # of them after its imports, by its own clock
    megabytes: float  # highest private memory
    tokens: int


def private_memory(process: psutil.Process) -> int:
    """Bytes of memory that no file stands behind, of a process and its children; where the system does not tell, all of it."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
            total += int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024
        except (OSError, TypeError):
            if one.is_running() and not Path("/proc").is_dir():
                total += one.memory_info().rss
    return total


@dataclass(frozen=True)
class Finished:
    """A process that has ended, or that has said enough."""

    seconds: float
    megabytes: float  # highest private memory
    stdout: str


def run_watched(
    command: list[str],
    folder: Path,
    environment: dict[str, str] | None = None,
    enough: tuple[str, int] | None = None,
    every: float = 1.0,
) -> Finished:
    """Run a command; `enough` is a pattern, and the count of output lines that hold it after which the process is ended.

    Its memory is looked at `every` so many seconds. A look takes 5 ms of a core, for which a program on all cores may wait.
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
        watcher.join()
        if process.returncode and left != 0:
            stderr.seek(0)
            raise UserError(
                f"{' '.join(command)[:200]} ended with status {process.returncode}: {stderr.read().strip()[-400:]}"
            )
    return Finished(seconds, highest / 1e6, "".join(lines))


def measure(
    command: list[str], folder: Path, environment: dict[str, str] | None = None
) -> Measured:
    """Run a command that prints, as its last line, `<seconds after the imports> <tokens>`."""
    done = run_watched(command, folder, environment, every=0.05)
    work, tokens = done.stdout.strip().splitlines()[-1].split()
    return Measured(done.seconds, float(work), done.megabytes, int(tokens))


def commit_of(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "of no known commit"
