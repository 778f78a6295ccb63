"""Estimates of memory and disk: what counts, and in which direction each setting acts."""

import pytest

from deca_node import estimate
from deca_node.estimate import Shape, Work

SHAPE = Shape(parameters=1000, layers=(100, 200), hidden=10, inner=30, heads=2, vocabulary=50)


def test_memory_is_the_documented_sum():
    """16-bit weights: 2 P and 4 + 8 + 2 bytes a parameter of the largest block, and two copies."""
    needs = estimate.memory(SHAPE, work_of([range(1), range(1, 2)]))
    assert (needs.weights, needs.master, needs.moments) == (2000, 4 * 200, 8 * 200)
    assert (needs.gradient, needs.snapshots) == (2 * 200, 4 * 200)
    assert needs.computing == 2000 + 14 * 200 + needs.activations
    assert estimate.memory(SHAPE, work_of([range(2)], element=4)).master == 0
    assert needs.references == 0


def test_compressed_edges_cost_references():
    """Own references, old and new, one step's messages, and one reference a neighbour."""
    blocks = [range(1), range(1, 2)]
    plain = estimate.memory(SHAPE, work_of(blocks, neighbours=3))
    for sent, factor in ((2, 8 + 2 + 12), (1, 8 + 1 + 12)):
        needs = estimate.memory(SHAPE, work_of(blocks, neighbours=3, sent=sent))
        assert needs.references == factor * 200
        assert needs.hosting == plain.hosting + factor * 200
        assert needs.computing == plain.computing


def test_a_mix_that_waits_for_all_keeps_what_has_come():
    """One block in fp32 for each neighbour that is kept."""
    blocks = [range(1), range(1, 2)]
    plain, kept = (estimate.memory(SHAPE, work_of(blocks, kept=n)) for n in (0, 3))
    assert kept.arrivals == 3 * 4 * 200
    assert kept.hosting == plain.hosting + kept.arrivals


def test_a_merged_model_is_written_with_the_layers_twice():
    """When there are no activations; copies of what is adapted are on the host."""
    plain, merged = (
        estimate.memory(SHAPE, work_of([range(2)], added=10, merged=merged))
        for merged in (False, True)
    )
    assert (plain.writing, merged.writing) == (2000, 2000 + 2 * 300)
    assert merged.computing == plain.computing
    assert merged.hosting == plain.hosting


def test_disk_counts_what_is_written_and_what_it_replaces():
    """Blocks and the open visit twice, the exported model, a line for every step."""
    needs = estimate.disk(SHAPE, work_of([range(1), range(1, 2)]), steps=10)
    assert needs.state == 2 * (2 * 300 + 12 * 200)
    assert needs.model == 2000
    assert needs.total == needs.state + 2000 + 10 * 512 + (32 << 20)
    assert estimate.converted(SHAPE) == 4000 + (32 << 20)


def work_of(blocks, **changes):
    return Work(
        **{"blocks": blocks, "element": 2, "batch": 2, "tokens": 8, "trained": 1, **changes}
    )


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"blocks": [range(2)]}, {}),
        ({"tokens": 16}, {}),
        ({"batch": 4}, {}),
        ({"trained": 8}, {}),
        ({}, {"checkpointing": True}),
    ],
)
def test_memory_grows_with_what_a_step_holds(more, less):
    """Each setting that a user may turn acts in the direction that they expect."""
    blocks = [range(1), range(1, 2)]
    high = estimate.memory(SHAPE, work_of(**{"blocks": blocks, **more}))
    low = estimate.memory(SHAPE, work_of(**{"blocks": blocks, **less}))
    assert high.computing > low.computing
    assert high.hosting >= low.hosting
