"""scripts.chat_cli with the scripted model: python -m tests.programs.chat_cli [chat_cli's flags]"""

import sys

from nanochat.common import run_script
from scripts import chat_cli
from tests.helpers import BYTE_TOKENIZER
from tests.server_helpers import ScriptedModel

chat_cli.load_model = lambda *args, **options: (ScriptedModel(step_sec=0.01), BYTE_TOKENIZER, {"step": 7})
run_script(lambda _: chat_cli.main(sys.argv[1:]))
