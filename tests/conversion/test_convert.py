"""Converted models against transformers: their logits, their tokenizers' ids, and every mistake in one sentence.

A GGUF file is written here with the `gguf` package's own writer, names and quantisation, and read by transformers as well.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers as hf
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import convert
import evaluate_checkpoints
import infer
from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.checkpoint.loading import Checkpoint, load_checkpoint
from pocketlm.config.sampling import SamplingParams
from pocketlm.conversion import gguf as gguf_reader
from pocketlm.conversion import huggingface
from pocketlm.errors import UserError, run_main
from pocketlm.inference import generate

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
VOCAB = 384  # of the models; the tokenizers have fewer entries
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
ROUNDING = 1e-4  # of logits as large as 5; measured: none at all with Llama, 2e-6 with GPT-2


def byte_level_bpe(splitter: str = "gpt-2") -> hf.Tokenizer:
    """A byte-level BPE of some 300 entries, trained with GPT-2's splitting or SmolLM's, of which the first two are special."""
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
    """Every parameter far enough from its initial value to matter."""
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
    """What `load_checkpoint` makes of what the command made of `path`."""
    file = Path(path).parent / "new" / "model.ckpt"
    assert convert.main([str(path), "--to", "ckpt", str(file), *more]) == 0
    assert [each.name for each in file.parent.iterdir()] == ["model.ckpt"]
    return load_checkpoint(file)


@torch.no_grad()
def worst_logit(ours: torch.nn.Module, theirs: torch.nn.Module, ids: Tensor | None = None) -> float:
    """The largest difference of any logit."""
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


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=True),
        dict(
            tie_word_embeddings=False, num_key_value_heads=2, rope_theta=54_321.0, rms_norm_eps=1e-3
        ),
        dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, head_dim=16),
    ],
    ids=["tied", "grouped", "bias"],
)
def test_a_llama_has_its_logits(tmp_path: Path, changes: dict) -> None:
    theirs = llama(**changes)
    ours = converted(save(theirs, tmp_path / "llama"))
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert ours.config.model.n_parameters == sum(p.numel() for p in theirs.parameters())
    assert (ours.config.model.max_seq_len, ours.step, ours.tokens, ours.val_loss) == (
        48,
        0,
        0,
        None,
    )


def test_one_in_many_files_is_the_same_model(tmp_path: Path) -> None:
    theirs = llama(num_key_value_heads=2)
    folder = save(theirs, tmp_path / "llama", max_shard_size="100KB")
    assert len([*folder.glob("model-0000*-of-0000*.safetensors")]) > 2
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_a_config_of_older_transformers_says_rope_theta_by_itself(tmp_path: Path) -> None:
    theirs = llama(rope_theta=777.0)
    folder = save(theirs, tmp_path / "llama")
    edit(
        folder / "config.json",
        rope_parameters=None,
        rope_theta=777.0,
        head_dim=None,
        attention_bias=None,
        mlp_bias=None,
    )
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_bfloat16_becomes_the_same_numbers_in_float32(tmp_path: Path) -> None:
    folder = save(llama().bfloat16(), tmp_path / "llama")
    ours, theirs = converted(folder), LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32}
    assert worst_logit(ours.model, theirs) < ROUNDING


@pytest.mark.parametrize(
    "changes",
    [{}, dict(n_inner=80, layer_norm_epsilon=1e-3, tie_word_embeddings=False)],
    ids=["tied", "untied"],
)
def test_a_gpt2_has_its_logits(tmp_path: Path, changes: dict) -> None:
    theirs = gpt2(**changes)
    ours = converted(save(theirs, tmp_path / "gpt2"))
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert ours.config.model.n_parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize(
    "model, part",
    [(llama(tie_word_embeddings=True), "model"), (gpt2(), "transformer")],
    ids=["llama", "gpt2"],
)
def test_a_file_without_the_head_has_names_without_a_prefix(
    tmp_path: Path, model: torch.nn.Module, part: str
) -> None:
    folder = save(getattr(model, part), tmp_path / part)
    assert not any(name.startswith(part) for name in load_file(folder / "model.safetensors"))
    assert worst_logit(converted(folder).model, model) < ROUNDING


def test_buffers_and_a_second_copy_of_the_tied_head_are_left_behind(tmp_path: Path) -> None:
    theirs = gpt2()
    folder = save(theirs, tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    more = {
        f"transformer.h.{i}.attn.{name}": torch.ones(1, 1, 48, 48)
        for i in range(2)
        for name in ("bias", "masked_bias")
    }
    save_file(
        tensors | more | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
        folder / "model.safetensors",
    )
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_llamas_old_buffers_are_left_behind(tmp_path: Path) -> None:
    theirs = llama()
    file = save(theirs, tmp_path / "llama") / "model.safetensors"
    more = {
        f"model.{part}rotary_emb.inv_freq": torch.ones(8)
        for part in ("", "layers.0.self_attn.", "layers.1.self_attn.")
    }
    save_file(load_file(file) | more, file)
    assert worst_logit(converted(file.parent).model, theirs) < ROUNDING


def test_the_tokenizer_has_transformers_ids_and_special_text_stays_text(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "llama")
    ours, theirs = converted(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert (
            ours.encode(text)
            == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        assert not {0, 1} & set(ours.encode(text))
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (0, 1)
    assert ours.vocab_size < VOCAB


@pytest.mark.parametrize(
    "where", ["tokenizer_config.json", "chat_template.jinja", "one of several"]
)
def test_the_chat_template_is_kept(tmp_path: Path, where: str) -> None:
    folder = save(gpt2(), tmp_path / "gpt2")
    converted(folder)
    assert "chat_template" not in read_checkpoint(tmp_path / "new/model.ckpt")["kit"]
    (tmp_path / "new/model.ckpt").unlink()
    several = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "other"}]
    if where == "chat_template.jinja":
        (folder / where).write_text(TEMPLATE)
    else:
        edit(
            folder / "tokenizer_config.json",
            chat_template=several if where == "one of several" else TEMPLATE,
        )
    converted(folder)
    assert read_checkpoint(tmp_path / "new/model.ckpt")["kit"]["chat_template"] == TEMPLATE


def test_infer_and_evaluate_take_a_converted_model(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    converted(save(gpt2(), tmp_path / "gpt2"))
    file = str(tmp_path / "new" / "model.ckpt")
    assert (
        infer.main(
            ["--ckpt", file, "--prompt", "The fox", "--temperature", "0", "--max-new-tokens", "60"]
        )
        == 0
    )
    (tmp_path / "cases.yaml").write_text("- {name: fox, prompt: The quick, target: ' brown fox'}\n")
    assert (
        evaluate_checkpoints.main(
            ["--checkpoints", file, "--cases", str(tmp_path / "cases.yaml"), "--csv"]
        )
        == 0
    )
    assert ",0,0,fox," in capsys.readouterr().out


# ---- GGUF ------------------------------------------------------------------------------------------------------------

F32, F16, Q8_0, Q4_1 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_1"))


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    kind: gguf.GGMLQuantizationType = F32,
    tokenizer: hf.Tokenizer | None = None,
    splitter: str = "gpt-2",
    **more: str,
) -> Path:
    """The model as llama.cpp's own converter would store it: matrices as `kind`, rows of q and k for neighbouring pairs."""
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


def as_stored(model: torch.nn.Module, kind: gguf.GGMLQuantizationType) -> torch.nn.Module:
    """The model with the numbers that quantising leaves of its matrices."""
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
    """Its pieces are those of a BPE trained on words that begin with the visible space, each scored by its rank; and some by hand."""
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
        gguf_reader.gguf_tokenizer(values, "model", "model.gguf"),
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


@pytest.mark.slow
def test_smollm2_has_the_logits_that_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    checkpoint = converted_name(tmp_path)
    path = DATA / "wheels" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.stat().st_size == 98_362_432
    theirs = LlamaForCausalLM(LlamaConfig(**load_gguf_checkpoint(path)["config"])).eval()
    theirs.load_state_dict(
        load_gguf_checkpoint(path, return_tensors=True, model_to_load=theirs)["tensors"],
        strict=False,
    )  # a tied head
    text = "The capital of France is Paris; it had 2,102,650 inhabitants in 2023. Qué día! 🙂 <|im_end|>"
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
    )  # 6.3; measured: no difference at all
    params = SamplingParams(max_new_tokens=4, temperature=0)
    said = "".join(
        piece for _, piece in generate.complete(checkpoint, "The capital of France is", params)
    )
    assert said.startswith(" Paris")


def converted_name(tmp_path: Path) -> Checkpoint:
    """SmolLM2 by its name, in the folder `tmp_path`."""
    assert (
        convert.main(
            ["smollm2-135m", "--to", "ckpt", str(tmp_path / "model.ckpt"), "--data-dir", str(DATA)]
        )
        == 0
    )
    return load_checkpoint(tmp_path / "model.ckpt")


# ---- mistakes --------------------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture, path: Path | str, *to: str) -> str:
    """The one sentence on stderr with which the command ends, in status 2 and without a new file."""
    target = Path(to[1]) if to else Path(path).parent / "new" / "model.ckpt"
    before = target.read_bytes() if target.exists() else None
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: convert.main([str(path), "--to", *(to or ("ckpt", str(target)))]))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert (target.read_bytes() if target.exists() else None) == before
    assert target.parent.exists() == (before is not None) and not [
        *target.parent.glob(".*unfinished")
    ]
    return said.removeprefix("error: ").strip()


def test_what_is_no_model_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty.gguf").touch()
    assert "has no config.json; give the folder" in refusal(capsys, tmp_path / "empty")
    assert "is not a GGUF file; give one, or the folder" in refusal(capsys, tmp_path / "notes.txt")
    assert "is not a GGUF file" in refusal(capsys, tmp_path / "empty.gguf")
    assert refusal(capsys, tmp_path / "nowhere").endswith(
        "give a Hugging Face folder, a GGUF file, or a name: smollm2-135m"
    )


def test_a_target_that_is_there_or_of_no_known_format_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "old.ckpt").write_text("precious")
    assert "old.ckpt is there already" in refusal(
        capsys, "smollm2-135m", "ckpt", str(tmp_path / "old.ckpt")
    )
    assert (
        refusal(capsys, "smollm2-135m", "onnx", str(tmp_path / "new/x.onnx"))
        == "--to onnx is no format; there is ckpt"
    )


LLAMA_CANNOT = {
    "model_type": (
        "mistral",
        "is of a model of the type 'mistral'; llama and gpt2 can be converted",
    ),
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "head_dim": (
        32,
        "head_dim is 32, which this model cannot express; it would have to be 16 or left out",
    ),
    "attention_bias": (True, "where attention_bias is True: mlp_bias is False"),
    "rope_parameters": (
        {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0},
        "rope_parameters: rope_type is 'llama3'",
    ),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, "rope_scaling: type is 'linear'"),
    "quantization_config": ({"bits": 4}, "quantization_config is"),
    "hidden_size": (
        62,
        "head_dim is 16, which this model cannot express; it would have to be 15 or left out",
    ),
    "num_attention_heads": (
        0,
        "num_attention_heads is 0, where a model needs a whole number above 0",
    ),
    "num_key_value_heads": (3, "n_heads 4 is not divisible by n_kv_heads 3"),
    "rms_norm_eps": ("small", "model.norm_eps is 'small'; it should be"),
    "num_hidden_layers": (
        1,
        "has the tensor model.layers.1.input_layernorm.weight, for which this model has no place",
    ),
    "intermediate_size": (
        97,
        "mlp.gate_proj.weight is torch.float32 of (96, 64), which does not make",
    ),
    "vocab_size": (100, "entries and the model 100; save the two as they belong together"),
}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("mistakes") / "llama")


@pytest.mark.parametrize("key", LLAMA_CANNOT)
def test_a_llama_that_cannot_be_expressed_is_told_by_key(
    llama_folder: Path, key: str, capsys: pytest.CaptureFixture
) -> None:
    value, said = LLAMA_CANNOT[key]
    file = llama_folder / "config.json"
    before = file.read_text()
    without_rope = {"rope_parameters": None} if key == "rope_scaling" else {}
    edit(file, **without_rope, **{key: value})
    try:
        assert said in refusal(capsys, llama_folder)
    finally:
        file.write_text(before)


@pytest.mark.parametrize(
    "key, value",
    [
        ("activation_function", "relu"),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("add_cross_attention", True),
    ],
)
def test_a_gpt2_that_cannot_be_expressed_is_told_by_key(key: str, value: object) -> None:
    with pytest.raises(
        UserError, match=f"config.json: {key} is {value!r}, which this model cannot express"
    ):
        huggingface.gpt2_settings({key: value}, "config.json")


def test_a_tensor_that_is_missing_left_over_or_of_whole_numbers_is_told_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(gpt2(), tmp_path / "gpt2")
    file = folder / "model.safetensors"
    tensors, name = load_file(file), "transformer.h.1.attn.c_attn.weight"
    save_file({key: p for key, p in tensors.items() if key != name}, file)
    assert f"has no tensor {name}, which its config asks for" in refusal(capsys, folder)
    save_file(tensors | {"score.weight": torch.zeros(2)}, file)
    assert "has the tensor score.weight, for which this model has no place" in refusal(
        capsys, folder
    )
    for wrong in (
        torch.zeros(64, 2),
        torch.zeros(192),
        torch.zeros(()),
        tensors[name].to(torch.int8),
    ):
        save_file(tensors | {name: wrong}, file)
        assert (
            f"the tensor {name} is {wrong.dtype} of {tuple(wrong.shape)}, which does not make"
            in refusal(capsys, folder)
        )


def test_a_folder_that_is_not_whole_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save(llama(), tmp_path / "llama", max_shard_size="100KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:5000])
    assert f"{shard.name} is damaged or not a safetensors file (" in refusal(capsys, folder)
    shard.unlink()
    assert f"there is no {shard}; fetch or save the model again" in refusal(capsys, folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").touch()
    assert "a pytorch_model.bin is not read: save the model again, as safetensors" in refusal(
        capsys, folder
    )
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json; save its tokenizer there" in refusal(capsys, folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON: " in refusal(capsys, folder)


def test_a_gguf_file_cut_anywhere_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write_gguf(tmp_path / "model.gguf", gpt2(n_layer=1))
    whole = path.read_bytes()
    for length in (4, 20, 100, 5_000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        assert "is truncated or damaged: what is read of it makes no sense (" in refusal(
            capsys, path
        )


GGUF_CANNOT = {
    "arch": ("qwen2", "is of a model of the type 'qwen2'; llama and gpt2 can be converted"),
    "llama__rope__scaling__type": (
        "yarn",
        "rope.scaling.type is 'yarn', which this model cannot express; it would have to be 'none'",
    ),
    "llama__expert_count": ("8", "llama.expert_count is '8'"),
    "splitter": (
        "jais",
        "splits text in the way 'jais'; gpt-2, smollm, llama-bpe can be converted",
    ),
}


@pytest.mark.parametrize("key", GGUF_CANNOT)
def test_a_gguf_file_that_cannot_be_expressed_is_told(
    tmp_path: Path, key: str, capsys: pytest.CaptureFixture
) -> None:
    value, said = GGUF_CANNOT[key]
    assert said in refusal(capsys, write_gguf(tmp_path / "model.gguf", llama(), **{key: value}))
