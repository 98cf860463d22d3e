"""Limits of the server: sizes, counts and times.

`ServerLimits` are the limits of one running server; the constants below are part of the API that
every server offers. A name says the unit: bytes, characters, tokens or seconds. Those of sampling
are in config/sampling.py, because infer.py and a run's config have them too.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one server. The first three are options of serve.py."""

    max_slots: int = 16  # sequences generated at the same time (KV-cache slots)
    max_queue: int = 128  # requests waiting for a slot
    deadline_seconds: float = 300  # an answer is cut off after this time

    max_connections: int = 1000
    max_body_bytes: int = 2**20
    head_seconds: float = 10  # to receive a request line and headers
    body_seconds: float = 30  # to receive a body
    idle_seconds: int = 30  # a keep-alive connection without a request
    write_seconds: float = 30  # a client that does not read its response
    shutdown_seconds: int = 5  # to send the last responses at shutdown


# Upper bounds of the options of serve.py.
MAX_SLOTS = 1024
MAX_QUEUE = 100_000
MAX_DEADLINE_SECONDS = 86_400


# Limits of a request.
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions
MAX_COMPLETION_TOKENS = 4096
MAX_LOGPROBS = 20
MAX_LOGPROB_ENTRIES = 500_000  # of a response, about 100 bytes each: tokens x (logprobs + 1)
MAX_LOGIT_BIASES = 300
MAX_PROMPTS = 64
MAX_NAME_CHARACTERS = 200  # of a --model-name
MAX_PROMPT_CHARACTERS = 100_000  # of all prompts or messages together, before encoding


# Responses.
MIN_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot represent
RETRY_AFTER_SECONDS = 1  # suggested to a client when the queue is full
MAX_QUOTED_CHARACTERS = 100  # of a client's text in an error message
MAX_QUOTED_KEY_CHARACTERS = 40  # of a JSON key or type in an error message

# Minimum interval between two updates of a stream: handing a token to the event loop costs more
# than a decoding step of a small model.
STREAM_INTERVAL_SECONDS = 0.025
