"""Quasi-global Adam (Lin et al. 2021) on all layers: quasiglobal.py, then a mix, then the fold."""

import torch
from torch import Tensor

from deca_node import quasiglobal
from deca_node.methods import Settled
from deca_node.methods.deca import Deca
from deca_node.models import LanguageModel
from deca_node.moments import Rule
from deca_node.robust import MEAN, Aggregation


class QgAdam(Deca):
    """See methods.Method.

    Args:
        model, rule, run, node: as for Deca.
        first: which first moment.
        overlap, aggregation: as for Deca.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: Rule,
        run: str,
        node: str,
        first: quasiglobal.FirstMoment,
        *,
        overlap: bool = True,
        aggregation: Aggregation = MEAN,
    ) -> None:
        super().__init__(model, rule, run, node, overlap=overlap, aggregation=aggregation)
        self._first = first
        self._before = torch.empty(0)  # x, within a step

    def advance(self, step: int) -> None:
        """See Method."""
        self._before = self._active.master.clone()
        super().advance(step)

    def _update(self, part: slice, gradient: Tensor, step: int) -> None:
        x, m, v = self._active.master[part], self._m[part], self._v[part]
        quasiglobal.half_step(x, gradient, m, v, step, self._rule, self._first)

    def settle(self, step: int) -> Settled:  # noqa: ARG002
        """See Method."""
        self._take_kept()
        mixed, master = self._mixed(), self._active.master
        norm = quasiglobal.fold(self._before, master, self._m, self._v, self._rule, self._first)
        self._before = torch.empty(0)
        self._own = None
        self._active.write_back()
        return Settled(norm, float(norm > 0), mixed, self._clipped)
