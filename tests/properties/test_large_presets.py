"""Presets that no machine here holds: counted on the meta device, planned, and trained small."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
import transformers

import train
from pocketlm.config.loading import load_config
from tests.support.training import write_text_and_config

ROOT = Path(__file__).parents[2]

# the models' own config.json on the hub, without what does not decide a shape
GPT2_XL = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 1600, "n_layer": 48, "n_head": 25}
GPT2 = GPT2_XL | {"n_embd": 768, "n_layer": 12, "n_head": 12}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
}
LARGE = {  # the published number of parameters, the class of transformers, its sizes
    "gpt2_124m": (124_439_808, "GPT2", GPT2),
    "gpt2_1558m": (1_557_611_200, "GPT2", GPT2_XL),
    "llama_1b": (1_235_814_400, "Llama", LLAMA_1B),
    "llama_7b": (6_738_415_616, "Llama", LLAMA_7B),
}
PLANNED = ["gpt2_1558m", "llama_1b", "llama_7b"]


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_has_the_published_parameters_and_those_of_transformers(name):
    published, kind, sizes = LARGE[name]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.device("meta"):
        theirs = getattr(
            transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        )(config)
    preset = load_config(ROOT / f"presets/{name}.yaml").with_vocab_size(sizes["vocab_size"])
    assert sum(p.numel() for p in theirs.parameters()) == published
    assert preset.model.n_parameters == published


@pytest.mark.parametrize("name", PLANNED)
def test_a_preset_is_planned_for_cards_that_it_fits_without_reading_data(name, capsys, tmp_path):
    preset = load_config(ROOT / f"presets/{name}.yaml")
    with contextlib.chdir(tmp_path):
        path = str(ROOT / f"presets/{name}.yaml")
        train.main(["--config", path, "--dry-run", "--card", "H100", "--price", "2"])
        assert not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    count = preset.hardware.world_size
    assert re.search(rf"one device +ddp on {count} +fsdp on {count}", shown)
    *_, fsdp = re.search(r"fits +(\w+) +(\w+) +(\w+)", shown).groups()
    assert fsdp == "yes"
    assert f"{LARGE[name][0]:,}" in shown
    # all cards together have the same hours, whatever the strategy, if sending is hidden
    tokens = preset.training.steps * preset.training.micro_batch * preset.training.seq_len
    assert f"{tokens * preset.training.grad_accum_steps:,} tokens in all" in shown


@pytest.mark.parametrize("name", PLANNED)
def test_a_scaled_down_copy_of_a_preset_trains(name, tmp_path, monkeypatch):
    """All that the preset sets is kept, but the sizes, the hub and the devices."""
    monkeypatch.chdir(tmp_path)
    write_text_and_config(tmp_path)
    small = ["n_layers=2", "d_model=16", "n_heads=2", "d_ff=32", "vocab_size=null"]
    small += ["n_kv_heads=1"] if name == "llama_1b" else []
    data = ["path=text.txt", "separator=line", "val_share=0.2", "tokenizer=bpe:300"]
    training = ["seq_len=16", "micro_batch_size=4", "grad_accum_steps=2", "max_steps=2"]
    training += ["precision=32-true", "warmup_steps=1"]
    hardware = ["accelerator=cpu", "devices=1", "num_nodes=1", "strategy=auto"]
    overrides = [
        *(f"model.{one}" for one in small),
        *(f"data.{one}" for one in data),
        *(f"training.{one}" for one in training),
        *(f"hardware.{one}" for one in hardware),
    ]
    assert train.main(["--config", str(ROOT / f"presets/{name}.yaml"), *overrides]) == 0
    assert Path(f"checkpoints/{name}/final.ckpt").is_file()
