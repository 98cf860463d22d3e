"""Request bodies of the API and their validation.

    body = parse(CompletionBody, raw)  # or ChatBody; raises ApiError

The fields are OpenAI's, plus those of SamplingParams. A body is JSON in UTF-8 without duplicate
keys, NaN or unpaired surrogates; types are strict. A field that asks for something this server does
not do is an error, as is an unknown one; what asks for nothing (null, an empty list, a default) is
ignored, since many clients send it. This module knows neither HTTP nor the engine.
"""

import json
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pocketlm.config.sampling import MAX_STOP_STRINGS, SamplingParams
from pocketlm.serving.errors import ApiError, invalid, invalid_json
from pocketlm.serving.limits import (
    MAX_LOGIT_BIASES,
    MAX_QUOTED_CHARACTERS,
    MAX_QUOTED_KEY_CHARACTERS,
)

# Fields that this server does not support, each with the values that have no effect: a client may
# send those, or null. The first group is OpenAI's, the second that of vLLM and llama.cpp.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "echo": (False,), "suffix": ("",), "best_of": (1,), "store": (False,),
    "service_tier": ("auto", "default"), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
    "verbosity": ("medium",),

    "min_tokens": (0,), "ignore_eos": (False,), "use_beam_search": (False,), "length_penalty": (1,),
    "skip_special_tokens": (True,), "include_stop_str_in_output": (False,), "typical_p": (1,),
    "mirostat": (0,), "cache_prompt": (True, False), "chat_template_kwargs": ({},),
}  # fmt: skip

# Fields that never affect the response: names of the client's own, and hints for a cache.
IGNORED_FIELDS = ("metadata", "prompt_cache_key", "safety_identifier")


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
    """Return a message's text, given as a string or as a list of text parts; "" for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return check_unicode(value)
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError('must be a string or a list of parts {"type": "text", "text": ...}')
    for part in value:
        if part.get("type") != "text":
            part_type = str(part.get("type"))[:MAX_QUOTED_KEY_CHARACTERS]
            raise ValueError(f"has a part of type {part_type!r}; this model accepts text only")
        if not isinstance(part.get("text"), str):
            raise ValueError(
                'has a text part that is not of the form {"type": "text", "text": ...}'
            )
    return check_unicode("".join(part["text"] for part in value))


def to_nothing(value: Any) -> None:
    """Return None for null and for an empty string, list or object."""
    if value not in (None, "", [], {}):
        raise ValueError("is not supported: this model reads text only; remove it")


def false_to_none(value: Any) -> Any:
    return None if value is False else value


def one_or_list(item: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of a value or a list of such values."""
    return {"anyOf": [item, {"type": "array", "items": item}]}


TEXT, IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}
TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": TEXT},
    "required": ["type", "text"],
}
Prompt = Annotated[
    Any,
    AfterValidator(to_prompts),
    WithJsonSchema({"anyOf": [one_or_list(TEXT), one_or_list(IDS)]}),
]
StopStrings = Annotated[
    Any,
    AfterValidator(to_stop_strings),
    WithJsonSchema({"anyOf": [one_or_list(TEXT), {"type": "null"}]}),
]
Content = Annotated[
    Any,
    AfterValidator(to_content),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "items": TEXT_PART}, {"type": "null"}]}),
]
Nothing = Annotated[Any, AfterValidator(to_nothing), WithJsonSchema({"type": "null"})]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIASES),
    AfterValidator(to_logit_bias),
]


# ---- bodies ----


class StrictModel(BaseModel):
    """A JSON object without type conversion, unknown fields, infinities or NaN."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: Literal[False] | None = None  # vLLM's


class RequestBody(StrictModel):
    """Fields of both endpoints; None if absent. The service and SamplingParams check the ranges."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    no_repeat_ngram: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: StopStrings = None
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
    def repeats_prompt(self) -> bool:
        """True if the text begins with the prompt."""
        return False

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

    prompt: Prompt
    logprobs: Annotated[int | None, BeforeValidator(false_to_none)] = None
    echo: bool | None = None  # begin the text, and its log-probabilities, with the prompt

    logprobs_field = "logprobs"

    @property
    def requested_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def repeats_prompt(self) -> bool:
        return bool(self.echo)


class ChatMessage(StrictModel):
    """A message of a conversation.

    Clients send back the assistant messages that they received, with all that came in them: keys
    without effect on the text are ignored. Those below would have one, unless they are empty.
    """

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    refusal: Nothing = None
    tool_calls: Nothing = None
    function_call: Nothing = None
    audio: Nothing = None

    @model_validator(mode="before")
    @classmethod
    def add_missing_content(cls, value: Any) -> Any:
        """Let an assistant message have no content, as OpenAI's API does."""
        if isinstance(value, dict) and value.get("role") == "assistant":
            return {"content": None} | value
        return value


class ChatBody(RequestBody):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

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
    remove_fields_without_effect(data, kind)
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise api_error_from_validation(error) from None
    check_combinations(body)
    return body


def remove_fields_without_effect(data: dict[str, Any], kind: type[RequestBody]) -> None:
    """Remove what asks for nothing; raise ApiError for an unsupported field with an effect."""
    for name in sorted(data.keys() - kind.model_fields.keys()):
        value = data[name]
        neutral = UNSUPPORTED_FIELDS.get(name, ())
        # In Python 0 == False and 1 == True; in JSON they differ.
        is_neutral = any(value == each and type(value) in same_types(each) for each in neutral)
        if value is None or is_neutral or name in IGNORED_FIELDS:
            del data[name]
        elif name in UNSUPPORTED_FIELDS:
            message = f"{name} is not supported by this server; remove it"
            raise invalid(name, message, "unsupported_parameter")


def same_types(value: object) -> tuple[type, ...]:
    """Return the types that a JSON value equal to `value` may have."""
    return (int, float) if type(value) is int else (type(value),)


def check_combinations(body: RequestBody) -> None:
    """Raise ApiError if two fields contradict each other."""
    if body.include_usage and not body.stream:
        raise invalid(
            "stream_options", "stream_options applies to streamed responses only; set stream: true"
        )
    if not isinstance(body, ChatBody):
        return
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
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
