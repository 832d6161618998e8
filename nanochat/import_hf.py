"""A model that stands in Hugging Face's format, as a checkpoint to go on from: what export.py writes, and back again.

    custom         bit for bit, but for what the dtype of the export rounded
    qwen3          the same logits but for rounding: norms of embeddings and resid lambdas stay folded into the weights
    nanochat 2025  the published models of late 2025, of which transformers' and mlx-lm's `nanochat` are made

An export has no optimizer state and no place in its data, so a checkpoint of it begins a run: its step is 0.
C channels, D head dim, V vocabulary.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from nanochat.checkpoint_manager import STAGES, build_model, get_run_dir, load_tensors, locked_run, save_checkpoint
from nanochat.choices import LR_NAMES
from nanochat.common import UserError
from nanochat.config import GPTConfig, estimate_flops, read_config
from nanochat.devices import get_environment
from nanochat.export import MARK_NAME, NAMES, SWIGLU_SCALE, TEMPLATE_NAME, rename
from nanochat.gpt import GPT
from nanochat.presets import KNOBS, PLAIN, PRESETS, find_rule, format_knob
from nanochat.scaling import make_plan
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, get_tokenizer_dir, unspell_bytes

CPU = torch.device("cpu")
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()} | {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
SPLITS = (("Isolated", False), ("Removed", True))    # two ways to say that a pattern's matches are the pieces
FOLD_TOLERANCE = 1e-3    # of gates and of norms' weights that fold_qwen3 wrote alike: float16 rounds small ones
State = dict[str, Tensor]


@dataclass(frozen=True)
class Import:
    """A model as its folder has it, with our names."""
    model:     GPT
    tokenizer: RustBPETokenizer
    stage:     str
    identity:  dict    # of the run that was exported, see stage.Recipe.get_meta, or what stands in for it
    origin:    dict    # what the folder says of where it comes from
    accuracy:  str     # how exact the weights are


# The folder


def read_folder(folder: Path, stage: str | None = None) -> Import:
    """UserError, which names the part, where the folder holds no model that this family has.

    stage: of the model; None: what the folder says
    """
    mark = read_object(folder / MARK_NAME) if (folder / MARK_NAME).is_file() else {}
    if mark.get("format") == "gguf":
        raise UserError(f"{folder} is an export of format gguf, which isn't read back; export the model as custom or "
                        "qwen3")
    settings = read_object(folder / "config.json")
    kind = str(settings.get("model_type"))
    if kind not in READERS:
        raise UserError(f"{folder} holds a model of type {kind}; what can be read back is a custom or qwen3 export of "
                        "scripts.export, and a nanochat of 2025")
    tensors = read_tensors(folder)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    preset = "nanochat-jan26" if kind == "nanochat" else "nanochat-july26"
    try:
        if mark and mark["tokenizer"]["hash"] != tokenizer.hash:
            raise UserError(f"{folder / 'tokenizer.json'} isn't the tokenizer that the model was exported with; export "
                            "the model again")
        knobs, state = READERS[kind](settings, {rename(name, OUR_NAMES): tensor for name, tensor in tensors.items()})
        shape = replace(read_shape(settings), **knobs)
        config = replace(read_config(mark["model_config"]) if mark else shape, vocab_size=tokenizer.get_vocab_size())
        if shape.vocab_size > config.padded_vocab_size:
            raise UserError(f"{folder} has a tokenizer of {config.vocab_size} tokens, but its model has "
                            f"{shape.vocab_size}; put the model's own tokenizer.json there")
        model = fill_model(config, state, folder)
        identity = {**(mark.get("identity") or make_identity(config, preset)), "tokenizer": tokenizer.hash,
                    "model": asdict(config)}
        is_chat = (folder / TEMPLATE_NAME).is_file() or '"chat_template"' in read_text(folder / "tokenizer_config.json")
        stage = stage or mark.get("stage") or ("sft" if is_chat else "base")
        if stage not in STAGES:    # it names a folder
            raise ValueError(f"its stage is {stage}")
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:    # the last: torch's own
        raise UserError(f"{folder} holds a {kind} that isn't one of this family ({describe(error)})") from None
    rounded = ", which rounded them" if dtypes != ["float32"] else ""
    accuracy = {"nanochat_full": f"the weights are those of the export, in {', '.join(dtypes)}{rounded}; the learned "
                                 "numbers are exact",
                "qwen3": f"the weights are as they were folded for Qwen3, in {', '.join(dtypes)}{rounded}",
                "nanochat": f"the weights are the published ones, in {', '.join(dtypes)}"}[kind]
    return Import(
        model, tokenizer, stage, identity,
        {key: mark.get(key) for key in ("format", "dtype", "stage", "step", "run")} | {"model_type": kind}, accuracy)


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def describe(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")


def read_object(path: Path) -> dict:
    """A JSON object of the folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
        return value
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no {path}; name a folder with a model in Hugging Face's format, as scripts.export "
                        "writes it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error})") from None


def read_tensors(folder: Path) -> State:
    """The tensors of all safetensors files of the folder."""
    tensors: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            tensors |= load_tensors(path, CPU)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({error}); export or download it again") from None
    if not tensors:
        raise UserError(f"{folder} has no .safetensors file; pickled weights (.bin, .pt) aren't read, for they can run "
                        "programs")
    return tensors


def read_tokenizer(path: Path) -> RustBPETokenizer:
    """A tokenizer.json whose token ids ours repeats: byte-level BPE in the order of its merges, one split pattern.

    What it puts around texts isn't taken over: we do so ourselves.
    """
    content = read_object(path)
    try:
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        (split, byte_level), model = content["pre_tokenizer"]["pretokenizers"], content["model"]
        if content.get("normalizer") or byte_level["type"] != "ByteLevel" or byte_level["add_prefix_space"] or \
                byte_level["use_regex"] or (split["behavior"], split["invert"]) not in SPLITS:
            raise ValueError("it changes or splits texts otherwise")
        ranks = {unspell_bytes(spelling): rank for spelling, rank in model["vocab"].items() if spelling not in specials}
        order = []
        for merge in model["merges"]:
            left, right = map(unspell_bytes, merge.split(" ") if isinstance(merge, str) else merge)
            order.append(ranks[left + right])
        # Other tools list every pair that makes a token, ours the one that does: the order is the same
        if order != sorted(order) or {*order} != {rank for token, rank in ranks.items() if len(token) > 1}:
            raise ValueError("the merges are not those of the vocabulary, in its order")
        if missing := [name for name in SPECIAL_TOKENS if name not in specials]:
            raise ValueError(f"it has no {missing[0]}")
        return RustBPETokenizer(split["pattern"]["Regex"], ranks, specials)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} is no tokenizer of nanochat's ({describe(error)})") from None


# The model


def read_shape(settings: dict) -> GPTConfig:
    """The shape of a model from its config.json, with the knobs that need no more than the plain ones."""
    C, H = settings["hidden_size"], settings["num_attention_heads"]
    query_dim, hidden = H * (settings.get("head_dim") or C // H), settings["intermediate_size"]
    return GPTConfig(settings["max_position_embeddings"], settings["vocab_size"], settings["num_hidden_layers"], H,
                     settings.get("num_key_value_heads") or H, C, "L", attn_dim=0 if query_dim == C else query_dim,
                     mlp_dim=0 if hidden == 4 * C else hidden, **PLAIN)


def read_custom(settings: dict, state: State) -> tuple[dict, State]:
    """Knobs and state of our own format; knobs of initialisation, which it doesn't have, are the default ones."""
    window, context = settings["sliding_window"], settings["max_position_embeddings"]
    kinds, pairs = settings["layer_types"], settings.get("key_offset_pairs", [])    # older exports have none
    is_short = [kind == "sliding_attention" or any(pairs) and not pairs[i] for i, kind in enumerate(kinds)]
    numbers = {name: settings[name] for name in ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")}
    knobs = {
        "window_pattern": "".join("S" if short else "L" for short in is_short),
        # Theirs counts the token itself; ours rounds up, so that half a token less is safe. No window: it is no shorter
        # than the context
        "window_fraction": (window - 1.5) / context if window else 1.0 if any(is_short) else GPTConfig.window_fraction,
        "key_offset": 2 * max(pairs, default=0) / settings["head_dim"],
        "mlp_act": {"silu": "swiglu"}.get(settings["hidden_act"], settings["hidden_act"]),
        "rope_base": settings["rotary_base"], "rope_fraction": settings["rotary_fraction"],
        "qk_scale": settings["qk_scale"], "embed_norm": settings["embed_norm"],
        "ve_gate_channels": settings["ve_gate_channels"], "ve_gate_scale": settings["ve_gate_scale"],
        "smear": numbers["smear_lambda"] is not None, "softcap": settings["final_logit_softcapping"] or 0.0,
        "backout_layer": -1 if settings["backout_layer"] is None else settings["backout_layer"],
        "resid_init": GPTConfig.resid_init if numbers["resid_lambdas"] else None,
        "x0_init": GPTConfig.x0_init if numbers["x0_lambdas"] else None}
    return knobs, state | {name: torch.tensor(value).view(-1) for name, value in numbers.items() if value is not None}


def refuse_other_attention(settings: dict) -> None:
    """ValueError where the config.json asks for rotary angles or windows that our model, of the same tensors, lacks."""
    for name in ("rope_parameters", "rope_scaling"):    # the second in older files, some with "type"
        rope = dict(settings.get(name) or {})    # which fails for no object
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            raise ValueError(f"its {name} scale the rotary angles, of type {kind}")
    if settings.get("use_sliding_window"):
        raise ValueError("it uses a sliding window")


def unfold_qwen3(settings: dict, state: State) -> tuple[dict, State]:
    """Knobs and state of what export.fold_qwen3 wrote; ValueError for any other Qwen3, whose norms have weights."""
    refuse_other_attention(settings)
    norms = {name: state.pop(name) for name in list(state) if "norm" in name}
    scales = {name: weight for name, weight in norms.items() if name.endswith(("q_norm.weight", "k_norm.weight"))}
    for name, weight in norms.items():
        if not (weight == (weight[0] if name in scales else 1)).all():
            raise ValueError(f"{name} isn't constant")
    acts, D = set(), settings["head_dim"]
    for i in range(settings["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        for name in ("attn.c_q", "attn.c_k"):
            weight = state[f"{layer}.{name}.weight"]
            state[f"{layer}.{name}.weight"] = weight.view(-1, 2, D // 2, weight.size(1)).flip(1).reshape(weight.shape)
        up = state[f"{layer}.mlp.c_gate.weight"].float() / SWIGLU_SCALE
        excess = (state[f"{layer}.mlp.c_fc.weight"].float() * SWIGLU_SCALE - up).abs().max()
        acts.add("relu2" if excess <= FOLD_TOLERANCE * up.abs().max() else "swiglu")
        if "relu2" in acts:
            state[f"{layer}.mlp.c_fc.weight"] = up
            del state[f"{layer}.mlp.c_gate.weight"]
    factors = {round(math.prod(scales[f"transformer.h.{i}.self_attn.{name}_norm.weight"][0].item() for name in "qk"), 3)
               for i in range(settings["num_hidden_layers"])}
    if len(acts) != 1 or len(factors) != 1:
        raise ValueError("its layers differ in kind")
    return {"mlp_act": acts.pop(), "qk_scale": math.sqrt(factors.pop()), "embed_norm": False, "resid_init": None,
            "rope_base": settings["rope_parameters"]["rope_theta"]}, state


def read_2025(settings: dict, state: State) -> tuple[dict, State]:
    """The model of late 2025: that of January without value embeddings, lambdas and short windows."""
    refuse_other_attention(settings)
    theta = (settings.get("rope_parameters") or settings).get("rope_theta", 10_000.0)
    knobs = {"ve_gate_channels": 0, "resid_init": None, "x0_init": None, "rope_base": theta,
             "softcap": settings.get("final_logit_softcapping", 15.0) or 0.0}
    if settings.get("hidden_act", "relu2") != "relu2":
        raise ValueError(f"its activation is {settings['hidden_act']}")
    return {**PRESETS["nanochat-jan26"].knobs, "embed_norm": True, "mlp_act": "relu2", **knobs}, state


READERS: dict[str, Callable[[dict, State], tuple[dict, State]]] = {
    "nanochat_full": read_custom, "qwen3": unfold_qwen3, "nanochat": read_2025}


def fill_model(config: GPTConfig, state: State, folder: Path) -> GPT:
    """The model with these weights; rows that pad its vocabulary, which nothing reads, are 0. UserError where a tensor
    is missing, unknown or of another shape."""
    model = build_model(config, torch.float32, CPU)
    if config.resid_init is not None and "resid_lambdas" not in state:    # folded
        state = state | {"resid_lambdas": torch.ones(config.n_layer)}
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        if name not in wanted or name not in state:
            what = "lacks" if name in wanted else "has"
            raise UserError(f"{folder} {what} a tensor {name}, unlike the model that its config.json describes")
        rows, shape, is_table = state[name], wanted[name].shape, any(part in name for part in ("wte", "value", "lm_h"))
        if is_table and rows.dim() == 2:    # by tokens
            rows = rows[:config.vocab_size]
        num_rows = config.vocab_size if is_table else shape[0]
        if rows.shape != (num_rows, *shape[1:]):
            raise UserError(f"{folder} has a tensor {name} of shape {tuple(state[name].shape)}, where the model that "
                            f"its config.json describes has {(num_rows, *shape[1:])}")
        wanted[name].zero_()[:num_rows] = rows
    return model.eval()


def make_identity(config: GPTConfig, preset_name: str) -> dict:
    """What later stages take over of a base run, where an export doesn't say: the preset's batch and rates."""
    preset = PRESETS[preset_name]
    plan = make_plan(config, estimate_flops(config), num_iterations=1, rule=find_rule(preset.rule),
                     batch_tokens=preset.flags.get("total_batch_size"), weight_decay=preset.flags["weight_decay"])
    return {"plan": asdict(plan), "rule": preset.rule} | {name: preset.flags[name] for name in LR_NAMES}


# The checkpoint


def save_import(found: Import, tag: str) -> tuple[Path, str]:
    """Write step 0 of a new run, and the tokenizer where it isn't there yet; returns the run's folder and the
    tokenizer's name. UserError where either name is taken."""
    run_dir = get_run_dir(found.stage, tag)
    with locked_run(run_dir):
        if any(path.suffix != ".tmp" for path in run_dir.glob("*")):    # those are of an import that was killed
            raise UserError(f"there is a {found.stage} run {tag} already; name another --model-tag")
        name = save_tokenizer(found.tokenizer, tag)
        model, rule = found.model, found.identity.get("rule", "july26")
        meta = {"stage": found.stage, "model_config": asdict(model.config), "identity": found.identity,
                "data": {"name": "unknown", "hash": None, "train_files": None},
                "tokenizer": {"name": name, "hash": found.tokenizer.hash,
                              "vocab_size": found.tokenizer.get_vocab_size()},
                "environment": get_environment(CPU), "choices": {}, "loader": None, "progress": None, "scaler": None,
                "optimizer_steps": 0, "imported": found.origin}
        save_checkpoint(run_dir, 0, model, model.setup_optimizer(rule=find_rule(rule)), meta)
    return run_dir, name


def save_tokenizer(tokenizer: RustBPETokenizer, tag: str) -> str:
    """The name of a tokenizer: of the one that is the same, where there is one, else the tag."""
    for path in sorted(get_tokenizer_dir().parent.glob("*/tokenizer.json")):
        try:
            if RustBPETokenizer.from_directory(path.parent).hash == tokenizer.hash:
                return path.parent.name
        except UserError:    # damaged: of no concern here
            continue
    try:
        folder = get_tokenizer_dir(tag)
    except UserError as error:
        raise UserError(f"{error}; name another --model-tag") from None
    if (folder / "tokenizer.json").exists():
        raise UserError(f"there is another tokenizer {tag} already; name another --model-tag")
    tokenizer.save(folder)
    return tag


def list_train_flags(config: GPTConfig) -> list[str]:
    """The flags of scripts.base_train that describe this model; [] where none do, as with key/value groups."""
    if config.n_kv_head != config.n_head:
        return []
    C, D = config.n_embd, config.n_embd // config.n_head
    knobs = [f"{name}={format_knob(getattr(config, name))}" for name in KNOBS
             if getattr(config, name) != getattr(GPTConfig, name)]
    return ["--depth", str(config.n_layer), "--aspect-ratio", str(C // config.n_layer), "--head-dim", str(D),
            "--max-seq-len", str(config.sequence_len), "--window-pattern", config.window_pattern,
            *(["--knobs", *knobs] if knobs else [])]
