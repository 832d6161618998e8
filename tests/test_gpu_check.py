"""dev/gpu_check on a CPU at toy size: it passes where all is well, and each kind of fault makes it fail."""

import json
import subprocess

import pytest
import torch

from dev import bench_memory, gpu_check, gpu_kernels, gpu_steps
from dev.gpu_setup import TINY, Setup, make_synthetic_rows
from nanochat import compilation, dataset, flash_attention, memory
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
    choices = {"--attention, by the kernels", "--loss", "CHUNK_TOKENS[cpu] of nanochat/memory.py", "decoding 3 rows",
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
    right = getattr(gpu_kernels, kernel)

    def wrong(param, *others):
        right(param, *others)
        if param.dtype != torch.float64:  # the reference stays right
            param.mul_(1.01)
    monkeypatch.setattr(gpu_kernels, kernel, wrong)
    statuses = get_statuses(run_checks(tmp_path, "--only", "optimizer"))
    failed = {name for name, status in statuses.items() if status == "FAIL"}
    assert failed and all(name.startswith(f"optimizer/{kernel.split('_')[0]}") for name in failed)


def test_a_wrong_gradient_of_the_loss_fails(tmp_path, monkeypatch):
    def wrong(x, weight, targets, vocab_size):
        loss = torch.nn.functional.cross_entropy(
            15 * torch.tanh((x @ weight[:vocab_size].T) / 15), targets, ignore_index=-1)
        return loss + 0.01 * (x.sum() - x.sum().detach())
    monkeypatch.setattr(gpu_kernels, "linear_cross_entropy", wrong)
    statuses = get_statuses(run_checks(tmp_path, "--only", "loss"))
    assert statuses["loss/against float64"] == "FAIL"


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


def test_the_shell_script_finds_the_sections():
    done = subprocess.run(["bash", str(REPO_DIR / "dev" / "gpu_check.sh"), "--help"], capture_output=True, text=True,
                          timeout=60, check=True)
    assert all(name in done.stdout for name in gpu_check.SECTIONS)
