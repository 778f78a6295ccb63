"""What a node's operator can tell it while it runs (transport.ControlHandler)."""

import asyncio
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deca_node import template
from deca_node.config import ENV_PREFIX, Settings
from deca_node.errors import PeerRefused
from deca_node.member import Member
from deca_node.membership import Phase
from deca_node.pb import node_pb2 as pb
from deca_node.standing import Standing
from deca_node.waiting import done_before

# Phases with steps still to come: they can be paused between.
_TRAINING = (Phase.TRAINING, Phase.CATCHING_UP, Phase.PAUSED)
# Between two looks whether a save that is waited for may still come.
LOOK_SECONDS = 1.0
# A folder of that name within OUTPUT/exports and nowhere else, whoever asks.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Control:
    """See the module.

    Args:
        settings: of the node.
        standing: where it stands.
        stop: ends it with its state saved.
        stopping: set when it ends.

    Attributes:
        member: None until the node has met its run.
    """

    def __init__(
        self,
        settings: Settings,
        standing: Standing,
        stop: Callable[[], None],
        stopping: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._standing = standing
        self._stop = stop
        self._stopping = stopping
        self._asked: set[asyncio.Future[bool]] = set()  # for a save
        self._was_saved = True  # the last time
        self._exporting = False
        self.member: Member | None = None

    async def pause(self, request: pb.PauseRequest) -> pb.PauseReply:
        """See ControlHandler."""
        del request
        member = self._acting((Phase.WAITING, *_TRAINING), "paused")
        already = member.is_to_pause
        member.pause()
        return pb.PauseReply(already=already)

    async def resume(self, request: pb.ResumeRequest) -> pb.ResumeReply:
        """See ControlHandler."""
        del request
        member = self._acting((Phase.WAITING, *_TRAINING), "resumed")
        already = not member.is_to_pause
        member.resume()
        return pb.ResumeReply(already=already)

    async def checkpoint(self, request: pb.CheckpointRequest) -> pb.CheckpointReply:
        """See ControlHandler."""
        del request
        if self._saving().phase == Phase.PAUSED:  # that has saved it, or tried to
            if not self._was_saved:
                raise PeerRefused(
                    "not_saved", "it could not be saved when it paused; resume it and try again"
                )
        else:
            saved = asyncio.get_running_loop().create_future()
            self._asked.add(saved)
            look = partial(done_before, self._stopping, saved, end=False, within=LOOK_SECONDS)
            try:
                while not await look():
                    if self._stopping.is_set():
                        raise PeerRefused("stopping", "it saves its state as it ends")
                    self._saving()
            finally:
                self._asked.discard(saved)
            if not saved.result():
                raise PeerRefused("not_saved", "it could not be written; see the node's warnings")
        progress = self._standing.progress
        return pb.CheckpointReply(visit=progress.visit, step=progress.step)

    async def stop(self, request: pb.StopRequest) -> pb.StopReply:
        """See ControlHandler."""
        del request
        self._stop()
        return pb.StopReply(pid=os.getpid())

    async def export(self, request: pb.ExportRequest) -> pb.ExportReply:
        """See ControlHandler.

        In a process of its own, from the state on disk: the training keeps its memory and its pace.
        """
        if not _NAME.fullmatch(request.name):
            raise PeerRefused("bad_name", "a name is 1 to 64 characters of a-z, 0-9, . _ and -")
        target = (self._settings.node.output / "exports" / request.name).absolute()
        if target.exists():
            raise PeerRefused("exists", f"{target}: already exists; choose another name")
        if self._exporting:
            raise PeerRefused("busy", "another export is under way")
        self._exporting = True
        try:
            return pb.ExportReply(
                path=str(target), model=await self._export(target, consensus=request.consensus)
            )
        finally:
            self._exporting = False

    async def _export(self, target: Path, *, consensus: bool) -> str:
        """Run ``deca-node export``; what it says of the model."""
        with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
            file.write(template.document(self._settings.resolved()))
            file.flush()
            command = [sys.executable, "-m", "deca_node", "export"]
            command += ["--config", file.name, "--to", str(target)]
            process = await asyncio.create_subprocess_exec(
                *(command + ["--consensus"] * consensus),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                # What the environment set is in the file, and might not win there.
                env={k: v for k, v in os.environ.items() if not k.upper().startswith(ENV_PREFIX)},
            )
            try:
                out, errors = await process.communicate()
            finally:
                if process.returncode is None:  # nobody waits for it any more
                    process.send_signal(signal.SIGINT)
                    await process.wait()
        if process.returncode:
            lines = errors.decode(errors="replace").strip().splitlines() or [
                "out of memory, perhaps"
            ]
            raise PeerRefused("failed", lines[-1].removeprefix("deca-node: error: "))
        said = out.decode(errors="replace").strip().splitlines()
        return said[-1].removeprefix(f"wrote {target}: ") if said else ""

    def _saving(self) -> Member:
        """The member, where its next step's end or visit's end saves its state."""
        member = self.member
        if member is not None and member.position().phase == Phase.CATCHING_UP:
            raise PeerRefused(
                "not_now",
                "the node is catching up: what it fetches is on disk as it comes; ask again when "
                "it trains",
            )
        return self._acting((Phase.TRAINING, Phase.PAUSED), "saved")

    def _acting(self, phases: tuple[Phase, ...], what: str) -> Member:
        member, phase = self.member, self._standing.phase
        if member is not None:
            phase = member.position().phase
        if member is None or phase not in phases:
            word = phase.name.lower().replace("_", " ")
            raise PeerRefused("not_now", f"the node is {word}: nothing can be {what}")
        return member

    # --- between two steps

    @property
    def is_save_due(self) -> bool:
        """Whether somebody waits for a save."""
        return bool(self._asked)

    def saved(self, *, done: bool) -> None:
        """The state was saved, or could not be."""
        self._was_saved = done
        for waiting in self._asked:
            if not waiting.done():
                waiting.set_result(done)
        self._asked.clear()
