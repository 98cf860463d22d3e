"""Loading a checkpoint: it is what was saved, and it fits its config and its tokenizer."""

import math
from pathlib import Path

import pytest
import torch

from pocketlm.checkpoint.format import hash_weights, save_checkpoint
from pocketlm.checkpoint.loading import best_checkpoint, load_checkpoint
from pocketlm.errors import UserError
from pocketlm.tokenizer.bpe import JsonTokenizer
from pocketlm.tokenizer.bytes import ByteTokenizer
from pocketlm.tokenizer.characters import CharTokenizer
from tests.support.checkpoints import tiny_checkpoint

SIZES = {"tied": {}, "grouped": dict(tie_embeddings=False, n_kv_heads=1, rope_theta=500.0)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_what_is_loaded_is_what_was_saved(sizes):
    model, state = tiny_checkpoint(**sizes)
    save_checkpoint(state, Path("x.ckpt"))
    torch.manual_seed(99)
    loaded = load_checkpoint("x.ckpt")
    ids = torch.randint(16, (3, 12))
    assert torch.equal(loaded.model(ids), model(ids))
    assert not loaded.model.training
    assert (loaded.step, loaded.tokens, loaded.val_loss) == (7, 5, 1.25)
    assert loaded.config.to_dict() == state["kit"]["config"]
    assert loaded.tokenizer.state() == state["kit"]["tokenizer"]
    assert loaded.weights_sha256 == hash_weights(dict(model.state_dict()))


def test_loading_draws_no_random_weights():
    """Drawing them, to overwrite them, took three seconds for 135 million."""
    save_checkpoint(tiny_checkpoint(tie_embeddings=False)[1], Path("x.ckpt"))
    before = torch.get_rng_state()
    load_checkpoint("x.ckpt")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rotary_tables_are_computed_again():
    """They are in no checkpoint, and a model that was built without memory has none.

    With a head_dim of 4 there are two wavelengths.
    """
    _, state = tiny_checkpoint(rope_theta=50.0)
    assert not [name for name in state["state_dict"] if "rope" in name]
    save_checkpoint(state, Path("x.ckpt"))
    model = load_checkpoint("x.ckpt").model
    frequencies = [50.0 ** (-2 * (i % 2) / 4) for i in range(4)]
    for table, function in ((model.rope_cos, math.cos), (model.rope_sin, math.sin)):
        rows = [[function(position * f) for f in frequencies] for position in range(12)]
        # angles up to 11 in float32
        torch.testing.assert_close(table, torch.tensor(rows), rtol=0, atol=2e-6)


def test_a_checkpoint_with_a_setting_that_is_not_known_here_says_which():
    state = tiny_checkpoint()[1]
    state["kit"]["config"]["model"]["n_experts"] = 2
    save_checkpoint(state, Path("x.ckpt"))
    with pytest.raises(UserError, match="x.ckpt: model has no key 'n_experts'"):
        load_checkpoint("x.ckpt")


def test_weights_that_do_not_fit_the_config_are_refused_by_name():
    state = tiny_checkpoint()[1]
    state["kit"]["config"]["model"]["d_ff"] = 24
    save_checkpoint(state, Path("shape.ckpt"))
    state = tiny_checkpoint()[1]
    del state["state_dict"]["model.norm.weight"]
    save_checkpoint(state, Path("missing.ckpt"))
    for name in ("shape", "missing"):
        with pytest.raises(UserError, match=f"{name}.ckpt"):
            load_checkpoint(f"{name}.ckpt")


def test_the_tokenizer_named_must_be_the_one_it_was_trained_with():
    state = tiny_checkpoint(vocab_size=257)[1]
    state["kit"]["tokenizer"] = ByteTokenizer().state()
    save_checkpoint(state, Path("x.ckpt"))
    assert load_checkpoint("x.ckpt", "byte").tokenizer.name == "byte"
    with pytest.raises(UserError, match="trained with the tokenizer 'byte', not 'bpe:300'"):
        load_checkpoint("x.ckpt", "bpe:300")


def test_gpt2_also_names_a_trimmed_one_and_a_line_says_which_it_is(capsys):
    state = tiny_checkpoint(vocab_size=300)[1]
    trained = JsonTokenizer.train_bpe(["a cat"], 260)
    state["kit"]["tokenizer"] = trained.state() | {"name": "gpt2:260"}
    save_checkpoint(state, Path("x.ckpt"))
    line = "x.ckpt: the tokenizer is gpt2:260, GPT-2's vocabulary trimmed to 260 of 50,257 tokens\n"
    for name, err in (("gpt2", line), ("gpt2:260", ""), (None, "")):
        assert load_checkpoint("x.ckpt", name).tokenizer.name == "gpt2:260"
        assert capsys.readouterr().err == err
    for other in ("byte", "gpt2:300"):
        with pytest.raises(UserError, match=f"the tokenizer 'gpt2:260', not '{other}'"):
            load_checkpoint("x.ckpt", other)


def test_a_trained_tokenizer_may_be_named():
    """It was refused: "trained with the tokenizer 'char', not 'char'"."""
    state = tiny_checkpoint(vocab_size=9)[1]
    state["kit"]["tokenizer"] = CharTokenizer("abc").state()
    save_checkpoint(state, Path("x.ckpt"))
    assert load_checkpoint("x.ckpt", "char").tokenizer.symbols == "abc"


# ---- the best checkpoint ----


def save(name: str, val_loss: float) -> None:
    state = tiny_checkpoint()[1]
    state["kit"]["val_loss"] = val_loss
    path = Path("checkpoints", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(state, path)


def test_the_best_is_the_unnamed_one_else_the_lowest_loss():
    with pytest.raises(UserError, match="no checkpoint yet"):
        best_checkpoint()
    save("old-1/best.ckpt", 0.1)
    with pytest.raises(UserError, match="no checkpoint yet"):
        best_checkpoint()
    save("b/best.ckpt", 2.0)
    save("c/best.ckpt", 1.0)
    save("c/last.ckpt", 0.5)
    assert best_checkpoint() == Path("checkpoints/c/best.ckpt")
    save("best.ckpt", 9.0)
    assert best_checkpoint() == Path("checkpoints/best.ckpt")
