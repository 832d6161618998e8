"""The CORE metric of a base model: centered accuracy on 22 tasks with examples in the context, 0 = guessing.

    python -m scripts.base_eval --fetch                             # once: download the tasks
    python -m scripts.base_eval                                     # the latest base model, all items
    python -m scripts.base_eval -g d12 -s 2000 --max-per-task 100
    torchrun --standalone --nproc-per-node 8 -m scripts.base_eval
    python -m scripts.base_eval --hf-path openai-community/gpt2     # a Hugging Face model, to compare with

Finished tasks are kept in $NANOCHAT_BASE_DIR/runs/base/<tag>/core_<step>.json, those of a Hugging Face model in
core_hf/<name>.json: the same command continues from there. The tasks are in eval_bundle/ or eval_bundle.zip in
$NANOCHAT_BASE_DIR; --fetch takes $NANOCHAT_MIRROR_DIR/eval_bundle.zip where that folder is set.
"""

import argparse
import hashlib
import json
import re
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nanochat.checkpoint_manager import MODEL_NAME, add_model_flags, load_model
from nanochat.command_line import Parser, add_compute_flags, int_or_all, run_script
from nanochat.common import (
    Ranks,
    UserError,
    file_lock,
    get_base_dir,
    get_first_line,
    get_mirror_dir,
    hash_file,
    print0,
    write_json,
)
from nanochat.devices import get_compute_dtype, init_compute
from nanochat.download import CorruptFile, Job, download_all
from nanochat.flash_attention import choose_for_inference
from nanochat.loss_eval import (
    BUNDLE_URL,
    NUM_CORE_TASKS,
    CoreTask,
    compute_core,
    find_bundle,
    load_tasks,
    score_task,
)
from nanochat.report import write_section

DEFAULT_CONTEXT = 2048   # of a Hugging Face model whose configuration names none


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser, choices=("base",), default="base", help="stage of the model")
    add_compute_flags(parser)
    add("--hf-path", help="evaluate this Hugging Face model instead: a folder, or a name on the hub")
    add("--max-per-task", type=int_or_all, help="items of each task, or all (default: all)")
    add("--bundle", type=Path, help="folder with the tasks (default: eval_bundle in the base folder)")
    add("--fetch", action="store_true", help="only download the tasks to the base folder, where they aren't there")
    add("--fresh", action="store_true", help="evaluate again what has been evaluated before")
    args = parser.parse_args(argv)
    if args.max_per_task == 0:
        raise UserError("--max-per-task 0 must be at least 1, or all")
    if args.hf_path:
        parser.refuse_unused(args, ("model_tag", "step"), "--hf-path")
    if args.fetch:
        parser.refuse_unused(args, ("model_tag", "step", "hf_path", "max_per_task", "bundle", "fresh"), "--fetch")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.fetch:
        return {"bundle_dir": str(fetch_bundle())}
    start_time = time.perf_counter()
    device, ranks = init_compute(args.device_type)
    dtype, reason = get_compute_dtype(args.dtype, device)
    tasks = load_tasks(args.bundle)
    if args.hf_path:
        model, tokenizer, weights = load_hf_model(args.hf_path, device, dtype)
        folder, name, step = get_base_dir() / "core_hf", make_slug(args.hf_path), None
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.json"
        print0(f"{args.hf_path}, context {model.config.sequence_len}, on {device} in {dtype} ({reason})")
    else:
        model, tokenizer, meta = load_model("base", device, tag=args.model_tag, step=args.step, dtype=dtype)
        backend = choose_for_inference(device, dtype, model.config)
        folder, step, weights = Path(meta["run_dir"]), meta["step"], meta["files"][MODEL_NAME]
        name, path = folder.name, folder / f"core_{step:06d}.json"
        print0(f"{name}, step {step}, on {device} in {dtype} ({reason}), attention {backend}")

    settings = {"max_per_task": -1 if args.max_per_task is None else args.max_per_task, "bundle": hash_tasks(tasks),
                "model": weights, "dtype": str(dtype).removeprefix("torch.")}
    results = load_results(path, settings, args.fresh, ranks)
    print0(f"{'task':32s} {'accuracy':>8s} {'centered':>8s} {'items':>6s} {'seconds':>8s}")
    for task in tasks:
        task_start = time.perf_counter()
        is_new = task.label not in results
        if is_new:
            results[task.label] = score_task(model, tokenizer, task, args.max_per_task)
            if ranks.rank == 0:
                write_json(path, {"settings": settings, "tasks": results})
        took = f"{time.perf_counter() - task_start:8.1f}" if is_new else "  before"
        values = results[task.label]
        print0(f"{task.label:32s} {values['accuracy']:8.4f} {values['centered']:8.4f} {values['num_items']:6d} {took}")

    core = compute_core({task.label: results[task.label] for task in tasks})
    what = f"mean over {core['num_tasks']} tasks" + ("" if args.max_per_task is None else
                                                     f" of at most {args.max_per_task} items")
    print0(f"{'CORE':32s} {'':8s} {core['core_metric']:8.4f}   ({what})")
    if core["num_tasks"] != NUM_CORE_TASKS:
        print0(f"not the published metric, which is the mean over {NUM_CORE_TASKS} tasks")
    if ranks.rank == 0:
        write_json(path, {"settings": settings, **core})
        section = {"argv": sys.argv if argv is None else argv, "wall_sec": time.perf_counter() - start_time}
        if args.hf_path:  # no stage of ours: it has a section, but no column among them
            section |= {"title": f"For comparison: CORE of {args.hf_path}", "order": 51}
        else:
            section |= {"title": "Base model: CORE", "order": 50, "stage": "base",
                        "run": folder.relative_to(get_base_dir()).as_posix(), "metrics": {"CORE": core["core_metric"]}}
        report_core(f"base_eval_hf_{name}" if args.hf_path else "base_eval", section, core, what, step)
    return {"run_dir": str(folder), "step": step, **core}


def fetch_bundle() -> Path:
    """The folder of the tasks in the base folder, after a download if they are missing; UserError where that fails."""
    bundle_dir, mirror_dir = get_base_dir() / "eval_bundle", get_mirror_dir()
    archive = bundle_dir.with_name("eval_bundle.zip")
    with file_lock(bundle_dir):
        if not bundle_dir.exists() and not archive.exists():
            source = mirror_dir / archive.name if mirror_dir else BUNDLE_URL
            print0(f"fetching the CORE tasks from {source}")
            failed = download_all([Job(source, archive)], 1, check_archive, lambda *_: None)
            if failed:
                raise UserError(f"the CORE tasks can't be had: {failed[archive.name]}; connect to the network, or put "
                                f"{archive.name} into {archive.parent}")
        return find_bundle(bundle_dir)


def check_archive(path: Path) -> None:
    """Raise CorruptFile unless the file is a whole zip."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise CorruptFile(str(error)) from None
    if damaged:
        raise CorruptFile(f"{damaged} in it is damaged")


def hash_tasks(tasks: list[CoreTask]) -> str:
    """16 hex digits that name the content of a bundle."""
    return hashlib.sha256(json.dumps([vars(task) for task in tasks]).encode()).hexdigest()[:16]


def load_results(path: Path, settings: dict, fresh: bool, ranks: Ranks) -> dict[str, dict]:
    """Earlier results with the same settings; those of other settings are renamed and kept.

    Every rank reads the file: it changes only after all ranks have finished a task together.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved_settings, tasks = saved["settings"], dict(saved["tasks"])
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError):
        print0(f"{path} is damaged, so all tasks are evaluated again")
        return {}
    if saved_settings == settings:
        return {} if fresh else tasks
    if ranks.rank == 0:
        names = (path.with_name(f"{path.stem}~{i}.json") for i in range(1, 10**6))
        path.rename(kept := next(name for name in names if not name.exists()))
        differing = ", ".join(key for key in settings if saved_settings.get(key) != settings[key])
        print0(f"earlier results with another {differing} were kept as {kept.name}")
    return {}


def report_core(name: str, section: dict, core: dict, what: str, step: int | None) -> None:
    """Write the section of the report card."""
    rows = [[label, result["accuracy"], result["centered"], result["num_items"]]
            for label, result in core["tasks"].items()]
    notes = [f"CORE is the {what} of centered accuracy: 0 is guessing, 1 is all right."]
    if core["num_tasks"] != NUM_CORE_TASKS:
        notes.append(f"Not the published metric, which is the mean over {NUM_CORE_TASKS} tasks.")
    values = {"CORE": core["core_metric"], "step": step, "tasks": core["num_tasks"]}
    write_section(name, section | {
        "notes": notes, "values": {key: value for key, value in values.items() if value is not None},
        "tables": [{"title": "Tasks", "columns": ["task", "accuracy", "centered", "items"], "rows": rows}]})


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face models, to compare with: they need the package transformers; weights come from safetensors files only


class HFModel(nn.Module):
    """A causal language model of transformers: (R, T) token ids to (R, T, V) logits, all that CORE asks of a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        names = ("max_position_embeddings", "n_positions", "n_ctx")
        self.config = SimpleNamespace(sequence_len=next(
            (getattr(model.config, name) for name in names if getattr(model.config, name, None)), DEFAULT_CONTEXT))

    def get_device(self) -> torch.device:
        return self.model.device

    def forward(self, idx: Tensor) -> Tensor:
        # Rows are padded on the right, which a causal model's earlier positions don't see, so no mask is needed
        return self.model(input_ids=idx, use_cache=False).logits.float()


class HFTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        """The first token of a document: bos, or eos for models without bos."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise UserError("this tokenizer has no token that begins or ends a document; choose another model")
        return eos if bos is None else bos

    def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *ids] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def load_hf_model(path: str, device: torch.device, dtype: torch.dtype) -> tuple[HFModel, HFTokenizer, str]:
    """The model at `path`, a folder or a name on the hub, in eval mode, its tokenizer and its weights' hash."""
    try:
        import transformers
    except ImportError:
        raise UserError("--hf-path needs the package transformers, which isn't installed: "
                        "pip install transformers") from None
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:   # transformers' errors for an unusable model
        reason = get_first_line(error).rstrip(". ")
        raise UserError(f"--hf-path {path} can't be loaded ({reason}); give a folder that has a model with "
                        "safetensors files, or a name on the hub") from None
    hashes = [hash_file(file) for file in sorted(Path(path).glob("*.safetensors"))]
    weights = "+".join(hashes) or str(getattr(model.config, "_commit_hash", None) or path)
    return HFModel(model.to(device=device, dtype=dtype)).eval(), HFTokenizer(tokenizer), weights


def make_slug(path: str) -> str:
    """The name of a model as part of a file's name: lower-case letters, digits, - and _."""
    return re.sub(r"[^a-z0-9_-]+", "-", "_".join(Path(path).parts[-2:]).lower()).strip("-")


if __name__ == "__main__":
    run_script(main)
