"""The instruments of dev/ don't lie: each figure that they draw or print is compared with one got in another way."""

import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from dev import bench_gqa, show_attention, show_loss_grid, show_memory
from dev.bench_memory import trace_step
from dev.results import find_odd_starts, name_kind
from nanochat import checkpoint_manager
from nanochat.common import Ranks, UserError
from nanochat.config import GPTConfig, count_params, read_config
from nanochat.flash_attention import flash_attn, plain_attention
from nanochat.gpt import GPT
from nanochat.memory import ACTIVATIONS, Machine, list_usage, predict_memory
from nanochat.presets import PLAIN, PRESETS
from nanochat.run import RunLog
from nanochat.scaling import make_config, make_plan
from tests.helpers import BYTE_TOKENIZER, CONFIG, make_model


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("module", [bench_gqa, show_attention, show_loss_grid, show_memory])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    assert ended.value.code == 0 and f"python -m {module.__name__}" in capsys.readouterr().out


def is_png(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x89PNG"


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def make_memory_config(depth: int) -> GPTConfig:
    return make_config(depth, vocab_size=300, sequence_len=256, head_dim=64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_by_part(dtype):
    config, machine = make_memory_config(3), Machine(dtype, "sdpa", is_compiled=False, device_type="cpu")
    measured = show_memory.record_step(config, 256, 2, machine)
    total = max(sum(parts.values()) for _, parts in measured)
    # the benchmark runs the training step itself, whose weights of the loss are a few KiB more
    assert total == pytest.approx(max(trace_step(config, 256, 2, machine).values()), rel=1e-3)
    model = GPT(config, getattr(torch, dtype))
    param_bytes = sum(param.nbytes for param in model.parameters())
    first, last = measured[0][1], measured[-1][1]
    assert first["parameters"] == param_bytes + model.cos.nbytes + model.sin.nbytes
    assert max(parts["gradients"] for _, parts in measured) == param_bytes
    # what is alive before and after a step: parameters and state alone
    assert first["parameters"] + first["optimizer state"] == pytest.approx(sum(first.values()), rel=1e-2)
    assert sum(last[kind] for kind in (*ACTIVATIONS, "logits and loss")) == 2 * 257 * 8 + 4    # tokens and loss
    predicted = predict_memory(config, 256, 2, machine)
    kept = next(parts for phase, parts in reversed(measured) if phase == ("forward", "norm"))
    for kind in ("residual stream", "attention", "MLP", "weights in the compute dtype"):
        assert kept[kind] == pytest.approx(predicted.activations[kind], rel=0.01), kind
    phases = list(dict.fromkeys(phase for phase, _ in measured))
    assert phases == [phase for phase, _ in list_usage(config, 256, 2, machine)]


def test_memory_script(capsys):
    results = show_memory.main(["--depth", "2", "--vocab-size", "300", "--max-seq-len", "128", "--rows", "2"])
    assert is_png(results["figure"]) and all(abs(row["error %"]) < 10 for row in results["phases"])
    assert "optimizer state" in capsys.readouterr().out
    with pytest.raises(UserError, match="--rows 0"):
        show_memory.main(["--rows", "0"])


def test_memory_of_experts_beside_the_dense_model():
    """More weights, gradients and state by the experts that no token uses, the same streams, two sorted copies."""
    results = show_memory.main(["--depth", "2", "--vocab-size", "300", "--max-seq-len", "128", "--rows", "2", "--dtype",
                                "float32", "--knobs", "num_experts=4", "moe_every=2"])
    assert is_png(results["figure"]) and is_png(results["beside_figure"])
    assert all(abs(row["error %"]) < 10 for row in results["phases"])
    (_, dense), (_, moe) = (zip(*((row["part, at its most"].strip(), list(row.values())[column])
                                  for row in results["beside"]), strict=True) for column in (1, 2))
    names = [row["part, at its most"].strip() for row in results["beside"]]
    more = {name: (b - a) * 2**20 for name, a, b in zip(names, dense, moe, strict=True)}
    expert, C = 2 * 128 * 256, 128
    assert more["gradients"] == more["parameters"] - 4 * 4 == 4 * (3 * expert + 4 * C)    # and four biases
    assert more["optimizer state"] > more["parameters"] and more["residual stream"] == more["attention"] == 0
    assert more["of it sorted copies"] == 2 * 256 * C * 4


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def make_windowed(**shape: int) -> GPT:
    """Two layers, the first with a window of 128 tokens and the second without."""
    return make_model(GPTConfig(**{"sequence_len": 256, "vocab_size": 300, "n_layer": 2, "n_head": 4, "n_kv_head": 2,
                                   "n_embd": 64, "window_pattern": "SL"} | shape))


def test_weights_give_the_attentions_output():
    model, idx, inputs, outputs = make_windowed(), torch.randint(300, (1, 200)), [], []
    attn = model.transformer.h[0].attn    # without value embeddings
    attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    attn.c_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    own_call = flash_attn.flash_attn_func
    layers = show_attention.record_attention(model, idx)
    assert flash_attn.flash_attn_func is own_call
    assert [layer.window for layer in layers] == [128, 256] and max(layer.error for layer in layers) < 1e-6
    values = attn.c_v(inputs[0])[0].view(200, 2, 16).repeat_interleave(2, dim=1)    # (T, H, D)
    expected = torch.einsum("hqk,khd->qhd", layers[0].weights, values.detach()).reshape(1, 200, 64)
    torch.testing.assert_close(expected, outputs[0], rtol=1e-5, atol=1e-5)
    for layer in layers:
        assert layer.weights.sum(-1) == pytest.approx(1, abs=1e-5) and not layer.weights.triu(1).any()
    distance = torch.arange(200)[:, None] - torch.arange(200)
    assert not layers[0].weights[:, distance > 128].any() and layers[1].weights[:, distance > 128].any()


def test_wrong_weights_are_noticed(monkeypatch):
    own_weights = show_attention.compute_weights
    monkeypatch.setattr(show_attention, "compute_weights", lambda q, k, window: own_weights(q, k, window - 1))
    with pytest.raises(RuntimeError, match="layer 0: the weights don't give the attention's output"):
        show_attention.record_attention(make_windowed(), torch.randint(300, (1, 200)))


def test_figures_of_a_head():
    T = 9
    uniform = torch.ones(T, T).tril()
    uniform /= uniform.sum(-1, keepdim=True)
    seen = range(2, T + 1)    # keys that each query but the first sees
    figures = show_attention.measure_head(uniform, T)
    assert figures["distance tokens"] == pytest.approx(np.mean([(n - 1) / 2 for n in seen]))
    assert figures["entropy nats"] == pytest.approx(np.mean([math.log(n) for n in seen]), rel=1e-6)
    for name in ("on bos %", "on itself %", "on the one before %"):
        assert figures[name] == pytest.approx(100 * np.mean([1 / n for n in seen]), rel=1e-6)
    previous = torch.zeros(T, T)
    previous[range(1, T), range(T - 1)] = previous[0, 0] = 1
    assert show_attention.measure_head(previous, T) == pytest.approx(
        {"distance tokens": 1, "entropy nats": 0, "on bos %": 100 / 8, "on itself %": 0, "on the one before %": 100})
    # a window of 2 hides bos from all but two of the queries
    assert show_attention.measure_head(uniform, 2)["on bos %"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2, rel=1e-6)


def test_attention_script(monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda stage, *args, **kwargs: (
        make_windowed(), BYTE_TOKENIZER, {"stage": stage, "step": 7, "run_dir": "runs/base/tiny"}))
    results = show_attention.main(["-i", "base", "--prompt", "costs $5 and\n$6"])
    assert is_png(results["figure"]) and len(results["heads"]) == 2 * 4 + 1 and results["error"] < 1e-5
    assert "on bos %" in capsys.readouterr().out
    assert is_png(show_attention.main(["-i", "base", "--prompt", "x" * 180, "--layers", "1"])["figure"])
    for argv, complaint in ((["--prompt", ""], "has 0 tokens"), (["--prompt", "x" * 256], "from 2 to 255"),
                            (["--prompt", "some text", "--layers", "0", "2"], "--layers 2 is none of .* 0 to 1")):
        with pytest.raises(UserError, match=complaint):
            show_attention.main(["-i", "base", *argv])


def test_too_many_heads_for_one_picture(monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda stage, *args, **kwargs: (
        make_windowed(), BYTE_TOKENIZER, {"stage": stage, "step": 7, "run_dir": "runs/base/tiny"}))
    monkeypatch.setattr(show_attention, "MAX_PANELS", 4)
    with pytest.raises(UserError, match="2 layers of 4 heads don't fit .* choose at most 1 with --layers"):
        show_attention.main(["-i", "base", "--prompt", "some text"])


# ---------------------------------------------------------------------------------------------------------------------
# Grouped queries

TINY_GQA = ["--query-heads", "8", "--head-dim", "16", "--rows", "3", "--cache-tokens", "40", "--prompt-tokens", "24",
            "--rounds", "1", "--dtype", "float32", "--device-type", "cpu"]


@pytest.mark.parametrize("groups", [1, 4, 8])
def test_groups_compute_attention(groups):
    """What is timed is the attention that it is said to be."""
    torch.manual_seed(0)
    args, drawn = bench_gqa.parse_args(TINY_GQA), []
    draw = torch.randn

    def keep(*shape, **options):
        drawn.append(draw(*shape, **options))
        return drawn[-1]
    torch.randn = keep
    try:
        calls = bench_gqa.make_calls(args, groups, torch.device("cpu"), torch.float32)
    finally:
        torch.randn = draw
    q, new_k, new_v, k_cache, v_cache, prompt_q, prompt_k, prompt_v = drawn
    assert bench_gqa.count_bytes(3, 0, 40, 8, groups, 16, 4) == k_cache.nbytes + v_cache.nbytes
    assert bench_gqa.count_bytes(1, 24, 24, 8, groups, 16, 4) == sum(
        t.nbytes for t in (prompt_q, prompt_q, prompt_k, prompt_v))    # the output is as large as the queries
    expected = plain_attention(prompt_q, prompt_k, prompt_v, -1)
    torch.testing.assert_close(calls[f"prefill {groups}"](), expected, rtol=1e-4, atol=1e-5)
    k, v = torch.cat((k_cache[:, :39], new_k), 1), torch.cat((v_cache[:, :39], new_v), 1)
    expected = plain_attention(q.expand(-1, 40, -1, -1), k, v, -1)[:, -1:]
    torch.testing.assert_close(calls[f"decode {groups}"](), expected, rtol=1e-4, atol=1e-5)


def test_gqa_script(capsys):
    results = bench_gqa.main(TINY_GQA)
    rows = results["rows"]
    assert [row["groups"] for row in rows] == [1, 2, 4, 8] and is_png(results["figure"])
    assert [row["cache MiB a layer"] * 2**20 for row in rows] == [2 * 3 * 40 * 16 * 4 * g for g in (1, 2, 4, 8)]
    decode_bytes = [2 * 3 * 16 * 4 * (8 + 40 * groups) for groups in (1, 2, 4, 8)]
    assert [row["decode by bytes ms"] for row in rows] == pytest.approx(
        [num_bytes / results["bytes_per_ms"] for num_bytes in decode_bytes])
    assert "groups" in capsys.readouterr().out
    for argv, complaint in ((["--groups", "3"], "--groups 3 doesn't divide the 8"), (["--rows", "0"], "--rows 0 must")):
        with pytest.raises(UserError, match=complaint):
            bench_gqa.main([*TINY_GQA, *argv])


# ---------------------------------------------------------------------------------------------------------------------
# Loss over a grid

SLOPES = (-0.07, -0.11)    # of ln L against ln N and ln D


def simulate_grid(noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Five sizes and four FLOP budgets: larger models see fewer tokens, so that either slope alone would mislead."""
    rng = np.random.default_rng(seed)
    params, budgets = np.meshgrid(np.geomspace(1e6, 2e7, 5), np.geomspace(1e15, 1e16, 4))
    params, tokens = params.ravel(), (budgets / 6 / params).ravel()
    losses = 30 * params ** SLOPES[0] * tokens ** SLOPES[1] * np.exp(noise * rng.standard_normal(params.size))
    return params, tokens, losses


def test_slopes_are_told_apart():
    params, tokens, losses = simulate_grid(0)
    laws = show_loss_grid.fit_slopes(params, tokens, losses)
    assert tuple(law.exponent for law in laws.values()) == pytest.approx(SLOPES)
    naive = np.polyfit(np.log(params), np.log(losses), 1)[0]
    assert abs(naive - SLOPES[0]) > 0.05    # what a line through the runs would have said
    other_point = show_loss_grid.predict_loss(laws, 3e6, 4e8, params, tokens)
    assert other_point == pytest.approx(30 * 3e6 ** SLOPES[0] * 4e8 ** SLOPES[1])


def test_slope_intervals_cover_as_often_as_they_say():
    covered = []
    for seed in range(60):
        laws = show_loss_grid.fit_slopes(*simulate_grid(0.01, seed), num_resamples=400)
        covered += [law.interval[0] < slope < law.interval[1] for law, slope in zip(laws.values(), SLOPES, strict=True)]
    assert 0.9 <= np.mean(covered) < 1    # 95% is meant; 0.9 is 2.5 standard errors below


def test_loss_grid_script(tmp_path, capsys):
    params, tokens, losses = simulate_grid(0.003)
    lines = ["flops_budget,num_scaling_params,tokens_trained,val_bpb"]
    lines += [f"{6 * n * d},{n},{d},{loss}" for n, d, loss in zip(params, tokens, losses, strict=True)]
    (tmp_path / "grid.csv").write_text("\n".join(lines))
    results = show_loss_grid.main([str(tmp_path / "grid.csv")])
    assert results["num_runs"] == 20 and is_png(results["figure"])
    assert results["slopes"]["parameters"]["exponent"] == pytest.approx(SLOPES[0], abs=0.01)
    assert results["slopes"]["training tokens"]["exponent"] == pytest.approx(SLOPES[1], abs=0.01)
    assert "twice as many give" in capsys.readouterr().out
    with pytest.raises(UserError, match="doesn't say its parameters all; choose --counting transformer"):
        show_loss_grid.main([str(tmp_path / "grid.csv"), "--counting", "all"])
    (tmp_path / "one.csv").write_text("\n".join(lines[:6]))    # one budget: N and D are one quantity
    with pytest.raises(UserError, match="5 runs of 5 sizes and 5 horizons can't tell two slopes"):
        show_loss_grid.main([str(tmp_path / "one.csv")])


def write_grid(folder, name: str, config: GPTConfig, factor: float, start_loss: float = math.log(300)) -> None:
    """Runs of three sizes and three horizons, whose losses follow SLOPES times a factor."""
    for n_layer in (2, 4, 8):
        for num_steps in (50, 100, 200):
            sized = replace(config, n_layer=n_layer)
            plan, params = make_plan(sized, 1e6, num_iterations=num_steps, batch_tokens=512), count_params(sized)
            num_params = params["transformer_matrices"] + params["lm_head"]
            loss = factor * 30 * num_params ** SLOPES[0] * plan.total_tokens ** SLOPES[1]
            info = {"stage": "base", "args": {}, "plan": asdict(plan), "params": params, "model_config": asdict(sized)}
            with RunLog(folder / f"{name}-{n_layer}-{num_steps}", info, Ranks()) as log:
                log.write("train", 1, loss=start_loss)
                log.write("eval", num_steps, val_bpb=loss)
                log.close("finished")


def test_loss_grid_of_several_presets(tmp_path, capsys):
    """Each kind of model has its own fit, where one over all would have taken the presets' difference for a slope."""
    write_grid(tmp_path, "plain", replace(CONFIG, vocab_size=300, window_pattern="L", **PLAIN), 1.2)
    write_grid(tmp_path, "now", replace(CONFIG, vocab_size=300, window_pattern="SSSL"), 1.0,
               start_loss=7.0)
    results = show_loss_grid.main([str(tmp_path)])
    assert set(results["kinds"]) == {"plain", "default"} and is_png(results["figure"])
    for slopes in results["kinds"].values():
        assert [law["exponent"] for law in slopes.values()] == pytest.approx(SLOPES, abs=1e-3)
    odd = [note for note in results["notes"] if "from ln V" in note]
    assert len(odd) == 9 and odd[0] == "now-2-100 starts at a loss of 7.000, +1.296 from ln V, that of guessing."
    assert "parameters, plain" in capsys.readouterr().out
    write_grid(tmp_path / "more", "one", replace(CONFIG, vocab_size=300, smear=False), 1.0)
    for path in (tmp_path / "more").glob("one-[48]*"):
        shutil.rmtree(path)
    results = show_loss_grid.main([str(tmp_path)])
    assert set(results["kinds"]) == {"plain", "default"}
    assert any("3 runs of window_pattern=SSL smear=False, of 1 sizes and 3 horizons can't tell" in note
               for note in results["notes"])


@pytest.mark.parametrize(("name", "kind"), [*((name, name) for name in PRESETS if "marin" not in name),
                                            *((name, "marin") for name in PRESETS if "marin" in name)])
def test_kinds_of_models(name, kind):
    preset = PRESETS[name]
    config = replace(GPTConfig(), window_pattern=preset.flags["window_pattern"], **preset.shape, **preset.knobs)
    assert name_kind(config) == kind


def test_kinds_without_a_name():
    assert name_kind(GPTConfig()) == "default"
    assert name_kind(replace(GPTConfig(), smear=False, softcap=0.0)) == "smear=False softcap=0.0"
    assert name_kind(read_config({})) == "nanochat-july26"    # of a run from before the knobs


def test_odd_starts():
    starts = {"good": (5.72, 300), "low": (5.0, 300), "high": (9.0, 300), "none": (math.nan, 300)}
    assert list(find_odd_starts(starts)) == ["low", "high", "none"] and find_odd_starts({"low": (5.0, 300)}, 1.0) == {}
