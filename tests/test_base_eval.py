"""The script of CORE: resume, settings, the bundle; Hugging Face models, a stand-in where transformers isn't there."""

import json
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError
from nanochat.loss_eval import evaluate_core, load_tasks, score_task
from scripts import base_eval
from scripts.base_eval import HFModel, HFTokenizer, load_hf_model, make_slug
from tests.eval_helpers import CORE_CONFIG, TASKS, make_tokenizer, write_bundle
from tests.helpers import make_model

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A base folder with a tokenizer, a model and a bundle; returns a call of the script that counts its tasks."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = make_tokenizer()
    tokenizer.save(tmp_path / "tokenizer" / "default")
    write_bundle(tmp_path / "eval_bundle")
    model = make_model(CORE_CONFIG, torch.float64)
    meta = {"model_config": vars(CORE_CONFIG), "tokenizer": {"name": "default", "hash": tokenizer.hash}}
    save_checkpoint(tmp_path / "runs" / "base" / "d3", 20, model, model.setup_optimizer(), meta)
    evaluated = []

    def count(model, tokenizer, task, max_per_task):
        if task.label == run.fail_at:
            raise KeyboardInterrupt
        evaluated.append(task.label)
        return score_task(model, tokenizer, task, max_per_task)

    def run(*flags: str) -> tuple[dict, list[str]]:
        evaluated.clear()
        return base_eval.main(["--device-type", "cpu", "--dtype", "float64", *flags]), evaluated.copy()
    run.fail_at, run.path = None, tmp_path / "runs" / "base" / "d3" / "core_000020.json"
    monkeypatch.setattr(base_eval, "score_task", count)
    return run


def test_base_eval_goes_on_where_it_was_stopped(run, tmp_path, capsys):
    run.fail_at = "count"
    with pytest.raises(KeyboardInterrupt):
        run("--max-per-task", "5")
    assert list(json.loads(run.path.read_text())["tasks"]) == ["odd", "dogs"]
    run.fail_at = None
    result, evaluated = run("--max-per-task", "5")
    expected = evaluate_core(make_model(CORE_CONFIG, torch.float64), make_tokenizer(), max_per_task=5,
                             bundle_dir=tmp_path / "eval_bundle")
    assert evaluated == ["count"] and {key: result[key] for key in expected} == expected
    assert json.loads(run.path.read_text())["core_metric"] == expected["core_metric"]
    assert run("--max-per-task", "5", "-g", "d3", "-s", "20") == (result, [])
    assert run("--max-per-task", "5", "--fresh") == (result, ["odd", "dogs", "count"])
    assert "not the published metric" in capsys.readouterr().out
    section = json.loads((tmp_path / "report" / "base_eval.json").read_text())
    assert section["metrics"] == {"CORE": expected["core_metric"]} and section["run"] == "runs/base/d3"
    assert [row[0] for row in section["tables"][0]["rows"]] == ["odd", "dogs", "count"]


def test_base_eval_does_not_mix_results_of_other_settings(run, tmp_path, capsys):
    few, _ = run("--max-per-task", "2")
    _, evaluated = run("--max-per-task", "3")
    assert evaluated == ["odd", "dogs", "count"]
    assert "earlier results with another max_per_task were kept as core_000020~1.json" in capsys.readouterr().out
    assert json.loads(run.path.with_name("core_000020~1.json").read_text())["core_metric"] == few["core_metric"]
    rows = TASKS["count"][4][:-1]  # the same names, other data
    other = write_bundle(tmp_path / "other", TASKS | {"count": (*TASKS["count"][:4], rows)})
    assert run("--max-per-task", "3", "--bundle", str(other))[1] == ["odd", "dogs", "count"]
    run.path.write_text("{")
    assert run("--max-per-task", "3")[1] == ["odd", "dogs", "count"] and "damaged" in capsys.readouterr().out


def test_base_eval_does_not_take_other_weights_results(run, tmp_path):
    """Of a run that was trained again under its tag to the same step."""
    run("--max-per-task", "3")
    model, meta = make_model(CORE_CONFIG, torch.float64, seed=1), json.loads(
        (tmp_path / "runs" / "base" / "d3" / "step_000020" / "meta.json").read_text())
    save_checkpoint(tmp_path / "runs" / "base" / "d3", 20, model, model.setup_optimizer(),
                    {key: meta[key] for key in ("model_config", "tokenizer")})
    assert run("--max-per-task", "3")[1] == ["odd", "dogs", "count"]


def test_all_items_by_a_word(run):
    everything, evaluated = run()
    assert len(evaluated) == 3 and json.loads(run.path.read_text())["core_metric"] == everything["core_metric"]
    assert run("--max-per-task", "all") == run("--max-per-task", "-1") == (everything, [])


def test_base_eval_says_what_is_missing(run, tmp_path):
    with pytest.raises(UserError, match="max-per-task 0 must be"):
        run("--max-per-task", "0")
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        run("-s", "7")
    with pytest.raises(UserError, match="base_eval --fetch, or unpack https://"):
        run("--bundle", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("words", [["--hf-path", "x", "-g", "d4"], ["--fetch", "--fresh"]])
def test_flags_that_would_be_dropped(words):
    with pytest.raises(UserError, match="means nothing beside --(hf-path|fetch); leave one of them out"):
        base_eval.main(words)


def test_base_eval_fetches_the_bundle(tmp_path, monkeypatch):
    """From a folder that stands in for the network: whole or not at all, and only where there is none."""
    base_dir, mirror_dir = tmp_path / "base", tmp_path / "mirror"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setenv("NANOCHAT_MIRROR_DIR", str(mirror_dir))
    with pytest.raises(UserError, match="can't be had: .*eval_bundle.zip isn't there; connect to the network, or put"):
        base_eval.main(["--fetch"])
    bundle_dir = write_bundle(tmp_path / "source" / "eval_bundle")
    archive = Path(shutil.make_archive(mirror_dir / "eval_bundle", "zip", bundle_dir.parent))
    whole = archive.read_bytes()
    with zipfile.ZipFile(archive) as file:
        data_start = file.getinfo("eval_bundle/core.yaml").header_offset + 40
    for damaged in (whole[:-9], whole[:data_start] + b"#" * 9 + whole[data_start + 9:]):
        archive.write_bytes(damaged)
        with pytest.raises(UserError, match="eval_bundle.zip is corrupt"):
            base_eval.main(["--fetch"])
        assert not (base_dir / "eval_bundle").exists() and not (base_dir / "eval_bundle.zip").exists()
    archive.write_bytes(whole)
    assert base_eval.main(["--fetch"]) == {"bundle_dir": str(base_dir / "eval_bundle")}
    assert load_tasks() == load_tasks(bundle_dir)
    archive.unlink()
    base_eval.main(["--fetch"])


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face models


class ByteTokenizer:
    """A token per byte, as a callable that returns what transformers' tokenizers return."""
    bos_token_id, eos_token_id = 256, 257

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict:
        assert not add_special_tokens
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture
def stand_in(monkeypatch):
    """A package named transformers whose models are ours; returns the folder names that it was asked for."""
    asked = []

    def load_model(path: str, use_safetensors: bool):
        asked.append(path)
        assert use_safetensors  # never a pickle
        if "nowhere" in path:
            raise OSError(f"{path} is not a local folder.\nMore advice.")
        ours = make_model(CORE_CONFIG, torch.float64)
        model = torch.nn.Module()
        model.ours, model.device = ours, CPU
        model.config = types.SimpleNamespace(n_positions=CORE_CONFIG.sequence_len, _commit_hash="abc")
        model.forward = lambda input_ids, use_cache: types.SimpleNamespace(logits=ours(input_ids))
        return model
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(
        AutoModelForCausalLM=types.SimpleNamespace(from_pretrained=load_model),
        AutoTokenizer=types.SimpleNamespace(from_pretrained=lambda path: ByteTokenizer())))
    return asked


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("RANK", raising=False)
    write_bundle(tmp_path / "eval_bundle")
    return tmp_path


def run_hf(*flags: str) -> dict:
    return base_eval.main(["--device-type", "cpu", "--dtype", "float64", *flags])


def test_same_answers_as_our_own_model(stand_in, base_dir):
    """The model behind the stand-in is ours, so whole rows of it must score as our prefixes and tails do."""
    class OurTokenizer:
        def get_bos_token_id(self) -> int:
            return 256

        def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
            return [[prepend, *text.encode()] for text in texts]
    expected = evaluate_core(make_model(CORE_CONFIG, torch.float64), OurTokenizer(), max_per_task=6)
    result = run_hf("--hf-path", "someone/some.model", "--max-per-task", "6")
    assert {key: result[key] for key in expected} == expected
    section = json.loads((base_dir / "report" / "base_eval_hf_someone_some-model.json").read_text())
    assert "stage" not in section and "metrics" not in section and "someone/some.model" in section["title"]


def test_goes_on_where_it_was_stopped(stand_in, base_dir, monkeypatch):
    real, done = base_eval.score_task, []

    def stop_at_third(model, tokenizer, task, max_per_task):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task.label)
        return real(model, tokenizer, task, max_per_task)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(base_eval, "score_task", stop_at_third)
        run_hf("--hf-path", "a/b", "--max-per-task", "3")
    saved = json.loads((base_dir / "core_hf" / "a_b.json").read_text())
    assert list(saved["tasks"]) == ["odd", "dogs"] and saved["settings"]["model"] == "abc"
    monkeypatch.setattr(base_eval, "score_task", lambda model, tokenizer, task, max_per_task: (
        done.append(task.label) or real(model, tokenizer, task, max_per_task)))
    assert run_hf("--hf-path", "a/b", "--max-per-task", "3")["num_tasks"] == 3 and done == ["odd", "dogs", "count"]


def test_mistakes(stand_in, base_dir, monkeypatch):
    with pytest.raises(UserError, match=r"--hf-path nowhere can't be loaded \(nowhere is not a local folder\); give"):
        run_hf("--hf-path", "nowhere")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it weren't installed
    with pytest.raises(UserError, match="pip install transformers"):
        run_hf("--hf-path", "a/b")


def test_what_a_model_and_a_tokenizer_may_lack():
    no_tokens = types.SimpleNamespace(bos_token_id=None, eos_token_id=None)
    with pytest.raises(UserError, match="no token that begins or ends"):
        HFTokenizer(no_tokens).get_bos_token_id()
    assert HFTokenizer(types.SimpleNamespace(bos_token_id=None, eos_token_id=7)).get_bos_token_id() == 7
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(max_position_embeddings=None, n_ctx=77)
    assert HFModel(model).config.sequence_len == 77


def test_slug():
    assert [make_slug(path) for path in ("openai-community/gpt2", "/a/b/My Model.v2/", "gpt2")] == [
        "openai-community_gpt2", "b_my-model-v2", "gpt2"]


def test_real_package_on_a_tiny_random_model(base_dir):
    transformers = pytest.importorskip("transformers")
    folder = base_dir / "tiny"
    write_tiny_gpt2(transformers, folder)
    model, tokenizer, weights = load_hf_model(str(folder), CPU, torch.float32)
    assert model.config.sequence_len == 128 and len(weights) == 64 and not model.training
    [ids] = tokenizer.encode(["a dog"], prepend=tokenizer.get_bos_token_id())
    assert ids == [256, *(tokenizer.tokenizer.convert_tokens_to_ids(c) for c in ("a", "Ġ", "d", "o", "g"))]
    first, second = (run_hf("--hf-path", str(folder), "--max-per-task", "4", "--dtype", "float32") for _ in range(2))
    assert first == second and first["num_tasks"] == 3


def write_tiny_gpt2(transformers, folder: Path) -> None:
    """A GPT-2 of two small random layers, with a byte-level tokenizer without merges."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=257, n_positions=128, n_embd=32, n_layer=2, n_head=2,
                                     bos_token_id=256, eos_token_id=256)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    from nanochat.tokenizer import BYTE_ALPHABET
    vocab = {character: byte for byte, character in enumerate(BYTE_ALPHABET)} | {"<|endoftext|>": 256}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
