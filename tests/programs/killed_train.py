"""train.py, killed by SIGKILL before the last step's checkpoint or picture gets the name NAME.

python killed_train.py NAME STEP arguments of train.py
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train  # noqa: E402
from pocketlm.errors import run_main  # noqa: E402

rename = os.replace


def rename_or_die(source: Path, target: Path) -> None:
    name, step = sys.argv[1:3]
    if Path(target).name == name and Path(target).with_name(f"step-{int(step):08d}.ckpt").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)


if __name__ == "__main__":
    os.replace = rename_or_die
    run_main(lambda: train.main(sys.argv[3:]))
