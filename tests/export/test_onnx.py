"""ONNX graphs that convert.py writes, in onnxruntime: other lengths, padding, the cache, int8."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

import convert
from model import Transformer
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.errors import UserError
from pocketlm.export.onnx import conversion as export
from pocketlm.export.onnx.files import mapped_model, quantize_file
from pocketlm.export.proof import Reference, greedy_tokens, our_step
from tests.support.checkpoints import byte_ids
from tests.support.exports import GPT2, a_checkpoint, export_refusal

# Of an export, which takes seconds: RoPE and grouped heads; learned positions and a fused head.
SIZES: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": GPT2}
ROUNDING = 1e-4  # logits are as large as 10; measured: 2e-5

pytestmark = pytest.mark.slow


@dataclass
class Converted:
    """A model, its graph, and the lines that the command printed."""

    model: Transformer
    file: Path
    lines: list[str]

    def run(self, ids: Any, mask: Any, positions: Any, past: list[Any] | None = None) -> list[Any]:
        """Run the graph as any other program would; return the logits and the new cache."""
        session = onnxruntime.InferenceSession(self.file, providers=["CPUExecutionProvider"])
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        names = [each.name for each in session.get_inputs() if each.name not in inputs]
        config = self.model.config
        empty = np.zeros((len(ids), config.n_kv_heads, 0, config.head_dim), np.float32)
        cache = dict(zip(names, past or [empty] * len(names), strict=True))
        return session.run(None, inputs | cache)


@pytest.fixture(scope="module", params=SIZES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("onnx")
    checkpoint, file = a_checkpoint(folder, **SIZES[request.param]), folder / "model.onnx"
    capture = pytest.MonkeyPatch()
    lines: list[str] = []
    capture.setattr("builtins.print", lambda *text, **to: lines.append(str(text[0])))
    assert convert.main([str(checkpoint), "--to", "onnx", str(file)]) == 0
    capture.undo()
    assert {each.name for each in folder.iterdir()} == {"model.ckpt", "model.onnx"}
    return Converted(load_checkpoint(checkpoint).model, file, lines[0].splitlines())


def test_other_lengths_have_our_logits_with_and_without_a_cache(converted: Converted) -> None:
    with torch.no_grad():
        for batch, length, split in ((1, 1, 0), (1, 96, 0), (3, 17, 5), (2, 40, 39)):
            ids = byte_ids(length, batch)
            expected = converted.model(ids).numpy()
            where = np.tile(np.arange(length), (batch, 1))
            past = None
            if split:
                seen = np.ones((batch, split), np.int64)
                _, *past = converted.run(ids[:, :split].numpy(), seen, where[:, :split])
            mask = np.ones((batch, length), np.int64)
            logits, *_ = converted.run(ids[:, split:].numpy(), mask, where[:, split:], past)
            assert np.abs(logits - expected[:, split:]).max() < ROUNDING


def test_padding_on_the_left_changes_nothing(converted: Converted) -> None:
    ids = byte_ids(9, batch=2).numpy()
    alone, *_ = converted.run(ids[1:, 4:], np.ones((1, 5), np.int64), np.arange(5)[None])
    mask = np.array([[1] * 9, [0] * 4 + [1] * 5])
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    together, *_ = converted.run(ids, mask, positions)
    assert np.abs(together[1:, 4:] - alone).max() < ROUNDING


def test_the_proof_is_printed_and_the_greedy_text_is_ours(converted: Converted) -> None:
    _, parity, shapes = converted.lines
    assert re.fullmatch(
        r"onnxruntime: largest logit difference \de-0\d, greedy 64 of 64 tokens",
        re.sub(r"\d\.\d", "1", parity),
    )
    assert "at other shapes (1x1 after 0, 3x5 after 0, 2x7 after 6)" in shapes
    step = export.onnx_step(converted.file, converted.model.config)
    prompt = byte_ids(20).numpy()
    ours = greedy_tokens(our_step(converted.model), prompt, 64)
    assert greedy_tokens(step, prompt, 64).tolist() == ours.tolist()


def test_its_axes_have_names_and_its_metadata_the_tokenizer(converted: Converted) -> None:
    graph = onnx.load(converted.file)
    onnx.checker.check_model(graph)
    axes = {
        each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in graph.graph.input
    }
    assert axes["input_ids"] == ["batch", "sequence"]
    assert axes["past_key_values.1.value"][::2] == ["batch", "past"]
    metadata = {each.key: each.value for each in graph.metadata_props}
    assert json.loads(metadata["tokenizer.json"])["model"]["type"] == "BPE"
    assert json.loads(metadata["generation_config.json"])["eos_token_id"] == 256


def test_int8_is_smaller_and_its_cost_is_that_of_the_two_graphs(converted: Converted) -> None:
    checkpoint = load_checkpoint(converted.file.with_name("model.ckpt"))
    small = converted.file.with_name("int8.onnx")
    small.write_bytes(converted.file.read_bytes())
    quantize_file(small)
    saved = converted.file.stat().st_size - small.stat().st_size
    assert saved > 2 * checkpoint.model.config.n_parameters  # of 4 bytes each, at most 3 are saved
    step = export.onnx_step(converted.file, checkpoint.model.config)
    text = "It is 12 o'clock in the café. " * 8  # more than two contexts
    ids = np.array([[256, *text.encode()]])
    with torch.no_grad():
        nats = sum(
            torch.nn.functional.cross_entropy(
                checkpoint.model(torch.tensor(ids[:, start : start + 96]))[
                    0, : ids.shape[1] - 1 - start
                ],
                torch.tensor(ids[0, start + 1 : start + 97]),
                reduction="sum",
            ).item()
            for start in range(0, ids.shape[1] - 1, 96)
        )
    bits = nats / np.log(2) / len(text.encode())
    assert export.bits_per_byte(step, checkpoint, [text]) == pytest.approx(bits, rel=1e-5)
    cost = export.bits_per_byte(
        export.onnx_step(small, checkpoint.model.config), checkpoint, [text]
    )
    assert cost != bits and cost == pytest.approx(bits, rel=0.2)


def test_int8_is_what_onnxruntimes_quantizer_makes_of_the_whole_file(converted: Converted) -> None:
    """The quantiser is given one weight at a time, and the file is written without its writer."""
    small = converted.file.with_name("small.onnx")
    small.write_bytes(converted.file.read_bytes())
    quantize_file(small)
    whole = converted.file.with_name("whole.onnx")
    quantize_dynamic(converted.file, whole, weight_type=QuantType.QUInt8, per_channel=True)
    found, expected = onnx.load(small), onnx.load(whole)
    assert sorted(map(str, found.graph.node)) == sorted(map(str, expected.graph.node))
    weights = [
        {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
        for model in (found, expected)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, expected_weight in weights[1].items():
        np.testing.assert_array_equal(weights[0][name], expected_weight, strict=True)


def test_a_file_that_is_cut_anywhere_is_not_read_as_a_graph(converted: Converted) -> None:
    data = converted.file.read_bytes()
    cut = converted.file.with_name("cut.onnx")
    for length in (len(data) - 1, len(data) // 2):
        cut.write_bytes(data[:length])
        with pytest.raises(UserError, match="not read back as it was written"):
            mapped_model(cut)


def test_a_graph_that_differs_or_is_too_large_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = a_checkpoint(tmp_path)

    def other(checkpoint: Path, path: Path) -> None:
        path.touch()

    monkeypatch.setattr(export, "export_in_new_process", other)
    monkeypatch.setattr(export, "onnx_step", lambda path, config: zeros)
    assert "the converted model is not the same" in export_refusal(capsys, checkpoint, "onnx")
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    assert "an ONNX file holds" in export_refusal(capsys, checkpoint, "onnx")
    assert "x.txt" in export_refusal(
        capsys, checkpoint, "onnx", "--dtype", "int8", "--text", str(tmp_path / "x.txt")
    )


def test_token_shift_is_refused_for_the_graphs_cache_has_no_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = a_checkpoint(tmp_path, token_shift=True)
    assert "token_shift" in export_refusal(capsys, checkpoint, "onnx")


def zeros(ids: Any, cache: Any) -> tuple[Any, Any]:
    return np.zeros((*ids.shape, 257), np.float32), None


@pytest.mark.parametrize("wrong", [1.0, math.nan])
def test_a_graph_that_differs_at_another_shape_is_refused(wrong: float) -> None:
    reference = Reference(np.zeros((2, 3), np.int64), np.ones((2, 3, 5)), np.zeros(1, np.int64))
    expected = {shape: np.ones((*shape[:2], 5)) for shape in export.OTHER_SHAPES}
    logits = {shape: value.copy() for shape, value in expected.items()}
    assert "0.0e+00" in export.compare_shapes(logits, expected, reference)
    logits[3, 5, 0].flat[0] += wrong
    with pytest.raises(UserError, match="differs by .* at lengths other than"):
        export.compare_shapes(logits, expected, reference)
