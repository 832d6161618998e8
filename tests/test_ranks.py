"""Many ranks in real processes: they compute what one does, continue each other's runs, and die in an orderly way."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from nanochat.common import Ranks, UserError
from nanochat.gpt import GPTConfig
from nanochat.presets import RULES
from nanochat.run import read_info, read_metrics
from nanochat.train import Batch, train_step
from scripts import base_train
from tests.helpers import (
    REPO_DIR,
    SMALL_RATES,
    assert_same_runs,
    choose_port,
    get_rank_env,
    make_base,
    make_model,
    make_preset_argv,
    out_of_memory_at,
    read_state,
    run_on_ranks,
    run_to_end,
    send_signal_at,
    small_presets,
    start_script,
)

CONFIG = GPTConfig(sequence_len=16, vocab_size=80, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
NUM_ROWS, NUM_STEPS, STOP_AT = 8, 6, 3
SHAPE = ("--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64")
OTHER_RULES = tuple(name for name in RULES if name not in ("july26", "nov26"))    # two batches of one optimizer
PRESET_NAMES = ("nanochat-jan26", "marin-150m", "arcadium-200m")


# ---------------------------------------------------------------------------------------------------------------------
# The same step


def make_batch(seed):
    """Random tokens, some of them not to be learned; in one row none are."""
    rng = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randint(0, CONFIG.vocab_size, (NUM_ROWS, 16), generator=rng) for _ in range(2))
    targets[torch.rand(targets.shape, generator=rng) < 0.3] = -1
    targets[3] = -1
    return Batch(inputs, targets, None)


def take_steps(dtype_name, num_steps, micro_rows, rule="july26"):
    """Train on this rank's rows; returns losses, gradient norms, a first gradient and all parameters as lists."""
    ranks = Ranks(dist.get_rank(), dist.get_rank(), dist.get_world_size())
    model = make_model(CONFIG, getattr(torch, dtype_name), as_initialised=True)
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_proj.weight, std=0.02)  # so that gradients reach everything
    optimizer = model.setup_optimizer(batch_lr_scale=0.1, rule=RULES[rule])
    facts = {"losses": [], "norms": [], "grads": compute_gradients(model, ranks)}
    for step in range(num_steps):
        batch = make_batch(step)
        mine = Batch(*(rows[ranks.rank::ranks.world_size] for rows in (batch.inputs, batch.targets)), None)
        stats = train_step(model, optimizer, mine, micro_rows)
        facts["losses"].append(stats.loss)
        facts["norms"].append(stats.grad_norm)
    facts["params"] = {name: param.double().flatten().tolist() for name, param in model.named_parameters()}
    facts["state_numel"] = sum(piece.tensor.numel() for piece in optimizer.get_named_state().values())
    return facts


def compute_gradients(model, ranks):
    """One step's gradients, summed over the ranks, on every rank."""
    batch = make_batch(99)
    rows = slice(ranks.rank, None, ranks.world_size)
    num_targets = int((batch.targets >= 0).sum())
    (model(batch.inputs[rows], batch.targets[rows], loss_reduction="sum") / num_targets).backward()
    grads = {}
    for name, param in model.named_parameters():
        dist.all_reduce(param.grad)
        grads[name] = param.grad.double().flatten().tolist()
    model.zero_grad()
    return grads


def to_vector(params):
    return torch.tensor([value for values in params.values() for value in values], dtype=torch.float64)


def train_toy(tag, *more):
    base_train.main(["--model-tag", tag, "--data", "toy", *SHAPE, *SMALL_RATES, "--num-iterations", str(NUM_STEPS),
                     "--total-batch-size", "512", "--eval-tokens", "1024", "--eval-every", "3", "--sample-every", "-1",
                     "--device-type", "cpu", "--compile", "off", *more])


def train_preset(name, tag, *more):
    with small_presets():
        base_train.main([*make_preset_argv(name, tag), "--dtype", "float64", *more])


def train_short(tag, *more):
    """Rank 1 runs out of memory in step 2, in the second of its two micro-batches."""
    with out_of_memory_at(*([5] if dist.get_rank() == 1 else [])):
        train_toy(tag, *more)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        make_base(base_dir, patch)
        yield base_dir


def start_differently(other_dir):
    """Rank 1 is given another flag, then a base folder of its own; returns what each rank says."""
    rank, base_dir, errors = dist.get_rank(), os.environ["NANOCHAT_BASE_DIR"], []
    for flags, folder in ((("--matrix-lr", "0.01"), base_dir), ((), other_dir)):
        if rank == 1:
            os.environ["NANOCHAT_BASE_DIR"] = folder
        try:
            train_toy("different", *(flags if rank == 1 else ()))
        except UserError as error:
            errors.append(str(error))
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    return errors


STEPPED = [(1, 8, "float64", 12), (1, 3, "float64", 12), (2, 4, "float64", 12), (2, 1, "float64", 12),
           (4, 2, "float64", 12), (3, 3, "float64", 4), (1, 8, "float64", 4),
           (1, 8, "float32", 50), (2, 4, "float32", 50), (4, 2, "float32", 10),
           *((world_size, 8 // world_size, "float64", 4, rule) for rule in OTHER_RULES for world_size in (1, 2, 3))]


@pytest.fixture(scope="module")
def finished(base_dir, tmp_path_factory):
    """All that runs on several ranks, in four processes that start once. Whole runs on 1, 2 and 4 ranks, and runs that
    went from one number to another; the facts of rank 0 of take_steps, after it is seen that all ranks agree."""
    jobs = [(world_size, take_steps, (dtype, num_steps, micro_rows, *rule))
            for world_size, micro_rows, dtype, num_steps, *rule in STEPPED]
    for dtype, world_sizes, changes in (("float64", (1, 2, 4), ((2, 1), (1, 4), (4, 2), (2, 2))),
                                        ("float32", (1, 2), ((2, 1), (1, 2))), ("bfloat16", (2,), ((2, 2),))):
        for world_size in world_sizes:
            jobs.append((world_size, train_toy, (f"{dtype}-{world_size}", "--dtype", dtype)))
        for first, second in changes:
            for world_size, more in ((first, ("--stop-at", str(STOP_AT))), (second, ())):
                jobs.append((world_size, train_toy, (f"{dtype}-{first}to{second}", "--dtype", dtype, *more)))
    for name in PRESET_NAMES:
        jobs += [(1, train_preset, (name, f"{name}-1")), (2, train_preset, (name, f"{name}-2to1", "--stop-at", "2")),
                 (1, train_preset, (name, f"{name}-2to1"))]
    jobs.append((2, train_short, ("short", "--device-batch-size", "2")))
    jobs += [(2, train_toy, ("expected", "--device-batch-size", rows, *more))
             for rows, more in (("2", ("--stop-at", "2")), ("1", ()))]
    for tag, *parts in (("warmup-1", (1, ())), ("warmup-2", (2, ())),
                        ("warmup-2to1", (2, ("--stop-at", "3")), (1, ()))):
        for world_size, more in parts:
            jobs.append((world_size, train_toy, (tag, "--dtype", "float64", "--seq-len-warmup", "16:5", *more)))
    other_dir = tmp_path_factory.mktemp("other")
    for name in ("data", "tokenizer"):
        shutil.copytree(base_dir / name, other_dir / name)
    jobs.append((2, start_differently, (str(other_dir),)))
    *results, errors = run_on_ranks(jobs, tmp_path_factory.mktemp("results"))
    results = results[:len(STEPPED)]
    for facts in results:
        for other in facts[1:]:
            assert all(other[key] == facts[0][key] for key in ("losses", "norms", "params", "grads"))
    return dict(zip(STEPPED, results, strict=True)) | {"errors": errors}


@pytest.fixture(scope="module")
def stepped(finished):
    return finished


@pytest.fixture(scope="module")
def runs(finished, base_dir):
    return base_dir / "runs" / "base"


@pytest.mark.parametrize("case", [(1, 3, "float64", 12), (2, 4, "float64", 12), (2, 1, "float64", 12),
                                  (4, 2, "float64", 12), (3, 3, "float64", 4)])
def test_any_cut_trains_the_same_parameters(stepped, case):
    """Three ranks don't divide the rows of the embeddings, nor the eight rows of the step evenly."""
    facts, expected = stepped[case][0], stepped[(1, 8, "float64", case[3])][0]
    assert facts["losses"] == pytest.approx(expected["losses"], abs=1e-9)
    assert facts["norms"] == pytest.approx(expected["norms"], rel=1e-9)
    assert (to_vector(facts["params"]) - to_vector(expected["params"])).abs().max() < 1e-6


@pytest.mark.parametrize("rule", OTHER_RULES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rule_is_the_same_on_several_ranks(stepped, rule, world_size):
    """marin's clips by the norm of what all ranks have; three ranks share neither rows nor matrices evenly."""
    facts = stepped[(world_size, 8 // world_size, "float64", 4, rule)][0]
    expected = stepped[(1, 8, "float64", 4, rule)][0]
    assert facts["losses"] == pytest.approx(expected["losses"], abs=1e-9)
    assert facts["norms"] == pytest.approx(expected["norms"], rel=1e-9)
    assert (to_vector(facts["params"]) - to_vector(expected["params"])).abs().max() < 1e-6


@pytest.mark.parametrize("case", [(2, 4, "float32", 50), (4, 2, "float32", 10)])
def test_fp32_losses_stay_together(stepped, case):
    losses, expected = stepped[case][0]["losses"], stepped[(1, 8, "float32", 50)][0]["losses"]
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert losses == pytest.approx(expected[:len(losses)], abs=0.03)


def test_fp32_gradients_of_one_step(stepped):
    expected = to_vector(stepped[(1, 8, "float32", 50)][0]["grads"])
    for case in ((2, 4, "float32", 50), (4, 2, "float32", 10)):
        grads = to_vector(stepped[case][0]["grads"])
        large = expected.abs() > 1e-8
        assert large.float().mean() > 0.3  # rows of tokens that don't occur have none
        gap = (grads - expected).abs() / expected.abs()
        # cancellation among the rows leaves less than fp32's digits of a few small sums
        assert gap[large].quantile(0.99) < 1e-5 and ((grads - expected).norm() / expected.norm()) < 1e-6


def test_each_rank_keeps_its_share_of_the_state(stepped):
    whole = stepped[(1, 8, "float64", 12)][0]["state_numel"]
    for case, world_size in (((2, 4, "float64", 12), 2), ((4, 2, "float64", 12), 4)):
        sizes = [facts["state_numel"] for facts in stepped[case]]
        assert max(sizes) < 1.35 * whole / world_size  # three layers don't divide evenly
        assert sum(sizes) < 1.05 * whole               # small parameters are on every rank


# ---------------------------------------------------------------------------------------------------------------------
# Runs that go from one number of ranks to another


def read_losses(run_dir, kind="train", key="loss"):
    return [line[key] for line in read_metrics(run_dir) if line["kind"] == kind]


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_preset_goes_from_two_ranks_to_one(runs, name):
    assert read_losses(runs / f"{name}-2to1") == pytest.approx(read_losses(runs / f"{name}-1"), abs=1e-9)


@pytest.mark.parametrize(("run", "tolerance"), [
    ("float64-2", 1e-9), ("float64-4", 1e-9), ("float64-2to1", 1e-9), ("float64-1to4", 1e-9), ("float64-4to2", 1e-9),
    ("float32-2", 1e-4), ("warmup-2", 1e-9), ("warmup-2to1", 1e-9)])
def test_every_number_of_ranks_makes_the_same_run(runs, run, tolerance):
    whole = read_state(runs / f"{run.split('-')[0]}-1")
    losses = read_losses(runs / run)
    assert len(losses) == NUM_STEPS
    for kind, key in (("train", "loss"), ("eval", "val_bpb"), ("eval", "val_bytes")):
        alone = read_losses(runs / f"{run.split('-')[0]}-1", kind, key)
        assert read_losses(runs / run, kind, key) == pytest.approx(alone, abs=tolerance) and alone
    assert read_state(runs / run)["loader"]["lanes"] == whole["loader"]["lanes"]


@pytest.mark.parametrize("run", ["float32-2to1", "float32-1to2"])
def test_fp32_goes_on_with_the_same_loss(runs, run):
    """The first step after the change; on the way there the runs differ by rounding."""
    first = run.split("-")[1][0]
    assert read_losses(runs / run)[STOP_AT] == pytest.approx(read_losses(runs / f"float32-{first}")[STOP_AT], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_same_ranks_go_on_bit_for_bit(runs, dtype):
    """In bf16 a rank has the others' matrices rounded; its checkpoint has them whole."""
    assert_same_runs(runs / f"{dtype}-2to2", runs / f"{dtype}-2")


def test_one_ranks_lack_of_memory_halves_the_rows_of_all(runs):
    """No rank waits for the other, and the step that failed is computed again."""
    assert_same_runs(runs / "short", runs / "expected")
    info = json.loads((runs / "short" / "run.json").read_text())
    decision = info["decisions"][-1]
    assert info["num_devices"] == 2 and decision["value"] == "1"
    assert "out of memory at step 2 with --device-batch-size 2: " in decision["why"]


def test_files_of_a_checkpoint_of_four_ranks(runs):
    """Each rank's file has its part only; together they are what one rank saved."""
    folder = runs / "float64-4" / f"step_{NUM_STEPS:06d}"
    parts = [load_file(folder / f"optim_{rank}.safetensors") for rank in range(4)]
    whole = load_file(runs / "float64-1" / folder.name / "optim_0.safetensors")
    for name, tensor in whole.items():
        joined = torch.cat([part[name] for part in parts if name in part])
        torch.testing.assert_close(joined, tensor, rtol=0, atol=1e-6)
    assert json.loads((folder / "meta.json").read_text())["world_size"] == 4


def test_missing_part_is_named(runs):
    folder = runs / "float64-4to2" / f"step_{STOP_AT:06d}"
    path = folder / "optim_3.safetensors"
    path.rename(folder / "away")
    try:
        code, stderr = run_alone("float64-4to2", "--dtype", "float64", "--num-iterations", str(NUM_STEPS),
                                 "--resume", str(STOP_AT))
    finally:
        (folder / "away").rename(path)
    assert code == 2 and stderr == f"error: the checkpoint file {path} is missing; use another step: {NUM_STEPS}\n"


def test_ranks_that_were_started_differently_are_refused(finished, base_dir):
    """They would train without any error, each with its own settings."""
    for flags_error, folder_error in finished["errors"]:
        assert "with different settings (flags.matrix_lr: rank 0 0.0006, rank 1 0.01); start all with" in flags_error
        assert folder_error.startswith("rank 1 doesn't see the folder ") and "set NANOCHAT_BASE_DIR" in folder_error
    assert list((base_dir / "runs" / "base").glob("different*")) == [base_dir / "runs" / "base" / "different.lock"]


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that die


def make_argv(tag, *more):
    return ["scripts.base_train", "--model-tag", tag, "--data", "toy", *SHAPE, *SMALL_RATES,
            "--num-iterations", "400", "--total-batch-size", "512", "--eval-every", "-1", "--sample-every", "-1",
            "--save-every", "5", "--device-type", "cpu", "--dtype", "float32", "--compile", "off", *more]


def run_alone(tag, *more):
    result = run_to_end(*make_argv(tag, *more))
    return result.returncode, result.stderr


def start_ranks(tag, *more, **env):
    port = choose_port()
    return [start_script(*make_argv(tag, *more), **get_rank_env(rank, 2, port), **env) for rank in range(2)]


def wait_for_step(process, step):
    for line in process.stdout:
        if line.startswith(f"step {step:05d}/"):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize(("signum", "timeout_sec"), [(signal.SIGKILL, "1800"), (signal.SIGSTOP, "4")])
def test_dead_or_stalled_rank_ends_the_others(base_dir, signum, timeout_sec):
    processes = start_ranks(f"lost{signum}", NANOCHAT_TIMEOUT_SEC=timeout_sec)
    try:
        wait_for_step(processes[0], 12)
        processes[1].send_signal(signum)
        start = time.monotonic()
        processes[0].stdout.read()
        assert processes[0].wait(timeout=60) == 1
        assert time.monotonic() - start < 20
        stderr = processes[0].stderr.read()
        errors = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert "Traceback" not in stderr and len(errors) == 1, stderr
        assert "rank 0 can't reach the other ranks" in errors[0]
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.communicate()
    run_dir = base_dir / "runs" / "base" / f"lost{signum}"
    assert int((run_dir / "latest").read_text().removeprefix("step_")) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGTERM])
def test_torchrun_passes_a_signal_on_to_ranks_that_save(base_dir, signum):
    script, *flags = make_argv(f"signal{signum}")
    process = start_script("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", script, "--", *flags)
    send_signal_at(process, 12, signum)
    run_dir = base_dir / "runs" / "base" / f"signal{signum}"
    assert int((run_dir / "latest").read_text().removeprefix("step_")) >= 12
    info = read_info(run_dir)
    assert info["status"] == "stopped" and info["reason"] == signum.name


def test_non_finite_loss_stops_all_ranks(base_dir):
    processes = start_ranks("diverging", "--embedding-lr", "1e30")
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for _, stderr in outputs:
        assert stderr.count("error:") == 1 and "Traceback" not in stderr and "so the run stopped" in stderr


# ---------------------------------------------------------------------------------------------------------------------
# The job of a cluster: its commands stand in for SLURM's, and one line for the training

SLURM_COMMANDS = {"scontrol": 'if [[ $1 == show ]]; then echo node1; else echo "$@" >> "$CALLS"; fi',
                  "srun": 'echo "timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> "$CALLS"; eval "$TRAIN"'}


@pytest.mark.parametrize(("train", "is_queued_again"), [
    ("echo step_000002 > $RUN/latest; exit 1", True),   # stopped or lost a rank on its way
    ("exit 1", False),                                  # it would fail for ever, and cost a cluster for ever
    ("echo step_000002 > $RUN/latest", False)])         # finished
def test_slurm_goes_on_only_where_it_gets_further(train, is_queued_again, tmp_path):
    run_dir = tmp_path / "base" / "runs" / "base" / "toy"
    run_dir.mkdir(parents=True)
    (run_dir / "latest").write_text("step_000001\n")
    shutil.copytree(REPO_DIR / "runs", tmp_path / "runs")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / "bin").mkdir()
    for name, body in SLURM_COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "NAME": "toy", "RUN": str(run_dir), "TRAIN": train,
                        "CALLS": str(tmp_path / "calls"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1",
                        "SLURM_NNODES": "1"}
    result = subprocess.run(["bash", str(REPO_DIR / "runs" / "slurm.sh")], env=env, capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert result.returncode == ("exit 1" in train) and calls[0] == "timeout 110", result.stderr
    assert calls[1:] == (["requeue 7"] if is_queued_again else [])
