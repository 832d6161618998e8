"""What the tests of exports share: models of each kind, and their source."""

from dataclasses import replace

from nanochat.export import Source
from nanochat.presets import PRESETS
from tests.helpers import BYTE_TOKENIZER, CONFIG, make_model, make_preset_config

PLAIN = make_preset_config("plain")
# Those that Qwen3 can express, then the others; CONFIG's two key/value heads serve four of queries
PLAIN_CONFIGS = {"plain": PLAIN, "swiglu": replace(PLAIN, mlp_act="swiglu"),
                 "wide heads": replace(PLAIN, attn_dim=128, n_head=8), "no lambdas": replace(PLAIN, resid_init=None)}
CONFIGS = {name: make_preset_config(name) for name in PRESETS} | PLAIN_CONFIGS | {
    "short windows": replace(CONFIG, sequence_len=256), "offset alone": replace(CONFIG, smear=False),
    "smear alone": replace(CONFIG, key_offset=0.0, sequence_len=256), "whole keys": replace(CONFIG, key_offset=1.0),
    "long context": replace(CONFIG, sequence_len=640, window_fraction=1.0),
    "rows as of the vocabulary": replace(CONFIG, mlp_dim=320)}


def make_source(config, tokenizer=BYTE_TOKENIZER, run_dir="runs/sft/toy"):
    meta = {"stage": "sft", "step": 7, "run_dir": run_dir, "tokenizer": {"name": "default", "hash": tokenizer.hash}}
    return Source(make_model(config), tokenizer, meta)
