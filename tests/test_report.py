"""The report card: what it shows, that it is made from files alone, and that nothing in those files can break it."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanochat import report, report_render
from nanochat.common import UserError
from nanochat.shards import Manifest, Shard, hash_shards
from nanochat.text_files import Account

MARKUP = "</pre><script>alert(1)</script><img src=http://x.y/z>\n```\n# not a heading | ![a](http://x.y/z)\x1b[2J"
HOSTILE = MARKUP + "\ud800"  # JSON can hold half a character


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def write_run(base_dir: Path, stage: str = "base", tag: str = "d4", num_steps: int = 120, **changes: object) -> str:
    folder = base_dir / "runs" / stage / tag
    folder.mkdir(parents=True)
    record = {"stage": stage, "tag": tag, "created": "2026-11-21 12:00:00", "status": "finished", "wall_sec": 540.0,
              "argv": ["/somewhere/scripts/base_train.py", "--depth", "4"],
              "model_config": {"n_layer": 4, "vocab_size": 8192}, "plan": {"num_iterations": num_steps},
              "decisions": [{"what": "attention", "value": "sdpa", "why": "no GPU | here"}],
              "environment": {"git_revision": "abc", "host": "secret",
                              "hardware": {"cpu": "a CPU", "ram_bytes": 2**34}}}
    (folder / "run.json").write_text(json.dumps(record | changes))
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(num_steps):
            if step % 20 == 0:
                file.write(json.dumps({"kind": "eval", "step": step, "val_bpb": 3 * math.exp(-step / 50) + 1}) + "\n")
            row = {"kind": "train", "step": step, "loss": 9 * math.exp(-step / 50) + 2, "tokens": 4096 * step,
                   "tokens_per_sec": 20000 + step, "elapsed_sec": 4.0 * step}
            file.write(json.dumps(row) + "\n")
    return folder.relative_to(base_dir).as_posix()


def generate(base_dir: Path, *flags: str) -> tuple[str, str]:
    made = report.main(["generate", *flags])
    return Path(made["markdown"]).read_text(), Path(made["html"]).read_text()


class Tags(HTMLParser):
    """Every tag that a browser would see, and whether they nest."""
    VOID = {"meta", "path"}

    def __init__(self, page: str):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def test_chain_of_runs(base_dir):
    report.write_section("base_train", {"title": "Base model", "run": write_run(base_dir), "argv": ["run", "x y"]})
    report.write_section("tok_train", {
        "title": "Tokenizer", "values": {"vocab_size": 8192, "train_sec": 75}, "wall_sec": 60,
        "tables": [{"title": "T", "columns": ["a_bytes", "b"], "rows": [[2048, 1.5]]}]})
    text, page = generate(base_dir, "--price-per-hour", "6")
    assert text.index("## Tokenizer") < text.index("## Base model") < text.index("## Code") < text.index("## Commands")
    assert "| train | 1 m 15 s |" in text and "| 2 KiB | 1.5000 |" in text and "run 'x y'" in text
    assert "| wall-clock time | 10 m 0 s |" in text and "| cost | $1.00 |" in text  # 540 s + 60 s
    assert "| best val bpb | 1.4060 |" in text and "no GPU \\| here" in text
    assert "a CPU" in text and "16 GiB" in text and "secret" not in text + page
    assert page.count("<svg") == 1 and "train loss" in page and "validation bits per byte" in page
    assert not Tags(page).open


def test_made_from_files_alone(base_dir):
    report.write_section("base_train", {"title": "Base model", "run": write_run(base_dir)})
    assert generate(base_dir) == generate(base_dir)


def test_run_without_section_is_shown(base_dir):
    write_run(base_dir, tag="d2", created="2026-11-20 12:00:00")
    write_run(base_dir, tag="d6", created="2026-11-21 12:00:00", status="stopped", wall_sec=None)
    text, _ = generate(base_dir)
    assert "## BASE d6 (stopped)" in text and "python -m scripts.base\\_train" not in text
    assert "python -m scripts.base_train --depth 4" in text  # in the fence
    assert "| runs/base/d2 | finished |" in text
    assert "| wall-clock time | 7 m 56 s |" in text  # a killed run: what its log has seen, 4 s * 119
    report.write_section("base_eval", {"title": "CORE", "stage": "base", "run": "runs/base/d6", "wall_sec": 60})
    assert "| wall-clock time | 8 m 56 s |" in generate(base_dir)[0]  # an evaluation's own time comes on top


def test_stages_side_by_side(base_dir):
    report.write_section("base_eval", {"title": "B", "stage": "base", "metrics": {"CORE": 0.21, "val_bpb": 0.8}})
    report.write_section("base_train", {"title": "A", "stage": "base", "metrics": {"CORE": None, "val_bpb": 0.9}})
    report.write_section("chat_eval_rl", {"title": "R", "stage": "rl", "metrics": {"GSM8K": 0.1}})
    report.write_section("chat_eval_sft", {"title": "S", "stage": "sft", "metrics": {"GSM8K": 0.05, "MMLU": 0.3}})
    text, _ = generate(base_dir)
    assert "| metric | BASE | SFT | RL |" in text
    assert "| GSM8K | – | 0.0500 | 0.1000 |" in text and "| CORE | 0.2100 | – | – |" in text
    assert "| val\\_bpb | 0.8000 | – | – |" in text  # the later in the chain, whichever was written first


def test_other_models_and_older_weights_are_not_mixed_in(base_dir):
    """A quickstart after another chain, and a base model that was trained again since its evaluation."""
    for name, stage, run, created, metrics in (
            ("base_train", "base", "runs/base/quickstart", "2026-11-21T13:00:00", {"val_bpb": 1.2}),
            ("base_loss", "base", "runs/base/quickstart", "2026-11-21T12:00:00", {"val_bpb": 0.7}),
            ("chat_eval_sft", "sft", "runs/sft/hour", "2026-11-20T12:00:00", {"GSM8K": 0.4})):
        report.write_section(name, {"title": name, "stage": stage, "run": run, "created": created, "metrics": metrics})
    write_run(base_dir, tag="quickstart", ended="2026-11-21T13:00:00")
    text, _ = generate(base_dir)
    table = text[text.index("## Stage by stage"):].split("\n\n")
    assert table[1].splitlines()[0] == "| metric | BASE quickstart | SFT hour |"
    assert "| val\\_bpb | 1.2000 | – |" in table[1] and "0.7000" not in table[1]
    assert "Of weights from before the training's end, and left out here: base\\_loss." in text


def test_evaluations_tell_of_the_model_and_the_step_that_they_name(base_dir):
    """Answers of another model of the stage, which name it beside its run, and the loss of an early step."""
    for tag, stage in (("a", "sft"), ("b", "sft"), ("d4", "base")):
        write_run(base_dir, stage, tag, ended="2026-11-21T13:00:00+00:00", results={"step": 120})
    for name, stage, run, values, metrics in (
            ("sft", "sft", "runs/sft/b", {}, {"val_bpb": 0.5}),
            ("chat_eval_sft", "sft", "", {"model": "runs/sft/a", "step": 120}, {"Identity": 0.25}),
            ("base_train", "base", "runs/base/d4", {"steps": 120}, {"val_bpb": 1.2}),
            ("base_loss", "base", "runs/base/d4", {"step": 60}, {"val_bpb": 1.5})):
        report.write_section(name, {"title": name, "stage": stage, "run": run, "created": "2026-11-21T14:00:00+00:00",
                                    "values": values, "metrics": metrics})
    text, _ = generate(base_dir)
    table = text[text.index("## Stage by stage"):].split("\n\n")
    assert table[1].splitlines() == ["| metric | BASE d4 | SFT b | SFT a |", "| --- | --- | --- | --- |",
                                     "| val\\_bpb | 1.2000 | 0.5000 | – |", "| Identity | – | – | 0.2500 |"]
    assert "and left out here: base\\_loss." in text


@pytest.mark.parametrize(("created", "is_older"), [
    ("2026-11-21T10:30:00+00:00", False),    # half an hour after the end, on a machine that runs in UTC
    ("2026-11-21T09:30:00+00:00", True),
    ("2026-11-21T13:30:00+03:00", False)])
def test_times_of_machines_in_other_zones_are_compared(base_dir, created, is_older):
    run = write_run(base_dir, ended="2026-11-21T12:00:00+02:00")
    report.write_section("base_loss", {"title": "loss", "stage": "base", "run": run, "created": created,
                                       "metrics": {"val_bpb": 0.7}})
    assert ("| val\\_bpb | 0.7000 |" not in generate(base_dir)[0]) == is_older


def test_whole_chain_in_one_table(base_dir):
    """Each stage with training and evaluation sections: one row per metric, one column per stage, times added up."""
    seconds = 0
    for i, stage in enumerate(report.STAGES):
        run = write_run(base_dir, stage, num_steps=120 - 20 * i, created=f"2026-11-21 1{i}:00:00")
        report.write_section(f"{'base_train' if stage == 'base' else stage}", {
            "title": f"Training {stage}", "stage": stage, "run": run, "metrics": {"val_bpb": 1 - i / 10}})
        chat = {"ChatCORE": i / 10, "ARC-Easy": 0.25 + i / 20}
        report.write_section(f"chat_eval_{stage}", {"title": f"Chat {stage}", "stage": stage, "run": run,
                                                    "metrics": chat, "wall_sec": 60})
        seconds += 540 + 60
    report.write_section("base_eval", {"title": "CORE", "stage": "base", "metrics": {"CORE": 0.2}})
    assert "| tokens trained on | 487 K |" in generate(base_dir)[0]  # the base model's, not those of the last stage
    text, page = generate(base_dir)
    table = text[text.index("## Stage by stage"):text.index("## Training base")]
    assert table.split("\n")[2:] == [
        "| metric | BASE | MID | SFT | RL |", "| --- | --- | --- | --- | --- |",
        "| val\\_bpb | 1.0000 | 0.9000 | 0.8000 | 0.7000 |", "| CORE | 0.2000 | – | – | – |",
        "| ChatCORE | 0 | 0.1000 | 0.2000 | 0.3000 |", "| ARC-Easy | 0.2500 | 0.3000 | 0.3500 | 0.4000 |", "", ""]
    assert seconds == 2400 and "| wall-clock time | 40 m 0 s |" in text
    titles = [f"## {what} {stage}" for what in ("Training", "Chat") for stage in report.STAGES]
    assert sorted(titles, key=text.index) == titles
    assert text == generate(base_dir)[0] and page.count("<svg") == 4


H100 = {"hardware": {"gpu": "NVIDIA H100 80GB HBM3", "num_gpus": 1}}
PREDICTED = {"peak_memory_bytes": 10 * 2**30, "train_sec": 1200.0, "tokens_per_sec": 16000, "mfu_pct": 40.0,
             "mfu_source": "published for 8 H100"}


def test_plan_against_actual(base_dir):
    """119 of 240 steps in 4 * 119 s, with half the memory that was predicted, at an assumed 3 dollars an hour."""
    run = write_run(base_dir, plan={"num_iterations": 240}, environment=H100, predicted=PREDICTED)
    path = base_dir / run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    more = {"mfu_pct": 50.0, "peak_memory_bytes": 5 * 2**30}
    path.write_text("".join(json.dumps(row | (more if row["kind"] == "train" else {})) + "\n" for row in rows))
    text, page = generate(base_dir)
    table = text[text.index("### Plan against actual"):].split("\n\n")[1].splitlines()
    assert table[0] == "|  | predicted | actual | actual / predicted |"
    assert table[2:] == ["| peak memory | 10 GiB | 5 GiB | 0.50 |",
                         "| time of 119 steps | 9 m 55 s | 7 m 56 s | 0.80 |",
                         "| tokens per sec | 16,000 | 20,060 | 1.25 |",
                         "| MFU | 40% | 50% | 1.25 |",
                         "| cost of that time | $0.50 | $0.40 | 0.80 |"]
    assert "- Predicted when the run began; MFU: published for 8 H100." in text and "Plan against actual" in page


def test_plan_without_a_known_mfu_leaves_its_cells_empty(base_dir):
    write_run(base_dir, predicted={"peak_memory_bytes": 2**30, "mfu_source": "unknown, for nothing was measured"})
    text, _ = generate(base_dir)
    rows = text[text.index("### Plan against actual"):].split("\n\n")[1].splitlines()[2:]
    assert rows == ["| peak memory | 1 GiB |  |  |", "| time of 119 steps |  | 7 m 56 s |  |",
                    "| tokens per sec |  | 20,060 |  |"]
    assert "MFU: unknown, for nothing was measured." in text
    text, _ = generate(base_dir, "--price-per-hour", "6")
    assert "| cost of that time |  | $0.79 |  |" in text


def test_run_that_predicted_nothing_has_no_plan_to_compare(base_dir):
    write_run(base_dir)
    assert "Plan against actual" not in generate(base_dir)[0]


@pytest.mark.parametrize(("hardware", "flags", "cost", "note"), [
    ({"gpu": "NVIDIA H100 80GB HBM3", "num_gpus": 8}, (), "$3.60", "at $24.00 per hour, assumed for 8 x h100"),
    ({"gpu": "NVIDIA H100 80GB HBM3", "num_gpus": 8}, ("--price-per-hour", "10"), "$1.50", "at $10.00 per hour, as gi"),
    ({"gpu": "Some Card 9", "num_gpus": 1}, (), "unknown", "no price is known for Some Card 9"),
    ({"cpu": "a CPU"}, (), "unknown", "no price is known for a CPU"),
    (None, ("--price-per-hour", "0"), "$0.00", "as given"), (None, (), "unknown", "no run says where")])
def test_cost(base_dir, hardware, flags, cost, note):
    write_run(base_dir, environment=hardware and {"hardware": hardware})
    text, _ = generate(base_dir, *flags)
    assert f"| cost | {cost} |" in text and note in text.replace("\\", "")


@pytest.mark.parametrize(("figures", "shown"), [({"num_jumps": 2}, ["2"]), ({"num_jumps": 0}, []), ({}, [])])
def test_jumps_of_the_loss_are_shown(figures, shown, base_dir):
    """Where there are any; runs of before didn't count them."""
    run_dir = base_dir / write_run(base_dir)
    info = json.loads((run_dir / "run.json").read_text()) | {
        "ended": "2026-11-21 13:00:00", "params": {"total": 10}, "plan": {"tokens_per_param": 1.0, "total_flops": 1e9},
        "data": {}, "results": {"step": 9, "tokens": 90, "train_sec": 60.0, "peak_memory_bytes": 2**30, **figures}}
    report.write_stage_section("base_train", "Base model: training", run_dir, info, metrics={}, values={})
    assert re.findall(r"in which the loss jumped \| (\d+)", generate(base_dir)[0]) == shown


def test_cost_of_several_machines_is_not_guessed(base_dir):
    for stage, gpu in (("base", "NVIDIA H100"), ("sft", "NVIDIA A100-SXM4-80GB")):
        write_run(base_dir, stage, environment={"hardware": {"gpu": gpu, "num_gpus": 1}})
    assert "several machines were used" in generate(base_dir)[0]
    with pytest.raises(UserError, match="must be 0 or more"):
        report.main(["generate", "--price-per-hour", "-1"])


def test_size_of_the_code(base_dir):
    write_run(base_dir)
    text, _ = generate(base_dir)
    rows = [line.split(" | ") for line in text[text.index("## Code"):].split("\n") if line.startswith("| nanochat")]
    files = [path for path in (report.REPO_DIR / "nanochat").rglob("*") if path.suffix in (".py", ".sh", ".html")]
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert rows[0][1:3] == [str(len(files)), f"{lines:,}"] and "dependencies declared" in text


def test_untrusted_text(base_dir):
    sample = {"prompt": HOSTILE, "text": HOSTILE + HOSTILE}
    report.write_section("base_loss", {"title": MARKUP, "values": {MARKUP: MARKUP}, "notes": [MARKUP],
                                       "tables": [{"title": MARKUP, "columns": [MARKUP], "rows": [[MARKUP]]}]})
    saved = base_dir / "report" / "base_loss.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"samples": [sample]}))
    text, page = generate(base_dir)
    tags = Tags(page)
    assert not tags.open and not {"script", "img", "link", "iframe", "a"} & {tag for tag, _ in tags.seen}
    assert not any(name in ("src", "href", "onload", "onerror") for _, attrs in tags.seen for name in attrs)
    assert "\x1b" not in text + page and "url(" not in page and "@import" not in page
    outside = re.sub(r"(?ms)^(`{3,})text\n.*?^\1$", "", text)
    assert not re.search(r"(?<!\\)<script", outside) and not re.search(r"(?<!\\)\[a", outside)
    assert "# not a heading" not in outside.replace("\\# not", "")


def test_metrics_torn_and_resumed(tmp_path):
    lines = [{"kind": "train", "step": step, "loss": 5.0} for step in range(10)]
    lines.insert(8, {"kind": "eval", "step": 8, "val_bpb": 1.0})
    lines += [{"kind": "eval", "step": 5, "val_bpb": 2.0}, {"kind": "sample", "step": 5, "prompt": "p", "text": "t"},
              {"kind": "train", "step": 5, "loss": 4.0}, {"kind": "sample", "step": 5, "prompt": "p", "text": "t"},
              {"kind": "sample", "step": 5, "prompt": "p", "text": "u"}, {"kind": "train", "step": 6, "loss": math.nan},
              {"kind": "new", "step": 6, "x": 1}, {"kind": "train", "step": 7, "loss": 3.0}]
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(map(json.dumps, lines)).encode() +
                                             b'\n\xff\xfe\n{"kind": "train", "step": 8, "lo')
    run = report.read_run(tmp_path)
    assert run.get_series("train", "loss") == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 4), (7, 3)]
    assert run.get_series("eval", "val_bpb") == [(5, 2.0)]  # step 8 belonged to what was done again
    assert [row["text"] for row in run.metrics["sample"][5]] == ["t", "u"]


def test_rl_shows_reward(base_dir):
    run = base_dir / write_run(base_dir, stage="rl", num_steps=0)
    lines = [{"kind": "train", "step": step, "loss": -0.03, "reward": step / 100} for step in range(1, 61)]
    lines += [{"kind": "eval", "step": step, "A_reward": 0.2, "A_problems": 30, "B_reward": reward, "B_problems": 10,
               "B_pass_at_4": 1.0} for step, reward in ((0, 0.6), (60, 1.0))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.get_held_out_reward(report.read_run(run)) == \
        [(0, pytest.approx(0.3)), (60, pytest.approx(0.4))]    # over the questions, not over the tasks
    text, page = generate(base_dir)
    assert "train loss" not in text + page and "held-out reward</text>" in page
    assert "step 60: 0.4000" in page
    # one scale: the train line's end and the evaluation of about that value are about as high
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', page)]
    line = re.search(r'<path class="train" d="M[^"]*L[\d.]+ ([\d.]+)"', page)
    smoothed = report_render.smooth([(row["step"], row["reward"]) for row in lines[:60]])[-1][1]
    assert smoothed == pytest.approx(0.51, abs=0.01)
    top, bottom = report_render.TOP, report_render.BOTTOM
    per_reward = (heights[0] - heights[1]) / 0.1
    assert float(line[1]) == pytest.approx(heights[1] - (smoothed - 0.4) * per_reward, abs=0.5)
    assert top <= float(line[1]) <= bottom


def test_reset_keeps_runs(base_dir):
    run = write_run(base_dir)
    report.write_section("base_train", {"title": "B", "run": run})
    (base_dir / "report" / "mid.json.1234.tmp").touch()    # of a process that was killed while it wrote
    assert report.main(["reset"]) == {"removed": 2}
    assert (base_dir / run / "metrics.jsonl").is_file() and not list((base_dir / "report").iterdir())


def test_mistakes(base_dir):
    with pytest.raises(UserError, match="nothing to report yet"):
        report.main(["generate"])
    report.write_section("gone", {"title": "Gone", "run": "runs/base/gone"})
    assert "runs/base/gone isn't there any more" in generate(base_dir)[0].replace("\\", "")
    (base_dir / "a_file").touch()
    with pytest.raises(UserError, match="choose a folder with --out"):
        report.main(["generate", "--out", str(base_dir / "a_file")])
    (base_dir / "report" / "torn.json").write_text('{"title": "T')
    with pytest.raises(UserError, match=r"torn\.json is damaged"):
        report.main(["generate"])
    with pytest.raises(ValueError, match="can't name a section"):
        report.write_section("../x", {})


def test_the_account_of_the_data_is_shown(base_dir):
    account = Account()
    account.add_file(".txt", 10)
    account.leave_out(HOSTILE[:-1], "is markup", 90)
    account.count("kept", 1234)
    account.count("without text")
    folder = base_dir / "data" / "mine"
    folder.mkdir(parents=True)
    shard = Shard("shard_00000.parquet", "0", 1, 1, 1, 1)
    Manifest("files", {}, "command", (shard,), replace(shard, file="val.parquet"), account).save(folder)
    shards_hash = hash_shards([shard, replace(shard, file="val.parquet")])
    write_run(base_dir, data={"name": "mine", "folder": str(folder), "hash": shards_hash})
    markdown, page = generate(base_dir)
    assert "## Data: mine" in markdown and "| without text | 1 | 0 |" in markdown and "| is markup |" in markdown
    assert "| characters kept | 1,234 |" in markdown and "made again" not in markdown
    assert "WARNING: 50% of the files were left out (1 of 2)" in page and "<script>" not in page
    Manifest("files", {}, "command", (replace(shard, sha256="1"),), shard, account).save(folder)
    assert "The data was made again since this run" in generate(base_dir)[0]
    (folder / "manifest.json").write_text("{")
    assert "Data: mine" not in generate(base_dir)[0]
