"""Bottleneck adapters (Houlsby et al. 2019): two in each layer of a frozen model.

One follows the attention, one the feed-forward part, each before its output is added to the
residual stream: y + up(GELU(down(y))). They hang on the model as forward hooks, so that the model's
own tensors and their names stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from deca_node import sizes
from deca_node.errors import ModelError

FILE = "adapters.safetensors"
# What transformers' decoder layers call their two parts.
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
# Of the matrices at the start, cut off at two of them: the adapters begin near the identity.
DEVIATION = 1e-2


class Bottleneck(nn.Module):
    """y + up(GELU(down(y))), computed in float32.

    Args:
        hidden: width of y.
        width: width of the bottleneck.
        generator: of the matrices' start; the biases are zero.
    """

    def __init__(self, hidden: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = (
            # Without PyTorch's own start, which would draw from the process's generator.
            skip_init(nn.Linear, *sizes, dtype=torch.float32)  # type: ignore[no-untyped-call]
            for sizes in ((hidden, width), (width, hidden))
        )
        for part in (self.down, self.up):
            nn.init.trunc_normal_(
                part.weight, 0.0, DEVIATION, -2 * DEVIATION, 2 * DEVIATION, generator
            )
            nn.init.zeros_(part.bias)

    def forward(self, y: Tensor) -> Tensor:
        """``y`` of shape (…, hidden) and any floating dtype, which the result has too."""
        change: Tensor = self.up(nn.functional.gelu(self.down(y.float())))
        return y + change.to(y.dtype)


class Houlsby:
    """See models.Addition. The exported folder has the base model and, beside it, the adapters.

    Args:
        module: the Hugging Face model; gets its adapters here.
        stack: name of its layer stack.
        width: of the bottlenecks.
        seed: of their start, the same on all nodes of a run.

    Raises:
        ModelError: attention or feed-forward part are not found in a layer.
    """

    note = (
        f"adapters cannot be merged: the folder has the base model and, beside it, {FILE}, which "
        "deca_node.houlsby.attach puts to use"
    )

    def __init__(self, module: Any, stack: str, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._stack, self._width = stack, width
        self._adapters: list[dict[str, Bottleneck]] = []
        hooks: list[tuple[nn.Module, Bottleneck]] = []
        for index, layer in enumerate(module.get_submodule(stack)):
            pair = {}
            for name, part in _parts(layer, index).items():
                adapter = Bottleneck(sizes.hidden(module), width, generator)
                adapter.to(next(part.parameters()).device).requires_grad_(False)
                hooks.append((part, adapter))
                pair[name] = adapter
            self._adapters.append(pair)
        # Only now, so that a model that they do not fit stays as it was.
        self._handles = [part.register_forward_hook(_hook(adapter)) for part, adapter in hooks]

    def remove(self) -> None:
        """Take the adapters off the model."""
        for handle in self._handles:
            handle.remove()

    def parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """See Addition."""
        return {
            f"{self._stack}.{layer}.{part}.adapter.{name}": parameter
            for part, adapter in self._adapters[layer].items()
            for name, parameter in adapter.named_parameters()
        }

    @contextmanager
    def exporting(self, folder: Path) -> Iterator[None]:
        """See Addition."""
        tensors = {
            name: parameter.detach().cpu().contiguous()
            for layer in range(len(self._adapters))
            for name, parameter in self.parameters(layer).items()
        }
        save_file(tensors, folder / FILE, {"stack": self._stack, "width": str(self._width)})
        yield


def added(module: Any, stack: str, width: int) -> int:
    """How many parameters ``Houlsby`` would add; the module may be without values.

    Raises:
        ModelError: as ``Houlsby``.
    """
    hidden = sizes.hidden(module)
    parts = [_parts(layer, index) for index, layer in enumerate(module.get_submodule(stack))]
    return sum(map(len, parts)) * (2 * hidden * width + hidden + width)


def attach(module: Any, folder: Path) -> None:
    """Put exported adapters on a base model that ``from_pretrained`` has read.

    Args:
        module: the Hugging Face model of ``folder``.
        folder: what ``deca-node export`` or a finished run of dec-adapter has written.

    Raises:
        ModelError: the folder has no such file, or one of another model; the model is as before.
    """
    houlsby = None
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        houlsby = Houlsby(module, about["stack"], int(about["width"]), seed=0)
        with torch.no_grad():
            for layer in range(len(houlsby._adapters)):
                for name, parameter in houlsby.parameters(layer).items():
                    parameter.copy_(tensors[name])
    except (
        OSError,
        SafetensorError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        if houlsby is not None:
            houlsby.remove()
        raise ModelError(
            f"{folder / FILE}: not the adapters of this model ({error}); export them again"
        ) from None


def _parts(layer: nn.Module, index: int) -> dict[str, nn.Module]:
    """A layer's attention and feed-forward part."""
    parts = dict(layer.named_children())
    found = {}
    for kind, names in (("attention", ATTENTION), ("feed-forward part", FEED_FORWARD)):
        name = next((name for name in names if name in parts), None)
        if name is None:
            raise ModelError(
                f"{type(layer).__name__}: no {kind} in layer {index}, which has "
                f"{', '.join(parts)}; choose another run.method than dec-adapter"
            )
        found[name] = parts[name]
    return found


def _hook(adapter: Bottleneck) -> Any:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, (tuple, list)):  # attention gives its weights, too; GPT in a list
            return type(output)([adapter(output[0]), *output[1:]])
        return adapter(output)

    return hook
