"""Several processes: the losses of one, with DDP and FSDP, and resumes on another number of them.

The processes are real ones, which talk over gloo; see tests/programs/train_ranks.py.
"""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import convert
from pocketlm.checkpoint.format import DamagedCheckpoint, read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.checkpoint.resume import Examination
from tests.support.forked_commands import ForkedCommands
from tests.support.training import LINES, STREAM, TINY, are_equal, end_equal, read_rows
from tests.support.training import weights_and_optimizer as everything

ROOT = Path(__file__).parents[2]
STEPS = ["training.max_steps=20", "training.log_every_steps=1", "training.val_every_steps=5"]
LONG = [*STEPS, "training.save_every_steps=50", "model.dropout=0"]
# Muon, accumulation and clipping on packed rows; AdamW and unequal numbers of targets
KINDS = {
    "packed": [*LONG, "training.grad_clip=0.3"],
    # without data workers: CPython 3.11 can hang in the fork that starts one while gloo's threads
    # come and go
    "stream": [
        *(*LONG, *STREAM, "data.packing=padded", "training.optimizer=adamw"),
        "model.tie_embeddings=false",
    ],
}
FSDP = ["hardware.strategy=fsdp", "hardware.devices=2"]
STOPPED = 128 + signal.SIGTERM


def planned(*overrides: str, name: str, stop: int | None = None) -> dict[str, Any]:
    """Return a run for `run_ranks`, which a SIGTERM after step `stop` may end."""
    arguments = ["--config", "config.yaml", *TINY, *overrides, f"run.name={name}"]
    interrupt = stop and [stop, signal.SIGTERM, 0]
    return {"arguments": arguments, "interrupt": interrupt, "exit": STOPPED if stop else 0}


@pytest.fixture
def run_ranks(folder, forked_commands: ForkedCommands):
    """Make runs in several processes; return the standard error of all."""

    def run_ranks(ranks: int, *runs: dict[str, Any], launcher: str = "torchrun") -> str:
        plan = {"ranks": ranks, "launcher": launcher, "runs": runs}
        Path("plan.json").write_text(json.dumps(plan))
        done = forked_commands.run("plan.json", program="tests/programs/train_ranks.py")
        assert done.returncode == 0, done.stderr
        return done.stderr

    return run_ranks


def logged(name: str) -> dict[tuple[int, str], float]:
    """Return the losses, norms and numbers of tokens of a run, by step, with all digits."""
    values = {}
    for line in Path(f"losses/{name}.json").read_text().splitlines():
        step, tokens, row = json.loads(line)
        values[step, "tokens"] = tokens
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            if key in row:
                values[step, key] = row[key]
    return values


def assert_equal_losses(name: str, other: str) -> None:
    """Losses of 3 to 6 nats in float32, whose digits are 2.4e-7 to 4.8e-7 apart."""
    values, others = logged(name), logged(other)
    assert len(values) == 20 + 20 + 20 + 4
    assert values == pytest.approx(others, abs=1e-6)


# ---- the losses of one process ----


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(run_ranks):
    """And a run goes on from two processes to one, and then to four."""
    run_ranks(1, *(planned(*options, name=kind) for kind, options in KINDS.items()))
    four = "hardware.devices=4"
    run_ranks(2, planned(*KINDS["packed"], *FSDP[1:], name="elastic", stop=8))
    shown = run_ranks(1, planned(*KINDS["packed"], name="elastic", stop=12))
    assert "strategy ddp -> single, devices 2 -> 1" in shown
    run_ranks(
        4,
        planned(*KINDS["packed"], four, name="elastic"),
        planned(*KINDS["stream"], four, name="stream-of-four"),
        launcher="lightning",
    )
    assert_equal_losses("packed", "elastic")
    assert_equal_losses("stream", "stream-of-four")


@pytest.mark.slow
def test_fsdp_has_the_losses_of_one_process(run_ranks, capsys):
    """With sharded checkpoints, which resume on one process and become ordinary ones."""
    options = [*KINDS["packed"], "model.gradient_checkpointing=true", "training.ema_decay=0.9"]
    run_ranks(1, planned(*options, name="one"))
    run_ranks(2, planned(*options, *FSDP, name="two", stop=8))
    last = Path("checkpoints/two/last.ckpt")
    assert convert.main([str(last), "--to", "ckpt", "whole.ckpt"]) == 0
    assert "at step 8, in one file" in capsys.readouterr().out
    assert are_equal(everything("whole.ckpt"), everything(last))
    # an ordinary checkpoint is resumed by FSDP, and a sharded one by a single process
    last.unlink()
    Path("whole.ckpt").rename(last)
    Path("checkpoints/two/step-00000008.ckpt").unlink()
    shutil.rmtree("checkpoints/two/step-00000008.shards")
    run_ranks(2, planned(*options, *FSDP, name="two", stop=12))
    run_ranks(1, planned(*options, name="two", stop=16))
    run_ranks(2, planned(*options, *FSDP, name="two"), launcher="slurm")
    assert_equal_losses("one", "two")
    one, two = (load_checkpoint(f"checkpoints/{name}/final.ckpt").model for name in ("one", "two"))
    for ours, theirs in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    folders = {path.name for path in Path("checkpoints/two").glob("step-*.shards")}
    used = [read_checkpoint(p, metadata_only=True) for p in Path("checkpoints/two").glob("*.ckpt")]
    assert folders == {state["shards"]["folder"] for state in used if "shards" in state}


@pytest.mark.slow
def test_fsdp_trains_with_every_optimizer_and_in_bfloat16(run_ranks):
    options = ["training.max_steps=2", "model.dropout=0"]
    run_ranks(
        2,
        planned(*options, *FSDP, "training.optimizer=sgd", name="sgd"),
        planned(*options, *FSDP, "training.precision=bf16-mixed", name="bf16"),
    )
    run_ranks(1, planned(*options, "training.optimizer=sgd", name="one"))
    ours, theirs = (
        everything("checkpoints/sgd/final.ckpt"),
        everything("checkpoints/one/final.ckpt"),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_scaled_down_copies_of_the_large_presets_take_fsdp_steps(run_ranks):
    """With all that the presets set but sizes, corpus and devices; they have the loss of one."""
    small = ["n_layers=2", "d_model=16", "n_heads=2", "d_ff=32", "vocab_size=null"]
    data = ["path=text.txt", "separator=line", "val_share=0.2", "tokenizer=byte"]
    training = ["seq_len=16", "micro_batch_size=2", "grad_accum_steps=4", "max_steps=3"]
    training += ["warmup_steps=1", "log_every_steps=1"]
    sections = {"model": small, "data": data, "training": training}
    keys = [f"{name}.{one}" for name, ones in sections.items() for one in ones]
    keys += ["hardware.accelerator=cpu", "hardware.num_nodes=1"]
    presets = ("gpt2_1558m", "llama_1b", "llama_7b")

    def runs(devices: int) -> list[dict[str, Any]]:
        strategy = "fsdp" if devices > 1 else "auto"
        hardware = [f"hardware.devices={devices}", f"hardware.strategy={strategy}"]
        return [
            {
                "arguments": [
                    *("--config", str(ROOT / f"presets/{name}.yaml"), *keys, *hardware),
                    *(["model.n_kv_heads=1"] if name == "llama_1b" else []),
                    f"run.name={name}-{devices}",
                ]
            }
            for name in presets
        ]

    run_ranks(1, *runs(1))
    shown = run_ranks(2, *runs(2))
    assert shown.count("bf16-mixed: as configured") == len(presets)
    for name in presets:
        config = read_checkpoint(f"checkpoints/{name}-2/final.ckpt", metadata_only=True)["kit"]
        assert config["config"]["model"]["gradient_checkpointing"]
        # sums in bfloat16, of which two processes round other parts than one
        assert logged(f"{name}-2") == pytest.approx(logged(f"{name}-1"), rel=2e-3)


# ---- exact resumes ----


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_dropout_resumes_exactly_on_every_process(run_ranks, strategy):
    options = [*LINES, "data.packing=padded", "model.dropout=0.3", "hardware.devices=2"]
    options.append(f"hardware.strategy={strategy}")
    shown = run_ranks(
        2,
        planned(*options, name="whole"),
        planned(*options, name="stopped", stop=7),
        planned(*options, name="stopped"),
    )
    assert shown.count("stopped at step 7; the same command resumes") == 1
    assert end_equal("checkpoints/stopped", "checkpoints/whole")
    assert (
        Path("logs/stopped/metrics.csv").read_text().count("\n")
        == len(read_rows("logs/whole/metrics.csv")) + 1
    )


def test_a_sharded_checkpoint_that_is_not_whole_is_named(folder, run_ranks):
    run_ranks(2, planned(*FSDP, "training.max_steps=1", name="a"))
    path = Path("checkpoints/a/final.ckpt")
    state = read_checkpoint(path, metadata_only=True)
    shard = path.parent / state["shards"]["folder"] / "__1_0.distcp"
    content, size = bytearray(shard.read_bytes()), shard.stat().st_size
    content[size // 2] ^= 1  # no size tells of it
    shard.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"{shard} has another checksum than when it was"):
        read_checkpoint(path)
    assert "has another checksum" in (Examination.of(path).damage or "")
    shard.write_bytes(content[:-1])
    with pytest.raises(DamagedCheckpoint, match=f"{shard} has {size - 1:,} of {size:,} bytes"):
        read_checkpoint(path)
    shard.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"{shard} is missing"):
        read_checkpoint(path)


# ---- started by train.py itself ----


@pytest.mark.slow
def test_one_command_starts_both_processes(folder, forked_commands):
    """Lightning starts the second one; a probe suite is scored once, with the tokens of both."""
    Path("cases.yaml").write_text("[{name: a, prompt: 'a', target: ' b', distractors: [' c']}]")
    options = ["model.dropout=0", "training.max_steps=6", "training.probe_cases=[cases.yaml]"]
    probes = []
    for name, devices in (("one", 1), ("two", 2)):
        arguments = planned(*options, f"hardware.devices={devices}", name=name)["arguments"]
        program = "tests/programs/train_in_two.py" if devices == 2 else "train.py"
        done: subprocess.CompletedProcess = forked_commands.run(*arguments, program=program)
        assert done.returncode == 0, done.stderr
        rows = read_rows(f"logs/{name}/metrics.csv")
        probes.append(
            [(r["step"], r["tokens"], r["probe/macro"]) for r in rows if r["probe/macro"]]
        )
    assert len(probes[0]) == 2 and probes[0] == probes[1]
    assert end_equal("checkpoints/one", "checkpoints/two")  # each step adds two equal halves
