"""lm-evaluation-harness: its requests equal slow sums, for any batch; the package itself, and its own class for
transformers, where they are installed."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from nanochat.export import Source, export_model
from nanochat.harness import Harness, compare_core, evaluate, load_tasks, make_core_row, make_lm, write_core_tasks
from nanochat.loss_eval import choose_shots, evaluate_rules, render_prompts, score_task
from nanochat.loss_eval import load_tasks as load_core_tasks
from scripts import lm_eval as script
from tests.eval_helpers import CORE_CONFIG, make_tokenizer, write_bundle
from tests.helpers import make_model

T = CORE_CONFIG.sequence_len
TOKENIZER = make_tokenizer()
BOS = TOKENIZER.get_bos_token_id()
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is the 1 odd?"},
                {"role": "assistant", "content": "yes, the 1"}, {"role": "user", "content": " 2?\n"}]


def make_writer(seed=0):
    """A model that writes text: special tokens are never the likeliest ones."""
    model = make_model(CORE_CONFIG, seed=seed)
    with torch.no_grad():
        model.lm_head.weight[BOS:] = 0
    return model


@pytest.fixture(scope="module")
def model():
    return make_writer()


@pytest.fixture(scope="module")
def harness(model):
    return Harness(model, TOKENIZER)


def ask(*args):
    return SimpleNamespace(args=args)


def score_slowly(model, row, num_scored):
    """(log-probability, is greedy) of the last tokens of one row."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([row[:-1]]))[0].double().log_softmax(-1)    # (T, V)
    targets = row[1:]
    places = range(len(targets) - num_scored, len(targets))
    return (sum(log_probs[i, targets[i]].item() for i in places),
            all(int(log_probs[i].argmax()) == targets[i] for i in places))


def find_greedy(model, text, num_tokens):
    """What the model likes to write after a text."""
    ids = TOKENIZER.encode(text, prepend=BOS)
    return list(model.generate(ids, num_tokens, temperature=0))


def assert_scores(scores, expected):
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    for (total, _), (expected_total, _) in zip(scores, expected, strict=True):
        assert total == pytest.approx(expected_total, abs=1e-4, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The three requests


def test_loglikelihood(harness, model):
    pairs = [("Is the", " odd"), ("Is the ", "odd"), ("", "Is"), ("Is", " the \n"), ("a" * 40, "b" * 30),
             ("Is the", " 1"), ("Is the", " 12345"), ("count on: 1, 2,", " 3"), ("count on: 1, 2,", " 4")]
    expected = []
    for context, continuation in pairs:
        context_ids = TOKENIZER.encode(context.rstrip())
        ids = TOKENIZER.encode(context + continuation)
        expected.append(score_slowly(model, [BOS, *ids], len(ids) - len(context_ids)))
    assert_scores(harness.loglikelihood([ask(*pair) for pair in pairs]), expected)
    # Blanks belong to the words after them, whichever side they come from
    assert harness.encode_pair("Is the ", "odd") == harness.encode_pair("Is the", " odd")


def test_loglikelihood_knows_the_greedy_continuation(harness, model):
    ids = find_greedy(model, "Is the", 12)
    (_, is_greedy), = harness.score([(TOKENIZER.encode("Is the"), ids)])
    assert is_greedy
    (_, is_greedy), = harness.score([(TOKENIZER.encode("Is the"), [*ids[:-1], (ids[-1] + 1) % 256])])
    assert not is_greedy


def test_token_that_spans_context_and_continuation_is_scored(harness, model):
    """' t' and 'th' are tokens: the continuation has none of its own."""
    context, continuation = harness.encode_pair("a t", "h")
    assert context + continuation == TOKENIZER.encode("a th") and continuation
    ids = TOKENIZER.encode("a th")
    assert_scores(harness.loglikelihood([ask("a t", "h")]), [score_slowly(model, [BOS, *ids], len(continuation))])
    assert harness.encode_pair("t", "h") == ([], [257])
    assert harness.loglikelihood([ask("a", "")]) == [(0.0, True)]


def test_long_context_keeps_bos_and_its_end(harness, model):
    context, continuation = "abcdefghij" * 30, "klmno"
    row = [BOS, *TOKENIZER.encode(context)[-(T - 5):], *TOKENIZER.encode(continuation)]
    assert len(row) == T + 1    # the last is no input
    assert_scores(harness.loglikelihood([ask(context, continuation)]), [score_slowly(model, row, 5)])


@pytest.mark.parametrize("num_chars", [0, 1, T - 1, T, T + 1, 2 * T - 2, 2 * T - 1, 2 * T, 3 * T + 7])
def test_rolling_scores_each_token_once(harness, model, num_chars):
    text = "".join("abcdefghijklmnop"[i * i % 16] for i in range(num_chars))
    ids = TOKENIZER.encode(text)
    expected, start = score_slowly(model, [BOS, *ids[:T]], min(T, num_chars))[0] if ids else 0.0, T
    while start < len(ids):    # bos, and one token before, at least; the last row is full
        end = min(start + T - 1, len(ids))
        expected += score_slowly(model, [BOS, *ids[end - T:end]], end - start)[0]
        start = end
    (total,) = harness.loglikelihood_rolling([ask(text)])
    assert total == pytest.approx(expected, abs=1e-3)


def test_any_batch_gives_the_same(model):
    """In the order of the requests, whatever order they are computed in."""
    requests = [ask("Is the odd " * (i % 5), " 1, 2, the 3"[:3 + i % 9]) for i in range(40)] * 2
    one, eight = (Harness(model, TOKENIZER, batch_size) for batch_size in (1, 8))
    assert_scores(one.loglikelihood(requests), eight.loglikelihood(requests))
    texts = [ask("the dog " * i) for i in (0, 20, 3, 40)]
    assert one.loglikelihood_rolling(texts) == pytest.approx(eight.loglikelihood_rolling(texts), abs=1e-3)
    prompts = [ask("Is the odd " * (i % 3), {"max_gen_toks": 4 + i}) for i in range(10)]
    assert one.generate_until(prompts) == eight.generate_until(prompts)


def test_generate_until(harness, model):
    texts = {context: TOKENIZER.decode(find_greedy(model, context, 20)) for context in ("Is the", "count on: 1, 2,")}
    greedy = {"max_gen_toks": 20, "until": [], "do_sample": False, "temperature": 0.0}
    assert harness.generate_until([ask(context, greedy) for context in texts]) == list(texts.values())
    text = texts["Is the"]
    stop = text[5:7]
    assert harness.generate_until([ask("Is the", greedy | {"until": ["zzz", stop]}), ask("Is the", greedy | {
        "until": stop})]) == [text[:text.index(stop)]] * 2
    (long,) = harness.generate_until([ask("abcdefghij" * 30, {"max_gen_toks": 8})])
    kept = TOKENIZER.encode("abcdefghij" * 30)[-(T - 9):]
    assert long == TOKENIZER.decode(list(model.generate([BOS, *kept], 8, temperature=0)))


def test_a_prompt_that_is_asked_again_is_sampled_anew(harness):
    requests = [ask("Is the", {"max_gen_toks": 12, "do_sample": True})] * 4
    texts = harness.generate_until(requests)
    assert len(set(texts)) > 2 and harness.generate_until(requests) == texts


def test_settings_of_generation(harness):
    request = harness.make_request("a", {"until": ["", "x"]})
    assert (request.temperature, request.max_tokens, request.stop) == (0.0, T // 2, ("x",))
    request = harness.make_request("a", {"until": None, "temperature": None})
    assert (request.temperature, request.stop) == (0.0, ())
    request = harness.make_request("a", {"do_sample": True, "top_k": 5, "top_p": 0.9, "max_tokens": 3}, sample=7)
    assert (request.temperature, request.top_k, request.top_p) == (1.0, 5, 0.9)
    assert (request.max_tokens, request.sample) == (3, 7)
    assert harness.make_request("a", {"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert harness.make_request("a", {"temperature": 0.7}).temperature == 0.7
    with pytest.raises(UserError, match="asks for generation with num_beams, which nanochat's engine doesn't have"):
        harness.make_request("a", {"num_beams": 4})


def test_conversations(model):
    harness = Harness(model, TOKENIZER)
    assert harness.encode("<|bos|>") == TOKENIZER.encode("<|bos|>")    # plain text until there is a conversation
    text = harness.apply_chat_template(CONVERSATION)
    prompt = TOKENIZER.render_for_completion({"messages": CONVERSATION})
    assert [BOS, *harness.encode(text)] == prompt
    context, continuation = harness.encode_pair(text, "yes")
    assert [BOS, *context] == prompt and continuation == TOKENIZER.encode("yes")
    begun = [*CONVERSATION, {"role": "assistant", "content": "The answer is"}]
    text = harness.apply_chat_template(begun, add_generation_prompt=False)
    assert [BOS, *harness.encode(text)] == [*prompt, *TOKENIZER.encode("The answer is")]
    assert harness.make_request(text, {"max_gen_toks": 4}).tokens == [*prompt, *TOKENIZER.encode("The answer is")]


# ---------------------------------------------------------------------------------------------------------------------
# CORE in the harness


def test_rows_are_the_prompts_of_core(tmp_path):
    for task in load_core_tasks(write_bundle(tmp_path)):
        rows = task.choose_rows(None)
        for i, row in enumerate(rows):
            shots = choose_shots(task, rows, i)
            made, prompts = make_core_row(task, row, shots), render_prompts(task, row, shots)
            if task.kind == "multiple_choice":
                assert [made["context"] + ending for ending in made["endings"]] == prompts
            elif task.kind == "schema":
                assert [context + made["ending"] for context in made["contexts"]] == prompts
            else:
                assert made["context"] + made["ending"] == prompts[1]


def test_sum_in_place_of_mean(tmp_path):
    model = make_writer(seed=5)
    task, harness = replace(load_core_tasks(write_bundle(tmp_path))[0], num_shots=1), Harness(model, TOKENIZER)
    assert task.kind == "multiple_choice"
    rows, num_right = task.choose_rows(None), 0
    for i, row in enumerate(rows):
        made = make_core_row(task, row, choose_shots(task, rows, i))
        totals = [total for total, _ in harness.loglikelihood([ask(made["context"], end) for end in made["endings"]])]
        num_right += totals.index(max(totals)) == row["gold"]
    core, summed = evaluate_rules(model, TOKENIZER, task)
    assert summed == num_right / len(rows) != core


def test_why_numbers_differ(tmp_path):
    model = make_writer(seed=5)
    odd, dogs, count = load_core_tasks(write_bundle(tmp_path))
    core, summed = evaluate_rules(model, TOKENIZER, odd)
    row = compare_core(model, TOKENIZER, odd, None, {"acc,none": summed, "acc_norm,none": 0.25})
    assert (row["CORE"], row["by sum"], row["acc"], row["acc_norm"]) == (core, summed, summed, 0.25)
    assert core != summed and row["why"] == "sum, not mean"
    short = make_model(replace(CORE_CONFIG, sequence_len=48))
    row = compare_core(short, TOKENIZER, odd, None, {"acc,none": 2.0})
    assert row["why"].endswith("14 of 14 prompts cut, in CORE with their bos")
    long = replace(odd, num_shots=0, rows=[row | {"choices": ["yes " * T, "yes", "no"]} for row in odd.rows])
    row = compare_core(model, TOKENIZER, long, 4, {"acc,none": 2.0})
    assert row["why"].endswith("4 of 4 prompts cut, in CORE with their bos")
    row = compare_core(model, TOKENIZER, count, 5, {"acc,none": 2.0})
    assert row["why"] == "rounding" and row["items"] == 5
    alike = [row | {"context_options": [context + " the" for context in row["context_options"]]} for row in dogs.rows]
    row = compare_core(model, TOKENIZER, replace(dogs, rows=alike[:4] + dogs.rows[4:]), None, {"acc,none": 2.0})
    assert row["why"].endswith("4 of 9 with other tokens where context and ending meet")
    accuracy = score_task(model, TOKENIZER, dogs)["accuracy"]
    assert compare_core(model, TOKENIZER, dogs, None, {"acc,none": accuracy})["why"] == "same"


def make_record(tasks, limit=None, **more):
    return {"lm_eval": "0.4.13", "model": "abc", "dtype": "float32", "limit": limit, "num_fewshot": None, "chat": False,
            "core_tasks": [], "results": {task: {"acc,none": score} for task, score in tasks.items()},
            "n-shot": dict.fromkeys(tasks, 0), "versions": dict.fromkeys(tasks, "1"), **more}


def test_no_result_is_lost(tmp_path, monkeypatch):
    """Tasks evaluated one by one are one evaluation; other settings, and CORE's table, stand beside it."""
    path, records = tmp_path / "runs" / "base" / "toy" / "lm_eval_000020.json", []
    assert script.read_records(path) == []
    path.parent.mkdir(parents=True)
    core = make_record({"core_copa": 0.5}, core_tasks=["copa"], core=[{"task": "copa", "CORE": 0.5}])
    for record in (make_record({"a": 0.1}), make_record({"b": 0.2}, limit=5), core, make_record({"c": 0.3, "a": 0.4})):
        records = script.join_records(records, record)
        path.write_text(json.dumps(records))
        records = script.read_records(path)
    assert [record["results"] for record in records] == [
        {"b": {"acc,none": 0.2}}, core["results"], {"a": {"acc,none": 0.4}, "c": {"acc,none": 0.3}}]
    assert records[-1]["n-shot"] == {"a": 0, "c": 0} and records[1] == core
    path.write_text(json.dumps(make_record({"a": 0.1})))    # of an older version
    assert script.read_records(path) == [make_record({"a": 0.1})]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    script.report(records, path.parent, {"stage": "base", "step": 20}, [], 0.0)
    tasks, both = json.loads((tmp_path / "report" / "lm_eval_base.json").read_text())["tables"]
    assert [(row[0], row[-1]) for row in tasks["rows"]] == [
        ("b", "5 items, float32"), ("core_copa", "all items, float32"), ("a", "all items, float32"),
        ("c", "all items, float32")]
    assert both["rows"] == [["copa", 0.5]]
    for text in ("[1]", "{", '[{"results": 1, "n-shot": {}}]', "null"):
        path.write_text(text)
        with pytest.raises(UserError, match="lm_eval_000020.json, the results so far, can't be read .*; move it away"):
            script.read_records(path)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)    # as if it weren't installed
    with pytest.raises(UserError, match="needs the package lm_eval, which isn't installed.*: pip install lm_eval"):
        script.main(["--tasks", "mine"])


@pytest.mark.parametrize(("argv", "reason"), [
    ([], "name the --tasks to evaluate, or --core"), (["--tasks", ","], "name the --tasks to evaluate, or --core"),
    (["--tasks", "a", "--bundle", "b"], "--bundle has the tasks of CORE"),
    (["--core", "--limit", "0"], "--limit 0 must be at least 1"),
    (["--core", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
    (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1 must be 0 or more"),
    (["--core", "--apply-chat-template"], "the prompts of --core are plain text")])
def test_flags_that_mean_nothing(argv, reason):
    with pytest.raises(UserError, match=reason):
        script.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------------
# In the package itself

QUESTIONS = [{"question": f"Is {n} odd?", "choices": ["no", "yes, it is", "yes"], "gold": 2 * (n % 2)}
             for n in range(20)]


def write_tasks(folder):
    """Three tasks of 20 rows, offline: choices, texts longer than the context, answers to write."""
    folder.mkdir()
    rows = [row | {"text": f"{n} men saw the dog. " * (n + 1), "answer": "the"} for n, row in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": {
        "data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}}
    def measure(*names):
        return {"metric_list": [{"metric": name} for name in names]}
    tasks = {
        "choices": {"output_type": "multiple_choice", "doc_to_text": "{{question}}\nAnswer:",
                    "doc_to_choice": "choices", "doc_to_target": "gold", "num_fewshot": 1,
                    **measure("acc", "acc_norm")},
        "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
                  **measure("bits_per_byte", "word_perplexity")},
        "answers": {"output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
                    "generation_kwargs": {"until": ["e"], "max_gen_toks": 12}, **measure("exact_match")}}
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["choices", "answers"]}))
    return folder


@pytest.mark.engines
def test_offline_tasks(tmp_path, model, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm_eval isn't installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    tasks = load_tasks(["choices", "texts", "answers"], [write_tasks(tmp_path / "tasks")])
    found = evaluate(make_lm(model, TOKENIZER, 8), tasks, bootstrap_iters=0)
    samples = found["samples"]
    assert {name: len(rows) for name, rows in samples.items()} == {"choices": 20, "texts": 20, "answers": 20}
    num_right = 0
    for sample in samples["choices"]:
        assert sample["arguments"][0][0].count("Answer:") == 2    # one shot
        totals = []
        for (context, continuation), (total, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            ids, start = TOKENIZER.encode(context + continuation), len(TOKENIZER.encode(context))
            row = [BOS, *ids[:start][-(T - len(ids) + start):], *ids[start:]]
            totals.append(score_slowly(model, row, len(ids) - start)[0])
            assert total == pytest.approx(totals[-1], abs=1e-4)
        num_right += totals.index(max(totals)) == sample["doc"]["gold"]
    assert found["results"]["choices"]["acc,none"] == pytest.approx(num_right / 20)
    texts = [sample["doc"]["text"] for sample in samples["texts"]]
    nats = -sum(Harness(model, TOKENIZER).loglikelihood_rolling([ask(text) for text in texts]))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert found["results"]["texts"]["bits_per_byte,none"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)
    for sample in samples["answers"]:
        assert "e" not in sample["filtered_resps"][0]
    again = evaluate(make_lm(model, TOKENIZER, 1), tasks, bootstrap_iters=0)
    for name, values in found["results"].items():
        numbers = {key: value for key, value in values.items() if isinstance(value, float)}
        assert numbers == pytest.approx({key: again["results"][name][key] for key in numbers}, rel=1e-5)


@pytest.mark.engines
def test_same_as_the_export_in_transformers(tmp_path, model, harness, monkeypatch):
    """Where texts fit into the context; HFLM needs its bos told: with it for pairs, without for whole texts."""
    package = pytest.importorskip("lm_eval", reason="lm_eval isn't installed")
    theirs = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval[hf] isn't installed").HFLM
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    meta = {"stage": "sft", "step": 7, "run_dir": str(tmp_path / "runs" / "sft" / "toy"),
            "tokenizer": {"name": "default", "hash": TOKENIZER.hash}}
    export_model(Source(model, TOKENIZER, meta), tmp_path / "out", "custom", "float32")
    lms = {is_pair: theirs(pretrained=str(tmp_path / "out"), trust_remote_code=True, dtype="float32", device="cpu",
                           batch_size=4, add_bos_token=is_pair) for is_pair in (True, False)}

    def make(kind, *args):
        return [package.api.instance.Instance(request_type=kind, doc={}, arguments=args, idx=0)]
    pairs = [(f"Is the {n} odd " * (n % 4 + 1), (" 1, 2, the 3" * 2)[:3 + n]) for n in range(20)] + [("", "the dog")]
    requests = sum((make("loglikelihood", *pair) for pair in pairs), [])
    assert_scores(harness.loglikelihood(requests), lms[True].loglikelihood(requests))
    requests = sum((make("loglikelihood_rolling", "the dog " * n) for n in (1, 5, 11)), [])
    expected = lms[False].loglikelihood_rolling(requests)
    assert harness.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-4)
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    requests = sum((make("generate_until", f"Is {n} odd?", settings) for n in range(12)), [])
    assert harness.generate_until(requests) == lms[True].generate_until(requests)
    chat = Harness(model, TOKENIZER)
    text = lms[True].apply_chat_template(CONVERSATION)
    assert chat.apply_chat_template(CONVERSATION) == text
    requests = make("loglikelihood", text, "yes") + make("loglikelihood", text, " no")
    assert_scores(chat.loglikelihood(requests), lms[True].loglikelihood(requests))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A base folder with a model, its tokenizer, a bundle and tasks; returns the flags that all calls share."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    TOKENIZER.save(tmp_path / "tokenizer" / "default")
    write_bundle(tmp_path / "eval_bundle")
    write_tasks(tmp_path / "tasks")
    model = make_writer()
    meta = {"model_config": vars(CORE_CONFIG), "tokenizer": {"name": "default", "hash": TOKENIZER.hash}}
    for stage in ("base", "sft"):
        save_checkpoint(tmp_path / "runs" / stage / "d3", 20, model, model.setup_optimizer(), meta)
    return ["--task-dir", str(tmp_path / "tasks"), "--device-type", "cpu", "--dtype", "float32"]


@pytest.mark.engines
def test_script(run, tmp_path, model, capsys):
    pytest.importorskip("lm_eval", reason="lm_eval isn't installed")
    result = script.main([*run, "--source", "base", "--tasks", "texts", "--core", "--limit", "6"])
    printed = capsys.readouterr().out
    assert "by sum" in printed and "mean, centered" in printed and "bits_per_byte" in printed
    rows = {row["task"]: row for row in result["core"]}
    for task in load_core_tasks():
        row, values = rows[task.label], result["results"][f"core_{task.label}"]
        assert row["CORE"] == score_task(model, TOKENIZER, task, 6)["accuracy"] and row["acc"] == values["acc,none"]
        assert row["items"] == 6
    assert rows["dogs"]["why"] == "same"
    core = sum(task.center(rows[task.label]["CORE"]) for task in load_core_tasks()) / 3
    assert result["centered"]["CORE"] == pytest.approx(core)
    (saved,) = json.loads((tmp_path / "runs" / "base" / "d3" / "lm_eval_000020.json").read_text())
    assert saved["results"]["texts"]["bits_per_byte,none"] > 0 and saved["limit"] == 6
    assert (tmp_path / "lm_eval_core_6" / "core_odd.yaml").is_file()
    section = json.loads((tmp_path / "report" / "lm_eval_base.json").read_text())
    assert section["values"]["model"] == "runs/base/d3" and "run" not in section    # whose curve it would take
    assert [table["title"] for table in section["tables"]] == ["Tasks", "CORE and the harness"]
    result = script.main([*run, "--source", "sft", "--tasks", "both", "--apply-chat-template",
                          "--num-fewshot", "2", "--limit", "3"])
    assert result["n-shot"]["choices"] == 2 and result["chat"] is True


@pytest.mark.engines
def test_script_refuses(run, tmp_path):
    pytest.importorskip("lm_eval", reason="lm_eval isn't installed")
    with pytest.raises(UserError, match="a base model knows no conversations"):
        script.main([*run, "--source", "base", "--tasks", "texts", "--apply-chat-template"])
    with pytest.raises(UserError, match="there is no task txts, neither in --task-dir nor"):
        script.main([*run, "--source", "base", "--tasks", "txts"])
    with pytest.raises(UserError, match="--task-dir nowhere is no folder"):
        script.main(["--task-dir", "nowhere", "--tasks", "texts"])
    (tmp_path / "tasks" / "rows.jsonl").unlink()
    with pytest.raises(UserError, match="the tasks can't be loaded .*; a task's data comes from the network, unless"):
        script.main([*run, "--source", "base", "--tasks", "texts"])


def test_files_for_the_harness(tmp_path):
    write_bundle(tmp_path / "bundle")
    names = write_core_tasks(load_core_tasks(tmp_path / "bundle"), tmp_path, 4)
    assert names == ["core_odd", "core_dogs", "core_count"]
    for name in ("odd", "dogs", "count"):
        task = yaml.safe_load((tmp_path / f"core_{name}.yaml").read_text())
        (path,) = task["dataset_kwargs"]["data_files"].values()
        with open(path) as file:
            rows = [json.loads(line) for line in file]
        fields = {task[key] for key in ("doc_to_text", "doc_to_target", "doc_to_choice") if key in task}
        assert len(rows) == 4 and all(fields == row.keys() for row in rows)
    dates = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}    # the same rows are cached once
    write_core_tasks(load_core_tasks(tmp_path / "bundle"), tmp_path, 4)
    assert dates == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    write_core_tasks(load_core_tasks(tmp_path / "bundle"), tmp_path, 3)
    assert all(len(path.read_text().splitlines()) == 3 for path in dates)
