"""dev/gpu_check on a CPU at toy size: it passes where all is well, and each kind of fault makes it fail."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dev import (
    bench_memory,
    gpu_ceilings,
    gpu_check,
    gpu_fp8,
    gpu_moe,
    gpu_record,
    gpu_setup,
    gpu_steps,
    kernel_optim,
    kernel_training,
)
from dev.gpu_setup import TINY, Setup, make_synthetic_rows
from nanochat import compilation, dataset, flash_attention, memory
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import SPECIAL_TOKENS, get_tokenizer_dir
from tests.helpers import BYTE_TOKENIZER, REPO_DIR


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Put back what a run of the checks chooses for its process."""
    monkeypatch.setattr(flash_attention, "_chosen", dict(flash_attention._chosen))
    monkeypatch.setattr(flash_attention, "_override_impl", None)
    monkeypatch.setattr(compilation, "_compile_kernels", False)


def run_checks(out_dir, *words) -> dict:
    return gpu_check.main(["--tiny", "--device-type", "cpu", "--dtype", "float32", "--compile", "off",
                           "--out", str(out_dir), *words])


def get_statuses(results: dict) -> dict[str, str]:
    return {f"{check['section']}/{check['name']}": check["status"] for check in results["checks"]}


def get_check(results: dict, name: str) -> dict:
    return next(check for check in results["checks"] if check["name"] == name)


def make_setup(out_dir) -> Setup:
    return Setup(TINY, torch.device("cpu"), torch.float32, False, "sdpa", out_dir, make_synthetic_rows(TINY, 8))


def test_everything_passes_and_is_recorded(tmp_path, capsys):
    results = run_checks(tmp_path / "out")
    statuses = get_statuses(results)
    assert results["passed"] and results["counts"]["FAIL"] == results["counts"]["skipped"] == 0
    is_there = {name.split("/")[0] for name, status in statuses.items() if status == "ok"}
    assert is_there | {"fp8"} == set(gpu_check.SECTIONS)  # which may be absent
    assert statuses["attention/flex"] == "absent" and statuses["resume/resumed run"] == "ok"
    saved = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert saved == json.loads(json.dumps(results)) and saved["environment"]["hardware"]["device"] == "cpu"
    # no checkpoint is left behind
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu_check.json", "gpu_check_defaults.json"}
    speed = get_check(saved, "d2 1 rows blocks")["figures"]
    num_tokens = speed["num_rows"] * speed["num_micro"] * TINY.T
    assert speed["tokens_per_sec"] == pytest.approx(num_tokens / speed["step_ms"] * 1e3)
    out, defaults = capsys.readouterr().out, json.loads((tmp_path / "out" / "gpu_check_defaults.json").read_text())
    choices = {"--attention, by the kernels", "CHUNK_TOKENS[cpu] of nanochat/memory.py", "decoding 3 rows",
               "compilation and rows at depth 2", "--attention, by steps at depth 1"}
    assert choices <= set(defaults["defaults"]) and all(choice in out for choice in choices)


def test_a_wrong_mask_fails_and_the_rest_goes_on(tmp_path, monkeypatch):
    whole = flash_attention._TRAIN_CALLS["sdpa"]
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "sdpa", lambda q, k, v, window: whole(q, k, v, -1))
    statuses = get_statuses(run_checks(tmp_path, "--only", "attention"))
    assert statuses["attention/sdpa"] == "FAIL"  # by its probe
    assert statuses["attention/blocks train"] == "ok"


def test_a_wrong_mask_at_odd_lengths_fails(tmp_path, monkeypatch):
    right = flash_attention._TRAIN_CALLS["sdpa"]
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "sdpa", lambda q, k, v, window: right(
        q, k, v, -1 if q.size(1) % 128 else window))
    statuses = get_statuses(run_checks(tmp_path, "--only", "attention"))
    assert statuses["attention/sdpa train"] == "FAIL" and statuses["attention/sdpa decode"] == "ok"


def test_decoding_that_ignores_lengths_fails(tmp_path, monkeypatch):
    right = flash_attention.find_positions
    monkeypatch.setattr(flash_attention, "find_positions", lambda lengths, num_new, capacity: right(
        torch.full_like(lengths, int(lengths.min())), num_new, capacity))
    assert get_statuses(run_checks(tmp_path, "--only", "attention"))["attention/sdpa decode"] == "FAIL"


@pytest.mark.parametrize("kernel", ["adamw_update", "muon_update"])
def test_an_optimizer_kernel_that_rounds_badly_fails(tmp_path, monkeypatch, kernel):
    right = getattr(kernel_optim, kernel)

    def wrong(param, *others):
        right(param, *others)
        if param.dtype != torch.float64:  # the reference stays right
            param.mul_(1.01)
    monkeypatch.setattr(kernel_optim, kernel, wrong)
    statuses = get_statuses(run_checks(tmp_path, "--only", "optimizer"))
    failed = {name for name, status in statuses.items() if status == "FAIL"}
    assert failed and all(name.startswith(f"optimizer/{kernel.split('_')[0]}") for name in failed)
    assert kernel == "adamw_update" or "optimizer/muon 2x32x32, half by heads" in failed


def test_a_wrong_gradient_of_the_loss_fails(tmp_path, monkeypatch):
    def wrong(x, weight, targets, vocab_size):
        loss = torch.nn.functional.cross_entropy(
            15 * torch.tanh((x @ weight[:vocab_size].T) / 15), targets, ignore_index=-1)
        return loss + 0.01 * (x.sum() - x.sum().detach())
    monkeypatch.setattr(kernel_training, "linear_cross_entropy", wrong)
    statuses = get_statuses(run_checks(tmp_path, "--only", "loss"))
    assert statuses["loss/against float64"] == "FAIL"


def test_grouped_products_that_are_wrong_fail(tmp_path, monkeypatch):
    right = gpu_moe.moe.grouped_outer
    monkeypatch.setattr(gpu_moe.moe, "grouped_outer", lambda a, b, ends: 1.1 * right(a, b, ends))
    statuses = get_statuses(run_checks(tmp_path, "--only", "moe"))
    failed = {name for name, status in statuses.items() if status == "FAIL"}
    assert failed == {f"moe/d{depth} {load} load" for depth in (1, 2) for load in ("even", "uneven")}


def test_the_time_tax_of_experts(tmp_path):
    """Each variant's step over the dense one's, of the same depth; the dispatch is what the products leave."""
    results = run_checks(tmp_path, "--only", "moe")
    dense = get_check(results, "d2 step, dense")["figures"]["step_ms"]
    for name in ("k = 1", "k = 2"):
        figures = get_check(results, f"d2 step, {name}")["figures"]
        assert figures["time_tax"] == pytest.approx(figures["step_ms"] / dense)
    layer = get_check(results, "d2 layer")["figures"]
    assert layer["dispatch_frac"] == pytest.approx(1 - layer["products_ms"] / layer["layer_ms"])
    ends = gpu_moe.make_ends(800, False, torch.device("cpu"))
    assert ends.tolist() == [400, 400, 467, 533, 600, 667, 733, 800]


def test_a_resume_that_loses_momentum_fails(tmp_path, monkeypatch):
    load = MuonAdamW.load_named_state
    monkeypatch.setattr(MuonAdamW, "load_named_state", lambda self, read, num_steps: load(
        self, lambda name, *rows: read(name, *rows) * (not name.endswith("momentum")), num_steps))
    statuses = get_statuses(run_checks(tmp_path, "--only", "resume"))
    assert statuses == {"resume/same run twice": "ok", "resume/resumed run": "FAIL"}


def test_a_wrong_prediction_of_memory_fails(tmp_path, monkeypatch):
    right = memory.count_loss_bytes
    monkeypatch.setattr(memory, "count_loss_bytes", lambda *args: 10 * right(*args))
    assert set(get_statuses(run_checks(tmp_path, "--only", "memory")).values()) == {"FAIL"}


def test_memory_that_cannot_be_measured_does_not_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_memory, "measure_free_bytes", lambda device: 1000)
    results = run_checks(tmp_path, "--only", "memory")
    assert get_statuses(results) == {"memory/d1 memory": "absent", "memory/d2 memory": "absent"}
    assert not results["passed"]


def test_a_section_that_crashes_is_a_line_and_the_exit_code(tmp_path, monkeypatch, capsys):
    def crash(setup):
        yield gpu_check.Check("first", "ok", "")
        raise RuntimeError("CUDA error: an illegal memory access")
    monkeypatch.setitem(gpu_check.SECTIONS, "loss", crash)
    with pytest.raises(SystemExit) as exit_info:
        gpu_check.run_and_exit(["--tiny", "--device-type", "cpu", "--compile", "off", "--out", str(tmp_path),
                                "--only", "loss", "optimizer"])
    assert exit_info.value.code == 1
    statuses = get_statuses(json.loads((tmp_path / "gpu_check.json").read_text()))
    assert statuses["loss/first"] == "ok" and statuses["loss/the rest"] == "FAIL"
    assert statuses["optimizer/adamw float32"] == "ok"
    assert "illegal memory access" in capsys.readouterr().out


def test_what_the_budget_leaves_out_is_skipped_not_passed(tmp_path):
    results = run_checks(tmp_path, "--budget-sec", "0")
    assert {check["status"] for check in results["checks"]} == {"skipped"} and not results["passed"]


def test_rows_are_halved_until_they_fit(tmp_path, monkeypatch):
    """The step is the real one: it raises what it raises in training."""
    forward, tried = GPT.forward, []

    def run(model, idx, *args, **kwargs):
        tried.append(len(idx))
        if len(idx) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, idx, *args, **kwargs)
    monkeypatch.setattr(GPT, "forward", run)
    assert gpu_steps.find_device_batch(make_setup(tmp_path), 2) == 1 and tried == [2, 1, 1]


def test_synthetic_tokens_cover_the_vocabulary_as_text_does():
    rows = make_synthetic_rows(TINY, 64)
    assert rows.shape == (64, TINY.T + 1) and rows.min() == 0 and rows.max() == TINY.vocab_size - 1
    counts = torch.bincount(rows.flatten(), minlength=TINY.vocab_size)
    assert counts[0] > 5 * counts[10] > 0


def test_real_text_gives_rows_of_its_own_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    BYTE_TOKENIZER.save(get_tokenizer_dir("bytes"))
    (tmp_path / "text").mkdir()
    for i in range(64):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " + "of some length " * (i % 7 + 40))
    dataset.main(["--source", "files", "--path", str(tmp_path / "text")])
    results = run_checks(tmp_path, "--data", "files", "--tokenizer", "bytes", "--only", "resume")
    assert results["passed"] and results["sizes"]["vocab_size"] == 256 + len(SPECIAL_TOKENS)
    assert results["decisions"]["tokens"] == "files"


# ---------------------------------------------------------------------------------------------------------------------
# Faults that leave the other checks of a section in place


def test_wrong_numbers_of_a_product_and_of_a_chunk_fail(tmp_path, monkeypatch):
    right = gpu_ceilings.make_fp8_product
    monkeypatch.setattr(gpu_ceilings, "make_fp8_product", lambda x, weight: lambda: 1.1 * right(x, weight)())
    loss = gpu_ceilings.linear_cross_entropy
    monkeypatch.setattr(gpu_ceilings, "linear_cross_entropy", lambda *args: loss(*args) * (
        1.1 if memory.CHUNK_TOKENS["cpu"] == 64 else 1))
    results = run_checks(tmp_path, "--only", "ceilings", "chunks")
    failed = {check["name"] for check in results["checks"] if check["status"] == "FAIL"}
    assert failed == {f"d{depth} {name} fp8" for depth in (1, 2) for name in ("q", "c_fc", "c_proj", "head")} | {
        "chunks of 64"}
    (choice,) = results["choices"]
    assert "64" not in choice["costs"] and "128" in choice["costs"]  # what is wrong can't win


def test_running_out_of_memory_is_a_line_of_its_own(tmp_path, monkeypatch):
    """Of the step, which raises its own exception, and elsewhere; a candidate that doesn't fit loses, no more."""
    forward = GPT.forward

    def run(model, idx, *args, **kwargs):
        if len(idx) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(model, idx, *args, **kwargs)
    monkeypatch.setattr(GPT, "forward", run)
    monkeypatch.setattr(gpu_ceilings, "make_fp8_product", lambda *_: torch.empty(2**60))
    results = run_checks(tmp_path, "--only", "step", "ceilings")
    statuses = get_statuses(results)
    assert statuses["step/d2 2 rows blocks"] == statuses["ceilings/d1 q fp8"] == "no memory"
    assert statuses["step/d2 1 rows blocks"] == statuses["ceilings/d2 head bf16"] == "ok" and results["passed"]


def test_a_check_that_raises_leaves_the_others(tmp_path, monkeypatch):
    def wrong(model, *args, **kwargs):
        raise RuntimeError("no kernel image is available")
    monkeypatch.setattr(GPT, "generate", wrong)
    statuses = get_statuses(run_checks(tmp_path, "--only", "decoding"))
    assert statuses["decoding/1 rows, tokens"] == statuses["decoding/3 rows, tokens"] == "FAIL"
    assert statuses["decoding/1 rows, eager"] == "ok"


def test_wrong_tokens_of_the_engine_fail(tmp_path, monkeypatch):
    right = Engine.step

    def wrong(engine):
        return [replace(event, token=event.token ^ (event.request_id == 2)) for event in right(engine)]
    monkeypatch.setattr(Engine, "step", wrong)
    results = run_checks(tmp_path, "--only", "decoding")
    statuses = get_statuses(results)
    assert statuses["decoding/1 rows, tokens"] == "ok" and statuses["decoding/3 rows, tokens"] == "FAIL"
    assert "row 2 differs from GPT.generate's at token 0" in get_check(results, "3 rows, tokens")["detail"]


def test_a_check_that_hangs_is_cut_off(tmp_path, monkeypatch):
    """Also inside code that catches every Exception, as compilers do."""
    right = gpu_ceilings.sustain

    def hang(run, device, seconds):
        if len(tried) == 0:
            tried.append(1)
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)
        return right(run, device, seconds)
    tried = []
    monkeypatch.setattr(gpu_ceilings, "sustain", hang)
    monkeypatch.setattr(gpu_check, "CHECK_SEC", 3.0)
    results = run_checks(tmp_path, "--only", "ceilings")
    first = get_check(results, "d1 q bf16")
    assert first["status"] == "skipped" and first["detail"] == "cut off after 3 s" and not results["passed"]
    assert get_check(results, "d1 q fp8")["status"] == "ok" and results["counts"]["skipped"] == 1


def test_an_interrupt_keeps_what_was_found(tmp_path, monkeypatch, capsys):
    def stop(setup):
        yield gpu_check.Check("first", "ok", "")
        raise KeyboardInterrupt
    monkeypatch.setitem(gpu_check.SECTIONS, "loss", stop)
    with pytest.raises(KeyboardInterrupt):
        run_checks(tmp_path, "--only", "chunks", "loss")
    saved = json.loads((tmp_path / "gpu_check.json").read_text())
    assert saved["running"] == "loss" and not saved["passed"] and get_check(saved, "first")["status"] == "ok"
    assert gpu_check.main(["--table", "--out", str(tmp_path)]) == saved
    assert "cut off in section loss" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Builds, fp8


def test_builds_are_timed_against_each_other(tmp_path, monkeypatch):
    """What each build compiles, with a compiler that does nothing; a build with other losses fails."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(how.get("mode", "default")))
    monkeypatch.setattr(GPT, "compile_trunk", lambda self: compiled.append("trunk"))
    tuned = gpu_setup.compile_tuned

    def spoil(model):
        tuned(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(100)
    monkeypatch.setitem(gpu_setup.BUILDS, "max-autotune", spoil)
    pending = SimpleNamespace(read=lambda: None)
    monkeypatch.setattr(gpu_steps, "queue_step", lambda *args: pending)
    checks = list(gpu_steps.check_steps(replace(make_setup(tmp_path), use_compile=True)))
    statuses = {check.name: check.status for check in checks}
    assert statuses["d1 1 rows trunk"] == statuses["d2 2 rows trunk"] == statuses["d2 queue"] == "ok"
    assert statuses["d1 1 rows max-autotune"] == "FAIL" and "trunk" in compiled
    assert {"default", "max-autotune-no-cudagraphs"} <= set(compiled)
    order = [check.name for check in checks if check.candidate]
    assert order[:4] == ["d1 1 rows blocks", "d2 1 rows blocks", "d1 1 rows trunk", "d2 1 rows trunk"]


def test_copies_of_the_weights_are_timed_and_change_no_loss(tmp_path):
    """But in fp32, where there is nothing to copy."""
    results = run_checks(tmp_path, "--only", "step", "--dtype", "bfloat16")
    for name in ("d1 1 rows copies", "d2 1 rows copies"):
        check = get_check(results, name)
        assert check["status"] == "ok" and check["figures"]["loss_gap"] == 0
    assert "copies, 1 rows" in next(choice for choice in results["choices"] if "depth 2" in choice["choice"])["costs"]
    assert gpu_steps.find_obstacle(make_setup(tmp_path), "copies").endswith("read as they are")


class FakeFp8:
    """Stands for nanochat.fp8: the same calls, in bf16, with an error of its own."""

    def __init__(self, error):
        self.error, self.used = error, 0

    def find_obstacle(self, device):
        return ""

    def Fp8Linear(self, linear, dtype):
        layer = gpu_fp8.Linear(linear.in_features, linear.out_features, torch.float32)
        layer.load_state_dict({"weight": linear.weight.detach() * (1 + self.error)})
        return layer

    def use_fp8(self, model, optimizer):
        self.used += 1


@pytest.mark.parametrize(("error", "status"), [(0.02, "ok"), (0.2, "FAIL")])
def test_fp8_against_bf16(tmp_path, monkeypatch, error, status):
    fp8 = FakeFp8(error)
    for module in (gpu_fp8, gpu_setup):
        monkeypatch.setattr(module, "fp8", fp8)
    results = run_checks(tmp_path, "--only", "fp8")
    layers = {f"fp8/d{depth} {name}" for depth in (1, 2) for name in gpu_fp8.FP8_LAYERS}
    statuses = get_statuses(results)
    assert {statuses[name] for name in layers} == {status} and statuses["fp8/d2 1 rows fp8"] == "ok" and fp8.used == 2
    assert [choice["choice"] for choice in results["choices"]] == ["--fp8 at depth 1", "--fp8 at depth 2"]
    assert set(results["choices"][0]["costs"]) == {"on", "off"} and results["choices"][0]["default"] == "off"


def test_clocks_are_those_that_nvidia_smi_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_ceilings.read_clocks("0-1") is None
    (tmp_path / "nvidia-smi").write_text('#!/bin/sh\necho "$4 $1"\n')
    (tmp_path / "nvidia-smi").chmod(0o755)
    for uuid in ("0-1", "GPU-0-1"):
        out, _ = gpu_ceilings.read_clocks(uuid).communicate()
        assert out == f"GPU-0-1 --query-gpu={gpu_ceilings.CLOCK_FIELDS}\n"


def test_pauses_are_what_no_kernel_covers():
    assert gpu_steps.find_pauses([(5, 6), (0, 2), (1, 3), (10, 11), (5, 5.5)]) == [4, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Results


def make_line(choice, option, cost, is_default, status="ok") -> dict:
    return {"status": status, "candidate": {"choice": choice, "option": option, "cost": cost, "is_default": is_default}}


def test_a_winner_must_gain_more_than_noise():
    lines = [make_line("a", "plain", 10, True), make_line("a", "new", 9, False),
             make_line("a", "bad", 1, False, "FAIL"),
             make_line("b", "plain", 10, True), make_line("b", "new", 9.9, False),
             make_line("c", "plain", 10, True, "no memory"), make_line("c", "new", 20, False)]
    found = {line["choice"]: (line["winner"], line["proposed"]) for line in gpu_record.list_choices(lines)}
    assert found == {"a": ("new", "new"), "b": ("new", "plain"), "c": ("new", "new")}


def test_commands_add_up_to_one_table(tmp_path):
    run_checks(tmp_path, "--only", "loss", "chunks")
    again = run_checks(tmp_path, "--only", "chunks")
    assert [check["section"] for check in again["checks"]].count("loss") == 2
    assert len({check["name"] for check in again["checks"]}) == len(again["checks"])  # the section's new lines alone
    assert again["counts"]["ok"] == sum(check["section"] == "chunks" for check in again["checks"])
    other = run_checks(tmp_path / "other", "--only", "optimizer", "--earlier", str(tmp_path / "gpu_check.json"))
    assert {check["section"] for check in other["checks"]} == {"loss", "chunks", "optimizer"}
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    results["machine"]["torch"] = "2.0"
    (tmp_path / "gpu_check.json").write_text(json.dumps(results))
    assert {check["section"] for check in run_checks(tmp_path, "--only", "chunks")["checks"]} == {"chunks"}


@pytest.mark.parametrize(("argv", "message"), [
    (["--table"], "holds no results; run bash dev/gpu_check.sh first"),
    ([], "torch finds no GPU here"),
])
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, argv, message):
    monkeypatch.setattr(gpu_check, "init_compute", lambda device_type: (torch.device("cpu"), None))
    with pytest.raises(UserError, match=message):
        gpu_check.main([*argv, "--out", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------------------------
# The shell script


def test_the_shell_script_is_killed_and_leaves_whole_results(tmp_path):
    command = ["bash", str(REPO_DIR / "dev" / "gpu_check.sh"), "1", "--toy", "--device-type", "cpu", "--dtype",
               "float32", "--out", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    path, saved = tmp_path / "gpu_check.json", {"checks": []}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        while len(saved["checks"]) < 3:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
            saved = json.loads(path.read_text()) if path.exists() else saved
        os.killpg(process.pid, signal.SIGKILL)
        output = process.stdout.read()  # unbuffered: what was found is on the screen, too
    saved = json.loads(path.read_text())
    assert saved["running"] in gpu_check.PARTS[1] and not saved["passed"]
    assert all(f"{check['name']}: " in output for check in saved["checks"][:2])


@pytest.mark.parametrize(("words", "runs"), [
    ("", ["1", "2", "3", "4"]), ("--toy", ["1 --toy", "2 --toy", "3 --toy", "4 --toy"]), ("2 --toy", ["2 --toy"]),
    ("2 --budget-sec 900", ["2 --budget-sec 900"]), ("3 --budget-sec=900", ["3 --budget-sec=900"]),
    ("--only step save", ["--only step save"]), ("--table", ["--table"])])
def test_each_part_is_a_process_of_its_own(tmp_path, words, runs):
    """With a python3 that notes its words and fails in part 2, and no .venv. Each is killed where it hangs, unless a
    budget was given, which may be longer."""
    (tmp_path / "dev").mkdir()
    shutil.copy(REPO_DIR / "dev" / "gpu_check.sh", tmp_path / "dev")
    (tmp_path / "python3").write_text(f"""#!/bin/sh
[ "$1" = -c ] && exit
shift 2
echo "$@" >> {tmp_path}/runs
[ "$1" != 2 ]
""")
    (tmp_path / "timeout").write_text(f'#!/bin/sh\nshift 4\necho "$@" >> {tmp_path}/limited\nexec "$@"\n')
    for name in ("python3", "timeout"):
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / "dev" / "gpu_check.sh"), *words.split()], check=False,
                          env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (tmp_path / "runs").read_text().splitlines() == runs
    assert done.returncode == any(run.startswith("2") for run in runs)
    assert (tmp_path / "limited").exists() == (runs[0][0] in "1234" and "budget" not in words)


def test_a_missing_package_is_one_sentence(tmp_path):
    (tmp_path / "dev").mkdir()
    shutil.copy(REPO_DIR / "dev" / "gpu_check.sh", tmp_path / "dev")
    (tmp_path / "python3").write_text("#!/bin/sh\necho filelock tiktoken\n")
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / "dev" / "gpu_check.sh"), "1"], capture_output=True, text=True,
                          env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False)
    assert done.returncode == 2 and "has no filelock tiktoken, which the checks need" in done.stderr
