"""The shape of a model, and its parameters and FLOPs by formula. Needs no torch, so that scripts.plan answers at once;
tests/test_config.py compares the formulas with the modules and with torch's counter of FLOPs.

B rows, T tokens, C = n_embd channels, H query heads, Hk key/value heads, D head dim, V vocabulary.
"""

import math
from dataclasses import dataclass, fields

from nanochat.common import UserError

SMEAR_GATE_CHANNELS = 24      # channels that gate the smear
VOCAB_MULTIPLE = 64           # the vocabulary is padded to this, for the matrix units
MLP_MATRICES = {"relu2": 2, "swiglu": 3}    # by activation
ROPE_LENGTHS = 10             # of the rotary table, in contexts: chats may outgrow the training context
OLDER = {"key_offset": 0.0, "fp32_embeds": False}    # knobs added later, by the value of the models saved before them
GONE = {"bigram_rows": 0}     # knobs taken out, by the value of the models that can still be read
# The least that a number of a model may be, where that isn't 0
LEAST = {"vocab_size": 1, "backout_layer": -1, "rope_base": 1} | dict.fromkeys(
    ("backout_init", "resid_init", "x0_init"), -math.inf)
# The most, beyond any model that could be trained; counting such parameters would take for ever
MOST = {"n_layer": 1000} | dict.fromkeys(
    ("sequence_len", "vocab_size", "n_head", "n_kv_head", "n_embd", "attn_dim", "mlp_dim", "num_experts"), 2**24)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; saved with its weights."""
    sequence_len:   int = 2048
    vocab_size:     int = 32768
    n_layer:        int = 12
    n_head:         int = 6       # query heads
    n_kv_head:      int = 6       # key/value heads; fewer than n_head is grouped-query attention
    n_embd:         int = 768
    window_pattern: str = "SSSL"  # tiled over the layers, the last always L: L whole context, S a part of it
    # Knobs, each by its default as in the model of today; presets.py has the values of other models of the family
    window_fraction:  float = 0.25         # of the context, S's part
    attn_dim:         int   = 0            # channels of all query heads together; 0: n_embd
    mlp_dim:          int   = 0            # hidden channels of the MLP; 0: 4 n_embd
    mlp_act:          str   = "relu2"      # or swiglu, which has a third matrix
    rope_base:        float = 100_000.0    # slow turns tell far positions apart
    rope_fraction:    float = 1.0          # of each head, the part that turns
    key_offset:       float = 0.5          # of each key, the part that is the token before's, in layers of L; 0: none
    qk_scale:         float = 1.2          # of normed queries and keys; 0: neither normed nor scaled
    ve_gate_channels: int   = 12           # that gate the value embeddings; 0: no value embeddings
    ve_gate_scale:    float = 3.0          # the most that a gate lets through
    ve_gate_init:     float = 0.02         # bound of the gates' initial weights
    smear:            bool  = True
    backout_layer:    int | None = None    # whose output is subtracted at the end; None: the middle one; -1: none
    backout_init:     float = 0.2
    resid_init: tuple[float, float] | None = (1.15, 1.05)    # of the first and the last layer's; None: no such factors
    x0_init:    tuple[float, float] | None = (0.20, 0.05)
    softcap:          float = 15.0         # bound of the logits; 0: none
    embed_norm:       bool  = True
    wte_std:          float = 0.8          # of initial embeddings
    fp32_embeds:      bool  = False        # beside bf16 activations, too: at a rate of .001 bf16 loses most updates
    head_std:         float = 0.001        # of the head's initial weights
    linear_init:      str   = "uniform"    # law of the other matrices, or normal; deviation 1/sqrt(inputs)
    fc_init:          float = 0.4          # factor on this deviation in the MLP's first layer
    num_experts:      int   = 0            # that a router chooses from, beside a shared one (moe.py); 0: a dense model
    top_k:            int   = 1            # experts of a token
    moe_every:        int   = 1            # every so many layers have experts; 2: those without value embeddings

    def __post_init__(self):
        for name in ("resid_init", "x0_init"):    # JSON has lists
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, value in vars(self).items():
            for number in value if isinstance(value, tuple) else [value]:
                least = LEAST.get(name, 0)
                if isinstance(number, int | float) and not (math.isfinite(number) and number >= least):
                    raise UserError(f"a model's {name} can't be {number:g}; it must be a finite number" +
                                    (f" of at least {least}" if math.isfinite(least) else ""))
                if name in MOST and number > MOST[name]:
                    raise UserError(f"a model's {name} can't be {number:,}; it must be at most {MOST[name]:,}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"--window-pattern {self.window_pattern!r} must be made of the letters S and L, as in SSSL")
        if self.query_dim % self.n_head or self.n_head % self.n_kv_head or (self.query_dim // self.n_head) % 2:
            raise UserError(f"{self.query_dim} channels don't split into {self.n_head} heads of even size "
                            f"in groups of {self.n_kv_head}")
        for what, least in (("smear", SMEAR_GATE_CHANNELS * self.smear), ("value embeddings'", self.ve_gate_channels)):
            if self.n_embd < least:
                raise UserError(f"{self.n_embd} channels are too few; the {what} gate alone reads {least}")
        for name, values in (("mlp_act", MLP_MATRICES), ("linear_init", ("uniform", "normal"))):
            if getattr(self, name) not in values:
                raise UserError(f"--knobs {name}={getattr(self, name)} is not one of {', '.join(values)}")
        for name in ("window_fraction", "rope_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--knobs {name}={getattr(self, name):g} must be above 0 and at most 1")
        if self.key_offset > 1:
            raise UserError(f"--knobs key_offset={self.key_offset:g} must be at most 1")
        if self.middle_layer is not None and not 0 <= self.middle_layer < self.n_layer:
            raise UserError(f"--knobs backout_layer={self.backout_layer} is no layer of {self.n_layer}; -1 is none")
        self._check_experts()

    def _check_experts(self) -> None:
        E, k, every = self.num_experts, self.top_k, self.moe_every
        for is_wrong, what in (
                (not E and k != 1, f"top_k={k} goes with num_experts, which is 0: a dense model"),
                (not E and every != 1, f"moe_every={every} goes with num_experts, which is 0: a dense model"),
                (E and not 1 <= k <= E, f"top_k={k} must be from 1 to the {E} experts of num_experts"),
                (E and not 1 <= every <= self.n_layer, f"moe_every={every} must be from 1 to {self.n_layer} layers"),
                (E and self.mlp_act != "relu2", f"num_experts={E} goes with mlp_act=relu2, not {self.mlp_act}")):
            if is_wrong:
                raise UserError(f"--knobs {what}")

    @property
    def query_dim(self) -> int:
        return self.attn_dim or self.n_embd

    @property
    def head_dim(self) -> int:
        return self.query_dim // self.n_head

    @property
    def hidden_dim(self) -> int:
        return self.mlp_dim or 4 * self.n_embd

    @property
    def expert_dim(self) -> int:
        """Hidden channels of an expert: a token's experts, the shared one among them, compute what the dense MLP would,
        rounded up for the matrix units."""
        return math.ceil(self.hidden_dim / (self.top_k + 1) / 128) * 128

    @property
    def middle_layer(self) -> int | None:
        """The layer whose output backout subtracts."""
        return {None: self.n_layer // 2, -1: None}.get(self.backout_layer, self.backout_layer)

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def has_value_embed(self, layer: int) -> bool:
        """Every other layer, the last one included."""
        return self.ve_gate_channels > 0 and layer % 2 == (self.n_layer - 1) % 2

    def has_experts(self, layer: int) -> bool:
        """Counted from the end: of every two layers those that have no value embeddings, so that each has one kind of
        sparse capacity (assumption, not studied)."""
        return self.num_experts > 0 and (self.n_layer - layer) % self.moe_every == 0

    def has_whole_context(self, layer: int) -> bool:
        return layer == self.n_layer - 1 or self.window_pattern[layer % len(self.window_pattern)] == "L"

    def count_offset_pairs(self, layer: int) -> int:
        """Pairs of a key's channels, of those that turn slowest, that are those of the token before."""
        if not self.key_offset or not self.has_whole_context(layer):
            return 0
        return max(1, round(self.key_offset * (self.head_dim // 2)))

    def window(self, layer: int) -> int:
        """Number of tokens before itself that a token of this layer sees; from the context, not the input's length.

        Short windows (as in Gemma 2, arXiv 2408.00118) save attention's FLOPs. From half the context to a quarter, with
        smear, backout and ratio 8: 1.80 -> 1.65 hours (see gpt.py)."""
        return self.sequence_len if self.has_whole_context(layer) else \
            math.ceil(self.sequence_len * self.window_fraction / 128) * 128


def read_config(saved: dict) -> GPTConfig:
    """The config that a checkpoint holds; a knob that it doesn't name is as it was before it had a name."""
    saved = {name: value for name, value in saved.items() if value != GONE.get(name, ())}
    if unknown := sorted(saved.keys() - {field.name for field in fields(GPTConfig)}):
        raise UserError(f"the checkpoint's model has knobs that this nanochat doesn't know ({', '.join(unknown)}); use "
                        "the nanochat that trained it" + ("" if GONE.keys() & unknown else ", or a newer one"))
    return GPTConfig(**OLDER | saved)


def list_matrices(config: GPTConfig, layer: int) -> list[tuple[int, int]]:
    """(rows, columns) of a block's matrices that aren't a routed expert's or the router's."""
    C, Q, kv_dim = config.n_embd, config.query_dim, config.kv_dim
    hidden = config.expert_dim if config.has_experts(layer) else config.hidden_dim
    attention = [(Q, C), (kv_dim, C), (kv_dim, C), (C, Q)]  # c_q, c_k, c_v, c_proj
    gate = [(config.n_kv_head, config.ve_gate_channels)] if config.has_value_embed(layer) else []
    mlp = [(hidden, C)] * (MLP_MATRICES[config.mlp_act] - 1) + [(C, hidden)]    # c_fc, swiglu's c_gate; c_proj
    return [*attention, *gate, *mlp]


def list_by_head(config: GPTConfig, layer: int) -> list[tuple[int, int]]:
    """Of these, queries and keys of several heads, which Muon may orthogonalise head by head."""
    return [shape for shape in list_matrices(config, layer)[:2] if shape[0] > config.head_dim]


def count_params(config: GPTConfig) -> dict[str, int]:
    """Parameters by part, with the padded vocabulary. Of a mixture of experts the transformer's matrices are the active
    ones, which compute for a token; `inactive_experts` are the others, in the total alone."""
    C, L, V = config.n_embd, config.n_layer, config.padded_vocab_size
    num_moe, expert = sum(map(config.has_experts, range(L))), 2 * C * config.expert_dim
    inactive = num_moe * (config.num_experts - config.top_k) * expert
    counts = {
        "wte": V * C,
        "value_embeds": V * config.kv_dim * sum(config.has_value_embed(layer) for layer in range(L)),
        "lm_head": V * C,
        "transformer_matrices": sum(rows * cols for layer in range(L) for rows, cols in list_matrices(config, layer)) +
                                num_moe * (config.top_k * expert + config.num_experts * C),
        # resid and x0 lambdas; smear's gate and lambda; backout's
        "scalars": L * ((config.resid_init is not None) + (config.x0_init is not None)) +
                   (SMEAR_GATE_CHANNELS + 1) * config.smear + (config.middle_layer is not None),
        **({"inactive_experts": inactive} if inactive else {}),
    }
    return counts | {"total": sum(counts.values())}


def count_active(counts: dict[str, int]) -> int:
    """All parameters but those of experts that a token doesn't use."""
    return counts["total"] - counts.get("inactive_experts", 0)


def describe_params(counts: dict[str, int]) -> str:
    """For people: '36,700,196 parameters', of a mixture of experts the active ones, too."""
    active = count_active(counts)
    return f"{active:,} active parameters of {counts['total']:,}" if active < counts["total"] else \
        f"{active:,} parameters"


def estimate_flops(config: GPTConfig, row_tokens: int | None = None) -> float:
    """Training FLOPs per token, in rows of the context or of row_tokens: 6 per active matrix parameter, 12 * H * D per
    key of the window, those hidden by the causal mask included, as is usual for MFU (PaLM, arXiv 2204.02311, appendix
    B)."""
    counts = count_params(config)
    matmul_params = counts["transformer_matrices"] + counts["lm_head"] + SMEAR_GATE_CHANNELS * config.smear
    keys_seen = sum(min(config.window(i), row_tokens or config.sequence_len) for i in range(config.n_layer))
    return 6 * matmul_params + 12 * config.n_head * config.head_dim * keys_seen


def count_marin_flops(config: GPTConfig, row_tokens: int | None = None) -> int:
    """Forward FLOPs per token as marin's leaderboard counts them (levanter's lm_flops_per_token), in rows of the
    context or of row_tokens: the head, the whole square of scores in every layer, windows or not, and 3 for each
    score's mask and softmax; no embedding, no gates. Training is three times that."""
    C, T, Q, L = config.n_embd, row_tokens or config.sequence_len, config.query_dim, config.n_layer
    num_moe = sum(map(config.has_experts, range(L)))
    mlp = 2 * MLP_MATRICES[config.mlp_act] * C * config.hidden_dim
    moe = 2 * 2 * C * config.expert_dim * (config.top_k + 1) + 2 * C * config.num_experts    # and the router
    projections = 2 * C * (Q + 2 * config.kv_dim) + 2 * C * Q
    scores = 2 * T * Q + 3 * T * config.n_head + 2 * T * Q
    return L * (projections + scores) + (L - num_moe) * mlp + num_moe * moe + 2 * C * config.vocab_size
