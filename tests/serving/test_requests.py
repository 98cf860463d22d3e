"""Wrong requests: each one is refused with a status, a code and the name of the field."""

import doctest
import json
from contextlib import suppress
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketlm.serving import requests
from pocketlm.serving.errors import ApiError
from pocketlm.serving.requests import UNSUPPORTED_FIELDS, ChatBody, CompletionBody, parse
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
    *cases("invalid_value", "repetition_penalty", 0, 1e-30, 1e30),
    *cases("invalid_type", "no_repeat_ngram", *WRONG_TYPES, 1.5),
    *cases("invalid_value", "no_repeat_ngram", -2, 101, 10**9),
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
    *cases("invalid_type", "echo", 1),
    *cases("unsupported_parameter", "suffix", "x"),
    *cases("unsupported_parameter", "best_of", 2),
    *cases("invalid_type", "presence_penalty", *WRONG_TYPES),
    *cases("invalid_value", "presence_penalty", 2.5, -2.5),
    *cases("invalid_type", "frequency_penalty", *WRONG_TYPES),
    *cases("invalid_value", "frequency_penalty", 2.5, -2.5),
    *cases("unsupported_parameter", "min_tokens", 5),
    *cases("unsupported_parameter", "ignore_eos", True, 0),
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
    "tool calls": (
        "messages",
        [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
        "messages[0].tool_calls",
        "invalid_value",
    ),
    "refusal": (
        "messages",
        [{"role": "assistant", "content": None, "refusal": "no"}],
        "messages[0].refusal",
        "invalid_value",
    ),
    "echo": ("echo", True, "echo", "unsupported_parameter"),
    "content is not Unicode": (
        "messages",
        [user_message(content="\udfff")],
        "messages[0].content",
        "invalid_value",
    ),
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
    others = {"user": "me", "stop": None, "n": None, "frequency_penalty": 0.0, "min_tokens": 0.0}
    ignored = {"metadata": {"a": "b"}, "prompt_cache_key": "k", "unknown": None, "logprobs": False}
    fields = neutral | others | ignored | {"stream_options": {}}
    response = server.post("/v1/completions", json=COMPLETION | fields)
    assert response.status_code == 200
    assert response.json()["choices"][0]["logprobs"] is None


TOLERATED_MESSAGES = {
    "no tool calls": {"role": "assistant", "content": "hello", "tool_calls": []},
    "null": {"role": "assistant", "content": None, "tool_calls": None, "function_call": None},
    "no content": {"role": "assistant"},
    "empty content of a user": {"role": "user", "content": None},
    "annotations": {"role": "assistant", "content": "hello", "annotations": [], "refusal": None},
    "name": {"role": "user", "content": "hello", "name": "bob"},
    "unknown keys": {"role": "assistant", "content": "hello", "reasoning_content": "?", "id": 3},
    "a part with a hint": {
        "role": "user",
        "content": [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}],
    },
}
TOLERATED_FIELDS = {
    "no top_logprobs": {"logprobs": False, "top_logprobs": 0},
    "no stream options": {"stream_options": {}},
    "no usage": {"stream_options": {"include_usage": False}},
    "one limit twice": {"max_tokens": 4, "max_completion_tokens": 4},
    "no tools": {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("message", TOLERATED_MESSAGES.values(), ids=TOLERATED_MESSAGES)
def test_what_asks_for_nothing_in_a_message_changes_nothing(
    server: RunningServer, message: dict[str, Any], stream: bool
) -> None:
    """The answer is that to the same conversation of roles and plain texts."""
    content = message.get("content")
    text = content[0]["text"] if isinstance(content, list) else content or ""
    plain = {"role": message["role"], "content": text}
    answers = []
    for second in (message, plain):
        response = server.chat([*MESSAGES, second], temperature=0, max_tokens=4, stream=stream)
        if stream:
            answers.append("".join(chunk.choices[0].delta.content for chunk in response))
        else:
            answers.append(response.choices[0].message.content)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("fields", TOLERATED_FIELDS.values(), ids=TOLERATED_FIELDS)
def test_a_field_that_asks_for_nothing_is_no_error(
    server: RunningServer, fields: dict[str, Any]
) -> None:
    options = {"max_tokens": 4, "temperature": 0} | fields
    choice = server.chat(**options).choices[0]
    assert (
        choice.message.content
        == server.chat(max_tokens=4, temperature=0).choices[0].message.content
    )
    assert choice.logprobs is None


@pytest.mark.parametrize(
    "field, value, limits",
    [
        ("max_tokens", -1, "from 1 to 4,096"),
        ("max_tokens", 10**6, "from 1 to 4,096"),
        ("n", -1, "from 1 to 16"),
        ("n", 500, "from 1 to 16"),
        ("logprobs", 10**6, "from 0 to 20"),
        ("no_repeat_ngram", 10**9, "from 0 to 100"),
    ],
)
def test_the_limit_told_is_the_limit_that_holds(
    server: RunningServer, field: str, value: int, limits: str
) -> None:
    error = error_of(server.post("/v1/completions", json=COMPLETION | {field: value}))
    assert limits in error["message"]
    if field in ("max_tokens", "n"):  # the largest value is accepted
        largest = int(limits.rpartition(" ")[2].replace(",", ""))
        body = COMPLETION | {"stop_ids": list(range(64)), "max_tokens": 1} | {field: largest}
        assert server.post("/v1/completions", json=body).status_code == 200


def test_a_response_of_millions_of_log_probabilities_is_refused(server: RunningServer) -> None:
    body = COMPLETION | {"n": 16, "max_tokens": 4096, "logprobs": 20}
    error = error_of(server.post("/v1/completions", json=body))
    assert (error["param"], error["code"]) == ("logprobs", "invalid_value")
    assert f"{16 * 4096 * 21:,} log-probabilities; the maximum is 500,000" in error["message"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=9), values),
    max_leaves=12,
)
MESSAGE_KEYS = st.sampled_from(["role", "content", "name", "tool_calls", "refusal", "type", "text"])
FIELD_NAMES = st.sampled_from(
    [*CompletionBody.model_fields, *ChatBody.model_fields, *UNSUPPORTED_FIELDS, "colour"]
)
SENSIBLE = st.sampled_from(["user", "small", "hello", 1, 0.5, [1, 2], {"7": 3}, MESSAGES])
BODIES = st.dictionaries(
    FIELD_NAMES,
    SENSIBLE | JSON_VALUES | st.lists(st.dictionaries(MESSAGE_KEYS, SENSIBLE | JSON_VALUES)),
)


@settings(max_examples=40, deadline=None)
@given(BODIES.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_any_body_is_parsed_or_refused(raw: bytes) -> None:
    for kind in (CompletionBody, ChatBody):
        with suppress(ApiError):
            assert isinstance(parse(kind, raw), kind)


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
