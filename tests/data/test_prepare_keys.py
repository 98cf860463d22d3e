"""The keys under which shards and trained tokenizers are kept and found again."""

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pocketlm.data import prepare as prepare_module
from pocketlm.data.prepare import prepare
from pocketlm.errors import UserError
from pocketlm.shards import builder
from pocketlm.tokenizer.base import Tokenizer
from pocketlm.tokenizer.build import build_tokenizer
from tests.support.preparation import (
    byte_config,
    only_shard,
    shard_folders,
    write_jsonl,
    write_text,
)

DOCUMENTS = [f"document {i} " * 3 for i in range(40)]


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_jsonl(tmp_path / "corpus.jsonl", DOCUMENTS)


# ---- shards ----


def test_everything_that_decides_the_tokens_is_in_the_key(tmp_path):
    text = "".join(f"line {i}\n\n" for i in range(40))
    path = write_text(tmp_path / "x.txt", text)
    changed = write_text(tmp_path / "y.txt", text.replace("line 7", "line_7"))
    config = byte_config(tmp_path, path=path, separator="line", val_share=0.3)
    changes = [
        {},
        {"path": changed},
        {"separator": "blank_line"},
        {"separator": "\n\n"},
        {"separator": None},
        {"errors": "replace"},
        {"val_share": 0.31},
        {"tokenizer": "char"},
        {"tokenizer": "bpe:260"},
        {"bos": True},
        {"eos": False},
        {"bos": True, "eos": False},
    ]
    configs = [dataclasses.replace(config, **change) for change in changes]
    prepared = [prepare(config) for config in configs]
    paths = [only_shard(data.train).path for data in prepared]
    assert len(set(paths)) == len(configs) == len(shard_folders(tmp_path / "cache"))
    assert len({data.tokenizer.fingerprint for data in prepared}) == 6
    assert [only_shard(prepare(config).train).path for config in configs] == paths


def test_the_same_text_in_another_file_and_at_another_time_shares_the_shards(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    text = "".join(f"line {i}\n" for i in range(40))
    first = write_text(tmp_path / "a" / "x.txt", text)
    second = write_text(tmp_path / "b" / "y.txt", text)
    os.utime(second, (0, 0))
    configs = [
        byte_config(tmp_path, path=first, separator="line", tokenizer=kind, val_share=0.3)
        for kind in ("byte", "char", "bpe:260")
    ]
    prepared = [prepare(config) for config in configs]
    # The second time, nothing is written or trained.
    monkeypatch.setattr(builder, "ShardWriter", None)
    built = {"byte": prepared[0].tokenizer}
    monkeypatch.setattr(prepare_module, "build_tokenizer", lambda name, *_, **__: built[name])
    again = [prepare(dataclasses.replace(config, path=second)) for config in configs]
    for one, other in zip(prepared, again, strict=True):
        assert only_shard(one.train).path == only_shard(other.train).path
        assert one.tokenizer.fingerprint == other.tokenizer.fingerprint
        assert one.sha256 == other.sha256


# ---- trained tokenizers ----


def test_a_trained_tokenizer_is_kept_for_the_documents_that_trained_it(tmp_path, corpus):
    folder = tmp_path / "cache" / "tokenizers"
    config = byte_config(tmp_path, path=corpus, tokenizer="char", val_share=0.3)

    def kept() -> int:
        return len(list(folder.glob("*.json")))

    fingerprint = prepare(config).tokenizer.fingerprint
    assert fingerprint == only_shard(prepare(config).train).header.tokenizer
    assert kept() == 1
    prepare(dataclasses.replace(config, tokenizer="bpe:300"))
    assert kept() == 2
    prepare(dataclasses.replace(config, val_share=0.6))  # other training documents
    assert kept() == 3
    write_jsonl(Path(corpus), [*DOCUMENTS, "ß"])
    prepare(config)
    assert kept() == 4
    prepare(dataclasses.replace(config, tokenizer="byte"))
    assert kept() == 4


def test_of_two_that_train_the_same_tokenizer_at_once_one_does(tmp_path, corpus, monkeypatch):
    trained, other_waits = [], threading.Event()

    def build_while_other_waits(*arguments: object) -> Tokenizer:
        trained.append(1)
        assert other_waits.wait(30)
        return build_tokenizer(*arguments)

    def print_that_other_waits(*_: object, **__: object) -> None:
        other_waits.set()

    monkeypatch.setattr(prepare_module, "build_tokenizer", build_while_other_waits)
    monkeypatch.setattr(builder, "print", print_that_other_waits, raising=False)
    config = byte_config(tmp_path, path=corpus, tokenizer="char", val_share=0.3)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(prepare, [config] * 2)
    assert trained == [1]
    assert only_shard(one.train).path == only_shard(other.train).path


@pytest.mark.parametrize("kind", ["char", "bpe:300"])
def test_a_damaged_tokenizer_is_named(tmp_path, corpus, kind):
    config = byte_config(tmp_path, path=corpus, tokenizer=kind)
    fingerprint = prepare(config).tokenizer.fingerprint
    (path,) = (tmp_path / "cache" / "tokenizers").glob("*.json")
    raw = path.read_text()
    if kind == "char":
        changed = raw.replace('"symbols": " ', '"symbols": "!')
    else:
        changed = raw.replace('"eos_id": 0', '"eos_id": 1')
    assert changed != raw
    message = f"the tokenizer {path} is damaged; delete it to train it again"
    for damaged in ("", raw[:-9], "[]", "{}", raw.replace('"kind": "', '"kind": "x'), changed):
        path.write_text(damaged)
        with pytest.raises(UserError, match=message):
            prepare(config)
    path.unlink()
    assert prepare(config).tokenizer.fingerprint == fingerprint
