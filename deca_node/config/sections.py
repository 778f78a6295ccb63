"""Every setting, typed, with its unit and what it trades."""

import ipaddress
import os
import platform
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from deca_node.addresses import checked_address, is_host
from deca_node.errors import ConfigError
from deca_node.limits import NAME, NAME_RULE
from deca_node.topology import TopologySpec, component, graph

DEFAULT_PORT = 7430  # unassigned by IANA


def _shaped(pattern: str, words: str) -> AfterValidator:
    """Text of a pattern; whoever misses it is told in words."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(words)
        return text

    return AfterValidator(check)


def _named(path: Any) -> Any:
    """Refuse text that pathlib would take for the working folder."""
    if isinstance(path, str) and not path.strip():
        raise ValueError("is empty; name a path or leave it out")
    return path


Name = Annotated[str, _shaped(NAME, f"use {NAME_RULE}")]
Device = Annotated[
    str, _shaped(r"auto|cpu|cuda(:[0-9]+)?|mps", "use auto, cpu, cuda, cuda:N (as cuda:0) or mps")
]
Place = Annotated[Path, BeforeValidator(_named)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Method = Literal["deca", "dec-lora", "decaf", "dec-adapter", "dsgd", "dadam", "qg-adam"]


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
            raise ValueError("cannot expand ~: no home directory; write the full path") from None


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
        description="TCP port where the gRPC health service also answers, in plain text and "
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
        "ends the node: for Kubernetes and others that restart whatever ends.",
    )
    output: Place = Field(
        Path("out"),
        description="Folder of the trained model, the run's record and the state to resume "
        "from. One run, one node, one folder. Unset: out in the folder in which the node is "
        "started, wherever this file is.",
    )

    @field_validator("advertise")
    @classmethod
    def _host(cls, value: str | None) -> str | None:
        if value is not None and not is_host(value):
            raise ValueError(
                "give a host name or an IP address without a port or brackets; the port is"
                " node.port, or node.advertise_port"
            )
        return value


class ModelSettings(Section):
    """The base model."""

    path: Place = Field(
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
    cache: Place = Field(
        Path("~/.cache/deca-node"),
        description="Folder where converted .gguf files are kept, shared by all nodes of a "
        "machine.",
    )


class DataSettings(Section):
    """The private data and how rows become examples."""

    train: Place = Field(
        description="Private training data: .jsonl, .csv, .parquet, or a folder written by "
        "Dataset.save_to_disk. It never leaves this machine."
    )
    test: Place | None = Field(
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
        description="classification: label = word that the model says for it; preferably one token "
        "each. Empty: the labels found in train, as they are. Give all of them "
        "when not every node has every label.",
    )
    label_field: str = Field("label", description="classification: the field of the label.")
    prompt_field: str = Field("prompt", description="instruction: the field of the prompt.")
    response_field: str = Field("response", description="instruction: the field of the response.")
    messages_field: str = Field(
        "messages",
        description="instruction: the field of a chat, a list of {role, content}; it takes "
        "precedence over prompt and response.",
    )
    text_field: str = Field("text", description="text: the field of the text.")
    share_label_counts: bool = Field(
        False,
        description="classification: tell in the status how many examples of each label there are, "
        "for a dashboard to show the skew. Whoever can ask for the status then sees them.",
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

    @field_validator("labels", mode="before")
    @classmethod
    def _words(cls, labels: Any) -> Any:
        if not isinstance(labels, dict):
            # pydantic takes no TypeError for a finding
            raise ValueError('write each label with its word, as in {neg = "neg"}')  # noqa: TRY004
        return labels


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
        "agree more slowly, and it costs the memory of one more block. A node that is stopped "
        "within a visit and resumed does not arrive at the same bits as one that was not.",
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
    discrepancy: Literal["l2", "none", "lr", "zero"] = Field(
        "l2",
        description="Scale of the move that is blended in: unit length (l2), as it is (none), "
        "divided by the learning rate (lr), or nothing of it (zero), so that moments only shrink.",
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
    alpha: Positive = Field(16.0, description="The product is scaled by alpha / rank.")
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
        description="Updated from the whole move (quasi-global, as the second moment is), or from "
        "this node's gradients alone (local, as in the authors' code).",
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

    @field_validator("edges")
    @classmethod
    def _make_one_graph(
        cls, edges: tuple[tuple[str, str], ...], info: ValidationInfo
    ) -> tuple[tuple[str, str], ...]:
        if edges and info.data.get("kind", "explicit") != "explicit":
            raise ValueError(
                'used with topology.kind = "explicit" only; set topology.kind = "explicit", or '
                "remove topology.edges"
            )
        for one, other in edges:
            if one == other:
                raise ValueError(f"{one!r} needs no edge to itself; remove it")
        if edges:
            names = {name for edge in edges for name in edge}
            drawn = graph(names, TopologySpec("explicit", edges=edges))
            reached = component(drawn, edges[-1][0])
            # Its parts would train as so many runs that never hear of each other.
            if cut := names - reached:
                raise ValueError(
                    f"the graph is not connected: no way from {min(cut)} to {min(reached)};"
                    " add an edge, or give none at all to train alone"
                )
        return edges


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
        description="clipped, trimmed: how many of a node's neighbours may be hostile. A clipped "
        "node mixes nothing when it has no more neighbours than that (unless tau is set), a "
        "trimmed one when it has fewer than twice as many; with exactly twice as many it takes "
        "the median.",
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

    folder: Place | None = Field(
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
        raise ConfigError("cannot expand ~: no home directory; set trust.folder") from None
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
        "largest between two neighbours before, in fp32: rounded to a model of 16 bits, two "
        "nodes' values may differ by one unit in the last place. 1e-3 is a good value. 0: no "
        "agreement, every node keeps its own model. Smaller takes more rounds, and each sends the "
        "block to every neighbour.",
    )
    max_rounds: int = Field(
        500,
        ge=8,
        le=100_000,
        description="Most rounds on one block. A few dozen are enough while the graph stays "
        "as it is; where nodes are lost meanwhile, the others may need hundreds.",
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
        description="HOST:PORT of peers to call, beside or in place of zeroconf. One that is "
        "running is enough: it names the others.",
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
        description="Seconds that a step waits for a neighbour's block, from when this node has "
        "nothing else to do. Unset: the preset's.",
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
        None,
        # Who is refused is greeted at every fifth, a quarter later by jitter, and what was refused
        # is told of for two minutes (health.REFUSAL_SECONDS).
        le=15,
        description="Seconds between greetings, at most half of gone_after. Unset: the preset's.",
        examples=[2.0],
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
        "included. Unset: as much as the link takes. With less, a step takes longer.",
        examples=[100.0],
    )
    send_rate_per_peer: Positive | None = Field(
        None,
        description="MB per second that this node sends to each peer. Unset: as much as the "
        "link takes.",
        examples=[50.0],
    )
    catch_up_rate: Positive = Field(
        64.0,
        description="MB per second that this node sends, in all, to nodes that catch up, at most. "
        "Lower spares the link, higher brings them back sooner.",
    )
    catch_up_share: Positive = Field(
        0.04,
        description="Share of the CPU cores in use by the training (node.threads; one with a GPU) "
        "that handing out blocks to nodes that catch up may take meanwhile; it slows down to that "
        "by itself. Lower spares the training, higher brings them back sooner.",
    )
    wire_format: Literal["fp32", "bf16", "int8"] = Field(
        "fp32",
        description="How blocks travel. bf16 and int8 send the difference from the step before, "
        "rounded, in a half or a quarter of fp32's bytes, but for a visit's first one, which is "
        "whole; what rounding leaves out is sent later. They cost computing time and, on the "
        "host, memory: two blocks in fp32, and one more for each neighbour. An edge takes the "
        "smaller of its two ends' formats.",
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
        description="Address to serve them on. Whoever reaches it can read them, so use "
        "an address beyond the loopback only on networks that you trust.",
    )


class TensorboardSettings(Section):
    """Curves for TensorBoard; needs the extra [tensorboard]."""

    folder: Place | None = Field(
        None,
        description="Folder of the event files: this node's go to a folder of its name in it, so "
        "that nodes can share one. Unset: none.",
        examples=["out/tensorboard"],
    )
