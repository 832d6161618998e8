"""The benchmark of decoding runs, for random weights and for a trained model; its figures are for a person to read."""

import json
from types import SimpleNamespace

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from nanochat.config import read_config
from nanochat.gpt import GPTConfig
from scripts import infer_bench
from tests.helpers import BYTE_TOKENIZER, make_model

SMALL = ["--prompt-tokens", "24", "--max-tokens", "6", "--dtype", "float32", "--device-type", "cpu"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(infer_bench, "READ_BYTES", 2**20)
    monkeypatch.setattr(infer_bench, "get_peak_flops", lambda device, dtype: (1e12, "invented"))


def test_random_weights(tmp_path, capsys):
    argv = ["--depth", "1", "--vocab-size", "128", "--max-seq-len", "64", "--rows", "1", "3", *SMALL]
    report = infer_bench.main([*argv, "--compare-single", "--json", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(report))    # JSON has no tuples
    assert [result["rows"] for result in report["results"]] == [1, 3]
    for result in report["results"]:
        assert result["token_ms_p50"] <= result["token_ms_p95"] <= result["token_ms_p99"]
        assert result["decode_frac"] * result["decode_limit_tokens_per_sec"] == pytest.approx(
            result["decode_tokens_per_sec"])
        # one layer of 12 * 128**2 and the gate's 12 weights, a head of 128 * 128; 24 + 6/2 keys and values of 128
        assert result["matrix_bytes"] == 4 * (12 * 128**2 + 12 + 128 * 128)
        assert result["cache_bytes_per_row"] == 4 * 2 * 27 * 128
        read_limit = report["read_bytes_per_sec"] / (result["matrix_bytes"] / result["rows"] + 4 * 2 * 27 * 128)
        assert result["decode_read_limit_tokens_per_sec"] == pytest.approx(read_limit)
        flops_limit = 1e12 / (2 * (12 * 128**2 + 12 + 128 * 128))
        assert result["decode_flops_limit_tokens_per_sec"] == pytest.approx(flops_limit)
        assert result["decode_limit_tokens_per_sec"] == pytest.approx(min(read_limit, flops_limit))
        assert result["prefill_limit_tokens_per_sec"] == pytest.approx(1e12 / (2 * (12 * 128**2 + 12)))
    assert "of limit" in capsys.readouterr().out


def test_rows_that_never_decode_together_are_refused():
    with pytest.raises(UserError, match="6 rows never decode together: .* set a larger --max-tokens, or fewer --rows"):
        infer_bench.main(["--depth", "1", "--vocab-size", "128", "--max-seq-len", "1024", "--rows", "6",
                          "--prompt-tokens", "900", "--max-tokens", "2", "--dtype", "float32", "--device-type", "cpu"])


@pytest.mark.parametrize(("dtype", "is_compiled", "element_bytes"), [
    ("bfloat16", False, 4), ("bfloat16", True, 2), ("float32", True, 4)])
def test_cache_that_is_read(dtype, is_compiled, element_bytes):
    config, args = GPTConfig(sequence_len=64), SimpleNamespace(prompt_tokens=8, max_tokens=4, compile=is_compiled)
    machine = {"dtype": dtype, "device": "cpu", "read_bytes_per_sec": 1.0, "peak_flops": None}
    result = {"rows": 1, "decode_tokens_per_sec": 1.0, "prefill_tokens_per_sec": 1.0}
    limits = infer_bench.compute_limits(config, result, args, machine)
    assert limits["cache_bytes_per_row"] == 2 * 12 * 10 * 768 * element_bytes


@pytest.mark.slow
def test_compiled(capsys):
    report = infer_bench.main(["--depth", "1", "--vocab-size", "128", "--max-seq-len", "64", "--rows", "1", "--compile",
                               *SMALL])
    assert report["results"][0]["decode_tokens_per_sec"] > 0
    assert "eagerly" not in capsys.readouterr().out


def test_trained_model(tmp_path):
    BYTE_TOKENIZER.save(tmp_path / "tokenizer" / "default")
    config = GPTConfig(sequence_len=64, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=64)
    model = make_model(config)
    meta = {"model_config": vars(config), "tokenizer": {"name": "default", "hash": BYTE_TOKENIZER.hash}}
    save_checkpoint(tmp_path / "runs" / "base" / "d1", 3, model, model.setup_optimizer(), meta)
    report = infer_bench.main(["-i", "base", "-g", "d1", "--rows", "2", *SMALL])
    assert read_config(report["model_config"]) == config and report["results"][0]["decode_tokens_per_sec"] > 0


@pytest.mark.parametrize(("argv", "message"), [
    (["--rows", "0"], "--rows must be from 1 to 65536"),
    (["--rows", "1", "99999999"], "--rows must be from 1 to 65536"),
    (["--max-tokens", "1"], "at least 2"),
    (["-i", "base"], "--vocab-size means nothing beside --source"),
    (["-g", "d12"], "-g and -s name a trained model, of a stage; add -i base"),
    (["--json", "/nowhere/at-all.json"], "--json /nowhere/at-all.json must be a file in a folder that is there"),
    (["--depth", "1", "--max-seq-len", "64", "--prompt-tokens", "600"], "exceed the 640 positions"),
])
def test_bad_values_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        infer_bench.main([*argv, "--device-type", "cpu", "--vocab-size", "128"])


def test_read_rate(monkeypatch):
    """A GPU reads more, several times for one wait."""
    assert infer_bench.measure_read_rate(torch.device("cpu")) > 0
    made, waits, ones = [], [], torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: made.append(4 * size) or ones(size, device="meta"))
    monkeypatch.setattr(infer_bench, "synchronize", waits.append)
    monkeypatch.setattr(infer_bench.time, "perf_counter", lambda: float(len(waits)))
    rate = infer_bench.measure_read_rate(torch.device("cuda"))
    assert made == [infer_bench.CUDA_READ_BYTES] and made[0] >= 2**31
    assert rate == infer_bench.CUDA_READS * made[0] and len(waits) == 2 * infer_bench.READ_ROUNDS
