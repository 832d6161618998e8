"""Finetune a model to answer (SFT): only what the assistant writes is learned, from conversations that are kept whole.

    python -m scripts.chat_sft                              # the latest midtrained model, the default tasks
    python -m scripts.chat_sft -i base                      # straight from a base model
    python -m scripts.chat_sft --tasks GSM8K ARC-Easy --custom-json mine.jsonl

Begins with that run's weights, optimizer state and settings, and goes through the conversations once. The same
command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/sft/<tag>/.
"""

import argparse
import sys
import time

from nanochat.chat_stage import (
    ChatRun,
    ChatStart,
    add_chat_args,
    begin_chat_run,
    plan_chat_run,
    report_chat_run,
    set_schedules,
)
from nanochat.checkpoint_manager import find_checkpoint, get_run_dir, locked_run
from nanochat.common import get_peak_memory_bytes, init_compute, print0, run_script
from nanochat.stage import (
    check_stage_args,
    evaluate,
    get_finished_info,
    get_run_results,
    get_state,
    print_samples,
    take_step,
)
from nanochat.train import StopSignal, any_rank
from tasks.mixtures import MIXTURES, make_mixture

# By the stage that it begins with (the public record of nanochat, January and July 2026). The rates aren't scaled to
# the batch: at toy scale that gave .98 bits per byte of answers, scaled ones 1.31 (dev/LOG.md, 2026-11-21)
DEFAULTS = {"mid":  {"mixture": "sft",        "init_lr_frac": 0.02, "warmdown_ratio": 1.0},
            "base": {"mixture": "sft-direct", "init_lr_frac": 0.8,  "warmdown_ratio": 0.5}}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--source", choices=tuple(DEFAULTS), default="mid",
                        help="stage of the model to begin with (default: %(default)s)")
    add_chat_args(parser, MIXTURES)
    args = check_stage_args(parser.parse_args(argv))
    for name, value in DEFAULTS[args.source].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint(args.source, args.model_tag, args.model_step)
    run_dir = get_run_dir("sft", args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        mixture = make_mixture(args.tasks or MIXTURES[args.mixture], args.custom_json)
        start = plan_chat_run("sft", args, source, run_dir, mixture, device, ranks, keep_whole=True, scales_lr=False)
        if info := get_finished_info(run_dir, start.step, start.plan):
            report_chat_run("chat_sft", "SFT", run_dir, info)
            return {"run_dir": str(run_dir), **info["results"]}
        return train(args, begin_chat_run(start, args, sys.argv if argv is None else argv, device, ranks), start)


def train(args: argparse.Namespace, run: ChatRun, start: ChatStart) -> dict:
    """The loop: save, stop?, evaluate, sample, set schedules, step, log. Returns the run's results."""
    model, optimizer, machine, plan, log, saver = run.model, run.optimizer, run.machine, start.plan, run.log, run.saver
    device, step, results, is_saved = machine.device, start.step, {}, bool(start.saved)

    def is_due(every: int) -> bool:
        return every > 0 and step > 0 and (step == run.last_step or step % every == 0)

    with StopSignal() as stop, run.loader, log, saver:
        while True:
            # save before an evaluation, which may fail; after the first one, at most --save-every-minutes are at stake
            stopping, late, failed = any_rank(stop.is_set(), saver.is_late(args.save_every_minutes),
                                              saver.has_failed(), device=device)
            if failed:
                saver.wait()
            is_new = not (start.saved and step == start.step)  # what was loaded is on disk already
            unsaved = not is_saved and is_due(args.eval_every)
            if is_new and (is_due(args.save_every) or step == run.last_step or stopping or late or unsaved):
                saver.save(step, model, optimizer,
                           run.meta | get_state(machine, run.loader, optimizer, run.scaler, run.progress))
                is_saved = True
            if stopping:
                saver.wait()
                log.close("stopped")
                stop.end()
            if run.val_batches and (is_due(args.eval_every) or (step == 0 and args.eval_every > 0)):
                results |= evaluate(model, run.val_batches, start.tokenizer, log, step,
                                    batch_rows=machine.micro_rows)
            if is_due(args.sample_every) and machine.ranks.rank == 0:
                print_samples(model, start.tokenizer, run.prompts, 64, log, step)
            if step == run.last_step:
                break
            if step == start.step and machine.use_compile:
                print0("compiling the step: up to a minute the first time, a few seconds after that ...")
            step_start = time.perf_counter()
            lr_frac = set_schedules(optimizer, step, plan.num_iterations, args.init_lr_frac, args.warmdown_ratio)
            stats, machine = take_step(model, optimizer, run.loader.next_step(), machine, step, run.scaler, log, stop)
            if stats is None:  # out of memory: save what was there before, and stop
                run.loader.give_back()
                continue
            stats.check_finite(step)
            step += 1
            values = run.progress.update(stats, time.perf_counter() - step_start)
            values |= {"lr_frac": lr_frac, "tokens": step * plan.batch_tokens, **run.loader.stats,
                       "peak_memory_bytes": get_peak_memory_bytes(device)}
            log.write("train", step, **values)
            print0(run.progress.format_line(step, values))

    results |= get_run_results(run.progress, step, plan, device) | start.epoch.describe()
    log.update(results=results, wall_sec=time.perf_counter() - start.start_time)
    log.close("finished" if step == plan.num_iterations else "stopped")
    report_chat_run("chat_sft", "SFT", start.run_dir, log.info)
    return {"run_dir": str(start.run_dir), **results}


if __name__ == "__main__":
    run_script(main)
