"""What each part of the model is worth: models with and without it, at equal FLOPs, over paired seeds.

    python -m dev.ablate --name d4 --depth 4 --mode drop --features smear,x0,softcap,plain --seeds 3 --tokens 20e6
    python -m dev.ablate --name d4-add --depth 4 --mode add --features value_embeds,x0,smear -- --max-seq-len 512
    python -m dev.ablate --name d4-new --depth 4 --tokens 1e6 --variant "e8: --knobs num_experts=8" "m: --matrix-lr .01"
    python -m dev.ablate --name d4 --only-table    # of what is finished by now; trains nothing

drop trains the full model and, for each feature, the model without it alone. add trains the model without all of these
features, then adds one after another in the order given, up to the full model. A variant, NAME: FLAGS, is the full
model with further flags of scripts.base_train, a change that might help. The flags after -- go to scripts.base_train
in every run. All models have the batch of the full one (a variant may set another) and its FLOPs (--target-flops; by
default those of its horizon), so one with fewer FLOPs a token learns from more tokens. The runs are a sweep's
(scripts/sweep.py): the same command continues them; more seeds and variants, and in drop more features, are added to
them.

Writes ablation.json and ablation.md to $NANOCHAT_BASE_DIR/sweeps/<name>/; dev/ablation_table.py says what they mean.
"""

import argparse
import itertools
import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from dev.ablation_table import SAVED_KEYS, SLOPE_FRAC, write_table
from nanochat.checkpoint_manager import get_run_dir
from nanochat.choices import FREE_FLAGS, MACHINE_FLAGS
from nanochat.command_line import Parser, run_script
from nanochat.common import Ranks, UserError, get_base_dir, now, write_json
from nanochat.config import count_params
from nanochat.presets import HORIZON, PLAIN, format_knob, parse_knobs
from nanochat.report import read_json
from nanochat.scaling import Plan, check_counts
from nanochat.stage import Recipe
from scripts import base_train
from scripts.sweep import Point, check_own, open_sweep, parse_flags, parse_run_args

OWN_FLAGS = {"depth", "model_tag", "resume", "resume_from_step", "seed", "stop_at"}    # of base_train, set here


@dataclass(frozen=True)
class Feature:
    what: str
    off:  dict[str, str]    # the window_pattern and the knobs of a model without it


FEATURES = {
    "smear": Feature("each embedding takes a gated part of the one before", {"smear": "off"}),
    "key_offset": Feature("a part of each key is the token before's, in layers that see the whole context",
                          {"key_offset": "0"}),
    "backout": Feature("the middle layer's output is subtracted at the end", {"backout_layer": "-1"}),
    "resid": Feature("a factor on each layer's residual stream", {"resid_init": "none"}),
    "x0": Feature("each layer adds a part of the embedding", {"x0_init": "none"}),
    "value_embeds": Feature("embeddings are added to attention's values", {"ve_gate_channels": "0"}),
    "windows": Feature("three of four layers see a part of the context", {"window_pattern": "L"}),
    "qk_scale": Feature("normed queries and keys times 1.2", {"qk_scale": "1.0"}),
    "softcap": Feature("logits are bounded by a tanh", {"softcap": "0"}),
    "relu2": Feature("relu^2 in place of SwiGLU of as many parameters", {"mlp_act": "swiglu", "mlp_dim": "{swiglu}"}),
    "embed_norm": Feature("the embedding is normed", {"embed_norm": "off"}),
    "plain": Feature("all that the preset plain leaves out",
                     {"window_pattern": "L", **{name: format_knob(value) for name, value in PLAIN.items()}}),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--name", required=True, help="of the ablation, the first part of its runs' tags")
    add("--mode", choices=("drop", "add"))
    add("--features", help=f"with commas: {', '.join(FEATURES)}")
    add("--variant", nargs="+", action="extend", default=[], metavar="'NAME: FLAGS'",
        help="the full model with FLAGS, too; with variants, --mode and --features may be left out")
    add("--depth", type=int, help="layers of the model")
    add("--seeds", type=int, default=3, help="runs of each model, with the seeds 1, 2, ...")
    add("--target-flops", type=float, help="training FLOPs of each run")
    add("--tokens", type=float, help="tokens of the full model; the others' FLOPs are the same")
    add("--only-table", action="store_true", help="make the table again and train nothing")
    return parse_run_args(parser, argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    get_run_dir("base", args.name)  # refuses names that can't be a folder
    folder = get_base_dir() / "sweeps" / args.name
    if args.only_table:
        if not (folder / "ablation.json").is_file():
            raise UserError(f"there is no ablation {args.name}: {folder} has no ablation.json")
        return write_table(folder)
    ablation, points, flags = plan_ablation(args)
    if (folder / "ablation.json").is_file():
        ablation = add_saved(ablation, read_json(folder / "ablation.json", SAVED_KEYS))
    kind = {"mode": [args.mode]}    # of another order, add has other models
    if args.mode == "add":
        kind["features"] = args.features.split(",")
    with open_sweep(points, kind, argparse.Namespace(**vars(args) | {"flags": flags})) as sweep:
        write_json(folder / "ablation.json", ablation)
        sweep.run()
        sweep.summarize()
        return write_table(folder)


# ---------------------------------------------------------------------------------------------------------------------
# The models


def plan_ablation(args: argparse.Namespace) -> tuple[dict, list[Point], list[str]]:
    """The models and what is compared, as ablation.json has them; the runs; the flags of the full model."""
    names, variants = parse_features(args), parse_variants(args.variant)
    check_counts(seeds=args.seeds)
    flags, own, target_flops = read_flags(args)
    hidden_dim = make_recipe([*flags, *switch(own)]).config.hidden_dim
    models = {name: own | make_off(off, hidden_dim) for name, off in list_models(args.mode, names)} | {"half": own}
    if twice := {*models, *FEATURES} & variants.keys():
        raise UserError(f"--variant {min(twice)}: a model or feature of this name is there already; choose another")
    models |= {name: own | knobs for name, (knobs, _) in variants.items()}
    words = {name: [*to_words(variants[name][1] if name in variants else {}), *switch(knobs),
                    f"--target-flops={target_flops * (SLOPE_FRAC if name == 'half' else 1)!r}"]
             for name, knobs in models.items()}    # a flag that is given twice has its last value
    recipes = {}
    for name in models:
        try:
            recipes[name] = make_recipe([*flags, *words[name]], args.nproc)
        except UserError as error:
            raise UserError(f"--variant {name}: {error}") if name in variants else error from None
    comparisons = list_comparisons(args.mode, names) + [(name, name, "full") for name in variants]
    for feature, with_it, without in comparisons:
        with_flags, without_flags = ([*flags, *words[model]] for model in (with_it, without))
        if describe(with_flags, recipes[with_it]) == describe(without_flags, recipes[without]):
            raise UserError(f"{feature} changes nothing of this model, or it is off already; leave it out")
    points = []
    for seed in range(1, args.seeds + 1):    # each seed of all models before the next: a table early on
        for name, recipe in recipes.items():
            tag = f"{args.name}-{name}-seed{seed}"
            points.append(Point(tag, ["--model-tag", tag, f"--seed={seed}", *flags, *words[name]],
                                recipe.plan.total_flops))
    about = {name: {"flags": words[name], "parameters": count_params(recipe.config)["total"],
                    "vocab_size": recipe.config.vocab_size, "flops_per_token": recipe.plan.flops_per_token,
                    "flops": recipe.plan.total_flops, "steps": recipe.plan.num_iterations}
             for name, recipe in recipes.items()}
    features = {name: FEATURES[name].what for name in names}
    features |= {name: " ".join(typed) for name, typed in split_variants(args.variant).items()}
    return {"name": args.name, "mode": args.mode, "seeds": args.seeds, "target_flops": target_flops, "flags": flags,
            "created": now(), "models": about, "comparisons": comparisons, "features": features}, points, \
        [*flags, *words["full"]]


def add_saved(ablation: dict, saved: dict) -> dict:
    """The ablation with the rows that an earlier command had and this one doesn't name; sweep.json refuses other flags.
    UserError where a variant has the name of another one: its runs would be taken for it."""
    if (ablation["mode"], ablation["target_flops"]) != (saved["mode"], saved["target_flops"]):    # of no run yet
        return ablation
    for name, what in ablation["features"].items():
        if name not in FEATURES and saved["features"].get(name, what) != what:
            raise UserError(f"--variant {name} was {saved['features'][name]!r} in this ablation; choose another name")
    new = {name for name, *_ in ablation["comparisons"]}
    comparisons = [row for row in saved["comparisons"] if row[0] not in new]
    return ablation | {"comparisons": [*comparisons, *ablation["comparisons"]],
                       "models": saved["models"] | ablation["models"],
                       "features": saved["features"] | ablation["features"]}


def read_flags(args: argparse.Namespace) -> tuple[list[str], dict[str, str], float]:
    """Of the flags behind --: those that all models have, the full model's window pattern and knobs, the FLOPs."""
    typed, given = read_given(args.flags)
    if typed.eval_every is None:
        raise UserError("--eval-every never would leave nothing to compare; leave it out")
    own = {"window_pattern": typed.window_pattern, **read_knobs(typed)}
    horizon = [key for key in HORIZON if key in given]
    horizon += [key for key in ("target_flops", "tokens") if getattr(args, key) is not None]
    if len(horizon) > 1:
        raise UserError(f"--{' and --'.join(horizon)} are two horizons; give one of them".replace("_", "-"))
    apart = ("knobs", "window_pattern", "num_iterations", "target_flops")
    flags = [f"--depth={args.depth}", *to_words({key: given[key] for key in given if key not in apart})]
    if args.tokens is not None and not 0 < args.tokens < math.inf:
        raise UserError(f"--tokens {args.tokens:g} must be a positive number")

    def plan_full(horizon: dict) -> Plan:
        return make_recipe([*flags, *to_words(horizon), *switch(own)], args.nproc).plan
    plan = plan_full({key: given[key] for key in horizon if key in given})
    target_flops = args.target_flops
    if args.tokens is not None:
        target_flops = args.tokens * plan.flops_per_token
    if target_flops is not None:    # the batch follows from them
        plan = plan_full({"target_flops": [repr(target_flops)]})
    if "total_batch_size" not in given:
        flags.append(f"--total-batch-size={plan.batch_tokens}")
    return flags, own, plan.total_flops if target_flops is None else target_flops


def read_given(words: list[str]) -> tuple[argparse.Namespace, dict[str, list[str]]]:
    """A command line of scripts.base_train: all of its flags; those that are given, by their whole names."""
    typed, _ = base_train.parse_args(words)
    if typed.preset:
        raise UserError(f"--preset {typed.preset} has all parts of its model; leave it out, and name the full model's "
                        "by --knobs")
    given = parse_flags(words)
    check_own(OWN_FLAGS, given.keys(), "the ablation")
    return typed, {next((key for key in vars(typed) if name not in vars(typed) and key.startswith(name)), name): values
                   for name, values in given.items()}    # argparse takes --knob for --knobs


def read_knobs(typed: argparse.Namespace) -> dict[str, str]:
    """UserError where there is no such knob."""
    parse_knobs(typed.knobs)
    return dict(word.split("=", 1) for word in typed.knobs)


def split_variants(texts: list[str]) -> dict[str, list[str]]:
    """{name: its flags}"""
    variants: dict[str, list[str]] = {}
    for text in texts:
        name, _, words = text.partition(":")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._]*", name) or not words.strip().startswith("-"):
            raise UserError(f"--variant {text!r} must be a name (a to z, 0 to 9, . and _) and flags of "
                            "scripts.base_train, such as 'slow: --matrix-lr .01'")
        if name in variants:
            raise UserError(f"--variant names {name} twice")
        try:
            variants[name] = shlex.split(words)
        except ValueError as error:
            raise UserError(f"--variant {text!r}: {error}") from None
    return variants


def parse_variants(texts: list[str]) -> dict[str, tuple[dict[str, str], dict[str, list[str]]]]:
    """{name: its window pattern and knobs, its other flags}"""
    variants: dict[str, tuple[dict[str, str], dict[str, list[str]]]] = {}
    for name, words in split_variants(texts).items():
        try:
            typed, given = read_given(words)
            knobs = read_knobs(typed)
        except SystemExit:    # argparse has said what is wrong
            raise UserError(f"--variant {name}: scripts.base_train doesn't take {' '.join(words)}") from None
        except UserError as error:
            raise UserError(f"--variant {name}: {error}") from None
        if taken := {*HORIZON, "eval_every", "eval_tokens"} & given.keys():
            raise UserError(f"--variant {name}: --{min(taken).replace('_', '-')} is the same for all models; set it "
                            "behind --")
        if "window_pattern" in given:
            knobs["window_pattern"] = typed.window_pattern
        variants[name] = knobs, {key: given[key] for key in given if key not in ("knobs", "window_pattern")}
    return variants


def parse_features(args: argparse.Namespace) -> list[str]:
    """UserError where something is missing, unknown, given twice, or can't be added to another."""
    if args.variant and not args.features:
        args.mode = args.mode or "drop"
    for flag in ("mode", "features", "depth"):
        if getattr(args, flag) is None and not (flag == "features" and args.variant and args.mode == "drop"):
            raise UserError(f"--{flag} is missing; --mode drop or add, --features (or --variant) and --depth say what "
                            "to train")
    if not args.features:
        return []
    names = args.features.split(",")
    for name in names:
        if name not in FEATURES:
            raise UserError(f"--features: there is no feature {name!r}; choose from {', '.join(FEATURES)}")
        if names.count(name) > 1:
            raise UserError(f"--features names {name} twice")
    if args.mode == "add":
        for other, name in itertools.combinations(names, 2):
            if FEATURES[name].off.keys() & FEATURES[other].off.keys():
                raise UserError(f"{name} and {other} have parts in common, so --mode add can't tell them apart; leave "
                                "one out")
    return names


def list_models(mode: str, names: list[str]) -> list[tuple[str, list[str]]]:
    """(model, its features that are off); full is the one that has them all."""
    if mode == "drop":
        return [("full", []), *((f"no-{name}", [name]) for name in names)]
    return [("full" if i == len(names) else f"{i}-{names[i - 1]}" if i else "none", names[i:])
            for i in range(len(names) + 1)]


def list_comparisons(mode: str, names: list[str]) -> list[tuple[str, str, str]]:
    """(feature, the model with it, the model without it)."""
    if mode == "drop":
        return [(name, "full", f"no-{name}") for name in names]
    models = [model for model, _ in list_models(mode, names)]
    return list(zip(names, models[1:], models[:-1], strict=True))


def make_off(names: list[str], hidden_dim: int) -> dict[str, str]:
    """The knobs without these features. SwiGLU has three matrices to relu^2's two, so 2/3 of the hidden channels."""
    swiglu = max(64, round(2 / 3 * hidden_dim / 64) * 64)
    return {knob: text.format(swiglu=swiglu) for name in names for knob, text in FEATURES[name].off.items()}


def switch(knobs: dict[str, str]) -> list[str]:
    """The flags of a window pattern and knobs."""
    words = [f"{name}={text}" for name, text in knobs.items() if name != "window_pattern"]
    return [f"--window-pattern={knobs['window_pattern']}", *(["--knobs", *words] if words else [])]


def to_words(flags: dict[str, list[str]]) -> list[str]:
    return [word for name, values in flags.items() for word in (f"--{name.replace('_', '-')}", *values)]


def make_recipe(words: list[str], num_ranks: int = 1) -> Recipe:
    """What scripts.base_train would train with these flags."""
    typed, flags = base_train.parse_args([*words, "--resume=none"])
    return base_train.make_recipe(typed, flags, Path(), Ranks(world_size=num_ranks))[0]


def describe(words: list[str], recipe: Recipe) -> tuple:
    """What two runs differ in that is learned, or how fast; a window as long as the context is none."""
    config, typed = recipe.config, vars(base_train.parse_args(words)[0])
    windows = [min(config.window(layer), config.sequence_len) for layer in range(config.n_layer)]
    return (replace(config, window_pattern="L"), windows,
            {name: value for name, value in typed.items()
             if name not in {"knobs", "window_pattern"} | FREE_FLAGS - MACHINE_FLAGS})


if __name__ == "__main__":
    run_script(main)
