"""Midtrain a base model on conversations: the format of a chat, the calculator, multiple choice, spelling.

    python -m scripts.mid_train                             # the latest base model, the default tasks
    python -m scripts.mid_train --mixture quickstart        # tasks that need no download
    python -m scripts.mid_train --tasks GSM8K SmolTalk:10000 MMLU::2 --custom-json mine.jsonl

Begins with the base run's weights, optimizer state and settings, and goes through the conversations once. The same
command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/mid/<tag>/.
"""

import argparse

from nanochat.chat_stage import MIDTRAINING, ChatSettings, add_chat_args, read_chat_flags, run_chat_stage
from nanochat.checkpoint_manager import find_checkpoint, get_run_dir, locked_run
from nanochat.choices import StageFlags
from nanochat.command_line import Parser, run_script
from nanochat.devices import init_compute
from tasks.mixtures import MIXTURES, make_mixture


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, StageFlags]:
    parser = Parser(description=__doc__)
    add_chat_args(parser, MIXTURES)
    parser.set_defaults(mixture="mid", init_lr_frac=1.0, warmdown_ratio=0.2)
    args = parser.parse_args(argv)
    return args, read_chat_flags(args, parser, argv)


def main(argv: list[str] | None = None) -> dict:
    args, flags = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint("base", args.model_tag, args.model_step)
    run_dir = get_run_dir("mid", args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        mixture = make_mixture(args.tasks or MIXTURES[args.mixture], args.custom_json, args.words)
        settings = ChatSettings(source, mixture, args.num_epochs, args.num_iterations, args.init_lr_frac,
                                args.warmdown_ratio)
        return run_chat_stage(MIDTRAINING, settings, flags, run_dir, device, ranks)


if __name__ == "__main__":
    run_script(main)
