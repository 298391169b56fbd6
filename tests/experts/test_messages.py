"""Headers of dispatches: what travels comes back, what is malformed does not pass."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.messages import DispatchHeader

PLACE = f"00-{1:032x}-{2:016x}-01"
GOOD = [5, 1, 1, 3, [2, 7], [1, 3], ""]  # call id, epoch, layer, tokens, experts, slots of each, trace


def changed(place: int, value: object) -> list:
    """A good body but for one field."""
    return [*GOOD[:place], value, *GOOD[place + 1 :]]


MALFORMED = {
    "nothing": None,
    "a number": 5,
    "a dict": {"layer": 1},
    "a field too few": GOOD[:-1],
    "a place in a trace that is none": changed(6, PLACE[:-1]),
    "a place in a trace that is a number": changed(6, 7),
    "a field too many": [*GOOD, 0],
    "an expert twice": changed(4, [2, 2]),
    "a negative expert": changed(4, [2, -1]),
    "an expert that is no number": changed(4, [2, float("nan")]),
    "an expert that is text": changed(4, ["2", 7]),
    "no experts": [5, 1, 1, 3, [], []],
    "more experts than counts": changed(5, [1]),
    "more counts than experts": changed(5, [1, 2, 3]),
    "a negative count": changed(5, [4, -1]),
    "a count of zero": changed(5, [4, 0]),
    "a count that is no number": changed(5, [1, float("nan")]),
    "a count that is true": changed(5, [1, True]),
    "no tokens": changed(3, 0),
    "negative tokens": changed(3, -3),
    "tokens that are no number": changed(3, float("nan")),
    "a layer that is text": changed(2, "1"),
    "a negative layer": changed(2, -1),
    "a negative epoch": changed(1, -1),
    "an epoch that is infinite": changed(1, float("inf")),
    "a call id that is true": changed(0, True),
    "experts in a dict": changed(4, {2: 1, 7: 3}),
}


def travelled(body: object) -> object:
    """What the receiver gets."""
    return msgpack.unpackb(msgpack.packb(body), strict_map_key=False)


@given(
    numbers=st.tuples(*[st.integers(0, 2**40)] * 3, st.integers(1, 2**31)),
    experts=st.dictionaries(st.integers(0, 4096), st.integers(1, 2**31), min_size=1, max_size=20),
    place=st.sampled_from(("", PLACE)),
)
def test_a_header_comes_back_as_it_left(numbers, experts, place):
    header = DispatchHeader(*numbers, tuple(experts), tuple(experts.values()), place)
    assert DispatchHeader.from_body(travelled(header.body())) == header
    assert header.slots_count == sum(experts.values())


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_header_is_refused(kind):
    with pytest.raises(ValueError, match="header of a dispatch is malformed"):
        DispatchHeader.from_body(travelled(MALFORMED[kind]))


def test_the_good_header_is_good():
    assert DispatchHeader.from_body(travelled(GOOD)) == DispatchHeader(5, 1, 1, 3, (2, 7), (1, 3))
