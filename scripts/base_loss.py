"""Bits per byte of a base model on validation and training text, and samples from it.

    python -m scripts.base_loss                         # the run that was saved last
    python -m scripts.base_loss -g d4 -s 500 --eval-tokens 1000000

Two byte models are printed for comparison: a language model that has learned more than spelling beats them by far.
Writes runs/base/<tag>/loss_<step>.json and a section of the report card.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat.checkpoint_manager import add_model_flags, load_for
from nanochat.command_line import Parser, add_compute_flags, run_script
from nanochat.common import Ranks, UserError, get_base_dir, get_ranks, print0, timed, write_json
from nanochat.dataloader import ValidationBatches, validation_batches
from nanochat.engine import Engine
from nanochat.loss_eval import compute_byte_bpb, evaluate_loss
from nanochat.report import write_section
from nanochat.shards import ShardList, iter_documents, load_shards

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "The planets of the solar system are:",
           "If 5 * x + 3 = 13, then x is", "def factorial(n):")
NUM_UNCONDITIONED = 4
PROMPTED_TOKENS, UNCONDITIONED_TOKENS = 32, 96   # length of a sample
BATCH_TOKENS = 8192                              # of a forward pass, by default
FIT_CHARS = 20_000_000                           # of training text that the byte models are fitted to


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser, choices=("base",), default="base", help="stage of the model")
    add_compute_flags(parser)
    add("--data", help="folder or name of the text that the model was trained on (default: as then)")
    add("--eval-tokens", type=int, default=2**19, help="tokens of each split, rounded up to whole rows")
    add("--device-batch-size", type=int, help=f"rows of a forward pass (default: {BATCH_TOKENS} tokens)")
    args = parser.parse_args(argv)
    for flag, value in (("--eval-tokens", args.eval_tokens), ("--device-batch-size", args.device_batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} leaves nothing to evaluate; give at least 1")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start_time = time.perf_counter()
    model, tokenizer, meta, place = load_for("base", args.model_tag, args.step, args.dtype, args.device_type)
    ranks, run_dir, step, T = get_ranks(), Path(meta["run_dir"]), meta["step"], model.config.sequence_len
    print0(f"{run_dir}, step {step}, {place}")
    shards = find_training_data(args.data, meta["data"])

    num_rows, batch_rows = -(-args.eval_tokens // T), args.device_batch_size or max(1, BATCH_TOKENS // T)
    batches = {split: validation_batches(shards, tokenizer, T, num_rows, ranks, split).cut(batch_rows)
               for split in ("val", "train")}
    losses = {}
    for split in batches:
        with timed(f"{split}: evaluating {batches[split].num_rows:,} rows of {T} tokens"):
            losses[split] = evaluate_loss(model, batches[split], tokenizer.count_token_bytes())
    results = {f"{split}_{key}": value for split, loss in losses.items() for key, value in
               (("bpb", loss.bpb), ("bytes", loss.num_bytes), ("tokens", loss.num_tokens))}
    if ranks.rank == 0:
        all_rows = validation_batches(shards, tokenizer, T, num_rows, Ranks())
        with timed("byte models: fitting and evaluating"):
            results |= compute_byte_bpb(iter_documents(shards.train, FIT_CHARS), iter_texts(all_rows, tokenizer))
        results["samples"] = draw_samples(Engine(model, tokenizer), tokenizer)
        results |= {"run_dir": str(run_dir), "step": step, "dtype": str(model.compute_dtype).removeprefix("torch."),
                    "val_rule": batches["val"].rule, "train_rule": batches["train"].rule}
        write_json(run_dir / f"loss_{step:06d}.json", results)
        report_loss(results, run_dir, sys.argv if argv is None else argv, time.perf_counter() - start_time)
    return results


def find_training_data(asked: str | None, trained_on: dict) -> ShardList:
    """The shards that the model was trained on; UserError for other shards of the same name."""
    if trained_on["hash"] is None and not asked:
        raise UserError("this model was imported, so nobody knows its data; name data to evaluate it on, with --data")
    folder = trained_on.get("folder", "")
    there = (Path(folder) / "manifest.json").is_file()
    shards = load_shards(asked or (folder if there else trained_on["name"]), train_files=trained_on.get("train_files"))
    if trained_on["hash"] not in (None, shards.hash):
        raise UserError(f"the model was trained on data {trained_on['name']} {trained_on['hash']}, but {shards.name} "
                        f"in {shards.val.parent} is {shards.hash}; name the folder of the old data with --data")
    return shards


def iter_texts(batches: ValidationBatches, tokenizer) -> Iterator[str]:
    """The text of the evaluated rows, piece by piece, so that the byte models are scored on the same text."""
    for batch in batches:
        for row in batch.targets:
            yield from tokenizer.decode(row[row >= 0].tolist()).split(tokenizer.bos_token)


def draw_samples(engine: Engine, tokenizer) -> list[dict]:
    """Greedy continuations of PROMPTS, and sampled texts without a prompt ('')."""
    bos_id, samples = tokenizer.get_bos_token_id(), []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, prepend=bos_id)
        rows, _ = engine.generate_batch(ids, max_tokens=PROMPTED_TOKENS, temperature=0)
        samples.append({"prompt": prompt, "text": tokenizer.decode(rows[0][len(ids):])})
    rows, _ = engine.generate_batch([bos_id], num_samples=NUM_UNCONDITIONED, max_tokens=UNCONDITIONED_TOKENS)
    samples += [{"prompt": "", "text": tokenizer.decode(row[1:])} for row in rows]
    for sample in samples:
        print0(f"sample | {sample['prompt']!r} -> {sample['text']!r}")
    return samples


def report_loss(results: dict, run_dir: Path, command: list[str], wall_sec: float) -> None:
    """Print the table and write the section of the report card."""
    rows = [["this model", "validation", results["val_bpb"]], ["this model", "training", results["train_bpb"]],
            ["bigram byte model", "validation", results["bigram_byte_bpb"]],
            ["unigram byte model", "validation", results["unigram_byte_bpb"]]]
    for what, text, bpb in rows:
        print0(f"{what:<20}{text:<12}{bpb:>8.4f} bits per byte")
    write_section("base_loss", {
        "title": "Base model: bits per byte and samples", "stage": "base", "argv": command, "wall_sec": wall_sec,
        "run": str(run_dir.relative_to(get_base_dir())), "metrics": {"val_bpb": results["val_bpb"]},
        "values": {"step": results["step"], "val_bytes": results["val_bytes"], "train_bytes": results["train_bytes"]},
        "tables": [{"title": "Bits per byte", "columns": ["model", "text", "bpb"], "rows": rows}],
        "samples": results["samples"], "notes": [f"Rows: {results['val_rule']}."]})


if __name__ == "__main__":
    run_script(main)
