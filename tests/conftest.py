"""Settings of every test (no hub, no skip that is not listed), and commands in new processes."""

import os

import pytest

from tests.support.forked_commands import ForkedCommands

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, one on each core
# torch.compile believes the CPU about its instruction sets, and compiles no trial programs
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

# names of tests, or of test files, that may be skipped in CI, each with its reason beside it
SKIPPABLE: set[str] = {
    "test_llama_cpp_has_our_ids_and_our_greedy_text",  # llama-cpp-python compiles for half an hour
}

skipped: list[str] = []


def pytest_collection_modifyitems(items):
    """Begin with commands in new processes: they take longest, and one worker's server is enough.

    xdist gives each worker a contiguous part of the tests, and the rest of the slowest one's to
    those that are done.
    """
    items.sort(key=lambda item: "forked_commands" not in item.fixturenames)


def pytest_runtest_logreport(report):
    *_, name = report.nodeid.split("[")[0].split("::")
    if report.skipped and not hasattr(report, "wasxfail") and name not in SKIPPABLE:
        skipped.append(report.nodeid)


def pytest_collectreport(report):
    if report.skipped and report.nodeid.split("/")[-1] not in SKIPPABLE:
        skipped.append(report.nodeid)


def pytest_sessionfinish(session, exitstatus):
    if skipped and os.environ.get("CI") and not hasattr(session.config, "workerinput"):
        print(f"\nskipped without being listed as skippable: {', '.join(skipped)}")
        session.exitstatus = 1


@pytest.fixture(scope="session")
def forked_commands():
    """Commands of the project, each in a new process."""
    commands = ForkedCommands(threads=int(os.environ["OMP_NUM_THREADS"]))
    yield commands
    commands.close()
