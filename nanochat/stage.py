"""What all training stages share besides the step: the beginning and end of a run, evaluation, records.

    flags + data -> Recipe (what to train) -> Setup (how this machine does it) -> Run (what the loop works on)

There is no trainer: each stage shows its own loop, and calls these.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.checkpoint_manager import Checkpoint, Checkpointer
from nanochat.choices import Choices, StageFlags, StepRows, choose_how, describe_short_rows, predict_run, take_identity
from nanochat.common import Ranks, UserError, now, print0
from nanochat.compilation import set_compile_kernels
from nanochat.config import GPTConfig, describe_params, read_config
from nanochat.cross_entropy import LossScaler
from nanochat.dataloader import Groups, RowOrder, TrainLoader, ValidationBatches
from nanochat.devices import get_environment
from nanochat.engine import Engine
from nanochat.fp8 import use_fp8
from nanochat.loss_eval import evaluate_loss
from nanochat.moe import make_balance
from nanochat.optim import MuonAdamW
from nanochat.presets import find_rule
from nanochat.run import STOP_SIGNALS, Progress, RunLog, StepLog, StopSignal, check_ranks, compare_with_saved, read_info
from nanochat.scaling import REFERENCE_BATCH_TOKENS, Plan, get_batch_lr_scale
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import TrainState


@dataclass(frozen=True)
class Recipe:
    """What a run is to learn, known before anything is loaded: a stage makes it of its flags and data."""
    stage:          str
    run_dir:        Path
    flags:          StageFlags
    saved:          Checkpoint | None    # of this run, to continue from
    source:         Checkpoint | None    # of the stage before, to begin with
    tokenizer:      RustBPETokenizer
    tokenizer_name: str
    config:         GPTConfig
    plan:           Plan
    T:              int                  # tokens of the longest rows
    rows_per_step:  int                  # all ranks together
    lrs:            dict[str, float]     # by LR_NAMES, before they are scaled to the batch
    data:           dict                 # its record in run.json: name, hash, ...
    identity:       dict                 # of the data and the source, beside tokenizer, model, plan and flags
    notes:          dict                 # what checkpoints keep for the stage's own use
    rule:           str                  # of presets.RULES, by which it is trained
    beside_bytes:   int = 0              # that the stage keeps beside a step

    def get_saved(self, key: str) -> object:
        """An entry of the checkpoint's meta.json; None in a new run."""
        return self.saved.meta.get(key) if self.saved else None

    def get_meta(self, device: torch.device) -> dict:
        """What all checkpoints of the run say alike."""
        identity = {**self.identity, "tokenizer": self.tokenizer.hash, "model": asdict(self.config),
                    "plan": asdict(self.plan), "rule": self.rule, **self.lrs, **take_identity(self.flags.given)}
        return {"stage": self.stage, "model_config": asdict(self.config), "identity": identity, "data": self.data,
                "tokenizer": {"name": self.tokenizer_name, "hash": self.tokenizer.hash,
                              "vocab_size": self.tokenizer.get_vocab_size()},
                "environment": get_environment(device), **self.notes}


@dataclass(frozen=True)
class Setup:
    """A recipe, and how it is carried out here."""
    recipe:     Recipe
    device:     torch.device
    ranks:      Ranks
    first_step: int           # where this process begins
    last_step:  int           # and where it stops
    choices:    Choices
    meta:       dict          # see Recipe.get_meta
    decisions:  list[dict]    # printed, and kept in run.json

    def make_loader(self, groups: Groups, **lanes) -> TrainLoader:
        """The rows of the run, from where its checkpoint left them."""
        recipe, flags = self.recipe, self.recipe.flags
        order = RowOrder(recipe.rows_per_step, flags.seed, allow_mismatch=flags.allow_mismatch, **lanes)
        return TrainLoader(groups, order, self.ranks, state=recipe.get_saved("loader"),
                           pin_memory=self.device.type == "cuda")

    def count_eval_rows(self) -> int:
        """Rows of a validation loss, all ranks together."""
        tokens = self.recipe.flags.eval_tokens or (2**17 if self.device.type == "cpu" else 20 * 2**19)
        return -(-tokens // self.recipe.T)


def prepare_run(recipe: Recipe, device: torch.device, ranks: Ranks) -> Setup | None:
    """Compare a run with the one that it continues, and choose how it computes; None where nothing is left to do.
    Collective. Nothing on disk changes before begin_run."""
    flags, plan, run_dir, decisions = recipe.flags, recipe.plan, recipe.run_dir, []
    first_step, meta = recipe.saved.step if recipe.saved else 0, recipe.get_meta(device)
    check_ranks(run_dir, {"step": first_step, "flags": flags.given, **meta["identity"]})
    if recipe.saved:
        saved = recipe.saved.meta
        # An older one names neither all knobs nor the rule nor the plan's lr_batch_tokens
        identity = {"rule": "july26"} | saved["identity"] | {"model": asdict(read_config(saved["model_config"])),
                    "plan": {"lr_batch_tokens": REFERENCE_BATCH_TOKENS} | saved["identity"]["plan"]}
        decisions += compare_with_saved(saved | {"identity": identity}, meta, take_identity(flags.defaults), run_dir,
                                        flags.allow_mismatch)
        if first_step >= plan.num_iterations and read_info(run_dir).get("status") == "finished":
            print0(f"the run in {run_dir} is finished{' and stays as it is' if decisions else ''}; --resume none or "
                   f"another {'--model-tag' if recipe.stage == 'base' else '--out-tag'} starts a new one")
            return None
    last_step = min(flags.stop_at or plan.num_iterations, plan.num_iterations)
    if last_step < first_step:
        raise UserError(f"--stop-at {last_step} is behind the run in {run_dir}, which is at step {first_step}")
    rows = StepRows(recipe.config, recipe.T, recipe.rows_per_step // ranks.world_size, recipe.beside_bytes,
                    find_rule(recipe.rule).has_muon)
    num_flops = plan.count_flops(last_step) - plan.count_flops(first_step)
    choices = choose_how(flags.wanted.keep(recipe.saved, recipe.source, device), rows, num_flops, device, decisions)
    check_ranks(run_dir, choices.to_json(choices.micro_rows))
    describe_short_rows(plan, recipe.T, choices.machine, decisions)
    return Setup(recipe, device, ranks, first_step, last_step, choices, meta, decisions)


def make_state(setup: Setup, narrow: Callable[[MuonAdamW], MuonAdamW] | None = None) -> TrainState:
    """Model, optimizer and (fp16) loss scaler: initialised from the seed, or as a checkpoint left them. Collective.
    narrow: takes parameters from the optimizer; of the stage before, only the weights are taken over then"""
    recipe, plan, machine = setup.recipe, setup.recipe.plan, setup.choices.machine
    dtype, begin = getattr(torch, machine.dtype), recipe.saved or recipe.source
    torch.manual_seed(recipe.flags.seed)
    model = checkpoints.build_model(recipe.config, dtype, setup.device)
    model.init_weights()
    model.loss, model.balance = machine.loss, None if narrow else make_balance(model)
    # Scalars follow the root of the batch everywhere: as fast as the rest, small models lose .07 bits per byte
    lrs = recipe.lrs | {"scalar_lr": recipe.lrs["scalar_lr"] * get_batch_lr_scale(plan.lr_batch_tokens)}
    optimizer = model.setup_optimizer(**lrs, weight_decay=plan.weight_decay, batch_lr_scale=plan.batch_lr_scale,
                                      rule=find_rule(recipe.rule))
    if narrow:
        optimizer = narrow(optimizer)
    optimizer.get_named_state()  # allocated now: a run can't survive an update that runs out of memory half-way
    scaler = LossScaler() if dtype == torch.float16 else None
    if begin and narrow and not recipe.saved:
        checkpoints.load_weights(model, begin.run_dir, begin.step)
    elif begin:
        checkpoints.restore(begin.run_dir, begin.step, model, optimizer)
        if scaler:
            vars(scaler).update(begin.meta["scaler"] or {})
    set_compile_kernels(machine.is_compiled)
    if machine.is_fp8:
        use_fp8(model, optimizer)
    if setup.choices.is_one_trunk:
        model.compile_trunk()
    elif machine.is_compiled:
        model.compile_blocks()
    return TrainState(model, optimizer, scaler, recipe.rows_per_step // setup.ranks.world_size,
                      setup.choices.micro_rows)


@dataclass(frozen=True)
class Run:
    """What the loop of a stage works on."""
    setup:    Setup
    state:    TrainState
    loader:   object         # TrainLoader, or RL's Rollouts: next_step, give_back, state_dict
    saver:    Checkpointer
    log:      RunLog
    progress: Progress
    steps:    StepLog

    def is_due(self, step: int, every: int | None) -> bool:
        """Whether something is to be done at this step: at multiples of `every` and at the end; None is never."""
        return step > 0 and (every or 0) > 0 and (step == self.setup.last_step or step % every == 0)

    def get_meta(self) -> dict:
        """What a checkpoint holds beside weights and optimizer state. Collective."""
        state = self.state
        return self.setup.meta | {"choices": self.setup.choices.to_json(state.micro_rows),
                                  "loader": self.loader.state_dict(), "optimizer_steps": state.optimizer.num_steps,
                                  "scaler": state.scaler and vars(state.scaler), "progress": self.progress.get_state()}

    def stop(self, signal: StopSignal) -> None:
        """End a run that was told to stop, when its last save is on disk; raises what ends the process."""
        self.saver.wait()
        if not signal.error:  # whose reason is there already
            self.log.update(reason=STOP_SIGNALS.get(signal.signum, "the signal of another rank"))
        self.log.close("stopped")
        signal.end()

    def finish(self, step: int, results: dict) -> dict:
        """Record the results of a run that came to its last step, when that is on disk; returns run.json."""
        self.saver.wait()
        plan, progress = self.setup.recipe.plan, self.progress
        own = {**progress.get_results(), "step": step, "tokens": step * plan.batch_tokens}
        self.log.update(results=own | results)
        self.log.close("finished" if step == plan.num_iterations else "stopped")
        return self.log.info


def begin_run(setup: Setup, state: TrainState, loader) -> Run:
    """Claim the folder, open the log, and print the plan. Collective."""
    recipe, flags, config, plan = setup.recipe, setup.recipe.flags, setup.recipe.config, setup.recipe.plan
    resume_step = recipe.saved.step if recipe.saved else None
    params, data, tokenizer = state.model.num_scaling_params(), recipe.data, setup.meta["tokenizer"]
    info = {"stage": recipe.stage, "tag": recipe.run_dir.name, "created": now(), "argv": flags.argv,
            "args": flags.given, "model_config": asdict(config), "params": params, "plan": asdict(plan),
            "predicted": predict_run(recipe.stage, setup.choices, config, plan), "data": data,
            "tokenizer": tokenizer, "environment": setup.meta["environment"], "decisions": setup.decisions,
            "num_devices": setup.ranks.world_size, **({"source": recipe.source.describe()} if recipe.source else {})}
    saver = Checkpointer(recipe.run_dir, flags.saving, last_step=setup.last_step, saved_step=resume_step)
    saver.check_disk(state.model, state.optimizer)
    checkpoints.claim_folder(recipe.run_dir, resume_step, is_asked_for=flags.resume != "auto")
    log = RunLog(recipe.run_dir, info, setup.ranks, resume_step=resume_step, wandb_name=flags.wandb_name,
                 start_time=flags.start_time)
    print0(f"model: depth {config.n_layer}, width {config.n_embd}, {config.n_head} heads, context "
           f"{config.sequence_len}, vocabulary {config.vocab_size:,}: {describe_params(params)}\n"
           f"plan: {plan.num_iterations:,} steps of {plan.batch_tokens:,} tokens = {plan.total_tokens:,} (horizon by "
           f"{plan.horizon}, {plan.tokens_per_param:.1f} per scaling parameter), {plan.total_flops:.2e} FLOPs, "
           f"learning rates x{plan.batch_lr_scale:.3g}\n"
           f"data: {data['name']} ({data['hash']}), tokenizer: {tokenizer['name']} ({tokenizer['hash']})\n"
           f"run: {recipe.run_dir}" + (f", continued at step {setup.first_step}" if setup.first_step else ""))
    if setup.choices.machine.is_compiled:
        print0("compiling the step: up to a minute the first time, a few seconds after that ...")
    progress = Progress(plan, setup.choices.peak_flops, setup.device, recipe.get_saved("progress"))
    predicted_bytes = setup.choices.memory_bytes if flags.wanted.micro_rows == "auto" else None
    steps = StepLog(log, progress, setup.first_step, predicted_bytes)
    return Run(setup, state, loader, saver, log, progress, steps)


def evaluate(run: Run, step: int, val_batches: ValidationBatches) -> dict:
    """Validation bits per byte; the rule and the context are part of what the figure means. Collective."""
    start, recipe = time.perf_counter(), run.setup.recipe
    result = evaluate_loss(run.state.model, val_batches.cut(run.state.micro_rows), recipe.tokenizer.count_token_bytes())
    values = {"val_bpb": result.bpb, "val_bytes": result.num_bytes, "val_T": recipe.config.sequence_len,
              "val_rule": val_batches.rule}
    run.log.write("eval", step, **values, eval_sec=time.perf_counter() - start)
    print0(f"step {step:05d} | validation: {result.bpb:.4f} bits per byte over {result.num_bytes:,} bytes")
    return values


def print_samples(run: Run, step: int, prompts: dict[str, list[int]], max_tokens: int) -> None:
    """Greedy continuations of a few prompts, given as their text and their tokens, by rank 0."""
    if run.setup.ranks.rank > 0:
        return
    tokenizer = run.setup.recipe.tokenizer
    engine = Engine(run.state.model, tokenizer, compile=None)    # the other ranks wait: no time for CUDA graphs
    for prompt, ids in prompts.items():
        try:
            rows, _ = engine.generate_batch(ids, num_samples=1, max_tokens=max_tokens, temperature=0)
        except UserError as error:  # a prompt too long for a tiny context must not cost the run
            print0(f"sample | {prompt!r}: {error}")
            continue
        text = tokenizer.decode(rows[0][1:])
        run.log.write("sample", step, prompt=prompt, text=text)
        print0(f"sample | {text!r}")
