"""Imports: an export comes back bit for bit, or with its logits, and is a checkpoint that training goes on from."""

import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError
from nanochat.config import GPTConfig
from nanochat.export import MARK_NAME, NAMES, TEMPLATE_NAME, export_model, name_tensors, rename
from nanochat.import_hf import list_train_flags, read_folder
from nanochat.presets import PRESETS, parse_knobs
from nanochat.tokenizer import build_tokenizer_json
from scripts import base_loss, base_train, chat_cli, chat_eval, chat_sft, export, import_hf
from tests.export_helpers import CONFIGS, PLAIN, PLAIN_CONFIGS, make_source
from tests.helpers import BYTE_TOKENIZER, CONFIG, CPU, make_base, make_batch, make_model, make_prompt

# Of late 2025: rotary, norms and softcap as ours, and nothing of what came later
OLD = replace(CONFIG, **PRESETS["nanochat-jan26"].knobs | {
    "ve_gate_channels": 0, "resid_init": None, "x0_init": None}, window_pattern="L")
OLD_SETTINGS = {"model_type": "nanochat", "vocab_size": 265, "hidden_size": 64, "intermediate_size": 256,
                "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 64}


def write_2025(folder, model, settings=OLD_SETTINGS, rename=lambda name: name):
    """A published folder, its tokenizer as other tools convert it."""
    tensors = {name: tensor[:265] if "wte" in name or "lm_head" in name else tensor
               for name, tensor in model.state_dict().items()}
    folder.mkdir()
    safetensors.torch.save_file({rename(name): tensor.contiguous() for name, tensor in tensors.items()},
                                folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    content = build_tokenizer_json(BYTE_TOKENIZER.pattern, BYTE_TOKENIZER.ranks, BYTE_TOKENIZER.special_tokens)
    content["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    content["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    content["model"]["vocab"] |= BYTE_TOKENIZER.special_tokens
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def export_toy(base_dir, config, form, dtype="float32"):
    source = make_source(config, run_dir=str(base_dir / "runs" / "sft" / "toy"))
    export_model(source, base_dir / "out", form, dtype, force=True)
    return source, base_dir / "out"


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def test_older_exports_have_no_key_offset(byte_base):
    """Which their config.json doesn't name; some name a table of pairs of tokens, which they don't have."""
    source, folder = export_toy(byte_base, replace(CONFIG, key_offset=0.0), "custom")
    for name in ("config.json", MARK_NAME):
        text = (folder / name).read_text(encoding="utf-8")
        text = re.sub(r'"key_offset(": 0\.0|_pairs": \[[^]]*\])', '"bigram_rows": 0', text)
        (folder / name).write_text(text, encoding="utf-8")
        assert "bigram" in text and "key_offset" not in text
    ids = torch.tensor([make_prompt(30)])
    assert torch.equal(read_folder(folder).model(ids), source.model(ids))


@pytest.mark.parametrize("has_mark", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_custom_comes_back_bit_for_bit(byte_base, name, has_mark):
    """Without the mark, too: transformers' save_pretrained leaves only config.json, which has no initial values."""
    source, folder = export_toy(byte_base, CONFIGS[name], "custom")
    if not has_mark:
        (folder / MARK_NAME).unlink()
    model = read_folder(folder).model
    expected = source.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, tensor in model.state_dict().items():
        rows = CONFIG.vocab_size if "wte" in key or "value_embeds" in key or "lm_head" in key else len(tensor)
        assert torch.equal(tensor[:rows], expected[key][:rows]) and not tensor[rows:].any(), key
    ids = torch.tensor([make_prompt(CONFIGS[name].sequence_len)])
    assert torch.equal(model(ids), source.model(ids))
    if has_mark:
        assert model.config == source.model.config


def test_bf16_comes_back_as_it_was_rounded(byte_base):
    source, folder = export_toy(byte_base, CONFIG, "custom", "bfloat16")
    found = read_folder(folder)
    assert torch.equal(found.model.resid_lambdas, source.model.resid_lambdas)
    for name, tensor in name_tensors(source.model).items():
        assert torch.equal(name_tensors(found.model)[name], tensor.bfloat16().float())
    assert found.accuracy == ("the weights are those of the export, in bfloat16, which rounded them; the learned "
                              "numbers are exact")


@pytest.mark.parametrize("has_mark", [True, False])
@pytest.mark.parametrize("name", PLAIN_CONFIGS)
@torch.inference_mode()
def test_qwen3_has_the_logits(byte_base, name, has_mark):
    source, folder = export_toy(byte_base, PLAIN_CONFIGS[name], "qwen3")
    if not has_mark:
        (folder / MARK_NAME).unlink()
    model, ids = read_folder(folder).model, torch.tensor([make_prompt(60)])
    logits = source.model(ids)
    assert (model(ids) - logits).abs().max() < 1e-5 < logits.std() / 1e4
    assert model.config.mlp_act == source.model.config.mlp_act
    if has_mark:
        assert model.config == source.model.config
    for dtype, tolerance in (("bfloat16", 0.2), ("float16", 0.02)):    # told apart by their rounded gates, too
        source, folder = export_toy(byte_base, PLAIN_CONFIGS[name], "qwen3", dtype)
        assert (read_folder(folder).model(ids) - logits).abs().max() < tolerance


@torch.inference_mode()
def test_published_model_of_2025(byte_base):
    model, ids = make_model(OLD), torch.tensor([make_prompt(60)])

    def rename_all(name):
        return rename(name, NAMES).replace("up_proj", "fc1").replace("down_proj", "fc2")
    for number, found in enumerate((read_folder(write_2025(byte_base / "mlx", model)), read_folder(write_2025(
            byte_base / "hf", model, OLD_SETTINGS | {"hidden_act": "relu2", "final_logit_softcapping": 15.0,
                                                     "rope_parameters": {"rope_theta": 10_000.0}}, rename_all)))):
        assert torch.equal(found.model(ids), model(ids)), number
        assert found.stage == "base" and found.tokenizer.hash == BYTE_TOKENIZER.hash
        assert found.identity["rule"] == "jan26" and found.identity["plan"]["batch_tokens"] == 2**19
    assert read_folder(byte_base / "mlx", "mid").stage == "mid"
    (byte_base / "mlx" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert read_folder(byte_base / "mlx").stage == "sft"


@pytest.mark.parametrize(("setting", "message"), [
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}, "of type linear"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "of type yarn"), ({"rope_scaling": "x"}, "isn't one of this"),
    ({"use_sliding_window": True, "sliding_window": 32}, "it uses a sliding window")])
def test_other_attention_over_the_same_tensors_is_refused(byte_base, setting, message):
    folders = [write_2025(byte_base / "published", make_model(OLD)), export_toy(byte_base, PLAIN, "qwen3")[1]]
    for folder in folders:
        path = folder / "config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"rope_scaling": None, "use_sliding_window": False}))
        read_folder(folder)
        path.write_text(json.dumps(settings | setting))
        with pytest.raises(UserError, match=message):
            read_folder(folder)


@pytest.mark.engines
@torch.inference_mode()
def test_nanochat_of_transformers(byte_base):
    """Its norms' eps is another, 1e-6."""
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    torch.manual_seed(0)
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**OLD_SETTINGS)).eval()
    for param in theirs.parameters():
        param.normal_(std=0.15)
    theirs.save_pretrained(byte_base / "theirs")
    write_2025(byte_base / "ours", make_model(OLD))
    (byte_base / "theirs" / "tokenizer.json").write_text((byte_base / "ours" / "tokenizer.json").read_text())
    model, ids = read_folder(byte_base / "theirs").model, torch.tensor([make_prompt(60)])
    logits = theirs(ids).logits
    assert (model(ids) - logits).abs().max() < 2e-4 < logits.std() / 1e3


@pytest.mark.engines
def test_what_transformers_saves_again(byte_base):
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    for config, form in ((CONFIGS["short windows"], "custom"), (PLAIN, "qwen3")):
        source, folder = export_toy(byte_base, config, form)
        for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
            auto.from_pretrained(folder, trust_remote_code=True).save_pretrained(byte_base / form)
        ids = torch.tensor([make_prompt(60)])
        assert (read_folder(byte_base / form).model(ids) - source.model(ids)).abs().max() < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint to go on from


def test_training_goes_on(tmp_path_factory, monkeypatch, capsys):
    """Export a base run and take it in elsewhere: the stages begin with it, with the batch and rates of the run."""
    base_dir = tmp_path_factory.mktemp("base")
    make_base(base_dir, monkeypatch)
    argv = ["--data", "toy", "--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64",
            "--num-iterations", "4", "--total-batch-size", "512", "--eval-every", "never", "--sample-every", "never",
            "--device-type", "cpu", "--dtype", "float32", "--compile", "off"]
    base_train.main([*argv, "--model-tag", "first", "--matrix-lr", "0.01"])
    export.main(["--source", "base", "--model-tag", "first", "--out", str(base_dir / "out"), "--dtype", "float32"])
    result = import_hf.main([str(base_dir / "out"), "--model-tag", "again"])
    assert result["tokenizer"] == "default" and result["stage"] == "base"
    printed = capsys.readouterr().out
    assert "the weights are those of the export, in float32; the learned numbers are exact" in printed
    first, _, meta = load_model("base", CPU, tag="first")
    again, tokenizer, other = load_model("base", CPU, tag="again")
    assert torch.equal(again(make_batch(0).inputs), first(make_batch(0).inputs)) and other["step"] == 0
    assert other["identity"] == meta["identity"] and other["imported"]["run"] == "first"

    # The same command goes on without a word of a mismatch, and learns from the first step on
    losses = base_train.main([*argv, "--model-tag", "again", "--matrix-lr", "0.01"])
    assert losses["step"] == 4 and "continued at step" not in capsys.readouterr().out
    assert not torch.equal(load_model("base", CPU, tag="again")[0].lm_head.weight, again.lm_head.weight)
    sft = ["-i", "base", "--tasks", "Arithmetic:64", "--words", "toy", "--num-iterations", "2", "--eval-every", "never",
           "--sample-every", "never", "--device-type", "cpu", "--compile", "off"]
    import_hf.main([str(base_dir / "out"), "--model-tag", "third"])
    rows = [{"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Hello"}]}
            for i in range(4)]
    (base_dir / "letters of Anna.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft += ["--custom-json", str(base_dir / "letters of Anna.jsonl")]
    chat_sft.main([*sft, "-g", "third", "--dtype", "float32"])
    _, _, meta = load_model("sft", CPU, tag="third")
    assert meta["identity"]["plan"]["batch_tokens"] == 512 and meta["identity"]["matrix_lr"] == 0.01
    assert meta["identity"]["source"]["step"] == 0 and "letters of Anna.jsonl" in meta["identity"]["tasks"]

    export.main(["--source", "sft", "--model-tag", "third", "--out", str(base_dir / "chat"), "--dtype", "float32"])
    for path in (base_dir / "chat").iterdir():    # an export is published: it tells no names of a person's files
        assert not re.search(rb"Anna|" + re.escape(bytes(base_dir)), path.read_bytes()), path
    import_hf.main([str(base_dir / "chat")])
    identity = load_model("sft", CPU, tag="chat")[2]["identity"]
    assert {name: identity[name] for name in ("plan", "matrix_lr", "rule")} == {
        name: meta["identity"][name] for name in ("plan", "matrix_lr", "rule")}
    import_hf.main([str(base_dir / "out"), "--model-tag", "chat"])
    with pytest.raises(UserError, match="can't continue with other settings .source.stage: saved None, now base"):
        chat_sft.main([*sft, "-g", "chat", "--dtype", "float32"])    # an import has no place in its conversations
    chat = ["-i", "sft", "-g", "chat", "--device-type", "cpu"]
    assert chat_cli.main([*chat, "-p", "1 + 2?", "--max-tokens", "4"])["num_tokens"] > 0
    result = chat_eval.main([*chat, "-a", "Arithmetic", "-x", "2", "-m", "8", "--words", "toy"])
    assert result["tasks"]["Arithmetic"]["num_problems"] == 2
    with pytest.raises(UserError, match="was imported, so nobody knows its data; name data to .* --data"):
        base_loss.main(["-g", "third", "--device-type", "cpu"])
    losses = base_loss.main(["-i", "base", "-g", "third", "--data", "toy", "--eval-tokens", "512", "--device-type",
                             "cpu", "--dtype", "float32"])
    assert 0 < losses["val_bpb"] < 9


def test_flags_that_train_it_on(byte_base, monkeypatch):
    """The printed command makes the model that was read, whatever its knobs."""
    for config in (replace(OLD, n_kv_head=4), replace(PLAIN, n_kv_head=4, resid_init=(1.1, 1.1)), GPTConfig()):
        args, _ = base_train.parse_args(list_train_flags(config))
        monkeypatch.setattr(base_train, "get_tokenizer", lambda name: BYTE_TOKENIZER)
        monkeypatch.setattr(base_train, "load_shards", lambda *args, **settings: pytest.fail("not needed"))
        made = base_train.make_config(args.depth, vocab_size=config.vocab_size, sequence_len=args.max_seq_len,
                                      aspect_ratio=args.aspect_ratio, head_dim=args.head_dim,
                                      window_pattern=args.window_pattern, **parse_knobs(args.knobs))
        assert made == config
    assert list_train_flags(OLD) == []    # no flag sets groups of heads


def test_tokenizer_is_kept_once(byte_base):
    source, folder = export_toy(byte_base, CONFIG, "custom")
    BYTE_TOKENIZER.save(byte_base / "tokenizer" / "mine")
    (byte_base / "tokenizer" / "default" / "tokenizer.json").unlink()
    assert import_hf.main([str(folder), "-g", "a"])["tokenizer"] == "mine"
    (byte_base / "tokenizer" / "mine" / "tokenizer.json").write_text("{}")
    assert import_hf.main([str(folder), "-g", "b"])["tokenizer"] == "b"
    assert load_model("sft", CPU, tag="b")[1].hash == BYTE_TOKENIZER.hash


# ---------------------------------------------------------------------------------------------------------------------
# What isn't taken


def test_names_that_are_taken(byte_base):
    _, folder = export_toy(byte_base, CONFIG, "custom")
    import_hf.main([str(folder), "-g", "a"])
    with pytest.raises(UserError, match="there is a sft run a already; name another --model-tag"):
        import_hf.main([str(folder), "-g", "a"])
    (byte_base / "tokenizer" / "default" / "tokenizer.json").unlink()
    (byte_base / "tokenizer" / "a" / "tokenizer.json").unlink(missing_ok=True)
    (byte_base / "tokenizer" / "c").mkdir()
    (byte_base / "tokenizer" / "c" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="there is another tokenizer c already"):
        import_hf.main([str(folder), "-g", "c"])
    with pytest.raises(UserError, match="'my model' can't name a tokenizer.*; name another --model-tag"):
        import_hf.main([str(folder), "-g", "my model"])
    assert not (byte_base / "runs" / "sft" / "c").exists()


def test_names_that_are_free(byte_base, capsys):
    """What a killed import left takes no name; a tag needs to be a tokenizer's name only where it becomes one."""
    _, folder = export_toy(byte_base, CONFIG, "custom")
    (byte_base / "runs" / "sft" / "my model" / "step_000000.tmp").mkdir(parents=True)
    assert import_hf.main([str(folder), "-g", "my model"])["tokenizer"] == "default"
    assert "python -m scripts.chat_cli -i sft -g 'my model'" in capsys.readouterr().out
    assert load_model("sft", CPU, tag="my model")[1].hash == BYTE_TOKENIZER.hash
    (byte_base / "tokenizer" / "default" / "tokenizer.json").unlink()
    (byte_base / "tokenizer" / "b").mkdir()
    assert import_hf.main([str(folder), "-g", "b"])["tokenizer"] == "b"


def change(folder, name, **fields):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_refusals(byte_base):
    def refuse(reason, damage):
        _, folder = export_toy(byte_base, CONFIG, "custom")
        damage(folder)
        with pytest.raises(UserError, match=reason):
            read_folder(folder)

    def save_tensors(make):
        def save(folder):
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            safetensors.torch.save_file(make(tensors), folder / "model.safetensors")
        return save
    with pytest.raises(UserError, match="there is no .*nowhere/config.json; name a folder with a model"):
        read_folder(byte_base / "nowhere")
    refuse("a model of type llama; what can be read back is", lambda f: change(f, "config.json", model_type="llama"))
    refuse(r"a model of type \['llama'\];", lambda f: change(f, "config.json", model_type=["llama"]))
    refuse("is an export of format gguf, which isn't read back", lambda f: change(f, MARK_NAME, format="gguf"))
    refuse("config.json can't be read", lambda f: (f / "config.json").write_text("[]"))
    refuse("a nanochat_full that isn't one of this family .sliding_window is missing.",
           lambda f: (f / "config.json").write_text(json.dumps({
               key: value for key, value in json.loads((f / "config.json").read_text()).items()
               if key != "sliding_window"})))
    refuse("has no .safetensors file; pickled weights", lambda f: (f / "model.safetensors").unlink())
    refuse("model.safetensors is damaged", lambda f: (f / "model.safetensors").write_bytes(b"none"))
    refuse("lacks a tensor lm_head.weight", save_tensors(
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}))
    refuse("has a tensor more.weight", save_tensors(lambda tensors: tensors | {"more.weight": torch.ones(1)}))
    refuse(r"lm_head.weight of shape \(265, 2\), where .* has \(265, 64\)", save_tensors(
        lambda tensors: tensors | {"lm_head.weight": torch.ones(265, 2)}))
    refuse("holds a nanochat_full that isn't one of this family .tokenizer is missing",
           lambda f: (f / MARK_NAME).write_text('{"format": "custom"}'))
    refuse("isn't one of this family", lambda f: change(f, MARK_NAME, identity=[1]))
    refuse("its stage is ../../elsewhere", lambda f: change(f, MARK_NAME, stage="../../elsewhere"))
    refuse("isn't one of this family .*codec", lambda f: ((f / TEMPLATE_NAME).unlink(), (
        f / "tokenizer_config.json").write_bytes(b"\xff")))

    def unmark(**fields):
        return lambda f: ((f / MARK_NAME).unlink(), change(f, "config.json", **fields))
    refuse("isn't one of this family", unmark(num_attention_heads=0))
    refuse("a model's mlp_dim can't be -4", unmark(intermediate_size=-4))
    refuse("has a tokenizer of 265 tokens, but its model has 530; put the model's own", unmark(vocab_size=530))
    refuse("isn't the tokenizer that the model was exported with", lambda f: (f / "tokenizer.json").write_text(
        json.dumps(build_tokenizer_json("x", BYTE_TOKENIZER.ranks, BYTE_TOKENIZER.special_tokens))))
    refuse("is no tokenizer of nanochat's .it changes or splits texts otherwise",
           lambda f: change(f, "tokenizer.json", normalizer={"a": 1}))
    refuse("is no tokenizer of nanochat's .it has no <.user_start.>", lambda f: change(
        f, "tokenizer.json", added_tokens=[{"content": "<|bos|>", "id": 256}]))
    refuse("is no tokenizer of nanochat's .model is missing", lambda f: (f / "tokenizer.json").write_text(
        json.dumps({key: value for key, value in json.loads((f / "tokenizer.json").read_text()).items()
                    if key != "model"})))


def test_another_qwen3_is_refused(byte_base):
    """Norms with weights of their own, layers of two kinds: nothing of ours has these."""
    for name, value, reason in (
            ("model.norm.weight", torch.linspace(1, 2, 64), "model.norm.weight isn't constant"),
            ("model.layers.1.mlp.up_proj.weight", torch.ones(256, 64), "its layers differ in kind"),
            ("model.layers.1.mlp.up_proj.weight", torch.ones(3, 64), "The size of tensor"),
            ("model.layers.1.self_attn.q_norm.weight", torch.tensor(1.2), "invalid index of a 0-dim tensor")):
        _, folder = export_toy(byte_base, PLAIN, "qwen3")
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file(tensors | {name: value}, folder / "model.safetensors")
        with pytest.raises(UserError, match=f"a qwen3 that isn't one of this family .{reason}"):
            read_folder(folder)
