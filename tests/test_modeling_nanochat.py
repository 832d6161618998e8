"""The modeling file that exports carry: gpt.py's logits in every model, cached, padded; in transformers itself, too."""

from contextlib import nullcontext

import pytest
import torch

from nanochat.export import export_model, make_config, name_tensors
from tests.export_helpers import CONFIGS, make_source
from tests.fake_transformers import load_modeling
from tests.helpers import CONFIG, make_prompt


@pytest.fixture
def modeling(monkeypatch):
    return load_modeling(monkeypatch)


def build(modeling, source):
    model = modeling.NanochatForCausalLM(modeling.NanochatConfig(**make_config(source, "float32", "custom")))
    model.load_state_dict(name_tensors(source.model))
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_are_those_of_the_model(modeling, name):
    source = make_source(CONFIGS[name])
    theirs, num_tokens = build(modeling, source), CONFIGS[name].sequence_len
    ids = torch.tensor([make_prompt(num_tokens), make_prompt(num_tokens, seed=1)])
    logits = source.model(ids)
    assert (theirs(ids, use_cache=False).logits - logits).abs().max() < 2e-5 < logits.std() / 1e4

    cache, pieces = None, []
    for piece in ids.split([20, 1, 1, 19, num_tokens - 41], dim=1):
        output = theirs(piece, cache=cache)
        cache = output.cache
        pieces.append(output.logits)
    assert (torch.cat(pieces, dim=1) - logits).abs().max() < 2e-5

    padded = torch.cat((torch.full((2, 7), 5), ids[:, :30]), dim=1)
    mask = torch.arange(37) >= torch.tensor([[7], [0]])    # the second row's first tokens are its own
    output = theirs(padded, attention_mask=mask.long())
    assert (output.logits[0, 7:] - logits[0, :30]).abs().max() < 2e-5
    assert (output.logits[1] - source.model(padded)[1]).abs().max() < 2e-5
    more = theirs(ids[:, 30:31], attention_mask=torch.cat((mask, mask[:, -1:]), dim=1).long(), cache=output.cache)
    assert (more.logits[0, 0] - logits[0, 30]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["short windows", "plain"])
@torch.inference_mode()
def test_eager_attention_gives_the_same_logits(modeling, name):
    source = make_source(CONFIGS[name])
    theirs, ids = build(modeling, source), torch.tensor([make_prompt(60), make_prompt(60, seed=1)])
    theirs.config._attn_implementation = "eager"
    first = theirs(ids[:, :59])
    last = theirs(ids[:, 59:], cache=first.cache)
    assert (torch.cat((first.logits, last.logits), dim=1) - source.model(ids)).abs().max() < 2e-5


@torch.inference_mode()
def test_last_logits_alone(modeling):
    theirs, ids = build(modeling, make_source(CONFIG)), torch.tensor([make_prompt(9)])
    assert torch.allclose(theirs(ids, logits_to_keep=1).logits, theirs(ids).logits[:, -1:], atol=1e-5)


@torch.inference_mode()
def test_embeddings_in_place_of_tokens_where_they_tell_all(modeling):
    theirs, ids = build(modeling, make_source(CONFIGS["plain"])), torch.tensor([make_prompt(9)])
    embeds = theirs.model.embed_tokens(ids)
    assert torch.equal(theirs(inputs_embeds=embeds).logits, theirs(ids).logits)


def test_what_the_smear_needs_is_asked_for(modeling):
    theirs, ids = build(modeling, make_source(CONFIG)), torch.tensor([make_prompt(9)])
    with pytest.raises(ValueError, match="needs input_ids: embeddings alone"):
        theirs(inputs_embeds=torch.zeros(1, 9, 64))
    cache = theirs(ids).cache
    del cache.layers[CONFIG.n_layer:]
    with pytest.raises(ValueError, match="lacks the ids of its tokens"):
        theirs(ids, cache=cache)
    cache = theirs(ids).cache
    cache.is_compileable = True    # as transformers' static caches are
    with pytest.raises(ValueError, match="need a cache that grows"):
        theirs(ids[:, :1], cache=cache)
    theirs.config._attn_implementation = "vllm"
    with pytest.raises(NotImplementedError, match="vLLM gives a model no previous token"):
        theirs(ids)


@pytest.mark.engines
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_model_in_transformers(tmp_path, monkeypatch, name):
    """Greedy text, a padded batch, beams with and without the cache, speculation: all of `generate`'s own."""
    transformers = pytest.importorskip("transformers", reason="transformers isn't installed")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    source = make_source(CONFIGS[name], run_dir=str(tmp_path / "runs" / "sft" / "toy"))
    export_model(source, tmp_path / "out", "custom", "float32")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs.eval()
    ids, length = torch.tensor([make_prompt(60)]), 20
    assert (theirs(ids).logits - source.model(ids)).abs().max() < 2e-5
    theirs.set_attn_implementation("eager")
    assert (theirs(ids).logits - source.model(ids)).abs().max() < 2e-5
    theirs.set_attn_implementation("sdpa")

    rows = torch.stack((ids[0, :length], torch.cat((torch.full((8,), 5), ids[0, :length - 8]))))
    settings = {"attention_mask": torch.arange(length) >= torch.tensor([[0], [8]]), "do_sample": False,
                "max_new_tokens": 30, "eos_token_id": None}
    greedy = theirs.generate(rows, **settings)[:, length:].tolist()
    expected = [list(source.model.generate(row[row_start:].tolist(), 30, temperature=0))
                for row, row_start in zip(rows, (0, 8), strict=True)]
    assert greedy == expected
    beams = theirs.generate(rows, **settings, num_beams=3)
    assert torch.equal(beams, theirs.generate(rows, **settings, num_beams=3, use_cache=False))
    settings["attention_mask"] = settings["attention_mask"][:1]
    guessed = theirs.generate(rows[:1], **settings, prompt_lookup_num_tokens=3)
    assert guessed[0, length:].tolist() == expected[0]
    with pytest.raises(ValueError, match="need a cache that grows") if theirs.model.looks_back else nullcontext():
        static = theirs.generate(rows[:1], **settings, cache_implementation="static")
        assert static[0, length:].tolist() == expected[0]
