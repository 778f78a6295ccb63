"""Checks before a run: would this node start, fit, and meet its peers?

Nothing is written to the output folder, and a running swarm is not disturbed: the checker meets
peers as a node that is still starting, which nobody counts as a member, and takes its leave.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from deca_node import status
from deca_node.config import Settings
from deca_node.doctor import machine, network, peers
from deca_node.doctor.checks import Check, Facts, Verdict, failed
from deca_node.errors import DecaError

__all__ = ["Check", "Verdict", "as_json", "examine", "failed", "render"]


async def examine(
    settings: Settings,
    *,
    full: bool = False,
    patience: float | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """All checks, one after the other; none of them ends the others.

    Args:
        settings: the node's.
        full: read the weights, however large, so that peers can compare them.
        patience: seconds to wait for peers; None: as long as theirs may take to call back.
        tell: called with what is being looked at.
    """
    facts = Facts(settings)
    checks = _guarded("settings", machine.settings, facts)
    tell("this machine's nodes")
    await network.find_running(facts)
    for name, look in machine.checks(full=full).items():
        tell(name)
        checks += await asyncio.to_thread(_guarded, name, look, facts)
    tell("multicast")
    checks += await network.multicast(facts)
    if facts.running is not None:
        return [*checks, *network.running(facts.running)]
    if settings.needs_trust() and facts.guard is None:
        return [*checks, Check("peers", Verdict.WARN, "not searched for without a certificate")]
    tell("port and peers")
    return [*checks, *await peers.meet(facts, patience)]


def _guarded(name: str, look: Callable[[Facts], Iterable[Check]], facts: Facts) -> list[Check]:
    try:
        return list(look(facts))
    except DecaError as error:
        return [failed(name, error)]
    except OSError as error:  # of a file that nothing above looks after
        found = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return [Check(name, Verdict.FAIL, found)]


_STYLES: Mapping[Verdict, str] = {
    Verdict.OK: "green",
    Verdict.WARN: "yellow",
    Verdict.FAIL: "bold red",
}


def render(checks: Iterable[Check]) -> Table:
    """For people."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("remedy", overflow="fold")
    for one in checks:
        table.add_row(
            Text(one.check),
            Text(one.verdict, _STYLES[one.verdict]),
            status.text(one.found),
            status.text(one.remedy),
        )
    return table


def as_json(checks: Sequence[Check]) -> dict[str, Any]:
    """For scripts."""
    return {
        "ok": all(one.verdict != Verdict.FAIL for one in checks),
        "checks": [asdict(one) for one in checks],
    }
