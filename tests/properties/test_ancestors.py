"""The older relatives of the Llama style (GPT-2, microgpt, nn.zig, randyGPT), each against something independent of this kit.

GPT-2 against Hugging Face's, in logits, loss, every gradient and ten steps. The others against their published graphs, written
out here in plain tensor operations, in logits and every gradient. And what all of them share: cache, packing, first parameters.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, ModelConfig, Transformer
from pocketlm.config.loading import load_config
from pocketlm.optim import build_optimizer, clip_gradients, lr_at_step
from tests.support.gpt2 import Weights, gpt2_pair, in_our_names, model_of, preset
from tests.support.models import (
    FLOAT32,
    FLOAT64,
    PACKED,
    Precision,
    T,
    mean_loss,
    random_ids,
    relative_error,
)

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
ROUNDING = 1e-12  # relative: 1,000 roundings of 1e-16, all in one direction, are 1e-13; what is left in float32 shows at 1e-7


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """New tensors, and so models, are float64 where a test does not say otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gradients(model: torch.nn.Module) -> Weights:
    return {name: p.grad for name, p in model.named_parameters()}


def their_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean nats a token; transformers' own loss passes through float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


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
    loss, expected_loss = mean_loss(logits, ids), their_loss(their_logits, ids)
    loss.backward()
    expected_loss.backward()
    assert relative_error(logits, their_logits) < precision.logits
    assert relative_error(loss, expected_loss) < precision.loss
    expected, errors = in_our_names(gradients(theirs)), {}
    assert gradients(ours).keys() == expected.keys()
    for name, gradient in gradients(ours).items():
        # A bias of the keys shifts all scores of a query alike, which softmax undoes: its gradient is 0 but for rounding
        unit = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
        errors[name] = ((gradient - expected[name]).norm() / unit).item()
    assert max(errors.values()) < precision.gradients, errors


CLIP = 1.7  # with these models the gradient's norm falls from 3 to 1.5 in ten steps


def ten_steps(
    loss_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    clip: Callable[[], Tensor],
) -> list[Tensor]:
    """Losses and gradient norms before each of ten steps, on two batches in turn."""
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
    torch.set_default_dtype(precision.dtype)
    ours, theirs = gpt2_pair(n_layers, n_heads)
    params = list(theirs.parameters())
    groups = [
        dict(params=[p for p in params if p.dim() == 2]),
        dict(params=[p for p in params if p.dim() == 1], weight_decay=0.0),
    ]
    adamw, clip = torch.optim.AdamW(groups, **SETTINGS), torch.nn.utils.clip_grad_norm_
    expected, norms = ten_steps(
        lambda ids: their_loss(theirs(ids).logits, ids), adamw, lambda: clip(params, CLIP)
    )
    assert (
        expected[-1] < expected[1] - 1 and norms.min() < CLIP < norms.max()
    )  # the steps matter, and so does the clip
    adamw = build_optimizer(ours, optimizer="adamw", fused=False, **SETTINGS)
    losses, _ = ten_steps(
        lambda ids: mean_loss(ours(ids), ids),
        adamw,
        lambda: clip_gradients(ours.parameters(), CLIP),
    )
    assert (losses - expected).abs().max() < precision.ten_losses


# ---- microgpt, nn.zig, randyGPT: their graphs written out, each from the tokens of one row to their logits ----


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def of_layer(w: Weights, layer: int) -> Weights:
    return {
        name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): p for name, p in w.items()
    }


def microgpt(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    """A token at a time: every layer appends the token's key and value to its lists and looks back over them."""
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
                shares = torch.stack(
                    [q[part].dot(k[part]) / config.head_dim**0.5 for k in keys[layer]]
                ).softmax(0)
                heads.append(
                    sum(share * v[part] for share, v in zip(shares, values[layer], strict=True))
                )
            x = x + p["self_attn.o_proj"] @ torch.cat(heads)
            x = x + p["mlp.down_proj"] @ (p["mlp.up_proj"] @ rms(x)).clamp(min=0)
        logits.append(w["lm_head.weight"] @ x)
    return torch.stack(logits)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, of (..., T, D) each."""
    scores = q @ k.mT / math.sqrt(q.size(-1))
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def turn(x: Tensor) -> Tensor:
    """RoPE of (T, D) by complex numbers: x[i] + x[i + D/2] j, turned by the angle t / 10000^(2i/D)."""
    half = x.size(-1) // 2
    frequencies = (
        1 / 10_000 ** (torch.arange(half, dtype=torch.float32) / half)
    ).double()  # the model rounds them to float32 too
    angles = torch.arange(x.size(0))[:, None] * frequencies
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def nnzig(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    x = w["embed_tokens.weight"][ids]
    for p in (of_layer(w, 0), of_layer(w, 1)):
        h = rms(x) * p["input_layernorm"]
        q, k, v = (h @ p[f"self_attn.{part}_proj"].T for part in "qkv")
        x = x + attention(turn(q), turn(k), v) @ p["self_attn.o_proj"].T
        h = rms(x) * p["post_attention_layernorm"]
        gate = h @ p["mlp.gate_proj"].T
        x = x + (gate * gate.sigmoid() * (h @ p["mlp.up_proj"].T)) @ p["mlp.down_proj"].T
    return (rms(x) * w["norm.weight"]) @ w["lm_head.weight"].T


def randygpt(w: Weights, config: ModelConfig, ids: Tensor) -> Tensor:
    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][: len(ids)]
    for layer in range(config.n_layers):
        p = of_layer(w, layer)
        q, k, v = (
            (rms(x) @ p[f"self_attn.{part}_proj"].T).split(config.d_model // config.n_heads, dim=-1)
            for part in "qkv"
        )
        x = (
            x
            + torch.cat([attention(*head) for head in zip(q, k, v, strict=True)], dim=-1)
            @ p["self_attn.o_proj"].T
        )
        x = x + (rms(x) @ p["mlp.up_proj"].T).clamp(min=0) ** 2 @ p["mlp.down_proj"].T
    return x @ w["lm_head.weight"].T


Graph = Callable[[Weights, ModelConfig, Tensor], Tensor]
GRAPHS = [
    (microgpt, preset("microgpt", 27)),
    (microgpt, preset("microgpt", 27, "model.n_layers=3")),
]
GRAPHS += [(nnzig, preset("nnzig", 256)), (randygpt, preset("randygpt_small", 67))]


@pytest.mark.parametrize("graph, config", GRAPHS)
def test_a_presets_model_is_its_ancestors_graph_in_logits_and_every_gradient(
    graph: Graph, config: ModelConfig
) -> None:
    model, ids = (
        model_of(config),
        random_ids(length=config.max_seq_len, vocab_size=config.vocab_size),
    )
    weights = {name: p.clone().requires_grad_() for name, p in model.state_dict().items()}
    logits, expected = model(ids), torch.stack([graph(weights, config, row) for row in ids])
    mean_loss(logits, ids).backward()
    their_loss(expected, ids).backward()
    errors = {
        name: relative_error(gradient, weights[name].grad)
        for name, gradient in gradients(model).items()
    }
    errors["logits of the worst position"] = (
        ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    )
    assert max(errors.values()) < ROUNDING, errors


def test_every_tensors_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences of 24 numbers in each of microgpt's 9 tensors: 216 of the 4,192."""
    config = preset("microgpt", 27)
    model, ids = model_of(config), random_ids(length=config.max_seq_len, vocab_size=27)
    mean_loss(model(ids), ids).backward()
    step = 1e-6  # so small that no ReLU passes its kink on the way
    slopes, expected = [], []
    for p in model.parameters():
        for i in torch.randperm(p.numel())[:24].tolist():
            losses, numbers, middle = [], p.data.view(-1), p.data.view(-1)[i].item()
            for place in (middle - step, middle + step, middle):
                numbers[i] = place
                losses.append(mean_loss(model(ids), ids).item())
            slopes.append((losses[1] - losses[0]) / (2 * step))
            expected.append(p.grad.view(-1)[i].item())
    slopes, expected = torch.tensor(slopes), torch.tensor(expected)
    assert len(slopes) == 216 and expected.abs().mean() > 1e-3
    # A loss of 4 nats is rounded by 1e-15 or so, which 2e-6 divides: some 1e-9. The step's own error, its square, is 1e-12
    assert (slopes - expected).abs().max() < 1e-8


COUNTS = [
    (preset("nnzig", 256), 590_464),
    (preset("microgpt", 27), 4_192),
    (preset("microgpt", 58), 5_184),
]
RANDYGPT = {"tiny": 16_832, "small": 811_776, "medium": 4_769_280, "large": 37_850_112}
COUNTS += [(preset(f"randygpt_{size}", 67), count) for size, count in RANDYGPT.items()]
GPT2_VARIANT = dict(mlp="gelu", position="learned", norm="layernorm", bias=True, n_kv_heads=None)
GPT2_124M = ModelConfig(
    **GPT2_VARIANT, vocab_size=50_257, max_seq_len=1024, n_layers=12, d_model=768, n_heads=12
)
COUNTS += [(GPT2_124M, 124_439_808), (preset("gpt2_124m", 50_257), 124_439_808)]


@pytest.mark.parametrize("config, count", COUNTS)
def test_the_number_of_parameters_is_the_ancestors(config: ModelConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(config).parameters()) == count
    assert config.n_parameters == count


# ---- what every family keeps to ----

KEYS = ["model.n_layers=2", "model.d_model=64", "model.d_ff=null", "training.seq_len=64"]
FAMILIES = {
    name: preset(name, 61, *KEYS) for name in ("microgpt", "nnzig", "randygpt_small", "gpt2_mini")
}
FAMILIES |= {"llama": ModelConfig(vocab_size=61, max_seq_len=64, n_layers=2, d_model=64)}
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
def test_first_matrices_spread_by_init_std_and_less_on_the_residual_stream_gains_are_one_biases_zero(
    config: ModelConfig,
) -> None:
    torch.manual_seed(0)
    for name, p in Transformer(config).named_parameters():
        if p.dim() == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            expected = (
                config.init_std / 2 if "o_proj" in name or "down_proj" in name else config.init_std
            )  # sqrt(2 * 2 layers) = 2
            assert p.std().item() == pytest.approx(expected, rel=0.05), (
                name
            )  # of 2,048 draws or more: 1.6 % standard error


@families
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_weight_decay_touches_every_matrix_positions_too_but_no_bias_and_no_norm(
    config: ModelConfig, optimizer: str
) -> None:
    model = Transformer(config)
    groups = build_optimizer(model, optimizer=optimizer, fused=False, **SETTINGS).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(p)] for name, p in model.named_parameters()}
    spared = {name for name in found if name.endswith("bias") or "norm" in name}
    assert found == {name: 0.0 if name in spared else 0.1 for name in found}
    assert ("embed_positions.weight" in found) == (config.position == "learned")


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
            momenta[name] = 0.9 * momenta[name] + p.grad + (0.1 * p.data if p.dim() == 2 else 0)
            p.data -= 0.01 * momenta[name]
    errors = {
        name: relative_error(p, by_hand.get_parameter(name)) for name, p in model.named_parameters()
    }
    assert max(errors.values()) < ROUNDING, errors


# ---- the systems' own settings ----

MICROGPT = {
    "model": dict(n_layers=1, d_model=16, n_heads=4, n_kv_heads=4, d_ff=64, init_std=0.08),
    "data": dict(tokenizer="seen-bytes", packing="padded"),
    "training": dict(
        seq_len=16,
        micro_batch_size=1,
        max_steps=1000,
        lr=0.01,
        betas=(0.85, 0.99),
        eps=1e-8,
        weight_decay=0.0,
        grad_clip=0.0,
    ),
    "sampling": dict(num_samples=20, temperature=0.5, prompts=("",)),
}
RANDYGPT_TRAINING = dict(micro_batch_size=32, max_steps=1000, val_every_steps=100, seed=1337)
RANDYGPT_SAMPLING = dict(
    prompts=("ROMEO:", "To be or not to be", "Once upon a time"),
    max_new_tokens=100,
    temperature=0.8,
    top_p=0.9,
)
STATED = {
    "microgpt": MICROGPT,
    "microgpt_korean": MICROGPT,
    "nnzig": {
        "model": dict(n_layers=2, d_model=128, n_heads=1, d_ff=512, rope_theta=10_000.0, tie_embeddings=False),
        "data": dict(tokenizer="byte", eos=False),
        "training": dict(
            seq_len=64, micro_batch_size=32, max_steps=20_000, lr=6e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, warmup_steps=200,
            min_lr_ratio=0.0, schedule="cosine", grad_clip=1.0,
        ),
        "sampling": dict(max_new_tokens=200, temperature=0.8, prompts=("A: Hello",)),
    },
    "gpt2_124m": {
        "model": dict(n_layers=12, d_model=768, n_heads=12, d_ff=3072, max_seq_len=1024, tie_embeddings=True, init_std=0.02),
        "training": dict(seq_len=64, micro_batch_size=4, max_steps=40),
    },
    "randygpt_tiny": {"model": dict(n_layers=1, d_model=32, n_heads=4, max_seq_len=8), "training": RANDYGPT_TRAINING},
    "randygpt_small": {
        "model": dict(n_layers=4, d_model=128, n_heads=8, d_ff=512, max_seq_len=64),
        "data": dict(tokenizer="char:512", val_share=0.1, optional_path="train.txt"),
        "training": RANDYGPT_TRAINING,
        "sampling": RANDYGPT_SAMPLING,
    },
    "randygpt_medium": {"model": dict(n_layers=6, d_model=256, n_heads=8), "training": RANDYGPT_TRAINING},
    "randygpt_large": {"model": dict(n_layers=12, d_model=512, n_heads=16), "training": RANDYGPT_TRAINING},
    "wikipedia": {
        "model": dict(n_layers=16, d_model=768),
        "data": dict(source="wikimedia/wikipedia", config_name="20231101.en", streaming=True, tokenizer="gpt2"),
        "training": dict(
            seq_len=1024, micro_batch_size=1, grad_accum_steps=64, max_steps=20_000, lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95),
            warmup_steps=400, precision="32-true", seed=42,
        ),
    },
    "shakespeare_char_cpu": {
        "model": dict(n_layers=4, d_model=128, n_heads=4, dropout=0.0),
        "training": dict(seq_len=64, micro_batch_size=12, max_steps=2000, lr=1e-3, min_lr_ratio=0.1, warmup_steps=100, betas=(0.9, 0.99)),
    },
    "shakespeare_char_gpu": {
        "model": dict(n_layers=6, d_model=384, n_heads=6, dropout=0.2),
        "training": dict(seq_len=256, micro_batch_size=64, max_steps=5000, lr=1e-3, min_lr_ratio=0.1, warmup_steps=100, betas=(0.9, 0.99)),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_a_preset_holds_what_its_system_states(name: str) -> None:
    config = load_config(ROOT / f"presets/{name}.yaml")
    for section, stated in STATED[name].items():
        assert stated == {key: getattr(getattr(config, section), key) for key in stated}


def test_microgpts_learning_rate_falls_in_a_straight_line_from_its_first_step() -> None:
    t = load_config(ROOT / "presets/microgpt.yaml").training
    of = dict(
        max_steps=t.max_steps,
        warmup_steps=t.warmup_steps,
        min_lr_ratio=t.min_lr_ratio,
        schedule=t.schedule,
    )
    for step in (0, 1, 500, 999):
        assert t.lr * lr_at_step(step, **of) == pytest.approx(0.01 * (1 - step / 1000), rel=1e-12)
