"""train.py as a script that a signal interrupts: the variable INTERRUPT is `step signal-number`.

A script of its own, and not a forked process, because Lightning starts the other processes of a
distributed run with the command line of the first one.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train  # noqa: E402
from pocketlm.errors import run_main  # noqa: E402
from tests.support.training import signal_after  # noqa: E402

if __name__ == "__main__":
    step, number = map(int, os.environ["INTERRUPT"].split())
    with signal_after(step, number):
        run_main(train.main)
