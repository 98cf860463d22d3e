"""Imports without the garbage collector."""

import gc

import pytest

from pocketlm.startup import fast_imports


def test_the_collector_is_off_during_imports_and_spares_what_they_made():
    gc.unfreeze()
    with fast_imports():
        assert not gc.isenabled()
        made = [[]]
    assert gc.isenabled()
    assert not any(item is made for item in gc.get_objects())  # only those that it will look at
    gc.unfreeze()
    assert any(item is made for item in gc.get_objects())


def test_the_collector_is_as_before_after_an_import_that_fails():
    gc.disable()
    try:
        with pytest.raises(ImportError), fast_imports():
            raise ImportError
        assert not gc.isenabled()
    finally:
        gc.enable()
