"""Conversations: messages to the token ids of a prompt, for the terminal and for the server.

A model that was trained to chat has a chat template, which convert.py keeps in its checkpoint. It
is rendered as transformers renders it, except that special tokens within a message stay text.
For other models a conversation is lines that begin with "A: " and "B: ", as in the corpus
`dialogue`.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer

Message = dict[str, str]  # role: system, user or assistant; content

MAX_ANSWER_TOKENS = 512  # by default
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


def render(template: str, messages: list[Message], **values: Any) -> str:
    """Render a chat template with transformers' settings of Jinja.

    Raises UserError if the template is broken or rejects the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, **values
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template rejects this conversation: {error}") from None


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
        text = render(
            self.template,
            guarded,
            add_generation_prompt=add_generation_prompt,
            **self.boundary_tokens,
        )
        if guard not in text:
            return encode_special(self._json_tokenizer, text)
        # Special tokens, at odd indices, are the template's: those of messages have the guard
        parts = re.split(f"({self.special_tokens.pattern})", text)
        ids = []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._token_id(part))
            else:
                ids += self.tokenizer.encode(part.replace(guard, ""))
        return ids

    def _split(self, message: Message, guard: str) -> str:
        """Return a message's content with a guard in every special token, after one character."""
        return self.special_tokens.sub(
            lambda match: match[0][0] + guard + match[0][1:], message["content"]
        )

    @property
    def _json_tokenizer(self) -> JsonTokenizer:
        assert isinstance(self.tokenizer, JsonTokenizer)  # only imported models have a template
        return self.tokenizer

    def _token_id(self, token: str) -> int:
        token_id = self._json_tokenizer.backend.token_to_id(token)
        assert token_id is not None
        return token_id

    @cached_property
    def special_tokens(self) -> re.Pattern[str]:
        """A pattern of any special token's spelling; of two that match, the longer one."""
        added = self._json_tokenizer.backend.get_added_tokens_decoder().values()
        spellings = [token.content for token in added if token.special]
        spellings.sort(key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) or "(?!)")

    @cached_property
    def boundary_tokens(self) -> dict[str, str | None]:
        """The tokens before and after a text, under the names that templates give them."""
        tokens: dict[str, str | None] = {}
        for name, token_id in (
            ("bos_token", self.tokenizer.bos_id),
            ("eos_token", self.tokenizer.eos_id),
        ):
            if token_id is not None:
                tokens[name] = self._json_tokenizer.backend.id_to_token(token_id)
        return tokens

    @property
    def stop(self) -> tuple[str, ...]:
        """The stop strings of an answer."""
        return ("\n",) if self.template is None else ()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The special token that the template puts after an answer, if there is one."""
        if self.template is None:
            return ()
        answer = PRIVATE_USE[0]
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": answer},
        ]
        text = render(self.template, messages, add_generation_prompt=False, **self.boundary_tokens)
        match = self.special_tokens.search(text.rpartition(answer)[2])
        return (self._token_id(match[0]),) if match else ()


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
