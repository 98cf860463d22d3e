"""Incremental detokenisation: token ids become text as they are generated."""

from collections.abc import Iterable, Iterator

from pocketlm.tokenizer.base import Tokenizer


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of `ids` in pieces, as soon as each is complete; no piece is empty."""
    stream = TextStream(tokenizer)
    for i in ids:
        text = stream.push(i)
        if text:
            yield text
    text = stream.flush()
    if text:
        yield text


class TextStream:
    """Incremental decoder: push ids, get text.

    A last character that may be incomplete is held back until the ids that complete it. Ids are
    decoded in groups, each group after the one before it, because some tokenizers drop a space at
    the beginning of a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.previous_ids: list[int] = []  # the last complete group, decoded again as context
        self.current_ids: list[int] = []  # the group that may end in an incomplete character
        self.decoded = ""  # text of both groups
        self.emitted = ""  # the part of it that has been returned

    def push(self, i: int) -> str:
        """Return the text that the id adds; often none."""
        self.current_ids.append(i)
        self.decoded = self.tokenizer.decode(self.previous_ids + self.current_ids)
        complete = self.decoded.removesuffix("\ufffd")
        new = complete[len(self.emitted) :]
        self.emitted += new
        if complete == self.decoded:
            self.previous_ids, self.current_ids = self.current_ids, []
            self.emitted = self.decoded = self.tokenizer.decode(self.previous_ids)
        return new

    def flush(self) -> str:
        """Return the text that was held back, if no id follows."""
        return self.decoded[len(self.emitted) :]
