"""A model of the nanochat family for Hugging Face's transformers, by itself: each export has a copy of this file.

The same model as nanochat's gpt.py, with its knobs in config.json, in the layout that transformers' caches, generation
and engines expect: tests compare the two. Numbers that training learned, but no matrix, stand in config.json, where a
load in bf16 doesn't round them. Run with transformers 5.19 and 5.24.

B rows, T tokens, C channels, H query heads, Hk key/value heads, D head dim, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

# What transformers calls a cache: so since 5.24, past_key_values before
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
ROPE_LENGTHS = 10    # of the rotary table, in contexts


class NanochatConfig(PretrainedConfig):
    """Its fields are those of config.json, as nanochat's export.py writes them: there is no default model."""
    model_type = "nanochat_full"
    use_cache = True


def norm(x, config):
    return F.rms_norm(x, (x.size(-1),), eps=config.rms_norm_eps)


def rotate(x, cos, sin):
    """By the negative of the angles, in the pairs (x[d], x[d + D/2]) of (B, H, T, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def offset_keys(k, num_pairs, before, is_first):
    """Keys (B, Hk, T, D) of which the slowest pairs are those of the token before, and these channels of each key
    itself, (B, Hk, T, 2 num_pairs). before: those of the token before the first, (B, Hk, 1, 2 num_pairs)"""
    half = k.size(-1) // 2
    fast, slow = k.unflatten(-1, (2, half)).split((half - num_pairs, num_pairs), dim=-1)    # (B, Hk, T, 2, pairs)
    flat = slow.flatten(-2)
    last = torch.cat((flat[:, :, :1] if before is None else before, flat[:, :, :-1]), dim=2)
    last = last.masked_fill(is_first[:, None, :, None], 0).view_as(slow)
    return torch.cat((fast, last), dim=-1).flatten(-2), flat


def attend_eagerly(module, q, k, v, mask, scaling, **kwargs):
    """Attention written out, which transformers leaves to each model: (B, T, H, D), and the weights (B, H, T, S).

    k, v: (B, Hk, S, D) of all tokens so far; mask: added to the scores, as transformers makes it for "eager"
    """
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))    # (B, H, S, D)
    scores = q @ k.transpose(2, 3) * scaling
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2), weights


class NanochatAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        C, H, Hk, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.config, self.layer_idx, self.head_dim = config, layer_idx, D
        self.num_key_value_groups, self.scaling, self.is_causal = H // Hk, D ** -0.5, True
        is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if is_sliding else None
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, Hk * D, bias=False)
        self.v_proj = nn.Linear(C, Hk * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        if layer_idx in config.value_embed_layers:
            self.ve_gate = nn.Linear(config.ve_gate_channels, Hk, bias=False)

    def forward(self, x, value_embed, cos_sin, mask, cache, is_first, slow_keys, **kwargs):
        B, T, _ = x.shape
        config = self.config
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # (B, H or Hk, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if value_embed is not None:
            gate = config.ve_gate_scale * torch.sigmoid(self.ve_gate(x[..., :config.ve_gate_channels]))  # (B, T, Hk)
            v = v + (gate.unsqueeze(-1) * value_embed.view(B, T, -1, self.head_dim)).transpose(1, 2)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        if config.qk_scale:
            q, k = norm(q, config) * config.qk_scale, norm(k, config) * config.qk_scale
        i = self.layer_idx
        if i in slow_keys:
            k, slow_keys[i] = offset_keys(k, config.key_offset_pairs[i], slow_keys[i], is_first)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = attend_eagerly
        if config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        y, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window,
                      **kwargs)    # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class NanochatMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(C, hidden, bias=False)
        self.gate_proj = nn.Linear(C, hidden, bias=False) if config.hidden_act == "silu" else None    # SwiGLU
        self.down_proj = nn.Linear(hidden, C, bias=False)

    def forward(self, x):
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanochatLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.self_attn = NanochatAttention(config, layer_idx)
        self.mlp = NanochatMLP(config)

    def forward(self, x, x0, *args, **kwargs):
        config, i = self.config, self.layer_idx
        if config.resid_lambdas is not None:
            x = config.resid_lambdas[i] * x
        if config.x0_lambdas is not None:
            x = x + config.x0_lambdas[i] * x0
        x = x + self.self_attn(norm(x, config), *args, **kwargs)
        return x + self.mlp(norm(x, config))


class NanochatPreTrainedModel(PreTrainedModel):
    config_class = NanochatConfig
    base_model_prefix = "model"
    _no_split_modules = ["NanochatLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class NanochatModel(NanochatPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        V, C = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, C)
        self.layers = nn.ModuleList(NanochatLayer(config, i) for i in range(config.num_hidden_layers))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(V, config.num_key_value_heads * config.head_dim)
                                           for i in config.value_embed_layers})
        if config.smear_lambda is not None:
            self.smear_gate = nn.Linear(config.smear_gate_channels, 1, bias=False)
        self.looks_back = config.smear_lambda is not None or any(config.key_offset_pairs)
        self.rope_table = None    # cos and sin, no buffers: transformers would leave those empty
        self.post_init()

    def get_cos_sin(self, position_ids, x):
        """Of the positions (B or 1, T): (B or 1, 1, T, D/2) each."""
        if self.rope_table is None or self.rope_table[0].device != x.device or self.rope_table[0].dtype != x.dtype:
            config, half_dim = self.config, self.config.head_dim // 2
            num_turning = round(half_dim * config.rotary_fraction)    # pairs; the others stand still
            exponents = torch.arange(half_dim, dtype=torch.float64, device="cpu") / num_turning
            positions = torch.arange(ROPE_LENGTHS * config.max_position_embeddings, dtype=torch.float64, device="cpu")
            angles = positions[:, None] / config.rotary_base ** exponents
            angles[:, num_turning:] = 0
            self.rope_table = [table.to(x.dtype).to(x.device) for table in (angles.cos(), angles.sin())]
        return [table[position_ids].unsqueeze(1) for table in self.rope_table]

    def norm_embeds(self, x):
        return norm(x, self.config) if self.config.embed_norm else x

    def read_last(self, input_ids, position_ids, cache):
        """What is kept of the token before the new ones: its id (B, 1) and, by layer, the slow channels of its key,
        where each layer puts those of the new ones; None where there is no token before. And which of the new tokens
        (B, T) have none before them.

        A cache gets more layers, of token ids and of these keys, in which they are looked up: they are reordered,
        cropped and repeated with the others, as beam search and speculative decoding need it.
        """
        config = self.config
        if config._attn_implementation == "vllm":
            raise NotImplementedError("vLLM gives a model no previous token, which smear and key offset need")
        # Beside such layers transformers takes a static cache for one without empty slots, and attention would see them
        if getattr(cache, "is_compileable", False):
            raise ValueError("smear and key offset need a cache that grows; leave out cache_implementation, or let it "
                             "be \"dynamic\"")
        L, has_past = config.num_hidden_layers, cache is not None and cache.get_seq_length() > 0
        layers = [i for i, num_pairs in enumerate(config.key_offset_pairs) if num_pairs]
        if has_past and len(cache.layers) != L + 1 + len(layers):
            raise ValueError("this cache lacks the ids of its tokens; use one that this model has filled")
        last_id = cache.layers[L].keys[:, 0, -1:, 0] if has_past else None
        slow_keys = {i: cache.layers[L + 1 + n].keys[:, :, -1:] if has_past else None for n, i in enumerate(layers)}
        is_first = position_ids == 0    # of a sequence, which may stand after padding
        if not has_past:
            is_first = is_first | (torch.arange(input_ids.size(1), device=input_ids.device) == 0)
        return last_id, slow_keys, is_first

    def keep_last(self, input_ids, slow_keys, cache):
        while len(cache.layers) < self.config.num_hidden_layers + 1 + len(slow_keys):
            cache.layers.append(DynamicLayer())
        kept = [input_ids[:, None, :, None], *slow_keys.values()]    # ids as keys of one head of one dimension
        for layer, keys in zip(cache.layers[-len(kept):], kept, strict=True):
            layer.update(keys, keys[..., :0])    # a cache's layer has values, too: empty ones

    def smear(self, x, input_ids, last_id, is_first):
        """Add to each embedding a gated part of the token before. (B, T, C) -> (B, T, C)"""
        last = torch.cat((input_ids[:, :1] if last_id is None else last_id, input_ids[:, :-1]), dim=1)
        previous = self.norm_embeds(self.embed_tokens(last)).masked_fill(is_first.unsqueeze(-1), 0)
        gate = torch.sigmoid(self.smear_gate(x[..., :self.config.smear_gate_channels]))    # (B, T, 1)
        return x + self.config.smear_lambda * gate * previous

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None,
                past_key_values=None, inputs_embeds=None, **kwargs):
        config, cache = self.config, past_key_values if cache is None else cache
        if input_ids is None and (config.value_embed_layers or self.looks_back):
            raise ValueError("this model needs input_ids: embeddings alone don't tell it all of a token")
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        x = self.norm_embeds(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        T = x.size(1)
        if position_ids is None:
            num_past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(num_past, num_past + T, device=x.device)[None]
            if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:    # rows may begin with padding
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        masks = attention_mask
        if not isinstance(masks, dict):    # else `generate` has made them
            settings = {"config": config, "inputs_embeds": x, "attention_mask": attention_mask,
                        "position_ids": position_ids, CACHE: cache}
            masks = {"full_attention": create_causal_mask(**settings)}
            if "sliding_attention" in config.layer_types:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**settings)
        is_first, slow_keys = None, {}
        if self.looks_back:
            last_id, slow_keys, is_first = self.read_last(input_ids, position_ids, cache)
            if config.smear_lambda is not None:
                x = self.smear(x, input_ids, last_id, is_first)
        x0, middle, cos_sin = x, None, self.get_cos_sin(position_ids, x)
        for i, layer in enumerate(self.layers):
            value_embed = self.value_embeds[str(i)](input_ids) if i in config.value_embed_layers else None
            x = layer(x, x0, value_embed, cos_sin, masks[config.layer_types[i]], cache, is_first, slow_keys,
                      **kwargs)
            if i == config.backout_layer:
                middle = x
        if middle is not None:
            x = x - config.backout_lambda * middle
        if self.looks_back and cache is not None:
            self.keep_last(input_ids, slow_keys, cache)
        return BaseModelOutputWithPast(last_hidden_state=norm(x, config), **{CACHE: cache if use_cache else None})


class NanochatForCausalLM(NanochatPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = NanochatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None,
                past_key_values=None, inputs_embeds=None, labels=None, logits_to_keep=0, **kwargs):
        """Logits in fp32, softcapped; of the last `logits_to_keep` tokens, 0 for all."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        output = self.model(input_ids, attention_mask, position_ids, cache, use_cache, past_key_values, inputs_embeds,
                            **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept]).float()
        if cap := self.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        loss = None if labels is None else self.loss_function(logits=logits, labels=labels,
                                                              vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: output[CACHE] if use_cache else None})
