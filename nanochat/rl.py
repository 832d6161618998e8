"""Reinforcement learning on tasks that grade an answer: sample answers, learn more of those that beat their group.

    a step: Q questions x S answers, sampled by the model as it is, the calculator in the loop
      -> reward of each by its task -> advantage = reward - mean of the question's answers
      -> PolicyBatch: target -1 on what the model didn't sample, weight = advantage -> train.train_step

REINFORCE (Williams 1992) with the group's mean as baseline (GRPO, arXiv 2402.03300), as pared down since: no division
by the group's standard deviation, which favours questions that are too easy or too hard, and none by an answer's own
length, which favours long wrong ones (arXiv 2503.20783); all tokens of a step count alike (DAPO, arXiv 2503.14476).
Answers are learned from once, at once, so there is no ratio to clip; no KL, so no second model. Temperature 1 and
nothing left out of the distribution: otherwise it is another policy's answers that are learned from.

Q questions, S answers each, B rows, T tokens.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Ranks, UserError
from nanochat.cross_entropy import LOGIT_SOFTCAP
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.train import Batch, sum_over_ranks

PASS_AT = (1, 4, 16)       # k of pass@k
PROBE_TOKENS = 1024        # at least one answer's, whose distributions are compared before and after a step
SAMPLE_ROWS = {"cpu": 64}  # answers that are written at once where nobody says better, by device
DEFAULT_SAMPLE_ROWS = 256
# Rows are padded to a multiple of this; where kernels are made for a length, few lengths matter more than padding
LENGTH_MULTIPLE = {"cpu": 16}
DEFAULT_LENGTH_MULTIPLE = 128


# ---------------------------------------------------------------------------------------------------------------------
# Questions


@dataclass(frozen=True)
class Question:
    """A problem of a task, and all tokens up to its answer."""
    task_name:    str
    task:         object       # tasks.common.Task with a reward
    conversation: dict
    prompt:       list[int]


def make_questions(tasks: Mapping[str, object], tokenizer, max_prompt_tokens: int) -> list[Question]:
    """The questions of tasks, one task after the other, without those whose prompt is longer than that."""
    questions = []
    for name, task in tasks.items():
        if not hasattr(task, "reward"):
            raise UserError(f"the task {name} has no reward, so there is nothing to reinforce; choose tasks that grade "
                            "an answer, such as GSM8K, Arithmetic, SpellingBee or SimpleSpelling")
        for i in range(len(task)):
            conversation = task[i]
            prompt = tokenizer.render_for_completion(conversation)
            if len(prompt) <= max_prompt_tokens:
                questions.append(Question(name, task, conversation, prompt))
    if not questions:
        raise UserError(f"no question of {', '.join(tasks)} has at most {max_prompt_tokens} tokens, which is what the "
                        "model's context leaves beside an answer; set a smaller --max-new-tokens")
    return questions


def choose_questions(num_questions: int, num: int, seed: int, step: int) -> list[int]:
    """Which questions a step asks: the next `num` of an endless list, in which each epoch has an order of its own."""
    chosen = []
    for n in range(step * num, (step + 1) * num):
        epoch, place = divmod(n, num_questions)
        if not chosen or place == 0:
            order = np.random.default_rng((seed, epoch)).permutation(num_questions)
        chosen.append(int(order[place]))
    return chosen


def get_sampling_seed(seed: int, step: int, question: int) -> int:
    """The seed of a step's question: consecutive ones within a step, as Engine.generate_many has them."""
    return (seed << 64) + (step << 32) + question


def take_share(num: int, ranks: Ranks) -> range:
    """Which of `num` things are this rank's: neighbours, as many as the other ranks have, or one fewer."""
    return range(num * ranks.rank // ranks.world_size, num * (ranks.rank + 1) // ranks.world_size)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@dataclass(frozen=True)
class Answer:
    """What the model wrote to a question, and what that is worth."""
    tokens:       list[int]   # prompt and answer, with the end token where it came to one
    masks:        list[int]   # 1: sampled; 0: the prompt, and what the calculator put in
    num_prompt:   int
    text:         str         # of the answer, without its end token: what is graded
    reward:       float       # from 0 to 1; 1 is a pass
    is_truncated: bool        # the room ended before the answer; it is graded like any other, as in evaluations


def write_answers(engine: Engine, questions: Sequence[Question], num_samples: int, max_new_tokens: int,
                  temperature: float, seed: int) -> list[list[Answer]]:
    """`num_samples` answers to each question; question i has the seed `seed` + i."""
    results = engine.generate_many([question.prompt for question in questions], num_samples, max_new_tokens,
                                   temperature, seed=seed)
    groups = []
    for question, (rows, masks) in zip(questions, results, strict=True):
        groups.append([])
        for tokens, mask in zip(rows, masks, strict=True):
            has_end, num_prompt = tokens[-1] in engine.end_tokens, len(question.prompt)
            text = engine.tokenizer.decode(tokens[num_prompt:-1] if has_end else tokens[num_prompt:])
            groups[-1].append(Answer(tokens, mask, num_prompt, text,
                                     float(question.task.reward(question.conversation, text)), not has_end))
    return groups


def compute_pass_at(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that at least one of k samples passes, estimated without bias from n >= k (arXiv 2107.03374)."""
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


# ---------------------------------------------------------------------------------------------------------------------
# What is learned from them


def compute_advantages(rewards: Tensor) -> Tensor:
    """(Q, S) rewards -> (Q, S) advantages: by how much each beats its group's mean; exactly 0 where all are equal.

    Exactly, since a mean is rounded: a step of nothing but such leftovers would be taken for something to learn.
    """
    is_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(is_equal, 0)


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Rows that hold an answer each, padded at their end; those without advantage come last.

    An answer without advantage counts where the loss is normalised, since its gradient is part of the mean, namely
    zero: leaving it out would enlarge the step the more, the fewer questions still teach something. (DAPO samples other
    questions in its place, which costs answers; arXiv 2503.20783 keeps the constant, as here.) But it isn't computed.
    """
    length_multiple: int

    def split(self, num_rows: int):
        """Micro-batches of at most `num_rows` rows, cut to their longest; none where no row has an advantage."""
        for micro in super().split(num_rows):
            if micro.weights.any():
                longest = int((micro.targets >= 0).any(dim=0).nonzero()[-1]) + 1
                tokens = slice(0, round_up(longest, self.length_multiple))
                yield Batch(micro.inputs[:, tokens], micro.targets[:, tokens], micro.weights[:, tokens])


def make_batch(answers: Sequence[Answer], advantages: Sequence[float], length_multiple: int) -> PolicyBatch:
    """The rows of answers: those with an advantage first, the longest first, so that few micro-batches are long."""
    order = sorted(range(len(answers)), key=lambda i: (advantages[i] == 0, -len(answers[i].tokens), i))
    T = round_up(max(len(answer.tokens) for answer in answers) - 1, length_multiple)
    inputs = torch.zeros(len(answers), T, dtype=torch.int64)  # what pads a row is never seen by what comes before it
    targets, weights = torch.full_like(inputs, -1), torch.zeros(len(answers), T)
    for row, i in enumerate(order):
        tokens, mask = torch.tensor(answers[i].tokens), torch.tensor(answers[i].masks)
        inputs[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = tokens[1:].where(mask[1:] > 0, -1)
        weights[row] = advantages[i]
    return PolicyBatch(inputs, targets, weights, length_multiple)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def choose_probe(groups: Sequence[Sequence[Answer]]) -> list[Answer]:
    """One answer to each question, a fair sample of them all at a fraction of a step's cost; some, if they are long."""
    probe, num_tokens = [], 0
    for answer, *_ in groups:
        num_tokens += sum(answer.masks)
        if probe and num_tokens > PROBE_TOKENS:
            break
        probe.append(answer)
    return probe


@torch.no_grad()
def compute_logprobs(model: GPT, batch: Batch, micro_rows: int) -> Tensor:
    """The distributions that the targets were sampled from, as the model has them now: logarithms, (targets, V)."""
    chunks = []
    for micro in Batch.split(batch, micro_rows):
        micro = micro.to(model.get_device())
        x = model.forward_trunk(micro.inputs)[micro.targets >= 0]  # (targets, C)
        logits = model.lm_head(x)[:, :model.config.vocab_size]     # (targets, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        chunks.append((LOGIT_SOFTCAP * torch.tanh(logits / LOGIT_SOFTCAP)).log_softmax(dim=-1))
    return torch.cat(chunks)


def sum_entropy(logprobs: Tensor) -> float:
    """Entropy of distributions (targets, V), in nats, summed."""
    return -float((logprobs.exp() * logprobs).sum())


def sum_kl(before: Tensor, after: Tensor) -> float:
    """By how much distributions (targets, V) have moved, in nats, summed: KL(before || after)."""
    return float((before.exp() * (before - after)).sum())


def keep_matrices(optimizer: MuonAdamW) -> MuonAdamW:
    """The optimizer of the transformer's matrices alone; all other parameters are frozen.

    Adam divides a gradient by its own size. Most of what a few answers say of embeddings, head and scalars is noise,
    which thereby becomes a step of full size (dev/LOG.md, 2026-11-21).
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.requires_grad_(group["kind"] == "muon")
    return MuonAdamW([group for group in optimizer.param_groups if group["kind"] == "muon"], optimizer.names,
                     optimizer.matmul_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# A step's answers


class Rollouts:
    """Asks the model the questions of a step, this rank its share. What is asked and drawn follows from seed and step.

    num_questions, num_samples: of a step, all ranks together; max_new_tokens: of an answer, tool output included
    sample_rows: answers that are written at once
    """

    def __init__(self, questions: Sequence[Question], tokenizer, *, num_questions: int, num_samples: int,
                 max_new_tokens: int, seed: int, ranks: Ranks, sample_rows: int, micro_rows: int,
                 length_multiple: int, state: dict | None = None):
        self.questions, self.tokenizer = questions, tokenizer
        self.num_questions, self.num_samples, self.max_new_tokens = num_questions, num_samples, max_new_tokens
        self.seed, self.ranks, self.sample_rows, self.micro_rows = seed, ranks, sample_rows, micro_rows
        self.length_multiple = length_multiple
        self.num_tokens = state["num_tokens"] if state else 0
        self.stats: dict = {}      # of the last step, all ranks together, but for times, which are this rank's
        self.sample: dict = {}     # the first of its answers

    def state_dict(self) -> dict:
        """What a resumed run can't find out: the tokens that have been learned from."""
        return {"num_tokens": self.num_tokens}

    def give_back(self) -> None:
        """Nothing was learned from the last step's answers: a run that goes on from the state is to ask them again."""
        self.num_tokens -= self.stats["row_tokens"]

    def next_step(self, model: GPT, step: int) -> PolicyBatch:
        """The batch of this rank's answers, weighted by their advantages. Collective: all ranks call it."""
        start_time = time.perf_counter()
        chosen = choose_questions(len(self.questions), self.num_questions, self.seed, step)
        share = take_share(len(chosen), self.ranks)
        asked = [self.questions[chosen[i]] for i in share]
        # a new engine for each step: it holds the weights as they were when it was made
        groups = write_answers(Engine(model, self.tokenizer, self.sample_rows), asked, self.num_samples,
                               self.max_new_tokens, 1.0, get_sampling_seed(self.seed, step, share.start))
        first = groups[0][0]
        self.sample = {"prompt": asked[0].conversation["messages"][-2]["content"], "text": first.text,
                       "reward": first.reward}
        rewards = torch.tensor([[answer.reward for answer in group] for group in groups], dtype=torch.float64)
        answers = [answer for group in groups for answer in group]
        sample_sec = time.perf_counter() - start_time
        probe = choose_probe(groups)
        self.probe = make_batch(probe, [0.0] * len(probe), self.length_multiple)
        self.probe_logprobs = compute_logprobs(model, self.probe, self.micro_rows)
        self._count(groups, sample_sec, model.get_device())
        return make_batch(answers, compute_advantages(rewards).flatten().tolist(), self.length_multiple)

    def measure_step(self, model: GPT) -> None:
        """Add to `stats` how far the step moved the policy, in nats an answer. Collective: all ranks call it.

        What is healthy is an assumption, not studied: hundredths of a nat; above tenths, rewards fell.
        """
        kl = sum_kl(self.probe_logprobs, compute_logprobs(model, self.probe, self.micro_rows))
        kl, num_answers = add_up([kl, len(self.probe.inputs)], model.get_device())
        self.stats["kl_nats"] = kl / num_answers

    def get_values(self, step_sec: float) -> dict:
        """What is logged of a step that took so long. The tokens are those of prompts and answers, without padding."""
        row_tokens, train_sec = self.stats["row_tokens"], step_sec - self.stats["sample_sec"]
        return {**self.stats, "tokens": self.num_tokens, "tokens_per_sec": row_tokens / step_sec,
                "train_tokens_per_sec": row_tokens / train_sec, "mfu_pct": None}

    def _count(self, groups: list[list[Answer]], sample_sec: float, device: torch.device) -> None:
        """Set `stats`."""
        answers = [answer for group in groups for answer in group]
        equal = sum(len({answer.reward for answer in group}) == 1 for group in groups)
        pass_at = get_pass_at(self.num_samples)
        sums = [len(groups), len(answers), sum(answer.reward for answer in answers),
                sum(answer.is_truncated for answer in answers),
                sum(len(answer.tokens) - answer.num_prompt for answer in answers),
                sum(len(answer.tokens) for answer in answers), equal, sum_entropy(self.probe_logprobs),
                len(self.probe_logprobs),
                *sum_pass_at(groups, pass_at)]
        (num_groups, num_answers, reward, truncated, answer_tokens, row_tokens, equal, entropy, probe_tokens,
         *passed) = add_up(sums, device)
        self.num_tokens += int(row_tokens)
        self.stats = {"reward": reward / num_answers,
                      **{f"pass_at_{k}": value / num_groups for k, value in zip(pass_at, passed, strict=True)},
                      "answer_tokens": answer_tokens / num_answers, "entropy_nats": entropy / probe_tokens,
                      "truncated_frac": truncated / num_answers, "zero_variance_frac": equal / num_groups,
                      "row_tokens": int(row_tokens), "sample_sec": sample_sec,
                      "sample_tokens_per_sec": answer_tokens / sample_sec}


def get_pass_at(num_samples: int) -> list[int]:
    """The k of pass@k that so many samples can tell."""
    return [k for k in PASS_AT if k <= num_samples]


def sum_pass_at(groups: Sequence[Sequence[Answer]], pass_at: Sequence[int]) -> list[float]:
    """For each k, pass@k summed over the questions; an answer passes with a reward of 1."""
    return [sum(compute_pass_at(len(group), sum(answer.reward >= 1 for answer in group), k) for group in groups)
            for k in pass_at]


def add_up(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value summed over all ranks. Collective."""
    # only where there are other ranks on the device, which needn't know float64
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64,
                                       device=device if dist.is_initialized() else "cpu")).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def evaluate_answers(model: GPT, tokenizer, questions: Sequence[Question], *, num_samples: int, max_new_tokens: int,
                     seed: int, ranks: Ranks, sample_rows: int) -> dict:
    """How many held-out questions are answered: greedily, and with samples at temperature 1. Collective.

    The samples are drawn with the same random numbers each time, so that two evaluations differ by the model alone.
    """
    engine, values = Engine(model, tokenizer, sample_rows), {}
    pass_at = get_pass_at(num_samples)
    for name in dict.fromkeys(question.task_name for question in questions):
        of_task = [question for question in questions if question.task_name == name]
        share = take_share(len(of_task), ranks)
        asked = [of_task[i] for i in share]
        greedy = write_answers(engine, asked, 1, max_new_tokens, 0.0, seed)
        drawn = write_answers(engine, asked, num_samples, max_new_tokens, 1.0, get_sampling_seed(seed, 0, share.start))
        cut = sum(answer.is_truncated for group in greedy for answer in group)
        reward = sum(answer.reward for group in drawn for answer in group)
        sums = add_up([*sum_pass_at(greedy, [1]), cut, reward, *sum_pass_at(drawn, pass_at)], model.get_device())
        values |= {f"{name}_problems": len(of_task), f"{name}_greedy_frac": sums[0] / len(of_task),
                   f"{name}_greedy_truncated_frac": sums[1] / len(of_task),
                   f"{name}_reward": sums[2] / len(of_task) / num_samples,
                   **{f"{name}_pass_at_{k}": value / len(of_task) for k, value in zip(pass_at, sums[3:], strict=True)}}
    return values


def get_length_multiple(device: torch.device, use_compile: bool) -> int:
    """What rows are padded to, see LENGTH_MULTIPLE."""
    return DEFAULT_LENGTH_MULTIPLE if use_compile else LENGTH_MULTIPLE.get(device.type, DEFAULT_LENGTH_MULTIPLE)
