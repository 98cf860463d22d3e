"""The config of a benchmark's runs, whose processes work in scratch folders.

Paths are the user's: relative to where the command was typed.
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from benchmarks.measure import absolute_path
from pocketlm.config.loading import load_config, to_yaml
from pocketlm.config.sections import Config, DataConfig, SourceConfig
from pocketlm.errors import UserError
from pocketlm.tokenizer.build import is_trained

Source = TypeVar("Source", bound=SourceConfig)


def load_absolute(path: str, overrides: list[str]) -> Config:
    """Load a config as train.py does, and make its paths absolute. Raises UserError."""
    config = load_config(path, overrides)
    try:
        return replace(config, data=absolute_data(config.data))
    except ValueError as error:  # two paths that name the same file
        raise UserError(f"data.{error}") from None


def absolute_data(data: DataConfig) -> DataConfig:
    """Return the section `data` with absolute paths."""
    mixture = tuple(absolute_source(source) for source in data.mixture)
    cache, tokenizer = absolute_path(data.cache_dir), data.tokenizer
    # A built-in name wins over a file of that name, and a path over a name on the hub.
    if not (is_trained(tokenizer) or tokenizer in ("byte", "gpt2")):
        file = absolute_path(tokenizer)
        tokenizer = file if Path(file).exists() else tokenizer
    return absolute_source(replace(data, mixture=mixture, cache_dir=cache, tokenizer=tokenizer))


def absolute_source(source: Source) -> Source:
    """Return a source of documents with absolute paths."""
    paths = {key: getattr(source, key) for key in ("path", "optional_path", "val_path")}
    return replace(source, **{key: absolute_path(path) for key, path in paths.items() if path})


def write_config(config: Config, folder: Path) -> Path:
    """Write a config into a folder; return the file's path."""
    file = folder / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return file
