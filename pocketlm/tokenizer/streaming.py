"""Ids decoded to text as they come."""

from collections.abc import Iterable, Iterator

from pocketlm.tokenizer.base import Tokenizer


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of `ids` as it grows; pieces are never empty."""
    stream = TextStream(tokenizer)
    for i in ids:
        if piece := stream.push(i):
            yield piece
    if piece := stream.rest():
        yield piece


class TextStream:
    """Ids in, text out. A last character that may still be incomplete waits for the ids that complete it.

    Each piece is decoded behind the piece before it, since some tokenizers drop a space at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.before: list[int] = []
        self.piece: list[int] = []
        self.shown = self.text = ""

    def push(self, i: int) -> str:
        """What the id adds to the text; often nothing."""
        self.piece.append(i)
        self.text = self.tokenizer.decode(self.before + self.piece)
        whole = self.text.removesuffix("\ufffd")
        new = whole[len(self.shown) :]
        self.shown += new
        if whole == self.text:
            self.before, self.piece = self.piece, []
            self.shown = self.text = self.tokenizer.decode(self.before)
        return new

    def rest(self) -> str:
        """What is left when no id follows."""
        return self.text[len(self.shown) :]
