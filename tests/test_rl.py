"""RL: golden values of every formula; then the script: learning, resume, ranks, skipped steps, refusals."""

import copy
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dev import rl_curve
from nanochat import rl
from nanochat.chat_stage import set_schedules
from nanochat.checkpoint_manager import load_model
from nanochat.common import Ranks, UserError
from nanochat.decoding import make_cache
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.rl import (
    Question,
    Rollout,
    Rollouts,
    RolloutSettings,
    choose_probe,
    choose_questions,
    compute_advantages,
    compute_logprobs,
    compute_pass_at,
    count_engine_bytes,
    evaluate_answers,
    get_sampling_seed,
    keep_matrices,
    make_batch,
    make_questions,
    sum_entropy,
    sum_kl,
    take_share,
    write_answers,
)
from nanochat.run import read_metrics
from nanochat.scaling import make_rl_plan
from nanochat.train import Batch, train_step
from scripts import base_train, chat_cli, chat_rl, chat_sft
from tasks.arithmetic import Arithmetic
from tests.helpers import (
    BYTE_TOKENIZER,
    PER_PROCESS_KEYS,
    assert_stopped_after,
    hang_up_in_step,
    leave_out_stops,
    make_base,
    make_model,
    out_of_memory_at,
    read_state,
    run_on_ranks,
    send_signal_at,
    start_script,
)
from tests.programs.rl_run import Vowels, train

CONFIG = GPTConfig(sequence_len=16, vocab_size=80, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
# What differs between two runs of the same steps
TIME_KEYS = PER_PROCESS_KEYS | {"sample_sec", "sample_tokens_per_sec", "train_tokens_per_sec"}


# ---------------------------------------------------------------------------------------------------------------------
# Golden values


def test_bytes_of_an_engine_are_those_of_its_tensors():
    """What it keeps beside a step on a GPU: six rows are eight there."""
    config = GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=64)
    cache = make_cache(GPT(config, torch.bfloat16), 8, 20, is_compiled=True)
    weights = sum(layer.weight.numel() for block in GPT(config).transformer.h for layer in block.modules()
                  if isinstance(layer, Linear)) + config.padded_vocab_size * 64
    kept = cache.k_cache.untyped_storage().nbytes() + cache.v_cache.untyped_storage().nbytes() + 2 * weights
    assert count_engine_bytes(config, 6, 20) == pytest.approx(kept, rel=0.01)


def test_advantages():
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]], dtype=torch.float64)
    assert compute_advantages(rewards).tolist() == [
        [0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_equal_rewards_have_no_advantage_however_the_mean_is_rounded():
    rewards = torch.full((1, 3), 0.1, dtype=torch.float64)
    assert rewards.mean() != 0.1  # so that the test could fail
    assert compute_advantages(rewards).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(("num_samples", "num_passed", "k", "expected"), [
    (4, 2, 1, 1 / 2),
    (16, 1, 4, 1 / 4),               # 1 - C(15, 4) / C(16, 4) = 1 - 1365 / 1820
    (16, 4, 4, 1 - 495 / 1820),      # C(12, 4) = 495
    (16, 13, 4, 1.0),                # any four hold a pass: only three failed
    (16, 0, 16, 0.0),
    (16, 1, 16, 1.0),
])
def test_pass_at_k(num_samples, num_passed, k, expected):
    assert compute_pass_at(num_samples, num_passed, k) == pytest.approx(expected, abs=1e-12)


# A finished answer with a tool call (12 and 13 are the calculator's), one that was cut short, one like its group
ENDED = Rollout([1, 2, 3, 10, 11, 12, 13, 9], [0, 0, 0, 1, 1, 0, 0, 1], 3, "", 1.0, False)
CUT = Rollout([1, 4, 20, 21], [0, 0, 1, 1], 2, "", 0.0, True)
EVEN = Rollout([1, 5, 6, 7, 30, 9], [0, 0, 0, 0, 1, 1], 4, "", 1.0, False)


def test_rows_targets_and_weights():
    """The end token that was sampled is a target; prompt, tool output and padding aren't."""
    batch = make_batch([CUT, EVEN, ENDED], [-0.25, 0.0, 0.75], length_multiple=4)
    assert batch.inputs.tolist() == [[1, 2, 3, 10, 11, 12, 13, 0], [1, 4, 20, 0, 0, 0, 0, 0], [1, 5, 6, 7, 30, 0, 0, 0]]
    assert batch.targets.tolist() == [[-1, -1, 10, 11, -1, -1, 9, -1], [-1, 20, 21, -1, -1, -1, -1, -1],
                                      [-1, -1, -1, 30, 9, -1, -1, -1]]
    assert batch.weights[:, 0].tolist() == [0.75, -0.25, 0]
    assert (batch.weights == batch.weights[:, :1]).all()


def test_micro_batches_are_short_and_without_what_teaches_nothing():
    batch = make_batch([CUT, EVEN, ENDED], [-0.25, 0.0, 0.75], length_multiple=4)
    assert [micro.inputs.tolist() for micro in batch.split(1)] == [[[1, 2, 3, 10, 11, 12, 13, 0]], [[1, 4, 20, 0]]]
    assert [micro.inputs.shape for micro in batch.split(2)] == [(2, 8)]
    assert list(make_batch([EVEN], [0.0], 4).split(1)) == []


def make_policy(uniform):
    model = make_model(CONFIG, torch.float64)
    if uniform:
        torch.nn.init.zeros_(model.lm_head.weight)  # every token has probability 1 / 80
    return model


def test_loss_is_normalised_by_the_sampled_tokens_of_the_whole_step():
    """3 tokens of .75, 2 of -.25, 2 of 0, each of log 80 nats: (2.25 - .5) / 7 = 1 / 4 of log 80 = 4.38203."""
    model = make_policy(uniform=True)
    batch = make_batch([CUT, EVEN, ENDED], [-0.25, 0.0, 0.75], length_multiple=4)
    stats = train_step(model, model.setup_optimizer(), batch, micro_rows=1)
    assert stats.num_targets == 7 and stats.loss == pytest.approx(4.38203 / 4, abs=1e-5)


@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_step_is_that_of_the_uncut_rows(micro_rows):
    """Cutting padding off and leaving out rows without advantage changes nothing."""
    batch = make_batch([CUT, EVEN, ENDED, EVEN], [-0.25, 0.0, 0.75, 0.0], length_multiple=4)
    results = []
    for rows, num in ((batch, micro_rows), (Batch(batch.inputs, batch.targets, batch.weights), 4)):
        model = make_policy(uniform=False)
        stats = train_step(model, model.setup_optimizer(), rows, num)
        results.append((stats.loss, stats.grad_norm, stats.num_targets))
        assert stats.skipped == "" and stats.grad_norm > 0.01
    assert results[0] == pytest.approx(results[1], rel=1e-10)


def test_gradient_is_reinforce():
    """Against the formula, written down with autograd: - sum over sampled tokens of A log p / number of them."""
    batch, model = make_batch([CUT, EVEN, ENDED], [-0.25, 0.0, 0.75], length_multiple=4), make_policy(uniform=False)
    loss = 0.0
    for answer, advantage in ((CUT, -0.25), (EVEN, 0.0), (ENDED, 0.75)):
        logprobs = model(torch.tensor([answer.tokens]))[0].log_softmax(dim=-1)
        for t in range(1, len(answer.tokens)):
            if answer.masks[t]:
                loss = loss - advantage * logprobs[t - 1, answer.tokens[t]] / 7
    loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([param.grad.norm() for param in model.parameters()
                                                 if param.grad is not None]))
    model.zero_grad()
    stats = train_step(model, model.setup_optimizer(), batch, micro_rows=3)
    assert stats.loss == pytest.approx(loss.item(), rel=1e-9)
    assert stats.grad_norm == pytest.approx(norm.item(), rel=1e-6)


def test_entropy():
    """log 80 at each of the 5 sampled tokens of a uniform model; of another, as its probabilities say."""
    batch = make_batch([ENDED, CUT], [0.0, 0.0], length_multiple=4)
    uniform = compute_logprobs(make_policy(uniform=True), batch, 1)
    assert uniform.shape == (5, 80) and sum_entropy(uniform) / 5 == pytest.approx(math.log(80), rel=1e-12)
    model = make_policy(uniform=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
    probs = model(torch.tensor([CUT.tokens]))[0].softmax(dim=-1)
    expected = -(probs * probs.log()).sum(dim=-1)[1:3].sum().item()  # before tokens 2 and 3, which were sampled
    assert sum_entropy(compute_logprobs(model, make_batch([CUT], [0.0], 4), 1)) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.99 * 2 * math.log(80)


def test_divergence():
    """By hand for two tokens; of a model and itself none."""
    before, after = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    assert sum_kl(before, after) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert sum_kl(before, before) == 0


def test_probe_is_an_answer_to_each_question_while_there_is_room():
    long = Rollout([1] + [5] * 700, [0] + [1] * 700, 1, "", 0.0, True)
    assert choose_probe([[ENDED, CUT], [CUT, ENDED]]) == [ENDED, CUT]
    assert choose_probe([[long], [CUT], [long], [CUT]]) == [long, CUT]
    assert choose_probe([[replace(long, masks=[1] * 2000)], [CUT]])[0].masks == [1] * 2000


def make_scripted(monkeypatch, answers):
    """`write_answers` that gives answers[temperature][a question's prompt]; returns its calls."""
    calls = []

    def write(engine, questions, num_samples, max_new_tokens, temperature, seed):
        calls.append((num_samples, temperature, [seed + i for i in range(len(questions))]))
        return [answers[temperature][question.prompt[0]] for question in questions]
    monkeypatch.setattr(rl, "write_answers", write)
    return calls


def test_figures_of_an_evaluation(monkeypatch):
    """By task: of the greedy answers those that pass, with the whole reward; of the samples the mean and pass@k."""
    def grade(*rewards):
        return [replace(CUT, reward=reward, is_truncated=reward == 0) for reward in rewards]
    calls = make_scripted(monkeypatch, {
        0.0: {1: grade(1.0), 2: grade(0.5), 3: grade(0.0)},
        1.0: {1: grade(1.0, 0.0, 0.5, 0.5), 2: grade(0.0, 0.0, 0.0, 0.0), 3: grade(1.0, 1.0, 1.0, 0.0)}})
    questions = [Question(name, None, {}, [number]) for name, number in (("a", 1), ("a", 2), ("b", 3))]
    values = evaluate_answers(None, questions, RolloutSettings(4, 9, seed=3, sample_rows=2), Ranks())
    assert values == {
        "a_problems": 2, "a_greedy_frac": 0.5, "a_greedy_truncated_frac": 0, "a_reward": 0.25, "a_pass_at_1": 0.125,
        "a_pass_at_4": 0.5, "b_problems": 1, "b_greedy_frac": 0, "b_greedy_truncated_frac": 1, "b_reward": 0.75,
        "b_pass_at_1": 0.75, "b_pass_at_4": 1}
    assert [call[:2] for call in calls] == [(1, 0.0), (4, 1.0)] * 2


def make_rollouts(ranks=Ranks(), num_questions=2):    # noqa: B008 (frozen)
    conversation = {"messages": [{"content": "Why?"}, {}]}
    questions = [Question("a", None, conversation, [number]) for number in (1, 2)]
    return Rollouts(questions, BYTE_TOKENIZER, RolloutSettings(2, 9, 3, 2), num_questions, ranks, 4, 9)


def test_figures_of_a_step(monkeypatch):
    """Two questions: of one an answer passes and another is cut short; both answers to the other one are alike."""
    make_scripted(monkeypatch, {1.0: {1: [ENDED, CUT], 2: [EVEN, EVEN]}})
    rollouts = make_rollouts()
    rollouts.next_step(make_policy(uniform=True), 0, 4)
    expected = {"reward": 0.75, "pass_at_1": 0.75, "answer_tokens": 11 / 4, "entropy_nats": math.log(80),
                "truncated_frac": 0.25, "zero_variance_frac": 0.5, "row_tokens": 24}
    assert {key: rollouts.stats[key] for key in expected} == pytest.approx(expected)
    model, kl = make_policy(uniform=False), 0.0
    rollouts.measure_step(model, 4)
    for answer, places in ((ENDED, (2, 3, 6)), (EVEN, (3, 4))):    # before the tokens that were sampled
        logprobs = model(torch.tensor([answer.tokens]))[0, list(places)].log_softmax(dim=-1)
        kl += -(logprobs.mean(dim=-1) + math.log(80)).sum().item()    # from a uniform distribution
    assert rollouts.stats["kl_nats"] == pytest.approx(kl / 2, rel=1e-9)


def test_each_question_of_each_step_has_random_numbers_of_its_own(monkeypatch):
    """The same on one rank and on two."""
    calls, model, seeds = make_scripted(monkeypatch, {1.0: {1: [ENDED, CUT], 2: [EVEN, EVEN]}}), make_policy(True), {}
    for world_size in (1, 2):
        for step in range(3):
            for rank in range(world_size):
                make_rollouts(Ranks(rank, rank, world_size), num_questions=4).next_step(model, step, 4)
        seeds[world_size] = [seed for call in calls for seed in call[2]]
        calls.clear()
    assert seeds[1] == seeds[2] and len(set(seeds[1])) == 3 * 4


def test_matrices_alone_learn():
    """Muon's parameters move, and they as with the whole optimizer; all others stay, and have no state."""
    batch, models = make_batch([CUT, ENDED], [-0.25, 0.75], length_multiple=4), []
    for choose in (keep_matrices, lambda optimizer: optimizer):
        model = make_policy(uniform=False)
        optimizer, before = choose(model.setup_optimizer()), copy.deepcopy(dict(model.named_parameters()))
        train_step(model, optimizer, batch, micro_rows=2)
        models.append((dict(model.named_parameters()), before, optimizer))
    (ours, before, optimizer), (whole, _, _) = models
    for name, param in ours.items():
        is_matrix = name.startswith("transformer.h.")
        assert torch.equal(param, whole[name] if is_matrix else before[name]), name
        assert any(key.startswith(name) for key in optimizer.get_named_state()) == is_matrix


def test_step_without_advantage_is_skipped():
    model = make_policy(uniform=False)
    optimizer, before = model.setup_optimizer(), [param.clone() for param in model.parameters()]
    stats = train_step(model, optimizer, make_batch([EVEN, EVEN], [0.0, 0.0], 4), micro_rows=1)
    assert stats.skipped == "no weights" and stats.num_targets == 4 and optimizer.num_steps == 0
    assert all(torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_plan():
    shape = {"examples_per_step": 16, "num_samples": 16, "max_new_tokens": 256, "batch_lr_scale": 0.25}
    plan = make_rl_plan(CONFIG, 6.0, num_questions=1000, **shape)
    assert (plan.num_iterations, plan.batch_tokens, plan.batch_lr_scale, plan.weight_decay) == (63, 65536, 0.25, 0.0)
    assert make_rl_plan(CONFIG, 6.0, num_questions=1000, num_epochs=2, **shape).num_iterations == 125
    assert make_rl_plan(CONFIG, 6.0, num_questions=1000, num_iterations=5, **shape).horizon == "iterations"


# ---------------------------------------------------------------------------------------------------------------------
# Questions and answers


def test_questions_of_a_step():
    """Each question once an epoch, in an order that follows from seed, step and epoch, whoever asks when."""
    steps = [choose_questions(10, 4, seed=1, step=step) for step in range(5)]
    flat = sum(steps, [])
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert choose_questions(10, 4, seed=1, step=3) == steps[3] != choose_questions(10, 4, seed=2, step=3)
    assert sorted(choose_questions(3, 6, seed=1, step=0)) == [0, 0, 1, 1, 2, 2]   # fewer questions than a step asks


def test_seeds_and_shares():
    seeds = {get_sampling_seed(seed, step, question) for seed in range(3) for step in range(5) for question in range(7)}
    assert len(seeds) == 3 * 5 * 7
    for world_size in (1, 2, 3, 8):
        shares = [take_share(6, Ranks(rank, rank, world_size)) for rank in range(world_size)]
        assert [i for share in shares for i in share] == list(range(6))


def test_what_is_graded(byte_tokenizer):
    """The answer without its end token, with the calculator's output; a truncated answer is graded like any other."""
    encode, special = byte_tokenizer.encode, byte_tokenizer.encode_special
    task = Arithmetic("train", size=1)
    conversation = task[0]
    value = conversation["messages"][1]["content"][1]["text"]
    prompt = byte_tokenizer.render_for_completion(conversation)
    output = [special("<|output_start|>"), *encode(value), special("<|output_end|>")]
    right = [*output, *encode(f"= {value}")]
    rows = [prompt + right + [special("<|assistant_end|>")], prompt + right, prompt + encode("= x")]
    masks = [[0] * (len(prompt) + len(output)) + [1] * (len(row) - len(prompt) - len(output)) for row in rows]
    engine = SimpleNamespace(tokenizer=byte_tokenizer, end_tokens={special("<|assistant_end|>")},
                             generate_many=lambda prompts, *args, **kwargs: [(rows, masks)])
    (answers,) = write_answers(engine, [Question("Arithmetic", task, conversation, prompt)], 3, 99, 1.0, seed=0)
    text = f"<|output_start|>{value}<|output_end|>= {value}"
    assert [answer.text for answer in answers] == [text, text, "= x"]
    assert [answer.reward for answer in answers] == [1, 1, 0]
    assert [answer.is_truncated for answer in answers] == [False, True, True]
    assert answers[0].tokens == rows[0] and answers[0].masks == masks[0] and answers[0].num_prompt == len(prompt)


def test_answers_of_the_engine(base_dir):
    """Those that end keep their end token, sampled; the others have all the tokens that they may."""
    model, tokenizer, _ = load_model("sft", torch.device("cpu"))
    questions = make_questions({"Vowels": Vowels(stop=4)}, tokenizer, 100)
    groups = write_answers(Engine(model, tokenizer), questions, 32, 12, 1.0, seed=5)
    ended = [answer for group in groups for answer in group if not answer.is_truncated]
    cut = [answer for group in groups for answer in group if answer.is_truncated]
    assert len(ended) > 2 and len(cut) > 50
    for answer in ended:
        assert tokenizer.decode([answer.tokens[-1]]) in ("<|assistant_end|>", "<|bos|>") and answer.masks[-1] == 1
        assert not answer.text.endswith(("<|assistant_end|>", "<|bos|>"))
    assert all(len(answer.tokens) == answer.num_prompt + 12 for answer in cut)
    alone = write_answers(Engine(model, tokenizer), questions[2:3], 3, 12, 1.0, seed=7)[0]  # not who else is asked
    assert [answer.tokens for answer in alone] == [answer.tokens for answer in groups[2][:3]]


def test_answers_to_learn_from_are_the_policys_own(base_dir, monkeypatch):
    """REINFORCE's gradient is that of the distribution that was sampled: temperature 1, all tokens."""
    calls = []
    monkeypatch.setattr(rl, "write_answers", lambda *args: calls.append(args) or write_answers(*args))
    model, tokenizer, _ = load_model("sft", torch.device("cpu"))
    questions = make_questions({"Vowels": Vowels()}, tokenizer, 99)[:2]
    sampling = RolloutSettings(2, 4, seed=3, sample_rows=4)
    Rollouts(questions, tokenizer, sampling, 2, Ranks(), 1, 99).next_step(model, 0, 4)
    assert [args[4] for args in calls] == [1.0]


def test_held_out_questions_are_not_those_to_learn_from(byte_tokenizer):
    questions, held_out = chat_rl.load_questions(["Arithmetic:300"], None, 60, byte_tokenizer, 200)
    asked = [{tuple(question.prompt) for question in some} for some in (questions, held_out)]
    assert len(asked[0]) > 250 and len(asked[1]) > 50 and not asked[0] & asked[1]


def test_held_out_questions_are_spread_over_their_task(byte_tokenizer, monkeypatch):
    """Which may be sorted, by subject say."""
    monkeypatch.setattr(chat_rl, "make_task", lambda name, split, count, words: Vowels(stop=count))
    questions, held_out = chat_rl.load_questions(["GSM8K:20"], None, 4, byte_tokenizer, 200)
    assert [question.conversation for question in questions] == list(Vowels(stop=20))
    assert [question.conversation for question in held_out] == [Vowels()[i] for i in (0, 7, 15, 22)]


def test_an_engine_keeps_no_cache_after_an_error(byte_tokenizer):
    """Such as memory that runs out, or an answer that a task can't grade."""
    question = Question("a", SimpleNamespace(reward=lambda *answer: 1 / 0), {}, [1, 2, 3])
    rollouts = Rollouts([question], byte_tokenizer, RolloutSettings(2, 4, seed=0, sample_rows=2), 1, Ranks(), 1, 9)
    with pytest.raises(ZeroDivisionError), rollouts.refreshed_engine(make_model()) as engine:
        write_answers(engine, [question], 2, 4, 1.0, seed=0)
    assert engine.cache is None and engine.rows == []
    assert engine.cache_tokens == 9 + 4    # of the longest prompt, which may be a held-out one


def test_the_engine_has_room_for_held_out_questions_too():
    asked, held_out = ([Question("a", None, {}, [1] * length) for length in lengths] for lengths in ((3, 5), (8, 2)))
    recipe = SimpleNamespace(identity={"max_new_tokens": 4}, notes={"sample_rows": 2}, tokenizer=None,
                             get_saved=lambda name: None)
    setup = SimpleNamespace(recipe=recipe, ranks=Ranks(), device=torch.device("cpu"),
                            choices=SimpleNamespace(machine=SimpleNamespace(is_compiled=False)))
    args = SimpleNamespace(num_samples=2, seed=0, examples_per_step=1)
    assert chat_rl.make_rollouts(args, setup, asked, held_out).longest_prompt == 8


def test_a_damaged_question_is_one_sentence(byte_tokenizer):
    task = Vowels()
    task.get_example = lambda index: {"messages": [{"role": "user", "content": None if index else "a"}, {}]}
    with pytest.raises(UserError, match="question 0 of Vowels can't be asked .*fetch its data again"):
        make_questions({"Vowels": task}, byte_tokenizer, 99)
    task.get_example = lambda index: {}["answer"]
    with pytest.raises(UserError, match="example 0 of Vowels can't be used .KeyError: 'answer'.; fetch its data again"):
        make_questions({"Vowels": task}, byte_tokenizer, 99)


def test_long_questions_are_left_out(byte_tokenizer):
    task = Vowels()
    lengths = [len(byte_tokenizer.render_for_completion(task[i])) for i in range(30)]
    questions = make_questions({"Vowels": task}, byte_tokenizer, min(lengths) + 2)
    assert [q.prompt for q in questions] == [byte_tokenizer.render_for_completion(task[i]) for i in range(30)
                                             if i % 7 <= 2]


# ---------------------------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    """A base folder with a model that has seen a few conversations."""
    base_dir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        make_base(base_dir, patch)
        machine = ("--device-type", "cpu", "--compile", "off", "--eval-every", "-1", "--sample-every", "-1")
        base_train.main(["--model-tag", "toy", "--preset", "nanochat-july26", "--data", "toy", "--depth",
                         "2", "--aspect-ratio", "16", "--head-dim",
                         "16", "--max-seq-len", "128", "--num-iterations", "3", "--total-batch-size", "1024",
                         "--dtype", "float32", *machine])
        chat_sft.main(["-i", "base", "-g", "toy", "--tasks", "Arithmetic:40", "--num-iterations", "3", *machine])
        yield base_dir


@pytest.fixture(scope="module")
def byte_tokenizer(base_dir):
    """The toy tokenizer; it encodes any text."""
    return load_model("sft", torch.device("cpu"))[1]


@pytest.fixture(scope="module")
def whole(base_dir):
    """An undisturbed run."""
    return train("whole")


def read_lines(run_dir, kind="train"):
    return [line for line in read_metrics(Path(run_dir)) if line["kind"] == kind]


def assert_same_runs(run_dir, expected_dir):
    """To the bit, but for times."""
    actual, expected = read_state(run_dir), read_state(expected_dir)
    for state in (actual, expected):
        state["lines"] = [{key: value for key, value in line.items() if key not in TIME_KEYS}
                          for line in state["lines"]]
    actual["lines"] = leave_out_stops(actual["lines"], expected["lines"])
    assert actual == expected


def test_run(base_dir, whole, capsys):
    """What it leaves: a checkpoint that answers, a log, a section of the report; it began with the SFT model."""
    run_dir = Path(whole["run_dir"])
    info, lines = json.loads((run_dir / "run.json").read_text()), read_lines(run_dir)
    assert run_dir == base_dir / "runs" / "rl" / "whole" and info["status"] == "finished"
    assert info["source"]["stage"] == "sft" and info["plan"]["horizon"] == "iterations"
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in read_lines(run_dir, "eval")] == [0, 3, 6]
    assert [line["step"] for line in read_lines(run_dir, "sample")] == [6]
    assert [line["lr_frac"] for line in lines] == pytest.approx([0.5 * n / 6 for n in (6, 5, 4, 3, 2, 1)])
    assert lines[0]["entropy_nats"] == pytest.approx(math.log(320), abs=0.1)  # it has learned next to nothing
    assert all(line["pass_at_1"] == 0 and 0 < line["reward"] < 0.4 and line["answer_tokens"] <= 8 for line in lines)
    assert all(line["kl_nats"] > 0 for line in lines)
    assert lines[-1]["tokens"] == whole["tokens"] == sum(line["row_tokens"] for line in lines)
    assert "pass_at_4" in lines[0] and "pass_at_16" not in lines[0]         # four samples can't tell
    assert json.loads((base_dir / "report" / "chat_rl.json").read_text())["stage"] == "rl"
    capsys.readouterr()
    assert train("whole") == whole
    assert "is finished; --resume none or another" in capsys.readouterr().out
    answer = chat_cli.main(["-i", "rl", "-g", "whole", "-p", "Hi", "--max-tokens", "4", "--device-type", "cpu"])
    assert answer["source"] == "rl" and answer["step"] == 6


def test_curve(whole, tmp_path, base_dir):
    rl_curve.main(["whole", "whole", "--out", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file can't be made .*; choose another"):
        rl_curve.main(["whole", "--out", str(tmp_path / "file" / "curve.png")])
    with pytest.raises(UserError, match="nowhere holds no steps of RL"):
        rl_curve.main(["nowhere"])


def test_optimizer_state_is_begun_anew_and_weights_are_not(base_dir):
    result = train("begun", "--save-every-minutes", "0", "--keep-last", "-1", "--stop-at", "1", "--eval-every", "-1")
    folder = Path(result["run_dir"]) / "step_000000"
    ours, theirs = load_file(folder / "model.safetensors"), load_file(
        base_dir / "runs" / "sft" / "toy" / "step_000003" / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(tensor.any() for tensor in load_file(folder / "optim_0.safetensors").values())
    assert json.loads((folder / "meta.json").read_text())["optimizer_steps"] == 0


def test_reward_rises(base_dir):
    """Within a few steps, at a rate for impatient people; on questions that it was never asked, too."""
    model, tokenizer, _ = load_model("sft", torch.device("cpu"))
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # after a few steps it is all but zero, and it stays as it is
    optimizer = keep_matrices(model.setup_optimizer(weight_decay=0.0))
    questions = make_questions({"Vowels": Vowels()}, tokenizer, 99)
    sampling = RolloutSettings(num_samples=16, max_new_tokens=6, seed=42, sample_rows=64)
    rollouts = Rollouts(questions[:20], tokenizer, sampling, 4, Ranks(), length_multiple=16, longest_prompt=99)
    rewards, entropies = [], []
    for step in range(22):
        set_schedules(optimizer, step, 44, init_lr_frac=1.0, warmdown_ratio=1.0)
        train_step(model, optimizer, rollouts.next_step(model, step, 64), micro_rows=64)
        rewards.append(rollouts.stats["reward"])
        entropies.append(rollouts.stats["entropy_nats"])
    assert rewards[0] < 0.1 and rewards[-1] > 0.18 and entropies[-1] < 5
    with rollouts.refreshed_engine(model) as engine:
        values = evaluate_answers(engine, questions[20:], replace(sampling, num_samples=4), Ranks())
    assert values["Vowels_problems"] == 10 and values["Vowels_reward"] > 0.18


def test_steps_without_advantage_change_nothing(base_dir, capsys):
    result = train("flat", "-a", "Flat", "--num-iterations", "2")
    source = base_dir / "runs" / "sft" / "toy" / "step_000003" / "model.safetensors"
    assert (Path(result["run_dir"]) / "step_000002" / "model.safetensors").read_bytes() == source.read_bytes()
    lines = read_lines(result["run_dir"])
    assert [(line["skipped"], line["zero_variance_frac"], line["kl_nats"]) for line in lines] == [
        ("no weights", 1.0, 0)] * 2
    assert result["num_skipped"] == 2 and "SKIPPED: no weights" in capsys.readouterr().out


def test_stopping_and_resuming_changes_nothing(whole):
    assert train("parts", "--stop-at", "4")["step"] == 4
    result = train("parts")
    assert_same_runs(result["run_dir"], whole["run_dir"])
    assert {key: value for key, value in result.items() if key.startswith(("Vowels", "tokens"))} == {
        key: value for key, value in whole.items() if key.startswith(("Vowels", "tokens"))}


def test_out_of_memory_twice(base_dir):
    """In step 0, and again with half the rows; the questions are asked once more, and their tokens counted once."""
    with out_of_memory_at(0, 1), pytest.raises(UserError, match="at step 0 with --device-batch-size 8: "):
        train("short")
    assert_same_runs(train("short")["run_dir"], train("eights", "--device-batch-size", "8")["run_dir"])


def test_terminal_that_closes_saves_and_stops(base_dir, whole):
    with hang_up_in_step(chat_rl, 4):
        train("hung_up")
    assert_stopped_after(base_dir / "runs" / "rl" / "hung_up", 4)
    assert_same_runs(train("hung_up")["run_dir"], whole["run_dir"])


def test_kill_changes_nothing(base_dir):
    more = ("--num-iterations", "16", "--save-every", "4", "--eval-every", "-1")
    process = start_script("tests.programs.rl_run", "killed", *more)
    exit_code, stderr = send_signal_at(process, 6, signal.SIGKILL)
    assert exit_code == -9 and "Traceback" not in stderr, stderr
    killed_at = read_lines(base_dir / "runs" / "rl" / "killed")[-1]["step"]
    assert 6 <= killed_at < 16
    assert_same_runs(train("killed", *more)["run_dir"], train("calm", *more)["run_dir"])


def test_two_ranks_make_the_same_run(base_dir, tmp_path):
    """Three steps by two ranks and three by one are six by one; where nothing teaches, both ranks skip the step."""
    exact = ("--dtype", "float64")
    run_on_ranks([(2, train, ("changed", *exact, "--stop-at", "3")),
                  (2, train, ("flats", "-a", "Flat", "--num-iterations", "1", "--eval-every", "-1"))], tmp_path)
    runs = [train("changed")["run_dir"], train("single", *exact)["run_dir"]]
    for key in ("loss", "grad_norm", "reward", "entropy_nats", "kl_nats", "tokens", "answer_tokens", "pass_at_4",
                "zero_variance_frac", "truncated_frac", "num_targets"):
        changed, single = ([line[key] for line in read_lines(run_dir)] for run_dir in runs)
        assert len(single) == 6 and changed == pytest.approx(single, abs=1e-9), key
    changed, single = ([line["Vowels_reward"] for line in read_lines(run_dir, "eval")] for run_dir in runs)
    assert len(single) == 3 and changed == pytest.approx(single, abs=1e-9)
    assert [line["skipped"] for line in read_lines(base_dir / "runs" / "rl" / "flats")] == ["no weights"]


def test_settings_of_a_run_are_kept(whole):
    before = read_state(whole["run_dir"])
    for argv, message in ((["--num-samples", "8"], "num_samples: saved 4, now 8"), (["--seed", "1"], "seed: saved 42"),
                          (["-a", "Flat"], "data.name: saved Vowels, now Flat"),
                          (["--max-new-tokens", "9"], "max_new_tokens: saved 8, now 9")):
        with pytest.raises(UserError, match=message):
            train("whole", *argv)
    assert read_state(whole["run_dir"]) == before


@pytest.mark.parametrize(("argv", "message"), [
    (["-a", "Identity"],            "the task Identity has no reward"),
    (["-a", "GSM9K"],               "there is no task 'GSM9K'; choose from"),
    (["-a", "Vowels", "Vowels"],    "--tasks names Vowels twice"),
    (["-g", "nowhere"],             "there is no sft run 'nowhere'; .* has toy"),
    (["-i", "mid"],                 "there is no mid run 'toy'"),
    (["--num-samples", "1"],        "--num-samples 1 must be at least 2: an answer is compared"),
    (["--examples-per-step", "0"],  "--examples-per-step 0 must be at least 1"),
    (["--eval-samples", "0"],       "--eval-samples 0 must be at least 1"),
    (["--eval-examples", str(10**9)], "--eval-examples 1000000000 must be at least 1 and at most 1000000"),
    (["--max-new-tokens", "128"],   "--max-new-tokens 128 leaves no room for a question in a context of 128"),
    (["--max-new-tokens", "124"],   "no question of Vowels has at most 5 tokens"),
    (["--device-batch-size", "3"],  "--device-batch-size 3 must divide the 16 rows"),
])
def test_bad_input_is_one_sentence(base_dir, argv, message):
    with pytest.raises(UserError, match=message) as error:
        train("refused", *argv)
    assert "\n" not in str(error.value)
    assert not (base_dir / "runs" / "rl" / "refused" / "run.json").exists()
