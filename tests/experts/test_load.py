"""Load: slots counted by layer and expert."""

from experts.load import ExpertLoad


def test_slots_are_counted_where_they_fall():
    load = ExpertLoad(first_layer=3, layers_count=2, experts_count=4)
    load.add(3, [0, 2], [5, 1])
    load.add(4, (3,), (7,))
    load.add(3, [2], [10])
    assert load.table() == ((5, 0, 11, 0), (0, 0, 0, 7))
    assert load.slots_count == 23


def test_the_table_is_a_copy():
    load = ExpertLoad(0, 1, 2)
    before = load.table()
    load.add(0, [1], [1])
    assert before == ((0, 0),) and load.table() == ((0, 1),)
