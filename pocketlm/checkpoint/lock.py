"""The lock of a run: one process at a time trains in its folders."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from pocketlm.errors import UserError

LOCKS = Path(".locks")  # beside checkpoints/ and logs/, which may be removed under a run


@contextmanager
def run_lock(checkpoints: Path) -> Iterator[None]:
    """Keep other runs out of a checkpoint folder. Raises UserError, naming the process, if locked.

    There are two locks. The one in LOCKS stays when the folder is removed or renamed. The one in
    the folder also holds where the folder has two paths, such as a symbolic link.
    """
    files = [checkpoints / ".lock"]
    if os.access(os.curdir, os.W_OK):
        LOCKS.mkdir(exist_ok=True)
        files.insert(0, LOCKS / f"{'-'.join(checkpoints.parts)}.lock")
    with ExitStack() as locks:
        for file in files:
            try:
                locks.enter_context(FileLock(file).acquire(timeout=0))
            except Timeout:
                raise UserError(
                    f"{read_holder(file)} is training in {checkpoints}; wait until it ends, stop "
                    "it, or give this run a name: run.name=NAME"
                ) from None
        for file in files:
            with suppress(OSError):  # of use in a message only
                holder_file(file).write_text(
                    f"process {os.getpid()} on {socket.gethostname()}, "
                    f"since {time.strftime('%Y-%m-%d %H:%M:%S')},"
                )
        yield


def holder_file(lock: Path) -> Path:
    return lock.with_suffix(".holder")


def read_holder(lock: Path) -> str:
    """Return who has the lock, for a message."""
    try:
        return holder_file(lock).read_text()
    except OSError:
        return "another process"
