"""Where state lives, files that are never half-written, ranks, and what a run was made with."""

import errno
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist

from nanochat import common
from nanochat.checkpoint_manager import locked_run
from nanochat.common import Ranks, UserError
from tasks.customjson import CustomJSON
from tests.helpers import run_program

# ---------------------------------------------------------------------------------------------------------------------
# Environment, files, ranks


def test_base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert common.get_base_dir() == tmp_path / "a" / "b" and (tmp_path / "a" / "b").is_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")  # as good as none
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.get_base_dir() == tmp_path / ".cache" / "nanochat"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/state")
    assert common.get_base_dir() == tmp_path / "state"
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        common.get_base_dir()


@pytest.mark.parametrize("seconds", ["inf", "nan", "0", "soon", "1e300"])
def test_a_timeout_that_is_none(seconds, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TIMEOUT_SEC", seconds)
    with pytest.raises(UserError, match=f"NANOCHAT_TIMEOUT_SEC={seconds} must be a number of seconds"):
        common.get_collective_timeout()


def test_user_without_a_home(monkeypatch):
    """As in a container that is started with any user's id."""
    def find_nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")
    monkeypatch.setattr("pwd.getpwuid", find_nobody)
    for name in ("HOME", "NANOCHAT_BASE_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="home folder in ~/.cache/nanochat isn't known .* set NANOCHAT_BASE_DIR"):
        common.get_base_dir()
    monkeypatch.setenv("NANOCHAT_MIRROR_DIR", "~/hub")
    for find in (common.get_mirror_dir, lambda: CustomJSON("~/mine.jsonl")):
        with pytest.raises(UserError, match="~/.* isn't known on this system; set HOME, or give it without ~"):
            find()


def test_write_atomic_replaces_a_file(tmp_path):
    path = tmp_path / "text"
    common.write_atomic(path, "größer\n")
    common.write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    common.write_json(path, {"a": [1, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'
    common.write_json(path, {"path": os.fsdecode(b"/data/\xff")})
    assert os.fsencode(json.loads(path.read_text(encoding="utf-8"))["path"]) == b"/data/\xff"
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_content_when_it_fails(failing, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    path = tmp_path / "text"
    path.write_text("old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        common.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["text"]


def test_hash_file(tmp_path):
    content = os.urandom(2**20 + 5)
    (tmp_path / "blob").write_bytes(content)
    assert common.hash_file(tmp_path / "blob") == hashlib.sha256(content).hexdigest()


def test_file_lock_is_exclusive(tmp_path):
    with common.file_lock(tmp_path / "folder" / "thing"):
        other = common.file_lock(tmp_path / "folder" / "thing")
        with pytest.raises(TimeoutError):
            other.acquire(timeout=0)
    other.acquire(timeout=0)
    other.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_disk_without_locks(number, tmp_path, monkeypatch, capsys):
    """As NFS and Lustre may be mounted: work goes on, and a warning says once what is missing."""
    def fail(descriptor, operation):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr("fcntl.flock", fail)
    for _ in range(2):
        with common.file_lock(tmp_path / "thing"), locked_run(tmp_path / "run"):
            pass
    with common.file_lock(tmp_path / "thing").acquire():
        pass
    out = capsys.readouterr().out
    assert out.count("has no file locks") == 1 and out.startswith(f"warning: the disk of {tmp_path} has no file locks")


def test_other_errors_of_a_lock_are_raised(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(OSError, match="Input/output error"), common.file_lock(tmp_path / "thing"):
        pass


def test_ranks(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert common.get_ranks() == Ranks(0, 0, 1)
    common.print0("from", 0)
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert common.get_ranks() == Ranks(rank=5, local_rank=1, world_size=8)
    common.print0("from", 5)
    assert capsys.readouterr().out == "from 0\n"


def test_a_line_is_written_in_one_piece(monkeypatch):
    """Else two threads' lines may mix."""
    pieces = []
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=pieces.append, flush=lambda: None))
    common.print0("saved", 5)
    assert [piece for piece in pieces if piece] == ["saved 5\n"]


# ---------------------------------------------------------------------------------------------------------------------
# What a run was made with


def test_git_revision_says_when_files_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert common.get_git_revision() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True, timeout=30)
    revision = common.get_git_revision()
    assert len(revision) == 12 and int(revision, 16)
    (tmp_path / "new").write_text("a change")
    assert common.get_git_revision() == revision + "+changes"


def test_hash_of_the_code_changes_with_an_edit(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "__file__", str(tmp_path / "nanochat" / "common.py"))
    hashes = {common.hash_code()}
    for path, text in (("nanochat/gpt.py", "a"), ("nanochat/gpt.py", "b"), ("tasks/gpt.py", "b"), ("README.md", "b")):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
        hashes.add(common.hash_code())
    (tmp_path / "nanochat" / ".#gpt.py").symlink_to("user@host.1:2")    # as Emacs marks a file that is being edited
    hashes.add(common.hash_code())
    assert len(hashes) == 4    # the README is no code


@pytest.fixture
def gpu_group():
    """One rank with a backend for each kind of memory, as ranks on GPUs have NCCL beside gloo."""
    dist.init_process_group("cpu:gloo,cuda:gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_flags_of_ranks_on_gpus_stay_in_host_memory(gpu_group):
    """On a GPU they would wait for all work that is queued there."""
    assert common.any_rank(True, False) == [True, False] and common.gather("x") == ["x"]
    counts = torch.tensor([3, 4])
    assert common.sum_over_ranks(counts) is counts and counts.tolist() == [3, 4]


def test_common_is_loaded_where_packages_are_missing(monkeypatch):
    """The doctor needs it to say which."""
    for name in ("filelock", "torch"):
        monkeypatch.setitem(sys.modules, name, None)    # imports fail
    spec = importlib.util.spec_from_file_location("common_again", common.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    assert module.get_ranks() is not None


def test_import_of_the_library_changes_nothing():
    """What a process of ours needs before torch is loaded is done where its scripts begin."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    done = run_program("import_library", env=env)
    assert done.returncode == 0, done.stderr


def test_printable():
    assert common.printable("caf\u00e9 \u6807") == "caf\u00e9 \u6807"
    assert common.printable(os.fsdecode(b"a\xff\x1b[2J\nb")) == r"a\xff\x1b[2J\nb"
