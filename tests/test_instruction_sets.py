"""The instruction set of the CPU: what is found, what limits it, and that bfloat16 follows it."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pocketlm import instruction_sets
from pocketlm.errors import UserError
from pocketlm.instruction_sets import (
    INSTRUCTION_SETS,
    VARIABLE,
    available_sets,
    instruction_set,
    multiplies_bfloat16,
)
from pocketlm.optim import newton_schulz

AVAILABLE = [isa.name for isa in available_sets()]


@pytest.fixture
def choose(monkeypatch):
    """Return the set that is used with POCKETLM_ISA of a value."""

    def choose(value: str | None, **variables: str) -> str:
        variables = {VARIABLE: value or "", **variables}
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        instruction_set.cache_clear()
        return instruction_set().name

    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    yield choose
    instruction_set.cache_clear()


def test_without_a_limit_it_is_the_newest_set_of_the_cpu(choose):
    assert choose(None) == available_sets()[-1].name


@pytest.mark.parametrize("name", AVAILABLE)
def test_each_set_of_the_cpu_can_be_named(choose, name):
    assert choose(name) == name


def test_a_set_that_the_cpu_lacks_is_refused_with_those_it_has(choose):
    foreign = "neon" if platform.machine() in ("x86_64", "AMD64") else "avx2"
    with pytest.raises(UserError, match=f"^{VARIABLE}={foreign}: this CPU has {AVAILABLE[0]}"):
        choose(foreign)


def test_an_unknown_set_is_refused_with_those_of_the_cpu(choose):
    with pytest.raises(UserError, match=f"avx3 is no instruction set; this CPU has {AVAILABLE[0]}"):
        choose("avx3")


@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_torchs_own_variable_limits_it_too(choose, limit):
    allowed = {isa.name for isa in INSTRUCTION_SETS.values() if isa.torch in ("default", limit)}
    assert choose(None, ATEN_CPU_CAPABILITY=limit) == [n for n in AVAILABLE if n in allowed][-1]


@pytest.mark.parametrize("name", AVAILABLE)
def test_torch_keeps_to_the_named_set(name):
    program = "import torch, pocketlm; print(torch.backends.cpu.get_cpu_capability().lower())"
    environment = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {VARIABLE: name},
        capture_output=True,
        text=True,
    )
    expected = INSTRUCTION_SETS[name].torch or torch.backends.cpu.get_cpu_capability().lower()
    assert done.stdout.strip() == expected, done.stderr


class MatmulDtypes(TorchDispatchMode):
    """Collects the data types that are multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.seen |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("name", "dtype"), [("avx2", torch.float32), ("avx512_bf16", torch.bfloat16)]
)
def test_muon_multiplies_in_bfloat16_only_where_the_cpu_does(monkeypatch, name, dtype):
    monkeypatch.setattr(instruction_sets, "instruction_set", lambda: INSTRUCTION_SETS[name])
    assert multiplies_bfloat16("cpu") == (dtype == torch.bfloat16)
    with MatmulDtypes() as dtypes:
        newton_schulz(torch.randn(2, 8, 8))
    assert dtypes.seen == {dtype}
