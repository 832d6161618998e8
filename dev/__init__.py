"""The laboratory: results of sweeps, figures, benchmarks, checks. The process is prepared before torch loads."""

from nanochat.command_line import prepare_process

prepare_process()
