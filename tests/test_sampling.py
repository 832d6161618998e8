"""Sampling: that tokens come with the frequency they should, each row by its own settings and random numbers."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import sampling
from nanochat.common import UserError
from nanochat.sampling import Sampling, cumulate, cumulate_exactly, draw_uniform, find_likeliest, sample_rows

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -float("inf"), 1.5])


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [
    (None, None, 5), (0, 1.0, 5), (3, None, 3), (100, None, 5),
    (None, 0.5, 1), (None, 0.7, 2), (None, 0.999999, 5), (3, 0.99, 3), (2, 0.999, 2), (3, 0.57, 1),
])
def test_samples_follow_the_distribution(top_k, top_p, kept):
    """At temperature 0.7 the likeliest has probability 0.56, the next ones 0.27, 0.13, 0.03."""
    num_rows, temperature = 5_000, 0.7
    samplings = [Sampling(temperature, top_k, top_p, sample=i) for i in range(num_rows)]
    sampled = sample_rows(LOGITS.expand(num_rows, -1), samplings, [0] * num_rows)
    probs = (LOGITS / temperature).softmax(-1)
    expected = probs * (probs >= probs.sort(descending=True).values[kept - 1])
    expected /= expected.sum()
    frequency = torch.bincount(sampled, minlength=6) / num_rows
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / num_rows).sqrt()).all()


def sample_slowly(logits, sampling, token_idx):
    """By the whole vocabulary of one row, in fp64."""
    logits = logits.double()
    probs = ((logits - logits.max()) / sampling.temperature).exp()
    if sampling.top_k:
        probs[logits < logits.sort(descending=True).values[:sampling.top_k][-1]] = 0
    if sampling.top_p is not None:
        ordered = probs.sort(descending=True).values
        num_kept = int((ordered.cumsum(0) < sampling.top_p * ordered.sum()).sum()) + 1
        probs[probs < ordered[min(num_kept, len(ordered)) - 1]] = 0
    target = draw_uniform(sampling, token_idx) * float(probs.sum())
    return next(token for token, end in enumerate(probs.cumsum(0).tolist()) if end > target)


@pytest.mark.parametrize("sums", [cumulate, cumulate_exactly])
@pytest.mark.parametrize("vocab_size", [40, 1500, 4096, 5000])
def test_samples_equal_those_of_the_slow_way(monkeypatch, vocab_size, sums):
    """Also where many are equally likely, so that more than k are kept, and with the sums of a GPU."""
    monkeypatch.setattr(sampling, "cumulate", sums)
    rng = random.Random(vocab_size)
    logits = torch.randn(120, vocab_size, generator=torch.Generator().manual_seed(0)).mul(3).bfloat16().float()
    logits[::3] = logits[::3].round()
    samplings = [Sampling(rng.choice((0.3, 1.0, 1.7)), rng.choice((None, 1, 2, 7, 50, 1200, 9999)),
                          rng.choice((None, 0.05, 0.6, 0.99, 1.0)), seed=i) for i in range(120)]
    expected = [sample_slowly(row, sampling, 5) for row, sampling in zip(logits, samplings, strict=True)]
    assert sample_rows(logits, samplings, [5] * 120).tolist() == expected


def test_each_row_sees_no_more_candidates_than_it_needs(monkeypatch):
    """One that needs the whole vocabulary mustn't have that of the others sorted: it would take ten times as long."""
    seen, sample_among = [], sampling.sample_among

    def spy(num_candidates, logits, *args):
        seen.append((num_candidates, len(logits)))
        return sample_among(num_candidates, logits, *args)
    monkeypatch.setattr(sampling, "sample_among", spy)
    logits = torch.randn(6, 4096, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(1, 50), Sampling(1, 99), Sampling(2, None, 0.9), Sampling(1, 9999), Sampling(1), Sampling(0)]
    sample_rows(logits, samplings, [0] * 6)
    assert seen == [(64, 2), (256, 2), (1024, 1), (4096, 1)]


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_candidates():
    logits = torch.zeros(1, 5000)
    logits[0, :2500] = 1.0  # 73% of the probability
    tokens = [int(sample_rows(logits, [Sampling(top_p=0.7, sample=i)], [0])) for i in range(300)]
    assert max(tokens) < 2500 and max(tokens) > 2000


@pytest.mark.parametrize("vocab_size", [1, 128, 384, 500])  # whole blocks and not
def test_likeliest_is_the_first_of_the_largest(vocab_size):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randint(-9, 9, (200, vocab_size), generator=rng).float()  # many are equally large
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert find_likeliest(logits).tolist() == expected
    assert find_likeliest(torch.full((2, vocab_size), -float("inf"))).tolist() == [0, 0]


def test_cold_and_narrow_sampling_is_greedy():
    logits = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)) * 1000
    for temperature, top_k, top_p in ((0, None, None), (0, 3, 0.5), (1e-37, None, None), (1e-37, 7, None),
                                      (1.0, 1, None), (1.0, None, 1e-9)):
        samplings = [Sampling(temperature, top_k, top_p, seed=i) for i in range(5)]
        assert sample_rows(logits, samplings, [0] * 5).equal(logits.argmax(-1))


def test_exact_sums():
    weights = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0)) ** 20
    weights[:, ::3] = 0
    weights[0] = 1
    weights[1] /= weights[1].sum()
    sums = cumulate_exactly(weights)
    torch.testing.assert_close(sums, cumulate(weights), rtol=0, atol=1e-9)
    steps = sums.diff(dim=-1)
    assert (steps >= 0).all() and not steps[1:, 2::3].any()  # a weight of 0 has no share
    assert cumulate_exactly(torch.ones(1, 2**20))[0, -1] == 2**20


class NoFloatCumsum(TorchDispatchMode):
    """Fails where CUDA has no deterministic kernel."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket is torch.ops.aten.cumsum:
            assert not (kwargs.get("dtype") or args[0].dtype).is_floating_point
        return function(*args, **kwargs)


def test_sums_on_a_gpu_are_deterministic():
    """The meta device takes the same way."""
    logits, draws = torch.empty(2, 300, device="meta"), torch.empty(2, 1, dtype=torch.float64, device="meta")
    samplings = [Sampling(0.7), Sampling(0.7, 5, 0.9)]
    with NoFloatCumsum():
        assert sampling.sample_among_all(logits, samplings, draws).shape == (2,)
        for num_candidates in (64, 300):
            assert sampling.sample_among(num_candidates, logits, samplings, draws)[0].shape == (2,)


def test_row_does_not_depend_on_the_others():
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(0), Sampling(0.8, seed=1), Sampling(1, 5, seed=2), Sampling(1, None, 0.5, seed=3),
                 Sampling(0, seed=4), Sampling(2, 9, 0.9, seed=5), Sampling(1, seed=6)]
    steps = [3, 1, 4, 1, 5, 9, 2]
    alone = [int(sample_rows(logits[i:i + 1], samplings[i:i + 1], steps[i:i + 1])) for i in range(7)]
    assert sample_rows(logits, samplings, steps).tolist() == alone
    assert sample_rows(logits.flip(0), samplings[::-1], steps[::-1]).tolist() == alone[::-1]


def test_random_numbers():
    draws = [draw_uniform(Sampling(seed=seed, sample=sample), token_idx)
             for seed in range(20) for sample in range(20) for token_idx in range(20)]
    assert len(set(draws)) == len(draws) and 0 <= min(draws) < 0.01 and 0.99 < max(draws) < 1
    assert abs(sum(draws) / len(draws) - 0.5) < 4 * (1 / 12 / len(draws)) ** 0.5
    assert draw_uniform(Sampling(seed=1, sample=2), 3) == draw_uniform(Sampling(0.5, 9, 0.1, 1, 2), 3)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")},
                                    {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_settings_are_refused(values):
    with pytest.raises(UserError, match=f"{next(iter(values))} "):
        Sampling(**values)
