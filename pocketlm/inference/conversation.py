"""Conversations to token ids, by a chat template or by turns."""

import json
import re
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pocketlm.errors import UserError
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer

Message = dict[str, str]  # role: system, user or assistant; content


ANSWER = 512  # tokens of an answer at most, unless told otherwise


PRIVATE = "".join(map(chr, range(0xE000, 0xF8FF)))  # characters that no text means anything by


class GenerationBlock(Extension):
    """{% generation %}, by which templates mark what the assistant said; here it is what is in it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Any) -> str:
        return caller()


def render(template: str, messages: list[Message], **values: Any) -> str:
    """The text that `template` makes of the messages, by transformers' settings of Jinja. Raises UserError."""

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    def tojson(x: Any, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, **values
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template refuses this conversation: {error}") from None


class Conversation:
    """What was said, and the ids by which a model goes on."""

    def __init__(self, tokenizer: Tokenizer, template: str | None):
        self.tokenizer, self.template = tokenizer, template
        self.messages: list[Message] = []

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})

    def prompt(self, room: int) -> list[int]:
        """Ids of the conversation and of the beginning of an answer, in at most `room`: the oldest exchanges are left out."""
        messages = list(self.messages)
        while len(ids := self.encode(messages)) > room and len(messages) > 2:
            first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
            del messages[first : first + 2]
        return ids[-room:]

    def encode(self, messages: list[Message], answer: bool = True) -> list[int]:
        """Ids of the messages; with those that begin an answer."""
        if self.template is None:
            text = "".join(
                f"{'AB'[m['role'] == 'assistant']}: {' '.join(m['content'].split())}\n"
                for m in messages
            )
            return self.tokenizer.prefix + self.tokenizer.encode(text + "B:" * answer)
        used = set().union(*(message["content"] for message in messages))
        guard = next((letter for letter in PRIVATE if letter not in used), None)
        if guard is None:
            raise UserError(
                "the conversation has every private character of Unicode in it, and one is needed; leave some out"
            )
        split = [
            m
            | {
                "content": self.special.sub(
                    lambda found: found[0][0] + guard + found[0][1:], m["content"]
                )
            }
            for m in messages
        ]
        text = render(self.template, split, add_generation_prompt=answer, **self.ends)
        if guard not in text:
            return encode_special(self.tokenizer, text)
        parts = re.split(
            f"({self.special.pattern})", text
        )  # special tokens, by the template, at odd places
        plain = (self.tokenizer.encode(part.replace(guard, "")) for part in parts[::2])
        pairs = zip(plain, [*map(self.ids_of, parts[1::2]), []], strict=True)
        return [i for ids in pairs for each in ids for i in each]

    def ids_of(self, token: str) -> list[int]:
        return [self.tokenizer.backend.token_to_id(token)]

    @cached_property
    def special(self) -> re.Pattern:
        """Any special token as a text spells it."""
        tokens = [
            token.content
            for token in self.tokenizer.backend.get_added_tokens_decoder().values()
            if token.special
        ]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    @cached_property
    def ends(self) -> dict[str, str]:
        """What templates call the tokens around a text."""
        named = {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}
        return {
            name: self.tokenizer.backend.id_to_token(i)
            for name, i in named.items()
            if i is not None
        }

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The special token that the template sets behind an answer."""
        if self.template is None:
            return ()
        answer = "\ue000"
        asked = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        behind = render(self.template, asked, add_generation_prompt=False, **self.ends).rpartition(
            answer
        )[2]
        found = self.special.search(behind)
        return tuple(self.ids_of(found[0])) if found else ()

    @property
    def stops(self) -> tuple[str, ...]:
        return ("\n",) if self.template is None else ()


def encode_special(tokenizer: JsonTokenizer, text: str) -> list[int]:
    """The ids of a text whose special tokens are meant."""
    tokenizer.backend.encode_special_tokens = False
    try:
        return tokenizer.encode(text)
    finally:
        tokenizer.backend.encode_special_tokens = True
