"""Blocks and schedules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deca_node.blocks import Cursor, Schedule, partition_layers


@given(st.integers(1, 100), st.integers(1, 40))
def test_blocks_cover_every_layer_once_and_in_order(layers, size):
    """Concatenated blocks are the layers; all but the last have the size asked for."""
    blocks = partition_layers(layers, size)
    assert [layer for block in blocks for layer in block] == list(range(layers))
    assert all(len(block) == size for block in blocks[:-1])


@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from(["ascending", "descending", "random"]),
    st.integers(0, 99),
)
def test_a_round_visits_every_block_once(n_blocks, rounds, order, seed):
    """Whatever the order, each round is a permutation of the blocks."""
    schedule = Schedule(partition_layers(n_blocks, 1), rounds, 3, order, seed)
    visits = [schedule.visit(index) for index in range(schedule.visits)]
    assert len(visits) == schedule.visits == rounds * n_blocks
    for round_ in range(rounds):
        visited = [visit.block for visit in visits if visit.round == round_]
        assert sorted(visited) == list(range(n_blocks))


def test_serials_number_the_steps_without_gap():
    """Tags of consecutive steps are consecutive over visits and rounds."""
    schedule = Schedule(partition_layers(4, 2), 2, 3, "ascending", 0)
    serials = [schedule.serial(v, s) for v in range(schedule.visits) for s in range(3)]
    assert serials == list(range(schedule.total_steps))
    assert schedule.cursor(3, 2) == Cursor(1, 1, 2)


def test_random_orders_follow_the_seed():
    """The same seed gives the same order everywhere; rounds and seeds differ."""
    blocks = partition_layers(8, 1)
    one, same, other = (Schedule(blocks, 2, 1, "random", seed) for seed in (1, 1, 2))
    assert one.round_order(0) == same.round_order(0) == [6, 3, 1, 2, 0, 4, 5, 7]
    assert one.round_order(0) != one.round_order(1)
    assert one.round_order(0) != other.round_order(0)


def test_bad_sizes_and_visits_are_errors():
    """Zero layers, zero per block and a visit outside the run are refused."""
    for layers, size in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least one layer"):
            partition_layers(layers, size)
    for index in (4, -1):
        with pytest.raises(IndexError, match=f"visit {index} of 4"):
            Schedule(partition_layers(4, 1), 1, 1, "ascending", 0).visit(index)
