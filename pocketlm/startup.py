"""The start of a command: imports, the standard streams, and the signals that ask it to stop."""

import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal


@contextmanager
def fast_imports() -> Iterator[None]:
    """Import without the garbage collector, which then leaves what was imported alone.

    `import torch` makes hundreds of thousands of objects that live as long as the process. Looking
    for garbage among them takes a fifth of the time of the imports, and again 0.2 s now and then.
    Ctrl-C ends the command with status 130 and no traceback.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


# Lightning and Slurm set some of these in each process of a run; unset means a single process.
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Return True in the only process of a run, or in the first of several."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may number machines unlike Slurm
        return os.environ.get("RANK", "0") == "0"
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


# Ctrl-C, kill, a closed terminal, the warnings of batch systems, and the limit of processor time;
# Windows has two of them. SIGQUIT (Ctrl-\) and SIGKILL end the process at once, as everywhere.
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
    if hasattr(signal, name)
]


class StopSignals:
    """The one handler of the signals that ask a run to stop, from its first line to its last.

    What a signal does depends on the phase:

        importing   end at once; nothing has begun
        preparing   SystemExit(128 + number), so that unfinished files are removed
        training    only remembered in `received`: the loop saves the step and stops
        finished    nothing; the process is about to end, and its work is done

    In training, the second SIGINT or SIGTERM ends the process at once. Other signals do not, since
    a closed terminal sends SIGHUP twice, and a batch system SIGTERM after its warning.
    """

    def __init__(self) -> None:
        self.phase: Literal["importing", "preparing", "training", "finished"] = "importing"
        self.received = 0  # the number of the first signal
        self.urgent = 0  # how many of SIGINT and SIGTERM
        self.process = os.getpid()

    def listen(self) -> dict[int, Any]:
        """Install the handler; return the handlers that it replaces. A SIGHUP under nohup stays."""
        self.process = os.getpid()
        previous = {}
        for number in STOP_SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if not (ignored and number == getattr(signal, "SIGHUP", None)):
                previous[number] = signal.signal(number, self._handle)
        return previous

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the command works, in the phase `preparing` unless it says otherwise."""
        previous = self.listen()
        early, self.received, self.urgent = self.received, 0, 0
        self.phase = "preparing"
        try:
            if early:
                self.receive(early)
            yield
        finally:
            self.phase = "finished"
            self.received = self.urgent = 0  # of this run; tests make several in a process
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        self.receive(number)

    def receive(self, number: int) -> None:
        """Do what a signal does in this phase."""
        if os.getpid() != self.process:  # a worker process: the run itself stops it
            if self.phase != "training":
                os._exit(128 + number)
            return
        first, self.received = not self.received, self.received or number
        self.urgent += number in (signal.SIGINT, signal.SIGTERM)
        if self.phase == "training":
            if self.urgent > 1:
                os._exit(128 + number)
            if first:
                _write_line("\nstopping after this step; a second Ctrl-C or SIGTERM stops at once")
        elif self.phase == "preparing":
            if not first:
                os._exit(128 + number)
            _write_line(f"\nstopped by {_name(number)} before the first step; nothing was trained")
            raise SystemExit(128 + number)
        elif self.phase == "importing" and number != getattr(signal, "SIGUSR1", None):
            _write_line(f"stopped by {_name(number)}")
            os._exit(128 + number)  # an exception might be caught by what is being imported


stop_signals = StopSignals()


def _name(number: int) -> str:
    return signal.Signals(number).name


def _write_line(text: str) -> None:
    """Write to stderr from a signal handler, where sys.stderr may be in use.

    A launcher sends a signal to every process of a run, of which the first one speaks.
    """
    if is_first_process():
        with suppress(OSError):
            os.write(2, text.encode() + b"\n")


def open_closed_streams() -> None:
    """Open /dev/null where a standard stream is closed, as in `2>&-`.

    The next file opened would get the number of the closed stream, and what is meant for stderr.
    """
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(null)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  # until the exit
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


class LossyStderr(io.FileIO):
    """stderr that never fails: text that cannot be written, for example to a full disk, is dropped.

    A reader that has gone, as in `| head`, and a terminal that is gone ask the run to stop.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
                gone = "SIGPIPE" if error.errno == errno.EPIPE else "SIGHUP"
                stop_signals.receive(getattr(signal, gone, signal.SIGTERM))
            return len(data)


def begin_run() -> None:
    """Install the stop signals and the lossy stderr of a training run, before its long imports."""
    stop_signals.listen()
    open_closed_streams()
    raw = LossyStderr(sys.stderr.fileno(), "w", closefd=False)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(raw), "utf-8", errors="replace", line_buffering=True
    )
