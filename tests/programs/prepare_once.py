"""Prepare data in a process of its own, and print how many batches were tokenised.

    python -m tests.programs.prepare_once DATA_CONFIG_AS_JSON [--wait]

With `--wait`, the first batch prints "tokenising" and waits for a line on stdin. The last line on
stdout is a JSON object {"calls": number of batches, "key": name of the folder of shards}.
"""

import json
import sys
from threading import Lock

from pocketlm.config.sections import DataConfig
from pocketlm.corpus.chunks import Chunk
from pocketlm.data.prepare import prepare
from pocketlm.shards.builder import BuildSettings, EncodedSplits
from pocketlm.tokenizer.base import Tokenizer
from tests.support.preparation import CountingEncoder


class WaitingEncoder(CountingEncoder):
    """An encoder that announces its first batch, and waits for a line on stdin."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()
        self.announced = False

    def __call__(self, batch: list[Chunk], tokenizer: Tokenizer) -> EncodedSplits:
        with self.lock:
            if not self.announced:
                print("tokenising", flush=True)
                sys.stdin.readline()
                self.announced = True
        return super().__call__(batch, tokenizer)


def main() -> None:
    encoder = WaitingEncoder() if "--wait" in sys.argv else CountingEncoder()
    config = DataConfig(**json.loads(sys.argv[1]))
    data = prepare(config, BuildSettings(batch_size=2**14, encode=encoder))
    key = data.train.shards[0].path.parent.name
    print(json.dumps({"calls": encoder.calls, "key": key}))


if __name__ == "__main__":
    main()
