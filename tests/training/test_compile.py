"""The compiled loss: the values and gradients of the eager one, and of transformers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import train
from model import Transformer
from pocketlm.checkpoint.runs import Run
from pocketlm.config.loading import load_config
from pocketlm.data.prepare import prepare
from pocketlm.hardware.devices import Hardware
from pocketlm.training import loop
from tests.support.gpt2 import gpt2_pair
from tests.support.losses import (
    Result,
    assert_equal,
    assert_loss_equals_gpt2,
    assert_same_losses,
    compute,
    gradient_errors,
    loss_function,
    make_batches,
    ten_clipped_losses,
)
from tests.support.models import (
    T,
    randomise_weights,
    relative_error,
)
from tests.support.parity import BFLOAT16, FLOAT32, assert_was_compiled, reset_compiler


class IdleTrainer:
    """A replacement of Lightning's trainer that does not train."""

    def __init__(self, **_: Any):
        self.global_rank, self.world_size, self.global_step = 0, 1, 0
        self._signal_connector = SimpleNamespace()

    def fit(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture
def make_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., train.LitTransformer]]:
    """Return a function that makes the module of a run as train.py does, with random weights."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(50)))
    Path("config.yaml").write_text("model: {n_layers: 2, d_model: 32}\n")
    monkeypatch.setattr(train.L, "Trainer", IdleTrainer)
    fixed = [
        "data.path=text.txt",
        "data.tokenizer=byte",
        f"training.seq_len={T}",
        "training.micro_batch_size=2",
        "training.max_steps=10",
    ]

    def make(compiled: bool, bfloat16: bool, *overrides: str) -> train.LitTransformer:
        config = load_config("config.yaml", [*fixed, *overrides])
        data = prepare(config.data)
        config = config.with_vocab_size(data.tokenizer.vocab_size)
        reset_compiler()
        hardware = Hardware("cpu", "bf16-mixed" if bfloat16 else "32-true", compiled, {})
        L.seed_everything(config.training.seed, verbose=False)
        module = train.LitTransformer(config, data)
        loop.fit(module, config, data, hardware, Run(""), None)
        torch.manual_seed(0)
        randomise_weights(module.model)
        return module

    yield make
    torch._dynamo.reset()


# A graph for each precision: both ways to compute the loss, with and without documents, tied and
# untied. A chunk of 20 splits the 26 tokens in two.
@pytest.mark.slow
@pytest.mark.parametrize(
    "bfloat16, chunk, packed, tie_embeddings",
    [(False, 0, True, True), (True, 20, False, False)],
    ids=["float32, documents", "bfloat16, chunks"],
)
def test_the_compiled_loss_has_the_gradients_and_ten_steps_of_the_eager_one(
    make_module: Callable, bfloat16: bool, chunk: int, packed: bool, tie_embeddings: bool
) -> None:
    """In float32 they differ like two orders of the same sums.

    In bfloat16, fused operations leave roundings out, and the results differ by those.
    """
    options = [f"training.loss_chunk={chunk}", f"model.tie_embeddings={tie_embeddings}".lower()]
    batches, bounds = make_batches(2, packed, 257), BFLOAT16 if bfloat16 else FLOAT32
    eager = make_module(False, bfloat16, *options)
    expected = compute(eager.model, eager.train_loss_fn, batches, bfloat16)
    expected_losses = ten_clipped_losses(eager.model, eager.train_loss_fn, batches, bfloat16)
    module = make_module(True, bfloat16, *options)
    result = compute(module.model, module.train_loss_fn, batches, bfloat16)
    assert relative_error(result.loss, expected.loss) < bounds.loss
    errors = gradient_errors(result, expected)
    assert max(errors.values()) < bounds.gradients, errors
    for p in module.model.parameters():
        assert p.grad.layout == torch.strided
        assert p.grad.dtype == torch.float32
    losses = ten_clipped_losses(module.model, module.train_loss_fn, batches, bfloat16)
    assert_same_losses(losses, expected_losses, bounds.ten_losses)
    assert_was_compiled()  # once, for all of it


@torch.no_grad()
def move(model: Transformer, direction: dict[str, torch.Tensor], distance: float) -> None:
    for name, p in model.named_parameters():
        p.add_(direction[name], alpha=distance)


@pytest.mark.slow
def test_the_compiled_losss_dropout_follows_torchs_seed_and_its_gradients_the_masks_drawn(
    make_module: Callable,
) -> None:
    """The gradient along a random direction is the slope between two losses of the same masks."""
    torch.set_default_dtype(torch.float64)
    try:
        module = make_module(True, False, "model.dropout=0.2", "model.n_layers=1")
        [batch] = make_batches(1, True, 257)
    finally:
        torch.set_default_dtype(torch.float32)
    model, loss_of = module.model.train(), module.train_loss_fn
    assert next(model.parameters()).dtype == torch.float64

    def result_of_seed(seed: int) -> Result:
        torch.manual_seed(seed)
        return compute(model, loss_of, [batch])

    first, again, other = result_of_seed(1), result_of_seed(1), result_of_seed(2)
    assert_equal(first, again, tolerance=0)
    assert abs(first.loss - other.loss) > 1e-3 * first.loss
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }
    step = 1e-5
    move(model, direction, step)
    above = result_of_seed(1).loss
    move(model, direction, -2 * step)
    below = result_of_seed(1).loss
    products = [(gradient * direction[name]).sum() for name, gradient in first.gradients.items()]
    slope = 9 * sum(products)  # `compute` divides the loss by 9
    # The third derivative adds step^2 of values around 1,000; rounding adds 1e-16 / step of them.
    assert (above - below) / (2 * step) == pytest.approx(slope.item(), rel=1e-5)
    assert_was_compiled()


def test_without_compile_the_module_trains_on_its_own_loss(make_module: Callable) -> None:
    """Validation always does so."""
    loss_sum = train.LitTransformer.loss_sum
    assert make_module(False, False).train_loss_fn.__func__ is loss_sum
    module = make_module(True, False)
    assert module.loss_sum.__func__ is loss_sum
    assert hasattr(module.train_loss_fn, "_torchdynamo_orig_callable")


@pytest.mark.slow
def test_the_compiled_gpt2_in_float32_has_the_loss_and_gradients_of_transformers() -> None:
    """tests/model/test_model_parity.py has those of the compiled Llama, and its logits."""
    ours, theirs = gpt2_pair(2, 4)
    reset_compiler()
    compiled_loss = torch.compile(loss_function(ours, 20), dynamic=False)
    assert_loss_equals_gpt2(ours, theirs, compiled_loss, FLOAT32)
    assert_was_compiled()
