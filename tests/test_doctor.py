"""The doctor: its verdict on machines that are ready, not ready, and broken."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nanochat import dataset, devices
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer_dir
from scripts import doctor

REPO_DIR = Path(__file__).resolve().parents[1]
CLOSED_PORT = "http://127.0.0.1:9"


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", CLOSED_PORT)
    monkeypatch.delenv("NANOCHAT_MIRROR_DIR", raising=False)
    return tmp_path / "base"


def states(result: dict) -> dict[str, str]:
    return {check["name"]: check["state"] for check in result["checks"]}


def run_doctor(tmp_path: Path, **changes: str) -> subprocess.CompletedProcess:
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HF_ENDPOINT": CLOSED_PORT} | changes
    return subprocess.run([sys.executable, "-m", "scripts.doctor", "--quick", "--device-type", "cpu"], cwd=REPO_DIR,
                          env=env, capture_output=True, text=True, timeout=120)


def test_ready_once_data_and_tokenizer_are_there(base_dir, tmp_path, capsys):
    before = states(doctor.main(["--quick", "--device-type", "cpu"]))
    assert before["data"] == before["tokenizer"] == "FAIL" and before["network"] == "note"
    assert all(before[name] == "ok" for name in ("python", "packages", "device", "matmul", "attention"))
    assert "\nnot ready: see the FAIL above, 2 in all" in capsys.readouterr().out

    texts = [f"Document {i} tells of {i * i} things and of nothing else." * 8 for i in range(400)]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    dataset.main(["--source", "files", "--path", str(tmp_path / "texts"), "--name", "mine"])
    RustBPETokenizer.train_from_iterator(texts, 300).save(get_tokenizer_dir())
    capsys.readouterr()
    result = doctor.main(["--quick", "--device-type", "cpu", "--json"])
    assert result["ready"] and json.loads(capsys.readouterr().out) == result
    assert "mine (1 shards" in str(result) and "300 tokens" in str(result)

    next((base_dir / "data" / "mine").glob("shard_*.parquet")).write_bytes(b"damaged")
    (get_tokenizer_dir() / "tokenizer.json").write_text("{")
    after = states(doctor.main(["--quick", "--device-type", "cpu"]))
    assert after["data"] == after["tokenizer"] == "FAIL"


def test_network_answers(base_dir, monkeypatch):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert doctor.check_network().state == "ok"
        server.shutdown()


def test_a_broken_compiler_costs_speed_only(monkeypatch):
    def fail(function, **options):
        raise OSError("file too short")
    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = doctor.check_compile(torch.device("cpu"), quick=False)
    assert finding.state == "note" and "file too short" in finding.what
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "no C++ compiler" in doctor.check_compile(torch.device("cpu"), quick=False).what


def test_gpu_that_training_would_not_use(monkeypatch, base_dir, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(devices, "find_driver", lambda: devices.Driver("580.65.06", ("NVIDIA H100",), (9.0,)))
    assert states(doctor.main(["--quick"]))["device"] == "FAIL"
    assert "580.65.06 lists NVIDIA H100, but torch can't use it: this torch is built for CPU" in capsys.readouterr().out
    assert "not used, as asked: NVIDIA H100" in doctor.check_device(torch.device("cpu")).what

    monkeypatch.setattr(devices, "find_driver", devices.Driver)
    monkeypatch.setattr(devices, "has_pci_gpu", lambda: True)
    finding = doctor.check_device(torch.device("cpu"))
    assert finding.state == "note" and "an NVIDIA GPU is there, and no driver" in finding.what


def test_gpus_of_different_kinds_and_in_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", ["NVIDIA A100", "NVIDIA A100", "NVIDIA H100"].__getitem__)
    finding = doctor.check_device(torch.device("cuda"))
    assert finding.state == "note" and finding.what.startswith("2 x NVIDIA A100, NVIDIA H100: ")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 2**30, 80 * 2**30))
    finding = doctor.check_memory(torch.device("cuda"))
    assert finding.state == "note" and "30 of 80 GiB free on the GPU: another process uses it" in finding.what


def test_no_attention_backend(monkeypatch):
    monkeypatch.setattr("nanochat.flash_attention.probe_report", lambda *args: [("sdpa", False, "is off by 3")])
    finding = doctor.check_attention(torch.device("cpu"), torch.float32)
    assert finding.state == "FAIL" and "sdpa: is off by 3" in finding.what


def test_fp8_and_whether_it_pays(monkeypatch):
    assert "doesn't pay: a CPU" in doctor.check_fp8(torch.device("cpu"), quick=True).what
    assert "not here: it needs an NVIDIA GPU" in doctor.check_fp8(torch.device("mps"), quick=True).what
    monkeypatch.setattr("nanochat.fp8.find_obstacle", lambda device: "")
    seconds = iter((3.0, 4.0, 6.0, 4.0))
    monkeypatch.setattr(doctor, "measure_sec", lambda device, call: next(seconds))
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: layer)
    monkeypatch.setattr(torch, "randn", lambda *shape, **more: None)    # "meta" stands in for a GPU
    assert "not timed" in doctor.check_fp8(torch.device("meta"), quick=True).what
    what = doctor.check_fp8(torch.device("meta"), quick=False).what
    assert "0.75x the speed of bf16 at depth 12, 1.50x the speed of bf16 at depth 24" in what


def test_a_check_that_breaks_is_a_finding():
    assert doctor.guard("x", lambda: 1 // 0) == doctor.Finding(
        "x", "FAIL", "ZeroDivisionError: integer division or modulo by zero")


def test_old_python_and_old_torch(monkeypatch):
    assert doctor.check_python((3, 9)).state == "FAIL" and doctor.check_python((3, 10)).state == "ok"
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert "older than 2.9" in doctor.check_packages().what
    monkeypatch.setattr(torch, "__version__", "2.10.0a0")
    assert doctor.check_packages().state == "ok"


@pytest.mark.parametrize("disk", [{"free": 2**29, "state": "FAIL"}, {"free": 2**32, "state": "note"}])
def test_little_disk(base_dir, monkeypatch, disk):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": disk["free"]}))
    assert doctor.check_disk().state == disk["state"]


def test_base_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    done = run_doctor(tmp_path, NANOCHAT_BASE_DIR=str(tmp_path / "file" / "base"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "FAIL  disk" in done.stdout and "set NANOCHAT_BASE_DIR" in done.stdout and "ok    attention" in done.stdout


def test_reader_that_ends_early(base_dir):
    done = subprocess.run(f"{sys.executable} -m scripts.doctor --quick --device-type cpu | head -1", shell=True,
                          cwd=REPO_DIR, capture_output=True, text=True)
    assert done.stdout.startswith("ok    python") and not done.stderr


def test_missing_and_broken_packages(tmp_path):
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError("No module named torch")')
    (tmp_path / "rustbpe.py").write_text('raise OSError("librust.so: file too short")')
    done = run_doctor(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "FAIL  packages   missing or broken: torch, rustbpe (OSError: librust.so: file too short)" in done.stdout
    assert "-> bash runs/setup.sh" in done.stdout
