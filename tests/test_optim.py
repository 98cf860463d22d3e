"""The optimizers, the gradient clip and the schedule, each against torch's own."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

from model import ModelConfig, Transformer
from pocketlm.optim import (
    MuonAdamW,
    build_optimizer,
    clip_gradients,
    iterate_gram,
    iterate_x,
    lr_at_step,
    newton_schulz,
)

SETTINGS = dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
RATES = (0.01, 0.02, 0.005, 0.01, 0.001)  # a schedule of five steps


def tiny_model(tie_embeddings: bool = False) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelConfig(
            vocab_size=40,
            max_seq_len=8,
            n_layers=2,
            d_model=24,
            n_heads=4,
            n_kv_heads=2,
            d_ff=56,
            tie_embeddings=tie_embeddings,
        )
    )


def set_gradients(model: nn.Module, seed: int) -> None:
    """Set random gradients, the same for the same seed; their size is not that of the weights."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 0.1


def take_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: tuple[float, ...],
    first_seed: int = 0,
) -> None:
    for seed, rate in enumerate(rates, first_seed):
        set_gradients(model, seed)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def torch_adamw(
    model: nn.Module, fused: bool, leave_out: set[str] = frozenset()
) -> torch.optim.AdamW:
    """Return torch's AdamW with weight decay on matrices only."""
    params = [p for name, p in model.named_parameters() if name not in leave_out]
    groups = [
        dict(params=[p for p in params if p.dim() == 2], weight_decay=0.1),
        dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def block_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: p
        for name, p in model.named_parameters()
        if name.startswith("layers.") and p.dim() == 2
    }


optimizers = pytest.mark.parametrize("optimizer", ["adamw", "muon"])
fusing = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
momenta = pytest.mark.parametrize("momentum", [0.95, 0.8])


def muon_of(model: Transformer, momentum: float) -> MuonAdamW:
    optimizer = build_optimizer(model, optimizer="muon", fused=False, **SETTINGS)
    assert isinstance(optimizer, MuonAdamW)
    optimizer.momentum = momentum
    return optimizer


# ---- groups ----


@optimizers
@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(
    optimizer: str, tie_embeddings: bool
) -> None:
    model = tiny_model(tie_embeddings)
    groups = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS).param_groups
    grouped = []
    for group in groups:
        grouped += [(p, group) for p in group["params"]]
    assert sorted(id(p) for p, _ in grouped) == sorted(id(p) for p in model.parameters())
    assert all(group["weight_decay"] == (0.1 if p.dim() == 2 else 0.0) for p, group in grouped)
    in_muon = {id(p) for p, group in grouped if group["muon"]}
    assert in_muon == (
        {id(p) for p in block_matrices(model).values()} if optimizer == "muon" else set()
    )


@optimizers
def test_each_learning_rate_is_that_of_its_key_and_of_lr_without_one(optimizer: str) -> None:
    rates = {"lr": 1.0, "head_lr": 2.0, "vector_lr": 3.0}
    model = tiny_model()
    groups = build_optimizer(
        model, optimizer=optimizer, fused=False, **SETTINGS | {"lr": rates}
    ).param_groups
    found = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        name: 3.0 if p.dim() == 1 else 2.0 if name == "lm_head.weight" else 1.0
        for name, p in model.named_parameters()
    }
    assert all(rates[group["lr_key"]] == group["lr"] for group in groups)


# ---- steps ----


@fusing
def test_adamw_equals_torch_step_for_step(fused: bool) -> None:
    ours, theirs = tiny_model(), tiny_model()
    optimizer = build_optimizer(ours, optimizer="adamw", fused=fused, **SETTINGS)
    reference = torch_adamw(theirs, fused)
    for seed, rate in enumerate(RATES):
        take_steps(ours, optimizer, (rate,), seed)
        take_steps(theirs, reference, (rate,), seed)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


@fusing
def test_with_muon_all_but_the_blocks_matrices_equal_torch_adamw_exactly(fused: bool) -> None:
    ours, theirs = tiny_model(), tiny_model()
    muon = block_matrices(ours).keys()
    optimizer = build_optimizer(ours, optimizer="muon", fused=fused, **SETTINGS)
    reference = torch_adamw(theirs, fused, set(muon))
    for seed, rate in enumerate(RATES):
        take_steps(ours, optimizer, (rate,), seed)
        take_steps(theirs, reference, (rate,), seed)
        expected = dict(theirs.named_parameters())
        same = {name for name, p in ours.named_parameters() if torch.equal(p, expected[name])}
        assert same == expected.keys() - muon


@momenta
def test_muon_moves_every_matrix_the_way_of_torch_muon(momentum: float) -> None:
    ours, theirs = tiny_model(), tiny_model()
    optimizer = muon_of(ours, momentum)
    reference = torch.optim.Muon(
        block_matrices(theirs).values(),
        lr=0.01,
        weight_decay=0.1,
        momentum=momentum,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    before = {name: p.detach().clone() for name, p in block_matrices(ours).items()}
    take_steps(ours, optimizer, RATES)
    take_steps(theirs, reference, RATES)
    expected = block_matrices(theirs)
    for name, p in block_matrices(ours).items():
        change = (p.detach() - before[name]).flatten()
        their_change = (expected[name].detach() - before[name]).flatten()
        # both run Newton-Schulz in bfloat16 (2^-9 per rounding), torch with fused sums: 3 % per
        # value
        assert F.cosine_similarity(change, their_change, dim=0) > 0.999, name
        assert change.norm().item() == pytest.approx(their_change.norm().item(), rel=0.03), name


@momenta
def test_muon_momentum_is_the_moving_average_that_torch_keeps(momentum: float) -> None:
    ours, theirs = tiny_model(), tiny_model()
    optimizer = muon_of(ours, momentum)
    reference = torch.optim.Muon(block_matrices(theirs).values(), momentum=momentum)
    take_steps(ours, optimizer, RATES)
    take_steps(theirs, reference, RATES)
    expected = block_matrices(theirs)
    for name, p in block_matrices(ours).items():
        momentum = reference.state[expected[name]]["momentum_buffer"]
        assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum)


@optimizers
def test_gradients_of_zero_leave_the_decay_of_matrices_alone(optimizer: str) -> None:
    model = tiny_model()
    stepper = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS)
    before = copy.deepcopy(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stepper.step()
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = q * (1 - 0.01 * 0.1) if q.dim() == 2 else q
        assert torch.equal(p, expected), name


@optimizers
def test_a_parameter_without_a_gradient_is_left_as_it_is(optimizer: str) -> None:
    model = tiny_model()
    stepper = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS)
    set_gradients(model, 0)
    frozen = [model.embed_tokens.weight, model.layers[0].mlp.up_proj.weight]
    for p in frozen:
        p.grad = None
    before = copy.deepcopy(model)
    stepper.step()
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    unchanged = {name for (name, p), q in pairs if torch.equal(p, q)}
    assert unchanged == {"embed_tokens.weight", "layers.0.mlp.up_proj.weight"}


@optimizers
def test_step_calls_the_closure_once_with_gradients_on_and_returns_its_loss(optimizer: str) -> None:
    model = tiny_model()
    stepper = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(model(torch.arange(8)[None]).square().mean())
        losses[-1].backward()
        return losses[-1]

    assert stepper.step(closure) is losses[0]
    assert len(losses) == 1


@fusing
@optimizers
def test_a_saved_and_loaded_optimizer_continues_bit_equal(optimizer: str, fused: bool) -> None:
    """AdamW's loading reads a `step` of every parameter's state.

    Muon's state once had none, and no such run could be resumed.
    """
    straight = tiny_model()
    stepper = build_optimizer(straight, optimizer=optimizer, fused=fused, **SETTINGS)
    take_steps(straight, stepper, RATES[:3])
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": stepper.state_dict()}, file)
    take_steps(straight, stepper, RATES[3:], first_seed=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = tiny_model()
    resumed.load_state_dict(saved["model"])
    stepper = build_optimizer(resumed, optimizer=optimizer, fused=fused, **SETTINGS)
    stepper.load_state_dict(saved["optimizer"])
    take_steps(resumed, stepper, RATES[3:], first_seed=3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- Newton-Schulz ----

matrices = pytest.mark.parametrize(
    "shape", [(4, 24, 56), (4, 56, 24), (2, 16, 128)], ids=["wide", "tall", "wider"]
)


@matrices
def test_newton_schulz_brings_every_singular_value_near_one_and_keeps_the_directions(
    shape: tuple[int, int, int],
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = newton_schulz(x)
    values = torch.linalg.svdvals(y)
    assert (values >= 0.6).all(), values
    assert (values <= 1.3).all(), values
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    # singular values from 0.67 to 1.15 have a cosine of 0.99 with all ones, and bfloat16 lowers it
    # a little
    assert F.cosine_similarity(y.flatten(1), (u @ vh).flatten(1)).min() > 0.97


@matrices
@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])  # bfloat16 has powers of two exactly
def test_newton_schulz_forgets_the_size_of_a_matrix_and_its_neighbours_in_the_batch(
    shape: tuple[int, int, int], scale: float
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    other = torch.cat([x[:1] * scale, -x[1:]])
    # in float32, the 1e-7 that is added to a norm of 0.03 shows
    torch.testing.assert_close(newton_schulz(x)[0], newton_schulz(other)[0], rtol=0, atol=1e-5)
    assert torch.equal(-newton_schulz(x)[1:], newton_schulz(other)[1:])


# errors of float64's rounding, and of float32's in singular values 1e-5 of the largest, which the
# five steps multiply by up to 3.44^5 = 480
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_the_iteration_of_gram_matrices_is_that_of_the_matrix(
    dtype: torch.dtype, tolerance: float
) -> None:
    x = torch.randn(3, 24, 56, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.logspace(-0.5, -5, 24, dtype=torch.float64) @ vh
    expected = iterate_x(x, 5)
    assert (iterate_gram(x.to(dtype), 5) - expected).norm() < tolerance * expected.norm()
    assert torch.equal(iterate_gram(x, 0), x)


# ---- clip ----


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 3.0, torch.tensor(0.25)], ids=str)
def test_clip_is_torchs_clip_of_the_scaled_gradients(
    max_norm: float, scale: float | Tensor
) -> None:
    ours, theirs = tiny_model(), tiny_model()
    for model in (ours, theirs):
        set_gradients(model, 0)
        model.embed_tokens.weight.grad = None  # like that of a frozen parameter
    for p in theirs.parameters():
        if p.grad is not None:
            p.grad *= scale
    norm = clip_gradients(ours.parameters(), max_norm, scale)
    expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    # scale and clip are one factor here and two in torch: a few float32 roundings (6e-8)
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    assert ours.embed_tokens.weight.grad is None


@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(4.0)], ids=str)
def test_a_max_norm_of_zero_scales_and_does_not_clip(scale: float | Tensor) -> None:
    model = tiny_model()
    set_gradients(model, 0)
    before = [p.grad.clone() for p in model.parameters()]
    norm = clip_gradients(model.parameters(), 0.0, scale)
    for p, grad in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, grad * scale)
    exact = torch.cat([grad.flatten() for grad in before]).double().norm() * scale
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)  # float32


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
@pytest.mark.parametrize(
    "scale, writes",
    [(1.0, 0), (torch.tensor(1.0), 0), (0.5, 1)],
    ids=["1", "tensor of 1", "a half"],
)
def test_gradients_that_keep_their_size_are_not_written_to(
    max_norm: float, scale: float | Tensor, writes: int
) -> None:
    """The version number that autograd keeps of each gradient counts the writes."""
    model = tiny_model()
    set_gradients(model, 0)
    before = [p.grad._version for p in model.parameters()]
    clip_gradients(model.parameters(), max_norm, scale)
    for p, version in zip(model.parameters(), before, strict=True):
        assert p.grad._version - version == writes


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_not_hidden(max_norm: float) -> None:
    model = tiny_model()
    set_gradients(model, 0)
    model.embed_tokens.weight.grad[0, 0] = torch.nan
    assert clip_gradients(model.parameters(), max_norm).isnan()
    assert model.embed_tokens.weight.grad[0, 0].isnan()


# ---- schedule ----

schedules = pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
falling = pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
ratios = st.floats(0, 1)
lengths = st.tuples(st.integers(1, 300), st.integers(0, 299)).map(
    lambda t: dict(max_steps=t[0] + t[1], warmup_steps=t[1])
)


def factors(schedule: str, *, max_steps: int, **settings: float) -> list[float]:
    """Return the factor of every step of a run, and of the one after its last."""
    run = dict(max_steps=max_steps, **settings, schedule=schedule)
    return [lr_at_step(step, **run) for step in range(max_steps + 1)]


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (
            "linear",
            [0.2, 0.4, 0.6, 0.8, 1.0, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1],
        ),
        ("constant", [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_factors_of_a_worked_example(schedule: str, expected: list[float]) -> None:
    assert factors(schedule, max_steps=12, warmup_steps=4, min_lr_ratio=0.1) == pytest.approx(
        expected
    )


@given(length=lengths, ratio=ratios, share=st.floats(0, 0.9))
def test_wsd_stays_at_one_and_then_falls_as_linear_does(
    length: dict[str, int], ratio: float, share: float
) -> None:
    """The fall is that of a linear schedule whose warm-up ends where the fall begins."""
    steps, warmup = length["max_steps"], length["warmup_steps"]
    start = max(warmup, steps - round(share * steps))
    values = factors("wsd", **length, min_lr_ratio=ratio, decay_share=share)
    assert values[warmup:start] == [1.0] * (start - warmup)
    fall = factors("linear", max_steps=steps, warmup_steps=start, min_lr_ratio=ratio)
    assert values[start:] == fall[start:]


def test_cosine_is_at_its_middle_half_way() -> None:
    run = dict(max_steps=100, warmup_steps=20, min_lr_ratio=0.2)
    assert lr_at_step(60, **run, schedule="cosine") == pytest.approx(0.6)


@schedules
@given(length=lengths, ratio=ratios)
def test_the_factor_rises_to_one_at_the_end_of_the_warmup_then_never_rises(
    schedule: str, length: dict[str, int], ratio: float
) -> None:
    values, end = factors(schedule, **length, min_lr_ratio=ratio), length["warmup_steps"]
    warmup, decay = values[: end + 1], values[end:]
    assert all(0 < value <= 1 for value in warmup)
    assert values[end] == pytest.approx(1)
    for a, b in itertools.pairwise(warmup):
        assert b - a == pytest.approx(1 / (end + 1))  # no jump at the end of the warm-up
    for a, b in itertools.pairwise(decay):
        assert 0 <= b <= a + 1e-15  # one rounding of float64


@falling
@given(length=lengths, ratio=ratios, beyond=st.integers(0, 50))
def test_the_factor_is_the_smallest_from_the_last_step_on(
    schedule: str, length: dict[str, int], ratio: float, beyond: int
) -> None:
    step = length["max_steps"] + beyond
    assert lr_at_step(step, **length, min_lr_ratio=ratio, schedule=schedule) == pytest.approx(ratio)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@given(length=lengths, ratio=ratios)
def test_the_fall_equals_torchs_scheduler(
    schedule: str, length: dict[str, int], ratio: float
) -> None:
    steps = length["max_steps"] - length["warmup_steps"]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if schedule == "cosine":
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=ratio)
    else:
        scheduler = lr_scheduler.PolynomialLR(optimizer, total_iters=steps)  # linear, down to 0
        ratio = 0.0
    expected = []
    for _ in range(steps + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    values = factors(schedule, **length, min_lr_ratio=ratio)[length["warmup_steps"] :]
    # torch multiplies the previous factor, and so rounds at every step
    assert values == pytest.approx(expected, abs=1e-9)
