"""The verbs of ``deca-node swarm``: who belongs to a run, and how a machine gets in and out."""

import asyncio
import datetime as dt
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from deca_node import identity, pairing, status
from deca_node.addresses import checked_address, joined
from deca_node.config import RunSettings, default_node_name, default_trust_folder, load
from deca_node.discovery import inviters, inviting, own_addresses
from deca_node.errors import ConfigError, ListenError, PeerError, TrustError, UnreachableError
from deca_node.guard import Visitor
from deca_node.identity import Authority
from deca_node.keyring import OPERATOR, Keyring, Pair, lifetime_days
from deca_node.limits import MAX_REVOKED, MAX_TOKEN_ADDRESSES, NAME_RULE
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import GrpcLink
from deca_node.trust import Certificate, Invitation, is_name, is_renewal_due, read_token, token

app = typer.Typer(
    help="Who belongs to a run: certificates, invitations, revocations (docs/securing.md).",
    no_args_is_help=True,
)

DAYS = 365.0
DEFAULT_RUN = RunSettings().name
# How long an invitation is looked for on the local network.
LOOK_SECONDS = 4.0
TELL_SECONDS = 5.0

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="A node's settings, which name run, node and trust.folder."
    ),
]
RunOption = Annotated[str | None, typer.Option("--run", help="The run; default: that of --config.")]
TrustOption = Annotated[
    Path | None,
    typer.Option("--trust", help="The trust folder; default: trust.folder, or the run's."),
]
NodeOption = Annotated[
    str | None,
    typer.Option("--node", help="The node's name; default: that of --config, or this machine's."),
]
DaysOption = Annotated[
    float, typer.Option("--days", min=0.001, max=3650, help="Days that certificates are valid.")
]


@dataclass(frozen=True)
class _Place:
    """Which run, which node, which folder a verb is about."""

    run: str
    node: str
    folder: Path

    def keyring(self) -> Keyring:
        return Keyring.of_run(self.folder, self.run)


def _place(config: Path | None, run: str | None, node: str | None, folder: Path | None) -> _Place:
    settings = load(config) if config is not None else None
    if settings is None and run is None:
        if folder is not None:
            run = Keyring(folder).run
        elif not (usual := default_trust_folder(DEFAULT_RUN)).exists():
            # Not that authority.pem is missing there: who makes one has parted the run in two.
            raise TrustError(
                f"{usual}: no such folder; name the run with --config FILE or --run NAME"
            )
    run = run or (settings.run.name if settings else DEFAULT_RUN)
    node = node or (settings.node.name if settings else default_node_name())
    for name in (run, node):
        if not is_name(name):
            raise ConfigError(f"{name!r}: a name has {NAME_RULE}")
    if folder is None and settings is not None and settings.run.name == run:
        folder = settings.trust_folder()
    return _Place(run, node, folder or default_trust_folder(run))


@app.command()
def init(
    config: ConfigOption = None,
    run: RunOption = None,
    node: NodeOption = None,
    trust: TrustOption = None,
    days: DaysOption = DAYS,
) -> None:
    """Make a run's authority here, an operator's certificate, and one for this machine's node.

    Once per run, on one machine. Whoever has the file authority.key can let others in.
    """
    place = _place(config, run or (DEFAULT_RUN if config is None else None), node, trust)
    if (place.folder / "authority.pem").exists():
        raise TrustError(
            f"{place.folder} already has an authority; see it with `deca-node swarm show`, let "
            "others in with `deca-node swarm invite`"
        )
    now = time.time()
    authority = Authority.new(place.run, now)
    keyring = Keyring(place.folder, authority.certificate)
    keyring.keep_authority(authority)
    keyring.issue_operator(now, days)
    _certify(keyring, place.node, days)
    # Last: with it the folder is a run's. Whatever is cut off before can be done again.
    Keyring.made(place.folder, authority.certificate)
    typer.echo(
        f"run {place.run}: authority, operator and node {place.node} in {place.folder}; let "
        f"another machine in with: deca-node swarm invite{_again(config, run, trust)}"
    )


def _again(config: Path | None, run: str | None, trust: Path | None) -> str:
    """The options by which another verb finds the same run and folder."""
    given = {"config": config, "run": run, "trust": trust}
    return "".join(f" --{name} {shlex.quote(str(v))}" for name, v in given.items() if v is not None)


def _certify(keyring: Keyring, node: str, days: float) -> None:
    key = identity.new_key()
    certificate = keyring.issue(node, identity.new_request(key), time.time(), days)
    keyring.keep_node(node, Pair(key, certificate))


def _seconds(text: str) -> float:
    """Of ``10m``, ``90s``, ``2h``."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        seconds = float(text[:-1]) * units[text[-1]]
    except (ValueError, KeyError, IndexError):
        raise typer.BadParameter("write it as 90s, 10m or 2h") from None
    if not 1 <= seconds <= 86400:
        raise typer.BadParameter("between 1s and 24h")
    return seconds


@app.command()
def invite(
    config: ConfigOption = None,
    run: RunOption = None,
    trust: TrustOption = None,
    node: Annotated[
        str | None,
        typer.Option(
            "--node",
            help="Node that it is for, new or in the run before; default: the joiner's choice.",
        ),
    ] = None,
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is valid: 90s, 10m, 2h.")] = (
        "10m"
    ),
    days: DaysOption = DAYS,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "0.0.0.0",  # noqa: S104
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 0,
    advertise: Annotated[
        str | None,
        typer.Option(
            "--advertise", metavar="HOST:PORT", help="Address that the joiner calls, behind NAT."
        ),
    ] = None,
) -> None:
    """Print what another machine must run to join, and wait for it.

    What is printed is valid once and for a short time. Whoever has it can join: send it over a
    channel that others do not read.
    """
    place = _place(config, run, node, trust)
    terms = pairing.Terms(node, days, _seconds(ttl))
    if advertise is not None:
        _checked(advertise)
    name = asyncio.run(_invite(place.keyring(), terms, host, port, advertise))
    typer.echo(f"{name} has joined run {place.run}", err=True)


async def _invite(
    keyring: Keyring, terms: pairing.Terms, host: str, port: int, advertise: str | None
) -> str:
    inviter = pairing.Inviter(keyring, terms, lambda text: typer.echo(text, err=True))
    try:
        own = await asyncio.to_thread(own_addresses, host)
    except OSError as error:  # as where seccomp forbids the question
        if advertise is None:
            raise ListenError(
                f"this machine's interfaces cannot be listed: {error.strerror or error}; give "
                "--advertise HOST:PORT, or the --host that the joiner calls"
            ) from None
        own = []
    port = await inviter.listen(host, port)
    where = [joined(ip, port) for ip in own]
    where = ([advertise] if advertise else where)[:MAX_TOKEN_ADDRESSES]
    word = token(inviter.invitation(where))
    typer.echo(f"deca-node swarm join {word}")
    typer.echo(
        f"waiting for {terms.node or 'a machine'} for {status.duration(terms.ttl)}, at "
        f"{', '.join(where)}; Ctrl-C withdraws the invitation",
        err=True,
    )
    async with inviting(keyring.run, port, own):
        return await inviter.joined()


@app.command()
def join(
    invitation: Annotated[
        str, typer.Argument(metavar="TOKEN", help="What `swarm invite` printed.")
    ],
    config: ConfigOption = None,
    node: NodeOption = None,
    trust: TrustOption = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="HOST:PORT",
            help="Where the inviter listens, if not where the token says.",
        ),
    ] = None,
) -> None:
    """Make this machine a node of a run, by an invitation."""
    said = read_token(invitation)
    place = _place(config, None if config else said.run, node, None)
    if place.run != said.run:
        raise TrustError(
            f"the invitation is for run {said.run!r}, the settings are for {place.run!r}; correct "
            "run.name, or give --config of another file"
        )
    folder = trust or place.folder
    joined = asyncio.run(_join(said, place.node, folder, at))
    then = f"deca-node start --config {shlex.quote(str(config or 'FILE'))}"
    if node is not None:
        then += f" --set node.name={node}"
    if folder != place.folder:
        then += f" --set trust.folder={shlex.quote(str(folder))}"
    typer.echo(f"node {joined.node} of run {said.run}, in {folder}; now: {then}")


async def _join(said: Invitation, node: str, folder: Path, at: str | None) -> pairing.Joined:
    def keyring(authority: bytes) -> Keyring:
        return Keyring.made(folder, authority)

    if at is not None:
        return await pairing.join(said, node, keyring, [_checked(at)])
    try:
        return await pairing.join(said, node, keyring, said.addresses)
    except pairing.NobodyError:
        found = await inviters(said.run, LOOK_SECONDS)
        if not found:
            raise
        return await pairing.join(said, node, keyring, found)


def _checked(address: str) -> str:
    try:
        return checked_address(address)
    except ValueError as error:
        raise ConfigError(str(error)) from None


@app.command()
def issue(
    node: Annotated[str, typer.Argument(help="Node that it is for.")],
    to: Annotated[Path, typer.Option("--to", help="A new trust folder, to carry to the machine.")],
    config: ConfigOption = None,
    run: RunOption = None,
    trust: TrustOption = None,
    days: DaysOption = DAYS,
) -> None:
    """Write a trust folder for another machine: for containers and configuration management.

    It holds the node's key: carry it like a password.
    """
    place = _place(config, run, node, trust)
    keyring = place.keyring()
    if node in keyring.revoked():
        raise TrustError(f"node {node!r} was revoked for good; use another name")
    if to.absolute() == place.folder.absolute():
        _certify(keyring, node, days)
    else:
        keyring.open_authority()
        theirs = Keyring.made(to, keyring.authority)
        key = identity.new_key()
        certificate = keyring.issue(node, identity.new_request(key), time.time(), days)
        theirs.keep_node(node, Pair(key, certificate))
        theirs.keep_revoked({**theirs.revoked(), **keyring.revoked()})
    typer.echo(f"wrote {to}: node {node} of run {place.run}")


@app.command()
def renew(
    config: ConfigOption = None,
    run: RunOption = None,
    node: NodeOption = None,
    trust: TrustOption = None,
    days: DaysOption = DAYS,
) -> None:
    """Renew the operator's certificate and those of this machine's nodes.

    Works where the authority's key is. Other machines' running nodes renew theirs by themselves
    while a node runs there; for one that was off too long, invite it again with --node NAME.
    """
    place = _place(config, run, node, trust)
    keyring = place.keyring()
    keyring.open_authority()  # or say at once that its key is elsewhere
    here = keyring.nodes()
    if node is not None and node not in here:
        raise TrustError(
            f"node {node!r} is not in {place.folder}, which has {', '.join(here) or 'none'}; for "
            "one on another machine: deca-node swarm invite --node "
            f"{node}{_again(config, run, trust)}"
        )
    names = [node] if node else here
    for name in names:
        if name in keyring.revoked():
            raise TrustError(f"node {name!r} was revoked for good")
        _certify(keyring, name, days)
    if node is None:
        keyring.issue_operator(time.time(), days)
        names = [*names, "operator"]
    typer.echo(f"renewed for {days:g} days: {', '.join(names)}; running nodes pick it up")


@app.command()
def revoke(
    node: Annotated[str, typer.Argument(help="Node to put out of the run, for good.")],
    config: ConfigOption = None,
    run: RunOption = None,
    trust: TrustOption = None,
    tell: Annotated[
        list[str] | None,
        typer.Option("--tell", metavar="HOST:PORT", help="A node to tell, if none runs here."),
    ] = None,
) -> None:
    """Put a node out of the run for good.

    A node that runs with this trust folder picks it up within a second, and the others from
    it. The name is never given again; the machine may be invited under another.
    """
    place = _place(config, run, node, trust)
    addresses = [_checked(address) for address in tell or ()]
    keyring = place.keyring()
    revoked = keyring.revoked()
    known = {*keyring.issued(), *revoked}
    if node == OPERATOR and node not in known:  # a node may be called so
        raise TrustError(
            "an operator's certificate cannot be revoked, only a node's; it expires by itself "
            "(deca-node swarm show); if its key was stolen, make a new authority for the run"
        )
    if node not in revoked:
        if len(revoked) >= MAX_REVOKED:
            raise TrustError(f"{MAX_REVOKED} nodes are revoked: make a new authority for the run")
        keyring.keep_revoked({node: keyring.open_authority().revoke(node)})
    note = "" if node in known else " (no such name was issued here)"
    typer.echo(f"revoked {node} in run {place.run}{note}")
    failed = []
    for address in addresses:
        try:
            asyncio.run(_tell(keyring, address))
            typer.echo(f"told {address}")
        except PeerError as error:
            failed.append(str(error))
    if failed:
        raise UnreachableError(f"revoked, but not told to {'; '.join(failed)}")


async def _tell(keyring: Keyring, address: str) -> None:
    link = GrpcLink(address, credentials=Visitor(keyring).credentials())
    marks = [pb.Revocation(node=n, signature=s) for n, s in keyring.revoked().items()]
    try:
        await link.exchange_revocations(pb.Revocations(revoked=marks), TELL_SECONDS)
    finally:
        await link.close()


@app.command()
def show(
    config: ConfigOption = None,
    run: RunOption = None,
    trust: TrustOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
) -> None:
    """Show what is in the trust folder: whose certificates, until when, who is revoked."""
    place = _place(config, run, None, trust)
    keyring = place.keyring()
    tree = _described(keyring)
    if as_json:
        typer.echo(json.dumps(tree))
        return
    where = "with its key" if keyring.has_authority else "its key is on another machine"
    typer.echo(f"run {keyring.run}, {keyring.folder}, authority {where}")
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("node", "here", "until", ""):
        table.add_column(column)
    for row in tree["certificates"]:
        state = "revoked" if row["revoked"] else row["state"]
        style = "" if state == "good" else "yellow" if state == "renewal due" else "red"
        until = ""
        if row["ends"] is not None:
            until = dt.datetime.fromtimestamp(row["ends"], dt.UTC).strftime("%Y-%m-%d")
        here = "yes" if row["here"] else ""
        table.add_row(Text(row["node"]), here, until, Text(state, style))
    for name in tree["revoked"]:
        if name not in {row["node"] for row in tree["certificates"]}:
            table.add_row(Text(name), "", "", Text("revoked", "red"))
    status.make_console().print(table)
    for row in tree["certificates"]:
        if row["problem"]:
            typer.echo(row["problem"])


def _described(keyring: Keyring) -> dict[str, Any]:
    now, revoked, here = time.time(), keyring.revoked(), keyring.nodes()
    rows = []
    if keyring.has_operator:
        rows.append(_row("(operator)", keyring.operator_certificate, keyring.operator, now))
    for name in sorted({*keyring.issued(), *here}):
        of = keyring.node_certificate if name in here else keyring.issued_certificate
        pair = partial(keyring.node, name) if name in here else None
        row = _row(name, partial(of, name), pair, now)
        rows.append(row | {"revoked": name in revoked})
    return {
        "run": keyring.run,
        "folder": str(keyring.folder),
        "authority_key": keyring.has_authority,
        "certificates": rows,
        "revoked": sorted(revoked),
    }


def _row(
    name: str, read: Callable[[], Certificate], pair: Callable[[], Pair] | None, now: float
) -> dict[str, Any]:
    """What a certificate says; where it or the key beside it is of no use, why."""
    row = {"node": name, "here": pair is not None, "ends": None, "days": None}
    row |= {"state": "unusable", "revoked": False, "problem": ""}
    try:
        shown = read()
        row |= {"ends": round(shown.ends), "days": round(lifetime_days(shown))}
        if pair is not None:
            pair()
    except TrustError as error:
        return row | {"problem": str(error)}
    late = now >= shown.ends
    state = "expired" if late else "renewal due" if is_renewal_due(shown, now) else "good"
    return row | {"state": state}
