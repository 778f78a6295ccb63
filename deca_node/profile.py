"""What a step of each method costs: time by part, bytes, memory, side by side in one run.

The model is an architecture with random weights, so that no weights are needed. Each method steps
with its daemon's code on batches of random tokens; neighbours' blocks come from memory, as messages
that have been checked, so that the network has no part in it.
"""

import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from deca_node import config, memory, sizes
from deca_node.batches import IGNORED, Batch
from deca_node.blocks import Visit
from deca_node.config import Settings
from deca_node.disk import translated, write_atomically
from deca_node.errors import ConfigError
from deca_node.fingerprint import schedule_for
from deca_node.methods import choose
from deca_node.models import LanguageModel, Prefix
from deca_node.wire import CHUNK_ELEMENTS, Snapshot

METHODS: tuple[str, ...] = get_args(config.Method)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        model: config.json of the architecture.
        device: where; on ``meta`` memory alone is counted, of models of any size.
        dtype: of the frozen weights.
        methods: by name.
        batch, tokens: examples a step, and tokens of each.
        learned: tokens of each example that the loss is of; its last ones.
        neighbours: how many blocks are mixed in.
        steps: timed steps of each block, after one that is not.
        layers: decoder layers; all when None.
        checkpointing: activations are computed again in the backward pass.
        overrides: settings; each goes to the methods that have it.
    """

    model: Path
    device: torch.device
    dtype: str
    methods: Sequence[str] = METHODS
    batch: int = 1
    tokens: int = 512
    learned: int = 512
    neighbours: int = 2
    steps: int = 3
    layers: int | None = None
    checkpointing: bool = False
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """Of a step of a method: the mean of its lowest and its topmost block, memory the larger.

    Times are medians; backward grows evenly with the number of layers that it passes, so that the
    mean of the two is that of all blocks.

    Attributes:
        method: its name.
        forward: seconds from the batch to the loss.
        backward: seconds from there to the gradient and its norm.
        update: seconds of the local update, of publishing, mixing the neighbours' and what follows.
        spread: of the whole step's seconds, standard deviation over the timed steps.
        trained: parameters that are trained at once, at most.
        sent: bytes for one neighbour.
        weights: bytes of the model before anything is trained.
        gradient_peak: bytes on the device at most while the gradient is computed, weights included.
        update_peak: the same for the rest of the step, when no activations are there; on a CPU
            with the snapshot.
        host: bytes of the published snapshot, which is in the host's memory whatever the device.
    """

    method: str
    forward: float
    backward: float
    update: float
    spread: float
    trained: float
    sent: float
    weights: float
    gradient_peak: float
    update_peak: float
    host: float

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.forward + self.backward + self.update


def architecture(text: str) -> Path:
    """The configuration file of a name that this package knows, or at a path.

    Raises:
        ConfigError: neither.
    """
    known = resources.files("deca_node") / "architectures"
    names = sorted(each.name.removesuffix(".json") for each in known.iterdir())
    if text in names:
        return Path(str(known / f"{text}.json"))
    path = Path(text)
    if not path.exists():
        raise ConfigError(
            f"--model-config {text}: no such file; give a config.json, a folder that has one, or"
            f" one of {', '.join(names)}"
        )
    return path


def measure(plan: Plan, tell: Callable[[str], None] = lambda _: None) -> list[Cost]:
    """Measure each method, one after the other, each on a model of its own.

    Raises:
        ConfigError: a setting is unknown, or does not fit method or model.
        ModelError: the architecture cannot be made, or does not fit into memory.
        DeviceError: a step of a method does not.
    """
    settings = {method: _settings(plan, method) for method in plan.methods}
    costs = []
    for method in plan.methods:
        tell(method)
        with memory.suffices(plan.device, "lower --batch or --tokens, or give --checkpointing"):
            costs.append(_cost(plan, settings[method]))
    return costs


def measure_depths(
    plan: Plan, tell: Callable[[str], None] = lambda _: None
) -> dict[str, list[Cost]]:
    """What is measured, by title; with ``plan.layers`` also of half of them, and all extrapolated.

    Raises:
        ConfigError, ModelError: as :func:`measure`.
    """
    deepest = depth(plan.model)
    about = f"{plan.model.stem}, {plan.dtype}, {plan.device}, {plan.batch} × {plan.tokens} tokens"
    if plan.layers is None:
        return {f"{about}, {deepest} layers": measure(plan, tell)}
    at = plan.layers // 2, plan.layers
    less, more = (measure(replace(plan, layers=number), tell) for number in at)
    return {
        f"{about}, {at[0]} of {deepest} layers": less,
        f"{about}, {at[1]} of {deepest} layers": more,
        f"{about}, {deepest} layers: NOT MEASURED, extrapolated from the two": full_depth(
            less, more, at, deepest
        ),
    }


def full_depth(
    less: Sequence[Cost], more: Sequence[Cost], at: tuple[int, int], depth: int
) -> list[Cost]:
    """The costs of all layers from those of two numbers of them: all grow evenly with the depth.

    Args:
        less: costs with ``at[0]`` layers.
        more: costs of the same methods with ``at[1]`` layers.
        at: the two numbers.
        depth: the number of layers that is asked for.
    """
    share = (depth - at[0]) / (at[1] - at[0])

    def along(low: Cost, high: Cost, name: str) -> float:
        one, other = getattr(low, name), getattr(high, name)
        return float(one + share * (other - one))

    names = [field.name for field in fields(Cost) if field.name not in ("method", "spread")]
    found = []
    for low, high in zip(less, more, strict=True):
        values: dict[str, Any] = {name: along(low, high, name) for name in names}
        found.append(replace(high, spread=math.nan, **values))
    return found


def depth(model: Path) -> int:
    """Decoder layers of an architecture."""
    return LanguageModel.untrained(model, torch.device("meta"), "bf16").n_layers


def _settings(plan: Plan, method: str) -> Settings:
    if method not in METHODS:
        raise ConfigError(f"--method {method}: no such method; there are {', '.join(METHODS)}")
    keys = [override.partition("=")[0].strip() for override in plan.overrides]
    for key in keys:
        if not any(config.has(each, key) for each in plan.methods):
            raise ConfigError(f"--set {key}: none of {', '.join(plan.methods)} has this setting")
    both = zip(keys, plan.overrides, strict=True)
    theirs = [override for key, override in both if config.has(method, key)]
    ours = {"run.method": method, "model.path": str(plan.model), "data.train": "none"}
    lines = (f"{key}={json.dumps(value)}" for key, value in ours.items())
    return config.load(None, [*lines, *theirs])


def _cost(plan: Plan, settings: Settings) -> Cost:
    model = _Timed.untrained(
        plan.model, plan.device, plan.dtype, layers=plan.layers, checkpointing=plan.checkpointing
    )
    takes = sizes.capacity(model.module)
    if takes.bound and plan.tokens > takes.positions:
        raise ConfigError(
            f"--tokens {plan.tokens}: {plan.model.stem} can take {takes.positions} tokens in a row;"
            " lower it"
        )
    batch = _batch(plan, takes.ids)
    weights = sum(_storages(model.module.parameters()).values())
    choose.prepare(settings, model)
    blocks = schedule_for(settings, model.n_layers).blocks
    times, memories = [], []
    full = [index for index, block in enumerate(blocks) if len(block) == max(map(len, blocks))]
    for index in dict.fromkeys((full[0], full[-1])):  # not one with the few layers that are left
        stage = _Stage(plan, settings, model, Visit(index, 0, index, index, blocks[index]), batch)
        memories.append(stage.memory())
        times.append((math.nan,) * 4 if plan.device.type == "meta" else stage.seconds())
    forward, backward, update, spread = map(statistics.fmean, zip(*times, strict=True))
    trained, sent, gradient_peak, update_peak, host = map(max, zip(*memories, strict=True))
    return Cost(
        method=settings.run.method,
        forward=forward,
        backward=backward,
        update=update,
        spread=spread,
        trained=trained,
        sent=sent,
        weights=weights,
        gradient_peak=gradient_peak,
        update_peak=update_peak,
        host=host,
    )


def _batch(plan: Plan, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (plan.batch, plan.tokens), generator=generator)
    labels = ids.clone()
    labels[:, : plan.tokens - plan.learned] = IGNORED
    return Batch(ids, torch.ones_like(ids), labels)


class _Timed(LanguageModel):
    """A model that tells when its forward pass was over."""

    over = 0.0

    def loss(self, batch: Batch, prefix: Prefix | None = None) -> Tensor:
        """See LanguageModel."""
        loss = super().loss(batch, prefix)
        _wait(self.device)
        self.over = _now(self.device)
        return loss


class _Stage:
    """A method that steps on one block."""

    def __init__(
        self, plan: Plan, settings: Settings, model: _Timed, visit: Visit, batch: Batch
    ) -> None:
        self._plan, self._model, self._visit, self._batch = plan, model, visit, batch
        self._method = choose.build(settings, model, "profile")
        # A step that ends with an exchange, of those that have some without.
        self._step = next(step for step in range(10**6) if self._method.exchanges(step))

    def seconds(self) -> tuple[float, float, float, float]:
        """Forward, backward, update, and the whole step's spread: medians after a first step."""
        method, device = self._method, self._plan.device
        method.open(self._visit, None)
        rows = []
        for _ in range(1 + self._plan.steps):
            _wait(device)
            began = _now(device)
            method.gradient(self._batch)
            _wait(device)
            computed = _now(device)
            self._mix(self._publish())
            _wait(device)
            ended = _now(device)
            over = self._model.over
            rows.append((over - began, computed - over, ended - computed, ended - began))
        method.close()
        *parts, whole = zip(*rows[1:], strict=True)
        spread = statistics.stdev(whole) if len(whole) > 1 else 0.0
        forward, backward, update = map(statistics.median, parts)
        return forward, backward, update, spread

    def _publish(self) -> Snapshot:
        self._method.advance(self._step)
        return self._method.outgoing(0)

    def _mix(self, snapshot: Snapshot) -> None:
        """What the neighbours sent is mixed in: this node's own values, which cost as much."""
        for number in range(self._plan.neighbours):
            mix = self._method.intake(f"peer-{number}")
            for index in range(snapshot.count - 1):
                values = snapshot.values(index)
                mix(index * CHUNK_ELEMENTS, values, 1 / (1 + self._plan.neighbours))
        self._method.settle(self._step)

    def memory(self) -> tuple[float, float, float, float, float]:
        """Trained parameters, bytes to a neighbour, peaks of gradient and update, the snapshot."""
        method, device = self._method, self._plan.device
        with _Meter(device, self._model.module) as meter:
            method.open(self._visit, None)
            numel = method.layout.numel
            if device.type == "meta":
                # No values, hence no norms and no messages: their sizes follow from the layout.
                self._model.loss(self._batch).backward()  # type: ignore[no-untyped-call]
                gradient = meter.peak()
                method.advance(self._step)
                update, host = meter.peak(), 4 * numel
            else:
                method.gradient(self._batch)
                gradient = meter.peak()
                snapshot = self._publish()
                host = sum(map(len, snapshot.messages))
                update = meter.peak()
                self._mix(snapshot)
                update = max(update, meter.peak() + (host if device.type == "cpu" else 0))
        method.close()
        return numel, host, gradient, update, host


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of live tensors on a device, at most since it was last asked.

    CUDA counts them itself. Elsewhere every result of an operation is looked at: its memory counts
    from its first tensor to the end of its last one.

    Args:
        device: where.
        module: what is there before.
    """

    def __init__(self, device: torch.device, module: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device, self._module = device, module
        self._sizes: dict[int, int] = {}
        self._live = self._peak = 0

    def __enter__(self) -> "_Meter":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return self
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            self._count(tensor)
        self._peak = self._live
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *about: Any) -> None:
        if self._device.type != "cuda":
            super().__exit__(*about)  # type: ignore[no-untyped-call]

    def peak(self) -> int:
        """The most bytes since this was last asked."""
        if self._device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            return found
        found, self._peak = self._peak, self._live
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See TorchDispatchMode."""
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self._count(each)
        return result

    def _count(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device.type:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # one Python object for as long as the memory lives
        if key in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self._live += size
        self._peak = max(self._peak, self._live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage, so that tied tensors count once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {id(storage): storage.nbytes() for storage in found}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _now(device: torch.device) -> float:
    """Seconds: of one CPU thread those that it computed, whatever else the machine does."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


# What is shown


def markdown(parts: Mapping[str, Sequence[Cost]]) -> str:
    """Tables of them, by title, in Markdown; a ratio is the first method's step over this one's."""
    return "\n".join(f"{title}:\n\n{_markdown(costs)}" for title, costs in parts.items())


def _markdown(costs: Sequence[Cost]) -> str:
    headings, rows = _cells(costs)
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "".join(
        f"| {' | '.join(map(str.rjust, line, widths))} |\n" for line in (headings, rule, *rows)
    )


def as_json(plan: Plan, parts: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    """What was asked for and what came out, for scripts; what was not measured is null."""
    about = {**asdict(plan), "model": plan.model.stem, "device": str(plan.device)}
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"plan": about, **versions, "costs": {t: _rows(c) for t, c in parts.items()}}


def _rows(costs: Sequence[Cost]) -> list[dict[str, Any]]:
    rows = ({**asdict(cost), "step": cost.step} for cost in costs)
    return [
        {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()}
        for row in rows
    ]


def write(folder: Path, tree: Mapping[str, Any], text: str) -> None:
    """Write profile.json and profile.md.

    Raises:
        OutputError, DiskFullError: they cannot be written.
    """
    with translated(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "profile.json", (json.dumps(tree, indent=1) + "\n").encode())
        write_atomically(folder / "profile.md", text.encode())


def _cells(costs: Sequence[Cost]) -> tuple[list[str], list[list[str]]]:
    timed = not all(math.isnan(cost.step) for cost in costs)
    first = costs[0]
    headings = ["method", "trained M"]
    if timed:
        headings += [
            "forward ms",
            "backward ms",
            "update ms",
            "step ms",
            f"{first.method}'s / this",
        ]
    headings += ["sent MB", "weights GB", "peak GB", "without activations GB", "snapshot GB"]
    rows = []
    for cost in costs:
        row = [cost.method, f"{cost.trained / 1e6:,.2f}"]
        if timed:
            parts = (cost.forward, cost.backward, cost.update)
            row += [f"{1e3 * part:,.1f}" for part in parts]
            varies = "" if math.isnan(cost.spread) else f" ± {1e3 * cost.spread:,.1f}"
            row += [f"{1e3 * cost.step:,.1f}{varies}", f"{first.step / cost.step:.2f}"]
        row.append(f"{cost.sent / 1e6:,.2f}")
        peak = max(cost.gradient_peak, cost.update_peak)
        sizes = (cost.weights, peak, cost.update_peak, cost.host)
        row += [f"{size / 1e9:,.3f}" for size in sizes]
        rows.append(row)
    return headings, rows
