"""The hub as a user meets it: reachable, unreachable, slow, offline or refusing.

Separate processes send requests to a hub on this machine.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
from tokenizers.models import WordLevel

from pocketlm.errors import UserError
from pocketlm.hub.datasets import is_saved, saved_rows
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.forked_commands import ForkedCommands

# What datasets, huggingface_hub and transformers import, without these: they read the environment.
LIBRARIES = (
    *("aiohttp", "anyio", "filelock", "h11", "httpcore2", "httpx2", "jinja2", "multiprocess"),
    *("pandas", "PIL.Image", "pyarrow.dataset", "pyarrow.json", "pyarrow.parquet", "regex"),
    *("tokenizers", "torch", "xxhash"),
)
Run = Callable[..., tuple[list[Any], str]]
Results = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def commands() -> Iterator[ForkedCommands]:
    """Processes of which each imports the hub's libraries with an environment of its own."""
    commands = ForkedCommands(threads=1, modules=LIBRARIES)
    yield commands
    commands.close()


@pytest.fixture
def run(commands: ForkedCommands, tmp_path: Path) -> Run:
    """Make calls in one process; return their rows, ids or messages, and its stderr.

    The libraries' files are in `tmp_path`.
    """

    def run(endpoint: str, *calls: dict[str, Any], **env: str) -> tuple[list[Any], str]:
        environment = {key: value for key, value in os.environ.items() if key[:3] != "HF_"}
        environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"}
        environment |= {"HF_UPDATE_DOWNLOAD_COUNTS": "0"} | env
        program = "tests/programs/hub_calls.py"
        with contextlib.chdir(tmp_path):
            done = commands.run(json.dumps(calls), program=program, environment=environment)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    return run


@pytest.fixture
def results(run: Run) -> Results:
    """Make calls in one process; return their results. Assert that stderr is empty."""

    def results(endpoint: str, *calls: dict[str, Any], **env: str) -> list[Any]:
        values, stderr = run(endpoint, *calls, **env)
        assert stderr == ""
        return values

    return results


def texts(*names: str, count: int = 5) -> list[str]:
    return [f"{' '.join(names)} {i}" for i in range(count)]


def write(file: Path, rows: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_dict({"text": rows})
    file.write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in rows)
    ) if file.suffix == ".jsonl" else data.to_parquet(file)


def card(folder: Path, configs: tuple[str, ...], default: str | None = None) -> None:
    entries = [
        {"config_name": c, "data_dir": c} | ({"default": True} if c == default else {})
        for c in configs
    ]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    root = tmp_path_factory.mktemp("hub")
    datasets.disable_progress_bars()
    for name, revision in itertools.product(
        ("rows", "versions", "counted", "partial"), ("main", "v1")
    ):
        for split in ("train", "validation"):
            write(
                root / f"datasets/o/{name}/{revision}/data/{split}-00000-of-00001.parquet",
                texts(revision, split),
            )
    for name in ("lines", "private", "gated", "silent", "stalling", "broken", "portal"):
        for split in ("train", "validation"):
            write(root / f"datasets/o/{name}/main/{split}.jsonl", texts(name, split))
    for name, default in (("configs", None), ("standard", "b")):
        for config in "ab":
            write(root / f"datasets/o/{name}/main/{config}/train.jsonl", texts(name, config))
        card(root / f"datasets/o/{name}/main", ("a", "b"), default)
    write(root / "datasets/o/damaged/main/train.jsonl", texts("damaged"))
    (root / "datasets/o/damaged/main/train.jsonl").write_text('{"text": "a"}\n{"text": ')
    for name in ("words", "gated", "silent"):
        folder = root / f"models/o/{name}/main"
        folder.mkdir(parents=True)
        tokenizers.Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "world": 2}, "<unk>")).save(
            str(folder / "tokenizer.json")
        )
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
    for name, file, text in (
        ("empty", "config.json", '{"model_type": "gpt2"}'),
        (
            "code",
            "tokenizer_config.json",
            '{"tokenizer_class": "My", "auto_map": {"AutoTokenizer": ["mine.My", null]}}',
        ),
    ):
        (root / f"models/o/{name}/main").mkdir(parents=True)
        (root / f"models/o/{name}/main/{file}").write_text(text)
    server = FakeHub(root)
    server.modes = {
        f"o/{mode}": mode for mode in ("private", "gated", "silent", "stalling", "broken", "portal")
    }
    yield server
    server.close()


@pytest.fixture(scope="module")
def deaf() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="module")
def gone() -> str:
    """Return an address at which no server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_dataset_comes_over_the_wire_downloaded_and_streamed_with_the_same_rows(hub, results):
    cases = [
        ({"name": "o/rows"}, texts("main", "train")),
        ({"name": "o/rows", "split": "validation"}, texts("main", "validation")),
        (
            {"name": "o/rows", "split": "train+validation"},
            texts("main", "train") + texts("main", "validation"),
        ),
        ({"name": "o/lines"}, texts("lines", "train")),
        ({"name": "o/configs", "config_name": "b"}, texts("configs", "b")),
        ({"name": "o/standard"}, texts("standard", "b")),
    ]
    for streaming in (True, False):
        got = results(hub.endpoint, *[call | {"streaming": streaming} for call, _ in cases])
        assert got == [rows for _, rows in cases]


def test_a_part_of_a_split_is_downloaded(hub, results):
    assert results(hub.endpoint, {"name": "o/rows", "split": "train[1:3]"}) == [
        texts("main", "train")[1:3]
    ]


def test_a_stream_keeps_nothing_and_a_download_is_fetched_once(hub, results, tmp_path):
    call = {"name": "o/counted"}
    results(hub.endpoint, call | {"streaming": True})
    assert not list((tmp_path / "datasets").rglob("*.arrow"))
    hub.requests.clear()
    results(hub.endpoint, call, call)
    assert (
        sum(
            line.startswith("GET /datasets/o/counted/") and line.endswith(".parquet")
            for line in hub.requests
        )
        == 2
    )


def test_a_revision_reaches_the_hub(hub, results):
    hub.requests.clear()
    calls = [
        {"name": "o/versions", "revision": "v1", "streaming": streaming}
        for streaming in (True, False)
    ]
    assert results(hub.endpoint, *calls) == [texts("v1", "train")] * 2
    requests = [line for line in hub.requests if "/o/versions/" in line]
    assert any("/resolve/v1/" in line for line in requests) and not any(
        "/main" in line for line in requests
    )


def test_a_token_opens_a_private_dataset(hub, results):
    calls = [{"name": "o/private", "streaming": streaming} for streaming in (True, False)]
    assert results(hub.endpoint, *calls, HF_TOKEN=TOKEN) == [texts("private", "train")] * 2


REACHED = [  # calls that the hub refuses, or that ask for what it lacks; words of the message
    (
        {"name": "o/private"},
        "no public dataset 'o/private' (401); check the name, "
        "or, if it is private, log in with `hf auth login`",
    ),
    ({"name": "o/absent"}, "no public dataset 'o/absent' (401)"),
    ({"name": "o/gated"}, "dataset 'o/gated' is gated; request access at http://"),
    (
        {"name": "o/rows", "revision": "v2"},
        "dataset 'o/rows' has no revision 'v2'; give a branch, tag or commit of http://",
    ),
    (
        {"name": "o/rows", "split": "test"},
        "dataset 'o/rows' has no split 'test'; it has train, validation",
    ),
    (
        {"name": "o/rows", "split": "test", "streaming": True},
        "dataset 'o/rows' has no split 'test'; it has train, validation",
    ),
    ({"name": "o/rows", "split": "train[:9%]", "streaming": True}, "can only stream whole splits"),
    (
        {"name": "o/configs", "config_name": "c"},
        "dataset 'o/configs' has no config 'c'; it has a, b",
    ),
    ({"name": "o/configs"}, "dataset 'o/configs' has several configs; give one of a, b"),
    ({"name": "o/damaged"}, "dataset 'o/damaged' cannot be read (JSON parse error"),
    (
        {"name": "o/damaged", "streaming": True},
        "dataset 'o/damaged' cannot be read (JSON parse error",
    ),
    (
        {"name": "nowhere"},
        "dataset 'nowhere' is not a folder here, and a dataset on the hub is named OWNER/NAME",
    ),
    (
        {"name": "o/broken"},
        "answers 503 Service Unavailable, and no copy of dataset 'o/broken' is on this machine; "
        "check the network",
    ),
    ({"name": "o/portal"}, "is not a Hugging Face hub, and no copy of dataset 'o/portal'"),
    ({"tokenizer": "o/absent"}, "no public tokenizer 'o/absent' (401)"),
    ({"tokenizer": "o/gated"}, "tokenizer 'o/gated' is gated; request access at http://"),
    ({"tokenizer": "o/empty"}, "tokenizer 'o/empty' has no tokenizer.json"),
    (
        {"tokenizer": "o/code"},
        "tokenizer 'o/code' cannot be read (The repository o/code contains custom code",
    ),
    (
        {"tokenizer": "no name"},
        "tokenizer 'no name' is not a file or folder here, and not a valid name on the hub",
    ),
]
WITH_TOKEN = [
    ({"name": "o/absent"}, "no dataset 'o/absent' that your token may read (404)"),
    ({"name": "o/gated"}, "dataset 'o/gated' is gated; request access at http://"),
]
WRONG_TOKEN = [
    (
        {"name": "o/rows"},
        "does not accept your token for dataset 'o/rows' (401); log in with `hf auth login`",
    ),
    ({"tokenizer": "o/words"}, "does not accept your token for tokenizer 'o/words' (401)"),
]
SHORT = {"HUB_TIMEOUT": "0.5"}  # seconds; where nobody answers, waiting longer changes nothing
SILENT = (
    "did not answer within 0.5 seconds, and no copy of {} is on this machine; "
    "check the network, the proxy and HF_ENDPOINT"
)


def cut_off(reason: str) -> list[tuple[dict[str, Any], str]]:
    """Return the calls for a dataset and a tokenizer that were never downloaded."""
    dataset = {"name": "o/rows"}, f"{reason}, and no copy of dataset 'o/rows' is on this machine; "
    return [
        dataset,
        (
            {"tokenizer": "o/words"},
            f"{reason}, and no copy of tokenizer 'o/words' is on this machine; ",
        ),
    ]


FAILURES: dict[
    str, tuple[str, dict[str, str], list[tuple[dict[str, Any], str]]]
] = {  # endpoint, environment, calls and words
    "name server silent": (
        "hub",
        SHORT | {"NO_ANSWER_TO_NAMES": "1"},
        [({"name": "o/rows"}, SILENT.format("dataset 'o/rows'"))],
    ),
    "hub silent": ("deaf", SHORT, [({"name": "o/rows"}, SILENT.format("dataset 'o/rows'"))]),
    "hub silent to a stream": (
        "deaf",
        SHORT,
        [({"name": "o/rows", "streaming": True}, SILENT.format("dataset 'o/rows'"))],
    ),
    "hub silent to a tokenizer": (
        "deaf",
        SHORT,
        [({"tokenizer": "o/words"}, SILENT.format("tokenizer 'o/words'"))],
    ),
    "silent after one answer": (
        "hub",
        SHORT,
        [({"name": "o/stalling"}, SILENT.format("dataset 'o/stalling'"))],
    ),
    "said by the hub": ("hub", {}, REACHED),
    "said to a token": ("hub", {"HF_TOKEN": TOKEN}, WITH_TOKEN),
    "wrong token": ("hub", {"HF_TOKEN": "hf_wrong"}, WRONG_TOKEN),
    "connection refused": (
        "gone",
        {},
        cut_off(
            "cannot be reached ([Errno 111] Connection refused)" if sys.platform == "linux" else ")"
        ),
    ),
    "no such host": ("http://hub.invalid", {}, cut_off(")")),
    "no protocol": (
        "hub.invalid",
        {},
        cut_off("cannot be reached (Request URL is missing an 'http://' or 'https://' protocol)"),
    ),
    "offline": ("hub", {"HF_HUB_OFFLINE": "1"}, cut_off("HF_HUB_OFFLINE is set")),
}


def test_what_was_downloaded_keeps_working_without_the_hub(hub, deaf, gone, run, results):
    calls = [{"name": "o/rows"}, {"name": "o/rows", "streaming": True}, {"tokenizer": "o/words"}]
    here = results(hub.endpoint, *calls)
    assert here == [texts("main", "train"), texts("main", "train"), [2, 1]]
    cases = {
        "Connection refused": (gone, calls, {}),
        "did not answer": (deaf, calls[::2], SHORT),
        "HF_HUB_OFFLINE is set": (hub.endpoint, calls, {"HF_HUB_OFFLINE": "1"}),
    }
    for why, (place, some, env) in cases.items():
        values, stderr = run(place, *some, **env)
        assert values == [here[calls.index(call)] for call in some]
        assert stderr.count("note: ") == len(some) == stderr.count(why) == len(stderr.splitlines())
        assert (
            "using the copy of dataset 'o/rows' on this machine, config default, commit " in stderr
            or "tokenizer" in some[0]
        )


def test_the_copy_is_of_the_revision_and_config_that_are_asked_for(hub, run, results):
    first = [{"name": "o/rows"}, {"name": "o/rows", "revision": "v1"}]
    first += [{"name": "o/standard", "config_name": config} for config in ("b", "a")]
    results(hub.endpoint, *first)
    then = [
        *first,
        {"name": "o/standard"},
        {"name": "o/rows", "revision": "v2"},
        {"name": "o/rows", "split": "test"},
    ]
    then += [{"name": "o/standard", "config_name": "c"}]
    got, _ = run(hub.endpoint, *then, HF_HUB_OFFLINE="1")
    assert got[:4] == [
        texts("main", "train"),
        texts("v1", "train"),
        texts("standard", "b"),
        texts("standard", "a"),
    ]
    assert got[4] == texts("standard", "b")  # its card says that b is the default
    assert "no copy of dataset 'o/rows' at revision 'v2' is on this machine" in got[5]
    assert "has no split 'test'; it has train, validation" in got[6]
    assert "dataset 'o/standard' on this machine has no config 'c'; it has a, b" in got[7]


def test_the_copy_is_of_the_revision_where_the_hub_fails_half_way(hub, run, results):
    calls = [{"name": "o/partial"}, {"name": "o/partial", "revision": "v1"}]
    hub.modes.pop("o/partial", None)
    results(hub.endpoint, calls[0])
    hub.modes["o/partial"] = "partial"
    got, _ = run(hub.endpoint, *calls)
    assert (
        got[0] == texts("main", "train")
        and "no copy of dataset 'o/partial' at revision 'v1' is on this machine" in got[1]
    )


def test_a_folder_of_parquet_or_jsonl_goes_through_the_same_call(gone, results, tmp_path):
    for kind in ("parquet", "jsonl"):
        for split in ("train", "validation"):
            write(tmp_path / f"my {kind}" / f"{split}.{kind}", texts(kind, split))
    calls = [
        {"name": f"my {kind}", "split": split, "streaming": s}
        for kind in ("parquet", "jsonl")
        for split in ("train", "validation")
        for s in (0, 1)
    ]
    assert results(gone, *calls) == [
        texts(call["name"].split()[1], call["split"]) for call in calls
    ]
    write(tmp_path / "my jsonl/train.jsonl", texts("changed"))
    wrong = {"name": "my jsonl", "split": "test"}, {"name": "my jsonl", "revision": "v1"}
    rows, split, revision = results(gone, {"name": "my jsonl"}, *wrong)
    assert rows == texts("changed")
    assert (
        "has no split 'test'; it has train, validation" in split
        and "which has no revision 'v1'" in revision
    )


def test_saved_datasets_come_back(tmp_path):
    one, two = (datasets.Dataset.from_dict({"text": texts(name)}) for name in ("one", "two"))
    one.save_to_disk(tmp_path / "single")
    datasets.DatasetDict(train=one, validation=two).save_to_disk(tmp_path / "several")
    assert is_saved(tmp_path / "single") and is_saved(tmp_path / "several")
    assert saved_rows(tmp_path / "single", "train")["text"] == texts("one")
    assert saved_rows(tmp_path / "several", "train")["text"] == texts("one")
    assert saved_rows(tmp_path / "several", "validation")["text"] == texts("two")
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        saved_rows(tmp_path / "several", "test")


def test_a_folder_of_something_else_is_no_saved_dataset(tmp_path):
    write(tmp_path / "train.parquet", texts("train"))
    assert not is_saved(tmp_path) and not is_saved(tmp_path / "absent")
    (tmp_path / "dataset_info.json").write_text("{}")
    assert not is_saved(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    assert is_saved(tmp_path)
    with pytest.raises(UserError, match="saved dataset .* cannot be read"):
        saved_rows(tmp_path, "train")


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_sentence(hub, deaf, gone, results, name):
    server, env, cases = FAILURES[name]
    address = {"hub": hub.endpoint, "deaf": deaf, "gone": gone}.get(server, server)
    for sentence, (_, words) in zip(
        results(address, *[call for call, _ in cases], **env), cases, strict=True
    ):
        assert words in sentence and "\n" not in sentence
