"""The model by itself: its config, its first weights, its training, its rotary positions."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model import ModelConfig, Transformer, rotate
from pocketlm.model.rope import RopeScaling, rope_tables
from tests.support.models import TINY, T, gradients, mean_loss, random_ids, random_model

# ---- config ----

SIZES = [
    dict(tie_embeddings=True),
    dict(tie_embeddings=False),
    dict(n_kv_heads=1, tie_embeddings=False),
    dict(n_kv_heads=None, n_layers=3),
    dict(d_ff=100, d_model=48, n_heads=2, n_kv_heads=2),
    dict(head_dim=6, d_model=30, qk_norm=True, attention_bias="qkv"),
    dict(n_layers=3, value_residual=True),
    dict(n_layers=3, embedding_shortcut=True, token_shift=True),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_n_parameters_is_the_real_count(sizes: dict[str, Any]) -> None:
    config = ModelConfig(**TINY | sizes)
    assert config.n_parameters == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("d_model, d_ff", [(24, 64), (32, 128), (256, 704), (768, 2048)])
def test_d_ff_is_eight_thirds_of_d_model_rounded_up_to_64(d_model: int, d_ff: int) -> None:
    assert ModelConfig(d_model=d_model, n_heads=4).d_ff == d_ff


INVALID = [
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
    (dict(head_dim=0), "head_dim is 0;"),
    (dict(head_dim=7), "head_dim is 7;"),
    (dict(position="learned", rope_scaling=RopeScaling("linear", 2.0)), "rope_scaling scales RoPE"),
    (dict(rope_theta=1.0, rope_scaling=RopeScaling("yarn", 2.0, 8)), "rope_theta is 1.0; yarn"),
    (dict(dropout=1.0), "dropout is 1.0;"),
    (dict(dropout=-0.1), "dropout is -0.1;"),
    (dict(rope_theta=0.0), "rope_theta is 0.0;"),
    (dict(norm_eps=-1e-5), "norm_eps is -1e-05;"),
]


@pytest.mark.parametrize("sizes, message", INVALID, ids=str)
def test_a_size_that_does_not_fit_is_refused_by_name_and_value(
    sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**sizes)


# ---- first weights ----


def test_matrices_begin_with_a_spread_of_002_smaller_on_the_residual_stream_and_gains_at_one() -> (
    None
):
    torch.manual_seed(0)
    sizes = dict(vocab_size=256, max_seq_len=T, n_layers=8, d_model=64, tie_embeddings=False)
    for name, p in Transformer(ModelConfig(**sizes)).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        std = 0.02 / 4 if residual else 0.02  # sqrt(2 * 8 layers) = 4
        # of 4,096 draws or more: a standard error of 1.1 %
        assert p.std().item() == pytest.approx(std, rel=0.05), name
        assert abs(p.mean().item()) < 0.1 * std, name


def test_the_initial_loss_is_that_of_a_uniform_guess() -> None:
    """Up to 0.1 nats.

    Logits with a standard deviation of 0.02 * sqrt(256) add 0.05; a tied head, which favours the
    token just read, adds less than that.
    """
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=4096, max_seq_len=64))
    ids = random_ids(batch=4, length=64, vocab_size=4096)
    with torch.no_grad():
        loss = mean_loss(model(ids), ids)
    assert abs(loss - math.log(4096)) < 0.1


# ---- training ----


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing_runs_each_block_twice_and_changes_no_gradient(
    dropout: float,
) -> None:
    ids, results, calls = random_ids(), [], []
    for checkpointing in (False, True):
        model = random_model(dropout=dropout, gradient_checkpointing=checkpointing).train()
        blocks: list[int] = []
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda *_, i=i, blocks=blocks: blocks.append(i))
        torch.manual_seed(2)  # the same dropout in both
        mean_loss(model(ids), ids).backward()
        results.append(gradients(model))
        calls.append(blocks)
    assert calls == [[0, 1], [0, 1, 1, 0]]
    plain, recomputed = results
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    ids = random_ids()
    with_dropout, without = random_model(dropout=0.5), random_model(dropout=0.0)
    assert torch.equal(with_dropout.eval()(ids), without.eval()(ids))
    assert not torch.equal(with_dropout.train()(ids), with_dropout(ids))


@pytest.mark.parametrize("sizes", [{}, {"mlp": "gelu"}], ids=["in C", "in torch"])
def test_a_model_whose_dropout_is_set_to_0_draws_no_masks(sizes: dict[str, Any]) -> None:
    ids = random_ids()
    model, without = random_model(dropout=0.5, **sizes), random_model(dropout=0.0, **sizes)
    model.train().set_dropout(0.0)
    assert torch.equal(model(ids), without.train()(ids))
    model.set_dropout(0.5)
    assert not torch.equal(model(ids), model(ids))


@torch.no_grad()
def test_the_values_of_later_blocks_are_mixed_with_those_of_the_first() -> None:
    """Where v_proj of both blocks reads the same input, the mix is one of their weights.

    The first block adds nothing to the stream here, and the norms of both blocks are the same.
    """
    model, ids = random_model(value_residual=True, dropout=0.0).eval(), random_ids()
    first, second = model.layers
    for projection in (first.self_attn.o_proj, first.mlp.down_proj):
        projection.weight.zero_()
    second.input_layernorm.weight.copy_(first.input_layernorm.weight)
    plain = Transformer(ModelConfig(**TINY)).eval()
    plain.load_state_dict(
        {name: p for name, p in model.state_dict().items() if not name.endswith("value_mix")}
    )
    own, of_first = second.self_attn.value_mix.tolist()
    weight = plain.layers[1].self_attn.v_proj.weight
    weight.mul_(own).add_(plain.layers[0].self_attn.v_proj.weight, alpha=of_first)
    assert first.self_attn.value_mix is None
    assert (model(ids) - plain(ids)).abs().max() < 1e-4  # float32, at logits of 10


def entering(model: Transformer, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Return what enters the attention's norm of a block."""
    found: list[torch.Tensor] = []
    norm = model.layers[layer].input_layernorm
    hook = norm.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0]))
    model(ids)
    hook.remove()
    return found[-1]


@torch.no_grad()
def test_a_token_gets_the_embedding_of_the_token_before_it_times_the_gain() -> None:
    model, ids = random_model(token_shift=True).eval(), random_ids()
    expected = model.embed_tokens.weight[ids]
    expected[:, 1:] += model.shift_gain * model.embed_tokens.weight[ids[:, :-1]]
    torch.testing.assert_close(entering(model, ids, 0), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_later_block_reads_the_embeddings_beside_its_input() -> None:
    model, ids = random_model(embedding_shortcut=True).eval(), random_ids()
    assert model.layers[0].input_mix is None
    own, of_embeddings = model.layers[1].input_mix.tolist()
    mixed = entering(model, ids, 1)
    model.layers[1].input_mix.copy_(torch.tensor([1.0, 0.0]))  # as it begins
    expected = own * entering(model, ids, 1) + of_embeddings * model.embed_tokens.weight[ids]
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_new_model_that_shifts_and_mixes_computes_what_one_without_does() -> None:
    torch.manual_seed(0)
    plain = Transformer(ModelConfig(**TINY)).eval()
    mixed = Transformer(ModelConfig(**TINY, embedding_shortcut=True, token_shift=True)).eval()
    new = {"shift_gain": mixed.shift_gain, "layers.1.input_mix": mixed.layers[1].input_mix}
    mixed.load_state_dict(plain.state_dict() | new)
    assert torch.equal(plain(random_ids()), mixed(random_ids()))


def test_one_batch_is_learnt_by_heart() -> None:
    torch.manual_seed(0)
    model, ids = Transformer(ModelConfig(**TINY)), random_ids(batch=2)
    assert ids[0, 0] != ids[1, 0]  # so the first token determines the row
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = mean_loss(model(ids), ids)
        loss.backward()
        optimizer.step()
    assert loss < 0.05


# ---- rotary positions ----


@pytest.mark.parametrize("rope_theta", [1e4, 1e6])
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
    """For 20 pairs of positions, at distances from 0 to 10."""
    cos, sin = rope_tables(16, 128, 1e4)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    q_positions, k_positions = torch.arange(20) // 2, torch.arange(20)

    def products(offset: int) -> torch.Tensor:
        m, n = (q_positions + offset)[:, None], (k_positions + offset)[:, None]
        return (rotate(q, cos[m], sin[m]) * rotate(k, cos[n], sin[n])).sum(-1).flatten()

    assert products(0).std() > 0.1  # distance matters
    # float64's rounding of angles up to 128
    assert (products(shift) - products(0)).abs().max() < 1e-12


@torch.no_grad()
def test_shifting_every_position_changes_no_logit() -> None:
    model, ids = random_model(max_seq_len=4 * T).eval(), random_ids()
    positions = torch.arange(T).expand(2, T)
    assert torch.equal(model(ids, positions=positions), model(ids))
    shifted = model(ids, positions=positions + 2 * T)
    # float32 angles up to 3 T = 39 radians
    assert (shifted - model(ids)).abs().max() < 1e-4
