"""C sources as shared libraries: compiled for this CPU at first use, and kept in a cache folder."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from pocketlm.instruction_sets import X86_SETS, InstructionSet, limited_set

FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-fopenmp-simd",
    "-std=gnu11",
    "-fPIC",
)


class NativeUnavailable(Exception):
    """A C source cannot be used on this machine; the text is the reason, as a clause."""


def load_native(source: Path, isa: InstructionSet | None = None) -> ctypes.CDLL:
    """Load a C source as a library, compiled on first use, which takes a second or two.

    It is compiled for the given instruction set; by default, for the one that this process is
    limited to, or, without a limit, for this very CPU. Raises NativeUnavailable if there is no
    compiler, or if it fails.
    """
    isa = isa or limited_set()
    compiler = find_compiler()
    try:
        return ctypes.CDLL(str(compiled_library(source, compiler, isa)))
    except OSError as error:
        raise NativeUnavailable(
            f"{source.name} could not be compiled or loaded: {error}"
        ) from error


def find_compiler() -> str:
    """Return the path of $CC, gcc, clang or cc. Raises NativeUnavailable if there is none."""
    for name in (os.environ.get("CC"), "gcc", "clang", "cc"):
        if name and (path := shutil.which(name)):
            return path
    raise NativeUnavailable("there is no C compiler on the PATH (gcc or clang)")


def compiled_library(source: Path, compiler: str, isa: InstructionSet | None) -> Path:
    """Return the shared library in the user's cache folder, compiled if it is not there.

    Its name has a hash of the source and of whatever else could change the machine code.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):
        raise NativeUnavailable(
            f"there is no home folder to keep the compiled {source.name} in; set XDG_CACHE_HOME"
        )
    folder = Path(cache) / "pocketlm"
    parts = [
        *source_texts(source),
        compiler,
        *FLAGS,
        *machine_flags(isa),
        platform.processor(),
        platform.node(),
    ]
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    library = folder / f"{source.stem}-{digest}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            os.replace(compile_library(source, compiler, isa, Path(temporary)), library)
    return library


def source_texts(source: Path) -> list[str]:
    """Return the text of a C source and of the project's headers that it includes."""
    text = source.read_text()
    headers = re.findall(r'^#include "(.+)"', text, re.MULTILINE)
    return [text, *((source.parent / header).read_text() for header in headers)]


def machine_flags(isa: InstructionSet | None) -> tuple[str, ...]:
    """Return the compiler's flags for an instruction set; None: for this CPU."""
    machine = platform.machine().lower()
    is_x86 = isa in X86_SETS if isa else machine in ("x86_64", "amd64")
    native = "-march=native" if is_x86 else "-mcpu=native"
    flags = isa.flags if isa else (native,)
    # gcc halves AVX-512's vectors by itself, for CPUs of 2017 that slow down for whole ones
    return (*flags, "-mprefer-vector-width=512") if is_x86 else flags


def compile_library(source: Path, compiler: str, isa: InstructionSet | None, folder: Path) -> Path:
    """Compile a source in a folder; use threads if the compiler has OpenMP.

    OpenMP is not linked: torch has loaded its own, and two would compete for the cores.
    """
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    compiled, linked = folder / "native.o", folder / "native.so"
    for threads in (["-fopenmp"], ["-Xclang", "-fopenmp"], []):
        options = [*FLAGS, *machine_flags(isa), *threads, "-c", str(source), "-o", str(compiled)]
        done = run_compiler(compiler, options)
        if done.returncode == 0:
            break
    else:
        reason = first_line(done.stderr)
        target = f" for {isa.name}" if isa else ""
        raise NativeUnavailable(f"{compiler} does not compile {source.name}{target}: {reason}")
    done = run_compiler(compiler, ["-shared", *undefined, str(compiled), "-o", str(linked), "-lm"])
    if done.returncode:
        reason = first_line(done.stderr)
        raise NativeUnavailable(f"{compiler} does not link {source.name}: {reason}")
    return linked


def run_compiler(compiler: str, options: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([compiler, *options], capture_output=True, text=True)


def first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]
