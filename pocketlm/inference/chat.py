"""Talk with a model on the terminal: `python infer.py --chat --ckpt checkpoints/smollm2.ckpt`.

A model that was taught to answer has a chat template, which convert.py keeps in its checkpoint; it is rendered as transformers
renders it. With any other model a conversation is lines by turns, "A: " and "B: ", as the corpus `dialogue` has them.
What is typed is only ever text: "<|im_end|>" in it is ten characters, and ends nothing.
"""

import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketlm.checkpoint.loading import Checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import UserError
from pocketlm.inference.conversation import Conversation
from pocketlm.inference.generate import stream_texts

HELP = (
    "/reset forgets the conversation, /seed N, /temp X, /save FILE, /quit; Ctrl-C stops an answer"
)


class Chat:
    """A conversation with a checkpoint, and the commands within it."""

    def __init__(self, checkpoint: Checkpoint, params: SamplingParams):
        self.checkpoint, self.params = checkpoint, params
        self.reset()

    def reset(self) -> None:
        self.conversation = Conversation(self.checkpoint.tokenizer, self.checkpoint.chat_template)

    def answer(self, text: str) -> Generator[str]:
        """Pieces of the answer. However it ends, what there is of it is remembered."""
        conversation, context, said = (
            self.conversation,
            self.checkpoint.config.model.max_seq_len,
            "",
        )
        conversation.say("user", text)
        try:
            ids = conversation.prompt(
                max(1, context - min(self.params.max_new_tokens, context // 2))
            )
        except UserError:
            conversation.messages.pop()
            raise
        try:
            seed = (
                None
                if self.params.seed is None
                else self.params.seed + len(conversation.messages) // 2
            )
            stop, stop_ids = (
                (*self.params.stop, *conversation.stops),
                (*self.params.stop_ids, *conversation.stop_ids),
            )
            params = replace(self.params, seed=seed, stop=stop, stop_ids=stop_ids, num_samples=1)
            for _, piece in stream_texts(
                self.checkpoint.model, self.checkpoint.tokenizer, [ids], params
            ):
                piece = piece if said else piece.lstrip()
                said += piece
                yield piece
        finally:
            conversation.say("assistant", said.strip())

    def command(self, line: str) -> str:
        """Do what a line that begins with / says; the answer to print. Raises UserError, and EOFError to quit."""
        name, _, value = line.partition(" ")
        try:
            if name == "/quit":
                raise EOFError
            if name == "/reset":
                self.reset()
                return "forgotten"
            if name == "/seed":
                self.params = replace(self.params, seed=number(int, line, "7"))
                return f"seed {self.params.seed}"
            if name == "/temp":
                self.params = replace(self.params, temperature=number(float, line, "0.7"))
                return f"temperature {self.params.temperature:g}"
            if name == "/save" and value:
                Path(value).write_text(
                    json.dumps(self.conversation.messages, ensure_ascii=False, indent=1) + "\n",
                    encoding="utf-8",
                )
                return f"{value}: {len(self.conversation.messages)} messages"
        except (ValueError, OSError) as error:
            raise UserError(f"{line}: {error}") from None
        return HELP


def number(kind: type, line: str, such_as: str) -> Any:
    """What a command is given. Raises UserError."""
    name, _, value = line.partition(" ")
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{line}: what follows is a number, as in {name} {such_as}") from None


def talk(checkpoint: Checkpoint, params: SamplingParams) -> None:
    """Read, answer, until /quit or the end of the input. The answers alone go to stdout, so that a pipe gets them."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  what makes input() remember lines
    sys.stdin.reconfigure(errors="replace")
    chat = Chat(checkpoint, params)
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line.startswith("/"):
                print(chat.command(line), file=sys.stderr)
            elif line:
                with closing(chat.answer(line)) as pieces:
                    for piece in pieces:
                        print(piece, end="", flush=True)
                print()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return
