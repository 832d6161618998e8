"""Plans and schedules against values worked out by hand from the public record's formulas."""

import math
from dataclasses import replace

import pytest

from nanochat.common import UserError
from nanochat.config import GPTConfig, estimate_flops
from nanochat.scaling import (
    JULY26,
    count_scaling_params,
    get_chat_momentum,
    get_lr_frac,
    get_muon_momentum,
    get_weight_decay_frac,
    make_chat_plan,
    make_config,
    make_plan,
)

# transformer matrices + lm_head at a vocabulary of 32768, and training FLOPs per token at T 2048
PARAMS = {4: 3_145_776 + 8_388_608, 8: 25_166_016 + 16_777_216, 12: 84_935_088 + 25_165_824,
          20: 393_217_200 + 41_943_040, 24: 679_478_976 + 50_331_648}
FLOPS = {4: 8.021650e7, 8: 2.956997e8, 12: 7.596960e8, 20: 2.886213e9, 24: 4.775226e9}


def plan_depth(depth, vocab_size=32768, sequence_len=2048, **choices):
    config = make_config(depth, vocab_size=vocab_size, sequence_len=sequence_len)
    return make_plan(config, estimate_flops(config), **choices)


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def test_config_of_a_depth():
    assert make_config(12, vocab_size=32768, sequence_len=2048) == GPTConfig()
    odd = make_config(5, vocab_size=100, sequence_len=64, window_pattern="SL")  # 320 channels make 3 heads
    assert (odd.n_embd, odd.n_head, odd.n_kv_head, odd.n_layer, odd.window_pattern) == (384, 3, 3, 5, "SL")
    narrow = make_config(3, vocab_size=100, sequence_len=64, aspect_ratio=32, head_dim=64)
    assert (narrow.n_embd, narrow.n_head, narrow.head_dim) == (128, 2, 64)
    for changes in ({"depth": 0}, {"aspect_ratio": 0}, {"head_dim": 0}, {"head_dim": 7}, {"sequence_len": 0}):
        with pytest.raises(UserError, match="--depth"):
            make_config(**{"depth": 4, "vocab_size": 100, "sequence_len": 64} | changes)


@pytest.mark.parametrize("depth", PARAMS)
def test_horizon_and_batch_of_the_public_record_by_hand(depth):
    assert count_scaling_params(make_config(depth, vocab_size=32768, sequence_len=2048)) == PARAMS[depth]
    for ratio in (12, 8):
        plan = plan_depth(depth, target_param_data_ratio=ratio, rule=JULY26)
        tokens = ratio * PARAMS[depth]
        batch = 2 ** round(19 + 0.383 * math.log2(PARAMS[depth] / PARAMS[12]))
        steps = math.floor(tokens / batch)
        assert (plan.target_tokens, plan.batch_tokens, plan.num_iterations) == (tokens, batch, steps)
        assert plan.total_tokens == steps * batch and plan.horizon == "ratio"
        assert plan.total_flops == pytest.approx(steps * batch * FLOPS[depth], rel=1e-6)
        assert plan.tokens_per_param == pytest.approx(steps * batch / PARAMS[depth])
        assert plan.batch_lr_scale == pytest.approx((batch / 524_288) ** 0.5)
        assert plan.weight_decay == pytest.approx(0.28 * (batch / 524_288) ** 0.5 * PARAMS[12] / PARAMS[depth])


@pytest.mark.parametrize(("depth", "ratio", "batch", "lr_scale"), [
    # vocabulary 32,768: 11.5 M, 42 M and 68 M parameters count; the first row is 3.5 M tokens
    (4, 0.3, 4096, 0.928), (4, 1, 8192, 1.0), (4, 12, 32_768, 0.910), (8, 1, 16_384, 1.0), (8, 12, 131_072, 0.926),
    (10, 12, 262_144, 0.954), (4, 200, 524_288, 1.0)])
def test_batch_and_rates_of_small_models(depth, ratio, batch, lr_scale):
    plan = plan_depth(depth, target_param_data_ratio=ratio)
    assert (plan.batch_tokens, plan.batch_lr_scale) == (batch, pytest.approx(lr_scale, abs=2e-3))
    assert plan.num_iterations == int(ratio * count_scaling_params(
        make_config(depth, vocab_size=32768, sequence_len=2048))) // batch


def test_from_depth_12_on_plans_are_those_of_the_public_record():
    for depth in (*range(12, 33, 2), 40):
        for horizon in ({}, {"target_param_data_ratio": 8}, {"target_param_data_ratio": 20}, {"target_flops": 1e18},
                        {"num_iterations": 20}, {"batch_tokens": 2**16}):
            assert plan_depth(depth, **horizon) == plan_depth(depth, **horizon, rule=JULY26), (depth, horizon)
    plain = make_config(12, vocab_size=32768, sequence_len=2048, ve_gate_channels=0)    # has no gates
    assert count_scaling_params(plain) < PARAMS[12]
    assert make_plan(plain, 1e9, target_param_data_ratio=8).batch_tokens == 2**19


@pytest.mark.parametrize("batch", [2048, 4096, 32_768])
def test_a_horizon_has_one_plan_however_it_is_spelled(batch):
    """But for the horizon's name, and the target of the ratio's."""
    config = make_config(4, vocab_size=8192, sequence_len=512)
    ratio = 400 * batch / count_scaling_params(config)
    spelled = ({"target_param_data_ratio": ratio * (1 + 1e-9)}, {"num_iterations": 400},
               {"target_flops": 400 * batch * 1e7})
    plans = [make_plan(config, 1e7, batch_tokens=batch, **horizon) for horizon in spelled]
    for plan in plans:
        assert plan.num_iterations == 400
        for name in ("batch_lr_scale", "weight_decay", "lr_batch_tokens"):
            assert getattr(plan, name) == pytest.approx(getattr(plans[0], name), rel=1e-4), name
    reference = make_config(12, vocab_size=8192, sequence_len=512)
    expected = 0.28 * count_scaling_params(reference) / count_scaling_params(config) * \
        plans[0].batch_lr_scale * plans[0].lr_batch_tokens / 2**19
    assert plans[0].weight_decay == pytest.approx(expected, rel=1e-4) and expected < 0.4


def test_small_budgets_have_small_batches_and_full_rates():
    """Depth 4, vocabulary 8,192, T 512, 1 and 3 M tokens: measured best are 2,048 to 4,096 (dev/dial_points.csv)."""
    config = make_config(4, vocab_size=8192, sequence_len=512)
    for num_tokens in (1e6, 3.2e6):
        plan = make_plan(config, 1e7, target_flops=1e7 * num_tokens)
        assert 2048 <= plan.batch_tokens <= 4096 and 0.8 < plan.batch_lr_scale < 1.25, plan
        large, small = (make_plan(config, 1e7, target_flops=1e7 * num_tokens, batch_tokens=batch)
                        for batch in (16 * plan.batch_tokens, plan.batch_tokens // 8))
        assert large.batch_lr_scale == 1 and 0.3 < small.batch_lr_scale < 0.5


def test_a_number_of_steps_has_the_batch_of_the_ratio_and_rates_of_its_own_tokens():
    config = make_config(4, vocab_size=8192, sequence_len=512)
    by_ratio, by_steps = make_plan(config, 1e7), make_plan(config, 1e7, num_iterations=100)
    assert by_steps.batch_tokens == by_ratio.batch_tokens and by_steps.num_iterations == 100
    assert by_steps.batch_lr_scale == 1    # the batch is larger than the best for so few tokens
    typed = make_plan(config, 1e7, num_iterations=100, batch_tokens=by_steps.batch_tokens)
    assert typed == by_steps


def test_a_few_steps_of_a_large_model_are_those_of_its_run():
    """To try a run's speed, say: the batch of the whole run, its rates but for the rounding, at most as much decay."""
    for depth in (8, 10, 12, 20):
        whole, tried = plan_depth(depth), plan_depth(depth, num_iterations=20)
        assert tried.batch_tokens == whole.batch_tokens
        assert tried.batch_lr_scale == pytest.approx(whole.batch_lr_scale, rel=0.2)
        assert tried.weight_decay == pytest.approx(whole.weight_decay, rel=0.2)


def test_a_batch_is_whole_rows_of_all_ranks():
    plans = {multiple: plan_depth(4, target_param_data_ratio=0.5, step_multiple=multiple)
             for multiple in (1, 2048, 6 * 1536, 64 * 2048)}
    free = plans[1].batch_tokens
    assert plans[2048].batch_tokens == free and plans[64 * 2048].batch_tokens == 64 * 2048
    assert plans[6 * 1536].batch_tokens % (6 * 1536) == 0
    assert abs(plans[6 * 1536].batch_tokens - free) <= 3 * 1536 < free


def test_plans_of_the_public_record():
    batches = {depth: plan_depth(depth, rule=JULY26).batch_tokens for depth in (4, 5, 6, 12, 24)}
    assert batches == {4: 2**18, 5: 2**18, 6: 2**18, 12: 2**19, 24: 2**20}
    d12, d24 = plan_depth(12), plan_depth(24, target_param_data_ratio=8)
    assert (d12.num_iterations, d12.batch_lr_scale, d12.weight_decay) == (2520, 1.0, 0.28)
    assert d24.num_iterations == 5568
    model_flops = {4: 7.4e15, 8: 9.9e16, 12: 6.7e17, 16: 3.0e18, 20: 1.0e19, 24: 2.79e19}
    for depth, flops in model_flops.items():
        plan = plan_depth(depth, target_param_data_ratio=8)
        assert plan.target_tokens * plan.flops_per_token == pytest.approx(flops, rel=0.02), depth


def test_one_horizon():
    """Steps or FLOPs go before the ratio, and exclude each other."""
    by_steps = plan_depth(12, num_iterations=77, target_param_data_ratio=8.0)
    by_flops = plan_depth(12, target_flops=1e18, target_param_data_ratio=8.0)
    assert (by_steps.horizon, by_steps.num_iterations, by_flops.horizon) == ("iterations", 77, "flops")
    # by the public record's rule batch and decay come from ratio * params, whatever decides the horizon
    by_steps = plan_depth(12, num_iterations=77, target_param_data_ratio=8.0, rule=JULY26)
    by_flops = plan_depth(12, target_flops=1e18, target_param_data_ratio=8.0, rule=JULY26)
    by_ratio = plan_depth(12, target_param_data_ratio=8.0, rule=JULY26)
    assert by_ratio.batch_tokens == by_steps.batch_tokens == by_flops.batch_tokens
    assert by_ratio.weight_decay == by_steps.weight_decay == by_flops.weight_decay
    with pytest.raises(UserError, match="--num-iterations and --target-flops are two horizons"):
        plan_depth(12, num_iterations=77, target_flops=1e18)


@pytest.mark.parametrize(("depth", "settings", "message"), [
    (1_000_000, {},                                 "n_layer can't be 1,000,000; it must be at most 1,000"),
    (1,         {"target_flops": 1e300},            "--target-flops 1e.300 must be a positive number of at most 1e.30"),
    (1,         {"target_param_data_ratio": 1e300}, "--target-param-data-ratio 1e.300 must be .* at most 1e.06"),
    (1,         {"num_iterations": 10**18},         "a run of 1,000,000,000,000,000,000 steps .* is out of reach"),
    (1,         {"num_iterations": 1, "batch_tokens": 2**62}, "4,611,686,018,427,387,904 tokens is out of reach"),
])
def test_runs_out_of_reach(depth, settings, message):
    """They would be planned for ever, or overflow."""
    with pytest.raises(UserError, match=message):
        plan_depth(depth, **settings)


def test_flops_are_rounded_to_steps_and_ratios_down():
    step_flops = plan_depth(12).flops_per_token * 2**19
    assert [plan_depth(12, target_flops=k * step_flops, batch_tokens=2**19).num_iterations
            for k in (0.6, 9.4, 9.6)] == [1, 9, 10]
    ratio = [plan_depth(12, target_param_data_ratio=1e6 / PARAMS[12], batch_tokens=batch).num_iterations
             for batch in (333_000, 334_000)]
    assert ratio == [3, 2]  # 3.003 and 2.994 steps


def test_a_batch_that_is_given_is_kept_and_scales_the_rest():
    plan = plan_depth(4, batch_tokens=16_384, weight_decay=0.4, rule=JULY26)
    assert plan.batch_tokens == 16_384 and plan.num_iterations == 12 * PARAMS[4] // 16_384
    assert plan.batch_lr_scale == pytest.approx(2**-2.5)
    assert plan.weight_decay == pytest.approx(0.4 * 2**-2.5 * PARAMS[12] / PARAMS[4])


def test_the_reference_model_has_the_same_vocabulary():
    plan = plan_depth(4, vocab_size=4096, batch_tokens=2**19, rule=JULY26)
    d4, d12 = 3_145_776 + 4096 * 256, 84_935_088 + 4096 * 768
    assert plan.weight_decay == pytest.approx(0.28 * d12 / d4)


@pytest.mark.parametrize("choices", [
    {"num_iterations": 0}, {"num_iterations": -5}, {"target_flops": 1.0}, {"target_flops": -1e18},
    {"target_param_data_ratio": 1e-3, "step_multiple": 2**15}, {"target_param_data_ratio": 0.0},
    {"target_param_data_ratio": -1.0},
    {"batch_tokens": 0}, {"batch_tokens": -8}])
def test_a_plan_without_a_step_is_refused(choices):
    with pytest.raises(UserError):
        plan_depth(4, **choices)


# ---------------------------------------------------------------------------------------------------------------------
# The warm-up of the sequence length


def list_row_tokens(warmup, T, num_steps):
    plan = plan_depth(4, sequence_len=T, num_iterations=num_steps, batch_tokens=T, seq_len_warmup=warmup)
    return [plan.get_row_tokens(step, T) for step in range(num_steps)]


def test_rows_double_until_they_are_whole():
    assert list_row_tokens("64:7", 512, 9) == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 2
    assert list_row_tokens("96:2", 192, 3) == [96, 96, 192]
    assert list_row_tokens("1:3", 8, 3) == [1, 2, 4]
    assert list_row_tokens(None, 512, 3) == [512] * 3


def test_flops_of_short_rows_by_hand():
    """Depth 4 at T 512: three layers see 128 keys, one 512, but never more than the row has."""
    plan = plan_depth(4, sequence_len=512, num_iterations=20, batch_tokens=1024, seq_len_warmup="64:9")
    keys = [4 * 64] * 3 + [4 * 128] * 3 + [3 * 128 + 256] * 3 + [3 * 128 + 512] * 11
    matmul_params = PARAMS[4] + 24  # and the smear gate
    step_flops = [1024 * (6 * matmul_params + 12 * 256 * num_keys) for num_keys in keys]
    assert plan.total_flops == sum(step_flops)
    assert [plan.count_flops(n) for n in range(21)] == [sum(step_flops[:n]) for n in range(21)]
    assert plan.flops_per_token * 1024 == step_flops[-1] and plan.total_tokens == 20 * 1024


def test_short_rows_change_nothing_but_flops():
    plain, warm = (plan_depth(4, num_iterations=50, seq_len_warmup=warmup) for warmup in (None, "256:40"))
    assert replace(warm, short_rows=None, total_flops=plain.total_flops) == plain
    assert warm.total_flops < plain.total_flops == plain.count_flops(50)


def test_a_budget_buys_more_steps_with_short_rows():
    target_flops = plan_depth(4, num_iterations=100).total_flops
    plan = plan_depth(4, target_flops=target_flops, seq_len_warmup="128:80")
    assert plan.num_iterations > 102
    assert abs(plan.total_flops - target_flops) <= plan.flops_per_token * plan.batch_tokens / 2


@pytest.mark.parametrize(("warmup", "message"), [
    ("64",       "--seq-len-warmup 64 must be START:STEPS"),
    ("64:x",     "must be START:STEPS"),
    ("64:9:9",   "must be START:STEPS"),
    ("",         "must be START:STEPS"),
    ("100:9",    "START must be the context of 384 tokens halved once or more, 192, 96, 48, 24, 12, 6, 3$"),
    ("384:9",    "halved once or more, 192"),
    ("768:9",    "halved once or more, 192"),
    ("0:9",      "halved once or more, 192"),
    ("-192:9",   "halved once or more, 192"),
    ("48:2",     "STEPS must be at least 3, one for each length from 48 to 192"),
    ("192:0",    "STEPS must be at least 1"),
    ("48:21",    "is longer than the run of 20 steps"),
])
def test_warmup_that_means_nothing_is_refused(warmup, message):
    with pytest.raises(UserError, match=message) as error:
        plan_depth(4, sequence_len=384, num_iterations=20, seq_len_warmup=warmup)
    assert "\n" not in str(error.value)
    if warmup == "48:21":
        plan = plan_depth(4, sequence_len=384, num_iterations=20)
        with pytest.raises(UserError, match="is longer than the run"):
            plan_depth(4, sequence_len=384, target_flops=0.9 * plan.total_flops, batch_tokens=plan.batch_tokens,
                       seq_len_warmup=warmup)


def test_an_odd_context_has_no_warmup():
    with pytest.raises(UserError, match="set an even --max-seq-len"):
        plan_depth(4, sequence_len=65, num_iterations=20, seq_len_warmup="5:10")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def test_lr_at_key_steps():
    lr = {it: get_lr_frac(it, 1000) for it in range(1000)}  # 40 steps of warm-up, 650 of warm-down
    assert lr[0] == 1 / 40 and lr[19] == 0.5 and lr[39] == lr[40] == lr[350] == 1.0
    assert lr[351] == pytest.approx(649 / 650 + 1 / 650 * 0.05)
    assert lr[675] == pytest.approx(0.525)  # half-way between 1 and .05
    assert lr[999] == pytest.approx(1 / 650 + 649 / 650 * 0.05)
    assert all(lr[it] > lr[it + 1] for it in range(350, 999))


def test_lr_of_short_runs():
    assert [get_lr_frac(it, 1) for it in range(1)] == [1.0]
    assert [get_lr_frac(it, 2) for it in range(2)] == [1.0, 1.0]
    assert [get_lr_frac(it, 3) for it in range(3)] == pytest.approx([1.0, 1.0, 0.525])
    assert get_lr_frac(0, 30) == pytest.approx(1 / 3)
    for n in range(1, 500):
        values = [get_lr_frac(it, n) for it in range(n)]
        assert all(0 < value <= 1 for value in values) and max(values) == 1.0
        assert sum(a < b for a, b in zip(values, values[1:], strict=False)) <= n // 10  # a tenth is warm-up at most


def test_lr_options():
    values = [get_lr_frac(it, 100, warmup_steps=5, warmdown_ratio=0.2, final_lr_frac=0.0) for it in range(100)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0]) and set(values[5:81]) == {1.0}
    assert values[81:] == pytest.approx([p / 20 for p in range(19, 0, -1)])
    assert {get_lr_frac(it, 50, warmup_steps=0, warmdown_ratio=0.0) for it in range(50)} == {1.0}
    assert get_lr_frac(1, 100, warmdown_ratio=1.0) == pytest.approx(0.2)  # warm-up first, though both apply


def test_momentum_at_key_steps():
    momentum = {it: get_muon_momentum(it, 2000) for it in range(2000)}  # the rate decays from step 700 on
    assert momentum[0] == 0.85 and momentum[200] == pytest.approx(0.91)
    assert {momentum[it] for it in range(400, 701)} == {0.97} and momentum[399] < 0.97
    assert momentum[1350] == pytest.approx(0.935) and momentum[1999] == pytest.approx(0.90 + 0.07 / 1300)


def test_momentum_of_short_runs():
    assert get_muon_momentum(350, 1000) == 0.97 and get_muon_momentum(349, 1000) == pytest.approx(0.97 - 0.12 / 350)
    assert get_muon_momentum(351, 1000) == pytest.approx(0.97 - 0.07 / 650)
    assert get_muon_momentum(399, 1142) == pytest.approx(0.85 + 0.12 * 399 / 400)
    assert get_muon_momentum(200, 2000, warmdown_ratio=1.0) == pytest.approx(0.91)  # the ramp wins over the decay
    for n in (1, 2, 3, 10):
        assert get_muon_momentum(0, n) == 0.85
        assert all(0.85 <= get_muon_momentum(it, n) <= 0.97 for it in range(n))


def test_weight_decay_is_half_a_cosine():
    values = [get_weight_decay_frac(it, 100) for it in range(101)]
    assert values[0] == 1 and values[50] == pytest.approx(0.5) and values[100] == pytest.approx(0)
    assert values[25] == pytest.approx((1 + 0.5**0.5) / 2)
    assert get_weight_decay_frac(0, 1) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Midtraining and SFT


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(1, 1, 1), (32, 1, 1), (33, 1, 2), (80, 2, 5), (81, 2, 6)])
def test_chat_plan_takes_every_row(rows, epochs, steps):
    config = make_config(4, vocab_size=4096, sequence_len=512)
    plan = make_chat_plan(config, estimate_flops(config), epoch_rows=rows, num_epochs=epochs, batch_tokens=32 * 512)
    assert (plan.num_iterations, plan.horizon, plan.weight_decay) == (steps, "epochs", 0)
    assert plan.batch_lr_scale == pytest.approx(math.sqrt(1 / 32)) and plan.target_tokens == epochs * rows * 512


def test_chat_plan_scales_rates_from_the_base_models_batch():
    config = make_config(4, vocab_size=4096, sequence_len=512)
    plans = [make_chat_plan(config, 1e6, epoch_rows=100, batch_tokens=batch, lr_batch_tokens=4096)
             for batch in (4096, 16_384)]
    assert [(plan.batch_lr_scale, plan.lr_batch_tokens) for plan in plans] == [(1, 4096), (2, 4096)]
    assert make_chat_plan(config, 1e6, epoch_rows=9, batch_tokens=512, scales_lr=False).batch_lr_scale == 1


def test_chat_plan_by_steps():
    config = make_config(4, vocab_size=4096, sequence_len=512)
    plan = make_chat_plan(config, 1e6, epoch_rows=100, num_iterations=7, batch_tokens=1024)
    assert (plan.num_iterations, plan.horizon, plan.total_tokens, plan.total_flops) == (7, "iterations", 7168, 7.168e9)


def test_chat_schedules():
    """Midtraining falls over the last fifth, SFT over all or half of the run; none begins or ends at 0."""
    def rates(n, warmdown_ratio):
        return [get_lr_frac(it, n, warmup_steps=0, warmdown_ratio=warmdown_ratio, final_lr_frac=0) for it in range(n)]
    assert rates(10, 0.2) == [1] * 9 + [0.5]
    assert rates(4, 1.0) == [1, 0.75, 0.5, 0.25] and rates(4, 0.5) == [1, 1, 1, 0.5]
    assert rates(1, 0.2) == rates(1, 1.0) == [1]
    assert [get_chat_momentum(it) for it in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_horizon_of_experts_is_by_active_parameters():
    dense = make_config(4, vocab_size=8192, sequence_len=512)
    moe = make_config(4, vocab_size=8192, sequence_len=512, num_experts=16, moe_every=2)
    router = 2 * 16 * 256
    assert count_scaling_params(moe) == count_scaling_params(dense) + router
    assert count_scaling_params(moe, counts_all=True) == count_scaling_params(dense, counts_all=True) + router
    assert estimate_flops(moe) == estimate_flops(dense) + 6 * router


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 12])
def test_backout_never_subtracts_the_last_layer(depth):
    """The final norm would hide all of its factor but the sign, which then turns by chance."""
    config = make_config(depth, vocab_size=256, sequence_len=64)
    assert config.middle_layer == {1: None, 2: None, 3: 1, 4: 2, 12: 6}[depth]
    assert make_config(depth, vocab_size=256, sequence_len=64, backout_layer=None).middle_layer == depth // 2
