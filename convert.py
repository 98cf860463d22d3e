"""Convert a pretrained model to a checkpoint: a Hugging Face folder, a GGUF file, or one by name.

    python convert.py path/to/folder --to ckpt checkpoints/llama.ckpt
    python convert.py model.Q8_0.gguf --to ckpt checkpoints/model.ckpt
    python convert.py smollm2-135m --to ckpt checkpoints/smollm2.ckpt

It reads Llama and GPT-2. The checkpoint has the same weights in float32 under the names of
model.py, the config and the tokenizer. Whatever model.py cannot express is refused by name, and so
is a tensor that is missing, unexpected or of the wrong shape.
"""

import argparse
from pathlib import Path

from pocketlm.config.sections import DataConfig
from pocketlm.conversion.pretrained import NAMED_MODELS, WRITERS, convert_pretrained
from pocketlm.errors import run_main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a pretrained model to a checkpoint.")
    parser.add_argument(
        "path", help=f"Hugging Face folder, GGUF file, or name: {', '.join(NAMED_MODELS)}"
    )
    parser.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "FILE"),
        help=f"output format ({', '.join(WRITERS)}) and new file",
    )
    parser.add_argument(
        "--data-dir",
        default=DataConfig.cache_dir,
        help="cache folder for named models (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    output_format, file = args.to
    model = convert_pretrained(args.path, output_format, Path(file), args.data_dir).config.model
    print(
        f"{Path(file)}: {model.n_parameters:,} parameters, vocabulary of {model.vocab_size:,} "
        f"tokens, context of {model.max_seq_len:,} tokens"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
