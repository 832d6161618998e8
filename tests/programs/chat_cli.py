"""scripts.chat_cli with the scripted model: python -m tests.programs.chat_cli [chat_cli's flags]"""

import sys

from nanochat import checkpoint_manager
from nanochat.command_line import run_script
from scripts import chat_cli
from tests.helpers import BYTE_TOKENIZER
from tests.server_helpers import ScriptedModel

checkpoint_manager.load_model = lambda stage, *args, **options: (
    ScriptedModel(step_sec=0.01), BYTE_TOKENIZER, {"stage": stage, "step": 7, "run_dir": "d4"})
run_script(lambda _: chat_cli.main(sys.argv[1:]))
