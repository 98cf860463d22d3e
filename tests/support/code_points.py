"""A tokenizer with any vocabulary size and special tokens."""

from pocketlm.tokenizer.base import Tokenizer


class CodePointTokenizer(Tokenizer):
    """A tokenizer whose ids are code points, with any special tokens around a document."""

    kind = name = "code points"

    def __init__(
        self, vocab_size: int = 2**16, bos_id: int | None = None, eos_id: int | None = None
    ):
        self.vocab_size, self.bos_id, self.eos_id = vocab_size, bos_id, eos_id

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids if i not in (self.bos_id, self.eos_id))

    def state(self) -> dict:
        return {"kind": self.kind, "name": self.name}
