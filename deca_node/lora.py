"""Low-rank adapters: the only file that imports peft, and only inside functions.

Beside a frozen matrix of shape (out, in) stand A of shape (rank, in) and B of shape (out, rank);
the layer computes with the matrix plus alpha / rank · B A.
"""

import importlib.util
import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deca_node.config import LoraSettings
from deca_node.errors import ConfigError

# Linear layers that peft knows, by name of their class: transformers' Conv1D, GPT-2's, has its
# matrix transposed; Falcon's own computes as nn.Linear. Others that come from nn.Linear do not:
# routers of experts choose, too, and DeepSeek V4 multiplies in groups.
_LINEAR = ("Linear", "Conv1D", "FalconLinear")

# Kinds of models whose kernels read the matrix of out_proj past its adapter; as peft has them.
_PAST_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")


class Lora:
    """See models.Addition. The exported model has the products merged into its matrices.

    Args:
        module: the Hugging Face model; gets its adapters here, A random and B zero.
        stack: name of its layer stack.
        settings: rank, alpha, targets.
        seed: of A, which is so the same on all nodes of a run.

    Raises:
        ConfigError: peft is not installed, a target matches nothing, or a matrix is smaller than
            the rank.
    """

    note = ""

    def __init__(self, module: Any, stack: str, settings: LoraSettings, seed: int) -> None:
        _require_peft()
        import peft  # noqa: PLC0415 - takes seconds

        found = _targets(module, stack, settings)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=[name.removeprefix(f"{stack}.") for name in found],
            lora_dropout=0.0,
        )
        # What peft draws is drawn anew below; that Conv1D is the other way round it finds itself.
        # Into the stack, not the model: of a model with experts whose files are converted as they
        # are read (DeepSeek V3, GLM 4.5), peft would change the targets to those of the files.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            peft.inject_adapter_in_model(config, module.get_submodule(stack))
        module.requires_grad_(False)
        self._stack = stack
        self._layers: dict[str, Any] = {name: module.get_submodule(name) for name in found}
        self._module = module
        generator = torch.Generator().manual_seed(seed)
        for layer in self._layers.values():
            # fp32 whatever the base: 16 bits would lose most updates.
            a, b = layer.lora_A.default.float().weight, layer.lora_B.default.float().weight
            bound = 1 / math.sqrt(a.shape[1])  # as peft's own start: Kaiming-uniform, a = √5
            with torch.no_grad():
                a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
                b.zero_()

    def parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """See Addition. A and B of each matrix, next to each other."""
        found = {}
        for name, adapted in self._layers.items():
            if name.startswith(f"{self._stack}.{layer}."):
                found[f"{name}.lora_A.weight"] = adapted.lora_A.default.weight
                found[f"{name}.lora_B.weight"] = adapted.lora_B.default.weight
        return found

    @contextmanager
    def exporting(self, folder: Path) -> Iterator[None]:  # noqa: ARG002
        """See Addition. Merged by peft; afterwards every bit is as it was.

        Copies of the matrices are kept on the host: a device that the model fills has no room.
        """
        kept = {
            name: layer.get_base_layer().weight.data.to("cpu", copy=True)
            for name, layer in self._layers.items()
        }
        try:
            for name, layer in self._layers.items():
                layer.merge()
                self._module.set_submodule(name, layer.get_base_layer())
            yield
        finally:
            for name, layer in self._layers.items():
                layer.get_base_layer().weight.data.copy_(kept[name])
                layer.merged_adapters.clear()
                self._module.set_submodule(name, layer)


def added(module: Any, stack: str, settings: LoraSettings) -> int:
    """How many parameters ``Lora`` would add; the module may be without values.

    Raises:
        ConfigError: as ``Lora``.
    """
    _require_peft()
    matrices = (module.get_submodule(name) for name in _targets(module, stack, settings))
    return sum(settings.rank * sum(p.shape) for m in matrices for p in [m.get_parameter("weight")])


def _targets(module: Any, stack: str, settings: LoraSettings) -> list[str]:
    """Names of the matrices that get adapters, in the order of the model."""
    matrices = {
        name: part
        for name, part in module.named_modules()
        if name.startswith(f"{stack}.") and type(part).__name__ in _LINEAR
    }
    endings = sorted({name.removeprefix(f"{stack}.").partition(".")[2] for name in matrices})
    found: set[str] = set()
    for target in settings.targets:
        matching = {name for name in matrices if name.endswith(f".{target}")}
        if not matching:
            raise ConfigError(
                f"lora.targets: {target!r} matches no linear layer of the model; it has "
                f"{', '.join(endings)}"
            )
        found |= matching
    chosen = [name for name in matrices if not found or name in found]
    kind = module.config.model_type
    if kind in _PAST_OUT_PROJ and any(name.endswith(".out_proj") for name in chosen):
        others = sorted({each.rpartition(".")[2] for each in endings} - {"out_proj"})
        raise ConfigError(
            f"lora.targets: out_proj of a {kind} model cannot have an adapter, for its kernels "
            f"read the matrix alone; set lora.targets = {json.dumps(others)}"
        )
    for name in chosen:
        rows, columns = matrices[name].weight.shape
        if settings.rank > min(rows, columns):
            raise ConfigError(
                f"lora.rank = {settings.rank}: {name} is of {rows} × {columns} and has no higher "
                f"rank than {min(rows, columns)}; lower it, or leave {name.rpartition('.')[2]} out "
                "of lora.targets"
            )
    return chosen


def _require_peft() -> None:
    for package in ("peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"run.method: LoRA needs the package {package}: pip install 'deca-node[lora]'"
            )
