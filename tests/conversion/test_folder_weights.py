"""The weights of a folder: safetensors or pytorch_model.bin, whole or in parts, and bad ones."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketlm.conversion import stored
from tests.support.pretrained import ROUNDING, converted, gpt2, llama, refusal, save, worst_logit

INDEX = "model.safetensors.index.json"


def as_torch_files(folder: Path, legacy: bool = False) -> Path:
    """Replace safetensors files, and their index, by files of torch.save."""
    for file in folder.glob("model*.safetensors"):
        target = folder / f"pytorch_{file.stem}.bin"
        torch.save(load_file(file), target, _use_new_zipfile_serialization=not legacy)
        file.unlink()
    index = folder / INDEX
    if index.is_file():
        text = index.read_text().replace("model-", "pytorch_model-")
        (folder / "pytorch_model.bin.index.json").write_text(text.replace(".safetensors", ".bin"))
        index.unlink()
    return folder


@pytest.mark.parametrize("size", ["100KB", "1GB"], ids=["shards", "one file"])
@pytest.mark.parametrize("theirs", [llama(num_key_value_heads=2), gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("legacy", [False, True], ids=["", "of torch before 1.6"])
def test_pytorch_model_bin_is_the_same_model(
    tmp_path: Path, theirs: torch.nn.Module, size: str, legacy: bool
) -> None:
    folder = as_torch_files(save(theirs, tmp_path / "model", max_shard_size=size), legacy)
    assert (len([*folder.glob("*.bin")]) == 1) == (size == "1GB")
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_files_that_are_links_are_read_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    theirs = llama()
    folder = save(theirs, tmp_path / "model")
    blob = (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_a_bar_is_shown_from_its_size_on(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(gpt2(n_layer=1), tmp_path / "model")
    for smallest, shown in ((10**9, False), (1, True)):
        monkeypatch.setattr(stored, "MIN_BAR_BYTES", smallest)
        converted(folder)
        assert ("reading" in capsys.readouterr().err) == shown
        shutil.rmtree(tmp_path / "new")


# ---- bad folders ----


def edited_index(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    values = json.loads((folder / INDEX).read_text())
    change(values["weight_map"])
    (folder / INDEX).write_text(json.dumps(values))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "a\\b", "", 7, None]
)
def test_a_name_in_an_index_that_leads_out_of_the_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: object
) -> None:
    folder = save(llama(), tmp_path / "model", max_shard_size="100KB")
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    edited_index(folder, lambda files: files.update({NORM: name}))
    assert f"{INDEX} names {name!r}, which is no file name" in refusal(capsys, folder)


def test_parts_that_disagree_with_their_index_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(llama(), tmp_path / "model", max_shard_size="100KB")
    whole = (folder / INDEX).read_text()
    last = folder / json.loads(whole)["weight_map"][NORM]
    first = min(file for file in folder.glob("model-*.safetensors") if file != last)
    edited_index(folder, lambda files: files.update({NORM: first.name}))
    assert f"{first} has no tensor {NORM}, which {INDEX} says" in refusal(capsys, folder)
    edited_index(folder, lambda files: files.update({"x.weight": last.name}))
    assert "has no tensor" in refusal(capsys, folder)
    (folder / INDEX).write_text(whole)
    tensors = load_file(last)
    save_file(load_file(first) | {NORM: tensors[NORM]}, first)
    assert f"both have a tensor {NORM}" in refusal(capsys, folder)
    (folder / INDEX).write_text('{"weight_map": []}')
    assert "weight_map is [], but a model needs an object" in refusal(capsys, folder)
    (folder / INDEX).unlink()
    assert "pytorch_model.bin or index of several; its model-00001-of-" in refusal(capsys, folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    assert "index of several; download or save the model again" in refusal(capsys, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, value: float
) -> None:
    theirs = llama()
    theirs.model.layers[1].mlp.up_proj.weight.data[3, 2] = value
    message = refusal(capsys, save(theirs, tmp_path / "model"))
    assert "model.layers.1.mlp.up_proj.weight has weights that are not finite" in message


class RunsCode:
    """A value whose pickle makes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return exec, (f"open({str(self.file)!r}, 'w')",)


@pytest.mark.parametrize("legacy", [False, True], ids=["", "of torch before 1.6"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, legacy: bool
) -> None:
    folder = as_torch_files(save(gpt2(n_layer=1), tmp_path / "model"))
    values = {"wte.weight": RunsCode(tmp_path / "made")}
    file = folder / "pytorch_model.bin"
    torch.save(values, file, _use_new_zipfile_serialization=not legacy)
    assert "it would run code (exec), and only tensors and plain values" in refusal(capsys, folder)
    assert not (tmp_path / "made").exists()


def test_archives_that_inflate_or_are_damaged_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = as_torch_files(save(gpt2(n_layer=1), tmp_path / "model"))
    file = folder / "pytorch_model.bin"
    whole = file.read_bytes()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    assert "has compressed or overlapping records" in refusal(capsys, folder)
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "is damaged at" in refusal(capsys, folder)
    file.write_bytes(whole[:middle])
    assert "is truncated, damaged or not a file of torch.save" in refusal(capsys, folder)
    file.write_bytes(b"")
    assert "is truncated, damaged or not a file of torch.save" in refusal(capsys, folder)
