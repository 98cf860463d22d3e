"""The older relatives of the Llama style, each against something independent of this project.

GPT-2 is compared with that of transformers, in logits, loss, every gradient and ten steps.
microgpt, nn.zig and randyGPT are compared with their published graphs, written here in plain tensor
operations, in logits and every gradient. What all of them share follows: cache, packing, first
weights, weight decay.
"""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.optim import build_optimizer, clip_gradients
from tests.support.gpt2 import Weights, gpt2_pair, in_our_names, model_of, preset
from tests.support.losses import assert_gradients_near, next_token_loss
from tests.support.models import PACKED, T, gradients, mean_loss, random_ids, relative_error
from tests.support.parity import FLOAT32, FLOAT64, Precision

SETTINGS = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)

# Relative: 1,000 roundings of 1e-16 in the same direction are 1e-13; anything left in float32 shows
# at 1e-7.
ROUNDING = 1e-12


@pytest.fixture(autouse=True)
def float64_by_default() -> Iterator[None]:
    """Make new tensors, and so new models, float64 unless a test sets another dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- GPT-2 ----

precisions = pytest.mark.parametrize("precision", [FLOAT32, FLOAT64], ids=["float32", "float64"])
shapes = pytest.mark.parametrize("n_layers, n_heads", [(2, 4), (3, 2)])


@precisions
@shapes
def test_gpt2s_logits_loss_and_every_gradient_equal_transformers(
    n_layers: int, n_heads: int, precision: Precision
) -> None:
    torch.set_default_dtype(precision.dtype)
    ours, theirs = gpt2_pair(n_layers, n_heads)
    ids = random_ids()
    logits, their_logits = ours(ids), theirs(ids).logits
    assert logits.dtype == their_logits.dtype == precision.dtype
    loss, their_loss = mean_loss(logits, ids), next_token_loss(their_logits, ids)
    loss.backward()
    their_loss.backward()
    assert relative_error(logits, their_logits) < precision.logits
    assert relative_error(loss, their_loss) < precision.loss
    expected = in_our_names({name: p.grad for name, p in theirs.named_parameters()})
    assert_gradients_near(gradients(ours), expected, precision.gradients)


CLIP = 1.7  # the gradient's norm of these models falls from 3 to 1.5 in ten steps


def ten_steps(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    clip: Callable[[], Tensor],
) -> list[Tensor]:
    """Return losses and gradient norms before each of ten steps, on two batches in turn."""
    batches, losses, norms = random_ids(batch=4).split(2), [], []
    for step in range(10):
        loss = loss_of(batches[step % 2])
        optimizer.zero_grad()
        loss.backward()
        norms.append(clip())
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), torch.stack(norms)]


@precisions
@shapes
def test_ten_clipped_adamw_steps_of_gpt2_follow_transformers(
    n_layers: int, n_heads: int, precision: Precision
) -> None:
    """The steps change the loss, and the clip acts on some of them."""
    torch.set_default_dtype(precision.dtype)
    ours, theirs = gpt2_pair(n_layers, n_heads)
    params = list(theirs.parameters())
    groups = [
        dict(params=[p for p in params if p.dim() == 2]),
        dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0),
    ]
    expected, norms = ten_steps(
        lambda ids: next_token_loss(theirs(ids).logits, ids),
        torch.optim.AdamW(groups, **SETTINGS),
        lambda: torch.nn.utils.clip_grad_norm_(params, CLIP),
    )
    assert expected[-1] < expected[1] - 1
    assert norms.min() < CLIP < norms.max()
    losses, _ = ten_steps(
        lambda ids: mean_loss(ours(ids), ids),
        build_optimizer(ours, optimizer="adamw", fused=False, **SETTINGS),
        lambda: clip_gradients(ours.parameters(), CLIP),
    )
    assert (losses - expected).abs().max() < precision.ten_losses


# ---- the graphs of microgpt, nn.zig and randyGPT: from the tokens of a row to their logits ----


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def of_layer(w: Weights, layer: int) -> Weights:
    prefix = f"layers.{layer}."
    return {name.removeprefix(prefix).removesuffix(".weight"): p for name, p in w.items()}


def microgpt(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    """Compute a token at a time: each layer appends its key and value to lists, and reads them."""
    keys, values = ([[] for _ in range(config.n_layers)] for _ in "kv")
    logits = []
    for position, token in enumerate(ids.tolist()):
        x = rms(w["embed_tokens.weight"][token] + w["embed_positions.weight"][position])
        for layer in range(config.n_layers):
            p = of_layer(w, layer)
            q, k, v = (p[f"self_attn.{part}_proj"] @ rms(x) for part in "qkv")
            keys[layer].append(k)
            values[layer].append(v)
            heads = []
            for head in range(config.n_heads):
                part = slice(head * config.head_dim, (head + 1) * config.head_dim)
                scores = [q[part].dot(k[part]) / config.head_dim**0.5 for k in keys[layer]]
                shares = torch.stack(scores).softmax(0)
                pairs = zip(shares, values[layer], strict=True)
                heads.append(sum(share * v[part] for share, v in pairs))
            x = x + p["self_attn.o_proj"] @ torch.cat(heads)
            x = x + p["mlp.down_proj"] @ (p["mlp.up_proj"] @ rms(x)).clamp(min=0)
        logits.append(w["lm_head.weight"] @ x)
    return torch.stack(logits)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute causal attention of (..., T, D)."""
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def rope(x: Tensor) -> Tensor:
    """Rotate (T, D) by complex numbers: x[i] + x[i + D/2] j, by the angle t / 10000^(2i/D)."""
    half = x.size(-1) // 2
    exponents = torch.arange(half, dtype=torch.float32) / half  # float32, as in the model
    angles = torch.arange(x.size(0))[:, None] * (1 / 10_000**exponents).double()
    rotation = torch.polar(torch.ones_like(angles), angles)
    rotated = torch.complex(x[:, :half], x[:, half:]) * rotation
    return torch.cat([rotated.real, rotated.imag], dim=-1)


def nnzig(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    x = w["embed_tokens.weight"][ids]
    for p in (of_layer(w, 0), of_layer(w, 1)):
        h = rms(x) * p["input_layernorm"]
        q, k, v = (h @ p[f"self_attn.{part}_proj"].T for part in "qkv")
        x = x + attention(rope(q), rope(k), v) @ p["self_attn.o_proj"].T
        h = rms(x) * p["post_attention_layernorm"]
        gate = h @ p["mlp.gate_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    return (rms(x) * w["norm.weight"]) @ w["lm_head.weight"].T


def randygpt(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][: len(ids)]
    head_dim = config.d_model // config.n_heads
    for layer in range(config.n_layers):
        p = of_layer(w, layer)
        q, k, v = (
            (rms(x) @ p[f"self_attn.{part}_proj"].T).split(head_dim, dim=-1) for part in "qkv"
        )
        heads = [attention(*head) for head in zip(q, k, v, strict=True)]
        x = x + torch.cat(heads, dim=-1) @ p["self_attn.o_proj"].T
        x = x + (rms(x) @ p["mlp.up_proj"].T).clamp(min=0) ** 2 @ p["mlp.down_proj"].T
    return x @ w["lm_head.weight"].T


Graph = Callable[[Weights, ModelConfig, Tensor], Tensor]
GRAPHS: list[tuple[Graph, ModelConfig]] = [
    (microgpt, preset("microgpt", 27)),
    (microgpt, preset("microgpt", 27, "model.n_layers=3")),
    (nnzig, preset("nnzig", 256)),
    (randygpt, preset("randygpt_small", 67)),
]


@pytest.mark.parametrize("graph, config", GRAPHS)
def test_a_presets_model_is_its_ancestors_graph_in_logits_and_every_gradient(
    graph: Graph, config: ModelConfig
) -> None:
    """The logits are compared at each position."""
    model = model_of(config)
    ids = random_ids(length=config.max_seq_len, vocab_size=config.vocab_size)
    weights = {name: p.clone().requires_grad_() for name, p in model.state_dict().items()}
    logits, expected = model(ids), torch.stack([graph(weights, config, row) for row in ids])
    mean_loss(logits, ids).backward()
    next_token_loss(expected, ids).backward()
    for name, gradient in gradients(model).items():
        assert relative_error(gradient, weights[name].grad) < ROUNDING, name
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < ROUNDING


def test_every_tensors_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences of 24 weights in each of microgpt's 9 tensors: 216 of the 4,192.

    A loss of 4 nats is rounded by 1e-15 or so, divided by 2e-6: about 1e-9. The error of the
    step itself, its square, is 1e-12.
    """
    config = preset("microgpt", 27)
    model, ids = model_of(config), random_ids(length=config.max_seq_len, vocab_size=27)
    mean_loss(model(ids), ids).backward()
    step = 1e-6  # so small that no ReLU passes its kink on the way
    slopes, expected = [], []
    for p in model.parameters():
        weights = p.data.view(-1)
        for i in torch.randperm(p.numel())[:24].tolist():
            losses, middle = [], weights[i].item()
            for value in (middle - step, middle + step, middle):
                weights[i] = value
                losses.append(mean_loss(model(ids), ids).item())
            slopes.append((losses[1] - losses[0]) / (2 * step))
            expected.append(p.grad.view(-1)[i].item())
    slopes, expected = torch.tensor(slopes), torch.tensor(expected)
    assert len(slopes) == 216 and expected.abs().mean() > 1e-3
    assert (slopes - expected).abs().max() < 1e-8


GPT2_124M = ModelConfig(
    vocab_size=50_257,
    max_seq_len=1024,
    n_layers=12,
    d_model=768,
    n_heads=12,
    n_kv_heads=None,
    mlp="gelu",
    position="learned",
    norm="layernorm",
    bias=True,
)
COUNTS = [
    (preset("nnzig", 256), 590_464),
    (preset("microgpt", 27), 4_192),
    (preset("microgpt", 58), 5_184),
    (preset("randygpt_tiny", 67), 16_832),
    (preset("randygpt_small", 67), 811_776),
    (preset("randygpt_medium", 67), 4_769_280),
    (preset("randygpt_large", 67), 37_850_112),
    (GPT2_124M, 124_439_808),
    (preset("gpt2_124m", 50_257), 124_439_808),
]


@pytest.mark.parametrize("config, count", COUNTS)
def test_the_number_of_parameters_is_the_ancestors(config: ModelConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == count
    assert config.n_parameters == count


# ---- properties of every family ----

KEYS = ["model.n_layers=2", "model.d_model=64", "model.d_ff=null", "training.seq_len=64"]
PRESETS = ("microgpt", "nnzig", "randygpt_small", "gpt2_mini")
FAMILIES = {name: preset(name, 61, *KEYS) for name in PRESETS}
FAMILIES["llama"] = ModelConfig(vocab_size=61, max_seq_len=64, n_layers=2, d_model=64)
families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


@families
@torch.no_grad()
def test_cached_logits_in_chunks_equal_the_full_forward_pass(config: ModelConfig) -> None:
    model, ids = model_of(config), random_ids(batch=3)
    cache = KVCache(config, 3, T, dtype=torch.float64, device=torch.device("cpu"))
    chunks = [model(piece, cache=cache) for piece in ids.split([6, 1, 2, 4], dim=1)]
    assert relative_error(torch.cat(chunks, dim=1), model(ids)) < ROUNDING


@families
@torch.no_grad()
def test_a_packed_document_has_the_logits_of_the_document_alone(config: ModelConfig) -> None:
    model, ids = model_of(config), random_ids()
    packed = model(ids, doc_ids=PACKED)
    for row, document in [(0, 4), (0, 9), (0, 2), (1, 0), (1, 1)]:
        inside = PACKED[row] == document
        assert relative_error(packed[row, inside], model(ids[row, inside][None])[0]) < ROUNDING


@families
def test_first_matrices_spread_by_init_std_less_on_the_residual_stream_gains_one_biases_zero(
    config: ModelConfig,
) -> None:
    torch.manual_seed(0)
    for name, p in Transformer(config).named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        std = config.init_std / 2 if residual else config.init_std  # sqrt(2 * 2 layers) = 2
        # of 2,048 draws or more: a standard error of 1.6 %
        assert p.std().item() == pytest.approx(std, rel=0.05), name


@families
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_weight_decay_touches_every_matrix_positions_too_but_no_bias_and_no_norm(
    config: ModelConfig, optimizer: str
) -> None:
    model = Transformer(config)
    groups = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    by_name = {name: decay[id(p)] for name, p in model.named_parameters()}
    exempt = {name for name in by_name if name.endswith("bias") or "norm" in name}
    assert by_name == {name: 0.0 if name in exempt else 0.1 for name in by_name}
    assert ("embed_positions.weight" in by_name) == (config.position == "learned")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_sgd_is_the_momentum_update_written_out_with_decay_on_matrices(fused: bool) -> None:
    model, ids = model_of(FAMILIES["gpt2_mini"]), random_ids()
    by_hand = copy.deepcopy(model)
    momenta = {name: torch.zeros_like(p) for name, p in by_hand.named_parameters()}
    optimizer = build_optimizer(model, optimizer="sgd", fused=fused, **SETTINGS)
    for _ in range(3):
        for each in (model, by_hand):
            each.zero_grad()
            mean_loss(each(ids), ids).backward()
        optimizer.step()
        for name, p in by_hand.named_parameters():
            decay = 0.1 * p.data if p.dim() == 2 else 0
            momenta[name] = 0.9 * momenta[name] + p.grad + decay
            p.data -= 0.01 * momenta[name]
    for name, p in model.named_parameters():
        assert relative_error(p, by_hand.get_parameter(name)) < ROUNDING, name
