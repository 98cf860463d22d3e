"""train.py, of whose processes RANK gets a SIGKILL after STEP, unless torchrun has restarted it.

torchrun --nproc-per-node 2 killed_rank.py RANK STEP arguments of train.py
"""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train  # noqa: E402
from pocketlm.errors import run_main  # noqa: E402
from tests.support.training import signal_after  # noqa: E402

if __name__ == "__main__":
    rank, step, *sys.argv[1:] = sys.argv[1:]
    first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    with signal_after(int(step), signal.SIGKILL, int(rank)) if first_start else nullcontext():
        run_main(train.main)
