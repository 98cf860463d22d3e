"""Integer weights against torch's own quantiser, worked examples, and the unpacked matrices."""

import pytest
import torch
from torch import Tensor

from model import Transformer
from pocketlm.errors import UserError
from pocketlm.inference.backend import SlotCache, TorchBackend
from pocketlm.inference.native import NativeBackend
from pocketlm.model.quantization import (
    PACKED_MATMUL_MAX_ROWS,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    as_linear,
    pack_int4,
    quantize,
    quantize_int4,
    quantize_int8,
    unpack_int4,
    weight_bytes,
)
from tests.support.checkpoints import confident_model

WIDE = dict(d_model=64, d_ff=128, n_heads=4)


def random_matrix(rows: int = 24, columns: int = 128) -> Tensor:
    """Return a random matrix whose rows differ in size by up to 10,000."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-3, 1, rows)[:, None]
    return torch.randn(rows, columns, generator=generator) * sizes


# ---- numbers ----


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_int8_equals_torchs_quantiser_by_channel():
    weight = random_matrix()
    ours, scale = quantize_int8(weight)
    zero_points = torch.zeros(24, dtype=torch.long)
    theirs = torch.quantize_per_channel(weight, scale.double(), zero_points, 0, torch.qint8)
    assert torch.equal(ours, theirs.int_repr())
    assert ours.abs().amax(1).tolist() == [127] * 24


def test_an_int8_number_is_at_most_half_a_step_away():
    weight = random_matrix()
    ours, scale = quantize_int8(weight)
    assert ((ours * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize("layer", [Int8Linear, Int4Linear])
def test_a_matrix_of_zeros_stays_one(layer):
    assert torch.equal(layer(as_linear(torch.zeros(4, 64))).matrix(), torch.zeros(4, 64))


def test_a_word_holds_four_numbers_sixteen_positions_apart():
    """The worked example: 1, 2, 3 and 15 at positions 5, 21, 37 and 53 are 0xf321 in word 5."""
    numbers = torch.zeros(1, 64, dtype=torch.int)
    numbers[0, [5, 21, 37, 53]] = torch.tensor([1, 2, 3, 15], dtype=torch.int)
    words = pack_int4(numbers)
    assert words.shape == (1, 16)
    assert [word & 0xFFFF for word in words[0].tolist()] == [0] * 5 + [0xF321] + [0] * 10


def test_packing_is_undone_by_unpacking():
    numbers = torch.randint(16, (7, 320), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(numbers)).long(), numbers)


def test_an_int4_number_is_at_most_half_a_step_away():
    """Rounding the minimum and the scale to bfloat16 adds to the half step.

    The minimum has 8 bits and is up to 16 steps from 0 here; the scale counts 15 times.
    """
    weight = random_matrix()
    step = quantize_int4(weight)[1][..., 0].float().repeat_interleave(32, dim=1)
    assert ((Int4Linear(as_linear(weight)).matrix() - weight).abs() <= 0.65 * step).all()


# ---- layers and models ----

GPT2 = dict(mlp="gelu", position="learned", norm="layernorm", bias=True, d_ff=100)
MODELS = {
    "llama": WIDE,
    "biases and a head": WIDE | dict(bias=True, tie_embeddings=False),
    "gpt2": WIDE | GPT2,
}


@torch.no_grad()
def unquantized(quantized: Transformer, **sizes) -> Transformer:
    """Return a model in floating point whose weights are the matrices of a quantised one."""
    model = confident_model(**sizes)
    for name, module in model.named_modules():
        layer = None if name == "lm_head" else quantized.get_submodule(name)
        if isinstance(layer, QuantizedLinear):
            module.weight.copy_(layer.matrix())
    model.embed_tokens.weight.copy_(quantized.embed_tokens(torch.arange(61)))
    if model.lm_head is not None:
        model.lm_head.weight.copy_(quantized.lm_head.matrix())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_decoding_with_integers_equals_decoding_with_the_unpacked_matrices(sizes, kind, dtype):
    """In C and in torch. A d_ff of 100 becomes int8 under int4."""
    model = quantize(confident_model(**sizes), kind)
    exact = unquantized(model, **sizes)
    model.to(dtype)
    ids = torch.randint(61, (6, 24), generator=torch.Generator().manual_seed(1))
    # float32: activations have 16 bits, 2^-16 of the largest of a row. bfloat16: about ten
    # roundings by 2^-9.
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    with torch.inference_mode():
        expected = exact(ids)
        for backend in (NativeBackend(model), TorchBackend(model)):
            cache = SlotCache(model.config, 6, 30, dtype=dtype, device=model.device)
            steps = [backend.decode(cache, ids[:, t].tolist()).float() for t in range(24)]
            difference = torch.stack(steps, dim=1) - expected
            error = difference.square().mean().sqrt() / expected.std()
            assert error < tolerance, backend.name


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_logits_of_a_row_are_the_same_to_the_last_bit_whatever_the_batch(kind):
    model = quantize(confident_model(d_model=192, d_ff=320, n_heads=6), kind)
    backend = NativeBackend(model)
    ids = torch.randint(61, (11, 9), generator=torch.Generator().manual_seed(1))

    def logits_of(rows: int) -> Tensor:
        cache = SlotCache(model.config, rows, 16, dtype=torch.float32, device=model.device)
        return torch.stack([backend.decode(cache, ids[:rows, t].tolist()) for t in range(9)], dim=1)

    together = logits_of(11)
    for rows in range(1, 11):
        assert torch.equal(logits_of(rows), together[:rows])


@pytest.mark.parametrize("width", [4096, 4112, 8200])
def test_sums_of_many_large_integers_do_not_overflow(width):
    """All weights and all activations at their largest: every product is 127 * 32767."""
    sizes = dict(n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, d_ff=64, vocab_size=5)
    sizes["final_norm"] = False
    model = confident_model(d_model=width, position="learned", **sizes)
    with torch.no_grad():
        for p in model.layers.parameters():
            p.zero_()
        model.embed_positions.weight.zero_()
        model.embed_tokens.weight.fill_(1.0)
    quantize(model, "int8")
    cache = SlotCache(model.config, 1, 4, dtype=torch.float32, device=model.device)
    logits = NativeBackend(model).decode(cache, [1])
    assert logits[0].tolist() == pytest.approx([width] * 5, rel=1e-5)


def test_moving_a_quantised_model_leaves_its_integers_and_scales_alone():
    model = quantize(confident_model(**WIDE), "int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    model.to(torch.float32)
    for name, tensor in model.state_dict().items():
        assert "norm" in name or torch.equal(tensor, before[name])


def test_a_tied_head_is_one_matrix():
    """A byte per weight; scales and norms add less than a fifth."""
    model = quantize(confident_model(**WIDE), "int8")
    assert model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()
    matrices = sum(p.numel() for p in confident_model(**WIDE).parameters() if p.dim() == 2)
    assert matrices < weight_bytes(model) < 1.2 * matrices


def test_int4_of_a_model_without_a_width_for_it_is_refused():
    message = "int4 needs widths that 64 divides, and this model's are 32 and 96; use int8"
    with pytest.raises(UserError, match=message):
        quantize(confident_model(d_model=32, d_ff=96), "int4")


@pytest.mark.parametrize("width", [32, 48, 100, 576])
@pytest.mark.parametrize("outputs", [1, 61, 64])
def test_few_rows_by_torchs_packed_matmul_equal_many_by_the_matrix(width, outputs):
    """torch 2.13's `_weight_int8pack_mm` reads past the end of rows whose width 32 does not divide.

    It may crash there.
    """
    linear = Int8Linear(as_linear(random_matrix(outputs, width))).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(PACKED_MATMUL_MAX_ROWS + 1, width, generator=generator).bfloat16()
    few, many = linear(x[:3]).float(), linear(x)[:3].float()
    # weights and sums are rounded to bfloat16, by 2^-9 each
    assert ((few - many).abs() <= 0.02 * many.abs().amax(0)).all()
