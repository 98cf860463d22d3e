"""train.py with a stderr that is closed, full, or a pipe whose reader leaves after the first step.

The first argument is one of `closed`, `full` and `pipe`; the others are those of train.py.
"""

import os
import runpy
import sys
import threading
from pathlib import Path


def leave_after_the_first_step(reader: int) -> None:
    text = b""
    while b"step 1/" not in text:
        text += os.read(reader, 4096)
    os.close(reader)


kind = sys.argv.pop(1)
sys.argv[0] = str(Path(__file__).parents[2] / "train.py")
if kind == "closed":
    os.close(2)
    sys.stderr = None  # as Python itself does
elif kind == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
else:
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    threading.Thread(target=leave_after_the_first_step, args=(reader,)).start()
runpy.run_path(sys.argv[0], run_name="__main__")
