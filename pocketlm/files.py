"""Files that are written completely or not at all, and file names expanded from patterns."""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketlm.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` once it has been written and fsynced.

    Raises UserError if the file cannot be written; `path` is then unchanged.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.unlink(missing_ok=True)
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's zip writer reports a full disk as a RuntimeError.
        reason = error.strerror if isinstance(error, OSError) else "the file is incomplete"
        free = f"{free_megabytes(path):,.0f} MB free"
        raise UserError(
            f"cannot write {path}: {reason or error}, with {free}; the file that was there is "
            "untouched. Make room or choose another folder, then run the same command again"
        ) from error
    finally:
        # Renaming a file onto another name of itself leaves both names, so this is not for
        # failures only.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder that gets the name `path`, and replaces what is there, once it is filled.

    Raises UserError if it cannot be written; `path` is then unchanged.
    """
    unfinished, replaced = (
        path.with_name(f".{path.name}.{os.getpid()}.{state}") for state in ("unfinished", "old")
    )
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.iterdir():
            with file.open("rb+") as written:
                os.fsync(written.fileno())
        if os.path.lexists(path):  # also a link to nothing
            os.replace(path, replaced)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        free = f"{free_megabytes(path):,.0f} MB free"
        raise UserError(
            f"cannot write {path}: {error.strerror or error}, with {free}; what was there is "
            "untouched. Make room or choose another folder, then run the same command again"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        remove(replaced)


def remove(path: Path) -> None:
    """Remove a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_megabytes(path: Path) -> float:
    """Return the free space of the disk on which `path` is, or will be."""
    existing = next(p for p in path.absolute().parents if p.exists())
    return shutil.disk_usage(existing).free / 1e6


def link_or_copy(source: Path, path: Path, *, copy: bool = False) -> None:
    """Give the finished file `source` the second name `path`, which is replaced atomically.

    With `copy`, and on file systems without hard links, `path` has its own content.
    """
    with atomic_write(path) as unfinished:
        if copy or not has_linked(source, unfinished):
            shutil.copyfile(source, unfinished)


def has_linked(source: Path, path: Path) -> bool:
    """Make a hard link. Return False if the file system has none."""
    try:
        os.link(source, path)
    except OSError:
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, on systems that can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def expand_globs(patterns: list[str], kind: str, describe_known: Callable[[], str]) -> list[str]:
    """Return the files that match the patterns, each once, in order.

    kind: what the files are, for the error message. describe_known: returns a sentence that names
    the files of that kind. Raises UserError if a pattern matches no file.
    """
    paths: dict[str, None] = {}
    for pattern in patterns:
        matching = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
        if not matching:
            raise UserError(f"no {kind} matches {pattern!r}; {describe_known()}")
        paths |= dict.fromkeys(matching)
    return list(paths)
