"""One training run of a sweep: train.py in a process of its own, its losses, and how it ended.

The run's messages go through a pipe to a log file. When this process is killed, the pipe closes,
and the run saves its step and stops, as it does whenever the reader of its stderr has gone.
"""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from pocketlm.checkpoint.lock import run_lock
from pocketlm.checkpoint.runs import Run
from pocketlm.errors import UserError
from pocketlm.hardware.processes import print_note
from pocketlm.startup import STOP_SIGNALS
from pocketlm.training.metrics import read_rows

TRAIN = (sys.executable, str(Path(__file__).parents[2] / "train.py"))
FINISHED = "is finished: "  # in train.py's refusal to train a finished run again
NON_FINITE = "not finite"  # in train.py's message for a loss or gradient that is NaN or infinite
POLL_SECONDS = 1.0  # between looks at a run that another process is ending


@dataclass(frozen=True)
class Losses:
    """The validation losses of a run up to a step: nats per token, and bits per byte."""

    step: int
    best_loss: float
    final_loss: float
    best_bpb: float
    final_bpb: float


@dataclass(frozen=True)
class Ending:
    """The end of a run's process.

    losses: None if nothing was validated. problem: why the run failed; empty if it did not.
    stopped: the run was asked to stop, and resumes from there.
    """

    losses: Losses | None
    problem: str = ""
    stopped: bool = False


def read_losses(run: Run, step: int | None = None) -> Losses | None:
    """Return the losses up to `step`, or to the last validation; None if there is none."""
    rows = [row for row in read_rows(run.metrics_file)[0] if row.get("val/loss")]
    if step is not None:
        rows = [row for row in rows if int(row["step"]) <= step]
    if not rows:
        return None
    loss, bpb = ([float(row[column]) for row in rows] for column in ("val/loss", "val/bpb"))
    return Losses(int(rows[-1]["step"]), min(loss), loss[-1], min(bpb), bpb[-1])


def failure(log: Path, status: int) -> str:
    """Return why a process failed: its own message, or the signal or status that it ended with."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors and status == 2:
        return errors[-1].removeprefix("error: ")
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    last = lines[-1].strip() if lines else ""
    return f"exit status {status}: {last}" if last else f"exit status {status}"


# ---- the process ----


def train(arguments: Sequence[str], run: Run, log: Path, should_stop: Callable[[], bool]) -> Ending:
    """Run `train.py ARGUMENTS`, which begins or resumes `run`, and return how it ended.

    should_stop: asked after each line that the run prints; if True, the run saves its step and
    ends. A stop signal to this process does the same, and is passed on as SystemExit.
    """
    wait_for_release(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*TRAIN, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process, which passes one signal on
        )
        assert process.stdout is not None
        with process:
            try:
                stopped = copy_lines(process.stdout, file, process, should_stop)
            except BaseException:
                end_gracefully(process, file)
                raise
    return ending(run, log, process.returncode, stopped)


def copy_lines(
    lines: IO[str], file: IO[str], process: "subprocess.Popen[str]", should_stop: Callable[[], bool]
) -> bool:
    """Copy a run's output to its log until it ends; return whether it was asked to stop."""
    stopped = False
    for line in lines:
        file.write(line)
        file.flush()
        if not stopped and process.poll() is None and should_stop():
            process.terminate()
            stopped = True
    process.wait()
    return stopped


def end_gracefully(process: "subprocess.Popen[str]", file: IO[str]) -> None:
    """Ask a run to save its step and end, and wait for it; at a second signal, end it at once."""
    assert process.stdout is not None
    process.terminate()
    try:
        file.writelines(process.stdout)
    finally:
        if process.poll() is None:
            process.terminate()


def ending(run: Run, log: Path, status: int, stopped: bool) -> Ending:
    """Return how a run ended, by the status of its process."""
    asked = (128 + signal.SIGTERM, -signal.SIGTERM)
    if stopped and status in asked:
        return Ending(read_losses(run), stopped=True)
    problem = failure(log, status) if status else ""
    if FINISHED in problem:  # a killed sweep had trained it, and not recorded it
        problem = ""
    losses = read_losses(run)
    if not problem and losses is None:
        problem = f"{run.metrics_file} has no validation loss"
    if not problem and losses and not math.isfinite(losses.final_loss):
        problem = f"the validation loss is {NON_FINITE}"
    return Ending(losses, problem)


def wait_for_release(run: Run) -> None:
    """Wait until no process has the run's lock: one that a killed sweep left ends by itself."""
    said = False
    while run.checkpoints.exists():
        try:
            with run_lock(run.checkpoints):
                return
        except UserError as error:
            if not said:
                print_note(f"waiting: {str(error).partition(';')[0]}")
            said = True
            time.sleep(POLL_SECONDS)


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise SystemExit(128 + number) in this process at a stop signal, until the context ends."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    ignored = [number for number in STOP_SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    caught = [number for number in STOP_SIGNALS if number not in ignored]
    previous = {number: signal.signal(number, stop) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
