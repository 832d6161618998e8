"""What the tests of checkpoints and their programs share: a tiny trained model, its meta.json, a saved run."""

from dataclasses import asdict

import torch

from nanochat.checkpoint_manager import get_run_dir, save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from nanochat.train import Batch, train_step

CPU = torch.device("cpu")
CONFIG = GPTConfig(sequence_len=16, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")


def make_tokenizer(first_byte=0):
    """One token per byte, in an order that depends on `first_byte`; the vocabulary's size doesn't."""
    return RustBPETokenizer(SPLIT_PATTERN, {bytes([(first_byte + i) % 256]): i for i in range(256)},
                            {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = GPT(CONFIG, dtype)
    model.init_weights()
    return model


def make_trained(dtype=torch.float32, num_steps=2):
    model = make_model(dtype)
    optimizer = model.setup_optimizer()
    for step in range(num_steps):
        train_step(model, optimizer, make_batch(step), 4)
    return model, optimizer


def make_batch(seed):
    ids = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], None)


def make_meta(optimizer, **more):
    return {"model_config": asdict(CONFIG), "tokenizer": {"name": "default", "hash": make_tokenizer().hash},
            "optimizer_steps": optimizer.num_steps, **more}


def save_run(tag="d2", steps=(1,), stage="base", keep_last=None):
    """A run whose checkpoint of step s is trained for s steps."""
    run_dir = get_run_dir(stage, tag)
    for step in steps:
        model, optimizer = make_trained(num_steps=step)
        save_checkpoint(run_dir, step, model, optimizer, make_meta(optimizer), keep_last=keep_last)
    return run_dir


def assert_same_weights(model, other):
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
