"""Checkpoints: save, find, load. A run's folder holds step_000200/ folders and `latest`, which loaders follow.

    step_000200/  model.safetensors    rank 0's
                  optim_0.safetensors  one for each rank that saved: the rows or matrices that the rank updates
                  meta.json            step, configuration, sha256 of the files, loader state, and its own checksum

Saving copies everything to host memory and writes beside the training. A step is written to step_000200.tmp, synced to
disk and renamed, then `latest` is replaced: whatever instant a process dies at, a loader sees a whole checkpoint or
none. Any number of ranks reads what any other number saved, each its own rows.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat import common, devices
from nanochat.common import Ranks, UserError, any_rank, gather, get_base_dir, get_ranks, print0
from nanochat.config import GPTConfig, read_config
from nanochat.flash_attention import choose_for_inference
from nanochat.gpt import GPT
from nanochat.tokenizer import get_tokenizer

STAGES = ("base", "mid", "sft", "rl")
META_NAME, MODEL_NAME = "meta.json", "model.safetensors"
ABANDONED_NAME = "abandoned"    # an empty file in a checkpoint from which a person went back
RANGES_KEY = "row_ranges"
FORMAT_VERSION = 1   # raised when an older nanochat couldn't read the files


def check_tag(tag: str) -> None:
    """UserError for a tag that can't name a run's folder."""
    common.check_name(tag, "the tag", reserved=(".lock",))


def get_run_dir(stage: str, tag: str) -> Path:
    """The folder of one run: $NANOCHAT_BASE_DIR/runs/<stage>/<tag>."""
    check_tag(tag)
    return get_base_dir() / "runs" / stage / tag


@dataclass(frozen=True)
class SaveRules:
    """When checkpoints are written, and which are kept."""
    every:         int | None = None   # steps; None: by time and at the end only
    every_minutes: float      = math.inf
    keep_last:     int | None = 2      # newest ones; None keeps all
    keep_every:    int | None = None   # of older ones, those at multiples of so many steps


class Checkpointer:
    """Saves a run beside its training: a copy in host memory, then files by a thread, one checkpoint at a time.

    Several ranks save together, each its part, into one folder that all of them see. All construct and call it alike.
    """

    def __init__(self, run_dir: Path, rules: SaveRules = SaveRules(), *, last_step: int | None = None,  # noqa: B008
                 saved_step: int | None = None):
        """last_step: where the run ends or stops; saved_step: the step that is on disk already."""
        if rules.keep_last == 0:
            raise UserError("--keep-last 0 would leave nothing to go on from; set 1 or more, or all")
        self.run_dir, self.rules, self.last_step, self.saved_step = run_dir, rules, last_step, saved_step
        self.last_save_time = time.monotonic()
        # the thread's collectives need a group of their own: those of the step must not get between them
        timeout = common.get_collective_timeout()
        self.group = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.ranks = get_ranks() if self.group else Ranks()
        self.copies: dict[str, Tensor] = {}   # host memory, used again by the next save
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def due(self, step: int, stopping: bool, evaluating: bool) -> tuple[bool, bool]:
        """(whether to save now, whether to stop now), alike on all ranks. Collective: all ranks call it.

        Saved is what isn't on disk yet: every so many steps and minutes, at the run's last step, before it stops, and
        before its first evaluation, which may fail. After that one at most `every_minutes` of work are at stake.
        """
        late = time.monotonic() - self.last_save_time > 60 * self.rules.every_minutes
        stopping, late, failed = any_rank(stopping, late, self.error is not None)
        if failed:
            self.wait()  # raises how
        is_first = evaluating and step > 0 and self.saved_step is None
        at_step = step == self.last_step or step > 0 and self.rules.every and step % self.rules.every == 0
        return step != self.saved_step and bool(at_step or stopping or late or is_first), stopping

    def save(self, step: int, model, optimizer, meta: dict) -> None:
        """Start to save a step; returns when parameters and optimizer may change again. Waits for an earlier save.
        Collective.
        meta: JSON-able; the configuration, the loader's state, all else that the run needs to continue"""
        self.wait()
        self.last_save_time, self.saved_step = time.monotonic(), step
        optimizer.gather_masters()
        state = optimizer.get_named_state()
        tensors = {name: piece.tensor for name, piece in state.items() if piece.is_ours}
        ranges = {name: (piece.start, piece.stop, piece.num_rows) for name, piece in state.items()
                  if piece.is_ours and piece.stop - piece.start < piece.num_rows}
        files = {f"optim_{self.ranks.rank}.safetensors": (self._copy("optim", tensors), ranges)}
        if self.ranks.rank == 0:
            files[MODEL_NAME] = (self._copy("model", model.state_dict()), {})
        devices.synchronize(model.get_device())  # the copies are under way
        meta = meta | {"format": FORMAT_VERSION, "step": step, "world_size": self.ranks.world_size}
        # a daemon: a second Ctrl-C must end the process at once; an orderly end waits in __exit__
        self.thread = threading.Thread(target=self._write, args=(step, files, meta), name="checkpoint", daemon=True)
        self.thread.start()

    def _copy(self, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now, in host memory."""
        copies = {}
        for name, tensor in tensors.items():
            key, pinned = f"{prefix}/{name}", tensor.device.type == "cuda"
            if key not in self.copies:
                self.copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            copies[name] = self.copies[key].copy_(tensor.detach(), non_blocking=pinned)
        return copies

    def check_disk(self, model, optimizer) -> None:
        """Refuse to begin a run whose first checkpoint wouldn't fit on the disk."""
        needed_bytes = sum(tensor.nbytes for tensor in model.state_dict().values()) + optimizer.count_state_bytes()
        free_bytes = shutil.disk_usage(self.run_dir.parent).free
        if needed_bytes > free_bytes:
            raise UserError(f"a checkpoint takes {needed_bytes / 1e9:.2f} GB, but {self.run_dir.parent} has only "
                            f"{free_bytes / 1e9:.2f} GB free; make room, or set NANOCHAT_BASE_DIR to another disk")

    def wait(self) -> None:
        """Wait for the save under way, and raise what went wrong with it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        error, self.error = self.error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.wait()
        elif kind is not KeyboardInterrupt and self.thread is not None:  # a failing run ends the save that it began
            self.thread.join()

    def _write(self, step: int, files: dict, meta: dict) -> None:
        """The thread: every rank writes its files, rank 0 makes a checkpoint of them, and all learn how it went."""
        temporary, is_first = self.run_dir / f"{get_step_name(step)}.tmp", self.ranks.rank == 0

        def prepare() -> None:
            if is_first:
                check_finite(files[MODEL_NAME][0], step)
                make_empty(self.run_dir, temporary)

        def finish() -> None:
            if is_first:
                publish(self.run_dir, step, meta)
                remove_old_checkpoints(self.run_dir, self.rules.keep_last, self.rules.keep_every)
        try:
            self._together(prepare)
            hashes = self._together(lambda: write_files(temporary, files))
            meta["files"] = dict(sorted(collections.ChainMap(*hashes).items()))
            self._together(finish)
            print0(f"saved step {step} in {self.run_dir}")
        except Exception as error:  # told to the training thread, which raises it
            self.error = error
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)

    def _together(self, work: Callable[[], object]) -> list:
        """Every rank's result of `work`; the first rank's error, if one has any, is raised on all."""
        result = error = None
        try:
            result = work()
        except (OSError, UserError) as problem:
            error = problem
        except Exception as problem:  # any other may not be made to be sent to the other ranks
            error = RuntimeError(f"{type(problem).__name__}: {problem}")
        answers = gather((result, error), self.group)
        if errors := [error for _, error in answers if error is not None]:
            raise errors[0]
        return [result for result, _ in answers]


def save_checkpoint(run_dir: Path, step: int, model, optimizer, meta: dict, *, keep_last: int | None = 2) -> None:
    """Save one checkpoint and wait for it. Collective."""
    with Checkpointer(run_dir, SaveRules(keep_last=keep_last)) as checkpointer:
        checkpointer.save(step, model, optimizer, meta)


def find_step(run_dir: Path, step: int | None = None) -> int:
    """The asked step, or with None the one that `latest` names; UserError if it isn't there."""
    step = read_latest(run_dir) if step is None else step
    if step is None:
        raise UserError(f"there is no checkpoint in {run_dir}")
    if step not in (steps := list_steps(run_dir)):
        raise UserError(f"there is no checkpoint of step {step} in {run_dir}; it has "
                        f"{', '.join(map(str, steps)) or 'none'}")
    return step


def claim_folder(run_dir: Path, step: int | None, is_asked_for: bool = True) -> None:
    """Make the folder ready: an earlier run there is kept under another name, or its steps after `step` abandoned, if a
    person asked for that step; else a kill came between a checkpoint and the name of the latest."""
    if get_ranks().rank > 0:
        return
    if step is not None:
        if is_asked_for:    # before `latest` is written: a kill in between leaves a mark too many, not one too few
            abandon_steps(run_dir, step)
        common.write_atomic(run_dir / "latest", get_step_name(step) + "\n")
        (run_dir / get_step_name(step) / ABANDONED_NAME).unlink(missing_ok=True)
    elif (run_dir / "latest").exists() or list_steps(run_dir):
        names = (run_dir.with_name(f"{run_dir.name}~{i}") for i in range(1, 10**6))
        kept = next(path for path in names if not path.exists())
        run_dir.rename(kept)
        print0(f"the earlier run was kept as {kept}")


def abandon_steps(run_dir: Path, step: int) -> None:
    """Mark the checkpoints after `step`, from which a person went back, and keep the log that leads to them; so, too,
    where the step itself was marked, and the person takes up that branch again."""
    later = [later for later in list_kept_steps(run_dir) if later > step]
    mark, log_path = run_dir / get_step_name(step) / ABANDONED_NAME, run_dir / "metrics.jsonl"
    if (later or mark.exists()) and log_path.is_file():
        names = (f"metrics_abandoned_{max(later, default=step):06d}{end}.jsonl"
                 for end in ("", *(f"~{i}" for i in range(1, 10**6))))
        kept_path = next(path for name in names if not (path := run_dir / name).exists())
        shutil.copyfile(log_path, kept_path)
        print0(f"going back to step {step}: the log of what came after it is kept as {kept_path}")
    for abandoned in later:
        (run_dir / get_step_name(abandoned) / ABANDONED_NAME).touch()


@contextlib.contextmanager
def locked_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in the same folder; rank 0 holds the lock for all."""
    is_first = get_ranks().rank == 0
    try:
        with common.file_lock(run_dir).acquire(blocking=False) if is_first else contextlib.nullcontext():
            yield
    except filelock.Timeout:
        raise UserError(f"another process trains in {run_dir}; wait for it, or use another tag") from None


def find_last_stage(tag: str | None) -> str:
    """The last stage with a saved run (of this tag); base where there is none, whose loading then says what to do."""
    for stage in reversed(STAGES):
        runs = [get_run_dir(stage, tag)] if tag else (get_base_dir() / "runs" / stage).glob("*")
        if any((run_dir / "latest").exists() for run_dir in runs):
            return stage
    return STAGES[0]


@dataclass(frozen=True)
class Checkpoint:
    """A saved step of a run, as something to go on from."""
    stage:   str
    run_dir: Path
    step:    int
    meta:    dict

    def describe(self) -> dict:
        """What names it in the records of a stage that begins with it."""
        return {"stage": self.stage, "tag": self.run_dir.name, "step": self.step,
                "weights": self.meta["files"][MODEL_NAME][:16]}


def find_saved(stage: str, run_dir: Path, resume: str) -> Checkpoint | None:
    """The checkpoint of a run to continue, None to start anew; `resume` is 'auto' (the latest, if any), 'none' or a
    step. The folder stays as it is until `claim_folder`, when it is clear that the run can begin."""
    if resume == "none" or resume == "auto" and read_latest(run_dir) is None:
        return None
    step = find_step(run_dir, None if resume == "auto" else int(resume))
    return Checkpoint(stage, run_dir, step, load_meta(run_dir, step))


def find_checkpoint(stage: str, tag: str | None = None, step: int | None = None) -> Checkpoint:
    """The latest run and step of a stage unless asked otherwise; one that is of another stage is refused."""
    saved = sorted((get_base_dir() / "runs" / stage).glob("*/latest"), key=lambda path: path.stat().st_mtime)
    if tag is None and not saved:
        script = {"base": "base_train", "mid": "mid_train"}.get(stage, f"chat_{stage}")
        raise UserError(f"there is no {stage} model in {get_base_dir()}; train one with python -m scripts.{script}"
                        + ("" if stage == "base" else ", or name another stage with -i"))
    run_dir = saved[-1].parent if tag is None else get_run_dir(stage, tag)
    if not run_dir.exists():
        others = ", ".join(sorted(path.parent.name for path in saved)) or "none"
        raise UserError(f"there is no {stage} run {tag!r}; {run_dir.parent} has {others}")
    step = find_step(run_dir, step)
    meta = load_meta(run_dir, step)
    if meta.get("stage", stage) != stage:
        raise UserError(f"the checkpoint {run_dir / get_step_name(step)} is of stage {meta['stage']}, not {stage}; "
                        f"put that run into {run_dir.parent.with_name(meta['stage'])}, or choose another")
    return Checkpoint(stage, run_dir, step, meta)


def build_model(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model on `device` whose parameters are not set yet; its rotary tables are."""
    with torch.device("meta"):
        model = GPT(config, dtype)
    # to_empty, but for what that loads to read a tensor on the meta device: half a second of every start
    model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    model.init_rope()
    return model


def load_model(stage: str, device: torch.device, *, tag: str | None = None, step: int | None = None,
               dtype: torch.dtype = torch.float32) -> tuple[GPT, object, dict]:
    """A trained model in eval mode, its tokenizer and its meta.json; the latest run and step unless asked otherwise.
    dtype: of the activations; bf16 weights load into any"""
    found = find_checkpoint(stage, tag, step)
    tokenizer = load_run_tokenizer(found.meta)
    model = build_model(read_config(found.meta["model_config"]), dtype, device)
    load_weights(model, found.run_dir, found.step)
    return model.eval(), tokenizer, found.meta | {"stage": stage, "run_dir": str(found.run_dir)}


def add_model_flags(parser: argparse.ArgumentParser, **stage) -> None:
    """The flags that name a trained model for load_for; stage: settings of -i that differ from the usual ones."""
    usual = {"choices": STAGES, "help": "stage of the model (default: the last trained one)"}
    parser.add_argument("-i", "--source", **usual | stage)
    parser.add_argument("-g", "--model-tag", help="folder of the run (default: the latest)")
    parser.add_argument("-s", "--step", type=int, help="optimizer step of the checkpoint (default: the latest)")


def load_for(stage: str | None, tag: str | None, step: int | None, dtype: str,
             device_type: str) -> tuple[GPT, object, dict, str]:
    """load_model for the values of these flags and of add_compute_flags', with device, dtype and attention in words.
    Collective."""
    device, _ = devices.init_compute(device_type)
    compute_dtype, reason = devices.get_compute_dtype(dtype, device)
    model, tokenizer, meta = load_model(stage or find_last_stage(tag), device, tag=tag, step=step, dtype=compute_dtype)
    backend = choose_for_inference(device, compute_dtype, model.config)
    return model, tokenizer, meta, f"on {device} in {compute_dtype} ({reason}), attention {backend}"


def load_weights(model: GPT, run_dir: Path, step: int) -> None:
    """Copy saved weights into the model, cast to its dtypes; every parameter must be there. Collective."""
    verify_files(run_dir, step, [MODEL_NAME])
    model.load_state_dict(load_tensors(run_dir / get_step_name(step) / MODEL_NAME, model.get_device()))


def restore(run_dir: Path, step: int, model: GPT, optimizer) -> None:
    """Put a checkpoint's weights and optimizer state into a model and optimizer that training goes on with.
    Collective: every rank calls it, and reads of the state just the rows that it will update."""
    meta = load_meta(run_dir, step)
    names = [name for name in meta["files"] if name.startswith("optim_")]
    verify_files(run_dir, step, names)
    try:
        load_weights(model, run_dir, step)
        optimizer.load_named_state(SavedState(run_dir / get_step_name(step), names).read, meta["optimizer_steps"])
    except (RuntimeError, ValueError) as error:  # torch's own for weights, ours for state
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"the checkpoint {run_dir / get_step_name(step)} is of another model ({reason}); train with "
                        "the model's own settings") from None


def load_run_tokenizer(meta: dict):
    """The tokenizer that a checkpoint was trained with; one of the same name but other content is refused."""
    name, saved_hash = meta["tokenizer"]["name"], meta["tokenizer"]["hash"]
    tokenizer = get_tokenizer(name)
    if tokenizer.hash != saved_hash:
        raise UserError(f"the model was trained with tokenizer {name} {saved_hash}, but the one on disk is "
                        f"{tokenizer.hash}; put the old one back or train again")
    return tokenizer


# The files of a step


def get_step_name(step: int) -> str:
    return f"step_{step:06d}"


def list_steps(run_dir: Path) -> list[int]:
    """The steps with a whole checkpoint, ascending."""
    return sorted(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob(f"step_*/{META_NAME}")
                  if path.parent.name.removeprefix("step_").isdigit())


def list_kept_steps(run_dir: Path) -> list[int]:
    """Of these, the ones that no person has abandoned by going back to an earlier one."""
    return [step for step in list_steps(run_dir) if not (run_dir / get_step_name(step) / ABANDONED_NAME).exists()]


def read_latest(run_dir: Path) -> int | None:
    """The step that `latest` names, or None in a folder without checkpoints."""
    steps = list_steps(run_dir)
    try:
        return int((run_dir / "latest").read_text(encoding="utf-8").strip().removeprefix("step_"))
    except FileNotFoundError:  # killed just before the first one was written, or deleted
        return steps[-1] if steps else None
    except ValueError:
        raise UserError(f"{run_dir / 'latest'} doesn't name a step; give one yourself: its folder has "
                        f"{', '.join(map(str, steps)) or 'none'}") from None


def check_finite(weights: dict[str, Tensor], step: int) -> None:
    """Refuse to keep a model that can't be trained further: its loss would be found out a step too late."""
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{bad[0]} has values that are not finite at step {step}, so this step was not saved and the "
                        "run stopped; go on from the last checkpoint with --allow-mismatch and a lower learning rate")


def make_empty(run_dir: Path, temporary: Path) -> None:
    """Make the folder that the ranks write into, without what a process that was killed while saving left."""
    for leftover in run_dir.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)


def publish(run_dir: Path, step: int, meta: dict) -> None:
    """Make a whole checkpoint of the files that lie in step_<step>.tmp, and the latest one."""
    temporary, final = run_dir / f"{get_step_name(step)}.tmp", run_dir / get_step_name(step)
    common.write_atomic(temporary / META_NAME, json.dumps(meta | {"checksum": hash_meta(meta)}, indent=2))
    earlier = [other for other in list_steps(run_dir) if other != step]
    if earlier and read_latest(run_dir) == step:  # once more: until it is whole, an earlier step is the latest
        common.write_atomic(run_dir / "latest", get_step_name(earlier[-1]) + "\n")
    common.sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    common.sync_folder(run_dir)
    common.write_atomic(run_dir / "latest", final.name + "\n")
    common.sync_folder(run_dir)


def write_files(folder: Path, files: dict[str, tuple[dict[str, Tensor], dict]]) -> dict[str, str]:
    """Write safetensors files, given as (tensors, ranges), synced to disk; returns the sha256 of each.

    ranges: of tensors that are rows [first, end) of a larger one: name -> (first, end, rows of the whole)
    """
    for name, (tensors, ranges) in files.items():
        try:
            # one entry, because the library writes several in another order each time
            save_file(tensors, folder / name, {RANGES_KEY: json.dumps(ranges)} if ranges else None)
        except SafetensorError as error:
            # safetensors wraps the system's error; a full disk, or a used up quota, must be known as one
            if number := re.search(r"\(os error (\d+)\)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder / name)) from error
            raise
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
    return {name: common.hash_file(folder / name) for name in files}


def remove_old_checkpoints(run_dir: Path, keep_last: int | None, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep_last` steps (None: all) and the multiples of `keep_every`, up to the one that
    `latest` names. Those that a person abandoned by going back stay, for that person to delete."""
    latest = read_latest(run_dir)
    steps = [step for step in list_kept_steps(run_dir) if latest is None or step <= latest]
    for step in steps[:-keep_last] if keep_last else []:
        if not keep_every or step % keep_every:
            try:
                common.remove_tree(run_dir / get_step_name(step))
            except OSError as error:    # the run is worth more than the room
                print0(f"warning: the old checkpoint {run_dir / get_step_name(step)} can't be deleted ({error})")


def load_meta(run_dir: Path, step: int) -> dict:
    """A checkpoint's meta.json; one that is damaged, or that a newer nanochat wrote, is refused."""
    path = run_dir / get_step_name(step) / META_NAME
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if (version := int(meta.get("format", 1))) > FORMAT_VERSION:
            raise UserError(f"the checkpoint {path.parent} has format {version}, but this nanochat reads up to "
                            f"{FORMAT_VERSION}; update nanochat, or use the version that wrote it")
        if meta.pop("checksum", None) not in (None, hash_meta(meta)):  # the first checkpoints had none
            raise ValueError("its checksum doesn't match")
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint file {path} is damaged ({error}); {advise_steps(run_dir, step)}") from None
    return meta


def hash_meta(meta: dict) -> str:
    """sha256 of what a meta.json says: a flipped digit there would be another run, without any error."""
    return hashlib.sha256(json.dumps(meta).encode()).hexdigest()


def advise_steps(run_dir: Path, bad_step: int) -> str:
    return f"use another step: {', '.join(str(s) for s in list_steps(run_dir) if s != bad_step) or 'none'}"


def verify_files(run_dir: Path, step: int, names: list[str]) -> None:
    """Compare files with the checksums they were saved with; UserError names the first that differs.

    Collective: each rank reads its share of the files, and all raise when one is damaged.
    """
    ranks = get_ranks() if common.get_process_group() else Ranks()
    expected, folder = load_meta(run_dir, step)["files"], run_dir / get_step_name(step)
    bad = [name for name in names[ranks.rank::ranks.world_size]
           if not (folder / name).exists() or common.hash_file(folder / name) != expected.get(name)]
    bad = sorted(sum(gather(bad), []))
    if bad:
        path = folder / bad[0]
        raise UserError(f"the checkpoint file {path} is {'damaged' if path.exists() else 'missing'}; "
                        f"{advise_steps(run_dir, step)}")


def open_tensors(path: Path, device: str = "cpu"):
    """A safetensors file, to be read a tensor or some rows at a time."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # Linux allows any bytes in a name, the library UTF-8 only: another name for the file
        with open(path, "rb") as file:
            return safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt", device=device)
    return safe_open(path, framework="pt", device=device)


def load_tensors(path: Path, device: torch.device) -> dict[str, Tensor]:
    """All tensors of one safetensors file."""
    with open_tensors(path, str(device)) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


class SavedState:
    """The optimizer's state in a checkpoint, read a few rows at a time from the files of all ranks that saved it."""

    def __init__(self, folder: Path, names: list[str]):
        self.pieces: dict[str, list[tuple[int, int, object]]] = {}   # name -> (first row, end row, file)
        self.num_rows: dict[str, int] = {}                            # name -> of the whole tensor
        for name in names:
            file = open_tensors(folder / name)
            ranges = json.loads((file.metadata() or {}).get(RANGES_KEY, "{}"))
            for key in file.keys():  # noqa: SIM118 (not a dict)
                num_rows = file.get_slice(key).get_shape()[0]
                start, stop, self.num_rows[key] = ranges.get(key, (0, num_rows, num_rows))
                self.pieces.setdefault(key, []).append((start, stop, file))

    def read(self, name: str, start: int, stop: int, num_rows: int) -> Tensor:
        """Rows [start, stop) of a tensor that has `num_rows`, from whichever files have them; ValueError if none do."""
        if self.num_rows.get(name) != num_rows:
            raise ValueError(f"the checkpoint has {self.num_rows.get(name, 'no')} rows of {name}, the model {num_rows}")
        parts, row = [], start
        for first, end, file in sorted(self.pieces.get(name, []), key=lambda piece: piece[:2]):
            if first <= row < min(stop, end):
                parts.append(file.get_slice(name)[row - first:min(stop, end) - first])
                row = min(stop, end)
        if row < stop:
            raise ValueError(f"the checkpoint has no rows {row} to {stop} of {name}")
        return parts[0] if len(parts) == 1 else torch.cat(parts)
