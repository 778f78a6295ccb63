"""Where in a model its decoder layers are."""

from pathlib import Path
from typing import Any

from torch import nn

from deca_node.errors import ModelError


def layer_stack(module: Any, path: Path) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder layers, found by structure.

    The outermost ModuleList whose items are of one class and hold more than half of the parameters
    outside the embeddings.

    Raises:
        ModelError: there is none.
    """
    tables = [each for each in module.modules() if isinstance(each, nn.Embedding)]
    if (head := module.get_output_embeddings()) is not None:
        tables.append(head)
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}

    def size(part: nn.Module) -> int:
        return sum(each.numel() for each in part.parameters() if id(each) not in embeddings)

    whole = size(module)
    seen: list[str] = []
    for name, part in module.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in seen)
        if nested or not isinstance(part, nn.ModuleList):
            continue
        seen.append(name)
        if len({type(layer) for layer in part}) == 1 and 2 * size(part) > whole:
            return name, part
    raise ModelError(
        f"{path}: no stack of equal layers that holds most of the model"
        f" ({type(module).__name__}); use a model with one list of decoder layers"
    )
