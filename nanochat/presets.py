"""Models of the family by name, each with its training, and single knobs of the model.

    python -m scripts.base_train --preset marin-150m
    python -m scripts.base_train --depth 4 --knobs smear=off qk_scale=1.0
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from nanochat import scaling
from nanochat.common import UserError, print0
from nanochat.config import OLDER, GPTConfig
from nanochat.scaling import JULY26, OURS, AdamGroup, TrainingRule

SHAPE = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
KNOBS = tuple(field.name for field in fields(GPTConfig) if field.name not in SHAPE)


def read_pair(text: str) -> tuple[float, float]:
    first, last = map(float, text.split(","))
    return first, last


# By the type of the default: what a value must be, and how it is read
READERS = {bool: ("on or off", {"on": True, "off": False}.__getitem__), int: ("a whole number", int),
           float: ("a number", float), str: ("a word", str), type(None): ("a whole number, or none", int),
           tuple: ("two numbers, FIRST,LAST, or none", read_pair)}


def parse_knobs(words: Sequence[str]) -> dict[str, object]:
    """The knobs of --knobs NAME=VALUE ..."""
    knobs: dict[str, object] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in KNOBS:
            raise UserError(f"--knobs {word}: there is no knob {name!r}; choose from {', '.join(KNOBS)}")
        if name in knobs:
            raise UserError(f"--knobs names {name} twice")
        kind, read = READERS[type(getattr(GPTConfig, name))]
        try:
            knobs[name] = None if text == "none" and text in kind else read(text)
        except (KeyError, ValueError):
            raise UserError(f"--knobs {word}: {name} must be {kind}") from None
    return knobs


def format_knob(value: object) -> str:
    """A knob's value as --knobs reads it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {True: "on", False: "off", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# How the models are trained


def make_groups(betas: tuple[float, float], weight_decay: float, rates: dict[str, str]) -> tuple[AdamGroup, ...]:
    """AdamW alike for all, but for the flags of their learning rates, which follow neither width nor batch."""
    return tuple(AdamGroup(name, rate, 1.0, "", betas, weight_decay) for name, rate in rates.items())


RATES = {"lm_head": "unembedding_lr", "wte": "embedding_lr", "value_embeds": "embedding_lr",
         "resid_lambdas": "scalar_lr", "x0_lambdas": "scalar_lr", "gates": "scalar_lr"}
# Five different iterations of step 3, as Polar Express has, found by others
QUINTIC = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
           (2.8366, -3.0525, 1.2012))
RULES = {
    "dec26": OURS,
    "nov26": TrainingRule(),    # whole queries and keys to Muon
    "july26": JULY26,    # the public record's: batch and rates by the model's size, for small models, too
    # Muon with NorMuon and cautious decay alone; no decay of what AdamW updates
    "jan26": TrainingRule(
        adam=(AdamGroup("lm_head",       "unembedding_lr", 1.0,  "width", (0.8,  0.95), 0.0),
              AdamGroup("wte",           "embedding_lr",   1.0,  "width", (0.8,  0.95), 0.0),
              AdamGroup("value_embeds",  "embedding_lr",   1.0,  "width", (0.8,  0.95), 0.0),
              AdamGroup("resid_lambdas", "scalar_lr",      0.01, "batch", (0.8,  0.95), 0.0),
              AdamGroup("x0_lambdas",    "scalar_lr",      1.0,  "batch", (0.96, 0.95), 0.0)),
        muon={"equalizes_rows": False, "margin": 1.02, "fixes_norm": False}, beta2=0.95,
        momentum=(0.85, 0.95, 0.95), momentum_steps=300, decay_fall="linear", decay_scaling="depth",
        batch_from="size"),
    "marin": TrainingRule(
        adam=make_groups((0.8, 0.95), 0.0, RATES), adam_eps=1e-15, max_norm=1.0,
        muon={"equalizes_rows": False, "margin": 1.0, "eps": 1e-5, "coefficients": QUINTIC, "fixes_norm": False,
              "has_neuron_norm": False, "is_cautious": False},
        momentum=(0.95, 0.95, 0.95), decay_fall="none", decay_scaling="none", batch_from="size",
        scales_to_batch=False, ratio_counts_all=True),
    # Betas, eps and decay are torch's defaults: its authors name none
    "adam": TrainingRule(adam=make_groups((0.9, 0.999), 0.01, RATES | {"matrices": "matrix_lr"}), adam_eps=1e-8,
                         warmdown="cosine", decay_fall="none", decay_scaling="none", batch_from="size",
                         scales_to_batch=False),
}


def find_rule(name: str) -> TrainingRule:
    """UserError where there is none."""
    if name not in RULES:
        raise UserError(f"the checkpoint was trained by a rule that this nanochat doesn't know ({name}); use the "
                        "nanochat that trained it, or a newer one")
    return RULES[name]


def choose_rule(preset: str | None, saved: dict | None) -> str:
    """The rule of a preset, or ours; but a run that was begun by an older one of ours keeps it. saved: its identity."""
    rule, before = find_preset(preset).rule, saved and saved.get("rule", "july26")    # at first it had no name
    if rule == Preset.rule and before in ("july26", "nov26"):
        print0(f"rule: {before}, by which this run was begun")
        return before
    return rule


def choose_knobs(preset: str | None, words: Sequence[str], saved: dict | None) -> dict[str, object]:
    """Shape and knobs of a preset and of --knobs; a run that began before there were some of them keeps their older
    values. saved: its checkpoint's meta"""
    chosen, typed, before = find_preset(preset), parse_knobs(words), saved and saved["model_config"]
    knobs = chosen.shape | chosen.knobs | typed
    older = {knob: value for knob, value in OLDER.items()
             if before is not None and knob not in typed and before.get(knob, value) == value
             and value != knobs.get(knob, getattr(GPTConfig, knob))}
    if older:
        print0(" ".join(f"{knob}={format_knob(value)}" for knob, value in older.items()) + ": as this run was begun")
    if before is not None and before.get("backout_layer") is None:
        knobs = {"backout_layer": None} | knobs    # of one or two layers the last, as at first
    return knobs | older


# ---------------------------------------------------------------------------------------------------------------------
# The models


@dataclass(frozen=True)
class Preset:
    """A model of the family: what it has and does otherwise than we do."""
    source: str                                  # where its figures come from
    knobs:  dict[str, object] = field(default_factory=dict)    # of GPTConfig
    shape:  dict[str, object] = field(default_factory=dict)    # of SHAPE; empty: from --depth
    rule:   str = "dec26"                                      # of RULES
    flags:  dict[str, object] = field(default_factory=dict)    # of scripts.base_train and scripts.plan


# Without what Qwen3, and with it every engine that people serve with, has no place for (scripts.export)
PLAIN = {"key_offset": 0.0, "ve_gate_channels": 0, "smear": False, "backout_layer": -1, "x0_init": None, "softcap": 0.0}


def make_flags(lrs: tuple[float, float, float, float], weight_decay: float, schedule: tuple[int, float, float],
               window_pattern: str, **horizon) -> dict[str, object]:
    """lrs: of matrices, embedding, head and scalars; schedule: warm-up steps, warm-down and final rate as parts"""
    names = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "warmup_steps", "warmdown_ratio",
             "final_lr_frac")
    return {**dict(zip(names, (*lrs, *schedule), strict=True)), "weight_decay": weight_decay,
            "window_pattern": window_pattern, **horizon}


def make_marin(n_layer: int, n_head: int, weight_decay: float = 0.0) -> Preset:
    """A size of marin's: heads of 128, a context of 2,048, the vocabulary of Llama 3 (128,256); 2.5 tokens a
    parameter in batches of 192 rows. Its norms have an eps of 1e-5, ours one of 1.2e-7, which its small initial
    embeddings notice: normed, they begin .3 to .5 as long there."""
    C = 128 * n_head
    knobs = {"rope_base": 1024.0, "rope_fraction": 0.5, "key_offset": 0.0, "qk_scale": 1.35 ** 0.5,
             "ve_gate_channels": 0, "smear": False, "backout_layer": 2 * n_layer // 3 - 1, "backout_init": 0.5,
             "resid_init": (1.1, 1.1), "x0_init": (0.0, 0.0), "softcap": 0.0, "wte_std": 1 / C, "head_std": 0.0,
             "linear_init": "normal", "fc_init": 1.0}
    shape = {"n_layer": n_layer, "n_head": n_head, "n_kv_head": n_head, "n_embd": C}
    flags = make_flags((0.02, 0.0064, 0.0064, 0.0064), weight_decay, (0, 0.5, 0.1), "L", max_seq_len=2048,
                       vocab_size=128_256, total_batch_size=192 * 2048, target_param_data_ratio=2.5)
    return Preset("marin-community/marin, its speedrun with features of modded-nanogpt", knobs, shape, "marin", flags)


PRESETS = {
    "nanochat-july26": Preset("karpathy/nanochat, July 2026", {"key_offset": 0.0}, flags=make_flags(
        (scaling.MATRIX_LR, scaling.EMBEDDING_LR, scaling.UNEMBEDDING_LR, scaling.SCALAR_LR), scaling.WEIGHT_DECAY,
        (scaling.WARMUP_STEPS, scaling.WARMDOWN_RATIO, scaling.FINAL_LR_FRAC), "SSSL"), rule="july26"),
    "nanochat-jan26": Preset("karpathy/nanochat, January 2026", {
        "window_fraction": 0.5, "rope_base": 10_000.0, "key_offset": 0.0, "qk_scale": 1.0, "ve_gate_channels": 32,
        "ve_gate_scale": 2.0, "ve_gate_init": 0.0, "smear": False, "backout_layer": -1, "resid_init": (1.0, 1.0),
        "x0_init": (0.1, 0.1), "wte_std": 1.0, "fc_init": 1.0}, rule="jan26", flags=make_flags(
        (0.02, 0.3, 0.004, 0.5), 0.2, (0, 0.4, 0.0), "SSSL", total_batch_size=2**19, target_param_data_ratio=10.5)),
    "marin-150m": make_marin(6, 4),
    "marin-270m": make_marin(11, 6),
    "marin-460m": make_marin(16, 8, weight_decay=0.01),
    # Its 8 heads of 512 are 32 of 128 here, of as many parameters: flash kernels end at 256. The cosine follows the
    # warm-up at once: 48,000 of 50,000 steps
    "arcadium-200m": Preset("arcadium's dense model of 200 M", PLAIN | {
        "attn_dim": 4096, "mlp_dim": 2048, "mlp_act": "swiglu", "qk_scale": 0.0, "resid_init": None,
        "embed_norm": False, "fp32_embeds": True, "fc_init": 1.0},
        {"n_layer": 16, "n_head": 32, "n_kv_head": 32, "n_embd": 512}, "adam", make_flags(
        (1e-3, 1e-3, 1e-3, 1e-3), 0.0, (2000, 0.96, 0.1), "L", max_seq_len=1024, vocab_size=50_257,
        total_batch_size=32 * 1024, num_iterations=50_000)),
    "plain": Preset("ours, for export", PLAIN, flags={"window_pattern": "L"}),
}


def find_preset(name: str | None) -> Preset:
    """None: what the flags say, trained as we do. UserError where there is none."""
    if name is not None and name not in PRESETS:
        raise UserError(f"--preset {name} is not one of {', '.join(PRESETS)}")
    return PRESETS[name] if name else Preset("flags")


# ---------------------------------------------------------------------------------------------------------------------
# As typed


def add_plan_args(parser: argparse.ArgumentParser) -> None:
    """The flags that make_config and make_plan read, of scripts.base_train and of scripts.plan."""
    add = parser.add_argument
    add("--aspect-ratio", type=int, default=64, help="width in channels per layer")
    add("--head-dim", type=int, default=128, help="channels of an attention head")
    add("--max-seq-len", type=int, default=2048, help="context in tokens")
    add("--window-pattern", type=str.upper, default="SSSL", help="windows, tiled over the layers: L whole, S a quarter")
    # horizon
    add("--num-iterations", type=int, help="optimizer steps, instead of a horizon by the ratio")
    add("--target-flops", type=float, help="training FLOPs, instead of a horizon by the ratio")
    add("--target-param-data-ratio", type=float, default=12, help="tokens per scaling parameter; beside another "
        "horizon it sets batch and weight decay alone")
    add("--seq-len-warmup", metavar="START:STEPS", help="rows of START tokens, doubled until they are whole after so "
        "many steps (default: whole from the first)")


HORIZON = ("num_iterations", "target_flops", "target_param_data_ratio")
# Flags that a person may set otherwise than the preset has them
BESIDE = (*HORIZON, "total_batch_size", "max_seq_len", "vocab_size")


def parse_preset_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags as typed, else as the preset has them, else the parser's defaults. UserError for a typed one that
    contradicts the preset."""
    args = parser.parse_args(argv)
    parse_knobs(args.knobs)
    if args.num_iterations is not None and args.target_flops is not None:
        raise UserError("--num-iterations and --target-flops are two horizons; give one of them")
    if args.preset is None:
        return args
    typed = list_typed(parser, argv, vars(args))
    args = argparse.Namespace(**vars(args) | apply_preset(args.preset, typed, vars(args)))
    args.model_tag = args.model_tag or args.preset + ("" if find_preset(args.preset).shape else f"-d{args.depth}")
    return args


def list_typed(parser: argparse.ArgumentParser, argv: Sequence[str] | None, names: Sequence[str]) -> dict[str, object]:
    """The flags that a person typed, by name."""
    unset: list = []    # argparse leaves alone what the namespace has already; a flag that is repeated extends a copy
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name: value for name, value in vars(args).items() if value is not unset}


def apply_preset(name: str, typed: dict[str, object], known: Sequence[str]) -> dict[str, object]:
    """Typed flags with those of a preset, as far as a script knows them."""
    preset = find_preset(name)

    def refuse(sets: str, flag: str) -> None:
        raise UserError(f"--preset {name} sets {sets}; leave {flag} out, or the preset")
    for flag in ("depth", "aspect_ratio", "head_dim") if preset.shape else ():
        if flag in typed:
            refuse("{n_layer} layers of {n_embd} channels in {n_head} heads".format(**preset.shape),
                   f"--{flag.replace('_', '-')} {typed[flag]}")
    for flag, value in preset.flags.items():
        if flag not in BESIDE and typed.get(flag, value) != value:
            flag = flag.replace("_", "-")
            refuse(f"--{flag} {value}", f"--{flag} {typed[flag.replace('-', '_')]}")
    for knob, value in parse_knobs(typed.get("knobs") or ()).items():
        if value != (own := preset.knobs.get(knob, getattr(GPTConfig, knob))):
            refuse(f"the knob {knob} to {format_knob(own)}", f"{knob}={format_knob(value)}")
    flags = {flag: value for flag, value in preset.flags.items() if flag in known}
    if any(flag in typed for flag in HORIZON):
        flags = {flag: value for flag, value in flags.items() if flag not in HORIZON}
    return flags | typed
