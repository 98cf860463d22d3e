"""Quantise a checkpoint: weights of 8 or 4 bits, for faster generation.

    python quantize.py checkpoints/final.ckpt --dtype int8 --to checkpoints/final.int8.ckpt
    python quantize.py checkpoints/final.ckpt --dtype int4 --report --cases 'cases/*.yaml'

Generation reads two (int8) or three and a half (int4) times fewer bytes of weights than in
bfloat16.

int8: w = q * scale, q from -127 to 127, one scale per output.
int4: w = q * scale + low, q from 0 to 15, one scale and one low per 32 inputs; the embedding and
the head are int8.

Norms and biases are not quantised. Activations are bfloat16 where the device multiplies it
natively, else float32.
"""

import argparse
from pathlib import Path

from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint, write_quantized
from pocketlm.errors import UserError, run_main
from pocketlm.evaluation.quantization_report import print_quantization_report, validation_texts
from pocketlm.model.quantization import QUANTIZED_DTYPES, weight_bytes


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Quantise a checkpoint, or report the effect of quantising it."
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint that is not quantised")
    add(
        "--dtype",
        nargs="+",
        choices=QUANTIZED_DTYPES,
        default=list(QUANTIZED_DTYPES),
        help="data types; one with --to (default: both)",
    )
    add("--to", metavar="FILE", help="checkpoint to write")
    add(
        "--report",
        action="store_true",
        help="print perplexity and accuracy on cases, compared with bfloat16",
    )
    add(
        "--text",
        metavar="FILE",
        help="text to measure perplexity on (default: the validation documents)",
    )
    add(
        "--characters",
        type=int,
        default=100_000,
        help="maximum length of that text (default: %(default)s)",
    )
    add("--cases", nargs="+", default=[], metavar="SUITE", help="probe suites for the report")
    args = parser.parse_args(argv)
    if not args.to and not args.report:
        raise UserError("there is nothing to do; pass --to FILE, --report, or both")
    if args.characters < 1:
        raise UserError(f"--characters is {args.characters}; it must be 1 or more")
    return args


def write(checkpoint: Checkpoint, target: str, dtypes: list[str]) -> None:
    """Write the quantised checkpoint and print its size. Raises UserError."""
    if len(dtypes) > 1:
        raise UserError("--to writes one checkpoint; pass --dtype int8 or --dtype int4")
    if Path(target).exists():
        raise UserError(f"{target} exists already; delete it, or choose another file")
    before = weight_bytes(checkpoint.model)
    after = weight_bytes(write_quantized(checkpoint.path, Path(target), dtypes[0]))
    print(
        f"{target}: {dtypes[0]}, {after / 1e6:,.1f} MB of weights, "
        f"where float32 has {before / 1e6:,.1f}"
    )


def report_texts(checkpoint: Checkpoint, path: str | None, max_characters: int) -> list[str]:
    """Return the texts to measure perplexity on. Raises UserError."""
    if path:
        try:
            texts = [Path(path).read_text(encoding="utf-8")[:max_characters]]
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 at byte {error.start}") from None
    else:
        texts = list(validation_texts(checkpoint.config, max_characters))
    if not any(text.strip() for text in texts):
        raise UserError("there is no text to measure perplexity on; pass --text FILE")
    return texts


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint.quantized:
        raise UserError(
            f"{args.checkpoint} is {checkpoint.quantized} already; "
            "use the checkpoint it was made from"
        )
    if args.to:
        write(checkpoint, args.to, args.dtype)
    if args.report:
        texts = report_texts(checkpoint, args.text, args.characters)
        print_quantization_report(args.checkpoint, args.dtype, texts, args.cases)
    return 0


if __name__ == "__main__":
    run_main(main)
