"""dev.torture with a resume that forgets the optimizer's state: the ranks are forks and inherit the fault."""

from dev import torture
from nanochat.command_line import run_script
from nanochat.optim import MuonAdamW


def forget_state(optimizer: MuonAdamW, read, num_steps: int) -> None:
    optimizer.num_steps = num_steps


MuonAdamW.load_named_state = forget_state
run_script(lambda argv: torture.main(["--kills", "3", "--series", "bitwise", "--seed", "1"]))
