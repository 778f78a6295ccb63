"""What a run needs of memory and disk, in bytes, from the model's shape alone. Pure.

With P parameters in the model, Pb in its largest block and e bytes an element (4 for fp32, else 2):

====================  ==========================  ==============================================
on the device         bytes                       why
====================  ==========================  ==============================================
weights               e P                         all layers, frozen but for one block
master                4 Pb, fp32: 0               in fp32 the parameters are views of it
moments               8 Pb                        Adam's m and v, of the active block alone
gradient              e Pb                        of the active block alone
activations           see ``_activations``        from the active block to the loss
====================  ==========================  ==============================================

These are DECA's. Adapters (``Work.added``) have master, moments and gradient of their own in fp32
and leave all layers frozen; D-SGD has no moments, quasi-global Adam 12 bytes (``Work.state``).

On the host come the published snapshot of the block (4 Pb), with ``schedule.staleness`` as much
again for what arrives meanwhile, and the process itself. A compressed wire format (references.py)
adds this node's own reference, old and new while the new one is made, its messages, and one
reference a neighbour: with n neighbours and c bytes a value (bf16 2, int8 1) that is
(8 + c + 4n) Pb. A clipped or trimmed mix keeps the neighbours' blocks, and DeCAF their factors,
until all have come: 4n Pb. On a GPU machine the weights also pass through the host while they are
loaded. LoRA's products are merged into the weights while the model is written, and the host keeps
the layers as they were: when there are no activations and gradients any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Python, torch, transformers and gRPC, measured at rest: 270 MiB and what a run adds.
PROCESS_BYTES = 400 << 20
# Elements that autograd keeps for a token in a layer, per unit of the hidden and of the
# feed-forward width. Measured for eight architectures (tests/edges/test_estimate.py) and rounded
# up; a frozen layer above the block needs less, as the inputs of its matrices are not kept.
FROZEN_KEEPS = (12, 4)
ACTIVE_KEEPS = (17, 6)
# The same for each head and earlier token, where attention is computed without a fused kernel.
EAGER_KEEPS = 4
# Of the feed-forward width, what backward through one layer holds for a token in passing.
BACKWARD_KEEPS = 4
# Logits: fp32 copy, log-softmax and its gradient of every trained token.
LOSS_BYTES = 12
# A line of history.jsonl, and what is neither blocks nor lines: manifest, tokenizer, summary.
HISTORY_LINE_BYTES = 512
SMALL_FILES_BYTES = 32 << 20


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    Attributes:
        parameters: of the whole model, tied ones counted once.
        layers: parameters of each decoder layer, in order.
        hidden: width of the layers.
        inner: width of the feed-forward part.
        heads: attention heads.
        vocabulary: tokens that the LM head scores.
        eager: attention is computed without a fused kernel.
    """

    parameters: int
    layers: tuple[int, ...]
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    eager: bool = False


@dataclass(frozen=True)
class Work:
    """What is done with the model in a step.

    Attributes:
        blocks: layers of each block.
        element: bytes of one weight: 4 for fp32, 2 for bf16 and fp16.
        batch: examples.
        tokens: of the longest example.
        trained: tokens of an example that are learned, at most.
        checkpointing: activations are computed again in the backward pass.
        sent: bytes of one value on the wire; 4 means that nothing is compressed.
        neighbours: with whom the node exchanges, at most.
        stale: blocks travel during the next step's gradient.
        added: parameters of adapters, in fp32, that are trained in the blocks' place; None: none.
        state: bytes of optimizer state for a trained parameter.
        kept: neighbours' blocks that are kept until the mix.
        merged: what is trained is merged into the layers when the model is written.
    """

    blocks: Sequence[range]
    element: int
    batch: int
    tokens: int
    trained: int
    checkpointing: bool = False
    sent: int = 4
    neighbours: int = 0
    stale: bool = False
    added: int | None = None
    state: int = 8
    kept: int = 0
    merged: bool = False

    def trained_at_once(self, shape: Shape) -> int:
        """Parameters that are trained at a time, at most."""
        if self.added is not None:
            return self.added
        return max(_parameters(shape, layers) for layers in self.blocks)


@dataclass(frozen=True)
class Memory:
    """Bytes that training holds at its peak, by what they are for.

    ``copies`` are those of the layers while a model is written, when training is over.
    """

    weights: int
    master: int
    moments: int
    gradient: int
    activations: int
    snapshots: int
    references: int = 0
    arrivals: int = 0
    copies: int = 0

    @property
    def computing(self) -> int:
        """On the device that computes."""
        return self.weights + self.master + self.moments + self.gradient + self.activations

    @property
    def hosting(self) -> int:
        """On the host, whatever the device."""
        return self.snapshots + self.references + self.arrivals + PROCESS_BYTES

    @property
    def writing(self) -> int:
        """On the host while the model is written, beside ``hosting``, where the weights are."""
        return self.weights + self.copies


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes to its output folder, by what they are for."""

    state: int
    model: int
    record: int

    @property
    def total(self) -> int:
        """All of them, at the moment when most is there."""
        return self.state + self.model + self.record


def memory(shape: Shape, work: Work) -> Memory:
    """What training needs when the block that needs most is active."""
    block = work.trained_at_once(shape)
    own = work.added is None  # else the master is all there is of what is trained
    return Memory(
        weights=work.element * shape.parameters,
        master=0 if own and work.element == 4 else 4 * block,
        moments=work.state * block,
        gradient=(work.element if own else 4) * block,
        activations=max(_activations(shape, work, layers) for layers in work.blocks),
        snapshots=(8 if work.stale else 4) * block,
        references=(8 + work.sent + 4 * work.neighbours) * block if work.sent < 4 else 0,
        arrivals=4 * work.kept * block,
        copies=work.element * sum(shape.layers) if work.merged else 0,
    )


def _activations(shape: Shape, work: Work, layers: range) -> int:
    """What the forward pass keeps for backward while ``layers`` are active, and the logits.

    Layers below the block run without autograd. With gradient checkpointing each layer keeps its
    input only, and one at a time is computed again.
    """
    tokens = work.batch * work.tokens
    graph = len(shape.layers) - layers.start
    frozen = _kept(shape, work, FROZEN_KEEPS)
    active = _kept(shape, work, ACTIVE_KEEPS)
    if work.checkpointing:
        kept = graph * shape.hidden + active
    else:
        kept = len(layers) * active + (graph - len(layers)) * frozen
    passing = BACKWARD_KEEPS * (shape.hidden + shape.inner)
    scored = work.batch * min(work.tokens, work.batch * work.trained)
    logits = scored * 2 * work.element + work.batch * work.trained * LOSS_BYTES
    return tokens * (kept + passing) * work.element + logits * shape.vocabulary


def _kept(shape: Shape, work: Work, keeps: tuple[int, int]) -> int:
    """Elements for one token in one layer."""
    scores = EAGER_KEEPS * shape.heads * work.tokens if shape.eager else 0
    return keeps[0] * shape.hidden + keeps[1] * shape.inner + scores


def disk(shape: Shape, work: Work, steps: int) -> Disk:
    """What a whole run writes into its output folder.

    The state holds every block that was visited, in the weights' precision, and between two steps
    the open block's x, m and v in fp32. New files are complete before old ones go: twice.

    Args:
        shape: the model's.
        work: of a step.
        steps: of the whole run.
    """
    block = work.trained_at_once(shape)
    blocks = work.element * sum(shape.layers) if work.added is None else 4 * work.added
    return Disk(
        state=2 * (blocks + (4 + work.state) * block),
        model=work.element * shape.parameters,
        record=steps * HISTORY_LINE_BYTES + SMALL_FILES_BYTES,
    )


def converted(shape: Shape) -> int:
    """What a GGUF file takes in ``model.cache``: fp32."""
    return 4 * shape.parameters + SMALL_FILES_BYTES


def _parameters(shape: Shape, layers: range) -> int:
    return sum(shape.layers[layer] for layer in layers)
