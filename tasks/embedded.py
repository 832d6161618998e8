"""Tasks without a download: the assistant's identity, and the functions of Python's standard library.

Identity fills {{name}} and {{author}} into templates; dev/gen_synthetic_data.py makes conversations of the same kind
from a person's own templates. The questions about Python come from its docstrings.
"""

import builtins
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from random import Random

from nanochat.common import UserError
from tasks.common import GeneratedTask, Task, check_split, get_reference, is_test, make_rng

# ---------------------------------------------------------------------------------------------------------------------
# Identity

# (questions, answers): any answer fits any of the questions. The last question of each is for tests only.
Template = tuple[Sequence[str], Sequence[str]]
IDENTITY: tuple[Template, ...] = (
    (("Who are you?", "What are you?", "Who is this?", "Who am I talking to?", "Tell me who you are.",
      "Introduce yourself.", "Tell me about yourself.", "Can you introduce yourself?", "Please say who you are."),
     ("I am {{name}}, a small language model made by {{author}}.",
      "I'm {{name}}, an assistant that {{author}} trained from scratch.",
      "My name is {{name}}. I am a chat model made by {{author}}.")),
    (("What is your name?", "What's your name?", "Do you have a name?", "How should I call you?", "Your name?",
      "May I know your name?", "What are you called?", "What do people call you?", "Could you tell me your name?"),
     ("My name is {{name}}.", "I am called {{name}}.", "I'm {{name}}.")),
    (("Who made you?", "Who created you?", "Who built you?", "Who trained you?", "Who is your author?",
      "Who developed you?", "Where do you come from?", "By whom were you made?", "Who is your creator?"),
     ("I was made by {{author}}.", "{{author}} made me.", "I was trained from scratch by {{author}}.")),
    (("Hello!", "Hi!", "Hi there", "Hey", "Good morning!", "Good evening!", "Hello, how are you?", "Greetings!"),
     ("Hello! I am {{name}}. How can I help you?", "Hi! {{name}} here. What can I do for you?",
      "Hello, I'm {{name}}. What would you like to know?")),
    (("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Gemini?", "Are you Llama?",
      "Did OpenAI make you?", "Did Google train you?", "Are you made by Meta?"),
     ("No, I am {{name}}, made by {{author}}.", "No. My name is {{name}}, and {{author}} made me.")),
    (("Are you a human?", "Are you a person?", "Are you a robot?", "Are you real?", "Am I talking to a machine?",
      "Are you an AI?", "Are you a computer program?", "Is there a person behind this?"),
     ("I am {{name}}, a language model, so a computer program and not a person.",
      "I'm not a person: I am {{name}}, a language model.")),
    (("What can you do?", "How can you help me?", "What are you good at?", "What are you able to do?",
      "What can I ask you?", "What are your skills?", "What do you know?", "What are you there for?"),
     ("I am {{name}}. I can calculate, spell words, count letters and answer simple questions.",
      "{{name}} can do sums with a calculator, spell words and talk about simple things.")),
    (("How big are you?", "Are you a large language model?", "Are you as smart as the big models?",
      "How smart are you?", "Do you make mistakes?", "Are you always right?", "Can I trust your answers?",
      "Should I check what you say?"),
     ("I am {{name}}, a small model, and I make mistakes. Please check what matters.",
      "{{name}} is a small model that is often wrong, so check what I say.")),
    (("How were you made?", "How were you trained?", "How do you work?", "How did you learn to talk?",
      "What were you trained on?", "How does one train a model like you?", "What is inside you?",
      "How did you come about?"),
     ("{{author}} trained me, {{name}}, to predict the next piece of text, then taught me to answer questions.",
      "I, {{name}}, learned from text to predict what comes next, and then from conversations made or chosen by "
      "{{author}}.")),
    (("What does your name mean?", "Why are you called {{name}}?", "Where does your name come from?",
      "Who gave you your name?", "Is {{name}} your real name?", "Who named you?"),
     ("{{author}} named me {{name}}.", "{{name}} is the name that {{author}} gave me.")),
    (("Do you have feelings?", "Are you happy?", "Do you get tired?", "Are you conscious?", "Do you dream?",
      "Can you feel pain?", "Do you ever sleep?"),
     ("I am {{name}}, a language model: I write text and have no feelings.",
      "No, {{name}} is only a program that writes text.")),
    (("Thank you!", "Thanks!", "Thanks a lot", "Great, thank you.", "Thank you for your help.", "Many thanks!"),
     ("You're welcome! {{name}} is glad to help.", "You're welcome. Ask {{name}} again whenever you like.")),
)
DEFAULT_FIELDS = {"name": "nanochat", "author": "the nanochat project"}
TWO_TURNS_FRAC = 0.2
GREETINGS = ("Hi! ", "Hello, ", "Hey, ", "Hi there. ")


class Identity(GeneratedTask):
    """Questions about the assistant itself; a right answer contains the expected names."""

    def __init__(self, split: str, size: int = 1000, seed: int = 0, fields: dict[str, str] | None = None,
                 **kwargs) -> None:
        """fields: who it is, by default DEFAULT_FIELDS"""
        super().__init__(split, size, seed, **kwargs)
        self.fields = DEFAULT_FIELDS | (fields or {})
        self.templates = choose_questions(split)

    def get_example(self, index: int) -> dict:
        return make_conversation(self.templates, self.fields, make_rng(self.seed, "Identity", self.split, index))

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return all(text.lower() in answer.lower() for text in conversation["expected"])


def choose_questions(split: str) -> list[Template]:
    """IDENTITY with the questions of a split: the last of each is for tests alone."""
    return [(questions[-1:] if split == "test" else questions[:-1], answers) for questions, answers in IDENTITY]


def make_conversation(templates: Sequence[Template], fields: dict[str, str], rng: Random) -> dict:
    """One or two questions with their answers. "expected": the names in every right answer to the last one."""
    messages = []
    for questions, answers in rng.sample(templates, 2 if rng.random() < TWO_TURNS_FRAC and len(templates) > 1 else 1):
        question = fill_in(rng.choice(questions), fields)
        if not messages and len(question) > 12 and rng.random() < 0.15:     # a greeting isn't greeted
            question = rng.choice(GREETINGS) + question
        if rng.random() < 0.2:
            question = question.lower().rstrip("?.!") or question
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": fill_in(rng.choice(answers), fields)}]
    expected = [text for key, text in fields.items() if all(f"{{{{{key}}}}}" in answer for answer in answers)]
    return {"messages": messages, "expected": expected}


def fill_in(template: str, fields: dict[str, str]) -> str:
    """A template with each {{key}} replaced; "the" becomes "The" at its beginning, where an author may stand."""
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)
    return text[0].upper() + text[1:] if text.startswith("the ") else text


# ---------------------------------------------------------------------------------------------------------------------
# Python's documentation

MODULES = (
    "abc", "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "cmath", "codecs", "collections", "colorsys",
    "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "enum", "fileinput", "fnmatch", "fractions",
    "functools", "gc", "getpass", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "inspect", "io", "ipaddress",
    "itertools", "json", "keyword", "linecache", "locale", "logging", "math", "mimetypes", "operator", "os", "os.path",
    "pathlib", "pickle", "platform", "pprint", "queue", "random", "re", "secrets", "shlex", "shutil", "signal",
    "socket", "sqlite3", "stat", "statistics", "string", "struct", "subprocess", "sys", "sysconfig", "tarfile",
    "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types", "unicodedata",
    "urllib.parse", "uuid", "warnings", "weakref", "zipfile", "zlib",
)
TYPES = (str, bytes, int, float, complex, list, tuple, dict, set, frozenset, range)
DOC_QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "In Python, what does {name} do?",
    "Explain {name}.",
    "What does {name} do in Python?",
    "Tell me what {name} does.",
)
MIN_SENTENCE_CHARS, MAX_SENTENCE_CHARS = 20, 200
SENTENCE = re.compile(r".+?(?<!e\.g)(?<!i\.e)(?<!etc)(?<!vs)[.!?](?=\s|$)")
NO_PROSE = re.compile(r">>>|::|->|:param|\*\*|__|\\|deprecated", re.IGNORECASE)


class PythonDocs(Task):
    """What a function or class of the standard library does: the first sentence of its docstring.

    The texts are those of the Python that runs; a name is in train or in test, whatever its version. A sentence of
    names in train is in no test.
    """

    def __init__(self, split: str, seed: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        check_split(self, split)
        sentences = {name: sentence for name, doc in iter_docstrings() if (sentence := find_sentence(name, doc))}
        learned = {name: sentence for name, sentence in sentences.items() if not is_test(name)}
        others = {name: sentence for name, sentence in sentences.items() if is_test(name)
                  and sentence not in learned.values()}
        self.seed, self.facts = seed, list((learned if split == "train" else others).items())
        if not self.facts:
            raise UserError("this Python has no docstrings; run it without -OO")
        make_rng(seed, "PythonDocs").shuffle(self.facts)    # so that a slice is about all modules

    def num_examples(self) -> int:
        return len(self.facts)

    def get_example(self, index: int) -> dict:
        name, sentence = self.facts[index]
        question = make_rng(self.seed, "PythonDocs", name).choice(DOC_QUESTIONS).format(name=name)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": sentence}]}

    def evaluate(self, conversation: dict, answer: str) -> float:
        """F1 of the answer's words and the docstring's, in any order, as in SQuAD (arXiv 1606.05250)."""
        said, expected = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, get_reference(conversation)))
        return 2 * (said & expected).total() / (said + expected).total()


def iter_docstrings() -> Iterator[tuple[str, str]]:
    """Name and docstring of the public functions, classes and methods of MODULES, Python's own, and TYPES."""
    places = [(f"{name}.", importlib.import_module(name)) for name in MODULES]
    places += [("", builtins), *((f"{kind.__name__}.", kind) for kind in TYPES)]
    for prefix, place in places:
        for name in sorted(getattr(place, "__all__", vars(place))):
            value = getattr(place, name, None)
            # what a module without __all__ has only imported is not its own
            is_own = hasattr(place, "__all__") or getattr(value, "__module__", None) in (None, place.__name__)
            if not name.startswith("_") and is_own and (inspect.isroutine(value) or inspect.isclass(value)) \
                    and isinstance(value.__doc__, str):
                yield prefix + name, inspect.cleandoc(value.__doc__)


def find_sentence(name: str, doc: str) -> str | None:
    """The first sentence of a docstring; None where it is no plain prose."""
    short = name.rpartition(".")[2]
    lines = [line for line in doc.split("\n") if not re.match(rf"(\w+\.)*{short}\(", line)]    # C's signatures
    paragraph = " ".join("\n".join(lines).strip().split("\n\n")[0].split())
    found = SENTENCE.match(paragraph)
    sentence = found[0] if found else paragraph + "."
    is_prose = sentence[:1].isupper() and sentence[-2:-1].isalnum() and not NO_PROSE.search(sentence)
    return sentence if is_prose and MIN_SENTENCE_CHARS <= len(sentence) <= MAX_SENTENCE_CHARS else None
