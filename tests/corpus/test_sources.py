"""The source that a config names, and Hugging Face datasets."""

import json
import pickle
from pathlib import Path

import datasets
import pytest

from pocketlm.config.sections import DataConfig, SourceConfig
from pocketlm.corpus.named import CORPORA
from pocketlm.corpus.sources import DatasetSource, NamedSource, open_source
from pocketlm.errors import UserError
from tests.support.sources import (
    documents_of,
    not_blank,
    open_path,
    read_path,
    refusal,
    write_file,
)

DATA = Path(__file__).parents[2] / "data"


# ---- which source ----


@pytest.mark.parametrize("name", ["names", "korean_names", "wiki"])
def test_a_named_corpus_is_that_of_the_table(name):
    source = open_source(SourceConfig(source=name), str(DATA))
    assert isinstance(source, NamedSource)
    assert documents_of(source) == list(CORPORA[name](str(DATA)))


def test_an_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match="wiki"):
        open_source(SourceConfig(source="wikki"), str(DATA))


def test_a_name_with_an_owner_is_on_the_hub():
    """The hub is not asked before the rows are needed."""
    source = open_source(
        SourceConfig(source="owner/name", split="train", val_split="test"), "data", validation=True
    )
    assert isinstance(source, DatasetSource)
    assert (source.name, source.split, source.path) == ("owner/name, split test", "test", None)


def test_validation_is_what_its_own_keys_name(tmp_path):
    for name in ("train", "val"):
        write_file(tmp_path, f"{name}.txt", name.encode())
        datasets.Dataset.from_dict({"text": [f"saved {name}"]}).save_to_disk(
            tmp_path / f"saved {name}"
        )
    splits = {split: datasets.Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")

    def both(path: str | None, **keys: str) -> tuple[list[str], list[str]]:
        if "val_path" in keys:
            keys["val_path"] = str(tmp_path / keys["val_path"])
        config = SourceConfig(path=path and str(tmp_path / path), **keys)
        val_source = open_source(config, str(DATA), validation=True)
        return documents_of(open_source(config, str(DATA))), documents_of(val_source)

    assert both("train.txt", val_path="val.txt") == (["train"], ["val"])
    assert both("train.txt", val_path="saved val") == (["train"], ["saved val"])
    assert both("saved train", val_path="saved val") == (["saved train"], ["saved val"])
    assert both("saved train", val_path="val.txt") == (["saved train"], ["val"])
    assert both("both", val_split="test") == (["train"], ["test"])
    assert both("both", split="test", val_split="train") == (["test"], ["train"])
    assert both("both", val_path="saved val") == (["train"], ["saved val"])
    assert both("saved train", val_path="both", val_split="test") == (["saved train"], ["test"])
    assert both(None, source="names", val_path="val.txt")[1] == ["val"]


@pytest.mark.parametrize("keys", [{"source": "names"}, {"path": "x.txt"}, {"path": "saved"}])
def test_a_validation_split_of_a_source_without_splits_is_refused(tmp_path, monkeypatch, keys):
    """It would be the training documents again."""
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path, "x.txt", b"text")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
    (name,) = keys.values()
    message = f"data.val_split is a split of a Hugging Face dataset, and {name} has none"
    with pytest.raises(UserError, match=message):
        open_source(SourceConfig(**keys, val_split="test"), str(DATA), validation=True)


def test_an_optional_path_is_read_if_it_exists_and_no_path_is_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_file(tmp_path, "path.txt", b"path")
    write_file(tmp_path, "val.txt", b"val")

    def first(validation: bool = False, **keys: str) -> str:
        config = SourceConfig(source="names", **keys)
        text, _ = next(open_source(config, str(DATA), validation=validation).pieces())
        return text

    assert first(optional_path="train.txt") == "emma"
    write_file(tmp_path, "train.txt", b"train")
    assert first(optional_path="train.txt") == "train"
    assert first(optional_path="train.txt", path="path.txt") == "path"
    assert first(optional_path="elsewhere.txt", path="path.txt") == "path"
    assert first(optional_path="train.txt", val_path="val.txt") == "train"
    assert first(optional_path="train.txt", val_path="val.txt", validation=True) == "val"
    Path("train").mkdir()
    write_file(Path("train"), "x.txt", b"folder")
    assert first(optional_path="train") == "folder"


def test_an_optional_path_counts_in_the_digest_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def digest(**keys: str) -> str:
        return open_source(SourceConfig(source="names", **keys), str(DATA)).digest()

    assert digest(optional_path="train.txt") == digest()
    write_file(tmp_path, "train.txt", b"train")
    assert digest(optional_path="train.txt") == digest(path="train.txt") != digest()


def test_a_source_can_be_opened_with_the_whole_data_section(tmp_path):
    config = DataConfig(path=str(write_file(tmp_path, "x.txt", b"text")))
    assert documents_of(open_source(config, "data")) == ["text"]


# ---- Hugging Face datasets ----


def test_a_saved_dataset_is_its_column(tmp_path):
    texts = [f"row {i} é😀\n" * 3 for i in range(1001)] + [None, "", " \n", "\0", "x" * 3_000_000]
    rows = datasets.Dataset.from_dict({"n": range(len(texts)), "body": texts})
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    source = open_path(tmp_path / "saved", text_field="body")
    assert isinstance(source, DatasetSource)
    assert documents_of(source) == not_blank(texts)
    assert source.size is None


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_the_format_that_a_dataset_was_saved_in_does_not_matter(tmp_path, form):
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None], "n": [1, 2, 3]})
    rows.with_format(form, columns=["n"]).save_to_disk(tmp_path / "saved")
    assert datasets.load_from_disk(tmp_path / "saved").format["type"] == form
    assert read_path(tmp_path / "saved") == ["a", "b"]


def test_other_columns_are_not_decoded(tmp_path):
    """The column of images holds bytes that are not an image."""
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [{"bytes": b"not an image", "path": None}] * 2},
        features=features,
    )
    rows.save_to_disk(tmp_path / "saved")
    assert read_path(tmp_path / "saved") == ["a", "b"]


def test_a_saved_dataset_that_cannot_be_read_says_why(tmp_path):
    datasets.DatasetDict(
        {"all": datasets.Dataset.from_dict({"a": ["x"], "b": [1], "c": [["y"]]})}
    ).save_to_disk(tmp_path / "d")
    assert "has no split 'train'; it has all" in refusal(tmp_path / "d")
    name = f"{tmp_path / 'd'}, split all"
    assert (
        refusal(tmp_path / "d", split="all")
        == f"{name} has no field 'text'; it has a, b, c: set data.text_field"
    )
    assert refusal(tmp_path / "d", split="all", text_field="b").startswith(
        f"row 0 of {name}: the field 'b' holds int '1', not text"
    )
    assert refusal(tmp_path / "d", split="all", text_field="c").startswith(
        f"row 0 of {name}: the field 'c' holds list"
    )
    arrow = next((tmp_path / "d" / "all").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert "cannot be read" in refusal(tmp_path / "d", split="all", text_field="a")


@pytest.fixture
def local_hub(tmp_path, monkeypatch) -> Path:
    """Return a folder that the library reads like a repository; its cache is a folder too."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repository").mkdir()
    return tmp_path / "repository"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_streamed_dataset_has_the_documents_of_the_downloaded_one(local_hub, streaming):
    texts = [f"document {i}" for i in range(250)] + [None, ""]
    lines = [json.dumps({"n": i, "body": text}) + "\n" for i, text in enumerate(texts)]
    write_file(local_hub, "train.jsonl", "".join(lines).encode())
    config = SourceConfig(source=str(local_hub), text_field="body")
    source = open_source(config, "data", streaming=streaming)
    assert documents_of(source) == documents_of(source) == not_blank(texts)
    assert documents_of(pickle.loads(pickle.dumps(source))) == not_blank(texts)
    config = SourceConfig(source=str(local_hub), text_field="text")
    other = open_source(config, "data", streaming=streaming)
    with pytest.raises(UserError, match="has no field 'text'; it has n, body: set data.text_field"):
        documents_of(other)


def test_a_stream_with_a_broken_row_is_a_user_error(local_hub):
    write_file(local_hub, "train.jsonl", b'{"text": "a"}\n' * 10 + b'{"text": \n')
    source = open_source(SourceConfig(source=str(local_hub)), "data", streaming=True)
    with pytest.raises(UserError, match="cannot be read"):
        documents_of(source)
