"""Chat templates, rendered as transformers renders them, within limits.

A template is a program in a model's file, from people whom one need not know. It runs in Jinja's
sandbox, and neither its steps nor the size of any value that it computes are without a limit.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence, Set, ValuesView
from contextlib import contextmanager
from datetime import datetime
from functools import reduce, wraps
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

TraceFunction = Callable[[FrameType, str, Any], Any]
Message = dict[str, str]  # role: system, user or assistant; content

MAX_STEPS = 1_000_000  # of rendering; a message takes about 20
MAX_RENDERED_CHARACTERS = 1_000_000
MAX_PRODUCT = 100_000_000  # of the sizes of a filter's arguments; the result is far smaller
MAX_REASON_CHARACTERS = 200  # of a template's own error message
TEMPLATE_FILE = "<template>"  # the file name of what Jinja compiles


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
        with limited_execution(MAX_STEPS):
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
