"""Decoding as the engine does it: the tokens of GPT.generate, CUDA graphs against eager steps, and the memory's limit.

Untested on a GPU. On a CPU the engine decodes eagerly, so that a graph is absent.
"""

import time
from collections.abc import Iterator
from statistics import median

import torch

from dev.gpu_setup import Candidate, Check, Setup, free_memory, guarded, judge
from dev.timing import make_random_model
from nanochat.devices import synchronize
from nanochat.engine import Engine, Request
from scripts import infer_bench

PROMPT_TOKENS = 5         # of the shortest prompt; each row's is longer than the one before it
MAX_COMPARED = 4          # rows that GPT.generate writes as well: it reads the whole sequence anew for each token
LIMIT_FRAC = 0.7          # of the memory's limit at batch 1: what an H100 should reach (a goal, not measured)


def check_decoding(setup: Setup) -> Iterator[Check]:
    """Greedy tokens of the engine against GPT.generate while the cache grows; then speed, with CUDA graphs and without,
    at the first depth."""
    for num_rows in setup.sizes.decode_rows:
        name = f"{num_rows} rows, tokens"
        yield guarded(name, setup.device, lambda name=name, n=num_rows: _check_tokens(setup, name, n))
    for num_rows in setup.sizes.decode_rows:
        for is_graphed in (True, False):
            name = f"{num_rows} rows, {'graph' if is_graphed else 'eager'}"
            yield guarded(name, setup.device, lambda name=name, n=num_rows, is_graphed=is_graphed: _time_steps(
                setup, name, n, is_graphed))


def _check_tokens(setup: Setup, name: str, num_rows: int) -> Check:
    """fp32 without tf32, or rounding would decide between near-equal tokens; prompts of different lengths, so that rows
    end at different times and the cache grows under a captured graph."""
    config, num_new = setup.make_config(setup.sizes.resume_depth), setup.sizes.compared_tokens
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        model = make_random_model(config, torch.float32, setup.device).eval()
        rng = torch.Generator().manual_seed(0)
        prompts = [torch.randint(config.vocab_size, (PROMPT_TOKENS + 3 * i,), generator=rng).tolist()
                   for i in range(num_rows)]
        engine, answers, capacities = Engine(model, infer_bench.NoTokenizer(), max_rows=num_rows), {}, []
        for prompt in prompts:
            engine.submit(Request(prompt, num_new, temperature=0.0))
        while engine.has_work():
            for event in engine.step():
                answers.setdefault(event.request_id, []).append(event.token)
            capacities.append(engine.cache.get_capacity() if engine.cache is not None else 0)
        compared = sorted({*range(min(2, num_rows)), *range(max(0, num_rows - MAX_COMPARED // 2), num_rows)})
        wrong = {}
        for i in compared:
            expected = list(model.generate(prompts[i], num_new, temperature=0.0))
            if answers[i] != expected:
                wrong[i] = next(k for k, (a, e) in enumerate(zip(answers[i], expected, strict=False)) if a != e) \
                    if len(answers[i]) == len(expected) else f"{len(answers[i])} of {len(expected)}"
    finally:
        torch.set_float32_matmul_precision(precision)
    num_growths = sum(a < b for a, b in zip(capacities, capacities[1:], strict=False))
    return Check(name, judge(not wrong), f"{describe_step(engine)}: {len(compared)} rows of {num_new} tokens equal "
                 f"GPT.generate's, the cache grew {num_growths} times" if not wrong else
                 f"{describe_step(engine)}: row {min(wrong)} differs from GPT.generate's at token {wrong[min(wrong)]}",
                 {"num_growths": num_growths, "wrong_rows": {str(i): k for i, k in wrong.items()}})


def describe_step(engine: Engine) -> str:
    """graph, or eager."""
    return "graph" if type(engine._run_step).__name__ == "GraphedStep" and engine._run_step.works else "eager"


def _time_steps(setup: Setup, name: str, num_rows: int, is_graphed: bool) -> Check:
    """Median milliseconds of a decoding step of the whole engine."""
    depth = setup.sizes.depths[0]
    engine = Engine(make_random_model(setup.make_config(depth), setup.dtype, setup.device).eval(),
                    infer_bench.NoTokenizer(), max_rows=num_rows)
    if is_graphed and describe_step(engine) != "graph":
        return Check(name, "absent", f"the engine decodes eagerly on {setup.device.type}")
    if not is_graphed and describe_step(engine) == "graph":
        engine._run_step.works = False  # it then runs the model as it is
    rng = torch.Generator().manual_seed(1)
    for _ in range(num_rows):
        engine.submit(Request(torch.randint(setup.sizes.vocab_size, (PROMPT_TOKENS,), generator=rng).tolist(),
                              setup.sizes.decode_tokens + 8))
    step_ms = []
    while engine.has_work():
        synchronize(setup.device)
        start = time.perf_counter()
        num_events = len(engine.step())
        synchronize(setup.device)
        if num_events == num_rows:
            step_ms.append((time.perf_counter() - start) * 1e3)
    ms = median(step_ms[2:] or step_ms)
    failed = is_graphed and describe_step(engine) != "graph"
    return Check(name, judge(not failed), "the graph could not be captured" if failed else
                 f"d{depth}: {ms:.2f} ms a step, {num_rows / ms * 1e3:,.0f} tokens/s",
                 {"step_ms": ms, "tokens_per_sec": num_rows / ms * 1e3},
                 Candidate(f"decoding {num_rows} rows", "graph" if is_graphed else "eager", ms,
                           is_graphed or setup.device.type != "cuda"))


def check_inference(setup: Setup) -> Iterator[Check]:
    """scripts.infer_bench at the first two depths, beside what the memory's rate allows."""
    for depth in setup.sizes.depths[:2]:
        yield guarded(f"d{depth}", setup.device, lambda depth=depth: _bench(setup, depth))


def _bench(setup: Setup, depth: int) -> Check:
    sizes = setup.sizes
    free_memory(setup.device)
    argv = ["--depth", depth, "--rows", *sizes.decode_rows, "--vocab-size", sizes.vocab_size, "--max-seq-len", sizes.T,
            "--prompt-tokens", sizes.decode_tokens, "--max-tokens", sizes.decode_tokens,
            "--device-type", setup.device.type, "--dtype", str(setup.dtype).removeprefix("torch.")]
    results = infer_bench.main([str(word) for word in argv])["results"]
    return Check(f"d{depth}", "ok", "; ".join(
        f"{result['rows']} rows: {result['decode_tokens_per_sec']:,.0f} tokens/s, {result['decode_frac']:.0%} of the "
        f"limit, prefill {result['prefill_tokens_per_sec']:,.0f}" for result in results)
        + f"; wanted at 1 row: {LIMIT_FRAC:.0%}", {"results": results})
