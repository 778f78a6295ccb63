"""Who is behind, where it takes part again, and which blocks it fetches from whom. Pure.

The merge rule, after a late start, a restart, a long sleep or a cut network alike: the position
further ahead wins. Who is behind fetches every block that a later visit than its own last one of
that block has changed, and takes part from the first visit whose edges are still open. A block
that both sides visited last at the same number stays as it is on each: the next visit mixes it.
Nobody decides this for anybody else.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deca_node.blocks import Schedule


@dataclass(frozen=True)
class Kept:
    """A block as a node keeps it.

    Attributes:
        visit: the last visit that changed it.
        bytes: of its safetensors file.
        xxh3: of that file, xxh3_128 as 32 hexadecimal digits.
    """

    visit: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Holdings:
    """What a node that others fetch from says of itself.

    Attributes:
        visit: its own visit; the number of visits when it has done them all.
        closed: that visit's edges are fixed.
        blocks: what it keeps; blocks that the run has not changed yet are not there.
    """

    visit: int
    closed: bool
    blocks: Mapping[int, Kept]


@dataclass(frozen=True)
class Need:
    """A block to fetch: its newest version by the name of each node that has one of that visit.

    Their digests differ, since each node has values of its own; any of them will do.
    """

    block: int
    sources: Mapping[str, Kept]

    @property
    def bytes(self) -> int:
        """Size of the largest."""
        return max(kept.bytes for kept in self.sources.values())


def next_block(missing: Mapping[int, Need], giver: str, begun: Collection[str]) -> int | None:
    """The block to fetch next from a giver; None when it has none of them.

    Args:
        missing: what is still to be fetched.
        giver: its name.
        begun: digests of files of which an earlier transfer left a part. First comes what it can
            complete, last what only others can.
    """

    def preference(block: int) -> tuple[int, int]:
        sources = missing[block].sources
        if sources[giver].xxh3 in begun:
            return 0, block
        return (2 if any(kept.xxh3 in begun for kept in sources.values()) else 1), block

    has = [block for block, need in missing.items() if giver in need.sources]
    return min(has, key=preference, default=None)


def checked(holdings: Holdings, schedule: Schedule, most_bytes: Mapping[int, int]) -> str:
    """What is wrong with what a peer says it has, empty when nothing is.

    Args:
        holdings: as received.
        schedule: the run's.
        most_bytes: by block, the largest size that its file can have.
    """
    if holdings.visit > schedule.visits:
        return f"visit {holdings.visit} of {schedule.visits}"
    for block, kept in holdings.blocks.items():
        if block not in most_bytes:
            return f"block {block} of {len(schedule.blocks)}"
        # A block that was agreed on at the end has the number of visits.
        if kept.visit > schedule.visits or (
            kept.visit < schedule.visits and schedule.visit(kept.visit).block != block
        ):
            return f"block {block} is not visited in visit {kept.visit}"
        if kept.visit > holdings.visit:
            return f"block {block} of visit {kept.visit}, which is still to come there"
        if not 0 < kept.bytes <= most_bytes[block]:
            return f"block {block} of {kept.bytes} bytes"
        if len(kept.xxh3) != 32 or not set(kept.xxh3) <= set("0123456789abcdef"):
            return f"block {block} without a digest"
    return ""


@dataclass(frozen=True)
class Step:
    """What a node that catches up does next.

    Attributes:
        fetch: blocks to fetch now, newest version first named by whoever has it.
        entry: the visit in which it takes part.
        wait: the visit whose end is waited for, since its block is about to change once more;
            None when nothing is waited for.
    """

    fetch: Mapping[int, Need]
    entry: int
    wait: int | None = None

    @property
    def done(self) -> bool:
        """Whether it can enter now."""
        return not self.fetch and self.wait is None


def next_step(
    own_visit: int,
    versions: Mapping[int, int],
    others: Mapping[str, Holdings],
    schedule: Schedule,
    *,
    overtaken: bool,
) -> Step:
    """Decide from what the others have.

    Args:
        own_visit: where this node is.
        versions: by block, the last visit that changed it here; absent for the base model's.
        others: what each peer that can be asked has.
        schedule: the run's.
        overtaken: this node has found its own visit closed.
    """
    front = max((each.visit for each in others.values()), default=own_visit)
    if front < own_visit:
        front, closed = own_visit, False
    else:
        # One that still shakes hands may be doing so with this node.
        closed = all(each.closed for each in others.values() if each.visit == front)
        closed = closed or (overtaken and front == own_visit)
    ended = front >= schedule.visits
    under_way = None if ended or not closed else schedule.visit(front).block
    needs = {
        block: need
        for block, need in _newer(versions, others, range(len(schedule.blocks))).items()
        if block != under_way
    }
    entry = min(front + closed, schedule.visits)
    return Step(needs, entry, wait=front if under_way is not None else None)


def _newer(
    versions: Mapping[int, int], others: Mapping[str, Holdings], blocks: Collection[int]
) -> dict[int, Need]:
    needs = {}
    for block in blocks:
        kept = {name: each.blocks[block] for name, each in others.items() if block in each.blocks}
        newest = max((each.visit for each in kept.values()), default=-1)
        if newest > versions.get(block, -1):
            latest = {name: each for name, each in kept.items() if each.visit == newest}
            needs[block] = Need(block, latest)
    return needs
