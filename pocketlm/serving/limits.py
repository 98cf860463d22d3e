"""Limits of the server: sizes, counts, seconds."""

BODY_BYTES = 2**20


CONNECTIONS = 1000


HEAD_SECONDS = 10  # for a request line and headers to come


BODY_SECONDS = 30  # for a body to come


IDLE_SECONDS = 30  # a connection is kept without a request


WRITE_SECONDS = 30  # an answer waits for a client that does not read


STOP_SECONDS = 5  # for the last answers to leave, at the end


COMPLETION_TOKENS = 16  # OpenAI's default


MAX_TOKENS = 4096  # of a completion


MOST_LOGPROBS = 20


MOST_BIASES = 300


MOST_PROMPTS = 64


PROMPT_CHARACTERS = 100_000  # of all prompts or messages, before they are tokens


LEAST_LOGPROB = -9999.0  # as OpenAI writes it
