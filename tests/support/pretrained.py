"""Small random models of transformers, written as Hugging Face folders and GGUF files."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers as hf
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import convert
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.errors import run_main

DATA = Path(__file__).parents[2] / "data"
CORPUS = [
    "The quick brown fox jumps over the lazy dog in 2024, and 12 more in 1999.",
    "Él dijo: «¡Qué día!» 안녕하세요 🙂",
    "def f(x):\n\n    return x\t# 100",
] * 3
TEXTS = [
    "The fox jumps.",
    "It's 31,415 o'clock in  Qué\n\n\t  x",
    "🙂🙃 안녕 ﷽",
    "<|end|> and <|begin|> are text <s></s>",
    "",
    "a",
]
VOCAB = 384  # of the models; the tokenizers have fewer tokens
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=48,
)
TEMPLATE = "{% for message in messages %}<|begin|>{{ message['content'] }}<|end|>{% endfor %}"
SPECIAL = ["<|begin|>", "<|end|>"]
ROUNDING = 1e-4  # logits are as large as 5; measured: none with Llama, 2e-6 with GPT-2


def byte_level_bpe(splitter: str = "gpt-2") -> hf.Tokenizer:
    """Return a trained byte-level BPE of about 300 tokens; the first two are special."""
    backend = hf.Tokenizer(models.BPE())
    digits = [pre_tokenizers.Digits(individual_digits=True)] * (splitter == "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@torch.no_grad()
def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Set every parameter to random values that differ enough from the initial ones to matter."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        p.normal_(std=p.size(-1) ** -0.5) if p.dim() == 2 else p.normal_(
            0.0 if name.endswith("bias") else 1.0, 0.3
        )
    return model.eval()


def llama(**changes: object) -> LlamaForCausalLM:
    return randomise(LlamaForCausalLM(LlamaConfig(**SIZES | changes)))


def gpt2(**changes: object) -> GPT2LMHeadModel:
    return randomise(
        GPT2LMHeadModel(
            GPT2Config(
                **dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=48) | changes
            )
        )
    )


def save(model: torch.nn.Module, folder: Path, **how: object) -> Path:
    model.save_pretrained(folder, **how)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(), bos_token="<|begin|>", eos_token="<|end|>"
    ).save_pretrained(folder)
    return folder


def converted(path: Path | str, *more: str) -> Checkpoint:
    """Convert `path` with the command, and load the checkpoint."""
    file = Path(path).parent / "new" / "model.ckpt"
    assert convert.main([str(path), "--to", "ckpt", str(file), *more]) == 0
    assert [each.name for each in file.parent.iterdir()] == ["model.ckpt"]
    return load_checkpoint(file)


@torch.no_grad()
def worst_logit(ours: torch.nn.Module, theirs: torch.nn.Module, ids: Tensor | None = None) -> float:
    """Return the largest difference of any logit."""
    ids = (
        torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
        if ids is None
        else ids
    )
    return (ours(ids) - theirs(ids).logits).abs().max().item()


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None takes one out."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


F32, F16, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_1"))


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    kind: gguf.GGMLQuantizationType = F32,
    tokenizer: hf.Tokenizer | None = None,
    splitter: str = "gpt-2",
    **more: str,
) -> Path:
    """Write the model as llama.cpp's converter does: matrices as `kind`, q and k for pairs."""
    c, arch = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, more.pop("arch", arch))
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_vocab_size(c.vocab_size)
    writer.add_head_count(c.num_attention_heads)
    if arch == "llama":
        writer.add_feed_forward_length(c.intermediate_size)
        writer.add_head_count_kv(c.num_key_value_heads)
        writer.add_layer_norm_rms_eps(c.rms_norm_eps)
        writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(c.head_dim)
    else:
        writer.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
        writer.add_layer_norm_eps(c.layer_norm_epsilon)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    backend = tokenizer or byte_level_bpe(splitter)
    spec = json.loads(backend.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in SPECIAL else gguf.TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], c.num_hidden_layers)
    for name, p in model.named_parameters():
        array = p.detach().float().numpy()
        if ".c_" in name and array.ndim == 2:  # GPT-2's are (in, out)
            array = np.ascontiguousarray(array.T)
        for part, heads in (
            ("q_proj", c.num_attention_heads),
            ("k_proj", getattr(c, "num_key_value_heads", 0)),
        ):
            if part in name:
                array = (
                    array.reshape(heads, 2, -1, *array.shape[1:])
                    .swapaxes(1, 2)
                    .reshape(array.shape)
                )
        stored = kind if array.ndim == 2 else F32
        writer.add_tensor(
            names.get_name(name, (".weight", ".bias")),
            gguf.quantize(array, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(capsys: pytest.CaptureFixture, path: Path | str, *to: str) -> str:
    """Return the sentence on stderr; assert status 2 and that no file has been written."""
    target = Path(to[1]) if to else Path(path).parent / "new" / "model.ckpt"
    before = target.read_bytes() if target.exists() else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: convert.main([str(path), "--to", *(to or ("ckpt", str(target)))]))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert (target.read_bytes() if target.exists() else None) == before
    assert target.parent.exists() == (before is not None) and not [
        *target.parent.glob(".*unfinished")
    ]
    return message.removeprefix("error: ").strip()
