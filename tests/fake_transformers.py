"""As much of Hugging Face's transformers as the shipped modeling file asks for, in plain torch: where the real package
isn't installed, the file is tested against these; tests marked `engines` run it in the real one."""

import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.export import MODELING_NAME, SHIPPED_DIR


class Config:
    _attn_implementation = "sdpa"

    def __init__(self, **fields):
        self.__dict__.update(fields)


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def post_init(self):
        pass


class DynamicLayer:
    keys = values = None

    def update(self, keys, values):
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=-2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=-2)
        return self.keys, self.values


class DynamicCache:
    def __init__(self, config):
        self.layers = [DynamicLayer() for _ in range(config.num_hidden_layers)]

    def update(self, keys, values, layer_idx):
        return self.layers[layer_idx].update(keys, values)

    def get_seq_length(self):
        return 0 if self.layers[0].keys is None else self.layers[0].keys.size(-2)


@dataclass
class Output:
    last_hidden_state: torch.Tensor = None
    loss: torch.Tensor = None
    logits: torch.Tensor = None
    cache: DynamicCache = None

    def __getitem__(self, name):
        return getattr(self, name)


def create_mask(config, inputs_embeds, attention_mask, position_ids, cache, window=None):
    """(B or 1, 1, T, past + T), True where a query sees a key; for "eager", 0 there and the lowest number elsewhere."""
    T = inputs_embeds.size(1)
    keys = torch.arange(T + (cache.get_seq_length() if cache is not None else 0))
    distances = keys[-T:, None] - keys
    mask = (distances >= 0) & (distances < (window or len(keys)))
    mask = mask[None, None] if attention_mask is None else mask & attention_mask.bool()[:, None, None]
    if config._attn_implementation == "eager":
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return mask


def create_sliding_mask(config, **settings):
    return create_mask(config, **settings, window=config.sliding_window)


def attend(module, q, k, v, mask, dropout, scaling, sliding_window):
    """q (B, H, T, D), k and v (B, Hk, past + T, D) -> (B, T, H, D)"""
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2), None


def load_modeling(patch):
    """The shipped modeling file as a module, on these stand-ins."""
    parts = {
        "": {"DynamicCache": DynamicCache, "GenerationMixin": object, "PretrainedConfig": Config,
             "PreTrainedModel": Model},
        ".cache_utils": {"DynamicLayer": DynamicLayer},
        ".masking_utils": {"create_causal_mask": create_mask, "create_sliding_window_causal_mask": create_sliding_mask},
        ".modeling_outputs": {"BaseModelOutputWithPast": Output, "CausalLMOutputWithPast": Output},
        ".modeling_utils": {"ALL_ATTENTION_FUNCTIONS": {"sdpa": attend}},
        ".utils": {"can_return_tuple": lambda function: function}}
    for name, names in parts.items():
        module = ModuleType(f"transformers{name}")
        module.__dict__.update(SimpleNamespace(**names).__dict__)
        patch.setitem(sys.modules, f"transformers{name}", module)
    spec = importlib.util.spec_from_file_location("modeling_nanochat", SHIPPED_DIR / MODELING_NAME)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
