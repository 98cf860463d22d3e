"""Conversions of a checkpoint to every format and back: what each proves, and its memory.

Memory is the private memory of the command and of its proof, without that of a process that has
only imported the program. The file of a checkpoint is mapped, and its pages are not private.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import OUT, ROOT, Finished, machine, run_watched
from pocketlm.checkpoint.format import hash_weights
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError

SAMPLE_SECONDS = 0.05  # between two samples of the memory
# format, output and data type; those after which the same weights come back
OUTPUTS = (
    ("hf", "hf", "f32"),
    ("gguf", "f32.gguf", "f32"),
    ("gguf", "f16.gguf", "f16"),
    ("gguf", "bf16.gguf", "bf16"),
    ("gguf", "q8_0.gguf", "q8_0"),
    ("gguf", "q4_0.gguf", "q4_0"),
    ("onnx", "f32.onnx", "f32"),
    ("onnx", "int8.onnx", "int8"),
    ("safetensors", "model.safetensors", "f32"),
)
RETURNING = ("hf", "f32.gguf")


@dataclass(frozen=True)
class Bench:
    """A checkpoint, and what its conversions are compared with."""

    ckpt: Path
    work: Path
    megabytes: float  # of the weights in float32
    imports: float  # megabytes of a process that has only imported the program
    sha256: str

    def convert(self, path: Path, output_format: str, output: str, *more: str) -> Finished:
        """Run the command."""
        command = [sys.executable, str(ROOT / "convert.py"), str(path), "--to", output_format]
        return run_watched([*command, output, *more], self.work, every=SAMPLE_SECONDS)

    def print_result(self, title: str, done: Finished, lines: list[str]) -> None:
        """Print a row of the table: time, memory, and what the conversion proves."""
        megabytes = done.megabytes - self.imports
        ratio = megabytes / self.megabytes
        memory = f"{megabytes:,.0f} MB, {ratio:.2f} times the model"
        OUT.print(f"| {title} | {done.seconds:.0f} s | {memory} | {'; '.join(lines)} |")


def bench_convert(args: argparse.Namespace) -> int:
    """Print what each conversion proves, and whether the weights come back."""
    checkpoint = load_checkpoint(args.ckpt)
    weights = checkpoint.model.state_dict()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        command = [sys.executable, "-c", "import time, convert; time.sleep(1)"]
        imports = run_watched(command, ROOT, every=SAMPLE_SECONDS).megabytes
        megabytes = sum(each.nbytes for each in weights.values()) / 1e6
        ckpt = Path(args.ckpt).resolve()
        bench = Bench(ckpt, Path(work), megabytes, imports, hash_weights(weights))
        del weights, checkpoint
        OUT.print(f"{args.ckpt}: {megabytes:,.0f} MB of float32 weights; {machine()}\n")
        OUT.print("| conversion | time | memory | proof |\n| --- | --- | --- | --- |")
        for output_format, output, dtype in OUTPUTS:
            if args.formats and output_format not in args.formats:
                continue
            convert_one(bench, output_format, output, dtype)
    return 0


def convert_one(bench: Bench, output_format: str, output: str, dtype: str) -> None:
    """Convert to a format, and back if nothing is lost on the way."""
    more = ("--text", str(ROOT / "docs" / "how_it_works.md")) if dtype == "int8" else ()
    try:
        done = bench.convert(bench.ckpt, output_format, output, "--dtype", dtype, *more)
    except UserError as error:
        OUT.print(f"| {output_format}, {dtype} | | | {error} |")
        return
    bench.print_result(f"{output_format}, {dtype}", done, done.stdout.splitlines()[1:])
    if output in RETURNING:
        again = bench.convert(bench.work / output, "ckpt", "again.ckpt", "--force")
        same = load_checkpoint(bench.work / "again.ckpt").weights_sha256 == bench.sha256
        weights = "the same weights to the last bit" if same else "OTHER WEIGHTS"
        bench.print_result(f"{output_format}, {dtype}, and back", again, [weights])
