"""Decode two tokens, then print which of the compiler's packages were imported: python -m tests.programs.first_token"""

import sys

from nanochat.engine import Engine
from tests.helpers import BYTE_TOKENIZER, TINY, make_model

Engine(make_model(TINY), BYTE_TOKENIZER).generate_batch([1, 2, 3], max_tokens=2)
print(sorted({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
