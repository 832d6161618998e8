"""What the driver says, by a stand-in for nvidia-smi and for the driver's files, and which build of torch follows."""

import dataclasses
import shutil
import subprocess

import pytest

from nanochat import nvidia
from nanochat.nvidia import Driver

H100 = Driver("580.65.06", ("NVIDIA H100 80GB HBM3",) * 2, (9.0, 9.0))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a GPU: its folder, to which a test adds one."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("PROC_DIR", "DEVICE_DIR", "PCI_DIR"):
        monkeypatch.setattr(nvidia, name, tmp_path / name)
    return tmp_path


def add_smi(machine, output, code=0):
    path = machine / "bin" / "nvidia-smi"
    path.write_text(f"#!{machine}/bin/bash\necho '{output}'\nexit {code}\n")
    path.chmod(0o755)


def add_files(machine, version="580.65.06", models=("NVIDIA H100 80GB HBM3",), num_devices=1):
    """The driver's own files, as the open kernel module writes them."""
    for i, model in enumerate(models):
        folder = machine / "PROC_DIR" / "gpus" / f"0000:0{i}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 43\nDevice Minor: \t {i}\n")
    (machine / "PROC_DIR" / "version").write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (root@x)\nGCC: 12\n")
    (machine / "DEVICE_DIR").mkdir()
    for i in range(num_devices):
        (machine / "DEVICE_DIR" / f"nvidia{i}").touch()


def test_machine_without_a_gpu_starts_nothing(machine, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: pytest.fail("a process was started"))
    assert nvidia.find_driver() == Driver() and nvidia.choose_build(Driver()) == "cpu"


def test_nvidia_smi_lists_gpus(machine):
    add_smi(machine, "580.65.06, 9.0, NVIDIA H100 80GB HBM3\n580.65.06, 9.0, NVIDIA H100 80GB HBM3")
    assert nvidia.find_driver() == H100 and H100.major == 580
    add_smi(machine, "535.1, [N/A], A GPU, renamed")
    assert nvidia.find_driver() == Driver("535.1", ("A GPU, renamed",), ())


def test_job_that_was_given_no_gpu(machine):
    """On a node with GPUs: nvidia-smi finds none, while the driver's files list them all."""
    add_files(machine)
    add_smi(machine, "No devices were found", nvidia.NO_DEVICES)
    assert nvidia.find_driver() == Driver()


@pytest.mark.parametrize(("output", "code"), [
    ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95", 18),
    ('Field "compute_cap" is not a valid field to query.', 2)])    # a driver before 510
def test_nvidia_smi_fails_and_the_files_list_a_gpu(output, code, machine):
    add_files(machine, "470.199.02", ("Tesla T4", "Tesla V100"), num_devices=1)
    add_smi(machine, output, code)
    assert nvidia.find_driver() == Driver("470.199.02", ("Tesla T4",), (), output.splitlines()[0])    # V100: no device


def test_nvidia_smi_hangs_or_is_not_there(machine, monkeypatch):
    add_files(machine)
    assert nvidia.find_driver() == Driver("580.65.06", ("NVIDIA H100 80GB HBM3",))
    add_smi(machine, "")

    def hang(command, timeout, **settings):
        raise subprocess.TimeoutExpired(command, timeout)
    monkeypatch.setattr(subprocess, "run", hang)
    assert nvidia.find_driver().problem == "nvidia-smi does not answer within 30 s"


def test_gpu_without_a_driver(machine):
    add_smi(machine, "NVIDIA-SMI has failed because it couldnt communicate with the NVIDIA driver.", 9)
    driver = nvidia.find_driver()
    assert driver.names == () and "communicate with the NVIDIA driver" in driver.problem
    for name, vendor, kind in (("audio", "0x10de", "0x040300"), ("intel", "0x8086", "0x030000")):
        (machine / "PCI_DIR" / name).mkdir(parents=True)
        (machine / "PCI_DIR" / name / "vendor").write_text(f"{vendor}\n")
        (machine / "PCI_DIR" / name / "class").write_text(f"{kind}\n")
    assert not nvidia.has_pci_gpu()
    (machine / "PCI_DIR" / "audio" / "class").write_text("0x030200\n")
    assert nvidia.has_pci_gpu()


@pytest.mark.parametrize(("version", "capabilities", "build"), [
    ("580.65.06", (9.0,), "default"), ("610.1", (12.0, 8.9), "default"), ("575.57.08", (8.0,), "cu126"),
    ("525.60.13", (8.6,), "cu126"), ("580.65.06", (7.0, 8.0), "cu126"), ("535.1", (), "cu126"), (None, (), "default")])
def test_build_for_a_driver(version, capabilities, build):
    assert nvidia.choose_build(Driver(version, ("GPU",), capabilities)) == build


@pytest.mark.parametrize(("version", "capabilities"), [("470.199.02", (7.5,)), ("570.86.10", (12.0,)),    # Blackwell
                                                       ("580.65.06", (7.0, 12.0)), ("580.65.06", (3.5,))])
def test_no_build_for_a_driver(version, capabilities):
    with pytest.raises(ValueError, match=f"no build of torch serves GPU .compute capability {capabilities[0]}.* with "
                                         f"the NVIDIA driver {version}; update the driver .525 is .* TORCH_INDEX="):
        nvidia.choose_build(Driver(version, ("GPU",), capabilities))


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
    sentence = nvidia.explain_unusable(driver, torch_cuda, visible, "torch's error")
    assert message in sentence and sentence.startswith(f"the NVIDIA driver {driver.version} lists 2 x NVIDIA H100")
    assert sentence.endswith("or give --device-type cpu to go on without") and "\n" not in sentence


def test_known_errors_of_a_gpu():
    assert "no kernels for it" in nvidia.explain_error("CUDA error: no kernel image is available for execution")
    assert "for itself alone" in nvidia.explain_error("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    assert nvidia.explain_error("CUDA error: misaligned") == "CUDA error: misaligned"


def test_build_is_printed_for_the_set_up(machine, capsys):
    nvidia.main()
    assert capsys.readouterr().out == "cpu\n"
    add_smi(machine, "470.199.02, 7.5, Tesla T4")
    with pytest.raises(SystemExit) as ending:
        nvidia.main()
    assert ending.value.code == 2 and capsys.readouterr().err.startswith("error: no build of torch serves Tesla T4")
