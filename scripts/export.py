"""Write a trained model as a folder that other engines load, without this package.

    python -m scripts.export --source sft --out my_model                     # the latest SFT run, for transformers
    python -m scripts.export --source sft --out my_model --format gguf       # for llama.cpp and ollama
    python -m scripts.export --source sft --out my_model --dtype float32 --check

Formats: custom holds any model and brings its code for transformers; qwen3 and gguf hold models without the parts that
Qwen3 lacks (the preset plain); auto is qwen3 where that can be, else custom. Nothing is uploaded. --check loads the
result in the engines that are installed here and compares logits and greedy text with ours.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.checkpoint_manager import add_model_flags, load_for
from nanochat.common import UserError, expand_home, print0, run_script
from nanochat.export import DTYPES, FORMATS, GGUF_NAME, Source, choose_format, export

QUESTION = {"messages": [{"role": "user", "content": "Why is the sky blue? Count to 12, then say it in one sentence."}]}
CHECK_TOKENS = 32    # of greedy text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_flags(parser)
    add("--out", required=True, help="folder to write")
    add("--format", default="auto", help=f"auto, {', '.join(FORMATS)} (%(default)s)")
    add("--dtype", default="bfloat16", help=f"of the weights: {', '.join(DTYPES)} (%(default)s)")
    add("--check", action="store_true", help="load the result in what is installed here, and compare")
    add("--force", action="store_true", help="replace the folder, whatever it holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    model, tokenizer, meta, _ = load_for(args.source, args.model_tag, args.step, "float32", "cpu")
    source, out = Source(model, tokenizer, meta), expand_home(args.out)
    form, reason = choose_format(args.format, source)
    print0(f"{meta['stage']} {Path(meta['run_dir']).name}, step {meta['step']}, as {form} ({reason})")
    export(source, out, form, args.dtype, args.force)
    print0(f"written to {out}, in {args.dtype}")
    return {"format": form, "out": str(out), "checks": check(source, out, form) if args.check else {}}


def check(source: Source, out: Path, form: str) -> dict[str, dict]:
    """Engine -> what the export gave in it: largest difference of logits in fp32, whether greedy text is ours."""
    loaders = {"llama.cpp": load_llama_cpp} if form == "gguf" else {"transformers": load_transformers}
    prompt, results = source.tokenizer.render_for_completion(QUESTION), {}
    prompt = prompt[-source.model.config.sequence_len // 2:]
    with torch.inference_mode():
        logits = source.model(torch.tensor([prompt]))[0]
    ours = list(source.model.generate(prompt, CHECK_TOKENS, temperature=0))    # not by Engine, which runs tools, too
    for name, load in loaders.items():
        try:
            version, compute_logits, generate = load(out, form == "custom")
        except ImportError as error:
            print0(f"not checked in {name}: it isn't installed ({error})")
            continue
        difference = (compute_logits(prompt) - logits).abs().max().item()
        theirs = generate(prompt, CHECK_TOKENS)
        is_equal = bool(theirs) and theirs == ours[:len(theirs)]    # theirs ends with an end token
        results[name] = {"version": version, "max_logit_difference": difference, "greedy_equal": is_equal}
        print0(f"checked in {name} {version}: logits differ by {difference:.2g} at most, greedy text is "
               f"{'equal' if is_equal else 'another'}")
    return results


Loaded = tuple[str, Callable[[list[int]], torch.Tensor], Callable[[list[int], int], list[int]]]


def load_transformers(folder: Path, is_custom: bool) -> Loaded:
    """(version, logits of a prompt (T, V), greedy tokens after it) by transformers in fp32; from this folder alone."""
    import transformers
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder.resolve(), dtype=torch.float32, trust_remote_code=is_custom, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"transformers {transformers.__version__} can't load {folder} ({error})") from error

    @torch.inference_mode()
    def compute_logits(prompt: list[int]) -> torch.Tensor:
        return model(torch.tensor([prompt])).logits[0]

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
        return rows[0, len(prompt):].tolist()
    return transformers.__version__, compute_logits, generate


def load_llama_cpp(folder: Path, is_custom: bool) -> Loaded:
    """As load_transformers, by llama-cpp-python. Written against its documentation, never run here."""
    import llama_cpp
    llama = llama_cpp.Llama(str(folder / GGUF_NAME), logits_all=True, verbose=False)

    def compute_logits(prompt: list[int]) -> torch.Tensor:
        llama.reset()
        llama.eval(prompt)
        return torch.tensor(llama.scores[:len(prompt)])

    def generate(prompt: list[int], num_tokens: int) -> list[int]:
        tokens = []
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            if len(tokens) == num_tokens:
                break
        return tokens
    return llama_cpp.__version__, compute_logits, generate


if __name__ == "__main__":
    run_script(main)
