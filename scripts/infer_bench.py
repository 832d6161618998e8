"""How fast a model reads prompts and writes answers here, beside what this machine's memory and arithmetic allow.

    python -m scripts.infer_bench                          # depth 4, random weights
    python -m scripts.infer_bench --depth 12 --dtype bfloat16 --rows 1 32
    python -m scripts.infer_bench -i sft -g d12 --json bench.json
    GOMP_SPINCOUNT=2000 python -m scripts.infer_bench --rows 1 32 --compile    # on Linux as chat_web --compile decodes

Decoding a token reads every matrix and what the cache holds of its row, so the limit of a batch is those bytes over the
measured rate of reading memory, or its arithmetic over the measured rate of a large product where that takes longer;
a prompt's is its arithmetic. Caches can exceed the first limit: a small model fits into them. Memory is the most that
was in use so far, on a CPU by the whole process. `--compare-single` times samples of one prompt, too, at once and one
by one.
"""

import argparse
import time
from collections import deque
from statistics import median, quantiles

import torch

from nanochat.checkpoint_manager import add_model_flags, build_model, load_model
from nanochat.command_line import Parser, add_compute_flags, json_file, run_script
from nanochat.common import MAX_ROWS, UserError, print0, write_json
from nanochat.config import GPTConfig, count_params
from nanochat.devices import get_compute_dtype, get_peak_flops, get_peak_memory_bytes, init_compute, synchronize
from nanochat.engine import Engine, Request
from nanochat.flash_attention import choose_for_inference
from nanochat.gpt import GPT
from nanochat.scaling import make_config

READ_BYTES = 2**28      # that are read to measure the memory's rate; more than any CPU's cache holds
CUDA_READ_BYTES = 2**31 # of these a GPU reads several at once: starting and waiting are a fifth of the time of 2**28
READ_ROUNDS, CUDA_READS = 10, 8
WARMUP_TOKENS = 4       # of each row, before anything is timed


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--depth", type=int, default=4, help="of a model with random weights")
    add("--vocab-size", type=int, default=32768, help="of a model with random weights")
    add("--max-seq-len", type=int, default=2048, help="context in tokens")
    add_model_flags(parser, help="a trained model of this stage instead")
    add_compute_flags(parser)
    add("--rows", type=int, nargs="+", default=[1, 8, 32, 64], help="sequences at once")
    add("--prompt-tokens", type=int, default=128, help="length of each prompt")
    add("--max-tokens", type=int, default=128, help="length of each answer")
    add("--compile", action="store_true", help="decode with a compiled step, on a CPU; compiling isn't timed")
    add("--compare-single", action="store_true", help="samples of one prompt, at once and one by one, too")
    add("--json", type=json_file, help="write the figures here, too")
    args = parser.parse_args(argv)
    if not 1 <= min(args.rows) <= max(args.rows) <= MAX_ROWS or args.prompt_tokens < 2 or args.max_tokens < 2:
        raise UserError(f"--rows must be from 1 to {MAX_ROWS}, --prompt-tokens and --max-tokens at least 2")
    if not args.source and (args.model_tag or args.step is not None):
        raise UserError("-g and -s name a trained model, of a stage; add -i base, or the stage that it is of")
    if args.source:
        parser.refuse_unused(args, ("depth", "vocab_size", "max_seq_len"), "--source, a trained model")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, _ = init_compute(args.device_type)
    dtype, reason = get_compute_dtype(args.dtype, device)
    model, tokenizer = make_model(args, device, dtype)
    backend = choose_for_inference(device, dtype, model.config)
    if args.prompt_tokens + args.max_tokens > len(model.cos):
        raise UserError(f"--prompt-tokens {args.prompt_tokens} --max-tokens {args.max_tokens} exceed the "
                        f"{len(model.cos)} positions of this model")
    peak_flops, peak_source = get_peak_flops(device, dtype)
    machine = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
               "read_bytes_per_sec": measure_read_rate(device), "peak_flops": peak_flops, "peak_source": peak_source}
    print0(f"{device.type}, {machine['threads']} threads, {machine['dtype']} ({reason}), attention {backend}; memory "
           f"is read at {machine['read_bytes_per_sec'] / 1e9:.1f} GB/s"
           + (f", {peak_source} {peak_flops / 1e12:.2f} TFLOP/s" if peak_flops else f"; {peak_source}"))
    print0(f"{'rows':>5}{'prefill tok/s':>15}{'of limit':>10}{'decode tok/s':>14}{'of limit':>10}{'first ms':>10}"
           f"{'token ms p50':>14}{'p95':>8}{'p99':>8}{'peak MiB':>10}")
    results = []
    for num_rows in args.rows:
        engine = Engine(model, tokenizer, max_rows=num_rows, compile=args.compile)
        result = measure(engine, num_rows, args) | {"memory_bytes": get_peak_memory_bytes(device)}
        results.append(result | compute_limits(model.config, result, args, machine))
        print_result(results[-1])
        if args.compare_single:
            results[-1]["times_single"] = ratio = measure_single(model, tokenizer, num_rows, args)
            print0(f"{num_rows} samples of one prompt at once are {ratio:.1f} times as fast as one by one")
    report = machine | {"model_config": vars(model.config), "results": results}
    if args.json:
        write_json(args.json, report)
    return report


def make_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[GPT, object]:
    """A trained model, or one of the wanted depth with random weights, which is as fast; and a tokenizer."""
    if args.source:
        return load_model(args.source, device, tag=args.model_tag, step=args.step, dtype=dtype)[:2]
    model = build_model(make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len), dtype,
                        device)
    model.init_weights()
    for param in model.transformer.h.parameters():  # the zero projections would make most products trivial
        if not param.any():
            torch.nn.init.normal_(param, std=0.02)
    return model.eval(), NoTokenizer()


class NoTokenizer:
    """Stands for the tokenizer of random weights, whose tokens mean nothing; no token ends a row or calls a tool."""

    def get_special_tokens(self) -> dict[str, int]:
        return {}

    def get_bos_token_id(self) -> int:
        return -1

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"?" * len(ids)


def measure_read_rate(device: torch.device) -> float:
    """Bytes per second at which memory is read: the best sum of a large tensor, on CUDA of several sums."""
    num_bytes, num_reads = (CUDA_READ_BYTES, CUDA_READS) if device.type == "cuda" else (READ_BYTES, 1)
    data = torch.ones(num_bytes // 4, device=device)
    seconds = []
    for _ in range(READ_ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(num_reads):
            data.sum()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return num_reads * num_bytes / min(seconds)


def make_requests(config: GPTConfig, num_rows: int, args: argparse.Namespace, first: int) -> list[Request]:
    """Prompts that have nothing in common, so that none can be taken from another row."""
    rng = torch.Generator().manual_seed(first)
    return [Request(torch.randint(config.vocab_size, (args.prompt_tokens,), generator=rng).tolist(), args.max_tokens,
                    seed=first + i) for i in range(num_rows)]


def measure(engine: Engine, num_rows: int, args: argparse.Namespace) -> dict:
    """One batch from its prompts to the end of its answers, all submitted at once."""
    config = engine.model.config
    for _ in range(2):  # the first run takes the memory that the second one uses
        engine.generate_many([request.tokens for request in make_requests(config, num_rows, args, 0)],
                             max_tokens=WARMUP_TOKENS)
    requests = make_requests(config, num_rows, args, first=1000)
    start = last = time.perf_counter()
    first_times: dict[int, float] = {}
    num_ended = 0
    step_secs: deque[float] = deque()
    for request in requests:
        engine.submit(request)
    while engine.has_work():
        are_all_decoding = len(first_times) == num_rows and not num_ended
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            first_times.setdefault(event.request_id, now - start)
            num_ended += event.finish_reason is not None
        if are_all_decoding:
            step_secs.append(now - last)
        last = now
    if not step_secs:
        raise UserError(f"{num_rows} rows never decode together: the first ones end before the last ones' prompts of "
                        f"{args.prompt_tokens} tokens are read; set a larger --max-tokens, or fewer --rows")
    percentiles = quantiles(step_secs, n=100, method="inclusive") if len(step_secs) > 1 else list(step_secs) * 99
    prefill_sec = max(first_times.values())  # and one token of each row, at least
    return {"rows": num_rows, "wall_sec": last - start, "first_token_ms": median(first_times.values()) * 1e3,
            "prefill_tokens_per_sec": num_rows * args.prompt_tokens / prefill_sec,
            "decode_tokens_per_sec": num_rows / median(step_secs),
            "token_ms_p50": percentiles[49] * 1e3, "token_ms_p95": percentiles[94] * 1e3,
            "token_ms_p99": percentiles[98] * 1e3}


def measure_single(model: GPT, tokenizer, num_rows: int, args: argparse.Namespace) -> float:
    """How many times as long as at once samples of one prompt take one after the other, which reads it once, too."""
    (request,) = make_requests(model.config, 1, args, first=2000)
    seconds = []
    for num_samples in (num_rows, 1):
        engine = Engine(model, tokenizer, max_rows=num_samples, compile=args.compile)
        engine.generate_batch(request.tokens[::-1], num_samples, WARMUP_TOKENS)
        start = time.perf_counter()
        for i in range(num_rows // num_samples):
            engine.generate_batch(request.tokens, num_samples, args.max_tokens, seed=i)
        seconds.append(time.perf_counter() - start)
    return seconds[1] / seconds[0]


def compute_limits(config: GPTConfig, result: dict, args: argparse.Namespace, machine: dict) -> dict:
    """What memory and arithmetic allow, and the fractions of it that were reached."""
    counts = count_params(config)
    element_bytes = getattr(torch, machine["dtype"]).itemsize
    # the eager step on a CPU keeps its cache in fp32 (decoding.py)
    cache_element_bytes = max(element_bytes, 4) if machine["device"] == "cpu" and not args.compile else element_bytes
    length = args.prompt_tokens + args.max_tokens // 2
    keys_seen = sum(min(config.window(layer) + 1, length) for layer in range(config.n_layer))
    row_bytes = 2 * keys_seen * config.n_kv_head * config.head_dim * cache_element_bytes
    # of experts at most those that the rows ask for are read, each row others
    more_rows = min(1, (result["rows"] - 1) * config.top_k / max(1, config.num_experts - config.top_k))
    matrices = counts["transformer_matrices"] + counts.get("inactive_experts", 0) * more_rows
    matrix_bytes = (matrices + counts["lm_head"]) * element_bytes
    decode_limit = machine["read_bytes_per_sec"] / (matrix_bytes / result["rows"] + row_bytes)
    limits = {"matrix_bytes": matrix_bytes, "cache_bytes_per_row": row_bytes,
              "decode_read_limit_tokens_per_sec": decode_limit}
    if machine["peak_flops"]:
        flops_limit = machine["peak_flops"] / (2 * (counts["transformer_matrices"] + counts["lm_head"]))
        decode_limit = min(decode_limit, flops_limit)
        limit = machine["peak_flops"] / (2 * counts["transformer_matrices"])  # the head isn't computed for a prompt
        limits |= {"decode_flops_limit_tokens_per_sec": flops_limit, "prefill_limit_tokens_per_sec": limit,
                   "prefill_frac": result["prefill_tokens_per_sec"] / limit}
    return limits | {"decode_limit_tokens_per_sec": decode_limit,
                     "decode_frac": result["decode_tokens_per_sec"] / decode_limit}


def print_result(result: dict) -> None:
    """One line of the table."""
    prefill_frac = f"{result['prefill_frac']:.0%}" if "prefill_frac" in result else "-"
    print0(f"{result['rows']:>5}{result['prefill_tokens_per_sec']:>15,.0f}{prefill_frac:>10}"
           f"{result['decode_tokens_per_sec']:>14,.0f}{result['decode_frac']:>10.0%}{result['first_token_ms']:>10.1f}"
           f"{result['token_ms_p50']:>14.2f}{result['token_ms_p95']:>8.2f}{result['token_ms_p99']:>8.2f}"
           f"{result['memory_bytes'] / 2**20:>10,.0f}")


if __name__ == "__main__":
    run_script(main)
