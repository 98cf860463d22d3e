"""Continue a text with a trained model.

    python infer.py --prompt "The history of Dubai is"                # with the best checkpoint
    python infer.py --ckpt checkpoints/final.ckpt --temperature 0 < prompt.txt
    python infer.py --ckpt examples/microgpt.ckpt --new-document --num-samples 20
    python infer.py --ckpt checkpoints/smollm2.ckpt --dtype int8 --chat

The completion of the raw prompt streams to stdout; nothing is wrapped around the prompt. A text
longer than the context keeps its last tokens: when the context is full, generation continues from
its last half.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pocketlm.errors import FieldError, UserError, run_main
from pocketlm.startup import fast_imports

with fast_imports():
    from pocketlm.checkpoint.loading import Checkpoint, best_checkpoint, load_checkpoint
    from pocketlm.config.sampling import SamplingParams
    from pocketlm.corpus.encodings import decode_text
    from pocketlm.inference.chat import run_chat
    from pocketlm.inference.conversation import MAX_ANSWER_TOKENS
    from pocketlm.inference.generate import complete, describe_left_out, merge_sampling_params
    from pocketlm.inference.placement import DTYPES, move_to_device
    from pocketlm.model.quantization import QUANTIZED_DTYPES


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained model.",
        epilog="Sampling options default to those of the checkpoint's config.",
    )
    add = parser.add_argument
    add("--ckpt", help="checkpoint (default: the best one in checkpoints/)")
    add("--tokenizer", help="tokenizer to compare the checkpoint's with (default: no check)")
    add("--prompt", help="text to continue (default: --prompt-file, else standard input)")
    add("--prompt-file", help="file with the text to continue")
    add(
        "--new-document",
        action="store_true",
        help="begin a document instead, such as a name or an article",
    )
    add("--chat", action="store_true", help="answer typed messages until /quit")
    add("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"])
    add(
        "--dtype",
        choices=[*DTYPES, *QUANTIZED_DTYPES],
        help="data type of the weights (default: float32, or that of a quantised checkpoint)",
    )
    add_sampling_options(parser)
    return parser.parse_args(argv)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of SamplingParams; those not given are absent from the namespace."""
    add = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS).add_argument
    add("--max-new-tokens", type=int, help="maximum number of new tokens")
    add("--temperature", type=float, help="divisor of the logits (0: greedy)")
    add("--top-k", type=int, help="number of most likely tokens to sample from (0: all)")
    add("--top-p", type=float, help="probability of the nucleus to sample from (1: disabled)")
    add("--min-p", type=float, help="minimum probability over the largest one (0: disabled)")
    add("--repetition-penalty", type=float, help="penalty on tokens of the context (1: disabled)")
    add(
        "--frequency-penalty",
        type=float,
        help="subtracted from a token's logit for each time it was generated (0: disabled)",
    )
    add(
        "--presence-penalty",
        type=float,
        help="subtracted from a token's logit if it was generated before (0: disabled)",
    )
    add(
        "--no-repeat-ngram",
        type=int,
        metavar="N",
        help="number of tokens in a row that may not occur twice (0: disabled)",
    )
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="stop string, which ends the completion; may be repeated",
    )
    add("--seed", type=int, help="random seed, for the same text every time")
    add("--num-samples", type=int, help="number of completions (default: 1)")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SamplingParams that were given. Raises UserError for a bad value."""
    options = {
        field.name: getattr(args, field.name)
        for field in fields(SamplingParams)
        if hasattr(args, field.name)
    }
    if "stop" in options:
        options["stop"] = tuple(options["stop"])
    try:
        SamplingParams(**options)
    except ValueError as error:
        raise as_user_error(error) from None
    return options


def as_user_error(error: ValueError) -> UserError:
    """Name the field of a FieldError as the command line does."""
    if isinstance(error, FieldError):
        return UserError(f"--{error.field.replace('_', '-')} {error.message}")
    return UserError(str(error))


def read_prompt(args: argparse.Namespace) -> str:
    """Return the text to continue; empty for a new document."""
    if args.new_document:
        return ""
    if args.prompt is not None:
        prompt: str = args.prompt
    elif args.prompt_file is None and sys.stdin.isatty():
        raise UserError(
            "there is no prompt; give --prompt TEXT, --prompt-file FILE, "
            "text on standard input, or --new-document"
        )
    else:
        raw = Path(args.prompt_file).read_bytes() if args.prompt_file else sys.stdin.buffer.read()
        prompt = decode_text(raw, "the prompt").rstrip("\n")
    if not prompt:
        raise UserError(
            "the prompt is empty; give some text to continue, "
            'for example --prompt "The history of", or --new-document'
        )
    return prompt


def print_completions(prompt: str, completions: Iterator[tuple[int, str]], numbered: bool) -> None:
    """Print the completions to stdout; a terminal shows the prompt before them, on stderr."""
    if sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    for number, text in completions:
        if numbered:
            print(f"--- {number + 1} ---\n{text}")
        else:
            print(text, end="", flush=True)
    print()


def load(args: argparse.Namespace) -> tuple[Checkpoint, str]:
    """Return the checkpoint on its device, and a description of both for the log."""
    path = args.ckpt or best_checkpoint()
    checkpoint = load_checkpoint(path, args.tokenizer)
    placement = move_to_device(checkpoint, args.device, args.dtype)
    return checkpoint, f"{path}: step {checkpoint.step}, {placement}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    options = sampling_options(args)
    if args.chat:
        if args.prompt is not None or args.prompt_file or args.new_document:
            raise UserError(
                "--chat answers typed messages; "
                "leave --prompt, --prompt-file and --new-document out"
            )
        checkpoint, description = load(args)
        params = merge_sampling_params({"max_new_tokens": MAX_ANSWER_TOKENS} | options, checkpoint)
        print(description, file=sys.stderr)
        run_chat(checkpoint, params)
        return 0
    prompt = read_prompt(args)
    checkpoint, description = load(args)
    params = merge_sampling_params(options, checkpoint)
    try:
        completions = complete(checkpoint, prompt, params)
    except ValueError as error:
        raise as_user_error(error) from None
    print(description, file=sys.stderr)
    if left_out := describe_left_out(checkpoint.tokenizer, prompt):
        print(f"note: {left_out}", file=sys.stderr)
    print_completions(prompt, completions, numbered=params.num_samples > 1)
    return 0


if __name__ == "__main__":
    run_main(main)
