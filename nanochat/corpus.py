"""Where text comes from: the datasets of the hub by name; documents of Python's own documentation and sources, of the
standard library and the packages that nanochat needs. Read by scripts.plan too, so only Python's library is imported.

The long docstrings of a module become a document of English prose; its code keeps their first paragraph, so that
(nearly) no text is there twice. Documents have at most MAX_DOC_CHARS; their order depends on the texts' names and
contents alone. A person's own folder is read by text_files.py.
"""

import ast
import hashlib
import itertools
import os
import platform
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class HubSource:
    """A dataset on the hub: its files of a column `text`, by their names in the repository."""
    repo:        str
    train:       tuple[str, ...]    # shard_00000.parquet, ... on this disk
    val:         str                # val.parquet on this disk, never among the training shards
    shard_chars: int                # of a training shard, about


def number_shards(repo: str, num_shards: int) -> HubSource:
    """The layout of the published shuffles: files by their number, of which the last is validation."""
    *train, val = (f"shard_{idx:05d}.parquet" for idx in range(num_shards))
    return HubSource(repo, tuple(train), val, shard_chars=250_000_000)


HUB_SOURCES = {
    "climbmix":    number_shards("karpathy/climbmix-400b-shuffle", 6543),
    "fineweb-edu": number_shards("karpathy/fineweb-edu-100b-shuffle", 1823),
    # Short stories in the words of a small child (Eldan and Li, 2023, arXiv 2305.07759), 1.9 billion characters
    "tinystories": HubSource("roneneldan/TinyStories",
                             ("data/train-00000-of-00004-2d5a1467fff1081b.parquet",
                              "data/train-00001-of-00004-5852b56a2bd28fd9.parquet",
                              "data/train-00002-of-00004-a26307300439e943.parquet",
                              "data/train-00003-of-00004-d243063613e5a057.parquet"),
                             "data/validation-00000-of-00001-869c898b519ad725.parquet", shard_chars=470_000_000),
}


MAX_DOC_CHARS = 50_000  # longer texts are cut; most modules stay whole and a row group of 1,024 documents small

# Which files

# nanochat's own dependencies, and through them theirs. Other installed packages are ignored, so that the corpus is the
# same with and without development tools.
PACKAGES          = ("torch", "numpy", "tiktoken", "rustbpe", "pyarrow", "safetensors", "requests", "filelock")
MAX_PACKAGE_CHARS = 16_000_000  # else torch would be most of the corpus; files are drawn by the hash of their path
VAL_FRAC          = 0.015
MAX_VAL_FILE_FRAC = 0.05  # of the validation text may come from one file
TEXT_SUFFIXES     = (".py", ".md", ".rst", ".txt")
# Tests and fixtures, vendored copies of other packages, files generated for this machine
SKIPPED_FOLDERS   = {"test", "tests", "testing", "idle_test", "_vendor", "_vendored", "third_party", "__pycache__",
                     "site-packages", "dist-packages", "_bundled", "Icons", "licenses", "node_modules", ".."}
SKIPPED_FILES     = re.compile(r"test_.*|.*_test\.py|conftest\.py|_sysconfigdata.*|_sysconfig_vars.*|__config__\.py|"
                               r"(?i:licen[cs]e|copying|notice|credits|authors|contributors|requirements).*")


@dataclass(frozen=True)
class Package:
    """The files of one version of a package; `paths` are relative to `root`."""
    name:    str
    version: str
    root:    Path
    paths:   tuple[str, ...]


def find_packages() -> list[Package]:
    """The standard library and the installed packages among PACKAGES and their requirements, by name."""
    found, queue = {}, list(PACKAGES)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = Package(name, dist.version, Path(dist.locate_file("")),
                              choose_paths(str(path) for path in dist.files or ()))
        queue += [re.match(r"[\w.-]+", line)[0] for line in dist.requires or () if "extra ==" not in line]
    stdlib = Path(sysconfig.get_path("stdlib"))
    python = Package("python", platform.python_version(), stdlib, choose_paths(list_files(stdlib)))
    return [python, *(found[name] for name in sorted(found))]


def choose_paths(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths of documentation and sources, sorted."""
    def is_wanted(path: str) -> bool:
        *folders, name = path.split("/")
        if any(folder in SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders):
            return False
        if any(folder.endswith(".dist-info") for folder in folders):
            return name == "METADATA"  # its body is the package's README
        return name.endswith(TEXT_SUFFIXES) and not SKIPPED_FILES.fullmatch(name)

    return tuple(sorted(filter(is_wanted, (path.replace("\\", "/") for path in paths))))


def list_files(root: Path) -> list[str]:
    """All files below `root` as sorted relative paths, without hidden ones and SKIPPED_FOLDERS."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        paths += [Path(folder, name).relative_to(root).as_posix() for name in names if not name.startswith(".")]
    return sorted(paths)


# Documents

FULL_DOC_CHARS  = 8_000 # a source's documents are filled up to this: a row of 2,048 tokens, and enough row groups
MIN_DOC_CHARS   = 200
PROSE_CHARS     = 300   # longer docstrings move to the module's prose document
REPEAT_CHARS    = 80    # longer paragraphs, and definitions of twice this, are kept once in the corpus
MAX_COMPRESSION = 8.0   # zlib compresses sources 3 to 5 times; tables more
MAX_DIGIT_FRAC  = 0.12  # of the characters that aren't blanks
MAX_LINE_CHARS  = 1_000 # minified or embedded data
DEFINITIONS     = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
GENERATED       = re.compile(r"(?i)(auto(matically)?[- ]?generated|generated (by|from|automatically)|do not edit)")
LICENCE         = re.compile(r"(?i)copyright|licen[cs]e|all rights reserved|spdx-")


def is_new(passage: str, seen: set[bytes], min_chars: int = REPEAT_CHARS) -> bool:
    """Whether `passage` is not in `seen`, where it is put, by its letters alone: another date, number or indentation is
    still a repeat. Short ones always count as new."""
    if len(passage) < min_chars:
        return True
    letters, num_seen = "".join(re.findall(r"[^\W\d_]+", passage)).lower(), len(seen)
    seen.add(hashlib.blake2b(letters.encode(), digest_size=12).digest())
    return len(seen) > num_seen


def build_python_docs(packages: list[Package]) -> tuple[list[str], list[str]]:
    """Training and validation documents. All documents of a source file are on one side, and repeated passages are kept
    once, so that no validation text is in training."""
    def hash_path(path: str) -> bytes:
        return hashlib.sha256(path.encode()).digest()

    documents, seen = {}, set()  # source file -> its documents; passages, see is_new
    for package in packages:
        budget_chars = MAX_PACKAGE_CHARS
        for path in sorted(package.paths, key=lambda path: hash_path(f"{package.name}/{path}")):
            if (text := read_clean(package.root / path)) is None:
                continue
            budget_chars -= len(text)
            if budget_chars < 0:
                break
            make_documents = make_module_documents if path.endswith(".py") else make_text_documents
            if made := make_documents(path, text, seen):
                documents[f"{package.name}/{path}"] = made
    file_chars = {source: sum(map(len, docs)) for source, docs in documents.items()}
    train, val, wanted_chars = [], [], VAL_FRAC * sum(file_chars.values())
    max_file_chars = max(MAX_VAL_FILE_FRAC * wanted_chars, min(file_chars.values(), default=0))
    for source in sorted(documents, key=hash_path):
        if file_chars[source] <= max_file_chars and (file_chars[source] <= wanted_chars or not val):
            wanted_chars -= file_chars[source]
            val += documents[source]
        else:
            train += documents[source]
    return train, val


def read_clean(path: Path) -> str | None:
    """A file's text without blanks at line ends; None if it isn't UTF-8 text or has lines over MAX_LINE_CHARS."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    text = re.sub(r"\A#!.*\n", "", text)  # a script's shebang is this machine's
    text = re.sub(r"[ \t\f]+\n", "\n", text.replace("\0", ""))
    return text if max(map(len, text.split("\n"))) <= MAX_LINE_CHARS else None


def is_table(text: str) -> bool:
    """Whether a text is data: many digits, or far more regular than sources."""
    solid = re.sub(r"\s", "", text)
    num_digits = sum(map(solid.count, "0123456789"))
    data = text.encode()
    return num_digits > MAX_DIGIT_FRAC * len(solid) or len(data) > MAX_COMPRESSION * len(zlib.compress(data, 6))


def make_text_documents(path: str, text: str, seen: set[bytes]) -> list[str]:
    """A README or manual without repeated paragraphs; a package's METADATA without its header."""
    if path.endswith("METADATA"):
        text = text.partition("\n\n")[2]
    paragraphs = [paragraph for paragraph in re.split(r"\n{2,}", text)
                  if not paragraph.startswith("[![") and is_new(paragraph, seen)]
    return [doc for doc in join_passages(paragraphs, "\n\n") if not is_table(doc)]


def make_module_documents(path: str, text: str, seen: set[bytes]) -> list[str]:
    """A module's code, and its long docstrings as prose."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # templates and samples of broken code
        return []
    module = re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".")
    lines = text.split("\n")
    literals = find_long_literals(tree)
    if 2 * sum(map(len, literals)) > len(text):  # a manual in a .py: pydoc's topics, numpy's add_newdocs
        passages, code = literals, []
    else:
        passages = move_docstrings(tree, module, lines)
        code = [] if GENERATED.search(text[:1000]) or is_table(text) else split_definitions(tree, lines)
    paragraphs = [paragraph for passage in passages for paragraph in passage.split("\n\n")
                  if paragraph.strip() and is_new(paragraph, seen)]
    code = [part for part in code if is_new(part, seen, 2 * REPEAT_CHARS)]
    return join_passages(code, "\n") + join_passages(paragraphs, "\n\n")


def find_long_literals(tree: ast.Module) -> list[str]:
    """String literals of several paragraphs, without docstrings, in the order of the source."""
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
             and len(node.value) >= PROSE_CHARS and "\n\n" in node.value and node not in docstrings]
    return [clean_doc(node.value) for node in sorted(nodes, key=lambda node: (node.lineno, node.col_offset))]


def move_docstrings(tree: ast.Module, module: str, lines: list[str]) -> list[str]:
    """The docstrings of several paragraphs, each under its name; `lines` keeps only their first paragraphs."""
    passages = []

    def visit(node: ast.AST, name: str) -> None:
        doc = ast.get_docstring(node, clean=False)
        if doc and len(doc) >= PROSE_CHARS and shorten_docstring(node.body[0], lines):
            signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
            passages.append(f"{name}{signature}\n\n{clean_doc(doc)}")
        for child in node.body:
            if isinstance(child, DEFINITIONS):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return passages


def shorten_docstring(node: ast.Expr, lines: list[str]) -> bool:
    """Cut a docstring after its first paragraph, in place: other lines become None. False if it has one paragraph."""
    first, last = node.lineno - 1, node.end_lineno - 1
    quote = re.match(r"""\s*[rRuU]?(\"\"\"|''')""", lines[first])
    blank = next((idx for idx in range(first + 1, last) if not lines[idx].strip()), None)
    if not quote or blank is None or not lines[last].endswith(quote[1]):
        return False
    lines[blank - 1] += quote[1]
    lines[blank:last + 1] = [None] * (last + 1 - blank)
    return True


def clean_doc(doc: str) -> str:
    """A docstring without its indentation, and with one blank line between paragraphs."""
    doc = doc.encode(errors="ignore").decode()  # drops lone surrogates
    first, *rest = [line.rstrip() for line in doc.expandtabs().split("\n")]
    margin = min((len(line) - len(line.lstrip()) for line in rest if line), default=0)
    return re.sub(r"\n{3,}", "\n\n", "\n".join([first.lstrip(), *(line[margin:] for line in rest)])).strip("\n")


def split_definitions(tree: ast.Module, lines: list[str]) -> list[str]:
    """The source as passages that end with a top-level class or function, without a licence comment at its head."""
    ends = [node.end_lineno for node in tree.body if isinstance(node, DEFINITIONS)]
    head = next((idx for idx, line in enumerate(lines) if line is None or not line.startswith("#")), len(lines))
    if LICENCE.search("\n".join(lines[:head])):
        lines[:head] = [None] * head
    bounds = [0, *dict.fromkeys(ends), len(lines)]
    passages = ("\n".join(line for line in lines[start:end] if line is not None)
                for start, end in itertools.pairwise(bounds))
    return [passage.rstrip() for passage in passages if passage.strip()]


def join_passages(passages: Iterable[str], separator: str) -> list[str]:
    """Documents of about FULL_DOC_CHARS, cut between passages, without those under MIN_DOC_CHARS."""
    documents = [""]
    for passage in itertools.chain.from_iterable(map(cut_text, passages)):
        if documents[-1] and len(documents[-1]) + len(passage) > FULL_DOC_CHARS:
            documents.append("")
        documents[-1] += passage + separator
    documents = [doc.removesuffix(separator) for doc in documents]
    return [doc.strip("\n") for doc in documents if len(doc) >= MIN_DOC_CHARS]


def cut_text(text: str) -> Iterator[str]:
    """The text in pieces of at most MAX_DOC_CHARS, cut at an empty line, else at a line end, else at a blank."""
    start = 0
    while len(text) - start > MAX_DOC_CHARS:
        stop = start + MAX_DOC_CHARS
        cuts = (text.rfind(mark, start + MAX_DOC_CHARS // 2, stop) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((cut for cut in cuts if cut > start + MAX_DOC_CHARS // 2), stop)
        yield text[start:end]
        start = end
    yield text[start:]
