"""Files that torch.save has written: tensors and plain types, and never code."""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.checkpoint.format import first_damaged_record
from pocketlm.conversion.stored import StoredTensors
from pocketlm.errors import UserError

BEGINNINGS = (b"PK\x03\x04", b"\x80")  # a zip archive; a pickle, as of torch before 1.6


def is_torch_file(path: Path) -> bool:
    """Return whether a file begins as torch.save begins one."""
    with path.open("rb") as file:
        return file.read(4).startswith(BEGINNINGS)


def load_torch_file(path: Path) -> Any:
    """Return the content of a file that is not known to be whole. Raises UserError.

    A pickle can call any function of Python; `weights_only` allows those that make tensors and
    plain types.
    """
    try:
        if zipfile.is_zipfile(path):
            check_archive(path)
        return map_torch_file(path)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not read: {unpickling_problem(error)}") from None
    except MemoryError:
        raise UserError(f"there is not enough memory to read {path}") from None
    except Exception as error:  # a damaged file fails in a dozen ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is truncated, damaged or not a file of torch.save ({reason}); "
            "download or save it again"
        ) from None


def map_torch_file(path: Path) -> Any:
    """Return the content of a checked file; its tensors are mapped, if it is an archive."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on protocols of pickle
        is_archive = zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)


def check_archive(path: Path) -> None:
    """Raise UserError for what torch.load does not check: checksums, and records that inflate."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        stored = sum(record.file_size for record in records)
        if any(record.compress_type for record in records) or stored > path.stat().st_size:
            raise UserError(
                f"{path} has compressed or overlapping records, which torch.save does not write; "
                "download or save it again"
            )
        if damaged := first_damaged_record(archive, archive.namelist()):
            raise UserError(f"{path} is damaged at {damaged}; download or save it again")


def unpickling_problem(error: Exception) -> str:
    """Return why a pickle is not loaded, with the name of the function that it would call."""
    words = str(error).split()
    if "GLOBAL" in words:
        return (
            f"it would run code ({words[words.index('GLOBAL') + 1].rstrip('.')}), and only tensors "
            "and plain values are read; save the weights alone, as safetensors"
        )
    return "it is damaged, or has more than tensors and plain values; save it as safetensors"


def require_tensors(values: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name that a file has. Raises UserError if it has anything else."""
    if not isinstance(values, dict) or not values:
        raise UserError(f"{path} has no weights by name; save the state_dict of the model")
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path}: {name!r} is no tensor but a {type(tensor).__name__}; "
                "save the state_dict of the model alone"
            )
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or tensor.is_nested or tensor.is_quantized:
            raise UserError(
                f"{path}: the tensor {name} is sparse, nested, quantised or without values; "
                "save the model with plain tensors"
            )
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: the tensor {name} is larger than what is stored of it")
    return values


def add_torch_tensors(
    tensors: StoredTensors, path: Path, select: Callable[[Any], dict[str, Tensor]]
) -> None:
    """Add the tensors that `select` takes of a file's content. Raises UserError.

    Each is read from a new mapping of the file, so that the memory of the others is not kept. A
    file that is no archive cannot be mapped.
    """

    def mapped(name: str) -> Tensor:
        return select(map_torch_file(path))[name]

    def loaded(tensor: Tensor) -> Tensor:
        return tensor

    for name, tensor in select(load_torch_file(path)).items():
        if zipfile.is_zipfile(path):
            tensors.add(name, str(path), partial(mapped, name))
        else:
            tensors.add(name, str(path), partial(loaded, tensor))
