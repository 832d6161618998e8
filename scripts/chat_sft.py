"""Finetune a model to answer (SFT): only what the assistant writes is learned, from conversations that are kept whole.

    python -m scripts.chat_sft                              # the latest midtrained model, the default tasks
    python -m scripts.chat_sft -i base                      # straight from a base model
    python -m scripts.chat_sft --tasks GSM8K ARC-Easy --custom-json mine.jsonl

Begins with the weights, optimizer state and settings of the run that --source and --model-tag name, and goes through
the conversations once. The same command again continues a run that was stopped or killed. State:
$NANOCHAT_BASE_DIR/runs/sft/<tag>/.
"""

import argparse

from nanochat.chat_stage import SFT, ChatSettings, add_chat_args, read_chat_flags, run_chat_stage
from nanochat.checkpoint_manager import find_checkpoint, get_run_dir, locked_run
from nanochat.choices import StageFlags
from nanochat.command_line import Parser, run_script
from nanochat.devices import init_compute
from tasks.mixtures import MIXTURES, make_mixture

# By the stage that it begins with (the public record of nanochat, January and July 2026)
DEFAULTS = {"mid":  {"mixture": "sft",        "init_lr_frac": 0.02, "warmdown_ratio": 1.0},
            "base": {"mixture": "sft-direct", "init_lr_frac": 0.8,  "warmdown_ratio": 0.5}}


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, StageFlags]:
    parser = Parser(description=__doc__)
    parser.add_argument("-i", "--source", choices=tuple(DEFAULTS), default="mid",
                        help="stage of the model to begin with")
    add_chat_args(parser, MIXTURES)
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.source].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args, read_chat_flags(args, parser, argv)


def main(argv: list[str] | None = None) -> dict:
    args, flags = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint(args.source, args.model_tag, args.model_step)
    run_dir = get_run_dir("sft", args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        mixture = make_mixture(args.tasks or MIXTURES[args.mixture], args.custom_json, args.words)
        settings = ChatSettings(source, mixture, args.num_epochs, args.num_iterations, args.init_lr_frac,
                                args.warmdown_ratio)
        return run_chat_stage(SFT, settings, flags, run_dir, device, ranks)


if __name__ == "__main__":
    run_script(main)
