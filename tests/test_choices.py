"""How a run computes: the rows of a micro-batch that fit, and what is predicted."""

import re
from dataclasses import replace

import pytest
import torch

from nanochat.choices import Choices, StepRows, Wanted, choose_how, choose_micro_rows, predict_run
from nanochat.common import UserError
from nanochat.devices import CPU_MFU, PUBLISHED_MFU
from nanochat.memory import GIB, Machine, get_usable_frac
from nanochat.scaling import make_config, make_plan

MIB = 2**20
SMALL = make_config(2, vocab_size=300, sequence_len=512, head_dim=64)
MACHINE = Machine("float32", "sdpa", is_compiled=False, device_type="cpu")


def choose(wanted, rows_per_rank, free_bytes, kept=None, device_type="cpu", T=512):
    wanted = Wanted(micro_rows=wanted, kept={"micro_rows": kept}, kept_why="as the run began")
    return choose_micro_rows(wanted, StepRows(SMALL, T, rows_per_rank), replace(MACHINE, device_type=device_type),
                             free_bytes)


def predict(rows, rows_per_rank):
    return StepRows(SMALL, 512, rows_per_rank).predict(rows, MACHINE)


def test_what_a_stage_keeps_beside_a_step_is_not_there_for_rows():
    room, rows = round(predict(4, 12) / get_usable_frac(MACHINE)) + 1, StepRows(SMALL, 512, 12, beside=100 * MIB)
    assert choose_micro_rows(Wanted(), rows, MACHINE, room)[0] < 4
    assert choose_micro_rows(Wanted(), rows, MACHINE, room + 100 * MIB)[0] == 4
    assert rows.predict(4, MACHINE) == predict(4, 12) + 100 * MIB


def test_micro_rows_are_what_fits_and_pays():
    room = predict(4, 12) / get_usable_frac(MACHINE)
    assert choose("auto", 12, room + 1) == (4, f"largest that fits: {predict(4, 12) / GIB:.2f} GiB predicted, "
                                               f"{room / GIB:.2f} GiB free; 3 a step")
    assert choose("auto", 12, room - 1)[0] == 3
    assert choose("auto", 12, 100 * GIB)[1].startswith("all of a step: ")
    assert choose("auto", 48, 100 * GIB)[0] == 16 and "at most 8,192 tokens: " in choose("auto", 48, 100 * GIB)[1]
    rows, why = choose("auto", 256, 200 * GIB, device_type="cuda")
    assert rows == 128 and re.fullmatch(r"at most 65,536 tokens: [\d.]+ GiB predicted, 200.00 GiB free; 2 a step", why)
    for rows in (1, 7, 12, 100, 257):
        chosen, why = choose("auto", rows, None)
        assert rows % chosen == 0 and chosen <= 16 and "GiB predicted, unknown free" in why
    assert choose("auto", 4, None, T=10**6)[0] == 1  # one row always has to fit
    rows, why = choose("auto", 8, MIB)
    assert rows == 1
    assert re.fullmatch(r"the fewest there are: [\d.]+ GiB predicted, 0.00 GiB free and may not fit; 8 a step", why)


def test_a_model_far_beyond_the_memory_is_refused():
    rows = StepRows(make_config(100, vocab_size=512, sequence_len=512), 512, 8)
    with pytest.raises(UserError, match="a step needs [0-9,]+ GiB with 1 rows at a time, and 1 GiB are free"):
        choose_micro_rows(Wanted(), rows, MACHINE, GIB)


def test_micro_rows_that_are_asked_for_or_kept():
    assert choose(3, 12, 100 * GIB)[1].startswith("asked for: ")
    assert "and may not fit; 4 a step" in choose(3, 12, MIB, kept=4)[1]
    assert choose("auto", 12, 100 * GIB, kept=2)[1].startswith("as the run began: ")
    assert choose("auto", 12, predict(2, 12), kept=2)[0] == 2  # what has run needs no headroom
    rows, why = choose("auto", 12, predict(2, 12) - 1, kept=2)
    assert rows == 1 and why.startswith(f"2 as the run began would need {predict(2, 12) / GIB:.2f} GiB: ")
    assert choose("auto", 12, 100 * GIB, kept=5)[0] == 12  # on as many ranks as have 12 rows that cut can't be made
    for wanted in (5, 13, -1, 0):
        with pytest.raises(UserError, match=f"--device-batch-size {wanted} must divide the 12 rows .* 12, or auto"):
            choose(wanted, 12, None)


@pytest.mark.parametrize(("asked", "kept", "saved"), [
    ("off", "trunk", False), ("on", "trunk", True), ("trunk", False, "trunk"),
    ("auto", "trunk", "trunk"), ("auto", True, True), ("auto", False, False)])
def test_what_is_compiled_as_one_is_kept(asked, kept, saved, monkeypatch):
    monkeypatch.setattr("nanochat.choices.choose_compile", lambda wanted, *_: (wanted != "off", "it works here"))
    monkeypatch.setattr("nanochat.choices.choose_backend", lambda *_, **__: ("sdpa", "asked for"))
    monkeypatch.setattr("nanochat.choices.get_peak_flops", lambda *_: (1e12, "measured"))
    wanted = Wanted("float32", compile=asked, kept={"use_compile": kept}, kept_why="as the run began")
    chosen = choose_how(wanted, StepRows(SMALL, 512, 4), 1e9, torch.device("cpu"), [])
    assert chosen.to_json(4)["use_compile"] == saved and chosen.machine.is_compiled == bool(saved)


@pytest.mark.parametrize(("depth", "layer", "is_told"), [
    (2, None, True), (1, None, True), (2, -1, False), (2, 0, False), (3, None, False)])
def test_backout_of_the_last_layer_is_told(depth, layer, is_told, monkeypatch, capsys):
    """Of a model that was begun so: its sign may turn."""
    monkeypatch.setattr("nanochat.choices.choose_backend", lambda *_, **__: ("sdpa", "asked for"))
    monkeypatch.setattr("nanochat.choices.get_peak_flops", lambda *_: (1e12, "measured"))
    config, decisions = make_config(depth, vocab_size=300, sequence_len=512, head_dim=64, backout_layer=layer), []
    choose_how(Wanted("float32", compile="off"), StepRows(config, 512, 4), 1e9, torch.device("cpu"), decisions)
    told = [decision["value"] for decision in decisions if decision["what"] == "backout"]
    assert told == ["of the last layer"] * is_told == ["of the last layer"] * capsys.readouterr().out.count("backout: ")


def test_prediction_of_a_run(monkeypatch):
    """Time where an MFU is known, or else why not; the report card compares it with what the run took."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    plan = make_plan(SMALL, 1e9, num_iterations=10, batch_tokens=8192)
    compiled = replace(MACHINE, is_compiled=True)
    on_cpu = Choices(compiled, 1e12, micro_rows=16, memory_bytes=MIB)
    on_gpu = replace(on_cpu, machine=replace(compiled, device_type="cuda"), peak_flops=8e15)
    for choices, mfu in ((on_cpu, CPU_MFU), (on_gpu, PUBLISHED_MFU[0][1])):
        predicted = predict_run("base", choices, SMALL, plan)
        assert predicted["peak_memory_bytes"] == MIB and predicted["mfu_pct"] == pytest.approx(100 * mfu)
        assert predicted["train_sec"] == pytest.approx(1e9 * 81920 / (mfu * choices.peak_flops))
        assert predicted["tokens_per_sec"] == pytest.approx(81920 / predicted["train_sec"])
    for stage, choices, why in (
            ("base", replace(on_cpu, machine=MACHINE), "nothing was measured without compilation"),
            ("sft", replace(on_gpu, peak_flops=None), "nothing was measured on cuda devices"),
            ("rl", on_gpu, "most of a step is sampling")):
        predicted = predict_run(stage, choices, SMALL, plan)
        assert predicted["mfu_source"] == f"unknown, for {why}" and "train_sec" not in predicted
