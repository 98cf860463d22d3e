"""Files to documents: text, JSON lines, CSV, parquet, dialogues."""

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from itertools import chain, repeat
from pathlib import Path
from typing import IO, Any

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus.named import by_turns
from pocketlm.corpus.pieces import Piece, Source, hash_files, in_pieces, paragraphs, split_at
from pocketlm.errors import UserError

BLOCK = 2**20  # bytes read from a file at a time
ROWS = 100  # of a table, in memory at a time


RULES = 1  # of reading files; a change of what a file's documents are makes this the next number


TURN = "__eou__"  # behind each utterance, where a line is a dialogue: DailyDialog's layout


class FileSource(Source):
    """Files of text, jsonl, csv or parquet, one after another.

    Without a separator, .txt files in DailyDialog's layout are conversations; raises UserError where only some of them are.
    """

    def __init__(self, name: str, files: list[Path], config: SourceConfig):
        self.name, self.files, self.config = name, files, config
        self.size = sum(file.stat().st_size for file in files)
        texts = (
            [file for file in files if suffix_of(file) == ".txt"]
            if config.separator is None
            else []
        )
        talks = [file for file in texts if TURN.encode() in first_line(file)]
        if 0 < len(talks) < len(texts):
            other = next(file for file in texts if file not in talks)
            raise UserError(
                f"{name}: {talks[0]} has DailyDialog's layout, in which {TURN} ends an utterance, and {other} has not; "
                f"name those that are meant, for example {talks[0]}"
            )
        self.dialogues = bool(talks)
        if self.dialogues:
            self.name = f"{name} (DailyDialog's layout)"

    def pieces(self) -> Iterator[Piece]:
        self.position = 0
        for file in self.files:
            before = self.position
            yield from in_pieces(self.read(file))
            self.position = before + file.stat().st_size

    def read(self, file: Path) -> Iterator[Piece]:
        reader = READERS.get(self.form_of(file))
        return ((text, True) for text in reader(self, file)) if reader else self.read_text(file)

    def form_of(self, file: Path) -> str:
        """How the file is read: what its name says it holds, or dialogues."""
        return "dialogues" if self.dialogues and suffix_of(file) == ".txt" else kind_of(file)

    def read_text(self, file: Path) -> Iterator[Piece]:
        """The documents of a text file, which `data.separator` ends."""
        blocks = self.blocks(file)
        match self.config.separator:
            case None:
                return chain(zip(blocks, repeat(False)), [("", True)])
            case "line":
                return (
                    (text.removesuffix("\r") if ends else text, ends)
                    for text, ends in split_at(blocks, "\n")
                )
            case "blank_line":
                return paragraphs(split_at(blocks, "\n"))
            case separator:
                return split_at(blocks, separator)

    def blocks(self, file: Path) -> Iterator[str]:
        """The file's text, a block at a time. Raises UserError with the position of bytes that are not UTF-8."""
        decoder = codecs.getincrementaldecoder("utf-8")(self.config.errors)
        with opened(file) as (raw, content):
            before, fed = self.position, 0
            while True:
                block = content.read(BLOCK)
                waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    raise not_utf_8(str(file), fed - waiting + error.start, error) from None
                fed += len(block)
                self.position = before + raw.tell()
                if text:
                    yield text
                if not block:
                    return

    def lines(self, file: Path) -> Iterator[str]:
        """The file's lines with their ends, without a byte order mark."""
        waiting: list[str] = []  # joined once, however long the line
        mark = "\ufeff"
        for text, ends in split_at(self.blocks(file), "\n"):
            waiting.append(text)
            if ends:
                yield "".join(waiting).removeprefix(mark) + "\n"
                waiting, mark = [], ""

    def read_dialogues(self, file: Path) -> Iterator[str]:
        """A conversation a line, in the form of the corpus `dialogue`; its words are left as they are."""
        for line in self.lines(file):
            yield by_turns(turn for part in line.split(TURN) if (turn := part.strip()))

    def read_jsonl(self, file: Path) -> Iterator[str]:
        """A JSON object a line."""
        field = self.config.text_field
        for number, line in enumerate(self.lines(file), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{file}:{number}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{file}:{number}: a line is a JSON object with a field {field!r}, not {line.strip()[:40]!r}"
                    )
                if field not in row:
                    raise no_field(f"{file}:{number}", field, row)
                yield as_text(row[field], f"{file}:{number}", field, self.config.errors)

    def read_csv(self, file: Path) -> Iterator[str]:
        """A header, and a document a row."""
        field = self.config.text_field
        rows = csv.reader(
            self.lines(file), delimiter="\t" if kind_of(file) == "tsv" else ",", strict=True
        )
        try:
            header = next(rows, [])
            if field not in header:
                raise no_field(str(file), field, header)
            column = header.index(field)
            for row in rows:
                if column < len(row) <= len(header):
                    yield row[column]
                elif row:  # and not an empty line
                    fields = f"{len(row)} fields under a header of {len(header)}, of which {field!r} is number {column + 1}"
                    raise UserError(
                        f"{file}:{rows.line_num}: a row of {fields}; a text that holds the separator stands in quotes"
                    )
        except csv.Error as error:
            raise UserError(f"{file}:{rows.line_num}: not CSV: {error}") from None

    def read_parquet(self, file: Path) -> Iterator[str]:
        """A column of text, some rows at a time."""
        import pyarrow as pa  # 0.2 s
        from pyarrow import parquet

        field, before, number = self.config.text_field, self.position, 0
        try:
            with parquet.ParquetFile(file) as table:
                if field not in (names := table.schema_arrow.names):
                    raise no_field(str(file), field, names)
                for batch in table.iter_batches(ROWS, columns=[field]):
                    column = batch.column(batch.schema.names.index(field))
                    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                        column = column.cast(
                            pa.large_binary()
                        )  # not every writer sees to it that a string is UTF-8
                    for value in column.to_pylist():
                        yield as_text(value, f"row {number} of {file}", field, self.config.errors)
                        number += 1
                    self.position = before + file.stat().st_size * number // table.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a parquet file that can be read: {error}") from None

    def digest(self) -> str:
        c = self.config
        forms = [(self.form_of(file), packing_of(file)) for file in self.files]
        return hash_files(self.files, [RULES, c.separator, c.text_field, c.errors, forms])


READERS = {
    "dialogues": FileSource.read_dialogues, "jsonl": FileSource.read_jsonl, "csv": FileSource.read_csv, "tsv": FileSource.read_csv,
    "parquet": FileSource.read_parquet,
}  # fmt: skip


KINDS = {
    ".txt": "text", ".md": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".bin": "tokens",
}  # fmt: skip


def find_files(path: str) -> list[Path]:
    """The file, the readable files of a folder and its subfolders, or those of a pattern, in the order of their names."""
    where = Path(path)
    if where.is_file():
        files = [where]
    elif where.is_dir():
        inside = (
            file.relative_to(where)
            for file in where.rglob("*")
            if file.is_file() and kind_of(file, None)
        )
        files = [
            where / file for file in inside if not any(part.startswith(".") for part in file.parts)
        ]
        if not files:
            raise UserError(
                f"the folder {path} holds no file that ends in {', '.join(KINDS)} (or these with .gz or .zst)"
            )
    else:
        files = [Path(file) for file in glob(path, recursive=True) if Path(file).is_file()]
        if not files:
            raise UserError(f"{path} is not a file, a folder or a pattern that fits one")
    for file in files:
        if suffix_of(file) == ".json":
            raise UserError(
                f"{file} is one JSON value, which would have to be read whole; write an object a line, as .jsonl"
            )
        if packing_of(file) and kind_of(file) in ("parquet", "tokens"):
            raise UserError(
                f"{file} is read from many places at once, which {packing_of(file)} does not allow; decompress it"
            )
    if len({kind_of(file) == "tokens" for file in files}) == 2:
        raise UserError(
            f"{path} holds both text and token files (.bin); name those that are meant, for example {path}/*.txt"
        )
    return sorted(files, key=Path.as_posix)


def packing_of(file: Path) -> str | None:
    """How the end of a file's name says it is compressed."""
    return suffix if (suffix := file.suffix.lower()) in (".gz", ".zst") else None


def suffix_of(file: Path) -> str:
    """The end of a file's name, before that of its compression."""
    return (file.with_suffix("") if packing_of(file) else file).suffix.lower()


def kind_of(file: Path, otherwise: str | None = "text") -> str | None:
    """What the end of a file's name says it holds."""
    return KINDS.get(suffix_of(file), otherwise)


@contextmanager
def opened(file: Path) -> Iterator[tuple[IO[bytes], Any]]:
    """The file as it is and what is read from it, decompressed. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as raw:
            if packing_of(file) == ".gz":
                yield raw, gzip.GzipFile(fileobj=raw)
            elif packing_of(file) == ".zst":
                import pyarrow as pa  # 0.2 s

                yield raw, pa.CompressedInputStream(pa.PythonFile(raw), "zstd")
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def first_line(file: Path) -> bytes:
    """The first line of a file; of one longer than BLOCK bytes, so many."""
    begin = b""
    with opened(file) as (_, content):
        while (
            b"\n" not in begin
            and len(begin) < BLOCK
            and (block := content.read(min(2**16, BLOCK - len(begin))))
        ):
            begin += block
    return begin.partition(b"\n")[0]


# ---- odds and ends ---------------------------------------------------------------------------------------------------


def as_text(value: Any, place: str, field: str, errors: str) -> str:
    """A row's value as text that UTF-8 can hold; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise not_utf_8(place, error.start, error) from None
    if not isinstance(value, str):
        raise UserError(
            f"{place}: the field {field!r} holds {type(value).__name__} {str(value)[:40]!r}, not text; set data.text_field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a character, which JSON can spell
        if errors == "strict":
            raise UserError(
                f"{place}: character {error.start} of {field!r} is half a one; data.errors=replace puts U+FFFD there"
            ) from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def not_utf_8(place: str, position: int, error: UnicodeDecodeError) -> UserError:
    found = f"byte {position} is 0x{error.object[error.start]:02x}"
    return UserError(
        f"{place} is not UTF-8: {found}; data.errors=replace puts U+FFFD in such places"
    )


def no_field(place: str, field: str, there: Iterable[str]) -> UserError:
    return UserError(
        f"{place} has no field {field!r}; there are {', '.join(map(str, there)) or 'none'}: set data.text_field"
    )
