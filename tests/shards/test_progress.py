"""Progress of a preparation, on a terminal and elsewhere."""

from types import SimpleNamespace

import pytest

from pocketlm.shards.progress import TokenisingProgress


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_names_the_source_as_it_is_spelt(monkeypatch, capsys, terminal):
    """Brackets are markup to rich, and a pattern of files may have them."""
    monkeypatch.setenv("COLUMNS", "150")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    clock = iter(range(0, 1000, 6)).__next__  # every look at the clock is six seconds later
    source = SimpleNamespace(name="[/x] [red].txt", size=4_000_000, position=0)
    with TokenisingProgress(source, 3, clock=clock) as progress:
        progress.advance(1_000_000, 500_000)
        source.position = 1_000_000
        progress.advance(1_000_000, 500_000)
    text = capsys.readouterr().err
    if terminal:
        assert "tokenising [/x] [red].txt" in text
        return
    first, second = text.splitlines()
    resumed = "resumed after 3 batches, "
    assert first.startswith(f"tokenising [/x] [red].txt: {resumed}1 MB, 0.5 M tokens, ")
    assert second.startswith(f"tokenising [/x] [red].txt: 25%, {resumed}2 MB, 1.0 M tokens, ")
