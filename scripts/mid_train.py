"""Midtrain a base model on conversations: the format of a chat, the calculator, multiple choice, spelling.

    python -m scripts.mid_train                             # the latest base model, the default tasks
    python -m scripts.mid_train --mixture quickstart        # tasks that need no download
    python -m scripts.mid_train --tasks GSM8K SmolTalk:10000 MMLU::2 --custom-json mine.jsonl

Begins with the base run's weights, optimizer state and settings, and goes through the conversations once. The same
command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/mid/<tag>/.
"""

import argparse

from nanochat.chat_stage import MIDTRAINING, add_chat_args, read_chat_flags, run_chat_stage
from nanochat.choices import StageFlags
from nanochat.command_line import Parser, run_script


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, StageFlags]:
    parser = Parser(description=__doc__)
    add_chat_args(parser)
    parser.set_defaults(mixture="mid", init_lr_frac=1.0, warmdown_ratio=0.2)
    args = parser.parse_args(argv)
    return args, read_chat_flags(args, parser, argv)


def main(argv: list[str] | None = None) -> dict:
    args, flags = parse_args(argv)
    return run_chat_stage(MIDTRAINING, "base", args, flags)


if __name__ == "__main__":
    run_script(main)
