"""Integer weights against torch's own quantiser and hand-worked words; steps in C against the matrices they stand for."""

import doctest
from pathlib import Path

import pytest
import torch

import evaluate_checkpoints
import infer
import quantize as command
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.inference import placement
from pocketlm.inference.engine import SlotCache, decode_in_torch
from pocketlm.inference.native import NativeStep
from pocketlm.model import quantization
from pocketlm.model.quantization import (
    Int4Linear,
    Int8Linear,
    pack_int4,
    quantize,
    quantize_int4,
    quantize_int8,
    unpack_int4,
)
from tests.support.checkpoints import confident_model
from tests.support.checkpoints import write_checkpoint

WIDE = dict(d_model=64, d_ff=128, n_heads=4)


def random_matrix(rows: int = 24, columns: int = 128) -> torch.Tensor:
    return (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-3, 1, rows)[:, None]
    )


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_int8_equals_torchs_quantiser_by_channel():
    weight = random_matrix()
    ours, scale = quantize_int8(weight)
    theirs = torch.quantize_per_channel(
        weight, scale.double(), torch.zeros(24, dtype=torch.long), 0, torch.qint8
    )
    assert torch.equal(ours, theirs.int_repr())
    assert ours.abs().amax(1).tolist() == [127] * 24


def test_an_int8_number_is_at_most_half_a_step_away():
    weight = random_matrix()
    ours, scale = quantize_int8(weight)
    assert ((ours * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()


def test_a_matrix_of_zeros_stays_one():
    for module in (Int8Linear, Int4Linear):
        assert torch.equal(
            module(quantization.as_linear(torch.zeros(4, 64))).matrix(), torch.zeros(4, 64)
        )


def test_a_word_holds_four_numbers_sixteen_places_apart():
    """The hand-worked one: 1, 2, 3 and 15 at places 5, 21, 37 and 53 are 0xf321 in word 5."""
    numbers = torch.zeros(1, 64, dtype=torch.int)
    numbers[0, [5, 21, 37, 53]] = torch.tensor([1, 2, 3, 15], dtype=torch.int)
    words = pack_int4(numbers)
    assert words.shape == (1, 16)
    assert [word & 0xFFFF for word in words[0].tolist()] == [0] * 5 + [0xF321] + [0] * 10


def test_packing_is_undone_by_unpacking():
    numbers = torch.randint(16, (7, 320), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_int4(pack_int4(numbers)).long(), numbers)


def test_an_int4_number_is_at_most_half_a_step_away():
    weight = random_matrix()
    module = Int4Linear(quantization.as_linear(weight))
    step = quantize_int4(weight)[1][..., 0].float().repeat_interleave(32, dim=1)
    # Half a step; and what rounding the low (8 bits, up to 16 steps from 0 here) and the scale (15 times) to bfloat16 adds
    assert ((module.matrix() - weight).abs() <= 0.65 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("sizes", [
    WIDE, WIDE | dict(bias=True, tie_embeddings=False), WIDE | dict(mlp="gelu", position="learned", norm="layernorm", bias=True, d_ff=100),
], ids=["llama", "biases and a head", "gpt2"])  # fmt: skip
def test_a_step_over_integers_equals_one_over_the_matrices_they_stand_for(sizes, kind, dtype):
    """In C and in torch; the reference is the float model whose weights are the unpacked ones. d_ff 100 is int8 under int4."""
    model = quantize(confident_model(**sizes), kind)
    exact = confident_model(**sizes)
    with torch.no_grad():
        for name, module in exact.named_modules():
            if name != "lm_head" and (
                integers := getattr(model.get_submodule(name), "matrix", None)
            ):
                module.weight.copy_(integers())
        exact.embed_tokens.weight.copy_(model.embed_tokens(torch.arange(61)))
        if exact.lm_head is not None:
            exact.lm_head.weight.copy_(model.lm_head.matrix())
    model.to(dtype)
    ids = torch.randint(61, (6, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = exact(ids)
        for step in (NativeStep(model), decode_in_torch):
            cache = SlotCache(model.config, 6, 30, dtype=dtype, device=model.device)
            logits = torch.stack(
                [step(model, cache, ids[:, t].tolist()).float() for t in range(24)], dim=1
            )
            error = (logits - expected).square().mean().sqrt() / expected.std()
            # float32: the 16 bits of an activation, 2^-16 of the largest of a row. bfloat16: some ten roundings by 2^-9
            assert error < (1e-3 if dtype == torch.float32 else 0.05), step


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_logits_of_a_row_are_the_same_to_the_last_bit_whatever_the_batch(kind):
    model = quantize(confident_model(d_model=192, d_ff=320, n_heads=6), kind)
    step, ids = (
        NativeStep(model),
        torch.randint(61, (11, 9), generator=torch.Generator().manual_seed(1)),
    )

    def logits_of(rows: int) -> torch.Tensor:
        cache = SlotCache(model.config, rows, 16, dtype=torch.float32, device=model.device)
        return torch.stack([step(model, cache, ids[:rows, t].tolist()) for t in range(9)], dim=1)

    together = logits_of(11)
    for rows in range(1, 11):
        assert torch.equal(logits_of(rows), together[:rows])


@pytest.mark.parametrize("width", [4096, 4112, 8200])
def test_sums_of_many_large_integers_do_not_overflow(width):
    """All weights and all activations at their largest: 127 * 32767 in every place."""
    model = confident_model(
        d_model=width,
        n_layers=1,
        n_heads=1,
        d_ff=64,
        n_kv_heads=1,
        vocab_size=5,
        final_norm=False,
        position="learned",
    )
    with torch.no_grad():
        for p in model.layers.parameters():
            p.zero_()
        model.embed_positions.weight.zero_()
        model.embed_tokens.weight.fill_(1.0)
    quantize(model, "int8")
    cache = SlotCache(model.config, 1, 4, dtype=torch.float32, device=model.device)
    assert NativeStep(model)(model, cache, [1])[0].tolist() == pytest.approx([width] * 5, rel=1e-5)


def test_moving_a_quantised_model_leaves_its_integers_and_scales_alone():
    model = quantize(confident_model(**WIDE), "int4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    model.to(torch.float32)
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in model.state_dict().items()
        if "norm" not in name
    )


def test_a_tied_head_is_one_matrix():
    model = quantize(confident_model(**WIDE), "int8")
    assert model.embed_tokens.weight.data_ptr() == model.lm_head.weight.data_ptr()
    matrices = sum(p.numel() for p in confident_model(**WIDE).parameters() if p.dim() == 2)
    assert (
        matrices < quantization.weight_bytes(model) < 1.2 * matrices
    )  # a byte each; scales and norms


def test_the_worked_examples():
    assert doctest.testmod(quantization).failed == 0


def test_int4_of_a_model_without_a_width_for_it_is_refused():
    with pytest.raises(
        UserError,
        match="int4 needs widths that 64 divides, and this model's are 32 and 96; use int8",
    ):
        quantize(confident_model(d_model=32, d_ff=96), "int4")


@pytest.mark.parametrize("width", [32, 48, 100, 576])
@pytest.mark.parametrize("outputs", [1, 61, 64])
def test_few_rows_by_torchs_packed_matmul_equal_many_by_the_matrix(width, outputs):
    """torch 2.13's `_weight_int8pack_mm` reads beyond the end of rows that are no multiple of 32, and may crash there."""
    linear = Int8Linear(quantization.as_linear(random_matrix(outputs, width))).to(torch.bfloat16)
    x = torch.randn(
        quantization.FEW + 1, width, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    few, many = linear(x[:3]).float(), linear(x)[:3].float()
    assert (
        (few - many).abs() <= 0.02 * many.abs().amax(0)
    ).all()  # weights and sums are rounded to bfloat16, by 2^-9 each


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("model.ckpt"))
    Path("text.txt").write_text("hello, hello\n" * 30)
    Path("cases.yaml").write_text(
        "- {id: x, prompt: a, answers: [b], distractors: [c]}\n- {id: y, prompt: b, answers: [c], distractors: [d]}\n"
    )
    return tmp_path


def test_a_quantised_checkpoint_is_read_as_it_was_written(folder, capsys):
    assert command.main(["model.ckpt", "--dtype", "int8", "--to", "small/model.int8.ckpt"]) == 0
    assert "small/model.int8.ckpt: int8, 0.0 MB of weights" in capsys.readouterr().out
    made, loaded = (
        quantize(load_checkpoint("model.ckpt").model, "int8"),
        load_checkpoint("small/model.int8.ckpt"),
    )
    assert loaded.quantized == "int8"
    assert loaded.step == 7
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(made(ids), loaded.model(ids))
    assert (
        read_checkpoint("small/model.int8.ckpt")["state_dict"]["model.lm_head.weight"].dtype
        == torch.int8
    )


def test_infer_and_the_evaluator_read_it_and_write_what_quantising_on_the_way_writes(
    folder, capsys
):
    command.main(["model.ckpt", "--dtype", "int8", "--to", "int8.ckpt"])
    capsys.readouterr()
    texts = []
    for args in (["--ckpt", "int8.ckpt"], ["--ckpt", "model.ckpt", "--dtype", "int8"]):
        assert (
            infer.main(
                [
                    *args,
                    "--prompt",
                    "Hello",
                    "--temperature",
                    "0",
                    "--max-new-tokens",
                    "30",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        said = capsys.readouterr()
        texts.append(said.out)
        assert "step 7, int8 on cpu\n" in said.err
    assert len(texts[0]) > 10
    assert texts[0] == texts[1]
    assert (
        evaluate_checkpoints.main(
            ["--checkpoints", "model.ckpt", "int8.ckpt", "--cases", "cases.yaml"]
        )
        == 0
    )


def test_the_report_has_a_row_for_each_dtype_and_the_first_is_bfloat16(folder, capsys):
    assert (
        command.main(
            [
                "model.ckpt",
                "--report",
                "--dtype",
                "int8",
                "--text",
                "text.txt",
                "--cases",
                "cases.yaml",
            ]
        )
        == 0
    )
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert "model.ckpt: 390 bytes of text, 2 cases" in title
    assert [row.split()[0] for row in rows] == ["bfloat16", "int8"]
    checkpoint = load_checkpoint("model.ckpt")
    placement.place(checkpoint, "cpu", "bfloat16")
    ids = torch.tensor([[256, *("hello, hello\n" * 30).encode()]])
    assert rows[0].split()[2:4] == [rows[0].split()[2], "+0.00%"]
    with (
        torch.inference_mode()
    ):  # one window of the model's context after another; here the first alone
        first = (
            checkpoint.model(ids[:, :64])
            .float()
            .log_softmax(-1)[0]
            .gather(1, ids[0, 1:65, None])
            .mean()
        )
    assert float(rows[0].split()[2].replace(",", "")) == pytest.approx(
        torch.exp(-first).item(), rel=0.5
    )  # text that repeats itself


@pytest.mark.parametrize("args, said", [
    (["model.ckpt"], "nothing to do"),
    (["model.ckpt", "--to", "x.ckpt"], "--to writes one checkpoint"),
    (["model.ckpt", "--to", "text.txt", "--dtype", "int8"], "text.txt is there already"),
    (["int8.ckpt", "--report"], "int8.ckpt is int8 already"),
    (["model.ckpt", "--report", "--characters", "0"], "--characters is 0"),
    (["gone.ckpt", "--report"], "no checkpoint gone.ckpt"),
])  # fmt: skip
def test_a_mistake_is_a_sentence(folder, args, said):
    command.main(["model.ckpt", "--dtype", "int8", "--to", "int8.ckpt"])
    with pytest.raises(UserError, match=said):
        command.main(args)


def test_another_dtype_for_a_quantised_checkpoint_is_refused(folder):
    command.main(["model.ckpt", "--dtype", "int8", "--to", "int8.ckpt"])
    with pytest.raises(
        UserError, match="--dtype bfloat16: int8.ckpt is int8 already; leave --dtype out"
    ):
        placement.place(load_checkpoint("int8.ckpt"), "cpu", "bfloat16")
