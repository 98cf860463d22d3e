"""The libraries' exceptions as sentences for the user."""

import contextlib
import errno
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pocketlm.errors import UserError
from pocketlm.hub.resource import HubResource

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

# by HTTP status, and whether a token was sent
REFUSALS = {
    (401, True): "the hub does not accept your token for {source} (401); {log_in} again",
    (401, False): (
        "the hub has no public {source} (401); check the name, or, if it is private, {log_in}"
    ),
    (404, True): "the hub has no {source} that your token may read (404); check the name",
    (404, False): "the hub has no {source} (404); check the name",
}


def refusal(source: HubResource, error: "HfHubHTTPError") -> UserError:
    """Return the message for the hub's refusal."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = error.response.status_code
    has_token = "authorization" in error.response.request.headers
    if isinstance(error, GatedRepoError):
        account = "with the account of your token" if has_token else f"then {LOG_IN}"
        return UserError(f"{source} is gated; request access at {source.page}, {account}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(
            f"{source} has no revision {source.revision!r}; "
            f"give a branch, tag or commit of {source.page}, or none"
        )
    if (status, has_token) in REFUSALS:
        return UserError(REFUSALS[status, has_token].format(source=source, log_in=LOG_IN))
    reason = error.response.headers.get("X-Error-Message") or error.response.reason_phrase
    return UserError(f"the hub refuses {source} ({status} {reason}); see {source.page}")


def is_server_failure(error: "HfHubHTTPError") -> bool:
    """Return whether the hub itself fails or is overloaded, so that its answer means nothing."""
    status = error.response.status_code
    return status in (408, 429) or status >= 500


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error, or of its cause if the error has no text."""
    text = str(error).removeprefix("An error occurred while generating the dataset")
    text = text.rpartition("Original error:")[2].strip()
    if not text and error.__cause__:
        return first_sentence(error.__cause__)
    sentence = textwrap.shorten(re.split(r"\.\s", text)[0], 200).rstrip(".")
    return sentence or type(error).__name__


@contextlib.contextmanager
def translate_errors(source: HubResource) -> Iterator[None]:
    """Raise UserError for any exception of the libraries while they read `source`.

    An error of the operating system, for example a full disk, remains an OSError.
    """
    try:
        yield
    except UserError:
        raise
    # yaml, pyarrow, fsspec and tokenizers raise too, and the last raises the bare class
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        raise reading_error(source, error) from error


def reading_error(source: HubResource, error: Exception) -> UserError:
    """Return the message for an exception of the libraries."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its own HTTP client

    for cause in (error, error.__cause__):
        if (
            isinstance(cause, HfHubHTTPError)
            and not isinstance(cause, EntryNotFoundError)
            and not is_server_failure(cause)
        ):
            return refusal(source, cause)
        if isinstance(cause, (HfHubHTTPError, httpx.HTTPError, ConnectionError)):
            return UserError(
                f"the hub stopped answering while {source} was read ({first_sentence(cause)}); "
                "try again"
            )
    if "scripts are no longer" in str(error):
        remedy = "try revision refs/convert/parquet"
    else:
        remedy = "correct it, or choose another"
    return UserError(f"{source} cannot be read ({first_sentence(error)}); {remedy}")
