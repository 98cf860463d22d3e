"""Input files: which files a path names, what each one holds, and how it is opened."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import IO, Any

from pocketlm.corpus.encodings import SNIFFED_BYTES, detect_encoding
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

START_BYTES = 2**20  # of a file, in which its first lines are looked for

HIDDEN, OTHER_KINDS = "hidden files", "files of other kinds"
FOLDERS = "folders that are links or match the pattern"


@dataclass(frozen=True)
class InputFiles:
    """The files that a path names, sorted by name, and those beside them that are not read."""

    path: str
    files: list[Path] = field(default_factory=list)
    not_read: dict[str, list[Path]] = field(default_factory=dict)  # by the reason

    def leave_out(self, reason: str, file: Path) -> None:
        """Note that a file or folder is not read."""
        self.not_read.setdefault(reason, []).append(file)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences on the files and folders that are not read; none on hidden ones."""
        remarks = []
        if others := self.not_read.get(OTHER_KINDS, []):
            kinds = Counter(suffix_of(file) or "no suffix" for file in others).most_common()
            listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds)
            example = next((kind for kind, _ in kinds if kind != "no suffix"), "")
            remarks.append(
                f"not read in the folder {self.path}: files of other kinds ({listed}); to read "
                f"some of them as text, name a pattern, such as '{self.path}/**/*{example}'"
            )
        if folders := self.not_read.get(FOLDERS, []):
            names = ", ".join(map(str, folders[:3])) + ", ..." * (len(folders) > 3)
            remarks.append(f"not read by {self.path}: what is in the folders {names}")
        return tuple(remarks)


def find_files(path: str) -> InputFiles:
    """Return the file, the files of a folder, or the files that match a pattern.

    Of a folder and its subfolders, hidden files and files of unknown kinds are not read. Raises
    UserError if there is no file, or if one of them cannot be read.
    """
    location, found = Path(path), InputFiles(path)
    if location.is_file():
        found.files.append(location)
    elif location.is_dir():
        list_folder(location, found)
        if not found.files:
            kinds = ", ".join(FILE_KINDS)
            raise UserError(
                f"the folder {path} holds no file that ends in {kinds} (or these with .gz or .zst)"
                + "".join(f"; {remark}" for remark in found.remarks)
            )
    else:
        match_pattern(path, found)
        if not found.files:
            raise UserError(f"{path} is not a file, a folder or a pattern that matches a file")
    check_files(path, found.files)
    found.files.sort(key=Path.as_posix)
    return found


def list_folder(folder: Path, found: InputFiles) -> None:
    """Sort what is in a folder and its subfolders into files to read and files that are not."""
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_dir():
            if file.is_symlink() and not hidden:  # it might lead back here
                found.leave_out(FOLDERS, file)
        elif hidden:
            found.leave_out(HIDDEN, file)
        elif suffix_of(file) in FILE_KINDS and file.is_file():
            found.files.append(file)
        else:
            found.leave_out(OTHER_KINDS, file)


def match_pattern(pattern: str, found: InputFiles) -> None:
    """Find the files that match a pattern, and the folders of which it matches no file."""
    paths = [Path(path) for path in glob(pattern, recursive=True)]
    found.files.extend(path for path in paths if path.is_file())
    parents = {parent for file in found.files for parent in file.parents}
    for folder in paths:
        if folder.is_dir() and folder not in parents:
            found.leave_out(FOLDERS, folder)


def check_files(path: str, files: list[Path]) -> None:
    """Raise UserError for a file that cannot be read, or if text and token files are mixed."""
    for file in files:
        if suffix_of(file) == ".json" and not has_json_lines(file):
            raise UserError(
                f"{file} is one JSON value, which would have to be read whole; "
                f"write one object per line, as .jsonl, for example with jq -c '.[]' {file}"
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
    suffix = suffix_of(file)
    return FILE_KINDS.get(suffix, "jsonl" if suffix == ".json" else "text")


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


def encoding_of(file: Path) -> str:
    """Return the encoding of a text file."""
    return detect_encoding(read_start(file, SNIFFED_BYTES))


def first_text(file: Path, size: int = START_BYTES) -> tuple[str, bool]:
    """Return the text of the first `size` bytes of a file, and whether that is all of it."""
    start = read_start(file, size)
    text = start.decode(detect_encoding(start[:SNIFFED_BYTES]), "replace")
    return text, len(start) < size


def line_end(text: str) -> str:
    """Return what ends the lines of a text: a line feed or, as old Macs wrote, a carriage return.

    >>> line_end("a\\nb\\r"), line_end("a\\rb\\r"), line_end("a\\r\\nb")
    ('\\n', '\\r', '\\n')
    """
    return "\r" if "\r" in text and "\n" not in text else "\n"


def read_start(file: Path, size: int) -> bytes:
    """Return the first `size` bytes of a file's content, or all of it."""
    start = b""
    with open_file(file) as (_, content):
        while len(start) < size:
            block = content.read(min(2**16, size - len(start)))
            if not block:
                break
            start += block
    return start


def has_json_lines(file: Path) -> bool:
    """Return whether the first of several lines of a file is a JSON object."""
    text, _ = first_text(file)
    lines = [line for line in text.removeprefix("\ufeff").split(line_end(text)) if line.strip()]
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False
