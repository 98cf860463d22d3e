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
from dataclasses import fields, replace
from pathlib import Path

from pocketlm.checkpoint.loading import best_checkpoint, load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.errors import FieldError, UserError, run_main
from pocketlm.inference.chat import talk
from pocketlm.inference.conversation import ANSWER
from pocketlm.inference.generate import complete, merge_sampling_params
from pocketlm.inference.placement import DTYPES, place
from pocketlm.model.quantization import QUANTIZED


def read_prompt(args: argparse.Namespace) -> str:
    """The text to continue; empty for a new document."""
    if args.new_document:
        return ""
    if args.prompt is not None:
        prompt = args.prompt
    elif args.prompt_file is None and sys.stdin.isatty():
        raise UserError(
            "there is no prompt; give --prompt TEXT, --prompt-file FILE, text on standard input, or --new-document"
        )
    else:
        raw = Path(args.prompt_file).read_bytes() if args.prompt_file else sys.stdin.buffer.read()
        try:
            prompt = raw.decode().rstrip("\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"the prompt is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}"
            ) from None
    if not prompt:
        raise UserError(
            'the prompt is empty; give some text to continue, for example --prompt "The history of", or --new-document'
        )
    return prompt


def as_option(error: ValueError) -> str:
    """The sentence of SamplingParams, or of the engine, in the words of the command line."""
    return (
        f"--{error.field.replace('_', '-')} {error.message}"
        if isinstance(error, FieldError)
        else str(error)
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Continue a text with a trained model.",
        epilog="How to sample is by default what the checkpoint's config says.",
    )
    parser.add_argument("--ckpt", help="checkpoint; by default the best there is")
    parser.add_argument("--tokenizer", help="checked against the checkpoint's own; never needed")
    parser.add_argument("--prompt", help="text to continue; else --prompt-file or standard input")
    parser.add_argument("--prompt-file")
    parser.add_argument(
        "--new-document",
        action="store_true",
        help="begin a document instead: a new name, a new article",
    )
    parser.add_argument(
        "--chat", action="store_true", help="talk: answers to what is typed, until /quit"
    )
    sampling = parser.add_argument_group("sampling", argument_default=argparse.SUPPRESS)
    sampling.add_argument("--max-new-tokens", type=int)
    sampling.add_argument("--temperature", type=float, help="0 is greedy")
    sampling.add_argument("--top-k", type=int, help="0 is all")
    sampling.add_argument("--top-p", type=float, help="1 is all")
    sampling.add_argument("--min-p", type=float, help="0 is all")
    sampling.add_argument("--repetition-penalty", type=float, help="1 is none")
    sampling.add_argument(
        "--no-repeat-ngram",
        type=int,
        metavar="N",
        help="never write the same N tokens twice; 0 is may be",
    )
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the completion; may be given again"
    )
    sampling.add_argument("--seed", type=int, help="the same text every time")
    sampling.add_argument("--num-samples", type=int, help="1 unless given")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "mps", "cuda"])
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *QUANTIZED],
        help="of the weights; float32, or what a quantised checkpoint has",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    given = {
        field.name: getattr(args, field.name)
        for field in fields(SamplingParams)
        if hasattr(args, field.name)
    }
    given |= {"stop": tuple(given["stop"])} if "stop" in given else {}
    try:
        SamplingParams(**given)
    except ValueError as error:
        raise UserError(as_option(error)) from None
    if args.chat and (args.prompt is not None or args.prompt_file or args.new_document):
        raise UserError(
            "--chat answers to what is typed; leave --prompt, --prompt-file and --new-document out"
        )
    prompt = "" if args.chat else read_prompt(args)
    path = args.ckpt or best_checkpoint()
    checkpoint = load_checkpoint(path, args.tokenizer)
    params = merge_sampling_params(given, checkpoint)
    placed = place(checkpoint, args.device, args.dtype)
    try:
        pieces = () if args.chat else complete(checkpoint, prompt, params)
    except ValueError as error:
        raise UserError(as_option(error)) from None
    print(f"{path}: step {checkpoint.step}, {placed}", file=sys.stderr)
    if args.chat:
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
