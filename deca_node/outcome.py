"""What a run leaves in its folder when it ends: the model, and summary.json beside it."""

from dataclasses import asdict
from typing import Any

from deca_node import __version__
from deca_node.checkpoint.manifest import Progress
from deca_node.config import Settings
from deca_node.disk import replace_folder
from deca_node.models import LanguageModel
from deca_node.record import write_summary
from deca_node.standing import Standing


class Outcome:
    """The result of one node's run.

    Args:
        settings: of the node.

    Attributes:
        model: the folder of the trained model.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._summary = settings.node.output / "summary.json"
        self.model = settings.node.output / "model"

    @property
    def shown(self) -> str:
        """The model's folder for a log, which is read elsewhere."""
        return str(self.model.absolute())

    def write_model(self, model: LanguageModel) -> None:
        """Write the model in place of an earlier one.

        Raises:
            OutputError: it cannot be written.
        """
        replace_folder(self.model, model.export)

    def write_summary(
        self,
        standing: Standing,
        progress: Progress,
        after: dict[str, Any] | None,
    ) -> None:
        """Write the record of a run that is complete.

        Args:
            standing: of the node.
            progress: at the end.
            after: the evaluation after training, if there is a test.

        Raises:
            OutputError: it cannot be written.
        """
        settings = self._settings
        summary = {
            "run": settings.run.name,
            "node": settings.node.name,
            "finished": True,
            "label_counts": standing.label_counts,
            "before": progress.before,
            "after": after,
            "bytes_sent": progress.bytes_sent,
            "bytes_received": progress.bytes_received,
            "steps": standing.schedule.total_steps if standing.schedule else 0,
            "seconds": round(progress.seconds, 3),
            "incomplete_mixes": progress.incomplete,
            "visits_passed_over": progress.passed_over,
            "bytes_caught_up": progress.caught_up,
            "consensus": asdict(progress.agreement) if progress.agreement is not None else None,
            "model": str(self.model),
            "device": str(standing.device),
            "version": __version__,
            "settings": settings.model_dump(mode="json"),
        }
        write_summary(self._summary, summary)
