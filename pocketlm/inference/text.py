"""Text of one sample while it is generated: token ids become text, which ends at a stop string.

TextStream (tokenizer/streaming.py) detokenises; StopStringBuffer cuts at stop strings; TextDecoder
is the two in sequence, for the tokens of an engine.
"""

from collections.abc import Iterator

from pocketlm.inference.engine import Token
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.streaming import TextStream


class TextDecoder:
    """The text of one sample, token by token, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
        self.stream, self.buffer = TextStream(tokenizer), StopStringBuffer(stop)
        self.length = 0  # characters of all tokens so far, including those held back
        self.ended = False

    @property
    def stopped(self) -> bool:
        """True if the text ended at a stop string."""
        return self.buffer.match is not None

    def push(self, token: Token) -> str:
        """Return the text that the token makes final; often none."""
        text = "" if token.end == "stop" else self.stream.push(token.id)
        self.length += len(text)
        final = self.buffer.push(text)
        if token.end:
            final += self.flush()
        self.ended = bool(token.end) or self.stopped
        return final

    def flush(self) -> str:
        """Return the text held back, because no token follows."""
        return self.buffer.push(self.stream.flush()) + self.buffer.flush()


class StopStringBuffer:
    """Text in, text out, up to the first stop string.

    Text that may be the beginning of a stop string is held back.

    >>> buffer = StopStringBuffer(("two",))
    >>> [buffer.push(text) for text in ("one", " tw", "o th", "ree")]
    ['o', 'ne ', '', '']
    >>> buffer.match
    'two'
    """

    def __init__(self, stop: tuple[str, ...]):
        self.stop, self.longest = stop, max(map(len, stop), default=1)
        self.pending = ""
        self.match: str | None = None  # the stop string that was complete first

    def push(self, text: str) -> str:
        """Return the text that cannot belong to a stop string any more."""
        if self.match is not None:
            return ""
        self.pending += text
        matches = []
        for stop in self.stop:
            begin = self.pending.find(stop)
            if begin >= 0:
                matches.append((begin + len(stop), begin, stop))
        if matches:
            _, end, self.match = min(matches)
        else:
            end = max(0, len(self.pending) - (self.longest - 1))
        final, self.pending = self.pending[:end], self.pending[end:]
        return final

    def flush(self) -> str:
        """Return the text held back, because no text follows."""
        return self.pending if self.match is None else ""


def until_stop(pieces: Iterator[str], stop: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of `pieces` up to the first stop string, and take no piece after it."""
    buffer = StopStringBuffer(stop)
    for piece in pieces:
        yield buffer.push(piece)
        if buffer.match is not None:
            return
    yield buffer.flush()
