"""Decentralized SGD: x ← Σ_j w_ij (x_j − γ g_j), all layers at each step."""

import torch
from torch import Tensor

from deca_node.methods.deca import Deca
from deca_node.moments import slices


class DSgd(Deca):
    """See methods.Method. From step to step nothing is remembered but x. The rule has no BMA."""

    def _begin(self) -> None:
        self._m = self._v = torch.empty(0)

    def _update(self, part: slice, gradient: Tensor, step: int) -> None:  # noqa: ARG002
        x = self._active.master[part]
        for few in slices(x):
            x[few].sub_(gradient[few].to(x.dtype), alpha=self._rule.learning_rate)

    def state(self) -> dict[str, Tensor]:
        """See Method."""
        return {"x": self._active.master}
