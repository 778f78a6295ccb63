"""The command line: verbs, and errors as one line and an exit code (errors.py lists them).

What takes seconds to import (torch, transformers) is imported by the verbs that need it, so that
``status`` and ``--help`` answer at once.
"""

import asyncio
import io
import json
import math
import os
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, NoReturn

import structlog
import typer
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deca_node import (
    __version__,
    access,
    cli_dashboard,
    cli_lab,
    cli_service,
    cli_swarm,
    cli_watch,
    logs,
    status,
    template,
)
from deca_node.config import load
from deca_node.disk import is_full
from deca_node.errors import (
    CheckError,
    ConfigError,
    DecaError,
    DiskFullError,
    OutputError,
    PeerError,
    UnreachableError,
)
from deca_node.events import printable
from deca_node.limits import MAX_SHOWN_CHARACTERS
from deca_node.pb import node_pb2 as pb
from deca_node.transport.client import GrpcLink, ask_all, ask_status

ASK_SECONDS = 3.0
WATCH_SECONDS = 1.0

app = typer.Typer(
    help="Machines with private data fine-tune one language model together, with nobody in charge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("install-service")(cli_service.install_service)

app.add_typer(cli_swarm.app, name="swarm")
cli_watch.register(app, cli_swarm.app)
app.command()(cli_lab.profile)
app.command()(cli_lab.answer)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="TOML file; `deca-node init` writes one.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting; may be repeated."),
]
AddressArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[NODE or HOST:PORT]",
        help="A node of this machine by name, or any by address; default: all on this machine.",
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="JSON for scripts: for a named node one object, its own status (peers: a list);"
        " otherwise a list with one object per node.",
    ),
]


def _above_zero(value: float) -> float:
    if not 0 < value < math.inf:
        raise typer.BadParameter("a finite number above 0 is needed")
    return value


ConcentrationOption = Annotated[
    float,
    typer.Option(
        "--concentration",
        "-a",
        callback=_above_zero,
        help="Dirichlet: 100 is even, 0.1 very uneven.",
    ),
]


TestOption = Annotated[Path | None, typer.Option("--test", help="Held-out data.")]
TestPerLabelOption = Annotated[
    int,
    typer.Option("--test-per-label", min=0, help="Rows of each label to hold out of --train."),
]
LabelFieldOption = Annotated[
    str | None, typer.Option("--label-field", help="Field of the label; default: data.label_field.")
]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit: 0, the error's own code, 1 for a defect, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A letter that the locale does not have is a question mark, and ends no verb.
        sys.stdout.reconfigure(errors="replace")
    try:
        try:
            app(list(arguments), prog_name="deca-node")
            sys.exit(0)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it is told that there is no room for it
    except DecaError as error:
        if "--traceback" in arguments:
            raise
        _complain(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the one place where a defect becomes an exit code
        if isinstance(error, OSError) and is_full(error):
            _forget_output()
            place = error.filename or "what this prints"
            full = DiskFullError(
                f"{place}: no space left on the disk; free some, or write elsewhere"
            )
            _complain(full)
            sys.exit(full.exit_code)
        structlog.get_logger().exception("this is a defect of deca-node; please report it")
        sys.exit(1)


def _forget_output() -> None:
    """What could not be printed is not tried again as Python ends, which would tell of it anew."""
    with suppress(OSError, ValueError):  # no file, as in a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: DecaError) -> None:
    print(f"deca-node: error: {_one_line(error)}", file=sys.stderr)  # noqa: T201


def _one_line(error: DecaError) -> str:
    """For a terminal: it may tell what a node has said."""
    return printable(" ".join(str(error).split()), MAX_SHOWN_CHARACTERS)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deca-node {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from.")
    ] = False,
) -> None:
    del version, traceback  # the first has exited, main and start look the second up
    logs.configure(human=sys.stderr.isatty())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("node.toml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite it.")] = False,
) -> None:
    """Write a commented settings file."""
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(template.commented())
    except FileExistsError:
        raise OutputError(f"{path}: already exists; --force overwrites it") from None
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror or error}; name a file in a folder that "
            "exists and can be written"
        ) from None
    typer.echo(f"wrote {path}; fill in model.path and data.train, then: deca-node start -c {path}")


@app.command()
def start(
    context: typer.Context,
    config: ConfigOption = None,
    settings: SetOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step.")] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plain text on the network: trust.insecure = true.")
    ] = False,
) -> None:
    """Run this machine's node until the run is finished, or a signal ends it.

    SIGINT and SIGTERM save the state; the same command resumes there. A second Ctrl-C ends it at
    once, with what was saved before.
    """
    human = sys.stderr.isatty()
    logs.configure(human=human, verbose=verbose)
    log = structlog.get_logger()
    node = None
    try:
        given = [*(settings or ()), *(["trust.insecure=true"] if insecure else ())]
        chosen = load(config, given)
        from deca_node.node import Node  # noqa: PLC0415 - imports torch

        with _progress_bar(shown=human) as report:
            node = Node(chosen, log, report)
            finished = asyncio.run(node.run())
    except DecaError as error:
        if context.find_root().params["traceback"]:
            raise
        if human:
            _complain(error)
        else:  # the log is JSON to its end
            log.error(_one_line(error), exit_code=error.exit_code)  # noqa: TRY400 - no defect
        if node is not None and node.is_computing:
            _leave_now(error.exit_code)
        raise typer.Exit(error.exit_code) from None
    if not finished:
        log.info("ended before the run was finished; the same command resumes it")
        _leave_now(0)


def _leave_now(code: int) -> NoReturn:
    """End at once, when all is saved that will be.

    Python takes seconds to wind up torch and gRPC, while whoever sent a signal waits; and under a
    thread that is still inside torch it aborts, whatever the exit code was to be.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Callable[[pb.NodeStatus], None] | None]:
    """A line under the log with the run's position; yields what takes the status."""
    if not shown:
        yield None
        return
    with Live(console=logs.console, refresh_per_second=4, transient=True) as live:
        yield lambda now: live.update(status.render_line(now))


@app.command("status")
def show_status(
    address: AddressArgument = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on until interrupted.")] = False,
    trust: cli_watch.TrustOption = None,
) -> None:
    """Show what a node, or all nodes of this machine, are doing."""
    where = access.targets(address)
    single = address is not None
    asyncio.run(_show(where, trust, as_json=as_json, single=single, watch=watch))


@app.command()
def peers(
    address: AddressArgument = None,
    as_json: JsonOption = False,
    trust: cli_watch.TrustOption = None,
) -> None:
    """Show what a node, or each node of this machine, knows of its peers."""
    found = asyncio.run(_ask(access.targets(address), trust))
    if as_json:
        nodes = [
            {
                "run": now.run,
                "node": now.node,
                "peers": [status.as_json(peer) for peer in now.peers],
            }
            for now in found
        ]
        typer.echo(json.dumps(nodes[0]["peers"] if address else nodes))
        return
    console = status.make_console()
    for now in found:
        if len(found) > 1:
            console.print(status.text(now.node, "bold"))
        console.print(status.render_peers(now.peers) if now.peers else "no peers yet")


async def _show(
    where: list[str], trust: Path | None, *, as_json: bool, single: bool, watch: bool
) -> None:
    console = status.make_console()
    async with aclosing(_states(where, trust, watch=watch)) as states:
        if as_json:
            async for now in states:
                tree = [status.as_json(one) for one in now]
                typer.echo(json.dumps(tree[0] if single else tree))
        elif watch and console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                async for now in states:
                    live.update(_rendered(now), refresh=True)
        else:
            async for now in states:
                console.print(_rendered(now))


def _rendered(states: list[pb.NodeStatus]) -> RenderableType:
    if len(states) == 1:
        return status.render(states[0])
    # Not by name: two nodes of one name are two rows, as that may be what is wrong.
    return status.render_swarm({str(number): one for number, one in enumerate(states)})


async def _states(
    where: list[str], trust: Path | None, *, watch: bool
) -> AsyncGenerator[list[pb.NodeStatus]]:
    if not watch:
        yield await _ask(where, trust)
    elif len(where) == 1:
        shown = await access.credentials(where, trust)
        link = GrpcLink(where[0], credentials=shown.get(where[0]))
        try:
            async for now in link.watch_status(WATCH_SECONDS):
                yield [access.as_asked(now, where[0], shown)]
        except PeerError as error:
            raise _unreachable(error) from None
        finally:
            await link.close()
    else:
        while True:
            yield await _ask(where, trust)
            await asyncio.sleep(WATCH_SECONDS)


async def _ask(where: list[str], trust: Path | None = None) -> list[pb.NodeStatus]:
    """The status of those that answer; at least one must."""
    shown = await access.credentials(where, trust)
    if len(where) == 1:
        try:
            now = await ask_status(where[0], ASK_SECONDS, shown.get(where[0]))
            return [access.as_asked(now, where[0], shown)]
        except PeerError as error:
            raise _unreachable(error) from None
    answers = await ask_all(where, ASK_SECONDS, shown)
    states = [
        access.as_asked(answer, address, shown)
        for address, answer in zip(where, answers, strict=True)
        if isinstance(answer, pb.NodeStatus)
    ]
    if not states:
        raise _unreachable(next(one for one in answers if isinstance(one, PeerError)))
    return states


def _unreachable(error: PeerError) -> UnreachableError:
    return UnreachableError(f"no deca-node answers at {error}")


@app.command("export")
def export_model(
    node: cli_watch.NodeArgument = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="A new folder for the model, made from what is on disk."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Let the running node write it, into OUTPUT/exports/NAME."),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    consensus: Annotated[
        bool,
        typer.Option("--consensus", help="Only a model that the nodes agreed on at the end."),
    ] = False,
    trust: cli_watch.TrustOption = None,
) -> None:
    """Write this node's model as far as it is trained, also while the node runs.

    The folder can be loaded by transformers, like the one that a finished run
    leaves in node.output. With --to it is put together here from the state on
    disk; with --name a running node, this machine's or another's, does so.
    """
    if (to is None) == (name is None):
        raise ConfigError("give either --to DIR, or --name NAME for a running node")
    if name is not None:
        if config is not None or settings:
            raise ConfigError(
                "--name asks a running node, which has its own settings; leave out --config "
                "and --set"
            )
        cli_watch.export_of_node(node, name, trust, consensus=consensus)
        return
    if node is not None:
        raise ConfigError(f"{node}: to ask a running node give --name in place of --to")
    assert to is not None  # noqa: S101 - one of the two is given
    from deca_node import export  # noqa: PLC0415 - imports torch

    done = export.export(load(config, settings or ()), to, consensus=consensus)
    typer.echo(f"wrote {to}: {done}")


@app.command()
def partition(
    source: Annotated[Path, typer.Argument(help="Labelled data: .jsonl, .csv, .parquet, folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for node-0.jsonl and so on.")],
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, help="How many nodes.")],
    concentration: ConcentrationOption = 0.25,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same split.")] = 0,
    label_field: Annotated[
        str, typer.Option("--label-field", help="Field of the label.")
    ] = "label",
    test_per_label: Annotated[
        int, typer.Option("--test-per-label", min=0, help="Rows of each label for test.jsonl.")
    ] = 0,
) -> None:
    """Split a labelled data set among nodes, each with a label mix of its own."""
    from deca_node.partition import write_shards  # noqa: PLC0415 - imports torch

    counts = write_shards(
        source,
        out,
        nodes,
        concentration,
        seed,
        label_field=label_field,
        test_per_label=test_per_label,
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("node")
    for label in [*counts[0], "rows"]:
        table.add_column(Text(label), justify="right")
    for number, row in enumerate(counts):
        table.add_row(f"node-{number}", *map(str, row.values()), str(sum(row.values())))
    status.make_console().print(table)
    test = " and test.jsonl" if test_per_label else ""
    typer.echo(f"wrote {out}{os.sep}node-0.jsonl to node-{nodes - 1}.jsonl{test}")


@app.command("testbed")
def run_testbed(
    config: ConfigOption = None,
    settings: SetOption = None,
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=1, help="How many nodes.")] = 4,
    train: Annotated[
        Path | None, typer.Option("--train", help="Labelled data to split among the nodes.")
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option("--shards", help="Folder with node-0.jsonl and so on, in place of --train."),
    ] = None,
    test: TestOption = None,
    test_per_label: TestPerLabelOption = 0,
    concentration: ConcentrationOption = 0.25,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the split.")] = 0,
    label_field: LabelFieldOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for all output.")] = Path(
        "out/testbed"
    ),
    isolated: Annotated[
        bool, typer.Option("--isolated", help="No edges: every node trains alone.")
    ] = False,
) -> None:
    """Run several nodes on this machine, each a process of its own, and compare them.

    The same command resumes a run that was interrupted.

    It sets by itself, whatever --config and --set say: node.name, node.host,
    node.port, node.advertise, node.advertise_port, node.output, node.stay,
    node.health_port, data.train, run.start_when, network.zeroconf,
    network.interfaces, network.static_peers, network.dns_peers, metrics.port.
    It makes run.name unique. Unless given, network.preset is local and
    node.threads an equal share.
    """
    if (train is None) == (shards is None):
        raise ConfigError("give either --train FILE or --shards DIR")
    if test_per_label and (test is not None or train is None):
        raise ConfigError("--test-per-label needs --train, and no --test")
    from deca_node import testbed  # noqa: PLC0415 - imports torch
    from deca_node.testbed.layout import Plan  # noqa: PLC0415 - imports torch

    testbed.run(
        Plan(
            nodes=nodes,
            config=config,
            overrides=tuple(settings or ()),
            train=train,
            shards=shards,
            test=test,
            test_per_label=test_per_label,
            concentration=concentration,
            seed=seed,
            label_field=label_field,
            out=out,
            isolated=isolated,
        )
    )


@app.command("chaos")
def run_chaos(
    config: ConfigOption = None,
    settings: SetOption = None,
    minutes: Annotated[
        float, typer.Option("--minutes", "-m", callback=_above_zero, help="Minutes of faults.")
    ] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of faults and split.")] = 0,
    nodes: Annotated[int, typer.Option("--nodes", "-n", min=2, help="Nodes at the start.")] = 4,
    joiners: Annotated[
        int, typer.Option("--joiners", "-j", min=0, help="Nodes that join later.")
    ] = 1,
    train: Annotated[
        Path | None, typer.Option("--train", help="Labelled data to split among all of them.")
    ] = None,
    test: TestOption = None,
    test_per_label: TestPerLabelOption = 0,
    concentration: ConcentrationOption = 0.25,
    label_field: LabelFieldOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="An empty folder.")] = Path("out/chaos"),
) -> None:
    """Kill, freeze, cut off, restart and join nodes of a testbed, and see whether it survives.

    Runs the nodes undisturbed first, for about as many minutes, then under a fault every few
    seconds. Exit code 10 when no step is made anywhere for 60 s, a state is lost, a node ends by
    itself, or the mean accuracy is more than 2 points lower. OUT/chaos.json has the details.

    Without --train it makes a small random model and data for it. It sets what
    testbed sets, and schedule.rounds to what fits the minutes; network.preset is lan unless
    given.
    """
    if train is None and (config is not None or test is not None or test_per_label):
        raise ConfigError("--config, --test and --test-per-label need --train FILE")
    if test_per_label and test is not None:
        raise ConfigError("give either --test FILE or --test-per-label N")
    from deca_node import chaos  # noqa: PLC0415 - imports torch

    chaos.run(
        chaos.Plan(
            minutes=minutes,
            seed=seed,
            nodes=nodes,
            joiners=joiners,
            config=config,
            overrides=tuple(settings or ()),
            train=train,
            test=test,
            test_per_label=test_per_label,
            concentration=concentration,
            label_field=label_field,
            out=out,
        )
    )


@app.command("doctor")
def check_up(
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Read the weights, however large, to compare them with peers'."
        ),
    ] = False,
    wait: Annotated[
        float | None,
        typer.Option("--wait", min=0.1, metavar="SECONDS", help="How long to look for peers."),
    ] = None,
) -> None:
    """Check before a run whether this machine's node would start, fit and meet its peers.

    Peers are greeted as by a node that is still starting; no run is disturbed. Exit code 11 when a
    check fails.
    """
    from deca_node import doctor  # noqa: PLC0415 - imports torch

    console = status.make_console()
    try:
        chosen = load(config, settings or ())
    except ConfigError as error:
        checks = [doctor.failed("settings", error)]
    else:
        with console.status("") as shown:  # draws on a terminal only
            checks = asyncio.run(
                doctor.examine(
                    chosen,
                    full=full,
                    patience=wait,
                    tell=lambda what: shown.update(f"looking at {what}"),
                )
            )
    if as_json:
        typer.echo(json.dumps(doctor.as_json(checks)))
    else:
        console.print(doctor.render(checks))
    bad = [one.check for one in checks if one.verdict == doctor.Verdict.FAIL]
    if bad:
        raise CheckError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}")


@app.command()
def simulate(
    experiment: Annotated[Path, typer.Argument(help="TOML file; examples/experiments has some.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the results; default: out/NAME.")
    ] = None,
    keep_models: Annotated[
        bool,
        typer.Option("--keep-models", help="Keep the first node's model of each cell that is run."),
    ] = False,
) -> None:
    """Run an experiment: many nodes in this process, on a virtual clock, for a grid of settings.

    The same command resumes one that was interrupted; a cell of the grid that is done is not done
    again. `deca-node report` makes tables and pictures of what is there.
    """
    from deca_node import laboratory  # noqa: PLC0415 - imports torch

    typer.echo(f"results in {laboratory.run(experiment, out, keep_models=keep_models)}")


@app.command("report")
def write_report(
    folder: Annotated[Path, typer.Argument(help="Results of `deca-node simulate`.")],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder for the report; default: that of the results."),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            "--against",
            metavar="SETTING=VALUE",
            help="The row that others are compared with, seed by seed; may be repeated."
            " Default: the one nearest to the defaults.",
        ),
    ] = None,
) -> None:
    """Make tables (Markdown, CSV) and pictures (PNG, SVG) of an experiment's results."""
    from deca_node import report  # noqa: PLC0415 - imports torch

    for path in report.write(folder, to, against or ()):
        typer.echo(str(path))


app.command()(cli_dashboard.dashboard)
