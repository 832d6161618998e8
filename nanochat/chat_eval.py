"""ChatCORE: accuracy of a chat model on six tasks, centered so that guessing gives 0.

    categorical   multiple choice     the answer is the likeliest of the choices' letters as its first token
    generative    all other tasks     the Engine writes an answer and may call the calculator

The task grades the answers. Each problem leaves a record; records on disk let a killed evaluation continue.

R rows, T tokens, C channels.
"""

import contextlib
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.common import UserError, failing_together, gather, get_ranks, write_atomic
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.loss_eval import BATCH_TOKENS, pad_right
from nanochat.tokenizer import RustBPETokenizer
from tasks.catalog import CHATCORE_TASKS, GRADED_TASKS, get_task
from tasks.common import Task

FAILURES = (UserError, OSError, RuntimeError, MemoryError)    # of data, disk, memory, after which other tasks can go on
CHOICE_BASELINE = 0.25      # accuracy of guessing one of four letters; that of writing an answer by chance is 0
ORDER_SEED = 1337           # shuffles the problems: the first n are a fair sample, and part of any larger one


@dataclass(frozen=True)
class AnswerSettings:
    """All that an answer depends on besides the model and the problem."""
    num_samples:    int   = 1
    temperature:    float = 0.0     # 0 takes the likeliest token
    top_k:          int   = 0       # sample among the k likeliest; 0 = all
    max_new_tokens: int   = 512     # of an answer, tool output included
    seed:           int   = 42

    def __post_init__(self):
        if self.num_samples < 1 or self.max_new_tokens < 1:
            raise UserError(f"an evaluation of {self.num_samples} samples of {self.max_new_tokens} tokens has nothing "
                            "to grade; give at least 1 of each")
        if not 0 <= self.temperature < math.inf or self.top_k < 0:
            raise UserError(f"temperature {self.temperature} and top-k {self.top_k} must be 0 or more")
        if self.num_samples > 1 and self.temperature == 0:
            raise UserError(f"{self.num_samples} samples at temperature 0 are all the same; give a temperature")


@dataclass(frozen=True)
class Solver:
    """A chat model that answers problems."""
    model:        GPT
    tokenizer:    RustBPETokenizer
    settings:     AnswerSettings = AnswerSettings()
    batch_rows:   int  = 64        # sequences at once, on each rank
    allow_unsafe: bool = False     # run programs that the model wrote even where this machine can't isolate them
    words:        str | None = None   # dataset whose words are spelled, see tasks.words.load_words


@dataclass(frozen=True)
class Problem:
    """One conversation of a task, its last message the reference answer."""
    index:        int     # in the task
    id:           str     # a hash of its content; a record belongs to the problem of its index and id
    conversation: dict
    prompt:       tuple[int, ...]   # all tokens up to the answer


def check_task_names(names: Sequence[str]) -> None:
    """UserError for unknown tasks, for tasks without a grade and for repeats, before any work is done."""
    for name in names:
        if name not in GRADED_TASKS:
            raise UserError(f"there is no task {name!r} to evaluate; choose from {', '.join(GRADED_TASKS)}")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"name each task once, not {', '.join(names) or 'none'}")


def load_problems(task: Task, name: str, tokenizer, max_problems: int | None) -> list[Problem]:
    """The problems to solve, shuffled with ORDER_SEED; UserError where one is damaged."""
    order, problems = list(range(len(task))), []
    random.Random(ORDER_SEED).shuffle(order)
    for index in order[:max_problems]:
        conversation = task[index]
        try:
            content = json.dumps(conversation, sort_keys=True)
            prompt = tokenizer.render_for_completion(conversation)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"problem {index} of {name} can't be used ({type(error).__name__}: {error}); fetch its "
                            "data again") from None
        problems.append(Problem(index, hashlib.sha256(content.encode()).hexdigest()[:12], conversation, tuple(prompt)))
    return problems


def crop_prompt(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """A prompt over `max_tokens` cropped to its first token, bos, and its last ones."""
    return prompt if len(prompt) <= max_tokens else prompt[:1] + prompt[len(prompt) - max_tokens + 1:]


@torch.no_grad()
def choose_letters(solver: Solver, problems: list[Problem]) -> Iterator[tuple[Problem, list[str], int]]:
    """Each problem with the likeliest of its letters, as sample_answers. Problems of similar length share a batch."""
    model, device = solver.model, solver.model.get_device()
    prompts = [crop_prompt(problem.prompt, model.config.sequence_len) for problem in problems]
    waiting = sorted(range(len(problems)), key=lambda i: len(prompts[i]))   # the longest come first, from the end
    while waiting:
        num_rows = max(1, min(solver.batch_rows, BATCH_TOKENS[device.type] // len(prompts[waiting[-1]])))
        batch, waiting = waiting[-num_rows:], waiting[:-num_rows]
        idx = pad_right([prompts[i] for i in batch], 0, device)                               # (R, T)
        ends = torch.tensor([len(prompts[i]) - 1 for i in batch], device=device)
        # Nearly every batch has a shape of its own: compiling for each would take longer than the evaluation
        with torch.compiler.set_stance("force_eager"):
            x = model.forward_trunk(idx)[torch.arange(len(batch), device=device), ends]             # (R, C)
        letters = sorted({letter for i in batch for letter in problems[i].conversation["letters"]})
        tokens = torch.tensor([solver.tokenizer.encode(letter)[0] for letter in letters], device=device)
        logits = model.unembed(x, tokens).tolist()                                                  # (R, letters)
        for i, row in zip(batch, logits, strict=True):
            values = dict(zip(letters, row, strict=True))
            yield problems[i], [max(problems[i].conversation["letters"], key=values.__getitem__)], 0


def sample_answers(solver: Solver, problems: list[Problem]) -> Iterator[tuple[Problem, list[str], int]]:
    """Each problem with its samples' texts and the number of samples that were cut short, as they finish. A sample
    depends on the problem's index and the settings alone, not on the other problems of the batch."""
    settings, context_tokens = solver.settings, solver.model.config.sequence_len
    room_tokens = max(context_tokens - settings.max_new_tokens, context_tokens // 2, 2)  # the rest is for the answer
    engine = Engine(solver.model, solver.tokenizer, max_rows=solver.batch_rows)
    owners = {}                                 # request -> index of its problem, tokens of its sample
    samples = [[] for _ in problems]            # of each problem: the tokens of each sample
    endings = [[] for _ in problems]            # of each problem: the reasons why its finished samples ended
    for i, problem in enumerate(problems):
        prompt = crop_prompt(problem.prompt, room_tokens)
        max_tokens = min(settings.max_new_tokens, context_tokens + 1 - len(prompt))  # untrained positions follow
        for sample in range(settings.num_samples):
            request = Request(prompt, max_tokens, settings.temperature, settings.top_k,
                              seed=settings.seed + problem.index, sample=sample)
            samples[i].append([])
            owners[engine.submit(request)] = i, samples[i][-1]
    while engine.has_work():
        for event in engine.step():
            i, tokens = owners[event.request_id]
            if event.token not in engine.end_tokens:
                tokens.append(event.token)
            if event.finish_reason:
                endings[i].append(event.finish_reason)
                if len(endings[i]) == settings.num_samples:
                    yield problems[i], list(map(solver.tokenizer.decode, samples[i])), endings[i].count("length")


def solve(solver: Solver, task: Task, problems: list[Problem]) -> Iterator[dict]:
    """A record of each problem: {index, id, answers, scores, num_cut}, lists over the samples."""
    task.check_grading(solver.allow_unsafe)
    answers = (choose_letters if task.eval_type == "categorical" else sample_answers)(solver, problems)
    while group := list(itertools.islice(answers, task.grade_batch)):
        pairs = [(problem.conversation, text) for problem, texts, _ in group for text in texts]
        scores = iter(task.grade(*zip(*pairs, strict=True), solver.allow_unsafe))
        for problem, texts, num_cut in group:
            yield {"index": problem.index, "id": problem.id, "answers": texts,
                   "scores": [next(scores) for _ in texts], "num_cut": num_cut}


def read_records(records_dir: Path, name: str) -> dict[tuple[int, str], dict]:
    """The records of a task by problem, from <task>.jsonl and the <task>.part<rank>.jsonl of a killed evaluation."""
    records = {}
    for path in (records_dir / f"{name}.jsonl", *sorted(records_dir.glob(f"{name}.part*.jsonl"))):
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError, LookupError, TypeError):  # the kill cut this line in two
                record = json.loads(line)
                if record.keys() >= {"answers", "scores", "num_cut"}:
                    records[record["index"], record["id"]] = record
    return records


def write_records(records_dir: Path, name: str, records: list[dict]) -> None:
    """Write all records of a task to one file, in the order of the task, and delete the parts."""
    lines = [json.dumps(record) + "\n" for record in sorted(records, key=lambda record: record["index"])]
    write_atomic(records_dir / f"{name}.jsonl", "".join(lines))
    for path in records_dir.glob(f"{name}.part*.jsonl"):
        path.unlink()


def evaluate_task(solver: Solver, name: str, max_problems: int | None = None, records_dir: Path | None = None) -> dict:
    """{accuracy, low, high, centered, num_problems, num_cut, pass_any} of one task. Collective: all ranks call it.

    low, high:   of the 95% interval of the accuracy
    num_cut:     answers that reached max_new_tokens or the end of the context before their end token
    pass_any:    share of the problems with a right sample; with several samples only
    records_dir: a folder for this checkpoint and these settings alone; problems with a record there are skipped
    Raises UserError, on all ranks, where the task can't be evaluated: no data, no sandbox, no memory ...
    """
    if max_problems is not None and max_problems < 1 or solver.batch_rows < 1:
        raise UserError(f"{'all' if max_problems is None else max_problems} problems in batches of {solver.batch_rows} "
                        "leave nothing to evaluate; give at least 1 of each")
    ranks, records = get_ranks(), {}
    with failing_together(*FAILURES):
        task = get_task(name, "test", solver.words)
        problems = load_problems(task, name, solver.tokenizer, max_problems)
        if records_dir and ranks.rank == 0:
            records_dir.mkdir(parents=True, exist_ok=True)
            records = read_records(records_dir, name)
            if records:
                write_records(records_dir, name, list(records.values()))
    records, *_ = gather(records)
    mine = [problem for problem in problems if (problem.index, problem.id) not in records][ranks.rank::ranks.world_size]
    solved, was_training = [], solver.model.training
    solver.model.eval()
    with failing_together(*FAILURES), contextlib.ExitStack() as stack:
        stack.callback(solver.model.train, was_training)
        path = records_dir and records_dir / f"{name}.part{ranks.rank}.jsonl"
        part = path and stack.enter_context(open(path, "w", encoding="utf-8"))
        for record in solve(solver, task, mine) if mine else ():
            solved.append(record)
            if part:
                print(json.dumps(record), file=part, flush=True)
    for others in gather(solved):
        records |= {(record["index"], record["id"]): record for record in others}
    if records_dir and ranks.rank == 0:
        with contextlib.suppress(OSError):  # the parts still exist
            write_records(records_dir, name, list(records.values()))
    return summarize_records([records[problem.index, problem.id] for problem in problems], task,
                             num_different=len({problem.prompt for problem in problems}))


def summarize_records(records: list[dict], task: Task, num_different: int) -> dict:
    """The figures of one task from the records of its problems. The interval rests on the `num_different` questions,
    since a generated task may repeat a question."""
    means = [sum(record["scores"]) / len(record["scores"]) for record in records]
    accuracy = sum(means) / len(means)
    low, high = wilson_interval(accuracy, num_different)
    baseline = CHOICE_BASELINE if task.eval_type == "categorical" else 0.0
    result = {"accuracy": accuracy, "low": low, "high": high, "centered": (accuracy - baseline) / (1 - baseline),
              "num_problems": len(means), "num_cut": sum(record["num_cut"] for record in records)}
    if any(len(record["scores"]) > 1 for record in records):
        result["pass_any"] = sum(max(record["scores"]) == 1 for record in records) / len(records)
    return result


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """The 95% confidence interval of a share measured on `count` problems (E. B. Wilson, JASA 1927).

    Unlike mean +- 2 sigma it stays within 0 and 1 and has a width at both. For scores between 0 and 1, and for means of
    several samples, it is wider than necessary: those vary less than right and wrong answers of the same mean.
    """
    z = 1.959964  # 95% of a normal distribution lie within so many standard deviations
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, min(middle - half, mean)), min(1.0, max(middle + half, mean))  # rounding must not exclude the mean


def compute_chatcore(results: dict[str, dict], missing: dict[str, str]) -> dict:
    """{chatcore, is_partial, num_tasks, tasks, missing}: ChatCORE is the mean centered accuracy of CHATCORE_TASKS.

    chatcore:   None where none of its tasks was evaluated
    is_partial: some were not, so the mean isn't ChatCORE
    """
    centered = [results[name]["centered"] for name in CHATCORE_TASKS if name in results]
    return {"chatcore": sum(centered) / len(centered) if centered else None, "num_tasks": len(centered),
            "is_partial": len(centered) < len(CHATCORE_TASKS), "tasks": results, "missing": missing}
