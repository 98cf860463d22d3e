"""The processes of one run: a run on several devices or machines has one process per device."""

import sys

from pocketlm.startup import is_first_process

__all__ = ["is_first_process", "print_note"]


def print_note(text: str) -> None:
    """Print a line on stderr, in the first process only."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
