"""``deca-node install-service``: a systemd unit for machines that run a node unattended."""

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from deca_node.config import Settings, load
from deca_node.errors import (
    ConfigError,
    DataError,
    DecaError,
    ModelError,
    OutputError,
    TrustError,
)

# Starting again would end in the same way until somebody corrects it.
_HOPELESS: tuple[type[DecaError], ...] = (
    ConfigError,
    DataError,
    ModelError,
    OutputError,
    TrustError,
)

_UNIT = """\
[Unit]
Description=deca-node: fine-tunes a language model together with other machines
Wants=network-online.target
After=network-online.target
# However often it has failed: a network that is not there yet, or a device, may come at any time.
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
ExecStart={start}
# NVIDIA's devices appear when root asks for them; no harm where there are none.
ExecStartPre=+-/usr/bin/nvidia-modprobe -c 0 -u
WorkingDirectory=/var/lib/{name}
StateDirectory={name}
StateDirectoryMode=0700
{writable}UMask=0077

# A crash resumes from the kept state. A finished run (0) is not started again, nor is one whose
# settings, data, model or output folder must be corrected first.
Restart=on-failure
RestartSec=30s
RestartPreventExitStatus={hopeless}
# SIGTERM saves the state within seconds; a busy machine is allowed more.
TimeoutStopSec=60s
# The machine's other work comes first.
Nice=10

# It reads files, writes to the folders above, and talks to the network and the GPU.
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
DevicePolicy=closed
DeviceAllow=char-nvidia* rw
DeviceAllow=char-nvhost* rw
DeviceAllow=char-nvmap rw
DeviceAllow=char-drm rw
DeviceAllow=char-kfd rw
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# Not MemoryDenyWriteExecute: PyTorch compiles machine code as it runs.

[Install]
WantedBy=multi-user.target
"""


# A word of any line of a unit, and a folder's name.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def unit(settings: Settings, config: Path, program: Path, user: str, name: str) -> str:
    """The text of a systemd unit.

    Args:
        settings: what ``config`` says.
        config: the absolute path of the settings' file.
        program: the absolute path of the deca-node command.
        user: whom it runs as.
        name: of the unit and of its folder in /var/lib, where relative paths of settings begin.

    Raises:
        ConfigError: a unit cannot name one of these.
    """
    for option, word in (("--user", user), ("--name", name)):
        if not _PLAIN.fullmatch(word):
            raise ConfigError(
                f"{option} {word!r} cannot be used in a unit; use letters, digits, '_', '.' and '-'"
            )
    own = []
    if "cache" not in settings.model.model_fields_set:
        own = [f"CacheDirectory={name}", f"Environment=DECA_MODEL__CACHE=/var/cache/{name}"]
    own += [f"ReadWritePaths={_quoted(str(path))}" for path in outside(settings, name)]
    return _UNIT.format(
        user=user,
        name=name,
        # Of command lines alone systemd fills in variables.
        start=" ".join(
            _quoted(word).replace("$", "$$")
            for word in (str(program), "start", "--config", str(config))
        ),
        writable="".join(f"{line}\n" for line in own),
        hopeless=" ".join(str(error.exit_code) for error in _HOPELESS),
    )


def outside(settings: Settings, name: str) -> list[Path]:
    """Folders that the settings have the node write to, and that systemd does not make for it.

    Without ``..``, which systemd takes in no path.
    """
    given = [settings.node.output]
    if "cache" in settings.model.model_fields_set:
        given.append(settings.model.cache)
    if settings.trust.folder is not None:
        given.append(settings.trust.folder)
    if settings.tensorboard.folder is not None:
        given.append(settings.tensorboard.folder)
    home = Path("/var/lib") / name
    found = [_plain(path) for path in given if path.is_absolute()]
    return [path for path in found if not path.is_relative_to(home)]


def _plain(path: Path) -> Path:
    """Absolute and without ``..``, which can only be told from where links lead now."""
    return path.resolve() if ".." in path.parts else path.absolute()


def _quoted(word: str) -> str:
    """A word of a unit's line, whatever it contains (systemd.syntax, systemd.unit: specifiers).

    Raises:
        ConfigError: it would be more than one line.
    """
    if not word.isprintable():
        raise ConfigError(f"{word!r} cannot be used in a unit; give it a name without line breaks")
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{plain}"' if set(plain) & set(" \t'\"\\;") else plain


def install_service(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The node's settings file, in its final place.")
    ] = Path("/etc/deca-node/node.toml"),
    user: Annotated[
        str,
        typer.Option("--user", help="User that it runs as; must be able to read model and data."),
    ] = "deca-node",
    name: Annotated[
        str,
        typer.Option("--name", help="Name of the unit; each node of a machine needs its own."),
    ] = "deca-node",
) -> None:
    """Print a systemd unit that runs this machine's node, hardened and kept alive.

    It changes nothing itself; docs/edge.md has the few commands around it.
    """
    config = _plain(config)
    settings = load(config)
    typer.echo(unit(settings, config, _program(), user, name), nl=False)
    for path in outside(settings, name):
        if not path.exists():
            place = shlex.quote(str(path))
            typer.echo(f"before it starts: install -d -o {user} {place}", err=True)


def _program() -> Path:
    """The command that was called, which may be anything when this is a test."""
    beside = Path(sys.executable).with_name("deca-node")
    return beside if beside.exists() else Path(sys.argv[0]).absolute()
