"""Files written whole: a new file takes its name only when all of it is on the disk; and names expanded from patterns."""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketlm.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` only when all of it is on the disk.

    Raises UserError where the disk refuses; what stood at `path` is then untouched.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch's zip writer reports a full disk as a RuntimeError
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free / 1e6
        reason = (
            error.strerror or error if isinstance(error, OSError) else "it was not written whole"
        )
        raise UserError(
            f"cannot write the checkpoint {path}: {reason}, with {free:,.0f} MB free; what stood there is untouched. "
            "Make room or choose another folder, then run the same command again"
        ) from error
    finally:  # also where `path` is the same file already, which a rename leaves with both names
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Give the finished file `source` the second name `path`, replacing what had that name in one step."""
    with atomic_write(path) as unfinished:
        try:
            os.link(source, unfinished)
        except OSError:  # no hard links on this file system
            shutil.copyfile(source, unfinished)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system allows it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def expand_globs(patterns: list[str], what: str, known: Callable[[], str]) -> list[str]:
    """Files that match the patterns, each once, in order.

    `what` and `known` (a sentence that names those there are) are for the message.
    Raises UserError for a pattern that matches no file.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        matching = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not matching:
            raise UserError(f"no {what} matches {pattern!r}; {known()}")
        paths |= dict.fromkeys(matching)
    return list(paths)
