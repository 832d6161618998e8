"""What the network costs: collectives measured, links injected around the real step, GPUs' steps predicted.

    python -m dev.fabric measure                                our collectives on 2 and 4 gloo ranks, fitted
    python -m dev.fabric inject                                 steps of 1, 2 and 4 ranks over links, and predicted
    python -m dev.fabric inject --shape --links 0:200 0:50      and over links that tc shapes; needs root
    python -m dev.fabric predict --depth 12 24 --nproc 8        GPUs over six fabrics, what would help, a picture
    python -m dev.fabric predict --trace 64 256 1024            messages and memory of many ranks, traced
    torchrun --nproc-per-node 8 -m dev.fabric -- measure        NCCL

Conventions are nccl-tests': bytes are those of the whole buffer, algbw = bytes / time, busbw = algbw times what goes
through a link as a part of the buffer, so that it is the link's rate for a ring of any size. alpha, beta and the model
of a step: nanochat/fabric.py. A link is named as there (ib, 10g, ...) or is MICROSECONDS:MEGABYTES_PER_SECOND.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.distributed as dist

from dev.links import Wire, run_ranks, shaped_namespaces, stopped_by_sigterm, warn_of_cores
from dev.timing import make_training, print_rows
from nanochat import optim
from nanochat.command_line import Parser, json_file, run_script
from nanochat.common import UserError, gather, get_ranks, print0, write_json
from nanochat.config import GPTConfig
from nanochat.cross_entropy import LossScaler
from nanochat.devices import COMPUTE_DTYPES, init_compute, synchronize
from nanochat.fabric import FABRICS, Event, Fabric, Network, count_hops, find_fabric, list_step, simulate
from nanochat.memory import Machine
from nanochat.scaling import make_config
from nanochat.train import train_step

KINDS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")    # no step of ours sends the last
LINKS = ("500:400", "100:100", "5000:2000")    # of a toy's messages: some of it hidden, most of it not, latency alone
TOLERANCE = 0.15


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure | inject | predict")

    def add_command(name: str, words: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=words, description=words)
        command.add_argument("--json", type=json_file, help="file for the figures, too")
        return command
    measure = add_command("measure", "collectives over sizes and ranks, fitted to alpha and beta")
    inject = add_command("inject", "the real step of a toy over links, measured and predicted")
    for command, ranks, rounds in ((measure, (2, 4), 20), (inject, (1, 2, 4), 7)):
        command.add_argument("--ranks", type=int, nargs="+", default=ranks, help="processes on this machine")
        command.add_argument("--rounds", type=int, default=rounds, help="measurements of which the median counts")
        command.add_argument("--here", action="store_true", help="be one rank, of those that the environment names")
        command.add_argument("--device-type", default="cpu", help="under torchrun also cuda")
    measure.add_argument("--max-kib", type=int, default=16 * 1024, help="the largest buffer")
    inject.add_argument("--links", nargs="*", default=LINKS, help="fabrics, or MICROSECONDS:MEGABYTES_PER_SECOND")
    inject.add_argument("--shape", action="store_true", help="also over links of that rate that tc shapes, with root")
    inject.add_argument("--depth", type=int, default=4)
    inject.add_argument("--max-seq-len", type=int, default=64)
    inject.add_argument("--vocab-size", type=int, default=4096)
    inject.add_argument("--rows", type=int, default=4, help="of a step, all ranks together")
    inject.add_argument("--dtype", choices=COMPUTE_DTYPES, default="float32")
    predict = add_command("predict", "steps of GPUs over fabrics, predicted, and what would help")
    predict.add_argument("--depth", type=int, nargs="+", default=[12, 24])
    predict.add_argument("--nproc", type=int, default=8, help="GPUs")
    predict.add_argument("--nodes", type=int, default=1, help="machines; the fabric is between them alone")
    predict.add_argument("--fabric", nargs="+", default=list(FABRICS), help=f"of {', '.join(FABRICS)}, or a link")
    predict.add_argument("--gpu", default="h100")
    predict.add_argument("--total-batch-size", type=int, help="tokens of a step (default: from the horizon)")
    predict.add_argument("--trace", type=int, nargs="+", metavar="RANKS", help="instead: trace a step of so many ranks")
    predict.add_argument("--out", type=Path, help="folder for the picture (default: figures, in the base folder)")
    args = parser.parse_args(argv)
    args.here = getattr(args, "here", False) or get_ranks().world_size > 1
    for name in ("ranks", "rounds", "max_kib", "depth", "max_seq_len", "vocab_size", "rows", "nproc", "nodes",
                 "total_batch_size", "trace"):
        values = getattr(args, name, None)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if getattr(args, "max_kib", 4) < 4:
        raise UserError(f"--max-kib {args.max_kib} must be at least 4: a fit needs two sizes, 1 KiB and 4")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.command == "predict":
        from dev.fabric_predict import predict  # which loads matplotlib; ranks needn't
        result = predict(args)
    else:
        with stopped_by_sigterm():
            result = {"measure": measure, "inject": inject}[args.command](args)
    if args.json and get_ranks().rank == 0:
        write_json(args.json, result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Measured


def measure(args: argparse.Namespace) -> dict:
    """Collectives on the ranks that this process is one of, or on new ones."""
    if args.here:
        if get_ranks().world_size < 2:
            raise UserError("--here: one rank alone sends nothing; start several with torchrun, or leave it out")
        device, _ = init_compute(args.device_type)
        rows = measure_here(device, args.max_kib * 1024, args.rounds)
    else:
        rows = []
        if min(args.ranks) < 2:
            raise UserError(f"--ranks {min(args.ranks)}: one rank alone sends nothing; measure at least 2")
        for num_ranks in args.ranks:
            warn_of_cores(num_ranks)
            rows += run_ranks(["dev.fabric", "measure", "--max-kib", str(args.max_kib), "--rounds", str(args.rounds),
                               "--device-type", args.device_type], num_ranks)["rows"]
    fits = fit_all(rows)
    if get_ranks().rank == 0:
        print_rows(rows)
        print()
        print_rows(fits)
    return {"rows": rows, "fits": fits}


def measure_here(device: torch.device, max_bytes: int, rounds: int) -> list[dict]:
    """A row for each collective and size. Collective: all ranks call it."""
    n, rows = dist.get_world_size(), []
    for kind in KINDS:
        num_bytes = 1024
        while num_bytes <= max_bytes:
            whole = torch.zeros(num_bytes // (4 * n) * n, device=device)
            own, other = whole.new_zeros(len(whole) // n), torch.zeros_like(whole)
            run = {"all_reduce": lambda whole=whole: dist.all_reduce(whole),
                   "reduce_scatter": lambda own=own, whole=whole: optim.reduce_scatter(own, whole),
                   "all_gather": lambda own=own, whole=whole: optim.all_gather(whole, own),
                   "all_to_all": lambda whole=whole, other=other: dist.all_to_all_single(other, whole)}[kind]
            seconds = median(time_together(run, device, rounds))
            algbw = whole.nbytes / seconds / 1e6
            rows.append({"ranks": n, "collective": kind, "KiB": whole.nbytes / 1024, "microseconds": seconds * 1e6,
                         "algbw MB/s": algbw, "busbw MB/s": algbw * count_hops(kind, n)[1]})
            num_bytes *= 4
    return rows


def time_together(run, device: torch.device, rounds: int, warmup: int = 3) -> list[float]:
    """Seconds of each round on its slowest rank; all begin together. Collective."""
    seconds = []
    for _ in range(warmup + rounds):
        dist.barrier()
        begin = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return np.max(gather(seconds[warmup:]), axis=0).tolist()


def fit_all(rows: list[dict]) -> list[dict]:
    """alpha and beta of each collective on each number of ranks."""
    fits = []
    for n, kind in dict.fromkeys((row["ranks"], row["collective"]) for row in rows):
        some = [row for row in rows if (row["ranks"], row["collective"]) == (n, kind)]
        sizes = np.array([row["KiB"] * 1024 for row in some])
        seconds = np.array([row["microseconds"] * 1e-6 for row in some])
        alpha, beta, half_bytes, error = fit_link(kind, n, sizes, seconds)
        fits.append({"ranks": n, "collective": kind, "alpha us": alpha * 1e6, "beta MB/s": beta / 1e6,
                     "half speed KiB": half_bytes / 1024, "mean error %": 100 * error})
    return fits


def fit_link(kind: str, n: int, sizes: np.ndarray, seconds: np.ndarray) -> tuple[float, float, float, float]:
    """alpha, beta, the bytes at half of the full speed and the mean relative error, by least squares of that error."""
    hops, factor = count_hops(kind, n)
    terms = np.stack((np.full_like(seconds, hops), sizes * factor), axis=1)
    (alpha, inverse), *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds), rcond=None)
    if inverse <= 0:    # no rate can be seen in these sizes
        alpha, inverse = 1 / np.mean(hops / seconds), 0.0
    if alpha < 0:
        alpha, inverse = 0.0, 1 / np.mean(sizes * factor / seconds)
    error = np.abs(terms @ (alpha, inverse) / seconds - 1).mean()
    beta = 1 / inverse if inverse else float("inf")
    return float(alpha), float(beta), float(alpha * hops * beta / factor), float(error)


# ---------------------------------------------------------------------------------------------------------------------
# Injected, and shaped


def inject(args: argparse.Namespace) -> dict:
    """The toy's step over each link, measured and predicted from the step over a free one."""
    fabrics = [find_fabric(text) for text in args.links]
    if args.shape and any(fabric.alpha or fabric.beta == float("inf") for fabric in fabrics):
        raise UserError("--shape shapes the rate alone, by tc's tbf, since a latency would need netem, which this code "
                        "doesn't use; give links of a rate alone, such as --links 0:200 0:50")
    if args.here:
        return inject_here(args, fabrics)
    if not fabrics:
        raise UserError("--links needs a link at least, such as 500:400")
    if uneven := [num_ranks for num_ranks in args.ranks if args.rows % num_ranks]:
        raise UserError(f"--rows {args.rows} must be a multiple of the {uneven[0]} ranks")
    if args.shape:
        with shaped_namespaces(2, 1e6):    # whether it can be had
            pass
    rows, shaped = [], []
    for num_ranks in args.ranks:
        warn_of_cores(num_ranks)
        argv = ["dev.fabric", "inject", *(word for name in ("depth", "max_seq_len", "vocab_size", "rows", "rounds",
                                                           "dtype", "device_type")
                                          for word in ("--" + name.replace("_", "-"), str(getattr(args, name))))]
        here = run_ranks([*argv, "--links", *args.links], num_ranks)
        rows += here["rows"]
        for fabric, row in zip(fabrics, here["rows"], strict=True) if args.shape and num_ranks > 1 else ():
            shaped.append(shape(args, argv, num_ranks, fabric, row, here))
    print_rows(rows)
    worst = max((abs(row["error %"]) for row in rows), default=0)
    print0(f"worst error {worst:.1f}%, {'within' if worst <= 100 * TOLERANCE else 'beyond'} {TOLERANCE:.0%}")
    if shaped:
        print0("\nThe same step where tc shapes what each rank sends, and what a collective of 1 MiB takes there, as a "
               "multiple of alpha and beta's:")
        print_rows(shaped)
    return {"rows": rows, "shaped": shaped}


def inject_here(args: argparse.Namespace, fabrics: list[Fabric]) -> dict:
    """What `inject` does on one rank; all ranks return the same."""
    device, ranks = init_compute(args.device_type)
    config = make_toy(args)
    settings = argparse.Namespace(compile="off", rows=args.rows // ranks.world_size)
    model, optimizer, batch = make_training(config, settings, device, getattr(torch, args.dtype))
    n, wire = ranks.world_size, Wire(device)
    scaler = LossScaler() if args.dtype == "float16" else None
    events = list_toy_step(args, n, device.type)
    seconds, phases = {None: [], **{fabric: [] for fabric in fabrics}}, []
    with wire.tapped():
        for i in range(2 + args.rounds):
            for fabric, times in seconds.items():
                wire.clear()
                wire.network = Network(fabric, n, 1) if fabric else None
                begin = wire.meet()
                train_step(model, optimizer, batch, settings.rows, scaler)
                synchronize(device)
                end = time.perf_counter()
                if i >= 2:
                    times.append(end - begin)
                    phases += [] if fabric else [cut_step(events, wire, begin, end)]
    seconds = {fabric: median(np.max(gather(times), axis=0).tolist()) for fabric, times in seconds.items()}
    measured = {key: mean(gather(median(times[key] for times in phases))) for key in phases[0]}
    flops = Counter()
    for event in events:
        flops[event.phase] += event.amount if event.kind == "compute" else 0
    sec_per_flop = {phase: measured.pop(phase) / flops[phase] for phase in ("forward", "backward", "update")}
    rows = []
    for fabric in fabrics:
        step = simulate(events, sec_per_flop, Network(fabric, n, 1), measured)
        rows.append({"ranks": n, "link": fabric.name, "messages": step.num_messages, "MB": step.num_bytes / 1e6,
                     "link ms": step.link_sec * 1e3, "free step ms": seconds[None] * 1e3,
                     "predicted ms": step.step_sec * 1e3, "measured ms": seconds[fabric] * 1e3,
                     "error %": 100 * (step.step_sec / seconds[fabric] - 1)})
    return {"rows": rows, "step_sec": seconds[None], "sec_per_flop": sec_per_flop,
            "free_sec": [measured[key] for key in sorted(measured)]}


def make_toy(args: argparse.Namespace) -> GPTConfig:
    return make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len, head_dim=64)


def list_toy_step(args: argparse.Namespace, num_ranks: int, device_type: str = "cpu") -> list[Event]:
    """The events of a step of the toy on each of so many ranks."""
    machine = Machine(args.dtype, "blocks", False, device_type, num_ranks)
    return list_step(make_toy(args), machine, args.rows // num_ranks * args.max_seq_len)


def cut_step(events: list[Event], wire: Wire, begin: float, end: float) -> dict[object, float]:
    """Seconds of a free step's phases and, by key, of its waits, which these are without. Messages part the phases: the
    first gradient's, and the flags after the last."""
    keys = [event.key for event in events if event.phase == "backward" and event.kind not in ("compute", "wait")]
    if not keys:    # one rank; how its time is cut doesn't matter
        return {phase: (end - begin) / 3 for phase in ("forward", "backward", "update")}
    begins = {moment.event.key: moment.begin for moment in wire.moments if moment.event.kind != "wait"}
    first, last = begins[keys[0]], begins[keys[-1]]
    waits = [moment for moment in wire.moments if moment.event.kind == "wait"]
    phases = {"forward": (begin, first), "backward": (first, last), "update": (last, end)}
    computed = {phase: stop - start - sum(wait.end - wait.begin for wait in waits if start <= wait.begin < stop)
                for phase, (start, stop) in phases.items()}
    return computed | {wait.event.key: wait.end - wait.begin for wait in waits}


@dataclass(frozen=True)
class GlooNetwork(Network):
    """A network whose collectives take multiples of a ring's time."""
    multiples: dict[str, float]

    def time(self, kind: str, num_bytes: float) -> float:
        return super().time(kind, num_bytes) * self.multiples[kind]


def shape(args: argparse.Namespace, argv: list[str], num_ranks: int, fabric: Fabric, row: dict,
          here: dict) -> dict:
    """The same step, and collectives, in network namespaces whose rate tc shapes."""
    def run(words: list[str]) -> dict:
        with shaped_namespaces(num_ranks, fabric.beta) as before:
            return run_ranks(words, num_ranks, before, "10.77.0.1", GLOO_SOCKET_IFNAME="eth0",
                             TORCH_CPP_LOG_LEVEL="ERROR")    # else it says that these hosts have no names
    step_sec, network, multiples = run([*argv, "--links"])["step_sec"], Network(fabric, num_ranks, 1), {}
    for line in run(["dev.fabric", "measure", "--max-kib", "1024", "--rounds", "5"])["rows"]:
        ideal_sec = network.time(line["collective"], line["KiB"] * 1024)
        multiples[line["collective"]] = line["microseconds"] * 1e-6 / ideal_sec    # the largest buffer's is the last
    gloo = simulate(list_toy_step(args, num_ranks), here["sec_per_flop"],
                    GlooNetwork(fabric, num_ranks, 1, multiples), dict(enumerate(here["free_sec"])))
    return {"ranks": num_ranks, "link": fabric.name, "predicted ms": row["predicted ms"],
            "injected ms": row["measured ms"], "shaped ms": step_sec * 1e3, "shaped / injected": step_sec * 1e3 /
            row["measured ms"], "predicted with these multiples ms": gloo.step_sec * 1e3, **multiples}


if __name__ == "__main__":
    run_script(main)
