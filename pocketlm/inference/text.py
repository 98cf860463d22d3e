"""Tokens to text as they come, cut at a stop string."""

from collections.abc import Iterator

from pocketlm.inference.engine import Token
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.streaming import TextStream


class TextDecoder:
    """The text of one sample as its tokens come, up to the first stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self.stream, self.until = TextStream(tokenizer), StopStringBuffer(stops)
        self.length = 0  # characters of all tokens so far, those that are held back too
        self.ended = False

    def push(self, token: Token) -> str:
        """What the token adds to the text; often nothing yet."""
        new = "" if token.end == "stop" else self.stream.push(token.id)
        self.length += len(new)
        piece = self.until.push(new) + (self.rest() if token.end else "")
        self.ended = bool(token.end) or self.until.reached is not None
        return piece

    def rest(self) -> str:
        """What is left when no token follows."""
        return self.until.push(self.stream.rest()) + self.until.rest()


class StopStringBuffer:
    """Pieces in, pieces out, up to the first stop text; what may become the beginning of one is held back.

    >>> until = StopStringBuffer(("two",))
    >>> [until.push(piece) for piece in ("one", " tw", "o th", "ree")], until.reached
    (['o', 'ne ', '', ''], 'two')
    """

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.longest = stops, max(map(len, stops), default=1)
        self.held = ""
        self.reached: str | None = None  # the stop text that was complete first

    def push(self, piece: str) -> str:
        if self.reached is not None:
            return ""
        self.held += piece
        if found := [
            (at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0
        ]:
            _, end, self.reached = min(found)
        else:
            end = max(0, len(self.held) - (self.longest - 1))
        free, self.held = self.held[:end], self.held[end:]
        return free

    def rest(self) -> str:
        """What is left when no piece follows."""
        return self.held if self.reached is None else ""


def until_stop(pieces: Iterator[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The pieces up to the first stop text; nothing is taken from `pieces` after it."""
    until = StopStringBuffer(stops)
    for piece in pieces:
        yield until.push(piece)
        if until.reached is not None:
            return
    yield until.rest()
