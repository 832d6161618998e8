"""Steps of GPUs over fabrics, predicted: what dev/fabric.py predict prints and draws."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from matplotlib.figure import Figure

from dev.bench_memory import fake_step, trace_step
from dev.figures import COLORS, MARKERS, make_panels, save_figure, styled
from dev.links import Wire
from dev.timing import print_rows
from nanochat.common import UserError, print0
from nanochat.config import GPTConfig, count_params, estimate_flops
from nanochat.devices import expect_mfu, find_gpu
from nanochat.fabric import FABRICS, Fabric, Network, StepTime, find_fabric, list_step, predict_step
from nanochat.memory import GIB, Machine, largest_micro_rows, predict_memory
from nanochat.scaling import make_config, make_plan
from nanochat.train import Batch, add_gradients

VOCAB_SIZE, T = 32768, 2048
GPUS_PER_NODE = 8           # of the sweep over ranks
NUM_LOCAL = 30              # DiLoCo's steps between two synchronisations (arXiv 2311.08105 has 500 at most)
LARGER = 4
WHAT_IFS = {"fp32 gathers": {"has_bf16_gathers": False}, "reduced after backward": {"reduces_in_backward": False}}


@dataclass(frozen=True)
class Job:
    """A step of one depth on so many GPUs: what each computes, and how fast."""
    config:        GPTConfig
    machine:       Machine
    micro_rows:    int
    num_micro:     int
    flops_per_sec: float    # of the model's FLOPs, by the MFU that is expected

    @property
    def tokens(self) -> int:
        return self.micro_rows * self.num_micro * T * self.machine.world_size

    @property
    def ideal_sec(self) -> float:
        """Of the model's FLOPs alone."""
        return estimate_flops(self.config) * self.tokens / self.machine.world_size / self.flops_per_sec

    def over(self, network: Network, **settings) -> StepTime:
        return predict_step(self.config, self.machine, network, self.flops_per_sec, self.micro_rows * T,
                            self.num_micro, **settings)

    def get_efficiency(self, step_sec: float) -> float:
        return self.ideal_sec / step_sec


def make_job(depth: int, num_ranks: int, gpu: str = "h100", batch_tokens: int | None = None) -> Job:
    """The plan's batch, or a row for each rank where it has fewer; micro-batches as training would cut them."""
    found = find_gpu(gpu)
    if not found:
        raise UserError(f"--gpu {gpu} is not in the table of nanochat/devices.py; choose one of it, such as h100")
    config, machine = make_config(depth, vocab_size=VOCAB_SIZE, sequence_len=T), Machine(world_size=num_ranks)
    plan = make_plan(config, estimate_flops(config), batch_tokens=batch_tokens, num_iterations=1)
    rows = max(1, plan.batch_tokens // (T * num_ranks))
    if batch_tokens and rows * T * num_ranks != batch_tokens:
        raise UserError(f"--total-batch-size {batch_tokens} must be a multiple of {T * num_ranks}, a row of {T} tokens "
                        f"on each of {num_ranks} ranks")
    micro_rows = largest_micro_rows(config, T, machine, found[2] * GIB, rows) or 1
    return Job(config, machine, micro_rows, rows // micro_rows, expect_mfu(found[0], depth)[0] * found[1])


def synchronise_rarely(job: Job, network: Network, num_steps: int = NUM_LOCAL) -> float:
    """Seconds of a step of DiLoCo: each rank takes all of its steps alone, with the whole optimizer, and every so many
    steps all parameters, in fp32, are averaged. What this costs in loss isn't predicted."""
    alone = replace(job, machine=replace(job.machine, world_size=1)).over(Network(network.fabric, 1, 1))
    return alone.step_sec + network.time("all_reduce", 4 * count_params(job.config)["total"]) / num_steps


def predict(args: argparse.Namespace) -> dict:
    if args.trace:
        rows = [trace_ranks(args.depth[0], num_ranks) for num_ranks in args.trace]
        print_rows(rows)
        return {"trace": rows}
    fabrics, result = [find_fabric(text) for text in args.fabric], {}
    for depth in args.depth:
        job = make_job(depth, args.nproc, args.gpu, args.total_batch_size)
        rows = [describe(job, Network(fabric, args.nproc, args.nodes)) for fabric in fabrics]
        helps = [list_helps(job, Network(fabric, args.nproc, args.nodes)) for fabric in fabrics]
        scaling = [scale(depth, fabric, args.gpu) for fabric in fabrics]
        print0(f"Depth {depth}, {args.nproc} {args.gpu}{f' in {args.nodes} nodes' if args.nodes > 1 else ''}, "
               f"{job.tokens:,} tokens a step, predicted; ms of a step:")
        print_rows(rows)
        print0("\nEfficiency in %, predicted, as it is and otherwise:")
        print_rows(helps)
        print0(f"\nEfficiency in % on more GPUs, predicted, in nodes of {GPUS_PER_NODE} over NVLink:")
        print_rows(scaling)
        print0()
        result[f"d{depth}"] = {"steps": rows, "helps": helps, "ranks": scaling}
    name = f"{args.nproc} {args.gpu}" + (f" in {args.nodes} nodes" if args.nodes > 1 else "")
    save_figure(draw_predictions(result, name), "fabric", args.out)
    return result


def describe(job: Job, network: Network) -> dict:
    """A step phase by phase: how long the link is busy, and what computation doesn't hide."""
    step = job.over(network)
    return {"fabric": network.fabric.name, "computation": step.compute_sec * 1e3, "messages": step.num_messages,
            "MB": round(step.num_bytes / 1e6), "link": step.link_sec * 1e3,
            "hidden": step.link_sec * 1e3 - sum(step.exposed_sec.values()) * 1e3,
            **{f"waits in {phase}": sec * 1e3 for phase, sec in step.exposed_sec.items()},
            "step": step.step_sec * 1e3, "tokens/s": round(job.tokens / step.step_sec),
            "efficiency %": 100 * job.get_efficiency(step.step_sec)}


def list_helps(job: Job, network: Network) -> dict:
    """Efficiency of the step as it is, without what it does already, and with what it could do."""
    larger = replace(job, num_micro=LARGER * job.num_micro)
    seconds = {"as it is": job.over(network).step_sec,
               **{name: job.over(network, **settings).step_sec for name, settings in WHAT_IFS.items()},
               "neither": job.over(network, has_bf16_gathers=False, reduces_in_backward=False).step_sec}
    return {"fabric": network.fabric.name,
            **{name: 100 * job.get_efficiency(sec) for name, sec in seconds.items()},
            f"{LARGER} x the batch": 100 * larger.get_efficiency(larger.over(network).step_sec),
            f"DiLoCo, every {NUM_LOCAL}": 100 * job.get_efficiency(synchronise_rarely(job, network))}


def scale(depth: int, fabric: Fabric, gpu: str, ranks: Sequence[int] = (8, 16, 32, 64, 128, 256, 512, 1024)) -> dict:
    """Efficiency over ranks, the batch the plan's as long as each has a row. NVLink is one of all nodes."""
    row: dict[str, object] = {"fabric": fabric.name}
    for n in ranks:
        job, nodes = make_job(depth, n, gpu), n // GPUS_PER_NODE
        network = Network(FABRICS["nvlink"] if nodes == 1 else fabric, n, 1 if fabric.name == "nvlink" else nodes)
        row[str(n)] = 100 * job.get_efficiency(job.over(network).step_sec)
    return row


def trace_ranks(depth: int, num_ranks: int, rows: int = 1) -> dict:
    """Messages and memory of rank 0 of many, by a step on fake tensors whose messages go nowhere, and as predicted."""
    config = make_config(depth, vocab_size=VOCAB_SIZE, sequence_len=T)
    machine = Machine("bfloat16", "sdpa", False, "cpu", num_ranks)
    with fake_step(config, machine) as (model, optimizer), Wire().tapped() as wire:
        tokens = torch.zeros((rows, T + 1), dtype=torch.int64)
        add_gradients(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:], None), rows, 1.0)
        optimizer.reduce_gradients()
        optimizer.step()
    sent = [moment.event.amount for moment in wire.moments if moment.event.kind != "wait"]
    events = list_step(config, machine, rows * T)
    # without what train_step sends itself: the counts of targets, the flags, the loss
    expected = [event.amount for event in events if event.kind not in ("compute", "wait") and not event.is_host][:-1]
    return {"ranks": num_ranks, "messages": len(sent), "predicted": len(expected), "MB": sum(sent) / 1e6,
            "predicted MB": sum(expected) / 1e6,
            "GiB": max(trace_step(config, T, rows, machine).values()) / GIB,
            "predicted GiB": predict_memory(config, T, rows, machine).peak / GIB}


@styled
def draw_predictions(result: dict[str, dict], name: str) -> Figure:
    """Efficiency by fabric and by ranks, a column for each depth."""
    figure, axes = make_panels(2, len(result), width=5.2, height=3.9, sharey=True)
    for i, (depth, tables) in enumerate(result.items()):
        top, bottom = axes[:, i]
        names = [row["fabric"] for row in tables["helps"]]
        columns = list(tables["helps"][0])[1:]
        top.bar(names, [row["as it is"] for row in tables["helps"]], color=COLORS[5], width=0.6, label="as it is")
        for k, column in enumerate(columns[1:]):
            top.plot([j + 0.14 * (k - 2) for j in range(len(names))], [row[column] for row in tables["helps"]],
                     MARKERS[k], color=COLORS[(0, 1, 3, 2, 6)[k]], markersize=5, label=column)
        top.set_xticks(range(len(names)), [f"{row['fabric']}\n{format_step(row['step'])}" for row in tables["steps"]])
        top.set(title=f"depth {depth[1:]} on {name}, predicted", ylim=(0, 104))
        for k, row in enumerate(tables["ranks"]):
            ranks = [int(key) for key in row if key.isdecimal()]
            bottom.plot(ranks, [row[str(n)] for n in ranks], marker=MARKERS[k % len(MARKERS)], markersize=4,
                        color=COLORS[k % len(COLORS)], linewidth=1.3, label=row["fabric"])
        bottom.set_xscale("log", base=2)
        bottom.set_xticks(ranks, [str(n) for n in ranks])
        bottom.set(title=f"depth {depth[1:]}, nodes of {GPUS_PER_NODE}, predicted", xlabel="GPUs")
    for k in range(2):
        axes[k, 0].set_ylabel("tokens/s, % of what the MFU alone gives")
        axes[k, -1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def format_step(ms: float) -> str:
    return f"{ms / 1e3:,.1f} s" if ms >= 1e4 else f"{ms / 1e3:.2f} s" if ms >= 1e3 else f"{ms:.0f} ms"
