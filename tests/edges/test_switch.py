"""The laboratory's switch, frame by frame, at times that the tests say."""

import pytest

from tests.lab.switch import BUFFER_SECONDS, Link, Switch

STATION = {name: bytes([2, 0, 0, 0, 0, number]) for number, name in enumerate("abc")}
BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("01005e0000fb")  # multicast DNS


def frame(target, source="a", size=100, number=0):
    head = STATION.get(target, target) + STATION[source] + b"\x08\x00"
    return head + bytes([number]) + bytes(size - len(head) - 1)


@pytest.fixture
def switch():
    made = Switch(seed=1)
    for name, station in STATION.items():
        made.attach(name, station)
    return made


def arrivals(switch, until=1e9):
    """Everything under way in the order of its release: moment, port, number of the frame."""
    found = []
    while (release := switch.next_release()) is not None and release <= until:
        found += [(release, port, content[14]) for port, content in switch.due(release)]
    return found


def test_a_frame_reaches_its_station_after_the_delay(switch):
    """Nobody else sees it, and it does not come a moment too soon."""
    switch.connect("a", "b", Link(delay=0.05))
    switch.accept("a", frame("b"), 1.0)
    assert switch.next_release() == pytest.approx(1.05)
    assert list(switch.due(1.0499)) == []
    assert [port for port, _ in switch.due(1.0501)] == ["b"]
    assert switch.next_release() is None


def test_directions_have_settings_of_their_own(switch):
    """What holds from a to b says nothing of b to a."""
    switch.connect("a", "b", Link(delay=1.0))
    switch.connect("b", "a", Link(cut=True))
    switch.accept("a", frame("b"), 0.0)
    switch.accept("b", frame("a", source="b"), 0.0)
    assert arrivals(switch) == [(1.0, "b", 0)]


def test_frames_to_all_and_to_groups_are_copied(switch):
    """A link without multicast still carries broadcasts, which find addresses."""
    switch.connect("a", "c", Link(delay=0, multicast=False))
    for number, target in enumerate((BROADCAST, GROUP)):
        switch.accept("a", frame(target, number=number), 0.0)
    assert sorted((port, number) for _, port, number in arrivals(switch)) == [
        ("b", 0),
        ("b", 1),
        ("c", 0),
    ]


def test_unknown_stations_short_frames_and_own_frames_go_nowhere(switch):
    """Nothing that a host can send makes the switch fail."""
    for content in (frame(b"\x02\x09\x09\x09\x09\x09"), frame("a"), b"", BROADCAST):
        switch.accept("a", content, 0.0)
    assert switch.next_release() is None


def test_jitter_spreads_frames_and_keeps_their_order(switch):
    """Delays differ within the bounds; no frame passes another of its direction."""
    switch.connect("a", "b", Link(delay=0.01, jitter=0.02))
    for number in range(100):
        switch.accept("a", frame("b", number=number), number * 1e-3)
    found = arrivals(switch)
    assert [number for _, _, number in found] == list(range(100))
    delays = [moment - number * 1e-3 for moment, _, number in found]
    assert min(delays) >= 0.01 - 1e-12
    assert max(delays) <= 0.03 + 1e-12
    assert max(delays) - min(delays) > 0.01


def test_loss_is_the_share_that_was_set_and_repeats_with_the_seed():
    """A fifth of 5,000 frames, give or take; the same ones again with the same seed."""

    def arrived():
        switch = Switch(seed=7)
        switch.attach("b", STATION["b"])
        switch.connect("a", "b", Link(delay=0, loss=0.2))
        for number in range(5000):
            switch.accept("a", frame("b", number=number % 256), float(number))
        return arrivals(switch)

    first = arrived()
    assert 0.18 < 1 - len(first) / 5000 < 0.22
    assert first == arrived()


def test_a_rate_spaces_frames_and_a_full_buffer_drops(switch):
    """At 80 kbit/s a frame of 100 bytes takes 10 ms; what the buffer cannot hold is lost."""
    switch.connect("a", "b", Link(delay=0.5, rate=80_000))
    for number in range(100):
        switch.accept("a", frame("b", number=number), 0.0)
    moments = [moment for moment, _, _ in arrivals(switch)]
    assert moments == pytest.approx([0.5 + 0.01 * (n + 1) for n in range(len(moments))])
    assert len(moments) == pytest.approx(BUFFER_SECONDS / 0.01, abs=1.5)
    switch.accept("a", frame("b"), 10.0)  # the buffer has run empty meanwhile
    assert arrivals(switch) == [(pytest.approx(10.51), "b", 0)]


def test_links_of_one_queue_share_its_rate(switch):
    """A host with one slow line is as slow to two others together as to one."""
    for target in "bc":
        switch.connect("a", target, Link(delay=0, rate=80_000, queue="line of a"))
    for number in range(10):
        switch.accept("a", frame("bc"[number % 2], number=number), 0.0)
    moments = [moment for moment, _, _ in arrivals(switch)]
    assert moments == pytest.approx([0.01 * (n + 1) for n in range(10)])


def test_a_cut_loses_what_is_under_way_and_a_heal_lets_pass_again(switch):
    """Frames of before, during and after: only the last ones arrive."""
    switch.connect("a", "b", Link(delay=1.0))
    switch.accept("a", frame("b", number=1), 0.0)
    switch.connect("a", "b", Link(delay=1.0, cut=True))
    switch.accept("a", frame("b", number=2), 0.5)
    assert arrivals(switch, until=5.0) == []
    switch.connect("a", "b", Link(delay=1.0))
    switch.accept("a", frame("b", number=3), 5.0)
    assert arrivals(switch) == [(6.0, "b", 3)]


def test_frames_due_at_one_moment_leave_in_the_order_they_came(switch):
    """A heap alone would not promise that."""
    switch.connect("a", "b", Link(delay=0))
    for number in range(50):
        switch.accept("a", frame("b", number=number), 0.0)
    assert [number for _, _, number in arrivals(switch)] == list(range(50))
