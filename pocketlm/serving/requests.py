"""What OpenAI's API says: the shapes of requests, answers and errors. Nothing here knows of HTTP or of the engine's thread.

A body is JSON without repeated keys, NaN and lone surrogates; every field has its type, and one that is not known is refused.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pocketlm.config.sampling import MOST_STOPS, SamplingParams
from pocketlm.serving.limits import MOST_BIASES, MOST_LOGPROBS

# Fields that OpenAI has and this server has not, with the values by which they ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,), "suffix": ("",), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "tools": ([],),
    "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (),
    "reasoning_effort": (), "verbosity": (), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"),
    "prompt_cache_key": (), "safety_identifier": (),
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error: its status, a sentence, the field it is about, and OpenAI's code for it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        **headers: str,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> bytes:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status
        )
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return to_json(
            {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
        )


def to_json(value: Any) -> bytes:
    """In ASCII: what a client sent may come back in a message, and need not be Unicode."""
    return json.dumps(value, separators=(",", ":")).encode()


# ---- requests --------------------------------------------------------------------------------------------------------


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value)


def as_unicode(text: str) -> str:
    """JSON can spell half a character, and no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"is not valid Unicode: {error.reason} at character {error.start}"
        ) from None
    return text


def as_prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, ids or lists of ids, as a list."""
    if isinstance(value, str) or is_ids(value):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return [as_unicode(each) for each in value]
    if isinstance(value, list) and value and all(map(is_ids, value)):
        return value
    raise ValueError(
        "is a text, a list of texts, a list of ids or a list of lists of ids, none of the lists empty and all ids 0 or more"
    )


def as_stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    value = [value] if isinstance(value, str) else value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(map(as_unicode, value))
    raise ValueError("is a text or a list of texts")


def as_bias(value: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(
                f'has the key {key[:40]!r}, where the id of a token is meant, as in {{"50256": -100}}'
            )
    if len({int(key) for key in value}) < len(value):
        raise ValueError("has one id twice")
    return tuple((int(key), bias) for key, bias in value.items())


def as_content(value: Any) -> str:
    """A text, or a list of parts that are texts."""
    if isinstance(value, str):
        return as_unicode(value)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError('is a text, or a list of parts {"type": "text", "text": ...}')
    for part in value:
        if part.get("type") != "text":
            raise ValueError(
                f"has a part of type {str(part.get('type'))[:40]!r}; this model reads text alone"
            )
        if not isinstance(part.get("text"), str) or len(part) > 2:
            raise ValueError(
                'has a part of type \'text\' that is not {"type": "text", "text": ...}'
            )
    return as_unicode("".join(part["text"] for part in value))


Bias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MOST_BIASES),
    AfterValidator(as_bias),
]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Body(Strict):
    """What both endpoints take; None is what is not given. Ranges are SamplingParams' own, and the engine's."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: Annotated[Any, AfterValidator(as_stops)] = None
    stop_ids: Annotated[list[int], Field(max_length=MOST_STOPS)] | None = None
    logit_bias: Bias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # whoever asks; of no consequence here

    likeliest_name: ClassVar[str]

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens to tell of beside each token; None: tell nothing."""
        raise NotImplementedError

    def sampling(self, max_tokens: int | None, default: int) -> dict[str, Any]:
        """What is given, by SamplingParams' names."""
        given = {
            field.name: getattr(self, field.name, None) for field in fields(SamplingParams)
        } | {"num_samples": self.n}
        given["max_new_tokens"] = default if max_tokens is None else max_tokens
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if value is not None
        }


class CompletionBody(Body):
    prompt: Annotated[Any, AfterValidator(as_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    likeliest_name = "logprobs"

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, AfterValidator(as_content)]
    name: None = None  # these may be there as null, as OpenAI's own client sends an answer back
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None


class ChatBody(Body):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    likeliest_name = "top_logprobs"

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parse(kind: type[Body], raw: bytes) -> Any:
    """The request that a body is. Raises ApiError, which names the field."""
    data = read_json(raw)
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    for name in data.keys() & UNSUPPORTED.keys():
        value = data.pop(name)
        if value is not None and not (
            value in UNSUPPORTED[name]
            and isinstance(value, bool) == isinstance(UNSUPPORTED[name][0], bool)
        ):
            raise ApiError(
                400,
                f"{name} is not supported by this server; leave it out",
                name,
                "unsupported_parameter",
            )
    try:
        asked = kind.model_validate(data)
    except ValidationError as error:
        raise as_api_error(error) from None
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(
            400,
            "stream_options is for answers that stream; set stream to true",
            "stream_options",
            "invalid_value",
        )
    if isinstance(asked, ChatBody):
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs: true", "top_logprobs", "invalid_value"
            )
        if None not in (asked.max_tokens, asked.max_completion_tokens):
            raise ApiError(
                400,
                "max_completion_tokens and max_tokens are one; give either",
                "max_completion_tokens",
                "invalid_value",
            )
    return asked


def read_json(raw: bytes) -> Any:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ApiError(400, f"{twice[:40]} is given twice", twice[:40], "duplicate_key")
        return found

    def no_constant(name: str) -> None:
        raise ApiError(400, f"the body is not JSON: it has no {name}", code="invalid_json")

    try:
        text = raw.decode()
        return json.loads(text, object_pairs_hook=no_repeats, parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(
            400,
            f"the body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}",
            code="invalid_json",
        ) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:  # JSONDecodeError, and numbers of thousands of digits
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def as_api_error(error: ValidationError) -> ApiError:
    """Of the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    kind, place = first["type"], [part for part in first["loc"] if part != "[key]"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(
        "."
    )[:100]
    if kind == "extra_forbidden":
        return ApiError(
            400, f"{param} is no field of this request; leave it out", param, "unknown_parameter"
        )
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param, "missing_required_parameter")
    if kind == "value_error":
        return ApiError(400, f"{param} {first['ctx']['error']}", param, "invalid_value")
    said = first["msg"].replace("Input should be", "must be")
    return ApiError(
        400,
        f"{param}: {said[:1].lower() + said[1:]}",
        param,
        "invalid_type" if "type" in kind else "invalid_value",
    )
