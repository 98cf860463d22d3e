"""Conversations: messages to the token ids of a prompt, for the terminal and for the server.

A model that was trained to chat has a chat template, which convert.py keeps in its checkpoint. It
is rendered as transformers renders it, except that special tokens within a message stay text.
For other models a conversation is lines that begin with "A: " and "B: ", as in the corpus
`dialogue`.
"""

import json
import re
from contextlib import suppress
from functools import cached_property

from pocketlm.errors import UserError
from pocketlm.templates import Message, render
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer

MAX_ANSWER_TOKENS = 512  # by default
PRIVATE_USE = "".join(map(chr, range(0xE000, 0xF8FF)))  # characters without a meaning in Unicode


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
