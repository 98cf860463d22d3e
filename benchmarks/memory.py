"""The memory that the plan of a run tells, compared with the peak of the run's process."""

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import OUT, ROOT, machine
from pocketlm.errors import UserError

# Each run has three steps, a validation, a checkpoint and samples, on a text of 500,000 bytes.
STEPS = 3
LINES = 20_000
COMMON = [
    "data.path=text.txt",
    "data.tokenizer=byte",
    "data.separator=line",
    "data.val_share=0.001",
    "hardware.accelerator=cpu",
    "hardware.compile=off",
    "sampling.max_new_tokens=4",
    "training.log_every_steps=1",
    "training.precision=32-true",
    f"training.max_steps={STEPS}",
    f"training.val_every_steps={STEPS}",
    f"training.save_every_steps={STEPS}",
]
BFLOAT16 = "training.precision=bf16-mixed"
DROPOUT = "model.dropout=0.1"
CHECKPOINTING = "model.gradient_checkpointing=true"
GPT2 = "model.mlp=gelu model.position=learned model.norm=layernorm model.bias=true"


def shape(layers: int, width: int, heads: int, rows: int, length: int, vocabulary: int) -> str:
    """Return the overrides of a model and its batch."""
    return (
        f"model.n_layers={layers} model.d_model={width} model.n_heads={heads} "
        f"model.n_kv_heads={heads} model.vocab_size={vocabulary} "
        f"training.micro_batch_size={rows} training.seq_len={length}"
    )


DEEP = f"{shape(12, 384, 6, 8, 256, 4096)} training.optimizer=adamw"
LONG = shape(6, 256, 8, 4, 512, 4096)
MANY = f"{shape(6, 256, 8, 16, 256, 8192)} {GPT2}"
CONFIGS = {
    "the default model": "model.vocab_size=12288",
    "the same, bfloat16": f"model.vocab_size=12288 {BFLOAT16}",
    "12 layers of 384": DEEP,
    "the same, checkpointing": f"{DEEP} {CHECKPOINTING}",
    "12 layers, bfloat16": f"{DEEP} {BFLOAT16}",
    "dropout, 512 tokens": f"{LONG} {DROPOUT}",
    "the same, checkpointing, dropout": f"{LONG} {DROPOUT} {CHECKPOINTING}",
    "dropout, bfloat16": f"{LONG} {DROPOUT} {BFLOAT16}",
    "dropout, bfloat16, 2 layers": f"{shape(2, 256, 8, 2, 512, 4096)} {DROPOUT} {BFLOAT16}",
    "dropout, 7 rows": f"{shape(4, 256, 8, 7, 256, 4096)} {DROPOUT}",
    "GPT-2, 16 rows": MANY,
    "GPT-2, bfloat16": f"{MANY} {BFLOAT16}",
    "GPT-2, no document mask": f"{shape(2, 256, 8, 8, 256, 2048)} {GPT2} data.document_mask=false",
    "all logits at once": "model.vocab_size=50257 training.loss_chunk=0 "
    "training.micro_batch_size=4",
    "768 wide, Muon": shape(6, 768, 12, 1, 256, 8192),
    "accumulation": f"{shape(6, 384, 6, 4, 256, 16384)} training.grad_accum_steps=3 "
    "training.optimizer=adamw",
}


def drawn_config(chance: random.Random) -> str:
    """Draw a config at random, as a check of the estimate on configs that nobody chose."""
    head = chance.choice([16, 32, 64])
    heads = chance.choice([2, 4, 6, 8, 10])
    sizes = shape(
        chance.choice([1, 2, 3, 4, 6, 8, 12]),
        head * heads,
        heads,
        chance.choice([1, 2, 3, 4, 6, 8, 12]),
        chance.choice([64, 128, 200, 256, 384, 512]),
        chance.choice([300, 1024, 4096, 10_000, 32_000, 50_257]),
    )
    switches = [
        (0.5, BFLOAT16),
        (0.3, DROPOUT),
        (0.25, CHECKPOINTING),
        (0.3, GPT2),
        (0.3, "training.grad_accum_steps=2"),
        (0.2, "data.document_mask=false"),
        (0.2, "data.packing=padded"),
        (0.2, "training.loss_chunk=0"),
        (0.3, "model.tie_embeddings=false"),
    ]
    optimizer = f"training.optimizer={chance.choice(['muon', 'adamw', 'sgd'])}"
    chosen = [setting for share, setting in switches if chance.random() < share]
    return " ".join([sizes, optimizer, *chosen])


def told_and_peak(overrides: list[str], folder: Path) -> tuple[float, float]:
    """Run train.py; return the gigabytes that its plan tells, and the most that it had.

    Raises UserError if the run fails.
    """
    command = [sys.executable, str(ROOT / "train.py"), "--config", "config.yaml", "--fresh"]
    with (folder / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            [*command, *COMMON, *overrides], cwd=folder, stdout=subprocess.DEVNULL, stderr=stderr
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    output = (folder / "stderr.txt").read_text()
    told = re.search(r"^memory +about ([0-9.,]+) GB", output, re.MULTILINE)
    if process.returncode or told is None:
        raise UserError(f"train.py {' '.join(overrides)} failed: {output.strip()[-400:]}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return float(told[1].replace(",", "")), usage.ru_maxrss * unit / 1e9


def bench_memory(args: argparse.Namespace) -> int:
    """Run each config in a process of its own; print what its plan told, and its peak."""
    configs = CONFIGS
    if args.random:
        chance = random.Random(args.seed)
        configs = {f"{args.seed}.{i + 1}": drawn_config(chance) for i in range(args.random)}
    within = 0
    OUT.print(f"{machine()}\n  told     peak           config")
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        lines = (f"{i} times {i} is {i * i}.\n" for i in range(LINES))
        (folder / "text.txt").write_text("".join(lines))
        (folder / "config.yaml").write_text("model: {}\n")
        for title, overrides in configs.items():
            told, peak = told_and_peak(overrides.split() + args.overrides, folder)
            difference = told / peak - 1
            within += abs(difference) <= 0.15
            shown = f"{title}: {overrides}" if args.random else title
            OUT.print(f"{told:6.2f} GB {peak:5.2f} GB {difference:+5.0%}  {shown}")
    OUT.print(f"within 15 %: {within} of {len(configs)}")
    return 0
