"""The network's cost: a step's messages are those that the optimizer sends, and their time is a link's."""

import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from dev import fabric as laboratory
from dev import fabric_predict, links
from dev.links import Wire, run_tool
from dev.timing import make_random_batch
from nanochat.common import UserError
from nanochat.config import estimate_flops
from nanochat.cross_entropy import LossScaler
from nanochat.fabric import (
    FABRICS,
    Event,
    Fabric,
    Network,
    count_layer_flops,
    find_fabric,
    list_step,
    predict_step,
    simulate,
)
from nanochat.gpt import GPT
from nanochat.memory import Machine
from nanochat.moe import make_balance
from nanochat.presets import RULES
from nanochat.scaling import make_config
from nanochat.train import train_step
from scripts import plan
from tests.helpers import REPO_DIR, run_on_ranks

SLOW = Fabric("slow", 0.02, 10e6)


def record_step(config, machine, rule, num_micro):
    """What rank 0 starts and waits for in a real step, among ranks that send nothing."""
    dist.init_process_group("fake", rank=0, world_size=machine.world_size)
    try:
        model = GPT(config, getattr(torch, machine.dtype))
        model.init_weights()
        model.balance = make_balance(model)
        optimizer = model.setup_optimizer(rule=rule)
        scaler = LossScaler() if machine.dtype == "float16" else None
        batch = make_random_batch(config, num_micro, torch.device("cpu"))
        with Wire().tapped() as wire:
            train_step(model, optimizer, batch, 1, scaler)
        return [moment.event for moment in wire.moments]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "knobs", "dtype", "rule", "num_micro"), [
    (2,    {},                                   "float32",  "july26", 1),
    (8,    {},                                   "bfloat16", "july26", 2),
    (6,    {},                                   "bfloat16", "july26", 1),    # which don't share the vocabulary
    (64,   {},                                   "bfloat16", "july26", 1),
    (256,  {},                                   "bfloat16", "july26", 1),
    (1024, {},                                   "bfloat16", "july26", 1),
    (4,    {"num_experts": 8, "moe_every": 2},   "bfloat16", "july26", 1),
    (4,    {"num_experts": 6, "top_k": 3},       "float32",  "july26", 1),    # nor the experts
    (2,    {"num_experts": 2, "top_k": 2},       "float32",  "july26", 1),    # nothing to balance
    (4,    {},                                   "bfloat16", "dec26",  1),    # in which queries and keys come first
    (4,    {"n_kv_head": 1},                     "bfloat16", "dec26",  1),
    (4,    {},                                   "bfloat16", "jan26",  1),
    (4,    {},                                   "float32",  "marin",  1),    # clips
    (4,    {},                                   "float32",  "adam",   1),
    (4,    {},                                   "float16",  "july26", 1),
    (4,    {"smear": False, "resid_init": None}, "float64",  "july26", 1)])
def test_messages_are_those_of_the_step(world_size, knobs, dtype, rule, num_micro):
    """In order and bytes, and what is waited for when. Where this fails, the optimizer and nanochat/fabric.py have
    parted."""
    config = make_config(3, vocab_size=1000, sequence_len=16, aspect_ratio=16, head_dim=16, **knobs)
    machine = Machine(dtype, world_size=world_size, device_type="cpu", has_muon=RULES[rule].has_muon)
    events = [event for event in list_step(config, machine, 16, num_micro, RULES[rule]) if event.kind != "compute"]
    recorded = record_step(config, machine, RULES[rule], num_micro)
    assert len(events) > 30
    assert [event._replace(phase="", is_host=False) for event in events] == recorded


def test_full_size_traced_on_many_ranks():
    row = fabric_predict.trace_ranks(4, 64)
    assert row["messages"] == row["predicted"] > 15 and row["MB"] == row["predicted MB"] > 100
    assert row["GiB"] == pytest.approx(row["predicted GiB"], rel=0.1)


def test_one_rank_sends_nothing():
    config = make_config(3, vocab_size=1000, sequence_len=64)
    events = list_step(config, Machine(), 64)
    assert {event.kind for event in events} == {"compute"}
    step = predict_step(config, Machine(), Network(FABRICS["wan"], 1, 1), 1e12, 64, 1)
    assert step.step_sec == step.compute_sec and step.num_messages == 0


@pytest.mark.parametrize("knobs", [{}, {"num_experts": 8, "moe_every": 2}])
def test_flops_of_the_layers_are_the_models(knobs):
    config = make_config(12, vocab_size=32768, sequence_len=2048, **knobs)
    assert sum(count_layer_flops(config, 1).values()) == pytest.approx(estimate_flops(config), rel=1e-5)
    for loss in ("fused", "plain"):
        for num_micro in (1, 3):
            events = list_step(config, Machine(loss=loss), 100, num_micro)
            model = sum(event.amount for event in events if event.kind == "compute" and event.phase != "update")
            assert model == pytest.approx(100 * num_micro * estimate_flops(config), rel=1e-5)


def count_update(config, rule, rank, num_ranks):
    """FLOPs of a rank's update, as torch counts them: Muon's products alone."""
    dist.init_process_group("fake", rank=rank, world_size=num_ranks)
    try:
        optimizer = GPT(config).setup_optimizer(rule=rule)
        with FlopCounterMode(display=False) as counter:
            optimizer.step()
        return counter.get_total_flops()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("rule", "num_ranks", "knobs"), [
    ("dec26", 1, {}), ("dec26", 4, {}), ("dec26", 4, {"num_experts": 4, "n_kv_head": 1}), ("nov26", 4, {}),
    ("adam",  4, {})])
def test_update_flops_are_those_that_torch_counts(rule, num_ranks, knobs, monkeypatch):
    """Queries and keys by heads, where the rule has it; padding included. A step waits for the slowest rank."""
    config = make_config(3, vocab_size=1000, sequence_len=16, aspect_ratio=16, head_dim=16, **knobs)
    counted = [count_update(config, RULES[rule], rank, num_ranks) for rank in range(num_ranks)]
    assert plan.count_update_flops(config, num_ranks, RULES[rule]) == sum(counted)
    assert any(counted) == RULES[rule].has_muon
    monkeypatch.setattr("nanochat.fabric.ADAM_FLOPS", 0)
    events = list_step(config, Machine("float32", world_size=num_ranks), 16, rule=RULES[rule])
    assert sum(event.amount for event in events if event.kind == "compute" and event.phase == "update") == max(counted)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def test_collectives_of_a_ring():
    """nccl-tests' convention: a ring's busbw is the link's rate, whatever the number of ranks."""
    link = Fabric("x", 0.0, 1e9)
    for n in (2, 4, 1024):
        assert Network(link, n, 1).time("all_gather", 1e9) == pytest.approx((n - 1) / n)
        assert Network(link, n, n).time("all_reduce", 1e9) == pytest.approx(2 * (n - 1) / n)
    assert Network(Fabric("x", 1.0, math.inf), 8, 1).time("reduce_scatter", 1) == 7
    assert Network(Fabric("x", 1.0, math.inf), 8, 1).time("all_reduce", 1) == 2 * 3    # a tree's
    assert Network(link, 1, 1).time("all_reduce", 1e9) == 0


def test_nodes_have_a_card_for_each_gpu_or_one():
    """Two nodes of eight: eight cards of 50 GB/s side by side, or one of 1.2; NVLink within, which is the limit of
    faster ones."""
    ib, slow = (Network(FABRICS[name], 16, 2).time("all_gather", 16e9) for name in ("ib", "10g"))
    assert ib == pytest.approx(15e9 / (8 * 50e9), rel=0.01) and slow == pytest.approx(15e9 / 1.2e9, rel=0.01)
    assert Network(Fabric("x", 0.0, 100e9), 16, 2).time("all_gather", 16e9) == pytest.approx(15e9 / 450e9, rel=0.01)
    assert Network(Fabric("x", 1.0, math.inf), 16, 2).time("all_gather", 0) == pytest.approx(1.0, abs=1e-3)


def test_messages_share_their_link_and_hide_behind_computation():
    """A link that takes one second for each of two messages of a rank that computes for half a second after each."""
    network = Network(Fabric("x", 0.0, 1.0), 2, 1)
    events = [Event("all_gather", "backward", 2, 0), Event("compute", "backward", 0.5),
              Event("all_gather", "backward", 2, 1), Event("compute", "update", 0.5), Event("wait", "update", key=0),
              Event("wait", "update", key=1)]
    step = simulate(events, 1.0, network)
    assert (step.compute_sec, step.link_sec, step.step_sec) == (1.0, 2.0, 2.0)
    assert step.exposed_sec == {"forward": 0, "backward": 0, "update": 1.0}
    assert simulate(events, {"backward": 4.0, "update": 4.0}, network).step_sec == 4.0
    # what a wait takes where the network is free is its least
    step = simulate(events, 1.0, network, {0: 0.25, 1: 3.0})
    assert step.exposed_sec["update"] == 3.25 and step.compute_sec == 1.0
    # a message between hosts goes beside them, and isn't hidden where it is waited for at once
    between_hosts = [*events[:1], Event("all_reduce", "backward", 0.5, 2, True), Event("wait", "backward", key=2),
                     *events[1:]]
    step = simulate(between_hosts, 1.0, network)
    assert step.exposed_sec == {"forward": 0, "backward": 0.5, "update": 0.5} and step.step_sec == 2.0


@pytest.mark.parametrize("depth", [12, 24])
def test_what_is_done_already_pays_on_every_fabric(depth):
    """Reductions during the backward pass and bf16 gathers; faster fabrics, larger batches and rare synchronisation."""
    job, before = fabric_predict.make_job(depth, 8), 0.0
    for fabric in FABRICS.values():
        row = fabric_predict.list_helps(job, Network(fabric, 8, 1))
        assert row["neither"] <= row["fp32 gathers"] < row["as it is"] < row["4 x the batch"] < 100
        assert row["neither"] <= row["reduced after backward"] < row["as it is"]
        assert before == 0 or row["as it is"] < before
        assert fabric.name == "nvlink" or row["DiLoCo, every 30"] > row["as it is"]
        before = row["as it is"]


# ---------------------------------------------------------------------------------------------------------------------
# Links that are measured and injected


def test_fit_finds_the_link():
    sizes = np.array([2.0**k for k in range(10, 24)])
    for kind in laboratory.KINDS:
        network = Network(Fabric("x", 5e-5, 2e9), 4, 1)
        hops, factor = laboratory.count_hops(kind, 4)
        seconds = hops * network.fabric.alpha + sizes * factor / network.fabric.beta
        alpha, beta, half_bytes, error = laboratory.fit_link(kind, 4, sizes, seconds)
        assert (alpha, beta, error) == (pytest.approx(5e-5), pytest.approx(2e9), pytest.approx(0, abs=1e-9))
        assert half_bytes / (hops * alpha + half_bytes * factor / beta) == pytest.approx(beta / factor / 2)


def send_three(network):
    """Two messages that overlap, then one that doesn't: when they were due and when they had come, in seconds."""
    from nanochat import optim
    whole, own, gathered = torch.ones(4000), torch.ones(2000), torch.zeros(4000)
    with Wire(network=Network(*network)).tapped() as wire:
        dist.barrier()
        begin, ends = time.perf_counter(), []
        works = [optim.reduce_scatter(own, whole, async_op=True),
                 optim.all_gather(gathered, whole[:2000], async_op=True)]
        for work in works:
            work.wait()
            ends.append(time.perf_counter() - begin)
        dist.all_reduce(gathered)
        return [*(work.due - begin for work in works), *ends, time.perf_counter() - begin, len(wire.moments),
                own.tolist() + gathered.tolist()]


def measure_and_inject():
    """The laboratory's own loops, as a rank of torchrun runs them."""
    rows = laboratory.main(["measure", "--max-kib", "4", "--rounds", "2"])["rows"]
    toy = ["--depth", "1", "--max-seq-len", "16", "--vocab-size", "64", "--rows", "2", "--rounds", "1"]
    return rows, laboratory.main(["inject", *toy, "--links", "5000:10"])["rows"]


def test_injected_link_has_one_clock(tmp_path):
    """Each message takes 20 ms and 8 KB at 10 MB/s; the second begins when the first is through."""
    three, (measured, *_) = run_on_ranks([(2, send_three, ((SLOW, 2, 1),)), (2, measure_and_inject, ())], tmp_path)
    one = 0.02 + 8000 / 10e6
    for first_due, second_due, first, second, third, num_moments, values in three:
        assert second_due - first_due == pytest.approx(one) and first >= first_due >= one and second >= second_due
        assert third >= 2 * one + 0.04
        assert num_moments == 6 and values == [2] * 6000
    rows, (step,) = measured
    assert [row["KiB"] for row in rows] == 4 * [1, 4]
    assert all(row["busbw MB/s"] == row["algbw MB/s"] for row in rows if row["collective"] == "all_reduce")
    assert step["messages"] > 15 and step["measured ms"] > step["link ms"] > 100


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def test_prediction_is_drawn(tmp_path, capsys):
    result = laboratory.main(["predict", "--depth", "12", "--fabric", "ib", "20:12000", "--out", str(tmp_path),
                              "--json", str(tmp_path / "figures.json")])
    ib, other = result["d12"]["steps"]
    assert ib["tokens/s"] > other["tokens/s"] and "predicted" in capsys.readouterr().out
    assert (tmp_path / "fabric.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "figures.json").read_text()) == result


def test_plan_over_a_fabric(capsys):
    argv = ["--depth", "12", "--nproc", "16"]
    alone, ib, slow, nodes = (plan.main([*argv, *more])["runs"][0] for more in (
        [], ["--fabric", "ib"], ["--fabric", "10g"], ["--fabric", "10g", "--nodes", "2"]))
    assert alone["network"] is None and alone["hours"] < ib["hours"] < slow["hours"]
    added = sum(slow["network"]["exposed_sec"].values()) * slow["plan"]["num_iterations"] / 3600
    assert slow["hours"] == pytest.approx(alone["hours"] + added) and slow["dollars"] == 48 * slow["hours"]
    assert nodes["network"]["link_sec"] < slow["network"]["link_sec"]
    out = capsys.readouterr().out.split("16 x h100")
    assert "Network" not in out[1] and "not hidden by computation" in out[2] and "Network: predicted" in out[2]


@pytest.mark.parametrize(("main", "argv", "message"), [
    (plan.main, ["--fabric", "wifi"], "no fabric is named wifi; choose one of nvlink, ib, .* as in 20:12000"),
    (plan.main, ["--fabric", "ib", "--nproc", "8", "--nodes", "3"], "8 ranks can't be shared by 3 nodes evenly"),
    (plan.main, ["--nproc", "8", "--nodes", "2"], "--nodes 2 says nothing without --fabric"),
    (laboratory.main, ["predict", "--fabric", "5:0"], "no fabric is named 5:0"),
    (laboratory.main, ["predict", "--gpu", "wonder"], "--gpu wonder is not in the table"),
    (laboratory.main, ["predict", "--total-batch-size", "1000"], "--total-batch-size 1000 must be a multiple of 16384"),
    (laboratory.main, ["measure", "--ranks", "1"], "one rank alone sends nothing"),
    (laboratory.main, ["measure", "--ranks", "0"], "--ranks 0 must be at least 1"),
    (laboratory.main, ["measure", "--json", "no-folder/x.json"], "--json no-folder/x.json must be a file in a folder"),
    (laboratory.main, ["measure", "--max-kib", "1"], "--max-kib 1 must be at least 4: a fit needs two sizes"),
    (laboratory.main, ["measure", "--here"], "--here: one rank alone sends nothing"),
    (laboratory.main, ["inject", "--links"], "--links needs a link at least"),
    (laboratory.main, ["inject", "--json", "."], "--json . must be a file in a folder that is there"),
    (laboratory.main, ["measure", "--ranks", "2", "1"], "one rank alone sends nothing"),
    (laboratory.main, ["inject", "--max-seq-len", "0"], "--max-seq-len 0 must be at least 1"),
    (laboratory.main, ["inject", "--rows", "3", "--ranks", "1", "2"], "--rows 3 must be a multiple of the 2 ranks"),
    (laboratory.main, ["inject", "--shape", "--links", "free"], "--shape shapes the rate alone"),
    (laboratory.main, ["inject", "--shape", "--links", "5:100"], "--shape shapes the rate alone, .* --links 0:200")])
def test_refused_in_one_sentence(main, argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)


def test_more_ranks_than_cores_are_a_warning(monkeypatch, capsys):
    monkeypatch.setattr(laboratory, "run_ranks", lambda argv, num_ranks: {"rows": []})
    monkeypatch.setattr(laboratory, "print_rows", lambda rows: None)
    laboratory.main(["measure", "--ranks", "4096"])
    assert capsys.readouterr().out.startswith("warning: 4096 ranks share ")


def test_shaping_says_what_it_needs():
    with pytest.raises(UserError, match=r"--shape needs the command no-such-tool, of the package iproute2"):
        run_tool("no-such-tool")
    with pytest.raises(UserError, match=r"--shape needs root and network namespaces: `false` failed .*; leave it out"):
        run_tool("false")


def test_a_rank_that_fails_ends_the_others(monkeypatch):
    """Before they have met it, they'd wait for half an hour."""
    monkeypatch.setattr(links, "GRACE_SEC", 0.2)
    assert links.wait_for_all([subprocess.Popen(command) for command in (["sleep", "60"], ["sh", "-c", "exit 3"])]) == [
        -9, 3]


def test_sigterm_is_an_exception():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"), links.stopped_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone kills a process when its parent ends")
def test_ranks_end_with_the_process_that_started_them():
    """However it ended: the pipe that both hold is at its end long before the rank would be."""
    done = subprocess.run([sys.executable, "-m", "tests.programs.dying_parent"], cwd=REPO_DIR, stdout=subprocess.PIPE,
                          timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL


def test_links_by_name():
    assert find_fabric("ib") is FABRICS["ib"]
    assert find_fabric("20:12000")[1:3] == (pytest.approx(20e-6), 12e9)
