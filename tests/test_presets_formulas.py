"""Published formulas of models of the family on the same weights, in slow and obvious words; their initial weights."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanochat.presets import find_preset
from tests.helpers import CONFIG, make_model, make_preset_config, make_prompt


def slow_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def slow_rotary(x, base, num_turning):
    """(T, H, D); the first pairs of each head turn."""
    T, _, D = x.shape
    x1, x2 = x[..., :D // 2], x[..., D // 2:]
    angles = torch.zeros(T, 1, D // 2, dtype=torch.float64)
    for i in range(num_turning):
        angles[:, 0, i] = torch.arange(T) * base ** (-i / num_turning)
    return torch.cat((x1 * angles.cos() + x2 * angles.sin(), x2 * angles.cos() - x1 * angles.sin()), -1)


def slow_attention(q, k, v, scale, window):
    """(T, H, D), (T, Hk, D) twice: each token sees itself and `window` tokens before it."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        first = max(0, t - window)
        for head in range(q.size(1)):
            shared = head // (q.size(1) // k.size(1))
            weights = (k[first:t + 1, shared] @ q[t, head] * scale).softmax(0)
            out[t, head] = weights @ v[first:t + 1, shared]
    return out


def slow_jan26(model, ids):
    """Logits of one row, as FACTS of January 2026 have it: windows of half the context, value embeddings by a gate of
    32 channels that reaches 2, normed queries and keys without a factor, no smear, no backout, logits within 15."""
    w, config = dict(model.named_parameters()), model.config
    H, Hk, D, L = config.n_head, config.n_kv_head, config.n_embd // config.n_head, config.n_layer
    x = x0 = slow_norm(w["transformer.wte.weight"][ids])
    for i in range(L):
        attn = f"transformer.h.{i}.attn"
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = slow_norm(x)
        q, k, v = ((h @ w[f"{attn}.{name}.weight"].T).view(len(ids), -1, D) for name in ("c_q", "c_k", "c_v"))
        if i % 2 == (L - 1) % 2:
            gate = 2 / (1 + (-(h[:, :32] @ w[f"{attn}.ve_gate.weight"].T)).exp())
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][ids].view(-1, Hk, D)
        q, k = (slow_norm(slow_rotary(heads, 10_000, D // 2)) for heads in (q, k))
        window = config.sequence_len // 2 if "SSSL"[i % 4] == "S" and i < L - 1 else config.sequence_len
        y = slow_attention(q, k, v, D ** -0.5, window)
        x = x + y.reshape(len(ids), H * D) @ w[f"{attn}.c_proj.weight"].T
        h = slow_norm(x) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T
        x = x + h.clamp(min=0) ** 2 @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
    return 15 * ((slow_norm(x) @ w["lm_head.weight"].T)[:, :config.vocab_size] / 15).tanh()


def slow_marin(model, ids):
    """Logits of one row: partial rotation of half of the pairs, QK norm before it, scores times 1.35 / sqrt(D), half of
    the output after 2L // 3 layers subtracted at the end, no windows, no bound of the logits."""
    w, config = dict(model.named_parameters()), model.config
    H, D, L = config.n_head, config.n_embd // config.n_head, config.n_layer
    x = x0 = slow_norm(w["transformer.wte.weight"][ids])
    outputs = []
    for i in range(L):
        attn = f"transformer.h.{i}.attn"
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = slow_norm(x)
        q, k, v = ((h @ w[f"{attn}.{name}.weight"].T).view(len(ids), -1, D) for name in ("c_q", "c_k", "c_v"))
        q, k = (slow_rotary(slow_norm(heads), 1024, D // 4) for heads in (q, k))
        y = slow_attention(q, k, v, 1.35 / math.sqrt(D), len(ids))
        x = x + y.reshape(len(ids), H * D) @ w[f"{attn}.c_proj.weight"].T
        h = slow_norm(x) @ w[f"transformer.h.{i}.mlp.c_fc.weight"].T
        x = x + h.clamp(min=0) ** 2 @ w[f"transformer.h.{i}.mlp.c_proj.weight"].T
        outputs.append(x)
    x = x - w["backout_lambda"] * outputs[2 * L // 3 - 1]
    return (slow_norm(x) @ w["lm_head.weight"].T)[:, :config.vocab_size]


def slow_arcadium(model, ids):
    """Logits of one row: embeddings as they are, heads wider than the stream, scores of what isn't normed over sqrt(D),
    SwiGLU, nothing on the residual stream, no bound of the logits."""
    w, config = dict(model.named_parameters()), model.config
    H, L, x = config.n_head, config.n_layer, w["transformer.wte.weight"][ids]
    for i in range(L):
        attn, mlp = f"transformer.h.{i}.attn", f"transformer.h.{i}.mlp"
        h = slow_norm(x)
        q, k, v = ((h @ w[f"{attn}.{name}.weight"].T).view(len(ids), -1, 128 // H) for name in ("c_q", "c_k", "c_v"))
        q, k = (slow_rotary(heads, 100_000, heads.size(-1) // 2) for heads in (q, k))
        y = slow_attention(q, k, v, (128 // H) ** -0.5, len(ids))
        x = x + y.reshape(len(ids), 128) @ w[f"{attn}.c_proj.weight"].T
        h = slow_norm(x)
        gate = h @ w[f"{mlp}.c_gate.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * (h @ w[f"{mlp}.c_fc.weight"].T)) @ w[f"{mlp}.c_proj.weight"].T
    return (slow_norm(x) @ w["lm_head.weight"].T)[:, :config.vocab_size]


@pytest.mark.parametrize(("name", "slow"), [("nanochat-jan26", slow_jan26), ("marin-150m", slow_marin),
                                            ("arcadium-200m", slow_arcadium)])
def test_forward_pass_equals_published_formulas(name, slow):
    config = replace(make_preset_config(name), sequence_len=256, n_layer=5)
    if name.startswith("marin"):
        config = replace(config, backout_layer=2)
    model = make_model(config, torch.float64)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if key in ("resid_lambdas", "x0_lambdas"):
                param.normal_(1.0, 0.3)    # as after training
        ids = torch.tensor(make_prompt(200))    # more than the window of 128
        logits = slow(model, ids)
        torch.testing.assert_close(model(ids[None])[0], logits, rtol=1e-5, atol=1e-5)    # logits are fp32
        nll = F.cross_entropy(logits[:-1], ids[1:])
        torch.testing.assert_close(model(ids[None, :-1], ids[None, 1:]).double(), nll, rtol=1e-6, atol=1e-6)


def test_initial_weights_of_january_and_marin():
    """resid 1 and x0 .1; resid 1.1 and x0 0, head and projections zero, backout .5, embedding 1/d, others 1/sqrt(d)."""
    jan26, marin = (make_model(make_preset_config(name), torch.float32, as_initialised=True)
                    for name in ("nanochat-jan26", "marin-150m"))
    for lambdas, value in ((jan26.resid_lambdas, 1.0), (jan26.x0_lambdas, 0.1), (marin.resid_lambdas, 1.1),
                           (marin.x0_lambdas, 0.0), (marin.backout_lambda, 0.5)):
        assert lambdas.tolist() == pytest.approx([value] * len(lambdas))
    assert not any(param.any() for param in (jan26.transformer.h[3].attn.ve_gate.weight, marin.lm_head.weight))
    assert marin.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(CONFIG.n_embd ** -0.5, rel=0.05)
    assert marin.transformer.h[0].mlp.c_fc.weight.abs().max() <= 3 * CONFIG.n_embd ** -0.5
    assert find_preset("marin-150m").knobs["wte_std"] == 1 / 512
