"""The package: dependencies are declared if and only if imported, locked, and set up by one script on any machine."""

import ast
import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import doctor, plan

REPO_DIR = Path(__file__).resolve().parents[1]
LOCKS = ("requirements.lock", "requirements-py310.lock")
OUR_FOLDERS = ("nanochat", "scripts", "tasks", "tests", "dev")
TOOLS = {"ruff", "pytest", "pytest-timeout", "pytest-xdist"}    # of runs/test.sh, whether or not a test imports them
INSIDE_OTHERS = {"tiktoken_ext", "triton"}    # of tiktoken, and of torch's GPU builds
DISTRIBUTIONS = {"yaml": "pyyaml"}             # where the package isn't named like its module
USER_BUILT = {"flash_attn_interface"}    # FlashAttention 3, from torch's own index or from source
NEWER_THAN_PYTHON_310 = re.compile(r"\b(hashlib\.file_digest|import tomllib|ExceptionGroup|contextlib\.chdir|"
                                   r"asyncio\.(TaskGroup|timeout)|(datetime\.|from datetime import [^\n]*\b)UTC|"
                                   r"(typing\.|from typing import [^\n]*\b)(Self|Never|assert_never))\b")


@functools.cache
def list_nodes(path: Path) -> list[ast.AST]:
    """The syntax tree of a Python file, flat."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def names_no_encoding(call: ast.Call) -> bool:
    """Whether a call opens a text file, or reads a process's text, in the encoding of whatever locale it runs in."""
    name, method = ast.unparse(call.func), ast.unparse(call.func).split(".")[-1]
    settings = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    mode = settings.get("mode") or (ast.unparse(call.args[1]) if len(call.args) > 1 else "'r'")
    if "encoding" in settings:
        return False
    if name.startswith("subprocess."):
        return "text" in settings or "universal_newlines" in settings
    return method in ("read_text", "write_text") and "." in name or \
        name in ("open", "os.fdopen") and mode.startswith("'") and "b" not in mode or \
        name in ("gzip.open", "bz2.open", "lzma.open") and "t" in mode


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def load_project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    return tomllib.loads((REPO_DIR / "pyproject.toml").read_text())["project"]


def parse_names(requirements: list[str]) -> set[str]:
    return {normalize(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def find_imports(*folders: str) -> set[str]:
    """Top-level packages of others that the Python files of these folders import, anywhere in a file."""
    names = set()
    for path in (path for folder in folders for path in (REPO_DIR / folder).rglob("*.py")):
        for node in list_nodes(path):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "importorskip")) \
                    and isinstance(node.args[0], ast.Constant):
                names.add(node.args[0].value.split(".")[0])
    return to_distributions(names - set(sys.stdlib_module_names) - set(OUR_FOLDERS))


def find_our_imports(folder: str) -> set[str]:
    """The folders of ours that the files of a folder import from."""
    found = set()
    for path in (REPO_DIR / folder).rglob("*.py"):
        for node in list_nodes(path):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                found |= {name.split(".")[0] for name in names}
    return found & set(OUR_FOLDERS)


def test_files_of_ours_are_utf8_whatever_the_locale():
    calls = [(path, node) for folder in ("nanochat", "scripts", "tasks", "dev") for path in
             (REPO_DIR / folder).rglob("*.py") for node in list_nodes(path)
             if isinstance(node, ast.Call)]
    assert len(calls) > 1000
    assert not [f"{path}:{call.lineno}: {ast.unparse(call)}" for path, call in calls if names_no_encoding(call)]


def test_script_that_is_started_as_a_file(tmp_path):
    """python scripts/plan.py, from any folder; it imports no torch."""
    argv = ["--depth", "4", "--nproc", "1", "--json"]
    done = subprocess.run([sys.executable, REPO_DIR / "scripts" / "plan.py", *argv], cwd=tmp_path, capture_output=True,
                          text=True, timeout=60)
    expected = json.loads(json.dumps(plan.main(argv)))    # JSON has no tuples
    assert done.returncode == 0 and json.loads(done.stdout) == expected, done.stderr
    done = subprocess.run([sys.executable, REPO_DIR / "scripts" / "plan.py", "--depth", "0"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_imports_point_downwards():
    """The library knows no script, a script no other script, and nothing but the tests knows the laboratory."""
    assert not find_our_imports("nanochat") & {"scripts", "dev", "tests"}
    assert not find_our_imports("tasks") & {"scripts", "dev", "tests"}
    assert not find_our_imports("scripts") & {"scripts", "dev", "tests"}


def test_each_module_has_a_test_file():
    modules = {path.stem for path in (REPO_DIR / "nanochat").glob("*.py")} - {"__init__"}
    assert not {name for name in modules if not (REPO_DIR / "tests" / f"test_{name}.py").is_file()}


def test_test_files_share_by_helpers_and_run_programs_from_files():
    """What two test files need is in helpers, and a program is a file in tests/programs/, where tools see it."""
    for path in (REPO_DIR / "tests").rglob("*.py"):
        for node in list_nodes(path):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            assert not [name for name in names if re.match(r"(tests\.)?test_", name)], path
            if isinstance(node, ast.List) and len(node.elts) > 1:
                assert [ast.unparse(word) for word in node.elts[:2]] != ["sys.executable", "'-c'"], path


def to_distributions(modules: set[str]) -> set[str]:
    return {normalize(DISTRIBUTIONS.get(module, module)) for module in modules}


def test_declared_if_and_only_if_imported():
    project = load_project()
    extras = {name: parse_names(packages) for name, packages in project["optional-dependencies"].items()}
    declared = parse_names(project["dependencies"])
    users = declared.union(*(packages for name, packages in extras.items() if name != "dev"))
    exempt = to_distributions(INSIDE_OTHERS | USER_BUILT)
    assert find_imports("nanochat", "scripts", "tasks", "dev") - exempt == users
    assert find_imports("tests") - users - exempt - TOOLS == extras["dev"] - TOOLS
    assert declared == to_distributions(set(doctor.PACKAGES))


def test_declared_versions_are_those_that_the_doctor_asks_for():
    project = load_project()
    assert project["requires-python"] == ">=" + ".".join(map(str, doctor.OLDEST_PYTHON))
    assert "torch>=" + ".".join(map(str, doctor.OLDEST_TORCH)) in project["dependencies"]


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_a_plain_list_that_pins_all_that_is_declared(lock):
    lines = (REPO_DIR / lock).read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    project = load_project()
    assert parse_names(project["dependencies"] + project["optional-dependencies"]["dev"]) <= parse_names(lines)
    assert len(parse_names(lines)) == len(lines)


def test_gpu_lock_pins_what_gpus_need_beside_the_other_locks():
    lines = (REPO_DIR / "requirements-gpu.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    assert parse_names(load_project()["optional-dependencies"]["gpu"]) <= parse_names(lines)
    assert not any(parse_names(lines) & parse_names((REPO_DIR / lock).read_text().splitlines()) for lock in LOCKS)


def test_nothing_newer_than_python_310_is_used():
    found = {path.name: match[0] for folder in ("nanochat", "scripts", "tasks", "dev")
             for path in (REPO_DIR / folder).rglob("*.py")
             if (match := NEWER_THAN_PYTHON_310.search(path.read_text()))}
    assert not found


# ---------------------------------------------------------------------------------------------------------------------
# runs/setup.sh, with a stand-in for Python that makes a hollow .venv and writes down what pip is asked for

FAKE_PYTHON = """#!/bin/bash
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >> calls ;;
    "-m pip install"*)
        echo "pip ${*:4}" >> calls
        while [[ -f pip_waits ]]; do sleep 0.1; done
        [[ ! -f pip_fails ]] || { cat pip_fails; exit 1; } ;;
    *urllib*) [[ -f index_answers ]] ;;
    *version_info* | *fcntl* | "-m nanochat.devices") exec "$REAL_PYTHON" "$@" ;;
    --version) echo "Python 3.99.0" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path = tmp_path / "John O'Neill's café"
    (tmp_path / "runs").mkdir(parents=True)
    for name in ("setup.sh", "recipe.sh"):
        shutil.copy(REPO_DIR / "runs" / name, tmp_path / "runs")
    (tmp_path / "nanochat").mkdir()
    for name in ("devices.py", "common.py"):
        shutil.copy(REPO_DIR / "nanochat" / name, tmp_path / "nanochat")
    for lock in LOCKS:
        (tmp_path / lock).write_text("numpy==1.0\ntorch==2.0\n")
    (tmp_path / "requirements-gpu.lock").write_text("kernels==1.0\n")
    fake = tmp_path / "fake_python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    tools = tmp_path / "tools"  # no uv and no nvidia-smi, whatever this machine has
    tools.mkdir()
    for name in ("bash", "mkdir", "cp", "mv", "rm", "cat", "cmp", "head", "tail", "grep", "tr", "wc", "uname",
                 "dirname", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("PYTHON", str(fake))
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.delenv("TORCH_INDEX", raising=False)
    return tmp_path


def set_up(checkout: Path) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run it; returns how it ended and the calls that it made."""
    (checkout / "calls").write_text("")
    done = subprocess.run(["bash", checkout / "runs" / "setup.sh"], capture_output=True, text=True, timeout=60)
    return done, (checkout / "calls").read_text().splitlines()


def get_lock_name() -> str:
    return LOCKS[0] if sys.version_info >= (3, 11) else LOCKS[1]


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
def test_set_up_once(checkout):
    done, calls = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert calls == ["venv", "pip torch==2.0", f"pip -r {get_lock_name()}"]
    done, calls = set_up(checkout)
    assert (done.returncode, done.stdout, calls) == (0, "", [])
    (checkout / get_lock_name()).write_text("torch==2.1\n")
    assert set_up(checkout)[1] == ["pip torch==2.1", f"pip -r {get_lock_name()}"]


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
def test_a_second_set_up_waits_for_the_first(checkout):
    """Else it would take the first one's half of an environment for an interrupted one, and delete it."""
    (checkout / "pip_waits").touch()
    with subprocess.Popen(["bash", checkout / "runs" / "setup.sh"]) as first:
        while not (checkout / ".venv" / "setup.log").exists():
            assert first.poll() is None
            time.sleep(0.01)
        with subprocess.Popen(["bash", checkout / "runs" / "setup.sh"], stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr.readline() == "set-up: waiting for another one in this folder\n"
            (checkout / "pip_waits").unlink()
            assert second.stderr.read() == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert (checkout / "calls").read_text().splitlines() == ["venv", "pip torch==2.0", f"pip -r {get_lock_name()}"]


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
def test_torch_from_its_cpu_index_where_it_answers(checkout):
    (checkout / "index_answers").touch()
    assert set_up(checkout)[1][1] == "pip --index-url https://download.pytorch.org/whl/cpu --no-deps torch==2.0"


def add_gpu(checkout: Path, driver: str, capability: str) -> None:
    """What nvidia-smi says of the machine from now on."""
    nvidia_smi = checkout / "tools" / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/bash\necho '{driver}, {capability}, NVIDIA GPU'\n")
    nvidia_smi.chmod(0o755)


INDEXES = "https://download.pytorch.org/whl"
GPU_LOCK = "pip -r requirements-gpu.lock"


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
@pytest.mark.parametrize(("driver", "capability", "pip"), [
    ("580.65.06", "9.0", []),                                                 # PyPI's build
    ("535.104.05", "8.0", [f"pip --index-url {INDEXES}/cu126 torch==2.0"]),   # the driver is older than CUDA 13
    ("580.65.06", "7.0", [f"pip --index-url {INDEXES}/cu126 torch==2.0"])])   # CUDA 13 has no Volta
def test_cpu_build_is_replaced_by_the_one_for_the_gpu(driver, capability, pip, checkout):
    """Set up on a login node, used on a GPU node."""
    set_up(checkout)
    add_gpu(checkout, driver, capability)
    done, calls = set_up(checkout)
    assert done.returncode == 0, done.stderr
    assert calls == ["venv", *pip, f"pip -r {get_lock_name()}", GPU_LOCK] and "has torch's build cpu" in done.stdout
    assert set_up(checkout)[1] == []
    (checkout / "tools" / "nvidia-smi").unlink()
    assert set_up(checkout)[1] == []    # back on the login node


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
def test_build_that_was_asked_for_stays(checkout, monkeypatch):
    done, _ = set_up(checkout)
    assert "no NVIDIA GPU here" in done.stdout
    monkeypatch.setenv("TORCH_INDEX", f"{INDEXES}/cu130")
    calls = [f"pip --index-url {INDEXES}/cu130 torch==2.0", f"pip -r {get_lock_name()}", GPU_LOCK]
    assert set_up(checkout)[1] == ["venv", *calls]
    monkeypatch.delenv("TORCH_INDEX")
    assert set_up(checkout)[1] == []
    add_gpu(checkout, "580.65.06", "9.0")
    assert set_up(checkout)[1] == []
    (checkout / get_lock_name()).write_text("torch==2.1\n")
    assert set_up(checkout)[1] == [f"pip --index-url {INDEXES}/cu130 torch==2.1", f"pip -r {get_lock_name()}", GPU_LOCK]


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
def test_build_follows_an_older_driver_only(checkout):
    """A shared disk's environment isn't made again and again by nodes with different drivers."""
    add_gpu(checkout, "580.65.06", "9.0")
    set_up(checkout)
    add_gpu(checkout, "550.54.15", "9.0")
    assert set_up(checkout)[1][1] == f"pip --index-url {INDEXES}/cu126 torch==2.0"
    add_gpu(checkout, "580.65.06", "9.0")
    assert set_up(checkout)[1] == []
    add_gpu(checkout, "470.199.02", "7.5")
    done, calls = set_up(checkout)
    assert done.returncode == 2 and calls == [] and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no build of torch serves NVIDIA GPU (compute capability 7.5) with the NVIDIA "
                                  "driver 470.199.02; update the driver")


@pytest.mark.skipif(sys.platform != "linux", reason="torch's CPU index is for Linux")
def test_environment_of_an_older_set_up(checkout):
    """Its stamp is a copy of the lock, and says nothing of torch's build."""
    set_up(checkout)
    shutil.copy(checkout / get_lock_name(), checkout / ".venv" / "nanochat-setup")
    done, calls = set_up(checkout)
    assert (done.returncode, done.stdout, calls) == (0, "", [])
    shutil.copy(checkout / get_lock_name(), checkout / ".venv" / "nanochat-setup")
    add_gpu(checkout, "580.65.06", "9.0")
    assert set_up(checkout)[1] == ["venv", f"pip -r {get_lock_name()}", GPU_LOCK]


def test_interrupted_set_up_begins_again_but_keeps_a_persons_own_venv(checkout):
    set_up(checkout)
    (checkout / ".venv" / "nanochat-setup").write_text("installing\n")
    (checkout / ".venv" / "half_a_package").touch()
    assert "venv" in set_up(checkout)[1] and not (checkout / ".venv" / "half_a_package").exists()
    (checkout / ".venv" / "nanochat-setup").unlink()  # made by hand
    (checkout / ".venv" / "their_package").touch()
    done, calls = set_up(checkout)
    assert done.returncode == 0 and "venv" not in calls and (checkout / ".venv" / "their_package").exists()


def test_set_up_says_in_one_sentence_what_is_wrong(checkout, monkeypatch):
    for log, reason in (("WARNING: NewConnectionError: no route\nERROR: No match for torch\n", "is there a network"),
                        ("ERROR: No matching version (from versions: none)\n", "is there a network"),
                        ("WARNING: slow\nERROR: the disk is full\n", "installed: ERROR: the disk is full (see .venv")):
        (checkout / "pip_fails").write_text(log)
        done, _ = set_up(checkout)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason in done.stderr
    (checkout / "pip_fails").unlink()
    assert set_up(checkout)[0].returncode == 0
    monkeypatch.setenv("PYTHON", "/nowhere/python3")
    assert set_up(checkout)[0].returncode == 0  # what is done needs no Python any more
    shutil.rmtree(checkout / ".venv")
    done, _ = set_up(checkout)
    assert done.returncode == 2 and done.stderr.startswith("error: /nowhere/python3 is missing or older than 3.10")
    assert done.stderr.count("\n") == 1
    (checkout / "no_venv").write_text(FAKE_PYTHON.replace('"-m venv .venv") ', '"-m venv .venv") exit 1; '))
    (checkout / "no_venv").chmod(0o755)
    monkeypatch.setenv("PYTHON", str(checkout / "no_venv"))
    done, _ = set_up(checkout)
    assert done.returncode == 2 and "apt install python3-venv" in done.stderr and done.stderr.count("\n") == 1
