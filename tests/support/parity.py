"""Comparison of a model with a reference of transformers: bounds by precision, and assertions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from model import Transformer
from tests.support.models import gradients, mean_loss, random_ids, relative_error


class Precision(NamedTuple):
    """The dtype of our model, and bounds on its differences from the reference.

    The first three are relative errors; the last is in nats, over ten optimizer steps.
    """

    dtype: torch.dtype
    logits: float
    loss: float
    gradients: float
    ten_losses: float


# 1e-5 is about 100 roundings (6e-8 each) in another order; the loss is a mean, in which they
# cancel. Ten steps: Adam divides by the size of gradients, so the roundings of small ones count.
FLOAT32 = Precision(torch.float32, logits=1e-5, loss=2e-6, gradients=1e-5, ten_losses=1e-4)

# 1e-9 is far above float64's rounding, and far below what anything left in float32 shows (1e-7).
FLOAT64 = Precision(torch.float64, logits=1e-9, loss=1e-9, gradients=1e-9, ten_losses=1e-9)

# Against float32. Eight bits round by up to 2^-9 = 0.002, by 0.0011 on average (root mean square):
# 100 roundings of activations and weights make 0.011 of a logit. The backward pass adds as many, of
# sums that nearly cancel (of a norm, of a softmax): three times that. The loss is the mean over 24
# tokens, each with the error of a logit. Over six seeds and all shapes the largest errors were
# 0.013, 0.0014 and 0.037, and those of transformers itself under the same autocast 0.013, 0.0012
# and 0.044. In ten steps the loss falls by 4 nats; if the directions differ by 0.05, the fall may
# differ by a small part of that: 0.05 is 1 %.
BFLOAT16 = Precision(torch.bfloat16, logits=0.02, loss=0.003, gradients=0.05, ten_losses=0.05)


def in_precision(model: Transformer, precision: Precision) -> Callable[[Tensor], Tensor]:
    """Return a function that computes the model's logits, under autocast for bfloat16."""

    def logits(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.dtype == torch.bfloat16):
            result = model(ids)
        assert result.dtype == precision.dtype  # else autocast did nothing
        return result

    return logits


def assert_parity(ours: Transformer, reference: LlamaForCausalLM, precision: Precision) -> None:
    """Compare logits, loss and every gradient of one batch.

    The reference computes in its own precision, uncompiled.
    """
    ids = random_ids()
    logits, theirs = in_precision(ours, precision)(ids), reference(ids, labels=ids)
    loss = mean_loss(logits, ids)
    loss.backward()
    theirs.loss.backward()
    assert relative_error(logits, theirs.logits) < precision.logits
    assert relative_error(loss, theirs.loss) < precision.loss
    expected = gradients(reference)
    assert gradients(ours).keys() == expected.keys()
    errors = {name: relative_error(grad, expected[name]) for name, grad in gradients(ours).items()}
    assert max(errors.values()) < precision.gradients, errors


def ten_losses(model: torch.nn.Module, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the losses before each of ten AdamW steps on one batch."""
    ids = random_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(10):
        loss = mean_loss(logits_of(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def assert_same_ten_steps(
    ours: Transformer, reference: LlamaForCausalLM, precision: Precision
) -> None:
    """Compare the losses of ten AdamW steps."""
    theirs = ten_losses(reference, lambda ids: reference(ids).logits)
    assert theirs[-1] < theirs[0] - 1  # the steps are not so small that nothing could differ
    losses = ten_losses(ours, in_precision(ours, precision))
    assert (losses - theirs).abs().max() < precision.ten_losses


def reset_compiler() -> None:
    """Forget all compiled graphs: past eight shapes of a function, the compiler gives up."""
    torch._dynamo.reset()
    counters.clear()


def assert_was_compiled() -> None:
    """Assert that one graph was compiled, without a break, and used for everything since."""
    assert counters["stats"]["unique_graphs"] == 1, counters
    assert not counters["graph_break"], counters
