"""Where the field's tools put things in a model's files: ties, padding, parts, ids of ends."""

import shutil
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pocketlm.checkpoint.format import read_checkpoint
from pocketlm.conversion.gguf_tokenizer import read_tokenizer
from tests.support.pretrained import (
    ROUNDING,
    TEMPLATE,
    VOCAB,
    byte_level_bpe,
    converted,
    edit,
    gpt2,
    llama,
    refusal,
    save,
    worst_logit,
    write_gguf,
)

# ---- tied weights ----


@pytest.mark.parametrize("theirs", [llama(tie_word_embeddings=True), gpt2()], ids=["llama", "gpt2"])
def test_tied_weights_under_the_heads_name_are_the_same_model(
    tmp_path: Path, theirs: torch.nn.Module
) -> None:
    """safetensors' own save_model, which accelerate uses, keeps the first name by the alphabet."""
    folder = save(theirs, tmp_path / "tied")
    file = folder / "model.safetensors"
    safetensors.torch.save_model(theirs, str(file), metadata={"format": "pt"})
    assert "lm_head.weight" in load_file(file) and not any("embed" in k for k in load_file(file))
    assert worst_logit(converted(folder).model, theirs) < ROUNDING


def test_a_head_of_its_own_is_not_tied_whatever_the_config_says_as_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(llama(tie_word_embeddings=False), tmp_path / "untied")
    edit(folder / "config.json", tie_word_embeddings=True)
    ours, theirs = converted(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert worst_logit(ours.model, theirs) < ROUNDING
    assert not ours.config.model.tie_embeddings
    assert "they are not tied, as in transformers" in capsys.readouterr().err


def test_an_untied_model_without_its_embedding_is_refused_by_the_tensors_name(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save(llama(tie_word_embeddings=False), tmp_path / "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert "has no tensor model.embed_tokens.weight" in refusal(capsys, folder)


def test_a_gguf_file_with_the_head_alone_is_tied_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = llama(tie_word_embeddings=True)
    add = gguf.GGUFWriter.add_tensor

    def renamed(writer: gguf.GGUFWriter, name: str, *values: object, **options: object) -> None:
        add(writer, name.replace("token_embd", "output"), *values, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", renamed)
    path = write_gguf(tmp_path / "head_only.gguf", theirs)
    assert worst_logit(converted(path).model, theirs) < ROUNDING
    assert "stores output.weight and no token_embd.weight: it is both" in capsys.readouterr().err


# ---- the vocabulary beyond the model ----


def test_a_padding_token_beyond_the_model_is_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    n = byte_level_bpe().get_vocab_size()
    folder = save(llama(vocab_size=n), tmp_path / "llama")
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(),
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="[PAD]",
    ).save_pretrained(folder)
    ours, theirs = converted(folder).tokenizer, AutoTokenizer.from_pretrained(folder)
    assert theirs.pad_token_id == n and ours.vocab_size == n
    assert ours.encode("The fox [PAD]") == byte_level_bpe().encode("The fox [PAD]").ids
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert f"left out of the vocabulary, as the model has {n} tokens: '[PAD]' ({n})" in (
        capsys.readouterr().err
    )


# ---- GGUF ----


def test_a_model_in_several_gguf_files_is_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Split(gguf.GGUFWriter):
        def __init__(self, path: Path, arch: str):
            super().__init__(path, arch, split_max_tensors=8)

    theirs = llama()
    monkeypatch.setattr(gguf, "GGUFWriter", Split)
    write_gguf(tmp_path / "parts.gguf", theirs)
    parts = sorted(tmp_path.glob("parts-0000*-of-0000*.gguf"))
    assert len(parts) > 2
    assert worst_logit(converted(parts[0]).model, theirs) < ROUNDING
    shutil.rmtree(tmp_path / "new")
    assert worst_logit(converted(parts[2]).model, theirs) < ROUNDING
    shutil.rmtree(tmp_path / "new")
    alone = parts[0].rename(tmp_path / "renamed.gguf")
    assert f"is one of {len(parts)} files of a model, and is not called" in refusal(capsys, alone)
    assert f"of which there is no {parts[0].name} beside it" in refusal(capsys, parts[1])


SENTENCEPIECE = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "▁a"]


def sentencepiece_keys(**more: object) -> dict[str, object]:
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0]
    keys = {"model": "llama", "tokens": SENTENCEPIECE, "scores": scores}
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


def test_a_sentencepiece_gguf_without_ids_and_types_has_llama_cpps_defaults() -> None:
    tokenizer = read_tokenizer(sentencepiece_keys(), "model", "model.gguf")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)
    assert tokenizer.document_prefix == [1]
    assert tokenizer.encode("a") == [SENTENCEPIECE.index("▁a")]
    euro = [SENTENCEPIECE.index(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert tokenizer.encode("€")[-3:] == euro
    special = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values()]
    assert special == ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("add_bos, prefix", [(True, [1]), (False, [2])])
def test_add_bos_token_of_gguf_is_heeded(add_bos: bool, prefix: list[int]) -> None:
    keys = sentencepiece_keys(add_bos_token=add_bos)
    tokenizer = read_tokenizer(keys, "model", "model.gguf")
    assert (tokenizer.bos_id, tokenizer.document_prefix) == (1, prefix)


def test_ends_of_turns_and_messages_in_gguf_end_a_text() -> None:
    keys = sentencepiece_keys(eot_token_id=0, eom_token_id=1, padding_token_id=999)
    tokenizer = read_tokenizer(keys, "model", "model.gguf")
    assert (tokenizer.eos_id, tokenizer.end_ids) == (2, (0, 1))
    assert "padding_token_id is 999, beyond the vocabulary" in tokenizer.note


# ---- chat templates ----


@pytest.mark.parametrize(
    "names, used, note",
    [
        (["rag", "default"], "default", ""),
        (["rag"], "rag", "has one chat template, called rag, which is used"),
        (["rag", "tool_use"], None, "called rag, tool_use, none called default: not used"),
    ],
)
@pytest.mark.parametrize("where", ["tokenizer_config.json", "additional_chat_templates"])
def test_of_several_chat_templates_the_default_is_used(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    where: str,
    names: list[str],
    used: str | None,
    note: str,
) -> None:
    folder = save(gpt2(n_layer=1), tmp_path / "gpt2")
    if where.endswith(".json"):
        templates = [{"name": name, "template": TEMPLATE + name} for name in names]
        edit(folder / where, chat_template=templates)
    else:
        (folder / where).mkdir()
        for name in names:
            (folder / where / f"{name}.jinja").write_text(TEMPLATE + name)
    converted(folder)
    metadata = read_checkpoint(tmp_path / "new/model.ckpt")["kit"]
    assert metadata.get("chat_template") == (used and TEMPLATE + used)
    assert note in capsys.readouterr().err


def test_a_checkpoint_keeps_all_ends_and_names(tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "llama")
    edit(folder / "generation_config.json", eos_token_id=[1, 0])
    tokenizer = converted(folder).tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_ids) == (0, 1, (0,))
    assert tokenizer.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    assert tokenizer.vocab_size < VOCAB


# ---- what is not known ----


def test_a_key_that_is_not_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for theirs, name in ((llama(), "llama"), (gpt2(), "gpt2")):
        converted(save(theirs, tmp_path / name))
        assert "not read" not in capsys.readouterr().err
        shutil.rmtree(tmp_path / "new")
    edit(tmp_path / "llama" / "config.json", sliding_window=8)
    converted(tmp_path / "llama")
    assert "config.json has keys that are not read: sliding_window" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "new")
    converted(write_gguf(tmp_path / "plain.gguf", llama()))
    assert "not read" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "new")
    converted(write_gguf(tmp_path / "odd.gguf", llama(), llama__logit_scale="2"))
    assert "odd.gguf has keys that are not read: llama.logit_scale" in capsys.readouterr().err
