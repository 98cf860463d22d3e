"""The self-check of MPS: it finds a device that computes wrongly, and names fault and remedy."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from model import ModelConfig
from pocketlm.config.sections import TrainingConfig
from pocketlm.errors import UserError
from pocketlm.hardware import mps_check
from pocketlm.hardware.devices import available_accelerators
from pocketlm.model import kernels
from tests.support.fake_mps import MATMULS, WrongOperators, aten, sums_too_far, wrong_attention
from tests.support.model_kinds import KINDS, LLAMA, SIZES

DEVICE = torch.device("cpu:0")  # the CPU under another name: the device that is checked
HALF = "use training.precision=32-true, or --dtype float32,"
FLOAT = "use hardware.accelerator=cpu, or --device cpu,"


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Make DEVICE, and not the CPU it is compared with, compute within a context."""
    original = mps_check.compute_values
    monkeypatch.setattr(kernels, "load", lambda: None)  # it computes as MPS does: by torch alone

    def plant(fault: Callable) -> None:
        def compute_values(device: torch.device, *arguments: Any) -> dict[str, Tensor]:
            with fault() if device == DEVICE else nullcontext():
                return original(device, *arguments)

        monkeypatch.setattr(mps_check, "compute_values", compute_values)

    return plant


def sees_all_in_half(
    attention: Callable, q: Tensor, *args: Any, is_causal: bool, **kwargs: Any
) -> Tensor:
    return attention(q, *args, is_causal=is_causal and q.dtype == torch.float32, **kwargs)


def sees_one_more(
    attention: Callable, q: Tensor, k: Tensor, *args: Any, is_causal: bool, **kwargs: Any
) -> Tensor:
    """The smallest leak: each token sees the next one."""
    v, mask, dropout = args
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(1)
    return attention(q, k, v, mask, dropout, is_causal=False, **kwargs)


def permutes_the_batch(attention: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return attention(q, *args, **kwargs).flip(0)


FAULTS = {
    "sums too far": (
        lambda: WrongOperators(sums_too_far, *MATMULS),
        torch.float32,
        rf"in float32: a matmul with 40,000 terms .*; {FLOAT}",
    ),
    "leak in half": (
        lambda: wrong_attention(sees_all_in_half),
        torch.bfloat16,
        rf"in bfloat16: attention without gradients sees the future.*; {HALF}",
    ),
    "smallest leak": (
        lambda: wrong_attention(sees_one_more),
        torch.float32,
        rf"in float32: attention with gradients sees the future.*; {FLOAT}",
    ),
    "batch permuted": (
        lambda: wrong_attention(permutes_the_batch),
        torch.float32,
        rf"in float32: logits with gradients, off by .*; {FLOAT}",
    ),
    "gradient": (
        lambda: WrongOperators(lambda f, *a: 1.1 * f(*a), aten.silu_backward),
        torch.float32,
        r"float32: the gradient of .*, off by 0\.\d+ of",
    ),
    "optimizer": (
        lambda: WrongOperators(lambda *a, **k: None, aten._fused_adamw_),
        torch.float32,
        r"float32: .* after two steps of AdamW, off by",
    ),
    "nan": (
        lambda: WrongOperators(lambda f, *a: f(*a) * torch.nan, aten.silu),
        torch.float32,
        "in float32: attention with gradients .* by nan of",
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", available_accelerators())
def test_the_devices_of_this_machine_pass_and_the_random_state_stays(
    device: str, kind: ModelConfig, dtype: torch.dtype
) -> None:
    before = torch.get_rng_state()
    mps_check.check_device(torch.device(device), dtype, kind, TrainingConfig())
    mps_check.check_device(torch.device(device), dtype, kind)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fault, dtype, message", FAULTS.values(), ids=FAULTS)
def test_the_check_names_the_fault_and_the_remedy(
    faulty: Callable, fault: Callable, dtype: torch.dtype, message: str
) -> None:
    faulty(fault)
    with pytest.raises(UserError, match=message):
        mps_check.check_device(DEVICE, dtype, ModelConfig(**SIZES, d_ff=40_000), TrainingConfig())


def test_a_leak_in_half_precision_does_not_stop_a_run_in_float32(faulty: Callable) -> None:
    faulty(lambda: wrong_attention(sees_all_in_half))
    mps_check.check_device(DEVICE, torch.float32, LLAMA, TrainingConfig())


@pytest.mark.parametrize("wrong", MATMULS[:2], ids=["mm", "bmm"])
def test_matmuls_of_each_kind_are_checked(faulty: Callable, wrong: Any) -> None:
    faulty(lambda: WrongOperators(sums_too_far, wrong))
    with pytest.raises(UserError, match="40,000 terms"):
        mps_check.check_device(DEVICE, torch.float32, ModelConfig(**SIZES, d_ff=40_000))


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_on_another_accelerator_the_check_does_nothing(
    monkeypatch: pytest.MonkeyPatch, accelerator: str
) -> None:
    """It once built and trained its small model at every start on a CPU."""

    def compute_values(*_: Any) -> dict[str, Tensor]:
        raise AssertionError(f"the check computes on {accelerator}")

    monkeypatch.setattr(mps_check, "compute_values", compute_values)
    mps_check.check_mps(accelerator, torch.float32, LLAMA, TrainingConfig())
    mps_check.check_mps(accelerator, torch.bfloat16, LLAMA)
    with pytest.raises(AssertionError, match="computes on"):
        mps_check.check_mps("mps", torch.float32, LLAMA)
