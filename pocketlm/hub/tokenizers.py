"""A tokenizer of the Hugging Face hub by its name."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pocketlm.errors import UserError
from pocketlm.hub.availability import check_hub
from pocketlm.hub.messages import translate_errors
from pocketlm.hub.resource import (
    HubResource,
    no_copy_error,
    print_copy_note,
    silence_libraries,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def hub_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Return the fast tokenizer of a repository on the hub, or its copy on this machine.

    A note on stderr says so if it is the copy. Raises UserError.
    """
    source = HubResource("tokenizer", name)
    status = check_hub(source)
    try:
        tokenizer = load_fast_tokenizer(source, offline=not status.available)
    except UserError as error:
        if status.available:
            raise
        raise no_copy_error(source, status.problem) from error.__cause__
    if not status.available:
        print_copy_note(source, status.problem)
    return tokenizer


def load_fast_tokenizer(source: HubResource, offline: bool) -> "PreTrainedTokenizerBase":
    """Load the tokenizer with transformers. Raises UserError, also if it has no vocabulary."""
    from transformers import AutoTokenizer  # before the offline switch, which it may copy

    silence_libraries()
    empty = UserError(f"{source} has no tokenizer.json, and no file to make one from; use another")
    with offline_mode(offline), translate_errors(source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source.name, use_fast=True, trust_remote_code=False
            )
        except ValueError as error:
            if "backend tokenizer" in str(error):
                raise empty from error
            raise
        vocabulary = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
        words = vocabulary - set(tokenizer.all_special_tokens)
        # if the library finds no file, it may make a tokenizer without words
        if not tokenizer.is_fast or len(words) < 2:
            raise empty
    return tokenizer


@contextlib.contextmanager
def offline_mode(offline: bool) -> Iterator[None]:
    """Set the one switch that every part of the library obeys."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
