"""Predicted memory: within 2% of the model's own step, traced on fake tensors; never too many rows; scripts.plan."""

import argparse
import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from dev.bench_memory import fake_step, join_phases, trace_step
from nanochat import compilation, flash_attention, gpt, memory
from nanochat.common import UserError
from nanochat.config import GPTConfig, count_params
from nanochat.devices import find_gpu
from nanochat.memory import (
    GIB,
    Machine,
    get_max_micro_tokens,
    get_usable_frac,
    largest_micro_rows,
    list_divisors,
    measure_free_bytes,
    predict_memory,
    read_available_bytes,
    read_cgroup_bytes,
    rows_or_auto,
)
from nanochat.presets import RULES
from nanochat.scaling import make_config
from nanochat.train import Batch, train_step
from scripts import plan
from tests.helpers import measure_peak_bytes, run_program

NODE = Machine(world_size=8)    # of H100s


def make(depth, vocab_size=1000, sequence_len=256, window_pattern="SSSL", **shape):
    return make_config(depth, vocab_size=vocab_size, sequence_len=sequence_len, window_pattern=window_pattern,
                       **{"head_dim": 64, **shape})


def check_trace(config, T, rows, machine, num_micro, tolerance, rule="july26"):
    """The peaks of each phase of the model's own step."""
    predicted = join_phases(predict_memory(config, T, rows, machine, num_micro))
    for phase, num_bytes in trace_step(config, T, rows, machine, num_micro, RULES[rule]).items():
        assert predicted[phase] == pytest.approx(num_bytes, rel=tolerance), phase


@pytest.mark.parametrize(("depth", "rows", "num_micro", "dtype", "attention", "world_size", "loss"), [
    (4,  8, 1, "bfloat16", "sdpa",   1, "fused"),
    (4,  4, 2, "bfloat16", "blocks", 1, "fused"),
    (4,  4, 1, "bfloat16", "fa2",    1, "fused"),    # and fa3, flex: all keep no probabilities
    (4,  4, 1, "bfloat16", "sdpa",   1, "plain"),
    (4,  4, 1, "float32",  "sdpa",   1, "plain"),
    (4,  8, 1, "bfloat16", "sdpa",   8, "fused"),
    (12, 4, 2, "bfloat16", "sdpa",   1, "fused"),
    (12, 4, 1, "float32",  "blocks", 8, "fused"),
    (12, 4, 2, "bfloat16", "sdpa",   8, "plain"),
    (26, 4, 1, "bfloat16", "sdpa",   8, "fused"),
])
def test_prediction_meets_the_model_at_full_size(depth, rows, num_micro, dtype, attention, world_size, loss):
    """Where this fails, the model and nanochat/memory.py have parted: mend the formula of the phase that is named."""
    config = make_config(depth, vocab_size=32768, sequence_len=2048)
    machine = Machine(dtype, attention, False, "cpu", world_size, loss)
    check_trace(config, 2048, rows, machine, num_micro, tolerance=0.02)


@pytest.mark.parametrize(("depth", "knobs", "T", "rows", "num_micro", "dtype", "world_size"), [
    (4,  {"fp32_embeds": True},               512,  8, 2, "bfloat16", 1),
    (4,  {"num_experts": 8},                  512,  8, 1, "bfloat16", 1),
    (4,  {"num_experts": 16, "top_k": 2},     512,  4, 2, "float32",  1),
    (12, {"num_experts": 8, "moe_every": 2},  2048, 4, 1, "bfloat16", 8),
    (6,  {"num_experts": 6, "top_k": 3},      512,  4, 1, "bfloat16", 4),    # which four ranks can't share
    (18, {"num_experts": 8},                  2048, 2, 2, "bfloat16", 1),    # several slices of Muon's
])
def test_prediction_meets_knobs_of_the_model(depth, knobs, T, rows, num_micro, dtype, world_size):
    config = make_config(depth, vocab_size=32768, sequence_len=T, **knobs)
    check_trace(config, T, rows, Machine(dtype, "sdpa", False, "cpu", world_size), num_micro, tolerance=0.02)


@pytest.mark.parametrize(("config", "T", "rows", "num_micro", "dtype", "attention"), [
    (make(4, 512, 512, num_experts=8, moe_every=2),             512, 8, 1, "bfloat16", "sdpa"),
    (make(4, 512, 512, num_experts=8, top_k=2),                 512, 8, 1, "float32",  "sdpa"),
    (make(2, sequence_len=512),                                 512, 4, 1, "bfloat16", "sdpa"),
    (make(2, 8192, 512),                                        512, 2, 1, "float32",  "sdpa"),     # the loss is worst
    (make(3, 300, 1024),                                        300, 2, 2, "bfloat16", "sdpa"),     # windows pad T
    (make(4, 4096, 512, "SL", head_dim=128),                    512, 2, 3, "bfloat16", "sdpa"),
    (make(4, 512, 512),                                         512, 2, 1, "bfloat16", "blocks"),
    (make(3, 512, 300, "L"),                                    300, 3, 1, "float32",  "blocks"),
    (make(6, 500, aspect_ratio=32),                             256, 4, 1, "float32",  "sdpa"),
    (make(8, 300, 128, "L", aspect_ratio=32),                   128, 2, 1, "float32",  "sdpa"),     # the update is
    (make(8, 300, 128, "S", aspect_ratio=32),                   128, 4, 2, "bfloat16", "sdpa"),
    (make(2, 256, 1024, "S"),                                   640, 2, 1, "float64",  "sdpa"),     # backward is
    (GPTConfig(256, 1000, 3, n_head=6, n_kv_head=2, n_embd=192), 256, 4, 1, "float32",  "sdpa"),     # grouped queries
    (GPTConfig(256, 1000, 3, n_head=6, n_kv_head=2, n_embd=192), 256, 4, 1, "bfloat16", "fa2"),
    (make(1, 300, 128),                                         128, 8, 1, "bfloat16", "sdpa"),
], ids=lambda value: f"d{value.n_layer}" if isinstance(value, GPTConfig) else str(value))
def test_prediction_meets_the_model_of_odd_shapes(config, T, rows, num_micro, dtype, attention):
    check_trace(config, T, rows, Machine(dtype, attention, False, "cpu"), num_micro, tolerance=0.1)


@pytest.mark.parametrize("rule", ["nov26", "dec26"])
def test_heads_take_no_more_memory_than_whole_matrices(rule):
    """Where Muon's update is the worst of a step, half of its square matrices queries and keys."""
    check_trace(make(4, 300, 128, "L"), 128, 1, Machine("float32", "sdpa", False, "cpu"), 1, tolerance=0.01, rule=rule)


@pytest.mark.parametrize("world_size", [1, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("knobs", [{}, {"fp32_embeds": True}, {"num_experts": 8, "top_k": 2}])
def test_optimizer_state_is_the_optimizers(world_size, dtype, knobs):
    config, machine = make(3, **knobs), Machine(dtype, "sdpa", False, "cpu", world_size)
    with fake_step(config, machine) as (_, optimizer):
        optimizer.get_named_state()
        state = [tensor for states in optimizer.state.values() for tensor in states.values()]
    assert memory.count_optimizer_bytes(config, machine) == sum(tensor.nbytes for tensor in state)


@pytest.mark.parametrize(("config", "T", "rows", "num_micro", "loss"), [
    (make_config(4, vocab_size=32768, sequence_len=2048),        2048, 4, 2, "fused"),
    (make_config(4, vocab_size=32768, sequence_len=2048),        2048, 4, 1, "plain"),
    (GPTConfig(256, 1000, 3, n_head=6, n_kv_head=2, n_embd=192), 256,  4, 1, "fused"),
], ids=["fused", "plain", "grouped queries"])
def test_prediction_meets_the_model_in_fp8(config, T, rows, num_micro, loss):
    machine = Machine("bfloat16", "sdpa", False, "cpu", loss=loss, is_fp8=True)
    check_trace(config, T, rows, machine, num_micro, tolerance=0.02)
    fp8, bf16 = (predict_memory(config, T, rows, replace(machine, is_fp8=is_fp8)) for is_fp8 in (True, False))
    copies = config.n_layer * memory.count_fp8_weights(config) + config.padded_vocab_size * config.n_embd
    assert fp8.parameters == bf16.parameters + copies
    assert sum(fp8.activations.values()) < sum(bf16.activations.values())


def count_saved_bytes(model, idx, block):
    """Bytes that autograd keeps of one block, but for parameters and what all blocks share."""
    saved = []
    x = x0 = model.embed(idx).detach()
    x = x.clone()
    shared = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x0, idx]}
    lambdas = (model.resid_lambdas[block], model.x0_lambdas[block])
    ve = model.value_embeds[str(block)](idx) if model.config.has_value_embed(block) else None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.transformer.h[block](x, x0, lambdas, ve, model.get_positions(idx.size(1)))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    return sum(size for key, size in storages.items() if key not in shared)


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.bfloat16), ("blocks", torch.bfloat16),
                                                  ("blocks", torch.float32)])
def test_compiled_blocks_keep_what_is_predicted(attention, dtype, monkeypatch):
    monkeypatch.setattr(flash_attention, "_override_impl", attention)
    config = make(2, 300, 512)
    model = gpt.GPT(config, dtype)
    model.init_weights()
    model.compile_blocks()
    machine = Machine(str(dtype).removeprefix("torch."), attention, True, "cpu")
    measured = count_saved_bytes(model, torch.randint(300, (8, 512)), block=1)
    predicted = sum(memory.count_block_bytes(config, 1, 8, 512, machine).values())
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["fused", "plain"])
def test_compiled_step_takes_what_is_predicted(loss, monkeypatch):
    """By the CPU's allocator, since inside compiled kernels no tensors are seen. The fused loss once kept an fp32 chunk
    of logits there, 240 MiB in this step, which no formula knew."""
    monkeypatch.setattr(flash_attention, "_override_impl", "blocks")
    monkeypatch.setattr(compilation, "_compile_kernels", False)  # put back afterwards
    config, rows = make_config(4, vocab_size=32768, sequence_len=512), 8
    model = gpt.GPT(config, torch.bfloat16)
    model.init_weights()
    model.loss = loss
    optimizer = model.setup_optimizer()
    optimizer.get_named_state()
    compilation.set_compile_kernels(True)
    model.compile_blocks()
    tokens = torch.randint(32768, (rows, 513))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    train_step(model, optimizer, batch, rows)
    measured = measure_peak_bytes(lambda: train_step(model, optimizer, batch, rows))
    predicted = predict_memory(config, 512, rows, Machine("bfloat16", "blocks", True, "cpu", loss=loss))
    assert predicted.peak - predicted.parameters - predicted.optimizer == pytest.approx(measured, rel=0.1)


def test_sharding_divides_what_it_should():
    config = make_config(12, vocab_size=32768, sequence_len=2048)
    one, eight = (predict_memory(config, 2048, 8, Machine(world_size=world)) for world in (1, 8))
    assert one.parameters == eight.parameters and one.activations == eight.activations
    assert one.optimizer / 8 <= eight.optimizer < one.optimizer / 6  # the gates' few matrices are padded
    # a vocabulary that doesn't split over the ranks stays whole on each: two moments in bf16, or fp32 for the head
    assert predict_memory(config, 2048, 8, Machine(world_size=6)).optimizer > 2 * count_params(config)["wte"] * 4


def test_parts_and_phases_add_up():
    config = make_config(24, vocab_size=32768, sequence_len=2048)
    result = predict_memory(config, 2048, 16, NODE)
    counts = count_params(config)
    embeds = counts["wte"] + counts["value_embeds"]
    rope = 2 * 10 * 2048 * 64 * 2
    assert result.parameters == 4 * (counts["total"] - embeds) + 2 * embeds + rope
    assert result.gradients == result.parameters - rope
    assert result.peak == max(result.phases.values()) and result.phases[result.worst_phase] == result.peak
    kept = result.parameters + result.optimizer + sum(result.activations.values())
    assert result.phases["loss"] == kept + result.loss
    accumulating = predict_memory(config, 2048, 16, NODE, num_micro=2)
    assert accumulating.phases["loss"] == result.phases["loss"] + result.gradients


@pytest.mark.parametrize("rows_per_rank", [1, 12, 16, 64])
@pytest.mark.parametrize("gib", [4, 24, 80])
def test_largest_micro_rows_fits_and_the_next_divisor_does_not(rows_per_rank, gib):
    config = make_config(12, vocab_size=32768, sequence_len=2048)
    machine = Machine()
    rows = largest_micro_rows(config, 2048, machine, gib * GIB, rows_per_rank)
    larger = [n for n in range(rows + 1, rows_per_rank + 1) if rows_per_rank % n == 0]

    def fits(n):
        return n * 2048 <= get_max_micro_tokens("cuda") and \
            predict_memory(config, 2048, n, machine, rows_per_rank // n).peak <= 0.92 * gib * GIB
    assert rows == 0 or (rows_per_rank % rows == 0 and fits(rows))
    assert not any(fits(n) for n in larger)


def test_checkpoint_of_a_cpu_takes_its_memory():
    config = make_config(4, vocab_size=4096, sequence_len=512)
    on_cpu, on_gpu = (predict_memory(config, 512, 4, Machine(device_type=name)) for name in ("cpu", "cuda"))
    assert on_cpu.needed == on_cpu.peak + on_cpu.parameters + on_cpu.optimizer and on_gpu.needed == on_gpu.peak
    cpu = Machine(device_type="cpu")
    limit_bytes = on_cpu.needed / get_usable_frac(cpu)
    assert largest_micro_rows(config, 512, cpu, limit_bytes + 1, 4) == 4
    assert largest_micro_rows(config, 512, cpu, limit_bytes - 1, 4) < 4


def test_divisors_of_a_huge_number_take_no_time():
    """A mistyped --total-batch-size must not hang."""
    assert [list_divisors(n) for n in (1, 12, 49, 97)] == [[1], [1, 2, 3, 4, 6, 12], [1, 7, 49], [1, 97]]
    assert len(list_divisors(2**44)) == 45


@pytest.mark.parametrize(("name", "expected"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100 pcie"), ("NVIDIA GeForce RTX 4090", "4090"),
    ("NVIDIA GeForce RTX 4080 Laptop GPU", None), ("NVIDIA GeForce RTX 3080 Ti", "3080 ti"), ("Some Card 9", None)])
def test_gpus_by_their_drivers_names(name, expected):
    assert (find_gpu(name) or (None,))[0] == expected


def test_rows_or_auto():
    assert rows_or_auto("auto") == "auto" and rows_or_auto("16") == 16
    with pytest.raises(argparse.ArgumentTypeError, match="many must be a number of rows, or auto"):
        rows_or_auto("many")


# ---------------------------------------------------------------------------------------------------------------------
# Free memory


def write_group(folder, limit, usage, cache, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = memory.CGROUP_NAMES["" if version == 2 else "memory"]
    for name, value in zip(names, (limit, usage), strict=False):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def test_memory_of_control_groups(tmp_path):
    own, root = tmp_path / "own", tmp_path / "groups"
    own.write_text("0::/jobs/mine\n")
    assert read_cgroup_bytes(own, root) is None and read_cgroup_bytes(tmp_path / "none", root) is None
    write_group(root / "jobs" / "mine", "max", 100, 0, version=2)
    assert read_cgroup_bytes(own, root) is None
    write_group(root / "jobs", 1000, 700, 50, version=2)        # the group above has a limit
    write_group(root / "others", 10, 5, 0, version=2)           # that of others doesn't matter
    assert read_cgroup_bytes(own, root) == 1000 - 700 + 50
    write_group(root / "jobs" / "mine", 500, 600, 0, version=2)
    assert read_cgroup_bytes(own, root) == 0
    own.write_text("5:cpu:/x\n4:memory:/docker/abc\n0::/\n")   # version 1, in a container that sees its own as the root
    assert read_cgroup_bytes(own, root) is None
    write_group(root / "memory", 2000, 500, 100, version=1)
    assert read_cgroup_bytes(own, root) == 2000 - 500 + 100


def test_free_memory_of_a_cpu_is_shared_by_the_ranks_of_the_machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:    8 kB\n")
    assert read_available_bytes(tmp_path / "meminfo") == 8192 and read_available_bytes(tmp_path / "none") is None
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(memory, "read_cgroup_bytes", lambda: None)
    for available, free in ((8192, 2048), (None, None)):
        monkeypatch.setattr(memory, "read_available_bytes", lambda available=available: available)
        assert measure_free_bytes(torch.device("cpu")) == free
    monkeypatch.setattr(memory, "read_cgroup_bytes", lambda: 4000)
    assert measure_free_bytes(torch.device("cpu")) == 1000
    assert 0 < read_available_bytes() < 2**50 if sys.platform == "linux" else read_available_bytes() is None


def test_free_memory_of_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert measure_free_bytes(torch.device("cuda", 0)) == 70 * GIB
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: GIB)
    assert measure_free_bytes(torch.device("mps")) == 11 * GIB
    monkeypatch.setattr(torch, "get_device_module", lambda device: object())
    assert measure_free_bytes(torch.device("xpu", 0)) is None


def test_unknown_dtype():
    with pytest.raises(UserError, match="--dtype int8 is not one of bfloat16, "):
        Machine("int8")


# ---------------------------------------------------------------------------------------------------------------------
# scripts.plan


def test_plan_of_the_speedrun():
    """The figures of the public record: RECIPE's FLOPs at ratio 8, and two hours for an H100 node at 50% MFU."""
    results = plan.main(["--depth", "24", "--nproc", "8", "--target-param-data-ratio", "8"])
    run = results["runs"][0]
    assert run["plan"]["total_flops"] == pytest.approx(2.79e19, rel=0.01) and run["fits"]
    assert run["hours"] == pytest.approx(2.79e19 / (0.5 * 8 * 989e12) / 3600, rel=0.01)
    assert run["dollars"] == pytest.approx(24 * run["hours"])
    assert run["micro_rows"] * run["num_micro"] * 8 * 2048 == run["plan"]["batch_tokens"]
    assert run["memory"]["peak"] <= 0.92 * 80 * GIB
    assert 0.9 < run["hardware_flops"] / run["plan"]["total_flops"] < 1.1


def test_plan_of_fp8_is_one_of_memory(capsys):
    runs = [plan.main(["--depth", "12", "--device-batch-size", "16", "--fp8", fp8])["runs"][0] for fp8 in ("off", "on")]
    assert runs[0]["memory"]["peak"] != runs[1]["memory"]["peak"] and runs[0]["hours"] == runs[1]["hours"]
    off, on = capsys.readouterr().out.split("Memory: ")[1:]
    assert "fp8" in on and "fp8" not in off.splitlines()[0]


def test_plan_of_experts_is_by_active_parameters(capsys):
    """As many tokens and FLOPs as the dense model to a percent, and more memory, in as many bytes as Muon's experts."""
    argv = ["--depth", "12", "--nproc", "8", "--device-batch-size", "8"]
    dense, moe = (plan.main([*argv, *knobs])["runs"][0] for knobs in ([], ["--knobs", "num_experts=8", "moe_every=2"]))
    assert moe["plan"]["total_flops"] == pytest.approx(dense["plan"]["total_flops"], rel=0.01)
    assert moe["plan"]["batch_tokens"] == dense["plan"]["batch_tokens"]
    expert = 2 * 768 * 1536
    more = moe["memory"]["parameters"] - dense["memory"]["parameters"]
    assert more == 4 * 6 * (7 * expert + 8 * 768)    # of 8 experts one takes the place of half the dense MLP
    assert moe["hardware_flops"] > dense["hardware_flops"]
    out = capsys.readouterr().out
    assert "active for a token" not in out.split("8 x h100")[1] and "active for a token" in out.split("8 x h100")[2]
    with pytest.raises(UserError, match="top_k=9 must be from 1 to the 8 experts"):
        plan.main(["--depth", "12", "--knobs", "num_experts=8", "top_k=9"])


def test_plan_of_short_rows_counts_what_they_save():
    """All of a run in rows of 512 costs what a model of that context costs in keys; windows stay the longer one's."""
    argv = ["--depth", "12", "--num-iterations", "100", "--total-batch-size", str(2**19), "--window-pattern", "L"]
    runs = {(T, warmup): plan.main([*argv, "--max-seq-len", str(T), *warmup])["runs"][0]
            for T, warmup in ((1024, ()), (512, ()), (1024, ("--seq-len-warmup", "512:100")),
                              (1024, ("--seq-len-warmup", "512:50")))}
    for get in (lambda run: run["plan"]["total_flops"], lambda run: run["hardware_flops"], lambda run: run["hours"]):
        whole, half, short, mixed = map(get, runs.values())
        assert short == pytest.approx(half, rel=1e-9) and mixed == pytest.approx((whole + half) / 2, rel=1e-9)
        assert half < 0.99 * whole


def test_plan_needs_no_torch_and_prints_json():
    done = run_program("plan_without_torch", "--depth", 4, 12, "--json", fresh=True)
    assert done.returncode == 0, done.stderr
    depths = [run["config"]["n_layer"] for run in json.loads(done.stdout)["runs"]]
    assert depths == [4, 12]


def test_plan_shows_depths_side_by_side(capsys):
    plan.main(["--depth", "4", "48", "--gpu", "4090"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 x 4090, 165.2 TFLOP/s and 24 GiB each"
    assert next(line for line in lines if line.startswith("depth")).split() == ["depth", "4", "48"]
    assert next(line for line in lines if "peak, of" in line).endswith("DOES NOT FIT")


def test_plan_shows_recipes_side_by_side(capsys):
    d24, d22 = plan.main(["--recipe", "d24", "d22", "--nproc", "8"])["runs"]
    assert (d22["config"]["n_layer"], d22["config"]["vocab_size"], d22["plan"]["batch_tokens"]) == (22, 49152, 2**19)
    alone = plan.main(["--depth", "24", "--nproc", "8", "--target-param-data-ratio", "8"])["runs"][0]
    assert d24 == alone and d22["hours"] < 0.85 * d24["hours"] and d22["fits"]
    out = capsys.readouterr().out
    assert re.search(r"^published time, on 8 H100 in fp8 +99.0 min +81.8 min$", out, re.MULTILINE)
    assert re.search(r"^warm-down, part of the run +65% +85%$", out, re.MULTILINE) and "pull request 830" in out


def test_no_more_shards_than_a_source_has(capsys):
    """Stories are counted in shards of their own length; text that runs out is repeated."""
    for num_iterations, source, num_shards in ((100, "tinystories", 1), (300, "tinystories", 2),
                                               (300, "climbmix", 4), (10_000, "tinystories", 4)):
        plan.main(["--num-iterations", str(num_iterations), "--total-batch-size", str(2**19), "--shards", source])
        assert capsys.readouterr().out == f"{num_shards}\n"



def test_plan_for_a_budget_takes_the_deepest_that_meets_it():
    hours = {depth: plan.main(["--depth", str(depth)])["runs"][0]["hours"] for depth in (6, 7)}
    between = str((hours[6] + hours[7]) / 2)
    assert plan.main(["--max-hours", between])["runs"][0]["config"]["n_layer"] == 6
    cost = str(3 * (hours[6] + hours[7]) / 2)
    assert plan.main(["--max-cost", cost])["runs"][0]["config"]["n_layer"] == 6


def test_plans_side_by_side_have_the_short_rows_of_each_context(capsys):
    plan.main(["--preset", "marin-150m", "arcadium-200m", "--seq-len-warmup", "512:100"])    # 2,048 and 1,024 tokens
    assert [line.split()[-3:] for line in capsys.readouterr().out.splitlines() if "rows are longer" in line] == [
        ["512", "50", "100"], ["1024", "100", "-"]]


@pytest.mark.parametrize(("argv", "message"), [
    (["--gpu", "wonder"], "--gpu wonder is not in the table; add --tflops .* and --gb"),
    (["--max-cost", "0.0001"], "no depth trains within .0.0001 on 1 h100: depth 1 takes .* allow more, or shorten"),
    (["--max-hours", "1", "--gpu", "wonder", "--tflops", "100", "--gb", "0.1"], r"no depth .* and [\d.]+ GiB on each"),
    (["--depth", "4", "--max-cost", "5"], "--depth and a budget"),
    (["--max-cost", "5", "--gpu", "cpu", "--tflops", "1", "--gb", "8"], "--max-cost needs --price, .* for cpu"),
    (["--recipe", "d22", "--vocab-size", "9"], "--recipe says what to train: leave out --vocab-size"),
    (["--recipe", "d22", "--max-cost", "5"], "--recipe and a budget"),
    (["--recipe", "d22", "--target-flops", "1e18"], "--recipe says what to train: leave out --target-flops"),
    (["--nproc", "3", "--total-batch-size", "1048576"],
     "a step of 1048576 tokens at depth 20 must be a multiple of 6144"),
    (["--device-batch-size", "7"], "--device-batch-size 7 must divide the 512 rows"),
    (["--preset", "marin-150m", "--depth", "3"], "--depth means nothing beside a --preset that has a shape"),
    (["--num-iterations", "9", "--target-flops", "1e18"], "--num-iterations and --target-flops are two horizons"),
    (["--nproc", "0"], "--nproc 0 must be a positive number"),
    (["--depth", "0"], "no model has --depth 0"),
    (["--dtype", "int8"], "--dtype int8 is not one of"),
    (["--num-iterations", "0"], "--num-iterations 0 must be at least 1"),
    (["--seq-len-warmup", "300:9"], "START must be the context of 2048 tokens halved"),
    (["--seq-len-warmup", "300:9", "--max-hours", "1"], "START must be the context of 2048 tokens halved"),
])
def test_plan_refuses_in_one_sentence(argv, message):
    with pytest.raises(UserError, match=message):
        plan.main(argv)


def test_plan_says_what_its_memory_was_compared_with(capsys):
    plan.main(["--depth", "4", "--gpu", "cpu", "--tflops", "1", "--gb", "8"])
    told = capsys.readouterr().out
    assert "predicted, compared with tensors counted one by one; the process grows" in told
    assert "cost at" not in told    # nobody knows what a CPU costs
    plan.main(["--depth", "4"])
    assert "predicted, not yet compared with a GPU." in capsys.readouterr().out


def test_plan_of_an_unknown_gpu_that_is_described(capsys):
    run = plan.main(["--gpu", "wonder", "--tflops", "100", "--gb", "48", "--mfu", "25", "--depth", "12"])["runs"][0]
    assert run["mfu"] == 0.25 and run["hours"] == pytest.approx(run["plan"]["total_flops"] / 0.25e14 / 3600)
    assert "1 x wonder, 100 TFLOP/s and 48 GiB each" in capsys.readouterr().out
