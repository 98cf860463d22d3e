"""Sizes and numbers beyond every use are refused at once, with the key and the limit."""

import pyarrow as pa
import pytest
from pyarrow import parquet

from pocketlm.config.loading import load_config
from pocketlm.config.sections import DataConfig
from pocketlm.config.strict_yaml import parse_yaml
from pocketlm.corpus import readers
from pocketlm.corpus.sources import open_source
from pocketlm.errors import UserError
from pocketlm.limits import MODEL_SIZES, TRAINING_SIZES


@pytest.mark.parametrize("size", [10**6 * 10, 2**63, 10**400], ids=["10^7", "2^63", "10^400"])
@pytest.mark.parametrize(
    "key",
    [
        *(f"model.{name}" for name in MODEL_SIZES if name not in ("vocab_size", "max_seq_len")),
        *("training.micro_batch_size", "training.grad_accum_steps", "hardware.num_workers"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path, key, size):
    (tmp_path / "c.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match=f"{key} is"):
        load_config(tmp_path / "c.yaml", [f"{key}={size}"])


@pytest.mark.parametrize("name", TRAINING_SIZES)
def test_the_largest_value_of_a_training_size_is_the_limit(tmp_path, name):
    (tmp_path / "c.yaml").write_text(f"model: {{max_seq_len: {2**24}}}\n")
    largest = TRAINING_SIZES[name]
    config = load_config(tmp_path / "c.yaml", [f"training.{name}={largest}"])
    assert getattr(config.training, name) == largest
    with pytest.raises(UserError, match=f"training.{name} is"):
        load_config(tmp_path / "c.yaml", [f"training.{name}={largest + 1}"])


@pytest.mark.parametrize(
    "text", ["[" * 50_000, "{a: " * 12_000, "- " * 30_000, "? " * 30_000, "[{a: " * 10_000]
)
def test_deep_yaml_is_refused_at_its_tenth_level(text):
    """Scanning 50,000 brackets took PyYAML 101 s."""
    with pytest.raises(UserError, match="c.yaml:1: .*nested more than 9 levels deep"):
        parse_yaml(text, "c.yaml")


def test_a_long_config_is_refused_unread():
    with pytest.raises(UserError, match="c.yaml: 70,000 characters are too many"):
        parse_yaml("#" * 70_000, "c.yaml")


def test_a_value_of_parquet_that_memory_may_not_hold_is_refused(tmp_path, monkeypatch):
    """A file of kilobytes may hold gigabytes of one letter."""
    monkeypatch.setattr(readers, "MAX_LINE_CHARACTERS", 1000)
    parquet.write_table(pa.table({"text": ["a" * 1000, "a" * 1001]}), tmp_path / "x.parquet")
    source = open_source(DataConfig(path=str(tmp_path / "x.parquet")), tmp_path)
    message = "x.parquet: a value of 'text' after row 0 has 1,001 bytes, and at most 1,000"
    with pytest.raises(UserError, match=message):
        [*source.pieces()]


@pytest.mark.parametrize(
    "name, text, place",
    [
        ("x.jsonl", '{"text": "short"}\n{"text": "' + "a" * 5_000_000, "x.jsonl:2: the line has"),
        ("x.csv", 'text\n"' + "a\n" * 3_000_000, "not CSV: field larger than field limit"),
    ],
)
def test_a_line_that_memory_may_not_hold_is_refused(tmp_path, monkeypatch, name, text, place):
    """Three gigabytes of one letter are three megabytes of .gz."""
    monkeypatch.setattr(readers, "MAX_LINE_CHARACTERS", 2_000_000)
    before = readers.csv.field_size_limit(2_000_000)
    (tmp_path / name).write_text(text)
    source = open_source(DataConfig(path=str(tmp_path / name)), tmp_path)
    try:
        with pytest.raises(UserError, match=place):
            for _ in source.pieces():
                pass
    finally:
        readers.csv.field_size_limit(before)


@pytest.mark.parametrize(
    "name", ["last.ckpt", "metrics.csv", "LOSS.PNG", "x.damaged", "Train", "events.out.1", "v1."]
)
def test_a_run_cannot_have_the_name_of_an_output(tmp_path, name):
    """The folder checkpoints/last.ckpt kept the unnamed run from saving."""
    (tmp_path / "c.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="run.name"):
        load_config(tmp_path / "c.yaml", [f"run.name={name}"])


@pytest.mark.parametrize("name", ["v1.2", "train2", "a-b_c"])
def test_other_names_are_free(tmp_path, name):
    (tmp_path / "c.yaml").write_text("model: {}\n")
    assert load_config(tmp_path / "c.yaml", [f"run.name={name}"]).run.name == name
