"""The local gradient of the active block: equation (3) of the paper. No network."""

import torch

from deca_node.batches import Batch
from deca_node.models import ActiveBlock, LanguageModel, Prefix


def gradient(
    model: LanguageModel, block: ActiveBlock, batch: Batch, prefix: Prefix | None = None
) -> tuple[float, float]:
    """Compute the batch's loss and leave its gradient in the block, in place of the former one.

    Backward reaches from the loss down to the block and no further: frozen layers above it pass
    gradients through without keeping any, those below it build no graph. An fp16 loss is scaled up
    before backward; ``block.gradients()`` and the norm returned here have the scale undone. With a
    ``prefix`` of the batch the frozen layers below the block are not run again.

    Returns:
        The loss and the gradient's ℓ2 norm over the block. Either may be infinite or NaN: the
        caller skips such a step, which is why nothing is raised.
    """
    block.drop_gradients()
    loss = model.loss(batch, prefix)
    (loss * block.loss_scale).backward()  # type: ignore[no-untyped-call]
    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for _, part in block.gradients()]
    return loss.item(), torch.linalg.vector_norm(torch.stack(norms)).item()
