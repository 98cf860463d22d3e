"""Tiled attention against torch's plain kernel: values, gradients, what a row may see; and where it is taken."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import KVCache, ModelConfig, Transformer
from pocketlm.model import attention
from pocketlm.model.attention import TiledAttention, attend

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]

B, D = 2, 8
ROUNDING = 1e-12  # of the largest value, in float64: sums of up to 300 terms, each rounded by 1e-16, of values that partly cancel

heads = pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1), (1, 1)])
# (rows, rows of a tile): one row, fewer than a tile, a tile, one more, tiles and a rest, many tiles; in tiles of the size in use, too
lengths = pytest.mark.parametrize(
    "T, tile",
    [
        (1, 4),
        (3, 4),
        (4, 4),
        (5, 4),
        (13, 4),
        (24, 4),
        (9, 1),
        (100, None),
        (128, None),
        (129, None),
        (300, None),
    ],
)
masks = pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])


@pytest.fixture
def tiles_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Set the size of a tile; None: that in use."""
    return lambda tile: tile and monkeypatch.setattr(attention, "TILE", tile)


def example(
    H: int, K: int, T: int, dtype: torch.dtype = torch.float64, strided: bool = True
) -> list[Tensor]:
    """q, k, v and the gradient that comes from above; strided as the model makes them: (B, T, heads, D) transposed."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, T, n, D) for n in (H, K, K, H)]
    made = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for shape in shapes
    ]
    return made if strided else [x.contiguous() for x in made]


def documents(T: int, *borders: int) -> Tensor:
    """A mask (B, 1, T, T): causal, and within documents; the first row of the batch has them begin at `borders`, the second has one."""
    ids = torch.zeros(B, T, dtype=torch.long)
    ids[0] = sum((torch.arange(T) >= border).long() for border in borders)
    return (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(
        T, T, dtype=torch.bool
    ).tril()


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Torch's attention by its definition; each key/value head is repeated for its group."""
    groups = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)


def tiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return TiledAttention.apply(q, k, v, mask)


def value_and_gradients(attend: Attend, inputs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    *qkv, dy = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    y = attend(*leaves, mask)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = ROUNDING) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---- what it computes ----


@heads
@lengths
@masks
def test_value_and_every_gradient_are_those_of_torchs_plain_attention(
    tiles_of: Callable, H: int, K: int, T: int, tile: int | None, masked: bool
) -> None:
    """Documents begin within a tile and, where there is one, at its border."""
    tiles_of(tile)
    mask = documents(T, T // 3, T // 2, min(4, T - 1)) if masked else None
    inputs = example(H, K, T)
    assert_equal(value_and_gradients(tiled, inputs, mask), value_and_gradients(plain, inputs, mask))


@heads
def test_the_strides_of_the_inputs_and_of_the_gradient_change_nothing(
    tiles_of: Callable, H: int, K: int
) -> None:
    tiles_of(4)
    contiguous = value_and_gradients(tiled, example(H, K, 13, strided=False), None)
    # other strides, other kernels: the same sums in another order
    assert_equal(value_and_gradients(tiled, example(H, K, 13, strided=True), None), contiguous)
    expanded = [
        *example(H, K, 13)[:3],
        torch.ones((), dtype=torch.float64).expand(B, H, 13, D),
    ]  # as .sum() gives it
    assert_equal(
        value_and_gradients(tiled, expanded, None), value_and_gradients(plain, expanded, None)
    )


@masks
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_gradcheck(tiles_of: Callable, masked: bool, needs: tuple[bool, bool, bool]) -> None:
    """Against finite differences, for each choice of the inputs that take a gradient."""
    tiles_of(2)
    q, k, v = (
        x[..., :3].clone().requires_grad_(need)
        for x, need in zip(example(2, 1, 5), needs, strict=False)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: TiledAttention.apply(q, k, v, documents(5, 2) if masked else None),
        (q, k, v),
    )


@heads
@pytest.mark.parametrize("t", [1, 4, 6, 12])
def test_no_gradient_leads_from_a_row_to_its_future(
    tiles_of: Callable, H: int, K: int, t: int
) -> None:
    """Exactly none: 13 rows in tiles of 4, of which those before t are looked at."""
    tiles_of(4)
    *qkv, dy = example(H, K, 13)
    dy[:, :, t:] = 0
    _, *gradients = value_and_gradients(tiled, [*qkv, dy], None)
    for gradient in gradients:
        assert (gradient[:, :, t:] == 0).all()
        assert (
            (gradient[:, :, 1:t] != 0).any(-1).all()
        )  # the first row sees itself alone: dq and dk are 0 there
    changed = [torch.cat([x[:, :, :t], 5 - 3 * x[:, :, t:]], dim=2) for x in qkv]
    assert torch.equal(tiled(*changed, None)[:, :, :t], tiled(*qkv, None)[:, :, :t])


def test_no_gradient_leads_from_a_document_to_another(tiles_of: Callable) -> None:
    tiles_of(4)
    *qkv, dy = example(4, 2, 13)
    dy[0, :, :3], dy[0, :, 9:], dy[1] = 0, 0, 0  # of row 0, the documents before and behind
    _, *gradients = value_and_gradients(tiled, [*qkv, dy], documents(13, 3, 9))
    for gradient in gradients:
        assert (
            (gradient[0, :, :3] == 0).all()
            and (gradient[0, :, 9:] == 0).all()
            and (gradient[1] == 0).all()
        )
        assert (gradient[0, :, 4:9] != 0).any(-1).all()


@torch.no_grad()
def test_large_scores_stay_finite_and_choose_the_largest(tiles_of: Callable) -> None:
    """Scores of +-5e4 / sqrt(8): their exponentials are beyond every float."""
    tiles_of(4)
    q, k, v, _ = example(4, 2, 13)
    assert_equal([tiled(100 * q, 500 * k, v, None)], [plain(100 * q, 500 * k, v, None)])


# ---- in bfloat16 ----


def relative_errors(of: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(of, exact, strict=True)]


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers' eager attention has it: matmuls in the inputs' dtype, a softmax in float32, gradients by autograd."""
    groups, T = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    seen = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    score = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf)
    return score.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


@heads
@masks
@pytest.mark.parametrize("T", [129, 1000])
def test_in_bfloat16_it_is_within_its_rounding_and_no_worse_than_attention_written_out(
    H: int, K: int, masked: bool, T: int
) -> None:
    """On the way back too, and beside the exact result for the very same inputs, which are bfloat16 numbers."""
    inputs, mask = (
        example(H, K, T, torch.bfloat16),
        documents(T, T // 3, T // 2) if masked else None,
    )
    exact = value_and_gradients(plain, [x.double() for x in inputs], mask)
    found = value_and_gradients(tiled, inputs, mask)
    assert {x.dtype for x in found} == {torch.bfloat16}
    ours, theirs = (
        relative_errors(found, exact),
        relative_errors(value_and_gradients(written_out, inputs, mask), exact),
    )
    # A rounding is 2^-9 = 0.002 at most. On the way to the value there are four, of the scaled q, of scores, of probabilities and of
    # the result; on the way back to q and k two more, of the probabilities' gradients and the scores'
    for error, roundings in zip(ours, (4, 6, 6, 4), strict=True):
        assert error < roundings * 2**-9, (ours, theirs)
    for error, their_error in zip(
        ours, theirs, strict=True
    ):  # the errors of one draw have chance in them: up to 1.08 was seen
        assert error < 1.1 * their_error, (ours, theirs)


def test_autocast_does_not_reach_into_it() -> None:
    """Under autocast, which a backward pass outside of it does not know, the products of float32 tensors stay in float32."""
    inputs = example(4, 2, 300, torch.float32)
    expected = value_and_gradients(tiled, inputs, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(
            torch.equal(a, b)
            for a, b in zip(value_and_gradients(tiled, inputs, None), expected, strict=True)
        )


# ---- where it is taken ----


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which of the two computed each attention."""
    log, right = [], F.scaled_dot_product_attention

    class Spied:
        @staticmethod
        def apply(*inputs: Tensor | None) -> Tensor:
            log.append("tiled")
            return TiledAttention.apply(*inputs)

    def spied(*args: Tensor, **kwargs: bool) -> Tensor:
        log.append("torch")
        return right(*args, **kwargs)

    monkeypatch.setattr(attention, "TiledAttention", Spied)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    return log


@pytest.mark.parametrize(
    "dtype, grad, dropout, T, kernel",
    [
        (torch.bfloat16, True, 0.0, 13, "tiled"),
        (torch.bfloat16, True, 0.0, 20, "tiled"),
        (torch.bfloat16, True, 0.0, 21, "torch"),  # longer than LONGEST, which is 20 here
        (torch.bfloat16, True, 0.1, 13, "torch"),
        (torch.bfloat16, False, 0.0, 13, "torch"),
        (torch.float32, True, 0.0, 13, "torch"),
        (torch.float64, True, 0.0, 13, "torch"),
        (torch.float16, True, 0.0, 13, "torch"),
    ],
)
@pytest.mark.parametrize("H, K", [(4, 4), (4, 2)])
@masks
def test_it_is_taken_for_training_in_bfloat16_alone(
    monkeypatch,
    taken: list[str],
    dtype: torch.dtype,
    grad: bool,
    dropout: float,
    T: int,
    kernel: str,
    H: int,
    K: int,
    masked: bool,
) -> None:
    """And whichever it is, the result is attention's."""
    monkeypatch.setattr(attention, "LONGEST", 20)
    (q, k, v, _), mask = example(H, K, T, dtype), documents(T, 5) if masked else None
    with torch.set_grad_enabled(grad):
        y = attend(q, k, v, mask, dropout)
    assert taken == [kernel]
    assert y.dtype == dtype and y.shape == q.shape
    if not dropout:
        taken.clear()
        expected = plain(q.double(), k.double(), v.double(), mask)
        assert (y - expected).norm() < 4 * torch.finfo(
            dtype
        ).eps * expected.norm()  # eps is twice the largest rounding


def test_off_the_cpu_torchs_kernel_is_taken(taken: list[str]) -> None:
    q, k, v, _ = (x.to("meta") for x in example(4, 2, 13, torch.bfloat16))
    assert attend(q, k, v, None, 0.0).shape == q.shape
    assert taken == ["torch"]


@pytest.mark.parametrize("T, S", [(1, 13), (5, 13)])
def test_with_keys_of_tokens_before_torchs_kernel_is_taken(
    taken: list[str], T: int, S: int
) -> None:
    """One token sees all; a chunk after others has a mask of its own. Gradients are on wherever nobody has turned them off."""
    q, k, v, _ = example(4, 2, S, torch.bfloat16)
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if T > 1 else None
    y = attend(q[:, :, -T:], k, v, mask, 0.0)
    assert taken == ["torch"]
    expected = plain(q.double(), k.double(), v.double(), None)[:, :, -T:]
    assert (y - expected).norm() < 4 * 2**-8 * expected.norm()


def test_a_bfloat16_model_reads_through_its_cache_with_gradients_on() -> None:
    torch.manual_seed(0)
    model = (
        Transformer(
            ModelConfig(vocab_size=61, max_seq_len=13, n_layers=2, d_model=32, init_std=0.2)
        )
        .bfloat16()
        .eval()
    )
    ids = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, 2, 13, dtype=torch.bfloat16, device=torch.device("cpu"))
    pieces = torch.cat([model(piece, cache=cache) for piece in ids.split([7, 5, 1], dim=1)], dim=1)
    with torch.no_grad():
        expected = model(ids)
    # two ways through two layers, each within some 100 roundings of 0.0011 on average: 0.011, as in test_model.py
    assert (pieces.float() - expected.float()).norm() < 0.03 * expected.float().norm()


def test_training_under_bfloat16_autocast_takes_it_in_every_layer_and_validation_does_not(
    taken: list[str],
) -> None:
    model = Transformer(ModelConfig(vocab_size=61, max_seq_len=13, n_layers=2, d_model=32))
    ids = torch.arange(26).view(2, 13)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
        assert taken == ["tiled", "tiled"]
        with torch.no_grad():
            model(ids)
    assert taken == ["tiled", "tiled", "torch", "torch"]
    model(ids)  # in float32
    assert taken[4:] == ["torch", "torch"]
