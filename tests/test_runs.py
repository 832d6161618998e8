"""The recipes of runs/, each command for real, at toy size."""

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.config import GPTConfig, count_params
from nanochat.presets import find_preset
from nanochat.run import read_metrics
from nanochat.scaling import count_scaling_params, make_config
from nanochat.shards import load_shards, write_shard
from scripts import base_train, plan
from tests.eval_helpers import write_bundle
from tests.helpers import REPO_DIR
from tests.warm import use_warm_python

TOY = {"DEPTH": "2", "SEQ_LEN": "64", "VOCAB_SIZE": "320", "DATA": "toy", "NAME": "toy", "TOK_CHARS": "100000",
       "EXTRA": "--aspect-ratio 16 --head-dim 16 --eval-tokens 2048 --dtype float32 --device-type cpu "
                "--num-iterations 12 --total-batch-size 512"}

pytestmark = pytest.mark.skipif(Path(sys.prefix).resolve() != REPO_DIR / ".venv",
                                reason="the recipes use the .venv that runs/setup.sh makes, and this isn't it")


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """A base folder with the data 'toy'."""
    base_dir = tmp_path / "John O'Neill's café"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setenv("TMPDIR", str(tmp_path))    # of the links for the compiler
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklm", k=rng.randint(2, 7))) for _ in range(60)]
    (tmp_path / "texts").mkdir()
    for i in range(300):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(rng.choices(words, k=60)))
    dataset.main(["--source", "files", "--path", str(tmp_path / "texts"), "--name", "toy"])
    return base_dir


def list_settings(name):
    """What a recipe reads from the environment, in its own file or in the one that it sources."""
    text = (REPO_DIR / "runs" / name).read_text(encoding="utf-8")
    own = set(re.findall(r"\b([A-Z_]+)=\$\{\1[:-]", text))
    other = re.search(r'^source .*/(\w+\.sh)"$', text, re.MULTILINE)[1]
    return own if other == "setup.sh" else own | list_settings(other)


def start_recipe(name, base_dir, **settings):
    toy = {key: value for key, value in TOY.items() if key in list_settings(name)}
    env = use_warm_python(os.environ | toy | {"NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"} | settings)
    return subprocess.Popen(["bash", str(REPO_DIR / "runs" / name)], env=env, text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_recipe(name, base_dir, **settings):
    with start_recipe(name, base_dir, **settings) as process:
        output, _ = process.communicate(timeout=300)
    if process.returncode:    # the errors first: of a long output, what a reader is shown is its ends
        lines = output.splitlines()
        pytest.fail("\n".join([f"{name} ended with {process.returncode}", *(line for line in lines if "error" in line),
                               *lines[-60:]]), pytrace=False)
    return output


def assert_complete(base_dir, tag, output, num_steps=12, chat_stages=("mid", "sft", "rl")):
    metrics = read_metrics(base_dir / "runs" / "base" / tag)
    assert [line["step"] for line in metrics if line["kind"] == "train"] == list(range(1, num_steps + 1))
    loss = json.loads(next((base_dir / "runs" / "base" / tag).glob("loss_*.json")).read_text())
    assert loss["val_bpb"] < 8 and str(base_dir / "report" / "report.html") in output
    page = (base_dir / "report" / "report.html").read_text()
    for stage in chat_stages:
        assert json.loads((base_dir / "runs" / stage / tag / "run.json").read_text())["status"] == "finished"
    assert "<svg" in page and "unigram" in page and "scripts.tok_train" in page and "Bytes per token" in page


def write_hub(folder, source):
    """The hub as a folder: the first training shard of a source, and its validation shard."""
    hub = dataset.HUB_SOURCES[source]
    documents = [f"The {i} {word}s are {word}." for i in range(200) for word in ("dog", "cat", "fox", "hen")]
    for name, texts in ((hub.train[0], documents), (hub.val, documents[:80])):
        (folder / hub.repo / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(folder / hub.repo / name, iter(texts))


def call(function, **settings):
    """A function of runs/recipe.sh alone."""
    return subprocess.run(["bash", "-c", f"source runs/recipe.sh; {function}"], cwd=REPO_DIR, text=True,
                          env={"PATH": os.environ["PATH"], "HOME": "/", **settings}, capture_output=True)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 7])
def test_tokens_of_a_laptop_recipe(depth):
    config = make_config(depth, vocab_size=8192, sequence_len=512)
    counted = call("count_tokens", DEPTH=str(depth), VOCAB_SIZE="8192", RATIO="0.5")
    gates = (config.n_layer + 1) // 2 * config.ve_gate_channels * config.n_kv_head    # too few to count
    assert 2 * int(counted.stdout) == pytest.approx(count_scaling_params(config), abs=gates + 1)


@pytest.mark.parametrize(("recipe", "settings", "message"), [
    ("quickstart.sh", {"BATCH_TOKENS": "4096"}, "error: BATCH_TOKENS=4096 is no setting of quickstart.sh; unset it"),
    ("quickstart.sh", {"EXPERTS": "num_experts=8"}, "error: EXPERTS=num_experts=8 is no setting of quickstart.sh"),
    ("run1000.sh", {"NUM_ITERATIONS": "9"}, "error: NUM_ITERATIONS=9 is no setting of run1000.sh; unset it, or set on"),
    ("runcpu.sh", {"EXTRA": "--dept"}, "base_train.py: error: argument --depth: expected one argument"),
    ("quickstart.sh", {"MID_TASKS": "Arithmetik"}, "error: scripts.mid_train: --tasks Arithmetik: there is no task "),
    ("quickstart.sh", {"CHAT_EXTRA": "--custom-json x.json"}, "error: scripts.mid_train: x.json can't be read, it is"),
    ("speedrun.sh", {"RL_TASKS": "MMLU"}, "error: scripts.chat_rl: the task MMLU has no reward"),
    ("moe.sh", {"SFT_EXTRA": "--epochs 2"}, "chat_sft.py: error: unrecognized arguments: --epochs 2"),
    ("speedrun.sh", {"RL_EXTRA": "--num-samples 1"}, "error: scripts.chat_rl: --num-samples 1 must be at least 2: an"),
    ("speedrun.sh", {"RL_EXTRA": "--dtype int8"}, "error: scripts.chat_rl: --dtype int8 is not one of auto, "),
    ("speedrun.sh", {"CHAT_EVAL_EXTRA": "-x 0"}, "error: scripts.chat_eval: --max-problems 0 leaves nothing"),
    ("moe.sh", {"EXTRA": "--knobs smeer=off"}, "error: scripts.base_train: --knobs smeer=off: there is no knob"),
    ("miniseries.sh", {"EXTRA": "--epochs 2"}, "error: unrecognized arguments: --epochs 2"),
    ("scaling_laws.sh", {"BUDGETS": "1e18,1f18"}, "base_train.py: error: argument --target-flops: invalid float value"),
    ("scaling_laws.sh", {"PARALLEL": "0"}, "error: scripts.sweep: --parallel 0 must be at least 1"),
    ("speedrun.sh", {"EVAL_EXTRA": "--dtype int8"}, "error: scripts.base_eval: --dtype int8 is not one of auto, "),
    ("marin.sh", {"EXTRA": "--epochs 2"}, "base_train.py: error: unrecognized arguments: --epochs 2")])
def test_wrong_settings_end_a_recipe_before_its_first_stage(recipe, settings, message, tmp_path):
    """Those that it doesn't read, and those that its last stage would refuse, started in whatever folder."""
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")} | settings
    if "NPROC" in list_settings(recipe):
        env |= {"NPROC": "1"}
    done = subprocess.run(["bash", os.path.relpath(REPO_DIR / "runs" / recipe, tmp_path)], cwd=tmp_path, text=True,
                          env=use_warm_python(env), capture_output=True)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and not done.stdout
    assert not (tmp_path / "base").exists()


def test_settings_are_known_and_others_warned_of(tmp_path):
    """What people export for other programs ends nothing, and each name is some recipe's."""
    commands = note_commands("quickstart.sh", tmp_path, "log", PARALLEL="4", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300")
    assert len(commands) == 8
    assert (tmp_path / "log.err").read_text() == \
        "warning: PARALLEL=4 does nothing here, it is no setting of quickstart.sh\n"
    recipes = re.search(r"^recipes=\((.*)\)$", (REPO_DIR / "runs" / "recipe.sh").read_text(), re.MULTILINE)[1].split()
    files = {path.name for path in (REPO_DIR / "runs").glob("*.sh")}
    assert set(recipes) == files - {"setup.sh", "recipe.sh", "test.sh"}


OWN_RECIPE = """
DEPTH=$1 NPROC=1
source "$CHECKOUT/runs/setup.sh"
begin_chain own text 0
stage text
python "$CHECKOUT/tool.py" $DEPTH
end_chain
"""


def test_a_copy_of_a_recipe_elsewhere_is_checked(tmp_path):
    """Its own file, not the one of this name in runs/."""
    text = (REPO_DIR / "runs" / "quickstart.sh").read_text().replace("--eval-tokens 262144", "--magic")
    (tmp_path / "quickstart.sh").write_text(text.replace('"$(dirname "${BASH_SOURCE[0]}")', f'"{REPO_DIR}/runs'))
    done = subprocess.run(["bash", "quickstart.sh"], cwd=tmp_path, text=True, capture_output=True,
                          env=use_warm_python(os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}))
    assert done.returncode == 2 and done.stderr == "base_loss.py: error: unrecognized arguments: --magic; see --help\n"


def test_a_recipe_of_ones_own(tmp_path):
    """Anywhere, with settings and commands of its own; each command runs once."""
    write_stub(tmp_path)
    (tmp_path / "tool.py").write_text("import sys\nprint('ran with', sys.argv[1])\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "own.sh").write_text(OWN_RECIPE)
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "CHECKOUT": str(tmp_path)}
    done = subprocess.run(["bash", "own.sh", "4"], cwd=tmp_path / "elsewhere", env=env, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.count("ran with 4\n") == 1 and not done.stderr


def test_commands_of_other_programs_are_not_checked():
    commands = (["-m", "http.server", "x"], ["tool.py", "x"], ["-c", ""], ["-m", "scripts.tok_train", "--name", ""])
    noted = "".join(f"{len(words)}\0" + "".join(f"{word}\0" for word in words) for words in commands)
    done = subprocess.run([sys.executable, "-m", "scripts.check_commands"], cwd=REPO_DIR, input=noted, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("tok_train.py: error: argument --name: the value is empty")


@pytest.mark.parametrize(("recipe", "data"), [
    ("quickstart.sh", "tinystories"), pytest.param("quickstart.sh", "climbmix", marks=pytest.mark.slow),
    pytest.param("runcpu.sh", "toy", marks=pytest.mark.slow)])
def test_laptop_recipes(recipe, data, base_dir, tmp_path):
    """Of the hub, a folder here, just what the run needs is fetched; the words to spell aren't what is on disk."""
    if data != "toy":
        write_hub(tmp_path / "hub", data)
    (base_dir / "words_alpha.txt").write_text("apple\n")
    chat_stages = ["mid"]
    settings = {"DATA": data, "NANOCHAT_MIRROR_DIR": str(tmp_path / "hub"), "NUM_PROBLEMS": "4",
                "MID_TASKS": "Arithmetic:20 SimpleSpelling:40 Identity:20:2",
                "EVAL_TASKS": "Arithmetic Identity", "CHAT_EXTRA": "--dtype float32 --device-type cpu",
                "RL_EXTRA": "--max-new-tokens 8 --num-samples 2"}
    if recipe == "runcpu.sh":
        settings |= {"SFT_TASKS": "Arithmetic:20 SimpleSpelling:20", "RL_TASKS": "SimpleSpelling:16"}
        chat_stages += ["sft", "rl"]
    output = run_recipe(recipe, base_dir, **settings)
    assert_complete(base_dir, "toy", output, chat_stages=chat_stages)
    num = 6 + len(chat_stages)
    assert f"toy: stage 3 of {num}, base | " in output and f"toy: all {num} stages done in " in output
    assert json.loads((base_dir / "runs" / "mid" / "toy" / "run.json").read_text())["args"]["words"] == data
    # not those of the list; the data's own are too few at this size
    assert output.count("words to spell: ") == 1 and " of Python's docstrings, kept in " in output
    if data != "toy":
        assert len(load_shards(data).train) == 1
        shutil.rmtree(tmp_path / "hub")
        output = run_recipe(recipe, base_dir, **settings)
        assert "is finished" in output and "stage 3 of 7, base | 100% of the chain done" in output


CHAT_EXTRA = "--dtype float32 --device-type cpu"
RL_EXTRA = f"--max-new-tokens 8 --num-samples 2 --eval-every -1 --sample-every -1 {CHAT_EXTRA}"
CHAT_SETTINGS = {"MID_EXTRA": f"--tasks Arithmetic:40 {CHAT_EXTRA}", "SFT_EXTRA": f"--tasks Identity:40 {CHAT_EXTRA}",
                 "RL_TASKS": "SimpleSpelling:16", "RL_EXTRA": RL_EXTRA,
                 "CHAT_EVAL_EXTRA": "--task-name Arithmetic -x 2 -m 4 --device-type cpu"}


def test_speedrun_is_killed_and_goes_on(base_dir, tmp_path):
    """The hub is a folder with as many shards as the plan asks for, and CORE's tasks. Killed on one rank, continued on
    two, every command of the recipe runs."""
    write_hub(tmp_path / "hub", "climbmix")
    shutil.make_archive(tmp_path / "hub" / "eval_bundle", "zip", write_bundle(tmp_path / "bundle"))
    settings = {"DATA": "climbmix", "NANOCHAT_MIRROR_DIR": str(tmp_path / "hub"), **CHAT_SETTINGS,
                "EXTRA": TOY["EXTRA"].replace("--num-iterations 12", "--num-iterations 60 --save-every 2"),
                "EVAL_EXTRA": "--max-per-task 2 --device-type cpu"}
    latest = base_dir / "runs" / "base" / "toy" / "latest"
    with start_recipe("speedrun.sh", base_dir, NPROC="1", **settings) as process:
        while not latest.exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
    step = int(latest.read_text().strip().removeprefix("step_"))
    assert 0 < step < 60
    output = run_recipe("speedrun.sh", base_dir, NPROC="2", **settings)
    assert f"continued at step {step}" in output
    assert_complete(base_dir, "toy", output, num_steps=60)
    core = json.loads(next((base_dir / "runs" / "base" / "toy").glob("core_*.json")).read_text())
    assert core["num_tasks"] == 3


@pytest.mark.slow
def test_run1000_without_core_and_rl(base_dir, tmp_path):
    """The chain goes on where CORE's tasks can't be had, and says so."""
    output = run_recipe("run1000.sh", base_dir, NPROC="1", NANOCHAT_MIRROR_DIR=str(tmp_path / "empty"),
                        **CHAT_SETTINGS | {"RL_TASKS": ""})
    assert "the CORE tasks can't be had" in output and "talk to it" in output
    assert not (base_dir / "runs" / "rl").exists()


def test_run1000_costs_what_it_says(capsys):
    """The header's hours and dollars are those of scripts.plan for the model that it trains."""
    recipe = (REPO_DIR / "runs" / "run1000.sh").read_text()
    depth, ratio = (re.search(rf"{name}:-(\d+)", recipe)[1] for name in ("DEPTH", "RATIO"))
    argv = ["--depth", depth, "12", "--target-param-data-ratio", ratio, "--nproc", "8", "--shards"]
    run = plan.main(argv)["runs"][0]
    assert run["fits"] and capsys.readouterr().out == f"{run['num_shards']}\n"    # not those of depth 12
    assert f"{run['hours']:.0f} hours for the base model of depth {depth}" in recipe
    assert f"${run['dollars']:.0f} for the base model" in recipe and run["dollars"] < 1000


@pytest.mark.parametrize(("experts", "is_moe"), [(None, True), ("", False)])
def test_moe_trains_experts_with_the_speedruns_commands(experts, is_moe, tmp_path):
    settings = {} if experts is None else {"EXPERTS": experts}
    commands = note_commands("moe.sh", tmp_path, "log", DEPTH="2", RECIPE_FLAGS="--seed 3", **settings)
    plain = note_commands("speedrun.sh", tmp_path, "plain", DEPTH="2", RATIO="20", NAME="moe", RECIPE_FLAGS="--seed 3")
    knobs = " --knobs num_experts=8 top_k=1 moe_every=2"
    assert [line.replace(knobs, "") for line in commands] == plain
    assert sum(knobs in line for line in commands) == is_moe


def test_moe_costs_what_it_says(capsys):
    """The header's figures are those of scripts.plan for the model that it trains."""
    recipe = (REPO_DIR / "runs" / "moe.sh").read_text()
    knobs = re.search(r"EXPERTS-(.+?)}", recipe)[1].split()
    run = plan.main(["--depth", "12", "--target-param-data-ratio", "20", "--price", "3", "--knobs", *knobs])["runs"][0]
    counts = count_params(GPTConfig(**run["config"]))
    active = counts["total"] - counts["inactive_experts"]
    assert f"{active / 1e6:.0f} M parameters" in recipe and f"of {counts['total'] / 1e6:.0f} M" in recipe
    assert f"{run['hours']:.1f} hours for the base model" in recipe and f"${run['dollars']:.1f} for" in recipe


def test_moe_at_toy_size(base_dir, tmp_path):
    """The chain: mid, SFT, RL and evaluation of a mixture of experts."""
    output = run_recipe("moe.sh", base_dir, NANOCHAT_MIRROR_DIR=str(tmp_path / "empty"), NPROC="1",
                        EXPERTS="num_experts=4 top_k=2", **CHAT_SETTINGS)
    assert "active parameters of" in output
    metrics = {stage: read_metrics(base_dir / "runs" / stage / "toy") for stage in ("base", "sft", "rl")}
    for stage in ("base", "sft"):
        assert all("moe_load_cv" in line for line in metrics[stage] if line["kind"] == "train")
    assert metrics["rl"] and "talk to it" in output


def write_stub(tmp_path):
    """runs/, without the set-up and what Python checks."""
    shutil.copytree(REPO_DIR / "runs", tmp_path / "runs", dirs_exist_ok=True)
    setup = (REPO_DIR / "runs" / "setup.sh").read_text()
    (tmp_path / "runs" / "setup.sh").write_text(setup.replace("|| set_up\n", "|| true\n"))
    recipe = (REPO_DIR / "runs" / "recipe.sh").read_text()
    (tmp_path / "runs" / "recipe.sh").write_text(recipe.replace("python -m scripts.check_commands", "cat > /dev/null"))


def note_commands(recipe, tmp_path, name, **settings):
    """The calls of Python that a recipe of runs/ makes. Each is answered with 7, as if that many shards were needed."""
    write_stub(tmp_path)
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/{name}"\necho 7\n')
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NANOCHAT_BASE_DIR": str(tmp_path)} | settings
    if "NPROC" in list_settings(recipe):
        env |= {"NPROC": "1"}
    with open(tmp_path / f"{name}.out", "w") as output, open(tmp_path / f"{name}.err", "w") as errors:
        subprocess.run(["bash", f"{tmp_path}/runs/{recipe}"], env=env, stdout=output, stderr=errors, check=True)
    return (tmp_path / name).read_text().splitlines()


CHAIN = """
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
begin_chain toy text 10 base 600 ${CORE:+core 100} chat 290
stage text
(( SECONDS += 20 ))
stage base
mkdir -p "$base_dir/runs/base/toy"
(( SECONDS += SPENT ))
[[ ! ${STOP:-} ]] || exit 3
stage chat
(( SECONDS += SPENT ))
end_chain
"""


def test_a_chain_says_how_far_it_is(tmp_path):
    """The pace is that of this machine once a tenth of the chain has been measured in one piece."""
    def show(**settings):
        (tmp_path / "runs" / "toy.sh").write_text(CHAIN)
        env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")} | settings
        return subprocess.run(["bash", f"{tmp_path}/runs/toy.sh"], env=env, text=True, capture_output=True).stdout
    write_stub(tmp_path)
    assert show(SPENT="1200").splitlines() == [
        "toy: stage 1 of 3, text | 0% of the chain done, about 15 min left | 0 min so far",
        "toy: stage 2 of 3, base | 1% of the chain done, about 15 min left | 0 min so far",
        "toy: stage 3 of 3, chat | 67% of the chain done, about 10 min left | 20 min so far",    # twice as slow
        "toy: all 3 stages done in 40 min"]
    assert "stage 1 of 3, text | 100% of the chain done, about 0 min left" in show(SPENT="0")    # all was there
    shutil.rmtree(tmp_path / "base")
    assert show(SPENT="600", STOP="yes").count("\n") == 2
    assert show(SPENT="1").splitlines()[1:3] == [    # the rest of a stage says nothing about the pace
        "toy: stage 2 of 3, base | 1% of the chain done, about 15 min left | 0 min so far",
        "toy: stage 3 of 3, chat | 67% of the chain done, about 5 min left | 0 min so far"]
    shutil.rmtree(tmp_path / "base" / "runs")    # of what was deleted nothing is done
    assert "stage 2 of 4, base | 1% of the chain done, about 17 min left" in show(SPENT="1", CORE="yes")
    shutil.rmtree(tmp_path / "base" / "chains")    # a chain of before these lines: that 600 s took 1 is no pace
    assert "stage 3 of 3, chat | 67% of the chain done, about 5 min left" in show(SPENT="1")


def test_base_folder_of_the_recipes_is_that_of_python(tmp_path):
    """A ~ that the shell has left, as in an .env file, is the home folder and no folder of this name."""
    write_stub(tmp_path)
    (tmp_path / "runs" / "toy.sh").write_text(CHAIN)
    env = os.environ | {"NANOCHAT_BASE_DIR": "~/my data", "HOME": str(tmp_path / "home"), "SPENT": "1"}
    subprocess.run(["bash", f"{tmp_path}/runs/toy.sh"], env=env, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "home" / "my data" / "chains" / "toy" / "text").is_file()
    assert not any(path.name.startswith("~") for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("recipe", ["speedrun.sh", "scaling_laws.sh"])
@pytest.mark.parametrize(("settings", "message"), [
    ({"NAME": "../data"}, "error: NAME=../data must be letters, digits and . _ -, at most 60 and no"),
    ({"NAME": "my model"}, "error: NAME=my model must be letters"), ({"NAME": ".."}, "error: NAME=.. must be letters"),
    ({"NAME": "a+b"}, "error: NAME=a+b must be letters"),
    ({"NAME": "my.old"}, "error: NAME=my.old must be letters"), ({"NAME": "x" * 100}, "error: NAME=xxx"),
    ({"NPROC": "2.5"}, "error: NPROC=2.5 must be a number of GPUs"), ({"NPROC": "0"}, "error: NPROC=0 must be a n"),
    ({"NPROC": "08"}, "error: NPROC=08 must be a number"), ({"NPROC": "x"}, "error: NPROC=x must be a number of GPUs")])
def test_a_name_or_number_that_would_lead_astray_is_refused_at_once(recipe, settings, message, tmp_path):
    """A NAME of another folder would have that one deleted, as the progress of a chain that begins anew."""
    write_stub(tmp_path)
    (tmp_path / "chains").mkdir()
    (tmp_path / "data").mkdir()
    env = os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)} | settings
    result = subprocess.run(["bash", f"{tmp_path}/runs/{recipe}"], env=env, text=True, capture_output=True)
    assert result.returncode == 2 and result.stderr.startswith(message) and (tmp_path / "data").is_dir()


def test_a_chain_that_nobody_has_timed(tmp_path):
    note_commands("speedrun.sh", tmp_path, "log")
    assert "speedrun: stage 4 of 12, loss | 0 min so far" in (tmp_path / "log.out").read_text().splitlines()


@pytest.mark.parametrize("recipe", ["quickstart.sh", "speedrun.sh", "scaling_laws.sh"])
def test_only_a_download_is_planned(recipe, tmp_path):
    toy = {key: value for key, value in TOY.items() if key in list_settings(recipe)}
    commands = {data: note_commands(recipe, tmp_path, data, **toy | {"DATA": data}) for data in ("climbmix", "own")}
    assert commands["climbmix"][0].startswith("-m scripts.plan ") and " --shards" in commands["climbmix"][0]
    assert commands["climbmix"][1] == "-m nanochat.dataset --source climbmix -n 7 -w 8"
    assert commands["own"][0].startswith("-m scripts.tok_train --data own ")
    assert len(commands["own"]) == len(commands["climbmix"]) - 2


def test_quickstart_learns_from_the_same_data_everywhere(tmp_path):
    """The default source is made here, and the words to spell are its own, whatever else is on the disk."""
    commands = note_commands("quickstart.sh", tmp_path, "log")
    assert commands[0] == "-m nanochat.dataset --source python-docs"
    spelling = [line for line in commands if "Spelling" in line]
    assert len(spelling) == 2 and all(" --words python-docs " in line for line in spelling)
    assert not any("tasks.words" in line or "scripts.plan" in line for line in commands)


SWEEP_EXTRA = "--aspect-ratio 32 --head-dim 16 --eval-tokens 2048 --dtype float32 --device-type cpu " \
              "--total-batch-size 512"


def test_miniseries(base_dir):
    output = run_recipe("miniseries.sh", base_dir, DEPTHS="1,2", RATIO="0.5", NPROC="1", EXTRA=SWEEP_EXTRA)
    for depth in (1, 2):
        info = json.loads((base_dir / "runs" / "base" / f"toy-depth{depth}" / "run.json").read_text())
        assert info["status"] == "finished" and info["plan"]["horizon"] == "ratio"
    assert str(base_dir / "sweeps" / "toy") in output


@pytest.mark.slow
def test_scaling_laws(base_dir):
    run_recipe("scaling_laws.sh", base_dir, DEPTHS="1,2,3", BUDGETS="3e9,1e9", NPROC="1", EXTRA=SWEEP_EXTRA)
    assert len(list((base_dir / "runs" / "base").glob("toy-*/run.json"))) == 6
    assert (base_dir / "sweeps" / "toy" / "laws" / "laws.html").is_file()


MARIN_STEPS = {"150m": 955, "270m": 1747, "460m": 2950}


@pytest.mark.slow
def test_marin(base_dir):
    """The smallest size for two steps; continued and ended; its ledger names the set that its bits per byte are of."""
    settings = {"SIZES": "150m", "NUM_ITERATIONS": "2", "NPROC": "1", "AUTHOR": "A. B.",
                "EXTRA": "--total-batch-size 128 --eval-tokens 128 --sample-every never --dtype float32 "
                         "--device-type cpu --compile off"}
    output = run_recipe("marin.sh", base_dir, **settings)
    assert "toy: stage 3 of 4, 150m | " in output and "toy: all 4 stages done in " in output
    ledger = json.loads((base_dir / "ledger" / "ledger.json").read_text())
    (entry,) = [run["run_info"] for run in ledger["runs"]]
    assert entry["run"] == "toy-150m" and entry["author"]["name"] == "A. B." and entry["total_tokens"] == 2 * 128
    assert 0 < entry["eval/toy/bpb"] < 10 and entry["num_devices"] == 1 and entry["training_hardware_flops"] > 0
    assert entry["description"].startswith("marin-150m, depth 6, width 512, context 64, vocabulary 320")
    assert "| FLOPs, seconds | toy-150m |" in (base_dir / "ledger" / "leaderboard.md").read_text().replace("\\", "")
    assert "is finished" in run_recipe("marin.sh", base_dir, **settings)


def test_marin_trains_each_size_for_its_steps(tmp_path):
    """2.5 tokens for each parameter of the published sizes, in batches of 192 rows."""
    commands = note_commands("marin.sh", tmp_path, "log", NAME="own", AUTHOR="A. B.")
    assert commands[0].startswith("-m scripts.plan --preset marin-460m --num-iterations 2950 ")
    assert commands[1] == "-m nanochat.dataset --source fineweb-edu -n 7 -w 8"
    trained = [base_train.parse_args(command.split()[2:])[0] for command in commands if "scripts.base_train" in command]
    assert {args.preset: args.num_iterations for args in trained} == {
        f"marin-{size}": steps for size, steps in MARIN_STEPS.items()}
    for args in trained:
        config = GPTConfig(vocab_size=128_256, **find_preset(args.preset).shape, **find_preset(args.preset).knobs)
        counts = count_params(config)
        assert args.num_iterations == int(2.5 * (counts["total"] - counts["scalars"])) // (192 * 2048)
        assert args.total_batch_size == 192 * 2048 and args.max_seq_len == 2048
    assert commands[-1] == "-m nanochat.report ledger own-150m own-270m own-460m --author A. B."


def test_marin_costs_what_it_says():
    header = (REPO_DIR / "runs" / "marin.sh").read_text().split("\nNPROC=")[0]
    for vocab_size, hours, dollars in (("32768", "1.8 hours", "$5.4"), ("128256", "2.5 with", "$7.5 with")):
        runs = [plan.main(["--preset", f"marin-{size}", "--num-iterations", str(steps), "--vocab-size",
                           vocab_size])["runs"][0] for size, steps in MARIN_STEPS.items()]
        assert all(run["fits"] for run in runs) and hours in header and dollars in header
        assert f"{sum(run['hours'] for run in runs):.1f}" == hours.split()[0]
        assert f"${sum(run['dollars'] for run in runs):.1f}" == dollars.split()[0]


def test_an_unknown_size_of_marin_is_refused():
    done = subprocess.run(["bash", str(REPO_DIR / "runs" / "marin.sh")], env=os.environ | {"SIZES": "150m 1b"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: SIZES=150m 1b must be of 150m, 270m and 460m\n"


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def write_folder(folder):
    """Made-up files in the layout that offline.sh reads; none of ARC-Easy."""
    shutil.copytree(folder.parent / "texts", folder / "pretrain")
    words = [first + second + "er" for first in ("ba", "do", "fi", "lu", "me") for second in ("lk", "nd", "pp", "st")]
    write_rows(folder / "sft" / "chat_train.jsonl.gz", [
        {"messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": word}],
         "source": "made up"} for word in words])
    sums = [{"question": f"What is {i} + {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}
            for i in range(10)]
    choices = [{"question": f"Which is {word}?", "subject": "words", "choices": ["a", word, "b", "c"], "answer": 1}
               for word in words]
    for name, rows in (("gsm8k_train", sums), ("gsm8k_test_dev", sums), ("mc_train_4choice", choices),
                       ("mmlu_validation", choices), ("mmlu_test", choices)):
        write_rows(folder / "tasks" / f"{name}.jsonl.gz", rows)
    with gzip.open(folder / "tasks" / "words_alpha.txt.gz", "wt") as file:
        file.write("\n".join(words))
    write_bundle(folder / "bundle")
    (folder / "core").mkdir()
    shutil.make_archive(folder / "core" / "eval_bundle_dev", "zip", folder / "bundle")


@pytest.mark.parametrize("missing", ["pretrain", "sft/chat_train.jsonl.gz"])
def test_offline_says_at_once_what_its_folder_lacks(missing, tmp_path):
    for part in {"pretrain", "sft/chat_train.jsonl.gz"} - {missing}:
        (tmp_path / part).mkdir(parents=True)
    env = os.environ | {"DATA_DIR": str(tmp_path), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    done = subprocess.run(["bash", "runs/offline.sh"], cwd=REPO_DIR, env=env, text=True, capture_output=True)
    assert done.returncode == 2 and f"DATA_DIR={tmp_path} has no {missing}; see the top of" in done.stderr


def write_empty_folder(folder, missing):
    """Names of the layout that offline.sh reads, but one; none of ARC-Easy."""
    for part in ("pretrain", "sft/chat_train.jsonl.gz", "tasks"):
        (folder / part).mkdir(parents=True)
    names = {"gsm8k_train": "gsm8k_train", "gsm8k_test": "gsm8k_test_dev", "mmlu_train": "mc_train_4choice",
             "mmlu_validation": "mmlu_validation", "mmlu_test": "mmlu_test"}
    for name in names.keys() - {missing}:
        (folder / "tasks" / f"{names[name]}.jsonl.gz").touch()


@pytest.mark.parametrize(("missing", "task"), [("gsm8k_train", "GSM8K"), ("gsm8k_test", "GSM8K"),
                                               ("mmlu_train", "MMLU"), ("mmlu_validation", "MMLU")])
def test_offline_says_at_once_what_sft_on_a_task_lacks(missing, task, tmp_path):
    write_empty_folder(tmp_path / "folder", missing)
    write_stub(tmp_path)
    env = os.environ | {"DATA_DIR": str(tmp_path / "folder"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    done = subprocess.run(["bash", f"{tmp_path}/runs/offline.sh"], env=env, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr == (
        f"error: DATA_DIR={tmp_path}/folder has no tasks/{missing}.jsonl.gz, which SFT on {task} needs; add it, or set "
        f"SFT_TASKS without {task}\n")
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(("missing", "settings"), [("mmlu_test", {}), ("arc_easy_train", {}),
                                                   ("gsm8k_train", {"SFT_TASKS": "MMLU:9 SpellingBee:9"})])
def test_what_an_evaluation_lacks_ends_no_offline_chain(missing, settings, tmp_path):
    write_empty_folder(tmp_path / "folder", missing)
    commands = note_commands("offline.sh", tmp_path, "log", DATA_DIR=str(tmp_path / "folder"), **settings)
    assert f"not there: {tmp_path}/folder/tasks/{missing}.jsonl.gz" in (tmp_path / "log.out").read_text().splitlines()
    assert any("scripts.chat_sft" in command for command in commands)


@pytest.mark.slow
def test_offline(base_dir, tmp_path):
    write_folder(tmp_path / "folder")
    settings = {"DATA_DIR": str(tmp_path / "folder"), "NAME": "own",
                "SFT_TASKS": "GSM8K MMLU SpellingBee:8 SimpleSpelling:8", "NUM_PROBLEMS": "3",
                "EVAL_TASKS": "GSM8K MMLU ARC-Easy SimpleSpelling", "CHAT_EVAL_EXTRA": "-m 4 --device-type cpu",
                "SFT_EXTRA": "--dtype float32 --device-type cpu", "EXTRA": TOY["EXTRA"]}
    output = run_recipe("offline.sh", base_dir, **settings)
    assert "not there: " in output and "ARC-Easy         was not evaluated" in output
    core = json.loads(next((base_dir / "runs" / "base" / "own").glob("core_*.json")).read_text())
    chat = json.loads(next((base_dir / "runs" / "sft" / "own" / "chat_eval").glob("*/results.json")).read_text())
    assert core["num_tasks"] == 3 and set(chat["tasks"]) == {"GSM8K", "MMLU", "SimpleSpelling"}
    page = (base_dir / "report" / "report.html").read_text()
    assert "CORE" in page and "MMLU" in page


@pytest.mark.parametrize("name", plan.RECIPES)
def test_recipes_of_the_speedrun_are_those_of_the_plan(name, tmp_path):
    """Flag by flag, and the header's figures are the plan's and the published ones."""
    recipe, (run,) = plan.RECIPES[name], plan.main(["--recipe", name, "--nproc", "8"])["runs"]
    commands = note_commands("speedrun.sh", tmp_path, name, RECIPE=name, NAME="own")
    command = next(line for line in commands if line.startswith("-m scripts.base_train "))
    args, _ = base_train.parse_args(command.split()[2:])
    expected = {key: value for key, value in vars(recipe).items() if hasattr(args, key)}
    assert {key: getattr(args, key) for key in expected} == expected and len(expected) == 5
    assert any(line.startswith("-m scripts.tok_train ") and f"--vocab-size {recipe.vocab_size} " in line
               for line in commands)
    assert f"--vocab-size {recipe.vocab_size} --shards" in commands[0]
    header = (REPO_DIR / "runs" / "speedrun.sh").read_text().split("\nRECIPE=")[0]
    row = next(line for line in header.splitlines() if line.startswith(f"#     {name} "))
    assert f"{run['hours']:.1f} hours, ${run['dollars']:.0f} " in row and f"CORE {recipe.core:.4f}" in row
    assert f"{recipe.minutes / 60:.2f} hours" in row or f"{recipe.minutes:.1f} minutes" in row


def test_a_setting_overrides_the_recipe(tmp_path):
    commands = note_commands("speedrun.sh", tmp_path, "log", RECIPE="d22", DEPTH="2", RATIO="20", RECIPE_FLAGS="")
    command = next(line for line in commands if line.startswith("-m scripts.base_train "))
    assert "--depth 2 " in command and "--target-param-data-ratio 20" in command and "warmdown" not in command


def test_an_unknown_recipe_is_refused():
    done = subprocess.run(["bash", str(REPO_DIR / "runs" / "speedrun.sh")], env=os.environ | {"RECIPE": "d23"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: RECIPE=d23 must be d24 or d22\n"
