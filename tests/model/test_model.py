"""The model against Hugging Face's Llama with the same weights, against itself (cached, packed, compiled), and its limits."""

import doctest
import importlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from model import KVCache, ModelConfig, Transformer, positions_in_document, rope_tables, rotate
from pocketlm.optim import build_optimizer, clip_gradients
from tests.support.models import (
    FLOAT32,
    FLOAT64,
    PACKED,
    TINY,
    Precision,
    T,
    gradients,
    mean_loss,
    random_ids,
    random_model,
    reference_of,
    relative_error,
    ten_losses,
)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are float64 throughout. Hugging Face's norm, rotary angles and loss pass through float32: they are replaced here."""

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()

    def rotary(
        self: LlamaRotaryEmbedding, x: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.inv_freq.double()
        return torch.cat((angles, angles), dim=-1).cos(), torch.cat((angles, angles), dim=-1).sin()

    def mean_of_next(logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    monkeypatch.setattr(LlamaForCausalLM, "loss_function", staticmethod(mean_of_next))
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# Against float32. Eight bits round by up to 2^-9 = 0.002, by 0.0011 on average (its square's root): 100 roundings of activations
# and weights make 0.011 of a logit. On the way back come as many again, of sums that nearly cancel (a norm's, a softmax's): three
# times that. The loss is the mean of 24 tokens', each as far off as a logit. Of six seeds and all shapes the worst errors were
# 0.013, 0.0014 and 0.037, and those of transformers itself under the same autocast 0.013, 0.0012 and 0.044.
# Ten steps fall by 4 nats; where the directions are off by 0.05, the way down may be off by a small part of that: 0.05 is 1 %
BFLOAT16 = Precision(torch.bfloat16, logits=0.02, loss=0.003, gradients=0.05, ten_losses=0.05)


def in_precision(model: Transformer, precision: Precision) -> Callable[[Tensor], Tensor]:
    """The model's logits and, in half precision, all that leads to them, under autocast."""

    def logits(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.dtype == torch.bfloat16):
            result = model(ids)
        assert result.dtype == precision.dtype  # else autocast did nothing
        return result

    return logits


def assert_parity(ours: Transformer, reference: LlamaForCausalLM, precision: Precision) -> None:
    """Logits, loss and every gradient of one batch; the reference computes in its own precision, uncompiled."""
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


def assert_same_ten_steps(
    ours: Transformer, reference: LlamaForCausalLM, precision: Precision
) -> None:
    theirs = ten_losses(reference, lambda ids: reference(ids).logits)
    assert theirs[-1] < theirs[0] - 1  # the steps are not so small that nothing could differ
    assert (
        ten_losses(ours, in_precision(ours, precision)) - theirs
    ).abs().max() < precision.ten_losses


def compiled(model: Transformer) -> Transformer:
    """The model with `hidden` compiled; test_fast_paths.py has all that training compiles. The compiler forgets what it did before: past
    eight shapes it gives up."""
    torch._dynamo.reset()
    counters.clear()
    model.hidden = torch.compile(model.hidden, dynamic=False)
    return model


def assert_was_compiled() -> None:
    """Else everything ran eagerly, or in pieces, or was compiled again on the way."""
    assert counters["stats"]["unique_graphs"] == 1, counters
    assert not counters["graph_break"], counters


shapes = pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
tying = pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
thetas = pytest.mark.parametrize("rope_theta", [1e4, 1e6])


@shapes
@tying
@thetas
def test_logits_loss_and_every_gradient_equal_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    assert_parity(model, reference_of(model), FLOAT32)


@pytest.mark.usefixtures("float64")
@shapes
@tying
@thetas
def test_logits_loss_and_every_gradient_equal_transformers_in_float64(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    assert_parity(model, reference_of(model), FLOAT64)


@shapes
@tying
@thetas
def test_bfloat16_autocast_stays_within_its_eight_bits_of_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    assert_parity(model, reference_of(model), BFLOAT16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "n_kv_heads, tie_embeddings, rope_theta",
    [(1, True, 1e6), (2, False, 1e4), (4, True, 1e4), (4, False, 1e6)],
    ids=str,
)
def test_the_compiled_model_equals_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool, rope_theta: float
) -> None:
    """Four of the twelve shapes, as each graph takes seconds to compile.

    Every n_kv_heads, as attention's code depends on it; tying and theta change no graph (the head is outside, theta is in a
    table's values), so each of their values occurs, and in every pair, but not with every n_kv_heads.
    """
    model = random_model(
        n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings, rope_theta=rope_theta
    )
    reference = reference_of(model)
    assert_parity(compiled(model), reference, FLOAT32)
    assert_was_compiled()


@shapes
@tying
def test_ten_adamw_steps_follow_transformers_in_float32(
    n_kv_heads: int, tie_embeddings: bool
) -> None:
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    assert_same_ten_steps(model, reference_of(model), FLOAT32)


@pytest.mark.usefixtures("float64")
@shapes
@tying
def test_ten_adamw_steps_follow_transformers_in_float64(
    n_kv_heads: int, tie_embeddings: bool
) -> None:
    model = random_model(n_kv_heads=n_kv_heads, tie_embeddings=tie_embeddings)
    assert_same_ten_steps(model, reference_of(model), FLOAT64)


def test_ten_adamw_steps_under_bfloat16_autocast_follow_transformers_in_float32() -> None:
    model = random_model()
    assert_same_ten_steps(model, reference_of(model), BFLOAT16)


@pytest.mark.slow
def test_ten_adamw_steps_of_the_compiled_model_follow_transformers_in_float32() -> None:
    model = random_model()
    reference = reference_of(model)
    assert_same_ten_steps(compiled(model), reference, FLOAT32)
    assert_was_compiled()


# ---- the cache ----


def new_cache(model: Transformer, batch_size: int, max_len: int = T) -> KVCache:
    return KVCache(
        model.config, batch_size, max_len, dtype=torch.float32, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    "chunks", [[T], [5, 4, 4], [6, 1, 6], [1] * T], ids=["whole", "chunks", "uneven", "tokens"]
)
@shapes
@torch.no_grad()
def test_cached_logits_equal_the_full_forward_pass(chunks: list[int], n_kv_heads: int) -> None:
    model, ids = random_model(n_kv_heads=n_kv_heads).eval(), random_ids(batch=3)
    cache = new_cache(model, batch_size=3)
    pieces, lengths = [], []
    for piece in ids.split(chunks, dim=1):
        pieces.append(model(piece, cache=cache))
        lengths.append(cache.length)
    assert lengths == torch.tensor(chunks).cumsum(0).tolist()
    assert (torch.cat(pieces, dim=1) - model(ids)).abs().max() < 1e-5  # float32 in another order


@torch.no_grad()
def test_a_cache_longer_than_needed_changes_nothing() -> None:
    model, ids = random_model(max_seq_len=4 * T).eval(), random_ids()
    long, exact = new_cache(model, 2, max_len=4 * T), new_cache(model, 2)
    assert (long.max_len, exact.max_len) == (4 * T, T)
    for piece in ids.split(4, dim=1):
        assert torch.equal(model(piece, cache=long), model(piece, cache=exact))


@torch.no_grad()
def test_more_tokens_than_the_context_are_refused_with_both_numbers() -> None:
    model, ids = random_model().eval(), random_ids(length=T + 1)
    with pytest.raises(ValueError, match=f"{T + 1} tokens .* {T}"):
        model(ids)
    cache = new_cache(model, 2)
    model(ids[:, :T], cache=cache)
    with pytest.raises(ValueError, match=f"{T + 1} tokens .* {T}"):
        model(ids[:, T:], cache=cache)
    assert cache.length == T


# ---- who sees whom ----


@pytest.mark.parametrize("t", [0, 1, 6, T - 1])
@torch.no_grad()
def test_changing_a_token_changes_no_logit_before_it(t: int) -> None:
    model, ids = random_model().eval(), random_ids()
    changed = ids.clone()
    changed[:, t] = (ids[:, t] + 1) % TINY["vocab_size"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all()  # and every logit from it on


@torch.no_grad()
def test_changing_a_row_of_the_batch_changes_no_other_row() -> None:
    model, ids = random_model().eval(), random_ids(batch=3)
    changed = ids.clone()
    changed[1] = (ids[1] + 1) % TINY["vocab_size"]
    before, after = model(ids), model(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("document", [4, 9, 2])
@torch.no_grad()
def test_changing_a_document_changes_no_logit_of_another(document: int) -> None:
    model, ids = random_model().eval(), random_ids()
    inside = document == PACKED
    changed = torch.where(inside, (ids + 1) % TINY["vocab_size"], ids)
    before, after = model(ids, doc_ids=PACKED), model(changed, doc_ids=PACKED)
    assert torch.equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).any(-1).all()


@shapes
@torch.no_grad()
def test_a_packed_document_has_the_logits_of_the_document_alone(n_kv_heads: int) -> None:
    model, ids = random_model(n_kv_heads=n_kv_heads).eval(), random_ids()
    packed = model(ids, doc_ids=PACKED)
    for row, documents in enumerate([[4, 9, 2], [0, 1]]):
        for document in documents:
            inside = PACKED[row] == document
            alone = model(ids[row, inside][None])[0]
            assert (packed[row, inside] - alone).abs().max() < 1e-5  # float32 in another order


@torch.no_grad()
def test_positions_of_packed_documents_are_by_default_those_in_the_document() -> None:
    """RoPE sees distances only, so no logit would tell but for its rounding: hence bits."""
    model, ids = random_model().eval(), random_ids()
    default = model(ids, doc_ids=PACKED)
    assert torch.equal(default, model(ids, doc_ids=PACKED, positions=positions_in_document(PACKED)))
    assert not torch.equal(
        default, model(ids, doc_ids=PACKED, positions=torch.arange(T).expand(2, T))
    )


@pytest.mark.parametrize(
    "doc_ids, positions",
    [
        ([3, 3, 3, 3], [0, 1, 2, 3]),
        ([5, 6, 7, 7], [0, 0, 0, 1]),
        ([1, 1, 2, 1], [0, 1, 0, 0]),  # a number used again is a new document
    ],
)
def test_positions_restart_with_each_document(doc_ids: list[int], positions: list[int]) -> None:
    assert positions_in_document(torch.tensor([doc_ids, [0, 1, 1, 1]])).tolist() == [
        positions,
        [0, 0, 1, 2],
    ]


# ---- training ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_runs_each_block_twice_and_changes_no_gradient(
    dropout: float,
) -> None:
    ids, results, calls = random_ids(), [], []
    for checkpointing in (False, True):
        model = random_model(dropout=dropout, gradient_checkpointing=checkpointing).train()
        ran: list[int] = []
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda *_, i=i, ran=ran: ran.append(i))
        torch.manual_seed(2)  # the same dropout in both
        mean_loss(model(ids), ids).backward()
        results.append(gradients(model))
        calls.append(ran)
    assert calls == [[0, 1], [0, 1, 1, 0]]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    ids = random_ids()
    with_dropout, without = random_model(dropout=0.5), random_model(dropout=0.0)
    assert torch.equal(with_dropout.eval()(ids), without.eval()(ids))
    assert not torch.equal(with_dropout.train()(ids), with_dropout(ids))


def test_matrices_begin_with_a_spread_of_002_smaller_on_the_residual_stream_and_gains_at_one() -> (
    None
):
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(vocab_size=256, max_seq_len=T, n_layers=8, d_model=64, tie_embeddings=False)
    )
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            expected = (
                0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            )  # sqrt(2 * 8 layers) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.05), (
                name
            )  # of 4,096 draws: 1.1 % standard error
            assert abs(p.mean().item()) < 0.1 * expected, name


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=4096, max_seq_len=64))
    ids = random_ids(batch=4, length=64, vocab_size=4096)
    with torch.no_grad():
        loss = mean_loss(model(ids), ids)
    # 0.1: logits of spread 0.02 * sqrt(256) add 0.05, a tied head's leaning to the token just read less than that
    assert abs(loss - math.log(4096)) < 0.1


def test_one_batch_is_learnt_by_heart() -> None:
    torch.manual_seed(0)
    model, ids = Transformer(ModelConfig(**TINY)), random_ids(batch=2)
    assert ids[0, 0] != ids[1, 0]  # what follows the first token can be known
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = mean_loss(model(ids), ids)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---- sizes ----


@pytest.mark.parametrize(
    "sizes",
    [
        dict(tie_embeddings=True),
        dict(tie_embeddings=False),
        dict(n_kv_heads=1, tie_embeddings=False),
        dict(n_kv_heads=None, n_layers=3),
        dict(d_ff=100, d_model=48, n_heads=2, n_kv_heads=2),
    ],
    ids=str,
)
def test_n_parameters_is_the_real_count(sizes: dict[str, Any]) -> None:
    config = ModelConfig(**TINY | sizes)
    assert config.n_parameters == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("d_model, d_ff", [(24, 64), (32, 128), (256, 704), (768, 2048)])
def test_d_ff_is_eight_thirds_of_d_model_rounded_up_to_64(d_model: int, d_ff: int) -> None:
    assert ModelConfig(d_model=d_model, n_heads=4).d_ff == d_ff


@pytest.mark.parametrize(
    "sizes, told",
    [
        (dict(vocab_size=0), "vocab_size is 0;"),
        (dict(max_seq_len=-1), "max_seq_len is -1;"),
        (dict(n_layers=0), "n_layers is 0;"),
        (dict(d_model=0), "d_model is 0;"),
        (dict(n_heads=0), "n_heads is 0;"),
        (dict(n_kv_heads=0), "n_kv_heads is 0;"),
        (dict(d_ff=-64), "d_ff is -64;"),
        (dict(d_model=30, n_heads=4), "d_model 30 is not divisible by n_heads 4; take d_model 28 "),
        (dict(d_model=2, n_heads=4), "d_model 2 is not divisible by n_heads 4; take d_model 4 "),
        (
            dict(n_heads=8, n_kv_heads=3),
            r"n_heads 8 is not divisible by n_kv_heads 3; take one of \[1, 2, 4, 8\]",
        ),
        (dict(d_model=12, n_heads=4), "d_model / n_heads is 3;"),
        (dict(dropout=1.0), "dropout is 1.0;"),
        (dict(dropout=-0.1), "dropout is -0.1;"),
        (dict(rope_theta=0.0), "rope_theta is 0.0;"),
        (dict(norm_eps=-1e-5), "norm_eps is -1e-05;"),
    ],
    ids=str,
)
def test_a_size_that_does_not_fit_is_refused_by_name_and_value(
    sizes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        ModelConfig(**sizes)


# ---- rotary positions ----


@thetas
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rotary_tables_equal_transformers(rope_theta: float, head_dim: int) -> None:
    length = 512
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
    )
    expected = LlamaRotaryEmbedding(config)(torch.zeros(()), torch.arange(length)[None])
    for ours, theirs in zip(rope_tables(head_dim, length, rope_theta), expected, strict=True):
        assert torch.equal(ours, theirs[0])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shift", [1, 7, 100])
def test_a_rotated_dot_product_depends_on_the_distance_alone(shift: int) -> None:
    cos, sin = rope_tables(16, 128, 1e4)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    m, n = torch.arange(20)[:, None, None], torch.arange(0, 40, 2)[:20, None, None]

    def products(by: int) -> Tensor:
        m_by, n_by = (
            (m // 2 + by)[:, 0],
            (n // 2 + by)[:, 0],
        )  # 20 pairs of places, from 0 to 19 apart
        return (rotate(q, cos[m_by], sin[m_by]) * rotate(k, cos[n_by], sin[n_by])).sum(-1).flatten()

    assert products(0).std() > 0.1  # distance matters
    assert (
        products(shift) - products(0)
    ).abs().max() < 1e-12  # float64's rounding of angles up to 128


@torch.no_grad()
def test_shifting_every_position_changes_no_logit() -> None:
    model, ids = random_model(max_seq_len=4 * T).eval(), random_ids()
    positions = torch.arange(T).expand(2, T)
    assert torch.equal(model(ids, positions=positions), model(ids))
    assert (
        model(ids, positions=positions + 2 * T) - model(ids)
    ).abs().max() < 1e-4  # float32 angles up to 3 T = 39 radians


# ---- devices that are not here ----


@pytest.fixture
def meta() -> torch.device:
    """A device other than the CPU on every machine; mixing the two is an error."""
    return torch.device("meta")


class Watch(TorchDispatchMode):
    """Collects the dtype and device of every tensor that any operation makes."""

    def __init__(self, scalars: bool = True) -> None:
        super().__init__()
        self.scalars = scalars
        self.made: dict[tuple[torch.dtype, str], str] = {}  # and the first operation that made one

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (self.scalars or tensor.dim() > 0):
                self.made.setdefault((tensor.dtype, tensor.device.type), str(func))
        return result


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_makes_every_tensor_on_the_device_of_its_inputs(
    meta: torch.device, optimizer: str, packed: bool
) -> None:
    with meta:
        model = Transformer(ModelConfig(**TINY))
    ids = random_ids().to(meta)
    stepper = build_optimizer(
        model,
        optimizer=optimizer,
        lr=1e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=False,
    )
    with Watch() as watch:
        mean_loss(model(ids, doc_ids=PACKED.to(meta) if packed else None), ids).backward()
        clip_gradients(model.parameters(), 1.0)
    with Watch(scalars=False) as step_watch:  # AdamW's counters of steps lie on the CPU by design
        stepper.step()
    assert {device for _, device in watch.made} == {"meta"}, watch.made
    assert {device for _, device in step_watch.made} == {"meta"}, step_watch.made
    assert all(p.grad.device.type == "meta" for p in model.parameters())


@torch.no_grad()
def test_cached_chunks_make_every_tensor_on_the_device_of_their_inputs(meta: torch.device) -> None:
    with meta:
        model = Transformer(ModelConfig(**TINY))
    ids = random_ids().to(meta)
    cache = KVCache(model.config, 2, T, dtype=torch.float32, device=meta)
    with Watch() as watch:
        for piece in ids.split([5, 7, 1], dim=1):
            logits = model(piece, cache=cache)
    assert {device for _, device in watch.made} == {"meta"}, watch.made
    assert logits.shape == (2, 1, TINY["vocab_size"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float32_training_step_makes_no_float64_and_no_complex_tensor(optimizer: str) -> None:
    """MPS has neither. The math kernel is what attention decomposes to there."""
    with sdpa_kernel(SDPBackend.MATH), Watch() as watch:
        model, ids = random_model(), random_ids()
        stepper = build_optimizer(
            model,
            optimizer=optimizer,
            lr=1e-3,
            weight_decay=0.1,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,
        )
        mean_loss(model(ids, doc_ids=PACKED), ids).backward()
        clip_gradients(model.parameters(), 1.0)
        stepper.step()
    kinds = {dtype for dtype, _ in watch.made}
    assert torch.float32 in kinds
    assert not [kind for kind in watch.made if kind[0] == torch.float64 or kind[0].is_complex], (
        watch.made
    )


def test_a_model_built_on_meta_is_whole_after_its_weights_and_tables_are_set() -> None:
    expected, ids = random_model(), random_ids()
    with torch.device("meta"):
        model = Transformer(expected.config)
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    model.reset_tables()
    assert torch.equal(model(ids), expected(ids))


# ---- the examples in the docstrings ----


def examples_by_module() -> dict[str, int]:
    """How many examples are written in each module that has any."""
    root = Path(__file__).parents[2]
    written = {}
    for path in [*root.glob("*.py"), *(root / "pocketlm").rglob("*.py")]:
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        written[name] = len(re.findall(r"^ *>>> ", path.read_text(), re.MULTILINE))
    return {name: count for name, count in sorted(written.items()) if count}


@pytest.mark.parametrize("name, examples", examples_by_module().items())
def test_the_worked_examples_in_the_docstrings_hold(name: str, examples: int) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
    assert results.attempted == examples  # none was left out, and there was one
