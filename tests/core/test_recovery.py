"""Which block is fetched next from whom."""

from deca_node.recovery import Kept, Need, next_block


def test_a_part_is_first_offered_to_whom_it_came_from():
    """A giver completes what it began, before what is new, before what others began."""
    missing = {
        block: Need(block, {name: Kept(block, 10, f"{name}{block}") for name in "ab"})
        for block in range(3)
    }
    assert next_block(missing, "a", {"b0", "a2"}) == 2
    assert next_block(missing, "b", {"b0", "a2"}) == 0
    del missing[2]
    assert next_block(missing, "a", {"b0"}) == 1
    del missing[1]
    assert next_block(missing, "a", {"b0"}) == 0  # rather than nothing
    assert next_block(missing, "c", ()) is None
    assert next_block({}, "a", ()) is None
