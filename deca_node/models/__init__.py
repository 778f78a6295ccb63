"""A Hugging Face causal language model: block access, forward passes, export."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import xxhash
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deca_node import memory, sizes
from deca_node.batches import IGNORED, Batch
from deca_node.config import ModelSettings
from deca_node.errors import DataError, ModelError, OutputError
from deca_node.models.active import FP16_LOSS_SCALE, ActiveBlock
from deca_node.models.devices import DTYPES, pick_device, pick_dtype, wide_device
from deca_node.models.layers import layer_stack
from deca_node.models.outlines import Outline, outline
from deca_node.models.reading import (
    check_folder,
    config_digest,
    converted,
    read_architecture,
    read_model,
    read_tokenizer,
)
from deca_node.models.tokenizer import Tokenizer, Untokenized
from deca_node.models.writing import written_whole

__all__ = [
    "DTYPES",
    "FP16_LOSS_SCALE",
    "ActiveBlock",
    "Addition",
    "LanguageModel",
    "Outline",
    "Prefix",
    "Tokenizer",
    "outline",
    "pick_device",
    "pick_dtype",
    "wide_device",
]


@dataclass(frozen=True, eq=False)
class Prefix:
    """What the first layers make of a batch, to go on from while their parameters stay as they are.

    Attributes:
        batch: what it was computed from.
        depth: the number of those layers, at least 1.
        output: of the last of them: one hidden state, alone or in front of a tuple.
    """

    batch: Batch
    depth: int
    output: Any


class _Enough(BaseException):
    """Ends a forward pass from within; no Exception, so that no model's code catches it."""

    def __init__(self, output: Any = None) -> None:
        self.output = output


class Addition(Protocol):
    """Small trainable parts added to the layers of a frozen model; lora.Lora is one.

    Attributes:
        note: what to know about a model folder that was written with it; may be empty.
    """

    note: str

    def parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Those added to a layer, by names that are unique in the model."""
        ...

    def exporting(self, folder: Path) -> AbstractContextManager[None]:
        """Meanwhile the model's own tensors are what is to be exported as the model.

        What they cannot say is written into ``folder``.
        """
        ...


class LanguageModel:
    """A causal language model whose layers are trained block by block and are frozen otherwise.

    Once it is extended by an addition, that is what is trained of a layer, and the layer's own
    parameters stay frozen.

    It stays in ``eval()`` mode throughout: dropout off, so that a step can be repeated exactly.

    Attributes:
        name: the folder's or the file's name.
        tokenizer: its tokenizer.
        device: where all parameters are.
        n_layers: length of the layer stack.
        stack: the layer stack's name in the module.
        dtype: precision of the frozen weights: bf16, fp16 or fp32.
        module: the Hugging Face model.
    """

    def __init__(self, module: Any, tokenizer: Tokenizer, device: torch.device, path: Path) -> None:
        self.name = path.stem if path.suffix.lower() == ".gguf" else path.resolve().name
        self.tokenizer = tokenizer
        self.device = device
        self.module = module.eval().requires_grad_(False)
        self.stack, layers = layer_stack(module, path)
        self.n_layers = len(layers)
        first = next(layers[0].parameters()).dtype
        self.dtype = next((name for name, dtype in DTYPES.items() if dtype is first), str(first))
        self._refuse_shared(path)
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
        self._active: ActiveBlock | None = None
        self._addition: Addition | None = None
        self._shares = False  # memory with other models, which is never written to

    def extend(self, addition: Addition) -> None:
        """Train what was added to the layers in their place; digests are to be taken before."""
        self._addition = addition

    @property
    def note(self) -> str:
        """What to know about a folder that was exported; may be empty."""
        return "" if self._addition is None else self._addition.note

    def twin(self) -> "LanguageModel":
        """Another model that is trained apart and shares the memory of all that it does not change.

        It starts with the values of this one, which may not be trained itself from then on: a
        twin gives a block memory of its own when it is activated or loaded.
        """
        memo: dict[int, Any] = {id(self.module.config): self.module.config}
        for parameter in self.module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
        for buffer in self.module.buffers():
            memo[id(buffer)] = buffer
        other = copy.copy(self)
        other.module = copy.deepcopy(self.module, memo)
        other._active = None
        other._shares = True
        return other

    @classmethod
    def load(cls, settings: ModelSettings, device: torch.device) -> "LanguageModel":
        """Read a Hugging Face folder or a GGUF file, which is converted once into the cache.

        Raises:
            ModelError: it is missing, damaged, or not a causal language model with a layer stack.
            DiskFullError: no room for the converted GGUF file.
            OutputError: the cache folder cannot be written.
        """
        path = settings.path
        folder = converted(path, settings.cache) if path.suffix.lower() == ".gguf" else path
        check_folder(folder, path)
        module = read_model(folder, path, dtype=DTYPES[pick_dtype(settings.dtype, device)])
        tokenizer = Tokenizer(read_tokenizer(folder, path), path)
        try:
            module.to(device)
        except Exception as error:
            if not memory.is_out(error):
                raise
            raise ModelError(
                f'{path}: does not fit into the memory of {device}; try model.dtype = "bf16",'
                ' a smaller model, or node.device = "cpu"'
            ) from None
        model = cls(module, tokenizer, device, path)
        if settings.gradient_checkpointing:
            model._checkpoint_layers()
        return model

    @classmethod
    def untrained(
        cls,
        config: Path,
        device: torch.device,
        dtype: str,
        *,
        layers: int | None = None,
        checkpointing: bool = False,
    ) -> Self:
        """An architecture with random weights and no tokenizer, to see what it costs.

        Args:
            config: its config.json, or a folder that has one.
            device: where it is made; ``meta`` makes shapes alone.
            dtype: of the weights: bf16, fp16 or fp32.
            layers: as many decoder layers; all when not given.
            checkpointing: activations are computed again in the backward pass.

        Raises:
            ModelError: it is no configuration of a causal language model, has fewer layers, or does
                not fit into memory.
        """
        file = config / "config.json" if config.is_dir() else config
        module = read_architecture(file, device, DTYPES[dtype], layers)
        model = cls(module, Untokenized(), device, file)
        if checkpointing:
            model._checkpoint_layers()
        return model

    def activate(self, layers: range) -> ActiveBlock:
        """Make these layers the trainable block, in place of any other.

        While the model is fp32 the block costs no memory beyond a passing copy, and its buffer
        stays the parameters' home after :meth:`release`.

        Raises:
            IndexError: the model has no such layers.
        """
        self.release()
        block = self._block(layers)
        if self._shares:  # what is float32 moves into the block's own buffer
            _renew({name: p for name, p in block.items() if p.dtype != torch.float32})
        half = self.dtype == "fp16"  # whatever is trained, gradients come to it through fp16
        self._active = ActiveBlock(block, self.device, half=half)
        return self._active

    def release(self) -> None:
        """Freeze the active block, if there is one, and free its gradients."""
        if self._active is not None:
            self._active.freeze()
            self._active = None

    def block_tensors(self, layers: range) -> dict[str, Tensor]:
        """The layers' parameters by name, in state-dict order: not copies, but the model's memory.

        Raises:
            IndexError: the model has no such layers.
        """
        return {name: parameter.detach() for name, parameter in self._block(layers).items()}

    def load_block(self, layers: range, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the layers' parameters. An active block's ``master`` may not see it.

        Raises:
            ModelError: a name or a shape differs; nothing was copied then.
            IndexError: the model has no such layers.
        """
        block = self._block(layers)
        if wrong := sorted(block.keys() ^ tensors.keys()):
            where = "missing" if wrong[0] in block else "not part of the block"
            raise ModelError(f"block {layers}: tensor {wrong[0]!r} is {where}")
        for name, parameter in block.items():
            if tensors[name].shape != parameter.shape:
                raise ModelError(
                    f"block {layers}: tensor {name!r} has shape {tuple(tensors[name].shape)},"
                    f" the model's has {tuple(parameter.shape)}"
                )
        if self._shares:
            _renew(block)
        with torch.no_grad():
            for name, parameter in block.items():
                parameter.copy_(tensors[name])

    def prefix(self, batch: Batch, depth: int, stop: Callable[[], bool]) -> Prefix | None:
        """Run the batch through the first ``depth`` layers, without autograd.

        Returns:
            What they gave; None when ``stop()``, asked after every layer, was true.

        Raises:
            IndexError: ``depth`` is not between 1 and ``n_layers``.
        """
        layers = self._first(depth)

        def done(layer: nn.Module, _: Any, output: Any) -> None:
            if stop():
                raise _Enough
            if layer is layers[-1]:
                raise _Enough(output)

        hooks = [layer.register_forward_hook(done) for layer in layers]
        try:
            with torch.no_grad():
                self._forward(batch)
        except _Enough as enough:
            return None if enough.output is None else Prefix(batch, depth, enough.output)
        finally:
            for hook in hooks:
                hook.remove()
        raise ModelError(f"{self.name}: does not run its layers one after the other")

    def resumes_exactly(self, prefix: Prefix) -> bool | None:
        """Whether predictions that go on from a prefix are those of a whole pass, bit for bit.

        They are for every model that hands one hidden state from layer to layer and nothing else.

        Returns:
            None when the batch cannot tell: no token of it is predicted, or one is no number.
        """
        with torch.no_grad():
            whole, _ = self.predictions(prefix.batch)
            if not whole.numel() or not bool(whole.isfinite().all()):
                return None
            resumed, _ = self.predictions(prefix.batch, prefix)
        return torch.equal(resumed, whole)

    def _first(self, depth: int) -> list[nn.Module]:
        if not 1 <= depth <= self.n_layers:
            raise IndexError(f"the first {depth} layers of a model with {self.n_layers} layers")
        return list(self.module.get_submodule(self.stack))[:depth]

    @contextmanager
    def _resumed(self, prefix: Prefix) -> Iterator[None]:
        """Within it the first layers do not compute but give the prefix's output."""
        layers = self._first(prefix.depth)
        own = [layer.__dict__.get("forward") for layer in layers]  # as a checkpointed layer has
        try:
            for layer in layers:
                layer.forward = lambda *_, **__: prefix.output
            yield
        finally:
            for layer, forward in zip(layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def predictions(self, batch: Batch, prefix: Prefix | None = None) -> tuple[Tensor, Tensor]:
        """Logits for each of the batch's N trained tokens, row by row, and the tokens themselves.

        The LM head runs at the positions that some row needs, where the model can be told so.

        Args:
            batch: examples side by side.
            prefix: of this batch, computed since the first layers were last changed.

        Returns:
            float32 of shape (N, vocabulary) and int64 of shape (N,), on the model's device.
        """
        labels = batch.labels[:, 1:]  # the token at t + 1 is predicted at t
        wanted = labels != IGNORED
        positions = wanted.any(dim=0).nonzero().squeeze(1)
        with nullcontext() if prefix is None else self._resumed(prefix):
            logits = self._forward(batch, positions)
        if not self._keeps_logits:
            logits = logits[:, positions.to(self.device)]
        # By index, not by a mask on the device: its size is known without waiting for the device.
        rows, columns = wanted[:, positions].nonzero(as_tuple=True)
        chosen = logits[rows.to(self.device), columns.to(self.device)]
        return chosen.float(), labels[wanted].to(self.device)

    def _forward(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """Logits, only at these positions where the model can be told so."""
        given: dict[str, Tensor] = {}
        if positions is not None and self._keeps_logits:
            given["logits_to_keep"] = positions.to(self.device)
        mask = batch.attention_mask.to(self.device)
        if self.device.type == "meta":  # no values to make a causal mask from: one in full
            mask = torch.ones(len(mask), 1, *2 * mask.shape[1:], dtype=torch.bool, device="meta")
        logits: Tensor = self.module(
            input_ids=batch.input_ids.to(self.device),
            attention_mask=mask,
            use_cache=False,
            **given,
        ).logits
        return logits

    def loss(self, batch: Batch, prefix: Prefix | None = None) -> Tensor:
        """Mean cross entropy over the batch's trained tokens: a float32 scalar, NaN without any."""
        return nn.functional.cross_entropy(*self.predictions(batch, prefix))

    def answer(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """What the model says next in a conversation, decoded greedily.

        Args:
            messages: of ``role`` and ``content``; the last is the user's.
            max_tokens: of the answer, at most; fewer where the model has no more positions.

        Raises:
            ModelError: the model has no chat template, or it refuses the conversation.
            DataError: the conversation takes all of the model's positions.
        """
        ids = torch.tensor([self.tokenizer.prompt(messages)], device=self.device)
        capacity = sizes.capacity(self.module)
        if capacity.bound:
            if (room := capacity.positions - ids.shape[1]) < 1:
                raise DataError(
                    f"the conversation has {ids.shape[1]} tokens, and {self.name} can take"
                    f" {capacity.positions} with the answer; shorten it, or the answers before"
                )
            max_tokens = min(max_tokens, room)
        with torch.no_grad():
            whole = self.module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=self.tokenizer.pad_id,
            )
        said: str = self.tokenizer.hf.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        return said.strip()

    def config_digest(self) -> str:
        """xxh3_128 of what defines the architecture: equal on all nodes that train one model."""
        return config_digest(self.module.config)

    def weights_digest(self) -> str:
        """xxh3_128 of name, dtype, shape and bytes of all parameters and persistent buffers."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            # NumPy has no bf16; bytes have no dtype.
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def export(self, folder: Path) -> None:
        """Write a folder that ``AutoModelForCausalLM.from_pretrained`` reads, in the model's dtype.

        Raises:
            OutputError: something is there already, or the folder cannot be written.
            DiskFullError: the disk has no room; nothing is left behind.
            DeviceError: there is not enough memory for it; likewise.
        """
        if folder.exists():
            raise OutputError(f"{folder}: already exists; move it away or export elsewhere")
        with written_whole(folder) as place:
            with nullcontext() if self._addition is None else self._addition.exporting(place):
                self.module.save_pretrained(place)
            self.tokenizer.hf.save_pretrained(place)

    def _block(self, layers: range) -> dict[str, nn.Parameter]:
        if not layers or min(layers) < 0 or max(layers) >= self.n_layers:
            raise IndexError(f"layers {layers} of a model with {self.n_layers} layers")
        if self._addition is not None:
            return {
                name: parameter
                for index in layers
                for name, parameter in self._addition.parameters(index).items()
            }
        stack = self.module.get_submodule(self.stack)
        return {
            f"{self.stack}.{index}.{name}": parameter
            for index in layers
            for name, parameter in stack[index].named_parameters()
        }

    def _refuse_shared(self, path: Path) -> None:
        """A parameter of two homes would be trained in one block and move under the other."""
        names: dict[int, str] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            other = names.setdefault(id(parameter), name)
            shared = other != name
            if shared and any(each.startswith(f"{self.stack}.") for each in (name, other)):
                raise ModelError(
                    f"{path}: {other} and {name} are one parameter; models that share"
                    " parameters between layers cannot be trained block by block"
                )

    def _checkpoint_layers(self) -> None:
        """Keep only each layer's input for backward and compute the rest again.

        Not transformers' own switch: that acts in train() mode only, where dropout is on, and makes
        the embeddings' output require a gradient, so that backward would walk down to layer 0.
        """
        for layer in self.module.get_submodule(self.stack):
            # Nothing in a layer draws random numbers in eval() mode: no state to keep.
            layer.forward = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )


def _renew(block: Mapping[str, nn.Parameter]) -> None:
    """Give parameters memory of their own; whoever holds what they had sees no change any more."""
    for parameter in block.values():
        parameter.data = parameter.data.clone()
