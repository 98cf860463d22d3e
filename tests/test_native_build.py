"""C sources as libraries: what they are compiled from, and for which instruction set."""

import pwd
from pathlib import Path

import pytest

from pocketlm import native_build
from pocketlm.instruction_sets import VARIABLE, available_sets, instruction_set
from pocketlm.model import kernels
from pocketlm.native_build import NativeUnavailable, load_native


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_change_of_a_header_is_compiled(tmp_path):
    source, header = tmp_path / "source.c", tmp_path / "number.h"
    source.write_text('#include "number.h"\nint number(void) { return NUMBER; }\n')
    for number in (7, 8):
        header.write_text(f"#define NUMBER {number}\n")
        assert load_native(source).number() == number
    assert len(list((tmp_path / "cache" / "pocketlm").glob("source-*.so"))) == 2


@pytest.mark.parametrize("variable", [VARIABLE, "ATEN_CPU_CAPABILITY", None])
def test_it_is_compiled_for_the_set_that_the_process_is_limited_to(tmp_path, monkeypatch, variable):
    compiled_for = []

    def compiled_library(source: Path, compiler: str, isa: object) -> Path:
        compiled_for.append(isa)
        raise OSError("not compiled")

    oldest = available_sets()[0]
    values = {VARIABLE: oldest.name, "ATEN_CPU_CAPABILITY": oldest.torch or "default"}
    for name, value in values.items():
        monkeypatch.delenv(name, raising=False)
        if name == variable:
            monkeypatch.setenv(name, value)
    instruction_set.cache_clear()
    monkeypatch.setattr(native_build, "compiled_library", compiled_library)
    with pytest.raises(native_build.NativeUnavailable, match="not compiled"):
        load_native(tmp_path / "source.c")
    assert compiled_for == [oldest if variable else None]
    instruction_set.cache_clear()


def test_a_user_without_a_home_folder_is_told_which_variable_to_set(monkeypatch):
    def unknown_user(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    with pytest.raises(NativeUnavailable, match="no home folder .* training.c in; set XDG_CACHE"):
        load_native(kernels.SOURCE)
