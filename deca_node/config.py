"""Every setting, typed, with its unit and what it trades.

TOML, ``DECA_…`` environment variables and ``--set`` are read here and nowhere else. Later wins:
defaults, file, environment, ``--set``. Relative paths in a file are relative to that file.
"""

import difflib
import ipaddress
import json
import os
import platform
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from deca_node.errors import ConfigError

ENV_PREFIX = "DECA_"
DEFAULT_PORT = 7430  # unassigned by IANA


def _shaped(pattern: str, words: str) -> AfterValidator:
    """Text of a pattern; whoever misses it is told in words."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(words)
        return text

    return AfterValidator(check)


# A name becomes part of a DNS label (63 bytes, RFC 1035), a folder and a log line.
Name = Annotated[
    str,
    _shaped(
        r"[a-z0-9][a-z0-9-]{0,47}",
        "use 1 to 48 characters of a-z, 0-9 and -, the first of them no -",
    ),
]
Device = Annotated[
    str, _shaped(r"auto|cpu|cuda(:[0-9]+)?|mps", "use auto, cpu, cuda, cuda:N (as cuda:0) or mps")
]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Method = Literal["deca", "dec-lora", "decaf", "dec-adapter", "dsgd", "dadam", "qg-adam"]


def checked_address(address: str) -> str:
    """The address of a node as it was given.

    Raises:
        ValueError: it is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} is not HOST:PORT with a port from 1 to 65535")
    return address


def default_node_name() -> str:
    """This machine's host name, cut down to what a node name may hold."""
    name = re.sub(r"[^a-z0-9-]+", "-", platform.node().split(".")[0].lower()).strip("-")
    return name[:48] or "node"


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        try:
            return value.expanduser() if isinstance(value, Path) else value
        except RuntimeError:
            raise ValueError("nobody knows whose home ~ is here; write the whole path") from None


class RunSettings(Section):
    """What all nodes of a run must agree on, besides model, schedule and optimizer."""

    name: Name = Field(
        "deca",
        description="The run, the same on all its nodes. Nodes look for others of the same run, "
        "and for nobody else.",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Decides random graphs, random block orders and the order of examples; the "
        "same on all nodes.",
    )
    method: Method = Field(
        "deca",
        description="What is trained and exchanged: a block of layers at a time (deca), small "
        "parts added to a frozen model (dec-lora, decaf, dec-adapter), or all layers at each "
        "step (dsgd, dadam, qg-adam). docs/methods.md helps to choose.",
    )
    start_when: int = Field(
        2,
        ge=1,
        le=256,  # limits.MAX_MEMBERS
        description="Members to wait for before training, this node included; 1 begins alone.",
    )


class NodeSettings(Section):
    """This machine's part."""

    name: Name = Field(
        default_factory=default_node_name,
        description="This node, unique in the run. Unset: the machine's host name.",
    )
    host: str = Field(
        "0.0.0.0",  # noqa: S104 - neighbours are on other machines
        description="Address to listen on. 0.0.0.0 is every IPv4 interface; 127.0.0.1 keeps the "
        "node to this machine.",
    )
    port: int = Field(
        DEFAULT_PORT,
        ge=0,
        le=65535,
        description="TCP port to listen on; 0 takes a free one, which zeroconf tells the others.",
    )
    advertise: str | None = Field(
        None,
        description="Host that others call, where it is not an address of this machine: behind "
        "NAT, in a container.",
        examples=["192.0.2.7"],
    )
    advertise_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="Port that others call, where it is not the one to listen on: behind NAT or "
        "port forwarding.",
        examples=[7430],
    )
    health_port: int | None = Field(
        None,
        ge=1,
        le=65535,
        description="TCP port where the gRPC health service answers besides, in plain text and "
        "to anybody: for orchestrators, which have no certificate. Unset: none.",
        examples=[7431],
    )
    device: Device = Field(
        "auto",
        description="auto, cpu, cuda, cuda:N or mps. auto takes a GPU where there is one.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="CPU threads of the computation; 0 leaves it to PyTorch (all cores). Nodes "
        "that share a machine should share its cores.",
    )
    save_every: float = Field(
        120.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds between two saves of the block being trained, so that a crash costs "
        "no more; less often where the disk is slow. 0: only at the end of each visit.",
    )
    stay: bool = Field(
        False,
        description="Go on answering status and health when the run is finished, until a signal "
        "ends the node: for Kubernetes and others that start again whatever ends.",
    )
    output: Path = Field(
        Path("out"),
        description="Folder of the trained model, the run's record and the state to resume "
        "from. One run, one node, one folder.",
    )

    @field_validator("advertise")
    @classmethod
    def _host(cls, value: str | None) -> str | None:
        if value is None or re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            return value
        try:
            ipaddress.ip_address(value)
        except ValueError:
            raise ValueError(
                "give a host name or an IP address without a port or brackets; the port is"
                " node.port, or node.advertise_port"
            ) from None
        return value


class ModelSettings(Section):
    """The base model."""

    path: Path = Field(
        description="Base model: a Hugging Face folder of a decoder-only model, or a .gguf "
        "file. The same on all nodes."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto",
        description="Precision of the frozen weights: bf16 and fp16 take 2 bytes a parameter, "
        "fp32 4; the active block always has an fp32 master. auto is bf16 on CUDA and fp32 "
        "elsewhere (most CPUs are slow in 16 bits); nodes of one run need the same.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, about a third "
        "more time.",
    )
    cache: Path = Field(
        Path("~/.cache/deca-node"),
        description="Folder where converted .gguf files are kept, shared by all nodes of a "
        "machine.",
    )


class DataSettings(Section):
    """The private data and how rows become examples."""

    train: Path = Field(
        description="Private training data: .jsonl, .csv, .parquet, or a folder written by "
        "Dataset.save_to_disk. It never leaves this machine."
    )
    test: Path | None = Field(
        None,
        description="Held-out data of the same form, measured before and after the run. Unset: "
        "no measurement.",
        examples=["test.jsonl"],
    )
    task: Literal["classification", "instruction", "text"] = Field(
        "classification",
        description="classification learns the label's word after the template; instruction the "
        "responses of prompts or chats; text all of it.",
    )
    template: str = Field(
        "{text}\nLabel:",
        description="classification: the prompt, with a row's fields in braces. A row that is "
        "too long loses the end of its longest field.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="classification: label = word that the model says for it; best one token "
        "each. Empty: the labels found in train, as they are. Give all of them "
        "where nodes do not hold all.",
    )
    label_field: str = Field("label", description="classification: the field of the label.")
    prompt_field: str = Field("prompt", description="instruction: the field of the prompt.")
    response_field: str = Field("response", description="instruction: the field of the response.")
    messages_field: str = Field(
        "messages",
        description="instruction: the field of a chat, a list of {role, content}; it wins over "
        "prompt and response.",
    )
    text_field: str = Field("text", description="text: the field of the text.")
    share_label_counts: bool = Field(
        False,
        description="classification: tell in the status how many examples of each label there are, "
        "for a dashboard to show the skew. Whoever can ask for the status then knows.",
    )
    max_tokens: int = Field(
        512,
        ge=8,
        le=1_000_000,
        description="Longest example in tokens. Time and memory of a step grow with it.",
    )
    batch_size: int = Field(
        4,
        ge=1,
        le=4096,
        description="Examples per step. Larger: steadier gradients, more time and memory a step.",
    )


class ScheduleSettings(Section):
    """How long and in which order."""

    rounds: int = Field(4, ge=1, le=100_000, description="Passes over all blocks.")
    steps: int = Field(
        48,
        ge=1,
        le=1_000_000,
        description="Steps on a block before the next one's turn. Each step exchanges the block "
        "with every neighbour.",
    )
    layers_per_block: int = Field(
        1,
        ge=1,
        le=10_000,
        description="Layers trained at a time. Memory for the optimizer and bytes per step grow "
        "with it; visits become fewer.",
    )
    staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="1: a step's blocks travel during the next step's gradient and are mixed in "
        "after it, by half. Hides the exchange behind the computation of every block; neighbours "
        "agree more slowly, and it costs the memory of one more block.",
    )
    order: Literal["ascending", "descending", "random"] = Field(
        "ascending",
        description="Order of the blocks within a round: from the input up, from the output "
        "down, or drawn anew each round.",
    )


class OptimizerSettings(Section):
    """Adam and its correction from the mix (BMA)."""

    learning_rate: Positive = Field(1e-4, description="Step size of Adam.")
    adam_beta1: Decay = Field(0.9, description="Decay of Adam's mean of gradients.")
    adam_beta2: Decay = Field(0.999, description="Decay of Adam's mean of squared gradients.")
    adam_eps: Positive = Field(1e-8, description="Added to Adam's denominator.")
    bma: Literal["on", "off", "trivial"] = Field(
        "on",
        description="What a step's whole move, mix included, does to Adam's moments: blends in "
        "(on), nothing (off), replaces them (trivial).",
    )
    bma_beta1: Share = Field(
        0.3, description="Share of Adam's first moment that survives the blend; 1 keeps all of it."
    )
    bma_beta2: Share = Field(
        0.333,
        description="Share of Adam's second moment that survives the blend; 1 keeps all of it.",
    )
    discrepancy: Literal["l2", "none", "lr"] = Field(
        "l2",
        description="Scale of the move that is blended in: unit length (l2), as it is (none), "
        "or divided by the learning rate (lr).",
    )


class LoraSettings(Section):
    """dec-lora and decaf: a product B A of two thin matrices beside each frozen matrix."""

    rank: int = Field(
        8,
        ge=1,
        le=4096,
        description="Rows of A and columns of B. Memory for the optimizer and bytes per exchange "
        "grow with it.",
    )
    alpha: Positive = Field(16.0, description="The product counts alpha / rank times.")
    targets: tuple[str, ...] = Field(
        (),
        description="Matrices of each layer by the end of their names. Empty: all linear ones.",
        examples=[["q_proj", "v_proj"]],
    )
    local_steps: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="Steps from one exchange to the next; schedule.steps must be a multiple. More "
        "sends less and lets the nodes drift apart in between.",
    )
    split: Literal["b", "a", "balanced"] = Field(
        "b",
        description="decaf: where a mixed product's singular values go when it is cut into factors "
        "again. In B or in A the other factor stays orthonormal; balanced, a direction that has "
        "vanished is never learned again.",
    )


class AdapterSettings(Section):
    """dec-adapter: two bottlenecks in each frozen layer."""

    width: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Width of a bottleneck. Memory for the optimizer and bytes per step grow "
        "with it.",
    )


class QuasiGlobalSettings(Section):
    """qg-adam: Adam whose moments follow the neighbourhood."""

    first_moment: Literal["quasi-global", "local"] = Field(
        "quasi-global",
        description="From what the whole move was (quasi-global, as the second moment), or from "
        "this node's gradients alone (local, what the authors' code does).",
    )


class TopologySettings(Section):
    """Who exchanges with whom."""

    kind: Literal["full", "ring", "erdos_renyi", "bipartite", "explicit"] = Field(
        "ring",
        description="Who exchanges with whom; each node derives the graph from the members' "
        "names. A full graph mixes fastest and sends the most.",
    )
    p: float = Field(0.5, gt=0, le=1, description="erdos_renyi: probability of each edge.")
    edges: tuple[tuple[str, str], ...] = Field(
        (),
        description="explicit: pairs of node names. None at all: every node trains alone.",
        examples=[[["alice", "bob"]]],
    )

    @model_validator(mode="after")
    def _edges_only_when_explicit(self) -> "TopologySettings":
        if self.edges and self.kind != "explicit":
            raise ValueError('edges are used with kind = "explicit" only')
        return self


class AggregationSettings(Section):
    """How a block is made of a node's own and its neighbours'."""

    rule: Literal["mean", "clipped", "trimmed"] = Field(
        "mean",
        description="mean weighs all neighbours by the graph, and one hostile neighbour is enough "
        "to spoil it. clipped takes no more of each than a radius allows; trimmed leaves out each "
        "parameter's largest and smallest values. Both keep every neighbour's block in memory "
        "until the mix, and learn less from each other. docs/robust.md helps to choose.",
    )
    hostile: int = Field(
        1,
        ge=1,
        le=255,  # limits.MAX_MEMBERS - 1
        description="clipped, trimmed: how many of a node's neighbours may be hostile. With no "
        "more neighbours than that (trimmed: twice that) a node mixes nothing.",
    )
    tau: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="clipped: largest distance from a neighbour's block that is taken in full. 0: "
        "chosen at each step from the neighbours' distances, the hostile farthest left out.",
    )


class TrustSettings(Section):
    """Who may take part: keys and certificates (docs/securing.md)."""

    folder: Path | None = Field(
        None,
        description="Folder of the run's certificates and of this machine's keys, outside of "
        "node.output. Unset: one for each run, ~/.config/deca-node/RUN.",
        examples=["trust"],
    )
    insecure: bool = Field(
        False,
        description="true: plain text on the network. Whoever reaches the port can read the "
        "blocks, join the run and contribute to it; on all nodes of a run or none.",
    )
    allow: tuple[Name, ...] = Field(
        (),
        description="The only nodes to deal with, by name. Empty: all that the run's authority "
        "has certified.",
        examples=[["alice", "bob"]],
    )


def default_trust_folder(run: str) -> Path:
    """Where a run's certificates are, unless trust.folder says otherwise."""
    home = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        base = home if home.is_absolute() else Path("~/.config").expanduser()
    except RuntimeError:
        raise ConfigError("nobody knows whose home ~ is here; set trust.folder") from None
    return base / "deca-node" / run


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ConsensusSettings(Section):
    """The agreement after the last round, which brings all nodes to one model."""

    tolerance: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Largest difference between two nodes' blocks at the end, relative to the "
        "largest between two neighbours before; 1e-3 is a good value. 0: no agreement, every node "
        "keeps its own model. Smaller takes more rounds, and each sends the block to every "
        "neighbour.",
    )
    max_rounds: int = Field(
        500,
        ge=8,
        le=100_000,
        description="Most rounds on one block. A few dozen are enough on a graph that holds; "
        "where nodes are lost meanwhile the rest may take hundreds.",
    )


class NetworkSettings(Section):
    """How peers are found and how long they are waited for."""

    preset: Literal["local", "lan", "wan"] = Field(
        "lan", description="Deadlines for nodes on one machine, in one room, or at several sites."
    )
    zeroconf: bool = Field(True, description="Find peers of the local network by multicast DNS.")
    interfaces: tuple[str, ...] = Field(
        (),
        description="Addresses of the interfaces that zeroconf uses. Empty: all.",
        examples=[["192.0.2.7"]],
    )
    static_peers: tuple[str, ...] = Field(
        (),
        description="HOST:PORT of peers to call, beside or in place of zeroconf. One that is up "
        "is enough: it names the others.",
        examples=[["host:7430"]],
    )
    dns_peers: tuple[str, ...] = Field(
        (),
        max_length=8,  # each takes a thread while its question is under way
        description="NAME:PORT of names that stand for all nodes, such as a headless service of "
        "Kubernetes. They are resolved again and again, and all their addresses called.",
        examples=[["deca.default.svc.cluster.local:7430"]],
    )
    overlap: bool = Field(
        True,
        description="While blocks travel, run the next batch through the frozen layers below the "
        "active block; and send a block's first messages while the rest of it is being updated. "
        "The numbers stay the same to the last bit; it costs the memory of one hidden state.",
    )
    step_deadline: Positive | None = Field(
        None,
        description="Seconds that a step waits for a neighbour's block. Unset: the preset's.",
        examples=[30.0],
    )
    visit_deadline: Positive | None = Field(
        None,
        description="Seconds that a block visit waits for neighbours to agree on edges. Unset: "
        "the preset's.",
        examples=[60.0],
    )
    wait_budget: Positive | None = Field(
        None,
        description="Seconds that the steps of one visit wait, in all, for a neighbour that keeps "
        "coming later than the others; then the visit goes on without it. Unset: the preset's.",
        examples=[300.0],
    )
    heartbeat: Positive | None = Field(
        None, description="Seconds between greetings. Unset: the preset's.", examples=[2.0]
    )
    gone_after: Positive | None = Field(
        None,
        description="Seconds of silence after which a peer leaves the member set. Unset: the "
        "preset's.",
        examples=[30.0],
    )
    send_rate: Positive | None = Field(
        None,
        description="MB per second that this node sends to all peers together, catching up "
        "included. Unset: what the link takes. A step takes longer where it is less.",
        examples=[100.0],
    )
    send_rate_per_peer: Positive | None = Field(
        None,
        description="MB per second that this node sends to each peer. Unset: what the link takes.",
        examples=[50.0],
    )
    catch_up_rate: Positive = Field(
        64.0,
        description="MB per second that this node sends, in all, to nodes that catch up, at most. "
        "Lower spares the link, higher brings them back sooner.",
    )
    catch_up_share: Positive = Field(
        0.04,
        description="What handing out blocks to nodes that catch up may take of the CPU cores that "
        "the training uses (node.threads; one with a GPU) while it does; by itself it slows to "
        "that. Lower spares the training, higher brings them back sooner.",
    )
    wire_format: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="How blocks travel. bf16 and int8 send the difference from the step before, "
        "rounded, in a half or a quarter of fp32's bytes; what rounding leaves out is sent later. "
        "They cost computing and, on the host, memory: two blocks in fp32, and one more for each "
        "neighbour. An edge takes the smaller of its two ends' formats.",
    )

    @field_validator("static_peers", "dns_peers")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(checked_address, value))


class MetricsSettings(Section):
    """Measurements for Prometheus (docs/watching.md)."""

    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="TCP port of /metrics; 0 takes a free one, which the log names. Unset: no "
        "metrics.",
        examples=[9464],
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to serve them on. Whoever reaches it can read them, so other "
        "addresses than the loopback are for networks that you trust.",
    )


class TensorboardSettings(Section):
    """Curves for TensorBoard; needs the extra [tensorboard]."""

    folder: Path | None = Field(
        None,
        description="Folder of the event files: this node's go to a folder of its name in it, so "
        "that nodes can share one. Unset: none.",
        examples=["out/tensorboard"],
    )


@dataclass(frozen=True)
class Timing:
    """Deadlines and intervals in seconds.

    ``step_deadline`` bounds what a missing neighbour can cost one step; ``visit_deadline`` what it
    can cost the start of a visit (shorter, so that those who wait are not given up meanwhile);
    ``wait_budget`` bounds what a neighbour that is late again and again can cost a visit;
    ``gone_after`` is the silence after which a peer leaves the member set. Longer is kinder to slow
    machines, shorter loses less when one dies without a word (a closed connection is noticed at
    once in any case).
    """

    step_deadline: float
    visit_deadline: float
    heartbeat: float
    gone_after: float
    wait_budget: float
    rpc: float
    browse: float
    redial: float
    redial_max: float

    @classmethod
    def local(cls) -> "Timing":
        """Several nodes share one machine: steps are slow, the network is not."""
        return cls(60.0, 40.0, 1.0, 60.0, 600.0, rpc=10.0, browse=3.0, redial=0.5, redial_max=2.0)

    @classmethod
    def lan(cls) -> "Timing":
        """Machines of one room."""
        return cls(30.0, 20.0, 1.5, 30.0, 300.0, rpc=5.0, browse=5.0, redial=1.0, redial_max=4.0)

    @classmethod
    def wan(cls) -> "Timing":
        """Machines of several sites."""
        return cls(
            180.0, 120.0, 10.0, 180.0, 900.0, rpc=20.0, browse=15.0, redial=3.0, redial_max=15.0
        )


class Settings(BaseSettings):
    """The whole configuration of one node."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    run: RunSettings = RunSettings()
    node: NodeSettings = Field(default_factory=NodeSettings)
    model: ModelSettings
    data: DataSettings
    schedule: ScheduleSettings = ScheduleSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    lora: LoraSettings = LoraSettings()
    adapter: AdapterSettings = AdapterSettings()
    quasi_global: QuasiGlobalSettings = QuasiGlobalSettings()
    topology: TopologySettings = TopologySettings()
    aggregation: AggregationSettings = AggregationSettings()
    consensus: ConsensusSettings = ConsensusSettings()
    network: NetworkSettings = NetworkSettings()
    trust: TrustSettings = TrustSettings()
    metrics: MetricsSettings = MetricsSettings()
    tensorboard: TensorboardSettings = TensorboardSettings()

    @model_validator(mode="after")
    def _fit_the_method(self) -> "Settings":
        if wrong := _unfit(self):
            raise ValueError(wrong)
        output = self.node.output.absolute()
        if self.needs_trust() and self.trust_folder().absolute().is_relative_to(output):
            raise ValueError(
                f"trust.folder = {self.trust_folder()}: lies within node.output, which is for "
                "models that may be given away; set it elsewhere"
            )
        return self

    def resolved(self) -> "Settings":
        """The same with absolute paths, good in any working directory."""
        sections = {
            name: section.model_copy(
                update={k: v.absolute() for k, v in section if isinstance(v, Path)}
            )
            for name, section in self
        }
        return self.model_copy(update=sections)

    def trust_folder(self) -> Path:
        """Of this run, on this machine."""
        return self.trust.folder or default_trust_folder(self.run.name)

    def needs_trust(self) -> bool:
        """Whether connections are made under TLS; on this machine alone they need not be."""
        return not self.trust.insecure and not is_loopback(self.node.host)

    def timing(self) -> Timing:
        """The preset's timing with the settings that were given in its place."""
        base: Timing = getattr(Timing, self.network.preset)()
        given = {
            field.name: getattr(self.network, field.name)
            for field in fields(Timing)
            if getattr(self.network, field.name, None) is not None
        }
        return replace(base, **given)


# Settings that not all methods have, and which do; a name of a section stands for all of it.
_OWN: Mapping[str, frozenset[str]] = {
    "schedule.layers_per_block": frozenset({"deca"}),
    "schedule.order": frozenset({"deca"}),
    "optimizer.adam_beta1": frozenset(get_args(Method)) - {"dsgd"},
    "optimizer.adam_beta2": frozenset(get_args(Method)) - {"dsgd"},
    "optimizer.adam_eps": frozenset(get_args(Method)) - {"dsgd"},
    "schedule.staleness": frozenset({"deca"}),
    "optimizer.bma": frozenset({"deca"}),
    "optimizer.bma_beta1": frozenset({"deca"}),
    "optimizer.bma_beta2": frozenset({"deca"}),
    "optimizer.discrepancy": frozenset({"deca"}),
    "lora": frozenset({"dec-lora", "decaf"}),
    "lora.split": frozenset({"decaf"}),
    "adapter": frozenset({"dec-adapter"}),
    "quasi_global": frozenset({"qg-adam"}),
    # A difference of factors is none of the products that decaf mixes.
    "aggregation": frozenset(get_args(Method)) - {"decaf"},
}


def has(method: str, key: str) -> bool:
    """Whether a method has a setting at all."""
    return all(
        method in methods for own, methods in _OWN.items() if f"{key}.".startswith(f"{own}.")
    )


def _unfit(settings: Settings) -> str:
    """What does not go with the method, beginning with its key; empty when all is well.

    A setting that has its default is as good as not given, so that a file which lists all of them
    can be read again.
    """
    method = settings.run.method
    for own, methods in _OWN.items():
        section, _, name = own.partition(".")
        part = getattr(settings, section)
        for field in [name] if name else type(part).model_fields:
            given = getattr(part, field)
            if method not in methods and given != type(part).model_fields[field].default:
                shown = json.dumps(given, default=str)
                return (
                    f"{section}.{field} = {shown}: a setting of {', '.join(sorted(methods))}, and "
                    f'run.method is "{method}"; remove it'
                )
    if has(method, "lora") and settings.schedule.steps % settings.lora.local_steps:
        return (
            f"schedule.steps = {settings.schedule.steps}: not a multiple of lora.local_steps = "
            f"{settings.lora.local_steps}, so that the last steps of a round would not be mixed"
        )
    if method == "decaf" and settings.consensus.tolerance:
        return (
            f'consensus.tolerance = {settings.consensus.tolerance}: run.method is "decaf", whose '
            "nodes have factors of their own that cannot be averaged; set it to 0"
        )
    chosen = settings.aggregation
    if chosen.tau and chosen.rule != "clipped":
        return f'aggregation.tau = {chosen.tau}: aggregation.rule is "{chosen.rule}"; remove it'
    if settings.consensus.tolerance and chosen.rule != "mean":
        return (
            f"consensus.tolerance = {settings.consensus.tolerance}: the agreement takes the mean, "
            f'which aggregation.rule = "{chosen.rule}" is there to avoid; set it to 0'
        )
    return ""


def keyed_fields(
    model: type[BaseModel] = Settings, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Each setting by its dotted key."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from keyed_fields(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, info


_FIELDS: Mapping[str, FieldInfo] = dict(keyed_fields())
KEYS: Mapping[str, Any] = {key: info.annotation for key, info in _FIELDS.items()}


def _free_form(key: str, keys: Mapping[str, Any] = KEYS) -> bool:
    return get_origin(keys[key]) is dict


def nearest(key: str, keys: Mapping[str, Any] = KEYS) -> str:
    """What to write in place of an unknown setting."""
    if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.5):
        return f"did you mean {close[0]!r}?"
    section = key.partition(".")[0]
    known = sorted(name for name in keys if name.startswith(section + ".")) or sorted(
        {name.partition(".")[0] for name in keys}
    )
    return "known here: " + ", ".join(known)


def _kinds(annotation: Any) -> set[Any]:
    """The plain types that a setting may have; str stands for words, too."""
    if get_origin(annotation) in (Union, UnionType):
        return {kind for option in get_args(annotation) for kind in _kinds(option)}
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    return {str} if get_origin(annotation) is Literal else {annotation}


def check_kind(key: str, value: Any, where: str, keys: Mapping[str, Any] = KEYS) -> None:
    """TOML has types: what Python or a variable's text would pass for another is refused.

    Raises:
        ConfigError: naming the key, after ``where``.
    """
    kinds = _kinds(keys[key])
    shown = f"{where}{key} = {json.dumps(value, default=str)}"
    if kinds & {int, float} and isinstance(value, bool | str):
        raise ConfigError(f"{shown}: a number is needed, without quotes")
    if bool in kinds and not isinstance(value, bool):
        raise ConfigError(f"{shown}: true or false is needed, without quotes")


def flatten(
    tree: Mapping[str, Any], prefix: str = "", keys: Mapping[str, Any] = KEYS
) -> Iterator[tuple[str, Any]]:
    """The values of nested tables by their dotted keys."""
    for name, value in tree.items():
        key = prefix + name
        if isinstance(value, Mapping) and not (key in keys and _free_form(key, keys)):
            yield from flatten(value, key + ".", keys)
        else:
            yield key, value


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables of values by their dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """What a TOML file says; ``remedy`` is for who names one that is not there.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def checked_value(key: str, value: Any, path: Path, keys: Mapping[str, Any] = KEYS) -> Any:
    """A value that a file gives; a path in it is relative to the file.

    Raises:
        ConfigError: no such setting, or not of its type.
    """
    if key not in keys:
        raise ConfigError(f"{path}: unknown setting {key!r}; {nearest(key, keys)}")
    check_kind(key, value, f"{path}: ", keys)
    if Path in _kinds(keys[key]) and isinstance(value, str) and not value.startswith("~"):
        return str(path.parent / value)
    return value


def _read_file(path: Path) -> dict[str, Any]:
    """Key -> value."""
    flat = dict(flatten(read_toml(path, "`deca-node init` writes one")))
    return {key: checked_value(key, value, path) for key, value in flat.items()}


def _read_overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """Key -> value."""
    flat: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {assignment}: write it as --set section.key=value")
        if key not in KEYS:
            raise ConfigError(f"--set {key}: unknown setting; {nearest(key)}")
        flat[key] = _override(key, text)
    return flat


def _override(key: str, text: str) -> Any:
    try:
        tree = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
    value = tree["value"]
    if _kinds(KEYS[key]) & {str, Path} and not isinstance(value, str):
        return text  # a name may be a number
    if len(tree) > 1:
        raise ConfigError(f"--set {key}: one setting each; give --set once more for the next")
    check_kind(key, value, "--set ")
    return value


def _check_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Key -> the variable that sets it."""
    found: dict[str, str] = {}
    for variable in environ:
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        key = variable[len(ENV_PREFIX) :].lower().replace("__", ".")
        if key not in KEYS and not any(
            key.startswith(known + ".") for known in KEYS if _free_form(known)
        ):
            close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            remedy = (
                f"did you mean {ENV_PREFIX}{close[0].upper().replace('.', '__')}?"
                if close
                else "write DECA_SECTION__KEY"
            )
            raise ConfigError(f"environment variable {variable}: unknown setting; {remedy}")
        if key in KEYS and get_origin(KEYS[key]) in (tuple, dict):
            try:
                json.loads(environ[variable])
            except ValueError:
                kind = "list" if get_origin(KEYS[key]) is tuple else "object"
                raise ConfigError(
                    f"environment variable {variable}: {environ[variable]!r} is not a JSON {kind}"
                ) from None
        found[key] = variable
    return found


def load(config: Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Read and check a node's settings.

    Args:
        config: a TOML file, or None to use the environment and ``overrides`` alone.
        overrides: ``section.key=value`` strings; values are TOML, bare words are strings.

    Raises:
        ConfigError: naming the file or variable, the key and the remedy.
    """
    from_file = _read_file(config) if config else {}
    variables = _check_environment(os.environ)
    given = _read_overrides(overrides)

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            assert isinstance(env_settings, EnvSettingsSource)  # noqa: S101 - narrows the type
            return init_settings, env_settings, InitSettingsSource(settings_cls, nest(from_file))

    try:
        return Loaded(**nest(given))
    except ValidationError as error:
        sources = [
            *((key, "--set ") for key in given),
            *((key, f"environment variable {name}: ") for key, name in variables.items()),
            *((key, f"{config}: ") for key in from_file),
        ]
        raise ConfigError(_explain(error, config, sources)) from None
    except ValueError as error:  # pydantic-settings could not read a variable
        raise ConfigError(f"environment: {error}".splitlines()[0]) from None


def from_values(values: Mapping[str, Any], path: Path) -> Settings:
    """Settings from these values alone, whatever the environment says.

    Args:
        values: by dotted key.
        path: the file that they come from, for messages.

    Raises:
        ConfigError: naming the key and the remedy.
    """

    class Given(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],  # noqa: ARG003
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    try:
        return Given(**nest(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, path, [(key, f"{path}: ") for key in values])) from None


def _explain(
    error: ValidationError, config: Path | None, sources: Iterable[tuple[str, str]]
) -> str:
    """One line: who gave the first wrong value, its key and the remedy.

    Args:
        error: what pydantic found.
        config: the file.
        sources: pairs of a key and what to call its giver, those that win first.
    """
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    setting = next((known for known in KEYS if f"{key}.".startswith(f"{known}.")), key)
    where = next((name for given, name in sources if f"{given}.".startswith(f"{setting}.")), "")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if not key:  # of several settings together; see _unfit
        text = first["msg"].removeprefix("Value error, ")
        setting = text.partition(" ")[0]
        return next((name for given, name in sources if given == setting), "") + text
    if setting in KEYS and get_origin(KEYS[setting]) is tuple and first["type"] != "value_error":
        example = json.dumps((_FIELDS[setting].examples or [[]])[0])
        return f"{where}{setting}: write it as a list, as in {example}{more}"
    if first["type"] == "missing":
        need = f"{key}.path" if key == "model" else f"{key}.train" if key == "data" else key
        file = f"{config}: " if config else ""
        return f"{file}setting {need!r} is missing; give it in the file or with --set {need}=…"
    if first["type"] == "extra_forbidden":
        return f"{where}unknown setting {key!r}; {nearest(key)}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{key} = {json.dumps(first['input'], default=str)}: {message}{more}"
