"""What a run leaves in its folder when it ends: the model, and summary.json beside it."""

from dataclasses import asdict, dataclass
from typing import Any

from deca_node import __version__
from deca_node.agreement import Agreement
from deca_node.checkpoint.manifest import Progress
from deca_node.config import Settings
from deca_node.disk import replace_folder
from deca_node.models import LanguageModel
from deca_node.record import read_summary, write_summary
from deca_node.standing import Standing


@dataclass(frozen=True)
class Agreed:
    """What the record says of an agreement that was reached; nobody's where there is none.

    Attributes:
        members: who has that one model.
        missing: who was to have it.
        finer: whether the settings ask for a smaller tolerance now.
    """

    members: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    finer: bool = True


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

    def agreed(self) -> Agreed:
        """The agreement that the record tells of.

        Raises:
            OutputError: the record cannot be read.
        """
        found = read_summary(self._summary).get("consensus") or {}
        if found.get("complete") is not True:
            return Agreed()
        return Agreed(
            frozenset(found.get("members", ())),
            frozenset(found.get("missing", ())),
            found.get("tolerance", 1.0) > self._settings.consensus.tolerance,
        )

    def forget_agreement(self) -> None:
        """What was agreed before does not count from now on: the blocks change.

        Raises:
            OutputError: the record cannot be read or written.
        """
        if summary := read_summary(self._summary):
            write_summary(self._summary, {**summary, "consensus": None})

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
        agreement: Agreement | None,
    ) -> None:
        """Write the record of a run that is complete.

        Args:
            standing: of the node.
            progress: at the end.
            after: the evaluation after training, if there is a test.
            agreement: if there was to be one.

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
            "consensus": {**asdict(agreement), "tolerance": settings.consensus.tolerance}
            if agreement is not None
            else None,
            "model": str(self.model),
            "device": str(standing.device),
            "version": __version__,
            "settings": settings.model_dump(mode="json"),
        }
        write_summary(self._summary, summary)
