"""A quick check that the hub answers, before a library waits and retries for minutes."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TypeVar

from pocketlm.errors import UserError
from pocketlm.hub.messages import first_sentence, is_server_failure, refusal
from pocketlm.hub.resource import HubResource, silence_libraries

T = TypeVar("T")

TIMEOUT = 8  # seconds for the hub's first answer, including the look-up of its host name


@dataclass(frozen=True)
class HubStatus:
    """Result of the check for one resource."""

    problem: str = ""  # why the hub cannot be used, for a message; empty: it can

    @property
    def available(self) -> bool:
        """True if the hub has answered that it has the resource."""
        return not self.problem


def check_hub(source: HubResource) -> HubStatus:
    """Return whether the hub can be used for `source`. Raises UserError if the hub refuses it."""
    from huggingface_hub import constants

    silence_libraries()
    if constants.HF_HUB_OFFLINE:
        return HubStatus("HF_HUB_OFFLINE is set")
    answer = call_in_thread(ask_hub, source)
    wait([answer], timeout=TIMEOUT)
    if not answer.done():
        return HubStatus(no_answer())
    error = answer.exception()
    if error is None:
        return answer.result()
    return HubStatus(explain(error, source))


def call_in_thread(function: Callable[[HubResource], T], source: HubResource) -> "Future[T]":
    """Call a function in a daemon thread and return the future of its result.

    No timeout of the libraries limits the look-up of a host name, or two requests together.
    """
    future: Future[T] = Future()
    threading.Thread(target=complete, args=(future, function, source), daemon=True).start()
    return future


def complete(
    future: "Future[T]", function: Callable[[HubResource], T], source: HubResource
) -> None:
    """Set the result or the exception of `function(source)` on the future."""
    try:
        future.set_result(function(source))
    except Exception as error:  # the waiting thread handles it
        future.set_exception(error)


def ask_hub(source: HubResource) -> HubStatus:
    """Ask the hub for a small file of the repository, and for the repository itself."""
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    get_session().timeout = TIMEOUT  # some of the library's requests have no timeout of their own
    with contextlib.suppress(EntryNotFoundError):  # the repository exists and lacks this file
        url = hf_hub_url(
            source.name, source.small_file, repo_type=source.repo_type, revision=source.revision
        )
        if not get_hf_file_metadata(url, timeout=TIMEOUT).commit_hash:
            return HubStatus(f"what answers at {constants.ENDPOINT} is not a Hugging Face hub")
    HfApi().repo_info(
        source.name, repo_type=source.repo_type, revision=source.revision, timeout=TIMEOUT
    )
    return HubStatus()


def explain(error: BaseException, source: HubResource) -> str:
    """Return the reason why the hub cannot be used. Raises UserError if the hub refuses `source`.

    An exception that is no failure to reach the hub is raised again.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its own HTTP client

    if isinstance(error, httpx.TimeoutException):
        return no_answer()
    if isinstance(error, HFValidationError):
        raise UserError(
            f"{source} is not a file or folder here, and not a valid name on the hub; "
            "check the name"
        ) from error
    if isinstance(error, HfHubHTTPError):
        if is_server_failure(error):
            response = error.response
            return f"{hub_name()} answers {response.status_code} {response.reason_phrase}"
        raise refusal(source, error) from error
    # ValueError: the answer is not JSON, or no host can have this name
    if isinstance(error, (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError)):
        return f"{hub_name()} cannot be reached ({first_sentence(error)})"
    raise error


def no_answer() -> str:
    """Return the reason for a hub that is silent."""
    return f"{hub_name()} did not answer within {TIMEOUT} seconds"


def hub_name() -> str:
    """Return the hub with its address."""
    from huggingface_hub import constants

    return f"the Hugging Face hub at {constants.ENDPOINT}"
