"""Presets have the settings that their systems state, or learning rates by docs/recipes.md."""

import math
from pathlib import Path
from typing import Any

import pytest

from pocketlm.config.loading import load_config
from pocketlm.optim import lr_at_step

ROOT = Path(__file__).parents[2]

# fmt: off
MICROGPT: dict[str, Any] = {
    "model": dict(n_layers=1, d_model=16, n_heads=4, n_kv_heads=4, d_ff=64, init_std=0.08),
    "data": dict(tokenizer="seen-bytes", packing="padded"),
    "training": dict(
        seq_len=16, micro_batch_size=1, max_steps=1000, lr=0.01, betas=(0.85, 0.99), eps=1e-8,
        weight_decay=0.0, grad_clip=0.0,
    ),
    "sampling": dict(num_samples=20, temperature=0.5, prompts=("",)),
}
RANDYGPT_TRAINING = dict(micro_batch_size=32, max_steps=1000, val_every_steps=100, seed=1337)
NANOGPT_TRAINING = dict(lr=1e-3, min_lr_ratio=0.1, warmup_steps=100, betas=(0.9, 0.99))
STATED: dict[str, dict[str, dict[str, Any]]] = {
    "microgpt": MICROGPT,
    "microgpt_korean": MICROGPT,
    "nnzig": {
        "model": dict(
            n_layers=2, d_model=128, n_heads=1, d_ff=512, rope_theta=10_000.0, tie_embeddings=False,
        ),
        "data": dict(tokenizer="byte", eos=False),
        "training": dict(
            seq_len=64, micro_batch_size=32, max_steps=20_000, lr=6e-4, betas=(0.9, 0.95), eps=1e-8,
            weight_decay=0.1, warmup_steps=200, min_lr_ratio=0.0, schedule="cosine", grad_clip=1.0,
        ),
        "sampling": dict(max_new_tokens=200, temperature=0.8, prompts=("A: Hello",)),
    },
    "gpt2_124m": {
        "model": dict(
            n_layers=12, d_model=768, n_heads=12, d_ff=3072, max_seq_len=1024, tie_embeddings=True,
            init_std=0.02,
        ),
        "training": dict(seq_len=64, micro_batch_size=4, max_steps=40),
    },
    "randygpt_tiny": {
        "model": dict(n_layers=1, d_model=32, n_heads=4, max_seq_len=8),
        "training": RANDYGPT_TRAINING,
    },
    "randygpt_small": {
        "model": dict(n_layers=4, d_model=128, n_heads=8, d_ff=512, max_seq_len=64),
        "data": dict(tokenizer="char:512", val_share=0.1, optional_path="train.txt"),
        "training": RANDYGPT_TRAINING,
        "sampling": dict(
            prompts=("ROMEO:", "To be or not to be", "Once upon a time"), max_new_tokens=100,
            temperature=0.8, top_p=0.9,
        ),
    },
    "randygpt_medium": {
        "model": dict(n_layers=6, d_model=256, n_heads=8), "training": RANDYGPT_TRAINING,
    },
    "randygpt_large": {
        "model": dict(n_layers=12, d_model=512, n_heads=16), "training": RANDYGPT_TRAINING,
    },
    "wikipedia": {
        "model": dict(n_layers=16, d_model=768),
        "data": dict(
            source="wikimedia/wikipedia", config_name="20231101.en", streaming=True,
            tokenizer="gpt2",
        ),
        "training": dict(
            seq_len=1024, micro_batch_size=1, grad_accum_steps=64, max_steps=20_000, lr=3e-4,
            weight_decay=0.1, betas=(0.9, 0.95), warmup_steps=400, precision="32-true", seed=42,
        ),
    },
    "shakespeare_char_cpu": {
        "model": dict(n_layers=4, d_model=128, n_heads=4, dropout=0.0),
        "training": dict(seq_len=64, micro_batch_size=12, max_steps=2000, **NANOGPT_TRAINING),
    },
    "shakespeare_char_gpu": {
        "model": dict(n_layers=6, d_model=384, n_heads=6, dropout=0.2),
        "training": dict(seq_len=256, micro_batch_size=64, max_steps=5000, **NANOGPT_TRAINING),
    },
}
# fmt: on


@pytest.mark.parametrize("name", STATED)
def test_a_preset_holds_what_its_system_states(name: str) -> None:
    config = load_config(ROOT / f"presets/{name}.yaml")
    for section, stated in STATED[name].items():
        assert stated == {key: getattr(getattr(config, section), key) for key in stated}


@pytest.mark.parametrize("step", [0, 1, 500, 999])
def test_microgpts_learning_rate_falls_in_a_straight_line_from_its_first_step(step: int) -> None:
    t = load_config(ROOT / "presets/microgpt.yaml").training
    factor = lr_at_step(
        step,
        max_steps=t.max_steps,
        warmup_steps=t.warmup_steps,
        min_lr_ratio=t.min_lr_ratio,
        schedule=t.schedule,
    )
    assert t.lr * factor == pytest.approx(0.01 * (1 - step / 1000), rel=1e-12)


@pytest.mark.parametrize(
    "name", ["nnzig_head", *(f"randygpt_{size}" for size in ("tiny", "small", "medium", "large"))]
)
def test_muons_learning_rate_falls_with_the_root_of_the_width_and_of_the_steps(name: str) -> None:
    """docs/recipes.md has the rule; 2 % for the preset's two digits."""
    config = load_config(ROOT / f"presets/{name}.yaml")
    rule = 6e-3 * math.sqrt(128 / config.model.d_model * 1000 / config.training.steps)
    assert config.training.optimizer == "muon"
    assert config.training.lr == pytest.approx(rule, rel=0.02)


def test_the_names_preset_has_makemores_size_and_measure() -> None:
    """Rows of one name, as long as the longest of 15 letters with its end; 0.2 M parameters."""
    config = load_config(ROOT / "presets/names.yaml").with_vocab_size(27)
    model = config.model
    assert (model.n_layers, model.d_model, model.n_heads, config.training.seq_len) == (4, 64, 4, 16)
    assert model.n_parameters == pytest.approx(200_000, rel=0.01)
    assert (config.data.packing, config.data.separator) == ("padded", "line")
    assert config.data.tokenizer == "seen-bytes"
