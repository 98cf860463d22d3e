"""Checkpoints of nanoGPT and of the starter, written as they write them, against transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pocketlm.config.sampling import SamplingParams
from pocketlm.inference.generate import complete
from tests.support.pretrained import (
    CORPUS,
    DATA,
    ROUNDING,
    VOCAB,
    byte_level_bpe,
    converted,
    gpt2,
    llama,
    refusal,
    worst_logit,
)

SYMBOLS = "".join(map(chr, range(0x4E00, 0x4E00 + VOCAB - 1))) + "\n"
EXACT = gpt2(activation_function="gelu")  # nanoGPT's, where GPT-2's is an approximation


def nanogpt(path: Path, *, bias: bool = True, prefix: str = "", **more: object) -> Path:
    """Write the weights of EXACT as nanoGPT's train.py does; without biases, those are zero."""
    weights = {}
    for name, tensor in EXACT.state_dict().items():
        is_bias = name.endswith("bias")
        if is_bias and not bias:
            tensor.zero_()
        if bias or not is_bias:
            transposed = ".c_" in name and tensor.dim() == 2  # GPT-2's are (in, out)
            weights[prefix + name] = tensor.T if transposed else tensor
    args = dict(n_layer=2, n_head=4, n_embd=64, block_size=48, bias=bias, dropout=0.1)
    state = {
        "model": weights,
        "optimizer": torch.optim.AdamW(EXACT.parameters()).state_dict(),
        "model_args": args | {"vocab_size": VOCAB},
        "iter_num": 10,
        "best_val_loss": torch.tensor(1.0),
        "config": {"dataset": "shakespeare_char"},
    }
    torch.save(state | more, path)
    return path


def neighbours(weight: Tensor, n_heads: int) -> Tensor:
    """Reorder the rows of q or k for a RoPE that rotates neighbours, one row at a time."""
    half = len(weight) // n_heads // 2
    rows = [
        h * 2 * half + i + part * half
        for h in range(n_heads)
        for i in range(half)
        for part in (0, 1)
    ]
    return weight[rows]


STARTER_NAMES = {
    "model.layers": "blocks",
    "model.embed_tokens": "tok_emb",
    "model.norm": "norm_f",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "self_attn.q_proj": "attn.Wq",
    "self_attn.k_proj": "attn.Wk",
    "self_attn.v_proj": "attn.Wv",
    "self_attn.o_proj": "attn.out",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w2",
    "mlp.down_proj": "mlp.w3",
}


def starter(path: Path, theirs: torch.nn.Module, tokenizer: str, **model: object) -> Path:
    """Write the weights of a Llama as the starter's LightningModule does."""
    weights = {}
    for name, tensor in theirs.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            tensor = neighbours(tensor, 4 if "q_proj" in name else 2)
        for hers, starters in STARTER_NAMES.items():
            name = name.replace(hers, starters)
        weights[f"net.{name}"] = tensor
    sizes = dict(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, dropout=0.0)
    others = dict(vocab_size=None, rope_theta=1_000_000, swa_window=0, gradient_checkpointing=True)
    config = {
        "model": sizes | others | {"tie_embeddings": theirs.config.tie_word_embeddings} | model,
        "training": {"seq_len": 48, "lr": 3e-4},
        "data": {"tokenizer_name": tokenizer},
    }
    state = {"state_dict": weights, "hyper_parameters": config, "global_step": 3, "epoch": 0}
    torch.save(state | {"pytorch-lightning_version": "2.5.0"}, path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "input.txt").write_text(SYMBOLS)
    return str(tmp_path / "input.txt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["", "compiled"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_has_the_logits_of_a_gpt2_with_the_exact_gelu(
    tmp_path: Path, text: str, bias: bool, prefix: str
) -> None:
    ours = converted(nanogpt(tmp_path / "ckpt.pt", bias=bias, prefix=prefix), "--text", text)
    assert worst_logit(ours.model, EXACT) < ROUNDING
    assert worst_logit(ours.model, EXACT) < 0.01 * worst_logit(ours.model, gpt2())
    assert ours.config.model.bias == bias and ours.config.model.mlp == "gelu_exact"
    # nanoGPT's prepare.py: the ids are the places of the characters in sorted(set(text))
    assert ours.tokenizer.encode(SYMBOLS[:3] + "\n") == [1, 2, 3, 0]
    assert ours.tokenizer.decode([3, 0, 1]) == SYMBOLS[2] + "\n" + SYMBOLS[0]
    params = SamplingParams(max_new_tokens=4, temperature=0)
    assert len("".join(piece for _, piece in complete(ours, SYMBOLS[:5], params))) == 4


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head of its own"])
def test_a_starters_model_has_the_logits_of_a_llama(tmp_path: Path, tied: bool) -> None:
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    theirs = llama(
        num_key_value_heads=2, rope_theta=1e6, rms_norm_eps=1e-5, tie_word_embeddings=tied
    )
    ours = converted(starter(tmp_path / "last.ckpt", theirs, str(tmp_path / "tokenizer.json")))
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert ours.config.model.tie_embeddings == tied
    assert ours.tokenizer.encode(CORPUS[0]) == byte_level_bpe().encode(CORPUS[0]).ids


def test_a_vocabulary_of_gpt2s_size_is_gpt2s(tmp_path: Path) -> None:
    weight = torch.randn(50_304, 64) / 8
    state = torch.load(nanogpt(tmp_path / "ckpt.pt"))
    for name in ("transformer.wte.weight", "lm_head.weight"):
        state["model"][name] = weight
    torch.save(
        state | {"model_args": state["model_args"] | {"vocab_size": 50_304}}, tmp_path / "ckpt.pt"
    )
    tokenizer = converted(tmp_path / "ckpt.pt", "--data-dir", str(DATA)).tokenizer
    assert (tokenizer.encode("Hello world"), tokenizer.eos_id) == ([15496, 995], 50256)


# ---- refusals ----


class RunsCode:
    """A value whose pickle makes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return exec, (f"open({str(self.file)!r}, 'w')",)


def test_what_is_no_such_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    path = tmp_path / "ckpt.pt"
    assert "a vocabulary of 384 tokens and no tokenizer (a meta.pkl is not read, as" in refusal(
        capsys, nanogpt(path)
    )
    nanogpt(path, config={"hook": RunsCode(tmp_path / "made")})
    assert "it would run code (exec)" in refusal(capsys, path)
    assert not (tmp_path / "made").exists()
    nanogpt(path, model_args={"n_layer": 2})
    assert "n_embd is None, but a model needs a whole number above 0" in refusal(capsys, path)
    nanogpt(path, model={"transformer.wte.weight": "text"})
    assert "'transformer.wte.weight' is no tensor but a str" in refusal(capsys, path)
    nanogpt(path, model={"x": torch.zeros(1).expand(10**9)})
    assert "the tensor x is larger than what is stored of it" in refusal(capsys, path)
    torch.save({"weights": 1, "step": 2}, path)
    assert "none of the starter (state_dict, hyper_parameters): it has weights, step" in refusal(
        capsys, path
    )
    for other, kind in (([1], "list"), (1, "int"), (torch.zeros(3), "Tensor")):
        torch.save(other, path)
        assert f"ckpt.pt holds a {kind}; give a checkpoint of nanoGPT" in refusal(capsys, path)
    path.write_bytes(path.read_bytes()[:200])
    assert "is truncated, damaged or not a file of torch.save" in refusal(capsys, path)
    llamas = starter(path, llama(num_key_value_heads=2), "gpt2", swa_window=8)
    assert "swa_window is 8, which this model cannot express" in refusal(capsys, llamas)


def test_a_text_of_other_characters_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "other.txt").write_text("abc")
    nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(Exception, match=r"has 3 different characters and .* 384 tokens"):
        converted(tmp_path / "ckpt.pt", "--text", str(tmp_path / "other.txt"))
    with pytest.raises(Exception, match="--tokenizer byte is made from a text"):
        converted(tmp_path / "ckpt.pt", "--tokenizer", "byte")
