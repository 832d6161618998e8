"""ChatCORE against slow, obvious versions: letters, answers, intervals, records, ranks, what is missing, the script."""

import copy
import json
import math
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat import chat_eval
from nanochat.chat_eval import (
    AnswerSettings,
    Solver,
    check_task_names,
    choose_letters,
    compute_chatcore,
    crop_prompt,
    evaluate_task,
    load_problems,
    sample_answers,
    wilson_interval,
)
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from nanochat.engine import Engine, Request
from nanochat.execution import find_method
from nanochat.gpt import GPT, GPTConfig
from scripts import chat_eval as script
from tasks.arithmetic import Arithmetic
from tasks.catalog import CHATCORE_TASKS, get_task
from tasks.common import Task
from tests.helpers import BYTE_TOKENIZER, REPO_DIR, make_model, run_program_on_ranks

REAL_TASKS = REPO_DIR.parent / "shared" / "data" / "tasks"
CONFIG = GPTConfig(sequence_len=160, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL")
WORDS = ["apple", "banana", "cherry", "grape", "lemon", "melon", "orange", "papaya", "peach", "plum", "quince",
         "raspberry", "strawberry", "tomato", "walnut", "almond", "bread", "butter", "cheese", "garlic"]
SHORT = AnswerSettings(max_new_tokens=12)

ARC = [{"question": f"Which number is {n}?", "answerKey": "ABCD"[n % 4],
        "choices": {"text": [str(4 * (n // 4) + i) for i in range(4)], "label": list("ABCD")}} for n in range(11)]
MMLU = [{"question": "Why? " * (1 + 3 * n), "subject": "reasons", "choices": ["a", "b", "c", "d"], "answer": n % 4}
        for n in range(14)]
GSM8K = [{"question": f"What is {n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1}"}
         for n in range(9)]
HUMANEVAL = [{"prompt": f"def add_{n}(x):\n    '''Add {n}.'''\n", "canonical_solution": f"    return x + {n}\n",
              "test": f"def check(f):\n    assert f(1) == {n + 1}\n", "entry_point": f"add_{n}"} for n in range(3)]
HUB = {"allenai/ai2_arc/ARC-Easy": ARC, "allenai/ai2_arc/ARC-Challenge": ARC[:6], "cais/mmlu/all": MMLU,
       "openai/gsm8k/main": GSM8K, "openai/openai_humaneval/openai_humaneval": HUMANEVAL}


def write_hub(base_dir: Path) -> None:
    """Small files of the six tasks in the hub's own layout."""
    for place, rows in HUB.items():
        path = base_dir / "hub" / place / "test.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (base_dir / "words_alpha.txt").write_text("\n".join(WORDS))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder with the tasks' files; the library that would ask the network fails at once."""
    def no_network(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")
    monkeypatch.delenv("NANOCHAT_MIRROR_DIR", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=no_network))
    write_hub(tmp_path)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tokenizer():
    return BYTE_TOKENIZER


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG, torch.float64)


def evaluate_chat(solver: Solver, names: tuple[str, ...], max_problems: int | None = None) -> dict:
    """As scripts.chat_eval does, without a checkpoint."""
    results, missing = {}, {}
    for name in names:
        try:
            results[name] = evaluate_task(solver, name, max_problems)
        except UserError as error:
            missing[name] = str(error)
    return compute_chatcore(results, missing)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def choose_slowly(model, tokenizer, problem) -> str:
    """One prompt at a time, all logits of the last position."""
    prompt = crop_prompt(problem.prompt, model.config.sequence_len)
    with torch.no_grad():
        logits = model(torch.tensor([prompt]))[0, -1]
    return max(problem.conversation["letters"], key=lambda letter: float(logits[tokenizer.encode(letter)[0]]))


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_letters_equal_one_at_a_time(hub, model, tokenizer, batch_rows):
    """Prompts of many lengths, some over the context; what stands before the answer's place matters to the model."""
    model = copy.deepcopy(model)
    for block in model.transformer.h:
        block.attn.c_proj.weight.data *= 20
    problems = load_problems(get_task("MMLU", "test"), "MMLU", tokenizer, None)
    lengths = [len(problem.prompt) for problem in problems]
    assert min(lengths) < CONFIG.sequence_len < max(lengths)
    solver = Solver(model, tokenizer, batch_rows=batch_rows)
    letters = {problem.index: letter for problem, [letter], _ in choose_letters(solver, problems)}
    assert letters == {problem.index: choose_slowly(model, tokenizer, problem) for problem in problems}
    assert len(set(letters.values())) > 1


def test_a_crop_keeps_bos_and_the_answers_place(hub, tokenizer):
    problem = max(load_problems(get_task("MMLU", "test"), "MMLU", tokenizer, None), key=lambda p: len(p.prompt))
    cropped = crop_prompt(problem.prompt, 50)
    assert len(cropped) == 50 and cropped[0] == tokenizer.get_bos_token_id() and cropped[1:] == problem.prompt[-49:]
    assert cropped[-1] == tokenizer.encode_special("<|assistant_start|>")
    assert crop_prompt(problem.prompt, len(problem.prompt)) == problem.prompt


def test_answers_equal_one_at_a_time(hub, model, tokenizer):
    settings = AnswerSettings(num_samples=3, temperature=1.0, top_k=30, max_new_tokens=20)
    problems = load_problems(get_task("GSM8K", "test"), "GSM8K", tokenizer, None)
    expected = {}
    for problem in problems:
        rows, _ = Engine(model, tokenizer).generate_batch(list(problem.prompt), 3, 20, 1.0, 30, seed=42 + problem.index)
        expected[problem.index] = [tokenizer.decode(row[len(problem.prompt):]) for row in rows]
    for batch_rows, some in ((64, problems), (2, problems[::-1]), (5, problems[4:])):
        answers = {problem.index: texts for problem, texts, _ in
                   sample_answers(Solver(model, tokenizer, settings, batch_rows), some)}
        assert answers == {problem.index: expected[problem.index] for problem in some}
    assert len({text for texts in expected.values() for text in texts}) > 20


def test_answers_that_are_cut_are_counted(hub, model, tokenizer):
    problems = load_problems(get_task("GSM8K", "test"), "GSM8K", tokenizer, 5)
    num_cut = {p.index: count for p, _, count in sample_answers(Solver(model, tokenizer, SHORT, 8), problems)}
    for problem in problems:
        ((rows, _),) = Engine(model, tokenizer).generate_many([list(problem.prompt)], 1, 12, 0)
        assert num_cut[problem.index] == (rows[0][-1] not in Engine(model, tokenizer).end_tokens)


def test_a_context_shorter_than_prompt_and_answer(hub, tokenizer, monkeypatch):
    """Both are cut: a model isn't asked to go on beyond the positions that it was trained for."""
    tiny, lengths = make_model(replace(CONFIG, sequence_len=16), torch.float64), []

    def make_request(tokens, max_tokens, *args, **kwargs):
        lengths.append(len(tokens) + max_tokens)
        return Request(tokens, max_tokens, *args, **kwargs)
    monkeypatch.setattr(chat_eval, "Request", make_request)
    chat = evaluate_chat(Solver(tiny, tokenizer, AnswerSettings(max_new_tokens=40)), ("ARC-Easy", "GSM8K"))
    assert not chat["missing"] and [task["num_problems"] for task in chat["tasks"].values()] == [11, 9]
    assert lengths == [16 + 1] * 9      # the last token is only written


def test_the_calculator_is_in_the_loop(hub, model, tokenizer, monkeypatch):
    """A model that writes a call, then what it was told: the answer holds the calculator's output."""
    call = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("6*7"),
            tokenizer.encode_special("<|python_end|>")]
    end = tokenizer.encode_special("<|assistant_end|>")
    script_tokens = iter([*call, end])

    def sample(logits, samplings, token_idxs):
        return torch.tensor([next(script_tokens)])
    monkeypatch.setattr("nanochat.engine.sample_rows", sample)
    problems = load_problems(Arithmetic("test", size=1), "Arithmetic", tokenizer, None)
    [(_, [text], num_cut)] = sample_answers(Solver(model, tokenizer, SHORT, 1), problems)
    assert text == "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>" and num_cut == 0


# ---------------------------------------------------------------------------------------------------------------------
# Figures


@pytest.mark.parametrize(("mean", "count"), [(0.0, 10), (1.0, 10), (0.3, 1000), (0.5, 1), (0.25, 14042), (0.9, 7)])
def test_wilson_interval_solves_its_equation(mean, count):
    """Its ends are the shares p from which `mean` lies z standard errors of p away: found by bisection."""
    def solve(low: float, high: float) -> float:
        """From `low`, at the mean, to `high`, at 0 or 1."""
        for _ in range(100):
            middle = (low + high) / 2
            is_inside = (mean - middle) ** 2 <= 1.959964**2 * middle * (1 - middle) / count
            low, high = (middle, high) if is_inside else (low, middle)
        return low
    low, high = wilson_interval(mean, count)
    assert low == pytest.approx(solve(mean, 0.0), abs=1e-9) and high == pytest.approx(solve(mean, 1.0), abs=1e-9)
    assert 0 <= low <= mean <= high <= 1 and high > low


def answer_always(monkeypatch, letter: str) -> None:
    monkeypatch.setattr(chat_eval, "choose_letters", lambda solver, problems: (
        (problem, [letter], 0) for problem in problems))


def test_accuracy_is_counted_and_centered(hub, model, tokenizer, monkeypatch):
    answer_always(monkeypatch, "B")
    result = evaluate_task(Solver(model, tokenizer), "ARC-Easy")
    assert result["accuracy"] == 3 / 11  # of 0 .. 10, those with n % 4 == 1
    assert result["centered"] == pytest.approx((3 / 11 - 0.25) / 0.75) and result["num_problems"] == 11
    assert (result["low"], result["high"]) == wilson_interval(3 / 11, 11)


def test_a_question_asked_twice_is_evidence_once(hub, model, tokenizer):
    result = evaluate_task(Solver(model, tokenizer, SHORT), "Identity", max_problems=60)
    problems = load_problems(get_task("Identity", "test"), "Identity", tokenizer, 60)
    different = len({problem.prompt for problem in problems})
    assert different < 50 and result["num_problems"] == 60
    assert (result["low"], result["high"]) == wilson_interval(result["accuracy"], different)


def test_samples_are_averaged(hub, model, tokenizer, monkeypatch):
    """Of four samples one is right for each problem: pass@1 is a quarter, and always any is right."""
    monkeypatch.setattr(chat_eval, "sample_answers", lambda solver, problems: (
        (p, ["x", f"#### {p.index + 1}", "#### -1", "####"], 1) for p in problems))
    result = evaluate_task(Solver(model, tokenizer, AnswerSettings(num_samples=4, temperature=1.0)), "GSM8K")
    assert (result["accuracy"], result["pass_any"], result["centered"], result["num_cut"]) == (0.25, 1.0, 0.25, 9)
    assert (result["low"], result["high"]) == wilson_interval(0.25, 9)


def test_chatcore_is_the_mean_over_its_six_tasks():
    results = {name: {"centered": i / 10} for i, name in enumerate(CHATCORE_TASKS)}
    chat = compute_chatcore(results | {"Arithmetic": {"centered": 100.0}}, {})
    assert chat["chatcore"] == pytest.approx(0.25) and not chat["is_partial"] and chat["num_tasks"] == 6
    partial = compute_chatcore({"GSM8K": {"centered": 0.3}, "Arithmetic": {"centered": 1.0}}, {"MMLU": "no data"})
    assert partial["chatcore"] == 0.3 and partial["is_partial"] and partial["missing"] == {"MMLU": "no data"}
    assert compute_chatcore({"Arithmetic": {"centered": 1.0}}, {})["chatcore"] is None


def test_fewer_problems_are_part_of_more(hub, tokenizer):
    few, more, everything = (load_problems(get_task("MMLU", "test"), "MMLU", tokenizer, n) for n in (3, 8, None))
    assert few == more[:3] and more == everything[:8]
    assert sorted(p.index for p in everything) == list(range(14)) != [p.index for p in everything]


def test_words_in_common_are_a_score_not_a_verdict(hub, model, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_eval, "sample_answers", lambda solver, problems: (
        (p, [p.conversation["messages"][-1]["content"] + " really"], 0) for p in problems))
    result = evaluate_task(Solver(model, tokenizer), "PythonDocs", max_problems=4)
    assert 0.8 < result["accuracy"] < 1


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def solve_rightly(monkeypatch) -> None:
    monkeypatch.setattr(chat_eval, "sample_answers", lambda solver, problems: (
        (p, [p.conversation["messages"][-1]["content"] if p.index else "    return 'wrong'"], 0) for p in problems)
        if "test" in problems[0].conversation else ((p, [""], 0) for p in problems))


def test_programs_are_run(hub, model, tokenizer, monkeypatch):
    if find_method()[0] == "none":
        pytest.skip("this machine has no isolation")
    solve_rightly(monkeypatch)
    result = evaluate_task(Solver(model, tokenizer), "HumanEval")
    assert result["accuracy"] == pytest.approx(2 / 3) and result["num_problems"] == 3


def test_programs_without_a_sandbox(hub, model, tokenizer, monkeypatch):
    """Refused before an answer is written, unless the person accepts the risk."""
    monkeypatch.setattr("nanochat.execution.find_method", lambda: ("none", "not here"))
    solve_rightly(monkeypatch)
    chat = evaluate_chat(Solver(model, tokenizer, SHORT), ("HumanEval", "GSM8K"), max_problems=3)
    assert "--allow-unsafe" in chat["missing"]["HumanEval"] and list(chat["tasks"]) == ["GSM8K"]
    chat = evaluate_chat(Solver(model, tokenizer, allow_unsafe=True), ("HumanEval",))
    assert chat["tasks"]["HumanEval"]["accuracy"] == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["GSM8K", "ARC-Easy"])
def test_a_killed_evaluation_goes_on(hub, model, tokenizer, tmp_path, monkeypatch, name):
    settings = AnswerSettings(num_samples=2, temperature=1.0, max_new_tokens=12) if name == "GSM8K" else SHORT
    expected = evaluate_task(Solver(model, tokenizer, settings), name, records_dir=tmp_path / "whole")
    real, graded = Task.grade, []

    def grade(task, conversations, answers, allow_unsafe):
        if len(graded) == stop_after:
            raise KeyboardInterrupt
        graded.extend(conversations[:1])
        return real(task, conversations, answers, allow_unsafe)
    monkeypatch.setattr(Task, "grade", grade)
    stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        evaluate_task(Solver(model, tokenizer, settings), name, records_dir=tmp_path / "killed")
    part = tmp_path / "killed" / f"{name}.part0.jsonl"
    assert len(read_lines(part)) == 4
    with open(part, "a") as file:
        file.write('{"index": 3, "id": "abc", "answ')  # killed in the middle of a line
    graded.clear()
    stop_after = -1
    assert evaluate_task(Solver(model, tokenizer, settings), name, records_dir=tmp_path / "killed") == expected
    assert len([conversation for conversation in graded if conversation]) == expected["num_problems"] - 4
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [f"{name}.jsonl"]
    whole, killed = (read_lines(tmp_path / folder / f"{name}.jsonl") for folder in ("whole", "killed"))
    assert whole == killed and [record["index"] for record in whole] == list(range(expected["num_problems"]))
    graded.clear()
    evaluate_task(Solver(model, tokenizer, settings), name, max_problems=5, records_dir=tmp_path / "killed")
    assert not graded and len(read_lines(tmp_path / "killed" / f"{name}.jsonl")) == len(whole)


def test_a_record_of_another_question_does_not_count(hub, model, tokenizer, tmp_path):
    before = evaluate_task(Solver(model, tokenizer), "ARC-Easy", records_dir=tmp_path / "records")
    rows = [*ARC[:4], ARC[4] | {"question": "Another?"}, *ARC[5:]]
    (hub / "allenai/ai2_arc/ARC-Easy/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = evaluate_task(Solver(model, tokenizer), "ARC-Easy", records_dir=tmp_path / "records")
    records = read_lines(tmp_path / "records" / "ARC-Easy.jsonl")
    assert [record["index"] for record in records] == sorted([*range(11), 4])  # both, told apart by their id
    assert before["num_problems"] == after["num_problems"] == 11


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong


def test_missing_and_damaged_data_cost_their_task_only(hub, model, tokenizer):
    shutil.rmtree(hub / "cais")
    (hub / "openai/gsm8k/main/test.jsonl").write_text('{"question": "Q"}\n')
    rows = [ARC[0], ARC[1] | {"answerKey": "Z"}]
    (hub / "allenai/ai2_arc/ARC-Challenge/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model.train()
    chat = evaluate_chat(Solver(model, tokenizer, SHORT),
                         ("MMLU", "GSM8K", "ARC-Challenge", "ARC-Easy", "SpellingBee"), max_problems=3)
    assert list(chat["tasks"]) == ["ARC-Easy", "SpellingBee"] and chat["is_partial"] and model.training
    assert "put test.parquet or test.jsonl into" in chat["missing"]["MMLU"]
    assert "no column 'answer'" in chat["missing"]["GSM8K"]
    assert "example 1 of ARC can't be used (ValueError: 'Z'" in chat["missing"]["ARC-Challenge"]
    model.eval()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nmore"), MemoryError(), OSError(28, "disk full")])
def test_what_befalls_a_task_does_not_end_a_training(hub, tokenizer, monkeypatch, error):
    training = make_model(CONFIG, torch.float64).train()
    monkeypatch.setattr(GPT, "forward_trunk", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    chat = evaluate_chat(Solver(training, tokenizer), ("ARC-Easy",))
    assert type(error).__name__ in chat["missing"]["ARC-Easy"] and "\n" not in chat["missing"]["ARC-Easy"]
    assert training.training and chat["chatcore"] is None


def test_a_bug_is_not_hidden(hub, model, tokenizer, monkeypatch):
    monkeypatch.setattr(chat_eval, "choose_letters", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_chat(Solver(model, tokenizer), ("ARC-Easy",))


@pytest.mark.parametrize(("names", "expected"), [
    (["GSM9K"], "no task 'GSM9K' to evaluate; choose from ARC-Easy, .*PythonDocs"),
    (["SmolTalk"], "no task 'SmolTalk'"), (["MMLU", "MMLU"], "each task once"), ([], "each task once")])
def test_names_are_checked_before_any_work(names, expected):
    with pytest.raises(UserError, match=expected):
        check_task_names(names)


@pytest.mark.parametrize("values", [{"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1},
                                    {"temperature": math.nan}, {"num_samples": 2}])
def test_settings_that_make_no_sense(values):
    with pytest.raises(UserError):
        AnswerSettings(**values)


def test_two_ranks_equal_one(hub, model, tokenizer, tmp_path):
    """And a task that fails on one rank fails on both, with neither left waiting."""
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vars(CONFIG)))
    expected = evaluate_chat(Solver(model, tokenizer, SHORT), ("ARC-Easy", "GSM8K"), max_problems=7)
    run_program_on_ranks("chat_eval_rank", tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"chat_{rank}.json").read_text())
        assert results == expected["tasks"] | {"MMLU": "this rank has no data"}
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == ["ARC-Easy.jsonl", "GSM8K.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# The real files, and the script


def test_real_tasks(hub, model, tokenizer):
    if not REAL_TASKS.is_dir():
        pytest.skip(f"the real files are not at {REAL_TASKS}")
    for place, name in (("allenai/ai2_arc/ARC-Easy", "arc_easy_test"), ("cais/mmlu/all", "mmlu_test_dev"),
                        ("openai/gsm8k/main", "gsm8k_test_dev")):
        (hub / place / "test.jsonl").unlink()
        shutil.copy(REAL_TASKS / f"{name}.jsonl.gz", hub / place / "test.jsonl.gz")
    chat = evaluate_chat(Solver(model, tokenizer, SHORT), ("ARC-Easy", "MMLU", "GSM8K"), max_problems=12)
    assert [task["num_problems"] for task in chat["tasks"].values()] == [12, 12, 12] and not chat["missing"]
    for name in ("ARC-Easy", "MMLU"):
        problems = load_problems(get_task(name, "test"), name, tokenizer, 12)
        slow = [choose_slowly(model, tokenizer, p) == p.conversation["messages"][-1]["content"] for p in problems]
        assert chat["tasks"][name]["accuracy"] == pytest.approx(sum(slow) / 12)


@pytest.fixture
def run(hub, model, tokenizer, tmp_path, monkeypatch):
    """A call of the script on a saved model, which counts the tasks that it evaluates."""
    tokenizer.save(tmp_path / "tokenizer" / "default")
    meta = {"model_config": vars(CONFIG), "tokenizer": {"name": "default", "hash": tokenizer.hash}}
    save_checkpoint(tmp_path / "runs" / "sft" / "d2", 20, model, model.setup_optimizer(), meta)
    return lambda *flags: script.main(["-i", "sft", "--device-type", "cpu", "-d", "float64", "-m", "12", *flags])


def test_script(run, hub, tmp_path, capsys, monkeypatch):
    shutil.rmtree(hub / "cais")
    if find_method()[0] == "none":
        shutil.rmtree(hub / "openai" / "openai_humaneval")
    result = run("-x", "4")
    out = capsys.readouterr().out
    assert result["is_partial"] and "MMLU             was not evaluated: cais/mmlu can't be had" in out
    assert f"ChatCORE, only {result['num_tasks']} of 6 tasks" in out
    section = json.loads((tmp_path / "report" / "chat_eval_sft.json").read_text())
    assert section["stage"] == "sft" and section["values"]["model"] == "runs/sft/d2"
    assert "ChatCORE" not in section["metrics"]
    assert section["metrics"]["GSM8K"] == result["tasks"]["GSM8K"]["accuracy"]
    assert any("MMLU was not evaluated" in note for note in section["notes"])
    records = read_lines(Path(result["records_dir"]) / "GSM8K.jsonl")
    assert len(records) == 4 and records[0].keys() == {"index", "id", "answers", "scores", "num_cut"}
    monkeypatch.setattr(chat_eval, "solve", lambda *args: pytest.fail("it was evaluated before"))
    assert run("-x", "4") == result
    with pytest.raises(pytest.fail.Exception):
        run("-x", "4", "--fresh", "-a", "ARC-Easy")
    records_dir = Path(result["records_dir"])
    assert not (records_dir / "ARC-Easy.jsonl").exists() and read_lines(records_dir / "GSM8K.jsonl") == records
    with pytest.raises(pytest.fail.Exception):
        run("-x", "4", "-m", "13")  # other settings have other records


def test_other_weights_or_words_have_records_of_their_own(run, tmp_path, tokenizer):
    (tmp_path / "words.txt").write_text("".join(f"{'abcdefghij'[i]}ert\n" for i in range(10)))
    folders = [run("-x", "2", "-a", "GSM8K")["records_dir"],
               run("-x", "2", "-a", "GSM8K", "--words", str(tmp_path / "words.txt"))["records_dir"]]
    model = make_model(CONFIG, torch.float64, seed=1)    # trained again, to the same step
    meta = {"model_config": vars(CONFIG), "tokenizer": {"name": "default", "hash": tokenizer.hash}}
    save_checkpoint(tmp_path / "runs" / "sft" / "d2", 20, model, model.setup_optimizer(), meta)
    folders.append(run("-x", "2", "-a", "GSM8K")["records_dir"])
    assert len(set(folders)) == 3


def test_all_problems_by_a_word():
    assert [script.parse_args(["-i", "sft", "-x", word]).max_problems for word in ("all", "-1", "7")] == [None, None, 7]


def test_tasks_evaluated_one_by_one_are_one_evaluation(run, tmp_path):
    parts = [run("-x", "4", "-a", name) for name in ("GSM8K", "SpellingBee", "GSM8K")]
    whole = run("-x", "4", "-a", "GSM8K", "SpellingBee")
    assert [list(part["tasks"]) for part in parts] == [["GSM8K"], ["GSM8K", "SpellingBee"], ["SpellingBee", "GSM8K"]]
    assert parts[1] == whole and parts[2]["chatcore"] == whole["chatcore"]
    section = json.loads((tmp_path / "report" / "chat_eval_sft.json").read_text())
    assert section["metrics"].keys() >= {"GSM8K", "SpellingBee"}
    assert list(run("-x", "3", "-a", "GSM8K")["tasks"]) == ["GSM8K"]    # fewer problems are another evaluation


def test_script_when_nothing_can_be_evaluated(run, hub):
    shutil.rmtree(hub)
    with pytest.raises(UserError, match="none of the tasks could be evaluated; the first, MMLU: cais/mmlu can't be"):
        run("-a", "MMLU", "GSM8K")
    with pytest.raises(UserError, match="there is no task 'mmlu'"):
        run("-a", "mmlu")
    with pytest.raises(UserError, match="--max-problems 0 leaves nothing"):
        run("-a", "Arithmetic", "-x", "0")
    with pytest.raises(UserError, match="there is no rl model"):
        script.main(["-i", "rl", "--device-type", "cpu"])
