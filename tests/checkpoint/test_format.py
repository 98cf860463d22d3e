"""Checkpoint files: written completely or not at all; damage and other files are refused."""

import errno
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from pocketlm import files
from pocketlm.checkpoint.format import (
    FORMAT,
    DamagedCheckpoint,
    hash_weights,
    read_checkpoint,
    save_checkpoint,
)
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from tests.support.checkpoints import tiny_checkpoint

ROOT = Path(__file__).parents[2]


def test_a_checkpoint_holds_plain_types_only():
    save_checkpoint(tiny_checkpoint()[1], Path("x.ckpt"))
    assert get_unsafe_globals_in_checkpoint("x.ckpt") == []
    assert torch.load("x.ckpt", weights_only=True)["kit"]["format"] == FORMAT


# ---- the hash of the weights ----


def test_the_weights_hash_is_of_names_shapes_and_numbers():
    """And not of the order of the tensors or of their layout in memory."""
    weights = {name: p.clone() for name, p in tiny_checkpoint()[0].state_dict().items()}
    name = "layers.0.mlp.up_proj.weight"
    same = {name: weights[name] for name in reversed(weights)}
    same |= {name: p.T.contiguous().T for name, p in weights.items() if p.dim() == 2}
    assert hash_weights(same) == hash_weights(weights)
    changed = weights[name].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(1.0))
    others = [
        {**weights, name: changed},
        {**weights, name: weights[name].flatten()},
        {**weights, name: weights[name].double()},
        {("other" if key == name else key): tensor for key, tensor in weights.items()},
    ]
    assert len({hash_weights(other) for other in [weights, *others]}) == 5


def test_weights_of_half_precision_hash_too():
    half = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(3, dtype=torch.float16)}
    next_number = torch.tensor([1, 1, 1.0078125], dtype=torch.bfloat16)
    assert hash_weights(half) != hash_weights({**half, "a": next_number})


# ---- written completely or not at all ----


def leftovers() -> list[str]:
    return [path.name for path in Path().iterdir() if "unfinished" in path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("existing", [True, False], ids=["over an old one", "new"])
def test_a_save_that_the_disk_refuses_leaves_the_old_file_and_nothing_else(
    monkeypatch, number, existing
):
    if existing:
        Path("x.ckpt").write_bytes(b"old")

    def refuse(state, file):
        file.write(b"half of it")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(UserError, match=f"x.ckpt.*{os.strerror(number)}"):
        save_checkpoint({}, Path("x.ckpt"))
    assert [path.read_bytes() for path in Path().iterdir()] == [b"old"] * existing


def test_a_save_that_is_interrupted_leaves_the_old_file_and_nothing_else(monkeypatch):
    Path("x.ckpt").write_bytes(b"old")

    def interrupt(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({}, Path("x.ckpt"))
    assert [path.read_bytes() for path in Path().iterdir()] == [b"old"]


def test_a_save_into_a_folder_that_is_not_there_says_so():
    with pytest.raises(UserError, match="cannot write gone/x.ckpt"):
        save_checkpoint({}, Path("gone/x.ckpt"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
def test_a_kill_at_any_point_of_a_save_leaves_the_old_file_or_the_new_one():
    """Once the new file is there it stays. tests/programs/killed_save.py says what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/programs/killed_save.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sums = [int(line) for line in done.stdout.split()]
    assert len(sums) > 20
    assert sums == sorted(sums)
    assert set(sums) == {0, 3}


def test_what_a_killed_save_left_does_not_trouble_the_next_one():
    save_checkpoint(tiny_checkpoint()[1], Path("x.ckpt"))
    Path(f".x.ckpt.{os.getpid()}.unfinished").write_bytes(b"half of it")
    model, state = tiny_checkpoint(seed=1)
    save_checkpoint(state, Path("x.ckpt"))
    assert load_checkpoint("x.ckpt").weights_sha256 == hash_weights(dict(model.state_dict()))
    assert leftovers() == []


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_follows(monkeypatch):
    """A power cut could otherwise leave the new name without its content."""
    events = []

    def fsync(handle):
        events.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    def replace(source, target, original=os.replace):
        events.append("name")
        original(source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    save_checkpoint(tiny_checkpoint()[1], Path("x.ckpt"))
    assert events == ["file", "name", "folder"]


# ---- damage ----


def content(path: Path) -> tuple:
    state = read_checkpoint(path)
    return state["kit"], state["global_step"], hash_weights(state["state_dict"])


@pytest.fixture
def raw():
    """Return the bytes of a checkpoint, which is x.ckpt."""
    save_checkpoint(tiny_checkpoint()[1], Path("x.ckpt"))
    return Path("x.ckpt").read_bytes()


def content_after_flip(raw: bytes, offset: int, bit: int) -> tuple | None:
    """Return the content after one bit of a byte has changed; None if it is refused."""
    flipped = bytearray(raw)
    flipped[offset] ^= 1 << bit
    Path("flipped.ckpt").write_bytes(flipped)
    try:
        return content(Path("flipped.ckpt"))
    except UserError:
        return None


def test_a_truncated_checkpoint_is_refused_by_name(raw):
    for size in [*range(0, len(raw), len(raw) // 40), len(raw) - 1, len(raw) - 22, len(raw) - 100]:
        Path("cut.ckpt").write_bytes(raw[:size])
        with pytest.raises(UserError, match="cut.ckpt"):
            read_checkpoint("cut.ckpt")


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_refused_or_harmless(raw, seed):
    """Never silently other weights: torch.load does not look at the archive's checksums."""
    good, generator, refused = content(Path("x.ckpt")), random.Random(seed), 0
    for _ in range(50):
        offset, bit = generator.randrange(len(raw)), generator.randrange(8)
        result = content_after_flip(raw, offset, bit)
        refused += result is None
        assert result in (None, good), f"bit {bit} of byte {offset}"
    assert refused > 10


def test_a_flipped_bit_in_a_records_header_is_refused_or_harmless(raw):
    """Python's zip reader fails there with errors that have no text."""
    good, first = content(Path("x.ckpt")), raw.index(b"PK\x03\x04")
    for offset in range(first, first + 46):
        for bit in range(8):
            assert content_after_flip(raw, offset, bit) in (None, good)


def test_flipped_weights_are_refused_by_name(raw):
    weights = tiny_checkpoint()[0].embed_tokens.weight
    offset = raw.index(weights.detach().numpy().tobytes())
    flipped = raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]
    Path("flipped.ckpt").write_bytes(flipped)
    with pytest.raises(UserError, match="flipped.ckpt is damaged at"):
        load_checkpoint("flipped.ckpt")


def test_flipped_metadata_are_refused_where_they_alone_are_read(raw):
    first, generator = raw.index(b"global_step"), random.Random(0)
    for _ in range(20):
        offset = first + generator.randrange(500)
        Path("flipped.ckpt").write_bytes(
            raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :]
        )
        with pytest.raises(DamagedCheckpoint, match="damaged"):
            read_checkpoint("flipped.ckpt", metadata_only=True)


# ---- other files ----


def test_what_is_no_checkpoint_of_this_program_is_refused_by_name():
    torch.save({"weight": torch.ones(2)}, "foreign.ckpt")
    torch.save(torch.ones(2), "tensor.ckpt")
    torch.save({"state_dict": {}, "kit": {}}, "empty.ckpt")
    torch.save({"state_dict": {}, "epoch": 1, "hyper_parameters": {"lr": 1}}, "lightning.ckpt")
    torch.save(tiny_checkpoint()[0], "pickled.ckpt")
    Path("text.ckpt").write_text("once upon a time")
    Path("nothing.ckpt").write_bytes(b"")
    for name in ("foreign", "tensor", "empty", "lightning", "pickled"):
        with pytest.raises(UserError, match=f"{name}.ckpt is not a checkpoint of this program"):
            read_checkpoint(f"{name}.ckpt")
    for name in ("text", "nothing"):
        with pytest.raises(UserError, match=f"{name}.ckpt is truncated or not a checkpoint"):
            read_checkpoint(f"{name}.ckpt")


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "done"),)

    torch.save({"state_dict": {}, "kit": {"format": 1}, "more": Evil()}, "evil.ckpt")
    with pytest.raises(UserError, match="evil.ckpt"):
        read_checkpoint("evil.ckpt")
    assert not (tmp_path / "done").exists()


def test_a_checkpoint_of_a_newer_format_says_so():
    state = tiny_checkpoint()[1]
    state["kit"]["format"] = FORMAT + 1
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(UserError, match=f"x.ckpt has format {FORMAT + 1}.*update"):
        read_checkpoint("x.ckpt")


def test_a_missing_checkpoint_names_the_ones_there_are():
    with pytest.raises(UserError, match="no checkpoint gone.ckpt; train one"):
        read_checkpoint("gone.ckpt")
    known = ["checkpoints/final.ckpt", "checkpoints/owl/best.ckpt", "checkpoints/b/last.ckpt"]
    for path in [*known, "checkpoints/old-1/best.ckpt"]:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(tiny_checkpoint()[1], Path(path))
    with pytest.raises(UserError) as error:
        read_checkpoint("gone.ckpt")
    assert all(path in str(error.value) for path in known)
    assert "old-1" not in str(error.value)
