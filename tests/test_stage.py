"""What the stages share: which flags are a run's identity, words as values, how many rows a step has, samples."""

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat import decoding, engine
from nanochat.choices import FREE_FLAGS, OUTCOME_FLAGS, count_rows, take_identity
from nanochat.command_line import int_or_all, int_or_never
from nanochat.common import Ranks, UserError
from nanochat.stage import print_samples
from scripts import base_train, chat_rl, chat_sft, mid_train
from tests.helpers import BYTE_TOKENIZER, TINY, make_model

STAGES = {"base": base_train, "mid": mid_train, "sft": chat_sft, "rl": chat_rl}


def test_count_rows():
    assert count_rows(512, 64, 2) == 8
    for batch_tokens, world_size in ((500, 1), (64, 2), (0, 1), (32, 1), (-512, 1)):
        with pytest.raises(UserError, match=f"--total-batch-size {batch_tokens} must be a multiple of"):
            count_rows(batch_tokens, 64, world_size)


def test_every_flag_is_identity_unless_it_is_listed():
    """The lists name flags that exist; what they don't name must be the same when a run is continued."""
    given = {name: STAGES[name].parse_args([])[1].given for name in STAGES}
    assert FREE_FLAGS | OUTCOME_FLAGS <= set().union(*given.values()) and not FREE_FLAGS & OUTCOME_FLAGS
    shared = {"seed", "deterministic", "loss"}
    assert take_identity(given["base"]).keys() == shared | {
        "packing", "long_docs", "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "warmup_steps",
        "warmdown_ratio", "final_lr_frac", "seq_len_warmup"}
    assert take_identity(given["mid"]).keys() == take_identity(given["sft"]).keys() == shared | {
        "init_lr_frac", "warmdown_ratio"}
    assert take_identity(given["rl"]).keys() == shared | {"init_lr_frac", "examples_per_step", "num_samples"}


@pytest.mark.parametrize("name", STAGES)
def test_words_and_their_old_spellings(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", object())
    words = "--run none --eval-every never --sample-every never --save-every never --keep-last all --keep-every never"
    old = "--run dummy --eval-every -1 --sample-every -1 --save-every -1 --keep-last -1 --keep-every -1"
    flags, same = (STAGES[name].parse_args(text.split())[1] for text in (words, old))
    assert flags.wandb_name is same.wandb_name is None and flags.saving == same.saving
    assert flags.eval_every is flags.sample_every is same.eval_every is same.sample_every is None
    assert flags.saving.keep_last is flags.saving.every is flags.saving.keep_every is None
    assert STAGES[name].parse_args(["--run", "mine"])[1].wandb_name == "mine"


def test_numbers_or_words():
    assert int_or_never("5") == int_or_all("5") == 5 and int_or_never("never") is int_or_all("all") is None
    for parse, text in ((int_or_never, "all"), (int_or_all, "never"), (int_or_never, "often")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} must be a number, or "):
            parse(text)


def test_samples_of_training_capture_and_compile_nothing(monkeypatch, capsys):
    """The other ranks wait for rank 0 meanwhile."""
    def make_as_on_cuda(model, *settings):
        on_cuda = SimpleNamespace(get_device=lambda: torch.device("cuda"))
        assert decoding.make_step(on_cuda, *settings).func is decoding.run_eagerly
        return decoding.make_step(model, *settings)
    monkeypatch.setattr(engine, "make_step", make_as_on_cuda)
    run = SimpleNamespace(setup=SimpleNamespace(ranks=Ranks(), recipe=SimpleNamespace(tokenizer=BYTE_TOKENIZER)),
                          state=SimpleNamespace(model=make_model(TINY)),
                          log=SimpleNamespace(write=lambda *args, **values: None))
    print_samples(run, 1, {"a": [256, 97]}, max_tokens=3)
    assert capsys.readouterr().out.startswith("sample | 'a")
