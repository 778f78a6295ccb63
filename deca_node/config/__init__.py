"""A node's settings: every one of them, typed, and the only place that reads them.

TOML, ``DECA_…`` environment variables and ``--set`` are read here and nowhere else. Later wins:
defaults, file, environment, ``--set``. Relative paths in a file are relative to that file.
"""

from deca_node.config.keys import (
    KEYS,
    check_kind,
    checked_value,
    flatten,
    keyed_fields,
    nearest,
    nest,
    read_toml,
)
from deca_node.config.loading import from_values, load
from deca_node.config.sections import (
    ConsensusSettings,
    DataSettings,
    LoraSettings,
    Method,
    ModelSettings,
    Name,
    NetworkSettings,
    OptimizerSettings,
    Positive,
    RunSettings,
    ScheduleSettings,
    Section,
    default_node_name,
    default_trust_folder,
    is_loopback,
)
from deca_node.config.settings import ENV_PREFIX, Settings, has
from deca_node.config.timing import Timing

__all__ = [
    "ENV_PREFIX",
    "KEYS",
    "ConsensusSettings",
    "DataSettings",
    "LoraSettings",
    "Method",
    "ModelSettings",
    "Name",
    "NetworkSettings",
    "OptimizerSettings",
    "Positive",
    "RunSettings",
    "ScheduleSettings",
    "Section",
    "Settings",
    "Timing",
    "check_kind",
    "checked_value",
    "default_node_name",
    "default_trust_folder",
    "flatten",
    "from_values",
    "has",
    "is_loopback",
    "keyed_fields",
    "load",
    "nearest",
    "nest",
    "read_toml",
]
