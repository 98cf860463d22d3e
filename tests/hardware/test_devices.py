"""Choice of the device, the precision and torch.compile from the hardware section."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from pocketlm import instruction_sets
from pocketlm.config.loading import load_config
from pocketlm.config.sections import HardwareConfig
from pocketlm.errors import UserError
from pocketlm.hardware import devices, measure
from pocketlm.instruction_sets import INSTRUCTION_SETS
from pocketlm.model import kernels
from pocketlm.training import plan


@pytest.fixture
def use_instruction_set(monkeypatch):
    """Make this CPU have the named instruction set, and no newer one."""

    def use(name: str) -> None:
        isa = INSTRUCTION_SETS[name]
        monkeypatch.setattr(instruction_sets, "instruction_set", lambda: isa)
        monkeypatch.setattr(devices, "instruction_set", lambda: isa)

    return use


@pytest.fixture
def machine(monkeypatch, use_instruction_set):
    """Make this machine have the named devices and a CPU without bfloat16."""

    def has(*names: str, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * ("cuda" in names))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: bf16 or including_emulation,
        )
        use_instruction_set("avx2")

    has()
    return has


def choose(precision: str = "auto", **section: str) -> tuple[str, str, bool]:
    config = HardwareConfig(**section)
    chosen = devices.with_compile(
        devices.choose_hardware(config, precision), config.compile, seconds=60
    )
    assert set(chosen.reasons) == {"accelerator", "precision", "compile", "strategy"}
    assert all(chosen.reasons.values())
    return chosen.accelerator, chosen.precision, chosen.compile


def test_auto_prefers_mps_then_cuda_then_cpu(machine):
    machine("mps", "cuda")
    assert choose() == ("mps", "32-true", False)
    machine("cuda")
    assert choose() == ("cuda", "bf16-mixed", True)
    machine()
    assert choose() == ("cpu", "32-true", False)


def test_gpu_means_cuda_even_where_mps_is(machine):
    machine("mps", "cuda")
    assert choose(accelerator="gpu") == choose(accelerator="cuda") == ("cuda", "bf16-mixed", True)


def test_a_gpu_without_bfloat16_gets_float16_with_loss_scaling(machine):
    machine("cuda", bf16=False)  # bfloat16 that is only emulated does not count
    assert choose() == ("cuda", "16-mixed", True)


def test_a_cpu_with_bfloat16_uses_it(machine, use_instruction_set):
    use_instruction_set("avx512_bf16")
    assert choose() == ("cpu", "bf16-mixed", False)
    assert choose("32-true") == ("cpu", "32-true", False)


def test_bfloat16_where_the_cpu_only_emulates_it_is_done_with_a_remark(machine):
    chosen = devices.choose_hardware(HardwareConfig(accelerator="cpu"), "bf16-mixed")
    assert chosen.precision == "bf16-mixed"
    assert "avx2, which does not multiply bfloat16" in chosen.reasons["precision"]


def test_what_is_asked_for_is_done(machine):
    machine("mps", "cuda")
    assert choose("bf16-mixed", accelerator="mps") == ("mps", "bf16-mixed", False)
    assert choose("16-mixed", accelerator="cuda", compile="off") == ("cuda", "16-mixed", False)
    assert choose(accelerator="cpu", compile="on") == ("cpu", "32-true", True)
    assert choose(accelerator="mps", compile="on") == (
        "mps",
        "32-true",
        False,
    )  # and reasons["compile"] says why not


@pytest.mark.parametrize("accelerator", ["cpu", "mps"])
def test_float16_is_refused_off_cuda(machine, accelerator):
    machine("mps")
    with pytest.raises(UserError, match=f"16-mixed.*{accelerator}.*32-true"):
        choose("16-mixed", accelerator=accelerator)


@pytest.mark.parametrize("requested", ["mps", "cuda", "gpu"])
def test_an_accelerator_that_is_not_there_is_refused_by_name(machine, requested):
    with pytest.raises(UserError, match=f"'{requested}'.*cpu"):
        choose(accelerator=requested)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_compile_needs_a_compiler_and_says_so(machine, monkeypatch, tmp_path, accelerator):
    """Inductor compiles C++ on a CPU; Triton compiles the launchers of its kernels in C on CUDA."""
    machine("cuda")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for requested in ("on", "auto"):
        compiles, why = devices.choose_compile(requested, accelerator, seconds=1e6)
        assert not compiles and "compiler" in why
    for name in ("g++", "gcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert devices.choose_compile("on", accelerator, seconds=60) == (True, "as configured")


def test_a_cpu_compiles_where_a_fifth_of_the_time_is_worth_two_compilations(machine):
    assert (
        devices.choose_compile("auto", "cpu", seconds=249)[0] is False
    )  # 49.8 s saved, 25 s spent
    compiles, why = devices.choose_compile("auto", "cpu", seconds=3000)
    assert compiles and why == "saves about 10 minutes; takes up to 25 s first"
    assert devices.choose_compile("on", "cpu", seconds=1) == (True, "as configured")


def test_auto_compiles_from_where_twice_the_seconds_of_compiling_are_saved(monkeypatch):
    """Half of 300 s is 150 s, twice the 75 s that compiling takes here."""
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    monkeypatch.setattr(devices, "COMPILE_SAVES", 0.5)
    monkeypatch.setattr(devices, "COMPILE_SECONDS", 75)
    compiles, why = devices.choose_compile("auto", "cpu", 299.9)
    assert not compiles
    assert why == (
        "it would save about 150 s of this run and take up to 75 s; "
        "set hardware.compile=on to try it"
    )
    compiles, why = devices.choose_compile("auto", "cpu", 300.0)
    assert compiles and "takes up to 75 s" in why


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_how_long_a_run_takes_matters_to_auto_on_a_cpu_alone(monkeypatch, seconds):
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    for accelerator in ("cpu", "mps", "cuda"):
        assert devices.choose_compile("off", accelerator, seconds) == (False, "as configured")
    for accelerator in ("cpu", "cuda"):
        assert devices.choose_compile("on", accelerator, seconds) == (True, "as configured")
    for requested in ("auto", "on"):
        compiles, why = devices.choose_compile(requested, "mps", seconds)
        assert not compiles and "MPS" in why
    assert devices.choose_compile("auto", "cuda", seconds)[0]


def test_whether_to_compile_changes_nothing_else_of_the_hardware(machine):
    chosen = devices.choose_hardware(HardwareConfig(), "32-true")
    assert not chosen.compile and "compile" not in chosen.reasons  # that is not decided here
    decided = devices.with_compile(chosen, "off", 1e6)
    assert decided == dataclasses.replace(
        chosen, reasons=chosen.reasons | {"compile": "as configured"}
    )


@pytest.mark.parametrize(
    "preset, native, compiles",
    [
        ("config.yaml", True, False),
        ("config.yaml", False, False),
        ("presets/microgpt.yaml", True, False),
        ("presets/nnzig.yaml", True, False),  # training.c is as fast
        ("presets/nnzig.yaml", False, True),
        ("presets/shakespeare_char_gpu.yaml", True, False),  # with dropout
        ("presets/randygpt_large.yaml", True, True),  # its squared ReLU is torch's
    ],
)
def test_long_runs_outside_the_head_are_compiled_on_a_cpu_unless_training_c_computes_them(
    machine, monkeypatch, preset, native, compiles
):
    monkeypatch.setattr(plan, "matmul_rate", lambda *_: 440e9)  # of two Zen 4 cores in bfloat16
    monkeypatch.setattr(kernels, "load", lambda: "training.c" if native else None)
    config = load_config(Path(__file__).parents[2] / preset).with_vocab_size(
        {"config.yaml": 12_288}.get(preset, 256)
    )
    chosen = devices.choose_hardware(config.hardware, config.training.precision)
    config = config.with_auto_steps("bf16-mixed")
    assert (
        devices.with_compile(chosen, "auto", plan.compilable_seconds(config, chosen)).compile
        is compiles
    )


@pytest.mark.parametrize("accelerator, count, there", [("cuda", 3, 2), ("mps", 2, 1)])
def test_more_devices_than_there_are_is_a_mistake(machine, accelerator, count, there):
    machine(accelerator)
    with pytest.raises(
        UserError,
        match=f"hardware.devices is {count}, and this machine has {there} of {accelerator}",
    ):
        devices.choose_hardware(HardwareConfig(accelerator=accelerator, devices=count), "32-true")


@pytest.mark.parametrize(
    "section, strategy",
    [
        ({}, "single"),
        ({"devices": 4}, "ddp"),  # more than the cores of this machine are processes
        ({"num_nodes": 2}, "ddp"),
        ({"devices": 2, "strategy": "fsdp"}, "fsdp"),
        ({"strategy": "fsdp"}, "fsdp"),
    ],
    ids=str,
)
def test_several_devices_have_a_strategy(machine, section, strategy):
    chosen = devices.choose_hardware(HardwareConfig(accelerator="cpu", **section), "32-true")
    assert chosen.strategy == strategy


@pytest.mark.parametrize(
    "section", [{"strategy": "ddp"}, {"strategy": "fsdp"}, {"num_nodes": 2}], ids=str
)
def test_a_strategy_that_mps_does_not_have_is_a_mistake(machine, section):
    machine("mps")
    [(key, value)] = section.items()
    with pytest.raises(UserError, match=f"^hardware.{key} is {value}, and MPS trains on one "):
        devices.choose_hardware(HardwareConfig(accelerator="mps", **section), "32-true")


def test_float16_is_not_divided(machine):
    machine("cuda")
    config = HardwareConfig(accelerator="cuda", strategy="fsdp")
    with pytest.raises(UserError, match="^training.precision 16-mixed .* hardware.strategy=ddp"):
        devices.choose_hardware(config, "16-mixed")


def test_the_measured_rate_is_a_finite_speed():
    assert 0 < measure.matmul_rate("cpu", "32-true", size=64) < math.inf
