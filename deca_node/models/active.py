"""The block that is trained: one flat buffer and the parameters that it stands for."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from deca_node.wire import Layout, TensorSpec

# 1024 lifts gradients ten binades away from fp16's underflow (6e-8) and leaves room up to 65504.
FP16_LOSS_SCALE = 1024.0


class ActiveBlock:
    """The trainable block: one flat fp32 buffer and the model's parameters that it stands for.

    A parameter whose dtype is fp32 *is* a view of the buffer; any other gets the buffer's values by
    :meth:`write_back`.

    Args:
        parameters: those of the block by name.
        device: the model's.
        half: gradients reach them through fp16, so that the loss needs a scale.

    Attributes:
        layout: the parameters' names and shapes, in the order of the model's state dict.
        master: the values, contiguous float32, shape (layout.numel,), on the model's device.
        loss_scale: the loss is multiplied by it before backward; :meth:`gradients` undoes it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        *,
        half: bool = False,
    ) -> None:
        self.layout = Layout(
            tuple(TensorSpec(name, tuple(tensor.shape)) for name, tensor in parameters.items())
        )
        self.master = torch.empty(self.layout.numel, dtype=torch.float32, device=device)
        self.loss_scale = FP16_LOSS_SCALE if half else 1.0
        self._parameters: list[tuple[slice, nn.Parameter]] = []
        end = 0
        for parameter in parameters.values():
            part = slice(end, end := end + parameter.numel())
            view = self.master[part].view(parameter.shape)
            view.copy_(parameter.detach())
            if parameter.dtype == torch.float32:
                parameter.data = view
            parameter.requires_grad_(True)
            self._parameters.append((part, parameter))

    def write_back(self) -> None:
        """Round ``master`` into the parameters that are not views of it."""
        with torch.no_grad():
            for part, parameter in self._parameters:
                if parameter.dtype != torch.float32:
                    parameter.copy_(self.master[part].view(parameter.shape))

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``master`` in order and their gradients, flat; zeros where backward left none.

        They have the parameter's dtype, or float32 where a loss scale is undone: divided in fp16
        they would underflow, which is what the scale is there to prevent.
        """
        for part, parameter in self._parameters:
            if parameter.grad is None:
                yield part, torch.zeros_like(parameter.detach()).reshape(-1)
            elif self.loss_scale == 1:
                yield part, parameter.grad.reshape(-1)
            else:
                yield part, parameter.grad.reshape(-1).float() / self.loss_scale

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for _, parameter in self._parameters:
            parameter.grad = None

    def freeze(self) -> None:
        """Train it no more, and free its gradients."""
        self.drop_gradients()
        for _, parameter in self._parameters:
            parameter.requires_grad_(False)
