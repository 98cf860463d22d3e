"""Rows of datasets: on the Hugging Face hub, in a folder of data files, or saved by the library."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.errors import UserError
from pocketlm.hub.availability import check_hub
from pocketlm.hub.messages import translate_errors
from pocketlm.hub.resource import (
    HubResource,
    no_config_message,
    no_copy_error,
    print_copy_note,
    silence_libraries,
)

if TYPE_CHECKING:
    from datasets import (  # type: ignore[import-untyped]  # the library has no types
        Dataset,
        DatasetBuilder,
        IterableDataset,
    )


def hub_rows(
    name: str, *, config_name: str | None, split: str, revision: str | None, streaming: bool
) -> "Dataset | IterableDataset":
    """Return the rows of a dataset OWNER/NAME on the hub, or of a folder of parquet or jsonl files.

    They are downloaded, or streamed. If the hub does not answer, they are those of the copy on this
    machine, and a note on stderr says so. Raises UserError; a stream needs `translate_errors`
    around its iteration.
    """
    source = HubResource("dataset", name, revision)
    builder = open_builder(source, config_name)
    check_split(source, builder, split, streaming)
    with translate_errors(source):
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def open_builder(source: HubResource, config_name: str | None) -> "DatasetBuilder":
    """Return the builder of a dataset on the hub or in a folder, or of its copy on this machine."""
    is_local = Path(source.name).is_dir()
    if is_local and source.revision is not None:
        raise UserError(
            f"{source} is a folder on this machine, which has no revision {source.revision!r}; "
            "remove the revision"
        )
    if not is_local and not re.fullmatch(r"[^/\s]+/[^/\s]+", source.name):
        raise UserError(
            f"{source} is not a folder here, and a dataset on the hub is named OWNER/NAME; "
            "check the name"
        )
    problem = "" if is_local else check_hub(source).problem
    import datasets

    silence_libraries()
    with translate_errors(source):
        if not problem:
            with named_configs(source, config_name):
                builder = datasets.load_dataset_builder(
                    source.name, config_name, revision=source.revision
                )
            if builder.name != "cache":
                return builder
            # the library's own fallback, which takes any revision
            problem = "the Hugging Face hub answers only some requests"
        return cached_builder(source, config_name, problem)


@contextlib.contextmanager
def named_configs(source: HubResource, config_name: str | None) -> Iterator[None]:
    """Raise UserError with the configurations of the dataset if the library lists them."""
    try:
        yield
    except ValueError as error:
        known = re.search(r"[Aa]vailable(?: configs)?: \[(.*?)\]", str(error))
        if not known:
            raise
        configs = known[1].replace("'", "")
        raise UserError(no_config_message(source, config_name, configs)) from error


def check_split(
    source: HubResource, builder: "DatasetBuilder", split: str, streaming: bool
) -> None:
    """Raise UserError for an unknown split, before all the data is downloaded."""
    splits = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    requested = {part.split("[")[0].strip() for part in split.split("+")}
    if splits and not requested <= {"all", *splits}:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(splits)}")
    if streaming and "[" in split:
        raise UserError(
            f"{source} can only stream whole splits, and {split!r} is a part; turn streaming off"
        )


def cached_builder(source: HubResource, config_name: str | None, problem: str) -> "DatasetBuilder":
    """Return the builder of the copy that an earlier run downloaded.

    It is the copy of the requested revision, or else the latest. Raises UserError if there is none.
    """
    from datasets.packaged_modules.cache.cache import (  # type: ignore[import-untyped]
        Cache,
    )

    commit, default = cached_revision(source)
    copies = cached_copies(source, commit)
    if not copies:
        raise no_copy_error(source, problem)
    if config_name is None:
        config_name = default or (next(iter(copies)) if len(copies) == 1 else None)
    if config_name not in copies:
        known = ", ".join(sorted(copies))
        message = no_config_message(source, config_name, known, "on this machine ")
        raise UserError(f"{problem}, and {message}")
    _, version, commit = copies[config_name].parts[-4:-1]
    print_copy_note(source, problem, f", config {config_name}, commit {commit[:8]}")
    return Cache(
        repo_id=source.name,
        dataset_name=source.name.split("/")[1],
        config_name=config_name,
        version=version,
        hash=commit,
    )


def cached_revision(source: HubResource) -> tuple[str | None, str | None]:
    """Return the commit of the revision, and the default config of its card, if they are cached."""
    from datasets.utils.metadata import MetadataConfigs  # type: ignore[import-untyped]
    from huggingface_hub import DatasetCard, resolve_revision, try_to_load_from_cache
    from huggingface_hub.errors import RevisionResolutionError

    try:
        commit = resolve_revision(
            source.name, repo_type="dataset", revision=source.revision, local_files_only=True
        ).resolved
    except RevisionResolutionError:
        return None, None
    card = try_to_load_from_cache(source.name, "README.md", revision=commit, repo_type="dataset")
    if not isinstance(card, str):
        return commit, None
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
    return commit, configs.get_default_config_name()


def cached_copies(source: HubResource, commit: str | None) -> dict[str, Path]:
    """Return the dataset_info.json of the newest suitable copy of each config.

    The path is CACHE/OWNER___NAME/CONFIG/VERSION/COMMIT/dataset_info.json. A copy of `commit` is
    preferred, and required if the revision was requested.
    """
    import datasets
    from datasets.naming import camelcase_to_snakecase  # type: ignore[import-untyped]

    owner, name = source.name.split("/")
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    folder = cache / f"{owner}___{camelcase_to_snakecase(name)}"
    files = sorted(
        folder.glob("*/*/*/dataset_info.json"),
        key=lambda file: (file.parent.name == commit, file.stat().st_mtime),
    )
    copies = {}
    for file in files:
        config_name = file.parts[-4]
        if source.revision is not None and file.parent.name != commit:
            continue
        # a folder of another name has only some of the files
        if json.loads(file.read_text("utf-8"))["config_name"] == config_name:
            copies[config_name] = file
    return copies


def is_saved(path: Path) -> bool:
    """Return whether a folder was written by `save_to_disk` of the datasets library."""
    if (path / "dataset_dict.json").is_file():
        return True
    return all((path / name).is_file() for name in ("dataset_info.json", "state.json"))


def saved_rows(path: Path, split: str) -> "Dataset":
    """Return the rows of a saved Dataset, or of one split of a saved DatasetDict.

    Raises UserError.
    """
    import datasets

    silence_libraries()
    source = HubResource("saved dataset", str(path))
    with translate_errors(source):
        saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        if split != "train":
            raise UserError(f"{source} has no splits, and so no split {split!r}; remove it")
        return saved
    if split not in saved:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(saved)}")
    return saved[split]
