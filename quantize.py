"""Weights of 8 or 4 bits, from which generation reads two or three and a half times fewer bytes than from bfloat16.

    python quantize.py checkpoints/final.ckpt --dtype int8 --to checkpoints/final.int8.ckpt
    python quantize.py checkpoints/final.ckpt --dtype int4 --report --cases 'cases/*.yaml'

int8: w = q * scale, q from -127 to 127, a scale for each output. int4: w = q * scale + low, q from 0 to 15, a scale and a low
for each 32 inputs; the embedding and the head stay int8 there. Norms and biases are as they were, and so are activations:
bfloat16 where the device multiplies it, else float32.
"""

import argparse
from pathlib import Path

from pocketlm.checkpoint.loading import load_checkpoint, write_quantized
from pocketlm.errors import UserError, run_main
from pocketlm.evaluation.quantization_report import print_quantization_report, validation_texts
from pocketlm.model.quantization import QUANTIZED, weight_bytes


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Quantise a checkpoint, or tell what that would do to it."
    )
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=QUANTIZED,
        default=list(QUANTIZED),
        help="one to write; to report on, both unless given",
    )
    parser.add_argument("--to", metavar="FILE", help="write the quantised checkpoint")
    parser.add_argument(
        "--report", action="store_true", help="perplexity and probe scores beside bfloat16's"
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="of which the perplexity is; else the validation documents of the checkpoint's config",
    )
    parser.add_argument(
        "--characters", type=int, default=100_000, help="of that text (default %(default)s)"
    )
    parser.add_argument("--cases", nargs="+", default=[], metavar="SUITE", help="probe suites")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:

    args = parse_args(argv)
    if not args.to and not args.report:
        raise UserError("there is nothing to do; give --to FILE, or --report")
    if args.characters < 1:
        raise UserError(f"--characters is {args.characters}; it must be 1 or more")
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint.quantized:
        raise UserError(
            f"{args.checkpoint} is {checkpoint.quantized} already; give the checkpoint that it was made of"
        )
    if args.to:
        if len(args.dtype) > 1:
            raise UserError("--to writes one checkpoint; say --dtype int8, or --dtype int4")
        if Path(args.to).exists():
            raise UserError(f"{args.to} is there already; delete it, or name another file")
        before = weight_bytes(checkpoint.model)
        made = weight_bytes(write_quantized(Path(args.checkpoint), Path(args.to), args.dtype[0]))
        print(
            f"{args.to}: {args.dtype[0]}, {made / 1e6:,.1f} MB of weights, where float32 has {before / 1e6:,.1f}"
        )
    if args.report:
        try:
            texts = (
                [Path(args.text).read_text(encoding="utf-8")[: args.characters]]
                if args.text
                else None
            )
        except UnicodeDecodeError as error:
            raise UserError(f"{args.text} is not UTF-8 at byte {error.start}") from None
        texts = texts or list(validation_texts(checkpoint.config, args.characters))
        if not any(text.strip() for text in texts):
            raise UserError("there is no text to take the perplexity of; give --text FILE")
        print_quantization_report(args.checkpoint, args.dtype, texts, args.cases)
    return 0


if __name__ == "__main__":
    run_main(main)
