"""ONNX files, which are protobuf messages, written, read and quantised one weight at a time.

onnx, onnxruntime and its quantiser each hold all weights of a file at once, up to five times.
"""

import logging
import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pocketlm.conversion.stored import progress_bar
from pocketlm.errors import UserError
from pocketlm.export.proof import Array

MIN_MAPPED_BYTES = 1024  # a smaller weight is read with the graph, which may need its values


@dataclass(frozen=True)
class Weight:
    """A weight of a graph: its name and type, and how to read its values."""

    name: str
    data_type: int  # of onnx.TensorProto
    shape: tuple[int, ...]
    n_bytes: int
    read: Callable[[], Array]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter and the quantiser, which warn of what does not concern a user."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write_model(model: Any, weights: list[Weight], path: Path) -> None:
    """Write a model (an onnx.ModelProto without weights) and its weights.

    Fields of a protobuf message may come in any order, so the weights are behind all others:
    https://protobuf.dev/programming-guides/encoding
    """
    import onnx

    graph = model.graph.SerializeToString()
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    whole.ClearField("graph")
    heads = []
    for weight in weights:
        tensor = onnx.TensorProto(name=weight.name, dims=weight.shape, data_type=weight.data_type)
        head = tensor.SerializeToString()
        head += field_head(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, weight.n_bytes)
        n_bytes = len(head) + weight.n_bytes
        heads.append(field_head(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, n_bytes) + head)
    n_bytes = len(graph) + sum(map(len, heads)) + sum(weight.n_bytes for weight in weights)
    shapes = [weight.shape for weight in weights]
    with path.open("wb") as file, progress_bar("writing", shapes) as advance:
        file.write(whole.SerializeToString())
        file.write(field_head(onnx.ModelProto.GRAPH_FIELD_NUMBER, n_bytes) + graph)
        for head, weight in zip(heads, weights, strict=True):
            file.write(head)
            file.write(np.ascontiguousarray(weight.read()).reshape(-1).view(np.uint8).data)
            advance(weight.n_bytes)


def field_head(number: int, n_bytes: int) -> bytes:
    """Return what stands before the bytes of a field of a protobuf message."""
    head = bytearray([number << 3 | 2])
    while n_bytes > 127:
        head.append(n_bytes & 127 | 128)
        n_bytes >>= 7
    return bytes(head) + bytes([n_bytes])


# ---- reading ----


def mapped_model(path: Path) -> Any:
    """Return the onnx.ModelProto of a file, whose weights it names as external data, in the file.

    Raises UserError if the file is no whole message.
    """
    import onnx

    model, graph, weights = bytearray(), bytearray(), []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number, begin, value, end in fields(data, 0, len(data)):
            if number != onnx.ModelProto.GRAPH_FIELD_NUMBER:
                model += data[begin:end]
                continue
            for number, begin, inner, inner_end in fields(data, value, end):
                if number == onnx.GraphProto.INITIALIZER_FIELD_NUMBER:
                    weights.append(mapped_weight(path, data, inner, inner_end))
                else:
                    graph += data[begin:inner_end]
    whole = onnx.ModelProto.FromString(bytes(model))
    whole.graph.MergeFromString(bytes(graph))
    whole.graph.initializer.extend(weights)
    return whole


def mapped_weight(path: Path, data: mmap.mmap, begin: int, end: int) -> Any:
    """Return an onnx.TensorProto whose values, if they are many, stay in the file."""
    import onnx

    head, location = bytearray(), {}
    for number, field, value, field_end in fields(data, begin, end):
        if (
            number == onnx.TensorProto.RAW_DATA_FIELD_NUMBER
            and field_end - value >= MIN_MAPPED_BYTES
        ):
            location = {"location": path.name, "offset": value, "length": field_end - value}
        else:
            head += data[field:field_end]
    tensor = onnx.TensorProto.FromString(bytes(head))
    if location:
        tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in location.items():
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number of each field of a message, and where it, its value and its end are.

    Raises UserError if they do not end where the message does.
    """
    while begin < end:
        key, value = read_varint(data, begin)
        number, kind = key >> 3, key & 7
        if kind == 0:
            _, stop = read_varint(data, value)
        elif kind == 2:
            length, value = read_varint(data, value)
            stop = value + length
        else:
            stop = value + {1: 8, 5: 4}.get(kind, end)
        if stop > end:
            raise UserError(
                "the ONNX file is not read back as it was written; nothing was kept. "
                "Please report this as a bug"
            )
        yield number, begin, value, stop
        begin = stop


def read_varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Return protobuf's varint at a position, and where it ends."""
    number, shift = 0, 0
    while data[at] > 127:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | data[at] << shift, at + 1


def values_of(folder: Path, tensor: Any) -> Array:
    """Return the values of an onnx.TensorProto of a file in this folder; they may be mapped."""
    import onnx

    if not tensor.external_data:
        values: Array = onnx.numpy_helper.to_array(tensor)
        return values
    location = {entry.key: entry.value for entry in tensor.external_data}
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    file, offset = folder / location["location"], int(location["offset"])
    return np.memmap(file, dtype, "r", offset, tuple(tensor.dims))


# ---- 8 bits ----


def quantize_file(path: Path) -> None:
    """Quantise the matrices of a file to 8 bits by onnxruntime, one scale per column.

    Weights are unsigned: with signed ones, sums overflow on x86 CPUs without VNNI. The quantiser
    does as in `quantize_dynamic`, which would read the whole file three times.
    """
    import onnx
    from onnxruntime import quantization as library
    from onnxruntime.quantization.registry import IntegerOpsRegistry

    model = onnx.shape_inference.infer_shapes(mapped_model(path))
    library.quant_utils.add_infer_metadata(model)
    values = partial(values_of, path.parent)
    with (
        quiet(),
        patch.object(library.base_quantizer, "tensor_proto_to_array", values),
        patch.object(library.onnx_quantizer, "save_and_reload_model_with_shape_infer", same),
    ):
        quantizer = library.onnx_quantizer.ONNXQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            mode=library.QuantizationMode.IntegerOps,
            static=False,
            weight_qType=library.QuantType.QUInt8,
            activation_qType=library.QuantType.QUInt8,
            tensors_range=None,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=list(IntegerOpsRegistry),
            extra_options={"MatMulConstBOnly": True},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    model = quantizer.model.model
    weights = [stored_weight(path.parent, tensor) for tensor in model.graph.initializer]
    model.graph.ClearField("initializer")
    quantized = path.with_name(f"{path.name}.int8")
    try:
        write_model(model, weights, quantized)
        os.replace(quantized, path)
    finally:
        quantized.unlink(missing_ok=True)


def same(model: Any) -> Any:
    """Return a model, of which the shapes are inferred already."""
    return model


def stored_weight(folder: Path, tensor: Any) -> Weight:
    """Return the weight of an onnx.TensorProto of a file in this folder."""
    values = values_of(folder, tensor)
    return Weight(tensor.name, tensor.data_type, tuple(tensor.dims), values.nbytes, lambda: values)
