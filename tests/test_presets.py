"""Models of the family: their published counts, decoding, training; what a person types."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dev.bench_memory import join_phases, trace_step
from nanochat.checkpoint_manager import find_checkpoint
from nanochat.common import UserError
from nanochat.config import GPTConfig, count_params, estimate_flops
from nanochat.engine import Engine
from nanochat.memory import Machine, predict_memory
from nanochat.presets import KNOBS, PRESETS, choose_knobs, find_preset, find_rule, format_knob, parse_knobs
from nanochat.rl import keep_matrices
from nanochat.run import read_info, read_metrics
from nanochat.scaling import make_plan
from nanochat.train import train_step
from scripts import base_train, chat_sft, plan
from tests.helpers import (
    BYTE_TOKENIZER,
    CONFIG,
    assert_same_runs,
    make_base,
    make_batch,
    make_model,
    make_preset_argv,
    make_preset_config,
    make_prompt,
    small_presets,
)


# marin's speedrun table: parameters without the lambdas, and forward FLOPs a token by its own formula
@pytest.mark.parametrize(("name", "num_params", "forward_flops"), [
    ("marin-150m", 150_208_512, 194_396_160), ("marin-270m", 274_857_984, 422_326_272),
    ("marin-460m", 463_994_880, 800_325_632)])
def test_sizes_of_marin(name, num_params, forward_flops):
    preset = find_preset(name)
    config = GPTConfig(vocab_size=128_256, window_pattern="L", **preset.shape, **preset.knobs)
    counts = count_params(config)
    assert counts["total"] - counts["scalars"] == num_params
    # Its formula counts the whole square of scores and the softmax; ours the products alone, three times for training
    softmax = 3 * config.sequence_len * config.n_head * config.n_layer
    assert estimate_flops(config) == 3 * (forward_flops - softmax)


def test_size_of_arcadium():
    preset = find_preset("arcadium-200m")
    config = GPTConfig(vocab_size=50_257, **preset.shape, **preset.knobs)
    counts = count_params(config)
    assert counts["wte"] + counts["lm_head"] == 2 * 50_304 * 512 and counts["scalars"] == 0
    assert counts["transformer_matrices"] == 16 * (4 * 512 * 4096 + 3 * 512 * 2048)


@pytest.mark.parametrize("name", PRESETS)
def test_decoding_equals_the_whole_forward_pass(name):
    model = make_model(make_preset_config(name), torch.float64)
    prompt = make_prompt(20)
    expected = prompt + list(model.generate(prompt, 30, temperature=0))
    rows, _ = Engine(model, BYTE_TOKENIZER).generate_batch(prompt, 2, max_tokens=30, temperature=0)
    assert rows == [expected[:len(rows[0])]] * 2 and len(rows[0]) > 30    # an answer ends with its end token


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_trains_every_parameter_of_a_preset(name):
    model = make_model(make_preset_config(name), torch.float32, as_initialised=True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    lrs = {flag: lr for flag, lr in PRESETS[name].flags.items() if flag.endswith("_lr")}
    optimizer = model.setup_optimizer(**lrs, rule=find_rule(PRESETS[name].rule))
    losses = [train_step(model, optimizer, make_batch(0), 4).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    assert [name for name, param in model.named_parameters() if torch.equal(param, before[name])] == []


def test_knobs_as_typed():
    assert parse_knobs(["smear=off", "backout_layer=none", "resid_init=1,1.1", "x0_init=none", "softcap=0",
                        "mlp_act=swiglu", "attn_dim=96"]) == {
        "smear": False, "backout_layer": None, "resid_init": (1.0, 1.1), "x0_init": None, "softcap": 0.0,
        "mlp_act": "swiglu", "attn_dim": 96}
    assert "rope_base" in KNOBS and "n_embd" not in KNOBS
    defaults = {name: getattr(GPTConfig, name) for name in KNOBS}
    assert parse_knobs([f"{name}={format_knob(value)}" for name, value in defaults.items()]) == defaults


@pytest.mark.parametrize("preset", [[], ["--preset", "nanochat-jan26"]])
def test_knobs_of_several_flags_add_up(preset):
    for _ in range(2):    # the default isn't what is extended
        args, _ = base_train.parse_args([*preset, "--knobs", "smear=off", "--depth", "4", "--knobs", "softcap=15"])
        assert args.knobs == ["smear=off", "softcap=15"]


@pytest.mark.parametrize(("words", "message"), [
    (["smaer=off"], "there is no knob 'smaer'; choose from window_fraction, attn_dim"),
    (["smear=maybe"], "smear must be on or off"), (["resid_init=1"], "resid_init must be two numbers"),
    (["softcap=high"], "softcap must be a number$"), (["softcap=none"], "softcap must be a number$"),
    (["attn_dim=0.5"], "attn_dim must be a whole number$"), (["backout_layer=x"], "must be a whole number, or none"),
    (["smear=on", "smear=off"], "names smear twice")])
def test_wrong_knobs_are_named(words, message):
    with pytest.raises(UserError, match=message):
        parse_knobs(words)


@pytest.mark.parametrize(("knobs", "message"), [
    ({"mlp_act": "gelu"}, "mlp_act=gelu is not one of relu2, swiglu"),
    ({"key_offset": 1.5}, "key_offset=1.5 must be at most 1"), ({"rope_fraction": 0.0}, "above 0 and at most 1"),
    ({"backout_layer": 4}, "is no layer of 4"),
    ({"linear_init": "zero"}, "not one of uniform, normal"),
    ({"softcap": -5.0}, "a model's softcap can't be -5; it must be a finite number of at least 0"),
    ({"softcap": math.nan}, "softcap can't be nan"), ({"qk_scale": math.inf}, "qk_scale can't be inf"),
    ({"mlp_dim": -4}, "mlp_dim can't be -4"), ({"ve_gate_channels": -3}, "ve_gate_channels can't be -3"),
    ({"rope_base": 0.0}, "rope_base can't be 0; .* of at least 1"),
    ({"resid_init": (1.0, math.nan)}, "resid_init can't be nan; it must be a finite number$")])
def test_impossible_knobs_are_refused(knobs, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **knobs)


def test_unknown_preset_names_those_that_exist():
    with pytest.raises(UserError, match="--preset gpt5 is not one of nanochat-july26, nanochat-jan26, marin-150m"):
        find_preset("gpt5")


@pytest.mark.parametrize("name", ["nanochat-jan26", "marin-150m", "arcadium-200m", "plain"])
def test_memory_of_a_preset_is_predicted(name):
    """As tests/test_memory.py does for the model of today: the model's own step on fake tensors."""
    small = {"attn_dim": 512, "mlp_dim": 640} if name.startswith("arcadium") else {}
    config = replace(make_preset_config(name), sequence_len=512, vocab_size=8192, n_embd=256, n_kv_head=4, **small)
    rule = find_rule(PRESETS[name].rule)
    machine = Machine("bfloat16", "sdpa", False, "cpu", has_muon=rule.has_muon)
    predicted = join_phases(predict_memory(config, 512, 8, machine))
    for phase, num_bytes in trace_step(config, 512, 8, machine, 1, rule).items():
        assert predicted[phase] == pytest.approx(num_bytes, rel=0.02), phase


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(("name", "num_steps", "num_tokens", "model_flops"), [
    ("marin-150m", 955, 375_521_280, 2.190e17), ("marin-270m", 1747, 686_948_352, 8.703e17),
    ("marin-460m", 2950, 1_159_987_200, 2.785e18), ("arcadium-200m", 50_000, 50_000 * 32 * 1024, None)])
def test_published_horizons(name, num_steps, num_tokens, model_flops, capsys):
    run = plan.main(["--preset", name])["runs"][0]["plan"]
    assert (run["num_iterations"], run["total_tokens"], run["batch_lr_scale"]) == (num_steps, num_tokens, 1.0)
    assert run["weight_decay"] == (0.01 if name == "marin-460m" else 0.0)
    if model_flops:
        assert run["total_flops"] == pytest.approx(model_flops, rel=2e-3)    # but for the softmax
    assert name in capsys.readouterr().out


def test_presets_are_planned_side_by_side(capsys):
    runs = plan.main(["--preset", "marin-150m", "nanochat-jan26", "plain", "--depth", "12", "24",
                      "--max-seq-len", "1024"])["runs"]
    assert [(run["config"]["n_layer"], run["config"]["vocab_size"]) for run in runs] == \
        [(6, 128_256), (12, 32_768), (24, 32_768), (12, 32_768), (24, 32_768)]
    assert {run["config"]["sequence_len"] for run in runs} == {1024}
    jan26 = runs[2]["plan"]
    assert jan26["batch_tokens"] == 2**19 and jan26["tokens_per_param"] == pytest.approx(10.5, rel=1e-3)
    assert jan26["weight_decay"] == pytest.approx(0.2 * (12 / 24) ** 2)
    with pytest.raises(UserError, match="--preset marin-150m sets 6 layers of 512 channels in 4 heads; leave --asp"):
        plan.main(["--preset", "marin-150m", "--aspect-ratio", "32"])
    with pytest.raises(UserError, match="leave out --recipe"):
        plan.main(["--preset", "marin-150m", "--recipe", "d24"])


def set_schedules(argv, num_steps):
    """(learning rate's factor, Muon's momentum, its weight decay) at each of so many steps."""
    args, _ = base_train.parse_args(argv)
    model = make_model(as_initialised=True)
    rule = find_rule(find_preset(args.preset).rule)
    optimizer = model.setup_optimizer(weight_decay=1.0, rule=rule)
    muon = next((group for group in optimizer.param_groups if group["kind"] == "muon"), None)
    figures = []
    for step in range(num_steps):
        lr_frac = base_train.set_schedules(optimizer, step, num_steps, args, rule)
        assert all(group["lr"] == group["initial_lr"] * lr_frac for group in optimizer.param_groups)
        figures.append((lr_frac, *(muon and (muon["momentum"], muon["weight_decay"]) or ())))
    return figures


def test_schedules_of_january():
    for step, figures in enumerate(set_schedules(["--preset", "nanochat-jan26"], 1000)):
        lr = 1.0 if step <= 600 else (1000 - step) / 400
        momentum = 0.85 + 0.1 * min(step / 300, 1)
        assert figures == (pytest.approx(lr), pytest.approx(momentum), pytest.approx(1 - step / 1000)), step


def test_schedules_of_marin():
    for step, figures in enumerate(set_schedules(["--preset", "marin-150m"], 100)):
        lr = 1.0 if step <= 50 else 0.1 + 0.9 * (100 - step) / 50
        assert figures == (pytest.approx(lr), 0.95, 1.0), step


def test_schedule_of_arcadium():
    lrs = [lr for lr, in set_schedules(["--preset", "arcadium-200m"], 50_000)]
    assert lrs[0] == 1 / 2000 and lrs[1999] == lrs[2000] == 1.0
    for step in (2000, 14_000, 26_000, 38_000, 49_999):
        assert lrs[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 2000) / 48_000))), step


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        make_base(base_dir, patch)
        yield base_dir


@pytest.fixture
def small(base_dir):
    with small_presets():
        yield


SFT = ["-i", "base", "--tasks", "Arithmetic:90", "Identity:50", "--num-iterations", "2", "--total-batch-size", "256",
       "--eval-every", "never", "--sample-every", "never", "--device-type", "cpu", "--compile", "off"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("marin-270m", "marin-460m")])
def test_training_resumes_and_sft_takes_the_rule_over(small, name):
    argv = make_preset_argv(name, f"whole-{name}")
    whole = base_train.main([*argv, "--sample-every", "4"])
    for more in (["--stop-at", "2"], []):
        resumed = base_train.main([*make_preset_argv(name, f"resumed-{name}"), "--sample-every", "4", *more])
    assert_same_runs(resumed["run_dir"], whole["run_dir"])
    info = read_info(Path(whole["run_dir"]))
    assert info["args"]["preset"] == name
    assert {flag: info["args"][flag] for flag in PRESETS[name].flags if flag.endswith("_lr")} == \
        {flag: value for flag, value in PRESETS[name].flags.items() if flag.endswith("_lr")}
    sft = chat_sft.main([*SFT, "-g", f"whole-{name}"])
    assert sft["step"] == 2
    meta = find_checkpoint("sft", f"whole-{name}").meta
    assert meta["identity"]["rule"] == PRESETS[name].rule
    assert meta["model_config"] == find_checkpoint("base", f"whole-{name}").meta["model_config"]


def edit_meta(run_dir, change):
    path = Path(run_dir) / (Path(run_dir) / "latest").read_text(encoding="utf-8").strip() / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    change(meta)
    del meta["checksum"]    # as in the first checkpoints
    path.write_text(json.dumps(meta), encoding="utf-8")


def test_a_run_from_before_the_rule_had_a_name_goes_on_by_july26(small):
    """The same command, without a preset: its batch, rates and decay stay, and so does every bit."""
    whole = base_train.main(make_preset_argv("nanochat-july26", "july"))
    before = base_train.main([*make_preset_argv("nanochat-july26", "before"), "--stop-at", "2"])

    def make_older(meta):
        del meta["identity"]["rule"], meta["identity"]["plan"]["lr_batch_tokens"]
        del meta["model_config"]["key_offset"]
    edit_meta(before["run_dir"], make_older)
    after = base_train.main(make_preset_argv("nanochat-july26", "before")[2:])
    assert_same_runs(after["run_dir"], whole["run_dir"])
    sft = chat_sft.main([*SFT, "-g", "before"])
    assert sft["step"] == 2 and find_checkpoint("sft", "before").meta["identity"]["rule"] == "july26"


def test_a_run_by_novembers_rule_goes_on_by_it(small, monkeypatch):
    """Whole queries and keys to Muon; the same command, bit for bit."""
    argv = make_preset_argv("plain", "november")[2:]
    monkeypatch.setattr(base_train, "choose_rule", lambda preset, saved: "nov26")
    whole = base_train.main(argv)
    argv[1] = "goes-on"
    base_train.main([*argv, "--stop-at", "2"])
    monkeypatch.undo()
    assert_same_runs(base_train.main(argv)["run_dir"], whole["run_dir"])
    argv[1] = "december"
    losses = [[line["loss"] for line in read_metrics(Path(run_dir)) if line["kind"] == "train"]
              for run_dir in (base_train.main(argv)["run_dir"], whole["run_dir"])]
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]


def test_a_run_from_before_the_key_offset_goes_on_without(small, capsys):
    argv = make_preset_argv("plain", "without")[2:]    # the default model
    whole = base_train.main([*argv, "--knobs", "key_offset=0"])
    argv[1] = "from-before"
    before = base_train.main([*argv, "--knobs", "key_offset=0", "--stop-at", "2"])
    edit_meta(before["run_dir"], lambda meta: meta["model_config"].pop("key_offset"))
    with pytest.raises(UserError, match="key_offset: saved 0.*, now 0.5"):
        base_train.main([*argv, "--knobs", "key_offset=0.5"])
    for more in (["--stop-at", "3"], [], []):    # the first one saves it by its name, the last is finished
        capsys.readouterr()
        after = base_train.main([*argv, *more])
        assert "key_offset=0.0: as this run was begun\n" in capsys.readouterr().out
    assert_same_runs(after["run_dir"], whole["run_dir"])


def test_an_arcadium_from_before_its_embeddings_were_fp32_goes_on(small, capsys, monkeypatch):
    argv, preset = make_preset_argv("arcadium-200m", "bf16-embeds"), PRESETS["arcadium-200m"]
    monkeypatch.setitem(PRESETS, "arcadium-200m", replace(preset, knobs=preset.knobs | {"fp32_embeds": False}))
    before = base_train.main([*argv, "--stop-at", "2"])
    monkeypatch.undo()
    edit_meta(before["run_dir"], lambda meta: meta["model_config"].pop("fp32_embeds"))
    for more in (["--stop-at", "3"], []):
        base_train.main([*argv, *more])
        assert "fp32_embeds=off: as this run was begun\n" in capsys.readouterr().out


def test_a_run_that_began_with_backout_of_the_last_layer_keeps_it():
    saved = {"model_config": {"key_offset": 0.5, "backout_layer": None}}
    assert choose_knobs(None, [], saved) == {"backout_layer": None}
    assert choose_knobs(None, ["backout_layer=0"], saved) == {"backout_layer": 0}
    assert choose_knobs(None, [], {"model_config": {"key_offset": 0.5, "backout_layer": -1}}) == {}
    assert choose_knobs(None, [], None) == {}


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_have_no_key_offset(name):
    assert PRESETS[name].knobs["key_offset"] == 0


def test_a_batch_that_was_chosen_stays_on_other_ranks(small, monkeypatch):
    """On 8 ranks a step has a row of each at least; continued on one, it has as many rows as before."""
    argv = [word for word in make_preset_argv("plain", "chosen") if word not in ("--total-batch-size", "512")]
    plans = []
    monkeypatch.setattr(base_train, "make_plan", lambda *args, **choices: plans.append(make_plan(
        *args, **choices | {"step_multiple": 1024 if not plans else 64})) or plans[-1])
    for more in (["--stop-at", "2"], []):
        base_train.main([*argv, *more])
    assert plans[0].batch_tokens % 1024 == 0 and plans[1] == plans[0]


def test_rules_of_checkpoints(small):
    """One without a rule is an older one; another preset's run, or an unknown rule, is refused."""
    argv = make_preset_argv("nanochat-july26", "old")
    run_dir = base_train.main([*argv, "--stop-at", "2"])["run_dir"]
    edit_meta(run_dir, lambda meta: meta["identity"].pop("rule"))
    assert base_train.main([*argv, "--stop-at", "3"])["step"] == 3
    with pytest.raises(UserError, match="rule: saved july26, now jan26"):
        base_train.main(make_preset_argv("nanochat-jan26", "old"))
    edit_meta(run_dir, lambda meta: meta["identity"].update(rule="may27"))
    with pytest.raises(UserError, match="trained by a rule that this nanochat doesn't know .may27."):
        chat_sft.main([*SFT, "-g", "old"])


def test_arcadiums_embeddings_learn_in_bf16():
    """Adam moves each by .001 at first, and bf16 has no number as near to one of .8."""
    model, batch = make_model(make_preset_config("arcadium-200m"), torch.bfloat16, as_initialised=True), make_batch(1)
    table = model.transformer.wte.weight
    before = table[batch.inputs.unique()].detach().clone()
    flags = find_preset("arcadium-200m").flags
    train_step(model, model.setup_optimizer(rule=find_rule("adam"), embedding_lr=flags["embedding_lr"]), batch, 4)
    assert (table[batch.inputs.unique()] != before).float().mean() > 0.9


def test_matrices_that_adam_trained_are_what_rl_trains():
    model = make_model(make_preset_config("arcadium-200m"), as_initialised=True)
    optimizer = keep_matrices(model.setup_optimizer(rule=find_rule("adam")))
    assert {id(param) for group in optimizer.param_groups for param in group["params"]} == \
        {id(param) for param in model.transformer.h.parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# What a person types


@pytest.mark.parametrize(("argv", "message"), [
    (["marin-150m", "--matrix-lr", "0.04"],
     "--preset marin-150m sets --matrix-lr 0.02; leave --matrix-lr 0.04 out, or the preset"),
    (["marin-150m", "--embedding-lr", "0.3"], "sets --embedding-lr 0.0064; leave --embedding-lr 0.3 out"),
    (["marin-150m", "--depth", "6"], "sets 6 layers of 512 channels in 4 heads; leave --depth 6 out"),
    (["marin-150m", "--knobs", "smear=on"], "sets the knob smear to off; leave smear=on out"),
    (["nanochat-july26", "--knobs", "smear=off"], "sets the knob smear to on; leave smear=off out"),
    (["plain", "--window-pattern", "SSSL"], "--preset plain sets --window-pattern L; leave --window-pattern SSSL out"),
    (["nanochat-july26", "--warmdown-ratio", "0.5"], "sets --warmdown-ratio 0.65"),
    (["nanochat"], "--preset nanochat is not one of nanochat-july26, nanochat-jan26, marin-150m")])
def test_contradictions_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        base_train.parse_args(["--preset", *argv])


def test_what_a_preset_leaves_to_a_person():
    def parse(*argv):
        args, _ = base_train.parse_args(["--preset", *argv])
        return args.num_iterations, args.target_param_data_ratio, args.total_batch_size, args.max_seq_len
    assert parse("marin-150m") == (None, 2.5, 192 * 2048, 2048)
    assert parse("marin-150m", "--num-iterations", "5", "--max-seq-len", "256") == (5, 12, 192 * 2048, 256)
    assert parse("marin-150m", "--target-param-data-ratio", "12") == (None, 12, 192 * 2048, 2048)
    assert parse("arcadium-200m", "--target-param-data-ratio", "20") == (None, 20, 32 * 1024, 1024)
    assert parse("nanochat-jan26", "--knobs", "smear=off", "--matrix-lr", "0.02") == (None, 10.5, 2**19, 2048)
    args, _ = base_train.parse_args(["--preset", "plain", "--depth", "4", "--matrix-lr", "0.04"])    # ours to tune
    assert (args.depth, args.matrix_lr, args.window_pattern) == (4, 0.04, "L")
    assert base_train.parse_args(["--preset", "plain", "--window-pattern", "l"])[0].window_pattern == "L"
    tags = [base_train.parse_args(["--preset", *argv])[0].model_tag
            for argv in (["marin-150m"], ["plain", "--depth", "4"], ["marin-150m", "--model-tag", "mine"])]
    assert tags == ["marin-150m", "plain-d4", "mine"]
