"""Models of the family by name, and single knobs of the model.

    python -m scripts.base_train --depth 4 --knobs smear=off qk_scale=1.0
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from nanochat.common import UserError
from nanochat.config import GPTConfig

SHAPE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
KNOBS = tuple(field.name for field in fields(GPTConfig) if field.name not in SHAPE)


def parse_knobs(words: Sequence[str]) -> dict[str, object]:
    """The knobs of --knobs NAME=VALUE ...: on, off, none, a number, two of them (first,last), or a word."""
    knobs: dict[str, object] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in KNOBS:
            raise UserError(f"--knobs {word}: there is no knob {name!r}; choose from {', '.join(KNOBS)}")
        if name in knobs:
            raise UserError(f"--knobs names {name} twice")
        default = getattr(GPTConfig, name)
        try:
            if name in ("backout_layer", "resid_init", "x0_init") and text == "none":
                knobs[name] = None
            elif isinstance(default, bool):
                knobs[name] = {"on": True, "off": False}[text]
            elif isinstance(default, tuple):
                first, last = map(float, text.split(","))
                knobs[name] = (first, last)
            else:
                knobs[name] = int(text) if name == "backout_layer" else type(default)(text)
        except (KeyError, ValueError):
            kind = "on or off" if isinstance(default, bool) else "two numbers, FIRST,LAST, or none" \
                if isinstance(default, tuple) else "a number" if not isinstance(default, str) else "a word"
            raise UserError(f"--knobs {word}: {name} must be {kind}") from None
    return knobs


@dataclass(frozen=True)
class Preset:
    """A model of the family: what it does otherwise than GPTConfig's defaults."""
    source: str                                  # where its figures come from
    knobs:  dict[str, object]
    shape:  dict[str, object] = field(default_factory=dict)    # of SHAPE; empty: from --depth


# Without what Qwen3, and with it every engine that people serve with, has no place for (scripts.export)
PLAIN = {"ve_gate_channels": 0, "smear": False, "backout_layer": -1, "x0_init": None, "softcap": 0.0}


def make_marin(n_layer: int, n_head: int) -> Preset:
    """A size of marin's: heads of 128, a context of 2,048, the vocabulary of Llama 3 (128,256)."""
    C = 128 * n_head
    knobs = {"rope_base": 1024.0, "rope_fraction": 0.5, "qk_scale": 1.35 ** 0.5, "ve_gate_channels": 0, "smear": False,
             "backout_layer": 2 * n_layer // 3 - 1, "backout_init": 0.5, "resid_init": (1.1, 1.1),
             "x0_init": (0.0, 0.0), "softcap": 0.0, "wte_std": 1 / C, "head_std": 0.0, "linear_init": "normal",
             "fc_init": 1.0}
    shape = {"n_layer": n_layer, "n_head": n_head, "n_kv_head": n_head, "n_embd": C, "window_pattern": "L"}
    return Preset("marin-community/marin, its speedrun with features of modded-nanogpt", knobs, shape)


PRESETS = {
    "nanochat-july26": Preset("karpathy/nanochat, July 2026", {}),
    "nanochat-jan26": Preset("karpathy/nanochat, January 2026", {
        "window_fraction": 0.5, "rope_base": 10_000.0, "qk_scale": 1.0, "ve_gate_channels": 32, "ve_gate_scale": 2.0,
        "ve_gate_init": 0.0, "smear": False, "backout_layer": -1, "resid_init": (1.0, 1.0), "x0_init": (0.1, 0.1),
        "wte_std": 1.0, "fc_init": 1.0}),
    "marin-150m": make_marin(6, 4),
    "marin-270m": make_marin(11, 6),
    "marin-460m": make_marin(16, 8),
    # Its 8 heads of 512 are 32 of 128 here, of as many parameters: flash kernels end at 256
    "arcadium-200m": Preset("arcadium's dense model of 200 M", PLAIN | {
        "attn_dim": 4096, "mlp_dim": 2048, "mlp_act": "swiglu", "qk_scale": 0.0, "resid_init": None,
        "embed_norm": False, "fc_init": 1.0},
        {"n_layer": 16, "n_head": 32, "n_kv_head": 32, "n_embd": 512, "window_pattern": "L"}),
    "plain": Preset("ours, for export", PLAIN, {"window_pattern": "L"}),
}


def find_preset(name: str) -> Preset:
    """UserError where there is none."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} is not one of {', '.join(PRESETS)}")
    return PRESETS[name]
