"""Fixtures of the tests of shards."""

from tests.support.preparation import small, wiki

__all__ = ["small", "wiki"]
