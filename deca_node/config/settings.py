"""All sections together, and which settings go with which method."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from deca_node.config.sections import (
    AdapterSettings,
    AggregationSettings,
    ConsensusSettings,
    DataSettings,
    LoraSettings,
    Method,
    MetricsSettings,
    ModelSettings,
    NetworkSettings,
    NodeSettings,
    OptimizerSettings,
    QuasiGlobalSettings,
    RunSettings,
    ScheduleSettings,
    TensorboardSettings,
    TopologySettings,
    TrustSettings,
    default_trust_folder,
    is_loopback,
)
from deca_node.config.timing import Timing
from deca_node.errors import ConfigError

ENV_PREFIX = "DECA_"


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

    def check_edges(self) -> None:
        """Refuse edges none of which is this node's: it would train alone, as by a slip in a name.

        Not where settings are read, as an experiment's nodes have other names.

        Raises:
            ConfigError: with the remedy.
        """
        edges, name = self.topology.edges, self.node.name
        if edges and not any(name in edge for edge in edges):
            known = ", ".join(sorted({each for edge in edges for each in edge}))
            raise ConfigError(
                f"topology.edges: none is of node.name = {name!r}, only of {known}; set the one or "
                "the other, the edges on all nodes alike"
            )

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
    if wrong := _late_greetings(settings.network, settings.timing()):
        return wrong
    chosen = settings.aggregation
    if chosen.tau and chosen.rule != "clipped":
        return f'aggregation.tau = {chosen.tau}: aggregation.rule is "{chosen.rule}"; remove it'
    if settings.consensus.tolerance and chosen.rule != "mean":
        return (
            f"consensus.tolerance = {settings.consensus.tolerance}: the agreement takes the mean, "
            f'which aggregation.rule = "{chosen.rule}" is there to avoid; set it to 0'
        )
    return ""


def _late_greetings(given: NetworkSettings, timing: Timing) -> str:
    """Whether peers would be gone between two greetings, one of which may be late or lost."""
    beat, gone = timing.heartbeat, timing.gone_after
    if 2 * beat <= gone:
        return ""
    if given.heartbeat is None:
        return (
            f"network.gone_after = {gone}: less than twice network.heartbeat = {beat}, so that "
            "peers would be gone between two greetings; raise it, or lower network.heartbeat"
        )
    return (
        f"network.heartbeat = {beat}: more than half of network.gone_after = {gone}, so that peers "
        "would be gone between two greetings; lower it, or raise network.gone_after"
    )
