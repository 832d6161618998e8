"""A trained model as a folder that other engines load without this package.

    custom  any model: safetensors with modeling_nanochat.py, the model's code for Hugging Face's transformers
    qwen3   a model without the parts that Qwen3 lacks, as the preset plain: whatever runs Qwen3 runs it
    gguf    the same models as one file for llama.cpp, ollama and others

C channels, D head dim, V vocabulary.
"""

import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from nanochat.choices import LR_NAMES
from nanochat.common import UserError, get_base_dir, replaced_folder, restore_folder, write_atomic, write_json
from nanochat.config import SMEAR_GATE_CHANNELS
from nanochat.gpt import GPT, NORM_EPS, norm
from nanochat.report import read_json, read_run
from nanochat.report_render import format_value
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, RustBPETokenizer, build_tokenizer_json

FORMATS = ("custom", "qwen3", "gguf")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHIPPED_DIR = Path(__file__).parent
MODELING_NAME, TEMPLATE_NAME, GGUF_NAME = "modeling_nanochat.py", "chat_template.jinja", "model.gguf"
MARK_NAME = "nanochat_export.json"    # says that a folder is an export, and of what
SWIGLU_SCALE = 256.0                  # b of fold_qwen3: a power of two, so that no format rounds for it
# Parts of our names, and what transformers' models call them; of those, and what llama.cpp calls them
NAMES = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "value_embeds": "model.value_embeds",
         "smear_gate": "model.smear_gate",
         "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
         "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj", "attn.ve_gate": "self_attn.ve_gate",
         "mlp.c_fc": "mlp.up_proj", "mlp.c_gate": "mlp.gate_proj", "mlp.c_proj": "mlp.down_proj"}
GGUF_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
              "model.layers": "blk", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
              "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
              "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
              "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
# llama.cpp has no split pattern in the file, but a list of patterns by name; a wrong name loads and splits otherwise
GGUF_SPLITS = {SPLIT_PATTERNS[name]: theirs for name, theirs in
               (("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("qwen35", "qwen35"))}


@dataclass(frozen=True)
class Source:
    """What is exported, as checkpoint_manager.load_model returns it."""
    model:     GPT
    tokenizer: RustBPETokenizer
    meta:      dict

    @property
    def is_chat(self) -> bool:
        """A base model knows no conversations, so its export has no chat template."""
        return self.meta["stage"] != "base"

    @property
    def name(self) -> str:
        return f"nanochat {self.meta['stage']} {Path(self.meta['run_dir']).name}"

    def find_ends(self) -> dict[str, int]:
        """The tokens that begin a document, end an answer, and fill rows up."""
        names = {"bos_token_id": "<|bos|>", "eos_token_id": "<|assistant_end|>", "pad_token_id": "<|assistant_end|>"}
        return {end: self.tokenizer.encode_special(name) for end, name in names.items()}


# Which format


def choose_format(asked: str, source: Source) -> tuple[str, str]:
    """(format, why). asked: one of FORMATS, or auto; UserError where the model or its tokenizer can't be written so"""
    if missing := [name for name in SPECIAL_TOKENS if name not in source.tokenizer.special_tokens]:
        raise UserError(f"the model's tokenizer has no {missing[0]}, so it is no chat tokenizer of nanochat's; export "
                        "a model with a tokenizer that scripts.tok_train made")
    if source.model.config.num_experts:
        raise UserError("a mixture of experts can't be exported: no format has a place for its router; export a model "
                        "that was trained without the knob num_experts")
    obstacles = list_obstacles(source.model)
    if asked == "auto":
        if not obstacles:
            return "qwen3", "the model can be written as Qwen3, which most engines run"
        return "custom", f"Qwen3 has no place for {', '.join(obstacles)}: written with its own modeling file"
    if asked != "custom" and obstacles:
        raise UserError(f"--format {asked} has no place for {', '.join(obstacles)}; use --format custom, or train with "
                        "--preset plain")
    if asked == "gguf" and source.tokenizer.pattern not in GGUF_SPLITS:
        raise UserError("llama.cpp doesn't know the split pattern of this model's tokenizer; for --format gguf train "
                        "the tokenizer with scripts.tok_train --split-pattern llama3, qwen2 or qwen35, and the model "
                        "with that")
    return asked, "as asked for"


def list_obstacles(model: GPT) -> list[str]:
    """What of this model Qwen3 can't express, in words."""
    config, lambdas = model.config, model.resid_lambdas
    parts = {
        "value embeddings": config.ve_gate_channels > 0,
        "smear": config.smear,
        "key offset": config.key_offset > 0,
        "backout": config.middle_layer is not None,
        "x0": config.x0_init is not None,
        "short windows": any(config.window(i) < config.sequence_len for i in range(config.n_layer)),
        "softcap": config.softcap > 0,
        "a rotary part of heads": config.rope_fraction < 1,
        "queries and keys without norm": not config.qk_scale,
        # Folding them scales the stream, and the norms' eps with it, which only large enough embeddings don't notice
        "resid lambdas without a norm of the embeddings": lambdas is not None and not config.embed_norm,
        "resid lambdas that aren't positive": lambdas is not None and bool((lambdas <= 0).any()),
    }
    return [part for part, is_there in parts.items() if is_there]


# The weights


def name_tensors(model: GPT) -> dict[str, Tensor]:
    """The model's matrices and tables in fp32 under transformers' names, without the padding of the vocabulary."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() < 2:    # learned numbers: in config.json
            continue
        if re.search(r"wte|value_embeds|lm_head", name):
            tensor = tensor[:model.config.vocab_size]
        tensors[rename(name, NAMES)] = tensor.detach().float()
    return tensors


def rename(name: str, names: dict[str, str]) -> str:
    for part, theirs in names.items():
        name = name.replace(part, theirs)
    return name


def fold_qwen3(model: GPT) -> dict[str, Tensor]:
    """The tensors of a Qwen3 model with the same logits. Exact but for rounding, and for relu^2 as below.

    - Embeddings are normed row by row in the table.
    - Our rotation is theirs with the halves of each head exchanged. QK norm's scale is the weights of their norms: of
      the pairs with its square as their product, one that bf16 hardly rounds.
    - The residual stream stays unscaled, which each norm after it undoes: what layer i adds to it is divided by the
      product of the resid lambdas up to i.
    - relu(z)^2 is silu(b z) z / b for large b, since that is z^2 sigmoid(b z): within 0.5 / b^2 for each hidden unit.
    """
    config, tensors = model.config, name_tensors(model)
    if config.embed_norm:
        tensors["model.embed_tokens.weight"] = norm(tensors["model.embed_tokens.weight"])
    scale, ones = 1.0, torch.ones(config.n_embd)
    q_scales = torch.arange(128, 256) / 128    # bf16 holds these
    k_scales = config.qk_scale ** 2 / q_scales
    best = (k_scales.bfloat16() / k_scales - 1).abs().argmin()
    for i in range(config.n_layer):
        layer = f"model.layers.{i}"
        scale *= 1.0 if model.resid_lambdas is None else model.resid_lambdas[i].item()
        for name in ("self_attn.q_proj", "self_attn.k_proj"):
            halves = tensors[f"{layer}.{name}.weight"].view(-1, 2, config.head_dim // 2, config.n_embd)
            tensors[f"{layer}.{name}.weight"] = halves.flip(1).reshape(-1, config.n_embd)
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"{layer}.{name}.weight"] = tensors[f"{layer}.{name}.weight"] / scale
        if config.mlp_act == "relu2":
            up = tensors[f"{layer}.mlp.up_proj.weight"]
            tensors[f"{layer}.mlp.gate_proj.weight"] = up * SWIGLU_SCALE
            tensors[f"{layer}.mlp.up_proj.weight"] = up / SWIGLU_SCALE
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = ones.clone()
        for name, scales in (("q_norm", q_scales), ("k_norm", k_scales)):
            tensors[f"{layer}.self_attn.{name}.weight"] = scales[best].repeat(config.head_dim)
    return tensors | {"model.norm.weight": ones}


# The files


def make_config(source: Source, dtype: str, form: str) -> dict:
    """config.json of a custom or qwen3 export."""
    config = source.model.config
    shared = {
        "dtype": dtype, "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_dim, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len, "rms_norm_eps": NORM_EPS, "tie_word_embeddings": False,
        "use_cache": True, **source.find_ends()}
    if form == "qwen3":
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **shared, "hidden_act": "silu",
                "attention_bias": False, "use_sliding_window": False, "rope_theta": config.rope_base,
                "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base}}
    windows = [config.window(i) for i in range(config.n_layer)]
    is_short = [window < config.sequence_len for window in windows]
    layers = [i for i in range(config.n_layer) if config.has_value_embed(i)]

    def read(table: Tensor | None) -> list[float] | None:
        return None if table is None else table.float().tolist()
    return {
        "architectures": ["NanochatForCausalLM"], "model_type": "nanochat_full",
        "auto_map": {auto: f"{Path(MODELING_NAME).stem}.{name}" for auto, name in
                     (("AutoConfig", "NanochatConfig"), ("AutoModel", "NanochatModel"),
                      ("AutoModelForCausalLM", "NanochatForCausalLM"))},
        **shared, "hidden_act": {"swiglu": "silu"}.get(config.mlp_act, config.mlp_act),
        "final_logit_softcapping": config.softcap or None,
        "layer_types": ["sliding_attention" if short else "full_attention" for short in is_short],
        "sliding_window": min(windows) + 1 if any(is_short) else None,    # theirs counts the token itself
        "embed_norm": config.embed_norm, "rotary_base": config.rope_base, "rotary_fraction": config.rope_fraction,
        "key_offset_pairs": [config.count_offset_pairs(i) for i in range(config.n_layer)],
        "qk_scale": config.qk_scale, "value_embed_layers": layers, "ve_gate_channels": config.ve_gate_channels,
        "ve_gate_scale": config.ve_gate_scale, "smear_gate_channels": SMEAR_GATE_CHANNELS,
        "smear_lambda": source.model.smear_lambda.item() if config.smear else None,
        "backout_layer": config.middle_layer,
        "backout_lambda": source.model.backout_lambda.item() if config.middle_layer is not None else None,
        "resid_lambdas": read(source.model.resid_lambdas), "x0_lambdas": read(source.model.x0_lambdas)}


def write_hf(folder: Path, source: Source, dtype: str, form: str) -> None:
    """The files of a custom or qwen3 export."""
    tokenizer, special = source.tokenizer, source.tokenizer.special_tokens
    tensors = fold_qwen3(source.model) if form == "qwen3" else name_tensors(source.model)
    tensors = {name: tensor.to(DTYPES[dtype]).contiguous() for name, tensor in tensors.items()}
    write_atomic(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt"}))
    write_json(folder / "config.json", make_config(source, dtype, form))
    ends = source.find_ends()
    write_json(folder / "generation_config.json", ends | {"eos_token_id": [ends["eos_token_id"], ends["bos_token_id"]]})
    content = build_tokenizer_json(tokenizer.pattern, tokenizer.ranks, special)
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    content["post_processor"] = {    # a document begins with bos
        "type": "TemplateProcessing", "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [special["<|bos|>"]], "tokens": ["<|bos|>"]}}}
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>", "clean_up_tokenization_spaces": False,
        "model_max_length": source.model.config.sequence_len})
    if form == "custom":
        shutil.copyfile(SHIPPED_DIR / MODELING_NAME, folder / MODELING_NAME)
    if source.is_chat:
        shutil.copyfile(SHIPPED_DIR / TEMPLATE_NAME, folder / TEMPLATE_NAME)


def write_gguf(folder: Path, source: Source, dtype: str) -> None:
    """The one file of a gguf export: a Qwen3 model with its tokenizer and chat template."""
    gguf = import_gguf()
    config, tokenizer = source.model.config, source.tokenizer
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer = gguf.GGUFWriter(folder / GGUF_NAME, "qwen3")
    for add, value in (("name", source.name), ("context_length", config.sequence_len),
                       ("embedding_length", config.n_embd), ("block_count", config.n_layer),
                       ("feed_forward_length", config.hidden_dim), ("head_count", config.n_head),
                       ("head_count_kv", config.n_kv_head), ("key_length", config.head_dim),
                       ("value_length", config.head_dim), ("rope_freq_base", config.rope_base),
                       ("layer_norm_rms_eps", NORM_EPS), ("vocab_size", config.vocab_size),
                       ("file_type", gguf.LlamaFileType[file_type])):
        getattr(writer, f"add_{add}")(value)
    content = build_tokenizer_json(tokenizer.pattern, tokenizer.ranks, tokenizer.special_tokens)["model"]
    special = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    tokens = [*content["vocab"], *(special[token_id] for token_id in sorted(special))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(GGUF_SPLITS[tokenizer.pattern])
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(content["vocab"]) + [gguf.TokenType.CONTROL] * len(special))
    writer.add_token_merges(content["merges"])
    for end, token_id in source.find_ends().items():
        getattr(writer, f"add_{end}")(token_id)
    writer.add_add_bos_token(True)
    if source.is_chat:
        writer.add_chat_template(read_template())
    for name, tensor in fold_qwen3(source.model).items():
        stored = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        writer.add_tensor(rename(name, GGUF_NAMES), gguf.quants.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_template(generation: str = "", end: str = "") -> str:
    """The chat template with these in place of a tag of transformers alone, which marks what the assistant writes."""
    template = (SHIPPED_DIR / TEMPLATE_NAME).read_text(encoding="utf-8")
    return template.replace("{%- generation -%}", generation).replace("{%- endgeneration -%}", end)


def import_gguf():
    try:
        import gguf
    except ImportError:
        raise UserError("--format gguf needs the package gguf, which isn't installed: pip install gguf") from None
    return gguf


# The folder


def export_model(source: Source, out: Path, form: str, dtype: str, force: bool = False) -> None:
    """Write a folder with everything in it, whole or not at all.

    force: replace what is at `out`, which else is done for an earlier export only
    """
    for kept in map(Path.resolve, (Path.cwd(), get_base_dir(), Path(source.meta["run_dir"]))):
        if kept.is_relative_to(out):
            raise UserError(f"{out} can't be replaced by an export, for {kept} is in use; name another --out")
    if form == "gguf":
        import_gguf()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(source, out, form, dtype, force)
    except OSError as error:    # no folder, none that this user may write to, a full disk
        raise UserError(f"{out} can't be written ({error}); name another --out") from None


def replace_folder(source: Source, out: Path, form: str, dtype: str, force: bool) -> None:
    """Write the folder beside `out`, and put it there once it is whole."""
    restore_folder(out)    # after an export that was killed
    if out.exists() and not (out / MARK_NAME).is_file() and not force:
        raise UserError(f"{out} exists and is no export of nanochat's; name another folder, or replace it with --force")
    with replaced_folder(out) as new:
        if form == "gguf":
            write_gguf(new, source, dtype)
        else:
            write_hf(new, source, dtype, form)
        write_atomic(new / "README.md", write_card(source, form, dtype))
        meta = source.meta
        write_json(new / MARK_NAME, {"format": form, "dtype": dtype, "stage": meta["stage"], "step": meta["step"],
                                     "run": Path(meta["run_dir"]).name, "tokenizer": meta["tokenizer"],
                                     "model_config": asdict(source.model.config),
                                     "identity": pick_identity(meta)})


def pick_identity(meta: dict) -> dict:
    """Of a run's identity (stage.Recipe.get_meta) what import_hf needs: of a base run all, which is numbers and hashes,
    so that it can go on; of later stages batch, rates and rule, and not the names of the files they learned from."""
    identity = meta.get("identity") or {}
    return {name: value for name, value in identity.items()
            if meta["stage"] == "base" or name in ("plan", "rule", *LR_NAMES)}


def write_card(source: Source, form: str, dtype: str) -> str:
    """README.md: what the model is, what was measured of it, how to run it. Its licence is left to its maker."""
    meta, run_dir = source.meta, Path(source.meta["run_dir"])
    info = read_run(run_dir).info
    results, params = info.get("results") or {}, info.get("params") or {}
    is_last = results.get("step", meta["step"]) == meta["step"]    # the run's figures are of its last step
    results = results if is_last else {}
    facts = {"stage": meta["stage"], "optimizer steps": meta["step"], "parameters": params.get("total"),
             "tokens of training": results.get("tokens"), "validation bits per byte": results.get("val_bpb"),
             "context in tokens": source.model.config.sequence_len, "weights": dtype,
             "tokenizer": f"{meta['tokenizer']['name']} ({meta['tokenizer']['hash']})"}
    for path in sorted((get_base_dir() / "report").glob("*.json")):
        section = read_json(path)
        is_its_own = section.get("run") == run_dir.relative_to(get_base_dir()).as_posix() and \
            (section.get("values") or {}).get("step", meta["step"]) == meta["step"] and \
            str(section.get("created") or "~") >= str(info.get("ended") or "")    # not of weights that were replaced
        if is_last and is_its_own:
            facts |= {f"{path.stem}: {name}": value for name, value in (section.get("metrics") or {}).items()}
    rows = "\n".join(f"| {name} | {format_value(name, value)} |" for name, value in facts.items() if value is not None)
    trust = ", trust_remote_code=True" if form == "custom" else ""
    prompt = 'tokenizer("The sky is", return_tensors="pt")'
    if source.is_chat:
        prompt = """tokenizer.apply_chat_template([{"role": "user", "content": "Why is the sky blue?"}],
                                       add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
    usage = f"llama-cli -m {GGUF_NAME}" if form == "gguf" else f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{trust})
tokenizer = AutoTokenizer.from_pretrained("."{trust})
inputs = {prompt}
answer = model.generate(**inputs, max_new_tokens=100)[0]
print(tokenizer.decode(answer[inputs["input_ids"].size(1):]))"""
    return f"""# {source.name}

A model trained with nanochat, written as `{form}` by its scripts.export. Its licence is its maker's to choose.

| | |
|---|---|
{rows}

```{"bash" if form == "gguf" else "python"}
{usage}
```

Names of special tokens within a message, such as `<|user_end|>`, are read as these tokens by this tokenizer, unlike
nanochat's own: remove them from text that isn't yours.
"""
