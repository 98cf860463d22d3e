"""Continue a text with a trained model.

    python infer.py --prompt "The history of Dubai is"                # the best checkpoint there is
    python infer.py --ckpt checkpoints/final.ckpt --temperature 0 < prompt.txt
    python infer.py --ckpt examples/microgpt.ckpt --new-document --num-samples 20
    python infer.py --ckpt checkpoints/smollm2.ckpt --dtype int8 --chat

The completion of the raw prompt streams to stdout; nothing is wrapped around it. A text longer than the context keeps
its last tokens: whenever the context is full, generation goes on from its last half.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mps
from checkpoint import Checkpoint, best_checkpoint, load_checkpoint
from config import SamplingParams
from engine import Engine, Request, Token
from errors import UserError, run_main
from model import Transformer
from native import why_not
from quantize import QUANTIZED, quantize
from tokenizer import TextStream, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def generate(model: Transformer, prompt_ids: Tensor, params: SamplingParams, eos_id: int | None = None) -> Iterator[list[int | None]]:
    """The tokens that follow prompt_ids (B, T), a list of num_samples * B at a time; None for a row that has ended."""
    prompts = prompt_ids.tolist()
    engine = Engine(model, len(prompts) * params.num_samples, prompt_ids.size(1) + params.max_new_tokens)
    place = {}
    for row, ids in enumerate(prompts):
        engine.add(request := Request(ids, params, eos_id))
        place |= {(request, sample): sample * len(prompts) + row for sample in range(params.num_samples)}
    while engine.waiting or engine.joining:
        engine.join()
    while engine.busy:
        row: list[int | None] = [None] * len(place)
        for token in engine.step():
            row[place[token.request, token.sample]] = None if token.end == "stop" else token.id
        yield row


def continuations(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams) -> Iterator[tuple[int, str]]:
    """(place, piece of text) as the texts behind all prompts grow side by side; place is sample * len(prompts) + prompt.

    A text that comes to one of params.stop is ended there. Raises ValueError for a prompt or parameters that the model has no place for.
    """
    longest = max(map(len, prompts))
    engine = Engine(model, len(prompts) * params.num_samples, longest + params.max_new_tokens)
    texts: dict[tuple[Request, int], tuple[int, Text]] = {}
    for row, ids in enumerate(prompts):
        engine.add(request := Request(ids, params, tokenizer.eos_id))
        texts |= {(request, n): (n * len(prompts) + row, Text(tokenizer, params.stop)) for n in range(params.num_samples)}

    def pieces() -> Iterator[tuple[int, str]]:
        while engine.busy:
            for token in engine.step():
                place, text = texts[token.request, token.sample]
                if piece := text.push(token):
                    yield place, piece
                if text.ended:
                    engine.cancel(token.request, token.sample)

    return pieces()


def whole_texts(model: Transformer, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams) -> list[str]:
    """The same when all have ended."""
    texts = [""] * (len(prompts) * params.num_samples)
    for place, piece in continuations(model, tokenizer, prompts, params):
        texts[place] += piece
    return texts


def complete(checkpoint: Checkpoint, prompt: str, params: SamplingParams) -> Iterator[tuple[int, str]]:
    """(sample's number, piece of text) as the completions of `prompt` grow; one sample streams, several come whole.

    An empty prompt begins a document. Raises UserError at once for a prompt that is not Unicode or has no token.
    """
    ids = encode_prompt(checkpoint.tokenizer, prompt)
    try:
        if params.num_samples == 1:
            return continuations(checkpoint.model, checkpoint.tokenizer, [ids], params)
        return iter(list(enumerate(whole_texts(checkpoint.model, checkpoint.tokenizer, [ids], params))))
    except ValueError as error:
        raise UserError(as_option(error)) from None


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids to continue, with what begins a document. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from None
    if not (ids := tokenizer.prefix + tokenizer.encode(prompt)):
        raise UserError(f"the prompt {prompt!r} has no token in {tokenizer.name!r}, with which a text could begin; give some other text")
    return ids


class Text:
    """The text of one sample as its tokens come, up to the first stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]):
        self.stream, self.until = TextStream(tokenizer), Until(stops)
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


class Until:
    """Pieces in, pieces out, up to the first stop text; what may become the beginning of one is held back.

    >>> until = Until(("two",))
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
        if found := [(at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0]:
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
    until = Until(stops)
    for piece in pieces:
        yield until.push(piece)
        if until.reached is not None:
            return
    yield until.rest()


def place(checkpoint: Checkpoint, device: str, dtype: str | None) -> str:
    """Put the model where `--device` and `--dtype` say; tell where that is. Raises UserError for a pair that cannot be."""
    from hardware import choose_accelerator, has_bfloat16_cpu, keep_freed_memory  # here, since training's settings need them too

    accelerator, _ = choose_accelerator(device)
    keep_freed_memory()
    dtype = dtype or checkpoint.quantized or "float32"
    if checkpoint.quantized not in (None, dtype):
        raise UserError(f"--dtype {dtype}: {checkpoint.path} is {checkpoint.quantized} already; leave --dtype out")
    if dtype == "float16" and accelerator == "cpu":
        raise UserError("--dtype float16 is 27 times slower than float32 on a CPU; use bfloat16 or float32")
    if dtype in QUANTIZED and not checkpoint.quantized:
        quantize(checkpoint.model, dtype)
    half = accelerator == "cuda" or accelerator == "cpu" and has_bfloat16_cpu()
    compute = DTYPES.get(dtype, torch.bfloat16 if half else torch.float32)
    mps.check(accelerator, compute, checkpoint.config.model)
    checkpoint.model.to(device=accelerator, dtype=compute)
    why = why_not(checkpoint.model) if accelerator == "cpu" else ""
    return f"{dtype} on {accelerator}{why and f', every step by torch, several times slower: {why}'}"


def read_prompt(args: argparse.Namespace) -> str:
    """The text to continue; empty for a new document."""
    if args.new_document:
        return ""
    if args.prompt is not None:
        prompt = args.prompt
    elif args.prompt_file is None and sys.stdin.isatty():
        raise UserError("there is no prompt; give --prompt TEXT, --prompt-file FILE, text on standard input, or --new-document")
    else:
        raw = Path(args.prompt_file).read_bytes() if args.prompt_file else sys.stdin.buffer.read()
        try:
            prompt = raw.decode().rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None
    if not prompt:
        raise UserError('the prompt is empty; give some text to continue, for example --prompt "The history of", or --new-document')
    return prompt


def as_option(error: ValueError) -> str:
    """The sentence of SamplingParams, or of the engine, in the words of the command line."""
    name, _, rest = str(error).partition(" ")
    return f"--{name.replace('_', '-')} {rest}" if name in {field.name for field in fields(SamplingParams)} else str(error)


def chosen_params(given: dict[str, Any], checkpoint: Checkpoint) -> SamplingParams:
    """What was given, and for the rest what the checkpoint's config says of its sampling; of samples one."""
    said = {field.name: getattr(checkpoint.config.sampling, field.name) for field in fields(SamplingParams)}
    return SamplingParams(**said | {"num_samples": 1} | given)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained model.", epilog="How to sample is by default what the checkpoint's config says."
    )
    parser.add_argument("--ckpt", help="checkpoint; by default the best there is")
    parser.add_argument("--tokenizer", help="checked against the checkpoint's own; never needed")
    parser.add_argument("--prompt", help="text to continue; else --prompt-file or standard input")
    parser.add_argument("--prompt-file")
    parser.add_argument("--new-document", action="store_true", help="begin a document instead: a new name, a new article")
    parser.add_argument("--chat", action="store_true", help="talk: answers to what is typed, until /quit")
    sampling = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    sampling.add_argument("--max-new-tokens", type=int)
    sampling.add_argument("--temperature", type=float, help="0 is greedy")
    sampling.add_argument("--top-k", type=int, help="0 is all")
    sampling.add_argument("--top-p", type=float, help="1 is all")
    sampling.add_argument("--min-p", type=float, help="0 is all")
    sampling.add_argument("--repetition-penalty", type=float, help="1 is none")
    sampling.add_argument("--no-repeat-ngram", type=int, metavar="N", help="never write the same N tokens twice; 0 is may be")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="ends the completion; may be given again")
    sampling.add_argument("--seed", type=int, help="the same text every time")
    sampling.add_argument("--num-samples", type=int, help="1 unless given")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"])
    parser.add_argument("--dtype", choices=[*DTYPES, *QUANTIZED], help="of the weights; float32, or what a quantised checkpoint has")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    given = {field.name: getattr(args, field.name) for field in fields(SamplingParams) if hasattr(args, field.name)}
    given |= {"stop": tuple(given["stop"])} if "stop" in given else {}
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise UserError(as_option(error)) from None
    if args.chat and (args.prompt is not None or args.prompt_file or args.new_document):
        raise UserError("--chat answers to what is typed; leave --prompt, --prompt-file and --new-document out")
    prompt = "" if args.chat else read_prompt(args)
    path = args.ckpt or best_checkpoint()
    checkpoint = load_checkpoint(path, args.tokenizer)
    params = chosen_params(given, checkpoint)
    placed = place(checkpoint, args.device, args.dtype)
    pieces = () if args.chat else complete(checkpoint, prompt, params)
    print(f"{path}: step {checkpoint.step}, {placed}", file=sys.stderr)
    if args.chat:
        from chat import ANSWER, talk

        talk(checkpoint, replace(params, max_new_tokens=given.get("max_new_tokens", ANSWER)))
        return 0
    if sys.stdout.isatty():  # a person reads on from the prompt; a pipe gets the completion alone
        print(prompt, end="", file=sys.stderr, flush=True)
    for number, piece in pieces:
        if params.num_samples > 1:
            print(f"--- {number + 1} ---\n{piece}")
        else:
            print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    run_main(main)
