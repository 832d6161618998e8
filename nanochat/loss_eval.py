"""What a base model has learned, from its losses: bits per byte on text, and CORE.

Bits per byte are compared with those of two byte models that any language model must beat. The validation rows come
from dataloader.validation_batches, the same whatever the ranks and the batch.

CORE is the metric of DCLM (arXiv 2406.11794): the mean over in-context tasks of accuracy, centered so that guessing
gives 0. A task is one of three kinds, by what its prompts vary and what counts:

    multiple_choice     one question, several endings    the ending with the lowest mean loss per token wins
    schema              several contexts, one ending     the context under which that ending has the lowest mean loss
    language_modeling   one context, one ending          each token of the ending must be the likeliest one

A prompt becomes an option: a prefix, and a tail whose tokens but the first are scored. Options with the same prefix
(the shots and the question of a choice) compute it once; each tail then continues a copy of its cache.

R rows, T tokens, P tokens of a prefix, S tokens of a tail, V vocabulary.
"""

import contextlib
import csv
import json
import math
import os
import random
import shutil
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from nanochat.common import UserError, failing_together, file_lock, get_base_dir, get_ranks, print0, sum_over_ranks
from nanochat.gpt import GPT
from nanochat.kv_cache import NO_TOKEN, KVCache
from nanochat.run import RunLog
from nanochat.train import Batch

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
NUM_CORE_TASKS = 22         # in the published bundle; the mean over fewer is another metric
ROW_FIELDS = {              # what a row of each kind must have
    "multiple_choice":   ("query", "choices", "gold"),
    "schema":            ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS_FIELD = {"multiple_choice": "choices", "schema": "context_options"}
DATA_SEED, SHOT_SEED = 1337, 1234   # the published metric's: other seeds give other items and other shots

FAILURES = (UserError, OSError, MemoryError, torch.OutOfMemoryError)    # after which a run can go on
WINDOW_ITEMS = 256          # items that are tokenized at a time, then sorted by length (assumption, not studied)
PREFILL_TOKENS = 256        # tokens of a prefix in one pass: short passes skip more of the masked keys
# Tokens of one batch, prefixes and tails of all its rows, and of its tails alone, whose logits are V wide; by device
BATCH_TOKENS = defaultdict(lambda: 2**16, cpu=8192)
TAIL_TOKENS  = defaultdict(lambda: 8192, cpu=1024)


# Bits per byte


@dataclass(frozen=True)
class LossEval:
    """The sums behind bits per byte, over all ranks."""
    nats:       float   # over the targets that count bytes
    num_bytes:  int     # UTF-8 bytes of those targets
    num_tokens: int

    @property
    def bpb(self) -> float:
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else float("nan")


@torch.no_grad()
def evaluate_loss(model, batches: Iterable[Batch], token_bytes: Tensor, num_tokens: int | None = None) -> LossEval:
    """Sum the loss over `batches`. Collective: all ranks call it, with equally many batches.

    token_bytes: (V,) UTF-8 length of each token; tokens of 0 bytes (the special ones) don't count
    num_tokens:  at most, all ranks together, rounded down to whole batches; None = all
    """
    device = model.get_device()
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    num_seen, world_size, was_training = 0, get_ranks().world_size, model.training
    model.eval()
    # On a CPU, compiling for the shapes of an evaluation takes longer than most evaluations
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else contextlib.nullcontext():
        for batch in batches:
            num_seen += batch.inputs.numel() * world_size
            if num_tokens is not None and num_seen > num_tokens:
                break
            batch = batch.to(device)
            nll = model(batch.inputs, batch.targets, loss_reduction="none")  # (B, T)
            num_bytes = token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)  # (B, T)
            counted = num_bytes > 0
            sums += torch.stack([(nll * counted).sum().to(sums.device).double(), num_bytes.sum().to(sums.device),
                                 counted.sum().to(sums.device)])
    model.train(was_training)
    nats, num_bytes, num_counted = sum_over_ranks(sums).tolist()
    return LossEval(nats, int(num_bytes), int(num_counted))


def evaluate_bpb(model, batches: Iterable[Batch], num_tokens: int | None, token_bytes: Tensor) -> float:
    """Bits per byte on `batches`, comparable across tokenizers; lower is better. Arguments as of evaluate_loss."""
    return evaluate_loss(model, batches, token_bytes, num_tokens).bpb


def compute_byte_bpb(train_texts: Iterable[str], val_texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte on `val_texts` of unigram and bigram byte models fitted to `train_texts`, add-one smoothed."""
    singles, pairs = np.ones(256), np.ones((256, 256))
    for text in train_texts:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        singles += np.bincount(data, minlength=256)
        pairs += np.bincount(data[:-1] * 256 + data[1:], minlength=65536).reshape(256, 256)
    unigram_bits = -np.log2(singles / singles.sum())                      # (256,)
    bigram_bits = -np.log2(pairs / pairs.sum(1, keepdims=True))              # (256 before, 256)
    sums = np.zeros(3)
    for text in val_texts:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if len(data):
            pair_bits = unigram_bits[data[0]] + bigram_bits[data[:-1], data[1:]].sum()
            sums += unigram_bits[data].sum(), pair_bits, len(data)
    num_bytes = max(sums[2], 1)
    return {"unigram_byte_bpb": sums[0] / num_bytes, "bigram_byte_bpb": sums[1] / num_bytes}


# CORE


@dataclass(frozen=True)
class CoreTask:
    """One task of the bundle with all its data."""
    label:        str
    kind:         str            # a key of ROW_FIELDS
    num_shots:    int            # solved examples before each question
    delimiter:    str            # between a question and its ending
    baseline_pct: float          # accuracy of guessing
    rows:         list[dict]

    def choose_rows(self, max_per_task: int | None) -> list[dict]:
        """The rows to evaluate, shuffled; None = all. Shots are drawn from the same rows."""
        rows = self.rows.copy()
        random.Random(DATA_SEED).shuffle(rows)
        return rows[:max_per_task]

    def center(self, accuracy: float) -> float:
        """An accuracy so that guessing gives 0."""
        baseline = self.baseline_pct / 100
        return (accuracy - baseline) / (1 - baseline)


@dataclass(frozen=True)
class Option:
    """One way to complete an item. Each token of `tail` but the first is scored, given all that come before it."""
    prefix: tuple[int, ...]      # may be empty
    tail:   tuple[int, ...]


@dataclass(frozen=True)
class Item:
    """One question to the model."""
    options: list[Option]
    gold:    int | None          # index of the right option; None: the only option must be predicted exactly

    def get_lengths(self) -> tuple[int, int]:
        """Tokens of the longest prefix and of the longest tail."""
        return max(len(option.prefix) for option in self.options), max(len(option.tail) for option in self.options)


def load_tasks(bundle_dir: Path | None = None) -> list[CoreTask]:
    """All tasks of a bundle in the order of its core.yaml. Each row is checked now, not after an hour of evaluation."""
    bundle_dir, tasks = find_bundle(bundle_dir), []
    path, baselines = bundle_dir / "core.yaml", load_baselines(bundle_dir)
    with reading_bundle(path, bundle_dir):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]:
            label, kind = str(entry["label"]), entry["icl_task_type"]
            if kind not in ROW_FIELDS:
                raise ValueError(f"the type of {label} is {kind!r}, which is none of {', '.join(ROW_FIELDS)}")
            if label not in baselines:
                raise ValueError(f"eval_meta_data.csv has no usable random baseline for {label}")
            num_shots = int(entry["num_fewshot"][0])  # a list in the format; CORE has one number in it
            tasks.append(CoreTask(label, kind, num_shots, str(entry.get("continuation_delimiter", " ")),
                                  baselines[label], load_task_rows(bundle_dir, label, kind, entry["dataset_uri"])))
        if not tasks:
            raise ValueError("it names no task")
    return tasks


def find_bundle(bundle_dir: Path | None) -> Path:
    """The folder of the bundle, by default in the base folder; unpacks the zip where only that exists."""
    bundle_dir = bundle_dir or get_base_dir() / "eval_bundle"
    archive = bundle_dir.with_name("eval_bundle.zip")
    if archive.is_file() and not bundle_dir.exists():
        with file_lock(archive):
            if not bundle_dir.exists():  # another rank may have been first
                unpack_bundle(archive, bundle_dir)
    if not (bundle_dir / "core.yaml").is_file():
        raise UserError(f"the CORE tasks aren't on disk: there is no {bundle_dir / 'core.yaml'}; fetch them with "
                        f"python -m scripts.base_eval --fetch, or unpack {BUNDLE_URL} to {bundle_dir}")
    return bundle_dir


def unpack_bundle(archive: Path, bundle_dir: Path) -> None:
    """Unpack the zip atomically: `bundle_dir` appears whole or not at all."""
    print0(f"unpacking {archive}")
    temporary = bundle_dir.with_name(bundle_dir.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(temporary)
        found = sorted(temporary.rglob("core.yaml"))
        if not found:
            raise zipfile.BadZipFile("it holds no core.yaml")
        os.rename(found[0].parent, bundle_dir)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); download it again from {BUNDLE_URL}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_baselines(bundle_dir: Path) -> dict[str, float]:
    """Accuracy of guessing by task label, in percent; as published, mistakes included, to keep CORE comparable."""
    path = bundle_dir / "eval_meta_data.csv"
    with reading_bundle(path, bundle_dir), open(path, encoding="utf-8", newline="") as file:
        pairs = [(row["Eval Task"], row["Random baseline"]) for row in csv.DictReader(file)]
        baselines = {label: float(percent) for label, percent in pairs if percent}
        return {label: percent for label, percent in baselines.items() if 0 <= percent < 100}


def load_task_rows(bundle_dir: Path, label: str, kind: str, uri: str) -> list[dict]:
    """The checked rows of one task."""
    path, rows = bundle_dir / "eval_data" / uri, []
    with reading_bundle(f"the data of the CORE task {label}, {path},", bundle_dir):
        if not any(lines := path.read_bytes().splitlines()):
            raise ValueError("it is empty")
    for number, line in enumerate(lines, start=1):
        with reading_bundle(f"the data of the CORE task {label}, line {number} of {path},", bundle_dir):
            rows += [check_row(json.loads(line), kind)] if line.strip() else []
    return rows


def check_row(row: dict, kind: str) -> dict:
    """The fields of ROW_FIELDS, texts as str; raises where one is missing or malformed."""
    def to_text(value: object) -> str:
        if not isinstance(value, str | int | float):
            raise ValueError(f"{value!r:.60} is no text")
        return str(value)

    checked = {name: row[name] for name in ROW_FIELDS[kind]}
    options_field = OPTIONS_FIELD.get(kind)
    if options_field:
        gold, options = checked["gold"], checked[options_field]
        if not isinstance(options, list):
            raise ValueError(f"{options_field} is no list")
        if type(gold) is not int or gold not in range(len(options)):
            raise ValueError(f"gold is {gold!r:.60}, but there are {len(options)} options, counted from 0")
    return {name: value if name == "gold" else list(map(to_text, value)) if name == options_field else to_text(value)
            for name, value in checked.items()}


@contextlib.contextmanager
def reading_bundle(what: object, bundle_dir: Path) -> Iterator[None]:
    """Turn errors of reading into a UserError that names the damaged part of the bundle."""
    try:
        yield
    except (OSError, yaml.YAMLError, csv.Error, LookupError, TypeError, ValueError, AttributeError) as error:
        details = " ".join(str(error).split()) + (" is missing" if isinstance(error, KeyError) else "")
        reason = f"can't be read ({error.strerror})" if isinstance(error, OSError) else f"is damaged ({details})"
        raise UserError(f"{what} {reason}; unpack {BUNDLE_URL} to {bundle_dir} again") from None


def choose_shots(task: CoreTask, rows: list[dict], index: int) -> list[dict]:
    """Solved examples for the row at `index`, drawn from the other rows; fewer than num_shots if those are fewer."""
    others = rows[:index] + rows[index + 1:]
    return random.Random(SHOT_SEED + index).sample(others, min(task.num_shots, len(others)))


def render_prompts(task: CoreTask, row: dict, shots: list[dict]) -> list[str]:
    """One prompt per option; for language modeling the prompt without its ending, then with it."""
    def render(row: dict, option: int) -> tuple[str, str]:
        if task.kind == "multiple_choice":
            return row["query"], row["choices"][option]
        if task.kind == "schema":
            return row["context_options"][option], row["continuation"]
        return row["context"].strip(), row["continuation"]

    head = "".join(task.delimiter.join(render(shot, shot.get("gold", 0))) + "\n\n" for shot in shots)
    if task.kind == "language_modeling":
        context, ending = render(row, 0)
        # Stripped: tokenized, a blank at the end would belong to the first token of the ending
        return [(head + context + task.delimiter).strip(), head + context + task.delimiter + ending]
    return [head + task.delimiter.join(render(row, option)) for option in range(len(row[OPTIONS_FIELD[task.kind]]))]


def make_item(kind: str, prompts: list[list[int]], gold: int | None, context_tokens: int) -> Item:
    """Find the scored tokens of an item's prompts, and crop prompts to the model's context.

    The common part is found on tokens of whole prompts, since token boundaries depend on the text that follows. Each
    option keeps a token to predict, even if it is a prefix of another or equals it. A prompt over `context_tokens`
    loses its first tokens, bos included, as in the published evaluations; all choices lose equally many.
    """
    if kind == "language_modeling":
        starts, prompts = [len(os.path.commonprefix(prompts))], prompts[1:]
    elif kind == "multiple_choice":
        starts = [min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)] * len(prompts)
    else:
        num_common = len(os.path.commonprefix([prompt[::-1] for prompt in prompts]))
        starts = [len(prompt) - num_common for prompt in prompts]
    options, excess_tokens = [], max(map(len, prompts)) - context_tokens
    for prompt, start in zip(prompts, starts, strict=True):
        num_shared = min(excess_tokens, start - 1) if kind == "multiple_choice" else 0
        num_cropped = max(0, len(prompt) - context_tokens, num_shared)
        start = max(min(start, len(prompt) - 1) - num_cropped, 1)  # nothing predicts the first token
        tokens = tuple(prompt[num_cropped:])
        options.append(Option(tokens[:start - 1], tokens[start - 1:]))
    return Item(options, gold)


def make_items(task: CoreTask, tokenizer, rows: list[dict], indices: list[int], context_tokens: int) -> list[Item]:
    """The items of the rows at `indices`, tokenized all together."""
    prompts = [render_prompts(task, rows[i], choose_shots(task, rows, i)) for i in indices]
    tokens = iter(tokenizer.encode(sum(prompts, []), prepend=tokenizer.get_bos_token_id()))
    return [make_item(task.kind, [next(tokens) for _ in group], rows[i].get("gold"), context_tokens)
            for i, group in zip(indices, prompts, strict=True)]


def make_batches(items: list[Item], batch_tokens: int, tail_tokens: int) -> Iterator[list[Item]]:
    """Group items of similar length, within the token limits of a batch, padding included."""
    batch, num_rows, longest_tail = [], 0, 0
    for item in sorted(items, key=Item.get_lengths, reverse=True):  # the longest first: out of memory shows early
        prefix, tail = (batch or [item])[0].get_lengths()[0], max(longest_tail, item.get_lengths()[1])
        rows = num_rows + len(item.options)
        if batch and (rows * (prefix + tail) > batch_tokens or rows * tail > tail_tokens):
            yield batch
            batch, rows, tail = [], len(item.options), item.get_lengths()[1]
        batch.append(item)
        num_rows, longest_tail = rows, tail
    if batch:
        yield batch


def pad_right(rows: list[tuple[int, ...]], padding: int, device: torch.device) -> torch.Tensor:
    """(R, T) int64: rows of tokens, padded on the right to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + (padding,) * (longest - len(row)) for row in rows], dtype=torch.long, device=device)


def cache_prefixes(model: GPT, prefixes: list[tuple[int, ...]], row_of: list[int], num_more: int) -> KVCache:
    """Compute each prefix once; row r of the cache holds prefixes[row_of[r]] and has room for `num_more` tokens."""
    config, device = model.config, model.get_device()
    lengths = torch.tensor([len(prefix) for prefix in prefixes], dtype=torch.int32, device=device)
    idx = pad_right(prefixes, 0, device)  # (prefixes, P)
    P = idx.size(1)
    cache = KVCache(len(prefixes), config.n_kv_head, P + num_more, config.head_dim, config.n_layer, device,
                    model.compute_dtype)
    for start in range(0, P, PREFILL_TOKENS):
        model.forward_trunk(idx[:, start:start + PREFILL_TOKENS], cache)
    # All rows are P long now. Each goes back to its own length, and its tail overwrites the padding
    last_ids = torch.tensor([prefix[-1:] or (NO_TOKEN,) for prefix in prefixes], device=device)
    return cache.take_rows(torch.tensor(row_of, device=device), lengths, last_ids)


def score_options(model, options: list[Option]) -> list[tuple[float, bool]]:
    """For each option its mean loss per scored token, in nats, and whether each of them was the likeliest. A GPT
    computes shared prefixes once; any other model, called with (R, T) tokens for (R, T, V) logits, whole rows."""
    device = model.get_device()
    targets = pad_right([option.tail[1:] for option in options], -1, device)  # (R, S)
    if isinstance(model, GPT):
        row_of_prefix = {prefix: row for row, prefix in enumerate(dict.fromkeys(o.prefix for o in options))}
        cache = cache_prefixes(model, list(row_of_prefix), [row_of_prefix[o.prefix] for o in options], targets.size(1))
        logits = model(pad_right([option.tail[:-1] for option in options], 0, device), kv_cache=cache)  # (R, S, V)
    else:
        logits = model(pad_right([option.prefix + option.tail[:-1] for option in options], 0, device))  # (R, T, V)
        first = torch.tensor([len(option.prefix) for option in options], device=device)
        positions = first[:, None] + torch.arange(targets.size(1), device=device)  # (R, S)
        positions = positions.clamp(max=logits.size(1) - 1)[..., None].expand(-1, -1, logits.size(2))
        logits = logits.gather(1, positions)  # (R, S, V)
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none").view_as(targets)
    mean_nll = nll.sum(1) / (targets >= 0).sum(1)
    exact = ((logits.argmax(-1) == targets) | (targets < 0)).all(1)
    return list(zip(mean_nll.tolist(), exact.tolist(), strict=True))


def count_correct(model, items: list[Item]) -> tuple[int, int]:
    """The number of items of one batch that the model gets right: where the option with the lowest mean loss wins,
    which is CORE, and where the one with the lowest loss of all its tokens together does, as in lm-evaluation-harness.
    Of equally good options the first is its answer."""
    options = list(dict.fromkeys(option for item in items for option in item.options))  # equal options must tie exactly
    scores, by_mean, by_sum = dict(zip(options, score_options(model, options), strict=True)), 0, 0
    for item in items:
        means, exact = zip(*map(scores.__getitem__, item.options), strict=True)
        sums = [loss * (len(option.tail) - 1) for loss, option in zip(means, item.options, strict=True)]
        by_mean += exact[0] if item.gold is None else means.index(min(means)) == item.gold
        by_sum += exact[0] if item.gold is None else sums.index(min(sums)) == item.gold
    return by_mean, by_sum


def score_task(model, tokenizer, task: CoreTask, max_per_task: int | None = None) -> dict:
    """{accuracy, centered, num_items} of one task. Collective: all ranks call it, each answers its share of items."""
    accuracy, _ = evaluate_rules(model, tokenizer, task, max_per_task)
    return {"accuracy": accuracy, "centered": task.center(accuracy), "num_items": len(task.choose_rows(max_per_task))}


@torch.no_grad()
def evaluate_rules(model, tokenizer, task: CoreTask, max_per_task: int | None = None) -> tuple[float, float]:
    """The accuracies of a task by both rules of count_correct, of which CORE is the first. Collective."""
    if max_per_task is not None and max_per_task < 1:
        raise UserError(f"--max-per-task {max_per_task} must be at least 1, or all")
    ranks = get_ranks()
    device, rows = model.get_device(), task.choose_rows(max_per_task)
    mine = list(range(ranks.rank, len(rows), ranks.world_size))
    tail_tokens = TAIL_TOKENS[device.type]
    batch_tokens = BATCH_TOKENS[device.type] if isinstance(model, GPT) else tail_tokens
    num_correct, was_training = torch.zeros(2, dtype=torch.int64), model.training
    model.eval()
    try:
        # Nearly every batch has a shape of its own: compiling for each would take longer than the evaluation
        with failing_together(*FAILURES), torch.compiler.set_stance("force_eager"):
            for start in range(0, len(mine), WINDOW_ITEMS):
                indices = mine[start:start + WINDOW_ITEMS]
                items = make_items(task, tokenizer, rows, indices, model.config.sequence_len)
                for batch in make_batches(items, batch_tokens, tail_tokens):
                    num_correct += torch.tensor(count_correct(model, batch))
    finally:
        model.train(was_training)    # a run goes on where its evaluation failed
    by_mean, by_sum = sum_over_ranks(num_correct.to(device)).tolist()
    return by_mean / len(rows), by_sum / len(rows)


def compute_core(results: dict[str, dict]) -> dict:
    """{core_metric, num_tasks, tasks} from the results by task: CORE is the mean of the centered accuracies."""
    return {"core_metric": sum(result["centered"] for result in results.values()) / len(results),
            "num_tasks": len(results), "tasks": results}


def evaluate_core(model, tokenizer, *, max_per_task: int | None = None, bundle_dir: Path | None = None) -> dict:
    """{core_metric, num_tasks, tasks: {label: {accuracy, centered, num_items}}}. Collective: all ranks call it.

    max_per_task: items of each task at most, also as shots; None = all
    bundle_dir:   default $NANOCHAT_BASE_DIR/eval_bundle
    """
    with failing_together(*FAILURES):
        tasks = load_tasks(bundle_dir)
    return compute_core({task.label: score_task(model, tokenizer, task, max_per_task) for task in tasks})


def log_core(model, tokenizer, log: RunLog, step: int, max_per_task: int | None) -> dict:
    """The CORE metric at a step of a run; where data or memory is missing the run goes on without. Collective."""
    try:
        values = evaluate_core(model, tokenizer, max_per_task=max_per_task)
    except UserError as error:
        print0(f"CORE was not evaluated: {error}")
        return {}
    log.write("core", step, **values)
    print0(f"step {step:05d} | CORE {values['core_metric']:.4f}")
    return {"core_metric": values["core_metric"]}
