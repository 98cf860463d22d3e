"""decode.c, compiled for each instruction set of this CPU, and for ARM's in an emulator."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model import Transformer
from pocketlm.inference.backend import SlotCache
from pocketlm.inference.native import NativeBackend
from pocketlm.inference.native_library import Model, load_library
from pocketlm.instruction_sets import ARM_SETS, InstructionSet, available_sets
from pocketlm.native_build import FLAGS, NativeUnavailable
from tests.support.weights import (
    SHAPES,
    TOLERANCES,
    exact_logits,
    kinds_and_shapes,
    model_with,
    relative_error,
)

PROGRAM = Path(__file__).parents[1] / "programs" / "run_decode.c"
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

every_set = pytest.mark.parametrize("isa", available_sets(), ids=lambda isa: isa.name)


def random_ids(batch: int, length: int) -> Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def decode(backend: NativeBackend, model: Transformer, ids: Tensor) -> Tensor:
    """Return the logits (B, T, V) of a decoding step for each column of ids (B, T)."""
    B, T = ids.shape
    cache = SlotCache(model.config, B, T, dtype=model.dtype, device=model.device)
    return torch.stack([backend.decode(cache, ids[:, t].tolist()) for t in range(T)], dim=1)


@every_set
def test_steps_equal_the_model_and_a_row_is_the_same_alone_and_in_a_batch(isa):
    """17 rows: from 16 on, bfloat16 weights may be widened before they are multiplied."""
    library, ids = load_library(isa), random_ids(17, 7)
    for kind, shape in kinds_and_shapes():
        model = model_with(kind, **SHAPES[shape])
        backend = NativeBackend(model, library)
        together = decode(backend, model, ids)
        error = relative_error(together, exact_logits(model, ids))
        assert error < TOLERANCES[kind], (kind, shape)
        for rows in (1, 2, 3, 4, 7):
            assert torch.equal(decode(backend, model, ids[:rows]), together[:rows]), (kind, shape)


@every_set
def test_a_prompt_read_at_once_fills_the_cache_as_token_by_token_to_the_last_bit(isa):
    """230 rows of 320 floats are more than the part of the cache that a matmul uses at a time."""
    library, ids = load_library(isa), random_ids(1, 230)[0].tolist()
    for kind in TOLERANCES:
        model = model_with(kind, n_layers=2, max_seq_len=256, **SHAPES["vectors"])
        backend = NativeBackend(model, library)
        caches = []
        for chunk in (230, 1):
            cache = SlotCache(model.config, 1, 230, dtype=model.dtype, device=model.device)
            for begin in range(0, 230, chunk):
                part, n = ids[begin : begin + chunk], len(ids[begin : begin + chunk])
                backend.run(cache, part, [0] * n, list(range(begin, begin + n)), None)
            caches.append(torch.stack([cache.keys, cache.values]))
        assert torch.equal(*caches), kind


def test_a_set_that_the_compiler_does_not_know_is_a_reason():
    with pytest.raises(NativeUnavailable, match="does not compile decode.c for avx4096: "):
        load_library(InstructionSet("avx4096", ("-march=avx4096",)))


# ---- ARM, emulated ----


def pointers_as_offsets(structure: ctypes.Structure, offsets: dict[int, int]) -> None:
    """Replace the addresses in a structure of native_library.py by offsets, in place."""
    for name, kind in structure._fields_:
        value = getattr(structure, name)
        if kind is ctypes.c_void_p:
            setattr(structure, name, value and offsets[value])
        elif isinstance(value, ctypes.Structure):
            pointers_as_offsets(value, offsets)


def model_file(backend: NativeBackend, ids: Tensor) -> bytes:
    """Return the file that run_decode.c reads: a head, the tensors, the layers and the model."""
    head = np.array([0, *ids.shape, *ids.T.flatten().tolist()], "<i8")
    parts, size, offsets = [head.tobytes()], head.nbytes, {}
    for tensor in backend.tensors:
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        parts += [bytes(-size % 64), data]
        offsets[tensor.data_ptr()] = size + -size % 64
        size += -size % 64 + len(data)
    for layer in backend.layers:
        pointers_as_offsets(layer, offsets)
    parts += [bytes(-size % 64), bytes(backend.layers)]
    size += -size % 64
    pointers_as_offsets(backend.struct, offsets)
    model = bytearray(bytes(backend.struct))
    layers = Model.layers.offset
    model[layers : layers + 8] = size.to_bytes(8, "little")
    head[0] = size + len(parts[-1])
    return b"".join([head.tobytes(), *parts[1:], bytes(model)])


@pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {ARM_COMPILER} and {EMULATOR}",
)
@pytest.mark.parametrize("isa", ARM_SETS, ids=lambda isa: isa.name)
def test_steps_on_arm_equal_the_model_and_a_row_is_the_same_alone_and_in_a_batch(isa, tmp_path):
    program, data, ids = tmp_path / "run_decode", tmp_path / "model", random_ids(7, 4)
    options = [*FLAGS, "-O1", *isa.flags, "-static", str(PROGRAM), "-o", str(program), "-lm"]
    subprocess.run([ARM_COMPILER, *options], check=True)
    for kind, shape in kinds_and_shapes():
        model = model_with(kind, n_layers=1, **SHAPES[shape])
        data.write_bytes(model_file(NativeBackend(model), ids))
        done = subprocess.run([EMULATOR, program, data], check=True, capture_output=True)
        logits = torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)
        together, alone = logits.view(2, *ids.T.shape, -1)
        error = relative_error(together.transpose(0, 1), exact_logits(model, ids))
        assert error < TOLERANCES[kind], (kind, shape)
        assert torch.equal(alone.view(7, 4, -1), together.transpose(0, 1)), (kind, shape)
