"""Sweeps: a grid run for real at toy size, killed in the middle and gone on with; failures, refusals, and the laws."""

import contextlib
import json
import os
import signal
import time

import pytest

from dev import scaling_laws
from dev.results import load_results
from nanochat.checkpoint_manager import get_run_dir
from nanochat.common import UserError, get_worker_env
from nanochat.run import read_metrics
from scripts import sweep
from tests.helpers import make_base, start_script

TOY = ["--data", "toy", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "32", "--total-batch-size", "128",
       "--eval-tokens", "512", "--dtype", "float32", "--device-type", "cpu", "--sample-every", "-1",
       "--compile", "off"]
GRID = ["--grid", "depth=1,2", "num-iterations=3,4"]


@pytest.fixture(scope="module", autouse=True)
def base_dir(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("sweep") / "base"
    base_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        make_base(base_dir, patch, num_docs=60)
        yield base_dir


@contextlib.contextmanager
def running_sweep(*argv):
    """A sweep in a process of its own, killed at the end."""
    process = start_script("scripts.sweep", *argv)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, sec=120):
    deadline = time.monotonic() + sec
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_status(tag):
    try:
        return json.loads((get_run_dir("base", tag) / "run.json").read_text())["status"]
    except FileNotFoundError:
        return None


def test_killed_sweep_goes_on(base_dir, capfd):
    """SIGKILL leaves the run in progress alone; the same command again runs what is left, each point once."""
    tags = [f"toy-depth{depth}-num-iterations{steps}" for depth in (1, 2) for steps in (3, 4)]
    with running_sweep("--name", "toy", *GRID, "--", *TOY):
        wait_for(lambda: read_status(tags[0]) == "finished" and read_status(tags[1]))
    before = (get_run_dir("base", tags[0]) / "run.json").read_bytes()
    results = sweep.main(["--name", "toy", *GRID, "--parallel", "2", "--", *TOY])
    assert [run["tag"] for run in results["runs"]] == tags  # the cheapest first
    assert [run["status"] for run in results["runs"]] == ["finished"] * 4 and not results["failed"]
    assert (get_run_dir("base", tags[0]) / "run.json").read_bytes() == before
    for run, steps in zip(results["runs"], (3, 4, 3, 4), strict=True):
        lines = read_metrics(get_run_dir("base", run["tag"]))
        assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, steps + 1))
        assert run["val_bpb"] == [line["val_bpb"] for line in lines if line["kind"] == "eval"][-1]
    output = capfd.readouterr().out
    assert "4 of 4 finished" in output and f"sweep: {results['folder']}" in output

    # nothing is left to do; another grid is refused, both sides named; the laws read the folder
    assert sweep.main(["--name", "toy", *GRID, "--", *TOY])["runs"] == results["runs"]
    with pytest.raises(UserError, match="has the grid depth=1,2 num-iterations=3,4 -- .* says depth=1,3 -- "):
        sweep.main(["--name", "toy", "--grid", "depth=1,3", "--", *TOY])
    found = load_results(base_dir / "sweeps" / "toy")
    assert sorted(run.name for run in found.runs) == sorted(tags) and not any("left out" in n for n in found.notes)
    assert {run.tokens for run in found.runs} == {3 * 128, 4 * 128}

    # flags that don't change what is learned may be others; those that do may not
    assert sweep.main(["--name", "toy", *GRID, "--", *TOY, "--save-every", "2"])["runs"] == results["runs"]
    with pytest.raises(UserError, match="has the grid"):
        sweep.main(["--name", "toy", *GRID, "--", *TOY, "--seed", "2"])


def test_sigterm_ends_the_runs_in_order():
    """The run saves and stops before the sweep ends, and goes on from there."""
    run_dir = get_run_dir("base", "long-depth1")
    with running_sweep("--name", "long", "--grid", "depth=1,2", "--", *TOY, "--num-iterations", "100000") as process:
        wait_for(lambda: any(line["kind"] == "train" for line in read_metrics(run_dir)))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on with the 2 runs that are left" in output
    assert read_status("long-depth1") == "stopped" and (run_dir / "latest").exists()
    assert read_status("long-depth2") is None


class FakeRun:
    """A process that has ended: depth 3 failed, others finished."""
    pid = os.getpid()

    def __init__(self, command, stdout, **options):
        tag, depth = (command[command.index("--model-tag") + i] for i in (1, 2))
        self.returncode = 2 if depth == "--depth=3" else 0
        stdout.write(b"loading\nerror: out of memory\n" if self.returncode else b"done\n")
        if not self.returncode:
            get_run_dir("base", tag).mkdir(parents=True)
            info = {"status": "finished", "argv": ["base_train.py", *command[command.index("--model-tag"):]]}
            (get_run_dir("base", tag) / "run.json").write_text(json.dumps(info))

    def poll(self):
        return self.returncode


def test_failed_runs_are_recorded_skipped_and_retried(base_dir, capsys, monkeypatch):
    commands = []
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda command, **options: commands.append(command) or
                        FakeRun(command, **options))
    argv = ["--name", "bad", "--grid", "depth=3,4", "--", *TOY]
    results = sweep.main(argv)
    assert [run["status"] for run in results["runs"]] == ["failed", "finished"] and len(commands) == 2
    assert results["failed"] == {"bad-depth3": "exit code 2 (error: out of memory)"}
    assert "--retry-failed" in capsys.readouterr().out
    assert sweep.main(argv)["failed"] == results["failed"] and len(commands) == 2
    assert sweep.main(["--retry-failed", *argv])["failed"] == results["failed"]
    assert len(commands) == 3 and "bad-depth3" in commands[2]
    sweep.main(["--name", "wide", "--grid", "depth=1", "--nproc", "2", "--", *TOY])
    assert "torch.distributed.run" in commands[3] and "--nproc-per-node=2" in commands[3]
    with pytest.raises(UserError, match=r"bad-depth3 is left out: exit code 2 \(error: out of memory\)\."):
        load_results(base_dir / "sweeps" / "bad")


def test_a_retry_that_fails_early_does_not_repeat_the_reason_before(monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", FakeRun)
    run_dir = get_run_dir("base", "again-depth3")
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"status": "failed", "reason": "the loss is nan"}))
    failed = sweep.main(["--name", "again", "--grid", "depth=3,4"])["failed"]
    assert failed == {"again-depth3": "exit code 2 (error: out of memory)"}


def test_sweep_of_failures_only_says_so_and_its_grid_can_be_corrected(monkeypatch):
    monkeypatch.setattr(sweep.subprocess, "Popen", FakeRun)
    with pytest.raises(UserError, match="all 1 runs of the sweep typo failed; .*logs has what they printed"):
        sweep.main(["--name", "typo", "--grid", "depth=3"])
    assert not sweep.main(["--name", "typo", "--grid", "depth=5"])["failed"]


def test_flags_of_a_command_line():
    """Knobs add up, other flags are the last one's; the flag before -d has no part of it."""
    assert sweep.parse_flags(["-d", "float32", "--knobs", "a=1", "b=2", "--depth=2", "-dfloat64", "--knobs", "c=3",
                              "--sample-every", "-1", "--depth", "4"]) == {
        "dtype": ["float64"], "knobs": ["a=1", "b=2", "c=3"], "depth": ["4"], "sample_every": ["-1"]}


@pytest.mark.parametrize(("argv", "message"), [
    (["--grid", "depth"], "--grid depth must be a flag"),
    (["--grid", "depth=1,,2"], "--grid depth=1,,2 must be a flag"),
    (["--grid", "depth=1,1"], "--grid names depth=1,1 twice"),
    (["--grid", "depth=1", "depth=2"], "--grid names depth twice"),
    (["--grid", "model-tag=a,b"], "--model-tag is set by the sweep"),
    (["--grid", "depth=1,2", "--", "--resume=none"], "--resume is set by the sweep"),
    (["--grid", "depth=1,2", "--", "--resum", "none"], "--resume is set by the sweep"),  # argparse takes it for that
    (["--grid", "depth=1,2", "--", "--resume-from", "3"], "--resume-from-step is set by the sweep"),
    (["--grid", "depth=1,2", "--", "--depth", "4"], "--depth is in the grid and behind --"),
    (["--grid", "data=a/b,a_b"], "would have the same name"),
    (["--grid", "depth=1,0"], "scripts.base_train: no model has --depth 0"),
    (["--grid", "depth=1", "--parallel", "0"], "--parallel 0 must be at least 1"),
    (["--grid", "depth=1", "--parallel", "9999"], "--parallel 9999 --nproc 1 would be 9999 processes; start at most"),
    (["--grid", "depth=x", "max-seq-len=1e400", "--parallel", "0"], "--parallel 0 must be at least 1"),
    (["--name", "a/b", "--grid", "depth=1"], "must be a plain folder name"),
    (["--name", "x" * 175, "--grid", "depth=1"], "must be a plain folder name"),
])
def test_refusals(argv, message):
    with pytest.raises(UserError, match=message):
        sweep.main(["--name", "refused", *argv])


def test_a_damaged_grid_is_said_so(base_dir):
    folder = base_dir / "sweeps" / "broken"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text('{"name": "broken", "grid": {}}')
    for main, argv in ((sweep.main, ["--name", "broken", "--grid", "depth=1"]), (scaling_laws.main, [str(folder)])):
        with pytest.raises(UserError, match=r"sweep\.json is damaged \(no flags, no created, no failed, no points\)"):
            main(argv)


def test_a_sweep_of_older_models_has_no_new_ones_added(base_dir):
    """Those of its runs that have a checkpoint go on as they began; the others would be of another model."""
    argv = ["--name", "older", "--grid", "depth=1,2", "num-iterations=2", "--", *TOY]
    assert len(sweep.main(argv)["runs"]) == 2
    path, run_dir = base_dir / "sweeps" / "older" / "sweep.json", get_run_dir("base", "older-depth2-num-iterations2")
    saved = json.loads(path.read_text())
    without = [{key: value for key, value in saved.items() if key != missing} for missing in ("rule", "key_offset")]
    for older in (*without, saved | {"rule": "nov26"}):
        path.write_text(json.dumps(older))
        sweep.main(argv)
        assert json.loads(path.read_text()) == older    # it stays an older one
        run_dir.rename(base_dir / "elsewhere")    # as if killed before its first checkpoint
        with pytest.raises(UserError, match="the sweep older was begun when the model, or batch and rates of small on"):
            sweep.main(argv)
        (base_dir / "elsewhere").rename(run_dir)


def test_a_run_of_another_command_is_not_taken_for_a_point(base_dir):
    run_dir = get_run_dir("base", "other-depth1")
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps({"status": "finished", "argv": ["base_train.py", "--depth", "2"]}))
    with pytest.raises(UserError, match="the run other-depth1 was made by another command .--depth 2.; delete"):
        sweep.main(["--name", "other", "--grid", "depth=1"])


def test_workers_have_gpus_of_their_own(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [get_worker_env(i, 2, 2)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    assert "CUDA_VISIBLE_DEVICES" not in get_worker_env(0, 1, 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [get_worker_env(i, 2, 1)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["5", "7"]


def test_work_orders_the_runs_and_survives_flags_that_base_train_will_refuse():
    flops = [sweep.estimate_run_flops(["--depth", str(depth)]) for depth in (4, 8, 12)]
    assert flops == sorted(flops) and flops[2] == pytest.approx(1.0e18, rel=0.1)
    assert sweep.estimate_run_flops(["--depth=8", "--target-flops=1e15", "--total-batch-size=16384"]) == \
        pytest.approx(1e15, rel=0.01)
    for flags in (["--depth", "x"], ["--depth", "0"], [], ["--depth", "2", "--num-iterations", "0"]):
        assert sweep.estimate_run_flops(flags) == 1.0
