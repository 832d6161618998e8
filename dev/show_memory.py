"""Memory during a training step, part by part: traced, and as nanochat.memory predicts it.

    python -m dev.show_memory --depth 6
    python -m dev.show_memory --depth 24 --rows 8 --dtype float32 --attention blocks
    python -m dev.show_memory --depth 6 --knobs num_experts=8 moe_every=2    # experts beside the dense model

The trace is one eager step on fake tensors (dev/bench_memory.py), so that any size will do. A tensor that autograd
keeps belongs to the part of the model that made it; any other is workspace until it becomes a gradient or is freed.
Writes memory.png, by default to $NANOCHAT_BASE_DIR/figures.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dev.bench_memory import LiveBytes, fake_step, list_kept
from dev.figures import FAINT, INK, add_out, make_panels, save_figure, styled
from dev.timing import print_table
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.config import GPTConfig
from nanochat.cross_entropy import LOSSES
from nanochat.devices import COMPUTE_DTYPES
from nanochat.gpt import GPT
from nanochat.memory import ACTIVATIONS, Machine, list_usage
from nanochat.optim import MuonAdamW
from nanochat.presets import parse_knobs
from nanochat.scaling import make_config

MIB = 2**20
COLORS = {"parameters": "#5b6470", "optimizer state": "#aab1bd", "gradients": "#e69f00", "residual stream": "#0072b2",
          "attention": "#56b4e9", "MLP": "#009e73", "embedding, final norm": "#a5d8c6",
          "weights in the compute dtype": "#cc79a7", "logits and loss": "#d55e00", "workspace": "#f0e442"}

Phase = tuple[str, str]      # such as ("backward", "3"): a pass, and the layer's own part of it
Usage = tuple[Phase, dict]   # bytes by part at one time in a phase


class StepRecorder(LiveBytes):
    """The bytes of each part after every operation of a step."""

    def __init__(self, model: GPT, optimizer: MuonAdamW):
        super().__init__([])
        self.part_of: dict[int, str] = {}     # by address, as storages
        self.kind_of: dict[int, str] = {}     # the part that a tensor belongs to once autograd keeps it
        self.phase, self.part, self.kind = ("forward", "embed"), "workspace", "embedding, final norm"
        self.num_layers = len(model.transformer.h)
        self.timeline: list[Usage] = []
        self.mark(list_kept(model, optimizer), "optimizer state")
        self.mark([*model.parameters(), *model.buffers()], "parameters")
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(lambda param: self.mark([param.grad], "gradients"))
        for layer, block in enumerate(model.transformer.h):
            block.register_forward_pre_hook(lambda _, args, layer=layer: self.begin_block(layer, args[1]))
            block.register_forward_hook(lambda *call, layer=layer: self.end_block(layer, call[-1]))
        modules = [(block.attn, "attention") for block in model.transformer.h]
        modules += [(block.mlp, "MLP") for block in model.transformer.h]
        modules += [(embed, "attention") for embed in model.value_embeds.values()]
        for module, kind in modules:
            self.watch(module, kind)

    def watch(self, module: nn.Module, kind: str) -> None:
        """Count what `module` makes as `kind`."""
        outer: list[str] = []

        def begin(*_) -> None:
            outer.append(self.kind)
            self.kind = kind

        def end(*_) -> None:
            self.kind = outer.pop()
        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)

    def begin_block(self, layer: int, x0: Tensor) -> None:
        self.enter("forward", str(layer))
        self.kind = "residual stream"
        if layer == 0:
            x0.register_hook(lambda _: self.enter("backward", "embed"))

    def end_block(self, layer: int, out: Tensor) -> None:
        if layer == self.num_layers - 1:
            self.enter("forward", "norm")
        self.kind = "embedding, final norm"
        out.register_hook(lambda _: self.enter("backward", str(layer)))

    def enter(self, *phase: str) -> None:
        """Begin a phase; all that is made in that of the loss counts as the loss's, kept or not."""
        self.phase = phase
        self.part = "logits and loss" if phase[0] == "loss" else "workspace"

    def add(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key not in self.storages:
            super().add(tensor)
            self.part_of[key], self.kind_of[key] = self.part, self.kind

    def mark(self, tensors: list[Tensor], part: str) -> None:
        """Count these tensors as `part` from now on."""
        for tensor in tensors:
            self.add(tensor)
            self.part_of[tensor.untyped_storage()._cdata] = part

    def keep(self, tensor: Tensor) -> Tensor:
        """Autograd keeps this tensor for the backward pass."""
        key = tensor.untyped_storage()._cdata
        if self.part_of.get(key) == "workspace":
            self.part_of[key] = self.kind_of[key]
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outer = self.kind
        if func is torch.ops.aten._to_copy.default and self.part_of.get(args[0].untyped_storage()._cdata) \
                == "parameters":
            self.kind = "weights in the compute dtype"
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.kind = outer
        parts = dict.fromkeys(COLORS, 0)
        for key, (_, num_bytes) in self.storages.items():
            parts[self.part_of[key]] += num_bytes
        self.timeline.append((self.phase, parts))
        return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-seq-len", type=int, default=512, help="context in tokens")
    parser.add_argument("--rows", type=int, default=4, help="rows of the step, in one micro-batch")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="bfloat16")
    parser.add_argument("--attention", choices=("sdpa", "blocks"), default="sdpa")
    parser.add_argument("--knobs", nargs="+", default=[], metavar="KNOB=VALUE", help="other parts of the model, as of "
                        "scripts.base_train; a model with num_experts is shown beside the dense one")
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.rows < 1 or args.vocab_size < 1:
        raise UserError(f"--rows {args.rows} and --vocab-size {args.vocab_size} must be at least 1")
    knobs = parse_knobs(args.knobs)
    config = make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len, **knobs)
    machine = Machine(args.dtype, args.attention, is_compiled=False, device_type="cpu")
    measured = record_step(config, args.max_seq_len, args.rows, machine)
    predicted = list_usage(config, args.max_seq_len, args.rows, machine)
    results = {"phases": compare_phases(measured, predicted), "parts": compare_parts(measured, predicted)}
    for rows in results.values():
        print_table(list(rows[0]), [list(row.values()) for row in rows])
        print0()
    if config.num_experts:
        dense = replace(config, num_experts=0, top_k=1, moe_every=1)
        usages = {"dense": record_step(dense, args.max_seq_len, args.rows, machine), name_experts(config): measured}
        results["beside"] = compare_models(usages, count_sorted_bytes(config, args.rows * args.max_seq_len, machine))
        print_table(list(results["beside"][0]), [list(row.values()) for row in results["beside"]])
        print0()
        results["beside_figure"] = str(save_figure(draw_beside(usages), "memory_experts", args.out))
    title = f"One training step at depth {args.depth}: {args.rows} rows of {args.max_seq_len} tokens, vocabulary " \
            f"{args.vocab_size:,}, {args.dtype}, attention {args.attention}, eager"
    return results | {"figure": str(save_figure(draw_memory(measured, predicted, title), "memory", args.out))}


def record_step(config: GPTConfig, T: int, rows: int, machine: Machine) -> list[Usage]:
    """Bytes by part after each operation of one eager training step."""
    with fake_step(config, machine) as (model, optimizer):
        tokens = torch.zeros((rows, T + 1), dtype=torch.int64)
        with StepRecorder(model, optimizer) as recorder:
            with torch.autograd.graph.saved_tensors_hooks(recorder.keep, lambda tensor: tensor):
                x = model.forward_trunk(tokens[:, :-1])
                recorder.enter("loss", "")
                recorder.mark([x], "logits and loss")
                loss = LOSSES[model.loss](x, model.lm_head.weight, tokens[:, 1:], config.vocab_size)
            del x
            recorder.enter("backward", "norm")
            loss.backward()
            recorder.enter("update", "")
            optimizer.reduce_gradients()
            recorder.mark([part.grad for part in optimizer.parts], "gradients")
            optimizer.step()
    return recorder.timeline


def name_experts(config: GPTConfig) -> str:
    """Such as '8 experts, 1 a token, in 2 layers'."""
    num_layers = sum(map(config.has_experts, range(config.n_layer)))
    return f"{config.num_experts} experts, {config.top_k} a token, in {num_layers} layers"


def count_sorted_bytes(config: GPTConfig, N: int, machine: Machine) -> int:
    """Bytes of the rows that go into the experts sorted, and come out of them put back, of all layers."""
    return sum(2 * N * config.top_k * config.n_embd * machine.act_bytes for layer in range(config.n_layer)
               if config.has_experts(layer))


def compare_models(usages: dict[str, list[Usage]], sorted_bytes: int) -> list[dict]:
    """A step's memory by part, traced: each model's own column, at its own worst instant of each part."""
    rows = []
    for part in COLORS:
        peaks = {name: max(parts[part] for _, parts in usage) / MIB for name, usage in usages.items()}
        if any(peaks.values()):
            rows.append({"part, at its most": part} | {f"{name}, MiB": value for name, value in peaks.items()})
        if part == "MLP":
            rows.append({"part, at its most": "  of it sorted copies"} |
                        {f"{name}, MiB": value for name, value in zip(usages, (0.0, sorted_bytes / MIB), strict=True)})
    totals = {f"{name}, MiB": max(sum(parts.values()) for _, parts in usage) / MIB for name, usage in usages.items()}
    return [*rows, {"part, at its most": "all, at the peak"} | totals]


@styled
def draw_beside(usages: dict[str, list[Usage]]) -> Figure:
    """A bar for each model and pass: bytes by part at the peak of the pass."""
    figure, axes = make_panels(1, 1, width=9, height=4.6)
    names = ("forward", "loss", "backward", "update")
    bars = {f"{name}\n{'dense' if model == 'dense' else 'experts'}": find_peak(usage, name)
            for name in names for model, usage in usages.items()}
    bottom = np.zeros(len(bars))
    for part, color in COLORS.items():
        heights = np.array([parts[part] / MIB for parts in bars.values()])
        axes[0, 0].bar(list(bars), heights, bottom=bottom, color=color, label=part)
        bottom += heights
    for i, total in enumerate(bottom):
        axes[0, 0].annotate(f"{total:,.0f}", (i, total), xytext=(0, 3), textcoords="offset points", ha="center")
    axes[0, 0].set(ylabel="MiB", title=f"peak of each pass: {' and '.join(usages)}")
    axes[0, 0].grid(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", handlelength=1.2)
    return figure


def find_peak(usages: list[Usage], name: str) -> dict:
    """Bytes by part at the peak of a pass."""
    return max((parts for (pass_name, _), parts in usages if pass_name == name), key=lambda parts: sum(parts.values()))


def compare_phases(measured: list[Usage], predicted: list[Usage]) -> list[dict]:
    """The peak of each pass, traced and predicted."""
    rows = []
    for name in ("forward", "loss", "backward", "update"):
        actual, expected = (sum(find_peak(usages, name).values()) / MIB for usages in (measured, predicted))
        rows.append({"peak of the": name, "traced MiB": actual, "predicted MiB": expected,
                     "error %": 100 * (expected / actual - 1)})
    return rows


def compare_parts(measured: list[Usage], predicted: list[Usage]) -> list[dict]:
    """Bytes kept at the end of the forward pass, and the gradients when the update begins."""
    ends = [dict(next(parts for phase, parts in reversed(usages) if phase == ("forward", "norm")))
            for usages in (measured, predicted)]
    for end, usages in zip(ends, (measured, predicted), strict=True):
        end["gradients"] = max(parts["gradients"] for (name, _), parts in usages if name == "update")
    rows = []
    for part in ("parameters", "optimizer state", "gradients", *ACTIVATIONS):
        actual, expected = (end[part] / MIB for end in ends)
        if actual or expected:
            rows.append({"part": part, "traced MiB": actual, "predicted MiB": expected,
                         "difference MiB": expected - actual})
    return rows


@styled
def draw_memory(measured: list[Usage], predicted: list[Usage], title: str) -> Figure:
    """Stacked bytes over the phases, all of one width; the traced total is a line in both panels."""
    widths = {"loss": 2.0, "update": 4.0}
    figure, axes = make_panels(2, 1, width=11, height=4.1, sharex=True, sharey=True)
    phases = [phase for phase, _ in predicted]
    edges = np.cumsum([0] + [widths.get(name, 1.0) for name, _ in phases])
    steps = {phase: [parts for other, parts in measured if other == phase] for phase in phases}
    x = np.concatenate([np.linspace(edges[i], edges[i + 1], len(steps[phase]), endpoint=False)
                        for i, phase in enumerate(phases)] + [edges[-1:]])
    actual = [parts for phase in phases for parts in steps[phase]]
    actual.append(actual[-1])
    total = [sum(parts.values()) / MIB for parts in actual]
    for ax, points, usages, name in ((axes[0, 0], x, actual, "traced, after each operation"),
                                     (axes[1, 0], edges, [parts for _, parts in [*predicted, predicted[-1]]],
                                      "predicted by nanochat.memory: the peak of each phase")):
        stacks = np.array([[parts[part] / MIB for parts in usages] for part in COLORS])
        ax.stackplot(points, stacks, colors=list(COLORS.values()), labels=list(COLORS), step="post", linewidth=0)
        ax.step(x, total, where="post", color=INK, linewidth=1, label="total, traced")
        ax.set(title=name, ylabel="MiB", xlim=(0, edges[-1]), ylim=(0, 1.12 * max(total)))
        ax.grid(False)
        for i, (edge, phase) in enumerate(zip(edges[1:], phases, strict=True)):
            is_last = i + 1 == len(phases) or phases[i + 1][0] != phase[0]
            ax.axvline(edge, color=INK if is_last else "white", linewidth=1 if is_last else 0.6)
    peak = int(np.argmax(total))
    axes[0, 0].annotate(f"peak {total[peak]:,.0f} MiB", (x[peak], total[peak]), xytext=(0, 4), color=INK, fontsize=9,
                        textcoords="offset points", ha="center", bbox={"fc": "white", "ec": "none", "pad": 1})
    centers = (edges[1:] + edges[:-1]) / 2
    axes[1, 0].set_xticks(centers, [label for _, label in phases], rotation=90 if len(phases) > 30 else 0, fontsize=8)
    for name in dict.fromkeys(name for name, _ in phases):
        inside = [i for i, phase in enumerate(phases) if phase[0] == name]
        axes[1, 0].text((edges[inside[0]] + edges[inside[-1] + 1]) / 2, -0.13, name, ha="center", va="top",
                        transform=axes[1, 0].get_xaxis_transform(), color=INK, fontweight="bold")
    axes[1, 0].set_xlabel("phase of the step: layers in the order in which they run", labelpad=28)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", handlelength=1.2)
    figure.suptitle(title, fontsize=10, color=FAINT, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    run_script(main)
