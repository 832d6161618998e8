"""What the tests of evaluations share: a bundle of CORE tasks, and a tokenizer with merges."""

import json
from pathlib import Path

from nanochat.config import GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

BOS = 259
CORE_CONFIG = GPTConfig(sequence_len=96, vocab_size=268, n_layer=3, n_head=4, n_kv_head=2, n_embd=64,
                        window_pattern="SL")

MC_ROWS = [{"query": f"Is {n} odd?", "choices": ["no", "yes, it is", "yes"], "gold": 2 * (n % 2)} for n in range(14)]
SCHEMA_ROWS = [{"context_options": [f"{n} men saw the dog; the men", f"{n} men saw the dog; the dog"],
                "continuation": "barked.", "gold": n % 2} for n in range(9)]
LM_ROWS = [{"context": f" count on: {n}, {n + 1}, ", "continuation": f"{n + 2}", "category": "x"} for n in range(12)]
# kind, few-shot examples, delimiter (None: the default), baseline in percent, rows
TASKS = {
    "odd":   ("multiple_choice", 3, "\nAnswer: ", 40, MC_ROWS),
    "dogs":  ("schema", 0, None, 50, SCHEMA_ROWS),
    "count": ("language_modeling", 2, None, 0, LM_ROWS),
}


def write_bundle(folder: Path, tasks: dict = TASKS) -> Path:
    """A bundle in the published layout."""
    lines, table = ["icl_tasks:"], ["Eval Task,Task Category,Random baseline,Description"]
    for label, (kind, num_shots, delimiter, baseline_pct, rows) in tasks.items():
        lines += ["-", f"  label: {label}", f"  dataset_uri: group/{label}.jsonl", f"  num_fewshot: [{num_shots}]",
                  f"  icl_task_type: {kind}"]
        if delimiter is not None:
            lines.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        table.append(f'{label},a category,{baseline_pct},"words, with a comma"')
        path = folder / "eval_data" / "group" / f"{label}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(table) + "\n")
    return folder


def make_tokenizer() -> RustBPETokenizer:
    """One token per byte, three merges (' t', 'th' and ' 1'), then the special tokens: an ending may merge with what
    stands before it, which bytes alone can't show."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" t": 256, b"th": 257, b" 1": 258}
    return RustBPETokenizer(SPLIT_PATTERN, ranks, {name: BOS + i for i, name in enumerate(SPECIAL_TOKENS)})
