"""The ledger: marin's published rows from a run's files, the leaderboard's order and front, what is left out."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from nanochat import ledger, report
from nanochat.common import UserError
from nanochat.config import GPTConfig, count_marin_flops, count_params, estimate_flops
from nanochat.presets import find_preset
from nanochat.scaling import make_plan
from tests.helpers import CONFIG

RULE = "val split, best-fit, T 2048, 64 rows"
H100 = {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "num_gpus": 8}
# marin's table: steps, tokens, forward FLOPs a token, model FLOPs, bits per byte on its set, hardware FLOPs, seconds
PUBLISHED = {
    "marin-150m": (955, 375_521_280, 194_396_160, 2.190e17, 1.27092, 1.1209e18, 1132.75),
    "marin-270m": (1747, 686_948_352, 422_326_272, 8.703e17, 1.17501, 3.919e18, 3960.6),
    "marin-460m": (2950, 1_159_987_200, 800_325_632, 2.785e18, 1.11268, 1.192e19, 6022.6),
}


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def make_marin_config(name: str) -> GPTConfig:
    preset = find_preset(name)
    return GPTConfig(vocab_size=128_256, window_pattern=preset.flags["window_pattern"], **preset.shape, **preset.knobs)


def write_run(base_dir: Path, tag: str, config: GPTConfig = CONFIG, *, num_steps: int = 4, batch_tokens: int = 512,
              bpb: float = 1.0, seconds: float = 8.0, peak: float | None = 1e12, stage: str = "base",
              **changes: object) -> None:
    """A finished run on one device, whose steps take equally long."""
    folder = base_dir / "runs" / stage / tag
    folder.mkdir(parents=True)
    plan = make_plan(config, estimate_flops(config), num_iterations=num_steps, batch_tokens=batch_tokens)
    info = {"stage": stage, "tag": tag, "status": "finished", "ended": "2026-11-28T13:00:00+01:00",
            "args": {"seed": 42}, "argv": ["/home/me/scripts/base_train.py", "--depth", "4"],
            "model_config": asdict(config), "params": count_params(config), "plan": asdict(plan), "num_devices": 1,
            "decisions": [{"what": "peak FLOP/s of one device", "value": str(peak), "why": "maker's figure"}],
            "environment": {"git_revision": "abc", "host": "secret", "hardware": H100},
            "data": {"name": "fineweb-edu", "hash": "0f"}, "tokenizer": {"name": "default", "hash": "1e"}}
    (folder / "run.json").write_text(json.dumps(info | changes))
    lines, step_flops = [], plan.flops_per_token * batch_tokens
    for step in range(1, num_steps + 1):
        lines.append({"kind": "train", "step": step, "loss": 5.0, "elapsed_sec": seconds * step / num_steps,
                      "flops": step * step_flops,
                      "mfu_pct": peak and 100 * step_flops / (seconds / num_steps) / peak})
    lines.append({"kind": "eval", "step": num_steps, "val_bpb": bpb, "val_bytes": 1000, "val_T": config.sequence_len,
                  "val_rule": RULE})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_ledger(*argv: str) -> tuple[dict[str, dict], str]:
    """({tag: run_info} of ledger.json, leaderboard.md)."""
    made = report.main(["ledger", *argv])
    saved = json.loads(Path(made["json"]).read_text())
    return {run["run_info"]["run"]: run["run_info"] for run in saved["runs"]}, Path(made["markdown"]).read_text()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_rows_of_marin(name, base_dir):
    """Its table from the shape, the steps and the seconds that it publishes, with its figure for an H100."""
    num_steps, tokens, forward, model_flops, bpb, hardware_flops, seconds = PUBLISHED[name]
    config = make_marin_config(name)
    num_chips = hardware_flops / 9.895e14 / seconds    # 1.00, and 2.00 of the largest
    write_run(base_dir, name, config, num_steps=num_steps, batch_tokens=192 * 2048, bpb=bpb, seconds=seconds,
              peak=9.895e14 * round(num_chips))
    entries, _ = make_ledger(name, "--author", "A. B.", "--url", "https://a.b")
    entry = entries[name]
    assert entry["total_tokens"] == tokens and entry["model_flops_per_token"] == forward
    assert entry["model_flops"] == pytest.approx(model_flops, rel=3e-4)
    assert entry["training_hardware_flops"] == pytest.approx(hardware_flops, rel=1e-3)
    assert entry["training_time"] == pytest.approx(seconds) and entry["eval/fineweb-edu/bpb"] == bpb
    assert entry["model_size"] == count_params(config)["total"]
    assert entry["author"] == {"name": "A. B.", "affiliation": None, "url": "https://a.b"}
    # ours counts no softmax: a little less
    assert 0.95 * entry["model_flops"] < entry["training_flops"] < entry["model_flops"]
    assert entry["mfu_pct"] == pytest.approx(100 * entry["training_flops"] / hardware_flops, rel=1e-3)


def test_marin_counts_no_windows_and_ours_does():
    config = replace(CONFIG, window_pattern="SSSL", sequence_len=512)
    whole = replace(config, window_pattern="L")
    assert count_marin_flops(config) == count_marin_flops(whole) and estimate_flops(config) < estimate_flops(whole)
    swiglu = replace(config, mlp_act="swiglu")
    third = 2 * config.n_layer * config.n_embd * config.hidden_dim
    assert count_marin_flops(swiglu) - count_marin_flops(config) == third


def test_an_entry_names_its_set_rule_and_command(base_dir):
    write_run(base_dir, "d4", args={"seed": 1, "preset": "plain", "knobs": ["softcap=15"]})
    entries, _ = make_ledger()
    entry = entries["d4"]
    assert entry["eval/fineweb-edu/rule"] == RULE and entry["eval/fineweb-edu/T"] == CONFIG.sequence_len
    assert entry["command"] == "python -m scripts.base_train --depth 4" and entry["git_revision"] == "abc"
    assert entry["run_completion_timestamp"] == "2026-11-28 12:00:00 UTC"
    assert entry["description"].startswith("plain, depth ") and entry["description"].endswith(", softcap=15")
    assert entry["device_flops"] == 1e12 and entry["num_devices"] == entry["num_chips"] == 1
    assert "secret" not in json.dumps(entry) and entry["wandb_run_link"] is None


def test_a_run_that_was_set_aside_has_its_folders_name(base_dir):
    write_run(base_dir, "d4")
    write_run(base_dir, "d4~1", **{"bpb": 1.1})
    info = base_dir / "runs" / "base" / "d4~1" / "run.json"
    info.write_text(info.read_text().replace('"tag": "d4~1"', '"tag": "d4"'))
    entries, board = make_ledger()
    assert set(entries) == {"d4", "d4~1"} and "d4\\~1" in board


def test_a_run_continued_on_other_devices(base_dir):
    """The first half on one device, the second on four, four times as fast: as many device seconds."""
    write_run(base_dir, "d4", seconds=8.0)
    path = base_dir / "runs" / "base" / "d4" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, elapsed in zip(lines, (2.0, 4.0, 4.5, 5.0), strict=False):
        line["elapsed_sec"] = elapsed    # and the MFU stays
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries, _ = make_ledger()
    assert entries["d4"]["training_time"] == 5.0
    assert entries["d4"]["training_hardware_flops"] == pytest.approx(8.0 * 1e12)


def test_no_peak_no_hardware_flops(base_dir):
    write_run(base_dir, "d4", peak=None)
    entries, board = make_ledger()
    assert entries["d4"]["training_hardware_flops"] is entries["d4"]["mfu_pct"] is entries["d4"]["device_flops"] is None
    assert "| – |" in board


def test_short_rows_count_by_their_length(base_dir):
    plan = make_plan(CONFIG, estimate_flops(CONFIG), num_iterations=10, batch_tokens=512,
                     seq_len_warmup=f"{CONFIG.sequence_len // 2}:4")
    halves, whole = count_marin_flops(CONFIG, CONFIG.sequence_len // 2), count_marin_flops(CONFIG)
    assert ledger.count_model_flops(CONFIG, json.loads(json.dumps(asdict(plan)))) == \
        3 * 512 * (4 * halves + 6 * whole)


def test_leaderboard(base_dir):
    """By FLOPs; the front has what nothing beats in both; the seconds of another machine are another front."""
    for tag, num_steps, bpb, seconds in (("b", 8, 1.2, 30.0), ("a", 4, 1.5, 9.0), ("worse", 16, 1.3, 90.0),
                                         ("c", 32, 1.0, 80.0)):
        write_run(base_dir, tag, num_steps=num_steps, bpb=bpb, seconds=seconds)
    write_run(base_dir, "cpu", num_steps=64, bpb=1.6, seconds=500.0, environment={"hardware": {"cpu": "a CPU"}})
    write_run(base_dir, "other", num_steps=2, bpb=0.5, data={"name": "tinystories", "hash": "2d"})
    _, board = make_ledger("a")
    tables = board.split("## ")
    rows = {table.splitlines()[0]: [line.split(" | ")[:3] for line in table.splitlines() if line.startswith("| ")][2:]
            for table in tables}
    assert [row[:2] for row in rows["Bits per byte on fineweb-edu"]] == [
        ["| FLOPs, seconds", "a"], ["| FLOPs, seconds", "b"], ["| ", "worse"], ["| FLOPs, seconds", "c"],
        ["| seconds", "cpu"]]
    assert rows["Bits per byte on tinystories"] == [["| FLOPs, seconds", "other", "0.5000"]]
    assert "val split, best-fit, T 2048, 64 rows" in board and "How to read it" in board and "Left out" not in board


def test_equals_are_both_on_the_front():
    assert ledger.find_front([(1, 2.0, ""), (1, 2.0, ""), (2, 2.0, ""), (2, 1.0, ""), (9, 9.0, "other")]) == [
        True, True, False, True, True]


def test_what_is_left_out_is_told(base_dir, capsys):
    write_run(base_dir, "done")
    write_run(base_dir, "running", status="running")
    write_run(base_dir, "blind")
    path = base_dir / "runs" / "base" / "blind" / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"eval"' not in line))
    write_run(base_dir, "future", model_config={"n_layer": 4, "wings": 2})
    write_run(base_dir, "talker", stage="sft")
    write_run(base_dir, "shapeless")
    path = base_dir / "runs" / "base" / "shapeless" / "run.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items()
                                if key != "model_config"}))
    (base_dir / "runs" / "base" / "torn").mkdir()
    (base_dir / "runs" / "base" / "torn" / "run.json").write_text('{"stage": "ba')
    entries, board = make_ledger()
    left_out = json.loads((base_dir / "ledger" / "ledger.json").read_text())["left_out"]
    assert list(entries) == ["done"] and list(left_out) == ["blind", "future", "running", "shapeless", "torn",
                                                             "sft/talker"]
    assert left_out["shapeless"] == "its run.json has no model_config"
    assert left_out["running"] == "it is running, not finished"
    assert left_out["blind"] == "it has no validation loss at its last step" and "wings" in left_out["future"]
    assert "is damaged" in left_out["torn"] and left_out["sft/talker"] == "it isn't a pretraining run"
    assert "- running: it is running, not finished." in board
    assert "left out: running: it is running, not finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="blind can't enter the ledger: it has no validation loss"):
        report.main(["ledger", "blind"])


def test_mistakes(base_dir):
    with pytest.raises(UserError, match="has no finished pretraining run for the ledger"):
        report.main(["ledger"])
    write_run(base_dir, "d4")
    report.main(["ledger", "d4", "d4"])
    assert len(json.loads((base_dir / "ledger" / "ledger.json").read_text())["runs"]) == 1
    with pytest.raises(UserError, match="there is no run d6: .* has d4"):
        report.main(["ledger", "d6"])
    (base_dir / "a_file").touch()
    with pytest.raises(UserError, match="choose a folder with --out"):
        report.main(["ledger", "--out", str(base_dir / "a_file")])


def test_marin_flops_of_experts():
    """Its formula: the MLP's term for each of a token's experts, and the router."""
    dense = GPTConfig()
    moe = replace(dense, num_experts=8, top_k=1)
    assert count_marin_flops(moe) == count_marin_flops(dense) + 2 * dense.n_layer * dense.n_embd * 8
    every_other = replace(dense, num_experts=8, top_k=3, moe_every=2)
    assert count_marin_flops(every_other) == count_marin_flops(dense) + dense.n_layer * dense.n_embd * 8
