"""Training batches, and the comparison of two ways to compute their loss and its gradients."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from pocketlm.model.loss import IGNORE_INDEX, batch_loss
from pocketlm.optim import build_optimizer, clip_gradients
from tests.support.gpt2 import in_our_names
from tests.support.models import T, gradients, random_ids, reference_of, relative_error
from tests.support.parity import Precision

# In float64, relative to the largest value: 1e-16 per rounding, and sums of some 100 terms in two
# layers.
ROUNDING = 1e-12

documents = pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])

Batch = dict[str, Tensor]
LossFunction = Callable[[Batch], Tensor]


class Result(NamedTuple):
    """The summed loss of some batches, and the accumulated gradients."""

    loss: Tensor
    gradients: dict[str, Tensor]


def make_batches(
    count: int, packed: bool = False, vocab_size: int = 61, length: int = T
) -> list[Batch]:
    """Return batches of two rows. Some tokens occur often, many never; some targets are missing."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        rows = torch.randint(vocab_size // 4, (2, length + 1), generator=generator)
        rows[:, ::5] = torch.randint(vocab_size, rows[:, ::5].shape, generator=generator)
        targets = rows[:, 1:].clone()
        targets[0, 2] = targets[1, -3:] = IGNORE_INDEX
        batch = {"input_ids": rows[:, :-1], "targets": targets}
        if packed:
            borders = torch.randint(1, length, (2, 3), generator=generator)
            batch["doc_ids"] = (torch.arange(length)[None, :, None] >= borders[:, None]).sum(-1)
        batches.append(batch)
    return batches


def loss_function(model: Transformer, chunk: int) -> LossFunction:
    """Return the loss that training computes, uncompiled."""
    return lambda batch: batch_loss(model, batch, chunk)


def compute(
    model: Transformer, loss_of: LossFunction, batches: list[Batch], bfloat16: bool = False
) -> Result:
    """Return the summed loss of the batches, and the gradients accumulated over them."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(batch)
        (loss / 9).backward()  # so that a factor from above must be passed on
        total = total + loss.detach()
    return Result(total, {name: p.grad.clone() for name, p in model.named_parameters()})


def assert_equal(ours: Result, theirs: Result, tolerance: float = ROUNDING) -> None:
    assert abs(ours.loss - theirs.loss) <= tolerance * abs(theirs.loss)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, expected in theirs.gradients.items():
        gradient = ours.gradients[name]
        assert gradient.layout == torch.strided
        assert gradient.dtype == expected.dtype
        assert gradient.shape == expected.shape
        assert (gradient - expected).abs().max() <= tolerance * expected.abs().max(), name


def gradient_errors(ours: Result, theirs: Result) -> dict[str, float]:
    """Return the relative error of each gradient."""
    return {
        name: relative_error(ours.gradients[name], expected)
        for name, expected in theirs.gradients.items()
    }


def ten_clipped_losses(
    model: Transformer, loss_of: LossFunction, batches: list[Batch], bfloat16: bool = False
) -> Tensor:
    """Return the mean losses before each of ten AdamW steps with clipped gradients."""
    optimizer = build_optimizer(
        model, optimizer="adamw", lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, fused=True
    )
    losses = []
    for step in range(10):
        batch = batches[step % len(batches)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            mean = loss_of(batch) / (batch["targets"] != IGNORE_INDEX).sum()
        optimizer.zero_grad()
        mean.backward()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        losses.append(mean.detach())
    return torch.stack(losses)


def assert_same_losses(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    # The steps are not so small that nothing could differ.
    assert theirs[-2:].mean() < theirs[:2].mean() - 0.5
    assert (ours - theirs).abs().max() <= tolerance


# ---- transformers ----


def next_token_batch(ids: Tensor) -> Batch:
    """Return the targets that transformers makes of labels=ids; the last token has none."""
    no_target = torch.full_like(ids[:, :1], IGNORE_INDEX)
    return {"input_ids": ids, "targets": torch.cat([ids[:, 1:], no_target], dim=1)}


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean loss by torch; the loss of transformers itself passes through float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def assert_gradients_near(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float
) -> None:
    """Compare gradients relative to the norms of `theirs`.

    A bias of the keys shifts all scores of a query by the same amount, which softmax ignores: its
    gradient is zero up to rounding. Its error is relative to the gradient of the queries' bias.
    """
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, gradient in ours.items():
        unit = theirs[name.replace("k_proj.bias", "q_proj.bias")].norm()
        errors[name] = ((gradient - theirs[name]).norm() / unit).item()
    assert max(errors.values()) < tolerance, errors


def assert_loss_equals_llama(
    model: Transformer, loss_of: LossFunction, precision: Precision
) -> None:
    """Compare loss and gradients with those of the Llama of transformers."""
    reference, ids = reference_of(model), random_ids()
    mean = loss_of(next_token_batch(ids)) / ids[:, 1:].numel()
    expected = next_token_loss(reference(ids).logits, ids)
    mean.backward()
    expected.backward()
    assert relative_error(mean, expected) < precision.loss
    assert all(p.grad.layout == torch.strided for p in model.parameters())
    assert_gradients_near(gradients(model), gradients(reference), precision.gradients)


def assert_loss_equals_gpt2(
    model: Transformer, reference: torch.nn.Module, loss_of: LossFunction, precision: Precision
) -> None:
    """Compare loss and gradients with those of the GPT-2 of transformers."""
    ids = random_ids()
    mean = loss_of(next_token_batch(ids)) / ids[:, 1:].numel()
    expected = next_token_loss(reference(ids).logits, ids)
    mean.backward()
    expected.backward()
    assert relative_error(mean, expected) < precision.loss
    assert all(p.grad.layout == torch.strided for p in model.parameters())
    theirs = in_our_names({name: p.grad for name, p in reference.named_parameters()})
    assert_gradients_near(gradients(model), theirs, precision.gradients)
