"""Models of the family: their published counts, decoding, a step; the knobs as a person types them."""

from dataclasses import replace

import pytest
import torch

from dev.bench_memory import join_phases, trace_step
from nanochat.common import UserError
from nanochat.config import GPTConfig, count_params, estimate_flops
from nanochat.engine import Engine
from nanochat.memory import Machine, predict_memory
from nanochat.presets import KNOBS, PRESETS, find_preset, parse_knobs
from nanochat.train import train_step
from tests.helpers import BYTE_TOKENIZER, CONFIG, make_batch, make_model, make_prompt


def make_config(name: str) -> GPTConfig:
    """The preset's model at toy size."""
    preset = PRESETS[name]
    small = {"attn_dim": 128, "mlp_dim": 96} if preset.knobs.get("attn_dim") else {}
    if "marin" in name:
        small["backout_layer"] = 1
    pattern = preset.shape.get("window_pattern", CONFIG.window_pattern)
    return replace(CONFIG, **preset.knobs | small, window_pattern=pattern)


# marin's speedrun table: parameters without the lambdas, and forward FLOPs a token by its own formula
@pytest.mark.parametrize(("name", "num_params", "forward_flops"), [
    ("marin-150m", 150_208_512, 194_396_160), ("marin-270m", 274_857_984, 422_326_272),
    ("marin-460m", 463_994_880, 800_325_632)])
def test_sizes_of_marin(name, num_params, forward_flops):
    preset = find_preset(name)
    config = GPTConfig(vocab_size=128_256, **preset.shape, **preset.knobs)
    counts = count_params(config)
    assert counts["total"] - counts["scalars"] == num_params
    # Its formula counts the whole square of scores and the softmax; ours the products alone, three times for training
    softmax = 3 * config.sequence_len * config.n_head * config.n_layer
    assert estimate_flops(config) == 3 * (forward_flops - softmax)


def test_size_of_arcadium():
    preset = find_preset("arcadium-200m")
    config = GPTConfig(vocab_size=50_257, **preset.shape, **preset.knobs)
    counts = count_params(config)
    assert counts["wte"] + counts["lm_head"] == 2 * 50_304 * 512 and counts["scalars"] == 0
    assert counts["transformer_matrices"] == 16 * (4 * 512 * 4096 + 3 * 512 * 2048)


@pytest.mark.parametrize("name", PRESETS)
def test_decoding_equals_the_whole_forward_pass(name):
    model = make_model(make_config(name), torch.float64)
    prompt = make_prompt(20)
    expected = prompt + list(model.generate(prompt, 30, temperature=0))
    rows, _ = Engine(model, BYTE_TOKENIZER).generate_batch(prompt, 2, max_tokens=30, temperature=0)
    assert rows == [expected[:len(rows[0])]] * 2 and len(rows[0]) > 30    # an answer ends with its end token


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_trains_every_parameter_of_a_preset(name):
    model = make_model(make_config(name), torch.float32, as_initialised=True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = model.setup_optimizer()
    losses = [train_step(model, optimizer, make_batch(0), 4).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    assert [name for name, param in model.named_parameters() if torch.equal(param, before[name])] == []


def test_knobs_as_typed():
    assert parse_knobs(["smear=off", "backout_layer=none", "resid_init=1,1.1", "x0_init=none", "softcap=0",
                        "mlp_act=swiglu", "attn_dim=96"]) == {
        "smear": False, "backout_layer": None, "resid_init": (1.0, 1.1), "x0_init": None, "softcap": 0.0,
        "mlp_act": "swiglu", "attn_dim": 96}
    assert "rope_base" in KNOBS and "n_embd" not in KNOBS


@pytest.mark.parametrize(("words", "message"), [
    (["smaer=off"], "there is no knob 'smaer'; choose from window_fraction, attn_dim"),
    (["smear=maybe"], "smear must be on or off"), (["resid_init=1"], "resid_init must be two numbers"),
    (["softcap=high"], "softcap must be a number"), (["smear=on", "smear=off"], "names smear twice")])
def test_wrong_knobs_are_named(words, message):
    with pytest.raises(UserError, match=message):
        parse_knobs(words)


@pytest.mark.parametrize(("knobs", "message"), [
    ({"mlp_act": "gelu"}, "mlp_act=gelu is not one of relu2, swiglu"),
    ({"rope_fraction": 0.0}, "above 0 and at most 1"), ({"backout_layer": 4}, "is no layer of 4"),
    ({"linear_init": "zero"}, "not one of uniform, normal")])
def test_impossible_knobs_are_refused(knobs, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **knobs)


def test_unknown_preset_names_those_that_exist():
    with pytest.raises(UserError, match="--preset gpt5 is not one of nanochat-july26, nanochat-jan26, marin-150m"):
        find_preset("gpt5")


@pytest.mark.parametrize("name", ["nanochat-jan26", "marin-150m", "arcadium-200m", "plain"])
def test_memory_of_a_preset_is_predicted(name):
    """As tests/test_memory.py does for the model of today: the model's own step on fake tensors."""
    small = {"attn_dim": 512, "mlp_dim": 640} if name.startswith("arcadium") else {}
    config = replace(make_config(name), sequence_len=512, vocab_size=8192, n_embd=256, n_kv_head=4, **small)
    machine = Machine("bfloat16", "sdpa", False, "cpu")
    predicted = join_phases(predict_memory(config, 512, 8, machine))
    for phase, num_bytes in trace_step(config, 512, 8, machine, 1).items():
        assert predicted[phase] == pytest.approx(num_bytes, rel=0.02), phase
