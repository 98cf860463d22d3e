"""Models that others have trained, made into checkpoints of this kit: a Hugging Face folder, a GGUF file, or one by name.

    python convert.py path/to/folder --to ckpt checkpoints/llama.ckpt
    python convert.py model.Q8_0.gguf --to ckpt checkpoints/model.ckpt
    python convert.py smollm2-135m --to ckpt checkpoints/smollm2.ckpt

Llama and GPT-2 are read. What comes out is what `load_checkpoint` reads: the same numbers in float32 under our names, the config,
the tokenizer. What model.py cannot express is refused by name, and so is a tensor that is missing, left over or misshapen.
"""

import argparse
from pathlib import Path

from pocketlm.config.sections import DataConfig
from pocketlm.conversion.pretrained import NAMED, WRITERS, read_pretrained
from pocketlm.errors import UserError, run_main


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make a checkpoint of a model that others have trained."
    )
    parser.add_argument(
        "path", help=f"a Hugging Face folder, a GGUF file, or a name: {', '.join(NAMED)}"
    )
    parser.add_argument(
        "--to",
        nargs=2,
        required=True,
        metavar=("FORMAT", "FILE"),
        help=f"{', '.join(WRITERS)}, and the new file",
    )
    parser.add_argument(
        "--data-dir",
        default=DataConfig.cache_dir,
        help="where a model that has a name is kept (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    form, file = args.to[0], Path(args.to[1])
    if form not in WRITERS:
        raise UserError(f"--to {form} is no format; there is {', '.join(WRITERS)}")
    if file.exists():
        raise UserError(f"{file} is there already; delete it, or name another file")
    model = read_pretrained(args.path, args.data_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[form](model, file)
    config = model.config.model
    print(
        f"{file}: {config.n_parameters:,} parameters, {config.vocab_size:,} entries, {config.max_seq_len:,} tokens of context"
    )
    return 0


if __name__ == "__main__":
    run_main(main)
