"""What is known of a model without reading its weights."""

from dataclasses import dataclass
from typing import Any

from deca_node import sizes
from deca_node.config import ModelSettings
from deca_node.estimate import Shape
from deca_node.models.layers import layer_stack
from deca_node.models.reading import (
    check_folder,
    config_digest,
    conversion,
    read_shapes,
    read_tokenizer,
    weight_files,
)
from deca_node.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Outline:
    """What is known of a model without reading its weights.

    Attributes:
        architecture: the model's class.
        shape: its sizes.
        config_digest: as ``LanguageModel.config_digest``; None for a GGUF file that was not
            converted yet.
        tokenizer_digest: as ``Tokenizer.digest``; None likewise, as its conversion may tell more.
        weight_bytes: of its files of weights.
        to_convert: it is a GGUF file that was not converted yet.
        tokenizer: the model's.
        module: the model without values, on torch's meta device.
        stack: its layer stack's name.
    """

    architecture: str
    shape: Shape
    config_digest: str | None
    tokenizer_digest: str | None
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
        folder = conversion(path, settings.cache)
        if not folder.is_dir():
            folder, options = path.parent, {"gguf_file": path.name}
    if not options:
        check_folder(folder, path)
    config, module = read_shapes(folder, path, **options)
    files = [path] if options else weight_files(folder, path)
    stack, layers = layer_stack(module, path)
    tokenizer = Tokenizer(read_tokenizer(folder, path, **options), path)
    text, hidden = sizes.text_config(module), sizes.hidden(module)
    return Outline(
        architecture=type(module).__name__,
        shape=Shape(
            parameters=sum(each.numel() for each in module.parameters()),
            layers=tuple(sum(each.numel() for each in layer.parameters()) for layer in layers),
            hidden=hidden,
            inner=int(getattr(text, "intermediate_size", None) or 4 * hidden),
            heads=int(getattr(text, "num_attention_heads", None) or 1),
            vocabulary=sizes.vocabulary(module),
            eager=getattr(text, "_attn_implementation", "") == "eager",
        ),
        config_digest=None if options else config_digest(config),
        tokenizer_digest=None if options else tokenizer.digest(),
        weight_bytes=sum(file.stat().st_size for file in files),
        to_convert=bool(options),
        tokenizer=tokenizer,
        module=module,
        stack=stack,
    )
