"""Terminal chat: `python infer.py --chat --ckpt checkpoints/smollm2.ckpt`.

A ChatSession answers messages and carries out commands; `run_chat` reads them from standard input.
Typed text is never more than text: "<|im_end|>" in it is ten characters and ends no message.
"""

import io
import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.conversation import Conversation
from pocketlm.inference.generate import stream_texts

HELP = "/reset clears the conversation, /seed N, /temp X, /save FILE, /quit; Ctrl-C stops an answer"
Number = TypeVar("Number", int, float)


class ChatSession:
    """A conversation with a checkpoint, and the commands that control it."""

    def __init__(self, checkpoint: Checkpoint, params: SamplingParams):
        self.checkpoint, self.params = checkpoint, params
        self.reset()

    def reset(self) -> None:
        self.conversation = Conversation(self.checkpoint.tokenizer, self.checkpoint.chat_template)

    def answer(self, text: str) -> Generator[str]:
        """Yield the answer to a message in pieces.

        What was generated of it joins the conversation, even if the generator is closed early.
        Raises UserError.
        """
        conversation, context = self.conversation, self.checkpoint.model.max_seq_len
        conversation.add("user", text)
        reserved = min(self.params.max_new_tokens, context // 2)  # for the answer
        try:
            ids = conversation.prompt(max(1, context - reserved))
        except UserError:
            conversation.messages.pop()
            raise
        answer = ""
        try:
            params = self._answer_params()
            model, tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
            for _, piece in stream_texts(model, tokenizer, [ids], params):
                if not answer:
                    piece = piece.lstrip()
                answer += piece
                yield piece
        finally:
            conversation.add("assistant", answer.strip())

    def _answer_params(self) -> SamplingParams:
        """Return the parameters of the next answer: another seed for each, and the stop strings."""
        conversation, params = self.conversation, self.params
        n_answers = len(conversation.messages) // 2
        return replace(
            params,
            seed=None if params.seed is None else params.seed + n_answers,
            stop=(*params.stop, *conversation.stop),
            stop_ids=(*params.stop_ids, *conversation.stop_ids),
            num_samples=1,
        )

    def command(self, line: str) -> str:
        """Carry out a line that begins with /; return the reply.

        Raises UserError for a wrong value, and EOFError to quit.
        """
        name, _, value = line.partition(" ")
        try:
            if name == "/quit":
                raise EOFError
            if name == "/reset":
                self.reset()
                return "conversation cleared"
            if name == "/seed":
                self.params = replace(self.params, seed=parse_number(int, line, "7"))
                return f"seed {self.params.seed}"
            if name == "/temp":
                self.params = replace(self.params, temperature=parse_number(float, line, "0.7"))
                return f"temperature {self.params.temperature:g}"
            if name == "/save" and value:
                return self._save(value)
        except (ValueError, OSError) as error:
            raise UserError(f"{line}: {error}") from None
        return HELP

    def _save(self, path: str) -> str:
        messages = self.conversation.messages
        text = json.dumps(messages, ensure_ascii=False, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")
        return f"{path}: {len(messages)} messages"


def parse_number(kind: type[Number], line: str, example: str) -> Number:
    """Return the number that follows a command. Raises UserError."""
    name, _, value = line.partition(" ")
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{line}: {name} needs a number, as in {name} {example}") from None


def run_chat(checkpoint: Checkpoint, params: SamplingParams) -> None:
    """Answer the lines of standard input until /quit or its end.

    Only the answers go to stdout, so that a pipe gets nothing else.
    """
    if sys.stdin.isatty():
        import readline  # noqa: F401  gives input() a history
    assert isinstance(sys.stdin, io.TextIOWrapper)
    sys.stdin.reconfigure(errors="replace")
    session = ChatSession(checkpoint, params)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line.startswith("/"):
                print(session.command(line), file=sys.stderr)
            elif line:
                print_answer(session, line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return


def print_answer(session: ChatSession, text: str) -> None:
    """Stream the answer to stdout; close it on an interruption, so that it is remembered."""
    with closing(session.answer(text)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
