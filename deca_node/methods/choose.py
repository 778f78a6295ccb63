"""From the settings to the method: what it needs of the model, and the method itself."""

from dataclasses import replace
from typing import Any

from deca_node import houlsby, lora
from deca_node.config import Settings, has
from deca_node.houlsby import Houlsby
from deca_node.limits import MAX_KEPT_ARRIVALS
from deca_node.lora import Lora
from deca_node.methods import Method
from deca_node.methods.dadam import DAdam
from deca_node.methods.dec_adapter import DecAdapter
from deca_node.methods.dec_lora import DecLora
from deca_node.methods.deca import Deca
from deca_node.methods.decaf import Decaf
from deca_node.methods.dsgd import DSgd
from deca_node.methods.qg_adam import QgAdam
from deca_node.models import LanguageModel, Outline
from deca_node.moments import Rule
from deca_node.robust import Aggregation


def prepare(settings: Settings, model: LanguageModel) -> None:
    """Add to the model what the method trains; its digests are to be taken before.

    Raises:
        ConfigError: the settings do not fit the model, or peft is missing.
        ModelError: the model shows no place for adapters.
    """
    seed = settings.run.seed
    if has(settings.run.method, "lora"):
        model.extend(Lora(model.module, model.stack, settings.lora, seed))
    elif has(settings.run.method, "adapter"):
        model.extend(Houlsby(model.module, model.stack, settings.adapter.width, seed))


def added(settings: Settings, model: Outline) -> int | None:
    """Parameters that ``prepare`` would add; None where the method trains the model's own.

    Raises:
        ConfigError, ModelError: as ``prepare``.
    """
    if has(settings.run.method, "lora"):
        return lora.added(model.module, model.stack, settings.lora)
    if has(settings.run.method, "adapter"):
        return houlsby.added(model.module, model.stack, settings.adapter.width)
    return None


# Bytes of optimizer state for a trained parameter: Adam's m and v in fp32, in qg-adam also x as it
# was before the step.
STATE_BYTES = {"dsgd": 0, "qg-adam": 12}
ADAM_BYTES = 8


def state_bytes(settings: Settings) -> int:
    """Bytes of optimizer state for each trained parameter."""
    return STATE_BYTES.get(settings.run.method, ADAM_BYTES)


def kept_arrivals(settings: Settings, neighbours: int) -> int:
    """Of so many neighbours' blocks, how many are kept at once until the mix."""
    if settings.run.method == "decaf":
        return neighbours
    robust = settings.aggregation.rule != "mean"
    return min(neighbours, MAX_KEPT_ARRIVALS) if robust else 0


def build(settings: Settings, model: LanguageModel, node: str) -> Method:
    """The method of ``run.method`` on a model that ``prepare`` has seen, for a node by its name."""
    about = settings.run.name, node
    rule = Rule(**settings.optimizer.model_dump())
    adam = replace(rule, bma="off")
    overlap = settings.network.overlap
    aggregation = Aggregation(**settings.aggregation.model_dump())
    mixed: dict[str, Any] = {"overlap": overlap, "aggregation": aggregation}
    match settings.run.method:
        case "deca":
            return Deca(model, rule, *about, stale=settings.schedule.staleness == 1, **mixed)
        case "dec-lora":
            return DecLora(model, adam, *about, settings.lora.local_steps, **mixed)
        case "decaf":
            lora = settings.lora
            return Decaf(model, adam, *about, lora.local_steps, lora.split, overlap=overlap)
        case "dec-adapter":
            return DecAdapter(model, adam, *about, **mixed)
        case "dsgd":
            return DSgd(model, adam, *about, **mixed)
        case "dadam":
            return DAdam(model, adam, *about, **mixed)
        case "qg-adam":
            return QgAdam(model, adam, *about, settings.quasi_global.first_moment, **mixed)
