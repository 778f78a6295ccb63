"""The laboratory's verbs beside simulate and report: what methods cost, what models answer.

cli.py registers them. torch is imported by the verbs, so that ``--help`` answers at once.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from deca_node import status
from deca_node.errors import ConfigError

# Of --layers, for costs at full depth: with the half of it there are two points of a line.
_LEAST_LAYERS = 2


def profile(
    model_config: Annotated[
        str,
        typer.Option(
            "--model-config",
            metavar="PATH|NAME",
            help="config.json of an architecture, a folder that has one, or smollm2-135m,"
            " qwen2-1.5b, qwen2.5-3b, llama-2-7b, llama-3.1-8b.",
        ),
    ],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A method; may be repeated; default: all."),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps; meta counts memory alone."),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Precision of the weights: auto, bf16, fp16, fp32.")
    ] = "auto",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Examples per step.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each example.")] = 512,
    learned: Annotated[
        int | None,
        typer.Option("--learned", min=1, help="Tokens of each example in the loss; default: all."),
    ] = None,
    neighbours: Annotated[
        int, typer.Option("--neighbours", min=0, help="Neighbours whose blocks are mixed in.")
    ] = 2,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of each block.")] = 5,
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            min=_LEAST_LAYERS,
            help="Measure this many layers and half as many; costs of all are extrapolated.",
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    threads: Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0: all.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="A setting, for the methods that have it."
        ),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Folder for profile.json and profile.md.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON for scripts.")] = False,
) -> None:
    """Measure a step of each method side by side, on an architecture with random weights."""
    import torch  # noqa: PLC0415 - takes seconds

    from deca_node import profile as room  # noqa: PLC0415 - imports torch
    from deca_node.models import DTYPES, pick_device, pick_dtype  # noqa: PLC0415

    where = torch.device("meta") if device == "meta" else pick_device(device)
    precision = "bf16" if device == "meta" and dtype == "auto" else pick_dtype(dtype, where)
    if precision not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: give auto, {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    plan = room.Plan(
        model=room.architecture(model_config),
        device=where,
        dtype=precision,
        methods=tuple(method or room.METHODS),
        batch=batch,
        tokens=tokens,
        learned=min(learned or tokens - 1, tokens - 1),
        neighbours=neighbours,
        steps=steps,
        layers=layers,
        checkpointing=checkpointing,
        overrides=tuple(settings or ()),
    )
    with status.make_console().status("") as shown:  # draws on a terminal only
        parts = room.measure_depths(plan, lambda what: shown.update(f"measuring {what}"))
    tree = room.as_json(plan, parts)
    if to is not None:
        room.write(to, tree, room.markdown(parts))
    typer.echo(json.dumps(tree) if as_json else room.markdown(parts), nl=as_json)


def answer(
    model: Annotated[Path, typer.Option("--model", help="An exported model, or any folder.")],
    questions: Annotated[
        Path, typer.Option("--questions", help="JSON Lines of question_id and turns.")
    ],
    to: Annotated[Path, typer.Option("--to", help="File of answers, created or continued.")],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            help="model_id of the answers; default: the folder's name or, if that is model, its"
            " parent's.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N, mps.")] = "auto",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")
    ] = 512,
) -> None:
    """Let a model answer questions, for judges that read MT-Bench's files.

    The same command continues what was interrupted.
    """
    from deca_node import answers  # noqa: PLC0415 - imports torch

    with status.make_console().status("") as shown:  # draws on a terminal only
        added = answers.write(
            model,
            questions,
            to,
            name=name,
            device=device,
            max_tokens=max_tokens,
            tell=shown.update,
        )
    typer.echo(f"wrote {added} answers to {to}")
