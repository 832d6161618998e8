"""The network's cost: a step's messages are those that the optimizer sends, and their time is a link's."""

import pytest
import torch
import torch.distributed as dist

from dev.links import Wire
from dev.timing import make_random_batch
from nanochat.cross_entropy import LossScaler
from nanochat.fabric import list_step
from nanochat.gpt import GPT
from nanochat.memory import Machine
from nanochat.moe import make_balance
from nanochat.presets import RULES
from nanochat.scaling import make_config
from nanochat.train import train_step


def record_step(config, machine, rule, num_micro):
    """What rank 0 starts and waits for in a real step, among ranks that send nothing."""
    dist.init_process_group("fake", rank=0, world_size=machine.world_size)
    try:
        model = GPT(config, getattr(torch, machine.dtype))
        model.init_weights()
        model.balance = make_balance(model)
        optimizer = model.setup_optimizer(rule=rule)
        scaler = LossScaler() if machine.dtype == "float16" else None
        batch = make_random_batch(config, num_micro, torch.device("cpu"))
        with Wire().tapped() as wire:
            train_step(model, optimizer, batch, 1, scaler)
        return [moment.event for moment in wire.moments]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "knobs", "dtype", "rule", "num_micro"), [
    (2, {}, "float32", "july26", 1), (8, {}, "bfloat16", "july26", 2), (6, {}, "bfloat16", "july26", 1),
    (64, {}, "bfloat16", "july26", 1), (256, {}, "bfloat16", "july26", 1), (1024, {}, "bfloat16", "july26", 1),
    (4, {"num_experts": 8, "moe_every": 2}, "bfloat16", "july26", 1),
    (4, {"num_experts": 6, "top_k": 3}, "float32", "july26", 1),
    (4, {}, "bfloat16", "jan26", 1), (4, {}, "float32", "marin", 1), (4, {}, "float32", "adam", 1),
    (4, {}, "float16", "july26", 1), (2, {"num_experts": 2, "top_k": 2}, "float32", "july26", 1),
    (4, {"smear": False, "resid_init": None}, "float64", "july26", 1)])
def test_messages_are_those_of_the_step(world_size, knobs, dtype, rule, num_micro):
    config = make_config(3, vocab_size=1000, sequence_len=16, head_dim=64, **knobs)
    machine = Machine(dtype, world_size=world_size, device_type="cpu", has_muon=RULES[rule].has_muon)
    expected = [(event.kind, event.amount, event.key) for event in list_step(config, machine, 16, num_micro,
                                                                            RULES[rule]) if event.kind != "compute"]
    assert len(expected) > 30
    assert [(event.kind, event.amount, event.key)
            for event in record_step(config, machine, RULES[rule], num_micro)] == expected
