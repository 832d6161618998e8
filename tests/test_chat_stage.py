"""Midtraining and SFT by their scripts: the chain, its settings, resume in every way, ranks, and what they refuse."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanochat import chat_stage
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.presets import RULES, Preset
from nanochat.run import read_metrics
from nanochat.scaling import get_chat_momentum
from scripts import base_train, chat_cli, chat_rl, chat_sft, mid_train
from tests.data_helpers import write_lines
from tests.helpers import (
    assert_same_runs,
    assert_stopped_after,
    hang_up_in_step,
    make_base,
    make_model,
    out_of_memory_at,
    read_state,
    run_on_ranks,
    send_signal_at,
    start_script,
)

T = 128
MACHINE = ("--device-type", "cpu", "--compile", "off", "--eval-tokens", "1024", "--eval-every", "4")
TASKS = ("--tasks", "Arithmetic:90", "Identity:50")


BASE = ("--preset", "nanochat-july26", "--data", "toy", "--depth", "2", "--aspect-ratio", "16", "--head-dim", "16",
        "--max-seq-len", str(T), "--num-iterations", "3", "--total-batch-size", "1024", "--sample-every", "-1",
        "--dtype", "float32", *MACHINE)
setup_optimizer = GPT.setup_optimizer


def train_base(tag, *more):
    return base_train.main(["--model-tag", tag, *BASE, *more])


def train_mid(*more):
    return mid_train.main(["-g", "toy", *TASKS, "--sample-every", "-1", *MACHINE, *more])


def train_sft(*more):
    return chat_sft.main(["-g", "toy", *TASKS, "--sample-every", "-1", *MACHINE, *more])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A base folder with a pretrained model."""
    base_dir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        make_base(base_dir, patch)
        train_base("toy")
        yield base_dir


@pytest.fixture(scope="module")
def mid(base_dir):
    return train_mid()


@pytest.fixture(scope="module")
def sft(mid):
    return train_sft()


def read_info(run_dir):
    return json.loads((Path(run_dir) / "run.json").read_text())


def read_meta(run_dir):
    return json.loads((Path(run_dir) / (Path(run_dir) / "latest").read_text().strip() / "meta.json").read_text())


def read_lines(run_dir, kind="train"):
    return [line for line in read_metrics(Path(run_dir)) if line["kind"] == kind]


# ---------------------------------------------------------------------------------------------------------------------
# The chain


def test_chain(base_dir, mid, sft, capsys):
    """Each stage takes up weights, moments, batch, rates and dtype of the one before; the last model answers."""
    for run, stage, source in ((mid, "mid", "base"), (sft, "sft", "mid")):
        info, meta, lines = read_info(run["run_dir"]), read_meta(run["run_dir"]), read_lines(run["run_dir"])
        assert run["run_dir"] == str(base_dir / "runs" / stage / "toy") and info["status"] == "finished"
        assert info["source"]["stage"] == source and info["plan"]["horizon"] == "epochs"
        assert info["plan"]["batch_tokens"] == 1024 and info["plan"]["weight_decay"] == 0
        assert meta["identity"]["matrix_lr"] == 0.02 and meta["choices"]["dtype"] == "float32"
        assert meta["stage"] == stage and run["num_conversations"] == 140
        assert len(lines) == run["step"] == -(-run["num_rows"] // 8) > 5
        assert [line["step"] for line in read_lines(run["run_dir"], "eval")][:2] == [0, 4]
        assert read_lines(run["run_dir"], "data")[0]["num_rows"] == run["num_rows"]
        changed = {decision["what"]: decision["value"] for decision in info["decisions"]}
        assert "Muon's weight decay" in changed if stage == "mid" else "tokens of a step" not in changed
        assert "held-out conversations of Arithmetic, Identity" in run["val_rule"]
    assert read_meta(mid["run_dir"])["optimizer_steps"] == 3 + mid["step"]
    mid_bpb, sft_bpb = ([line["val_bpb"] for line in read_lines(run["run_dir"], "eval")] for run in (mid, sft))
    assert mid_bpb[-1] < mid_bpb[0] - 0.1 and sft_bpb[0] == pytest.approx(mid_bpb[-1], rel=1e-4)
    lr_fracs = [[line["lr_frac"] for line in read_lines(run["run_dir"])] for run in (mid, sft)]
    assert lr_fracs[0][:3] == [1, 1, 1] and 0 < lr_fracs[0][-1] < 1
    assert lr_fracs[1][0] == 0.02 and lr_fracs[1][-1] == pytest.approx(0.02 / sft["step"])
    assert [read_info(run["run_dir"])["plan"]["batch_lr_scale"] for run in (mid, sft)] == [512**-0.5, 1]
    # midtraining fills rows and cuts what doesn't fit; SFT keeps conversations whole, and pads
    assert mid["num_shortened"] > sft["num_shortened"] and mid["pad_frac"] < sft["pad_frac"]
    section = json.loads((base_dir / "report" / "chat_sft.json").read_text())
    assert section["metrics"]["chat bpb"] == sft["val_bpb"] and section["stage"] == "sft"
    capsys.readouterr()
    answer = chat_cli.main(["-g", "toy", "-p", "Hi", "--max-tokens", "4", "--device-type", "cpu", "-d", "float32"])
    assert answer["source"] == "sft" and answer["step"] == sft["step"]


@pytest.mark.parametrize("flags", [("--matrix-lr", "0.03"), ("--preset", "nanochat-jan26")])
def test_each_stage_hands_its_plan_and_rule_to_the_optimizer(base_dir, monkeypatch, flags):
    """Rates for the batch, weight decay and the kind of update; by our own rule small models have a batch of theirs."""
    handed, tag, preset = [], f"handed{flags[0]}", "--preset" in flags
    monkeypatch.setattr(GPT, "setup_optimizer",
                        lambda self, **figures: handed.append(figures) or setup_optimizer(self, **figures))
    argv = [word for word in BASE if word not in ("--preset", "nanochat-july26")]
    runs = [base_train.main(["--model-tag", tag, *argv, *flags]),
            *(main(["-g", tag, *TASKS, "--sample-every", "-1", *MACHINE, "--stop-at", "1"])
              for main in (mid_train.main, chat_sft.main))]
    infos = [read_info(run["run_dir"]) for run in runs]
    rule = RULES["jan26" if preset else Preset.rule]
    assert [info["plan"]["lr_batch_tokens"] for info in infos] == [infos[0]["plan"]["lr_batch_tokens"]] * 3
    assert (infos[0]["plan"]["lr_batch_tokens"] == 2**19) == preset and infos[0]["plan"]["weight_decay"] > 0
    for_batch = (1024 / infos[0]["plan"]["lr_batch_tokens"])**.5
    for figures, info, batch_lr_scale in zip(handed, infos, (for_batch, for_batch, 1), strict=True):
        assert figures["rule"] == rule and figures["matrix_lr"] == (0.02 if preset else 0.03)
        assert figures["batch_lr_scale"] == pytest.approx(batch_lr_scale)
        assert figures["weight_decay"] == (infos[0]["plan"]["weight_decay"] if info is infos[0] else 0)
        assert figures["scalar_lr"] == pytest.approx(0.5 * (infos[0]["plan"]["lr_batch_tokens"] / 2**19)**.5)
    chat_rl.main(["-i", "mid", "-g", tag, "-a", "Arithmetic:2", "--num-iterations", "1", "--examples-per-step", "1",
                  "--num-samples", "2", "--max-new-tokens", "2", "--eval-every", "never", "--device-type", "cpu"])
    figures = handed[-1]
    assert len(handed) == 4 and figures["rule"] == rule and figures["matrix_lr"] == (0.02 if preset else 0.03)
    assert figures["batch_lr_scale"] == pytest.approx(for_batch) and figures["weight_decay"] == 0


def test_learning_rates_and_momentum_of_a_chat_stage():
    optimizer = make_model(as_initialised=True).setup_optimizer()
    for step, lr_frac in ((0, 0.8), (50, 0.8), (150, 0.4)):
        assert chat_stage.set_schedules(optimizer, step, 200, init_lr_frac=0.8, warmdown_ratio=0.5) == lr_frac
        assert all(group["lr"] == group["initial_lr"] * lr_frac for group in optimizer.param_groups)
        assert {group["momentum"] for group in optimizer.param_groups if group["kind"] == "muon"} == {
            get_chat_momentum(step)}


def test_what_is_printed(mid, capsys):
    train_mid("--out-tag", "printed", "--stop-at", "1", "--sample-every", "1")
    out = capsys.readouterr().out
    for text in ("packing 140 conversations ...", "conversations: 140 an epoch, in", "begun with base toy, step 3",
                 "Muon's weight decay: 0.0", "learning rates: x1 of those",
                 "dtype: torch.float32 (as the base run)", "horizon by epochs", "sample | '<|user_start|>Who are you?"):
        assert text in out, text
    assert train_mid() == mid
    assert "is finished; --resume none or another" in capsys.readouterr().out


def test_sft_straight_from_the_base(base_dir):
    result = train_sft("-i", "base", "--out-tag", "straight", "--num-epochs", "2")
    lr_fracs = [line["lr_frac"] for line in read_lines(result["run_dir"])]
    assert result["step"] == -(-2 * result["num_rows"] // 8)
    assert read_info(result["run_dir"])["source"]["stage"] == "base"
    assert lr_fracs[0] == lr_fracs[len(lr_fracs) // 2] == 0.8 and lr_fracs[-1] < 0.2
    first, last = read_lines(result["run_dir"], "eval")[0], read_lines(result["run_dir"], "eval")[-1]
    assert last["val_bpb"] < first["val_bpb"] - 0.1


def test_weights_and_moments_are_those_of_the_stage_before(base_dir, mid):
    """Saved before the first step."""
    result = train_sft("--out-tag", "begun", "--save-every-minutes", "0", "--keep-last", "-1", "--stop-at", "1")
    folders = Path(result["run_dir"]) / "step_000000", base_dir / "runs" / "mid" / "toy" / f"step_{mid['step']:06d}"
    for name in ("model.safetensors", "optim_0.safetensors"):
        ours, theirs = (load_file(folder / name) for folder in folders)
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in theirs)


def test_loss_does_not_depend_on_how_a_step_is_cut(mid):
    """Rows with few targets beside rows with many, in float64; without the optimizer's part, which has its own test."""
    runs = [train_sft("--out-tag", f"cut{rows}", "--dtype", "float64", "--device-batch-size", str(rows), "--stop-at",
                      "4") for rows in (8, 2, 1)]
    losses = [[line["loss"] for line in read_lines(run["run_dir"])] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9) and losses[2] == pytest.approx(losses[0], abs=1e-9)


def test_other_dtype_than_the_stage_before(mid, sft):
    """Weights and moments are cast."""
    result = train_sft("--dtype", "bfloat16", "--out-tag", "bf16")
    assert result["val_bpb"] == pytest.approx(sft["val_bpb"], rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and going on


@pytest.mark.parametrize("train", [train_mid, train_sft])
@pytest.mark.parametrize("stop_at", [3, 4])
def test_stopping_and_resuming_changes_nothing(mid, sft, train, stop_at):
    expected = mid if train is train_mid else sft
    assert train("--out-tag", f"parts{stop_at}", "--stop-at", str(stop_at))["step"] == stop_at
    result = train("--out-tag", f"parts{stop_at}")
    assert result["step"] == expected["step"] and result["val_bpb"] == expected["val_bpb"]
    assert_same_runs(result["run_dir"], expected["run_dir"])


@pytest.mark.parametrize("train", [train_mid, train_sft])
def test_out_of_memory_twice(mid, train):
    """In step 0, which has one micro-batch of 8 rows, then in step 2: saved there, and gone on with."""
    calm = ("--eval-every", "-1")  # an evaluation in batches of 8 rows would differ from one of 4 in its last bits
    expected = train("--out-tag", "fours", "--device-batch-size", "4", *calm)
    with out_of_memory_at(0, 1 + 2 + 2), pytest.raises(UserError, match="at step 2 with --device-batch-size 4: "):
        train("--out-tag", "short", *calm)
    assert_same_runs(train("--out-tag", "short", *calm)["run_dir"], expected["run_dir"])


def test_terminal_that_closes_saves_and_stops(base_dir, sft):
    with hang_up_in_step(chat_stage, 3):
        train_sft("--out-tag", "hung_up")
    assert_stopped_after(base_dir / "runs" / "sft" / "hung_up", 3)
    assert_same_runs(train_sft("--out-tag", "hung_up")["run_dir"], sft["run_dir"])


def test_kill_changes_nothing(base_dir, mid):
    argv = ["-g", "toy", *TASKS, "--num-epochs", "8", "--sample-every", "-1", *MACHINE, "--eval-every", "20",
            "--save-every", "10"]
    process = start_script("scripts.mid_train", *argv, "--out-tag", "killed")
    exit_code, stderr = send_signal_at(process, 27, signal.SIGKILL)
    assert exit_code == -9 and "Traceback" not in stderr, stderr
    killed_at = read_state(base_dir / "runs" / "mid" / "killed")["lines"][-1]["step"]
    expected = mid_train.main([*argv, "--out-tag", "calm"])
    assert 20 < killed_at < expected["step"]
    assert_same_runs(mid_train.main([*argv, "--out-tag", "killed"])["run_dir"], expected["run_dir"])


def run_stage(stage, *more):
    """What a rank does."""
    {"base": train_base, "mid": train_mid, "sft": train_sft}[stage](*more)


def test_two_ranks_make_the_same_runs(base_dir, mid, tmp_path):
    """Pretraining and midtraining on two ranks, then SFT on one and on two: the same losses, the same end."""
    exact = ("--dtype", "float64")
    run_on_ranks([(2, run_stage, ("base", "pair", *exact)), (2, run_stage, ("mid", "-g", "pair")),
                  (2, run_stage, ("sft", "-g", "pair")), (1, run_stage, ("sft", "-g", "pair", "--out-tag", "alone"))],
                 tmp_path)
    train_base("single", *exact)
    train_mid("-g", "single")
    train_sft("-g", "single")
    for stage, tags in (("mid", ("pair", "single")), ("sft", ("pair", "alone", "single"))):
        dirs = [base_dir / "runs" / stage / tag for tag in tags]
        losses = [[line["loss"] for line in read_lines(run_dir)] for run_dir in dirs]
        counts = [[line["num_targets"] for line in read_lines(run_dir)] for run_dir in dirs]
        assert all(other == pytest.approx(losses[-1], abs=1e-8) for other in losses)
        assert all(other == counts[-1] for other in counts) and len(losses[0]) > 5
        *pairs, alone = ([line["val_bpb"] for line in read_lines(run_dir, "eval")] for run_dir in dirs)
        assert all(pair == pytest.approx(alone, abs=1e-8) for pair in pairs) and len(alone) > 2
        assert len({json.dumps(read_meta(run_dir)["epoch"]) for run_dir in dirs}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Odd conversations


def write_conversations(path, conversations):
    roles = ("user", "assistant")
    path.write_text("".join(json.dumps({"messages": [{"role": roles[i % 2], "content": text}
                                                     for i, text in enumerate(texts)]}) + "\n"
                            for texts in conversations))
    return ("--mixture", "none", "--custom-json", str(path))


@pytest.mark.parametrize("train", [mid_train, chat_sft])
def test_odd_conversations(mid, tmp_path, train, capsys):
    """Longer than the context, without an answer, with an answer beyond the context: counted, finite, and it ends. The
    last one is held out, though there is nothing to score."""
    argv = write_conversations(tmp_path / "odd.jsonl", [
        ["Hello?"], ["Tell me.", "Well, " * 300], ["Hi", "Hello"], ["Why? " * 200, "Because."]] * 5)
    result = train.main(["-g", "toy", *argv, "--out-tag", "odd", "--sample-every", "-1", *MACHINE])
    assert all(line["loss"] > 0 for line in read_lines(result["run_dir"])) and "val_bpb" not in result
    assert result["num_conversations"] == 19
    assert result["num_skipped_conversations"] == 9
    assert result["num_shortened"] >= 5
    out = capsys.readouterr().out
    assert f"{result['num_shortened']} shortened" in out
    assert "validation: 1 of 1 held-out conversations have no answer to score within 128 tokens; so there is no" in out


def test_account_of_a_file(base_dir, mid, tmp_path, capsys):
    """What became of each row is said, and kept in run.json and the report card."""
    rows = [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}], "id": i}
            for i in range(8)]
    rows += [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, {"chosen": "a",
             "rejected": "b"}]
    path = write_lines(tmp_path / "mine.jsonl", rows)
    result = chat_sft.main(["-g", "toy", "--mixture", "none", "--custom-json", str(path), "--out-tag", "account",
                            "--sample-every", "-1", *MACHINE])
    assert result["num_conversations"] == 9
    out = capsys.readouterr().out
    for text in ("mine.jsonl: 9 conversations of 79 characters in 10 rows",
                 "mine.jsonl: converted from ShareGPT: 1 rows",
                 "mine.jsonl: left out line 10: a row of pairs", "mine.jsonl: not read: id (8 rows)",
                 "WARNING: 10% of the rows of mine.jsonl were left out (1 of 10)"):
        assert text in out, text
    (file,) = read_info(result["run_dir"])["data"]["files"]
    assert (file["rows"], file["kept"], file["left_out"]) == (10, 9, 1) and file["forms"]["ShareGPT"] == 1
    assert [reason["first"] for reason in file["reasons"].values()] == [[10]]
    section = json.loads((base_dir / "report" / "chat_sft.json").read_text())
    assert section["notes"] == file["lines"] and set(file["lines"]) <= set(out.splitlines())


def test_step_with_nothing_to_learn(mid, tmp_path):
    """More steps than rows: padding alone is skipped, not learned from."""
    argv = write_conversations(tmp_path / "one.jsonl", [["Hi", "Hello"]])
    result = chat_sft.main(["-g", "toy", *argv, "--out-tag", "one", "--sample-every", "-1", *MACHINE])
    assert result["step"] == result["num_rows"] == 1
    more = chat_sft.main(["-g", "toy", *argv, "--out-tag", "more", "--num-iterations", "3", "--sample-every", "-1",
                          *MACHINE])
    assert more["step"] == 3 and read_lines(more["run_dir"])[-1]["epoch"] == 23     # eight rows a step, of one each


def test_no_answer_at_all(mid, tmp_path):
    argv = write_conversations(tmp_path / "mute.jsonl", [["Hello?"]] * 3)
    with pytest.raises(UserError, match="nothing to learn in mute.jsonl: no answer of weight 1 begins within 128"):
        chat_sft.main(["-g", "toy", *argv, "--out-tag", "mute", *MACHINE])


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("words", [["--mixture", "quickstart", "--tasks", "GSM8K"],
                                   ["--num-epochs", "2", "--num-iterations", "9"]])
@pytest.mark.parametrize("script", [chat_sft, mid_train])
def test_flags_that_exclude_each_other(script, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(words)
    assert f"argument {words[2]}: not allowed with argument {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(("train", "argv", "message"), [
    (train_mid, ["-g", "nowhere"],               "there is no base run 'nowhere'; .* has .*toy"),
    (train_sft, ["-g", "nowhere"],               "there is no mid run 'nowhere'"),
    (train_mid, ["--model-step", "7"],           "there is no checkpoint of step 7 in .*; it has 3"),
    (train_mid, ["--tasks", "GSM9K"],            "there is no task 'GSM9K'; choose from"),
    (train_mid, ["--custom-json", "absent.jsonl"], "absent.jsonl can't be read"),
    (train_mid, ["--num-epochs", "0"],           "--num-epochs 0 must be at least 1"),
    (train_mid, ["--num-iterations", "0"],       "--num-iterations 0 must be at least 1"),
    (train_mid, ["--total-batch-size", "0"],     "--total-batch-size 0 must be at least 1"),
    (train_mid, ["--total-batch-size", "1000"],  "--total-batch-size 1000 must be a multiple of 128"),
    (train_mid, ["--init-lr-frac", "-1"],        "--init-lr-frac -1 must be above 0"),
    (train_sft, ["--warmdown-ratio", "1.5"],     "--warmdown-ratio 1.5 must be at least 0 and at most 1"),
    (train_sft, ["--init-lr-frac", "0.5"],       "can't continue .* .init_lr_frac: saved 0.02, now 0.5"),
    (train_sft, ["-i", "base"],                  "source.stage: saved mid, now base"),
    (train_sft, ["--tasks", "Arithmetic:91"],    "tasks.Arithmetic: saved 90 x1, now 91 x1"),
])
def test_bad_input_is_one_sentence(mid, sft, train, argv, message):
    before = [read_state(run["run_dir"]) for run in (mid, sft)]
    with pytest.raises(UserError, match=message) as error:
        train(*argv)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert [read_state(run["run_dir"]) for run in (mid, sft)] == before


def test_checkpoint_of_another_stage_is_refused(base_dir, mid):
    shutil.copytree(base_dir / "runs" / "base" / "toy", base_dir / "runs" / "mid" / "disguised")
    with pytest.raises(UserError, match="step_000003 is of stage base, not mid; put that run into .*runs/base"):
        train_sft("-g", "disguised")
