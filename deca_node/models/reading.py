"""Models and tokenizers from files.

The only file that imports transformers, and only inside functions: the import takes seconds.
Nothing here opens a network connection.
"""

import importlib.util
import io
import json
import os
import threading
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import filelock
import torch
import xxhash

from deca_node import memory
from deca_node.errors import ModelError, first_line
from deca_node.models.writing import write_error, written_whole

# Where a configuration was written and how it was read, not what the model computes.
_VOLATILE = frozenset({"transformers_version", "dtype", "torch_dtype", "use_cache"})
_READ_BYTES = 16 * 2**20

# transformers switches the process's default dtype and device while it loads.
_LOADING = threading.Lock()


def _transformers() -> Any:
    """The transformers module, quiet and barred from the network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers  # noqa: PLC0415 - takes seconds

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def check_folder(folder: Path, path: Path) -> None:
    """Refuse, before anything large is read, what cannot be trained.

    ``folder`` is where the model is, ``path`` the name that its owner knows.

    Raises:
        ModelError: it is missing, no model folder, quantized, or no causal language model.
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
            f"{path}: "
            f"{', '.join(map(str, architectures)) or 'a model that names no architecture'} is not "
            "a causal language model that transformers ships; use a decoder-only one, such as "
            "Llama, Qwen or Mistral"
        )


def weight_files(folder: Path, path: Path) -> list[Path]:
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


def read_model(folder: Path, path: Path, **options: Any) -> Any:
    """The model on CPU; ``options`` go to ``from_pretrained``.

    Raises:
        ModelError: it cannot be loaded, or tensors are missing or have other shapes.
    """
    transformers = _transformers()
    again = "copy or download the model again"
    # Unpacking a GGUF file shows a progress bar that heeds no setting of transformers.
    quiet = redirect_stderr(io.StringIO()) if "gguf_file" in options else nullcontext()
    try:
        with _LOADING, quiet:
            module, info = transformers.AutoModelForCausalLM.from_pretrained(  # nosec B615
                folder,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported, and refused below in words of our own
                **options,
            )
    except Exception as error:  # noqa: BLE001 - it raises whatever its many readers raise
        if memory.is_out(error):
            again = 'take a smaller model, or try model.dtype = "bf16"'
        raise ModelError(f"{path}: cannot be loaded ({first_line(error)}); {again}") from None
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


def read_architecture(
    file: Path, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> Any:
    """A model with random weights from its config.json.

    Raises:
        ModelError: as ``LanguageModel.untrained``.
    """
    transformers = _transformers()
    deepest = 0
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        name = tree.pop("model_type")
        kind = transformers.AutoConfig.for_model(name, **tree)
        if layers is not None:
            text = kind.get_text_config()
            deepest = int(text.num_hidden_layers)
            part = tree if text is kind else tree["text_config"]
            # GPT-2 calls it n_layer.
            part[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
            part.pop("layer_types", None)  # transformers lists them anew
            kind = transformers.AutoConfig.for_model(name, **tree)
        with _LOADING, device:
            module = transformers.AutoModelForCausalLM.from_config(kind, dtype=dtype)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001 - it raises whatever its many readers raise
        if memory.is_out(error):
            raise ModelError(
                f"{file}: does not fit into the memory of {device}; take fewer layers"
            ) from None
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"{file}: no configuration of a causal model ({reason})") from None
    if layers is not None and not 1 <= layers <= deepest:
        raise ModelError(f"{file}: has {deepest} layers, not {layers}")
    return module


def read_shapes(folder: Path, path: Path, **options: Any) -> tuple[Any, Any]:
    """The configuration, and the model without values, on torch's meta device.

    Raises:
        ModelError: they cannot be read.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(  # nosec B615
            folder, local_files_only=True, trust_remote_code=False, **options
        )
        with _LOADING, torch.device("meta"):
            return config, transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # noqa: BLE001 - it raises whatever its many readers raise
        raise ModelError(f"{path}: cannot be read ({first_line(error)})") from None


def read_tokenizer(folder: Path, path: Path, **options: Any) -> Any:
    """The tokenizer of transformers; ``options`` as for the model.

    Raises:
        ModelError: there is none that can be used.
    """
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(  # nosec B615
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # noqa: BLE001 - as above
        reason = first_line(error)
    else:
        if tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
            return tokenizer
        reason = "its vocabulary is empty"
    raise ModelError(
        f"{path}: has no usable tokenizer ({reason}); copy the model's tokenizer files into it"
    )


def converted(path: Path, cache: Path) -> Path:
    """The folder that holds a GGUF file as fp32 safetensors, made on the first call.

    It is named by the file's content and shared by all nodes of this machine.

    Raises:
        ModelError: the file cannot be read, or what reads it is not installed.
        DiskFullError: no room for what is made of it.
        OutputError: the cache folder cannot be written.
    """
    folder = conversion(path, cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _convert(path, folder)
    except OSError as error:
        raise write_error(cache, error) from None
    return folder


def conversion(path: Path, cache: Path) -> Path:
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
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; set model.path to a GGUF file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None


def _convert(path: Path, folder: Path) -> None:
    transformers = _transformers()
    unpack: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # older releases know no other way than to unpack
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    module = read_model(path.parent, path, dtype=torch.float32, gguf_file=path.name, **unpack)
    tokenizer = read_tokenizer(path.parent, path, gguf_file=path.name)
    # They are plain fp32 weights now, but save_pretrained would still refuse a "quantized" model.
    module.hf_quantizer = None
    vars(module.config).pop("quantization_config", None)
    with written_whole(folder) as place:
        module.save_pretrained(place)
        tokenizer.save_pretrained(place)


def _content_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def config_digest(config: Any) -> str:
    """xxh3_128 of what defines the architecture."""
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
