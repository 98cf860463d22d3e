"""Readers: files of text, JSON lines, CSV, parquet and dialogues to documents.

`FileSource` reads a list of files one after another. Text files are read in blocks of BLOCK_BYTES,
tables TABLE_ROWS rows at a time, so that memory does not grow with the files.
"""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from pocketlm.config.sections import SourceConfig
from pocketlm.corpus.encodings import SNIFFED_BYTES, undecodable
from pocketlm.corpus.input_files import (
    START_BYTES,
    InputFiles,
    compression_of,
    encoding_of,
    first_text,
    kind_of,
    line_end,
    open_file,
    suffix_of,
)
from pocketlm.corpus.named import format_dialogue
from pocketlm.corpus.pieces import (
    WHOLE,
    ByteAccount,
    Part,
    Piece,
    Source,
    counted,
    hash_files,
    join_texts,
    resize_pieces,
    split_on_blank_lines,
    split_on_separator,
)
from pocketlm.errors import UserError
from pocketlm.limits import MAX_LINE_CHARACTERS

BLOCK_BYTES = 2**20
TABLE_ROWS = 100

READER_VERSION = 1
"""Part of every digest of files. Raise it when a reader below yields other documents than before,
so that token shards made of the old documents are not found any more."""

END_OF_UTTERANCE = "__eou__"  # follows every utterance in DailyDialog's layout, a dialogue per line

SEPARATORS = "separators between documents"
OUTSIDE_DOCUMENTS = {  # what else is in a file, by its format
    "text": SEPARATORS,
    "dialogues": "marks of DailyDialog's layout",
    "jsonl": "JSON syntax and other fields",
    "csv": "CSV syntax and other columns",
    "tsv": "CSV syntax and other columns",
}

csv.field_size_limit(MAX_LINE_CHARACTERS)  # of the whole process; by default 131,072


class FileSource(Source):
    """Files of text, jsonl, csv or parquet, read one after another.

    If no separator is set, .txt files in DailyDialog's layout are read as dialogues. Raises
    UserError if only some of the .txt files have that layout.
    """

    def __init__(self, found: InputFiles, config: SourceConfig):
        self.name, self.files, self.config = found.path, found.files, config
        self.not_read, self.remarks = found.not_read, found.remarks
        self.sizes = [file.stat().st_size for file in self.files]
        self.size: int = sum(self.sizes)
        self.divisible = all(kind_of(file) != "tokens" for file in self.files)
        self.file_account = ByteAccount()  # of the file that is read
        self.fixed_place: int | None = None  # of all of a file that is not divided
        self.text_bytes = 0  # of the file that is read, in UTF-8
        self.dialogues = config.separator is None and have_dialogue_layout(self.name, self.files)
        if self.dialogues:
            self.name = f"{self.name} (DailyDialog's layout)"

    @property
    def has_text_files(self) -> bool:
        """Return whether a separator can be in the files."""
        return any(self.format_of(file) == "text" for file in self.files)

    @property
    def place(self) -> int:
        return self.position if self.fixed_place is None else self.fixed_place

    def pieces(self) -> Iterator[Piece]:
        return self.part_pieces(WHOLE)

    def part_pieces(self, part: Part) -> Iterator[Piece]:
        """Yield the documents of the files that are in the part at least in part.

        A compressed or parquet file is not divided: its place is where it begins.
        """
        account = self.account = ByteAccount()
        start = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            end = start + size
            whole = compression_of(file) is not None or kind_of(file) == "parquet"
            last_owner = part.owner(start if whole else end, self.size)
            if part.owner(start, self.size) <= part.index <= last_owner:
                self.position, self.fixed_place = start, start if whole else None
                self.file_account = own = ByteAccount()
                yield from resize_pieces(self.read_and_count(file, own), own)
                if last_owner == part.index:
                    account.add(own)
            self.position = start = end

    def read_and_count(self, file: Path, account: ByteAccount) -> Iterator[Piece]:
        """Yield the documents of one file, and count its bytes that are in none of them.

        Of parquet, which is compressed, only the column counts.
        """
        kind = self.format_of(file)
        if kind == "parquet":
            yield from counted(self.read(file), account)
            return
        self.text_bytes = in_documents = 0
        for text, is_last in self.read(file):
            in_documents += len(text.encode())
            yield text, is_last
        account.leave_out(OUTSIDE_DOCUMENTS[kind], self.text_bytes - in_documents)

    def read(self, file: Path) -> Iterator[Piece]:
        """Yield the documents of one file; pieces may have any size, documents may be blank."""
        match self.format_of(file):
            case "dialogues":
                documents = self.read_dialogues(file)
            case "jsonl":
                documents = self.read_jsonl(file)
            case "csv":
                documents = self.read_csv(file, ",")
            case "tsv":
                documents = self.read_csv(file, "\t")
            case "parquet":
                documents = self.read_parquet(file)
            case _:
                return self.read_text(file)
        return ((document, True) for document in documents)

    def format_of(self, file: Path) -> str:
        """Return how the file is read: as dialogues, or as the kind that its name says."""
        return "dialogues" if self.dialogues and suffix_of(file) == ".txt" else kind_of(file)

    def read_text(self, file: Path) -> Iterator[Piece]:
        """Yield the documents of a text file, which end at `data.separator`."""
        blocks = self.blocks(file)
        match self.config.separator:
            case None:
                return chain(zip(blocks, repeat(False)), [("", True)])
            case "line":
                return strip_carriage_returns(split_on_separator(blocks, "\n"))
            case "blank_line":
                return split_on_blank_lines(split_on_separator(blocks, "\n"))
            case separator:
                return split_on_separator(blocks, separator)

    def blocks(self, file: Path) -> Iterator[str]:
        """Yield the file's text, one block at a time.

        Raises UserError with the position of the first byte that is not of the file's encoding.
        """
        encoding = encoding_of(file)
        decoder = codecs.getincrementaldecoder(encoding)(self.config.errors)
        with open_file(file) as (raw, content):
            start, fed_bytes, text_bytes = self.position, 0, 0
            while True:
                block = content.read(BLOCK_BYTES)
                pending_bytes = len(decoder.getstate()[0])  # of a character that the block cut
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    byte = fed_bytes - pending_bytes + error.start
                    raise decoding_error(str(file), byte, error, encoding) from None
                fed_bytes += len(block)
                text_bytes += len(text.encode())
                self.position = start + raw.tell()
                if text:
                    yield text
                if not block:
                    break
        self.count_text(fed_bytes, text_bytes, encoding)

    def count_text(self, size: int, text_bytes: int, encoding: str) -> None:
        """Count a file of `size` bytes, and the bytes of its text in UTF-8."""
        self.file_account.bytes += size
        self.text_bytes += text_bytes
        replaced = "bytes that are not UTF-8, read as U+FFFD"
        reason = replaced if encoding == "utf-8" else f"change from {encoding.upper()} to UTF-8"
        self.file_account.leave_out(reason, size - text_bytes)

    def lines(self, file: Path) -> Iterator[str]:
        """Yield the file's lines with a line feed each, without a byte order mark.

        Lines may also end in carriage returns, if there are no line feeds.
        """
        end = line_end(first_text(file)[0])
        pending: list[str] = []  # joined once, however long the line is
        byte_order_mark = "\ufeff"
        number, characters = 1, 0
        for text, is_last in split_on_separator(self.blocks(file), end):
            pending.append(text)
            characters += len(text)
            if characters > MAX_LINE_CHARACTERS:
                raise UserError(
                    f"{file}:{number}: the line has more than {MAX_LINE_CHARACTERS:,} characters, "
                    "the most that is read into memory; write one document in each line"
                )
            if is_last:
                yield join_texts(pending).removeprefix(byte_order_mark) + "\n"
                pending, byte_order_mark = [], ""
                number, characters = number + 1, 0

    def read_dialogues(self, file: Path) -> Iterator[str]:
        """Yield one dialogue per line, in the form of the corpus `dialogue`."""
        for line in self.lines(file):
            turns = (turn.strip() for turn in line.split(END_OF_UTTERANCE))
            yield format_dialogue(filter(None, turns))

    def read_jsonl(self, file: Path) -> Iterator[str]:
        """Yield `data.text_field` of the JSON object in each line."""
        field = self.config.text_field
        for number, line in enumerate(self.lines(file), 1):
            if not line.strip():
                continue
            location = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{location}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{location}: a line is a JSON object with a field {field!r}, "
                    f"not {line.strip()[:40]!r}"
                )
            if field not in row:
                raise missing_field_error(location, field, row)
            yield text_of_value(row[field], location, field, self.config.errors)

    def read_csv(self, file: Path, delimiter: str) -> Iterator[str]:
        """Yield the column `data.text_field` of a table whose first row names the columns."""
        field = self.config.text_field
        escape = quote_escape(*first_text(file), delimiter)
        rows = csv.reader(self.lines(file), delimiter=delimiter, escapechar=escape, strict=True)
        try:
            header = next(rows, [])
            if field not in header:
                raise missing_field_error(str(file), field, header)
            column = header.index(field)
            for row in rows:
                if column < len(row) <= len(header):
                    yield row[column]
                elif row:  # an empty line is an empty row
                    raise UserError(
                        f"{file}:{rows.line_num}: a row of {len(row)} fields under a header of "
                        f"{len(header)}, in which {field!r} is number {column + 1}; "
                        "quote a text that contains the delimiter"
                    )
        except csv.Error as error:
            raise UserError(f"{file}:{rows.line_num}: not CSV: {error}") from None

    def read_parquet(self, file: Path) -> Iterator[str]:
        """Yield the column `data.text_field`, TABLE_ROWS rows at a time."""
        import pyarrow as pa  # type: ignore[import-untyped]  # no stubs; takes 0.2 s
        from pyarrow import compute, parquet

        field, errors = self.config.text_field, self.config.errors
        start, number = self.position, 0
        try:
            with parquet.ParquetFile(file) as table:
                names = table.schema_arrow.names
                if field not in names:
                    raise missing_field_error(str(file), field, names)
                for batch in table.iter_batches(TABLE_ROWS, columns=[field]):
                    column = batch.column(batch.schema.names.index(field))
                    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                        # As bytes, because some writers store strings that are not UTF-8.
                        column = column.cast(pa.large_binary())
                        longest = compute.max(compute.binary_length(column)).as_py() or 0
                        if longest > MAX_LINE_CHARACTERS:
                            raise UserError(
                                f"{file}: a value of {field!r} after row {number} has "
                                f"{longest:,} bytes, and at most {MAX_LINE_CHARACTERS:,} are read "
                                "into memory; write one document in each row"
                            )
                    for value in column.to_pylist():
                        yield text_of_value(value, f"row {number} of {file}", field, errors)
                        number += 1
                    read_bytes = file.stat().st_size * number // table.metadata.num_rows
                    self.position = start + read_bytes
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} is not a parquet file that can be read: {error}") from None

    def digest(self) -> str:
        config = self.config
        formats = [self.format_in_digest(file) for file in self.files]
        settings = [READER_VERSION, config.separator, config.text_field, config.errors, formats]
        return hash_files(self.files, settings)

    def format_in_digest(self, file: Path) -> list[str | None]:
        """Return everything but the settings and the bytes that decides how a file is read."""
        kind, compression = self.format_of(file), compression_of(file)
        is_text = kind not in ("parquet", "tokens") and not compression
        encoding = encoding_of(file) if is_text else "utf-8"
        # UTF-8 is left out, as before there were others, so that prepared shards are found
        return [kind, compression, *([] if encoding == "utf-8" else [encoding])]


def have_dialogue_layout(name: str, files: list[Path]) -> bool:
    """Return whether the .txt files have DailyDialog's layout.

    The layout is recognised by END_OF_UTTERANCE in the first line. Raises UserError if only some
    of the files have it.
    """
    texts = [file for file in files if suffix_of(file) == ".txt"]
    dialogues = [file for file in texts if END_OF_UTTERANCE in first_line(file)]
    if 0 < len(dialogues) < len(texts):
        other = next(file for file in texts if file not in dialogues)
        raise UserError(
            f"{name}: {dialogues[0]} has DailyDialog's layout, in which {END_OF_UTTERANCE} ends an "
            f"utterance, and {other} does not; name the files to use, for example {dialogues[0]}"
        )
    return bool(dialogues)


def strip_carriage_returns(lines: Iterable[Piece]) -> Iterator[Piece]:
    """Remove the carriage return at the end of each line."""
    for text, is_last in lines:
        yield text.removesuffix("\r") if is_last else text, is_last


def first_line(file: Path) -> str:
    """Return the first line of a file, or what is in its first bytes of a longer one."""
    for size in (SNIFFED_BYTES, START_BYTES):
        text, is_whole = first_text(file, size)
        line, end, _ = text.partition(line_end(text))
        if end or is_whole:
            break
    return line


def quote_escape(start: str, is_whole: bool, delimiter: str) -> str | None:
    r"""Return what is before a quote inside a quoted field of a table: a backslash, or None.

    None is the usual way, a doubled quote. A table is read with backslashes if it has them, and if
    its start, from which the rest may be cut off, is no table without them.

    >>> quote_escape('text\n"a \\"b\\" c"', True, ","), quote_escape('text\n"a ""b"" c"', True, ",")
    ('\\', None)
    """
    if '\\"' not in start or is_table(start, is_whole, delimiter, None):
        return None
    return "\\" if is_table(start, is_whole, delimiter, "\\") else None


def is_table(start: str, is_whole: bool, delimiter: str, escape: str | None) -> bool:
    """Return whether the rows are CSV, and none is wider than the header."""
    lines = start.split(line_end(start))
    rows = csv.reader(
        (f"{line}\n" for line in lines), delimiter=delimiter, escapechar=escape, strict=True
    )
    try:
        width = len(next(rows, []))
        return all(len(row) <= width for row in rows)
    except csv.Error:
        return not is_whole and rows.line_num >= len(lines)  # in the row that is cut off


# ---- values of tables, and errors ----


def text_of_value(value: Any, location: str, field: str, errors: str) -> str:
    """Return the value of a field as text that UTF-8 can encode; null is the empty text.

    Raises UserError for a value that is not text, or is not valid with `errors` = strict.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise decoding_error(location, error.start, error) from None
    if not isinstance(value, str):
        raise UserError(
            f"{location}: the field {field!r} holds {type(value).__name__} {str(value)[:40]!r}, "
            "not text; set data.text_field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
        if errors == "strict":
            raise UserError(
                f"{location}: character {error.start} of {field!r} is half of a surrogate pair; "
                "data.errors=replace reads it as U+FFFD"
            ) from None
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def decoding_error(
    location: str, position: int, error: UnicodeDecodeError, encoding: str = "utf-8"
) -> UserError:
    """Return the error for a byte that is not of the text's encoding."""
    return UserError(
        f"{undecodable(location, position, error, encoding)}; "
        "data.errors=replace reads such bytes as U+FFFD, and a text in another encoding is "
        "converted with iconv -f ENCODING -t UTF-8"
    )


def missing_field_error(location: str, field: str, fields: Iterable[str]) -> UserError:
    """Return the error for a row or table without the field, with the names of its fields."""
    names = ", ".join(map(str, fields)) or "none"
    return UserError(f"{location} has no field {field!r}; it has {names}: set data.text_field")
