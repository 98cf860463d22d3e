"""The chunked loss equals the plain loss (value, gradients, edge cases), and torch's."""

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
from tests.support.gpt2 import gpt2_pair
from tests.support.losses import (
    assert_equal,
    assert_loss_equals_gpt2,
    assert_loss_equals_llama,
    assert_same_losses,
    compute,
    loss_function,
    make_batches,
    ten_clipped_losses,
)
from tests.support.models import random_model
from tests.support.parity import FLOAT64

B, T, C, V = 2, 50, 8, 11  # 100 tokens of a vocabulary of 11: targets recur within a chunk

# 3 and 70 leave a shorter last chunk
chunks = pytest.mark.parametrize("chunk", [1, 3, 70, B * T, 1000])
tying = pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])


def example(
    dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a head, and targets of which some are ignored.

    The logits have a standard deviation of about `scale`.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, C, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64) / C**0.5
    targets = torch.randint(V, (B, T), generator=generator)
    targets[0, 1] = targets[1, 4] = IGNORE_INDEX
    targets[0, 3:6] = IGNORE_INDEX  # all of the second chunk of 3
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def value_and_gradients(
    loss: Tensor, hidden: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of a ninth of it: a factor from above must be passed on."""
    return loss.detach(), *torch.autograd.grad(loss / 9, (hidden, weight))


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss over all logits at once, by torch."""
    logits = (hidden @ weight.T).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def assert_equals_torch(chunk: int, dtype: torch.dtype, scale: float, tolerance: float) -> None:
    hidden, weight, targets = example(dtype, scale)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    ours = value_and_gradients(loss, hidden, weight)
    theirs = value_and_gradients(torch_loss(hidden, weight, targets), hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype == dtype
        assert torch.isfinite(a).all()
        assert (a - b).abs().max() < tolerance * b.abs().max()


# ---- the function ----


# 100 and 5,000 roundings
@chunks
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_chunked_loss_and_gradients_equal_those_over_all_logits(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_equals_torch(chunk, dtype, 1.0, tolerance)


# a logit of 300 has an error of 300 * 6e-8 in float32
@chunks
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_logits_in_the_hundreds_stay_finite_and_equal(
    chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    assert_equals_torch(chunk, dtype, 100.0, tolerance)


@chunks
def test_under_autocast_the_chunked_loss_is_within_bfloat16_of_float32(chunk: int) -> None:
    hidden, weight, targets = example()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    ours = value_and_gradients(loss, hidden, weight)
    theirs = value_and_gradients(torch_loss(hidden, weight, targets), hidden, weight)
    assert not torch.equal(ours[1], theirs[1])  # else autocast did nothing
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        # a rounding to bfloat16 is 2^-9 = 0.002: of inputs, of the logit and of its exponential
        assert (a - b).abs().max() < 0.01 * b.abs().max()


@chunks
def test_under_float16_autocast_the_chunked_loss_is_that_of_float32(chunk: int) -> None:
    """A share of 1/50,000 of a token's gradient is below float16's range.

    So the matmuls are in float32 whatever autocast asks for.
    """
    hidden, weight, targets = example()
    with torch.autocast("cpu", torch.float16):
        loss = chunked_cross_entropy(hidden, weight, targets, chunk)
    ours = value_and_gradients(loss, hidden, weight)
    theirs = value_and_gradients(torch_loss(hidden, weight, targets), hidden, weight)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        # 100 float32 roundings; one of float16 would show as 5e-4
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@chunks
def test_gradients_have_the_dtype_of_their_inputs_whatever_that_of_the_matmuls(chunk: int) -> None:
    """Autograd would silently cast a bfloat16 gradient to float32 after its bits are lost."""
    hidden, weight, targets = example()
    arguments = hidden.detach().flatten(0, 1), weight.detach(), targets.flatten(), chunk
    assert [x.dtype for x in loss_and_gradients(*arguments, torch.bfloat16)] == [torch.float32] * 3


def test_a_thousand_small_chunks_add_up_under_autocast() -> None:
    """Every token is the same.

    A sum in bfloat16 stops growing once a part is below half of its last bit: after 512 at most.
    """
    hidden, weight, _ = example()
    same, target = hidden[0, 0].expand(1, 1000, C), torch.full((1, 1000), 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(same, weight, target, 1)
    ours = torch.autograd.grad(loss, weight)[0]
    theirs = torch.autograd.grad(torch_loss(same, weight, target), weight)[0]
    assert (ours - theirs).abs().max() < 0.01 * theirs.abs().max()  # as above


def test_a_second_backward_pass_is_refused_and_changes_no_gradient() -> None:
    """The first pass scales the kept gradients in place; a second would apply both scales."""
    hidden, weight, targets = example()
    loss = chunked_cross_entropy(hidden, weight, targets, 70)
    (loss / 9).backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss / 9).backward()
    assert torch.equal(hidden.grad, once[0]) and torch.equal(weight.grad, once[1])


@chunks
def test_ignored_tokens_have_no_gradient_and_nothing_else_depends_on_them(chunk: int) -> None:
    hidden, weight, targets = example()
    chunked = chunked_cross_entropy(hidden, weight, targets, chunk)
    loss, d_hidden, d_weight = value_and_gradients(chunked, hidden, weight)
    ignored = targets == IGNORE_INDEX
    assert (d_hidden[ignored] == 0).all()
    assert (d_hidden[~ignored] != 0).all()
    other = torch.where(ignored[..., None], -3 * hidden, hidden)
    chunked = chunked_cross_entropy(other, weight, targets, chunk)
    other_loss, _, other_d_weight = value_and_gradients(chunked, other, weight)
    assert torch.equal(other_loss, loss)
    assert torch.equal(other_d_weight, d_weight)


@chunks
def test_with_every_token_ignored_loss_and_gradients_are_zero(chunk: int) -> None:
    hidden, weight, targets = example()
    nothing = torch.full_like(targets, IGNORE_INDEX)
    chunked = chunked_cross_entropy(hidden, weight, nothing, chunk)
    for loss in (chunked, cross_entropy(hidden @ weight.T, nothing)):
        assert all((x == 0).all() for x in value_and_gradients(loss, hidden, weight))


def test_cross_entropy_of_a_worked_example() -> None:
    """The first two tokens have the probabilities 1/4, 1/4, 1/2; the third is ignored."""
    logits = torch.tensor([[[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [7.0, 1.0, 1.0]]]).log()
    loss = cross_entropy(logits, torch.tensor([[2, 0, IGNORE_INDEX]]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-6)  # float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_of_half_precision_logits_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(300, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(300) % V
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    exact = -logits.double().log_softmax(-1)[torch.arange(300), targets].sum()
    assert abs(loss - exact) < 1e-6 * exact  # a sum in half precision has an error of 1e-3


# ---- of a whole model: the head is padded to a multiple of 64 rows ----


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@tying
@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
@pytest.mark.parametrize("vocab_size", [61, 64, 65])
@pytest.mark.usefixtures("float64")
def test_the_loss_in_chunks_is_the_plain_one_for_the_whole_model(
    chunk: int, vocab_size: int, packed: bool, tie_embeddings: bool
) -> None:
    model = random_model(vocab_size=vocab_size, tie_embeddings=tie_embeddings)
    batches = make_batches(2, packed, vocab_size)
    chunked = compute(model, loss_function(model, chunk), batches)
    assert_equal(chunked, compute(model, loss_function(model, 0), batches))


@tying
@pytest.mark.parametrize("vocab_size", [61, 64])
@pytest.mark.usefixtures("float64")
def test_ten_steps_with_the_loss_in_chunks_are_those_with_the_plain_one(
    vocab_size: int, tie_embeddings: bool
) -> None:
    losses = []
    for chunk in (7, 0):
        model = random_model(vocab_size=vocab_size, tie_embeddings=tie_embeddings)
        batches = make_batches(2, vocab_size=vocab_size)
        losses.append(ten_clipped_losses(model, loss_function(model, chunk), batches))
    assert_same_losses(*losses, 1e-9)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@tying
@pytest.mark.usefixtures("float64")
def test_in_float64_chunks_and_rows_give_the_loss_and_gradients_of_transformers_llama(
    chunk: int, n_kv_heads: int, tie_embeddings: bool
) -> None:
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    assert_loss_equals_llama(model, loss_function(model, chunk), FLOAT64)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.usefixtures("float64")
def test_in_float64_chunks_and_rows_give_the_loss_and_gradients_of_transformers_gpt2(
    chunk: int,
) -> None:
    ours, theirs = gpt2_pair(2, 4)
    assert_loss_equals_gpt2(ours, theirs, loss_function(ours, chunk), FLOAT64)
