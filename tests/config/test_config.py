"""Settings: strict loading of files and overrides, and a sentence for every mistake."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import ModelConfig
from pocketlm.config.loading import config_from_dict, load_config, to_yaml
from pocketlm.config.sections import (
    OUTPUTS,
    SECTIONS,
    Config,
    DataConfig,
    HardwareConfig,
    RunConfig,
    TrainingConfig,
)
from pocketlm.errors import UserError
from pocketlm.model.rope import RopeScaling

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Config:
    Path("c.yaml").write_text(text, encoding="utf-8")
    return load_config("c.yaml", overrides)


# ---- what is read ----


def test_the_file_changes_the_defaults_and_overrides_change_the_file():
    file = "training: {lr: 1e-3, max_steps: 7}\ndata: {path: a.txt}"
    config = load(file, "training.max_steps=9", "run.name=x", "training.betas=[0.8, 0.9]")
    assert config == dataclasses.replace(
        Config(),
        run=RunConfig(name="x"),
        data=DataConfig(path="a.txt"),
        training=TrainingConfig(lr=0.001, max_steps=9, betas=(0.8, 0.9)),
    )


@pytest.mark.parametrize("text", ["", "# a comment", "training:", "training: {}\nmodel:\n"])
def test_an_empty_file_or_section_is_the_defaults(text):
    assert load(text) == Config()


@pytest.mark.parametrize("text, value", [
    ("3e-4", 3e-4), ("3E-4", 3e-4), ("1", 1.0), (".5", 0.5), ("5.", 5.0), ("+1.5e+3", 1500.0),
    ("1e3", 1000.0), ("007", 7.0),
])  # fmt: skip
def test_numbers_are_yaml_1_2_numbers(text, value):
    lr = load(f"training: {{lr: {text}}}").training.lr
    assert type(lr) is float and lr == value


@pytest.mark.parametrize("text, value", [("010", 10), ("08", 8), ("+3", 3)])
def test_integers_are_decimal_whatever_they_begin_with(text, value):
    """YAML 1.1 reads 010 as eight; YAML 1.2's core schema and every reader of a config read ten."""
    assert load("", f"training.seed={text}").training.seed == value


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "12:30", "1_000", "2024-01-01", "0x10", "1e", "True story"]
)
def test_what_only_looks_like_another_type_stays_text(text):
    assert load(f"data: {{path: {text}}}").data.path == text
    for key in ("model.tie_embeddings", "training.seed"):
        with pytest.raises(UserError, match=f"{key} is '{text}'"):
            load("", f"{key}={text}")


def test_the_context_is_a_training_row_unless_given():
    assert load("training: {seq_len: 77}").model.max_seq_len == 77
    assert load("training: {seq_len: 77}\nmodel: {max_seq_len: 99}").model.max_seq_len == 99
    with pytest.raises(UserError, match="seq_len 77 does not fit model.max_seq_len 50"):
        load("training: {seq_len: 77}\nmodel: {max_seq_len: 50}")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_auto_steps_are_those_that_the_comment_states_for_a_precision(precision):
    comment = (ROOT / "config.yaml").read_text().split("  max_steps: auto")[1].split("\n  max_")[0]
    steps = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+(?= in)", comment)]
    expected = steps[precision != "32-true"]
    assert Config().with_auto_steps(precision).training.steps == expected


def test_a_number_of_steps_is_kept_in_every_precision():
    config = Config(training=TrainingConfig(max_steps=7))
    assert config.with_auto_steps("bf16-mixed").training.steps == 7


def test_the_vocabulary_is_the_tokenizers_unless_a_larger_one_is_given():
    assert Config().with_vocab_size(257).model.vocab_size == 257
    padded = Config(model=ModelConfig(vocab_size=320))
    assert (
        padded.with_vocab_size(257).model.vocab_size
        == padded.with_vocab_size(320).model.vocab_size
        == 320
    )
    with pytest.raises(UserError, match="320.*'gpt2:12288'.*321"):
        padded.with_vocab_size(321)


def test_an_override_with_no_value_is_null_or_the_empty_text():
    assert load("training: {max_epochs: 2}", "training.max_epochs=").training.max_epochs is None
    assert load("run: {name: a}", "run.name=").run.name == ""
    assert load("run: {name: a}", 'run.name=""').run.name == ""


# ---- mistakes ----

BOMB = "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]"
MISTAKES = {
    "malformed": ("training:\n  lr: [1, 2\n", ["c.yaml:", "not valid YAML"]),
    "tab": ("training:\n\tlr: 1\n", ["c.yaml:2", "not valid YAML"]),
    "list at the top": ("- training", ["c.yaml", "['training']", "mapping of sections"]),
    "text at the top": ("training", ["c.yaml", "'training'", "mapping of sections"]),
    "two documents": ("--- {}\n--- {}", ["c.yaml:2"]),
    "unknown section": (
        "run: {}\ntrainin: {lr: 1}",
        ["c.yaml:2", "'trainin'", "did you mean training?"],
    ),
    "far from any section": (
        "zzz: {}",
        ["c.yaml:1", "'zzz'", "run, model, data, training, sampling, hardware"],
    ),
    "number for a section": ("12: {}", ["c.yaml:1", "12"]),
    "section that is a number": ("training: 5", ["c.yaml:1", "training", "5"]),
    "unknown key": (
        "training:\n  lr: 1\n  max_step: 1",
        ["c.yaml:3", "'max_step'", "did you mean max_steps?"],
    ),
    "text for a number": ("training:\n  lr: fast", ["c.yaml:2", "training.lr", "'fast'", "number"]),
    "number for text": ("run:\n  name: 3", ["c.yaml:2", "run.name", "3", "string"]),
    "fraction for a count": (
        "training: {seed: 1.5}",
        ["c.yaml:1", "training.seed", "1.5", "integer"],
    ),
    "bool for a count": ("training: {seed: true}", ["training.seed", "True", "integer"]),
    "null for a count": ("training: {seed: }", ["training.seed", "None", "integer"]),
    "one beta": ("training: {betas: [0.9]}", ["c.yaml:1", "training.betas", "[0.9]"]),
    "beta of 1": ("training: {betas: [0.9, 1.0]}", ["c.yaml:1", "training.betas", "1.0"]),
    "no such choice": (
        "training: {optimizer: lion}",
        ["c.yaml:1", "training.optimizer", "'lion'", "'adamw', 'muon' or 'sgd'"],
    ),
    "another program's key": (
        "training:\n  learning_rate: 1",
        ["c.yaml:2", "'learning_rate'", "training.lr"],
    ),
    "a key that nothing here is": (
        "training:\n  early_stopping: {}",
        ["c.yaml:2", "'early_stopping'", "best.ckpt"],
    ),
    "no epochs": ("training: {max_epochs: 0}", ["c.yaml:1", "training.max_epochs", "0", "above 0"]),
    "prompt that is no list": (
        "sampling: {prompts: hello}",
        ["c.yaml:1", "sampling.prompts", "'hello'"],
    ),
    "cold": (
        "sampling:\n  temperature: -1",
        ["c.yaml:2", "sampling.temperature", "-1", "0 or more"],
    ),
    "duplicate key": (
        "training:\n  seed: 1\n  lr: 1\n  seed: 2",
        ["c.yaml:4", "training.seed", "c.yaml:2"],
    ),
    "duplicate section": (
        "training: {seed: 1}\ntraining: {lr: 2}",
        ["c.yaml:2", "training", "c.yaml:1"],
    ),
    "alias": (BOMB, ["c.yaml:2", "aliases", "write the value out"]),
    "python tag": (
        "training:\n  seed: !!python/object/apply:os.getpid []",
        ["c.yaml:2", "os.getpid"],
    ),
    "nan": ("training:\n  lr: .nan", ["c.yaml:2", "training.lr is nan"]),
    "inf": ("training:\n  lr: .inf", ["c.yaml:2", "training.lr is inf"]),
    "negative": (
        "training:\n  warmup_steps: -1",
        ["c.yaml:2", "training.warmup_steps", "-1", "0 or more"],
    ),
    "neither": (
        "training: {max_steps: many}",
        ["c.yaml:1", "training.max_steps", "'many'", "an integer or 'auto'"],
    ),
    "zero": ("training:\n  max_steps: 0", ["c.yaml:2", "training.max_steps", "0", "from 1 to"]),
    "share of 1": ("data:\n  val_share: 1", ["c.yaml:2", "data.val_share", "1.0", "0.05"]),
    "heads do not divide": (
        "model:\n  d_model: 100\n  n_heads: 8",
        ["c.yaml:2", "d_model 100", "n_heads 8", "96"],
    ),
    "groups do not divide": (
        "model:\n  n_heads: 8\n  n_kv_heads: 3",
        ["c.yaml:2", "n_heads 8", "n_kv_heads 3", "[1, 2, 4, 8]"],
    ),
    "odd head": ("model: {d_model: 24, n_heads: 8}", ["c.yaml:1", "is 3", "even"]),
    "dropout of 1": ("model: {dropout: 1}", ["c.yaml:1", "model.dropout", "1.0"]),
    "slash in a name": ("run:\n  name: a/b", ["c.yaml:2", "run.name", "'a/b'", "letters"]),
    "hidden name": ("run: {name: .x}", ["c.yaml:1", "run.name", "'.x'"]),
    "name of an old run": ("run: {name: old-1}", ["c.yaml:1", "run.name", "'old-1'"]),
    "control character": ("training: {lr: 1\x07}", ["c.yaml"]),
    "number that is no octal": ("training:\n  seed: !!int 1x", ["c.yaml:2"]),
    "bool tag": ("training:\n  seed: !!bool maybe", ["c.yaml:2"]),
    "date tag": ("training:\n  seed: !!timestamp 2020-01-01", ["c.yaml:2"]),
    "set tag": ("training:\n  betas: !!set {0.9, 0.95}", ["c.yaml:2"]),
    "half a character": ('data:\n  path: "\\ud800"', ["c.yaml:2"]),
    "deep list": ("training:\n  betas: " + "[" * 300 + "]" * 300, ["c.yaml:2"]),
    "very deep list": ("[" * 1200, ["c.yaml"]),
    "5,000 digits": ("training:\n  seed: " + "9" * 5000, ["c.yaml:2"]),
}


@pytest.mark.parametrize("text, parts", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_file_names_the_line_the_value_and_the_remedy(text, parts):
    with pytest.raises(UserError) as error:
        load(text)
    missing = [part for part in parts if part not in str(error.value)]
    assert not missing, str(error.value)


@pytest.mark.parametrize("key", [
    "model.rope_theta", "model.norm_eps", "model.dropout", "data.val_share", "training.lr",
    "training.eps", "training.weight_decay", "training.min_lr_ratio", "training.grad_clip",
])  # fmt: skip
def test_no_number_may_be_nan(key):
    with pytest.raises(UserError, match=rf"{key.partition('.')[2]}\b.*nan"):
        load("", f"{key}=.nan")


@pytest.mark.parametrize("override", [
    "hardware.devices=0", "hardware.num_workers=-1", "model.norm_eps=.inf", "model.rope_theta=.inf",
    "training.weight_decay=.inf", "training.min_lr_ratio=.inf", "training.eps=.inf",
    "training.seed=99999999999999999999",
])  # fmt: skip
def test_a_value_that_no_run_can_have_is_refused_at_the_start(override):
    with pytest.raises(UserError, match=override.partition("=")[0]):
        load("", override)


@pytest.mark.parametrize("override, words", [
    ("training", "section.key=value"), ("training=1", "section.key=value"),
    ("training.=1", "section.key=value"), ("", "section.key=value"), ("=", "section.key=value"),
    (".lr=1", "no section ''"), ("trainin.lr=1", "did you mean training?"),
    ("training.lrr=1", "did you mean lr?"), ("training.lr.x=1", "no key 'lr.x'"),
    ("training.lr=[", "not valid YAML"), ("training.lr=x", "training.lr is 'x'"),
    ("training.lr=*x", "aliases"), ("training.lr=\x07", "training.lr"),
    ("data.path=\udcff", "data.path"),
])  # fmt: skip
def test_a_mistake_in_an_override_says_so(override, words):
    with pytest.raises(UserError) as error:
        load("", override)
    assert words in str(error.value)


def test_an_override_does_not_hide_a_mistake_in_the_file():
    with pytest.raises(UserError, match="c.yaml:1: training is a section"):
        load("training: [1, 2]", "training.lr=1")


def test_an_override_of_a_list_takes_its_lines_too():
    """The line of the file's own source is not the place of the mistake."""
    file = "data:\n  mixture:\n    - {weight: 1, path: a}"
    with pytest.raises(UserError, match="^on the command line: data.mixture.0.weight is 0"):
        load(file, "data.mixture=[{weight: 0}]")
    with pytest.raises(UserError, match="^c.yaml:3: data.mixture.0.weight is 0"):
        load(file.replace("weight: 1", "weight: 0"))


def test_a_preset_that_is_not_there_lists_those_that_are():
    Path("presets").mkdir()
    for name in ("microgpt", "nnzig"):
        Path(f"presets/{name}.yaml").write_text("")
    with pytest.raises(
        UserError,
        match="presets/micro_gpt.yaml; did you mean presets/microgpt.yaml.*"
        "microgpt.yaml, presets/nnzig.yaml",
    ):
        load_config("presets/micro_gpt.yaml")
    with pytest.raises(
        UserError, match="no config zzz.yaml; here are presets/microgpt.yaml, presets/nnzig.yaml"
    ):
        load_config("zzz.yaml")


def test_a_file_that_cannot_be_read_is_named():
    Path("near.yaml").write_text("")
    with pytest.raises(UserError, match="no config gone.yaml; here are near.yaml"):
        load_config("gone.yaml")
    Path("latin.yaml").write_bytes(b"run: {name: \xe9}")
    with pytest.raises(UserError, match="latin.yaml.*position 12"):
        load_config("latin.yaml")
    with pytest.raises(UserError, match="cannot read the config ."):
        load_config(".")


@settings(max_examples=150, deadline=None)
@given(
    st.text()
    | st.text(alphabet="training:modelrunsd {}[],-.0189e\n\t !&*'\"#?|>%@~<=", max_size=60)
)
@example("training: {seed: 08}")
@example("\x00")
@example("? {a: 1}\n: 2")
@example("training: {seed: !!null x}")
def test_any_text_loads_or_is_a_user_error(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(text.encode())
        try:
            config = load_config(path)
        except UserError:
            return
        assert isinstance(config, Config)


# ---- writing it out ----

CHANGED = Config(
    run=RunConfig("a-1.b"),
    model=ModelConfig(
        vocab_size=300, n_kv_heads=2, rope_theta=5e5, norm_eps=1e-6, tie_embeddings=False
    ),
    data=DataConfig(path="é 😀: #.txt", val_share=1e-3),
    training=TrainingConfig(lr=3e-4, eps=1e-12, betas=(0.0, 0.999), precision="32-true"),
    hardware=HardwareConfig(compile="off"),
)


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["defaults", "changed"])
def test_yaml_and_plain_dicts_lead_back_to_the_same_config(config):
    assert load(to_yaml(config)) == config
    assert config_from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert set(config.to_dict()) == set(SECTIONS)


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet="0123456789eE.xobn_-tru", min_size=1, max_size=6).filter(
        lambda name: name[0] != "." and not name.lower().endswith(OUTPUTS)
    )
)
@example("1e3")
@example("08")
@example("true")
@example("2024-01-01")
def test_a_name_that_looks_like_a_number_is_written_so_that_it_loads_back(name):
    """PyYAML writes 1e3 unquoted: in YAML 1.1 it is not a number. In the strict loader it is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_text(to_yaml(Config(run=RunConfig(name=name))))
        assert load_config(path).run.name == name


# ---- RoPE scaling, a section in a section ----


def test_a_scaling_in_a_file_or_typed_is_the_same_and_survives_writing():
    scaling = RopeScaling("yarn", 4.0, original_max_seq_len=64)
    values = "{kind: yarn, factor: 4, original_max_seq_len: 64}"
    config = load(f"model:\n  rope_scaling: {values}\n")
    assert config.model.rope_scaling == scaling
    assert load("", f"model.rope_scaling={values}") == config
    assert load(to_yaml(config)) == config
    assert load(to_yaml(config), "model.rope_scaling=null").model.rope_scaling is None


@pytest.mark.parametrize(
    "values, message",
    [
        ("yarn", "c.yaml:2: model.rope_scaling is a section with keys of its own, not 'yarn'"),
        ("{kind: yarn, factor: 4, beta: 1}", "c.yaml:2: model.rope_scaling has no key 'beta'; did"),
        ("{kind: ntk, factor: 4}", "c.yaml:2: model.rope_scaling.kind is 'ntk'; it should be"),
        ("{kind: linear, factor: 0}", "c.yaml:2: model.rope_scaling.factor is 0.0; it must be"),
    ],
)
def test_a_mistake_in_a_scaling_has_its_line(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(f"model:\n  rope_scaling: {values}\n")
