"""The kernel bench: what is wrong is said and not timed, our kernels agree with their definitions, counts are exact."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dev import bench_kernels, kernel_ops, kernel_training, timing
from dev.kernel_ops import Operation, Scale, Setting, Variant, clone, count_bytes, find_expected, judge_variant, run
from dev.kernels import Registry
from nanochat import flash_attention
from nanochat.common import UserError
from nanochat.scaling import make_config
from tests.helpers import CPU

SETTING = Setting(CPU, torch.float32, "not in tests")
SCALE = Scale(make_config(2, vocab_size=320, sequence_len=128, head_dim=16, aspect_ratio=32), 2, 3)
OPERATIONS = Registry().operations
TOY = ["--toy", "--compile", "off", "--dtype", "float32", "--device-type", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Roofs of small products and copies, few rounds, a base folder of its own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setitem(bench_kernels.PRODUCT_SIZES, "cpu", 64)
    monkeypatch.setitem(bench_kernels.COPY_BYTES, "cpu", 2**16)
    monkeypatch.setattr(bench_kernels, "ROUNDS_SEC", 0)


def prepare(operation: Operation, setting=SETTING, label=None) -> tuple:
    """Shape, inputs and expected outputs of a toy."""
    shapes = operation.list_shapes(SCALE)
    shape = shapes[label or next(iter(shapes))]
    torch.manual_seed(0)
    inputs = operation.make_inputs(shape, setting)
    return shape, inputs, find_expected(operation, inputs)


def judge(call, operation="linear", inputs_expected=None):
    """The verdict on a variant of an operation."""
    operation = OPERATIONS[operation]
    _, inputs, expected = inputs_expected or prepare(operation)
    return judge_variant(operation, Variant("mine", call), inputs, expected, operation.tolerances[torch.float32])


def bench(*words, plugin=None, tmp_path=None) -> dict:
    if plugin is not None:
        (tmp_path / "mine.py").write_text(plugin)
        words = [*words, "--plugin", str(tmp_path / "mine.py")]
    return bench_kernels.main([*TOY, *words])


def get_point(results: dict, variant: str) -> dict:
    return next(point for point in results["points"] if point["variant"] == variant)


# ---------------------------------------------------------------------------------------------------------------------
# Our kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_variants_agree_with_the_definition(name, dtype):
    operation, setting = OPERATIONS[name], replace(SETTING, dtype=dtype)
    if dtype not in operation.tolerances:
        assert name == "fp8_linear" and dtype != torch.bfloat16
        return
    for label, shape in operation.list_shapes(SCALE).items():
        _, inputs, expected = prepare(operation, setting, label)
        present = [variant for variant in operation.variants if not variant.find_obstacle(setting, shape)]
        assert present or name == "fp8_linear"
        for variant in present:
            verdict = judge_variant(operation, variant, inputs, expected, operation.tolerances[dtype])
            assert verdict.status == "ok", (label, variant.name, verdict)
            outputs = run(operation, variant.call, clone(inputs))
            assert {key: output.shape for key, output in outputs.items()} == {
                key: output.shape for key, output in expected.items()}


def test_sampling_among_fewer_tokens_than_its_top(monkeypatch):
    monkeypatch.setitem(bench_kernels.TOY, "vocab_size", 10)
    points = bench("--op", "sampling")["points"]
    assert {point["label"] for point in points} == {"all", "top 10"} and all(point["ms"] for point in points)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_variants_agree_with_the_definition(name):
    operation, setting = OPERATIONS[name], replace(SETTING, no_compile="")
    for label, shape in operation.list_shapes(SCALE).items():
        for variant in operation.variants if torch.float32 in operation.tolerances else ():
            if "compiled" in variant.name and not variant.find_obstacle(setting, shape):
                _, inputs, expected = prepare(operation, setting, label)
                verdict = judge_variant(operation, variant, inputs, expected, operation.tolerances[torch.float32])
                assert verdict.status == "ok", (label, variant.name, verdict)


def test_backends_serve_themselves(monkeypatch):
    """Whatever backend this process has chosen, a variant is its own; and all of them stand in the bench."""
    operation = OPERATIONS["attention_train"]
    assert set(flash_attention.BACKENDS) < {variant.name for variant in operation.variants}
    _, inputs, _ = prepare(operation)
    used, right = [], dict(flash_attention._TRAIN_CALLS)
    for name in ("blocks", "sdpa"):
        monkeypatch.setitem(flash_attention._TRAIN_CALLS, name,
                            lambda *args, name=name: used.append(name) or right[name](*args))
    for variant in operation.variants:
        if variant.name in ("blocks", "sdpa"):
            run(operation, variant.call, inputs)
            assert used.pop() == variant.name and not used
    assert flash_attention._override_impl is None


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def test_counts_of_a_product_are_exact():
    operation = OPERATIONS["linear"]
    shape, inputs, expected = prepare(operation, replace(SETTING, dtype=torch.bfloat16), "c_fc")
    assert shape == {"N": 256, "C": 64, "M": 256}
    assert operation.count_flops(shape) == 2 * 256 * 64 * 256
    assert count_bytes(operation, shape, inputs, expected) == 2 * (256 * 64 + 256 * 64 + 256 * 256)


@pytest.mark.parametrize(("name", "label"), [
    ("linear", None), ("linear_cross_entropy", None), ("moe", None), ("orthogonalize", "square"),
    ("orthogonalize", "heads"), ("muon_update", "square"), ("muon_update", "heads"), ("muon_update", "c_fc")])
def test_flops_are_those_that_torch_counts(name, label):
    """Of a variant that computes nothing twice, with those of the backward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    operation = OPERATIONS[name]
    shape, inputs, _ = prepare(operation, label=label)
    call = {"moe": kernel_training.run_each_expert, "linear_cross_entropy": kernel_training.lose_plainly,
            "muon_update": operation.definition}.get(name, operation.variants[-1].call)
    with FlopCounterMode(display=False) as counter:
        run(operation, call, inputs)
    assert counter.get_total_flops() == operation.count_flops(shape)


def test_attention_counts_what_is_seen():
    train, decode = OPERATIONS["attention_train"], OPERATIONS["attention_decode"]
    shape, inputs, expected = prepare(train, label="window 32")
    T = shape["T"]
    pairs = sum(k <= q and q - k <= 32 for q in range(T) for k in range(T))
    assert train.count_flops(shape) == 3 * 2 * 2 * pairs * shape["B"] * shape["H"] * shape["D"]
    assert count_bytes(train, shape, inputs, expected) == 8 * inputs["q"].nbytes    # q, k, v, the output; gradients
    shape, inputs, expected = prepare(decode)
    seen = sum(length + 1 for length in shape["lengths"])
    assert decode.count_flops(shape) == 4 * seen * shape["H"] * shape["D"]
    key_bytes = shape["H"] * shape["D"] * 4
    # the cache's keys and values, the new ones read and written, queries and output, lengths
    assert count_bytes(decode, shape, inputs, expected) == 2 * key_bytes * (
        sum(shape["lengths"]) + 2 * shape["B"] + shape["B"]) + 4 * shape["B"]


def test_an_update_reads_and_writes_its_state():
    operation = OPERATIONS["adamw_update"]
    shape, inputs, expected = prepare(operation)
    rates = 6 * 4
    assert count_bytes(operation, shape, inputs, expected) == (4 + 3) * inputs["param"].nbytes + rates


def test_roof_is_the_lower_of_both():
    roof = bench_kernels.Roof(100.0, 10.0, "")
    assert roof.at(2) == 20 and roof.at(10) == roof.at(1000) == 100 and bench_kernels.Roof(None, 10.0, "").at(2) is None
    speed = bench_kernels.describe_speed([3.0, 2.0, 4.0, 2.0, 2.0], 10, 5, {"measured": roof})
    assert speed["ms"] == speed["min_ms"] == 2 and speed["flops_per_sec"] == 5000 and speed["bytes_per_sec"] == 2500
    assert speed["roof_frac"] == {"measured": 5000 / 20} and speed["p80_ms"] > speed["p20_ms"]


def test_measured_roof_is_of_the_best_calls(monkeypatch):
    """Two FLOPs for each multiplication; a copy reads and writes."""
    monkeypatch.setattr(bench_kernels, "sample", lambda calls, device: {name: [4.0, 2.0, 3.0] for name in calls})
    roof = bench_kernels.measure_roof(SETTING)
    assert roof.flops_per_sec == pytest.approx(64 * 64 * 128 / 2e-3)
    assert roof.bytes_per_sec == pytest.approx(2**17 / 2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong


@pytest.mark.parametrize(("call", "detail"), [
    (lambda x, weight: 1.1 * F.linear(x, weight), "its result is off by 1.0e-01, allowed are 2e-03"),
    (lambda x, weight: (x @ weight.T) * float("nan"), "its result has NaN or infinity"),
    (lambda x, weight: weight[:3] @ x.T, "its result has shape (3, 256), not (256, 64)"),
    (lambda x, weight: F.linear(x, weight).double(), "its result is float64, not float32"),
    (lambda x, weight: None, "it returns a NoneType, not a tensor"),
    (lambda x, weight: F.linear(x, weight.mul_(2)) / 2, "it changes its input weight"),
])
def test_wrong_results(call, detail):
    verdict = judge(call)
    assert verdict.status == "WRONG" and verdict.detail == detail


def test_inputs_stay_as_they_are():
    """A variant that spoils its inputs leaves those of the next one."""
    prepared = prepare(OPERATIONS["linear"])
    assert judge(lambda x, weight: F.linear(x.zero_(), weight), inputs_expected=prepared).status == "WRONG"
    assert judge(F.linear, inputs_expected=prepared).status == "ok"


def test_wrong_gradients():
    attention = prepare(OPERATIONS["attention_train"])
    right = flash_attention.plain_attention

    def detach(q, k, v, window):
        return right(q, k.detach(), v, window) + 0 * k
    assert judge(right, "attention_train", attention).status == "ok"
    verdict = judge(detach, "attention_train", attention)
    assert verdict.status == "WRONG" and verdict.detail.startswith("its gradient of k is off by 1.0e+00")
    verdict = judge(lambda q, k, v, window: right(q, k, v, window).detach(), "attention_train", attention)
    assert verdict.status == "WRONG" and verdict.detail.startswith("its result has no gradient")
    verdict = judge(lambda q, k, v, window: 1 * q, "attention_train", attention)
    assert verdict.status == "WRONG" and verdict.detail == "its result has no gradient of k, which isn't used"
    assert judge(lambda q, k, v, window: right(q, k, v, -1), "attention_train",
                 prepare(OPERATIONS["attention_train"], label="window 32")).status == "WRONG"


def test_wrong_updates():
    """An update that does nothing, or half of it, is far off: its own step is the scale."""
    for factor, error in ((0, "1.0e+00"), (0.5, "5.0e-01")):
        def step(param, grad, exp_avg, exp_avg_sq, *rates, factor=factor):
            start = param.clone()
            kernel_ops.with_kernels(OPERATIONS["adamw_update"].definition, False)(
                param, grad, exp_avg, exp_avg_sq, *rates)
            param.copy_(start + factor * (param - start))
        assert judge(step, "adamw_update").detail.startswith(f"its param is off by {error}")


def test_a_cache_that_is_not_written():
    operation = OPERATIONS["attention_decode"]

    def forget(q, k_cache, v_cache, *others):
        return operation.variants[0].call(q, k_cache.clone(), v_cache, *others)
    verdict = judge(forget, "attention_decode")
    assert verdict.status == "WRONG" and verdict.detail.startswith("its k_cache is off by 1.0e+00")


def test_whole_numbers_must_be_equal():
    sample = OPERATIONS["sampling"].definition
    assert judge(sample, "sampling").status == "ok"
    verdict = judge(lambda logits, draws, top_k: sample(logits, draws, top_k) + 1, "sampling")
    assert verdict.status == "WRONG" and verdict.detail.startswith("its result is off by 1.0e+00")


# ---------------------------------------------------------------------------------------------------------------------
# The program


def test_points_and_figure(tmp_path, capsys):
    results = bench("--op", "linear", "attention_train", "sampling", "fp8_linear", "--out", str(tmp_path / "out"))
    saved = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert saved["points"] == json.loads(json.dumps(results["points"])) and saved["dtype"] == "float32"
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["kernels_d2.png"]
    assert (tmp_path / "out" / "kernels_d2.png").read_bytes().startswith(b"\x89PNG")
    assert set(saved["roofs"]) == {"measured", "datasheet"} and saved["roofs"]["measured"]["flops_per_sec"] > 0
    assert saved["roofs"]["datasheet"] == {"flops_per_sec": None, "bytes_per_sec": None, "source": "not known for cpu"}
    for point in saved["points"]:
        assert {"operation", "family", "scale", "label", "shape", "variant", "status", "detail", "errors", "tolerance",
                "ms", "speedup"} <= set(point)
        assert bool(point["ms"]) == (point["status"] == "ok")
        if point["ms"]:
            assert point["flops_per_sec"] == pytest.approx(point["flops"] / point["ms"] * 1e3)
            assert point["min_ms"] <= point["ms"] and point["roof_frac"]["measured"] > 0
    assert get_point(saved, "fa3")["status"] == get_point(saved, "fp8")["status"] == "absent"
    out = capsys.readouterr().out
    assert "fa3; fa2; flex: absent: needs a CUDA device, this is cpu" in out and "% of measured roof" in out
    assert "bf16; bf16, compiled; fp8; fp8, compiled: absent: fp8_linear isn't for float32" in out


PLUGIN = """
import torch
from torch import Tensor

calls = []

def variants(registry):
    registry.add("linear", "mine", lambda x, weight: x @ weight.T)
    registry.add("linear", "wrong", lambda x, weight: calls.append(1) or 1.1 * (x @ weight.T))
    registry.add("linear", "raises", fail)
    registry.add("linear", "tires", tire)
    registry.add("linear", "of a GPU", fail, needs="cuda")
    registry.add("linear", "picky", fail, needs=lambda setting, shape: f"not with {shape['N']} tokens")
    registry.add("linear", "lost", fail, needs=lambda setting, shape: shape["T"])

def fail(x, weight):
    raise RuntimeError("no kernel image")

count = [0]

def tire(x: Tensor, weight: Tensor) -> Tensor:
    count[0] += 1
    return x @ weight.T * (count[0] == 1)
"""


def test_plugin(tmp_path, capsys):
    results = bench("--op", "linear", plugin=PLUGIN, tmp_path=tmp_path)
    mine, wrong, raises = (get_point(results, name) for name in ("mine", "wrong", "raises"))
    assert mine["status"] == "ok" and mine["speedup"] == get_point(results, "torch")["ms"] / mine["ms"]
    assert wrong["status"] == "WRONG" and wrong["ms"] is None
    assert len(sys.modules["kernel_plugin_mine"].calls) == 3    # one call for each shape: it wasn't timed
    assert raises["status"] == "error" and raises["detail"].endswith("mine.py, line 17: RuntimeError: no kernel image")
    assert get_point(results, "tires")["status"] == "WRONG" and get_point(results, "tires")["ms"] is None
    assert get_point(results, "picky")["detail"] == "not with 256 tokens"
    assert get_point(results, "lost")["detail"].endswith("mine.py, line 14: KeyError: 'T'")
    out = capsys.readouterr().out
    assert "of a GPU: absent: needs a CUDA device, this is cpu" in out
    assert "WRONG: wrong of d2 linear, q: its result is off by 1.0e-01, allowed are 2e-03" in out


CAREFREE = """
import functools

def variants(registry):
    registry.add("linear", "exits", lambda x, weight: exit(0))
    registry.add("linear", "keeps its first", keep)
    registry.add("linear", "keeps by input", functools.cache(lambda x, weight: x @ weight.T))
    registry.add("linear", "asks for a gradient", lambda x, weight: x.requires_grad_() @ weight.T)

kept = {}

def keep(x, weight):
    return kept.setdefault(x.shape + weight.shape, x @ weight.T)
"""


def test_plugins_that_exit_or_keep_results(tmp_path):
    """Inputs are others after the timing, in the tensors that were timed: who kept a result isn't right then."""
    results = bench("--op", "linear", plugin=CAREFREE, tmp_path=tmp_path)
    exits = get_point(results, "exits")
    assert exits["status"] == "error" and exits["detail"].endswith("mine.py, line 5: SystemExit: 0")
    for name in ("keeps its first", "keeps by input"):
        point = get_point(results, name)
        assert point["status"] == "WRONG" and point["ms"] is None
        assert point["detail"].endswith("(after calls that were right)")
    assert get_point(results, "asks for a gradient")["status"] == get_point(results, "torch")["status"] == "ok"


def test_memory_that_the_definition_lacks(monkeypatch):
    def fail(operation, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(bench_kernels, "find_expected", fail)
    statuses = {point["variant"]: point["status"] for point in bench("--op", "attention")["points"]}
    assert statuses["sdpa"] == "no memory" and statuses["fa3"] == "absent"


def test_one_that_fails_when_it_is_timed(tmp_path):
    plugin = """
count = [0]

def variants(registry):
    registry.add("linear", "mine", call)

def call(x, weight):
    count[0] += 1
    if count[0] > 1:
        raise ValueError("again?")
    return x @ weight.T
"""
    results = bench("--op", "linear", plugin=plugin, tmp_path=tmp_path)
    mine = get_point(results, "mine")
    assert mine["status"] == "error" and mine["ms"] is None and get_point(results, "torch")["ms"]
    assert mine["detail"].startswith("right at first, then ")
    assert mine["detail"].endswith("mine.py, line 10: ValueError: again?")


@pytest.mark.parametrize(("plugin", "complaint"), [
    ("def variants(registry):\n    return 1 +\n", r"mine.py, line 2: SyntaxError: invalid syntax"),
    ("x = 1\nimport nothing_like_it\n", r"mine.py, line 2: ModuleNotFoundError: No module named 'nothing_like_it'"),
    ("raise SystemExit(3)\n", r"mine.py, line 1: SystemExit: 3"),
    ("x = 1\n", r"mine.py: it must define a function variants\(registry\)"),
    ("def variants():\n    pass\n", r"mine.py: TypeError: variants\(\) takes 0 positional arguments"),
    ("def variants(registry):\n    registry.add('lin', 'a', print)\n",
     r"mine.py, line 2: there is no operation 'lin' to add to; there are attention, "),
    ("def variants(registry):\n    registry.add('linear', 'torch', print)\n",
     r"line 2: linear has a variant 'torch' already; choose another name"),
    ("def variants(registry):\n    registry.add('linear', 'a', 3)\n", r"line 2: 'a' of linear must be a function"),
    ("def variants(registry):\n    registry.add('linear', 'a', print, needs='tpu')\n",
     r"'a' of linear can't need 'tpu'; needs is one of compile, cuda, or a function"),
])
def test_bad_plugins_are_one_sentence(tmp_path, plugin, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        bench("--list", plugin=plugin, tmp_path=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("words", "complaint"), [
    (["--op", "lin"], "--op lin is not one of attention, "),
    (["--only", "lin"], "--only lin is not one of the variants plain; fa3; "),
    (["--plugin", "nowhere.py"], "--plugin nowhere.py: there is no such file"),
    (["--rows", "0"], "--rows 0 must be at least 1"),
    (["--vocab-size", "0"], "--vocab-size means nothing beside --toy"),
    (["--depth", "0"], "no model has --depth 0"),
])
def test_mistakes_are_one_sentence(words, complaint):
    with pytest.raises(UserError, match=complaint):
        bench(*words)


def test_choice_of_variants(capsys):
    results = bench("--op", "linear_cross_entropy", "norm_rotary", "--only", "fused", "ours")
    assert [point["variant"] for point in results["points"]] == ["fused", "ours"]
    assert bench("--list") == {} and "norm_rotary: (x (B, T, H, D), cos" in capsys.readouterr().out


def test_a_wrong_kernel_of_ours_is_noticed(monkeypatch):
    right = kernel_training.linear_cross_entropy
    monkeypatch.setattr(kernel_training, "linear_cross_entropy", lambda *args: 1.01 * right(*args))
    results = bench("--op", "linear_cross_entropy")
    assert get_point(results, "fused")["status"] == "WRONG" and get_point(results, "plain")["status"] == "ok"


def test_time_on_a_gpu_is_by_events(monkeypatch):
    """With events that count operations: what is written to flush the cache isn't in the time, the call is."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at
    flush = SimpleNamespace(zero_=lambda: clock.__setitem__(0, clock[0] + 100))
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: flush)
    samples = timing.sample_on_cuda(lambda: clock.__setitem__(0, clock[0] + 2.5), CPU)
    assert samples == [2.5] * 40    # 100 ms of them
