"""The shape of a model, and its parameters and FLOPs by formula. Needs no torch, so that scripts.plan answers at once;
tests/test_config.py compares the formulas with the modules and with torch's counter of FLOPs.

B rows, T tokens, C = n_embd channels, H query heads, Hk key/value heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass

from nanochat.common import UserError

VE_GATE_CHANNELS = 12         # channels that gate the value embeddings
SMEAR_GATE_CHANNELS = 24      # channels that gate the smear
VOCAB_MULTIPLE = 64           # the vocabulary is padded to this, for the matrix units
ROPE_LENGTHS = 10             # of the rotary table, in contexts: chats may outgrow the training context


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; saved with its weights."""
    sequence_len:   int = 2048
    vocab_size:     int = 32768
    n_layer:        int = 12
    n_head:         int = 6       # query heads
    n_kv_head:      int = 6       # key/value heads; fewer than n_head is grouped-query attention
    n_embd:         int = 768
    window_pattern: str = "SSSL"  # tiled over the layers, the last always L: L whole context, S a quarter of it

    def __post_init__(self):
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"--window-pattern {self.window_pattern!r} must be made of the letters S and L, as in SSSL")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"{self.n_embd} channels don't split into {self.n_head} heads of even size "
                            f"in groups of {self.n_kv_head}")
        if self.n_embd < SMEAR_GATE_CHANNELS:
            raise UserError(f"{self.n_embd} channels are too few; the smear gate alone reads {SMEAR_GATE_CHANNELS}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def has_value_embed(self, layer: int) -> bool:
        """Every other layer, the last one included."""
        return layer % 2 == (self.n_layer - 1) % 2

    def window(self, layer: int) -> int:
        """Number of tokens before itself that a token of this layer sees; from the context, not the input's length.

        Short windows (as in Gemma 2, arXiv 2408.00118) save attention's FLOPs. From half the context to a quarter, with
        smear, backout and ratio 8: 1.80 -> 1.65 hours (see gpt.py)."""
        is_long = layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L"
        return self.sequence_len if is_long else math.ceil(self.sequence_len / 4 / 128) * 128


def list_matrices(config: GPTConfig, layer: int) -> list[tuple[int, int]]:
    """(rows, columns) of a block's matrices."""
    C, kv_dim = config.n_embd, config.kv_dim
    attention = [(C, C), (kv_dim, C), (kv_dim, C), (C, C)]  # c_q, c_k, c_v, c_proj
    gate = [(config.n_kv_head, VE_GATE_CHANNELS)] if config.has_value_embed(layer) else []
    return [*attention, *gate, (4 * C, C), (C, 4 * C)]      # the MLP's c_fc, c_proj


def count_params(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, with the padded vocabulary."""
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    counts = {
        "wte": V * C,
        "value_embeds": V * config.kv_dim * sum(config.has_value_embed(layer) for layer in range(L)),
        "lm_head": V * C,
        "transformer_matrices": sum(rows * cols for layer in range(L) for rows, cols in list_matrices(config, layer)),
        "scalars": 2 * L + SMEAR_GATE_CHANNELS + 2,  # resid and x0 lambdas; smear's gate; smear and backout lambdas
    }
    return counts | {"total": sum(counts.values())}


def estimate_flops(config: GPTConfig, row_tokens: int | None = None) -> float:
    """Training FLOPs per token, in rows of the context or of row_tokens: 6 per matrix parameter, 12 * H * D per key of
    the window, those hidden by the causal mask included, as is usual for MFU (PaLM, arXiv 2204.02311, appendix B)."""
    counts = count_params(config)
    matmul_params = counts["transformer_matrices"] + counts["lm_head"] + SMEAR_GATE_CHANNELS
    keys_seen = sum(min(config.window(i), row_tokens or config.sequence_len) for i in range(config.n_layer))
    return 6 * matmul_params + 12 * config.n_head * config.head_dim * keys_seen
