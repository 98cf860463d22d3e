"""A checkpoint is whole or not there, damage is noticed, and what is loaded is what was saved."""

import errno
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint

from model import ModelConfig, Transformer
from pocketlm.checkpoint.format import (
    FORMAT,
    checkpoint_metadata,
    hash_weights,
    read_checkpoint,
    save_checkpoint,
)
from pocketlm.checkpoint.loading import best_checkpoint, load_checkpoint
from pocketlm.config.sections import Config, TrainingConfig
from pocketlm.errors import UserError
from pocketlm.files import link_or_copy
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def build(seed: int = 0, **sizes: object) -> tuple[Transformer, dict]:
    """A tiny model and a checkpoint's content around it."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=16, max_seq_len=12, n_layers=1, d_model=8, n_heads=2, d_ff=8) | sizes
    config = Config(model=ModelConfig(**sizes), training=TrainingConfig(seq_len=10))
    model = Transformer(config.model).eval()
    kit = checkpoint_metadata(config, CharTokenizer("abc é😀").state(), tokens=5, val_loss=1.25)
    return model, {
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
        "global_step": 7,
        "kit": kit,
    }


def leftovers() -> list[str]:
    return [path.name for path in Path().iterdir() if "unfinished" in path.name]


# ---- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [{}, dict(tie_embeddings=False, n_kv_heads=1, rope_theta=500.0)],
    ids=["tied", "grouped"],
)
def test_what_is_loaded_is_what_was_saved(sizes):
    model, state = build(**sizes)
    save_checkpoint(state, Path("x.ckpt"))
    torch.manual_seed(99)
    loaded = load_checkpoint("x.ckpt")
    ids = torch.randint(16, (3, 12))
    assert torch.equal(loaded.model(ids), model(ids))
    assert not loaded.model.training
    assert (loaded.step, loaded.tokens, loaded.val_loss) == (7, 5, 1.25)
    assert loaded.config.to_dict() == state["kit"]["config"]
    assert loaded.tokenizer.state() == state["kit"]["tokenizer"]
    assert loaded.weights_sha256 == hash_weights(dict(model.state_dict()))


def test_the_rotary_tables_are_computed_again():
    """They are in no checkpoint, and a model that was built without memory has none."""
    _, state = build(rope_theta=50.0)
    assert not [name for name in state["state_dict"] if "rope" in name]
    save_checkpoint(state, Path("x.ckpt"))
    model = load_checkpoint("x.ckpt").model
    angles = [
        [position * 50.0 ** (-2 * (i % 2) / 4) for i in range(4)] for position in range(12)
    ]  # head_dim 4: two wavelengths
    for table, function in ((model.rope_cos, math.cos), (model.rope_sin, math.sin)):
        expected = torch.tensor([[function(angle) for angle in row] for row in angles])
        torch.testing.assert_close(table, expected, rtol=0, atol=2e-6)  # angles up to 11 in float32


def test_a_checkpoint_holds_plain_types_only():
    save_checkpoint(build()[1], Path("x.ckpt"))
    assert get_unsafe_globals_in_checkpoint("x.ckpt") == []
    assert torch.load("x.ckpt", weights_only=True)["kit"]["format"] == FORMAT


def test_the_weights_hash_is_of_names_shapes_and_numbers():
    weights = {name: p.clone() for name, p in build()[0].state_dict().items()}
    name = "layers.0.mlp.up_proj.weight"
    same = {
        name: weights[name].T.contiguous().T
        for name in reversed(weights)
        if weights[name].dim() == 2
    }  # another layout in memory
    assert hash_weights(
        {**same, **{k: v for k, v in weights.items() if k not in same}}
    ) == hash_weights(weights)
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
    assert hash_weights(half) != hash_weights(
        {**half, "a": torch.tensor([1, 1, 1.0078125], dtype=torch.bfloat16)}
    )  # the next number


# ---- whole or not there ----------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="cannot write the checkpoint gone/x.ckpt"):
        save_checkpoint({}, Path("gone/x.ckpt"))


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint

path, events = Path("x.ckpt"), 0

def step(last):  # one more place at which the process may die
    global events
    events += 1
    if events == last:
        os.kill(os.getpid(), signal.SIGKILL)

def around(function, last):
    def wrapped(*args, **kwargs):
        step(last)
        result = function(*args, **kwargs)
        step(last)
        return result
    return wrapped

def save_in_pieces(state, file, last):
    class Piecewise:
        def write(self, data):
            step(last)
            file.write(bytes(data)[: len(data) // 2])
            file.flush()
            step(last)
            return len(data) // 2 + file.write(bytes(data)[len(data) // 2 :])
        def flush(self):
            file.flush()
    original(state, Piecewise())

original = torch.save
for last in range(1, 1000):
    for unfinished in Path().glob(".*"):
        unfinished.unlink()
    original({"state_dict": {"w": torch.zeros(3)}, "kit": {"format": 1}}, path)
    if (child := os.fork()) == 0:
        os.fsync, os.replace = around(os.fsync, last), around(os.replace, last)
        torch.save = lambda state, file: save_in_pieces(state, file, last)
        save_checkpoint({"state_dict": {"w": torch.ones(3)}, "kit": {"format": 1}}, path)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    print(int(read_checkpoint(path)["state_dict"]["w"].sum()))
    if not killed:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is POSIX")
def test_a_kill_at_any_point_of_a_save_leaves_the_old_file_or_the_new_one():
    """Before, within and after every write, the flush to the disk and the renaming. 0 is the old file, 3 the new one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    seen = [int(line) for line in done.stdout.split()]
    assert len(seen) > 20
    assert seen == sorted(seen)  # once the new file is there it stays
    assert set(seen) == {0, 3}


def test_what_a_killed_save_left_does_not_trouble_the_next_one():
    save_checkpoint(build()[1], Path("x.ckpt"))
    Path(f".x.ckpt.{os.getpid()}.unfinished").write_bytes(b"half of it")
    save_checkpoint(build(seed=1)[1], Path("x.ckpt"))
    assert load_checkpoint("x.ckpt").weights_sha256 == hash_weights(
        dict(build(seed=1)[0].state_dict())
    )
    assert leftovers() == []


# ---- damage ----------------------------------------------------------------------------------------------------------


def content(path: Path) -> tuple:
    state = read_checkpoint(path)
    return state["kit"], state["global_step"], hash_weights(state["state_dict"])


@pytest.fixture
def raw():
    save_checkpoint(build()[1], Path("x.ckpt"))
    return Path("x.ckpt").read_bytes()


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
        place, bit = generator.randrange(len(raw)), generator.randrange(8)
        Path("flipped.ckpt").write_bytes(
            raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
        )
        try:
            read = content(Path("flipped.ckpt"))
        except UserError:
            refused += 1
            continue
        assert read == good, f"bit {bit} of byte {place}"
    assert refused > 10


def test_a_flipped_bit_in_a_records_header_is_refused_or_harmless(raw):
    """Python's zip reader fails there with errors that have no text."""
    good, first = content(Path("x.ckpt")), raw.index(b"PK\x03\x04")
    for place in range(first, first + 46):
        for bit in range(8):
            Path("flipped.ckpt").write_bytes(
                raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
            )
            try:
                read = content(Path("flipped.ckpt"))
            except UserError:
                continue
            assert read == good


def test_flipped_weights_are_refused_by_name(raw):
    weights = build()[0].embed_tokens.weight
    place = raw.index(weights.detach().numpy().tobytes())
    Path("flipped.ckpt").write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    with pytest.raises(UserError, match="flipped.ckpt is damaged at"):
        load_checkpoint("flipped.ckpt")


# ---- what is no checkpoint -------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_of_this_program_is_refused_by_name():
    torch.save({"weight": torch.ones(2)}, "foreign.ckpt")
    torch.save(torch.ones(2), "tensor.ckpt")
    torch.save({"state_dict": {}, "kit": {}}, "empty.ckpt")
    torch.save({"state_dict": {}, "epoch": 1, "hyper_parameters": {"lr": 1}}, "lightning.ckpt")
    torch.save(build()[0], "pickled.ckpt")
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
    state = build()[1]
    state["kit"]["format"] = FORMAT + 1
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(UserError, match=f"x.ckpt has format {FORMAT + 1}.*update"):
        read_checkpoint("x.ckpt")


def test_a_checkpoint_with_a_setting_that_is_not_known_here_says_which():
    state = build()[1]
    state["kit"]["config"]["model"]["n_experts"] = 2
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(UserError, match="x.ckpt: model has no key 'n_experts'"):
        load_checkpoint("x.ckpt")


def test_weights_that_do_not_fit_the_config_are_refused_by_name():
    state = build()[1]
    state["kit"]["config"]["model"]["d_ff"] = 24
    save_checkpoint(state, Path("shape.ckpt"))
    state = build()[1]
    del state["state_dict"]["model.norm.weight"]
    save_checkpoint(state, Path("missing.ckpt"))
    for name in ("shape", "missing"):
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            load_checkpoint(f"{name}.ckpt")


def test_the_tokenizer_named_must_be_the_one_it_was_trained_with():
    state = build(vocab_size=257)[1]
    state["kit"]["tokenizer"] = ByteTokenizer().state()
    save_checkpoint(state, Path("x.ckpt"))
    assert load_checkpoint("x.ckpt", "byte").tokenizer.name == "byte"
    with pytest.raises(UserError, match="trained with the tokenizer 'byte', not 'bpe:300'"):
        load_checkpoint("x.ckpt", "bpe:300")


# ---- finding one -----------------------------------------------------------------------------------------------------


def put(name: str, val_loss: float) -> None:
    state = build()[1]
    state["kit"]["val_loss"] = val_loss
    path = Path("checkpoints", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(state, path)


def test_a_missing_checkpoint_names_the_ones_there_are():
    with pytest.raises(UserError, match="no checkpoint gone.ckpt; train one"):
        read_checkpoint("gone.ckpt")
    for name in ("final.ckpt", "owl/best.ckpt", "b/last.ckpt", "old-1/best.ckpt"):
        put(name, 1.0)
    with pytest.raises(UserError) as error:
        read_checkpoint("gone.ckpt")
    assert all(
        f"checkpoints/{name}" in str(error.value)
        for name in ("final.ckpt", "owl/best.ckpt", "b/last.ckpt")
    )
    assert "old-1" not in str(error.value)


def test_the_best_is_the_unnamed_one_else_the_lowest_loss():
    with pytest.raises(UserError, match="no checkpoint yet"):
        best_checkpoint()
    put("old-1/best.ckpt", 0.1)
    with pytest.raises(UserError, match="no checkpoint yet"):
        best_checkpoint()
    put("b/best.ckpt", 2.0)
    put("c/best.ckpt", 1.0)
    put("c/last.ckpt", 0.5)
    assert best_checkpoint() == Path("checkpoints/c/best.ckpt")
    put("best.ckpt", 9.0)
    assert best_checkpoint() == Path("checkpoints/best.ckpt")


# ---- a second name ---------------------------------------------------------------------------------------------------


def refuse_links(*_: object) -> None:
    raise OSError(errno.EPERM, "no hard links here")


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_second_name_replaces_the_old_file(monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    Path("a").write_bytes(b"new")
    Path("b").write_bytes(b"old")
    link_or_copy(Path("a"), Path("b"))
    assert (Path("a").read_bytes(), Path("b").read_bytes()) == (b"new", b"new")
    assert os.path.samefile("a", "b") == links
    Path("a").unlink()
    assert Path("b").read_bytes() == b"new"
    assert leftovers() == []


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "copies"])
def test_a_second_name_is_replaced_in_one_step(monkeypatch, links):
    """Until the renaming the old file has the name; a renaming that fails changes nothing."""
    if not links:
        monkeypatch.setattr(os, "link", refuse_links)
    Path("a").write_bytes(b"new")
    Path("b").write_bytes(b"old")

    def refuse(source, target):
        assert (Path(source).read_bytes(), Path(target).read_bytes()) == (b"new", b"old")
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError):
        link_or_copy(Path("a"), Path("b"))
    assert sorted(path.read_bytes() for path in Path().iterdir()) == [b"new", b"old"]


def test_giving_the_same_second_name_again_leaves_nothing_behind():
    """Renaming a file onto another name of itself does nothing, and leaves both names (POSIX rename)."""
    Path("a").write_bytes(b"new")
    for _ in range(2):
        link_or_copy(Path("a"), Path("b"))
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b"]
