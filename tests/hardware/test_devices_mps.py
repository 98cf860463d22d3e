"""The choices of a run on MPS, with a machine that claims to have it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import train
from model import MPS_INNER_LIMIT, ModelConfig
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import load_config
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.hardware import mps_check
from pocketlm.hardware.devices import check_matmul_sizes, check_recomputation, choose_hardware
from pocketlm.inference.placement import move_to_device
from pocketlm.training import loop
from tests.support.checkpoints import write_checkpoint
from tests.support.model_kinds import SIZES

ROOT = Path(__file__).parents[2]
TEXT = [
    "data.path=text.txt",
    "data.separator=line",
    "data.tokenizer=byte",
    "training.seq_len=16",
    "training.max_steps=2",
]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch and Lightning find MPS."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 2**34)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 0)
    for package in ("fabric", "pytorch"):
        monkeypatch.setattr(
            f"lightning.{package}.accelerators.MPSAccelerator.is_available",
            staticmethod(lambda: True),
        )


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a small text and a small model's config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(50)))
    (tmp_path / "config.yaml").write_text("model: {n_layers: 1, d_model: 16, n_heads: 2}\n")
    return tmp_path


class Recorder:
    """A trainer that only records its arguments, the module and the loaders."""

    def __init__(self, **arguments: Any):
        self.arguments, self.global_rank, self.world_size = arguments, 0, 1
        self.global_step = 0
        self._signal_connector = SimpleNamespace()

    def fit(self, module: L.LightningModule, *loaders: Any, **_: Any) -> None:
        self.module, self.loaders = module, loaders


@pytest.mark.parametrize("precision, chosen", [("auto", "32-true"), ("bf16-mixed", "bf16-mixed")])
def test_a_run_on_mps_has_its_precision_no_pinned_memory_no_workers_and_the_fused_optimizer(
    mac: None, text: Path, monkeypatch, precision: str, chosen: str
) -> None:
    config = load_config("config.yaml", [*TEXT, f"training.precision={precision}"])
    data = prepare(config.data)
    config = config.with_vocab_size(data.tokenizer.vocab_size)
    hardware = choose_hardware(config.hardware, config.training.precision)
    assert hardware.accelerator == "mps" and not hardware.compile
    with monkeypatch.context() as patch:
        patch.setattr(L, "Trainer", Recorder)
        module = train.LitTransformer(config, data)
        trainer = loop.fit(module, config, data, hardware, Run(""), None).trainer
    assert trainer.arguments["accelerator"] == "mps" and trainer.arguments["precision"] == chosen
    module.trainer = SimpleNamespace(strategy=None, precision=chosen)
    assert module.configure_optimizers().defaults["fused"]
    for loader in trainer.loaders:
        assert not loader.pin_memory and loader.num_workers == 0
        dtypes = {rows.dtype for rows in next(iter(loader)).values()}
        assert dtypes <= {torch.int64, torch.int32, torch.bool}
    made = L.Trainer(
        accelerator="mps",
        devices=1,
        precision=chosen,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    assert getattr(made.precision_plugin, "device", "mps") == "mps"  # autocast asks for this device


def test_neither_the_default_run_nor_a_preset_is_refused_on_mps() -> None:
    for path in [ROOT / "config.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]:
        training = load_config(path).training
        check_matmul_sizes("mps", training.micro_batch_size * training.seq_len)


def test_more_tokens_than_a_gradient_sums_rightly_are_refused_on_mps_only() -> None:
    check_matmul_sizes("mps", MPS_INNER_LIMIT - 1)
    check_matmul_sizes("cuda", MPS_INNER_LIMIT)
    with pytest.raises(UserError, match=r"is 32,767; on MPS.* take a smaller micro_batch_size"):
        check_matmul_sizes("mps", MPS_INNER_LIMIT)


def test_dropout_in_recomputed_blocks_is_refused_on_mps_only() -> None:
    """torch keeps the random state for the second pass on CUDA and the CPU, but not on MPS.

    There the gradients were those of other masks.
    """
    kind = ModelConfig(**SIZES, dropout=0.1, gradient_checkpointing=True)
    check_recomputation("cpu", kind)
    check_recomputation("mps", dataclasses.replace(kind, dropout=0.0))
    check_recomputation("mps", dataclasses.replace(kind, gradient_checkpointing=False))
    message = "model.gradient_checkpointing with model.dropout 0.1 has wrong gradients on MPS"
    with pytest.raises(UserError, match=message):
        check_recomputation("mps", kind)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of each self-check; every check fails."""
    calls = []

    def check_device(*arguments: Any) -> None:
        calls.append(arguments)
        raise UserError("wrong")

    monkeypatch.setattr(mps_check, "check_device", check_device)
    return calls


def test_training_on_mps_begins_with_the_self_check(mac: None, text: Path, checked) -> None:
    with pytest.raises(UserError, match="wrong"):
        train.main(["--config", "config.yaml", *TEXT, "training.precision=bf16-mixed"])
    [(device, dtype, kind, training)] = checked
    assert (device.type, dtype) == ("mps", torch.bfloat16)
    assert (kind.vocab_size, training.seq_len) == (257, 16)


def test_generation_on_mps_begins_with_the_self_check(mac: None, text: Path, checked) -> None:
    """It comes before the model is moved to the device, which this machine does not have."""
    checkpoint = load_checkpoint(write_checkpoint(text / "random.ckpt"))
    with pytest.raises(UserError, match="wrong"):
        move_to_device(checkpoint, "mps", "float16")
    assert checked == [(torch.device("mps"), torch.float16, checkpoint.config.model, None)]
