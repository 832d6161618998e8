"""lm-evaluation-harness, by which published models are compared, with a model of ours: pip install lm_eval.

    loglikelihood          of a continuation, in nats, and whether each of its tokens is the likeliest
    loglikelihood_rolling  of a whole text
    generate_until         the Engine's text up to a stop string, with the calculator as its tool

A row that is scored is bos, as much of the text before as fits, and the tokens that count: our models never saw text
without bos. So does the harness with an export in transformers (its HFLM), but that texts which are longer than the
context lose their bos there, and that a context keeps its own tokens where the text after it would merge with them.

CORE in the harness: the same prompts, but its own score, the sum of log-probabilities, where CORE has the mean per
token. T tokens of the context.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import yaml

from nanochat.common import UserError, timed, write_atomic
from nanochat.engine import Engine, Request
from nanochat.loss_eval import (
    BATCH_TOKENS,
    TAIL_TOKENS,
    CoreTask,
    Item,
    Option,
    choose_shots,
    evaluate_rules,
    make_batches,
    make_items,
    render_prompts,
    score_options,
)

MAX_GEN_TOKENS = 256      # of an answer, where a task doesn't say: the harness's own
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")    # the first counts
CORE_PREFIX = "core_"     # of the tasks' names in the harness
# How the harness reads our rows: several endings of a context, several contexts of an ending, one of each
CORE_FIELDS = {
    "multiple_choice":   {"doc_to_text": "context", "doc_to_choice": "endings", "doc_to_target": "gold"},
    "schema":            {"doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "ending"},
    "language_modeling": {"doc_to_text": "context", "doc_to_target": "ending"}}
CORE_METRICS = {"multiple_choice": ("acc", "acc_norm"), "schema": ("acc",), "language_modeling": ("acc",)}


class Harness:
    """The three requests of lm_eval.api.model.LM, which make_lm mixes in; each request's `args` is what is asked."""

    def __init__(self, model, tokenizer, batch_size: int = 64):
        """batch_size: rows at once, at most"""
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.bos, self.T = tokenizer.get_bos_token_id(), model.config.sequence_len
        self.is_chat = False    # whether contexts are conversations, in which special tokens stand by name

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability, and whether it is the greedy one."""
        return self.score([self.encode_pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """For each (text,): its log-probability; each token is scored once, the last ones in a row that is full."""
        return [total for total, _ in self.score([([], self.encode(request.args[0])) for request in requests])]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): the text after it."""
        engine, texts = Engine(self.model, self.tokenizer, self.batch_size), [""] * len(requests)
        for i, request in enumerate(requests):
            engine.submit(self.make_request(*request.args, sample=i), request_id=i)
        with timed(f"generating {len(requests):,} texts"):
            while engine.has_work():
                for event in engine.step():
                    texts[event.request_id] += event.text if event.part == "text" else ""
        return texts

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """A conversation as text, special tokens by name: up to its answer, or to the end of a begun answer.

        From now on names of special tokens are read as these tokens, in the messages themselves, too, as other
        tokenizers do always.
        """
        self.is_chat, conversation = True, {"messages": chat_history}
        if add_generation_prompt:
            return self.tokenizer.decode(self.tokenizer.render_for_completion(conversation))
        ids, _ = self.tokenizer.render_conversation(conversation, max_tokens=None)
        return self.tokenizer.decode(ids[:-1])    # without the answer's end

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache of requests."""
        return f"nanochat-{self.tokenizer.hash}"

    def encode(self, text: str) -> list[int]:
        """Token ids without bos."""
        special = self.tokenizer.get_special_tokens()
        if not self.is_chat:
            return self.tokenizer.encode(text)
        parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
        ids = sum(([special[part]] if part in special else self.tokenizer.encode(part) for part in parts), [])
        return ids[1:] if ids[:1] == [self.bos] else ids

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation; the context's last blanks belong to the continuation, as to its words."""
        stripped = context.rstrip()
        whole, start = self.encode(context + continuation), len(self.encode(stripped))
        if continuation:    # though it should merge with the context's last token
            start = min(start, len(whole) - 1)
        return whole[:start], whole[start:]

    def cut_rows(self, context: list[int], continuation: list[int]) -> Iterator[Option]:
        """Rows of up to T inputs that score each token of the continuation once."""
        text, start = context + continuation, len(context)
        while start < len(text):
            scored = text[start:start + (self.T - 1 if start else self.T)]    # a token of what is before, if any
            before = text[max(0, start - (self.T - len(scored))):start]
            prefix = (self.bos, *before)
            yield Option(prefix[:-1], (prefix[-1], *scored))
            start += len(scored)

    @torch.no_grad()
    def score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) in ids: log-probability in nats, and whether all tokens are the likeliest.
        Rows of similar length are computed together, those of one prefix with that prefix computed once."""
        rows = [list(self.cut_rows(*pair)) for pair in pairs]
        same: dict[tuple, dict[Option, None]] = {}
        for option in (option for options in rows for option in options):
            same.setdefault(option.prefix, {})[option] = None
        items = [Item(options[i:i + self.batch_size], None) for options in map(list, same.values())
                 for i in range(0, len(options), self.batch_size)]
        device, scores = self.model.get_device().type, {}
        with timed(f"scoring {len(pairs):,} texts"), torch.compiler.set_stance("force_eager"):
            for batch in make_batches(items, BATCH_TOKENS[device], TAIL_TOKENS[device]):
                options = [option for item in batch for option in item.options]
                for i in range(0, len(options), self.batch_size):
                    part = options[i:i + self.batch_size]
                    for option, (nll, is_greedy) in zip(part, score_options(self.model, part), strict=True):
                        scores[option] = -nll * (len(option.tail) - 1), is_greedy
        return [(sum(scores[option][0] for option in options), all(scores[option][1] for option in options))
                for options in rows]

    def make_request(self, context: str, settings: dict, sample: int = 0) -> Request:
        """The prompt, cut on the left to leave room for the answer, which has half the context at most, and how it is
        continued: greedily by default."""
        settings = dict(settings)
        lengths = [settings.pop(name) for name in LENGTH_NAMES if name in settings]
        stop, temperature = settings.pop("until", None) or (), float(settings.pop("temperature", None) or 0.0)
        is_sampled, top_k, top_p = (settings.pop(name, None) for name in ("do_sample", "top_k", "top_p"))
        if is_sampled is not None:
            temperature = (temperature or 1.0) if is_sampled else 0.0
        if settings:
            raise UserError(f"a task asks for generation with {', '.join(sorted(settings))}, which nanochat's engine "
                            "doesn't have")
        max_tokens = min(lengths[0] if lengths else MAX_GEN_TOKENS, self.T // 2)
        prompt = self.encode(context)
        prompt = [self.bos, *prompt[max(0, len(prompt) - (self.T - max_tokens - 1)):]]
        stop = tuple([stop] if isinstance(stop, str) else filter(None, stop))
        return Request(prompt, max_tokens, temperature, top_k, top_p, sample=sample, stop=stop)


# The package


def import_package():
    """The package lm_eval; UserError where it isn't installed."""
    try:
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise UserError(f"scripts.lm_eval needs the package lm_eval, which isn't installed ({error}): pip install "
                        "lm_eval") from None
    return lm_eval


def make_lm(model, tokenizer, batch_size: int = 64):
    """The model as the harness takes one, for lm_eval.simple_evaluate(model=...)."""
    base = import_package().api.model.LM
    return type("NanochatLM", (Harness, base), {})(model, tokenizer, batch_size)


def load_tasks(names: Sequence[str], folders: Sequence[Path]) -> list:
    """Tasks and groups by name, from folders of YAML files and, where those don't have all, of the package's own."""
    tasks = import_package().tasks
    if absent := [folder for folder in folders if not folder.is_dir()]:
        raise UserError(f"--task-dir {absent[0]} is no folder; name one with the YAML files of tasks")
    include = [str(folder.resolve()) for folder in folders]
    manager = tasks.TaskManager(include_path=include, include_defaults=False)
    if {*names} - {*manager.all_tasks}:
        manager = tasks.TaskManager(include_path=include)
    if missing := [name for name in names if name not in manager.all_tasks]:
        raise UserError(f"there is no task {missing[0]}, neither in --task-dir nor among those of lm_eval; "
                        "`lm_eval ls tasks` lists those")
    try:
        loaded = manager.load(list(names))
    except Exception as error:    # of the harness, of YAML, of datasets: whatever a task's file leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the tasks can't be loaded ({reason:.200}); a task's data comes from the network, unless its "
                        "YAML names files") from error
    groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
    within = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in loaded["tasks"].items() if name not in within]


def evaluate(lm, tasks: list, **settings) -> dict:
    """lm_eval.simple_evaluate of loaded tasks; by itself it would read the package's 14,000 files of tasks first."""
    package = import_package()
    manager = package.tasks.TaskManager(include_defaults=False)
    return package.simple_evaluate(model=lm, tasks=tasks, task_manager=manager, **settings)


# CORE


def write_core_tasks(tasks: list[CoreTask], folder: Path, max_per_task: int | None) -> list[str]:
    """Each task of CORE as a YAML file and its rows, shots included, for this harness with any model; returns the
    tasks' names."""
    for task in tasks:
        name, rows = CORE_PREFIX + task.label, task.choose_rows(max_per_task)
        data = folder / f"{name}.jsonl"
        lines = (json.dumps(make_core_row(task, row, choose_shots(task, rows, i))) for i, row in enumerate(rows))
        content = "".join(line + "\n" for line in lines).encode()
        if not data.is_file() or data.read_bytes() != content:    # a file of a new date is cached once more
            write_atomic(data, content)
        metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                   for metric in CORE_METRICS[task.kind]]
        write_atomic(folder / f"{name}.yaml", yaml.safe_dump({
            "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0, "target_delimiter": "",
            "dataset_kwargs": {"data_files": {"test": str(data.resolve())}, "cache_dir": str(folder / "cache")},
            "output_type": "loglikelihood" if task.kind == "language_modeling" else "multiple_choice",
            **CORE_FIELDS[task.kind], "metric_list": metrics}))
    return [CORE_PREFIX + task.label for task in tasks]


def make_core_row(task: CoreTask, row: dict, shots: list[dict]) -> dict:
    """A row's prompts, each as a context and its ending."""
    prompts = render_prompts(task, row, shots)
    if task.kind == "language_modeling":
        return {"context": prompts[1].removesuffix(row["continuation"]), "ending": row["continuation"]}
    endings = row["choices"] if task.kind == "multiple_choice" else [row["continuation"]] * len(prompts)
    contexts = [prompt.removesuffix(ending) for prompt, ending in zip(prompts, endings, strict=True)]
    if task.kind == "multiple_choice":
        return {"context": contexts[0], "endings": endings, "gold": row["gold"]}
    return {"contexts": contexts, "ending": endings[0], "gold": row["gold"]}


def compare_core(model, tokenizer, task: CoreTask, max_per_task: int | None, theirs: dict) -> dict:
    """One line of the table: a task by CORE, by CORE with the harness's sum, and by the harness; and why they differ.
    theirs: the harness's results of the task
    """
    core, summed = evaluate_rules(model, tokenizer, task, max_per_task)
    rows, acc, reasons = task.choose_rows(max_per_task), theirs["acc,none"], []
    if core != summed:
        reasons.append("sum, not mean")
    if summed != acc:
        num_cut, num_other = count_other_rows(model, tokenizer, task, rows)
        if num_cut:
            reasons.append(f"{num_cut} of {len(rows)} prompts cut, in CORE with their bos")
        if num_other:
            reasons.append(f"{num_other} of {len(rows)} with other tokens where context and ending meet")
        if not num_cut and not num_other:
            reasons.append("rounding")
    return {"task": task.label, "items": len(rows), "CORE": core, "by sum": summed, "acc": acc,
            "acc_norm": theirs.get("acc_norm,none", acc), "why": "; ".join(reasons) or "same"}


def count_other_rows(model, tokenizer, task: CoreTask, rows: list[dict]) -> tuple[int, int]:
    """The rows whose prompts are longer than the context; of the others, those of which the harness scores other tokens
    than CORE. First tokens that all endings of a question share count for neither."""
    harness, counts = Harness(model, tokenizer), [0, 0]
    for i, item in enumerate(make_items(task, tokenizer, rows, list(range(len(rows))), sys.maxsize)):
        made = make_core_row(task, rows[i], choose_shots(task, rows, i))
        pairs = ([(context, made["ending"]) for context in made["contexts"]] if "contexts" in made else
                 [(made["context"], ending) for ending in made.get("endings", [made.get("ending")])])
        theirs = [harness.encode_pair(*pair)[1] for pair in pairs]
        ours = [list(option.tail[1:]) for option in item.options]
        if task.kind == "multiple_choice":
            num_shared = len(theirs[0]) - len(ours[0])
            theirs = [tokens[max(0, num_shared):] for tokens in theirs]
        if max(len(option.prefix) + len(option.tail) for option in item.options) > harness.T:
            counts[0] += 1
        elif theirs != ours:
            counts[1] += 1
    return counts[0], counts[1]
