"""``deca-node export``: the base model with what the run's state keeps of each block."""

from pathlib import Path

import torch

from deca_node.blocks import Schedule
from deca_node.checkpoint import Checkpoint
from deca_node.checkpoint.manifest import Progress, SavedFile, State
from deca_node.checkpoint.mark import read_mark
from deca_node.config import Settings
from deca_node.errors import OutputError
from deca_node.fingerprint import fingerprint, schedule_for
from deca_node.methods.choose import prepare
from deca_node.models import DTYPES, LanguageModel

# A daemon replaces one block in seconds at least, and only what it replaced is read again.
MAX_TRIES = 10
HOW_TO_AGREE = (
    "set consensus.tolerance, the same on all nodes, and start them all again: finished nodes "
    "agree, and write the model anew"
)


def export(settings: Settings, to: Path, *, consensus: bool) -> str:
    """Write the model as far as this node has trained it; the node may be running.

    What the open visit has done so far is not in it. The model is put together on the CPU, in the
    precision that the run uses. Where a file of the newest state is damaged, the state before is
    written if it is whole, and the answer says so; never with ``consensus``, whose name it would
    bear without being it.

    Args:
        settings: the node's.
        to: a new folder.
        consensus: refuse what the nodes have not agreed on.

    Returns:
        What the model is, in words.

    Raises:
        OutputError: the node's folder holds no such run or no state; a block of it is damaged; it
            has no agreement to show; or ``to`` is there already or cannot be written.
        ModelError: the base model cannot be read.
        DiskFullError: there is no room for the model.
    """
    folder = settings.node.output
    if to.exists():
        raise OutputError(f"{to}: already exists; give --to a new folder")
    mark = read_mark(folder / "run.json")
    dtype = mark.get("model.dtype")
    base = settings.model
    if dtype in DTYPES:  # which "auto" was on the device that trains
        base = base.model_copy(update={"dtype": dtype})
    model = LanguageModel.load(base, torch.device("cpu"))
    schedule = schedule_for(settings, model.n_layers)
    marks = fingerprint(
        settings,
        schedule,
        model.config_digest(),
        model.weights_digest(),
        model.tokenizer.digest(),
        model.dtype,
    )
    prepare(settings, model)
    store = Checkpoint(folder, {**marks, "node": settings.node.name}, schedule)
    state = _load_blocks(model, schedule, store)
    if consensus and store.warnings:
        raise OutputError(f"{store.warnings[0]}; {HOW_TO_AGREE}")
    agreed = _agreed(folder, state.progress) if consensus else ""
    model.export(to)
    return "; ".join(
        (
            f"the model after {state.progress.visit} of {schedule.visits} block visits, "
            f"{len(state.blocks)} of {len(schedule.blocks)} blocks changed{agreed}",
            *([model.note] if model.note else []),
            *store.warnings,
        )
    )


def _load_blocks(model: LanguageModel, schedule: Schedule, store: Checkpoint) -> State:
    """Bring the model to the newest state, which may be replaced meanwhile."""
    loaded: dict[int, SavedFile] = {}
    for _ in range(MAX_TRIES):
        state = store.look()
        if state.lost:
            raise OutputError(
                f"{'; '.join(store.warnings)}; restore it, or start the node: it fetches the "
                "block from another one"
            )
        try:
            for block, saved in state.blocks.items():
                if loaded.get(block) != saved:
                    model.load_block(schedule.blocks[block], store.load(saved))
                    loaded[block] = saved
        except OutputError:
            if store.look() == state:
                raise
        else:
            return state
    raise OutputError(f"{store.folder}: changes faster than it can be read; try again")


def _agreed(folder: Path, progress: Progress) -> str:
    """How the nodes have agreed, in words.

    Raises:
        OutputError: they have not; with what to do.
    """
    found = progress.agreement
    if found is None and not progress.finished:
        raise OutputError(
            f"{folder}: the run is not finished, and nodes agree at its end only; without "
            "--consensus the model is exported as it is"
        )
    if found is None:
        raise OutputError(f"{folder}: finished without an agreement; {HOW_TO_AGREE}")
    if not found.complete:
        raise OutputError(f"{folder}: its nodes did not come to an agreement; {HOW_TO_AGREE}")
    without = f", without {', '.join(found.missing)}" if found.missing else ""
    return f", agreed on by {', '.join(found.members)}{without}"
