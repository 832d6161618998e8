"""The model against the public record's tables and against a forward pass written as loops over tokens and heads."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.config import count_params
from nanochat.cross_entropy import LOSSES
from nanochat.engine import KVCache
from nanochat.gpt import GPT, GPTConfig, norm
from nanochat.scaling import make_config
from tests.helpers import make_model

TINY = dict(vocab_size=70, n_layer=4, n_head=4, n_kv_head=2, n_embd=48, window_pattern="SSL")


def make_tiny(dtype=torch.float64, **changes):
    return make_model(GPTConfig(**{"sequence_len": 64} | TINY | changes), dtype)


def make_ids(*shape, seed=0, vocab_size=70):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Shape and count

# depth, C, wte, value_embeds, lm_head, transformer matrices, scalars, total, FLOPs per token; vocabulary 32768, T 2048
TABLE = [
    (4,   256,  8_388_608,  16_777_216,  8_388_608,   3_145_776, 34,    36_700_242, 8.021650e7),
    (8,   512, 16_777_216,  67_108_864, 16_777_216,  25_166_016, 42,   125_829_354, 2.956997e8),
    (12,  768, 25_165_824, 150_994_944, 25_165_824,  84_935_088, 50,   286_261_730, 7.596960e8),
    (20, 1280, 41_943_040, 419_430_400, 41_943_040, 393_217_200, 66,   896_533_746, 2.886213e9),
    (24, 1536, 50_331_648, 603_979_776, 50_331_648, 679_478_976, 74, 1_384_122_122, 4.775226e9),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"d{row[0]}")
def test_params_and_flops_of_the_public_record(row):
    depth, width, wte, value_embeds, lm_head, matrices, scalars, total, flops = row
    config = make_config(depth, vocab_size=32768, sequence_len=2048)
    with torch.device("meta"):
        model = GPT(config)
    assert (config.n_embd, config.n_head, config.n_kv_head) == (width, width // 128, width // 128)
    expected = {"wte": wte, "value_embeds": value_embeds, "lm_head": lm_head, "transformer_matrices": matrices,
                "scalars": scalars, "total": total}
    assert model.num_scaling_params() == count_params(config) == expected
    assert model.estimate_flops() == pytest.approx(flops, rel=2e-7)


def test_counts_of_a_model_with_padding_and_grouped_heads():
    model = make_tiny()
    assert count_params(model.config) == model.num_scaling_params()
    assert model.lm_head.weight.shape == (128, 48)


def test_parameter_names():
    names = {"transformer.wte.weight", "lm_head.weight", "value_embeds.1.weight", "value_embeds.3.weight",
             "resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"}
    for i in range(4):
        names |= {f"transformer.h.{i}.attn.{name}.weight" for name in ("c_q", "c_k", "c_v", "c_proj")}
        names |= {f"transformer.h.{i}.mlp.{name}.weight" for name in ("c_fc", "c_proj")}
    names |= {f"transformer.h.{i}.attn.ve_gate.weight" for i in (1, 3)}
    model = make_tiny()
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
    assert set(shapes) == set(model.state_dict()) == names
    assert shapes["smear_gate.weight"] == (1, 24) and shapes["transformer.h.3.attn.ve_gate.weight"] == (2, 12)
    assert shapes["resid_lambdas"] == shapes["x0_lambdas"] == (4,)
    assert shapes["smear_lambda"] == shapes["backout_lambda"] == (1,)


def test_windows():
    config = GPTConfig(n_layer=12, window_pattern="SSSL", sequence_len=2048)
    assert [config.window(i) for i in range(12)] == [512, 512, 512, 2048] * 3
    assert [GPTConfig(n_layer=2, window_pattern="S").window(i) for i in range(2)] == [512, 2048]  # the last is always L
    assert [GPTConfig(n_layer=3, window_pattern="LS").window(i) for i in range(3)] == [2048, 512, 2048]
    assert GPTConfig(n_layer=2, sequence_len=1000, window_pattern="S").window(0) == 256  # 250, rounded up to 128s
    assert GPTConfig(n_layer=2, sequence_len=1025, window_pattern="S").window(0) == 384


@pytest.mark.parametrize("changes", [{"window_pattern": "SSX"}, {"window_pattern": ""}, {"window_pattern": "ssl"},
                                     {"n_embd": 50}, {"n_kv_head": 3}, {"n_embd": 12}])
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(UserError):
        GPTConfig(**TINY | changes)


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize(("dtype", "knobs", "num_buffers"), [
    (torch.float32, {}, 2), (torch.bfloat16, {}, 2), (torch.float32, {"mlp_act": "swiglu"}, 2),
    (torch.float32, {"num_experts": 4, "moe_every": 2}, 4)])
def test_init_weights_sets_everything_after_meta_construction(dtype, knobs, num_buffers):
    with torch.device("meta"):
        model = GPT(GPTConfig(sequence_len=16, **TINY, **knobs), dtype)
    model.to_empty(device="cpu")
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for tensor in everything.values():
            tensor.fill_(float("nan"))
    model.init_weights()
    assert len(everything) == len(list(model.parameters())) + num_buffers
    assert [name for name, tensor in everything.items() if not tensor.isfinite().all()] == []


def test_init_distributions():
    torch.manual_seed(0)
    C = 256
    model = GPT(GPTConfig(sequence_len=16, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=C))
    model.init_weights()
    params = {name.removesuffix(".weight"): param.detach() for name, param in model.named_parameters()}
    bound = math.sqrt(3 / C)
    uniform = {name: (-bound, bound) for name in params if name.split(".")[-1] in ("c_q", "c_k", "c_v") or
               name.startswith("value_embeds")}
    uniform |= {name: (-0.4 * bound, 0.4 * bound) for name in params if name.endswith("c_fc")}
    uniform |= {name: (0, 0.02) for name in params if name.endswith(("ve_gate", "smear_gate"))}
    for name, (low, high) in uniform.items():
        values = params[name].flatten()
        standard_error = (high - low) / math.sqrt(12 * len(values))
        assert low <= values.min() < low + 0.2 * (high - low) and high - 0.2 * (high - low) < values.max() <= high, name
        assert abs(values.mean() - (low + high) / 2) < 5 * standard_error, name
    for name, std in (("transformer.wte", 0.8), ("lm_head", 0.001)):
        assert params[name].std() == pytest.approx(std, rel=0.01) and params[name].mean().abs() < 0.01 * std
        assert (params[name] / std).pow(4).mean() == pytest.approx(3, abs=0.1), name  # kurtosis; a uniform has 1.8
    zeros = {name for name in params if name.endswith("c_proj")}
    assert len(zeros) == 8 and not any(params[name].any() for name in zeros)
    torch.testing.assert_close(params["resid_lambdas"], torch.tensor([1.15, 1.15 - 1 / 30, 1.05 + 1 / 30, 1.05]))
    torch.testing.assert_close(params["x0_lambdas"], torch.tensor([0.20, 0.15, 0.10, 0.05]))
    assert params["smear_lambda"].item() == 0 and params["backout_lambda"].item() == pytest.approx(0.2)
    assert set(uniform) | zeros | {"transformer.wte", "lm_head", "resid_lambdas", "x0_lambdas", "smear_lambda",
                                   "backout_lambda"} == set(params)


@pytest.mark.parametrize(("dtype", "knobs", "embed_dtype", "master_dtype"), [
    (torch.float64,  {},                    torch.float64,  torch.float64),
    (torch.float32,  {},                    torch.float32,  torch.float32),
    (torch.bfloat16, {},                    torch.bfloat16, torch.float32),
    (torch.bfloat16, {"fp32_embeds": True}, torch.float32,  torch.float32),
    (torch.float16,  {},                    torch.float32,  torch.float32)])
def test_storage_dtypes(dtype, knobs, embed_dtype, master_dtype):
    model = make_tiny(dtype, **knobs)
    for name, param in model.named_parameters():
        assert param.dtype == (embed_dtype if "wte" in name or "embed" in name else master_dtype), name
    assert model.cos.dtype == model.sin.dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Forward


def slow_logits(model, ids):
    """(T, V) fp64 logits of one sequence, token by token and head by head, written from the recipe's text."""
    config, weights = model.config, {name.removesuffix(".weight"): p.double() for name, p in model.named_parameters()}
    H, Hk, D = config.n_head, config.n_kv_head, config.n_embd // config.n_head

    def rms_norm(x):
        return x / (x.square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()

    def rotate(heads, t):  # a turn of the complex numbers x1 + i x2 by minus the angle
        angles = t / 100_000 ** (torch.arange(D // 2, dtype=torch.float64) / (D // 2))
        turned = torch.complex(heads[:, :D // 2], heads[:, D // 2:]) * torch.polar(torch.ones_like(angles), -angles)
        return torch.cat((turned.real, turned.imag), dim=-1)

    raw = [rms_norm(weights["transformer.wte"][token]) for token in ids]
    xs = [raw[0]]
    for t in range(1, len(ids)):
        gate = torch.sigmoid(weights["smear_gate"][0] @ raw[t][:24]) if config.smear else 0
        xs.append(raw[t] + (weights["smear_lambda"] * gate * raw[t - 1] if config.smear else 0))
    x0s = list(xs)
    for i in range(config.n_layer):
        letter = "L" if i == config.n_layer - 1 else config.window_pattern[i % len(config.window_pattern)]
        window = config.sequence_len if letter == "L" else -(-config.sequence_len // 512) * 128
        attn = {name: weights.get(f"transformer.h.{i}.attn.{name}") for name in ("c_q", "c_k", "c_v", "ve_gate")}
        xs = [weights["resid_lambdas"][i] * x + weights["x0_lambdas"][i] * x0 for x, x0 in zip(xs, x0s, strict=True)]
        qs, ks, vs = [], [], []
        for t, x in enumerate(xs):
            h = rms_norm(x)
            qs.append(1.2 * rms_norm(rotate((attn["c_q"] @ h).view(H, D), t)))
            ks.append(1.2 * rms_norm(rotate((attn["c_k"] @ h).view(Hk, D), t)))
            v = (attn["c_v"] @ h).view(Hk, D)
            if i % 2 == (config.n_layer - 1) % 2:
                gates = 3 * torch.sigmoid(attn["ve_gate"] @ h[:12])
                v = v + gates[:, None] * weights[f"value_embeds.{i}"][ids[t]].view(Hk, D)
            vs.append(v)
        if config.key_offset and letter == "L":    # of the pairs (d, d + D/2) the last ones, which turn slowest
            num_pairs = max(1, round(config.key_offset * D / 2))
            slow = [d for d in range(D) if d % (D // 2) >= D // 2 - num_pairs]
            for t in reversed(range(len(ks))):
                ks[t][:, slow] = ks[t - 1][:, slow] if t else 0
        for t in range(len(xs)):
            seen = range(max(0, t - window), t + 1)
            heads = []
            for head in range(H):
                kv_head = head // (H // Hk)
                scores = torch.stack([qs[t][head] @ ks[s][kv_head] for s in seen]) / math.sqrt(D)
                heads.append(scores.softmax(0) @ torch.stack([vs[s][kv_head] for s in seen]))
            xs[t] = xs[t] + weights[f"transformer.h.{i}.attn.c_proj"] @ torch.cat(heads)
            hidden = weights[f"transformer.h.{i}.mlp.c_fc"] @ rms_norm(xs[t])
            xs[t] = xs[t] + weights[f"transformer.h.{i}.mlp.c_proj"] @ hidden.clamp(min=0) ** 2
        if i == config.n_layer // 2:
            middle = list(xs)
    xs = [rms_norm(x - weights["backout_lambda"] * m) for x, m in zip(xs, middle, strict=True)]
    return torch.stack([15 * torch.tanh((weights["lm_head"] @ x)[:config.vocab_size] / 15) for x in xs])


@pytest.mark.parametrize(("changes", "num_tokens"), [
    ({"sequence_len": 64}, 140),                  # L sees 64 tokens, S 128: both are shorter than the input
    ({"sequence_len": 520, "n_layer": 2}, 262),   # S sees 256 tokens; 128 if it were derived from the input's length
    ({"n_layer": 1, "n_kv_head": 1}, 5),
    ({"key_offset": 0.0}, 30),
    ({"key_offset": 1.0, "n_layer": 3}, 30),
    ({"key_offset": 0.01, "n_embd": 40}, 30),     # of the 5 pairs of a head, one at least
    ({"n_embd": 40}, 30),                         # 2 of 5
    ({"n_layer": 1, "smear": False}, 9),
    ({"n_layer": 3, "n_kv_head": 4}, 1)])
@torch.no_grad()
def test_forward_equals_slow_reference(changes, num_tokens):
    model, ids = make_tiny(**changes), make_ids(num_tokens)
    expected = slow_logits(model, ids.tolist())
    assert expected.abs().max() > 1  # or the comparison says little
    torch.testing.assert_close(model(ids[None])[0], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_ids_of_32_bits_are_those_of_64():
    model, ids = make_tiny(), make_ids(1, 20)
    assert torch.equal(model(ids.int()), model(ids))


@torch.no_grad()
def test_low_precision_forward_is_near_the_slow_reference():
    ids = make_ids(40)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        model = make_tiny(dtype)
        logits, expected = model(ids[None])[0], slow_logits(model, ids.tolist())
        assert logits.dtype == torch.float32 and logits.shape == (40, 70)
        assert (logits - expected).norm() / expected.norm() < tolerance, dtype


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scalars_do_not_promote_activations(dtype):
    model, seen = make_tiny(dtype), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: seen.extend(a.dtype for a in args if torch.is_tensor(a)))
        module.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    model.forward_trunk(make_ids(1, 20))
    assert {d for d in seen if d.is_floating_point} == ({dtype} if dtype == torch.bfloat16 else {dtype, torch.float32})
    if dtype == torch.float16:  # the embeddings only, which are fp32 masters there
        assert seen.count(torch.float32) == 1 + len(model.value_embeds)


def test_norm_uses_the_eps_of_fp32_in_bf16():
    x = torch.full((1, 8), 1e-3, dtype=torch.bfloat16)  # the eps of bf16, 8e-3, would leave 0.01
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), torch.full((1, 8), (1 + 0.119209) ** -0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.01),
                                                  (torch.float16, 0.002)])
def test_norm_of_eager_decoding_is_the_same(dtype, tolerance):
    """In inference mode a CPU takes fewer operations; tiny, ordinary and large rows, and zeros."""
    x = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor([1e-4, 1.0, 100.0, 0.0], dtype=torch.float64)[:, None]).to(dtype)
    expected = norm(x)
    with torch.inference_mode():
        actual = norm(x)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_a_sequence_longer_than_the_rotary_table_is_refused():
    with pytest.raises(ValueError, match="41 tokens exceed the 40 positions"):
        make_tiny(sequence_len=4)(make_ids(1, 41))


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def test_loss_reductions():
    model, idx, targets = make_tiny(), make_ids(2, 30), make_ids(2, 30, seed=1)
    targets[0, :7], targets[1, 20:] = -1, -1
    weights = torch.randn(2, 30, dtype=torch.float64)
    logits = model(idx)
    expected = F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none")
    nll = model(idx, targets, loss_reduction="none")
    torch.testing.assert_close(nll, expected)
    assert not nll[targets < 0].any()
    torch.testing.assert_close(model(idx, targets), expected.sum() / (targets >= 0).sum())
    torch.testing.assert_close(model(idx, targets, loss_reduction="sum"), expected.sum())
    torch.testing.assert_close(model(idx, targets, loss_reduction="sum", weights=weights), (weights * expected).sum())
    assert model(idx, torch.full_like(targets, -1)).item() == 0


def test_evaluation_is_the_cross_entropy_whatever_is_trained(monkeypatch):
    """Bits per byte must stay comparable when a fork trains another loss."""
    model, idx, targets = make_tiny(), make_ids(2, 30), make_ids(2, 30, seed=1)
    monkeypatch.setitem(LOSSES, "plain", lambda *args, **options: torch.tensor(-1.0))
    model.loss = "plain"
    assert model(idx, targets).item() == -1 and model(idx, targets, loss_reduction="sum").item() == -1
    with torch.no_grad():
        nll = model(idx, targets, loss_reduction="none")
        torch.testing.assert_close(nll, F.cross_entropy(model(idx).mT, targets, reduction="none"))


def test_gradients_through_the_loss_equal_those_through_the_logits():
    model, idx, targets = make_tiny(), make_ids(2, 30), make_ids(2, 30, seed=1)
    targets[0, :7] = -1
    params = list(model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(model(idx).mT, targets, ignore_index=-1), params)
    actual = torch.autograd.grad(model(idx, targets), params)
    assert all(grad.any() for grad in expected)
    torch.testing.assert_close(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize("chunks", [(1,) * 90, (70, 1, 19)])
@torch.inference_mode()
def test_cached_forward_in_chunks_equals_slow_reference(chunks):
    model, idx = make_tiny(), torch.stack((make_ids(90), make_ids(90, seed=1)))
    cache = KVCache(2, 2, 90, 12, 4, torch.device("cpu"), torch.float64)
    logits = torch.cat([model(part, kv_cache=cache) for part in idx.split(chunks, dim=1)], dim=1)
    expected = torch.stack([slow_logits(model, row.tolist()) for row in idx])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_generate_is_reproducible():
    model, prompt = make_tiny(torch.float32), [1, 2, 3]
    first, again, other = (list(model.generate(prompt, 20, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other and len(first) == 20 and all(0 <= token < 70 for token in first)
    greedy = list(model.generate(prompt, 20, temperature=0))
    assert greedy == list(model.generate(prompt, 20, temperature=0, seed=1))
    assert greedy == list(model.generate(prompt, 20, top_k=1))
    with torch.no_grad():
        assert [int(model(torch.tensor([prompt + greedy[:n]]))[0, -1].argmax()) for n in range(20)] == greedy
