"""What all nodes of a run must have in common, as named values. Pure."""

import json
from collections.abc import Mapping

from deca_node.blocks import Schedule, partition_layers
from deca_node.config import Settings, has
from deca_node.errors import ConfigError
from deca_node.wire import DTYPE

PROTOCOL_VERSION = 1


def schedule_for(settings: Settings, n_layers: int) -> Schedule:
    """The run's schedule over a model with so many layers.

    Only DECA goes from block to block; for the other methods all layers are one.

    Raises:
        ConfigError: a block is to have more layers than the model.
    """
    chosen = settings.schedule
    if chosen.layers_per_block > n_layers:
        raise ConfigError(
            f"schedule.layers_per_block = {chosen.layers_per_block}: the model has {n_layers} "
            "layers; lower it, on all nodes alike"
        )
    whole = settings.run.method != "deca"
    blocks = partition_layers(n_layers, n_layers if whole else chosen.layers_per_block)
    return Schedule(blocks, chosen.rounds, chosen.steps, chosen.order, settings.run.seed)


def fingerprint(
    settings: Settings,
    schedule: Schedule,
    model_config: str,
    base_weights: str,
    tokenizer: str,
    dtype: str,
) -> dict[str, str]:
    """Named values of a run; two nodes work together when all are equal.

    Args:
        settings: the node's settings; what may differ between nodes is left out.
        schedule: blocks, rounds, steps and order.
        model_config: digest of the model's configuration.
        base_weights: digest of the weights that the run starts from.
        tokenizer: digest of what makes tokens of a text.
        dtype: precision of the frozen weights, as used.
    """
    random_graph = settings.topology.kind == "erdos_renyi"
    return {
        "run.name": settings.run.name,
        "run.seed": str(settings.run.seed),
        "run.method": settings.run.method,
        "model.config": model_config,
        "model.dtype": dtype,  # before the digest of the weights, which it changes
        "model.weights": base_weights,
        "model.tokenizer": tokenizer,
        "schedule.rounds": str(schedule.rounds),
        "schedule.steps": str(schedule.steps),
        "schedule.order": schedule.order,
        "schedule.staleness": str(settings.schedule.staleness),
        "schedule.blocks": str(len(schedule.blocks)),
        "schedule.layers_per_block": str(settings.schedule.layers_per_block),
        **{
            f"optimizer.{name}": str(value)
            for name, value in settings.optimizer.model_dump().items()
        },
        **{
            f"{section}.{name}": str(value)
            for section in ("lora", "adapter", "quasi_global")
            for name, value in getattr(settings, section).model_dump().items()
            if has(settings.run.method, f"{section}.{name}")
        },
        # A node that takes less of its neighbours than they take of it would draw all to itself.
        **(
            {
                f"aggregation.{name}": str(value)
                for name, value in settings.aggregation.model_dump().items()
            }
            if settings.aggregation.rule != "mean"
            else {}
        ),
        "topology.kind": settings.topology.kind,
        **({"topology.p": str(settings.topology.p)} if random_graph else {}),
        "topology.edges": json.dumps(sorted(sorted(edge) for edge in settings.topology.edges)),
        "wire.format": DTYPE,
    }


def agreement_marks(settings: Settings) -> dict[str, str]:
    """Named values that must be equal to work together, but do not make a run another one.

    A run that has finished may be started again with other values, to agree once more.
    """
    return {
        f"consensus.{name}": str(value) for name, value in settings.consensus.model_dump().items()
    }


def difference(own: Mapping[str, str], theirs: Mapping[str, str]) -> str | None:
    """The first field in which two fingerprints differ, with both values; None when equal."""
    for name in [*own, *sorted(set(theirs) - set(own))]:
        if own.get(name) != theirs.get(name):
            return (
                f"{name} is {own.get(name, 'absent')!r} here, {theirs.get(name, 'absent')!r} there"
            )
    return None
