"""Data: text to batches, in shards that are prepared once or in a stream.

    documents -> token shards -> PackedLMDataset ------------> {input_ids (B, T), targets (B, T)}
    documents ----------------> StreamingPackedLMDataset ---->  and doc_ids (B, T)

The code is in pocketlm/data/. As a command, this prepares the data of a config and reports on it:

    python data.py --config config.yaml
    python data.py --config config.yaml data.path=books/ --json
    python data.py --config config.yaml --export nanogpt --to folder
    python data.py --config config.yaml --part 3/8      # one of eight processes or machines

Nothing here imports Lightning, because worker processes import it.
"""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

from pocketlm.config.loading import load_config
from pocketlm.corpus.pieces import Part
from pocketlm.data.datasets import JoinedDataset, PackedLMDataset, PaddedLMDataset
from pocketlm.data.prepare import prepare_and_export, prepare_part
from pocketlm.data.report import build_report, print_report
from pocketlm.data.streaming import StreamingPackedLMDataset
from pocketlm.errors import UserError, run_main
from pocketlm.limits import MAX_PARTS

__all__ = ["JoinedDataset", "PackedLMDataset", "PaddedLMDataset", "StreamingPackedLMDataset"]


def parse_part(text: str) -> Part:
    """Return the part that `3/8` names. Raises UserError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count <= MAX_PARTS:
        raise UserError(
            f"--part {text}: name one of up to {MAX_PARTS:,} parts, from 1, for example 3/8 for "
            "the third of eight"
        )
    return Part(index - 1, count)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Prepare the data of a config, and report what is in it."
    )
    parser.add_argument(
        "--config",
        default="config.yaml",
        help="YAML file with the keys that differ from the defaults (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.add_argument(
        "--part",
        metavar="NUMBER/COUNT",
        help="prepare one of COUNT parts of the text, which processes or machines that share "
        "data.cache_dir do side by side; the command without --part joins them (default: all)",
    )
    parser.add_argument(
        "--export",
        choices=["nanogpt", "llmc"],
        help="program in whose format to write train.bin and val.bin as well (default: none)",
    )
    parser.add_argument(
        "--to", default=".", metavar="FOLDER", help="folder of the export (default: %(default)s)"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="keys of the config to change, for example data.path=book.txt",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    if args.part is not None:
        if args.export:
            raise UserError("--export writes all tokens; leave --part out once all are prepared")
        parts = prepare_part(config.data, parse_part(args.part))
        if args.json:
            print(json.dumps([asdict(part) for part in parts], indent=2, ensure_ascii=False))
        else:
            print("\n".join(f"part {args.part} of {part}" for part in parts))
        return 0
    report = build_report(config, prepare_and_export(config.data, args.export, Path(args.to)))
    if args.json:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print_report(report)
    return 0


if __name__ == "__main__":
    run_main(main)
