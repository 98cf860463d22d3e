"""Each function of training.c equals the textbook formula, which torch computes in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import rotate
from pocketlm.model import kernels
from pocketlm.model.block import NO_DROPOUT
from pocketlm.model.kernels import Dropout
from pocketlm.model.loss import IGNORE_INDEX
from pocketlm.model.rope import rope_tables

# Of the largest value: a sum of up to 300 float32 terms, or the one rounding to bfloat16.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
# no multiple of a register, a multiple, and rows of several parts of a sum
row_counts = pytest.mark.parametrize("N, size", [(1, 1), (5, 7), (70, 64), (130, 300)])


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ours.shape == exact.shape
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


# ---- the loss ----


@dtypes
@pytest.mark.parametrize("V, stride", [(1, 64), (11, 64), (64, 64), (4097, 4160)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_cross_entropy_and_its_gradient(
    dtype: torch.dtype, V: int, stride: int, scale: float
) -> None:
    logits, targets = draw(5, stride, dtype=dtype, scale=scale), torch.arange(5) * 7 % V
    targets[3] = IGNORE_INDEX
    exact = logits[:, :V].double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE_INDEX, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses = kernels.cross_entropy_(logits, V, targets)
    assert_near(losses, expected.detach(), 3e-6)
    assert_near(logits[:, :V], gradient, TOLERANCE[dtype])
    assert (logits[:, V:] == 0).all() and (logits[3] == 0).all()


@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_not_finite_makes_the_loss_nan(dtype: torch.dtype, value: float) -> None:
    """The run is then stopped; a finite loss would hide it."""
    logits = draw(2, 64, dtype=dtype)
    logits[1, 33] = value
    losses = kernels.cross_entropy_(logits, 64, torch.tensor([1, 1]))
    assert losses.isnan().tolist() == [False, True]


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    """Reading the logit of target 61 of 61 would read padding, and of 64 another row."""
    with pytest.raises(IndexError, match="target 61 is out of bounds for 61 logits"):
        kernels.cross_entropy_(draw(2, 64), 61, torch.tensor([3, 61]))


# ---- norm and activation ----


@dtypes
@row_counts
def test_the_norm_of_a_sum_and_its_gradients(dtype: torch.dtype, N: int, size: int) -> None:
    x, weight, added = draw(N, size), 1 + draw(size) / 2, draw(N, size, dtype=dtype)
    d_normed, d_sum = draw(N, size, dtype=dtype, scale=2), draw(N, size, scale=3)
    total, normed, inverse_rms = kernels.add_norm(x, added, weight, 1e-5, dtype)
    dx, d_weight = kernels.add_norm_backward(total, weight, inverse_rms, d_normed, d_sum)

    exact = (x.double() + added.double()).requires_grad_()
    gain = weight.double().requires_grad_()
    expected = F.rms_norm(exact, (size,), gain, 1e-5)
    outputs, upstream = (expected, exact * 1), (d_normed.double(), d_sum.double())
    expected_dx, expected_d_weight = torch.autograd.grad(outputs, (exact, gain), upstream)
    assert_near(total, exact.detach(), 3e-6)
    assert_near(normed, expected.detach(), TOLERANCE[dtype])
    assert_near(dx, expected_dx, 3e-6)
    assert_near(d_weight, expected_d_weight, 3e-6)
    alone, inverse = kernels.norm(total, weight, 1e-5, dtype)
    assert torch.equal(alone, normed) and torch.equal(inverse, inverse_rms)


@dtypes
@row_counts
def test_swiglu_and_its_gradient(dtype: torch.dtype, N: int, size: int) -> None:
    gate_up, d_hidden = draw(N, 2 * size, dtype=dtype, scale=3), draw(N, size, dtype=dtype)
    gate_up[1:, 0] = -200  # the exponential of 200 overflows float32
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    expected = F.silu(gate) * up
    (gradient,) = torch.autograd.grad(expected, exact, d_hidden.double())
    assert_near(kernels.swiglu(gate_up), expected.detach(), TOLERANCE[dtype])
    assert_near(kernels.swiglu_backward(gate_up, d_hidden), gradient, TOLERANCE[dtype])


# ---- attention ----


def starts_of(T: int, borders: list[int]) -> Tensor:
    """Return the start of each token's document for two rows; the second is one document."""
    starts = torch.zeros(2, T, dtype=torch.long)
    for border in borders:
        starts[0, border:] = border
    return starts


def exact_attention(
    qkv: Tensor, H: int, K: int, starts: Tensor, rope_base: float, kept: Tensor | float = 1.0
) -> Tensor:
    """Compute attention from the full matrix of scores; `kept` (B, H, T, T): dropout's factors."""
    B, T = starts.shape
    D = qkv.size(1) // (H + 2 * K)
    q, k, v = qkv.view(B, T, -1, D).transpose(1, 2).split([H, K, K], dim=1)
    positions = torch.arange(T) - starts
    cos, sin = (table.double()[positions][:, None] for table in rope_tables(D, T, rope_base))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    index = torch.arange(T)
    visible = (index <= index[:, None]) & (index >= starts[:, :, None])
    scores = (q @ k.mT / D**0.5).masked_fill(~visible[:, None], -torch.inf)
    return (scores.softmax(-1) * kept @ v).transpose(1, 2).reshape(B * T, H * D)


@dtypes
@pytest.mark.parametrize("H, K, D", [(4, 4, 8), (4, 2, 10), (4, 1, 32), (1, 1, 50)])
@pytest.mark.parametrize(
    "T, borders", [(1, []), (13, [1, 5, 12]), (32, []), (33, [32]), (100, [3, 31, 64, 70])]
)
def test_attention_within_documents_and_its_gradient(
    dtype: torch.dtype, H: int, K: int, D: int, T: int, borders: list[int]
) -> None:
    starts = starts_of(T, borders)
    qkv = draw(2 * T, (H + 2 * K) * D, dtype=dtype, scale=2)
    dy = draw(2 * T, H * D, dtype=dtype)
    rope = rope_tables(D, T + 3, 100.0)
    inputs = kernels.AttentionInputs(qkv, *rope, starts)
    y, log_sums = kernels.attention(inputs, H, 1e-5, NO_DROPOUT)
    d_qkv, *others = kernels.attention_backward(inputs, 1e-5, NO_DROPOUT, log_sums, dy)
    assert others == [None] * 4

    exact = qkv.double().requires_grad_()
    expected = exact_attention(exact, H, K, starts, 100.0)
    (gradient,) = torch.autograd.grad(expected, exact, dy.double())
    assert_near(y, expected.detach(), TOLERANCE[dtype])
    assert_near(d_qkv, gradient, TOLERANCE[dtype])


def test_large_scores_stay_finite_and_choose_the_largest() -> None:
    """Scores of thousands: their exponentials overflow every float."""
    qkv = draw(26, 32, scale=100)
    inputs = kernels.AttentionInputs(qkv, *rope_tables(8, 13, 100.0), starts_of(13, [5]))
    y, _ = kernels.attention(inputs, 2, 1e-5, NO_DROPOUT)
    exact = exact_attention(qkv.double(), 2, 1, starts_of(13, [5]), 100.0)
    # a score of 1e4 has an error of 1e-3 in float32
    assert_near(y, exact, 0.01)


# ---- dropout ----


@dtypes
def test_dropout_keeps_the_expected_share_and_the_sum(dtype: torch.dtype) -> None:
    """Other rows, columns and seeds drop other numbers, and the same ones the same every time."""
    ones = torch.ones(500, 400, dtype=dtype)
    masks = [kernels.drop_(ones.clone(), Dropout(0.3, seed)) for seed in (7, 7, 8)]
    kept = masks[0] != 0
    assert torch.equal(masks[0][kept], torch.full_like(masks[0][kept], 1 / 0.7))
    assert torch.equal(masks[0], masks[1])
    # 200,000 draws: a standard deviation of 0.001; of pairs that agree, of 0.0011
    assert abs(kept.float().mean() - 0.7) < 0.005
    for other in (masks[2] != 0, kept.roll(1, 0), kept.roll(1, 1)):
        assert abs((kept == other).float().mean() - (0.7**2 + 0.3**2)) < 0.006
    # 400 draws a row and 500 a column: 5 standard deviations
    assert (kept.float().mean(1) - 0.7).abs().max() < 5 * (0.21 / 400) ** 0.5
    assert (kept.float().mean(0) - 0.7).abs().max() < 5 * (0.21 / 500) ** 0.5


def factors_of_attention(H: int, K: int, T: int, dropout: Dropout) -> Tensor:
    """Return what attention multiplies its weights (2, H, T, T) with.

    Keys of zero have equal weights, and values of a unit matrix return them one by one.
    """
    qkv = torch.zeros(2, T, H + 2 * K, T)
    qkv[:, :, H + K :] = torch.eye(T)[:, None]
    inputs = kernels.AttentionInputs(
        qkv.view(2 * T, -1), *rope_tables(T, T, 100.0), starts_of(T, [])
    )
    y, _ = kernels.attention(inputs, H, 1e-5, dropout)
    return y.view(2, T, H, T).transpose(1, 2) * torch.arange(1, T + 1)[:, None]


@dtypes
def test_dropout_of_attention_weights_and_its_gradient(dtype: torch.dtype) -> None:
    H, K, T, dropout = 4, 2, 40, Dropout(0.25, 3)
    kept = factors_of_attention(H, K, T, dropout)
    past = kept[..., torch.ones(T, T).tril().bool()]
    assert abs((past != 0).float().mean() - 0.75) < 0.03  # 6,560 draws: 5 standard deviations
    torch.testing.assert_close(past[past != 0], torch.full_like(past[past != 0], 1 / 0.75))
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[:, 0], kept[:, 1])

    qkv, dy = draw(2 * T, (H + 2 * K) * 8, dtype=dtype, scale=2), draw(2 * T, H * 8, dtype=dtype)
    inputs = kernels.AttentionInputs(qkv, *rope_tables(8, T, 100.0), starts_of(T, [17]))
    y, log_sums = kernels.attention(inputs, H, 1e-5, dropout)
    d_qkv, *_ = kernels.attention_backward(inputs, 1e-5, dropout, log_sums, dy)
    exact = qkv.double().requires_grad_()
    expected = exact_attention(exact, H, K, inputs.starts, 100.0, kept.double())
    (gradient,) = torch.autograd.grad(expected, exact, dy.double())
    assert_near(y, expected.detach(), TOLERANCE[dtype])
    assert_near(d_qkv, gradient, TOLERANCE[dtype])


# ---- threads ----


def everything(dtype: torch.dtype) -> list[Tensor]:
    """Return the results of every function."""
    N, size = 2 * 70, 48
    x, weight = draw(N, size), draw(size)
    logits, rope, starts = draw(N, size, dtype=dtype), rope_tables(8, 70, 1e4), starts_of(70, [9])
    losses = kernels.cross_entropy_(logits, size, torch.arange(N) % size)
    total, normed, inverse_rms = kernels.add_norm(
        x, draw(N, size, dtype=dtype), weight, 1e-5, dtype
    )
    d_norm = kernels.add_norm_backward(total, weight, inverse_rms, normed, x)
    hidden = kernels.swiglu(draw(N, 2 * size, dtype=dtype))
    d_gate_up = kernels.swiglu_backward(draw(N, 2 * size, dtype=dtype), hidden)
    qkv = draw(N, 8 * 8, dtype=dtype)
    options = 1 + draw(8), 1 + draw(8), draw(2), draw(N, 2 * 8, dtype=dtype)
    inputs = kernels.AttentionInputs(qkv, *rope, starts, *options)
    dropout = Dropout(0.3, 5)
    y, log_sums = kernels.attention(inputs, 4, 1e-5, dropout)
    gradients = kernels.attention_backward(inputs, 1e-5, dropout, log_sums, y)
    kernels.drop_(hidden, dropout)
    return [logits, losses, total, normed, *d_norm, hidden, d_gate_up, y, log_sums, *gradients]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@dtypes
def test_the_number_of_threads_changes_no_bit(
    dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    set_threads(1)
    expected = everything(dtype)
    for threads in (2, 3, 5):
        set_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(everything(dtype), expected, strict=True))
