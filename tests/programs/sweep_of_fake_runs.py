"""sweep.py, or another command after COMMAND, whose runs are those of fake_train.py.

python sweep_of_fake_runs.py COMMAND arguments
"""

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from pocketlm.errors import run_main  # noqa: E402
from pocketlm.sweeps import runs  # noqa: E402

if __name__ == "__main__":
    runs.TRAIN = (sys.executable, str(Path(__file__).with_name("fake_train.py")))
    run_main(lambda: import_module(sys.argv[1]).main(sys.argv[2:]))
