"""The files of a checkpoint: written so that a reader sees all of it or none, verified and read a part at a time.

    step_000200/  model.safetensors    rank 0's
                  optim_0.safetensors  one for each rank that saved: the rows or matrices that the rank updates
                  meta.json            step, configuration, sha256 of the files, loader state, and its own checksum

A step is written to step_000200.tmp, synced to disk and renamed, then `latest` is replaced: whatever instant a process
dies at, a loader sees a whole checkpoint or none.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanochat.common import Ranks, UserError, gather, get_process_group, get_ranks, hash_file, sync_folder, write_atomic

META_NAME, MODEL_NAME = "meta.json", "model.safetensors"
RANGES_KEY = "row_ranges"
FORMAT_VERSION = 1   # raised when an older nanochat couldn't read the files


def get_step_name(step: int) -> str:
    return f"step_{step:06d}"


def list_steps(run_dir: Path) -> list[int]:
    """The steps with a whole checkpoint, ascending."""
    return sorted(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob(f"step_*/{META_NAME}")
                  if path.parent.name.removeprefix("step_").isdigit())


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
    write_atomic(temporary / META_NAME, json.dumps(meta | {"checksum": hash_meta(meta)}, indent=2))
    earlier = [other for other in list_steps(run_dir) if other != step]
    if earlier and read_latest(run_dir) == step:  # once more: until it is whole, an earlier step is the latest
        write_atomic(run_dir / "latest", get_step_name(earlier[-1]) + "\n")
    sync_folder(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    sync_folder(run_dir)
    write_atomic(run_dir / "latest", final.name + "\n")
    sync_folder(run_dir)


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
    return {name: hash_file(folder / name) for name in files}


def remove_old_checkpoints(run_dir: Path, keep_last: int | None, keep_every: int | None = None) -> None:
    """Delete all but the newest `keep_last` steps (None: all) and the multiples of `keep_every`, up to the one that
    `latest` names; later ones were abandoned by a person who went back, and stay for that person to delete."""
    latest = read_latest(run_dir)
    steps = [step for step in list_steps(run_dir) if latest is None or step <= latest]
    for step in steps[:-keep_last] if keep_last else []:
        if not keep_every or step % keep_every:
            shutil.rmtree(run_dir / get_step_name(step))


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
    ranks = get_ranks() if get_process_group() else Ranks()
    expected, folder = load_meta(run_dir, step)["files"], run_dir / get_step_name(step)
    bad = [name for name in names[ranks.rank::ranks.world_size]
           if not (folder / name).exists() or hash_file(folder / name) != expected.get(name)]
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
