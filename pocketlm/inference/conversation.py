"""Conversations: messages to the token ids of a prompt, for the terminal and for the server.

A model that was trained to chat has a chat template, which convert.py keeps in its checkpoint. It
is rendered as transformers renders it, except that special tokens within a message stay text.
For other models a conversation is lines that begin with "A: " and "B: ", as in the corpus
`dialogue`.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence, Set, ValuesView
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cached_property, reduce, wraps
from types import FrameType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer

TraceFunction = Callable[[FrameType, str, Any], Any]
Message = dict[str, str]  # role: system, user or assistant; content

MAX_ANSWER_TOKENS = 512  # by default
MAX_TEMPLATE_STEPS = 1_000_000  # of rendering; a message takes about 20
TEMPLATE_FILE = "<template>"  # the file name of what Jinja compiles
MAX_RENDERED_CHARACTERS = 1_000_000
MAX_PRODUCT = 100_000_000  # of the sizes of a filter's arguments; the result is far smaller
MAX_REASON_CHARACTERS = 200  # of a template's own error message
PRIVATE_USE = "".join(map(chr, range(0xE000, 0xF8FF)))  # characters without a meaning in Unicode


# ---- chat templates ----


class GenerationBlock(Extension):
    """The tag {% generation %}, with which templates mark the assistant's text.

    It renders as its content.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = CallBlock(self.call_method("_content"), [], [], body)
        block.set_lineno(line)
        return block

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which no value becomes huge, for which steps do not count.

    What an operator, a filter or a function gets is measured; what could grow by more than a sum of
    its inputs is refused, or its inputs are multiplied.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        extensions = [GenerationBlock, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=measured
        )
        self.filters["tojson"] = to_json
        for name in [*self.filters]:
            if name in UNBOUNDED:
                del self.filters[name]
            else:
                self.filters[name] = bounded(self.filters[name], name in MULTIPLYING)
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = ConcatAsSum().visit(super()._parse(source, name, filename))
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        grows = isinstance(obj, str) and attr in UNBOUNDED
        return not grows and super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # Jinja wraps the method format
        own = getattr(method, "__self__", None)
        values, extra = (*args, *kwargs.values()), 0
        if isinstance(own, str) and method.__name__ in MULTIPLYING:
            require_small_product(own, *values)
        if isinstance(own, str) and method.__name__ == "format":
            extra = total_width(own)
        require_small(*values, extra=extra)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            require_small(left, right, extra=total_width(left))
        elif size_of_result(operator, left, right) > MAX_RENDERED_CHARACTERS:
            raise jinja2.TemplateRuntimeError(TOO_LARGE)
        return super().call_binop(context, operator, left, right)


# Filters and methods of texts with a width or a number that decides how large the result is. No
# chat template of a known model has one.
UNBOUNDED = {
    *("center", "wordwrap", "batch", "slice", "format", "round", "pprint", "urlize", "xmlattr"),
    *("ljust", "rjust", "zfill", "expandtabs", "translate", "format_map", "filesizeformat"),
}
MULTIPLYING = {"replace", "join", "indent", "tojson"}  # their result may be a product of arguments
TOO_LARGE = "it computes a value that is too large"


class ConcatAsSum(NodeTransformer):
    """Makes a ~ b, which cannot be intercepted, a sum of texts."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [
            nodes.Filter(part, "string", [], [], None, None, lineno=node.lineno)
            for part in node.nodes
        ]
        return reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), texts)


def size_of(value: Any) -> int:
    """Return about the characters of a value that is written out, or more than the maximum.

    A list may hold the same list again and again, so that few objects are a long text.

    >>> size_of("abc"), size_of([["a"] * 3, 1000])
    (3, 9)
    """
    size, left = 0, [value]
    while left and size <= MAX_RENDERED_CHARACTERS:
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
            continue
        size += 1
        if isinstance(value, int):
            size += value.bit_length() // 3
        elif isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, Sequence | Set | ValuesView):
            left += value
    return size


def total_width(form: str) -> int:
    """Return at least the sum of the widths in a format, or the maximum if arguments have them.

    >>> total_width("%5d and {:<7}"), total_width("%*d") == total_width("{:{}}")
    (12, True)
    """
    if re.search(r"\*|\{[^}]*\{", form):
        return MAX_RENDERED_CHARACTERS
    return sum(map(int, re.findall(r"\d{1,9}", form)))


def require_small(*values: Any, extra: int = 0) -> None:
    """Raise TemplateRuntimeError if the values are too large together."""
    if extra + sum(map(size_of, values)) > MAX_RENDERED_CHARACTERS:
        raise jinja2.TemplateRuntimeError(TOO_LARGE)


def require_small_product(*values: Any) -> None:
    """Raise TemplateRuntimeError if a product of the values' sizes, or numbers, is too large."""
    numbers = [value if isinstance(value, int) else size_of(value) for value in values]
    if math.prod(1 + number for number in numbers) > MAX_PRODUCT:
        raise jinja2.TemplateRuntimeError(TOO_LARGE)


def measured(value: Any) -> Any:
    """Return a value that is written out. Raises TemplateRuntimeError if it is too large."""
    require_small(value)
    return value


def bounded(function: Callable[..., Any], multiplies: bool) -> Callable[..., Any]:
    """Return a filter that refuses large arguments."""

    @wraps(function)
    def bounded_filter(*args: Any, **kwargs: Any) -> Any:
        args = tuple(small_parts(arg) if isinstance(arg, Iterator) else arg for arg in args)
        if multiplies:
            args = tuple([*arg] if isinstance(arg, Iterator) else arg for arg in args)
            require_small_product(*args, *kwargs.values())
        require_small(*args, *kwargs.values())
        return function(*args, **kwargs)

    return bounded_filter


def small_parts(values: Iterator[Any]) -> Iterator[Any]:
    """Yield the values, as long as they are small together."""
    size = 0
    for value in values:
        size += 1 + size_of(value)
        require_small(extra=size)
        yield value


def size_of_result(operator: str, left: Any, right: Any) -> int:
    """Return at least the bits of a number, or the length of a text or list, that results.

    >>> size_of_result("*", "ab", 3), size_of_result("**", 2, 100), size_of_result("+", "a", "b")
    (6, 200, 2)
    """
    sizes = [
        value.bit_length() if isinstance(value, int) else size_of(value) for value in (left, right)
    ]
    numbers = isinstance(left, int), isinstance(right, int)
    if operator == "**" and numbers[1] or operator == "*" and numbers == (False, True):
        return sizes[0] * int(right)
    if operator == "*" and numbers == (True, False):
        return int(left) * sizes[1]
    return sum(sizes)


def render(template: str, messages: list[Message], **values: Any) -> str:
    """Render a chat template with transformers' settings of Jinja.

    Raises UserError if the template is broken, rejects the messages, or does not come to an end.
    """
    try:
        compiled = BoundedSandbox().from_string(template)
        with limited_execution(MAX_TEMPLATE_STEPS):
            pieces = compiled.generate(messages=messages, tools=None, documents=None, **values)
            return "".join(small_parts(pieces))
    except Exception as error:  # a template can raise anything, as a program can
        reason = " ".join(str(error).split())[:MAX_REASON_CHARACTERS] or type(error).__name__
        raise UserError(f"the chat template rejects this conversation: {reason}") from None


@contextmanager
def limited_execution(max_steps: int) -> Iterator[None]:
    """Raise TemplateRuntimeError once this thread has executed so many lines and calls.

    The lines counted are the template's own, and the calls those of any Python function but these.
    """
    n_steps = 0

    def count(frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        nonlocal n_steps
        n_steps += frame.f_code.co_filename != __file__
        if n_steps > max_steps:
            raise jinja2.TemplateRuntimeError(f"it is not done after {max_steps:,} steps")
        return count if frame.f_code.co_filename == TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


# Functions that templates may call


def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


# ---- conversations ----


class Conversation:
    """Messages so far, and the prompts that they make.

    template: a chat template, which needs a JsonTokenizer; None: one line per turn.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None):
        self.tokenizer, self.template = tokenizer, template
        self.messages: list[Message] = []
        self._aliased: tuple[str, dict[str, str], JsonTokenizer] | None = None

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def prompt(self, max_tokens: int) -> list[int]:
        """Return the ids of the conversation and of the beginning of an answer.

        The oldest exchanges are left out while there are more than `max_tokens`; a message that
        alone is too long loses its beginning.
        """
        messages = list(self.messages)
        ids = self.encode(messages)
        while len(ids) > max_tokens and len(messages) > 2:
            first = first_user_message(messages)
            del messages[first : first + 2]
            ids = self.encode(messages)
        return ids[-max_tokens:]

    def encode(self, messages: list[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the ids of the messages, and of the beginning of an answer unless it is off."""
        if self.template is None:
            text = "".join(map(as_line, messages)) + ("B:" if add_generation_prompt else "")
            return self.tokenizer.document_prefix + self.tokenizer.encode(text)
        guard = unused_character(messages)
        guarded = [message | {"content": self._split(message, guard)} for message in messages]
        text = self._render(guarded, add_generation_prompt)
        if guard not in text:
            return encode_special(self._json_tokenizer, text)
        # Markers, at odd indices, are the template's: those of messages have the guard
        parts = re.split(f"({self.markers.pattern})", text)
        aliases, tokenizer = self._with_aliases(guard)
        parts[0::2] = [part.replace(guard, "") for part in parts[0::2]]
        parts[1::2] = [aliases[part] for part in parts[1::2]]
        return encode_special(tokenizer, "".join(parts))

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        assert self.template is not None
        return render(
            self.template,
            messages,
            add_generation_prompt=add_generation_prompt,
            **self.boundary_tokens,
        )

    def _split(self, message: Message, guard: str) -> str:
        """Return a message's content with a guard in every marker, after one character."""
        return self.markers.sub(
            lambda match: match[0][0] + guard + match[0][1:], message["content"]
        )

    @property
    def _json_tokenizer(self) -> JsonTokenizer:
        assert isinstance(self.tokenizer, JsonTokenizer)  # only imported models have a template
        return self.tokenizer

    @cached_property
    def markers(self) -> re.Pattern[str]:
        """A pattern of the tokens that a message must not contain; of two, the longer one.

        They are the special tokens, and the added tokens with which the template marks turns. Other
        added tokens, such as words and runs of spaces, are parts of a text.
        """
        added = self._json_tokenizer.backend.get_added_tokens_decoder().values()
        template_text = self._template_text
        spellings = [
            token.content
            for token in added
            if token.special or (token.content.strip() and token.content in template_text)
        ]
        spellings.sort(key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) or "(?!)")

    @property
    def _template_text(self) -> str:
        """The template and what it renders, which may put a marker together from parts."""
        texts = [self.template or ""]
        for roles in (["user"], ["user", "assistant", "user"], ["system", "user"]):
            messages = [{"role": role, "content": PRIVATE_USE[0]} for role in roles]
            with suppress(UserError):  # some templates reject a system message
                texts.append(self._render(messages, add_generation_prompt=True))
        return "\n".join(texts)

    def _with_aliases(self, guard: str) -> tuple[dict[str, str], JsonTokenizer]:
        """Return an alias for each marker, and a tokenizer in which the aliases are the markers.

        A marker's own spelling is then only text, in a text that is encoded as a whole: some
        tokenizers treat the beginning of a text differently. Aliases begin with the guard, which
        no message contains.
        """
        if self._aliased is None or self._aliased[0] != guard:
            letters = PRIVATE_USE.replace(guard, "")
            spec = json.loads(self._json_tokenizer.backend.to_str())
            aliases = {}
            for n, token in enumerate(spec["added_tokens"]):
                if self.markers.fullmatch(token["content"]):
                    high, low = divmod(n, len(letters))
                    aliases[token["content"]] = guard + letters[high] + letters[low]
                    token["content"] = aliases[token["content"]]
            vocab = spec["model"]["vocab"]
            if isinstance(vocab, dict):
                vocab = {aliases.get(token, token): i for token, i in vocab.items()}
            else:  # Unigram's
                vocab = [[aliases.get(token, token), score] for token, score in vocab]
            spec["model"]["vocab"] = vocab
            tokenizer = JsonTokenizer(json.dumps(spec), self.tokenizer.name, None, None)
            self._aliased = guard, aliases, tokenizer
        return self._aliased[1:]

    @cached_property
    def boundary_tokens(self) -> dict[str, str]:
        """The special tokens under the names that templates give them: bos_token and others."""
        tokenizer = self._json_tokenizer
        if tokenizer.special_tokens:
            return tokenizer.special_tokens
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        spelling = tokenizer.backend.id_to_token
        return {name: spelling(i) or "" for name, i in ids.items() if i is not None}

    @property
    def stop(self) -> tuple[str, ...]:
        """The stop strings of an answer: what ends it in the template, if that is no token."""
        if self.template is None:
            return ("\n",)
        between = self._after_answer[-1].strip().partition("\n")[0]
        return (between,) if between and not self.stop_ids else ()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The marker that the template puts after an answer, or else before the next message."""
        if self.template is None:
            return ()
        for text in self._after_answer:
            if match := self.markers.search(text):
                token_id = self._json_tokenizer.backend.token_to_id(match[0])
                assert token_id is not None
                return (token_id,)
        return ()

    @cached_property
    def _after_answer(self) -> list[str]:
        """Return what follows an answer that is the last message, and one before another."""
        answer, question = PRIVATE_USE[0], PRIVATE_USE[1]
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
        ]
        texts = [self._render(messages).rpartition(answer)[2]]
        with suppress(UserError):
            text = self._render([*messages, {"role": "user", "content": question}])
            texts.append(text.rpartition(answer)[2].partition(question)[0])
        return texts


def as_line(message: Message) -> str:
    """Return a turn of a conversation without a template."""
    speaker = "B" if message["role"] == "assistant" else "A"
    return f"{speaker}: {' '.join(message['content'].split())}\n"


def first_user_message(messages: list[Message]) -> int:
    for index, message in enumerate(messages):
        if message["role"] == "user":
            return index
    return 0


def unused_character(messages: list[Message]) -> str:
    """Return a private-use character that is in no message. Raises UserError."""
    used = set().union(*(message["content"] for message in messages))
    for character in PRIVATE_USE:
        if character not in used:
            return character
    raise UserError(
        "the conversation contains every private-use character of Unicode; remove at least one"
    )


def encode_special(tokenizer: JsonTokenizer, text: str) -> list[int]:
    """Return the ids of a text in which special tokens are not plain text."""
    tokenizer.backend.encode_special_tokens = False
    try:
        return tokenizer.encode(text)
    finally:
        tokenizer.backend.encode_special_tokens = True
