"""GGUF files that convert.py writes: read by transformers, by our reader, and by llama.cpp."""

import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import convert
from pocketlm.checkpoint.format import read_checkpoint, save_checkpoint
from pocketlm.checkpoint.loading import load_checkpoint
from pocketlm.conversion.gguf import read_gguf
from pocketlm.export.gguf import DTYPES
from pocketlm.export.proof import TEXTS as TEXTS_OF_PROOFS
from pocketlm.export.proof import greedy_tokens, our_step
from pocketlm.hub.special_tokens import SpecialTokens
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.build import build_tokenizer
from tests.support.checkpoints import byte_ids
from tests.support.exports import (
    GPT2,
    MODELS,
    a_checkpoint,
    architecture,
    changed_checkpoint,
    export_refusal,
    exported,
    same_weights,
)
from tests.support.pretrained import TEMPLATE, byte_level_bpe
from tests.support.tokenizer_families import SIZE, qwen
from tests.support.tokenizer_kinds import DATA

ROUNDING = 1e-4  # logits are as large as 10; measured: 4e-6
CAT = "the cat sat on the mat, the dog sat on the log. " * 5
BPE = build_tokenizer("bpe:300", DATA, [CAT, "中文中文 naïve 😀😀"])
QWEN = qwen()
TOKENIZERS = {
    "byte": build_tokenizer("byte", DATA),
    "bpe": BPE,
    "bpe with bos": build_tokenizer("bpe:300", DATA, [CAT], bos=True),
    "trimmed gpt2": build_tokenizer("gpt2:300", DATA, [CAT]),
    "qwen": JsonTokenizer(QWEN.to_str(), "qwen", None, QWEN.token_to_id("<|im_end|>")),
    "digits one by one": JsonTokenizer(byte_level_bpe("smollm").to_str(), "smollm", 0, 1),
}
TEXTS = st.lists(
    st.sampled_from(["<|endoftext|>", "1234", "\r\n", "  ", "it's"]) | st.text(max_size=8),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("sizes", [{}, GPT2], ids=["llama", "gpt2"])
def test_transformers_has_our_logits_of_a_file(tmp_path: Path, sizes: dict) -> None:
    # of another context_length, transformers 5.23 leaves out the positions of a GPT-2
    checkpoint = a_checkpoint(tmp_path, tokenizer=BPE, max_seq_len=1024, **sizes)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name).eval()
    ids = byte_ids(80, batch=2)
    with torch.no_grad():
        assert (load_checkpoint(checkpoint).model(ids) - theirs(ids).logits).abs().max() < ROUNDING
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    text = "the cat's 中文 naïve 😀 12345\n\n x"
    assert tokenizer.encode(text, add_special_tokens=False) == BPE.encode(text)


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_a_file_read_again_is_the_same_model_to_the_last_bit(tmp_path: Path, sizes: dict) -> None:
    checkpoint = a_checkpoint(tmp_path, **sizes)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf")
    again = tmp_path / "again.ckpt"
    assert convert.main([str(file), "--to", "ckpt", str(again)]) == 0
    assert same_weights(checkpoint, again)
    assert architecture(again) == architecture(checkpoint)


# Relative to the largest weight: half a unit in the last of the 11 or 8 bits; half a step of 127;
# a whole step of 8, to which the largest of the other sign is cut. Scales are float16.
STEPS = {"f16": 2**-11, "bf16": 2**-8, "q8_0": 1 / 254 + 2**-11, "q4_0": 1 / 8 + 2**-11}


@pytest.mark.parametrize("dtype", STEPS)
def test_matrices_are_as_near_as_their_type_allows(tmp_path: Path, dtype: str) -> None:
    checkpoint = a_checkpoint(tmp_path, d_model=64, d_ff=96)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf", "--dtype", dtype)
    stored = {entry.name: entry.tensor_type.name.lower() for entry in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.ffn_up.weight"] == dtype
    assert stored["token_embd.weight"] == ("q8_0" if dtype == "q4_0" else dtype)
    assert stored["output_norm.weight"] == "f32"
    ours, read = load_checkpoint(checkpoint).model, read_gguf(file, "byte").weights
    for name, weight in ours.named_parameters():
        error = (read[name] - weight).abs().max() / weight.abs().max()
        assert error <= (STEPS[dtype] if weight.dim() == 2 else 0)


def test_rows_that_no_block_fits_are_float16_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = a_checkpoint(tmp_path, d_ff=40)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf", "--dtype", "q8_0")
    stored = {entry.name: entry.tensor_type.name for entry in gguf.GGUFReader(file).tensors}
    assert (stored["blk.0.ffn_up.weight"], stored["blk.0.ffn_down.weight"]) == ("Q8_0", "F16")
    assert "2 matrices are f16, since blocks of 32 weights do not fit" in capsys.readouterr().out


@pytest.fixture(scope="module")
def read_again(tmp_path_factory: pytest.TempPathFactory) -> dict[str, JsonTokenizer]:
    """Return each tokenizer as our reader makes it of a file."""
    found = {}
    for name, tokenizer in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp("gguf")
        sizes = dict(tokenizer=tokenizer, vocab_size=SIZE + 3, d_model=8, n_heads=1, n_kv_heads=1)
        file = exported(a_checkpoint(folder, **sizes), "gguf", folder / "model.gguf")
        found[name] = read_gguf(file, name).tokenizer
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_a_tokenizer_of_a_file_has_our_ids(
    read_again: dict[str, JsonTokenizer], name: str, text: str
) -> None:
    ours, again = TOKENIZERS[name], read_again[name]
    assert again.encode(text) == ours.encode(text)
    assert again.document_prefix == ours.document_prefix
    assert again.eos_id == ours.eos_id


def test_ends_and_the_chat_template_are_kept_and_a_third_end_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    special = SpecialTokens(end_ids=(5, 7, 9), names={"bos_token": "<|begin|>"})
    tokenizer = JsonTokenizer(byte_level_bpe().to_str(), "chat", 0, 1, special=special)
    checkpoint = changed_checkpoint(
        a_checkpoint(tmp_path, tokenizer=tokenizer), chat_template=TEMPLATE
    )
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf")
    again = read_gguf(file, "chat")
    assert (again.tokenizer.bos_id, again.tokenizer.eos_id) == (0, 1)
    assert again.tokenizer.end_ids == (5, 7)
    assert again.chat_template == TEMPLATE
    assert "GGUF has no key for the end ids 9: left out" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["char", "char:20", "seen-bytes"])
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, kind: str
) -> None:
    checkpoint = a_checkpoint(tmp_path, tokenizer=build_tokenizer(kind, DATA, [CAT]))
    message = export_refusal(capsys, checkpoint, "gguf")
    assert f"llama.cpp has no tokenizer with the ids of {kind!r}" in message


def test_the_exact_gelu_which_llama_cpp_lacks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = a_checkpoint(tmp_path, **GPT2 | dict(mlp="gelu_exact"))
    assert "llama.cpp cannot compute, because of mlp 'gelu_exact'" in export_refusal(
        capsys, checkpoint, "gguf"
    )


# ---- llama.cpp itself, which takes half an hour to compile: pytest -m llama_cpp ----

HARD_TEXTS = [
    *TEXTS_OF_PROOFS,
    "the cat sat",
    "it's 12345\r\n\n  中文 😀",
    "<|endoftext|> x",
    "a\u3000\ufeffb ",
    " \n \n\n  x   y\t\t",
    "É\u0301\u200d🇫🇷 ١٢٣ ½ Ⅷ 𝟘",
    "I'LL we've 3.14e-10 __init__ C++ ~/.x",
]
# How far below the best a token of llama.cpp may be, where logits have a standard deviation of 2:
# it also rounds what enters a matrix, to 11 bits with f16, to 8 bits with q8_0. Measured: 0, 0.1.
WITHIN = {"f32": 0.0, "f16": 0.02, "q8_0": 0.25}


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return llama.cpp without its matrices for AMX, which a virtual machine may not have."""
    module = pytest.importorskip("llama_cpp")
    default = module.llama_cpp.llama_model_default_params

    def portable() -> Any:
        params = default()
        params.use_extra_bufts = False
        return params

    monkeypatch.setattr(module.llama_cpp, "llama_model_default_params", portable)
    return module


@pytest.mark.llama_cpp
@pytest.mark.parametrize("sizes", [{}, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_llama_cpp_has_our_ids_and_our_greedy_text(
    tmp_path: Path, llama_cpp: ModuleType, tokenizer: Tokenizer, sizes: dict
) -> None:
    checkpoint = a_checkpoint(tmp_path, tokenizer=tokenizer, **sizes)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(file), n_ctx=96, n_threads=1, logits_all=True, verbose=False)
    for text in HARD_TEXTS:
        if tokenizer.name == "qwen":  # llama.cpp does not normalise, as the conversion says
            text = unicodedata.normalize("NFC", text)
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text)
    prompt = tokenizer.document_prefix + tokenizer.encode("the cat sat")
    assert theirs.tokenize(b"the cat sat", add_bos=True, special=False) == prompt
    ours = greedy_tokens(our_step(load_checkpoint(checkpoint).model), np.array([prompt]), 64)
    assert greedy_of_llama_cpp(theirs, prompt, 64) == ours.tolist()


@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", WITHIN)
@pytest.mark.parametrize("sizes", [{}, GPT2], ids=["llama", "gpt2"])
def test_llama_cpp_chooses_the_tokens_that_are_best_in_the_file(
    tmp_path: Path, llama_cpp: ModuleType, sizes: dict, dtype: str
) -> None:
    checkpoint = a_checkpoint(tmp_path, tokenizer=BPE, d_model=64, d_ff=96, **sizes)
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf", "--dtype", dtype)
    assert convert.main([str(file), "--to", "ckpt", str(tmp_path / "again.ckpt")]) == 0
    theirs = llama_cpp.Llama(str(file), n_ctx=96, n_threads=1, logits_all=True, verbose=False)
    prompt = BPE.document_prefix + BPE.encode("the cat sat")
    found = greedy_of_llama_cpp(theirs, prompt, 64)
    with torch.inference_mode():
        logits = load_checkpoint(tmp_path / "again.ckpt").model(torch.tensor([prompt + found]))
    before = logits[0, len(prompt) - 1 : -1]  # each token found
    chosen = before[torch.arange(64), torch.tensor(found)]
    assert (before.amax(-1) - chosen).max() <= WITHIN[dtype]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_llama_cpp_continues_a_trained_model_in_every_type_as_this_program_in_float32(
    tmp_path: Path, llama_cpp: ModuleType, dtype: str
) -> None:
    """Compare greedy text where a model is certain enough for four bits: what it has learned."""
    checkpoint = trained_on_cats(a_checkpoint(tmp_path, tokenizer=BPE, d_model=64, d_ff=96))
    file = exported(checkpoint, "gguf", tmp_path / "model.gguf", "--dtype", dtype)
    theirs = llama_cpp.Llama(str(file), n_ctx=96, n_threads=1, logits_all=True, verbose=False)
    prompt = BPE.document_prefix + BPE.encode("the cat")
    ours = greedy_tokens(our_step(load_checkpoint(checkpoint).model), np.array([prompt]), 24)
    assert CAT.startswith("the cat" + BPE.decode(ours.tolist()))
    assert greedy_of_llama_cpp(theirs, prompt, 24) == ours.tolist()


def trained_on_cats(path: Path) -> Path:
    """Train a checkpoint until it knows the text."""
    state, model = read_checkpoint(path), load_checkpoint(path).model.train()
    ids = torch.tensor([BPE.document_prefix + BPE.encode(CAT)])[:, :64]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {f"model.{name}": each.detach() for name, each in model.state_dict().items()}
    save_checkpoint(state | {"state_dict": weights}, path)
    return path


def greedy_of_llama_cpp(theirs: Any, prompt: list[int], n_tokens: int) -> list[int]:
    """Return the most likely tokens after a prompt."""
    theirs.eval(prompt)
    found: list[int] = []
    for _ in range(n_tokens):
        found.append(int(np.argmax(theirs.scores[theirs.n_tokens - 1])))
        theirs.eval(found[-1:])
    return found
