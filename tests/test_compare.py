"""The compute multiplier on curves whose answer is known, seeds as one group, and what makes a comparison void."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dev import compare
from nanochat.common import Ranks, UserError
from nanochat.run import RunLog
from nanochat.scaling import make_config, make_plan

FLOPS_PER_TOKEN, BATCH_TOKENS, NUM_STEPS = 1000.0, 512, 100


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def write_run(base_dir: Path, tag: str, speed: float = 1.0, seed: int = 1, lr: float = 0.02, step_sec: float = 0.1,
              shift: float = 0.0, eval_every: int = 5, status: str = "finished", stage: str = "base",
              **changes: object) -> None:
    """A run whose loss after `steps` is 4 - speed * steps / 100 + shift: twice the speed is half the compute."""
    plan = make_plan(make_config(2, vocab_size=512, sequence_len=64), FLOPS_PER_TOKEN, num_iterations=NUM_STEPS,
                     batch_tokens=BATCH_TOKENS)
    info = {"stage": stage, "args": {"seed": seed, "matrix_lr": lr, "model_tag": tag, "keep_every": 9 * seed},
            "plan": asdict(plan), "data": {"hash": "d"}, "tokenizer": {"hash": "t"},
            "environment": {"hardware": {"cpu": "x"}}}
    with RunLog(base_dir / "runs" / stage / tag, info | changes, Ranks()) as log:
        for step in range(1, NUM_STEPS + 1):
            loss = 4 - speed * step / 100 + shift
            log.write("train", step, loss=9.0, loss_smooth=2 * loss, elapsed_sec=step * step_sec)
            if step % eval_every == 0:
                log.write("eval", step, val_bpb=loss, val_rule="rows", val_bytes=10)
        log.close(status)


def test_multiplier_of_a_faster_learner(base_dir):
    write_run(base_dir, "a")
    write_run(base_dir, "b", speed=1.6, lr=0.04, step_sec=0.2)
    results = compare.main(["a", "b"])
    b = results["groups"]["b"]
    total_flops = NUM_STEPS * BATCH_TOKENS * FLOPS_PER_TOKEN
    # 62.5 steps lie between two evaluations
    assert b["flops_to_reach"]["needed"] == pytest.approx(0.625 * total_flops)
    assert b["flops_to_reach"]["multiplier"] == pytest.approx(1.6)
    assert b["seconds_to_reach"]["needed"] == pytest.approx(12.5)
    assert b["seconds_to_reach"]["multiplier"] == pytest.approx(0.8)
    assert results["differences"] == {"matrix_lr": {"a": 0.02, "b": 0.04}}
    out = base_dir / "compare" / "a-b"
    assert json.loads((out / "compare.json").read_text()) == results
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_flops_are_those_that_were_logged(base_dir):
    """Of a run whose first half has short rows: the tokens of its plan at the plan's FLOPs would be too much."""
    write_run(base_dir, "a")
    write_run(base_dir, "b", speed=2.0, lr=0.04)
    step_flops = BATCH_TOKENS * FLOPS_PER_TOKEN
    path = base_dir / "runs" / "base" / "b" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"flops": step_flops * (line["step"] - min(line["step"], 50) / 5)}) + "\n"
                            for line in lines))
    b = compare.main(["a", "b"])["groups"]["b"]
    assert b["flops_to_reach"]["needed"] == pytest.approx(40 * step_flops) and b["flops"] == 90 * step_flops
    assert b["flops_to_reach"]["multiplier"] == pytest.approx(2.5)


def test_not_reached_and_the_other_way_round(base_dir, capsys):
    write_run(base_dir, "a")
    write_run(base_dir, "b", speed=0.8, lr=0.04)
    b = compare.main(["a", "b"])["groups"]["b"]
    assert b["flops_to_reach"]["multiplier"] is None and b["flops_to_reach"]["needed"] is None
    assert b["base_flops_to_reach"]["multiplier"] == pytest.approx(1.25)
    printed = capsys.readouterr().out
    assert "not reached" in printed and "a reaches the final val_bpb of b with 80% of its FLOPs" in printed


def test_seeds_are_one_group(base_dir):
    for seed, shift in ((1, 0.0), (2, 0.02), (3, -0.02)):
        write_run(base_dir, f"a-s{seed}", seed=seed, shift=shift)
        write_run(base_dir, f"b-s{seed}", seed=seed, shift=shift, speed=1.6, lr=0.04, eval_every=1)
    results = compare.main([f"{kind}-s{seed}" for seed in (1, 2, 3) for kind in "ab"])
    assert list(results["groups"]) == ["a (3 seeds)", "b (3 seeds)"]
    a, b = results["groups"].values()
    assert a["seeds"] == [1, 2, 3] and a["final_std"] == pytest.approx(0.02)
    measured = b["flops_to_reach"]
    assert measured["num_pairs"] == measured["num_reached"] == 9
    assert measured["multiplier"] == pytest.approx(1.6)
    # the worst pair is b's seed 2 (.02 above) against a's seed 3 (.02 below): (1 + .04) / 1.6 of the steps
    assert measured["lowest"] == pytest.approx(1.6 / 1.04) and measured["highest"] == pytest.approx(1.6 / 0.96)
    assert not any("chance" in note for note in results["notes"])


def test_some_pairs_do_not_reach(base_dir, capsys):
    write_run(base_dir, "a")
    for seed, shift in ((1, 0.1), (2, -0.1), (3, -0.1)):
        write_run(base_dir, f"b-{seed}", seed=seed, shift=shift, lr=0.04)
    measured = compare.main(["a", "b-1", "b-2", "b-3"])["groups"]["b (3 seeds)"]["flops_to_reach"]
    assert measured["num_reached"] == 2 and measured["lowest"] is None
    assert measured["multiplier"] == pytest.approx(1 / 0.9)
    assert "1.111 (not reached in 1 of 3)" in capsys.readouterr().out


def test_same_settings_and_seed_are_two_groups(base_dir):
    write_run(base_dir, "before")
    write_run(base_dir, "after", speed=1.25)
    results = compare.main(["before", "after"])
    assert results["groups"]["after"]["flops_to_reach"]["multiplier"] == pytest.approx(1.25)
    assert results["differences"] == {}


def test_train_loss(base_dir):
    write_run(base_dir, "a", eval_every=1000)
    write_run(base_dir, "b", speed=2, lr=0.04, eval_every=1000)
    results = compare.main(["a", "b", "--metric", "train_loss"])
    assert results["groups"]["a"]["final_mean"] == pytest.approx(6)
    assert results["groups"]["b"]["flops_to_reach"]["multiplier"] == pytest.approx(2)
    with pytest.raises(UserError, match="has logged no val_bpb; train it with --eval-every"):
        compare.main(["a", "b"])


def test_a_run_without_flops_is_refused(base_dir):
    write_run(base_dir, "a")
    write_run(base_dir, "b", plan={"batch_tokens": BATCH_TOKENS})
    with pytest.raises(UserError, match="b doesn't say its tokens and FLOPs"):
        compare.main(["a", "b"])


def test_first_crossing_counts():
    axes = {"values": np.array([3.0, 2.0, 2.5, 1.0]), "flops": np.array([10.0, 20.0, 30.0, 40.0])}
    run = compare.Run("a", 1, {}, (), None, axes, True)
    assert compare.find_cost(run, 2.2, "flops") == pytest.approx(18)
    assert compare.find_cost(run, 1.75, "flops") == pytest.approx(35)
    assert compare.find_cost(run, 5.0, "flops") == 10 and compare.find_cost(run, 0.5, "flops") is None


def test_caveats(base_dir):
    write_run(base_dir, "a")
    write_run(base_dir, "b", lr=0.04, status="stopped", eval_every=50, data={"hash": "other"},
              environment={"hardware": {"cpu": "y"}})
    notes = "\n".join(compare.main(["a", "b"])["notes"])
    for part in ("b has not reached its horizon", "b was measured 2 times only", "not measured on the same text",
                 "different machines", "With one seed a side"):
        assert part in notes


def test_runs_are_found(base_dir, tmp_path):
    write_run(base_dir, "a")
    write_run(base_dir, "b", speed=2, lr=0.04)
    write_run(base_dir, "a", stage="mid", lr=0.04)
    for names, complaint in ((["a", "b"], "a is a run of several stages; say which: base/a or mid/a"),
                             (["b", "c"], "there is no run c: .* has a, a, b"), (["b", "base/b"], "is given twice"),
                             (["b"], "b is the only run")):
        with pytest.raises(UserError, match=complaint):
            compare.main(names)
    folder = str(base_dir / "runs" / "base" / "a")
    assert compare.main([folder, "b", "--out", str(tmp_path / "out")])["base"] == "a"
    assert (tmp_path / "out" / "compare.png").is_file()


def test_seeds_alone_are_no_comparison(base_dir):
    write_run(base_dir, "a", seed=1)
    write_run(base_dir, "b", seed=2)
    with pytest.raises(UserError, match="these runs differ only in their seed"):
        compare.main(["a", "b"])
