"""Finetune a model to answer (SFT): only what the assistant writes is learned, from conversations that are kept whole.

    python -m scripts.chat_sft                              # the latest midtrained model, the default tasks
    python -m scripts.chat_sft -i base                      # straight from a base model
    python -m scripts.chat_sft --tasks GSM8K ARC-Easy --custom-json mine.jsonl

Begins with the weights, optimizer state and settings of the run that --source and --model-tag name, and goes through
the conversations once. The same command again continues a run that was stopped or killed. State:
$NANOCHAT_BASE_DIR/runs/sft/<tag>/.
"""

import argparse

from nanochat.chat_stage import SFT, add_chat_args, read_chat_flags, run_chat_stage
from nanochat.choices import StageFlags
from nanochat.command_line import Parser, run_script

# By the stage that it begins with (the public record of nanochat, January and July 2026)
DEFAULTS = {"mid":  {"mixture": "sft",        "init_lr_frac": 0.02, "warmdown_ratio": 1.0},
            "base": {"mixture": "sft-direct", "init_lr_frac": 0.8,  "warmdown_ratio": 0.5}}


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, StageFlags]:
    parser = Parser(description=__doc__)
    parser.add_argument("-i", "--source", choices=tuple(DEFAULTS), default="mid",
                        help="stage of the model to begin with")
    add_chat_args(parser)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.source].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args, read_chat_flags(args, parser, argv)


def main(argv: list[str] | None = None) -> dict:
    args, flags = parse_args(argv)
    return run_chat_stage(SFT, args.source, args, flags)


if __name__ == "__main__":
    run_script(main)
