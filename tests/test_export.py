"""Exports: the folded Qwen3 has the model's logits, the chat template its tokens; a folder is whole or not there."""

import functools
import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jinja2.sandbox
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.conversations import ConversationError
from nanochat.export import (
    DTYPES,
    GGUF_NAME,
    GGUF_NAMES,
    MARK_NAME,
    Source,
    choose_format,
    export_model,
    fold_qwen3,
    make_config,
    read_template,
    rename,
)
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERNS, RustBPETokenizer
from scripts import export as script
from tests.export_helpers import CONFIGS, PLAIN, PLAIN_CONFIGS, make_source
from tests.helpers import BYTE_TOKENIZER, CONFIG, make_prompt, save_run


@pytest.fixture
def source(byte_base):
    return make_source(CONFIG, run_dir=str(byte_base / "runs" / "sft" / "toy"))


def make_tokenizer(pattern):
    """Bytes and one merge."""
    return RustBPETokenizer(SPLIT_PATTERNS[pattern], BYTE_TOKENIZER.ranks | {b"th": 256},
                            {name: 257 + i for i, name in enumerate(SPECIAL_TOKENS)})


def make_gguf_source(pattern, base_dir):
    return make_source(replace(PLAIN, vocab_size=266), make_tokenizer(pattern), str(base_dir / "runs" / "sft" / "toy"))


# ---------------------------------------------------------------------------------------------------------------------
# Weights and configuration


def run_qwen3(config, tensors, ids):
    """Qwen3's forward pass as transformers' modeling_qwen3.py has it: ids (B, T) -> logits (B, T, V)."""
    (B, T), H, D = ids.shape, config["num_attention_heads"], config["head_dim"]

    def norm(x, name):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"])
        return tensors[f"{name}.weight"] * x

    def linear(x, name):
        return F.linear(x, tensors[f"{name}.weight"])

    def rotate(x):
        frequencies = 1 / config["rope_parameters"]["rope_theta"] ** (torch.arange(0, D, 2, dtype=torch.float) / D)
        angles = (torch.arange(T)[:, None] * frequencies).repeat(1, 2)
        x1, x2 = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-x2, x1), dim=-1) * angles.sin()

    x = tensors["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{name}").view(B, T, -1, D) for name in ("q_proj", "k_proj", "v_proj"))
        q = rotate(norm(q, f"{layer}.self_attn.q_norm").transpose(1, 2))
        k = rotate(norm(k, f"{layer}.self_attn.k_norm").transpose(1, 2))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).reshape(B, T, H * D), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = linear(h, f"{layer}.mlp.gate_proj"), linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(F.silu(gate) * up, f"{layer}.mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("name", PLAIN_CONFIGS)
@torch.inference_mode()
def test_folded_into_qwen3(byte_base, name):
    source = make_source(PLAIN_CONFIGS[name], run_dir=str(byte_base / "runs" / "sft" / "toy"))
    export_model(source, byte_base / "out", "qwen3", "float32")
    config = json.loads((byte_base / "out" / "config.json").read_text(encoding="utf-8"))
    tensors = safetensors.torch.load_file(byte_base / "out" / "model.safetensors")
    ids = torch.tensor([make_prompt(60)])
    logits, theirs = source.model(ids), run_qwen3(config, tensors, ids)
    assert (theirs - logits).abs().max() < 1e-5 < logits.std() / 1e4
    assert torch.equal(theirs.argmax(-1), logits.argmax(-1))
    assert config["model_type"] == "qwen3" and not (byte_base / "out" / "modeling_nanochat.py").exists()

    C, D, V, hidden = (config[key] for key in ("hidden_size", "head_dim", "vocab_size", "intermediate_size"))
    Q, K = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    layer = {"self_attn.q_proj": (Q, C), "self_attn.k_proj": (K, C), "self_attn.v_proj": (K, C),
             "self_attn.o_proj": (C, Q), "self_attn.q_norm": (D,), "self_attn.k_norm": (D,),
             "mlp.gate_proj": (hidden, C), "mlp.up_proj": (hidden, C), "mlp.down_proj": (C, hidden),
             "input_layernorm": (C,), "post_attention_layernorm": (C,)}
    expected = {f"model.layers.{i}.{part}": shape for i in range(4) for part, shape in layer.items()}
    expected |= {"model.embed_tokens": (V, C), "model.norm": (C,), "lm_head": (V, C)}
    assert {key.removesuffix(".weight"): tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    scales = [tensors[f"model.layers.0.self_attn.{key}_norm.weight"][0].bfloat16().item() for key in "qk"]
    assert abs(scales[0] * scales[1] / 1.44 - 1) < 1e-4
    # And llama.cpp's names for them: none is left as transformers has it, no two are one
    names = {rename(key, GGUF_NAMES) for key in tensors}
    assert len(names) == len(tensors) and not any(part in name for name in names for part in ("proj", "model", "layer"))


def test_custom_folder_holds_what_the_checkpoint_does(source, byte_base):
    export_model(source, byte_base / "out", "custom", "bfloat16")
    config = json.loads((byte_base / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_nanochat.NanochatForCausalLM"
    model = source.model
    # As numbers, which no load in bf16 rounds
    assert config["resid_lambdas"] == model.resid_lambdas.tolist() and config["x0_lambdas"] == model.x0_lambdas.tolist()
    assert config["smear_lambda"] == model.smear_lambda.item()
    assert config["backout_lambda"] == model.backout_lambda.item() and config["backout_layer"] == 2
    assert config["layer_types"] == ["full_attention"] * 4    # a window of S is longer than this context
    wide = make_config(make_source(CONFIGS["short windows"]), "float32", "custom")
    assert wide["layer_types"] == ["sliding_attention"] * 2 + ["full_attention"] * 2 and wide["sliding_window"] == 129

    tensors = safetensors.torch.load_file(byte_base / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["model.embed_tokens.weight"].shape == (265, 64)    # without the padding
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], model.transformer.h[1].mlp.c_fc.weight.bfloat16())
    files = {path.name: path.stat().st_mode & 0o777 for path in (byte_base / "out").iterdir()}
    assert len(files) == 9 and len(set(files.values())) == 1
    mark = json.loads((byte_base / "out" / MARK_NAME).read_text(encoding="utf-8"))
    assert mark["stage"] == "sft" and mark["run"] == "toy" and mark["model_config"]["n_kv_head"] == 2


def test_format_is_chosen_or_refused():
    full, plain = make_source(CONFIG), make_source(PLAIN)
    form, reason = choose_format("auto", full)
    assert form == "custom" and "value embeddings, smear, key offset, backout, x0, softcap" in reason
    assert choose_format("auto", plain)[0] == "qwen3"
    windows = make_source(replace(PLAIN, sequence_len=256, window_pattern="SL"))
    negative = make_source(PLAIN)
    with torch.no_grad():
        negative.model.resid_lambdas[1] = -1
    foreign = Source(plain.model, RustBPETokenizer(SPLIT_PATTERNS["qwen2"], BYTE_TOKENIZER.ranks,
                                                   {"<|endoftext|>": 256}), plain.meta)
    for source, asked, reason in (
            (full, "qwen3", "no place for value embeddings, .*use --format custom, or train with --preset plain"),
            (windows, "qwen3", "no place for short windows;"),
            (negative, "qwen3", "no place for resid lambdas that aren't positive;"),
            (plain, "gguf", "train the tokenizer with scripts.tok_train --split-pattern llama3, qwen2 or qwen35"),
            (foreign, "auto", "has no <|bos|>, so it is no chat tokenizer")):
        with pytest.raises(UserError, match=reason):
            choose_format(asked, source)
    for pattern in ("llama3", "qwen2", "qwen35"):
        assert choose_format("gguf", make_gguf_source(pattern, Path())) == ("gguf", "as asked for")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and chat template


def test_tokenizer_begins_documents_with_bos(source, byte_base):
    export_model(source, byte_base / "out", "custom", "bfloat16")
    theirs = tokenizers.Tokenizer.from_file(str(byte_base / "out" / "tokenizer.json"))
    text = "It's 12,345 日本語\n\n don't"
    assert theirs.encode(text).ids == BYTE_TOKENIZER.encode(text, prepend="<|bos|>")
    assert theirs.encode(text, add_special_tokens=False).ids == BYTE_TOKENIZER.encode(text)


@functools.cache
def compile_template():
    """As transformers does it, but that \\1 and \\2 stand around what the assistant writes."""
    def fail(reason):
        raise ConversationError(reason)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = fail
    return environment.from_string(read_template("{{- '\\1' -}}", "{{- '\\2' -}}"))


def render(messages, **settings):
    """(tokens, mask) by the template."""
    text, ids, mask = compile_template().render(messages=messages, **settings), [], []
    for i, span in enumerate(text.replace("\2", "\1").split("\1")):
        span_ids = BYTE_TOKENIZER.encoding.encode(span, allowed_special="all")
        ids, mask = ids + span_ids, mask + [i % 2] * len(span_ids)
    return ids, mask


def make_message(rng):
    text = "".join(rng.choice("ab 12.\n'é日") for _ in range(rng.randint(1, 9)))
    parts = [{"type": rng.choice(("text", "python", "python_output")), "text": text} for _ in range(rng.randint(0, 3))]
    call = rng.choice(({"name": "python", "arguments": {"expression": "1 + 2"}},
                       {"name": "get", "arguments": {"a": 1, "é": ["<b>"]}}, {"name": "get", "arguments": '{"a": 2}'}))
    return rng.choice((
        {"role": rng.choice(("user", "system", "developer")), "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": "more"}]},
        {"role": "system", "content": rng.choice(("", None))},
        {"role": "assistant", "content": text} | rng.choice(({}, {"weight": 0}, {"weight": 1})),
        {"role": "assistant", "content": parts} | rng.choice(({}, {}, {"tool_calls": [{"function": call}]})),
        {"role": "assistant", "content": rng.choice((None, "", text)), "refusal": "No."},
        {"role": "assistant", "content": rng.choice((None, "", text)), "tool_calls": [{"function": call}]},
        {"role": "tool", "content": rng.choice((text, [{"type": "text", "text": text}]))}))


def test_template_renders_as_the_tokenizer_does():
    """Bytes as tokens, since texts of the assistant that follow each other are encoded one by one in training."""
    rng = random.Random(0)
    for _ in range(400):
        messages = [make_message(rng) for _ in range(rng.randint(1, 6))]
        assert render(messages) == BYTE_TOKENIZER.render_conversation({"messages": messages}, None), messages
        assert render(messages, add_generation_prompt=True)[0] == \
            BYTE_TOKENIZER.render_for_completion({"messages": messages}), messages


def test_template_folds_the_system_message():
    ids, mask = render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                        {"role": "assistant", "content": "Hello"}])
    text = BYTE_TOKENIZER.decode(ids)
    assert text == "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>Hello<|assistant_end|>"
    assert mask == [0] * (len(ids) - 6) + [1] * 6


@pytest.mark.parametrize("message", [
    {"role": "critic", "content": "no"}, {"role": "user", "content": ""}, {"role": "user"},
    {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
    {"role": "assistant", "content": [{"type": "audio", "text": "x"}]},
    {"role": "assistant", "content": [{"type": "text", "text": None}]},
    {"role": "tool", "content": [{"type": "image_url", "image_url": "x"}]}])
def test_template_refuses_what_the_tokenizer_refuses(message):
    for call in (lambda: BYTE_TOKENIZER.render_conversation({"messages": [message]}), lambda: render([message])):
        with pytest.raises(ConversationError):
            call()


def test_template_says_what_only_the_tokenizer_reads():
    for message in ({"role": "assistant", "content": "3", "parts": [{"type": "python", "text": "1+2"}]},
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                    {"role": "assistant", "content": None,
                     "tool_calls": [{"function": {"name": "python", "arguments": '{"x": "1+2"}'}}]}):
        with pytest.raises(ConversationError):
            render([message])
    with pytest.raises(ConversationError, match="at least one message"):
        render([])


# ---------------------------------------------------------------------------------------------------------------------
# The folder, the script


def test_folder_is_whole_or_not_there(source, byte_base, monkeypatch):
    out = byte_base / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(UserError, match="exists and is no export of nanochat's; name another folder, or .* --force"):
        export_model(source, out, "custom", "bfloat16")
    assert (out / "mine.txt").exists()
    run_dir = Path(source.meta["run_dir"])
    run_dir.mkdir(parents=True)
    for kept in (run_dir, byte_base, Path("/")):
        with pytest.raises(UserError, match=f"^{kept} can't be replaced by an export, for .* is in use; name another"):
            export_model(source, kept, "custom", "bfloat16", force=True)
    (byte_base / ".out.new").mkdir()    # an earlier one was killed
    export_model(source, out, "custom", "bfloat16", force=True)
    assert not (out / "mine.txt").exists()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nanochat.export.write_card", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        export_model(source, out, "custom", "float32")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    out.rename(byte_base / ".out.old")    # one was killed in the instant in which nothing is at `out`; the next fails
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("nanochat.export.write_card", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        export_model(source, out, "custom", "float32")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    export_model(source, out, "custom", "float32")    # an earlier export is replaced
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert [path.name for path in byte_base.iterdir() if path.name.startswith(".")] == []
    with monkeypatch.context() as patch, pytest.raises(UserError, match="out can't be written .*No space left"):
        patch.setattr("nanochat.export.write_card", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
        export_model(source, out, "custom", "bfloat16")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    with pytest.raises(UserError, match=r"can't be written \(.*Not a directory: .*mine.txt.*; name another --out"):
        (byte_base / "mine.txt").write_text("", encoding="utf-8")
        export_model(source, byte_base / "mine.txt" / "a" / "out", "custom", "float32")
    with pytest.raises(UserError, match=r"can't be written \(.*File exists: .*mine.txt.*; name another --out"):
        export_model(source, byte_base / "mine.txt" / "out", "custom", "float32")


def test_gguf_needs_its_package(byte_base, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)    # as if it weren't installed
    with pytest.raises(UserError, match="isn't installed: pip install gguf"):
        export_model(make_gguf_source("qwen2", byte_base), byte_base / "out", "gguf", "float32")
    assert not (byte_base / "out").exists()


def test_script(byte_base, capsys):
    run_dir = save_run("d2")
    info = {"params": {"total": 12_345}, "results": {"val_bpb": 1.25, "tokens": 64}}
    (run_dir / "run.json").write_text(json.dumps(info), encoding="utf-8")
    (byte_base / "report").mkdir()
    section = {"run": "runs/base/d2", "metrics": {"core": 0.125}}
    (byte_base / "report" / "base_eval.json").write_text(json.dumps(section), encoding="utf-8")
    out = byte_base / "deep" / "out"
    result = script.main(["--source", "base", "--model-tag", "d2", "--out", str(out)])
    assert result == {"format": "custom", "out": str(out), "checks": {}}
    printed = capsys.readouterr().out
    assert "base d2, step 1, as custom (Qwen3 has no place for value embeddings" in printed
    assert f"written to {out}" in printed
    card = (out / "README.md").read_text(encoding="utf-8")
    for row in ("| parameters | 12,345 |", "| validation bits per byte | 1.2500 |", "| base_eval: core | 0.1250 |"):
        assert row in card
    assert "Its licence is its maker's to choose" in card and 'from_pretrained(".", trust_remote_code=True)' in card
    assert 'tokenizer("The sky is"' in card and not (out / "chat_template.jinja").exists()    # no chat model
    info["results"]["step"] = 2    # of which the exported step knows nothing
    (run_dir / "run.json").write_text(json.dumps(info), encoding="utf-8")
    script.main(["--source", "base", "--model-tag", "d2", "--out", str(out)])
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| parameters | 12,345 |" in card and "bits per byte" not in card and "core" not in card
    for words in (["--format", "pickle"], ["--dtype", "int8"]):    # refused before a model is loaded
        with pytest.raises(SystemExit, match="2"):
            script.main(["--source", "base", "--model-tag", "d2", "--out", str(out), *words])
        assert f"invalid choice: '{words[1]}'" in capsys.readouterr().err
    with pytest.raises(UserError, match="there is no base run 'd9'"):
        script.main(["--source", "base", "--model-tag", "d9", "--out", str(out)])


def test_check_says_which_engine_is_missing(source, byte_base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setenv("PATH", str(byte_base))
    assert script.check(source, byte_base, "custom") == script.check(source, byte_base, "gguf") == {}
    printed = capsys.readouterr().out
    assert "not checked in transformers, which isn't installed" in printed and "no llama-server on the PATH" in printed


# ---------------------------------------------------------------------------------------------------------------------
# In the engines themselves


@pytest.mark.engines
@pytest.mark.parametrize("name", ["nanochat-july26", *PLAIN_CONFIGS])
def test_transformers(byte_base, name):
    pytest.importorskip("transformers", reason="transformers isn't installed")
    source = make_source(CONFIGS[name], run_dir=str(byte_base / "runs" / "sft" / "toy"))
    form, _ = choose_format("auto", source)
    export_model(source, byte_base / "out", form, "float32")
    checked = script.check(source, byte_base / "out", form)["transformers"]
    assert checked["max_difference"] < 2e-5 and checked["greedy_equal"]


@pytest.mark.engines
def test_tokenizer_and_template_in_transformers(source, byte_base):
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    export_model(source, byte_base / "out", "custom", "bfloat16")
    theirs = transformers.AutoTokenizer.from_pretrained(byte_base / "out", trust_remote_code=True)
    rng = random.Random(1)
    for _ in range(200):
        messages = [make_message(rng) for _ in range(rng.randint(1, 6))]
        rendered = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (rendered["input_ids"], rendered["assistant_masks"]) == \
            BYTE_TOKENIZER.render_conversation({"messages": messages}, None), messages
    assert theirs("a")["input_ids"] == BYTE_TOKENIZER.encode("a", prepend="<|bos|>")


@pytest.mark.engines
@pytest.mark.parametrize("pattern", ["llama3", "qwen2", "qwen35"])
def test_llama_cpp(byte_base, pattern):
    pytest.importorskip("gguf", reason="gguf isn't installed")
    if shutil.which("llama-server") is None:
        pytest.skip("no llama-server on the PATH")
    source = make_gguf_source(pattern, byte_base)
    for dtype, tolerance in zip(DTYPES, (0.5, 0.05, 2e-5), strict=True):
        export_model(source, byte_base / "out", "gguf", dtype)
        checked = script.check(source, byte_base / "out", "gguf")["llama.cpp"]
        assert checked["max_difference"] < tolerance and (dtype != "float32" or checked["greedy_equal"])


@pytest.mark.engines
def test_gguf_file_as_its_package_reads_it(byte_base):
    gguf = pytest.importorskip("gguf", reason="gguf isn't installed")
    source = make_gguf_source("qwen2", byte_base)
    export_model(source, byte_base / "out", "gguf", "float32")
    reader = gguf.GGUFReader(Path(byte_base, "out", GGUF_NAME))
    folded = {rename(name, GGUF_NAMES): tensor for name, tensor in fold_qwen3(source.model).items()}
    assert {tensor.name for tensor in reader.tensors} == folded.keys()
    for tensor in reader.tensors:
        assert torch.equal(torch.tensor(tensor.data.copy()), folded[tensor.name])
    assert reader.get_field("tokenizer.ggml.pre").contents() == "qwen2"
    assert reader.get_field("tokenizer.ggml.tokens").contents()[-len(SPECIAL_TOKENS):] == list(SPECIAL_TOKENS)
