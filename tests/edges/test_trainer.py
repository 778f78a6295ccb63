"""trainer.py: the gradient of equation (3), and where autograd goes to get it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from deca_node.batches import Batch, Example, collate
from deca_node.config import ModelSettings
from deca_node.models import FP16_LOSS_SCALE, ActiveBlock, LanguageModel
from deca_node.trainer import gradient
from tests.tiny import make_model

BATCH = collate(
    [
        Example([1, 80, 90, 100, 110, 120], [False] * 3 + [True] * 3),
        Example([1, 85, 95, 105], [False] * 3 + [True]),
    ],
    pad_id=0,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("trainer") / "llama")


def load(folder: Path, dtype: str = "fp32", checkpointing: bool = False) -> LanguageModel:
    settings = ModelSettings(path=folder, dtype=dtype, gradient_checkpointing=checkpointing)
    return LanguageModel.load(settings, torch.device("cpu"))


def flat(block: ActiveBlock) -> torch.Tensor:
    return torch.cat([part.float() for _, part in block.gradients()])


def test_it_is_the_gradient_of_the_block(folder: Path) -> None:
    """The same as from autograd over the whole model; repeated calls replace, never add."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss = whole(
        input_ids=BATCH.input_ids, attention_mask=BATCH.attention_mask, labels=BATCH.labels
    ).loss
    loss.backward()
    model = load(folder)
    block = model.activate(range(1, 3))
    names = dict(whole.named_parameters())
    expected = torch.cat([names[spec.name].grad.reshape(-1) for spec in block.layout.tensors])

    first = gradient(model, block, BATCH)
    assert first == gradient(model, block, BATCH)
    torch.testing.assert_close(flat(block), expected, rtol=1e-5, atol=1e-6)
    assert first[0] == pytest.approx(loss.item(), rel=1e-5)
    assert first[1] == pytest.approx(expected.norm().item(), rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autograd_stays_between_the_loss_and_the_block(folder: Path, checkpointing: bool) -> None:
    """No graph below the block; above it gradients pass through and none is kept."""
    model = load(folder, checkpointing=checkpointing)
    block = model.activate(range(2, 3))
    builds_graph: dict[int, tuple[bool, bool]] = {}
    for index, layer in enumerate(model.module.model.layers):

        def watch(_: Any, args: Any, output: torch.Tensor, index: int = index) -> None:
            builds_graph[index] = args[0].requires_grad, output.requires_grad

        layer.register_forward_hook(watch)
    gradient(model, block, BATCH)
    assert builds_graph == {
        0: (False, False),
        1: (False, False),
        2: (False, True),
        3: (True, True),
    }
    kept = {n for n, p in model.module.named_parameters() if p.grad is not None}
    assert kept == {spec.name for spec in block.layout.tensors}


def test_no_step_leaves_anything_behind_when_dropped(folder: Path) -> None:
    model = load(folder)
    block = model.activate(range(1))
    gradient(model, block, BATCH)
    block.drop_gradients()
    assert all(parameter.grad is None for parameter in model.module.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [("bf16", 0.05), ("fp16", 0.01)])
def test_low_precision_comes_close(folder: Path, dtype: str, tolerance: float) -> None:
    """The loss scale of fp16 is undone in the gradients and in their norm."""
    exact = load(folder)
    exact_block = exact.activate(range(1, 2))
    loss, norm = gradient(exact, exact_block, BATCH)
    model = load(folder, dtype)
    block = model.activate(range(1, 2))
    assert block.loss_scale == (FP16_LOSS_SCALE if dtype == "fp16" else 1)
    near = gradient(model, block, BATCH)
    assert near == pytest.approx((loss, norm), rel=tolerance)
    error = flat(block) - flat(exact_block)
    assert error.norm() < tolerance * norm


def test_small_fp16_gradients_survive(folder: Path) -> None:
    """Values below fp16's smallest, 6e-8, are gradients and not zeros."""
    block = load(folder, "fp16").activate(range(1))
    for _, parameter in block._parameters:
        parameter.grad = torch.full_like(parameter, 1e-8 * FP16_LOSS_SCALE)
    torch.testing.assert_close(
        flat(block), torch.full((block.layout.numel,), 1e-8), rtol=0.01, atol=0
    )


def test_a_broken_model_gives_a_number_and_no_exception(folder: Path) -> None:
    """NaN or infinity come back for the caller to see."""
    model = load(folder)
    block = model.activate(range(1))
    block.master[0] = math.inf
    loss, norm = gradient(model, block, BATCH)
    assert not math.isfinite(loss)
    assert not math.isfinite(norm)


def test_a_batch_that_teaches_nothing(folder: Path) -> None:
    model = load(folder)
    nothing = Batch(BATCH.input_ids, BATCH.attention_mask, torch.full_like(BATCH.labels, -100))
    loss, norm = gradient(model, model.activate(range(1)), nothing)
    assert math.isnan(loss)
    assert not norm > 0
