"""What is typed, how scripts end, and their streams, whatever the terminal and the locale."""

import errno
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from nanochat import command_line, common
from nanochat.common import UserError
from tests.helpers import run_forked, start_script

# ---------------------------------------------------------------------------------------------------------------------
# What is typed


@pytest.mark.parametrize(("words", "message"), [
    (["--name", ""],       "argument --name: the value is empty; give one or leave it out"),
    (["--name", " "],      "argument --name: the value is empty"),
    (["--name="],          "argument --name: the value is empty"),
    (["--path", ""],       "argument --path: the value is empty"),
    (["--list", "a", ""],  "argument --list: the value is empty"),
    (["--count", "x"],     "argument --count: invalid int value: 'x'"),
    (["--count", "9223372036854775808"], "argument --count: 9223372036854775808 must be a number of 64 bits"),
    (["--rate", "1e400"],  "argument --rate: 1e400 must be a finite number"),
    (["--rate", "nan"],    "argument --rate: nan must be a finite number")])
@pytest.mark.parametrize("command", [[], ["sub"]])
def test_empty_values_and_numbers_out_of_reach_are_refused(command, words, message, capsys):
    parser = command_line.Parser()
    inner = parser.add_subparsers().add_parser("sub") if command else parser
    for flag, settings in (("name", {}), ("path", {"type": Path}), ("list", {"nargs": "+"}), ("count", {"type": int}),
                           ("rate", {"type": float}), ("text", {"type": str})):
        inner.add_argument(f"--{flag}", **settings)
    assert parser.parse_args([*command, "--text", "", "--path", " x", "--rate=-2"]).path == Path(" x")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args([*command, *words])
    assert message in capsys.readouterr().err


def test_a_wrong_flag_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as ending:
        command_line.Parser(prog="train").parse_args(["--magic"])
    assert ending.value.code == 2
    assert capsys.readouterr().err == "train: error: unrecognized arguments: --magic; see --help\n"


@pytest.mark.parametrize(("settings", "shown"), [
    ({"help": "layers", "type": int, "default": 20}, "layers (default: 20)"),
    ({"help": "share", "type": float, "default": 0.0}, "share (default: 0.0)"),
    ({"help": "steps", "type": command_line.int_or_never}, "steps (default: never)"),
    ({"help": "items", "type": command_line.int_or_all, "default": 500}, "items (default: 500)"),
    ({"help": "rows", "nargs": "+", "default": [1, 8]}, "rows (default: 1 8)"),
    ({"help": "part", "default": "5%"}, "part (default: 5%)"),
    ({"help": "tag (default: the latest)"}, "tag (default: the latest)"),
    ({"help": "tag"}, "tag"),
    ({"help": "go on", "action": "store_true"}, "go on")])
def test_help_shows_the_default(settings, shown):
    parser = command_line.Parser(prog="train", add_help=False)
    parser.add_argument("-x", **settings)
    assert " ".join(parser.format_help().split()).endswith(f" {shown}")


@pytest.mark.parametrize(("name", "words", "message"), [
    ("tok_train",  "--vocab-size 200",               "--vocab-size 200 is out of reach; ask for 266 to 16777216"),
    ("tok_train",  "--vocab-size -5",                "--vocab-size -5 is out of reach"),
    ("base_train", "--depth 0",                      "no model has --depth 0 "),
    ("base_train", "--max-seq-len 0",                "no model has .* --max-seq-len 0: all must be at least 1"),
    ("base_train", "--head-dim 3",                   "no model has .* --head-dim 3 .* the head dim even"),
    ("base_train", "--window-pattern XYZ",           "--window-pattern 'XYZ' must be made of the letters S and L"),
    ("base_train", "--knobs top_k=2",                "--knobs top_k=2 goes with num_experts"),
    ("base_train", "--target-param-data-ratio 0",    "--target-param-data-ratio 0 must be above 0"),
    ("base_train", "--target-flops -1",              "--target-flops -1 must be above 0"),
    ("base_train", "--seq-len-warmup 7:x",           "--seq-len-warmup 7:x must be START:STEPS"),
    ("base_train", "--seq-len-warmup 300:9",         "--seq-len-warmup 300:9: START must be the context of 20"),
    ("base_train", "--total-batch-size 1000",        "--total-batch-size 1000 must be a multiple of 2048"),
    ("base_train", "--device-batch-size 0",          "--device-batch-size 0 must be at least 1"),
    ("mid_train",  "--keep-last 0",                  "--keep-last 0 must be at least 1"),
    ("chat_sft",   "--device-type foo",              "--device-type foo can't be used here: "),
    ("chat_rl",    "--num-samples 1",                "--num-samples 1 must be at least 2: an answer is compared"),
    ("chat_rl",    "--examples-per-step 2000000000", "a run of 1 steps of 32,000,000,000 tokens is out of reach"),
    ("chat_eval",  "-i sft --device-type foo",       "--device-type foo can't be used here: ")])
def test_flags_that_no_data_could_make_good_are_refused_before_a_stage_runs(name, words, message):
    with pytest.raises(UserError, match=f"scripts.{name}: {message}"):
        command_line.check_flags(f"scripts.{name}", words.split())


@pytest.mark.parametrize("words", [
    "--preset arcadium-200m --seq-len-warmup 512:100", "--preset marin-150m --max-seq-len 64 --device-type cuda:1",
    "--depth 1 --device-batch-size auto --keep-last all --device-type xpu", "--target-flops 1"])
def test_flags_whose_use_depends_on_data_or_device_pass(words):
    command_line.check_flags("scripts.base_train", words.split())


# ---------------------------------------------------------------------------------------------------------------------
# How a script ends

ENDINGS = {  # of tests/programs/script_ending.py -> exit code, what stderr says, whether there is a traceback
    "error": (2, "error: no data here\n", False),
    "ctrl_c": (130, "stopped by Ctrl-C\n", False),
    "full_disk": (2, "error: the disk is full", False),
    "bug": (1, "ValueError: a bug", True),
}


@pytest.fixture(scope="module")
def endings():
    """All scripts at once: what they wait for is the import of torch. Ending -> (exit code, stderr)."""
    processes = {ending: start_script("tests.programs.script_ending", ending) for ending in ENDINGS}
    return {ending: (process.communicate(timeout=120)[1], process.returncode) for ending, process in processes.items()}


@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_code_and_message(ending, endings):
    if ending == "full_disk" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    code, message, has_traceback = ENDINGS[ending]
    stderr, actual_code = endings[ending]
    assert actual_code == code and message in stderr
    assert ("Traceback" in stderr) == has_traceback


def raise_error(error):
    raise error


# As NCCL 2.27 and torch put it
NCCL_MEMORY = """NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error (run with NCCL_DEBUG=INFO for details)
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'"""


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 2049]"), True),
    (torch.distributed.DistBackendError(NCCL_MEMORY), False),
    (torch.distributed.DistError("a socket's peer said: out of memory"), False),
    (RuntimeError("NCCL Error 2: unhandled system error: out of memory"), False),
    (RuntimeError("CUDA error: misaligned address"), False), (ValueError("out of memory"), False)])
def test_memory_that_a_smaller_step_may_fit(error, expected):
    """After an error of NCCL no rank reaches the others, whatever the reason."""
    assert common.is_out_of_memory(error) is expected


@pytest.mark.parametrize(("error", "message"), [
    (OSError(errno.ENOSPC, "No space left on device", "model.bin"),
     "error: the disk is full while writing model.bin; what was saved before is intact"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "error: x can't be used (File name too long)"),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "a.tmp", None, "a"), "error: a can't be used (Is a directory)"),
    (torch.OutOfMemoryError("Tried to allocate 2 GiB\nmore"),
     "error: out of memory (Tried to allocate 2 GiB); set a smaller --device-batch-size, where the "
             "script has it, or take a smaller model\n")])
def test_full_disk_and_memory_end_with_2(error, message, capsys):
    with pytest.raises(SystemExit) as ending:
        command_line.run_script(lambda argv: raise_error(error))
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_other_errors_of_the_system_stay_bugs():
    with pytest.raises(FileNotFoundError):
        command_line.run_script(lambda argv: open("/no/such/file"))
    command_line.run_script(lambda argv: {"loss": 1.0})  # returns: exit code 0


class Ended(BaseException):
    """os._exit, with its exit code."""


@pytest.fixture
def live_group(monkeypatch):
    """A communicator, of NCCL for all that common can tell; the calls that end it and the process, in order."""
    calls = []

    def leave(code):
        calls.append(code)
        raise Ended
    monkeypatch.setattr(command_line, "get_process_group", lambda: types.SimpleNamespace(
        destroy_process_group=lambda: calls.append("destroy"), get_backend=lambda: "nccl"))
    monkeypatch.setattr(command_line.time, "sleep", lambda seconds: calls.append("wait"))
    monkeypatch.setattr(command_line.atexit, "_run_exitfuncs", lambda: calls.append("exit functions"))
    monkeypatch.setattr(os, "_exit", leave)
    return calls


@pytest.mark.parametrize(("error", "code", "message"), [
    (UserError("no data"), 2, "error: no data\n"), (KeyboardInterrupt(), 130, "stopped by Ctrl-C\n"),
    (torch.OutOfMemoryError("Tried to allocate"), 2, "error: out of memory"),
    (torch.distributed.DistBackendError("NCCL timeout"), 1, "can't reach the other ranks any more"),
    (torch.distributed.DistBackendError(NCCL_MEMORY), 2,
     "error: NCCL, which connects the GPUs, is out of memory on rank 0 (NCCL error in: ProcessGroupNCCL.cpp:3690"),
    (SystemExit(143), 143, ""),  # how StopSignal ends a run
    (ValueError("a bug"), 1, "Traceback (most recent call last)")])
def test_rank_ends_without_the_teardown_of_a_live_communicator(error, code, message, live_group, capsys):
    """NCCL's would wait for the other ranks."""
    with pytest.raises(Ended):
        command_line.run_script(lambda argv: raise_error(error))
    assert live_group == ["wait", "exit functions", code] and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4321",
                                  "Application timeout caused pair closure"])
def test_what_gloo_says_of_a_lost_rank_is_explained(text, monkeypatch):
    """The second was seen when a rank stalled while all ranks waited for each other; it doesn't name gloo."""
    assert command_line.explain_ending(RuntimeError(text)) is None    # one process alone has no ranks to lose
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    code, message = command_line.explain_ending(RuntimeError(text))
    assert code == 1 and "can't reach the other ranks any more" in message and text in message
    assert command_line.explain_ending(RuntimeError("a bug")) is None


def test_rank_that_is_done_destroys_its_communicator(live_group):
    with pytest.raises(Ended):
        command_line.run_script(lambda argv: None)
    assert live_group == ["destroy", "exit functions", 0]


# ---------------------------------------------------------------------------------------------------------------------
# Streams and locales


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "été ?? ?".encode("latin-1")), ("ascii", b"?t? ?? ?"),
                                                 ("utf-8", "été 中文 ?".encode())])
def test_what_stdout_can_not_show_is_replaced(encoding, shown, monkeypatch):
    """PYTHONIOENCODING, or a locale that isn't UTF-8; the last character is a byte of a path that isn't UTF-8."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    command_line.run_script(lambda argv: common.print0("été 中文 \udcff"))
    assert raw.getvalue() == shown + b"\n"


def test_closed_streams_are_dev_null(tmp_path):
    """Else the first file that is opened would be stdin, the second stdout, and get what is printed."""
    def close_and_write():
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.close(number)
            setattr(sys, name, None)
        command_line.run_script(lambda argv: None)
        with open(tmp_path / "file", "w", encoding="utf-8") as file:
            print("to stdout")
            print("to stderr", file=sys.stderr)
            subprocess.run(["echo", "to stdout"], check=True)
            return [file.fileno() > 2, sys.stdin.read(), os.path.samestat(os.fstat(1), os.stat(os.devnull))]
    assert run_forked(close_and_write) == [True, "", True]
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize(("path", "encoding", "message"), [
    ("/data/é", "ascii", "the character '\\xe9', which the encoding of this locale, ascii, lacks; set LC_ALL="),
    ("/data/\udcff", "utf-8", "'/data/\\udcff' has the byte 0xff, which isn't utf-8, and what is to open it takes")])
def test_file_name_that_can_not_be_encoded(path, encoding, message, monkeypatch, capsys):
    """Under LC_ALL=C PYTHONUTF8=0, where a file of ours names a path; and by a library that takes UTF-8 only."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(SystemExit) as ending:
        command_line.run_script(lambda argv: path.encode(encoding))
    assert ending.value.code == 2 and message in capsys.readouterr().err


def test_environment_that_torch_can_not_be_loaded_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "prefix", "/home/\udcff/.venv")
    with pytest.raises(SystemExit) as ending:
        command_line.prepare_process()
    assert ending.value.code == 2 and "a path that isn't UTF-8; move it" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "has_driver", "expected"), [
    ({}, True, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}), ({}, False, {}),
    ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, True, {"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}),
    ({"PYTORCH_CUDA_ALLOC_CONF": ""}, True, {"PYTORCH_CUDA_ALLOC_CONF": ""})])
def test_allocator_of_cuda_is_set_beside_a_driver_unless_a_person_did(settings, has_driver, expected, tmp_path,
                                                                      monkeypatch):
    monkeypatch.setattr(os, "environ", dict(settings))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(command_line, "NVIDIA_DIR", tmp_path if has_driver else tmp_path / "missing")
    command_line.prepare_process()
    assert {name: value for name, value in os.environ.items() if "ALLOC" in name} == expected


@pytest.mark.parametrize(("before", "after"), [("600", "2000"), ("300", "300"), (None, None)])
def test_decoding_processes_spin_longer_unless_a_person_chose(monkeypatch, before, after):
    """Ours may come from the process that started this one, as from the server's benchmark."""
    monkeypatch.setenv("GOMP_SPINCOUNT", before or "")
    if before is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    command_line.let_threads_spin()
    assert os.environ.get("GOMP_SPINCOUNT") == after
