"""Make a checkpoint of a model in Hugging Face's format: of an export of ours, or of a published nanochat of 2025.

    python -m scripts.import_hf my_model --model-tag mine      # a folder that scripts.export wrote, custom or qwen3
    python -m scripts.chat_cli --model-tag mine
    python -m scripts.import_hf nanochat-d20 --model-tag d20 --stage mid    # so that chat_sft begins with it

A float32 export comes back bit for bit (custom) or with the same logits (qwen3), others as their dtype rounded them. An
export has no optimizer state: the checkpoint is step 0 of a run, whose optimizer begins anew, and which keeps the batch
and the learning rates of the run that was exported; published models have those of their preset.
"""

import argparse
import shlex

from nanochat.checkpoint_manager import STAGES
from nanochat.command_line import Parser, run_script
from nanochat.common import expand_home, print0
from nanochat.import_hf import list_train_flags, read_folder, save_import


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", help="folder with config.json, tokenizer.json and safetensors")
    add("-g", "--model-tag", help="folder of the new run (default: the name of the folder that is read)")
    add("--stage", choices=STAGES, help="stage of the model (default: what the folder says, else sft where it has a "
        "chat template, else base)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    folder = expand_home(args.folder)
    tag = args.model_tag or folder.resolve().name
    found = read_folder(folder, args.stage)
    run_dir, tokenizer_name = save_import(found, tag)
    config, stage = found.model.config, found.stage
    print0(f"read {folder}: a {stage} model of {found.model.num_scaling_params()['total']:,} parameters, depth "
           f"{config.n_layer}, context {config.sequence_len}; {found.accuracy}\n"
           f"run: {run_dir}, tokenizer: {tokenizer_name}\n"
           f"talk to it: python -m scripts.chat_cli -i {stage} -g {shlex.quote(tag)}")
    flags = list_train_flags(config)
    if stage == "base" and flags:
        print0(f"train it on: python -m scripts.base_train --model-tag {shlex.quote(tag)} --tokenizer {tokenizer_name} "
               f"{shlex.join(flags)} --allow-mismatch")
    if following := {"base": "chat_sft -i base", "mid": "chat_sft", "sft": "chat_rl"}.get(stage):
        print0(f"go on with: python -m scripts.{following} -g {shlex.quote(tag)}")
    return {"run_dir": str(run_dir), "stage": stage, "tokenizer": tokenizer_name, "accuracy": found.accuracy}


if __name__ == "__main__":
    run_script(main)
