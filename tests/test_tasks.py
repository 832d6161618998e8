"""tasks/: the interface, mixtures, rows from local files, and the hub's datasets on their real files."""

import gzip
import re
import shutil
import sys
import types
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.conversations import parse_conversation
from nanochat.execution import calculate
from tasks.arc import ARC
from tasks.catalog import REWARD_TASKS, TASKS, get_task
from tasks.common import Task, TaskMixture, extract_answer, get_reference, render_mc
from tasks.gsm8k import GSM8K, split_calls
from tasks.humaneval import build_program
from tasks.mmlu import MMLU
from tasks.rows import JsonLines, TableRows, load_rows
from tasks.smoltalk import SmolTalk
from tests.data_helpers import write_lines

REAL_TASKS = Path(__file__).parents[2] / "shared" / "data" / "tasks"
# where the real files belong in the hub's layout
PLACES = {
    "arc_easy_train":           "allenai/ai2_arc/ARC-Easy/train",
    "arc_easy_test":            "allenai/ai2_arc/ARC-Easy/test",
    "arc_challenge_validation": "allenai/ai2_arc/ARC-Challenge/validation",
    "gsm8k_train":              "openai/gsm8k/main/train",
    "gsm8k_test_dev":           "openai/gsm8k/main/test",
    "humaneval_dev":            "openai/openai_humaneval/openai_humaneval/test",
    "mc_train_4choice":         "cais/mmlu/auxiliary_train/train",
    "mmlu_test_dev":            "cais/mmlu/all/test",
    "mmlu_validation":          "cais/mmlu/all/validation",
}


class Numbers(Task):
    """Numbered conversations."""

    def __init__(self, num, name="n", **kwargs):
        super().__init__(**kwargs)
        self.num, self.name = num, name

    def num_examples(self):
        return self.num

    def get_example(self, index):
        return f"{self.name}{index}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder for local files, under an empty base folder; the network's library fails at once."""
    monkeypatch.delenv("NANOCHAT_MIRROR_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def no_network(*args, **kwargs):
        raise ConnectionError("Couldn't reach it.\nmore lines")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=no_network))
    return tmp_path / "hub"


@pytest.fixture
def real_hub(hub):
    if not REAL_TASKS.is_dir():
        pytest.skip(f"the real files are not at {REAL_TASKS}")
    for name, place in PLACES.items():
        path = hub / f"{place}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REAL_TASKS / f"{name}.jsonl.gz", path)
    return hub


# ---------------------------------------------------------------------------------------------------------------------
# The interface


@pytest.mark.parametrize(("start", "stop", "step"), [(0, None, 1), (2, 7, 2), (3, 100, 1), (9, None, 5), (20, 30, 1)])
def test_slice_is_a_lists(start, stop, step):
    task = Numbers(10, start=start, stop=stop, step=step)
    expected = [f"n{i}" for i in range(10)][start:stop:step]
    assert len(task) == len(expected) and list(task) == expected and task.num_examples() == 10
    if expected:
        assert task[-1] == expected[-1]
    with pytest.raises(IndexError):
        task[len(expected)]


@pytest.mark.parametrize("slice_", [{"start": -1}, {"step": 0}, {"start": 5, "stop": 4}])
def test_slice_that_is_none(slice_):
    with pytest.raises(ValueError, match="no slice"):
        Numbers(10, **slice_)


def test_mixture_has_each_example_as_often_as_weighted():
    tasks = [Numbers(100, "a"), Numbers(10, "b"), Numbers(40, "c"), Numbers(7, "d", start=2)]
    counts = Counter(TaskMixture(tasks, weights=[1, 3, 0.5, 1.6]))
    assert {counts[f"a{i}"] for i in range(100)} == {1} and {counts[f"b{i}"] for i in range(10)} == {3}
    assert [counts[f"c{i}"] for i in range(40)] == [1, 0] * 20  # every other one, not the first half
    assert sum(counts[f"d{i}"] for i in range(7)) == 8 and {counts[f"d{i}"] for i in range(2, 7)} == {1, 2}
    assert counts.total() == 100 + 30 + 20 + 8
    assert Counter(TaskMixture(tasks)) == Counter(example for task in tasks for example in task)


def test_mixture_is_shuffled_by_its_seed_alone():
    tasks = [Numbers(500, "a"), Numbers(500, "b")]
    first, again, other = (list(TaskMixture(tasks, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)
    assert 200 < sum(text.startswith("a") for text in first[:500]) < 300
    assert list(TaskMixture(tasks, seed=1, start=10, stop=20)) == first[10:20]


def test_tasks_with_a_reward_are_listed():
    """RL checks its flags by the list, before anything is loaded."""
    classes = TASKS | {"ARC-Easy": ARC, "ARC-Challenge": ARC, "MMLU": MMLU, "GSM8K": GSM8K}
    classes = {name: task for name, task in classes.items() if isinstance(task, type)}    # without those of other tests
    assert {name for name, task in classes.items() if hasattr(task, "reward")} == set(REWARD_TASKS) & set(classes)


@pytest.mark.parametrize("weights", [[1], [1, -1]])
def test_mixture_refuses_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        TaskMixture([Numbers(1), Numbers(1)], weights)


def test_render_mc():
    assert render_mc("Which?", ["one", "two"]).splitlines()[:3] == ["Which?", "- one=A", "- two=B"]
    with pytest.raises(ValueError):
        render_mc("Which?", ["one", "two"], letters="A")


@pytest.mark.parametrize(("text", "answer"), [
    ("so 18.\n#### 18", "18"), ("#### 1,234", "1234"), ("#### -3.5", "-3.5"), ("####7.", "7"),
    ("#### 18\n#### 19", "18"), ("18", None), ("#### many", None), ("", None)])
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_unknown_names_list_the_known(hub):
    with pytest.raises(UserError, match="no task 'gsm8k'; choose one of ARC-Easy, .*GSM8K.*SpellingBee"):
        get_task("gsm8k", "test")
    with pytest.raises(UserError, match="Arithmetic has no split 'validation'; choose train or test"):
        get_task("Arithmetic", "validation")
    with pytest.raises(NotImplementedError, match="SmolTalk has no grade"):
        SmolTalk.evaluate(object.__new__(SmolTalk), {}, "")


# ---------------------------------------------------------------------------------------------------------------------
# Rows

ROWS = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(10)]


def test_the_same_rows_from_every_kind_of_file(hub):
    folder = hub / "openai/gsm8k/main"
    write_lines(folder / "train.jsonl", ROWS)
    write_lines(folder / "train_extra.jsonl", ROWS[:1])     # another split, whose name begins alike
    assert list(load_rows("openai/gsm8k", "main", "train")) == ROWS
    (folder / "train.jsonl.gz").write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    (folder / "train.jsonl").unlink()
    assert list(load_rows("openai/gsm8k", "main", "train")) == ROWS
    pq.write_table(pa.Table.from_pylist(ROWS[:6]), folder / "train-00000-of-00002.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(ROWS[6:]), folder / "train-00001-of-00002-abc.parquet")
    rows = load_rows("openai/gsm8k", "main", "train")
    assert list(rows) == ROWS and rows[7] == rows[-3] == ROWS[7]
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match="1 of 2 files of the split train"):
        load_rows("openai/gsm8k", "main", "train")


def test_folders_without_subsets_and_the_mirror(hub, tmp_path, monkeypatch):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    repo = "HuggingFaceTB/smol-smoltalk"
    (hub / repo / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "source": "x"}]), hub / repo / "data/test.parquet")
    assert SmolTalk("test")[0] == {"messages": messages}
    write_lines(tmp_path / "mirror" / repo / "test.jsonl", [{"messages": messages}] * 3)
    monkeypatch.setenv("NANOCHAT_MIRROR_DIR", str(tmp_path / "mirror"))
    assert len(SmolTalk("test")) == 3


def test_through_the_library(hub, monkeypatch):
    calls = []
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset",
                        lambda *args, **kwargs: calls.append((args, kwargs)) or ROWS)
    assert GSM8K("main", "test")[3]["messages"][0]["content"] == "q3"
    assert calls == [(("openai/gsm8k", "main"), {"split": "test"})]


@pytest.mark.parametrize("name", ["ARC-Easy", "MMLU", "GSM8K", "HumanEval", "SmolTalk"])
def test_missing_data_says_which_and_where(hub, name):
    with pytest.raises(UserError, match=r"can't be had from the hub \(Couldn't reach it\).*test\.jsonl into .*/hub/"):
        get_task(name, "test")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("test.jsonl", b'{"question": "q", "answer": "a"}\n{"question": ', r"test\.jsonl:2 is not JSON"),
    ("test.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "\xff"}', "UTF-8 text"),
    ("test.jsonl", b"", "is empty"),
    ("test.jsonl", b'{"text": "q"}', "has no column 'question'"),
    ("test.jsonl", b"[1]", "has no column 'question'"),
    ("test.jsonl.gz", gzip.compress(b'{"question": "q"}' * 99, mtime=0)[:-9], "not a whole gzip file"),
    ("test.jsonl.gz", b"plain", "not a whole gzip file"),
    ("test.parquet", b"PAR1 and no more", "can't be read as parquet")], ids=range(8))
def test_damaged_files_are_named(hub, name, content, message):
    path = hub / "openai/gsm8k/main" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        GSM8K("main", "test")
    assert str(path) in str(error.value)


def test_parquet_without_rows(hub):
    (hub / "openai/gsm8k/main").mkdir(parents=True)
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), hub / "openai/gsm8k/main/test.parquet")
    with pytest.raises(UserError, match="has no rows"):
        GSM8K("main", "test")


def test_rows_take_little_memory_and_time(tmp_path):
    """Rows stay as the file has them; one is made into objects when it is asked for."""
    messages = [{"role": role, "content": "word " * 50} for role in ("user", "assistant")]
    table = pa.Table.from_pylist([{"messages": messages}] * 5000)
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=100)
    rows = TableRows([tmp_path / "train.parquet"])
    assert isinstance(rows.table, pa.Table) and rows[4999] == {"messages": messages}
    lines = JsonLines(write_lines(tmp_path / "train.jsonl", [{"messages": messages}] * 10))
    assert all(isinstance(line, bytes) for line in lines.lines) and lines[9] == {"messages": messages}


# ---------------------------------------------------------------------------------------------------------------------
# The hub's datasets


def check_choices(task, num_rows):
    assert task.eval_type == "categorical" and len(task) == num_rows
    letters = Counter()
    for conversation in task:
        parse_conversation(conversation)
        question, answer = (message["content"] for message in conversation["messages"])
        num_choices = len(conversation["letters"])
        assert answer in conversation["letters"]
        assert re.findall("=(.)$", question, re.MULTILINE)[-num_choices:] == list(conversation["letters"])
        assert task.evaluate(conversation, answer) and task.evaluate(conversation, f" {answer}\n")
        assert not any(task.evaluate(conversation, letter) for letter in (*conversation["letters"], "", f"{answer}.")
                       if letter != answer)
        letters[answer] += 1
    assert all(letters[letter] > 0.15 * num_rows for letter in "ABCD")  # no letter is the answer to all
    return task


def test_arc(real_hub):
    first = check_choices(ARC("ARC-Easy", "test"), 2376)[0]
    assert first["messages"][0]["content"].startswith(
        "Which statement best explains why photosynthesis is the foundation of most food webs?\n"
        "- Sunlight is the source of energy for nearly all ecosystems.=A\n")
    check_choices(ARC("ARC-Challenge", "validation"), 299)
    assert len(get_task("ARC-Easy", "train", start=1, step=2)) == 1125


def test_arc_numbers_its_choices_with_letters(hub):
    row = {"question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    write_lines(hub / "allenai/ai2_arc/ARC-Easy/test.jsonl", [row])
    conversation = ARC("ARC-Easy", "test")[0]
    assert conversation["letters"] == ("A", "B", "C") and get_reference(conversation) == "C"


def test_mmlu(real_hub):
    task = check_choices(MMLU("all", "test"), 7032)
    assert len({conversation["subject"] for conversation in task}) == 57
    check_choices(get_task("MMLU", "train"), 8275)
    assert len(get_task("MMLU", "validation")) == 1531


def test_mmlu_auxiliary_train_as_the_hub_has_it(hub):
    row = {"train": {"question": "q", "subject": "", "choices": ["1", "2", "3", "4"], "answer": 2}}
    (hub / "cais/mmlu/auxiliary_train").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([row]), hub / "cais/mmlu/auxiliary_train/train-00000-of-00001.parquet")
    assert get_reference(get_task("MMLU", "train")[0]) == "C"
    write_lines(hub / "cais/mmlu/all/test.jsonl", [{"question": "q"}])
    with pytest.raises(UserError, match="no column 'subject'"):
        MMLU("all", "test")


def test_gsm8k(real_hub):
    task = GSM8K("main", "train")
    assert len(task) == 7473 and task.eval_type == "generative"
    num_calls = num_equal = 0
    for index, conversation in enumerate(task):
        parse_conversation(conversation)
        question, parts = (message["content"] for message in conversation["messages"])
        # nothing is lost or invented: but for what the calculator writes, the parts are the published solution
        spelled = {"text": "{}", "python": "<<{}=", "python_output": ">>"}
        written = "".join(spelled[part["type"]].format(part["text"]) for part in parts)
        assert written == re.sub(r"(<<[^<>]*=)[^<>=]*>>", r"\1>>", task.rows[index]["answer"])
        assert all("<<" not in part["text"] for part in parts)
        calls = [(call["text"], output["text"]) for call, output in zip(parts, parts[1:], strict=False)
                 if call["type"] == "python"]
        num_calls += len(calls)
        num_equal += sum(calculate(call) == output for call, output in calls)
        assert task.reward(conversation, parts[-1]["text"]) == 1.0
    assert num_calls > 20_000 and num_equal > 0.999 * num_calls  # the others can't be calculated
    first = task[0]
    for answer, right in (("#### 72", True), ("it is 72", False), ("#### 73", False), ("", False), ("#### 72.", True)):
        assert task.evaluate(first, answer) is right
    assert len(get_task("GSM8K", "test")) == 1055


def test_gsm8k_commas_do_not_matter(hub):
    write_lines(hub / "openai/gsm8k/main/test.jsonl", [{"question": "q", "answer": "<<1200*2=2400>>2400\n#### 2,400"}])
    task = GSM8K("main", "test")
    assert task.evaluate(task[0], "#### 2400") and task.evaluate(task[0], "#### 2,400")
    assert split_calls("a <<1+1=2>>2.") == [{"type": "text", "text": "a "}, {"type": "python", "text": "1+1"},
                                           {"type": "python_output", "text": "2"}, {"type": "text", "text": "2."}]
    parts = split_calls("<<32*.5=16.00>> <<2/5=.4>> <<3/4=3/4>> <<x+1=5>> <<1,000*2=2,000>>")
    outputs = [part["text"] for part in parts if part["type"] == "python_output"]
    assert outputs == ["16", "0.4", "0.75", "5", "2000"]  # the calculator's, where it has one


def run_program(code, timeout, maximum_memory_bytes):
    """A stand-in for the sandbox, for code that is known to be harmless."""
    assert 0 < timeout <= 60 and maximum_memory_bytes >= 2**27
    try:
        exec(code, {})
        return types.SimpleNamespace(success=True)
    except Exception:
        return types.SimpleNamespace(success=False)


def test_humaneval(real_hub, monkeypatch):
    monkeypatch.setattr("tasks.humaneval.execute_many", lambda programs, timeout, memory, *_: [
        run_program(program, timeout, memory) for program in programs])
    task = get_task("HumanEval", "test")
    assert len(task) == 131
    for index in range(0, 131, 7):
        conversation, row = task[index], task.rows[index]
        whole, body = get_reference(conversation), row["canonical_solution"]
        function = whole[whole.index(f"def {row['entry_point']}("):]    # without the prompt's imports
        for answer in (whole, body, function, f"Sure:\n```python\n{whole}```\nDone.", f"```\n{body}\n```",
                       f"```py\n{function}"):
            assert task.evaluate(conversation, answer), (row["task_id"], answer)
        for answer in ("", "    return None", "```python\n```", f"def {row['entry_point']}(*args):\n    return 7.5",
                       "def something_else(): pass", "not Python"):
            assert not task.evaluate(conversation, answer), (row["task_id"], answer)


def test_humaneval_program():
    program = build_program('import math\n\ndef f(x):\n    """Root."""\n', "    return math.sqrt(x)",
                            "def check(c):\n    assert c(4) == 2", "f")
    assert run_program(program, 1, 2**30).success and program.endswith("check(f)\n")
