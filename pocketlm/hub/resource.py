"""One dataset or tokenizer of the Hugging Face hub, and the messages that name it."""

import logging
import sys
import warnings
from dataclasses import dataclass

from pocketlm.errors import UserError

LIBRARIES = ("datasets", "huggingface_hub", "transformers")


@dataclass(frozen=True)
class HubResource:
    """A dataset or tokenizer to read, as messages name it."""

    kind: str  # dataset, saved dataset, tokenizer
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"

    @property
    def page(self) -> str:
        """Address of its page on the hub."""
        from huggingface_hub.constants import ENDPOINT

        return f"{ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def repo_type(self) -> str:
        """Type of its repository in the hub's API."""
        return "dataset" if self.kind == "dataset" else "model"

    @property
    def small_file(self) -> str:
        """A small file that such a repository usually has."""
        return "README.md" if self.kind == "dataset" else "tokenizer_config.json"


def no_copy_error(source: HubResource, problem: str) -> UserError:
    """Return the error for a hub that cannot be used and a resource that was never downloaded."""
    revision = f" at revision {source.revision!r}" if source.revision else ""
    if problem.startswith("HF_"):
        remedy = "unset it, or download once without it"
    else:
        remedy = "check the network, the proxy and HF_ENDPOINT"
    return UserError(f"{problem}, and no copy of {source}{revision} is on this machine; {remedy}")


def no_config_message(
    source: HubResource, config_name: str | None, known: str, where: str = ""
) -> str:
    """Return the message for a configuration that does not exist, or has to be chosen."""
    if config_name is None:
        return f"{source} {where}has several configs; give one of {known}"
    return f"{source} {where}has no config {config_name!r}; it has {known}"


def print_copy_note(source: HubResource, problem: str, details: str = "") -> None:
    """Print to stderr that the copy on this machine is used, and why."""
    print(f"note: {problem}; using the copy of {source} on this machine{details}", file=sys.stderr)


def silence_libraries() -> None:
    """Suppress the libraries' warnings, and their progress bars unless stderr is a terminal."""
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})\b")
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if not sys.stderr.isatty():
        for module in ("datasets", "huggingface_hub.utils"):
            if module in sys.modules:
                sys.modules[module].disable_progress_bars()
