"""Settings of every test: no hub, no skip that is not listed."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

SKIPPABLE: set[str] = set()  # names of tests that may be skipped in CI, each with its reason beside it

skipped: list[str] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if outcome.get_result().skipped and item.originalname not in SKIPPABLE:
        skipped.append(item.nodeid)


def pytest_sessionfinish(session, exitstatus):
    if skipped and os.environ.get("CI"):
        print(f"\nskipped without being listed as skippable: {', '.join(skipped)}")
        session.exitstatus = 1
