"""From a config to batches: prepared shards or a stream, packed into rows, dealt out in an order that can be resumed.

    prepare.py                 packing.py                  order.py
    documents -> TokenShard -> PackedLMDataset ---------> TrainingOrder, ResumableLoader -> {input_ids (B, T), targets (B, T)}
    documents ---------------> StreamingPackedLMDataset -> StreamLoader (stream.py) ------>  and doc_ids (B, T)

    python data.py --config config.yaml                           # prepare, and print what is in the data
    python data.py --config config.yaml data.path=books/ --json
    python data.py --config config.yaml --export nanogpt --to folder

No Lightning in any of these: worker processes import them.
"""

import argparse
from pathlib import Path

from pocketlm.config.loading import load_config
from pocketlm.data.bin_files import write_bin
from pocketlm.data.datasets import JoinedDataset, PackedLMDataset, PaddedLMDataset
from pocketlm.data.prepare import prepare
from pocketlm.data.report import build_report, print_report
from pocketlm.data.streaming import StreamingPackedLMDataset
from pocketlm.errors import UserError, run_main

__all__ = ["JoinedDataset", "PackedLMDataset", "PaddedLMDataset", "StreamingPackedLMDataset"]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Prepare the data of a config, and report what is in it."
    )
    parser.add_argument(
        "--config",
        default="config.yaml",
        help="a YAML file with what differs from the defaults (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.add_argument(
        "--export",
        choices=["nanogpt", "llmc"],
        help="write the tokens as train.bin and val.bin of that program, too",
    )
    parser.add_argument("--to", default=".", metavar="FOLDER", help="where to (default: here)")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="changes a key, for example data.path=book.txt",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:

    args = parse_args(argv)
    config = load_config(args.config, args.overrides)
    if args.export and config.data.mixture:
        raise UserError(
            "a mixture is drawn row by row while training; export its sources one at a time"
        )
    if args.export and config.data.streaming:
        raise UserError("a stream keeps no tokens to export; set data.streaming to false")
    data = prepare(config.data)
    if args.export:
        for name, part in (("train", data.train), ("val", data.val)):
            write_bin(Path(args.to) / f"{name}.bin", part.shards[0], args.export)
    print_report(build_report(config, data), as_json=args.json)
    return 0


if __name__ == "__main__":
    run_main(main)
