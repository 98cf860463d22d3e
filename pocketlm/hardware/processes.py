"""The processes of one run: a run on several devices or machines has one process per device."""

import os
import sys

# Each launcher (torchrun, Lightning, Slurm) sets some of these; unset means a single process.
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Return True in the only process of a run, or in the first of several."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def print_note(text: str) -> None:
    """Print a line on stderr, in the first process only."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)
