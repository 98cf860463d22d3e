"""The chunked loss is the plain loss: value, gradients, edges; and the plain one is the textbook's."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pocketlm.model.loss import (
    IGNORE_INDEX,
    chunked_cross_entropy,
    cross_entropy,
    loss_and_gradients,
)

B, T, C, V = 2, 50, 8, 11  # 100 tokens of 11 entries: targets occur more than once in a chunk
chunks = pytest.mark.parametrize(
    "chunk", [1, 3, 70, B * T, 1000]
)  # 3 and 70 leave a shorter last chunk


def example(
    dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head whose logits have a spread of `scale`, and targets of which some count for nothing."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, C, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64) / C**0.5
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 1] = targets[1, 4] = IGNORE_INDEX
    targets[0, 3:6] = IGNORE_INDEX  # all of the second chunk of 3
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def value_and_gradients(
    nats: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients are those of a mean, so that what comes from above must be passed on."""
    return nats.detach(), *torch.autograd.grad(nats / 9, (hidden, weight))


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss over all logits at once, by torch."""
    return F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def assert_equals_whole(chunk: int, dtype: torch.dtype, scale: float, tolerance: float) -> None:
    hidden, weight, targets = example(dtype, scale)
    ours = value_and_gradients(
        chunked_cross_entropy(hidden, weight, targets, chunk), hidden, weight
    )
    theirs = value_and_gradients(whole(hidden, weight, targets), hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == dtype
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() < tolerance * b.abs().max()


@chunks
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)]
)  # 100 and 5,000 roundings
def test_chunked_loss_and_gradients_equal_those_over_all_logits(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_equals_whole(chunk, dtype, 1.0, tolerance)


@chunks
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)]
)  # a logit of 300 is off by 300 * 6e-8
def test_logits_in_the_hundreds_stay_finite_and_equal(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_equals_whole(chunk, dtype, 100.0, tolerance)


@chunks
def test_under_autocast_the_chunked_loss_is_within_bfloat16_of_float32(chunk: int) -> None:
    hidden, weight, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        nats = chunked_cross_entropy(hidden, weight, targets, chunk)
    ours = value_and_gradients(nats, hidden, weight)
    theirs = value_and_gradients(whole(hidden, weight, targets), hidden, weight)
    assert not torch.equal(ours[1], theirs[1])  # else autocast did nothing
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        # a rounding to bfloat16 is 2^-9 = 0.002: of the inputs, of the logit and of its exponential
        assert (a - b).abs().max() < 0.01 * b.abs().max()


@chunks
def test_under_float16_autocast_the_chunked_loss_is_that_of_float32(chunk: int) -> None:
    """A share of 1/50,000 of a token's gradient is below float16's range: whatever autocast asks for, the matmuls are float32."""
    hidden, weight, targets = example()
    with torch.autocast("cpu", torch.float16):
        nats = chunked_cross_entropy(hidden, weight, targets, chunk)
    ours = value_and_gradients(nats, hidden, weight)
    theirs = value_and_gradients(whole(hidden, weight, targets), hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (
            (a - b).abs().max() < 1e-5 * b.abs().max()
        )  # 100 float32 roundings; one of float16 would show as 5e-4


@chunks
def test_gradients_are_kept_in_the_dtype_of_what_they_are_of_whatever_the_matmuls_are_in(
    chunk: int,
) -> None:
    """Autograd would turn a bfloat16 gradient into a float32 one without a word, its bits being lost by then."""
    hidden, weight, targets = example()
    arguments = hidden.detach().flatten(0, 1), weight.detach(), targets.flatten(), chunk
    assert [x.dtype for x in loss_and_gradients(*arguments, torch.bfloat16)] == [torch.float32] * 3


def test_a_thousand_small_chunks_add_up_under_autocast() -> None:
    """The same token each time: a sum in bfloat16 stays where it is once a part is below half of its last bit, after 512 at most."""
    hidden, weight, _ = example()
    same, target = hidden[0, 0].expand(1, 1000, C), torch.full((1, 1000), 3)
    with torch.autocast("cpu", torch.bfloat16):
        nats = chunked_cross_entropy(same, weight, target, 1)
    ours = torch.autograd.grad(nats, weight)[0]
    theirs = torch.autograd.grad(whole(same, weight, target), weight)[0]
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()  # as above


def test_a_second_backward_pass_is_refused_and_changes_no_gradient() -> None:
    """The first one scales the kept gradients where they are: a second would give their product with both scales."""
    hidden, weight, targets = example()
    nats = chunked_cross_entropy(hidden, weight, targets, 70)
    (nats / 9).backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (nats / 9).backward()
    assert torch.equal(hidden.grad, once[0]) and torch.equal(weight.grad, once[1])


@chunks
def test_ignored_tokens_have_no_gradient_and_nothing_else_depends_on_them(chunk: int) -> None:
    hidden, weight, targets = example()
    nats, d_hidden, d_weight = value_and_gradients(
        chunked_cross_entropy(hidden, weight, targets, chunk), hidden, weight
    )
    ignored = targets == IGNORE_INDEX
    assert (d_hidden[ignored] == 0).all()
    assert (d_hidden[~ignored] != 0).all()
    other = torch.where(ignored[..., None], -3 * hidden, hidden)
    again = value_and_gradients(chunked_cross_entropy(other, weight, targets, chunk), other, weight)
    assert torch.equal(again[0], nats)
    assert torch.equal(again[2], d_weight)


@chunks
def test_with_every_token_ignored_loss_and_gradients_are_zero(chunk: int) -> None:
    hidden, weight, targets = example()
    nothing = torch.full_like(targets, IGNORE_INDEX)
    for nats in (
        chunked_cross_entropy(hidden, weight, nothing, chunk),
        cross_entropy(hidden @ weight.T, nothing),
    ):
        assert all((x == 0).all() for x in value_and_gradients(nats, hidden, weight))


def test_cross_entropy_of_a_worked_example() -> None:
    logits = torch.tensor(
        [[[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [7.0, 1.0, 1.0]]]
    ).log()  # 1/4, 1/4, 1/2 of the first two
    nats = cross_entropy(logits, torch.tensor([[2, 0, IGNORE_INDEX]]))
    assert nats.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-6)  # float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_precision_logits_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(300, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(300) % V
    nats = cross_entropy(logits, targets)
    assert nats.dtype == torch.float32
    exact = -logits.double().log_softmax(-1)[torch.arange(300), targets].sum()
    assert abs(nats - exact) < 1e-6 * exact  # a sum in half precision would be off by 1e-3
