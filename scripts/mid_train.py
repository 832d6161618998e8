"""Midtrain a base model on conversations: the format of a chat, the calculator, multiple choice, spelling.

    python -m scripts.mid_train                             # the latest base model, the default tasks
    python -m scripts.mid_train --mixture quickstart        # tasks that need no download
    python -m scripts.mid_train --tasks GSM8K SmolTalk:10000 MMLU::2 --custom-json mine.jsonl

Begins with the base run's weights, optimizer state and settings, and goes through the conversations once. The same
command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/mid/<tag>/.
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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_chat_args(parser, MIXTURES)
    parser.set_defaults(mixture="mid", init_lr_frac=1.0, warmdown_ratio=0.2)
    return check_stage_args(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint("base", args.model_tag, args.model_step)
    run_dir = get_run_dir("mid", args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        mixture = make_mixture(args.tasks or MIXTURES[args.mixture], args.custom_json)
        start = plan_chat_run("mid", args, source, run_dir, mixture, device, ranks, keep_whole=False, scales_lr=True)
        if info := get_finished_info(run_dir, start.step, start.plan):
            report_chat_run("mid_train", "Midtraining", run_dir, info)
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
    report_chat_run("mid_train", "Midtraining", start.run_dir, log.info)
    return {"run_dir": str(start.run_dir), **results}


if __name__ == "__main__":
    run_script(main)
