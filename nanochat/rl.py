"""Reinforcement learning on tasks that grade an answer: sample answers, learn more of those that beat their group.

    a step: Q questions x S answers, sampled by the model as it is, the calculator in the loop
      -> reward of each by its task -> advantage = reward - mean of the question's answers
      -> PolicyBatch: target -1 on what the model didn't sample, weight = advantage -> train.take_step

REINFORCE (Williams 1992) with the group's mean as baseline (GRPO, arXiv 2402.03300), as pared down since: no division
by the group's standard deviation, which favours questions that are too easy or too hard, and none by an answer's own
length, which favours long wrong ones (arXiv 2503.20783); all tokens of a step count alike (DAPO, arXiv 2503.14476).
Answers are learned from once, right after they are sampled, so there is no ratio to clip; there is no KL penalty, so no
second model. They are sampled at temperature 1 from the whole distribution: any other is another policy's.

Q questions, S answers each, B rows, T tokens.
"""

import bisect
import contextlib
import itertools
import math
import operator
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nanochat.common import Ranks, UserError, sum_over_ranks
from nanochat.config import GPTConfig, count_params
from nanochat.decoding import round_up_rows
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.train import Batch

PASS_AT = (1, 4, 16)       # k of pass@k
PROBE_TOKENS = 1024        # whose distributions are compared before and after a step; at least those of one answer
SAMPLE_ROWS = defaultdict(lambda: 256, cpu=64)    # answers that are sampled at once by default, by device


@dataclass(frozen=True)
class Question:
    """A problem of a task, and all tokens up to its answer."""
    task_name:    str
    task:         object       # tasks.common.Task with a reward
    conversation: dict
    prompt:       list[int]


def make_questions(tasks: Mapping[str, object], tokenizer, max_prompt_tokens: int) -> list[Question]:
    """The questions of tasks, one task after the other, without those whose prompt is too long."""
    questions = []
    for name, task in tasks.items():
        for i in range(len(task)):
            conversation = task[i]
            try:
                prompt = tokenizer.render_for_completion(conversation)
            except ValueError as error:    # conversations.ConversationError, or a text that isn't one
                raise UserError(f"question {i} of {name} can't be asked ({error}); fetch its data again") from None
            if len(prompt) <= max_prompt_tokens:
                questions.append(Question(name, task, conversation, prompt))
    if not questions:
        raise UserError(f"no question of {', '.join(tasks)} has at most {max_prompt_tokens} tokens, which is what the "
                        "model's context leaves beside an answer; set a smaller --max-new-tokens")
    return questions


def choose_questions(num_questions: int, num: int, seed: int, step: int) -> list[int]:
    """The questions of a step: the next `num` of an endless list, in which each epoch has an order of its own."""
    epoch, place = divmod(step * num, num_questions)
    num_epochs = -(-(place + num) // num_questions)
    orders = [np.random.default_rng((seed, epoch + i)).permutation(num_questions) for i in range(num_epochs)]
    return np.concatenate(orders)[place:place + num].tolist()


def get_sampling_seed(seed: int, step: int, question: int) -> int:
    """The seed of a step's question: consecutive ones within a step, as Engine.generate_many has them."""
    return (seed << 64) + (step << 32) + question


def take_share(num: int, ranks: Ranks) -> range:
    """This rank's share of `num` items: neighbours, as many as the other ranks have, or one fewer."""
    return range(num * ranks.rank // ranks.world_size, num * (ranks.rank + 1) // ranks.world_size)


@dataclass(frozen=True)
class Rollout:
    """A sampled answer to a question, and its reward."""
    tokens:       list[int]   # prompt and answer, with the end token where it came to one
    masks:        list[int]   # 1: sampled; 0: the prompt, and what the calculator put in
    num_prompt:   int
    text:         str         # of the answer, without its end token: what is graded
    reward:       float       # from 0 to 1; 1 is a pass
    is_truncated: bool        # it came to max_new_tokens before its end token; graded like any other, as in evaluations


def write_answers(engine: Engine, questions: Sequence[Question], num_samples: int, max_new_tokens: int,
                  temperature: float, seed: int) -> list[list[Rollout]]:
    """`num_samples` answers to each question; question i has the seed `seed` + i."""
    results = engine.generate_many([question.prompt for question in questions], num_samples, max_new_tokens,
                                   temperature, seed=seed)
    groups = []
    for question, (rows, masks) in zip(questions, results, strict=True):
        groups.append([])
        for tokens, mask in zip(rows, masks, strict=True):
            has_end, num_prompt = tokens[-1] in engine.end_tokens, len(question.prompt)
            text = engine.tokenizer.decode(tokens[num_prompt:-1] if has_end else tokens[num_prompt:])
            groups[-1].append(Rollout(tokens, mask, num_prompt, text,
                                      float(question.task.reward(question.conversation, text)), not has_end))
    return groups


def compute_pass_at(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that at least one of k samples passes, estimated without bias from n >= k (arXiv 2107.03374)."""
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def compute_advantages(rewards: Tensor) -> Tensor:
    """(Q, S) rewards -> (Q, S) advantages: each one's distance from its group's mean; exactly 0 where all are equal.
    Exactly, because a mean is rounded: otherwise the optimizer would take a step on rounding errors alone."""
    is_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)  # (Q, 1)
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(is_equal, 0)


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Rows with an answer each, padded at their end; those without advantage come last.

    An answer without advantage counts in the loss's denominator, as its gradient, zero, is part of the mean: without it
    the step would grow as fewer questions still teach something. (DAPO samples other questions in its place, which
    costs answers; arXiv 2503.20783 keeps the constant, as here.) The forward pass leaves it out.
    """
    length_multiple: int

    def split(self, num_rows: int):
        """Micro-batches of at most `num_rows` rows, cut to their longest; none where no row has an advantage."""
        for micro in super().split(num_rows):
            if micro.weights.any():
                longest = int((micro.targets >= 0).any(dim=0).nonzero()[-1]) + 1
                tokens = slice(0, round_up(longest, self.length_multiple))
                yield micro.map(operator.itemgetter((slice(None), tokens)))


def make_batch(answers: Sequence[Rollout], advantages: Sequence[float], length_multiple: int) -> PolicyBatch:
    """The rows of answers: those with an advantage first, the longest first, so that few micro-batches are long."""
    order = sorted(range(len(answers)), key=lambda i: (advantages[i] == 0, -len(answers[i].tokens), i))
    T = round_up(max(len(answer.tokens) for answer in answers) - 1, length_multiple)
    inputs = torch.zeros(len(answers), T, dtype=torch.int64)  # padding at the end: no token before it attends to it
    targets, weights = torch.full_like(inputs, -1), torch.zeros(len(answers), T)
    for row, i in enumerate(order):
        tokens, mask = torch.tensor(answers[i].tokens), torch.tensor(answers[i].masks)
        inputs[row, :len(tokens) - 1] = tokens[:-1]
        targets[row, :len(tokens) - 1] = tokens[1:].where(mask[1:] > 0, -1)
        weights[row] = advantages[i]
    return PolicyBatch(inputs, targets, weights, length_multiple)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def choose_probe(groups: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    """One answer to each question, up to PROBE_TOKENS: a fair sample of the step at a fraction of its cost."""
    firsts = [group[0] for group in groups]
    totals = list(itertools.accumulate(sum(answer.masks) for answer in firsts))
    return firsts[:max(1, bisect.bisect_right(totals, PROBE_TOKENS))]


@torch.no_grad()
def compute_logprobs(model: GPT, batch: Batch, micro_rows: int) -> Tensor:
    """Log probabilities of all tokens where the targets were sampled, by the model as it is: (targets, V)."""
    chunks = []
    for micro in Batch.split(batch, micro_rows):
        micro = micro.to(model.get_device())
        x = model.forward_trunk(micro.inputs)[micro.targets >= 0]  # (targets, C)
        chunks.append(model.unembed(x).log_softmax(dim=-1))        # (targets, V)
    return torch.cat(chunks)


def sum_entropy(logprobs: Tensor) -> float:
    """Entropy of distributions (targets, V), in nats, summed."""
    return -float((logprobs.exp() * logprobs).sum())


def sum_kl(before: Tensor, after: Tensor) -> float:
    """KL(before || after) of distributions (targets, V), in nats, summed."""
    return float((before.exp() * (before - after)).sum())


def keep_matrices(optimizer: MuonAdamW) -> MuonAdamW:
    """The optimizer of the transformer's matrices alone; all other parameters are frozen.

    Adam divides a gradient by its own size. Most of the gradient that a few answers give to embeddings, head and
    scalars is noise, which Adam would make a step of full size (dev/LOG.md, "RL: what kept the reward from rising").
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.requires_grad_(group["name"] == "matrices")
    return MuonAdamW([group for group in optimizer.param_groups if group["name"] == "matrices"], optimizer.names,
                     optimizer.matmul_dtype)


def count_engine_bytes(config: GPTConfig, num_rows: int, num_tokens: int) -> int:
    """Bytes of 16-bit numbers that the engine of `Rollouts` keeps on CUDA, where its graphs know their addresses: a
    cache of so many rows and tokens, and the linear layers' weights."""
    params = count_params(config)
    cache = 2 * config.n_layer * round_up_rows(num_rows) * (num_tokens + 1) * config.kv_dim
    return 2 * (cache + params["transformer_matrices"] + params.get("inactive_experts", 0) + params["lm_head"])


@dataclass(frozen=True)
class RolloutSettings:
    """How answers are sampled."""
    num_samples:     int    # to each question
    max_new_tokens:  int    # of an answer, the calculator's included
    seed:            int
    sample_rows:     int    # answers that a rank samples at once


@dataclass
class Rollouts:
    """Asks the model each step's questions, this rank its share. Questions and answers follow from seed and step."""
    questions:       Sequence[Question]
    tokenizer:       object
    sampling:        RolloutSettings
    num_questions:   int     # of a step, all ranks together
    ranks:           Ranks
    length_multiple: int
    longest_prompt:  int     # in tokens, of held-out questions as well, which the engine answers in evaluations
    num_tokens:      int = 0                               # that have been learned from
    stats:           dict = field(default_factory=dict)    # of the last step, all ranks together but for times
    sample:          dict = field(default_factory=dict)    # the first of its answers
    engine:          Engine | None = None                  # which serves all steps, and evaluations

    def state_dict(self) -> dict:
        """What a continued run needs to know; all else follows from the step."""
        return {"num_tokens": self.num_tokens}

    def give_back(self) -> None:
        """Take back the last step's count, because nothing was learned from its answers."""
        self.num_tokens -= self.stats["row_tokens"]

    @contextlib.contextmanager
    def refreshed_engine(self, model: GPT) -> Iterator[Engine]:
        """An engine with the model's weights as they are now, which frees its cache at the end, without CUDA graphs.

        These serve all steps as long as weights and cache stay where they are. So the cache has room for the longest
        sequence from the start.
        """
        if self.engine is None:
            self.engine = Engine(model, self.tokenizer, self.sampling.sample_rows,
                                 cache_tokens=self.longest_prompt + self.sampling.max_new_tokens)
        else:
            self.engine.refresh(model)
        try:
            yield self.engine
        finally:    # also where memory runs out, or a task can't grade an answer
            self.engine.forget()

    def next_step(self, model: GPT, step: int, micro_rows: int) -> PolicyBatch:
        """The batch of this rank's answers, weighted by their advantages. Collective: all ranks call it."""
        start_time, sampling = time.perf_counter(), self.sampling
        chosen = choose_questions(len(self.questions), self.num_questions, sampling.seed, step)
        share = take_share(len(chosen), self.ranks)
        asked = [self.questions[chosen[i]] for i in share]
        with self.refreshed_engine(model) as engine:
            groups = write_answers(engine, asked, sampling.num_samples, sampling.max_new_tokens, 1.0,
                                   get_sampling_seed(sampling.seed, step, share.start))
        first = groups[0][0]
        self.sample = {"prompt": asked[0].conversation["messages"][-2]["content"], "text": first.text,
                       "reward": first.reward}
        rewards = torch.tensor([[answer.reward for answer in group] for group in groups], dtype=torch.float64)
        sample_sec = time.perf_counter() - start_time
        probe = choose_probe(groups)
        self.probe = make_batch(probe, [0.0] * len(probe), self.length_multiple)
        self.probe_logprobs = compute_logprobs(model, self.probe, micro_rows)
        self._count(groups, sample_sec)
        return make_batch(sum(groups, []), compute_advantages(rewards).flatten().tolist(), self.length_multiple)

    def measure_step(self, model: GPT, micro_rows: int) -> None:
        """Add to `stats` the KL of the policy before the step from that after it, in nats an answer. Collective.
        A healthy step moves hundredths of a nat (assumption, not studied); above tenths, rewards fell."""
        kl = sum_kl(self.probe_logprobs, compute_logprobs(model, self.probe, micro_rows))
        sums = add_up({"kl": kl, "answers": len(self.probe.inputs)})
        self.stats["kl_nats"] = sums["kl"] / sums["answers"]

    def get_values(self, step_sec: float) -> dict:
        """The values to log for a step that took so long. Tokens are those of prompts and answers, without padding."""
        row_tokens, train_sec = self.stats["row_tokens"], step_sec - self.stats["sample_sec"]
        return {**self.stats, "tokens": self.num_tokens, "tokens_per_sec": row_tokens / step_sec,
                "train_tokens_per_sec": row_tokens / train_sec, "mfu_pct": None}

    def _count(self, groups: list[list[Rollout]], sample_sec: float) -> None:
        """Set `stats`."""
        answers = sum(groups, [])
        sums = add_up({
            "questions": len(groups), "answers": len(answers), "reward": sum(answer.reward for answer in answers),
            "truncated": sum(answer.is_truncated for answer in answers),
            "answer_tokens": sum(len(answer.tokens) - answer.num_prompt for answer in answers),
            "row_tokens": sum(len(answer.tokens) for answer in answers),
            "equal": sum(len({answer.reward for answer in group}) == 1 for group in groups),
            "entropy": sum_entropy(self.probe_logprobs), "probe_tokens": len(self.probe_logprobs),
            **sum_pass_at(groups, self.sampling.num_samples)})
        num_questions, num_answers, row_tokens = sums["questions"], sums["answers"], int(sums["row_tokens"])
        self.num_tokens += row_tokens
        passed = {key: value / num_questions for key, value in sums.items() if key.startswith("pass_at_")}
        self.stats = {
            "reward": sums["reward"] / num_answers, **passed, "answer_tokens": sums["answer_tokens"] / num_answers,
            "entropy_nats": sums["entropy"] / sums["probe_tokens"], "truncated_frac": sums["truncated"] / num_answers,
            "zero_variance_frac": sums["equal"] / num_questions, "row_tokens": row_tokens, "sample_sec": sample_sec,
            "sample_tokens_per_sec": sums["answer_tokens"] / sample_sec}


def sum_pass_at(groups: Sequence[Sequence[Rollout]], num_samples: int) -> dict[str, float]:
    """For each k that so many samples allow, pass@k summed over the questions; a reward of 1 is a pass."""
    num_passed = [sum(answer.reward >= 1 for answer in group) for group in groups]
    return {f"pass_at_{k}": sum(compute_pass_at(num_samples, n, k) for n in num_passed)
            for k in PASS_AT if k <= num_samples}


def add_up(values: dict[str, float]) -> dict[str, float]:
    """Each value summed over all ranks. Collective."""
    sums = sum_over_ranks(torch.tensor(list(values.values()), dtype=torch.float64)).tolist()
    return dict(zip(values, sums, strict=True))


def evaluate_answers(engine: Engine, questions: Sequence[Question], sampling: RolloutSettings, ranks: Ranks) -> dict:
    """Rewards on held-out questions: of greedy answers, and of samples at temperature 1. Collective.
    The samples are drawn with the same random numbers each time, so that two evaluations differ by the model alone."""
    values = {}
    num_samples, max_new_tokens, seed = sampling.num_samples, sampling.max_new_tokens, sampling.seed
    for name in dict.fromkeys(question.task_name for question in questions):
        of_task = [question for question in questions if question.task_name == name]
        share = take_share(len(of_task), ranks)
        asked = [of_task[i] for i in share]
        greedy = write_answers(engine, asked, 1, max_new_tokens, 0.0, seed)
        drawn = write_answers(engine, asked, num_samples, max_new_tokens, 1.0, get_sampling_seed(seed, 0, share.start))
        sums = add_up({"greedy_frac": sum_pass_at(greedy, 1)["pass_at_1"],
                       "greedy_truncated_frac": sum(answer.is_truncated for answer in sum(greedy, [])),
                       "reward": sum(answer.reward for answer in sum(drawn, [])), **sum_pass_at(drawn, num_samples)})
        values |= {f"{name}_problems": len(of_task), **{f"{name}_{key}": n / len(of_task) for key, n in sums.items()}}
        values[f"{name}_reward"] /= num_samples
    return values


def get_length_multiple(device: torch.device, use_compile: bool) -> int:
    """The number that the length of rows is padded to a multiple of: where kernels are compiled for a length, few
    lengths matter more than padding."""
    return 16 if device.type == "cpu" and not use_compile else 128
