"""Convert a model: others' to a checkpoint, and a checkpoint to the files of other programs.

    python convert.py FOLDER_OR_FILE_OR_NAME --to ckpt checkpoints/llama.ckpt
    python convert.py checkpoints/last.ckpt --to ckpt FILE       # a sharded one, in one file
    python convert.py checkpoints/final.ckpt --to hf DIR
    python convert.py checkpoints/final.ckpt --to gguf FILE --dtype q8_0
    python convert.py checkpoints/final.ckpt --to onnx FILE --dtype int8
    python convert.py checkpoints/final.ckpt --to safetensors FILE

It reads models in Hugging Face folders and GGUF files, checkpoints of nanoGPT and of the Tiny
Transformer Starter, and SmolLM2 by name, and never runs code that comes with a model. Every
conversion of a checkpoint is loaded again, by transformers, gguf or onnxruntime, and compared with
it before it gets its name; the line that says so is printed. Whatever a format cannot express is
refused by name.
"""

import argparse
import os
import sys
from pathlib import Path

from pocketlm.checkpoint.format import sharded_checkpoint, write_whole
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.config.sections import DataConfig
from pocketlm.conversion.pretrained import NAMED_MODELS, convert_pretrained
from pocketlm.conversion.stored import is_finite
from pocketlm.conversion.torch_checkpoints import TokenizerSource
from pocketlm.errors import UserError, run_main
from pocketlm.evaluation.quantization_report import validation_texts
from pocketlm.export import gguf, huggingface, safetensors
from pocketlm.export.onnx import conversion as onnx
from pocketlm.export.proof import reference_of
from pocketlm.hardware.memory import return_large_blocks

FORMATS = {  # of --to: its data types, the first by default
    "ckpt": ("f32",),
    "hf": ("f32",),
    "gguf": tuple(gguf.DTYPES),
    "onnx": onnx.DTYPES,
    "safetensors": ("f32",),
}
TEXT_CHARACTERS = 20_000  # on which the cost of int8 is measured


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Convert a pretrained model to a checkpoint, or a checkpoint to other formats."
    )
    add = parser.add_argument
    add(
        "path",
        help="checkpoint; or, for --to ckpt, a Hugging Face folder, a GGUF file, a checkpoint of "
        "nanoGPT or of the Tiny Transformer Starter, or a name: " + ", ".join(NAMED_MODELS),
    )
    add(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "OUTPUT"),
        help=f"output format ({', '.join(FORMATS)}), and a new file, or, for hf, folder",
    )
    add(
        "--dtype",
        help="data type of the matrices: "
        + "; ".join(f"{name}: {', '.join(FORMATS[name])}" for name in ("gguf", "onnx"))
        + " (default: f32)",
    )
    add(
        "--text",
        metavar="FILE",
        help="text that a nanoGPT of characters was trained on, or on which the cost of int8 is "
        "measured (default: the validation documents)",
    )
    add("--tokenizer", metavar="NAME", help="of a nanoGPT or starter checkpoint: gpt2, a path")
    add("--force", action="store_true", help="replace an output that exists")
    add(
        "--data-dir",
        default=DataConfig.cache_dir,
        help="cache folder for named models (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not fit together, or an output that exists."""
    output_format, output = args.to
    if output_format not in FORMATS:
        formats = ", ".join(FORMATS)
        raise UserError(f"--to {output_format} is not a format; the formats are: {formats}")
    dtypes = FORMATS[output_format]
    args.dtype = args.dtype or dtypes[0]
    if args.dtype not in dtypes:
        raise UserError(
            f"--dtype {args.dtype} is no data type of {output_format}, which has: "
            + ", ".join(dtypes)
        )
    if args.text and args.dtype != "int8" and output_format != "ckpt":
        raise UserError("--text measures what --to onnx FILE --dtype int8 costs; leave it out")
    if args.tokenizer and output_format != "ckpt":
        raise UserError("--tokenizer is for --to ckpt; a checkpoint has its own: leave it out")
    path = Path(output)
    if os.path.lexists(path) and not args.force:  # also a link to nothing
        raise UserError(f"{output} exists already; name another, or pass --force to replace it")
    if path.exists() and Path(args.path).exists() and path.samefile(args.path):
        raise UserError(f"{output} is the model to convert; name another output")
    if path.exists() and path.is_dir() != (output_format == "hf"):
        kinds = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise UserError(f"{output} is {kinds[0]}, and {output_format} is {kinds[1]}; name another")


def load_finite(path: str) -> Checkpoint:
    """Load a checkpoint. Raises UserError if it is quantised or has weights that are not finite."""
    if Path(path).is_dir() or path in NAMED_MODELS or path.endswith(".gguf"):
        raise UserError(
            f"{path} is not a checkpoint; make one first: python convert.py {path} --to ckpt FILE"
        )
    checkpoint = load_checkpoint(path, mapped=True)
    if checkpoint.quantized:
        raise UserError(
            f"{path} is {checkpoint.quantized} already; use the checkpoint it was made from"
        )
    for name, weight in checkpoint.model.named_parameters():
        if not is_finite(weight.detach()):
            raise UserError(
                f"{path}: {name} has weights that are not finite; use an earlier checkpoint"
            )
    return checkpoint


def measured_texts(args: argparse.Namespace, checkpoint: Checkpoint) -> list[str]:
    """Return the texts on which the cost of int8 is measured. Raises UserError."""
    if not args.text:
        return list(validation_texts(checkpoint.config, TEXT_CHARACTERS))
    try:
        text = Path(args.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{args.text} is not UTF-8 at byte {error.start}") from None
    if not text.strip():
        raise UserError(f"{args.text} has no text; pass another file")
    return [text[:TEXT_CHARACTERS]]


def export(args: argparse.Namespace) -> list[str]:
    """Convert a checkpoint; return what the proof says. Raises UserError."""
    output_format, output = args.to[0], Path(args.to[1])
    checkpoint = load_finite(args.path)
    texts = measured_texts(args, checkpoint) if args.dtype == "int8" else []
    reference = reference_of(checkpoint.model)
    if output_format == "hf":
        return huggingface.write_folder(checkpoint, reference, output)
    if output_format == "gguf":
        return gguf.write_file(checkpoint, reference, output, args.dtype)
    if output_format == "onnx":
        return onnx.write_file(checkpoint, reference, output, args.dtype, texts)
    return safetensors.write_file(checkpoint, reference, output)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    output_format, output = args.to
    if output_format != "ckpt":
        lines = export(args)
        print("\n".join([f"{output}: {args.path} as {output_format}, {args.dtype}", *lines]))
        return 0
    if sharded := sharded_checkpoint(Path(args.path)):
        step = write_whole(sharded, Path(output))
        print(f"{output}: {sharded} at step {step:,}, in one file")
        return 0
    text = Path(args.text) if args.text else None
    source = TokenizerSource(args.data_dir, args.tokenizer, text)
    pretrained = convert_pretrained(args.path, Path(output), source)
    model = pretrained.config.model
    for note in pretrained.notes:
        print(f"note: {note}", file=sys.stderr)
    print(
        f"{Path(output)}: {model.n_parameters:,} parameters, vocabulary of {model.vocab_size:,} "
        f"tokens, context of {model.max_seq_len:,} tokens"
    )
    return 0


if __name__ == "__main__":
    return_large_blocks()
    run_main(main)
