"""Input files: which files a path names, what each one holds, and how it is opened."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import IO, Any

from pocketlm.errors import UserError

FILE_KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".bin": "tokens",
}

COMPRESSIONS = (".gz", ".zst")

FIRST_LINE_BYTES = 2**20  # a longer first line is read up to here


def find_files(path: str) -> list[Path]:
    """Return the file, the files of a folder, or the files that match a pattern, sorted by name.

    Of a folder and its subfolders, hidden files and files of unknown kinds are left out. Raises
    UserError if there is no file, or if one of them cannot be read.
    """
    location = Path(path)
    if location.is_file():
        files = [location]
    elif location.is_dir():
        files = files_in_folder(location)
        if not files:
            kinds = ", ".join(FILE_KINDS)
            raise UserError(
                f"the folder {path} holds no file that ends in {kinds} (or these with .gz or .zst)"
            )
    else:
        files = [Path(file) for file in glob(path, recursive=True) if Path(file).is_file()]
        if not files:
            raise UserError(f"{path} is not a file, a folder or a pattern that matches a file")
    check_files(path, files)
    return sorted(files, key=Path.as_posix)


def files_in_folder(folder: Path) -> list[Path]:
    """Return the files of known kinds in a folder and its subfolders, except hidden ones."""
    files = []
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and suffix_of(file) in FILE_KINDS and file.is_file():
            files.append(file)
    return files


def check_files(path: str, files: list[Path]) -> None:
    """Raise UserError for a file that cannot be read, or if text and token files are mixed."""
    for file in files:
        if suffix_of(file) == ".json":
            raise UserError(
                f"{file} is one JSON value, which would have to be read whole; "
                "write one object per line, as .jsonl"
            )
        compression = compression_of(file)
        if compression and kind_of(file) in ("parquet", "tokens"):
            raise UserError(
                f"{file} needs random access, which {compression} does not allow; decompress it"
            )
    if len({kind_of(file) == "tokens" for file in files}) == 2:
        raise UserError(
            f"{path} holds both text and token files (.bin); "
            f"name the files to use, for example {path}/*.txt"
        )


def compression_of(file: Path) -> str | None:
    """Return the suffix that says how a file is compressed, or None."""
    suffix = file.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def suffix_of(file: Path) -> str:
    """Return the suffix of a file's name in lower case, without that of its compression."""
    name = file.with_suffix("") if compression_of(file) else file
    return name.suffix.lower()


def kind_of(file: Path) -> str:
    """Return what a file holds, by the suffix of its name; text if the suffix is unknown."""
    return FILE_KINDS.get(suffix_of(file), "text")


@contextmanager
def open_file(file: Path) -> Iterator[tuple[IO[bytes], Any]]:
    """Open a file as (raw file, decompressed content). Raises UserError if it cannot be read."""
    try:
        with file.open("rb") as raw:
            match compression_of(file):
                case ".gz":
                    yield raw, gzip.GzipFile(fileobj=raw)
                case ".zst":
                    import pyarrow as pa  # type: ignore[import-untyped]  # no stubs; takes 0.2 s

                    yield raw, pa.CompressedInputStream(pa.PythonFile(raw), "zstd")
                case _:
                    yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def first_line(file: Path) -> bytes:
    """Return the first line of a file, or its first FIRST_LINE_BYTES if the line is longer."""
    start = b""
    with open_file(file) as (_, content):
        while b"\n" not in start and len(start) < FIRST_LINE_BYTES:
            block = content.read(min(2**16, FIRST_LINE_BYTES - len(start)))
            if not block:
                break
            start += block
    return start.partition(b"\n")[0]
