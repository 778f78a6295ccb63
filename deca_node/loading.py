"""What a node reads when it begins: model, data and what is kept of the run."""

import contextlib
from dataclasses import dataclass
from functools import partial

from deca_node.batches import BatchStream
from deca_node.blocks import Schedule
from deca_node.checkpoint import Checkpoint
from deca_node.config import Settings
from deca_node.corpus import Corpus, read_corpus
from deca_node.data import label_counts
from deca_node.errors import OutputError
from deca_node.fingerprint import fingerprint, schedule_for
from deca_node.methods.choose import prepare
from deca_node.models import LanguageModel
from deca_node.rounds import Worker
from deca_node.standing import Standing


@dataclass(frozen=True)
class Loaded:
    """What a node has read when it begins.

    Attributes:
        marks: the run's fingerprint.
        resumed: whether the folder holds this run's state.
        corpus: what the data files hold.
        batches: of the examples to train on.
    """

    model: LanguageModel
    schedule: Schedule
    marks: dict[str, str]
    checkpoint: Checkpoint
    resumed: bool
    corpus: Corpus
    batches: BatchStream


async def load(
    settings: Settings, standing: Standing, compute: Worker, stack: contextlib.AsyncExitStack
) -> Loaded:
    """Read everything; ``standing`` tells how far that is, and gets the progress that was kept.

    Args:
        settings: of the node.
        standing: of the node; warnings go there.
        compute: may raise whatever ends the node meanwhile.
        stack: gives the output folder back at its end.

    Raises:
        DecaError: something cannot be read, or does not fit the rest.
    """
    model = await compute(partial(LanguageModel.load, settings.model, standing.device))
    standing.model = model.name
    standing.schedule = schedule = schedule_for(settings, model.n_layers)
    marks = fingerprint(
        settings,
        schedule,
        await compute(model.config_digest),
        await compute(model.weights_digest),
        await compute(model.tokenizer.digest),
        model.dtype,
    )
    await compute(partial(prepare, settings, model))
    checkpoint = Checkpoint(settings.node.output, {**marks, "node": settings.node.name}, schedule)
    stack.callback(checkpoint.release)
    # The data first: what is wrong with it must not mark the folder as this run's.
    standing.waiting_for = "the data"
    corpus = await compute(partial(read_corpus, settings.data, model.tokenizer))
    standing.label_counts = label_counts(corpus.train)
    for warning in await compute(partial(corpus.warnings, model, settings.model.path)):
        standing.warn(warning)
    resumed = await compute(checkpoint.claim)
    if checkpoint.lost and settings.run.start_when == 1:  # no other node can have the block
        raise OutputError(
            f"{'; '.join(checkpoint.warnings)}; restore the folder from a backup, or set "
            "node.output to a new one"
        )
    for line in checkpoint.warnings:
        standing.warn(line)
    standing.resume(checkpoint.state.progress)
    pad_id = model.tokenizer.pad_id
    batches = BatchStream(corpus.train, settings.data.batch_size, settings.run.seed, pad_id)
    batches.position = standing.progress.data_position
    return Loaded(model, schedule, marks, checkpoint, resumed, corpus, batches)
