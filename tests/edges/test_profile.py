"""What a step costs: counted memory against what must be there, extrapolation, refusals."""

import json

import pytest
import torch

from deca_node import profile
from deca_node.cli import main
from deca_node.profile import Cost, Plan, architecture, depth, full_depth, measure

META = torch.device("meta")
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def deca_node(*words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


def test_the_meter_counts_what_lives_and_remembers_the_most():
    """Views count once, what is gone does not count, what was there before does."""
    module = torch.nn.Linear(10, 10, bias=False)
    with profile._Meter(torch.device("cpu"), module) as meter:
        assert meter.peak() == 400
        kept = torch.ones(100)
        assert kept.view(10, 10).sum() == 100
        gone = torch.ones(1000) + 1
        del gone
        assert meter.peak() >= 400 + 400 + 8000 - 4000  # one of the two is needed at a time
        assert meter.peak() == 400 + 400
        module.weight.data = torch.zeros(1, 1)
        assert meter.peak() == 400 + 400 + 4  # before the old one was let go
        assert meter.peak() == 400 + 4


@pytest.mark.parametrize(
    "name",
    [
        "llama-3.1-8b",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen2-1.5b", "qwen2.5-3b", "llama-2-7b")
        ),
    ],
)
def test_a_deca_step_keeps_to_the_memory_that_is_promised(name):
    """M + 8M/B without activations, 8 billion parameters in 24 GB with them.

    Full-size, batch 1 × 512 tokens, checkpointing; counted on tensors without values.
    """
    plan = Plan(
        architecture(name),
        META,
        "bf16",
        methods=("deca",),
        tokens=512,
        learned=511,
        checkpointing=True,
    )
    (cost,) = measure(plan)
    model, blocks = cost.weights, depth(plan.model)
    assert cost.update_peak <= model + 8 * model / blocks
    # Later in the step the gradient is gone and the snapshot is there: master, moments, snapshot.
    assert model + 12 * cost.trained + cost.host <= model + 8 * model / blocks
    assert cost.gradient_peak < 24e9
    assert cost.gradient_peak > cost.update_peak - 2 * cost.trained


def test_costs_of_all_layers_follow_from_two_numbers_of_them(small):
    """Memory and sizes that were extrapolated are those that are counted."""
    methods = ("deca", "dec-adapter", "dadam")
    plan = Plan(small, META, "bf16", methods=methods, tokens=64, learned=63)
    less, more, whole = (
        measure(Plan(**{**plan.__dict__, "layers": number})) for number in (2, 4, None)
    )
    for found, counted in zip(full_depth(less, more, (2, 4), 8), whole, strict=True):
        assert found.method == counted.method
        for key in ("trained", "weights", "host", "gradient_peak", "update_peak"):
            assert getattr(found, key) == pytest.approx(getattr(counted, key), rel=0.02), key


def test_a_line_through_two_costs():
    """Each value goes on as it went from the first to the second."""
    one = Cost("deca", 1.0, 2.0, 3.0, 0.1, 10, 20, 30, 40, 50, 60)
    two = Cost("deca", 2.0, 4.0, 3.0, 0.1, 10, 20, 50, 60, 50, 60)
    (found,) = full_depth([one], [two], (2, 4), 32)
    assert (found.forward, found.backward, found.update) == (16.0, 32.0, 3.0)
    assert (found.trained, found.weights) == (10, 330)


def test_all_methods_are_measured_side_by_side(small, tmp_path, capsys):
    """On the CPU, as the verb does it: every time above 0, every size as the layout says."""
    pytest.importorskip("peft", reason="the extra [lora] is not installed")
    words = ["--device", "cpu", "--dtype", "fp32", "--tokens", 16, "--steps", 2]
    words += ["--set", "lora.rank=2"]
    code = deca_node("profile", "--model-config", small, *words, "--json", "--to", tmp_path / "out")
    assert code == 0
    tree = json.loads(capsys.readouterr().out)
    (rows,) = tree["costs"].values()
    assert [row["method"] for row in rows] == list(profile.METHODS)
    for row in rows:
        assert min(row["forward"], row["backward"], row["update"]) > 0
        assert row["step"] == pytest.approx(row["forward"] + row["backward"] + row["update"])
        assert 4 * row["trained"] < row["sent"] < 4 * row["trained"] + 20_000
        assert row["gradient_peak"] > row["weights"]
    sizes = {row["method"]: row["trained"] for row in rows}
    assert sizes["dadam"] == 8 * sizes["deca"]
    assert json.loads((tmp_path / "out" / "profile.json").read_text()) == tree
    assert "| dec-adapter |" in (tmp_path / "out" / "profile.md").read_text()


def test_fewer_layers_are_said_to_be_extrapolated(small, capsys):
    """Three tables, and the last one's title says what it is."""
    words = ["--device", "meta", "--layers", "4", "--method", "deca", "--tokens", "16"]
    assert deca_node("profile", "--model-config", small, *words) == 0
    shown = capsys.readouterr().out
    assert "2 of 8 layers" in shown
    assert "4 of 8 layers" in shown
    assert "NOT MEASURED" in shown


GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 100,
}
EYES = {  # smaller than two layers of the rest
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**SMALL, "model_type": "gemma3_text", "head_dim": 8, "num_hidden_layers": 4}
GEMMA3 = {"model_type": "gemma3", "text_config": TEXT, "vision_config": EYES}


@pytest.mark.parametrize("tree", [GPT2, GEMMA3])
def test_architectures_with_other_names_for_sizes_are_measured(tmp_path, tree):
    """GPT-2 has names of its own, Gemma 3 those of its language model in a part."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    assert depth(path) == 4
    costs = measure(Plan(path, META, "fp32", ("deca", "dec-adapter"), tokens=16, layers=2))
    assert all(cost.trained > 0 for cost in costs)


def test_more_tokens_than_positions_are_refused(tmp_path, capsys):
    """Where each position has a row in a table."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    words = ("profile", "--model-config", path, "--device", "meta", "--method", "deca", "--tokens")
    assert deca_node(*words, 300) == 2
    assert "--tokens 300: config can take 128 tokens in a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--model-config", "gone.json"], 2, "no such file; give a config.json"),
        (["--model-config", "llama-2-7b", "--method", "adam"], 2, "no such method; there are deca"),
        (
            ["--model-config", "llama-2-7b", "--device", "meta", "--layers", "99"],
            5,
            "has 32 layers",
        ),
        (["--model-config", "SMALL", "--device", "cuda:77"], 7, "CUDA devices"),
        (["--model-config", "SMALL", "--device", "cpu", "--dtype", "fp8"], 2, "--dtype fp8"),
        (["--model-config", "SMALL", "--device", "meta", "--set", "lora.rank=99"], 2, "lora.rank"),
        (["--model-config", "SMALL", "--device", "meta", "--set", "lora.rnk=9"], 2, "lora.rank"),
        (
            ["--model-config", "SMALL", "-m", "deca", "--device", "meta", "--set", "lora.rank=9"],
            2,
            "--set lora.rank: none of deca has this setting",
        ),
        (["--model-config", "BROKEN", "--device", "meta"], 5, "no configuration"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(small, tmp_path, capsys, words, code, said):
    """With the exit code of its kind."""
    broken = tmp_path / "broken.json"
    broken.write_text('{"model_type": "no-such-model", "num_hidden_layers": 2}')
    places = {"SMALL": str(small), "BROKEN": str(broken)}
    assert deca_node("profile", *(places.get(word, word) for word in words)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
