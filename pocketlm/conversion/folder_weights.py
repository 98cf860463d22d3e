"""The weights of a Hugging Face folder: safetensors, or pytorch_model.bin, in one or more files."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketlm.conversion.layout import require_key
from pocketlm.conversion.stored import StoredTensors
from pocketlm.conversion.torch_files import add_torch_tensors, require_tensors
from pocketlm.errors import UserError
from pocketlm.hub.special_tokens import read_json_object, unique_keys

# names of a single file; that of its index, for several, ends in .index.json
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"


def read_weights(folder: Path) -> StoredTensors:
    """Return the tensors of a folder. Raises UserError that names what is missing or damaged."""
    for name, add in ((SAFETENSORS, add_safetensors), (TORCH, add_torch_file)):
        if (folder / name).is_file() or (folder / f"{name}.index.json").is_file():
            return read_files(folder, name, add)
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    found = f"; its {', '.join(others[:3])} has no index" if others else ""
    raise UserError(
        f"{folder} has no weights: no {SAFETENSORS}, {TORCH} or index of several{found}; "
        "download or save the model again"
    )


def read_files(
    folder: Path, name: str, add: Callable[[StoredTensors, Path], None]
) -> StoredTensors:
    """Return the tensors of a file, or of those that its index lists."""
    tensors = StoredTensors()
    index = folder / f"{name}.index.json"
    if not index.is_file():
        add(tensors, folder / name)
        return tensors
    weight_map = require_key(read_json_object(index), "weight_map", dict, str(index))
    for file in weight_map.values():
        # the index comes with the model, and must not lead out of its folder
        if not isinstance(file, str) or not file.strip(".") or set(file) & set("/\\\0"):
            raise UserError(
                f"{index} names {file!r}, which is no file name; download the model again"
            )
    for file in dict.fromkeys(weight_map.values()):
        if not (folder / file).is_file():
            raise UserError(
                f"there is no {folder / file}, which {index.name} lists; "
                "download or save the model again"
            )
        add(tensors, folder / file)
    for tensor, file in weight_map.items():
        if tensor not in tensors or tensors.origins[tensor] != str(folder / file):
            raise UserError(
                f"{folder / file} has no tensor {tensor}, which {index.name} says it has; "
                "download or save the model again"
            )
    return tensors


def add_safetensors(tensors: StoredTensors, file: Path) -> None:
    """Add the tensors of a safetensors file."""
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
        with file.open("rb") as raw:  # the library takes one of two tensors of a name
            length = int.from_bytes(raw.read(8), "little")
            json.loads(raw.read(length), object_pairs_hook=unique_keys)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} is damaged or not a safetensors file ({error}); "
            "download or save the model again"
        ) from None
    for name in names:
        tensors.add(name, str(file), partial(read_tensor, file, name))


def read_tensor(file: Path, name: str) -> Tensor:
    """Return one tensor; the memory of the others is not touched."""
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def add_torch_file(tensors: StoredTensors, file: Path) -> None:
    """Add the tensors of a file of torch.save."""
    add_torch_tensors(tensors, file, lambda values: require_tensors(values, file))
