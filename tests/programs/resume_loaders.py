"""Resume loaders in a process of its own, and print the batches that follow.

    python -m tests.programs.resume_loaders CASES

CASES is a file with a JSON list of [kind, number of workers, state, number of batches], with a kind
of tests/support/loaders.py. Prints a JSON list of batches for each case, one per line.
"""

import json
import sys
import warnings
from pathlib import Path

from tests.support.loaders import LOADERS, take


def main() -> None:
    warnings.simplefilter("ignore")  # more workers than cores
    for kind, num_workers, state, count in json.loads(Path(sys.argv[1]).read_text()):
        loader = LOADERS[kind](num_workers)
        loader.load_state_dict(state)
        print(json.dumps(take(loader, count)))


if __name__ == "__main__":
    main()
