"""Tensors that are to the code as those on Apple's GPUs: there is no float64 of them."""

import torch


class Mps(torch.Tensor):
    """Made by ``tensor.as_subclass(Mps)``; what is moved to the CPU is an ordinary tensor."""

    device = property(lambda _: torch.device("mps"))

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cpu, torch.Tensor.to) and torch.device("mps") not in args:
            return args[0].as_subclass(torch.Tensor).clone()
        found = super().__torch_function__(func, types, args, kwargs)
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return found
