"""The cost of experts: rates that made-up runs were made with are found again; refusals."""

from dataclasses import asdict, replace

import pytest

from dev import moe_cost
from nanochat.checkpoint_manager import get_run_dir
from nanochat.common import Ranks, UserError
from nanochat.config import GPTConfig
from nanochat.run import RunLog

DENSE = GPTConfig(sequence_len=64, vocab_size=512, n_layer=4, n_head=2, n_kv_head=2, n_embd=128)
MUON_RATE, COPY_RATE = 3e8, 5e6    # a millisecond


def write_run(tag, config, ms, batch=4096):
    with RunLog(get_run_dir("base", tag), {"model_config": asdict(config), "plan": {"batch_tokens": batch}},
                Ranks()) as log:
        for step, value in enumerate((9e3, ms, ms), 1):    # the first one compiles
            log.write("train", step, step_ms=value)
        log.close("finished")


@pytest.fixture
def tags(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    write_run("dense", DENSE, 500)
    tags = ["dense"]
    for num_experts, top_k, every in ((4, 1, 1), (8, 2, 1), (8, 1, 2)):
        config = replace(DENSE, num_experts=num_experts, top_k=top_k, moe_every=every)
        layers = 4 // every    # of experts of 256 hidden channels; for k = 2 a third of 512 is rounded up to that
        muon = layers * (2 * (num_experts + 1) * 5 * (4 * 128**2 * 256 + 2 * 128**3)
                         - 2 * 5 * (4 * 128**2 * 512 + 2 * 128**3))
        copied = 4096 * layers * (8 + 34 * top_k) * 128
        tags.append(f"e{num_experts}k{top_k}x{every}")
        write_run(tags[-1], config, 500 + muon / MUON_RATE + copied / COPY_RATE)
    return tags


def test_rates_are_found_again(tags, capsys):
    found = moe_cost.main(tags)
    assert found["muon_rate"] == pytest.approx(MUON_RATE, rel=1e-6)
    assert found["copy_rate"] == pytest.approx(COPY_RATE, rel=1e-6)
    for _, experts, _, _, _, dense_ms, ms, fitted, over_dense, muon_part, *taxes in found["rows"]:
        assert fitted == pytest.approx(ms) and over_dense == ms / dense_ms and experts in (4, 8)
        assert 0 < muon_part < 1 and over_dense > taxes[0] > taxes[1] > taxes[2] > 1
    # of the largest batch, copies alone: 4 layers of 42 C bytes, at 5 GB/s, beside 500 ms of 4,096 tokens
    assert found["rows"][0][-1] == pytest.approx(1 + 4 * 42 * 128 * 4096 / COPY_RATE / 500, rel=0.02)
    assert "Muon's further products: 0.30 TFLOP/s; copies: 5.0 GB/s" in capsys.readouterr().out


def test_refusals(tags):
    for names, message in ((tags[1:], "of depth 4 and 4096 tokens a step there is no dense run"),
                           (tags[:2], "two rates need two different mixtures"), (["nothing"], "holds no steps")):
        with pytest.raises(UserError, match=message):
            moe_cost.main(names)
    write_run("fast", replace(DENSE, num_experts=16), 400)
    with pytest.raises(UserError, match="was as fast as its dense model"):
        moe_cost.main([*tags, "fast"])


def test_a_dense_model_that_differs_otherwise_is_none(tags):
    write_run("dense", replace(DENSE, smear=False), 500)
    with pytest.raises(UserError, match="no dense run that differs in its experts alone"):
        moe_cost.main(tags)
