"""Depth -> every other number: model shape, horizon, batch size, learning rates, and their schedules. Pure functions.

Figures and formulas are those of nanochat's public record (January-July 2026), with the papers named beside them, but
Muon by heads (dev/LOG.md, "Muon by heads") and the batch of small budgets, which we measured; other models of the
family have a TrainingRule of their own (presets.py). In the record a depth-24 model of GPT-2's CORE score (0.2565) took
3.04 hours on 8 H100 at first and 1.65 at last: batches of 1M tokens cut 2.91 hours to 2.76; tuned rates, betas, decay,
initial weights and RoPE base 2.02 to 1.80.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.config import GPTConfig, count_active, count_params, estimate_flops

REFERENCE_DEPTH = 12               # depth at which batch size, learning rates and weight decay were tuned
REFERENCE_RATIO = 12               # its tokens per scaling parameter
REFERENCE_BATCH_TOKENS = 2**19     # and its batch
BATCH_EXPONENT = 0.383             # optimal batch ~ tokens^0.383 (arXiv 2505.13738)
MAX_STEPS, MAX_BATCH_TOKENS = 10**9, 2**28    # beyond any run
SMALL_TOKENS, SMALL_BATCH_TOKENS = 10e6, 7168    # at a small budget (dev/LOG.md, "The dial where budgets are small")

# Learning rates at the reference batch and, for the first two, at 768 channels; ADAM_GROUPS has the groups
EMBEDDING_LR   = 0.3
UNEMBEDDING_LR = 0.008
MATRIX_LR      = 0.02              # Muon's
SCALAR_LR      = 0.5
WEIGHT_DECAY   = 0.28              # Muon's, at the reference depth and batch
# Their schedule, see get_lr_frac
WARMUP_STEPS   = 40
WARMDOWN_RATIO = 0.65
FINAL_LR_FRAC  = 0.05


class AdamGroup(NamedTuple):
    """Parameters that AdamW updates with the same figures."""
    name:         str           # of ADAM_GROUPS; or matrices, which are Muon's where no group has them
    rate:         str           # the flag with its learning rate; "" where none has it
    factor:       float         # on this rate
    scaling:      str           # of the rate: by "width" and batch, by "batch", or ""
    betas:        tuple[float, float]
    weight_decay: float


ADAM_GROUPS = (
    AdamGroup("lm_head",       "unembedding_lr", 1.0,   "width", (0.8,  0.96),  0.01),
    AdamGroup("wte",           "embedding_lr",   1.0,   "width", (0.8,  0.995), 0.001),
    AdamGroup("value_embeds",  "embedding_lr",   0.5,   "width", (0.8,  0.995), 0.01),
    AdamGroup("resid_lambdas", "scalar_lr",      0.01,  "batch", (0.8,  0.95),  0.05),
    AdamGroup("x0_lambdas",    "scalar_lr",      1.0,   "batch", (0.96, 0.95),  0.0),
    # Of smear and backout
    AdamGroup("gates",         "",               0.2,   "",      (0.8,  0.95),  0.0),
    # Of experts. .0025 to .01 were as good, .02 worse than a frozen random router (nanochat's branch of July 2026)
    AdamGroup("routers",       "",               0.005, "width", (0.8,  0.96),  0.0),
)


@dataclass(frozen=True)
class TrainingRule:
    """How weights are updated, and how the figures of an update move during a run: all that no flag sets. OURS is
    the dial's; presets.py has its predecessors' and those of other models of the family."""
    adam:             tuple[AdamGroup, ...] = ADAM_GROUPS
    adam_eps:         float = 1e-10
    max_norm:         float | None = None    # to which the gradients of all AdamW groups together are clipped
    muon:             dict  = field(default_factory=dict)    # what optim.MuonRule has otherwise
    beta2:            float = 0.9            # Muon's
    momentum:         tuple[float, float, float] = (0.85, 0.97, 0.90)    # Muon's: first, highest, last
    momentum_steps:   int   = 400            # from the first to the highest
    warmdown:         str   = "linear"       # of the learning rate; or "cosine"
    decay_fall:       str   = "cosine"       # of Muon's weight decay, over the whole run; or "linear", "none"
    decay_scaling:    str   = "horizon"      # of Muon's weight decay; or "depth", "none"
    batch_from:       str   = "horizon"      # what batch and learning rates follow from; or "size" (see make_plan)
    scales_to_batch:  bool  = True           # whether learning rates follow the batch
    ratio_counts_all: bool  = False          # whether the ratio of a horizon counts the embeddings' parameters too

    @property
    def groups(self) -> tuple[AdamGroup, ...]:
        """AdamW's, with ours for parts that the rule's own model doesn't have, but a knob may add."""
        names = {group.name for group in self.adam}
        return (*self.adam, *(group for group in ADAM_GROUPS if group.name not in names))

    @property
    def has_muon(self) -> bool:
        return all(group.name != "matrices" for group in self.adam)


OURS   = TrainingRule(muon={"by_heads": True})
JULY26 = TrainingRule(batch_from="size")


def make_config(depth: int, *, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128,
                window_pattern: str = "SSSL", **knobs) -> GPTConfig:
    """The model of a given depth: width = depth * aspect_ratio, rounded up to whole heads; knobs: of GPTConfig,
    a shape of its own included."""
    if depth < 1 or aspect_ratio < 1 or head_dim < 2 or head_dim % 2 or sequence_len < 1:
        raise UserError(f"no model has --depth {depth} --aspect-ratio {aspect_ratio} --head-dim {head_dim} "
                        f"--max-seq-len {sequence_len}: all must be at least 1, the head dim even")
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    shape = {"n_layer": depth, "n_head": n_head, "n_kv_head": n_head, "n_embd": n_head * head_dim}
    if depth < 3:    # n_layer // 2 is the last: the final norm hides the factor, whose noise one day turns the sign
        shape["backout_layer"] = -1
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, window_pattern=window_pattern, **shape | knobs)


def count_scaling_params(config: GPTConfig, counts_all: bool = False) -> int:
    """The parameter count that horizons are multiples of: transformer matrices and lm_head, or all but the scalars; of
    a mixture of experts those that are active for a token."""
    counts = count_params(config)
    return count_active(counts) - counts["scalars"] if counts_all else \
        counts["transformer_matrices"] + counts["lm_head"]


@dataclass(frozen=True)
class ShortRows:
    """One stage of the sequence-length warm-up: steps whose rows are shorter than the context."""
    end_step:        int      # the first step after the stage
    row_tokens:      int
    flops_per_token: float    # fewer than in whole rows, which see more keys


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that follow from its depth and a few choices; saved in run.json."""
    num_iterations: int       # optimizer steps
    batch_tokens: int         # tokens of one step, all ranks together
    target_tokens: int        # the horizon's: ratio * scaling params, in chat stages the epochs' tokens
    total_tokens: int         # num_iterations * batch_tokens
    flops_per_token: float    # training FLOPs of whole rows, forward and backward
    total_flops: float
    tokens_per_param: float   # total_tokens / scaling params
    batch_lr_scale: float     # multiplies the learning rates (except smear's and backout's)
    weight_decay: float       # Muon's, before its schedule
    horizon: str              # the flag that decided it: iterations, flops, ratio or epochs
    short_rows: list[ShortRows] | None = None    # stages of the sequence-length warm-up
    lr_batch_tokens: float = REFERENCE_BATCH_TOKENS    # the batch at which rates aren't scaled, for later stages

    def get_row_tokens(self, step: int, T: int) -> int:
        """Tokens of a row at a step: T, or fewer during the warm-up."""
        return next((stage.row_tokens for stage in self.short_rows or () if step < stage.end_step), T)

    def count_flops(self, num_steps: int) -> float:
        """Training FLOPs of the first `num_steps`."""
        flops = self.flops_per_token * self.batch_tokens * num_steps
        return flops - count_saved_flops(self.short_rows, self.flops_per_token, self.batch_tokens, num_steps)


def count_saved_flops(short_rows: list[ShortRows] | None, flops_per_token: float, batch_tokens: int,
                      num_steps: float = math.inf) -> float:
    """FLOPs that short rows save in the first `num_steps`."""
    saved = first_step = 0
    for stage in short_rows or ():
        stage_steps = max(0, min(num_steps, stage.end_step) - first_step)
        saved += stage_steps * batch_tokens * (flops_per_token - stage.flops_per_token)
        first_step = stage.end_step
    return saved


def make_short_rows(text: str, config: GPTConfig) -> list[ShortRows]:
    """The stages of --seq-len-warmup START:STEPS: rows of START tokens, then of twice as many, ..., for STEPS in all.

    Sequence-length warm-up (after arXiv 2108.06084) splits each row into several shorter rows; the token count of a
    step stays the same, and with it every schedule. Lengths double, so that few kernels are compiled. It saves
    attention's FLOPs; at depth 4 it didn't help (dev/LOG.md, "Sequence length warm-up: short rows first").
    """
    try:
        start, num_steps = map(int, text.split(":"))
    except ValueError:
        raise UserError(f"--seq-len-warmup {text} must be START:STEPS, the tokens of the first rows and for how many "
                        "steps rows are short, as in 256:100") from None
    T = config.sequence_len
    starts = [T >> k for k in range(1, T.bit_length()) if T % (1 << k) == 0]
    if not starts:
        raise UserError(f"--seq-len-warmup {text}: a context of {T} tokens can't be halved; set an even --max-seq-len")
    if start not in starts:
        raise UserError(f"--seq-len-warmup {text}: START must be the context of {T} tokens halved once or more, "
                        f"{', '.join(map(str, starts))}")
    num_stages = starts.index(start) + 1
    if num_steps < num_stages:
        raise UserError(f"--seq-len-warmup {text}: STEPS must be at least {num_stages}, one for each length from "
                        f"{start} to {T // 2}")
    return [ShortRows((k + 1) * num_steps // num_stages, start << k, estimate_flops(config, start << k))
            for k in range(num_stages)]


def make_plan(config: GPTConfig, flops_per_token: float, *, num_iterations: int | None = None,
              target_flops: float | None = None, target_param_data_ratio: float = REFERENCE_RATIO,
              batch_tokens: int | None = None, step_multiple: int = 1, weight_decay: float = WEIGHT_DECAY,
              seq_len_warmup: str | None = None, rule: TrainingRule = OURS) -> Plan:
    """Horizon, batch and hyper-parameter scales of a pretraining run.

    The horizon is num_iterations or target_flops, else target_param_data_ratio (tokens per scaling param), from which
    batch and weight decay follow even where another is given.
    A batch that isn't given is rounded to a multiple of step_multiple, all ranks' rows.

    For models smaller than the reference it is the best for the horizon's tokens, or for the ratio's where only the
    number of steps is given. Learning rates are the reference's from the best batch up to the reference's; below and
    above, they follow the root of the batch. For larger models, and by a rule whose batch is from "size", that of the
    public record holds: the batch follows from the size alone, rates follow the root of the batch everywhere.
    """
    for flag, value, most in (("--target-param-data-ratio", target_param_data_ratio, 1e6),
                              ("--target-flops", target_flops, 1e30)):
        if value is not None and not 0 < value <= most:
            raise UserError(f"{flag} {value:g} must be a positive number of at most {most:g}")
    if num_iterations is not None and target_flops is not None:
        raise UserError("--num-iterations and --target-flops are two horizons; give one of them")
    check_counts(num_iterations=num_iterations, total_batch_size=batch_tokens)
    horizon = "iterations" if num_iterations else "flops" if target_flops is not None else "ratio"
    reference = make_config(REFERENCE_DEPTH, vocab_size=config.vocab_size, sequence_len=config.sequence_len,
                            window_pattern=config.window_pattern)
    size, reference_size = (count_scaling_params(model, rule.ratio_counts_all) for model in (config, reference))
    target_tokens, reference_tokens = (int(target_param_data_ratio * num) for num in (size, reference_size))
    if target_tokens < 1:
        raise UserError(f"--target-param-data-ratio {target_param_data_ratio:g} gives less than one token")
    is_small = rule.batch_from == "horizon" and size < 0.95 * reference_size    # not for want of a few gates
    num_tokens: float = target_flops / flops_per_token if horizon == "flops" else target_tokens
    tuned_tokens = REFERENCE_RATIO * reference_size    # for which the reference's batch was tuned
    if batch_tokens is None:
        best = get_best_batch(num_tokens, tuned_tokens) if is_small else \
            REFERENCE_BATCH_TOKENS * (target_tokens / reference_tokens) ** BATCH_EXPONENT
        batch_tokens = max(1, round(2 ** round(math.log2(best)) / step_multiple)) * step_multiple
    lr_batch_tokens: float = REFERENCE_BATCH_TOKENS
    if is_small:
        num_tokens = num_iterations * batch_tokens if horizon == "iterations" else num_tokens
        lr_batch_tokens = min(max(batch_tokens, get_best_batch(num_tokens, tuned_tokens)), lr_batch_tokens)
    short_rows = make_short_rows(seq_len_warmup, config) if seq_len_warmup is not None else None
    saved_flops = count_saved_flops(short_rows, flops_per_token, batch_tokens)
    if horizon == "flops":
        num_iterations = round((target_flops + saved_flops) / (flops_per_token * batch_tokens))
    elif horizon == "ratio":
        num_iterations = target_tokens // batch_tokens
    if num_iterations < 1:
        raise UserError(f"the horizon ({horizon}) is shorter than one step of {batch_tokens} tokens; "
                        "set a smaller --total-batch-size or a longer horizon")
    if short_rows and short_rows[-1].end_step > num_iterations:
        raise UserError(f"--seq-len-warmup {seq_len_warmup} is longer than the run of {num_iterations} steps; give it "
                        "fewer steps")
    batch_lr_scale = get_batch_lr_scale(batch_tokens, lr_batch_tokens) if rule.scales_to_batch else 1.0
    if rule.decay_scaling == "horizon":
        # The decay's time constant, 1 / (rate * decay) steps, is the same part of a run of the same ratio, for every
        # size and batch (T_epoch, arXiv 2405.13698)
        weight_decay *= batch_lr_scale * (lr_batch_tokens / REFERENCE_BATCH_TOKENS)
        weight_decay = weight_decay * reference_tokens / target_tokens
    elif rule.decay_scaling == "depth":
        weight_decay = weight_decay * (REFERENCE_DEPTH / config.n_layer) ** 2
    return _fill_plan(config, flops_per_token, num_iterations=num_iterations, batch_tokens=batch_tokens,
                      target_tokens=target_tokens, horizon=horizon, batch_lr_scale=batch_lr_scale,
                      weight_decay=weight_decay, short_rows=short_rows, lr_batch_tokens=lr_batch_tokens)


def get_best_batch(num_tokens: float, reference_tokens: float) -> float:
    """Tokens of a batch for a horizon of num_tokens; reference_tokens: those at which it is the reference's.

    Measured for 1 to 10 M tokens, at depths 2 and 4, it grows there as the paper has it, but from a batch that is a
    twelfth of what the paper's law and the reference give. Between both nothing was measured: a parabola in log-log
    leaves the small budgets along their law and ends at the reference.
    """
    if num_tokens >= reference_tokens:
        return REFERENCE_BATCH_TOKENS * (num_tokens / reference_tokens) ** BATCH_EXPONENT
    part = max(0.0, math.log(num_tokens / SMALL_TOKENS) / math.log(reference_tokens / SMALL_TOKENS))
    at_reference = SMALL_BATCH_TOKENS * (reference_tokens / SMALL_TOKENS) ** BATCH_EXPONENT
    return (SMALL_BATCH_TOKENS * (num_tokens / SMALL_TOKENS) ** BATCH_EXPONENT
            * (REFERENCE_BATCH_TOKENS / at_reference) ** part ** 2)


def get_batch_lr_scale(batch_tokens: float, lr_batch_tokens: float = REFERENCE_BATCH_TOKENS) -> float:
    """Factor on learning rates, the square root of the batch: Adam's (arXiv 2205.10287) and, by assumption, Muon's."""
    return math.sqrt(batch_tokens / lr_batch_tokens)


def check_counts(**counts: int | list[int] | None) -> None:
    """Refuse numbers below 1; each is named as its flag."""
    for name, values in counts.items():
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def _fill_plan(config: GPTConfig, flops_per_token: float, *, weight_decay: float = 0.0, **decided) -> Plan:
    """A plan with the totals that follow from what was decided."""
    num_steps, batch_tokens = decided["num_iterations"], decided["batch_tokens"]
    if num_steps > MAX_STEPS or batch_tokens > MAX_BATCH_TOKENS:
        raise UserError(f"a run of {num_steps:,} steps of {batch_tokens:,} tokens is out of reach; it may have "
                        f"{MAX_STEPS:,} steps of {MAX_BATCH_TOKENS:,} tokens")
    total_tokens = num_steps * batch_tokens
    saved_flops = count_saved_flops(decided.get("short_rows"), flops_per_token, decided["batch_tokens"])
    return Plan(flops_per_token=flops_per_token, total_tokens=total_tokens, weight_decay=weight_decay,
                total_flops=flops_per_token * total_tokens - saved_flops,
                tokens_per_param=total_tokens / count_scaling_params(config), **decided)


def make_chat_plan(config: GPTConfig, flops_per_token: float, *, epoch_rows: int, num_epochs: int = 1,
                   num_iterations: int | None = None, batch_tokens: int, scales_lr: bool = True,
                   lr_batch_tokens: float = REFERENCE_BATCH_TOKENS) -> Plan:
    """Horizon of midtraining or SFT: num_iterations, or else whole epochs of `epoch_rows` rows, of which the last step
    takes what is left. No Muon weight decay. scales_lr: whether learning rates are scaled to the batch, from the batch
    at which the base model's weren't."""
    check_counts(num_iterations=num_iterations, num_epochs=num_epochs, total_batch_size=batch_tokens)
    T, num_rows = config.sequence_len, num_epochs * epoch_rows
    return _fill_plan(config, flops_per_token, horizon="iterations" if num_iterations else "epochs",
                      num_iterations=num_iterations or -(-num_rows // (batch_tokens // T or 1)),
                      batch_tokens=batch_tokens, target_tokens=num_rows * T,
                      batch_lr_scale=get_batch_lr_scale(batch_tokens, lr_batch_tokens) if scales_lr else 1.0,
                      lr_batch_tokens=lr_batch_tokens)


def make_rl_plan(config: GPTConfig, flops_per_token: float, *, num_questions: int, num_epochs: int = 1,
                 num_iterations: int | None = None, examples_per_step: int, num_samples: int,
                 max_new_tokens: int, batch_lr_scale: float) -> Plan:
    """Horizon of RL: num_iterations, or else whole epochs of `num_questions` questions. No Muon weight decay.

    Tokens are counted as if every answer had max_new_tokens. An answer teaches a few bits, however long it is, so
    learning rates aren't scaled to this batch: batch_lr_scale is that of the stage before.
    """
    check_counts(num_iterations=num_iterations, num_epochs=num_epochs, examples_per_step=examples_per_step)
    if num_samples < 2:
        raise UserError(f"--num-samples {num_samples} must be at least 2: an answer is compared with the others to its "
                        "question")
    question_tokens = num_samples * max_new_tokens
    return _fill_plan(config, flops_per_token, horizon="iterations" if num_iterations else "epochs",
                      num_iterations=num_iterations or -(-num_epochs * num_questions // examples_per_step),
                      batch_tokens=examples_per_step * question_tokens,
                      target_tokens=num_epochs * num_questions * question_tokens, batch_lr_scale=batch_lr_scale)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, all of step `it` (0-based) of `n`


def get_lr_frac(it: int, n: int, *, warmup_steps: int = WARMUP_STEPS, warmdown_ratio: float = WARMDOWN_RATIO,
                final_lr_frac: float = FINAL_LR_FRAC, warmdown: str = "linear") -> float:
    """Learning-rate factor of all stages: linear warm-up, constant, warm-down to `final_lr_frac`: linear (a trapezoid,
    arXiv 2405.18392), or along half a cosine."""
    warmup = min(warmup_steps, n // 10)  # so that a short run isn't all warm-up
    if it < warmup:
        return (it + 1) / warmup
    progress = get_warmdown(it, n, warmdown_ratio)
    if warmdown == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return progress + (1 - progress) * final_lr_frac


def get_warmdown(it: int, n: int, ratio: float) -> float:
    """1 until the last `ratio` of the run, then linearly towards 0."""
    num_steps = round(ratio * n)
    return 1.0 if it <= n - num_steps else (n - it) / num_steps


def get_muon_momentum(it: int, n: int, *, warmdown_ratio: float = WARMDOWN_RATIO,
                      rule: TrainingRule = OURS) -> float:
    """Muon's momentum: up over some hundred steps (fewer in a short run), then down while the learning rate decays.

    The ramps are modded-nanogpt's. Why they help, a guess: early gradients turn fast, and so outdate an average.
    """
    first, highest, last = rule.momentum
    ramp_steps = min(rule.momentum_steps, max(1, round(0.35 * n)))
    if it < ramp_steps:
        return first + (highest - first) * it / ramp_steps
    return last + (highest - last) * get_warmdown(it, n, warmdown_ratio)


def get_weight_decay_frac(it: int, n: int, fall: str = "cosine") -> float:
    """Factor on Muon's weight decay: from 1 to 0, so that the last steps don't shrink the weights; 1 for "none"."""
    return {"cosine": (1 + math.cos(math.pi * it / n)) / 2, "linear": 1 - it / n, "none": 1.0}[fall]


def get_chat_momentum(it: int) -> float:
    """Muon's momentum in midtraining, SFT and RL: .85 -> .95 over 300 steps (in SFT and RL an assumption)."""
    return 0.85 + (0.95 - 0.85) * min(it / 300, 1)
