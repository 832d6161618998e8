"""Memory, time, data and cost of a pretraining run, before it is paid for. Needs no GPU and no data.

    python -m scripts.plan --depth 24 --nproc 8 --gpu h100 --target-param-data-ratio 8    # runs/speedrun.sh
    python -m scripts.plan --depth 12 20 24 --nproc 8                                     # side by side
    python -m scripts.plan --recipe d24 d22 --nproc 8                                     # what runs/speedrun.sh offers
    python -m scripts.plan --preset marin-150m marin-270m marin-460m                      # models of the family
    python -m scripts.plan --max-cost 100 --nproc 8                                       # the deepest for $100
    python -m scripts.plan --depth 12 24 --nproc 16 --nodes 2 --fabric ib                 # and what the network costs
    python -m scripts.plan --depth 10 16 --target-flops 1e18 --shards                     # how much text to download
    python -m scripts.plan --depth 6 --gpu cpu --tflops 0.85 --gb 24 --max-seq-len 512 --target-param-data-ratio 0.6

The flags of the model and the horizon are those of scripts.base_train, and mean the same.
"""

import argparse
import contextlib
import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, replace

from nanochat import devices, memory
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.config import GPTConfig, count_active, count_params, estimate_flops, list_by_head
from nanochat.corpus import HUB_SOURCES
from nanochat.fabric import FABRICS, Network, StepTime, count_muon_flops, find_fabric, predict_step
from nanochat.memory import GIB, Machine, Memory, get_usable_frac, rows_or_auto
from nanochat.presets import add_plan_args, apply_preset, find_preset, find_rule, list_typed, parse_knobs
from nanochat.scaling import FINAL_LR_FRAC, WARMDOWN_RATIO, WEIGHT_DECAY, Plan, TrainingRule, make_config, make_plan

CHARS_PER_TOKEN = 5           # of a 32K vocabulary; assumption, none was counted. Smaller vocabularies have fewer
SPARE_DATA = 1.05             # shards for each one of the estimate, since text that runs out is repeated
MAX_DEPTH = 64                # of the search for a budget
HOPPER = ("h100", "h200", "h800", "h20", "gh200")          # FlashAttention 3 is built for these
WITHOUT_BF16 = ("v100", "t4", "2080 ti")


@dataclass(frozen=True)
class PublishedRun:
    """A public run on 8 H100 whose recipe is a RECIPE of runs/speedrun.sh."""
    depth:                   int
    target_param_data_ratio: float
    vocab_size:              int
    total_batch_size:        int | None    # tokens of a step; None: from the horizon
    warmdown_ratio:          float
    final_lr_frac:           float
    minutes:                 float         # of training, in fp8
    core:                    float
    source:                  str


# That this script has as well
RECIPE_FLAGS = ("depth", "num_iterations", "target_flops", "target_param_data_ratio", "vocab_size", "total_batch_size")
RECIPES = {
    # Commit a825e63
    "d24": PublishedRun(24, 8, 32768, None, WARMDOWN_RATIO, FINAL_LR_FRAC, 99.0, 0.2626,
                        "karpathy/nanochat, run 6 of its leaderboard, by March 2026, mean CORE of 5 runs"),
    # Not merged. Its micro-batches had 32 rows; in bf16 16 fit by plan. Its command names no schedule; that of the run
    # before it (88.2 minutes) is a warm-down over 85% of the steps, to 0
    "d22": PublishedRun(22, 9.4, 49152, 2**19, 0.85, 0, 81.8, 0.2618,
                        "karpathy/nanochat, pull request 830, August 2026, mean CORE of 6 runs; with learned norm "
                        "scales, which this model has not. The schedule is its predecessor's, pull request 733"),
}


@dataclass(frozen=True)
class Hardware:
    """The GPUs of the run, or the CPU."""
    name:        str
    num_gpus:    int
    peak_flops:  float    # of one GPU, dense bf16
    memory_gib:  float    # of one GPU
    dollars:     float | None    # per GPU and hour


@dataclass(frozen=True)
class Estimate:
    """The plan of one depth."""
    config:         GPTConfig
    plan:           Plan
    fits:           bool
    micro_rows:     int
    num_micro:      int
    memory:         Memory
    hardware_flops: float
    mfu:            float
    mfu_source:     str
    hours:          float
    dollars:        float | None    # None: no price is known
    num_shards:     int
    network:        StepTime | None    # where a fabric is named


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--depth", type=int, nargs="+", help="layers; several are shown side by side (default: 20)")
    add("--recipe", choices=RECIPES, nargs="+", help="instead of --depth: recipes of runs/speedrun.sh, side by side")
    add("--preset", nargs="+", metavar="NAME", help="presets of scripts.base_train, side by side; at each --depth, if "
        "they have no shape of their own")
    add("--max-hours", type=float, help="instead of --depth: the deepest model that trains in so many hours")
    add("--max-cost", type=float, help="instead of --depth: the deepest model that trains for so many dollars")
    # hardware
    add("--gpu", default="h100", help="name of the GPU, or cpu")
    add("--nproc", type=int, default=1, help="number of GPUs, a process each")
    add("--tflops", type=float, help="dense bf16 TFLOP/s of one GPU (default: from the table)")
    add("--gb", type=float, help="memory of one GPU in GiB (default: from the table)")
    add("--mfu", type=float, help="model FLOP/s in percent of the peak (default: as published)")
    add("--fabric", help=f"adds what a network costs each step: {', '.join(FABRICS)}, or MICROSECONDS:MEGABYTES_PER_"
        "SECOND; between all GPUs, or between nodes in which NVLink connects them")
    add("--nodes", type=int, default=1, help="machines that the GPUs are in, as many in each")
    add("--price", type=float, help="dollars per GPU hour (default: as assumed for the GPU, where it has a price)")
    # model and horizon
    add_plan_args(parser)
    add("--vocab-size", type=int, default=32768, help="tokens of the tokenizer")
    add("--knobs", nargs="+", action="extend", default=[], metavar="KNOB=VALUE",
        help="other parts, as of scripts.base_train")
    add("--total-batch-size", type=int, help="tokens of a step, all GPUs together (default: from the horizon)")
    # computation
    add("--device-batch-size", type=rows_or_auto, default="auto", metavar="ROWS",
        help="rows of a micro-batch; auto: the largest that fits, as training chooses it")
    add("--dtype", default="auto", help="auto, bfloat16, float16, float32 or float64")
    add("--attention", choices=("auto", "fa3", "fa2", "flex", "blocks", "sdpa"), default="auto",
        help="the backend, as training names it; auto: as expected on the GPU")
    add("--compile", choices=("on", "off"), default="on", help="off: a step keeps more in memory")
    add("--loss", choices=("fused", "plain"), default="fused", help="plain keeps the logits of a whole micro-batch")
    add("--fp8", choices=("on", "off"), default="off", help="in memory alone: what it saves in time isn't measured yet")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of a table")
    output.add_argument("--shards", nargs="?", const="climbmix", choices=HUB_SOURCES, metavar="SOURCE",
                        help="print only the number of shards to download of a source (default: climbmix), at most all "
                        "that it has, for the depth that reads most")
    args = parser.parse_args(argv)
    for name in ("nproc", "nodes", "vocab_size", "tflops", "gb", "mfu", "max_hours", "max_cost", "device_batch_size"):
        value = getattr(args, name)
        if value not in (None, "auto") and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value:g} must be a positive number")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise UserError(f"--price {args.price:g} must be dollars per GPU hour, 0 or more")
    if args.preset and (args.recipe or args.max_hours or args.max_cost):
        raise UserError("--preset says what to train: leave out --recipe and the budgets (--max-hours, --max-cost)")
    if args.nodes > 1 and not args.fabric:
        raise UserError(f"--nodes {args.nodes} says nothing without --fabric, what connects them; add --fabric ib")
    if args.preset and all(find_preset(name).shape for name in args.preset):
        parser.refuse_unused(args, ("depth",), "a --preset that has a shape of its own")
    args.typed = list_typed(parser, argv, vars(args))
    if args.depth and (args.max_hours or args.max_cost):
        raise UserError("--depth and a budget (--max-hours, --max-cost) exclude each other: a budget chooses the depth")
    given = [name for name in RECIPE_FLAGS if getattr(args, name) != parser.get_default(name)]
    if args.recipe and (given or args.max_hours or args.max_cost):
        raise UserError(f"--recipe says what to train: leave out --{given[0].replace('_', '-')}" if given else
                        "--recipe and a budget (--max-hours, --max-cost) exclude each other")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    hardware, machine = choose_hardware(args)
    if args.max_hours or args.max_cost:
        estimates = [find_deepest(args, hardware, machine)]
    elif args.preset:
        estimates = [estimate_run(apply_to(args, name), depth, hardware, machine)
                     for name in args.preset for depth in list_depths(args, name)]
    elif args.recipe:
        estimates = [estimate_run(argparse.Namespace(**vars(args) | asdict(RECIPES[name])), RECIPES[name].depth,
                                  hardware, machine) for name in args.recipe]
    else:
        estimates = [estimate_run(args, depth, hardware, machine) for depth in args.depth or [20]]
    results = {"hardware": asdict(hardware), "compute": asdict(machine), "runs": [asdict(e) for e in estimates]}
    for result, estimate in zip(results["runs"], estimates, strict=True):
        result["memory"] |= {name: getattr(estimate.memory, name) for name in ("peak", "worst_phase", "needed")}
    if args.shards:
        print0(max(count_shards(estimate.plan.total_tokens, args.shards) for estimate in estimates))
    elif args.json:
        print0(json.dumps(results, indent=2))
    else:
        print_table(estimates, hardware, machine, args.recipe or [], [
            name for name in args.preset or () for _ in list_depths(args, name)])
    return results


def apply_to(args: argparse.Namespace, name: str) -> argparse.Namespace:
    """The flags with those of a preset."""
    typed = {flag: value for flag, value in args.typed.items() if flag != "depth"}
    return argparse.Namespace(**vars(args) | apply_preset(name, typed, vars(args)) | {"preset": name})


def list_depths(args: argparse.Namespace, name: str) -> list[int]:
    """The depths at which a preset is planned."""
    shape = find_preset(name).shape
    return [shape["n_layer"]] if shape else args.depth or [20]


def choose_hardware(args: argparse.Namespace) -> tuple[Hardware, Machine]:
    """The GPU from the table, or as described; dtype, attention and compilation as training would choose them there."""
    gpu = devices.find_gpu(args.gpu)
    if not gpu and not (args.tflops and args.gb):
        known = ", ".join(name for name, *_ in devices.GPUS)
        raise UserError(f"--gpu {args.gpu} is not in the table; add --tflops (dense bf16 TFLOP/s of one) and --gb (its "
                        f"memory), or choose one of {known}")
    name, peak_flops, memory_gib = gpu or (args.gpu.lower(), None, None)
    price = devices.find_gpu(name, devices.GPU_PRICES) if args.price is None else (name, args.price)
    if args.max_cost and price is None:
        raise UserError(f"--max-cost needs --price, dollars per GPU hour, for no price is known for {name}")
    hardware = Hardware(name, args.nproc, args.tflops * 1e12 if args.tflops else peak_flops, args.gb or memory_gib,
                        price and price[1])
    is_cpu, dtype, attention = name == "cpu", args.dtype, args.attention
    if dtype == "auto":
        dtype = "float16" if name in WITHOUT_BF16 else "bfloat16"
    if attention == "auto":
        attention = "blocks" if is_cpu else "fa3" if name.split()[0] in HOPPER else \
            "flex" if name in WITHOUT_BF16 else "fa2"    # which needs Ampere
    return hardware, Machine(dtype, attention, args.compile == "on", "cpu" if is_cpu else "cuda", args.nproc, args.loss,
                             args.fp8 == "on")


def estimate_run(args: argparse.Namespace, depth: int, hardware: Hardware, machine: Machine) -> Estimate:
    """The run of one depth."""
    T, preset = args.max_seq_len, find_preset(args.preset)
    rule = find_rule(preset.rule)
    machine = replace(machine, has_muon=rule.has_muon)
    config = make_config(depth, vocab_size=args.vocab_size, sequence_len=T, aspect_ratio=args.aspect_ratio,
                         head_dim=args.head_dim, window_pattern=args.window_pattern,
                         **preset.shape | preset.knobs | parse_knobs(args.knobs))
    plan = make_plan(config, estimate_flops(config), num_iterations=args.num_iterations,
                     target_flops=args.target_flops, target_param_data_ratio=args.target_param_data_ratio,
                     batch_tokens=args.total_batch_size, weight_decay=preset.flags.get("weight_decay", WEIGHT_DECAY),
                     seq_len_warmup=args.seq_len_warmup, rule=rule, step_multiple=T * hardware.num_gpus)
    rows = plan.batch_tokens // (T * hardware.num_gpus)
    if rows < 1 or plan.batch_tokens % (T * hardware.num_gpus):
        raise UserError(f"a step of {plan.batch_tokens} tokens at depth {depth} must be a multiple of "
                        f"{T * hardware.num_gpus}, a row of {T} tokens on each of {hardware.num_gpus} ranks; set "
                        "--total-batch-size, or change --nproc or --max-seq-len")
    if args.device_batch_size != "auto" and rows % args.device_batch_size:
        raise UserError(f"--device-batch-size {args.device_batch_size} must divide the {rows} rows of a step on each "
                        f"rank at depth {depth}")
    memory_bytes = hardware.memory_gib * GIB
    micro_rows = args.device_batch_size
    if micro_rows == "auto":
        micro_rows = memory.largest_micro_rows(config, T, machine, memory_bytes, rows) or 1
    predicted = memory.predict_memory(config, T, micro_rows, machine, rows // micro_rows)
    mfu, source = (args.mfu / 100, "asked for") if args.mfu else devices.expect_mfu(hardware.name, depth)
    hours = plan.total_flops / (mfu * hardware.peak_flops * hardware.num_gpus) / 3600
    fits = predicted.needed <= get_usable_frac(machine) * memory_bytes
    network = args.fabric and predict_step(
        config, machine, Network(find_fabric(args.fabric), hardware.num_gpus, args.nodes), mfu * hardware.peak_flops,
        micro_rows * T, rows // micro_rows, rule=rule)
    hours += sum(network.exposed_sec.values()) * plan.num_iterations / 3600 if network else 0.0
    return Estimate(config, plan, fits, micro_rows, rows // micro_rows, predicted,
                    count_hardware_flops(config, plan, hardware.num_gpus, rule), mfu, source, hours,
                    None if hardware.dollars is None else hours * hardware.num_gpus * hardware.dollars,
                    count_shards(plan.total_tokens, "climbmix"), network)


def count_shards(num_tokens: int, source: str) -> int:
    """Training shards of a source that hold so many tokens, or all that it has: text that runs out is repeated."""
    hub = HUB_SOURCES[source]
    return min(math.ceil(SPARE_DATA * num_tokens * CHARS_PER_TOKEN / hub.shard_chars), len(hub.train))


def count_hardware_flops(config: GPTConfig, plan: Plan, num_gpus: int, rule: TrainingRule) -> float:
    """FLOPs that the run executes. They differ from model FLOPs in the keys hidden by attention's mask (left out), the
    scores recomputed in the backward pass (7 products a key, not 6), and Muon's orthogonalisation."""
    flops, first_step = plan.total_flops, 0
    stages = [(stage.end_step, stage.row_tokens) for stage in plan.short_rows or ()]
    for end_step, T in [*stages, (plan.num_iterations, config.sequence_len)]:
        keys = 0.0    # that a token sees on average, over all layers
        for layer in range(config.n_layer):
            w = min(config.window(layer), T - 1)
            keys += (w + 1) - w * (w + 1) / (2 * T)
        model_keys = sum(min(config.window(layer), T) for layer in range(config.n_layer))
        per_token = config.n_head * config.head_dim * (14 * keys - 12 * model_keys)
        flops, first_step = flops + per_token * (end_step - first_step) * plan.batch_tokens, end_step
    return flops + count_update_flops(config, num_gpus, rule) * plan.num_iterations


def count_update_flops(config: GPTConfig, num_gpus: int, rule: TrainingRule) -> int:
    """FLOPs of Muon's orthogonalisation in a step, on all GPUs together, padding included."""
    layers, flops = range(config.n_layer), 0
    by_head = Counter(shape for layer in layers for shape in list_by_head(config, layer) if rule.muon.get("by_heads"))
    for shape, num in memory.count_shapes(config).items():
        flops += count_muon_flops(*shape, -(-num // num_gpus) * num_gpus, by_head[shape], config.head_dim)
    for E, *shape in (shape for layer in layers for shape in memory.list_experts(config, layer)):
        flops += count_muon_flops(*shape, memory.count_own_rows(E, math.prod(shape), num_gpus) * num_gpus)
    return flops * rule.has_muon


def find_deepest(args: argparse.Namespace, hardware: Hardware, machine: Machine) -> Estimate:
    """The deepest model whose run fits the memory and the budget."""
    estimates = []
    for depth in range(1, MAX_DEPTH + 1):
        with contextlib.suppress(UserError):  # a shallow model's batch may have fewer rows than there are ranks
            estimates.append(estimate_run(args, depth, hardware, machine))
    if not estimates:
        return estimate_run(args, MAX_DEPTH, hardware, machine)  # raises: no depth can take these flags
    max_hours, max_dollars = args.max_hours or math.inf, args.max_cost or math.inf
    within = [estimate for estimate in estimates
              if estimate.fits and estimate.hours <= max_hours and (estimate.dollars or 0.0) <= max_dollars]
    if within:
        return within[-1]
    shallowest = estimates[0]
    limits = [text.format(most) for text, most in (("{:g} hours", args.max_hours), ("${:g}", args.max_cost)) if most]
    raise UserError(f"no depth trains within {' and '.join(limits)} on {hardware.num_gpus} {hardware.name}: depth "
                    f"{shallowest.config.n_layer} takes {format_hours(shallowest.hours)}"
                    f"{'' if shallowest.dollars is None else ', ' + format_dollars(shallowest.dollars)} and "
                    f"{shallowest.memory.peak / GIB:.1f} GiB on each; allow more, or shorten the run with "
                    "--target-param-data-ratio")


def format_ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


NETWORK_ROWS = (
    ("a step's computation",              lambda step: format_ms(step.compute_sec)),
    ("  its messages",                    lambda step: f"{step.num_messages}, {step.num_bytes / 1e6:,.0f} MB"),
    ("  their time on the network",       lambda step: format_ms(step.link_sec)),
    ("  of it not hidden by computation", lambda step: format_ms(sum(step.exposed_sec.values()))),
)


def print_table(estimates: list[Estimate], hardware: Hardware, machine: Machine, recipes: list[str],
                presets: list[str]) -> None:
    """One column a depth, recipe or preset, then the sources of the figures."""
    def gib(num_bytes: float) -> str:
        return f"{num_bytes / GIB:.2f}"
    rows: list[tuple[str, list[str]]] = []

    def add(label: str, show) -> None:
        rows.append((label, [show(estimate) for estimate in estimates]))

    def add_published(label: str, show) -> None:
        if recipes:
            rows.append((label, [show(RECIPES[name]) for name in recipes]))
    if recipes:
        rows.append(("recipe", recipes))
    if presets:
        rows.append(("preset", presets))
    add("depth", lambda e: str(e.config.n_layer))
    add("width, heads", lambda e: f"{e.config.n_embd}, {e.config.n_head}")
    add("vocabulary", lambda e: f"{e.config.vocab_size:,}")
    add("parameters", lambda e: f"{count_params(e.config)['total'] / 1e6:,.1f} M")
    if any(e.config.num_experts for e in estimates):
        add("  active for a token", lambda e: f"{count_active(count_params(e.config)) / 1e6:,.1f} M")
    add("training tokens", lambda e: f"{e.plan.total_tokens / 1e9:,.3f} B")
    add("tokens per scaling parameter", lambda e: f"{e.plan.tokens_per_param:.2f}")
    add("steps", lambda e: f"{e.plan.num_iterations:,}")
    add("tokens of a step", lambda e: f"{e.plan.batch_tokens:,}")
    add_published("warm-down, part of the run", lambda run: f"{run.warmdown_ratio:.0%}")
    add_published("final learning rate, of the peak", lambda run: f"{run.final_lr_frac:.0%}")
    # Runs of other contexts have other lengths of short rows
    ends = [{stage.row_tokens: f"{stage.end_step:,}" for stage in e.plan.short_rows or ()} for e in estimates]
    for row_tokens in sorted(set().union(*ends)):
        rows.append((f"steps until rows are longer than {row_tokens}", [steps.get(row_tokens, "-") for steps in ends]))
    add("rows of a micro-batch (--device-batch-size)", lambda e: str(e.micro_rows))
    add("micro-batches of a step (gradient accumulation)", lambda e: str(e.num_micro))
    add("climbmix shards to download", lambda e: f"{e.num_shards:,}")
    rows.append(("GiB on each device", [""] * len(estimates)))
    for label, part in (("parameters", "parameters"), ("gradients", "gradients"), ("optimizer state", "optimizer")):
        add(f"  {label}", lambda e, part=part: gib(getattr(e.memory, part)))
    add("  activations", lambda e: gib(sum(e.memory.activations.values())))
    for part in estimates[0].memory.activations:
        add(f"    {part}", lambda e, part=part: gib(e.memory.activations[part]))
    add("  logits and loss", lambda e: gib(e.memory.loss))
    for phase in estimates[0].memory.phases:
        add(f"  in use, {phase}", lambda e, phase=phase: gib(e.memory.phases[phase]))
    if hardware.name == "cpu":
        add("  a checkpoint's copy in memory", lambda e: gib(e.memory.checkpoint))
    add(f"  peak, of {get_usable_frac(machine) * hardware.memory_gib:.1f} that can be used",
        lambda e: gib(e.memory.needed) + ("" if e.fits else " DOES NOT FIT"))
    add("model FLOPs", lambda e: f"{e.plan.total_flops:.3g}")
    add("hardware FLOPs", lambda e: f"{e.hardware_flops:.3g}")
    add("expected MFU", lambda e: f"{100 * e.mfu:.1f}%")
    for label, show in NETWORK_ROWS if estimates[0].network else ():
        add(label, lambda e, show=show: show(e.network))
    add("time", lambda e: format_hours(e.hours))
    if hardware.dollars is not None:
        add(f"cost at ${hardware.dollars:g} per GPU hour", lambda e: format_dollars(e.dollars))
    add_published("published time, on 8 H100 in fp8", lambda run: f"{run.minutes:.1f} min")
    add_published("published CORE", lambda run: f"{run.core:.4f}")
    print0(f"{hardware.num_gpus} x {hardware.name}, {hardware.peak_flops / 1e12:g} TFLOP/s and "
           f"{hardware.memory_gib:g} GiB each\n")
    label_width = max(len(label) for label, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(estimates))]
    for label, cells in rows:
        print0(f"{label:{label_width}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    print0(f"\nMFU: {estimates[0].mfu_source}.")
    if estimates[0].network:
        print0("Network: predicted, not compared with GPUs; what NVLink costs 8 H100 is in the published MFU already.")
    print0("Time is training alone: evaluation, compiling and downloads come on top.")
    for name in recipes:
        print0(f"Published, {name}: {RECIPES[name].source}.")
    for name in dict.fromkeys(presets):
        print0(f"Preset {name}: {find_preset(name).source}.")
    compared = "compared with tensors counted one by one; the process grows by up to twice as much" \
        if machine.device_type == "cpu" else "not yet compared with a GPU"
    print0(f"Memory: {machine.dtype}{', fp8' if machine.is_fp8 else ''}, attention {machine.attention}, {machine.loss} "
           f"loss, {'' if machine.is_compiled else 'not '}compiled; predicted, {compared}.")
    shard_tokens = HUB_SOURCES["climbmix"].shard_chars / CHARS_PER_TOKEN
    print0(f"Shards: about {shard_tokens / 1e6:.0f} M tokens each (assumption, for a vocabulary of 32K), and "
           f"{100 * (SPARE_DATA - 1):.0f}% to spare.")


def format_hours(hours: float) -> str:
    return f"{hours:,.2f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def format_dollars(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 0.1 else f"${dollars:.4f}"


if __name__ == "__main__":
    run_script(main)
