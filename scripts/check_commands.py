"""Parse the flags of commands that are to run later, so that a mistake in the last stage of a chain is told before the
first one. The recipes of runs/ do that with all of theirs.

    printf '%s\\0' 4 -m scripts.chat_sft --tasks GSM8K | python -m scripts.check_commands

Reads from stdin, of each command the number of its words and the words, each ended by a NUL; other programs than ours
are left out. Whether the data, the GPU or the ranks are there is told by the stage itself.
"""

import sys
from collections.abc import Iterator
from itertools import islice

from nanochat.command_line import Parser, check_flags, run_script

OURS = ("nanochat", "scripts", "tasks", "dev")


def main(argv: list[str] | None = None) -> dict:
    Parser(description=__doc__).parse_args(argv)
    num_checked = 0
    for command in read_commands(sys.stdin.buffer.read()):
        match command:
            case ["-m", name, *words] if name.split(".")[0] in OURS:
                check_flags(name, words)
                num_checked += 1
    return {"num_checked": num_checked}


def read_commands(noted: bytes) -> Iterator[list[str]]:
    """The words of each command."""
    fields = iter(noted.decode(errors="surrogateescape").split("\0")[:-1])
    for num in fields:
        yield list(islice(fields, int(num)))


if __name__ == "__main__":
    run_script(main)
