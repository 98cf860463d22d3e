"""Checks of a run's folders before its first step: writable, and with room for all its files."""

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from pocketlm.errors import UserError
from pocketlm.files import sync_folder

if sys.platform != "win32":
    import pwd
    import resource


def require_writable(folder: Path, use: str) -> None:
    """Create `folder`, and write, rename and remove a file in it.

    use: what the folder is for, in the message. Raises UserError with the path, the reason, and
    the owner if it is another user.
    """
    probe = folder / f".probe.{os.getpid()}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            os.replace(probe, probe.with_suffix(".renamed"))
            sync_folder(folder)
        finally:
            for leftover in (probe, probe.with_suffix(".renamed")):
                leftover.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {use} to {folder.absolute()}: {error.strerror or error}"
            f"{foreign_owner(folder)}; make it writable, or start in another folder"
        ) from None


def foreign_owner(folder: Path) -> str:
    """Return who owns the folder, or the nearest one above it, if that is not this user."""
    if sys.platform == "win32":
        return ""
    with suppress(OSError):
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        owner = existing.stat().st_uid
        if owner != os.getuid():
            return (
                f" ({existing} belongs to {user_name(owner)}, and you are {user_name(os.getuid())})"
            )
    return ""


def user_name(number: int) -> str:
    """Return the name of a user id."""
    if sys.platform == "win32":
        return str(number)
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def require_room(folder: Path, files: list[int], use: str) -> None:
    """Raise UserError if the disk of `folder` has no room for files of these bytes.

    The files that are there already are counted as room: the run replaces them.
    """
    needed, free = sum(files), shutil.disk_usage(folder).free
    held = {s.st_ino: s.st_size for s in (path.stat() for path in folder.glob("*.ckpt"))}
    if needed > free + sum(held.values()):
        raise UserError(
            f"{use} need {megabytes(needed)} in {folder.absolute()}, where "
            f"{megabytes(free)} are free"
            + (f" beside {megabytes(sum(held.values()))} of this run" if held else "")
            + "; make room, choose another folder, or lower training.keep_checkpoints"
        )
    limit = file_size_limit()
    if limit is not None and max(files) > limit:
        raise UserError(
            f"a file of {use} has {megabytes(max(files))}, and this process may write files of at "
            f"most {megabytes(limit)}; raise the limit: ulimit -f unlimited"
        )


def file_size_limit() -> int | None:
    """Return the most bytes that this process may write to a file, or None."""
    if sys.platform == "win32":
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.{0 if size >= 1e7 else 2}f} MB"
