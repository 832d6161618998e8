"""The tasks that are made here: spelling, arithmetic, identity, Python's documentation; and where words come from."""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from data_helpers import Server

from nanochat import download
from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.dataset import main as make_dataset
from nanochat.tokenizer import check_messages
from tasks import arithmetic
from tasks import words as words_module
from tasks.arithmetic import Arithmetic, draw_problem, is_test_problem
from tasks.catalog import get_task
from tasks.common import get_reference, is_test, make_rng
from tasks.embedded import IDENTITY, Identity, PythonDocs, find_sentence, iter_docstrings, make_conversation
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.words import collect_words, load_words, read_list

REPO_DIR = Path(__file__).parents[1]
REAL_LIST = REPO_DIR.parent / "shared" / "data" / "tasks" / "words_alpha.txt.gz"
WORDS = ["strawberry", "banana", "mississippi", "apple", "harbour", "quay", "yellow", "winter", "letter", "cloud",
         "engine", "garden", "pepper", "silver", "ribbon", "coffee", "rabbit", "summer", "tunnel", "window", "zebra",
         "orange", "purple", "basket", "cotton", "dinner", "flower", "guitar", "hammer", "island", "jacket", "kitten"]


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_MIRROR_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(words_module, "LIST_URL", "http://127.0.0.1:9/words_alpha.txt")   # where nobody listens
    return tmp_path


def make_tasks(split, size=2000):
    return [SimpleSpelling(split, size, words=WORDS), SpellingBee(split, size, words=WORDS), Arithmetic(split, size),
            Identity(split, size)]


def parts_of(conversation):
    content = conversation["messages"][-1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def decode_answer(conversation):
    """The reference answer as the engine's tokens would be decoded."""
    forms = {"text": "{}", "python": "<|python_start|>{}<|python_end|>",
             "python_output": "<|output_start|>{}<|output_end|>"}
    return "".join(forms[part["type"]].format(part["text"]) for part in parts_of(conversation))


def digest(tasks):
    return hashlib.sha256(json.dumps([[task[i] for i in (0, 1, 77, 1999)] for task in tasks]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What holds for all


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_are_well_formed_and_their_references_right(split):
    for task in [*make_tasks(split), PythonDocs(split)]:
        for conversation in task:
            check_messages(conversation)
            assert all(part["text"] for part in parts_of(conversation))
            assert task.evaluate(conversation, decode_answer(conversation))
            assert not task.evaluate(conversation, "")
            if hasattr(task, "reward"):
                assert task.reward(conversation, decode_answer(conversation)) == 1.0
                assert task.reward(conversation, "I don't know") == 0.0


def test_calls_give_what_the_calculator_gives():
    for task in make_tasks("train"):
        for conversation in task:
            parts = parts_of(conversation)
            for call, output in zip(parts, parts[1:], strict=False):
                assert call["type"] != "python" or \
                    output == {"type": "python_output", "text": calculate(call["text"])}


def test_same_in_every_process_and_other_with_another_seed():
    code = ("import sys; sys.path[:0] = ['tests', '.']\n"
            "from test_tasks_made import digest, make_tasks\nprint(digest(make_tasks('train')))")
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO_DIR, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(make_tasks("train"))
    for make in (lambda seed: SpellingBee("train", words=WORDS, seed=seed), lambda seed: Arithmetic("train", seed=seed),
                 lambda seed: Identity("train", seed=seed)):
        assert list(make(1)) == list(make(1)) != list(make(2))


def test_an_example_does_not_depend_on_the_others():
    for small, large in zip(make_tasks("train", 10), make_tasks("train", 10**9), strict=True):
        assert small[7] == large[7]
        assert large[10**9 - 1]


def test_examples_are_made_fast():
    for split in ("train", "test"):
        for task in make_tasks(split):
            start = time.process_time()
            for i in range(1000):
                task[i]
            assert time.process_time() - start < 0.5, type(task)   # 2,000 a second on a busy machine; idle 15,000


@pytest.mark.parametrize("name", ["SpellingBee", "SimpleSpelling", "Arithmetic", "Identity", "PythonDocs"])
def test_unknown_split(name, base_dir):
    with pytest.raises(UserError, match=f"{name} has no split 'val'; choose train or test"):
        get_task(name, "val")


# ---------------------------------------------------------------------------------------------------------------------
# Spelling


@pytest.mark.parametrize("make", [SimpleSpelling, SpellingBee])
def test_train_and_test_words_are_disjoint(make):
    train, test = ({conversation["word"] for conversation in make(split, 3000, seed, words=WORDS)}
                   for split, seed in (("train", 1), ("test", 2)))
    assert train and test and not train & test and train | test == set(WORDS)
    # another list can't move a word to the other side
    other = {conversation["word"] for conversation in make("test", 500, words=[*WORDS[::2], "hello", "world"])}
    assert not other & train


def test_spelling_bee_spells_counts_and_checks():
    absent = 0
    for conversation in SpellingBee("train", 500, words=WORDS):
        text, call, output, final = parts_of(conversation)
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call["text"]).groups()
        spelled, _, *lines = text["text"].split("\n")
        assert spelled.replace(" ", "") == word and [line[0] for line in lines[:len(word)]] == list(word)
        marked = [line for line in lines[:len(word)] if len(line) > 1]
        assert marked == [f"{letter} {i + 1}" for i in range(word.count(letter))]
        assert f"By hand: {word.count(letter)}\n" in text["text"]
        assert output["text"] == str(word.count(letter)) and final["text"].endswith(f"#### {word.count(letter)}")
        question = conversation["messages"][0]["content"]
        assert word in question and re.search(rf"\b{letter}(s|\b)", question)
        absent += word.count(letter) == 0
    assert 10 < absent < 60


def test_questions_vary():
    for make, num_forms in ((SimpleSpelling, 60), (SpellingBee, 250)):
        forms = set()
        for conversation in make("train", 3000, words=["strawberry"]):
            forms.add(conversation["messages"][0]["content"].replace("strawberry", "W"))
        assert len(forms) > num_forms and any('"W"' in form for form in forms) and any("'W'" in form for form in forms)
    assert "How many r are in strawberry?" in {conversation["messages"][0]["content"] for conversation
                                               in SpellingBee("train", 20_000, words=["strawberry"])}


def test_spelling_is_graded_by_its_letters():
    task = SimpleSpelling("train", words=["banana"])
    conversation = task[0]
    for answer, right in (("b a n a n a", True), ("B, A, N, A, N, A.", True), ("banana: b-a-n-a-n-a", True),
                          ("b a n a n", False), ("b a n n a a", False), ("banana", False)):
        assert task.evaluate(conversation, answer) is right


def test_no_word_for_a_split():
    with pytest.raises(UserError, match="no word for its split test; give it more"):
        SimpleSpelling("test", words=[word for word in WORDS if not is_test(word)])


# ---------------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.skipif(not REAL_LIST.exists(), reason=f"the published list is not at {REAL_LIST}")
def test_published_list(base_dir, capsys):
    (base_dir / "words_alpha.txt.gz").write_bytes(REAL_LIST.read_bytes())
    words = load_words()
    assert len(words) > 350_000 and words == sorted(set(words)) and "strawberry" in words
    assert 0.09 < sum(map(is_test, words)) / len(words) < 0.11
    assert not capsys.readouterr().out
    assert read_list(base_dir / "words_alpha.txt.gz") == words


def test_list_is_downloaded_by_command_alone(base_dir, monkeypatch, capsys):
    listed = [first + second + third + fourth for first in "abcdefghij" for second in "aeiou" for third in "klmno"
              for fourth in "stuvwxyz"]
    monkeypatch.setattr(words_module, "MIN_LIST_WORDS", 1000)
    monkeypatch.setattr(download, "MAX_FAILURES", 1)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(words_module, "LIST_URL", server.url)
        server.content, server.script = b"a page that asks to log in\n", ["500"]
        for _ in range(2):  # an error, then a page: neither is kept
            with pytest.raises(UserError, match="the list of words can't be had: .*connect to the network"):
                words_module.main([])
            assert not (base_dir / "words_alpha.txt").exists()
        server.content = "\r\n".join(listed).encode() + b"\r\n"
        num_requests = len(server.requests)
        collected = load_words()
        assert collected != sorted(listed) and len(server.requests) == num_requests    # nothing is fetched by itself
        words_module.main([])
        words_module.main([])
        assert load_words() == sorted(listed) and len(server.requests) == num_requests + 1
        server.shutdown()


def test_words_of_docstrings_then_of_the_corpus(base_dir, tmp_path, capsys):
    words = load_words()
    lines = capsys.readouterr().out.splitlines()
    assert len(words) > 800 and {"return", "string", "value", "number"} <= set(words)
    assert len(lines) == 1 and "Python's docstrings" in lines[0] and "python -m tasks.words" in lines[0]
    rows = [{"text": f"{idx} The harbour, the quay and the Harbour. " * 5} for idx in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": "once xyz."}]))
    make_dataset(["--source", "files", "--path", str(tmp_path / "texts.jsonl"), "--name", "mine"])
    capsys.readouterr()
    assert load_words() == words and not capsys.readouterr().out    # those that were kept
    (base_dir / words_module.KEPT_NAME).unlink()
    found = load_words()
    assert {"harbour", "quay", "the"} <= set(found) and "once" not in found
    assert "the corpus mine" in capsys.readouterr().out
    assert SimpleSpelling("train", words=found)[0]["word"] in found
    (base_dir / "words_alpha.txt").write_text("apple\n")             # a person's own list goes first
    assert load_words() == ["apple"]


def test_collect_words_keeps_words_only():
    text = "Apples and pears, os.path.join(x) snake_case naïve HTTP Server's x1 it bcdfg. " * 3
    assert collect_words([text]) == ["and", "apples", "pears", "server"]


def test_damaged_list(base_dir):
    path = base_dir / "words_alpha.txt.gz"
    for content in (b"no gzip", gzip.compress(b"apple\n" * 1000)[:-9], gzip.compress(b"1\n2\n")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path} .*delete it"):
            load_words()


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def find_problem(conversation):
    left, operator, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", parts_of(conversation)[0]["text"]).groups()
    return int(left), operator, int(right)


def test_arithmetic_problems():
    seen = set()
    for conversation in Arithmetic("train", 5000):
        left, operator, right = find_problem(conversation)
        assert 0 < left < 10_000 and 0 < right < 10_000
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
        assert operator != "/" or value * right == left     # exact
        assert parts_of(conversation)[1]["text"] == str(value)
        assert get_reference(conversation) == f"{left} {operator} {right} = {value}"
        seen.add((operator, len(str(left)), len(str(right))))
    for operator in "+-*":
        assert {(operator, i, j) for i in range(1, 5) for j in range(1, 5)} <= seen


def test_train_and_test_problems_are_disjoint():
    def problems(split, seed):
        found = set()
        for conversation in Arithmetic(split, 8000, seed):
            left, operator, right = find_problem(conversation)
            found.add((min(left, right), operator, max(left, right)) if operator in "+*" else (left, operator, right))
        return found
    train, test = problems("train", 1), problems("test", 2)
    assert len(train) > 5000 and len(test) > 3000 and not train & test
    assert is_test_problem(34, "*", 27) == is_test_problem(27, "*", 34)
    share = sum(is_test_problem(left, "-", right) for left in range(100, 200) for right in range(100, 200)) / 10_000
    assert 0.08 < share < 0.12


def test_what_is_34_times_27_can_be_asked(monkeypatch):
    drawn = {draw_problem(make_rng(i)) for i in range(30_000)}
    products = {(left, right) for left, operator, right in drawn if operator == "*"}
    assert len({left for left, right in products if left >= 10 and 10 <= right <= 99} & {*range(10, 100)}) == 90
    assert len({right for left, right in products if 10 <= left <= 99}) > 90
    split = "test" if is_test_problem(34, "*", 27) else "train"
    monkeypatch.setattr(arithmetic, "draw_problem", lambda rng: (34, "*", 27))
    asked = {conversation["messages"][0]["content"]: conversation for conversation in Arithmetic(split, 300)}
    assert decode_answer(asked["What is 34 * 27?"]) == ("<|python_start|>34*27<|python_end|><|output_start|>918"
                                                        "<|output_end|>34 * 27 = 918")


def test_wordings_vary():
    forms = {re.sub(r"\d+", "N", conversation["messages"][0]["content"]) for conversation in Arithmetic("train", 3000)}
    assert {"What is N * N?", "N/N", "How much is N plus N?", "Calculate N x N."} <= forms and len(forms) > 100


@pytest.mark.parametrize(("answer", "right"), [
    ("34 * 27 = 918", True), ("918", True), ("It is 918.", True), ("The answer: 1,918", False), ("-918", False),
    ("<|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>34 * 27 = 918", True),
    ("<|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>", False),    # it must say so itself
    ("<|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>34 * 27 = 91", False),
    ("918 or 919", False), ("", False), ("nine hundred", False)])
def test_arithmetic_is_graded_by_the_last_number(answer, right):
    reference = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "34 * 27 = 918"}]}]}
    assert Arithmetic("test").evaluate(reference, answer) is right


# ---------------------------------------------------------------------------------------------------------------------
# Identity and Python's documentation


def test_identity():
    for questions, answers in IDENTITY:
        assert len(questions) == len(set(questions)) >= 5 and len(answers) >= 2
        # else an evaluation would have nothing to look for
        assert any(all(key in answer for answer in answers) for key in ("{{name}}", "{{author}}"))
    conversations = list(Identity("train", 3000))
    assert len({json.dumps(conversation["messages"]) for conversation in conversations}) > 500
    questions = {conversation["messages"][0]["content"] for conversation in conversations}
    assert {"Who are you?", "What's your name?", "Who made you?"} <= questions
    assert {len(conversation["messages"]) for conversation in conversations} == {2, 4}
    assert not any("{{" in message["content"] for conversation in conversations for message in conversation["messages"])


def test_identity_is_held_out_by_wording():
    def questions(split):
        return {re.sub(r"\W", "", message["content"].lower()) for conversation in Identity(split, 5000)
                for message in conversation["messages"] if message["role"] == "user"}
    train, test = questions("train"), questions("test")
    held_out = {re.sub(r"\W", "", asked[-1].lower().replace("{{name}}", "nanochat")) for asked, _ in IDENTITY}
    assert held_out <= test and not any(text.endswith(tuple(held_out)) for text in train)


def test_identity_is_graded_by_its_names():
    task = Identity("train", fields={"name": "Ada", "author": "Eve Moss"})
    conversation = next(row for row in task if row["messages"][-2]["content"] == "Who made you?")
    assert conversation["expected"] == ["Eve Moss"] and "Eve Moss" in get_reference(conversation)
    assert task.evaluate(conversation, "It was eve moss!") and not task.evaluate(conversation, "It was Ada.")


def test_templates_of_one_question():
    made = {tuple(message["content"] for message in make_conversation(
        [(["Where?"], ["In {{city}}."])], {"city": "Oslo"}, make_rng(i))["messages"]) for i in range(50)}
    assert made == {("Where?", "In Oslo."), ("where", "In Oslo.")}


def test_python_docs():
    train, test = PythonDocs("train"), PythonDocs("test")
    assert len(train) > 800 and len(test) > 80
    names = [{name for name, _ in task.facts} for task in (train, test)]
    assert not names[0] & names[1]
    facts = dict(train.facts + test.facts)
    assert facts["os.path.join"].startswith("Join two or more pathname components")
    assert "math.sqrt" in facts and "str.upper" in facts and "len" in facts
    for name, sentence in facts.items():
        assert 20 <= len(sentence) <= 200 and sentence[0].isupper() and sentence[-1] in ".!?" and "\n" not in sentence
        assert not re.search(r">>>|->|::", sentence), name
    assert list(train) == list(PythonDocs("train"))
    assert train[0]["messages"][0]["content"].count(train.facts[0][0]) == 1


def test_python_docs_are_graded_by_their_words():
    task = PythonDocs("train")
    conversation = {"messages": [{"role": "assistant", "content": "Return the square root of x."}]}
    assert task.evaluate(conversation, "return the square root of x") == 1.0
    assert task.evaluate(conversation, "Return the cube of x.") == pytest.approx(8 / 11)    # 4 of 5 and of 6 words
    assert task.evaluate(conversation, "Nothing alike") == 0.0


@pytest.mark.parametrize(("doc", "sentence"), [
    ("Return the sum of all items, e.g. of a list. Then more.", "Return the sum of all items, e.g. of a list."),
    ("max(iterable, *[, key=func]) -> value\n\nReturn the biggest\nof the items", "Return the biggest of the items."),
    ("lower case is no sentence here.", None), ("Too short.", None), ("Some kinds are supported here:", None),
    (">>> Some code that is no prose at all", None), ("Word " * 60, None), ("", None)])
def test_find_sentence(doc, sentence):
    assert find_sentence("builtins.max", doc) == sentence


def test_docstrings_are_of_this_python():
    assert dict(iter_docstrings())["textwrap.dedent"].startswith("Remove any common leading whitespace")
