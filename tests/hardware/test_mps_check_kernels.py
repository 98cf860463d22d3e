"""Training and generation use only what MPS has and computes rightly, on a simulated device."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model
from model import MPS_INNER_LIMIT, ModelConfig, Transformer
from pocketlm import optim
from pocketlm.config.sampling import SamplingParams
from pocketlm.config.sections import Config
from pocketlm.evaluation.likelihood import Query, query_likelihoods
from pocketlm.hardware.mps_check import inner_dimensions
from pocketlm.inference.engine import Engine, Token
from pocketlm.inference.generate import generate
from pocketlm.model import loss
from pocketlm.optim import build_optimizer, clip_gradients
from tests.support.fake_mps import OnMps, on_mps, without_interception
from tests.support.model_kinds import KINDS, LLAMA, config_for

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
chunks = pytest.mark.parametrize("chunk", [24, 0])  # of 64 tokens
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def batch(vocab_size: int) -> dict[str, Tensor]:
    """Return two rows, each of two documents; a target is missing."""
    rows = torch.randint(vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    return {
        "input_ids": rows[:, :-1],
        "targets": rows[:, 1:].index_fill(1, torch.tensor(7), loss.IGNORE_INDEX),
        "doc_ids": (torch.arange(32) >= 20).long().expand(2, 32),
    }


def take_step(
    net: Transformer,
    config: Config,
    rows: dict[str, Tensor],
    half: bool = False,
    fused: bool = True,
) -> None:
    """Take an optimizer step as the training module does."""
    t = config.training
    optimizer = build_optimizer(
        net,
        optimizer=t.optimizer,
        lr=t.lr,
        weight_decay=t.weight_decay,
        betas=t.betas,
        eps=t.eps,
        fused=fused,
    )
    with (
        torch.autocast("mps", torch.bfloat16, enabled=half),
        torch.autocast("cpu", torch.bfloat16, enabled=half),
    ):
        value = loss.batch_loss(net, rows, t.loss_chunk)
    positions, targets = rows["targets"].numel(), (rows["targets"] != loss.IGNORE_INDEX).sum()
    (value / positions).backward()
    clip_gradients(net.parameters(), t.grad_clip, positions / targets)
    optimizer.step()


# ---- a training step ----


# The head's chunks, the autocast and the optimizer meet in no operation: each value occurs, and
# each pair of the first two.
@kinds
@pytest.mark.parametrize(
    "optimizer, chunk, half",
    [("muon", 24, True), ("adamw", 24, False), ("adamw", 0, True), ("sgd", 0, False)],
)
def test_a_training_step_does_only_what_mps_does_rightly(
    kind: ModelConfig, optimizer: str, chunk: int, half: bool
) -> None:
    net, config = Transformer(kind), config_for(kind, chunk, optimizer=optimizer)
    rows = batch(kind.vocab_size)
    one_document = {name: ids for name, ids in rows.items() if name != "doc_ids"}
    with on_mps() as guard:
        take_step(net, config, rows, half)
        take_step(net, config, one_document, half)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert (torch.bfloat16 in guard.dtypes) == half and torch.float16 not in guard.dtypes
    assert MPS_INNER_LIMIT // 2 in guard.inner  # the head went in parts: this is the path of MPS
    # the self-check tries all of these
    assert guard.inner <= inner_dimensions(kind, config.training)


@kinds
@chunks
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_makes_every_tensor_on_the_device_and_never_waits_for_one(
    kind: ModelConfig, chunk: int, optimizer: str
) -> None:
    """Meta tensors have no values: `.item()` fails on them, and so does mixing them with others."""
    with torch.device("meta"):
        net = Transformer(kind)
        rows = {name: ids.to("meta") for name, ids in batch(kind.vocab_size).items()}
    config = config_for(kind, chunk, optimizer=optimizer)
    with OnMps("meta"):
        take_step(net, config, rows, fused=False)  # the fused optimizers have no meta kernel
    with on_mps("meta"):
        loss.batch_loss(net, rows, chunk).backward()
        clip_gradients(net.parameters(), 1.0)
        optim.newton_schulz(net.layers[0].mlp.up_proj.weight.detach()[None])


# float32 uses is_causal; float64 uses a mask in its place
@chunks
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("documents", [False, True])
def test_on_mps_loss_and_gradients_are_those_of_any_device(
    monkeypatch, documents: bool, chunk: int, dtype: torch.dtype, tolerance: float
) -> None:
    kind = ModelConfig(vocab_size=101, max_seq_len=32, n_layers=2, d_model=16)
    net, rows = Transformer(kind).to(dtype), batch(101)
    if not documents:
        del rows["doc_ids"]
    plain = loss.batch_loss(net, rows, chunk)
    expected = torch.autograd.grad(plain, list(net.parameters()))
    monkeypatch.setattr(model, "MPS_INNER_LIMIT", 21)
    monkeypatch.setattr(loss, "MPS_INNER_LIMIT", 21)
    with OnMps():
        ours = loss.batch_loss(net, rows, chunk)
        gradients = torch.autograd.grad(ours, list(net.parameters()))
    assert ours.item() == pytest.approx(plain.item(), rel=tolerance)
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() < tolerance * b.abs().max()


@pytest.mark.parametrize("chunk", [3, 7, 100])
def test_no_matmul_of_the_chunked_loss_sums_as_many_terms_as_the_limit(
    monkeypatch, chunk: int
) -> None:
    """The vocabulary, and a chunk of 7 tokens or more, go in parts of 3."""
    monkeypatch.setattr(loss, "MPS_INNER_LIMIT", 6)
    hidden, weight = (torch.randn(*shape, requires_grad=True) for shape in [(2, 50, 4), (11, 4)])
    with on_mps() as guard:
        loss.chunked_cross_entropy(hidden, weight, torch.randint(11, (2, 50)), chunk).backward()
    assert 3 <= max(guard.inner) < 6


# ---- generation and scoring ----


@kinds
@dtypes
def test_generation_and_scoring_do_only_what_mps_does_rightly(
    kind: ModelConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Transformer(kind).to(dtype).eval()
    params = SamplingParams(
        max_new_tokens=20,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        num_samples=2,
        seed=0,
    )
    sample = Engine._sample

    def sample_on_the_cpu(engine: Engine, logits: Tensor) -> list[Token]:
        with without_interception():
            return sample(engine, logits)

    monkeypatch.setattr(Engine, "_sample", sample_on_the_cpu)
    queries = [Query((1, 2, 3), (4, 5, 6)), Query((1, 2, 3), (7,)), Query((8, 9), (4, 5))]
    with on_mps():
        tokens = list(generate(net, torch.arange(20)[None], params, eos_id=5))
        answers = query_likelihoods(net, queries, top_k=5)
    assert len(tokens) > 12  # beyond the context of 32
    assert len(answers) == 3


# ---- the guard itself ----


def float64_rope(patch: pytest.MonkeyPatch) -> None:
    original = model.rope_tables

    def rope_tables(*sizes):
        return tuple(table.double() for table in original(*sizes))

    patch.setattr(model, "rope_tables", rope_tables)


def complex_rope(patch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs).flatten(-2)

    patch.setattr(model, "rotate", rotate)


def whole_vocabulary(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(loss, "matmul", torch.matmul)


def whole_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transformer, "logits", lambda net, hidden: F.linear(hidden, net.head_weight))


def exact_orthogonalisation(patch: pytest.MonkeyPatch) -> None:
    def by_svd(matrices: Tensor, **_: Any) -> Tensor:
        u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
        return u @ vt

    patch.setattr(optim, "newton_schulz", by_svd)


def strided_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "contiguous", lambda x: x)


def causal_attention(patch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
        q, k, v = q.contiguous(), k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(
            q, k, v, None, dropout, is_causal=True, enable_gqa=False
        )

    patch.setattr(model, "attend", attend)


@pytest.mark.parametrize(
    "plant, chunk, message",
    [
        (float64_rope, 24, "of torch.float64"),
        (complex_rope, 24, "of torch.complex64"),
        (whole_vocabulary, 24, "mm with an inner dimension of 50"),
        (whole_head, 0, "mm with an inner dimension of 50"),
        (exact_orthogonalisation, 24, "MPS has no _linalg_svd"),
        (strided_attention, 24, "strided input to attention"),
        (causal_attention, 24, "is_causal in half precision"),
    ],
)
def test_the_guard_catches_a_planted_fault(
    monkeypatch, plant: Callable, chunk: int, message: str
) -> None:
    plant(monkeypatch)
    net, config = Transformer(LLAMA), config_for(LLAMA, chunk, optimizer="muon")
    with pytest.raises(AssertionError, match=message), on_mps():
        take_step(net, config, batch(50_257), half=plant is causal_attention)


A, B = torch.zeros(1, 16, 40_000), torch.zeros(1, 40_000, 16)
PRODUCTS = {
    "mm": lambda: A[0] @ B[0],
    "bmm": lambda: A @ B,
    "addmm": lambda: torch.addmm(torch.zeros(16), A[0], B[0]),
    "baddbmm": lambda: torch.baddbmm(torch.zeros(1, 16, 16), A, B),
    "linear": lambda: F.linear(A, B[0].T, torch.zeros(16)),
}


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_the_guard_catches_an_inner_dimension_of_40_000(product: Callable) -> None:
    with pytest.raises(AssertionError, match="inner dimension of 40000"), on_mps():
        product()


def test_the_guard_catches_a_read_of_the_device_and_a_tensor_made_elsewhere() -> None:
    with pytest.raises(RuntimeError, match="meta"), on_mps("meta"):
        torch.zeros(2, device="meta").sum().item()
    with pytest.raises(AssertionError, match="wrong device"), on_mps("meta"):
        torch.zeros(2)
