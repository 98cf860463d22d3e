"""The numbers of training: loss, gradient, learning rate and validation, held to plain torch."""

import math
from pathlib import Path

import pytest
import torch

import train
from model import Transformer
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.loading import load_config
from pocketlm.data.datasets import PackedLMDataset
from pocketlm.data.prepare import prepare
from pocketlm.model.loss import cross_entropy
from pocketlm.optim import lr_at_step
from tests.support.training import TINY, read_rows, run


def test_validation_is_the_sum_over_every_target_divided_once(finished):
    """Held to a plain loop over the whole validation shard, whose last window is short."""
    checkpoint = load_checkpoint("checkpoints/final.ckpt")
    data = prepare(checkpoint.config.data)
    windows = PackedLMDataset(data.val.shards[0], 16)
    rows = [windows[i] for i in range(len(windows))]
    loss_sum = sum(
        cross_entropy(checkpoint.model(row["input_ids"][None]), row["targets"]).item()
        for row in rows
    )
    last = read_rows()[-1]
    text = Path("text.txt").read_text()
    val_bytes = len(text.encode()) - int(len(text.encode()) * 0.95)
    assert float(last["val/loss"]) == pytest.approx(loss_sum / (data.val.n_tokens - 1), rel=1e-5)
    assert float(last["val/bpb"]) == pytest.approx(loss_sum / math.log(2) / val_bytes, rel=1e-5)


def test_accumulated_small_batches_equal_one_large_batch_where_targets_are_missing(folder):
    """The text's last window is short, so that the batches of a step have unequal targets.

    A mean of means would differ.
    """
    options = ["model.dropout=0", "training.max_steps=8", "training.optimizer=adamw"]
    run("run.name=large", *options, "training.micro_batch_size=8", "training.grad_accum_steps=1")
    run("run.name=small", *options, "training.micro_batch_size=2", "training.grad_accum_steps=4")
    large, small = (
        read_checkpoint(f"checkpoints/{name}/final.ckpt")["state_dict"]
        for name in ("large", "small")
    )
    for name in large:  # sums in another order: 1e-7 a step, magnified by AdamW's division
        torch.testing.assert_close(small[name], large[name], atol=2e-5, rtol=1e-4)


def test_the_gradient_is_the_mean_over_the_targets_there_are(folder):
    """A text shorter than a window leaves most of a row without targets.

    Held to torch's own mean on the same first weights.
    """
    (folder / "text.txt").write_text("forty bytes of text, less than a window")
    run("model.dropout=0", "training.seq_len=64", "training.max_steps=1")
    logged = read_rows()[0]
    config = load_checkpoint("checkpoints/final.ckpt").config
    window = PackedLMDataset(prepare(config.data).train.shards[0], 64)[0]
    torch.manual_seed(config.training.seed)
    model = Transformer(config.model)
    logits = model(window["input_ids"][None])[0]
    loss = torch.nn.functional.cross_entropy(logits, window["targets"])  # ignores -100 too
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert 0 < (window["targets"] == -100).sum() < 64
    assert float(logged["train/loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert float(logged["train/grad_norm"]) == pytest.approx(norm.item(), rel=1e-5)


def test_the_learning_rate_of_each_step_is_the_schedules(folder):
    run("training.log_every_steps=1")
    rates = [float(row["train/lr"]) for row in read_rows() if row["train/lr"]]
    schedule = {"max_steps": 12, "warmup_steps": 2, "min_lr_ratio": 0, "schedule": "linear"}
    assert rates == pytest.approx([4e-3 * lr_at_step(s, **schedule) for s in range(12)], rel=1e-5)


def test_each_rate_and_the_momentum_of_the_config_reach_the_optimizer(folder, monkeypatch):
    made = []
    build = train.LitTransformer.configure_optimizers
    monkeypatch.setattr(
        train.LitTransformer,
        "configure_optimizers",
        lambda module: made.append(build(module)) or made[-1],
    )
    rates = {"matrix_lr": 1e-4, "embed_lr": 2e-4, "vector_lr": 3e-4}
    keys = [f"training.{key}={value}" for key, value in rates.items()]
    one_step = ["training.max_steps=1", "training.warmup_steps=0", "training.schedule=constant"]
    run(*one_step, *keys, "training.lr=5e-4", "training.muon_momentum=0.5", "model.bias=true")
    [optimizer] = made
    assert optimizer.momentum == 0.5
    assert {group["lr_key"]: group["lr"] for group in optimizer.param_groups} == rates


def test_the_loss_is_drawn_at_the_end(finished):
    assert Path("checkpoints/loss.png").read_bytes().startswith(b"\x89PNG")


def test_print_config_prints_yaml_that_loads_to_the_same(folder, capsys):
    assert train.main(["--config", "config.yaml", *TINY, "--print-config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    assert load_config("printed.yaml") == load_config("config.yaml", TINY)


def test_a_dry_run_reports_and_leaves_no_run_behind(folder, capsys):
    assert train.main(["--config", "config.yaml", *TINY, "--dry-run"]) == 0
    output = capsys.readouterr().out
    for word in ("device", "precision", "documents", "parameters", "steps", "memory", "minutes"):
        assert word in output
    assert not Path("checkpoints").exists() and not Path("logs").exists()
