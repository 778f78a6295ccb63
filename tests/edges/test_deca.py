"""The DECA method on real tiny models: against the oracle, in all precisions, past a NaN."""

import math
import random

import numpy as np
import pytest
import torch

from deca_node import trainer, wire
from deca_node.batches import Example, collate
from deca_node.blocks import Visit
from deca_node.config import ModelSettings
from deca_node.methods import deca
from deca_node.methods.deca import Deca
from deca_node.mixing import metropolis_hastings
from deca_node.models import LanguageModel
from deca_node.moments import Rule
from deca_node.wire import CHUNK_ELEMENTS, Receiver
from tests import oracle
from tests.tiny import make_model

NODES, STEPS = 3, 4
VISIT = Visit(0, 0, 0, 0, range(1, 3))
NAMES = [f"n{i}" for i in range(NODES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("deca") / "model", "llama")


def load(folder, dtype="fp32"):
    return LanguageModel.load(ModelSettings(path=folder, dtype=dtype), torch.device("cpu"))


def batch(node, step):
    ids = [(7 * node + 3 * step + i) % 200 + 10 for i in range(12)]
    return collate([Example(ids, [i > 5 for i in range(12)])], 0)


def exchange(methods, serial):
    """Publish, and mix what every receiver accepts of everybody else (a full graph)."""
    published = {name: m.outgoing(serial) for name, m in methods.items()}
    row = metropolis_hastings(NODES - 1, dict.fromkeys(NAMES[1:], NODES - 1))
    weight = row[NAMES[1]]
    for name, method in methods.items():
        for peer in NAMES:
            if peer != name:
                receiver = Receiver(method.layout, serial, "run", peer)
                for message in published[peer].messages:
                    arrived = receiver.feed(message)
                    if arrived is not None:
                        method.mix(*arrived, weight)
                assert receiver.complete


@pytest.mark.parametrize("bma", ["on", "off", "trivial"])
@pytest.mark.parametrize("discrepancy", ["l2", "none", "lr", "zero"])
def test_a_visit_equals_the_oracle(folder, bma, discrepancy):
    """Gradient, half-step, messages, mix and fold of three nodes give the paper's numbers."""
    constants = {
        "learning_rate": 1e-3,
        "adam_eps": 1e-4,  # at 1e-8 a gradient that is mere rounding decides a whole step
        "bma": bma,
        "discrepancy": discrepancy,
    }
    methods = {name: Deca(load(folder), Rule(**constants), "run", name) for name in NAMES}
    for method in methods.values():
        method.open(VISIT, None)
    first = next(iter(methods.values())).state()["x"].double().numpy().copy()
    for step in range(STEPS):
        for node, method in enumerate(methods.values()):
            method.gradient(batch(node, step))
            method.advance(step)
        exchange(methods, step)
        for method in methods.values():
            settled = method.settle(step)
            assert settled.disagreement > 0
            if discrepancy in ("l2", "zero") or bma == "off":
                none = discrepancy == "zero" or bma == "off"
                assert settled.h_norm == pytest.approx(0 if none else 1)

    judge = load(folder)

    def gradient(client, _round, _position, step, blocks, _active):
        block = judge.activate(VISIT.layers)
        block.master.copy_(torch.from_numpy(blocks[0]))
        trainer.gradient(judge, block, batch(client, step))
        values = torch.cat([part.flatten() for _, part in block.gradients()]).double().numpy()
        block.drop_gradients()
        return values

    expected = oracle.run(
        [first],
        gradient,
        ~np.eye(NODES, dtype=bool),
        rounds=1,
        steps=STEPS,
        settings=oracle.Settings(**constants),
    )
    for client, method in zip(expected, methods.values(), strict=True):
        state = method.state()
        np.testing.assert_allclose(state["x"], client.blocks[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(state["m"], client.m, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_weights_have_a_full_precision_master(folder, dtype):
    """The exchange and the master are fp32; the model holds the rounded values after each step."""
    model = load(folder, dtype)
    method = Deca(model, Rule(1e-3), "run", "n0")
    method.open(VISIT, None)
    before = method.state()["x"].clone()
    method.gradient(batch(0, 0))
    method.advance(0)
    snapshot = method.outgoing(0)
    sent = torch.cat([snapshot.values(i) for i in range(len(snapshot.messages) - 1)])
    method.settle(0)
    master = method.state()["x"]
    assert torch.equal(sent, master)
    assert master.dtype == torch.float32
    assert not torch.equal(before, master)
    held = torch.cat([t.flatten() for t in model.block_tensors(VISIT.layers).values()])
    assert torch.equal(held, master.to(held.dtype))


def test_what_is_sent_while_updating_is_what_is_sent_after_it(folder, monkeypatch):
    """Byte for byte; each message is there once the update has passed its last element."""
    for module in (wire, deca):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    early, after = (Deca(load(folder), Rule(1e-3), "run", "n0") for _ in range(2))
    seen = []
    for method in (early, after):
        method.open(VISIT, None)
        method.gradient(batch(0, 0))
    promised = early.promise(7)
    assert len(promised.messages) == 1
    update = early._update

    def watched(part, *arguments):
        seen.append((part.start, len(promised.messages) - 1))
        update(part, *arguments)

    early._update = watched
    early.advance(0)
    after.advance(0)
    assert promised.messages == after.outgoing(7).messages
    assert promised.covers(early.layout.numel)
    assert [made for _, made in seen] == [begin // 1000 for begin, _ in seen]
    assert len(seen) >= promised.count - 1 > 2
    assert early.settle(0) == after.settle(0)
    assert torch.equal(early.state()["m"], after.state()["m"])


def test_late_mixing_and_no_overlap_promise_nothing(folder):
    """The one still needs the snapshot before, the other is told not to."""
    for how in ({"stale": True}, {"overlap": False}):
        method = Deca(load(folder), Rule(1e-3), "run", "n0", **how)
        method.open(VISIT, None)
        assert method.promise(0) is None


def test_a_gradient_that_is_no_number_reaches_nobody(folder):
    """It counts as zero: the moments decay, the block stays finite, the next step is normal."""
    method = Deca(load(folder), Rule(1e-3, bma="off"), "run", "n0")
    method.open(VISIT, None)
    method.gradient(batch(0, 0))
    method.advance(0)
    method.settle(0)
    m = method.state()["m"].clone()
    local = method.gradient(batch(0, 1))
    for _, gradient in method._active.gradients():
        gradient.fill_(float("nan"))
    method._finite = False
    method.advance(1)
    method.settle(1)
    state = method.state()
    assert math.isfinite(local.loss)
    torch.testing.assert_close(state["m"], 0.9 * m)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert not any(bool(g.any()) for _, g in method._active.gradients())


def test_a_visit_continues_from_its_saved_state(folder):
    """Two steps, save, two steps more in another process's place: the same as four."""

    def steps(method, numbers):
        for step in numbers:
            method.gradient(batch(0, step))
            method.advance(step)
            method.settle(step)

    whole = Deca(load(folder), Rule(1e-3), "run", "n0")
    whole.open(VISIT, None)
    steps(whole, range(4))
    first = Deca(load(folder), Rule(1e-3), "run", "n0")
    first.open(VISIT, None)
    steps(first, range(2))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    second = Deca(load(folder), Rule(1e-3), "run", "n0")
    second.open(VISIT, saved)
    steps(second, range(2, 4))
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name])


def test_working_ahead_changes_no_number(folder):
    """Bit for bit; what was computed for another batch, or given up, is not used."""

    def go(method, ahead):
        method.open(VISIT, None)
        for step in range(4):
            here = getattr(method, "next", None) or batch(0, step)
            method.next = None
            local = method.gradient(here)
            method.advance(step)
            ahead(method, step)
            yield local, method.settle(step)
        yield {name: tensor.clone() for name, tensor in method.state().items()}

    def coming(method, step):
        method.next = batch(0, step + 1)
        method.ahead(method.next, lambda: False)
        assert method._prefix.depth == 1

    def another(method, step):
        method.ahead(batch(0, step), lambda: False)

    def given_up(method, step):
        method.next = batch(0, step + 1)
        method.ahead(method.next, lambda: True)
        assert method._prefix is None

    *whole, state = go(Deca(load(folder), Rule(1e-3), "run", "n0"), lambda *_: None)
    for ahead in (coming, another, given_up):
        *steps, ended = go(Deca(load(folder), Rule(1e-3), "run", "n0"), ahead)
        assert steps == whole
        assert all(torch.equal(ended[name], state[name]) for name in state)


def test_mixing_a_step_late_equals_its_equation(folder):
    """x_{r+1} = x½_r + ½ (W − I) x½_{r−1}; the mean is that of the local updates; none is lost."""
    methods = {name: Deca(load(folder), Rule(1e-3), "run", name, stale=True) for name in NAMES}
    for method in methods.values():
        method.open(VISIT, None)
    laplacian = np.full((NODES, NODES), 1 / NODES) - np.eye(NODES)
    before = None

    def values():
        return np.stack([method.state()["x"].double().numpy() for method in methods.values()])

    for step in range(STEPS):
        for node, method in enumerate(methods.values()):
            method.gradient(batch(node, step))
            method.advance(step)
        half = values()
        exchange(methods, step)  # publishing takes in what came for the step before
        expected = half if before is None else half + 0.5 * laplacian @ before
        np.testing.assert_allclose(values(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(values().mean(0), half.mean(0), rtol=0, atol=1e-6)
        for method in methods.values():
            settled = method.settle(step)
            assert (settled.disagreement > 0) == (step > 0)
        before = half
    expected = values() + 0.5 * laplacian @ before
    for method, row in zip(methods.values(), expected, strict=True):
        model, names = method._model, [spec.name for spec in method.layout.tensors]
        method.absorb()
        method.close()
        tensors = model.block_tensors(VISIT.layers)
        ended = torch.cat([tensors[name].flatten() for name in names])
        np.testing.assert_allclose(ended.double().numpy(), row, rtol=0, atol=1e-6)


class Sharing:
    """A model of which a pass that goes on from a prefix is told to be, or to do, something."""

    def __init__(self, model, answer):
        self.model, self.answer = model, answer

    def __getattr__(self, name):
        return getattr(self.model, name)

    def resumes_exactly(self, prefix):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("answer", [False, KeyError("sliding_attention")])
def test_a_model_that_cannot_resume_trains_all_the_same(folder, answer):
    """Said once; nothing is worked ahead from then on."""
    method = Deca(Sharing(load(folder), answer), Rule(1e-3), "run", "n0")
    method.open(VISIT, None)
    whole = Deca(load(folder), Rule(1e-3), "run", "n0")
    whole.open(VISIT, None)
    here = batch(0, 0)
    method.ahead(here, lambda: False)
    assert method._prefix is not None
    assert method.gradient(here) == whole.gradient(here)
    method.ahead(here, lambda: False)
    assert method._prefix is None


def test_a_batch_that_cannot_tell_decides_nothing(folder):
    """Neither for nor against working ahead."""
    method = Deca(load(folder), Rule(1e-3), "run", "n0")
    method.open(VISIT, None)
    nothing = batch(0, 0)
    nothing.labels.fill_(-100)
    method.ahead(nothing, lambda: False)
    method.gradient(nothing)
    assert not method._exact
    here = batch(0, 1)
    method.ahead(here, lambda: False)
    method.gradient(here)
    assert method._exact == {1}


def test_nothing_is_below_the_first_block(folder):
    """There the overlap has nothing to compute; nor where it is switched off."""
    for layers, overlap in ((range(2), True), (range(1, 3), False)):
        method = Deca(load(folder), Rule(1e-3), "run", "n0", overlap=overlap)
        method.open(Visit(0, 0, 0, 0, layers), None)
        method.ahead(batch(0, 0), lambda: False)
        assert method._prefix is None


def test_arrivals_in_any_chunk_size_mix_the_same(folder):
    """Values may straddle our own messages' borders."""
    results = []
    for size in (CHUNK_ELEMENTS, 1000, 7777):
        method = Deca(load(folder), Rule(1e-3), "run", "n0")
        method.open(VISIT, None)
        method.gradient(batch(0, 0))
        method.advance(0)
        method.outgoing(0)
        values = torch.linspace(-1, 1, method.layout.numel)
        for low in range(0, values.numel(), size):
            method.mix(low, values[low : low + size], 0.25)
        results.append(method.state()["x"].clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("size", [CHUNK_ELEMENTS, 1000])
def test_each_neighbour_is_mixed_against_what_was_published(folder, size):
    """And not against what the one before it has left, in this step and in the next."""
    method = Deca(load(folder), Rule(1e-3), "run", "n0")
    method.open(VISIT, None)
    for step in range(2):
        method.gradient(batch(0, step))
        method.advance(step)
        half = method.outgoing(step).values(0).clone()
        assert half.numel() == method.layout.numel, "the block is one message"
        arrivals = torch.rand(2, half.numel(), generator=torch.Generator().manual_seed(step))
        expected = half.clone()
        for values, weight in zip(arrivals, (0.25, 0.5), strict=True):
            expected += (values - half) * weight
            for low in range(0, half.numel(), size):
                method.mix(low, values[low : low + size], weight)
        assert torch.equal(method.state()["x"], expected)
        method.settle(step)


@pytest.mark.parametrize("promised", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_neighbours_in_any_order_that_break_off_anywhere(folder, monkeypatch, seed, promised):
    """Arrivals of three, each in its own pieces across messages' borders: none sees another's."""
    for module in (wire, deca):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1000)
    rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
    method = Deca(load(folder), Rule(1e-3), "run", "n0")
    method.open(VISIT, None)
    for step in range(2):
        method.gradient(batch(0, step))
        if promised:
            assert method.promise(step) is not None
        method.advance(step)
        half = method.state()["x"].clone()
        if not promised:
            method.outgoing(step)
        expected = half.clone()
        come = dict.fromkeys([0.125, 0.25, 0.375], 0)  # by the neighbours' weights
        while come:
            weight = rng.choice(list(come))
            low, high = come[weight], min(come[weight] + rng.randrange(1, 5000), half.numel())
            values = torch.rand(high - low, generator=source)
            expected[low:high] += (values - half[low:high]) * weight
            method.mix(low, values, weight)
            come[weight] = high
            if high == half.numel() or rng.random() < 0.08:
                del come[weight]
        assert torch.equal(method.state()["x"], expected)
        method.settle(step)
