"""Looks around from a running node: what is wrong with the swarm as it is seen from here."""

import asyncio
from collections.abc import Mapping
from typing import Any

from deca_node import __version__, health
from deca_node.config import Settings
from deca_node.member import Member
from deca_node.search import Search


class Lookout:
    """Gathers what health.diagnose judges, and logs what it finds.

    Args:
        settings: of the node.
        log: a structlog logger.

    Attributes:
        findings: what is wrong now.
    """

    def __init__(self, settings: Settings, log: Any) -> None:
        self._settings = settings
        self._log = log
        self._most_members = 1
        self._began = 0.0
        self.findings: list[health.Finding] = []

    def begin(self) -> None:
        """The node looks for others from now on."""
        self._began = asyncio.get_running_loop().time()

    def look(
        self,
        member: Member,
        search: Search,
        neighbours: frozenset[str] | None,
        late: Mapping[str, int],
    ) -> None:
        """Say once what is wrong, and once when it is resolved.

        Args:
            member: of the run.
            search: for others.
            neighbours: those of the open visit; None before the first one.
            late: how many steps in a row each was late.
        """
        settings, swarm, discovery = self._settings, member.swarm, search.discovery
        name, chosen = settings.node.name, settings.topology
        self._most_members = max(self._most_members, len(swarm.members(member.visit)))
        now = asyncio.get_running_loop().time()
        found = health.diagnose(
            health.View(
                name=name,
                run=settings.run.name,
                port=swarm.identity.port,
                phase=member.position().phase,
                wanted=settings.run.start_when,
                now=now,
                looking=now - self._began,
                peers=list(swarm.peers.values()),
                told=swarm.told,
                version=__version__,
                neighbours=neighbours,
                isolated=chosen.kind == "explicit" and not chosen.edges,
                most=self._most_members,
                zeroconf=discovery is not None,
                heard_itself=discovery is not None and discovery.heard_itself,
                heard_others=discovery is not None and discovery.heard_others,
                static=settings.network.static_peers,
                silent=swarm.never_answered(settings.network.static_peers),
                unresolved=search.named.failing,
                uncallable=swarm.uncallable(),
                refusals=swarm.refusals.last,
                late=late,
            )
        )
        before = {finding.key for finding in self.findings}
        for finding in found:
            if finding.key not in before:
                self._log.warning(finding.text, finding=finding.key)
        for resolved in before - {finding.key for finding in found}:
            self._log.info("resolved", finding=resolved)
        self.findings = found
