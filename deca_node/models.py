"""A Hugging Face causal language model: loading, block access, export.

The only file that imports transformers, and only inside functions: the import takes seconds.
Nothing here opens a network connection.
"""

import copy
import importlib.util
import inspect
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import filelock
import torch
import xxhash
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deca_node.config import ModelSettings
from deca_node.data import IGNORED, Batch
from deca_node.disk import is_full
from deca_node.errors import DecaError, DeviceError, DiskFullError, ModelError, OutputError
from deca_node.estimate import Shape
from deca_node.wire import Layout, TensorSpec

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# 1024 lifts gradients ten binades away from fp16's underflow (6e-8) and leaves room up to 65504.
FP16_LOSS_SCALE = 1024.0
# Where a configuration was written and how it was read, not what the model computes.
_VOLATILE = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache"})
_READ_BYTES = 16 * 2**20


# transformers switches the process's default dtype and device while it loads.
_LOADING = threading.Lock()


def pick_device(text: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    ``auto`` takes the first of CUDA, MPS and CPU that is there.

    Raises:
        DeviceError: the device asked for is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if text == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    device = torch.device(text)
    if device.type == "cuda":
        count = torch.cuda.device_count() if cuda else 0
        missing = f"this machine has {count} CUDA devices" if (device.index or 0) >= count else ""
    else:
        missing = "this machine has no MPS device" if device.type == "mps" and not mps else ""
    if missing:
        raise DeviceError(f'device {text!r}: {missing}; set node.device = "cpu" or "auto"')
    return device


def pick_dtype(text: str, device: torch.device) -> str:
    """The name of the dtype for ``bf16|fp16|fp32|auto``: auto is bf16 on CUDA, else fp32."""
    if text != "auto":
        return text
    return "bf16" if device.type == "cuda" else "fp32"


class ActiveBlock:
    """The trainable block: one flat fp32 buffer and the model's parameters that it stands for.

    A parameter whose dtype is fp32 *is* a view of the buffer; any other gets the buffer's values by
    :meth:`write_back`.

    Args:
        parameters: those of the block by name.
        device: the model's.
        half: gradients reach them through fp16, so that the loss needs a scale.

    Attributes:
        layout: the parameters' names and shapes, in the order of the model's state dict.
        master: the values, contiguous float32, shape (layout.numel,), on the model's device.
        loss_scale: the loss is multiplied by it before backward; :meth:`gradients` undoes it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        *,
        half: bool = False,
    ) -> None:
        self.layout = Layout(
            tuple(TensorSpec(name, tuple(tensor.shape)) for name, tensor in parameters.items())
        )
        self.master = torch.empty(self.layout.numel, dtype=torch.float32, device=device)
        self.loss_scale = FP16_LOSS_SCALE if half else 1.0
        self._parameters: list[tuple[slice, nn.Parameter]] = []
        end = 0
        for parameter in parameters.values():
            part = slice(end, end := end + parameter.numel())
            view = self.master[part].view(parameter.shape)
            view.copy_(parameter.detach())
            if parameter.dtype == torch.float32:
                parameter.data = view
            parameter.requires_grad_(True)
            self._parameters.append((part, parameter))

    def write_back(self) -> None:
        """Round ``master`` into the parameters that are not views of it."""
        with torch.no_grad():
            for part, parameter in self._parameters:
                if parameter.dtype != torch.float32:
                    parameter.copy_(self.master[part].view(parameter.shape))

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``master`` in order and their gradients, flat; zeros where backward left none.

        They have the parameter's dtype, or float32 where a loss scale is undone: divided in fp16
        they would underflow, which is what the scale is there to prevent.
        """
        for part, parameter in self._parameters:
            if parameter.grad is None:
                yield part, torch.zeros_like(parameter.detach()).reshape(-1)
            elif self.loss_scale == 1:
                yield part, parameter.grad.reshape(-1)
            else:
                yield part, parameter.grad.reshape(-1).float() / self.loss_scale

    def drop_gradients(self) -> None:
        """Free the gradients."""
        for _, parameter in self._parameters:
            parameter.grad = None

    def _freeze(self) -> None:
        self.drop_gradients()
        for _, parameter in self._parameters:
            parameter.requires_grad_(False)


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


class Tokenizer:
    """A Hugging Face tokenizer as ``data.Tokenizer`` wants it.

    Attributes:
        bos_id: the token that the tokenizer itself puts before a text, None when it puts none.
        eos_id: the token that ends a text, None when there is none.
        pad_id: the padding token, or else ``eos_id``, or else 0.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self.hf = tokenizer
        self._path = path
        # Data are cut to length by trying: hundreds of thousands of short texts. What the wrapper
        # adds to each takes longer than the tokens.
        self._fast = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        # Qwen and GPT-2 define a bos token that they never put before a text: ask, do not look up.
        first = tokenizer("a").input_ids[:1]
        bos: int | None = tokenizer.bos_token_id
        self.bos_id = bos if first == [bos] else None
        self.eos_id: int | None = tokenizer.eos_token_id
        pads = (tokenizer.pad_token_id, self.eos_id, 0)
        self.pad_id: int = next(token for token in pads if token is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""
        if self._fast is None:
            ids: list[int] = self.hf(text, add_special_tokens=False, verbose=False).input_ids
        else:
            ids = self._fast.encode(text, add_special_tokens=False).ids
        return ids

    def starts(self, text: str) -> tuple[list[int], list[int] | None]:
        """``encode``, and by token the index of its first character; None of a slow tokenizer."""
        if self._fast is None:
            return self.encode(text), None
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def chat(self, messages: list[dict[str, str]]) -> list[tuple[list[int], bool]]:
        """A conversation's token ids in segments; True marks what the assistant says.

        That is what the chat template makes of an assistant's message after the generation prompt,
        up to and with the token that ends its turn.

        Raises:
            ModelError: the model has no chat template.
            ValueError: the template refuses these messages, or shows a message otherwise once
                others follow it, so that it cannot be told apart.
        """
        self._require_template()
        whole = self._render(messages)
        segments = []
        end = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], add_generation_prompt=True)
            answered = self._render(messages[: index + 1])
            # What follows the end-of-turn token, a line break in most templates, is not learned.
            said = answered[len(prompt) :].rstrip()
            # Templates of thinking models strip the (empty) thought from all but the last answer.
            bare = said[max(said.find(message["content"].strip()), 0) :]
            start = len(prompt)
            spoken = next((text for text in (said, bare) if whole.startswith(text, start)), "")
            if not (spoken and answered.startswith(prompt) and whole.startswith(prompt)):
                raise ValueError(f"message {index + 1} cannot be told apart in the rendered text")
            segments.append((whole[end:start], False))
            end = start + len(spoken)
            segments.append((whole[start:end], True))
        segments.append((whole[end:], False))
        return [(self.encode(text), flag) for text, flag in segments if text]

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant's turn begins.

        Raises:
            ModelError: the model has no chat template, or it refuses these messages.
        """
        self._require_template()
        try:
            return self.encode(self._render(messages, add_generation_prompt=True))
        except ValueError as error:
            raise ModelError(f"{self._path}: its chat template refuses: {error}") from None

    def _require_template(self) -> None:
        if self.hf.chat_template is None:
            raise ModelError(
                f"{self._path}: has no chat template; use the model's instruction-tuned version,"
                ' put a chat_template.jinja in its folder, or set data.task = "text"'
            )

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        try:
            return str(self.hf.apply_chat_template(messages, tokenize=False, **options))
        except Exception as error:  # noqa: BLE001 - a template is a program of the model's author
            raise ValueError(_first_line(error)) from None


class _Untokenized(Tokenizer):
    """Of a model without one, whose batches are made of numbers."""

    def __init__(self) -> None:
        self.hf = None
        self.bos_id = self.eos_id = None
        self.pad_id = 0


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
        self.stack, layers = _layer_stack(module, path)
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
        folder = _converted(path, settings.cache) if path.suffix.lower() == ".gguf" else path
        _check_folder(folder, path)
        with _LOADING:
            module = _read_model(folder, path, dtype=DTYPES[pick_dtype(settings.dtype, device)])
        tokenizer = Tokenizer(_read_tokenizer(folder, path), path)
        try:
            module.to(device)
        except torch.OutOfMemoryError:
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
        transformers = _transformers()
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            if layers is not None:
                deepest, tree["num_hidden_layers"] = int(tree["num_hidden_layers"]), layers
                tree.pop("layer_types", None)  # transformers lists them anew
            kind = transformers.AutoConfig.for_model(tree.pop("model_type"), **tree)
            with _LOADING, device:
                module = transformers.AutoModelForCausalLM.from_config(kind, dtype=DTYPES[dtype])
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
        except (torch.OutOfMemoryError, MemoryError):
            raise ModelError(
                f"{file}: does not fit into the memory of {device}; take fewer layers"
            ) from None
        except Exception as error:  # noqa: BLE001 - it raises whatever its many readers raise
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise ModelError(f"{file}: no configuration of a causal model ({reason})") from None
        if layers is not None and not 1 <= layers <= deepest:
            raise ModelError(f"{file}: has {deepest} layers, not {layers}")
        model = cls(module, _Untokenized(), device, file)
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
            self._active._freeze()
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
            max_tokens: of the answer, at most.

        Raises:
            ModelError: the model has no chat template, or it refuses the conversation.
        """
        ids = torch.tensor([self.tokenizer.prompt(messages)], device=self.device)
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
        return _config_digest(self.module.config)

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
        """
        if folder.exists():
            raise OutputError(f"{folder}: is there already; move it away or export elsewhere")
        with _complete(folder) as place:
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


@dataclass(frozen=True)
class Outline:
    """What is known of a model without reading its weights.

    Attributes:
        architecture: the model's class.
        shape: its sizes.
        config_digest: as ``LanguageModel.config_digest``; None for a GGUF file that was not
            converted yet.
        weight_bytes: of its files of weights.
        to_convert: it is a GGUF file that was not converted yet.
        tokenizer: the model's.
        module: the model without values, on torch's meta device.
        stack: its layer stack's name.
    """

    architecture: str
    shape: Shape
    config_digest: str | None
    weight_bytes: int
    to_convert: bool
    tokenizer: Tokenizer
    module: Any
    stack: str


def outline(settings: ModelSettings) -> Outline:
    """Read all of a model but its weights: seconds, and hardly any memory.

    Raises:
        ModelError: as ``LanguageModel.load``, as far as it can be told.
    """
    path = settings.path
    folder, options = path, {}
    if path.suffix.lower() == ".gguf":
        folder = _conversion(path, settings.cache)
        if not folder.is_dir():
            folder, options = path.parent, {"gguf_file": path.name}
    if not options:
        _check_folder(folder, path)
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
        with _LOADING, torch.device("meta"):
            module = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001 - it raises whatever its many readers raise
        raise ModelError(f"{path}: cannot be read ({_first_line(error)})") from None
    files = [path] if options else _weight_files(folder, path)
    stack, layers = _layer_stack(module, path)
    hidden = int(getattr(config, "hidden_size", 0))
    return Outline(
        architecture=type(module).__name__,
        shape=Shape(
            parameters=sum(each.numel() for each in module.parameters()),
            layers=tuple(sum(each.numel() for each in layer.parameters()) for layer in layers),
            hidden=hidden,
            inner=int(getattr(config, "intermediate_size", None) or 4 * hidden),
            heads=int(getattr(config, "num_attention_heads", None) or 1),
            vocabulary=int(config.vocab_size),
            eager=getattr(config, "_attn_implementation", "") == "eager",
        ),
        config_digest=None if options else _config_digest(config),
        weight_bytes=sum(file.stat().st_size for file in files),
        to_convert=bool(options),
        tokenizer=Tokenizer(_read_tokenizer(folder, path, **options), path),
        module=module,
        stack=stack,
    )


def _weight_files(folder: Path, path: Path) -> list[Path]:
    """The files that hold the weights.

    Raises:
        ModelError: one is missing.
    """
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{path}: {index.name} cannot be read; copy the model again") from None
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise ModelError(
                f"{path}: {len(missing)} of its {len(names)} files of weights are missing, such as"
                f" {missing[0]}; copy or download the model again"
            )
        return [folder / name for name in names]
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    if not files:
        raise ModelError(f"{path}: holds no weights; copy or download the model again")
    return files


def _layer_stack(module: Any, path: Path) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder layers, found by structure.

    The outermost ModuleList whose items are of one class and hold more than half of the parameters
    outside the embeddings.
    """
    tables = [each for each in module.modules() if isinstance(each, nn.Embedding)]
    if (head := module.get_output_embeddings()) is not None:
        tables.append(head)
    embeddings = {id(parameter) for table in tables for parameter in table.parameters()}

    def size(part: nn.Module) -> int:
        return sum(each.numel() for each in part.parameters() if id(each) not in embeddings)

    whole = size(module)
    seen: list[str] = []
    for name, part in module.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in seen)
        if nested or not isinstance(part, nn.ModuleList):
            continue
        seen.append(name)
        if len({type(layer) for layer in part}) == 1 and 2 * size(part) > whole:
            return name, part
    raise ModelError(
        f"{path}: no stack of equal layers that holds most of the model"
        f" ({type(module).__name__}); use a model with one list of decoder layers"
    )


# Reading


def _transformers() -> Any:
    """The transformers module, quiet and barred from the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers  # noqa: PLC0415 - takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _check_folder(folder: Path, path: Path) -> None:
    """Refuse, before anything large is read, what cannot be trained.

    ``folder`` is where the model is, ``path`` the name that its owner knows.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such folder; set model.path to a Hugging Face model folder")
    if not path.is_dir() and folder == path:
        raise ModelError(f"{path}: is neither a model folder nor a .gguf file")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")  # noqa: TRY004, TRY301 - as json.loads does
    except FileNotFoundError:
        raise ModelError(
            f"{path}: holds no config.json; set model.path to a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: its config.json cannot be read: {error}") from None
    if config.get("quantization_config"):
        raise ModelError(
            f"{path}: its weights are quantized, which cannot be trained in full;"
            " use the model's unquantized version"
        )
    _transformers()
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )

    architectures = config.get("architectures") or []
    # AutoModelForCausalLM would also read a BERT, with its attention to both sides.
    if config.get("is_encoder_decoder") or not set(architectures) & set(CAUSAL.values()):
        raise ModelError(
            f"{path}: {', '.join(map(str, architectures)) or 'a model of no named architecture'}"
            " is not a causal language model that transformers ships;"
            " use a decoder-only one, such as Llama, Qwen or Mistral"
        )


def _read_model(folder: Path, path: Path, **options: Any) -> Any:
    """The model on CPU; ``options`` go to ``from_pretrained``."""
    transformers = _transformers()
    again = "copy or download the model again"
    try:
        module, info = transformers.AutoModelForCausalLM.from_pretrained(  # nosec B615
            folder,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below in words of our own
            **options,
        )
    except Exception as error:  # noqa: BLE001 - it raises whatever its many readers raise
        raise ModelError(f"{path}: cannot be loaded ({_first_line(error)}); {again}") from None
    # Transformers fills what is missing or misshapen with random numbers.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path}: {len(missing)} of its tensors are missing, such as {missing[0]}; {again}"
        )
    if misshapen := sorted(key for key, *_ in info["mismatched_keys"]):
        raise ModelError(
            f"{path}: {len(misshapen)} of its tensors have other shapes than config.json says,"
            f" such as {misshapen[0]}; {again}"
        )
    return module


def _read_tokenizer(folder: Path, path: Path, **options: Any) -> Any:
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(  # nosec B615
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # noqa: BLE001 - as above
        reason = _first_line(error)
    else:
        if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            return tokenizer
        reason = "its vocabulary is empty"
    raise ModelError(
        f"{path}: has no usable tokenizer ({reason}); copy the model's tokenizer files into it"
    )


def _converted(path: Path, cache: Path) -> Path:
    """The folder that holds a GGUF file as fp32 safetensors, made on the first call.

    It is named by the file's content and shared by all nodes of this machine.
    """
    folder = _conversion(path, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert(path, folder)
    except OSError as error:
        raise _write_error(cache, error) from None
    return folder


def _conversion(path: Path, cache: Path) -> Path:
    """Where the conversion of a GGUF file is, or will be.

    Raises:
        ModelError: the file cannot be read, or what reads it is not installed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"{path}: reading GGUF needs the package {package}: pip install 'deca-node[gguf]'"
            )
    try:
        return cache / _content_digest(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


def _convert(path: Path, folder: Path) -> None:
    transformers = _transformers()
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # older releases know no other way than to unpack
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with redirect_stderr(io.StringIO()):  # a progress bar that heeds no setting of transformers
        module = _read_model(path.parent, path, dtype=torch.float32, gguf_file=path.name, **unpack)
    tokenizer = _read_tokenizer(path.parent, path, gguf_file=path.name)
    # They are plain fp32 weights now, but save_pretrained would still refuse a "quantized" model.
    module.hf_quantizer = None
    vars(module.config).pop("quantization_config", None)
    with _complete(folder) as place:
        module.save_pretrained(place)
        tokenizer.save_pretrained(place)


def _content_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _config_digest(config: Any) -> str:
    # Without the defaults of the base class, to which each release of transformers adds some.
    tree = _without_volatile(config.to_diff_dict())
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _without_volatile(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        str(key): _without_volatile(value)
        for key, value in tree.items()
        if key not in _VOLATILE and not str(key).startswith("_")
    }


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error)).strip(" :")


# Writing


@contextmanager
def _complete(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``folder`` once it is whole, and vanishes otherwise.

    Raises:
        DiskFullError: the disk is full.
        OutputError: it cannot be written for another reason.
    """
    place = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(place, ignore_errors=True)  # of a writer that was killed
        place.mkdir(parents=True)
        yield place
        for file in place.iterdir():
            file.chmod(place.stat().st_mode & 0o666)  # safetensors keeps its file to its writer
            with file.open("rb") as handle:
                os.fsync(handle.fileno())  # or a power cut could leave the new name on empty files
        place.rename(folder)
    except Exception as error:  # noqa: BLE001 - transformers, tokenizers, safetensors: each its own
        raise _write_error(folder, error) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write_error(folder: Path, error: Exception) -> DecaError:
    if is_full(error):
        return DiskFullError(f"{folder.parent}: no space left on this disk; free some and repeat")
    reason = getattr(error, "strerror", None) or _first_line(error)
    return OutputError(f"{folder}: cannot be written: {reason}")
