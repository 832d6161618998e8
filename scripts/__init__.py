"""The command lines. A process is prepared here, before a script loads torch."""

from nanochat.command_line import prepare_process

prepare_process()
