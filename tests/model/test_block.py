"""Blocks computed by training.c: when a model uses them, and that they do what torch does."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import model as model_file
from model import KVCache, RMSNorm
from pocketlm.model import kernels
from pocketlm.model.block import native_block
from pocketlm.model.rope import RopeScaling
from pocketlm.native_build import NativeUnavailable
from tests.support.losses import (
    Result,
    assert_equal,
    assert_same_losses,
    compute,
    documents,
    gradient_errors,
    loss_function,
    make_batches,
    ten_clipped_losses,
)
from tests.support.models import random_ids, random_model, relative_error
from tests.support.parity import BFLOAT16

NATIVE_MODELS: list[dict[str, Any]] = [
    {"n_kv_heads": 1},
    {"n_kv_heads": 4, "d_ff": 37},
    {"qk_norm": True},
    {"qk_norm": True, "value_residual": True, "n_kv_heads": 1, "n_layers": 3},
    {"n_layers": 3, "embedding_shortcut": True, "token_shift": True},
    {"head_dim": 6, "rope_scaling": RopeScaling("yarn", 3.0, original_max_seq_len=12)},
]

chunks = pytest.mark.parametrize("chunk", [0, 7])


def both(request: pytest.FixtureRequest, chunk: int, packed: bool, **options: Any) -> list[Result]:
    """Return loss and gradients, first with training.c and then by torch alone."""
    results = []
    for fixture in (None, "torch_alone"):
        if fixture:
            request.getfixturevalue(fixture)
        model = random_model(max_seq_len=40, **options).train()
        results.append(compute(model, loss_function(model, chunk), make_batches(2, packed)))
    return results


@documents
@chunks
@pytest.mark.parametrize("options", NATIVE_MODELS, ids=str)
def test_loss_and_every_gradient_are_those_of_torch(
    request: pytest.FixtureRequest, packed: bool, chunk: int, options: dict[str, Any]
) -> None:
    ours, theirs = both(request, chunk, packed, **options)
    assert any((ours.gradients[n] != theirs.gradients[n]).any() for n in ours.gradients)
    # 100 roundings of 6e-8 in another order; the terms of a mix's gradient cancel to a hundredth
    assert_equal(ours, theirs, tolerance=1e-4 if options.get("value_residual") else 1e-5)


@documents
@chunks
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=str)
def test_under_bfloat16_autocast_gradients_and_ten_steps_are_those_of_float32_within_its_rounding(
    packed: bool, chunk: int, options: dict[str, Any]
) -> None:
    batches, model = make_batches(2, packed, length=40), random_model(max_seq_len=40, **options)
    expected = compute(model, loss_function(model, chunk), batches)
    result = compute(model, loss_function(model, chunk), batches, bfloat16=True)
    assert relative_error(result.loss, expected.loss) < BFLOAT16.loss
    errors = gradient_errors(result, expected)
    assert 1e-4 < max(errors.values()) < BFLOAT16.gradients, errors  # autocast did something
    losses = []
    for bfloat16 in (True, False):
        model = random_model(max_seq_len=40, **options)
        losses.append(ten_clipped_losses(model, loss_function(model, chunk), batches, bfloat16))
    assert_same_losses(*losses, BFLOAT16.ten_losses)


def test_a_norm_alone_has_the_value_and_gradients_of_torchs() -> None:
    """The last norm, and those of the blocks that torch computes."""
    x = torch.randn(3, 5, 37, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = RMSNorm(37, 1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    ours, theirs = norm(x), F.rms_norm(x, (37,), norm.weight, 1e-5)
    assert "NativeNorm" in ours.grad_fn.name()
    dy = x.detach().roll(1, 0)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (x, norm.weight), dy)),
        (theirs, *torch.autograd.grad(theirs, (x, norm.weight), dy)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of 37 float32 terms


def test_recomputed_blocks_have_the_same_gradients() -> None:
    results = []
    for recompute in (False, True):
        model = random_model(gradient_checkpointing=recompute).train()
        results.append(compute(model, loss_function(model, 7), make_batches(2, packed=True)))
    assert_equal(*results, tolerance=0)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "value_residual": True}], ids=str)
def test_the_gradients_of_a_model_that_drops_out_are_the_slopes_of_its_loss(
    options: dict[str, Any],
) -> None:
    """Along 20 random directions, by differences of losses with the same seed."""
    model = random_model(dropout=0.3, **options).train()
    loss, batch = loss_function(model, 0), make_batches(1)[0]

    def loss_of_seed() -> torch.Tensor:
        torch.manual_seed(3)
        return loss(batch)

    loss_of_seed().backward()
    parameters, generator = list(model.parameters()), torch.Generator().manual_seed(0)
    for _ in range(20):
        directions = [
            torch.randn(p.shape, generator=generator) * p.detach().square().mean().sqrt()
            for p in parameters
        ]
        slopes = [(p.grad * d).sum() for p, d in zip(parameters, directions, strict=True)]
        losses = []
        for step in (1e-3, -2e-3, 1e-3):
            with torch.no_grad():
                torch._foreach_add_(parameters, directions, alpha=step)
            losses.append(loss_of_seed().detach())
        difference = (losses[0] - losses[1]) / 2e-3
        torch.testing.assert_close(torch.stack(slopes).sum(), difference, rtol=0.01, atol=0.03)


# ---- when it is used ----


@pytest.fixture
def native_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets an element for each block that training.c computes."""
    calls: list[int] = []

    def recorded(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        calls.append(len(x))
        return native_block(x, *arguments)

    monkeypatch.setattr(model_file, "native_block", recorded)
    return calls


def test_it_computes_every_block_of_a_training_step(native_blocks: list[int]) -> None:
    random_model().train()(random_ids())
    assert len(native_blocks) == 2


OTHER_MODELS = [
    {"mlp": "gelu"},
    {"norm": "layernorm"},
    {"norm_gain": False},
    {"position": "learned"},
    {"bias": True},
    {"attention_bias": "qkv"},
]


@pytest.mark.parametrize("options", OTHER_MODELS, ids=str)
def test_blocks_of_other_kinds_are_torchs(
    native_blocks: list[int], options: dict[str, Any]
) -> None:
    random_model(**options).train()(random_ids())
    assert not native_blocks


def test_without_gradients_or_with_a_cache_or_given_positions_blocks_are_torchs(
    native_blocks: list[int],
) -> None:
    model, ids = random_model(), random_ids()
    cache = KVCache(model.config, 2, 13, dtype=torch.float32, device=torch.device("cpu"))
    model(ids, cache=cache)
    model(ids, positions=torch.arange(13).expand(2, -1))
    with torch.no_grad():
        model(ids)
    assert not native_blocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_of_weights_that_are_not_float32_blocks_are_torchs(
    native_blocks: list[int], dtype: torch.dtype
) -> None:
    random_model().to(dtype)(random_ids())
    with torch.autocast("cpu", torch.float16):
        random_model()(random_ids())
    assert not native_blocks


def test_without_a_compiler_training_goes_on_and_says_so_once(
    native_blocks: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unavailable(_: Any) -> None:
        raise NativeUnavailable("there is no C compiler on the PATH (gcc or clang)")

    monkeypatch.setattr(kernels, "load_native", unavailable)
    kernels.load.cache_clear()
    model = random_model()
    for _ in range(2):
        compute(model, loss_function(model, 7), make_batches(1))
    kernels.load.cache_clear()
    assert not native_blocks
    assert capsys.readouterr().err == (
        "note: training with torch alone, which is slower: "
        "there is no C compiler on the PATH (gcc or clang)\n"
    )


def test_frozen_weights_get_no_gradient_and_the_others_keep_theirs() -> None:
    frozen, model = random_model(tie_embeddings=False), random_model(tie_embeddings=False)
    for name, p in frozen.named_parameters():
        p.requires_grad_("up_proj" in name)
    for each in (frozen, model):
        loss_function(each, 7)(make_batches(1)[0]).backward()
    for (name, p), q in zip(frozen.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) if "up_proj" in name else p.grad is None
