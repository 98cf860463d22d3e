"""Continue a text with a trained model.

    python infer.py --prompt "The history of Dubai is"                # the best checkpoint there is
    python infer.py --ckpt checkpoints/final.ckpt --temperature 0 < prompt.txt

The completion of the raw prompt streams to stdout; nothing is wrapped around it. A text longer than the context keeps
its last tokens: whenever the context is full, generation goes on from its last half.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import Checkpoint, best_checkpoint, load_checkpoint
from errors import UserError, run_main
from model import KVCache, Transformer
from tokenizer import Tokenizer, stream_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Raises ValueError that names the field."""

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 0.95  # keep the most likely up to this probability in sum; 1: all
    min_p: float = 0.0  # keep those at least this share as likely as the most likely; 0: all
    repetition_penalty: float = 1.0  # above 1: make tokens of the context less likely
    stop: tuple[str, ...] = ()  # texts that end the completion and are not part of it
    seed: int | None = None  # None: another text every time
    num_samples: int = 1  # completions of one prompt

    def __post_init__(self) -> None:
        checks = [
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more, and finite"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite"),
            ("num_samples", self.num_samples >= 1, "1 or more"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        ]
        for name, good, meaning in checks:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {meaning}")


def filter_logits(logits: Tensor, params: SamplingParams, context: Tensor) -> Tensor:
    """Logits (B, V) with what the parameters rule out at -inf; temperature, 0 apart, is applied. context (B, S) ids.

    The order is that of Hugging Face's processors: penalty (Keskar et al. 2019), temperature, top-k, top-p
    (Holtzman et al. 2020), min-p (Nguyen et al. 2024).

    >>> logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> filter_logits(logits, SamplingParams(temperature=1.0, top_k=2, top_p=1.0), torch.zeros(1, 0, dtype=torch.long)).tolist()
    [[4.0, 3.0, -inf, -inf]]
    """
    logits = logits.clone()
    if params.repetition_penalty != 1:
        seen = logits.gather(1, context)
        logits.scatter_(1, context, torch.where(seen < 0, seen * params.repetition_penalty, seen / params.repetition_penalty))
    if params.temperature > 0:
        logits /= params.temperature
    if 0 < params.top_k < logits.size(-1):
        logits.masked_fill_(logits < logits.topk(params.top_k).values[:, -1:], -math.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= params.top_p  # the mass before a token is enough already; the first always stays
        logits.masked_fill_(beyond.scatter(1, order, beyond), -math.inf)
    if params.min_p > 0:
        p = logits.softmax(-1)
        logits.masked_fill_(p < params.min_p * p.amax(-1, keepdim=True), -math.inf)
    return logits


def sample(logits: Tensor, params: SamplingParams, context: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the next token (B,) from logits (B, V), on the CPU. Greedy at temperature 0, the first of equals."""
    logits = filter_logits(logits.float(), params, context)
    if params.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(model: Transformer, prompt_ids: Tensor, params: SamplingParams, eos_id: int | None = None) -> Iterator[list[int | None]]:
    """The tokens that follow prompt_ids (B, T), a list of B at a time; None for a row that has ended with `eos_id`.

    One pass over the prompt fills the cache; then one token a pass. Sampling is on the CPU with the params' own seed.
    """
    context_size = model.config.max_seq_len
    ids = prompt_ids.repeat(params.num_samples, 1).cpu()
    weight = model.embed_tokens.weight
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    cache = KVCache(model.config, len(ids), context_size, dtype=weight.dtype, device=weight.device)
    new = ids[:, -context_size:]
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(params.max_new_tokens):
        if cache.length + new.size(1) > context_size:  # full: begin again from the last half
            cache.length = 0
            new = ids[:, -max(1, context_size // 2) :]
        logits = model.logits(model.hidden(new.to(weight.device), cache=cache)[:, -1])
        token = sample(logits.cpu(), params, ids, generator)
        if eos_id is not None:
            ended |= token == eos_id
        yield [None if end else int(t) for t, end in zip(token, ended, strict=True)]
        if ended.all():
            return
        new = token[:, None]
        ids = torch.cat([ids, new], dim=1)


def complete(checkpoint: Checkpoint, prompt: str, params: SamplingParams) -> Iterator[tuple[int, str]]:
    """(sample's number, piece of text) as the completions of `prompt` grow; one sample streams, several come whole.

    Raises UserError at once for a prompt that is empty or not Unicode. A stop text ends its sample.
    """
    if not prompt:
        raise UserError('the prompt is empty; give some text to continue, for example --prompt "The history of"')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from None
    tokenizer = checkpoint.tokenizer
    if not (ids := tokenizer.prefix + tokenizer.encode(prompt)):
        raise UserError(f"the prompt {prompt!r} has no token in {tokenizer.name!r}; give some other text")
    rows = generate(checkpoint.model, torch.tensor([ids]), params, tokenizer.eos_id)
    if params.num_samples == 1:
        ids = (row[0] for row in rows if row[0] is not None)
        return ((0, piece) for piece in until_stop(stream_text(tokenizer, ids), params.stop))
    return complete_whole(tokenizer, rows, params)


def complete_whole(tokenizer: Tokenizer, rows: Iterator[list[int | None]], params: SamplingParams) -> Iterator[tuple[int, str]]:
    """The samples one after the other, when all have ended."""
    for number, ids in enumerate(zip(*rows, strict=True)):
        text = tokenizer.decode([i for i in ids if i is not None])
        yield number, "".join(until_stop(iter([text]), params.stop))


def until_stop(pieces: Iterator[str], stops: tuple[str, ...]) -> Iterator[str]:
    """The pieces up to the first stop text, holding back what may become the beginning of one.

    >>> "".join(until_stop(iter(["one", " tw", "o th", "ree"]), ("two",)))
    'one '
    """
    held = ""
    longest = max(map(len, stops), default=1)
    for piece in pieces:
        held += piece
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:  # the stop that was complete first
            yield held[: min(found)[1]]
            return
        free = len(held) - (longest - 1)
        if free > 0:
            yield held[:free]
            held = held[free:]
    yield held


def place(checkpoint: Checkpoint, device: str, dtype: str) -> str:
    """Move the model where `--device` and `--dtype` say; return the device type. Raises UserError."""
    from hardware import choose_accelerator  # here, since training's settings need it too

    accelerator, _ = choose_accelerator(device)
    if dtype == "float16" and accelerator == "cpu":
        raise UserError("--dtype float16 is 27 times slower than float32 on a CPU; use bfloat16 or float32")
    checkpoint.model.to(device=accelerator, dtype=DTYPES[dtype])
    return accelerator


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    if args.prompt_file is None and sys.stdin.isatty():
        raise UserError("there is no prompt; give --prompt TEXT, --prompt-file FILE, or text on standard input")
    raw = Path(args.prompt_file).read_bytes() if args.prompt_file else sys.stdin.buffer.read()
    try:
        return raw.decode().rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    defaults = SamplingParams()
    parser = argparse.ArgumentParser(description="Continue a text with a trained model.")
    parser.add_argument("--ckpt", help="checkpoint; by default the best there is")
    parser.add_argument("--tokenizer", help="checked against the checkpoint's own; never needed")
    parser.add_argument("--prompt", help="text to continue; else --prompt-file or standard input")
    parser.add_argument("--prompt-file")
    parser.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    parser.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=defaults.top_k, help="0 is all (default)")
    parser.add_argument("--top-p", type=float, default=defaults.top_p, help="1 is all (default %(default)s)")
    parser.add_argument("--min-p", type=float, default=defaults.min_p, help="0 is all (default)")
    parser.add_argument("--repetition-penalty", type=float, default=defaults.repetition_penalty, help="1 is none (default)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the completion; may be given again")
    parser.add_argument("--seed", type=int, help="the same text every time")
    parser.add_argument("--num-samples", type=int, default=defaults.num_samples)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        params = SamplingParams(
            args.max_new_tokens,
            args.temperature,
            args.top_k,
            args.top_p,
            args.min_p,
            args.repetition_penalty,
            tuple(args.stop),
            args.seed,
            args.num_samples,
        )
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', str(error).split()[0].count('_'))}") from None
    prompt = read_prompt(args)
    path = args.ckpt or best_checkpoint()
    checkpoint = load_checkpoint(path, args.tokenizer)
    device = place(checkpoint, args.device, args.dtype)
    pieces = complete(checkpoint, prompt, params)
    print(f"{path}: step {checkpoint.step}, {args.dtype} on {device}", file=sys.stderr)
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
