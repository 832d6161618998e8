"""Ablations: one for real at toy size, killed in the middle and gone on with; the table's arithmetic on made-up runs;
refusals."""

import json
import math
import sys
import time

import pytest

from dev import ablate
from dev.ablation_table import write_table
from dev.results import load_results
from nanochat.checkpoint_manager import get_run_dir
from nanochat.common import Ranks, UserError, write_json
from nanochat.presets import PLAIN
from nanochat.run import RunLog, read_info
from scripts import base_train
from tests.helpers import make_base, start_script
from tests.warm import make_warm_python, use_warm_python

TOY = ["--data", "toy", "--aspect-ratio", "16", "--head-dim", "32", "--max-seq-len", "32", "--total-batch-size", "128",
       "--eval-tokens", "512", "--dtype", "float32", "--device-type", "cpu", "--sample-every", "-1", "--compile", "off"]
DROP = ["--name", "toy", "--mode", "drop", "--features", "smear,relu2,plain", "--depth", "2"]


@pytest.fixture(scope="module", autouse=True)
def base_dir(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("ablate") / "base"
    base_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        make_base(base_dir, patch, num_docs=60)
        yield base_dir


@pytest.fixture(scope="module", autouse=True)
def fast_python():
    """The runs are forks of the warm process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(make_warm_python()))
        yield


def read_status(tag):
    return read_info(get_run_dir("base", tag)).get("status")


def test_a_killed_ablation_goes_on(base_dir, capfd):
    """Each model has the batch of the full one and its FLOPs; what was finished before the kill stays as it was."""
    argv = [*DROP, "--seeds", "2", "--", *TOY, "--num-iterations", "6"]
    process = start_script("dev.ablate", *argv, **use_warm_python({}))
    deadline = time.monotonic() + 100
    while read_status("toy-full-seed1") != "finished" or not read_status("toy-no-smear-seed1"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = (get_run_dir("base", "toy-full-seed1") / "run.json").read_bytes()

    partial = ablate.main(["--name", "toy", "--only-table"])
    assert partial["means"]["full"]["bpb"] > 0 and "plain" not in partial["means"]
    assert partial["rows"][2]["delta_bpb"] is None and "Runs that aren't finished, or" in "".join(partial["notes"])

    results = ablate.main(argv)
    assert (get_run_dir("base", "toy-full-seed1") / "run.json").read_bytes() == before
    assert list(results["models"]) == ["full", "no-smear", "no-relu2", "no-plain", "half"]
    for model, about in results["models"].items():
        for seed in (1, 2):
            info = read_info(get_run_dir("base", f"toy-{model}-seed{seed}"))
            assert info["status"] == "finished" and info["args"]["seed"] == seed
            assert info["plan"]["batch_tokens"] == 128 and info["params"]["total"] == about["parameters"]
            assert info["plan"]["total_flops"] == about["flops"]
            assert info["plan"]["flops_per_token"] == about["flops_per_token"]
    assert results["models"]["full"]["steps"] == 6 and results["models"]["half"]["steps"] == 3
    assert read_info(get_run_dir("base", "toy-no-smear-seed1"))["model_config"]["smear"] is False
    swiglu = read_info(get_run_dir("base", "toy-no-relu2-seed1"))["model_config"]
    assert (swiglu["mlp_act"], swiglu["mlp_dim"]) == ("swiglu", 64)
    plain = read_info(get_run_dir("base", "toy-no-plain-seed1"))["model_config"]
    assert {key: plain[key] for key in PLAIN} == PLAIN and plain["window_pattern"] == "L"

    smear = results["rows"][0]
    bpb = {model: [read_info(get_run_dir("base", f"toy-{model}-seed{seed}"))["results"]["val_bpb"] for seed in (1, 2)]
           for model in ("full", "no-smear")}
    assert smear["deltas"] == [without - full for full, without in zip(bpb["full"], bpb["no-smear"], strict=True)]
    assert "All models start at a loss of ln V, within 0.05 nats." in results["notes"]
    folder = base_dir / "sweeps" / "toy"
    assert json.loads((folder / "ablation.json").read_text()) == json.loads(json.dumps(results))
    table = (folder / "ablation.md").read_text()
    assert table.startswith("| model | bpb | delta bpb |") and "| no-smear | " in table
    assert "no-relu2" in capfd.readouterr().out

    # nothing is left to do; a seed more is added, another horizon refused
    assert ablate.main(argv)["means"] == results["means"]
    path = get_run_dir("base", "toy-half-seed2") / "run.json"    # whose command was given other rows to evaluate
    text = path.read_text()
    path.write_text(text.replace('"val_rule": "val split', '"val_rule": "another split'))
    notes = ablate.main(argv)["notes"]
    assert "The losses aren't comparable: full, seed 1 and half, seed 2 differ in data or validation rows." in notes
    path.write_text(text)
    with pytest.raises(UserError, match="the sweep toy has the grid mode=drop -- .*; go back to that grid"):
        ablate.main([*DROP, "--seeds", "2", "--", *TOY, "--num-iterations", "7"])
    assert len(load_results(folder).runs) == 10


def test_add_goes_from_the_plainest_model_to_the_full_one():
    """The runs that add makes, without training them."""
    args = ablate.parse_args(["--name", "a", "--mode", "add", "--features", "x0,softcap,qk_scale", "--depth", "2",
                              "--seeds", "1", "--tokens", "2560", "--", *TOY, "--knobs", "smear=off", "softcap=30"])
    ablation, points, _ = ablate.plan_ablation(args)
    knobs = {point.tag: point.flags[point.flags.index("--knobs") + 1:-1] for point in points}
    assert knobs == {
        "a-none-seed1": ["smear=off", "softcap=0", "x0_init=none", "qk_scale=1.0"],
        "a-1-x0-seed1": ["smear=off", "softcap=0", "qk_scale=1.0"],
        "a-2-softcap-seed1": ["smear=off", "softcap=30", "qk_scale=1.0"],
        "a-full-seed1": ["smear=off", "softcap=30"], "a-half-seed1": ["smear=off", "softcap=30"]}
    assert ablation["comparisons"] == [("x0", "1-x0", "none"), ("softcap", "2-softcap", "1-x0"),
                                       ("qk_scale", "full", "2-softcap")]
    assert ablation["models"]["full"]["steps"] == 20    # 2,560 tokens
    assert ablation["models"]["none"]["flops"] == pytest.approx(ablation["target_flops"], rel=0.03)


def test_features_are_off_without_them(base_dir):
    for name, off in (("key_offset", "key_offset=0"), ("smear", "smear=off")):
        args = ablate.parse_args(["--name", "a", "--depth", "2", "--mode", "drop", "--features", name, "--", *TOY])
        assert off in ablate.plan_ablation(args)[0]["models"][f"no-{name}"]["flags"]


def test_variants_are_the_full_model_with_other_flags():
    """The runs that variants make, without training them; their FLOPs are the full model's."""
    args = ablate.parse_args(["--name", "a", "--depth", "2", "--seeds", "1", "--tokens", "2560", "--features", "x0",
                              "--mode", "drop", "--variant", "e4: --knobs num_experts=4 smear=on -d float64",
                              "slow: --matrix-lr=.01 --total-batch 64 --window-pattern LS", "--", *TOY, "--knobs",
                              "smear=off"])
    ablation, points, _ = ablate.plan_ablation(args)
    recipes = {point.tag: base_train.parse_args(point.flags)[0] for point in points}
    assert list(recipes) == ["a-full-seed1", "a-no-x0-seed1", "a-half-seed1", "a-e4-seed1", "a-slow-seed1"]
    experts, slow, full = recipes["a-e4-seed1"], recipes["a-slow-seed1"], recipes["a-full-seed1"]
    assert experts.knobs == ["smear=on", "num_experts=4"] and experts.dtype == "float64" and full.dtype == "float32"
    assert (slow.matrix_lr, slow.total_batch_size, slow.knobs) == (0.01, 64, ["smear=off"])
    assert slow.window_pattern == "LS" and full.window_pattern == "SSSL"
    assert (full.matrix_lr, full.total_batch_size, full.knobs) == (0.02, 128, ["smear=off"])
    assert ablation["comparisons"] == [("x0", "full", "no-x0"), ("e4", "e4", "full"), ("slow", "slow", "full")]
    assert ablation["features"]["slow"] == "--matrix-lr=.01 --total-batch 64 --window-pattern LS"
    assert ablation["models"]["e4"]["flops"] == pytest.approx(ablation["target_flops"], rel=0.03)
    assert ablation["models"]["slow"]["steps"] == 2 * ablation["models"]["full"]["steps"]
    args = ablate.parse_args(["--name", "a", "--depth", "2", "--variant", "slow: --matrix-lr .01", "--", *TOY])
    assert [point.tag.split("-")[1] for point in ablate.plan_ablation(args)[1]] == ["full", "half", "slow"] * 3


@pytest.mark.parametrize("dtype", [["-d", "float64"], ["-dfloat64"], ["-d=float64"]])
def test_flags_as_a_person_spells_them(dtype):
    """base_train's one short flag, first and behind the knobs; knobs in two parts; an MLP of one's own."""
    for words in ([*dtype, "--knobs", "smear=off"], ["--knob", "smear=off", *dtype]):
        args = ablate.parse_args(["--name", "a", "--mode", "drop", "--features", "relu2", "--depth", "2",
                                  "--seeds", "1", "--tokens", "2560", "--", *words, "--data", "toy",
                                  "--max-seq-len", "32", "--total-batch-size", "128", "--knobs", "mlp_dim=384"])
        _, points, _ = ablate.plan_ablation(args)
        recipes = [base_train.parse_args(point.flags)[0] for point in points]
        assert [recipe.dtype for recipe in recipes] == ["float64"] * 3
        assert [recipe.knobs for recipe in recipes] == [
            ["smear=off", "mlp_dim=384"], ["smear=off", "mlp_dim=256", "mlp_act=swiglu"], ["smear=off", "mlp_dim=384"]]


# ---------------------------------------------------------------------------------------------------------------------
# The table

LN_V = math.log(512)
MODELS = {"full": (2000.0, 1e6), "no-smear": (1600.0, 1e6), "no-x0": (2000.0, 1e6), "half": (2000.0, 5e5)}


def write_ablation(base_dir, name, bpb, step_ms=None, start=LN_V):
    """Made-up runs; bpb: {model: its value by seed}, None: not finished."""
    folder = base_dir / "sweeps" / name
    folder.mkdir(parents=True)
    models = {model: {"parameters": 1000, "vocab_size": 512, "flops_per_token": per_token, "flops": flops, "steps": 300}
              for model, (per_token, flops) in MODELS.items()}
    write_json(folder / "ablation.json", {
        "name": name, "mode": "drop", "seeds": max(map(len, bpb.values())), "target_flops": 1e6, "models": models,
        "comparisons": [["smear", "full", "no-smear"], ["x0", "full", "no-x0"]],
        "features": {"smear": "a smear", "x0": "the embedding"}})
    for model, values in bpb.items():
        for seed, value in enumerate(values, 1):
            with RunLog(get_run_dir("base", f"{name}-{model}-seed{seed}"), {}, Ranks()) as log:
                for step in (1, 2, 3):
                    log.write("train", step, loss=start / step,
                              step_ms=(step_ms or {}).get(model, 100) + 9e5 * (step == 1))    # it compiles
                log.update(results={"val_bpb": value})
                log.close("stopped" if value is None else "finished")
    return folder


def test_seconds_are_the_median_seeds(base_dir):
    """One seed that ran beside other work moves neither the column nor the multiplier."""
    folder = write_ablation(base_dir, "busy", {"full": [1.0] * 3, "no-smear": [1.0] * 3, "no-x0": [1.0] * 3,
                                               "half": [1.02] * 3})
    path = get_run_dir("base", "busy-full-seed2") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step_ms": 100', '"step_ms": 900'))
    results = write_table(folder)
    assert results["means"]["full"]["seconds"] == pytest.approx(30)
    assert results["rows"][0]["seconds_multiplier"] == pytest.approx(1)


def test_arithmetic(base_dir):
    """The slope is .02 per doubling: what loses .02 takes twice the FLOPs."""
    folder = write_ablation(base_dir, "sums", {
        "full": [1.00, 1.10, 1.20], "no-smear": [1.01, 1.12, 1.23], "no-x0": [0.999, 1.101, 1.20],
        "half": [1.02, 1.12, 1.22]}, step_ms={"no-smear": 125})
    results = write_table(folder)
    smear, x0 = results["rows"]
    assert results["slope"] == pytest.approx(0.02 / math.log(2))
    assert smear["deltas"] == pytest.approx([0.01, 0.02, 0.03]) and smear["delta_bpb"] == pytest.approx(0.02)
    assert smear["std_error"] == pytest.approx(0.01 / math.sqrt(3)) and smear["is_clear"]
    assert smear["compute_multiplier"] == pytest.approx(2.0)
    assert smear["range"] == pytest.approx([2 ** (1 - 1 / math.sqrt(3)), 2 ** (1 + 1 / math.sqrt(3))])
    # as many FLOPs take 30 seconds with it, 37.5 without
    assert smear["seconds_multiplier"] == pytest.approx(2 * 37.5 / 30)
    assert x0["delta_bpb"] == pytest.approx(0, abs=1e-9) and not x0["is_clear"]
    assert x0["compute_multiplier"] == x0["seconds_multiplier"] == pytest.approx(1.0)
    pooled = math.sqrt((0.01**2 + 0.001**2) / 2 / 3)
    assert results["pooled_std_error"] == pytest.approx(pooled)
    table = (folder / "ablation.md").read_text()
    assert r"| no-smear | 1.1200 | +0.0200 ± 0.0058 \* | 2.000 (1.340 to 2.984) | 2.500 | 1,000 | 1600 | 300 |" in table
    assert "| 30 | x0: the embedding |" in table


def test_add_shows_each_model_with_what_it_adds(base_dir):
    """In place of the model without it, as drop does."""
    folder = write_ablation(base_dir, "order", {"full": [1.0], "no-smear": [1.1], "no-x0": [1.2], "half": [1.1]})
    path = folder / "ablation.json"
    comparisons = [["x0", "no-smear", "none"], ["smear", "full", "no-smear"]]
    text = json.loads(path.read_text().replace("no-x0", "none"))
    (get_run_dir("base", "order-no-x0-seed1")).rename(get_run_dir("base", "order-none-seed1"))
    write_json(path, text | {"mode": "add", "comparisons": comparisons})
    assert [row["deltas"] for row in write_table(folder)["rows"]] == [[pytest.approx(0.1)]] * 2
    lines = (folder / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| none", "| no-smear", "| full", "| half"]
    assert "+0.1000" in lines[3] and lines[3].endswith("x0: the embedding |")


def test_a_variant_is_compared_with_the_full_model(base_dir):
    """Its delta is above 0 where it is better than the full model, beside a feature's, which is what its loss costs."""
    folder = write_ablation(base_dir, "beside", {"full": [1.0], "no-smear": [1.1], "no-x0": [0.98], "half": [1.02]},
                            step_ms={"no-x0": 200})
    path = folder / "ablation.json"
    text = json.loads(path.read_text().replace('"no-x0"', '"slow"'))
    (get_run_dir("base", "beside-no-x0-seed1")).rename(get_run_dir("base", "beside-slow-seed1"))
    write_json(path, text | {"comparisons": [["smear", "full", "no-smear"], ["slow", "slow", "full"]],
                             "features": {"smear": "a smear", "slow": "--matrix-lr .01"}})
    smear, slow = write_table(folder)["rows"]
    assert (smear["delta_bpb"], slow["delta_bpb"]) == (pytest.approx(0.1), pytest.approx(0.02))
    assert slow["compute_multiplier"] == pytest.approx(2) and slow["seconds_multiplier"] == pytest.approx(1)
    lines = (folder / "ablation.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| full", "| no-smear", "| slow", "| half"]
    assert lines[4].endswith("slow: --matrix-lr .01 |")


def test_rows_are_kept_and_names_mean_one_thing(base_dir):
    """A command that names other features or variants adds to the table; a variant's runs are never another's."""
    def plan(*words):
        words = ["--name", "a", "--depth", "2", "--mode", "drop", "--tokens", "2560", *words, "--", *TOY]
        return ablate.plan_ablation(ablate.parse_args(words))[0]
    first, second = plan("--features", "smear"), plan("--variant", "a: --matrix-lr 1")
    both = ablate.add_saved(second, first)
    assert both["comparisons"] == [("smear", "full", "no-smear"), ("a", "a", "full")]
    assert list(both["models"]) == ["full", "no-smear", "half", "a"] and set(both["features"]) == {"smear", "a"}
    assert ablate.add_saved(first, both)["comparisons"] == [("a", "a", "full"), ("smear", "full", "no-smear")]
    assert ablate.add_saved(first, both | {"target_flops": 1.0}) == first    # no run of those can be there
    with pytest.raises(UserError, match="--variant a was '--matrix-lr 1' in this ablation; choose another name"):
        ablate.add_saved(plan("--variant", "a: --matrix-lr 1 --dtype bfloat16"), both)


def test_a_small_spread_by_chance_is_no_proof(base_dir):
    """Two seeds that agree by chance, among features that vary by more."""
    folder = write_ablation(base_dir, "chance", {"full": [1.0, 1.1], "no-smear": [1.001, 1.101],
                                                 "no-x0": [1.01, 1.09], "half": [1.02, 1.12]})
    smear, _ = write_table(folder)["rows"]
    assert smear["std_error"] == pytest.approx(0, abs=1e-9) and not smear["is_clear"]


def test_caveats(base_dir):
    folder = write_ablation(base_dir, "odd", {"full": [1.0, 1.1], "no-smear": [1.1, None], "no-x0": [None, None],
                                              "half": [0.9, 1.0]}, start=9.0)
    results = write_table(folder)
    smear, x0 = results["rows"]
    assert smear["seeds"] == [1] and smear["std_error"] is None and not smear["is_clear"]
    assert smear["compute_multiplier"] is None and x0["delta_bpb"] is None
    notes = "\n".join(results["notes"])
    for part in ("full, seed 1 starts at a loss of 9.000, not at ln V = 6.238", "missing: of no-smear, no-x0.",
                 "Twice the FLOPs made the full model no better", "With one seed"):
        assert part in notes
    assert "within" not in notes


def test_a_slope_of_noise_and_runs_without_a_log(base_dir):
    """A factor of e^2000 is none; a seed whose log is gone isn't read; nothing is said of FLOPs without a pair."""
    folder = write_ablation(base_dir, "noise", {"full": [1.0, 1.1], "no-smear": [1.2, 1.3], "no-x0": [0.8, 0.9],
                                                "half": [1.00007, 1.10007]})
    smear, x0 = write_table(folder)["rows"]
    assert smear["compute_multiplier"] == pytest.approx(1000) and x0["compute_multiplier"] == pytest.approx(0.001)
    (get_run_dir("base", "noise-full-seed1") / "metrics.jsonl").unlink()
    results = write_table(folder)
    assert results["rows"][0]["seeds"] == [2] and "lost their log, are missing: of full." in "".join(results["notes"])
    (get_run_dir("base", "noise-full-seed2") / "metrics.jsonl").write_text('{"kind": "tr')
    results = write_table(folder)
    assert results["slope"] is None and not any("no better" in note for note in results["notes"])


@pytest.mark.parametrize(("argv", "message"), [
    (["--features", "smaer"], "there is no feature 'smaer'; choose from smear, key_offset, backout,"),
    (["--features", "smear,x0,smear"], "--features names smear twice"),
    (["--features", "smear", "--seeds", "0"], "--seeds 0 must be at least 1"),
    ([], r"--features is missing; --mode drop or add, --features \(or --variant\) and --depth say"),
    (["--mode", "add", "--variant", "a: --matrix-lr 1"], "--features is missing"),
    (["--features", "smear", "--variant", "matrix-lr .01"], "'matrix-lr .01' must be a name"),
    (["--features", "smear", "--variant", "slow: .01"], "'slow: .01' must be a name"),
    (["--features", "smear", "--variant", "a|b: --matrix-lr 1"], "'a|b: --matrix-lr 1' must be a name"),
    (["--features", "smear", "--variant", "a: --nonsense 3"], "a: scripts.base_train doesn't take --nonsense 3"),
    (["--features", "smear", "--variant", "a: --help"], "--variant a: scripts.base_train doesn't take --help"),
    (["--features", "smear", "--variant", "a: --preset plain"], "--variant a: --preset plain has all parts"),
    (["--features", "smear", "--variant", "x0: --matrix-lr 1"], "--variant x0: a model or feature of this name is"),
    (["--features", "smear", "--variant", "a: --save-every 7 --keep-last 3"], "a changes nothing of this model"),
    (["--features", "smear", "--variant", "a: --eval-tokens 9"], "--variant a: --eval-tokens is the same for all"),
    (["--features", "smear", "--nproc", "3", "--variant", "a: --total-batch-size 32"], "32"),
    (["--features", "smear", "--variant", "a: --total-batch-size 33"], "--variant a: --total-batch-size 33 must be"),
    (["--features", "smear", "--variant", "a: --tokenizer nobody"], "--variant a: .*nobody"),
    (["--features", "smear", "--variant", "a: --matrix-lr '1"], "No closing quotation"),
    (["--features", "smear", "--variant", "a: --matrix-lr 1", "a: --matrix-lr 2"], "--variant names a twice"),
    (["--features", "smear", "--variant", "full: --matrix-lr 1"], "--variant full: a model or feature of this name"),
    (["--features", "smear", "--variant", "a: --matrix-lr .02"], "a changes nothing of this model"),
    (["--features", "smear", "--variant", "a: --target-flops 1e9"], "--variant a: --target-flops is the same for all"),
    (["--features", "smear", "--variant", "a: --seed 3"], "--seed is set by the ablation itself"),
    (["--features", "smear", "--variant", "a: --knobs smaer=1"], "there is no knob 'smaer'"),
    (["--features", "smear,plain", "--mode", "add"], "plain and smear have parts in common"),
    (["--features", "windows"], "windows changes nothing of this model"),    # of 32 tokens
    (["--features", "smear", "--tokens", "1e4", "--", *TOY, "--num-iter", "3"],
     "--num-iterations and --tokens are two horizons"),
    (["--features", "smear", "--tokens", "1e4", "--target-flops", "1e9"], "--target-flops and --tokens are two hor"),
    (["--features", "smear", "--", *TOY, "--seed", "3"], "--seed is set by the ablation itself"),
    (["--features", "smear", "--", *TOY, "--model-ta", "x"], "--model-tag is set by the ablation itself"),
    (["--features", "smear", "--", *TOY, "--eval-every", "never"], "--eval-every never would leave nothing"),
    (["--features", "smear", "--", *TOY, "--knobs", "smear=off"], "smear changes nothing of this model, or it is off"),
    (["--features", "smear", "--target-flops", "0"], "--target-flops 0 must be above 0"),
    (["--features", "smear", "--tokens", "-3"], "--tokens -3 must be a positive number"),
    (["--features", "smear", "--", *TOY, "--preset", "plain"], "--preset plain has all parts of its model; leave it"),
    (["--features", "smear", "--", *TOY, "--resume-from", "3"], "--resume-from-step is set by the ablation itself"),
    (["--features", "smear", "--parallel", "0"], "--parallel 0 must be at least 1"),
])
def test_refusals(argv, message):
    toy = [] if "--" in argv else ["--", *TOY]
    with pytest.raises(UserError, match=message):
        ablate.main(["--name", "refused", "--mode", "drop", "--depth", "2", *argv, *toy])


def test_refusals_of_names(base_dir):
    for argv, message in ((["--name", "a/b", "--only-table"], "must be a plain folder name"),
                          (["--name", "nothing", "--only-table"], "there is no ablation nothing"),
                          (["--name", "a", "--depth", "2", "--features", "smear"], "--mode is missing")):
        with pytest.raises(UserError, match=message):
            ablate.main(argv)
