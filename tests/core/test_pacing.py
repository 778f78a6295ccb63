"""Send rates: caps in all and for each peer."""

import pytest

from deca_node.pacing import SendRates, TokenBucket, WorkBudget

MB = 1e6


@pytest.mark.parametrize(
    ("total", "per_peer", "expected"), [(None, None, 0), (10 * MB, None, 1.9), (None, 5 * MB, 1.8)]
)
def test_waits_add_up_to_the_rate(total, per_peer, expected):
    """Twenty messages of 1 MB to two peers take what the tighter cap makes of them."""
    rates = SendRates(total, per_peer, MB, 8)
    waits = [rates.take("ab"[index % 2], 1_000_000, 0.0) for index in range(20)]
    assert max(waits) == pytest.approx(expected)


def test_a_busy_peer_leaves_the_others_their_share():
    """The cap of one peer does not slow another."""
    rates = SendRates(None, MB, MB, 8)
    for _ in range(10):
        rates.take("a", 1_000_000, 0.0)
    assert rates.take("b", 1_000_000, 0.0) == 0


def test_only_the_latest_peers_are_remembered():
    """Names that come and go fill no table."""
    rates = SendRates(None, MB, MB, 2)
    for name in "abcabd":
        rates.take(name, 1_000_000, 0.0)
    assert len(rates._peers) == 2


def test_what_was_not_sent_is_given_back():
    """Whoever turns away while waiting leaves no debt to the others."""
    rates = SendRates(100.0, 50.0, 10.0, 4)
    assert rates.take("a", 10, 0.0) == 0
    for _ in range(1_000):
        assert rates.take("b", 10, 0.0) > 0
        rates.give_back("b", 10)
    assert rates.take("c", 10, 0.0) == pytest.approx(0.1)


def test_work_slows_to_its_share_of_a_core():
    """What a byte has been seen to cost sets the rate; before that, and at most, the cap."""
    budget = WorkBudget(0.04, 16 * MB)
    assert budget.rate(64 * MB) == 64 * MB
    budget.spent(1_000_000, 0.001)
    assert budget.rate(64 * MB) == pytest.approx(40 * MB)
    assert budget.rate(10 * MB) == 10 * MB
    for _ in range(200):  # on a machine that has become slower
        budget.spent(1_000_000, 0.004)
    assert budget.rate(64 * MB) == pytest.approx(10 * MB, rel=0.01)
    for _ in range(200):
        budget.spent(1_000_000, 0.0001)
    assert budget.rate(64 * MB) == 64 * MB


def test_a_rest_saves_up_no_more_than_the_burst():
    """However long it was: else a cap would let a whole visit's blocks out at once."""
    bucket = TokenBucket(10.0, 20.0, 0.0)
    bucket.take(20, 0.0)
    assert bucket.take(10, 1.0) == 0
    assert bucket.take(20, 1_000.0) == 0
    assert bucket.take(20, 1_000.0) == 2


def test_a_rate_can_change():
    """A bucket waits as its latest rate asks."""
    bucket = TokenBucket(10.0, 10.0, 0.0)
    assert bucket.take(10, 0.0) == 0
    assert bucket.take(10, 0.0) == 1
    bucket.rate = 20.0
    assert bucket.take(10, 0.0) == 1
