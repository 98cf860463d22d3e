"""Request bodies of the API and their validation.

    body = parse(CompletionBody, raw)  # or ChatBody; raises ApiError

The fields are OpenAI's, plus those of SamplingParams. A body is JSON in UTF-8 without duplicate
keys, NaN or unpaired surrogates; types are strict, and an unknown field is an error. This module
knows neither HTTP nor the engine.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pocketlm.config.sampling import MAX_STOP_STRINGS, SamplingParams
from pocketlm.serving.errors import ApiError, invalid, invalid_json
from pocketlm.serving.limits import (
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_QUOTED_CHARACTERS,
    MAX_QUOTED_KEY_CHARACTERS,
)

# Fields of OpenAI's API that this server does not support, each with the values that have no
# effect: a client may send those, or null.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "echo": (False,), "suffix": ("",), "best_of": (1,), "store": (False,), "metadata": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "service_tier": ("auto", "default"),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False),
    "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
    "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": (),
    "verbosity": (), "prompt_cache_key": (), "safety_identifier": (),
}  # fmt: skip


# ---- validators of fields; a message continues the sentence that the field's name begins ----


def is_token_ids(value: Any) -> bool:
    """Return True for a non-empty list of integers that are 0 or more."""
    if not isinstance(value, list) or not value:
        return False
    return all(type(i) is int and i >= 0 for i in value)


def check_unicode(text: str) -> str:
    """Return `text`; raise ValueError for an unpaired surrogate, which JSON can contain."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"is not valid Unicode: {error.reason} at character {error.start}"
        ) from None
    return text


def to_prompts(value: Any) -> list[str | list[int]]:
    """Return a prompt in any of its four forms as a list of strings or of lists of token ids."""
    prompts = [value] if isinstance(value, str) or is_token_ids(value) else value
    if isinstance(prompts, list) and prompts:
        if all(isinstance(prompt, str) for prompt in prompts):
            return [check_unicode(prompt) for prompt in prompts]
        if all(is_token_ids(prompt) for prompt in prompts):
            return prompts
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of token "
        "ids; no list may be empty, and ids must be 0 or more"
    )


def to_stop_strings(value: Any) -> tuple[str, ...] | None:
    """Return one stop string or a list of them as a tuple."""
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    if isinstance(stops, list) and all(isinstance(stop, str) for stop in stops):
        return tuple(check_unicode(stop) for stop in stops)
    raise ValueError("must be a string or a list of strings")


def to_logit_bias(value: dict[str, float]) -> tuple[tuple[int, float], ...]:
    """Return the pairs (token id, bias) of a JSON object whose keys are token ids."""
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(
                f"has the key {key[:MAX_QUOTED_KEY_CHARACTERS]!r}; "
                'keys must be token ids, for example {"50256": -100}'
            )
    if len({int(key) for key in value}) < len(value):
        raise ValueError("contains the same token id twice")
    return tuple((int(key), bias) for key, bias in value.items())


def to_content(value: Any) -> str:
    """Return a message's text, given as a string or as a list of text parts."""
    if isinstance(value, str):
        return check_unicode(value)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError('must be a string or a list of parts {"type": "text", "text": ...}')
    for part in value:
        if part.get("type") != "text":
            part_type = str(part.get("type"))[:MAX_QUOTED_KEY_CHARACTERS]
            raise ValueError(f"has a part of type {part_type!r}; this model accepts text only")
        if not isinstance(part.get("text"), str) or len(part) > 2:
            raise ValueError(
                'has a text part that is not of the form {"type": "text", "text": ...}'
            )
    return check_unicode("".join(part["text"] for part in value))


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIASES),
    AfterValidator(to_logit_bias),
]
LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


# ---- bodies ----


class StrictModel(BaseModel):
    """A JSON object without type conversion, unknown fields, infinities or NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class RequestBody(StrictModel):
    """Fields of both endpoints; None if absent. SamplingParams and the engine check the ranges."""

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
    stop: Annotated[Any, AfterValidator(to_stop_strings)] = None
    stop_ids: Annotated[list[int], Field(max_length=MAX_STOP_STRINGS)] | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # the end user's name; ignored

    logprobs_field: ClassVar[str]  # the field that holds `requested_logprobs`

    @property
    def requested_logprobs(self) -> int | None:
        """Number of top log-probabilities to return per token; None disables them."""
        raise NotImplementedError

    @property
    def requested_max_tokens(self) -> int | None:
        """Maximum number of tokens to generate, if the client set one."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling_options(self, default_max_tokens: int) -> dict[str, Any]:
        """Return the sampling fields that are present, under their names in SamplingParams."""
        max_tokens = self.requested_max_tokens
        options = {field.name: getattr(self, field.name, None) for field in fields(SamplingParams)}
        options["num_samples"] = self.n
        options["max_new_tokens"] = default_max_tokens if max_tokens is None else max_tokens
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in options.items()
            if value is not None
        }


class CompletionBody(RequestBody):
    """Body of POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(to_prompts)]
    logprobs: LogprobCount | None = None

    logprobs_field = "logprobs"

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs


class ChatMessage(StrictModel):
    """A message of a conversation.

    The fields of type None may be present as null, because OpenAI's client sends back the
    assistant messages that it received.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, AfterValidator(to_content)]
    name: None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: None = None


class ChatBody(RequestBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None

    logprobs_field = "top_logprobs"

    @property
    def requested_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def requested_max_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


# ---- parsing ----

BodyT = TypeVar("BodyT", bound=RequestBody)


def parse(kind: type[BodyT], raw: bytes) -> BodyT:
    """Return the validated body. Raises ApiError, naming the field."""
    data = read_json(raw)
    if not isinstance(data, dict):
        raise invalid_json("the body is not a JSON object")
    remove_unsupported(data)
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise api_error_from_validation(error) from None
    check_combinations(body)
    return body


def remove_unsupported(data: dict[str, Any]) -> None:
    """Remove unsupported fields without effect; raise ApiError for one that has an effect."""
    for name, neutral in UNSUPPORTED_FIELDS.items():
        value = data.pop(name, None)
        if value is None:
            continue
        # In Python 0 == False and 1 == True; in JSON they differ.
        is_neutral = value in neutral and isinstance(value, bool) == isinstance(neutral[0], bool)
        if not is_neutral:
            raise invalid(
                name, f"{name} is not supported by this server; remove it", "unsupported_parameter"
            )


def check_combinations(body: RequestBody) -> None:
    """Raise ApiError if two fields contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise invalid(
            "stream_options", "stream_options applies to streamed responses only; set stream: true"
        )
    if not isinstance(body, ChatBody):
        return
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid(
            "max_completion_tokens",
            "max_completion_tokens and max_tokens mean the same; use only one of them",
        )


def read_json(raw: bytes) -> Any:
    """Return the JSON value. Raises ApiError for anything else, and for duplicate keys."""
    try:
        return json.loads(
            raw.decode(),
            object_pairs_hook=object_without_duplicates,
            parse_constant=reject_constant,
        )
    except UnicodeDecodeError as error:
        raise invalid_json(
            f"the body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}"
        ) from None
    except RecursionError:
        raise invalid_json("the body is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise invalid_json(f"the body is not JSON: {error}") from None


def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dict; raise ApiError for a duplicate key."""
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        duplicate = next(key for key in keys if keys.count(key) > 1)[:MAX_QUOTED_KEY_CHARACTERS]
        raise invalid(duplicate, f"{duplicate} occurs twice", "duplicate_key")
    return result


def reject_constant(name: str) -> NoReturn:
    """Raise ApiError for NaN, Infinity or -Infinity, which Python's parser accepts."""
    raise invalid_json(f"the body is not JSON: {name} is not a JSON value")


def field_path(location: tuple[str | int, ...]) -> str:
    """Return the path of a field as OpenAI writes it.

    >>> field_path(("messages", 0, "content"))
    'messages[0].content'
    """
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":  # pydantic's marker for an error in a key, not in its value
            path += f".{part}"
    return path.lstrip(".")[:MAX_QUOTED_CHARACTERS]


def api_error_from_validation(error: ValidationError) -> ApiError:
    """Return the ApiError for the first validation error."""
    first = error.errors(include_url=False)[0]
    kind, param = first["type"], field_path(first["loc"])
    if kind == "extra_forbidden":
        return invalid(
            param, f"{param} is not a field of this request; remove it", "unknown_parameter"
        )
    if kind == "missing":
        return invalid(param, f"{param} is missing", "missing_required_parameter")
    if kind == "value_error":
        return invalid(param, f"{param} {first['ctx']['error']}")
    message = first["msg"].replace("Input should be", "must be")
    message = message[:1].lower() + message[1:]
    code = "invalid_type" if "type" in kind else "invalid_value"
    return invalid(param, f"{param}: {message}", code)
