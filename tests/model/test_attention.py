"""Tiled attention against torch's plain kernel: values, gradients, masks; and its dispatch."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pocketlm.model import attention
from pocketlm.model.attention import (
    TiledAttention,
    attend,
    document_mask,
    positions_in_document,
)

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

B, D = 2, 8

# In float64, of the largest value: sums of up to 300 terms, each rounded by 1e-16, of values that
# partly cancel.
ROUNDING = 1e-12

heads = pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1), (1, 1)])
masks = pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])

# Rows, and rows of a tile: one row, fewer than a tile, a tile, one more, tiles and a rest, many
# tiles; and all of it with the default tile size (None).
SMALL_TILES = [(1, 4), (3, 4), (4, 4), (5, 4), (13, 4), (24, 4), (9, 1)]
lengths = pytest.mark.parametrize(
    "T, tile", [*SMALL_TILES, (100, None), (128, None), (129, None), (300, None)]
)


@pytest.fixture
def set_tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Return a function that sets the size of a tile; None keeps the default."""

    def set_size(tile: int | None) -> None:
        if tile is not None:
            monkeypatch.setattr(attention, "TILE", tile)

    return set_size


def example(
    H: int, K: int, T: int, dtype: torch.dtype = torch.float64, strided: bool = True
) -> list[Tensor]:
    """Return q, k, v and a gradient of the output, (B, heads, T, D).

    strided: as the model makes them, transposed from (B, T, heads, D).
    """
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for n in (H, K, K, H):
        x = torch.randn(B, T, n, D, generator=generator, dtype=torch.float64)
        tensors.append(x.to(dtype).transpose(1, 2))
    return tensors if strided else [x.contiguous() for x in tensors]


def documents(T: int, *borders: int) -> Tensor:
    """Return a document mask (B, 1, T, T).

    In the first row of the batch, documents begin at `borders`; the second row is one document.
    """
    ids = torch.zeros(B, T, dtype=torch.long)
    ids[0] = sum((torch.arange(T) >= border).long() for border in borders)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return same & torch.ones(T, T, dtype=torch.bool).tril()


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention by torch's math kernel, with key/value heads repeated for their group."""
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return TiledAttention.apply(q, k, v, mask)


def value_and_gradients(
    function: AttentionFunction, inputs: list[Tensor], mask: Tensor | None
) -> list[Tensor]:
    *qkv, dy = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    y = function(*leaves, mask)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = ROUNDING) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- values and gradients ----


@heads
@lengths
@masks
def test_value_and_every_gradient_are_those_of_torchs_plain_attention(
    set_tile: Callable, H: int, K: int, T: int, tile: int | None, masked: bool
) -> None:
    """Documents begin within a tile and, if there is one, at its border."""
    set_tile(tile)
    mask = documents(T, T // 3, T // 2, min(4, T - 1)) if masked else None
    inputs = example(H, K, T)
    assert_equal(value_and_gradients(tiled, inputs, mask), value_and_gradients(plain, inputs, mask))


@heads
def test_the_strides_of_the_inputs_and_of_the_gradient_change_nothing(
    set_tile: Callable, H: int, K: int
) -> None:
    """Other strides use other kernels: the same sums in another order."""
    set_tile(4)
    contiguous = value_and_gradients(tiled, example(H, K, 13, strided=False), None)
    assert_equal(value_and_gradients(tiled, example(H, K, 13, strided=True), None), contiguous)
    gradient_of_a_sum = torch.ones((), dtype=torch.float64).expand(B, H, 13, D)
    expanded = [*example(H, K, 13)[:3], gradient_of_a_sum]
    ours, theirs = (value_and_gradients(function, expanded, None) for function in (tiled, plain))
    assert_equal(ours, theirs)


@masks
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradcheck(set_tile: Callable, masked: bool, needs: tuple[bool, bool, bool]) -> None:
    """Against finite differences, for each choice of the inputs that need a gradient."""
    set_tile(2)
    mask = documents(5, 2) if masked else None
    inputs = [x[..., :3].clone() for x in example(2, 1, 5)[:3]]
    for x, need in zip(inputs, needs, strict=True):
        x.requires_grad_(need)
    assert torch.autograd.gradcheck(lambda q, k, v: TiledAttention.apply(q, k, v, mask), inputs)


@heads
@pytest.mark.parametrize("t", [1, 4, 6, 12])
def test_no_gradient_leads_from_a_row_to_its_future(
    set_tile: Callable, H: int, K: int, t: int
) -> None:
    """Exactly none: 13 rows in tiles of 4, with a gradient from the rows before t."""
    set_tile(4)
    *qkv, dy = example(H, K, 13)
    dy[:, :, t:] = 0
    _, *gradients = value_and_gradients(tiled, [*qkv, dy], None)
    for gradient in gradients:
        assert (gradient[:, :, t:] == 0).all()
        # the first row sees itself alone: its dq and dk are 0
        assert (gradient[:, :, 1:t] != 0).any(-1).all()
    changed = [torch.cat([x[:, :, :t], 5 - 3 * x[:, :, t:]], dim=2) for x in qkv]
    assert torch.equal(tiled(*changed, None)[:, :, :t], tiled(*qkv, None)[:, :, :t])


def test_no_gradient_leads_from_a_document_to_another(set_tile: Callable) -> None:
    """The gradient comes from the second document of row 0 only."""
    set_tile(4)
    *qkv, dy = example(4, 2, 13)
    dy[0, :, :3], dy[0, :, 9:], dy[1] = 0, 0, 0
    _, *gradients = value_and_gradients(tiled, [*qkv, dy], documents(13, 3, 9))
    for gradient in gradients:
        assert (gradient[0, :, :3] == 0).all()
        assert (gradient[0, :, 9:] == 0).all()
        assert (gradient[1] == 0).all()
        assert (gradient[0, :, 4:9] != 0).any(-1).all()


@torch.no_grad()
def test_large_scores_stay_finite_and_choose_the_largest(set_tile: Callable) -> None:
    """Scores of +-5e4 / sqrt(8): their exponentials overflow every float."""
    set_tile(4)
    q, k, v, _ = example(4, 2, 13)
    assert_equal([tiled(100 * q, 500 * k, v, None)], [plain(100 * q, 500 * k, v, None)])


# ---- in bfloat16 ----


def relative_errors(results: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(results, exact, strict=True)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention like the eager attention of transformers.

    The matmuls are in the dtype of the inputs, the softmax is in float32, and the gradients are
    autograd's.
    """
    groups, T = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    visible = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    score = (q @ k.mT * D**-0.5).masked_fill(~visible, -torch.inf)
    return score.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@heads
@masks
@pytest.mark.parametrize("T", [129, 1000])
def test_in_bfloat16_it_is_within_its_rounding_and_no_worse_than_eager_attention(
    H: int, K: int, masked: bool, T: int
) -> None:
    """For values and gradients, against the exact result for the same bfloat16 inputs."""
    inputs = example(H, K, T, torch.bfloat16)
    mask = documents(T, T // 3, T // 2) if masked else None
    exact = value_and_gradients(plain, [x.double() for x in inputs], mask)
    results = value_and_gradients(tiled, inputs, mask)
    assert {x.dtype for x in results} == {torch.bfloat16}
    ours = relative_errors(results, exact)
    theirs = relative_errors(value_and_gradients(eager, inputs, mask), exact)
    # A rounding is 2^-9 = 0.002 at most. The value has four: of the scaled q, of scores, of
    # probabilities and of the result. The gradients of q and k have two more: of the gradients of
    # probabilities and of scores.
    for error, roundings in zip(ours, (4, 6, 6, 4), strict=True):
        assert error < roundings * 2**-9, (ours, theirs)
    # The errors of one draw vary by chance: up to 1.08 was seen.
    for error, their_error in zip(ours, theirs, strict=True):
        assert error < 1.1 * their_error, (ours, theirs)


def test_autocast_does_not_reach_into_it() -> None:
    """A backward pass runs outside of autocast: products of float32 tensors stay in float32."""
    inputs = example(4, 2, 300, torch.float32)
    expected = value_and_gradients(tiled, inputs, None)
    with torch.autocast("cpu", torch.bfloat16):
        results = value_and_gradients(tiled, inputs, None)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# ---- dispatch: `attention_kernels` records the kernel of each attention ----

DISPATCH = [
    (torch.bfloat16, True, 0.0, 13, "tiled"),
    (torch.bfloat16, True, 0.0, 20, "tiled"),
    (torch.bfloat16, True, 0.0, 21, "torch"),  # longer than LONGEST, which is 20 here
    (torch.bfloat16, True, 0.1, 13, "torch"),
    (torch.bfloat16, False, 0.0, 13, "torch"),
    (torch.float32, True, 0.0, 13, "torch"),
    (torch.float64, True, 0.0, 13, "torch"),
    (torch.float16, True, 0.0, 13, "torch"),
]


@pytest.mark.parametrize("case", DISPATCH, ids=str)
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2)])
@masks
def test_it_is_used_for_training_in_bfloat16_alone(
    monkeypatch: pytest.MonkeyPatch,
    attention_kernels: list[str],
    case: tuple[torch.dtype, bool, float, int, str],
    H: int,
    K: int,
    masked: bool,
) -> None:
    """With either kernel, the result is attention's."""
    dtype, grad, dropout, T, kernel = case
    monkeypatch.setattr(attention, "LONGEST", 20)
    q, k, v, _ = example(H, K, T, dtype)
    mask = documents(T, 5) if masked else None
    with torch.set_grad_enabled(grad):
        y = attend(q, k, v, mask, dropout)
    assert attention_kernels == [kernel]
    assert y.dtype == dtype and y.shape == q.shape
    if not dropout:
        expected = plain(q.double(), k.double(), v.double(), mask)
        largest_rounding = torch.finfo(dtype).eps / 2
        assert (y - expected).norm() < 8 * largest_rounding * expected.norm()


def test_off_the_cpu_torchs_kernel_is_used(attention_kernels: list[str]) -> None:
    q, k, v, _ = (x.to("meta") for x in example(4, 2, 13, torch.bfloat16))
    assert attend(q, k, v, None, 0.0).shape == q.shape
    assert attention_kernels == ["torch"]


@pytest.mark.parametrize("T, S", [(1, 13), (5, 13)])
def test_with_keys_of_earlier_tokens_torchs_kernel_is_used(
    attention_kernels: list[str], T: int, S: int
) -> None:
    """A single token sees all keys; a chunk after other tokens has a mask. Gradients are on."""
    q, k, v, _ = example(4, 2, S, torch.bfloat16)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if T > 1 else None
    y = attend(q[:, :, -T:], k, v, mask, 0.0)
    assert attention_kernels == ["torch"]
    expected = plain(q.double(), k.double(), v.double(), None)[:, :, -T:]
    assert (y - expected).norm() < 4 * 2**-8 * expected.norm()


# ---- documents ----


def test_a_token_sees_its_own_document_up_to_itself() -> None:
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert document_mask(torch.tensor([[7, 7, 8, 8]])).int().tolist() == [[expected]]


@pytest.mark.parametrize(
    "doc_ids, positions",
    [
        ([3, 3, 3, 3], [0, 1, 2, 3]),
        ([5, 6, 7, 7], [0, 0, 0, 1]),
        ([1, 1, 2, 1], [0, 1, 0, 0]),  # an id that is used again is a new document
    ],
)
def test_positions_restart_with_each_document(doc_ids: list[int], positions: list[int]) -> None:
    ids = torch.tensor([doc_ids, [0, 1, 1, 1]])
    assert positions_in_document(ids).tolist() == [positions, [0, 0, 1, 2]]
