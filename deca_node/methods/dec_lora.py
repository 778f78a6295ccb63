"""Dec-LoRA: local Adam steps on low-rank adapters (lora.py), then A and B are mixed, each alone."""

from deca_node.methods.dadam import DAdam
from deca_node.models import LanguageModel
from deca_node.moments import Rule
from deca_node.robust import MEAN, Aggregation


class DecLora(DAdam):
    """See methods.Method; the model is extended by lora.Lora.

    Args:
        model, rule, run, node: as for Deca.
        local_steps: from one exchange to the next.
        overlap, aggregation: as for Deca.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: Rule,
        run: str,
        node: str,
        local_steps: int,
        *,
        overlap: bool = True,
        aggregation: Aggregation = MEAN,
    ) -> None:
        super().__init__(model, rule, run, node, overlap=overlap, aggregation=aggregation)
        self._local_steps = local_steps

    def exchanges(self, step: int) -> bool:
        """See Method. After every ``local_steps`` steps."""
        return (step + 1) % self._local_steps == 0
