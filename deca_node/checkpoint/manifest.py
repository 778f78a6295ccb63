"""What a manifest holds: where the run is, and its files with their digests."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, with_config

from deca_node.blocks import Schedule
from deca_node.checkpoint.sealing import canonical, unsealed
from deca_node.consensus import Agreement

MANIFEST, PREVIOUS = "manifest.json", "manifest.previous.json"
DIGEST = re.compile(r"[0-9a-f]{32}")

_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0)]


@with_config(_STRICT)
@dataclass(frozen=True)
class SavedFile:
    """A file of the state folder: its plain name, the xxh3_128 of its bytes and their number.

    ``visit`` is the index of the last visit that changed the block, or of the open visit.
    """

    file: Annotated[str, Field(pattern=r"^[a-z0-9-]+\.safetensors$")]
    xxh3: Annotated[str, Field(pattern=rf"^{DIGEST.pattern}$")]
    bytes: _Count
    visit: _Count


@with_config(_STRICT)
@dataclass(frozen=True)
class Progress:
    """Where a run is: everything but tensors.

    ``visit`` and ``step`` come next; ``data_position`` counts examples consumed; ``bytes_sent``,
    ``bytes_received``, ``incomplete`` and ``seconds`` are totals so far; ``caught_up`` counts the
    bytes of blocks fetched to catch up, ``passed_over`` the visits that were skipped by it;
    ``agreement`` is how the final agreement ended whose values the blocks have.
    """

    visit: _Count = 0
    step: _Count = 0
    data_position: _Count = 0
    bytes_sent: _Count = 0
    bytes_received: _Count = 0
    incomplete: _Count = 0
    caught_up: _Count = 0
    passed_over: _Count = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    finished: bool = False
    before: dict[str, Any] | None = None
    agreement: Agreement | None = None


@with_config(_STRICT)
@dataclass(frozen=True)
class State:
    """What a manifest holds.

    ``blocks`` are those that the run has changed; ``active`` holds the open visit's tensors;
    ``peers`` are the last known addresses (HOST:PORT) by name; ``lost`` are blocks that were
    changed and whose values are not there any more.
    """

    progress: Progress = field(default_factory=Progress)
    blocks: dict[int, SavedFile] = field(default_factory=dict)
    active: SavedFile | None = None
    peers: dict[str, str] = field(default_factory=dict)
    lost: tuple[int, ...] = ()

    def files(self) -> set[SavedFile]:
        """All that it names."""
        return {*self.blocks.values(), *([self.active] if self.active else [])}


_STATE = TypeAdapter(State)


def parsed(path: Path, content: bytes, schedule: Schedule) -> State:
    """Check and read a manifest.

    Raises:
        ValueError: it is torn, edited, or holds what this run cannot have.
        OutputError: it is of another format.
    """
    state = _STATE.validate_json(canonical(unsealed(path, content)))
    progress = state.progress
    if progress.visit > schedule.visits or progress.step > schedule.steps:
        raise ValueError("a place outside the run")
    # Blocks of the whole run's end carry the number of visits.
    if any(saved.visit > schedule.visits for saved in state.files()):
        raise ValueError("a visit outside the run")
    if any(not 0 <= block < len(schedule.blocks) for block in {*state.blocks, *state.lost}):
        raise ValueError("a block that the model does not have")
    if state.active is not None and state.active.visit != progress.visit:
        raise ValueError("tensors of another visit than the open one")
    return state
