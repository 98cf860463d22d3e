"""Wrong requests: each one is refused with a status, a code and the name of the field."""

import doctest
import json
from typing import Any

import openai
import pytest

from pocketlm.serving import requests
from pocketlm.serving.requests import UNSUPPORTED_FIELDS
from tests.support.server import MESSAGES, RunningServer, error_of

COMPLETION = {"model": "small", "prompt": "hello"}
CHAT = {"model": "small", "messages": MESSAGES}


def cases(code: str, field: str, *values: object) -> list:
    """Return a parameter for each value; its id shows the field and the beginning of the value."""
    return [pytest.param(field, value, code, id=case_id(field, value)) for value in values]


def case_id(field: str, value: object) -> str:
    text = ascii(value)
    return f"{field}={text if len(text) < 40 else text[:30] + '...'}"


WRONG_TYPES = ("1", True, [1], {})
WRONG_COMPLETION_FIELDS = [
    *cases("invalid_type", "model", 3, None),
    *cases("invalid_value", "prompt", 3, [], [[]], [1, "a"], [True], [-1], [10**30], {"a": 1}),
    *cases("invalid_value", "prompt", "\ud800"),
    *cases("array_above_max_length", "prompt", ["a"] * 65),
    *cases("string_above_max_length", "prompt", "a" * 100_001),
    *cases("context_length_exceeded", "prompt", "a " * 200, [5] * 257),
    *cases("invalid_type", "max_tokens", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "max_tokens", 0, -1, 4097, 10**30),
    *cases("invalid_type", "n", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "n", 0, -1, 4097, 10**30),
    *cases("invalid_type", "seed", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "seed", -1, 2**63),
    *cases("invalid_type", "temperature", *WRONG_TYPES),
    *cases("invalid_value", "temperature", -1),
    *cases("invalid_type", "top_p", *WRONG_TYPES),
    *cases("invalid_value", "top_p", 0, 1.1),
    *cases("invalid_type", "top_k", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "top_k", -1, 10**9),
    *cases("invalid_type", "min_p", *WRONG_TYPES),
    *cases("invalid_value", "min_p", 2),
    *cases("invalid_type", "repetition_penalty", *WRONG_TYPES),
    *cases("invalid_value", "repetition_penalty", 0),
    *cases("invalid_type", "no_repeat_ngram", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "no_repeat_ngram", -2),
    *cases("invalid_type", "logprobs", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "logprobs", 21, -1),
    *cases("invalid_value", "stop", 5, [5], "", ["a"] * 65, "a" * 1001),
    *cases("invalid_type", "stop_ids", ["a"]),
    *cases("invalid_value", "stop_ids", [-1], [10**6]),
    *cases("invalid_type", "logit_bias", [1]),
    *cases("invalid_value", "logit_bias", {"a": 1}, {"1": 101}, {"999999": 1}, {"-1": 1}),
    *cases("invalid_value", "logit_bias", {"1": 1, "01": 2}, {str(i): 1 for i in range(301)}),
    *cases("invalid_type", "stream", "yes", 1),
    *cases("invalid_value", "stream_options", {"include_usage": True}),
    *cases("invalid_type", "user", 5),
    *cases("unknown_parameter", "colour", 1),
    *cases("unknown_parameter", "max_new_tokens", 5),
    *cases("unsupported_parameter", "echo", True),
    *cases("unsupported_parameter", "suffix", "x"),
    *cases("unsupported_parameter", "best_of", 2),
    *cases("unsupported_parameter", "presence_penalty", 0.5),
    *cases("unsupported_parameter", "frequency_penalty", -1),
]


def user_message(**fields: object) -> dict[str, object]:
    return {"role": "user", "content": "x"} | fields


TOOL_MESSAGE = {"role": "tool", "content": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
PRIVATE_USE = "".join(map(chr, range(0xE000, 0xF8FF)))  # one of them must be free for the template
WRONG_CHAT_FIELDS = {
    "no messages": ("messages", [], "messages", "invalid_value"),
    "messages are a string": ("messages", "hi", "messages", "invalid_type"),
    "no content": (
        "messages",
        [{"role": "user"}],
        "messages[0].content",
        "missing_required_parameter",
    ),
    "unknown role": ("messages", [*MESSAGES, TOOL_MESSAGE], "messages[1].role", "invalid_value"),
    "content is null": (
        "messages",
        [user_message(content=None)],
        "messages[0].content",
        "invalid_value",
    ),
    "content is not Unicode": (
        "messages",
        [user_message(content="\udfff")],
        "messages[0].content",
        "invalid_value",
    ),
    "name": ("messages", [user_message(name="y")], "messages[0].name", "invalid_value"),
    "image": ("messages", [user_message(content=[IMAGE])], "messages[0].content", "invalid_value"),
    "too long": (
        "messages",
        [user_message(content="x " * 300)],
        "messages",
        "context_length_exceeded",
    ),
    "all private-use characters": (
        "messages",
        [user_message(content=PRIVATE_USE)],
        "messages",
        "invalid_value",
    ),
    "tools": ("tools", [{"type": "function"}], "tools", "unsupported_parameter"),
    "JSON mode": (
        "response_format",
        {"type": "json_object"},
        "response_format",
        "unsupported_parameter",
    ),
    "logprobs is a number": ("logprobs", 5, "logprobs", "invalid_type"),
    "top_logprobs without logprobs": ("top_logprobs", 5, "top_logprobs", "invalid_value"),
    "prompt": ("prompt", "x", "prompt", "unknown_parameter"),
    "no tokens": ("max_completion_tokens", 0, "max_tokens", "invalid_value"),
}


@pytest.mark.parametrize("field, value, code", WRONG_COMPLETION_FIELDS)
def test_a_wrong_field_of_a_completion_is_named(
    server: RunningServer, field: str, value: Any, code: str
) -> None:
    body = json.dumps(COMPLETION | {field: value})
    error = error_of(server.post("/v1/completions", content=body))
    top_level_field = error["param"].partition("[")[0].partition(".")[0]
    assert (top_level_field, error["code"]) == (field, code)
    assert field in error["message"] or code == "context_length_exceeded"


@pytest.mark.parametrize(
    "field, value, param, code", WRONG_CHAT_FIELDS.values(), ids=WRONG_CHAT_FIELDS
)
def test_a_wrong_field_of_a_chat_is_named_with_its_path(
    server: RunningServer, field: str, value: Any, param: str, code: str
) -> None:
    body = json.dumps(CHAT | {field: value})
    error = error_of(server.post("/v1/chat/completions", content=body))
    assert (error["param"], error["code"]) == (param, code)


@pytest.mark.parametrize("missing", ["model", "prompt"])
def test_a_missing_field_is_named(server: RunningServer, missing: str) -> None:
    body = {name: value for name, value in COMPLETION.items() if name != missing}
    assert error_of(server.post("/v1/completions", json=body))["param"] == missing


def test_the_server_answers_after_a_wrong_request(server: RunningServer) -> None:
    error_of(server.post("/v1/completions", json=COMPLETION | {"n": -1}))
    assert server.complete().choices


def test_unsupported_fields_are_accepted_with_values_that_have_no_effect(
    server: RunningServer,
) -> None:
    neutral = {name: values[0] if values else None for name, values in UNSUPPORTED_FIELDS.items()}
    others = {"user": "me", "stop": None, "n": None, "frequency_penalty": 0.0}
    response = server.post("/v1/completions", json=COMPLETION | neutral | others)
    assert response.status_code == 200


DEEP = b"[" * 100_000 + b"]" * 100_000
START = b'{"model":"small","prompt":"a",'
WRONG_BODIES = {
    "empty": (b"", "invalid_json"),
    "incomplete": (b"{", "invalid_json"),
    "list": (b"[]", "invalid_json"),
    "null": (b"null", "invalid_json"),
    "not UTF-8": (b"\xff\xfe{}", "invalid_json"),
    "deep list": (DEEP, "invalid_json"),
    "deep value": (b'{"model":' + DEEP + b"}", "invalid_json"),
    "NaN": (b'{"a":NaN}', "invalid_json"),
    "infinity": (b'{"a":-Infinity}', "invalid_json"),
    "duplicate key": (START + b'"prompt":"b"}', "duplicate_key"),
    "float overflow": (START + b'"temperature":1e999}', "invalid_value"),
    "huge integer": (START + b'"seed":' + b"9" * 5000 + b"}", "invalid_json"),
    "surrogate key": (START + b'"\\ud800":1}', "invalid_value"),
}


@pytest.mark.parametrize("body, code", WRONG_BODIES.values(), ids=WRONG_BODIES)
def test_a_body_that_is_not_a_request_is_refused(
    server: RunningServer, body: bytes, code: str
) -> None:
    assert error_of(server.post("/v1/completions", content=body))["code"] == code


def test_openais_client_raises_the_same_exceptions_as_with_openai(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.complete(temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as error:
        server.client.completions.create(model="gpt-4", prompt="x")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


def test_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(requests).failed == 0
