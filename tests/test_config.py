"""Counts and FLOPs by formula, which need no torch, against the modules and torch's own counter of FLOPs."""

import json
from dataclasses import asdict

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from nanochat.common import UserError
from nanochat.config import SMEAR_GATE_CHANNELS, GPTConfig, count_params, estimate_flops, read_config
from nanochat.gpt import GPT
from nanochat.presets import PRESETS

SHAPES = [
    GPTConfig(),
    GPTConfig(vocab_size=64, sequence_len=256, n_layer=1, n_head=1, n_kv_head=1, n_embd=32),
    GPTConfig(vocab_size=320, sequence_len=512, n_layer=5, n_head=6, n_kv_head=2, n_embd=96),  # grouped queries
    GPTConfig(vocab_size=640, sequence_len=300, n_layer=4, n_head=8, n_kv_head=1, n_embd=256, window_pattern="SL"),
    *(GPTConfig(vocab_size=320, sequence_len=512, n_layer=11, n_head=4, n_kv_head=2, n_embd=64, **preset.knobs |
                ({"attn_dim": 128, "mlp_dim": 96} if preset.knobs.get("attn_dim") else {}))
      for preset in PRESETS.values()),
    GPTConfig(vocab_size=320, sequence_len=256, n_layer=5, n_head=2, n_kv_head=2, n_embd=64, num_experts=8, top_k=2,
              moe_every=2),
    GPTConfig(vocab_size=320, sequence_len=256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, num_experts=4, top_k=4),
]


@register_flop_formula([torch.ops.nanochat.grouped_product, torch.ops.nanochat.grouped_outer])
def count_grouped_flops(a, b, ends, out_shape):
    """Of each row by its expert's matrix, and of outer products."""
    return 2 * a[0] * a[1] * b[-1]


def name_shape(config: GPTConfig) -> str:
    return f"d{config.n_layer}-{config.n_embd}-{config.n_head}-{config.n_kv_head}-{config.rope_base:g}-" + \
        f"{config.num_experts}"


@pytest.mark.parametrize("config", SHAPES, ids=name_shape)
def test_counts_are_the_modules(config):
    with torch.device("meta"):
        model = GPT(config)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    counts = count_params(config)
    for part, prefix in (("wte", "transformer.wte"), ("value_embeds", "value_embeds"), ("lm_head", "lm_head"),
                         ("transformer_matrices", "transformer.h")):
        inactive = counts.get("inactive_experts", 0) if prefix == "transformer.h" else 0
        size = sum(size for name, size in sizes.items() if name.startswith(prefix + "."))
        assert counts[part] + inactive == size, part
    assert counts["total"] == sum(sizes.values()) and counts == model.num_scaling_params()


@pytest.mark.parametrize("loss", ["fused", "plain"])
@pytest.mark.parametrize("config", SHAPES, ids=name_shape)
def test_matrix_products_are_six_flops_a_parameter_and_token(config, loss, monkeypatch):
    """Attention's FLOPs are a formula, which counts the keys of a window, not those of an implementation."""
    monkeypatch.setattr("nanochat.flash_attention._override_impl", "sdpa")    # whose products aren't counted as mm
    B, T = 2, config.sequence_len
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        model = GPT(config)
        model.loss = loss
        tokens = torch.zeros((B, T), dtype=torch.int64)
        model(tokens, tokens).backward()
    by_operation = counter.get_flop_counts()["Global"]
    products = by_operation.pop(torch.ops.aten.mm) + sum(
        by_operation.pop(getattr(torch.ops.nanochat, name), 0) for name in ("grouped_product", "grouped_outer"))
    assert all("scaled_dot_product" in str(name) for name in by_operation)
    counts = count_params(config)
    num_matmul_params = counts["transformer_matrices"] + counts["lm_head"] + SMEAR_GATE_CHANNELS * config.smear
    assert products == 6 * num_matmul_params * B * T
    keys = sum(min(config.window(layer), T) for layer in range(config.n_layer))
    assert estimate_flops(config) == 6 * num_matmul_params + 12 * config.query_dim * keys


@pytest.mark.parametrize(("shape", "message"), [
    ({"window_pattern": "SXL"}, "must be made of the letters S and L"), ({"window_pattern": ""}, "letters S and L"),
    ({"n_head": 5, "n_kv_head": 5}, "don't split into 5 heads"), ({"n_kv_head": 4}, "in groups of 4"),
    ({"n_embd": 12}, "smear gate alone reads 24")])
def test_impossible_shapes_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        GPTConfig(**shape)


def test_config_of_an_older_checkpoint_is_as_it_was():
    """Checkpoints hold JSON, where a tuple is a list; those of before the knobs hold the shape alone."""
    shape = {"sequence_len": 64, "vocab_size": 265, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 64,
             "window_pattern": "SSL"}
    assert read_config(shape) == GPTConfig(**shape, key_offset=0.0)    # later than the other knobs
    config = GPTConfig(**shape, resid_init=(1.0, 1.1))
    assert read_config(json.loads(json.dumps(asdict(config)))) == config
    assert read_config(shape | {"bigram_rows": 0}) == read_config(shape)    # a knob that was taken out, and off
    with pytest.raises(UserError, match="knobs that this nanochat doesn't know .bigram_rows.; use the .* it$"):
        read_config(shape | {"bigram_rows": 9})
    with pytest.raises(UserError, match="knobs that this nanochat doesn't know \\(hyper, zoom\\)"):
        read_config(shape | {"zoom": 1, "hyper": 2})
