"""Read datasets and tokenizers of the hub: the calls, in JSON, are the only argument.

Prints a line of JSON for each: its rows or ids, or the message of its UserError. Of the environment
it reads what the libraries read, and

    HUB_TIMEOUT           seconds in place of availability.TIMEOUT
    NO_ANSWER_TO_NAMES    if set, no server of names answers
"""

import json
import os
import signal
import socket
import sys
import time

from pocketlm.errors import UserError
from pocketlm.hub import availability
from pocketlm.hub.datasets import hub_rows
from pocketlm.hub.messages import translate_errors
from pocketlm.hub.resource import HubResource
from pocketlm.hub.tokenizers import hub_tokenizer

MINUTES = 5  # in which the libraries' own retries would not end
SETTINGS = {"config_name": None, "split": "train", "revision": None, "streaming": False}
SLOW = {"datasets", "huggingface_hub", "transformers"}


def answer(call: dict) -> list:
    if "tokenizer" in call:
        return hub_tokenizer(call["tokenizer"]).convert_tokens_to_ids(["world", "hello"])
    rows = hub_rows(**SETTINGS | call)
    with translate_errors(HubResource("dataset", call["name"])):
        return [row["text"] for row in rows]


if __name__ == "__main__":
    assert not SLOW & set(sys.modules), "importing hub is quick"
    signal.alarm(MINUTES * 60)
    availability.TIMEOUT = float(os.environ.get("HUB_TIMEOUT", availability.TIMEOUT))
    if os.environ.get("NO_ANSWER_TO_NAMES"):
        socket.getaddrinfo = lambda *args, **kwargs: time.sleep(60)
    for call in json.loads(sys.argv[1]):
        try:
            result = answer(call)
        except UserError as error:
            result = str(error)
        print(json.dumps(result), flush=True)
