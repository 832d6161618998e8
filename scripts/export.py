"""Write a trained model as a folder that other engines load, without this package.

    python -m scripts.export --source sft --out my_model                     # the latest SFT run, for transformers
    python -m scripts.export --source sft --out my_model --format gguf       # for llama.cpp and ollama
    python -m scripts.export --source sft --out my_model --dtype float32 --check

    vllm serve my_model           # custom: --model-impl transformers --trust-remote-code; no smear, no key offset
    mlx_lm.chat --model my_model                     # of format qwen3
    llama-server -m my_model/model.gguf              # of format gguf

Formats: custom holds any model and brings its code for transformers; qwen3 and gguf hold models without the parts that
Qwen3 lacks (the preset plain); auto is qwen3 where that can be, else custom. Nothing is uploaded. --check loads the
result in transformers or in llama.cpp's llama-server, where they are installed, and compares it with our own model.
"""

import argparse
import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import requests
import torch

from nanochat.checkpoint_manager import add_model_flags, load_for
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, expand_home, print0
from nanochat.export import DTYPES, FORMATS, GGUF_NAME, Source, choose_format, export_model

QUESTION = {"messages": [{"role": "user", "content": "Why is the sky blue? Count to 12, then say it in one sentence."}]}
CHECK_TOKENS = 32    # of greedy text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add("--out", required=True, help="folder to write")
    add("--format", choices=("auto", *FORMATS), default="auto", help="auto: qwen3 where that can be, else custom")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the weights")
    add("--check", action="store_true", help="load the result in what is installed here, and compare")
    add("--force", action="store_true", help="replace the folder, whatever it holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    model, tokenizer, meta, _ = load_for(args.source, args.model_tag, args.step, "float32", "cpu")
    source, out = Source(model, tokenizer, meta), expand_home(args.out).resolve()
    form, reason = choose_format(args.format, source)
    print0(f"{meta['stage']} {Path(meta['run_dir']).name}, step {meta['step']}, as {form} ({reason})")
    export_model(source, out, form, args.dtype, args.force)
    print0(f"written to {out}, in {args.dtype}")
    return {"format": form, "out": str(out), "checks": check(source, out, form) if args.check else {}}


def check(source: Source, out: Path, form: str) -> dict[str, dict]:
    """Engine -> what the export gave in it, in fp32: largest difference of log-probabilities, whether greedy text is
    ours. They differ by what the dtype of the weights rounds, beside some 1e-5."""
    prompt = source.tokenizer.render_for_completion(QUESTION)[-source.model.config.sequence_len // 2:]
    with torch.inference_mode():
        ours = source.model(torch.tensor([prompt]))[0].log_softmax(-1)    # (T, V)
    text = list(source.model.generate(prompt, CHECK_TOKENS, temperature=0))    # not by Engine, which runs tools, too
    name, run = ("llama.cpp", run_llama_cpp) if form == "gguf" else ("transformers", run_transformers)
    try:
        version, logits, tokens = run(out, prompt)
    except ImportError as error:
        print0(f"not checked in {name}, which isn't installed here ({error})")
        return {}
    difference = (logits.log_softmax(-1) - ours[-len(logits):]).abs().max().item()
    is_equal = bool(tokens) and tokens == text[:len(tokens)]    # theirs ends with an end token
    print0(f"checked in {name} {version}: log-probabilities differ by {difference:.2g} at most, greedy text is "
           f"{'equal' if is_equal else 'another'}")
    return {name: {"version": version, "max_difference": difference, "greedy_equal": is_equal}}


def run_transformers(folder: Path, prompt: list[int]) -> tuple[str, torch.Tensor, list[int]]:
    """(version, logits of the prompt (T, V), greedy tokens after it), from this folder alone, in fp32."""
    import transformers
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder.resolve(), dtype=torch.float32, trust_remote_code=True, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"transformers {transformers.__version__} can't load {folder} ({error})") from error
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        logits = model(ids).logits[0]
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CHECK_TOKENS, do_sample=False)
    return transformers.__version__, logits, rows[0, len(prompt):].tolist()


def run_llama_cpp(folder: Path, prompt: list[int]) -> tuple[str, torch.Tensor, list[int]]:
    """(version, log-probabilities after the prompt (1, V), greedy tokens after it) by the llama-server on the PATH."""
    if (program := shutil.which("llama-server")) is None:
        raise ImportError("no llama-server on the PATH")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    exact = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    process = subprocess.Popen([program, "-m", folder / GGUF_NAME, "--port", url.rpartition(":")[2], *exact],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with requests.Session() as session:
            session.trust_env = False    # no proxy
            wait_for(process, session, url)
            answer = session.post(f"{url}/completion", timeout=600, json={
                "prompt": prompt, "n_predict": CHECK_TOKENS, "temperature": 0, "n_probs": 2**24,
                "return_tokens": True}).json()
            build = session.get(f"{url}/props", timeout=60).json()["build_info"]
    finally:
        process.terminate()
        process.wait()
    scores = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
    return build, torch.tensor([[scores[token] for token in range(len(scores))]]), answer["tokens"]


def wait_for(process: subprocess.Popen, session: requests.Session, url: str) -> None:
    """Return when the server answers; UserError where it ends before, or takes more than two minutes."""
    for _ in range(480):
        with contextlib.suppress(requests.RequestException):
            if session.get(f"{url}/health", timeout=5).ok:
                return
        if process.poll() is not None:
            break
        time.sleep(0.25)
    raise UserError("llama-server doesn't load the export: see what `llama-server -m` says of it; a llama.cpp from "
                    "before Qwen3 is too old")


if __name__ == "__main__":
    run_script(main)
