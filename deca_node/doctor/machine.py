"""Whether settings, model, data, memory, disk and certificates are fit for the run."""

import contextlib
import datetime as dt
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch

from deca_node import estimate, memory, status
from deca_node.batches import Example
from deca_node.checkpoint.mark import check_mark
from deca_node.config import is_loopback
from deca_node.corpus import read_corpus
from deca_node.data import label_counts
from deca_node.doctor.checks import Check, Facts, Verdict, failed
from deca_node.errors import OutputError
from deca_node.fingerprint import schedule_for
from deca_node.guard import Guard
from deca_node.keyring import Keyring
from deca_node.methods.choose import added
from deca_node.models import LanguageModel, outline, pick_device
from deca_node.rows import read_rows
from deca_node.tensorboard import tensorboardx

# Up to this size the weights are read for their digest without being asked for: some seconds.
QUICK_BYTES = 2 << 30
# Above this share of what is free a run is likely to meet another program's needs.
TIGHT = 0.8


def checks(*, full: bool) -> dict[str, Callable[[Facts], Iterable[Check]]]:
    """What there is to look at, by name, in the order in which one builds on the other.

    Args:
        full: read the weights, however large.
    """
    return {
        "device": _device,
        "model": _model,
        "data": _data,
        "weights": _full_weights if full else _weights,
        "memory": _memory,
        "disk": _disk,
        "tensorboard": _tensorboard,
        "trust": _trust,
    }


# Settings, model, data


def settings(facts: Facts) -> Iterable[Check]:
    """Whether the node could find others."""
    run, network = facts.settings.run, facts.settings.network
    facts.settings.check_edges()
    found = (
        f"node {facts.settings.node.name} of run {run.name}, {run.start_when} members wanted, "
        f"preset {network.preset}"
    )
    named = network.static_peers or network.dns_peers
    if run.start_when > 1 and not network.zeroconf and not named:
        yield Check(
            "settings",
            Verdict.WARN,
            f"{found}; it has no way to find others",
            "set network.zeroconf = true, network.static_peers or network.dns_peers, unless others "
            "name this node",
        )
    else:
        yield Check("settings", Verdict.OK, found)


def _device(facts: Facts) -> Iterable[Check]:
    facts.device = device = pick_device(facts.settings.node.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    threads = facts.settings.node.threads or torch.get_num_threads()
    about = name or f"{threads} threads of {psutil.cpu_count()} processors"
    yield Check("device", Verdict.OK, f"{device}, {about}, weights in {facts.dtype}")


def _model(facts: Facts) -> Iterable[Check]:
    chosen = facts.settings
    facts.model = found = outline(chosen.model)
    layers, granularity = len(found.shape.layers), chosen.schedule.layers_per_block
    schedule_for(chosen, layers)
    facts.added = added(chosen, found)
    how = f"in blocks of {granularity}" if chosen.run.method == "deca" else "at once"
    if facts.added is not None:
        how = f"with adapters of {facts.added / 1e6:,.2f} million"
    yield Check(
        "model",
        Verdict.OK,
        f"{found.architecture}, {found.shape.parameters / 1e6:,.0f} million parameters, "
        f"{layers} layers {how}",
    )


def _data(facts: Facts) -> Iterable[Check]:
    data = facts.settings.data
    if facts.model is None:
        rows = len(read_rows(data.train))
        found = f"{rows:,} rows; whether they fit the task cannot be told without the model"
        yield Check("data", Verdict.WARN, found)
        return
    corpus = read_corpus(data, facts.model.tokenizer)
    facts.longest, facts.trained = _sizes(corpus.train)
    labels = ", ".join(f"{label} {count}" for label, count in label_counts(corpus.train).items())
    found = (
        f"{corpus.rows:,} rows, {len(corpus.train):,} examples of at most {facts.longest} tokens"
    )
    if data.test is not None:
        found += f", {len(corpus.test):,} to test"
    yield Check("data", Verdict.OK, found + (f"; {labels}" if labels else ""))
    for warning in corpus.warnings(facts.model, facts.settings.model.path):
        found, _, remedy = warning.partition("; ")
        yield Check("data", Verdict.WARN, found, remedy)


def _sizes(found: Sequence[Example]) -> tuple[int, int]:
    return max(len(one.input_ids) for one in found), max(sum(one.completion) for one in found)


def _weights(facts: Facts) -> Iterable[Check]:
    model = facts.model
    if model is None or model.to_convert or model.weight_bytes > QUICK_BYTES:
        return  # what was not compared is told beside the peers
    if _free_memory() > 2 * model.weight_bytes:
        yield from _full_weights(facts)


def _full_weights(facts: Facts) -> Iterable[Check]:
    if facts.model is None or facts.dtype is None:
        return
    chosen = facts.settings.model.model_copy(update={"dtype": facts.dtype})
    model = LanguageModel.load(chosen, torch.device("cpu"))
    facts.weights = model.weights_digest()
    facts.model = replace(
        facts.model,
        config_digest=model.config_digest(),
        tokenizer_digest=model.tokenizer.digest(),
        to_convert=False,
    )
    yield Check("weights", Verdict.OK, f"readable, digest {facts.weights[:12]}… in {facts.dtype}")


# Trust


def _trust(facts: Facts) -> Iterable[Check]:
    settings = facts.settings
    if not settings.needs_trust():
        if is_loopback(settings.node.host):
            yield Check("trust", Verdict.OK, "plain text, on this machine only")
        else:
            found = "plain text on the network: whoever reaches the port can join the run"
            yield Check("trust", Verdict.WARN, found, "make certificates (docs/securing.md)")
        return
    keyring = Keyring.of_run(settings.trust_folder(), settings.run.name)
    facts.guard = guard = Guard(keyring, settings.node.name, settings.trust.allow)
    ends = dt.datetime.fromtimestamp(guard.ends, dt.UTC).strftime("%Y-%m-%d")
    found = f"{settings.node.name} is certified until {ends}, in {keyring.folder}"
    if guard.revoked:
        found += f"; revoked: {', '.join(sorted(guard.revoked))}"
    if guard.is_renewal_due and not keyring.has_authority:
        remedy = "run a node where the authority's key is, or have this one invited anew"
        yield Check("trust", Verdict.WARN, found, remedy)
    else:
        yield Check("trust", Verdict.OK, found)
    for line in keyring.readable_by_others():
        yield Check("trust", Verdict.WARN, *line.split("; ", 1))


# Memory and disk


_LESS_TO_COMPUTE = (
    f'{memory.LESS_A_STEP}; on all nodes alike: schedule.layers_per_block, model.dtype = "bf16"'
)
_LESS_TO_WRITE = 'on all nodes alike: fewer lora.targets, or model.dtype = "bf16"'


def _memory(facts: Facts) -> Iterable[Check]:
    sizes = facts.work()
    if facts.running is not None or sizes is None or facts.device is None:
        return
    need = estimate.memory(*sizes)
    sizes_of = {name: count for name, count in asdict(need).items() if count and name != "copies"}
    parts = ", ".join(f"{name} {status.size(count)}" for name, count in sizes_of.items())
    host, remedy = need.hosting, _LESS_TO_COMPUTE
    if facts.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(facts.device)
        yield _fits(f"memory of {facts.device}", need.computing, free, parts)
        host += need.weights  # they pass through on their way to the device
        parts = "process, snapshots, references and the weights while they are loaded"
    else:
        host += max(need.computing, need.writing)
        if need.writing > need.computing:
            parts += f"; to write the model, weights and copies {status.size(need.copies)}"
            remedy = _LESS_TO_WRITE
    yield _fits("memory", host, _free_memory(), parts, remedy)


def _fits(name: str, need: int, free: int, parts: str, remedy: str = _LESS_TO_COMPUTE) -> Check:
    found = f"about {status.size(need)} needed of {status.size(free)} free ({parts})"
    if need <= TIGHT * free:
        return Check(name, Verdict.OK, found)
    return Check(name, Verdict.WARN if need <= free else Verdict.FAIL, found, remedy)


def _free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its control group's if less."""
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no limit is the word max
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that were read count as used, but make way.
        free = min(free, max(0, limit - used + int(counts.get("inactive_file", 0))))
    return free


def _disk(facts: Facts) -> Iterable[Check]:
    output = facts.settings.node.output
    yield from _belongs(output, facts)
    sizes, schedule = facts.work(), facts.schedule
    if sizes is None or schedule is None or facts.model is None:
        return
    need = estimate.disk(*sizes, schedule.total_steps)
    there = _size(output)
    found = f"state {status.size(need.state)}, model {status.size(need.model)}"
    wanted: dict[Path, tuple[int, str]] = {output: (max(0, need.total - there), found)}
    if facts.model.to_convert:
        size, cache = estimate.converted(facts.model.shape), facts.settings.model.cache
        home, other = _existing(output), _existing(cache)
        if home.stat().st_dev == other.stat().st_dev:
            wanted[output] = (wanted[output][0] + size, f"{found}, converted {status.size(size)}")
        else:
            wanted[cache] = (size, f"converted {status.size(size)}")
    for folder, (size, parts) in wanted.items():
        yield _room(folder, size, parts)


def _size(folder: Path) -> int:
    """Bytes of the files below a folder, in which a running node may be replacing some."""
    size = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            state = file.stat()
            size += state.st_size if stat.S_ISREG(state.st_mode) else 0
    return size


def _belongs(output: Path, facts: Facts) -> Iterable[Check]:
    """Whether the output folder is this run's, or free."""
    own = {**facts.marks(), "node": facts.settings.node.name}
    try:
        check_mark(output, own)
    except OutputError as error:
        yield failed("output", error)


def _tensorboard(facts: Facts) -> Iterable[Check]:
    """Whether its curves could be written, where they are wanted."""
    folder = facts.settings.tensorboard.folder
    if folder is None:
        return
    tensorboardx()
    if trouble := _unwritable(folder / facts.settings.node.name):
        remedy = "set tensorboard.folder to another folder"
        yield Check("tensorboard", Verdict.FAIL, trouble, remedy)
    else:
        yield Check("tensorboard", Verdict.OK, f"curves go to {folder}")


def _unwritable(folder: Path) -> str:
    """Why nothing could be written there, where that is seen without trying."""
    place = _existing(folder)
    if _obstacle(folder) is not None:
        return f"{_obstacle(folder)} is a file, not a folder"
    return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} is not writable"


def _room(folder: Path, need: int, parts: str) -> Check:
    if trouble := _unwritable(folder):
        return Check("disk", Verdict.FAIL, trouble, "set node.output elsewhere")
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    found = f"{folder}: at most {status.size(need)} to write, {status.size(free)} free ({parts})"
    if need <= TIGHT * free:
        return Check("disk", Verdict.OK, found)
    verdict = Verdict.WARN if need <= free else Verdict.FAIL
    return Check("disk", verdict, found, "free some, or set node.output (or model.cache) elsewhere")


def _existing(path: Path) -> Path:
    """The folder that is there already, of those that lead to ``path``."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _obstacle(path: Path) -> Path | None:
    """What is in the way of a folder at ``path``."""
    path = path.absolute()
    return next((place for place in (path, *path.parents) if place.is_file()), None)
