"""Depth -> every other number: model shape, horizon, batch size, learning rates, and their schedules. Pure functions.

Figures and formulas: the public record of nanochat (January-July 2026), with the papers named beside them.
"""

import math
from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.config import GPTConfig, count_params, estimate_flops

REFERENCE_DEPTH = 12               # the depth at which batch size, learning rates and weight decay were tuned
REFERENCE_BATCH_TOKENS = 2**19     # and its batch
BATCH_EXPONENT = 0.383             # optimal batch ~ tokens^0.383, arXiv 2505.13738
# Defaults of scripts.base_train
EMBEDDING_LR, UNEMBEDDING_LR, MATRIX_LR, SCALAR_LR = 0.3, 0.008, 0.02, 0.5
WEIGHT_DECAY, WARMUP_STEPS, WARMDOWN_RATIO, FINAL_LR_FRAC = 0.28, 40, 0.65, 0.05


def make_config(depth: int, *, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128,
                window_pattern: str = "SSSL") -> GPTConfig:
    """The model of a given depth: width = depth * aspect_ratio, rounded up to whole heads."""
    if depth < 1 or aspect_ratio < 1 or head_dim < 2 or head_dim % 2 or sequence_len < 1:
        raise UserError(f"no model has --depth {depth} --aspect-ratio {aspect_ratio} --head-dim {head_dim} "
                        f"--max-seq-len {sequence_len}: all must be at least 1, the head dim even")
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    return GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=depth, n_head=n_head, n_kv_head=n_head,
                     n_embd=n_head * head_dim, window_pattern=window_pattern.upper())


def count_scaling_params(config: GPTConfig) -> int:
    """The parameter count that horizons are multiples of: transformer matrices and lm_head."""
    counts = count_params(config)
    return counts["transformer_matrices"] + counts["lm_head"]


@dataclass(frozen=True)
class ShortRows:
    """One stage of a sequence length warm-up: steps whose rows are shorter than the context."""
    end_step:        int      # the first step after it
    row_tokens:      int
    flops_per_token: float    # fewer than in whole rows, since fewer keys are seen


@dataclass(frozen=True)
class Plan:
    """Everything about a run that follows from the dial and a few choices; saved in run.json."""
    num_iterations: int       # optimizer steps
    batch_tokens: int         # tokens of one step, all ranks together
    target_tokens: int        # what the horizon asks for: ratio * scaling params, in chat stages the epochs' tokens
    total_tokens: int         # num_iterations * batch_tokens
    flops_per_token: float    # training FLOPs of whole rows, forward and backward
    total_flops: float
    tokens_per_param: float   # total_tokens / scaling params
    batch_lr_scale: float     # multiplies the learning rates (but smear's and backout's)
    weight_decay: float       # Muon's, before its schedule
    horizon: str              # which of the ways of giving a horizon decided: iterations, flops, ratio or epochs
    short_rows: list[ShortRows] | None = None    # stages of the sequence length warm-up, if there is one

    def get_row_tokens(self, step: int, T: int) -> int:
        """Tokens of a row at a step: T, or fewer during the warm-up."""
        return next((stage.row_tokens for stage in self.short_rows or () if step < stage.end_step), T)

    def count_flops(self, num_steps: int) -> float:
        """Training FLOPs of the first `num_steps`."""
        flops = self.flops_per_token * self.batch_tokens * num_steps
        return flops - count_saved_flops(self.short_rows, self.flops_per_token, self.batch_tokens, num_steps)


def count_saved_flops(short_rows: list[ShortRows] | None, flops_per_token: float, batch_tokens: int,
                      num_steps: float = math.inf) -> float:
    """How many FLOPs less than with whole rows the first `num_steps` take."""
    saved = first_step = 0
    for stage in short_rows or ():
        stage_steps = max(0, min(num_steps, stage.end_step) - first_step)
        saved += stage_steps * batch_tokens * (flops_per_token - stage.flops_per_token)
        first_step = stage.end_step
    return saved


def make_short_rows(text: str, config: GPTConfig) -> list[ShortRows]:
    """The stages of --seq-len-warmup START:STEPS: rows of START tokens, then twice as many ..., equally long.

    The tokens of a step stay the same, so that every schedule by steps does. Doubling keeps the lengths few: each
    has kernels of its own to compile.
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
    lengths = [start << k for k in range(num_stages)]
    return [ShortRows((k + 1) * num_steps // num_stages, length, estimate_flops(config, length))
            for k, length in enumerate(lengths)]


def make_plan(config: GPTConfig, flops_per_token: float, *, num_iterations: int | None = None,
              target_flops: float | None = None, target_param_data_ratio: float = 12.0,
              batch_tokens: int | None = None, weight_decay: float = 0.28, seq_len_warmup: str | None = None) -> Plan:
    """Horizon, batch and hyper-parameter scales of a pretraining run.

    The horizon is the first given of num_iterations, target_flops, target_param_data_ratio (tokens per scaling param).
    seq_len_warmup: START:STEPS, see make_short_rows
    """
    for flag, value in (("--target-param-data-ratio", target_param_data_ratio), ("--target-flops", target_flops)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{flag} {value:g} must be a positive number")
    num_params = count_scaling_params(config)
    reference = make_config(REFERENCE_DEPTH, vocab_size=config.vocab_size, sequence_len=config.sequence_len,
                            window_pattern=config.window_pattern)
    target_tokens = int(target_param_data_ratio * num_params)
    reference_tokens = int(target_param_data_ratio * count_scaling_params(reference))
    if target_tokens < 1:
        raise UserError(f"--target-param-data-ratio {target_param_data_ratio:g} gives less than one token")
    if batch_tokens is None:
        batch_tokens = REFERENCE_BATCH_TOKENS * (target_tokens / reference_tokens) ** BATCH_EXPONENT
        batch_tokens = 2 ** round(math.log2(batch_tokens))
    if batch_tokens < 1:
        raise UserError(f"--total-batch-size {batch_tokens} must be a positive number of tokens")
    short_rows = make_short_rows(seq_len_warmup, config) if seq_len_warmup is not None else None
    saved_flops = count_saved_flops(short_rows, flops_per_token, batch_tokens)
    if num_iterations is not None:
        horizon = "iterations"
    elif target_flops is not None:
        # a warm-up that the run can't hold is refused below
        horizon, num_iterations = "flops", round((target_flops + saved_flops) / (flops_per_token * batch_tokens))
    else:
        horizon, num_iterations = "ratio", target_tokens // batch_tokens
    if num_iterations < 1:
        raise UserError(f"the horizon ({horizon}) is shorter than one step of {batch_tokens} tokens; "
                        "set a smaller --total-batch-size or a longer horizon")
    if short_rows and short_rows[-1].end_step > num_iterations:
        raise UserError(f"--seq-len-warmup {seq_len_warmup} is longer than the run of {num_iterations} steps; give it "
                        "fewer steps")
    # AdamW and Muon steps scale with the square root of the batch; the decay keeps its time constant in epochs
    # (T_epoch, arXiv 2405.13698) the same for every model size
    batch_lr_scale = math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS)
    total_tokens = num_iterations * batch_tokens
    return Plan(num_iterations=num_iterations, batch_tokens=batch_tokens, target_tokens=target_tokens,
                total_tokens=total_tokens, flops_per_token=flops_per_token,
                total_flops=flops_per_token * total_tokens - saved_flops, tokens_per_param=total_tokens / num_params,
                batch_lr_scale=batch_lr_scale, horizon=horizon, short_rows=short_rows,
                weight_decay=weight_decay * batch_lr_scale * reference_tokens / target_tokens)


def make_chat_plan(config: GPTConfig, flops_per_token: float, *, epoch_rows: int, num_epochs: int = 1,
                   num_iterations: int | None = None, batch_tokens: int, scales_lr: bool = True) -> Plan:
    """Horizon of midtraining or SFT: so many steps, or else whole epochs of `epoch_rows` rows. No Muon weight decay.

    scales_lr: whether learning rates are scaled to the batch, as in pretraining
    The last step of the last epoch takes the rows that are left, fewer than the others.
    """
    for flag, value in (("--num-iterations", num_iterations), ("--num-epochs", num_epochs),
                        ("--total-batch-size", batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    T, target_tokens = config.sequence_len, num_epochs * epoch_rows * config.sequence_len
    horizon = "epochs" if num_iterations is None else "iterations"
    if num_iterations is None:
        num_iterations = -(-num_epochs * epoch_rows // (batch_tokens // T or 1))
    total_tokens = num_iterations * batch_tokens
    return Plan(num_iterations=num_iterations, batch_tokens=batch_tokens, target_tokens=target_tokens,
                total_tokens=total_tokens, flops_per_token=flops_per_token, total_flops=flops_per_token * total_tokens,
                tokens_per_param=total_tokens / count_scaling_params(config), weight_decay=0.0, horizon=horizon,
                batch_lr_scale=math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS) if scales_lr else 1.0)


def make_rl_plan(config: GPTConfig, flops_per_token: float, *, num_questions: int, num_epochs: int = 1,
                 num_iterations: int | None = None, examples_per_step: int, num_samples: int,
                 max_new_tokens: int, batch_lr_scale: float) -> Plan:
    """Horizon of RL: so many steps, or else whole epochs of `num_questions` questions. No Muon weight decay.

    Tokens are counted as if each answer were as long as it may be; what they teach is a few bits an answer, so the
    learning rates don't follow their number, but remain those of the stage before (batch_lr_scale is its).
    """
    for flag, value, least in (("--num-iterations", num_iterations, 1), ("--num-epochs", num_epochs, 1),
                               ("--examples-per-step", examples_per_step, 1), ("--num-samples", num_samples, 2)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value} must be at least {least}" + (
                ": an answer is compared with the others to its question" if flag == "--num-samples" else ""))
    batch_tokens = examples_per_step * num_samples * max_new_tokens
    target_tokens = num_epochs * num_questions * num_samples * max_new_tokens
    horizon = "epochs" if num_iterations is None else "iterations"
    if num_iterations is None:
        num_iterations = -(-num_epochs * num_questions // examples_per_step)
    total_tokens = num_iterations * batch_tokens
    return Plan(num_iterations=num_iterations, batch_tokens=batch_tokens, target_tokens=target_tokens,
                total_tokens=total_tokens, flops_per_token=flops_per_token, total_flops=flops_per_token * total_tokens,
                tokens_per_param=total_tokens / count_scaling_params(config), weight_decay=0.0, horizon=horizon,
                batch_lr_scale=batch_lr_scale)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules, all of step `it` (0-based) of `n`


def get_lr_frac(it: int, n: int, *, warmup_steps: int = 40, warmdown_ratio: float = 0.65,
                final_lr_frac: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up, constant, linear warm-down to `final_lr_frac`. Of all stages.

    The warm-up is at most a tenth of the run, so that a short run isn't all warm-up.
    """
    warmup = min(warmup_steps, n // 10)
    warmdown = round(warmdown_ratio * n)
    if it < warmup:
        return (it + 1) / warmup
    if it <= n - warmdown:
        return 1.0
    progress = (n - it) / warmdown
    return progress + (1 - progress) * final_lr_frac


def get_muon_momentum(it: int, n: int, *, warmdown_ratio: float = 0.65) -> float:
    """Muon's momentum: .85 -> .97 over 400 steps (fewer in a short run), then -> .90 while the learning rate decays."""
    ramp_steps = 400 if n >= 1143 else max(1, round(0.35 * n))  # 1143 steps: where .35 n reaches 400
    if it < ramp_steps:
        return 0.85 + (0.97 - 0.85) * it / ramp_steps
    warmdown = round(warmdown_ratio * n)
    if it <= n - warmdown:
        return 0.97
    progress = (n - it) / warmdown
    return 0.90 + (0.97 - 0.90) * progress


def get_weight_decay_frac(it: int, n: int) -> float:
    """Factor on Muon's weight decay: half a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * it / n)) / 2


def get_chat_momentum(it: int) -> float:
    """Muon's momentum in midtraining, SFT and RL: .85 -> .95 over 300 steps (for the last two an assumption)."""
    return 0.85 + (0.95 - 0.85) * min(it / 300, 1)
