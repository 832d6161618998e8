"""What the tests of conversations and of their program share: a model that answers by a script."""

import re
import time
from types import SimpleNamespace

import torch
from torch import nn

from tests.server_helpers import make_byte_tokenizer

TOKENIZER = make_byte_tokenizer()
# A word of the question -> the answer
SCRIPTS = {"27": "That is <|python_start|>34*27<|python_end|>.", "slow": "tick " * 400, "evil": "\x1b[2Jdone\x07",
           "": "Hello!"}


class ScriptedModel(nn.Module):
    """Answers each question by its script; its position in the script is that of the tokens in its cache."""
    config = SimpleNamespace(vocab_size=265, n_layer=1, n_kv_head=1, head_dim=2, n_embd=1, sequence_len=300)
    compute_dtype = torch.float32

    def __init__(self, step_sec=0.0):
        super().__init__()
        self.cos = range(1000)  # positions
        self.step_sec = step_sec
        self.num_read = 0       # tokens

    def get_device(self):
        return torch.device("cpu")

    def embed_tokens(self, token):
        return torch.zeros(1)

    def forward_trunk(self, idx, kv_cache):
        start = int(kv_cache.cache_seqlens[0])
        kv_cache.k_cache[0, 0, start:start + idx.size(1), 0, 0] = idx[0].float()
        kv_cache.advance(idx.size(1))
        self.num_read += idx.size(1)

    def forward(self, idx, kv_cache):
        self.forward_trunk(idx, kv_cache)
        time.sleep(self.step_sec)
        text = TOKENIZER.decode(kv_cache.k_cache[0, 0, :int(kv_cache.cache_seqlens[0]), 0, 0].int().tolist())
        question, answer = text.split("<|user_start|>")[-1].split("<|user_end|><|assistant_start|>")
        script = next(script for word, script in SCRIPTS.items() if word in question)
        answer = re.sub(r"<\|output_start\|>.*<\|output_end\|>", "", answer)  # put in by the calculator
        tokens = TOKENIZER.encoding.encode(script + "<|assistant_end|>", allowed_special="all")
        num_said = len(TOKENIZER.encoding.encode(answer, allowed_special="all"))
        return nn.functional.one_hot(torch.tensor([[tokens[num_said]]]), 265) * 100.0  # (1, 1, V)
