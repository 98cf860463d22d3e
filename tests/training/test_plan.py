"""The plan of a run: its table, its estimates, and the reasons for its choices."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from model import Transformer
from pocketlm.config.loading import config_from_dict
from pocketlm.config.sections import DataConfig
from pocketlm.corpus.chunks import is_validation
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.hardware import devices
from pocketlm.hardware.devices import Hardware
from pocketlm.hardware.memory import Room
from pocketlm.model import kernels
from pocketlm.training import plan
from tests.support.training import TINY


def printed_plan(capsys, *options: str) -> str:
    """Return the plan of a dry run, its words one space apart."""
    assert train.main(["--config", "config.yaml", *TINY, *options, "--dry-run"]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "rate, choice, reason",
    [
        (1e5, "on", r"saves about \d+ minutes; takes up to \d+ s first"),
        (1e15, "off", r"it would save about 0 s of this run and take up to \d+"),
    ],
    ids=["a long run", "a short run"],
)
def test_the_plan_says_whether_the_step_is_compiled_and_why(
    folder, monkeypatch, capsys, rate, choice, reason
):
    """By default, on a CPU: if the run would take long."""
    monkeypatch.setattr(plan, "matmul_rate", lambda *_: rate)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    shown = printed_plan(capsys, "model.mlp=gelu")  # training.c computes SwiGLU
    assert re.search(f"compile {choice}: {reason}", shown)


@pytest.mark.parametrize("missing, told", [(0, False), (1, True)])
def test_memory_that_is_not_free_is_told_without_what_the_process_has(monkeypatch, missing, told):
    config = config_from_dict({"model": {"vocab_size": 256}, "training": {"micro_batch_size": 1}})
    needed = plan.estimate_memory(config, "cpu", "32-true").total
    room = Room(10**15, needed - missing, "this machine has")
    monkeypatch.setattr(plan, "available_memory", lambda _: room)
    row = plan.memory_row(config, Hardware("cpu", "32-true", False, {}))
    assert ("are free now" in row) == told


def test_the_plan_tells_of_characters_left_out_and_of_documents_that_do_not_fit(folder, capsys):
    """The rare characters are digits; a row of 16 holds no line with two-digit numbers."""
    shown = printed_plan(
        capsys,
        "data.tokenizer=char:12",
        "data.separator=line",
        "data.packing=padded",
        "data.val_share=0.1",
    )
    lines = [
        line for line in Path("text.txt").read_text().splitlines() if not is_validation(line, 0.1)
    ]
    different = len(set("".join(lines)))
    assert (
        f"the training text has {different} different characters; char:12 keeps the 10 most "
        f"common, and the other {different - 10}"
    ) in shown
    too_long = sum(len(line) + 1 > 16 for line in lines)
    assert (
        f"{too_long} of {len(lines)} do not fit a row of 16 tokens: each is cut off there" in shown
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("devices, accumulated", [(1, 1), (1, 3), (2, 2)])
def test_the_seconds_outside_the_head_are_those_of_the_operations_that_a_step_does_there(
    monkeypatch, tie_embeddings, devices, accumulated
):
    """Torch counts the operations of a pass over all but the head.

    They are the weights' matmuls, and the half of attention's that is not future. Devices share
    the rows, and each reaches half of the measured rate of a single matmul.
    """
    sections = {
        "model": {"n_layers": 3, "d_model": 48, "tie_embeddings": tie_embeddings},
        "training": {
            "seq_len": 20,
            "micro_batch_size": 5,
            "grad_accum_steps": accumulated,
            "max_steps": 7,
        },
        "hardware": {"devices": devices},
    }
    config = config_from_dict(sections).with_vocab_size(1000)
    monkeypatch.setattr(kernels, "load", lambda: None)  # torch cannot count what training.c does
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Transformer(config.model).hidden(torch.zeros(5, 20, dtype=torch.long)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    matmuls, of_all_pairs = counts.pop(torch.ops.aten.mm), counts.pop(torch.ops.aten.bmm)
    assert not counts
    measured = []

    def matmul_rate(accelerator: str, precision: str) -> float:
        measured.append((accelerator, precision))
        return 1e9

    monkeypatch.setattr(plan, "matmul_rate", matmul_rate)
    seconds = plan.compilable_seconds(config, Hardware("cpu", "bf16-mixed", False, {}))
    assert measured == [("cpu", "bf16-mixed")]
    operations = 7 * accumulated / devices * (matmuls + of_all_pairs / 2)
    assert seconds == pytest.approx(operations / 0.5e9, rel=1e-12)


def test_the_plan_states_counts_and_reasons(folder):
    data = prepare(DataConfig(path="text.txt", tokenizer="byte", val_share=0.1))
    config = config_from_dict({"data": {"tokenizer": "byte"}, "training": {"max_steps": 600}})
    config = config.with_vocab_size(257)
    reasons = {"accelerator": "why-a", "precision": "why-p", "compile": "why-c"}
    table = plan.plan(config, data, Hardware("cpu", "32-true", False, reasons))
    text = " ".join(str(cell) for column in table.columns for cell in column.cells)
    counts = [f"{config.model.n_parameters:,}"]
    counts.append(f"{data.train.n_tokens:,} and {data.val.n_tokens:,}")
    for part in (*counts, *reasons.values(), "GB", "minutes"):
        assert part in text


# ---- several devices, and cards that are not here ----


def test_a_dry_run_compares_the_strategies_and_counts_days_and_cost(folder, capsys):
    """12 steps of 128 tokens at 64 tokens/s on each of two devices: 12 s, at 3,600 an hour 24."""
    options = ["hardware.devices=2", "--rate", "64", "--price", "3600"]
    shown = printed_plan(capsys, *options)
    assert "one device ddp on 2 fsdp on 2" in shown
    assert "64 tokens/s on one (given)" in shown and "1,536 tokens in all" in shown
    assert "tokens/s in all 64 128 128" in shown
    days = " ".join(f"{seconds / 86_400:.3g}" for seconds in (24, 12, 12))
    assert f"days {days} cost 24 24 24" in shown


def test_a_card_is_planned_for_without_the_data(folder, capsys):
    Path("text.txt").unlink()
    shown = printed_plan(capsys, "--card", "A100", "data.tokenizer=gpt2", "hardware.devices=4")
    assert "4 x A100, 80.0 GB each" in shown and "assumed: 40% of 312 TFLOP/s" in shown
    assert not list(Path().glob("checkpoints")) and not list(Path().glob("data"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--card", "A100"], "--card is for planning; add --dry-run"),
        (["--rate", "5"], "--rate is for planning; add --dry-run"),
        (["--dry-run", "--card", "H9", "data.tokenizer=gpt2"], "--card H9: the cards are H200, "),
        (["--dry-run", "--price", "-1"], "--price is -1; it must be above 0 and finite"),
        (["--dry-run", "--rate", "nan"], "--rate is nan; it must be above 0 and finite"),
        (["--dry-run", "--card", "L4"], "the tokenizer 'byte' does not tell the size"),
        (["--dry-run", "--card", "L4", "training.max_epochs=1"], "set training.max_steps instead"),
        (
            ["--dry-run", "--card", "L4", "training.micro_batch_size=auto"],
            "set training.micro_batch_size to a number",
        ),
        (
            ["--dry-run", "--card", "L4", "model.vocab_size=9", "hardware.devices=3"],
            "which 3 devices",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(folder, options, message):
    with pytest.raises(UserError) as raised:
        train.main(["--config", "config.yaml", *TINY, *options])
    assert message in str(raised.value)
