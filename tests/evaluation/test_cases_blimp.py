"""BLiMP is read from its own files, merged with other suites, and scored by paradigm."""

import csv
import io
import json
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow.parquet import write_table

import evaluate_checkpoints
from pocketlm.errors import UserError
from pocketlm.evaluation.cases import Case, merge_suites, read_blimp
from tests.support.bigrams import make_checkpoint
from tests.support.probes import read_suite


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(number: int, uid: str = "anaphor_agreement", **changes) -> str:
    """Return a line as in BLiMP's own files; None removes a field."""
    row = {
        "sentence_good": f"Many girls insulted themselves {number}.",
        "sentence_bad": f"Many girls insulted herself {number}.",
        "field": "morphology",
        "linguistics_term": "anaphor_agreement",
        "UID": uid,
        "simple_LM_method": True,
        "one_prefix_method": True,
        "two_prefix_method": False,
        "lexically_identical": False,
        "pairID": str(number),
    }
    fields = {key: value for key, value in (row | changes).items() if value is not None}
    return json.dumps(fields, ensure_ascii=False) + "\n"


def write_blimp() -> None:
    """Write data/ and BLiMP.zip, with the files that macOS puts into a zip.

    One sentence has a Unicode line separator, which does not end a line of JSONL.
    """
    Path("data").mkdir()
    Path("data/b.jsonl").write_text(line(0) + line(1), encoding="utf-8")
    texts = dict(sentence_good="Un café\u2028 noir.", sentence_bad="Un café.")
    Path("data/a.jsonl").write_text(line(0, "wh_island", **texts), encoding="utf-8")
    Path("data/._a.jsonl").write_bytes(b"\x00\x05\x16\x07\xb0")
    with zipfile.ZipFile("BLiMP.zip", "w") as archive:
        for name in ("b.jsonl", "a.jsonl", "._a.jsonl"):
            archive.write(f"data/{name}")
        archive.writestr("__MACOSX/data/._b.jsonl", b"\x00\x05\x16\x07\xb0")
        archive.writestr("data/readme.txt", "no line of BLiMP")


def test_blimp_is_read_from_its_folder_and_from_its_zip():
    write_blimp()
    in_folder, in_zip = read_blimp("data"), read_blimp("BLiMP.zip")
    expected = [("wh_island-0", "wh_island", "Un café\u2028 noir.", "Un café.")]
    for i in range(2):
        good, bad = (f"Many girls insulted {word} {i}." for word in ("themselves", "herself"))
        expected.append((f"anaphor_agreement-{i}", "anaphor_agreement", good, bad))
    assert in_folder.cases == in_zip.cases
    assert list(in_folder.cases) == [
        Case(name, "minimal_pair", uid, name, good=good, bad=bad)
        for name, uid, good, bad in expected
    ]
    assert in_zip.positions == ("data/a.jsonl:1", "data/b.jsonl:1", "data/b.jsonl:2")
    assert in_folder.sha256 == in_zip.sha256
    assert all(case.chance == 0.5 for case in in_folder.cases)


@pytest.mark.parametrize(
    "wrong",
    [
        line(1, sentence_bad=None).encode(),
        line(1, UID=None).encode(),
        b"{\n",
        b"[1]\n",
        b"3\n",
        b"[" * 100_000,
        b'{"UID": "\xb0"}\n',
    ],
)
def test_a_line_that_is_not_blimp_s_is_refused_with_its_number(wrong):
    Path("x.jsonl").write_bytes(line(0).encode() + wrong)
    fields = "sentence_good, sentence_bad, UID and pairID"
    with pytest.raises(UserError, match=f"x.jsonl:2: not a line of BLiMP: it has {fields}"):
        read_blimp(".")


def test_the_hub_s_rows_are_the_authors_own(folder):
    """The hub calls the field pair_id and has a number there; a blank line is no row."""
    rows = [line(i, pairID=None, pair_id=i) for i in range(2)]
    Path("own").mkdir()
    Path("own/x.jsonl").write_text(line(0) + line(1))
    Path("lines").mkdir()
    Path("lines/x.jsonl").write_text("\n" + rows[0] + "\r\n \n" + rows[1] + "\n")
    table = pyarrow.Table.from_pylist([json.loads(row) for row in rows])
    Path("table/anaphor_agreement").mkdir(parents=True)
    write_table(table, "table/anaphor_agreement/train-00000-of-00001.parquet")
    own, lines, from_table = (read_blimp(name) for name in ("own", "lines", "table"))
    assert own.cases == lines.cases == from_table.cases
    assert lines.positions == ("lines/x.jsonl:2", "lines/x.jsonl:5")
    Path("table/broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="table/broken.parquet is not a parquet file"):
        read_blimp("table")


def test_a_folder_without_blimp_is_refused(folder):
    message = "--blimp .* holds no .jsonl file; give BLiMP's folder data/, or its zip"
    with pytest.raises(UserError, match=message):
        read_blimp(folder)


@pytest.mark.parametrize("path", [Path("none"), Path(__file__)], ids=["missing", "no zip"])
def test_a_path_that_is_no_folder_and_no_zip_is_refused(path):
    message = "--blimp .* is not a folder or a zip file that can be read"
    with pytest.raises(UserError, match=message):
        read_blimp(path)


def test_blimp_may_repeat_itself_but_not_another_suite():
    """The real one has a pair in two paradigms."""
    twin = dict(sentence_good="The men dig.", sentence_bad="The men digs.")
    Path("x.jsonl").write_text(line(0, "regular", **twin) + line(1, "irregular", **twin))
    own = read_suite('- {name: a, prompt: p, target: " t"}')
    assert len(merge_suites([own, read_blimp(".")]).cases) == 3
    pair = read_suite("- {id: a, type: minimal_pair, good: The men dig., bad: The men digs.}")
    message = "x.jsonl:1: the question of 'regular-0' is already at s.yaml:1"
    with pytest.raises(UserError, match=message):
        merge_suites([pair, read_blimp(".")])


def test_blimp_is_scored_by_paradigm(capsys):
    write_blimp()
    make_checkpoint("a.ckpt", "", max_seq_len=40)
    command = ["--checkpoints", "a.ckpt", "--blimp", "BLiMP.zip", "--csv"]
    assert evaluate_checkpoints.main(command) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["case"], row["category"]) for row in rows] == [
        ("wh_island-0", "wh_island"),
        ("anaphor_agreement-0", "anaphor_agreement"),
        ("anaphor_agreement-1", "anaphor_agreement"),
    ]
