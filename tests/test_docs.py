"""README tells the truth: its tree is the tree, its commands parse, its table of depths is what the code computes."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from nanochat.config import count_params, estimate_flops
from nanochat.scaling import count_scaling_params, make_config

REPO_DIR = Path(__file__).resolve().parents[1]
README = (REPO_DIR / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m ((?:nanochat|scripts|dev)\.\w+[^\n`#|]*)", README)))


def test_tree():
    """Every file of the code is in the tree, and every file of the tree is there."""
    tree = README.split("## The tree")[1].split("```")[1]
    folder, named = "", {"nanochat": set(), "scripts": set(), "runs": set()}
    for line in tree.splitlines():
        folder = line.split("/")[0] if re.match(r"\w+/", line) else folder
        if folder in named:
            named[folder] |= set(re.findall(r"\b\w+\.(?:py|sh|html)\b", line))
    for folder, names in named.items():
        files = {path.name for path in (REPO_DIR / folder).iterdir() if path.suffix in (".py", ".sh", ".html")}
        assert names == files - {"__init__.py"}


def test_core_is_read_in_an_evening():
    """What a newcomer reads first, in that order, stays short, and README says how short."""
    order = README.split("Read in this order: this page")[1].split("\n\n")[0]
    paths = ["README.md", *re.findall(r"`([\w./]+)`", order)]
    assert len(paths) == 6
    num_lines = {path: len((REPO_DIR / path).read_text(encoding="utf-8").splitlines()) for path in paths}
    in_all, in_python = sum(num_lines.values()), sum(num for path, num in num_lines.items() if path.endswith(".py"))
    assert in_all <= 1300
    stated = [int(number.replace(",", "")) for number in re.findall(r"\b(\d,\d{3}) lines", README)]
    assert len(stated) == 2 and abs(stated[0] - in_python) <= 20 and abs(stated[1] - in_all) <= 20, (in_python, in_all)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    """Each `python -m` line names a module with a command line that takes these flags."""
    name, *argv = shlex.split(command)
    module = importlib.import_module(name)
    assert module.parse_args(argv)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"bash ((?:runs|dev)/[\w.]+)", README))))
def test_recipe_exists(path):
    assert (REPO_DIR / path).is_file()


def test_settings_of_recipes_exist():
    """Each VARIABLE=value before a recipe is one that the recipe lists."""
    for settings, path in re.findall(r"((?:[A-Z_]+=\w+ )+)bash (runs/\w+\.sh)", README):
        recipe = (REPO_DIR / path).read_text()
        for name in re.findall(r"([A-Z_]+)=", settings):
            assert re.search(rf"^{name}=\${{{name}", recipe, re.MULTILINE), (name, path)


def test_log_has_what_is_cited():
    """Each `dev/LOG.md, "heading"` of README and code begins one entry's heading; no reference is without one."""
    headings = set(re.findall(r"^### (.+)$", (REPO_DIR / "dev" / "LOG.md").read_text(), re.MULTILINE))
    files = [path for folder in ("nanochat", "scripts", "tasks", "runs", "dev", "tests")
             for path in (REPO_DIR / folder).rglob("*.[ps][yh]") if path != Path(__file__)]
    wrong = {}
    for path in (REPO_DIR / "README.md", *files):
        text = re.sub(r"\s*\n\s*#?\s*", " ", path.read_text())    # a heading may go on in the next line of a comment
        for cited in re.findall(r"LOG\.md(?! \(dated)`?(?:, \"([^\"]+)\")?", text):
            if not cited or sum(heading.startswith(cited) for heading in headings) != 1:
                wrong[path.name] = cited or "no heading"
    assert not wrong


def test_no_figure_is_left_to_fill_in():
    for path in (REPO_DIR / "README.md", *(REPO_DIR / "runs").glob("*.sh")):
        assert not re.search(r"\b[A-Z]+_(TIME|EXPECT|README|MINUTES)\b", path.read_text()), path


def test_dial_table():
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d,.]+) M \| ([\d.]+) B \| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) >= 4
    for depth, width, params_m, tokens_b, flops in rows:
        config = make_config(int(depth), vocab_size=32768, sequence_len=2048)
        tokens = 12 * count_scaling_params(config)
        assert config.n_embd == int(width.replace(",", ""))
        assert count_params(config)["total"] / 1e6 == pytest.approx(float(params_m.replace(",", "")), abs=0.06)
        assert tokens / 1e9 == pytest.approx(float(tokens_b), abs=0.006)
        assert tokens * estimate_flops(config) == pytest.approx(float(flops), rel=0.06)
