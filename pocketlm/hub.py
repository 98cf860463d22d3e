"""Everything that talks to the Hugging Face hub: the rows of a dataset, and a tokenizer by its name.

The libraries wait and retry for minutes where the hub is gone, so one short question goes ahead of them. Where it has no answer, the copy
that an earlier run downloaded is used; where the hub refuses, a UserError says why. No code from the hub is ever run.
"""

import contextlib
import errno
import json
import logging
import re
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import PreTrainedTokenizerBase

PATIENCE = 8  # seconds for the hub's first answer, the look-up of its name included


LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class HubResource:
    """What is read, as the sentences name it."""

    kind: str  # dataset, tokenizer
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"

    @property
    def page(self) -> str:
        from huggingface_hub.constants import ENDPOINT

        return f"{ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


def hub_rows(
    name: str, *, config_name: str | None, split: str, revision: str | None, streaming: bool
) -> "Dataset | IterableDataset":
    """The rows of a dataset OWNER/NAME on the hub, or of a local folder of parquet or jsonl files; downloaded, or streamed.

    Without the hub it is the copy on this machine, as is said on stderr. Raises UserError; so does `explained` around a stream.
    """
    source = HubResource("dataset", name, revision)
    local = Path(name).is_dir()
    if local and revision is not None:
        raise UserError(
            f"{source} is a folder on this machine, which has no revision {revision!r}; leave the revision out"
        )
    if not local and not re.fullmatch(r"[^/\s]+/[^/\s]+", name):
        raise UserError(
            f"{source} is no folder here, and a dataset on the hub is named OWNER/NAME; mend the name"
        )
    why = None if local else hub_unavailable_reason(source)
    import datasets

    silence_libraries()
    with translate_errors(source):
        if why is None:
            try:
                builder = datasets.load_dataset_builder(name, config_name, revision=revision)
            except ValueError as error:
                if not (there := re.search(r"[Aa]vailable(?: configs)?: \[(.*?)\]", str(error))):
                    raise
                raise no_config(source, config_name, there[1].replace("'", "")) from error
            if builder.name == "cache":  # the library's own way out, which takes any revision
                why = "the Hugging Face hub answers in part only"
        if why is not None:
            builder = copied(source, config_name, why)
    splits = [str(name) for name in builder.config.data_files or builder.info.splits or ()]
    parts = {part.split("[")[0].strip() for part in split.split("+")}
    if splits and not parts <= {"all", *splits}:  # said before all of it is downloaded
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(splits)}")
    if streaming and "[" in split:
        raise UserError(
            f"{source} is streamed by whole splits, which {split!r} is not; turn streaming off"
        )
    with translate_errors(source):
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def hub_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The fast tokenizer of a repository on the hub, or its copy on this machine, as is said on stderr. Raises UserError."""
    source = HubResource("tokenizer", name)
    why = hub_unavailable_reason(source)
    from huggingface_hub import constants
    from transformers import AutoTokenizer

    silence_libraries()
    empty = UserError(f"{source} has no tokenizer.json, nor what one is made from; choose another")
    switch = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = why is not None  # the one switch that all of the library heeds
    try:
        with translate_errors(source):
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    name, use_fast=True, trust_remote_code=False
                )
            except ValueError as error:
                if "backend tokenizer" in str(error):
                    raise empty from error
                raise
            words = (
                tokenizer.get_vocab().keys()
                - tokenizer.get_added_vocab().keys()
                - set(tokenizer.all_special_tokens)
            )
            if (
                not tokenizer.is_fast or len(words) < 2
            ):  # where the library finds no file, it may make one without words
                raise empty
    except UserError as error:
        raise (no_copy(source, why) if why else error) from error.__cause__
    finally:
        constants.HF_HUB_OFFLINE = switch
    if why:
        note(source, why)
    return tokenizer


def is_saved(path: Path) -> bool:
    """Whether a folder holds what `save_to_disk` of the datasets library wrote."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def saved_rows(path: Path, split: str) -> "Dataset":
    """The rows of a saved dataset: all of a Dataset, or one split of a DatasetDict. Raises UserError."""
    import datasets

    silence_libraries()
    source = HubResource("saved dataset", str(path))
    with translate_errors(source):
        saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        if split != "train":
            raise UserError(f"{source} has no splits, and so no split {split!r}; leave it out")
        return saved
    if split not in saved:
        raise UserError(f"{source} has no split {split!r}; it has {', '.join(saved)}")
    return saved[split]


def copied(source: HubResource, config_name: str | None, why: str) -> "DatasetBuilder":
    """The builder of the copy that an earlier run downloaded: of the revision where one is asked for, else the latest."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, resolve_revision, try_to_load_from_cache
    from huggingface_hub.errors import RevisionResolutionError

    owner, short = source.name.split("/")
    commit = default = None
    with contextlib.suppress(RevisionResolutionError):
        commit = resolve_revision(
            source.name, repo_type="dataset", revision=source.revision, local_files_only=True
        ).resolved
        readme = try_to_load_from_cache(
            source.name, "README.md", revision=commit, repo_type="dataset"
        )
        if isinstance(readme, str):
            default = MetadataConfigs.from_dataset_card_data(
                DatasetCard.load(readme).data
            ).get_default_config_name()
    root = (
        Path(datasets.config.HF_DATASETS_CACHE).expanduser()
        / f"{owner}___{camelcase_to_snakecase(short)}"
    )
    infos = sorted(
        root.glob("*/*/*/dataset_info.json"),
        key=lambda info: (info.parent.name == commit, info.stat().st_mtime),
    )
    copies = {  # by config; a folder of another name holds some of the files only
        info.parts[-4]: info
        for info in infos
        if (source.revision is None or info.parent.name == commit)
        and json.loads(info.read_text("utf-8"))["config_name"] == info.parts[-4]
    }
    if not copies:
        raise no_copy(source, why)
    config_name = config_name or default or (next(iter(copies)) if len(copies) == 1 else None)
    if config_name not in copies:
        raise UserError(
            f"{why}, and {no_config(source, config_name, ', '.join(sorted(copies)), 'on this machine ')}"
        )
    _, version, commit = copies[config_name].parts[-4:-1]
    note(source, why, f", config {config_name}, commit {commit[:8]}")
    return Cache(
        repo_id=source.name,
        dataset_name=short,
        config_name=config_name,
        version=version,
        hash=commit,
    )


def silence_libraries() -> None:
    """Keep the libraries' warnings off the screen, and their progress bars off everything that is not a terminal."""
    libraries = ("datasets", "huggingface_hub", "transformers")
    warnings.filterwarnings("ignore", module=rf"({'|'.join(libraries)})\b")
    for library in libraries:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        for module in ("datasets", "huggingface_hub.utils"):
            if module in sys.modules:
                sys.modules[module].disable_progress_bars()


def hub_unavailable_reason(source: HubResource) -> str | None:
    """Why the hub cannot be asked for `source`; None where it answers. Raises UserError where its answer is a refusal."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import httpx

    silence_libraries()
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    hub = f"the Hugging Face hub at {constants.ENDPOINT}"
    file, kind = (
        ("README.md", "dataset") if source.kind == "dataset" else ("tokenizer_config.json", "model")
    )
    outcome: list[str | Exception | None] = []

    def ask() -> None:
        try:
            get_session().timeout = (
                PATIENCE  # some of the library's requests have no limit of their own
            )
            with contextlib.suppress(
                EntryNotFoundError
            ):  # the repository is there, and has no such file
                url = hf_hub_url(source.name, file, repo_type=kind, revision=source.revision)
                if not get_hf_file_metadata(url, timeout=PATIENCE).commit_hash:
                    return outcome.append(
                        f"what answers at {constants.ENDPOINT} is not a Hugging Face hub"
                    )
            HfApi().repo_info(
                source.name, repo_type=kind, revision=source.revision, timeout=PATIENCE
            )
            outcome.append(None)
        except Exception as error:  # for the thread that waits
            outcome.append(error)

    # in a thread, since no limit holds for the look-up of a name, nor for the two questions together
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    try:
        answer = outcome[0] if outcome else httpx.TimeoutException("")
        if isinstance(answer, Exception):
            raise answer
        return answer
    except httpx.TimeoutException:
        return f"{hub} did not answer within {PATIENCE} seconds"
    except HFValidationError as error:
        raise UserError(
            f"{source} is no file or folder here, and no name on the hub; mend the name"
        ) from error
    except HfHubHTTPError as error:
        if failing(error):
            return f"{hub} answers {error.response.status_code} {error.response.reason_phrase}"
        raise refusal(source, error) from error
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        OSError,
        ValueError,
    ) as error:  # ValueError: no JSON, or a name that no host has
        return f"{hub} cannot be reached ({said(error)})"


def refusal(source: HubResource, error: "HfHubHTTPError") -> UserError:
    """The sentence for the hub's refusal."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status, token = error.response.status_code, "authorization" in error.response.request.headers
    if isinstance(error, GatedRepoError):
        also = "with the account of your token" if token else f"then {LOG_IN}"
        return UserError(f"{source} is gated; request access at {source.page}, {also}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{source} has no revision {source.revision!r}; give a branch, tag or commit of {source.page}, or none"
        )
    if status == 401 and token:
        return UserError(
            f"the hub does not accept your token for {source} ({status}); {LOG_IN} anew"
        )
    if status == 401:
        return UserError(
            f"the hub has no public {source} ({status}); mend the name, or, where it is private, {LOG_IN}"
        )
    if status == 404:
        return UserError(
            f"the hub has no {source}{' that your token may read' if token else ''} ({status}); mend the name"
        )
    reason = error.response.headers.get("X-Error-Message") or error.response.reason_phrase
    return UserError(f"the hub refuses {source} ({status} {reason}); see {source.page}")


def no_copy(source: HubResource, why: str) -> UserError:
    at = f" at revision {source.revision!r}" if source.revision else ""
    remedy = (
        "unset it, or download once without it"
        if why.startswith("HF_")
        else "check the network, the proxy and HF_ENDPOINT"
    )
    return UserError(f"{why}, and no copy of {source}{at} is on this machine; {remedy}")


def no_config(
    source: HubResource, config_name: str | None, there: str, where: str = ""
) -> UserError:
    if config_name is None:
        return UserError(f"{source} {where}has several configs; give one of {there}")
    return UserError(f"{source} {where}has no config {config_name!r}; it has {there}")


def note(source: HubResource, why: str, which: str = "") -> None:
    print(f"note: {why}; using the copy of {source} on this machine{which}", file=sys.stderr)


@contextlib.contextmanager
def translate_errors(source: HubResource) -> Iterator[None]:
    """Turn what the libraries raise while they read `source` into a UserError. What the system refuses stays an OSError."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.utils import httpx

    try:
        yield
    except UserError:
        raise
    except (
        Exception
    ) as error:  # of yaml, pyarrow, fsspec and tokenizers too, and the last raises the bare class
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        for cause in (error, error.__cause__):
            if (
                isinstance(cause, HfHubHTTPError)
                and not isinstance(cause, EntryNotFoundError)
                and not failing(cause)
            ):
                raise refusal(source, cause) from error
            if isinstance(cause, (HfHubHTTPError, httpx.HTTPError, ConnectionError)):
                raise UserError(
                    f"the hub stopped answering while {source} was read ({said(cause)}); try again"
                ) from error
        remedy = (
            "try revision refs/convert/parquet"
            if "scripts are no longer" in str(error)
            else "mend it, or choose another"
        )
        raise UserError(f"{source} cannot be read ({said(error)}); {remedy}") from error


def failing(error: "HfHubHTTPError") -> bool:
    """Whether the hub is in trouble, and its answer says nothing about what was asked."""
    return error.response.status_code in (408, 429) or error.response.status_code >= 500


def said(error: BaseException) -> str:
    """The first sentence of an error, or, where it says nothing, of its cause."""
    text = (
        str(error)
        .removeprefix("An error occurred while generating the dataset")
        .rpartition("Original error:")[2]
        .strip()
    )
    if not text and error.__cause__:
        return said(error.__cause__)
    return textwrap.shorten(re.split(r"\.\s", text)[0], 200).rstrip(".") or type(error).__name__
