"""Devices: which one computes, in which dtype, its peak figures; NVIDIA's driver by a stand-in for nvidia-smi and for
the driver's files, and which build of torch follows."""

import dataclasses
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat import compilation, devices
from nanochat.common import Ranks, UserError, write_json
from nanochat.devices import Driver

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def raise_error(error):
    raise error


@pytest.mark.parametrize(("settings", "message"), [
    ({"RANK": "3"}, "RANK=3, LOCAL_RANK=0 and WORLD_SIZE=1 .* don't name one of several ranks; start these with torch"),
    ({"RANK": "first"}, "RANK=first"), ({"RANK": ""}, "RANK=, LOCAL"),
    ({"RANK": "0", "LOCAL_RANK": "", "WORLD_SIZE": "2"}, "LOCAL_RANK= and"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "b"}, "MASTER_PORT=b is no number"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT not, where the ranks meet; start them with torch"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "but MASTER_ADDR not")])
def test_half_an_environment_of_ranks(settings, message, monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    with pytest.raises(UserError, match=message):
        devices.init_compute("cpu")


def test_compiled_kernels_of_several_nodes_are_not_on_their_common_disk(tmp_path, monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                        "NANOCHAT_BASE_DIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    devices.init_compute("cpu")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ    # torch's own choice
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "chosen"))
    devices.init_compute("cpu")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "chosen")


def test_compiled_kernels_are_reached_without_blanks_and_quotes(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plain, awkward = tmp_path / "Grüße", tmp_path / "John O'Neill"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(plain))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    devices.init_compute("cpu")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(plain / "compiled")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(awkward))
    for _ in range(2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        devices.init_compute("cpu")
        link = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert compilation.is_plain(link) and link.samefile(awkward / "compiled")
    assert link.parent.stat().st_mode & 0o77 == 0  # others could put their own kernels there
    link.unlink()
    link.parent.rename(tmp_path / "theirs")
    link.parent.symlink_to(tmp_path / "theirs")
    assert compilation.find_plain_path(awkward) == awkward


def test_device_that_is_not_here_is_a_mistake():
    assert devices.get_device("cpu", Ranks()) == CPU
    missing = [name for name in ("cuda", "xpu", "mps") if not torch.get_device_module(name).is_available()]
    assert missing  # no machine has all three
    for name in (*missing, "toaster"):
        with pytest.raises(UserError, match=f"--device-type {name} can't be used here: ."):
            devices.get_device(name, Ranks())


OLD_DRIVER = Driver("535.104.05", ("NVIDIA H100",), (9.0,))


@pytest.fixture
def no_accelerator(monkeypatch):
    """torch has none; the driver is what a test sets as its second item."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda driver: monkeypatch.setattr(devices, "find_driver", lambda: driver)


def test_gpu_that_torch_can_not_use_is_a_mistake(no_accelerator, monkeypatch):
    """Else a large model would train on the CPU without a word."""
    no_accelerator(OLD_DRIVER)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    sentence = "driver 535.104.05 lists NVIDIA H100, but .* CUDA 13.0, which needs driver 580 or newer; .*--device-"
    for name in ("auto", "", "cuda"):
        with pytest.raises(UserError, match=sentence):
            devices.get_device(name, Ranks())
    assert devices.get_device("cpu", Ranks()) == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES= hides all GPUs; unset it"):
        devices.get_device("auto", Ranks())
    no_accelerator(Driver(problem="NVIDIA-SMI has failed"))
    assert devices.get_device("auto", Ranks()) == CPU
    with pytest.raises(UserError, match="--device-type cuda can't be used here: NVIDIA-SMI has failed"):
        devices.get_device("cuda", Ranks())
    no_accelerator(Driver())
    with pytest.raises(UserError, match="--device-type cuda can't be used here: no NVIDIA driver lists a GPU"):
        devices.get_device("cuda", Ranks())


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="8 ranks run on this machine, and torch sees 2 .* --nproc-per-node=2, or name"):
        devices.get_device("cuda", Ranks(0, 0, 8))


@pytest.mark.parametrize(("error", "message"), [
    (torch.OutOfMemoryError("CUDA error: out of memory\nmore"), "its memory is full; nvidia-smi shows who uses it"),
    (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), "another process has it"),
    (RuntimeError("CUDA error: no kernel image is available for execution on the device"), "has no kernels for it"),
    (RuntimeError("CUDA error: misaligned address\nmore"), "CUDA error: misaligned address$")])
def test_gpu_that_does_not_compute(error, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *args, **settings: raise_error(error))
    with pytest.raises(UserError, match=f"--device-type cuda can't be used here: .*{message}"):
        devices.get_device("cuda", Ranks())


def test_gpus_of_ranks_that_differ_or_are_in_use(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    gpus = []
    monkeypatch.setattr(devices, "gather", lambda value: [value, *gpus])
    devices.check_gpus.__wrapped__(CUDA)
    assert capsys.readouterr().out == ""
    gpus.append(("NVIDIA H100", True, 10 * 2**30, 80 * 2**30))
    devices.check_gpus.__wrapped__(CUDA)
    differ, used = capsys.readouterr().out.splitlines()
    assert differ.startswith("warning: the ranks' GPUs differ (NVIDIA A100, NVIDIA H100): each step waits for the")
    assert used.startswith("warning: only 10.0 of 80.0 GiB are free on rank 1's GPU (NVIDIA H100), another process")
    gpus.append(("Tesla T4", False, 16 * 2**30, 16 * 2**30))
    with pytest.raises(UserError, match="only some of the ranks' GPUs have bf16 .*A100, NVIDIA H100, Tesla T4"):
        devices.check_gpus.__wrapped__(CUDA)


def test_compute_dtype(monkeypatch):
    assert devices.get_compute_dtype("float64", CPU) == (torch.float64, "asked for")
    with pytest.raises(UserError, match="--dtype int8 is not one of auto, bfloat16, float16, float32, float64"):
        devices.get_compute_dtype("int8", CPU)
    assert devices.get_compute_dtype("auto", torch.device("mps"))[0] == torch.float32
    for bf16_rate, dtype in ((1.9, torch.bfloat16), (1.1, torch.float32), (0.2, torch.float32)):
        rates = {torch.bfloat16: bf16_rate, torch.float32: 1.0}
        monkeypatch.setattr(devices, "measure_matmul_rate", lambda dtype, size, rates=rates: rates[dtype])
        chosen, reason = devices.get_compute_dtype("auto", CPU)
        assert chosen == dtype and f"{bf16_rate}x" in reason
    mine = (torch.float32, "bf16 measured only 0.2x the matmul rate of fp32 on this CPU")
    monkeypatch.setattr(devices, "gather", lambda value: [(torch.bfloat16, "rank 0's")] if value == mine else None)
    assert devices.get_compute_dtype("auto", CPU)[0] == torch.bfloat16    # all ranks compute in what rank 0 measured
    monkeypatch.setattr(devices, "gather", lambda value: [value])
    assert devices.get_compute_dtype("bfloat16", CPU) == (
        torch.bfloat16, "asked for, though this CPU emulates it at 0.20x the matmul rate of fp32; --dtype float32 is "
        "faster")
    monkeypatch.setattr(devices, "measure_matmul_rate", lambda dtype, size: {512: 1.0, 1024: 2.0 + 2 * (
        dtype == torch.bfloat16)}[size])    # where a smaller product doesn't say it, a large one counts
    assert devices.get_compute_dtype("auto", CPU)[1] == "measured 2.0x the matmul rate of fp32 on this CPU"
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, dtype in (((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16),
                              ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert devices.get_compute_dtype("auto", CUDA)[0] == dtype
        assert ("emulates" in devices.get_compute_dtype("bfloat16", CUDA)[1]) == (dtype != torch.bfloat16)


@pytest.mark.parametrize(("name", "tera_flops"), [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 836), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
    ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10", 125),
    ("NVIDIA A10G", 70), ("NVIDIA A30", 165), ("NVIDIA A40", 149.7), ("NVIDIA L4", 121), ("NVIDIA L40", 181),
    ("NVIDIA L40S", 362), ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65), ("NVIDIA GeForce RTX 5090", 209.5),
    ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4080 SUPER", 104.4), ("NVIDIA GeForce RTX 4080", 97.5),
    ("NVIDIA GeForce RTX 3090", 71), ("NVIDIA GeForce RTX 3090 Ti", 80), ("NVIDIA RTX 6000 Ada Generation", 364),
    ("NVIDIA RTX A6000", 154.8), ("NVIDIA RTX A5000", 111), ("NVIDIA RTX A4000", 76.7), ("AMD Instinct MI300X", 1307.4),
    ("AMD Instinct MI250X / MI250", 191.5),                            # each of its two dies is a device to torch
    ("NVIDIA RTX A1000", None), ("NVIDIA RTX A3000 Laptop GPU", None),  # not A100, not A30
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),                      # half of the desktop card's
    ("NVIDIA T400 4GB", None), ("A GPU of the future", None),
])
def test_peak_flops_by_name(name, tera_flops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    flops, reason = devices.get_peak_flops(CUDA, torch.bfloat16)
    assert flops == (None if tera_flops is None else pytest.approx(tera_flops * 1e12))
    if flops is None:
        assert name in reason


def test_peak_flops_of_a_cpu_is_measured():
    rate, reason = devices.get_peak_flops(CPU, torch.float32)
    assert 1e8 < rate < 1e14 and reason == "measured matmul rate"
    assert devices.get_peak_flops(CPU, torch.float32)[0] == rate  # once a process
    assert devices.get_peak_flops(torch.device("mps"), torch.float32)[0] is None


def test_peak_memory_of_a_cpu_grows_with_use():
    before = devices.get_peak_memory_bytes(CPU)
    used = torch.ones(before // 4 + 2**20)  # fp32: more than was ever in use
    assert devices.get_peak_memory_bytes(CPU) >= used.nbytes > before > 2**20


def test_environment_is_json_and_knows_this_machine(tmp_path):
    environment = devices.get_environment(CPU)
    write_json(tmp_path / "run.json", environment)
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["hardware"]["num_cpus"] >= 1 and environment["hardware"]["ram_bytes"] > 2**28


def test_ranks_on_gpus_have_both_backends(monkeypatch, tmp_path):
    groups, switches = [], []
    for name, value in (("NANOCHAT_BASE_DIR", str(tmp_path)), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(devices, "get_ranks", lambda: Ranks(1, 1, 2))
    monkeypatch.setattr(devices, "get_device", lambda device_type, ranks: torch.device("cuda", ranks.local_rank))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(devices, "check_gpus", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switches.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: groups.append((backend, options)))
    devices.init_compute("cuda")
    (backend, options), = groups
    assert backend == "cpu:gloo,cuda:nccl" and options["device_id"] == torch.device("cuda", 1)
    assert switches == [False]    # cuDNN's attention would plan anew for each token


# ---------------------------------------------------------------------------------------------------------------------
# NVIDIA's driver

H100 = Driver("580.65.06", ("NVIDIA H100 80GB HBM3",) * 2, (9.0, 9.0))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a GPU: its folder, to which a test adds one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("NVIDIA_DIR", "DEVICE_DIR", "PCI_DIR"):
        monkeypatch.setattr(devices, name, tmp_path / name)
    return tmp_path


def add_smi(machine, output, code=0):
    path = machine / "bin" / "nvidia-smi"
    path.write_text(f"#!{machine}/bin/bash\necho '{output}'\nexit {code}\n")
    path.chmod(0o755)


def add_files(machine, version="580.65.06", models=("NVIDIA H100 80GB HBM3",), num_devices=1):
    """The driver's own files, as the open kernel module writes them."""
    for i, model in enumerate(models):
        folder = machine / "NVIDIA_DIR" / "gpus" / f"0000:0{i}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 43\nDevice Minor: \t {i}\n")
    (machine / "NVIDIA_DIR" / "version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (root@x)\nGCC: 12\n")
    (machine / "DEVICE_DIR").mkdir()
    for i in range(num_devices):
        (machine / "DEVICE_DIR" / f"nvidia{i}").touch()


def test_machine_without_a_gpu_starts_nothing(machine, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: pytest.fail("a process was started"))
    assert devices.find_driver() == Driver() and devices.choose_build(Driver()) == "cpu"


def test_nvidia_smi_lists_gpus(machine):
    add_smi(machine, "580.65.06, 9.0, NVIDIA H100 80GB HBM3\n580.65.06, 9.0, NVIDIA H100 80GB HBM3")
    assert devices.find_driver() == H100 and H100.major == 580
    add_smi(machine, "535.1, [N/A], A GPU, renamed")
    assert devices.find_driver() == Driver("535.1", ("A GPU, renamed",), ())


def test_job_that_was_given_no_gpu(machine):
    """On a node with GPUs: nvidia-smi finds none, while the driver's files list them all."""
    add_files(machine)
    add_smi(machine, "No devices were found", devices.NO_DEVICES)
    assert devices.find_driver() == Driver()


@pytest.mark.parametrize(("output", "code"), [
    ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95", 18),
    ('Field "compute_cap" is not a valid field to query.', 2)])    # a driver before 510
def test_nvidia_smi_fails_and_the_files_list_a_gpu(output, code, machine):
    add_files(machine, "470.199.02", ("Tesla T4", "Tesla V100"), num_devices=1)
    add_smi(machine, output, code)
    assert devices.find_driver() == Driver("470.199.02", ("Tesla T4",), (), output.splitlines()[0])    # V100: no device


def test_nvidia_smi_hangs_or_is_not_there(machine, monkeypatch):
    add_files(machine)
    assert devices.find_driver() == Driver("580.65.06", ("NVIDIA H100 80GB HBM3",))
    add_smi(machine, "")

    def hang(command, timeout, **settings):
        raise subprocess.TimeoutExpired(command, timeout)
    monkeypatch.setattr(subprocess, "run", hang)
    assert devices.find_driver().problem == "nvidia-smi does not answer within 30 s"


def test_gpu_without_a_driver(machine):
    add_smi(machine, "NVIDIA-SMI has failed because it couldnt communicate with the NVIDIA driver.", 9)
    driver = devices.find_driver()
    assert driver.names == () and "communicate with the NVIDIA driver" in driver.problem
    for name, vendor, kind in (("audio", "0x10de", "0x040300"), ("intel", "0x8086", "0x030000")):
        (machine / "PCI_DIR" / name).mkdir(parents=True)
        (machine / "PCI_DIR" / name / "vendor").write_text(f"{vendor}\n")
        (machine / "PCI_DIR" / name / "class").write_text(f"{kind}\n")
    assert not devices.has_pci_gpu()
    (machine / "PCI_DIR" / "audio" / "class").write_text("0x030200\n")
    assert devices.has_pci_gpu()


@pytest.mark.parametrize(("version", "capabilities", "build"), [
    ("580.65.06", (9.0,), "default"), ("610.1", (12.0, 8.9), "default"), ("575.57.08", (8.0,), "cu126"),
    ("525.60.13", (8.6,), "cu126"), ("580.65.06", (7.0, 8.0), "cu126"), ("535.1", (), "cu126"), (None, (), "default")])
def test_build_for_a_driver(version, capabilities, build):
    assert devices.choose_build(Driver(version, ("GPU",), capabilities)) == build


@pytest.mark.parametrize(("version", "capabilities"), [("470.199.02", (7.5,)), ("570.86.10", (12.0,)),    # Blackwell
                                                       ("580.65.06", (7.0, 12.0)), ("580.65.06", (3.5,))])
def test_no_build_for_a_driver(version, capabilities):
    with pytest.raises(ValueError, match=f"no build of torch serves GPU .compute capability {capabilities[0]}.* with "
                                         f"the NVIDIA driver {version}; update the driver .525 is .* TORCH_INDEX="):
        devices.choose_build(Driver(version, ("GPU",), capabilities))


@pytest.mark.parametrize(("changes", "torch_cuda", "visible", "message"), [
    ({}, "13.0", "", "CUDA_VISIBLE_DEVICES= hides all GPUs; unset it, or give --device-type cpu"),
    ({}, "13.0", "-1", "CUDA_VISIBLE_DEVICES=-1 hides all GPUs; unset it"),
    ({}, None, None, "this torch is built for CPUs only; rm -r .venv && bash runs/setup.sh, or give --device-type cpu"),
    ({"version": "535.104"}, "13.0", None, "this torch is built for CUDA 13.0, which needs driver 580 or newer; updat"),
    ({"problem": "version mismatch"}, "13.0", None, "nvidia-smi says: version mismatch; restart the machine"),
    ({}, "13.0", "7", "CUDA_VISIBLE_DEVICES=7 names none of them (torch's error); correct or unset it"),
    ({}, "13.0", None, "torch can't use it: torch's error; rm -r .venv && bash runs/setup.sh, or give")])
def test_gpu_that_torch_can_not_use(changes, torch_cuda, visible, message):
    driver = dataclasses.replace(H100, **changes)
    sentence = devices.explain_unusable(driver, torch_cuda, visible, "torch's error")
    assert message in sentence and sentence.startswith(f"the NVIDIA driver {driver.version} lists 2 x NVIDIA H100")
    assert sentence.endswith("or give --device-type cpu to go on without") and "\n" not in sentence


def test_known_errors_of_a_gpu():
    assert "no kernels for it" in devices.explain_error("CUDA error: no kernel image is available for execution")
    assert "for itself alone" in devices.explain_error("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    assert devices.explain_error("CUDA error: misaligned") == "CUDA error: misaligned"


def test_build_is_printed_for_the_set_up(machine, capsys):
    devices.main()
    assert capsys.readouterr().out == "cpu\n"
    add_smi(machine, "470.199.02, 7.5, Tesla T4")
    with pytest.raises(SystemExit) as ending:
        devices.main()
    assert ending.value.code == 2 and capsys.readouterr().err.startswith("error: no build of torch serves Tesla T4")
