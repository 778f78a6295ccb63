"""Decentralized SGD: x ← Σ_j w_ij (x_j − γ g_j), all layers at each step."""

import math

import torch
from torch import Tensor

from deca_node.methods import Settled
from deca_node.methods.deca import Deca
from deca_node.moments import slices


class DSgd(Deca):
    """See methods.Method. Nothing is remembered from step to step but x."""

    def _begin(self) -> None:
        self._m = self._v = torch.empty(0)

    def _update(self, part: slice, gradient: Tensor, step: int) -> None:  # noqa: ARG002
        x = self._active.master[part]
        for few in slices(x):
            x[few].sub_(gradient[few].to(x.dtype), alpha=self._rule.learning_rate)

    def settle(self, step: int) -> Settled:  # noqa: ARG002
        """See Method."""
        self._take_kept()
        square = 0.0
        for part, half in self._halves():
            mixed = self._active.master[part]
            for few in slices(half):
                moved = half[few] - mixed[few]
                square += float(torch.dot(moved, moved))
        self._own = None
        self._active.write_back()
        return Settled(math.sqrt(square), 0.0, math.sqrt(square), self._clipped)

    def state(self) -> dict[str, Tensor]:
        """See Method."""
        return {"x": self._active.master}
