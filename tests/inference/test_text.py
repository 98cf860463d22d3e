"""Stop strings: where a text is cut, and what is held back."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pocketlm.inference.generate import until_stop

pieces_of = st.lists(st.text(alphabet="abc\n", max_size=4), max_size=12)
a_stop = st.text(alphabet="abc\n", min_size=1, max_size=4)


class Recorded:
    """An iterator that keeps a list of what was taken from it."""

    def __init__(self, pieces):
        self.pieces, self.taken = iter(pieces), []

    def __iter__(self):
        return self

    def __next__(self):
        self.taken.append(next(self.pieces))
        return self.taken[-1]


@settings(max_examples=300, deadline=None)
@given(pieces_of, a_stop)
def test_a_stop_string_cuts_at_its_first_occurrence_wherever_the_pieces_end(pieces, stop):
    assert "".join(until_stop(iter(pieces), (stop,))) == "".join(pieces).partition(stop)[0]


@settings(max_examples=300, deadline=None)
@given(pieces_of, st.lists(a_stop, max_size=3).map(tuple))
@example(["abc"], ("abc", "b"))
def test_of_several_stop_strings_the_first_that_is_complete_cuts(pieces, stop):
    """The result does not depend on how the text is cut into pieces."""
    text = "".join(pieces)
    for end in range(len(text) + 1):
        if complete := [each for each in stop if text[:end].endswith(each)]:
            text = text[: end - max(map(len, complete))]
            break
    assert "".join(until_stop(iter(pieces), stop)) == text


def test_nothing_is_held_back_that_cannot_become_a_stop_string():
    letters, shown = Recorded("abcdefgh"), ""
    for piece in until_stop(letters, ("xyz",)):
        shown += piece
        assert len(shown) >= len(letters.taken) - 2
    assert shown == "abcdefgh"
    assert next(until_stop(iter(["ab", "cd"]), ())) == "ab"


def test_no_piece_is_taken_after_a_stop_string():
    pieces = Recorded(["a", "b", "c", "d"])
    assert "".join(until_stop(pieces, ("b",))) == "a"
    assert pieces.taken == ["a", "b"]
