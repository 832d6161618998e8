"""What the tests of data and of tasks share: a server that behaves badly, texts, shards, a loader, conversations."""

import hashlib
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import dataset
from nanochat.common import Ranks
from nanochat.dataloader import Groups, RowOrder, TextGroups, TrainLoader
from nanochat.shards import ShardList
from nanochat.text_files import Account, find_text_files, read_documents
from tests.helpers import BYTE_TOKENIZER

REPO, NUM_IN_REPO = dataset.HUB_SOURCES["climbmix"].repo, len(dataset.HUB_SOURCES["climbmix"].train) + 1
BOS = BYTE_TOKENIZER.get_bos_token_id()
ALONE = Ranks()
CONTENT = bytes(range(256)) * 12_000  # 3 MB: 47 chunks


class Server(ThreadingHTTPServer):
    """Serves `content`; the first answers follow `script`, one word each, the later ones are good."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.script, self.requests = CONTENT, '"v1"', [], []
        self.extra_headers, self.delay_seconds = {}, 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/file.bin"

    def handle_error(self, request, client_address):
        pass  # clients that are killed are part of the tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.requests.append({"path": self.path, "time": time.monotonic()} | dict(self.headers))
        act = server.script.pop(0) if server.script else ""
        if act.isdigit():
            return self.answer(int(act), b"no", server.extra_headers)
        content = server.content(self.path) if callable(server.content) else server.content
        if content is None:
            return self.answer(404, b"no", {})
        start = 0
        asked = self.headers.get("Range", "")
        if asked and act != "ignore-range" and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"ETag": server.etag} | server.extra_headers
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        if act == "truncate":  # a whole answer of a part: only a checksum or a look inside can tell
            body = body[:-100]
        self.answer(206 if start else 200, body, headers, drop_after=len(body) // 2 if act == "drop" else None)

    def answer(self, status, body, headers, drop_after=None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        for start in range(0, drop_after if drop_after is not None else len(body), 2**18):
            self.wfile.write(body[start:min(start + 2**18, drop_after or len(body))])
            time.sleep(self.server.delay_seconds)
        self.wfile.flush()
        self.close_connection = True


LICENCE = "# Copyright 2020 The Authors. All rights reserved.\n# Licensed under some licence, as it says elsewhere.\n"
PARAGRAPH = "This paragraph is long enough to be remembered, so that it may stand only once in the whole corpus."
MODULE = f'''{LICENCE}
"""A module about number {{idx}}."""

import os


class Thing{{idx}}:
    """The thing number {{idx}}, whose words are many: {{words}}.

    {PARAGRAPH}

    Thing {{words}} ends here, after a last sentence that only the {{words}} thing has, and nothing else in the world.
    """

    def act(self, value=1):
        return [value, os.name, "{{words}}"]


def shared_helper(path):
    """This helper was copied from module to module, as it happens, so that it stands in each one of them."""
    with open(path) as file:
        return [line.strip() for line in file if line.strip() and not line.startswith("#")]
'''


def make_package(root, num_modules=40):
    """A small package tree: modules with much in common, and files that must be left out."""
    def write(path, text):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    for idx in range(num_modules):
        words = " ".join(chr(97 + idx % 26) * length for length in range(2 + idx // 26, 12))
        write(f"pkg/module_{idx}.py", MODULE.format(idx=idx, words=words))
    write("pkg/tests/test_it.py", "FIXTURE = 'never seen'\n" * 20)
    write("pkg/latin.py", "# caf\xe9 never seen\n".encode("latin-1") * 20)
    write("pkg/broken.py", "def broken(: never seen\n" * 20)
    write("pkg/table.py", "ROWS = [\n" + "    (0x1234, 5678, 9012),  # never seen\n" * 300 + "]\n")
    write("pkg/minified.py", "never_seen = " + " + ".join(f"name_{idx}" for idx in range(500)))
    write("pkg/generated.py", "# Automatically generated, do not edit\n" + "never_seen = print\n" * 30)
    write("pkg/LICENSE.txt", "never seen\n" * 100)
    write("pkg-1.0.dist-info/METADATA", "Name: pkg\nLicense: never seen\n\n# The package\n\n" + PARAGRAPH + "\n\n"
          + "\n".join(f"Line {chr(97 + idx) * 5} of the introduction says what it says." for idx in range(20)))
    paths = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    return paths


def make_hub_shard(name):
    """The bytes of a shard as the hub has them: its own row groups, and a column more."""
    sink = pa.BufferOutputStream()
    rows = [f"{name} document {idx} " + os.urandom(300).hex() for idx in range(300)]
    pq.write_table(pa.table({"text": rows, "id": list(range(300))}), sink, row_group_size=100)
    return sink.getvalue().to_pybytes()


def write_documents(folder):
    """A folder with 3,000 different documents, and one that stands there three times."""
    folder.mkdir()
    for part in range(3):
        rows = [{"text": f"Document {part}-{idx}. " + "word " * (idx % 50)} for idx in range(1000)]
        lines = [json.dumps(row) for row in [*rows, {"text": "the same thing"}]]
        (folder / f"part{part}.jsonl").write_text("\n".join(lines))
    return folder


def make_files(texts, *extra):
    return dataset.main(["--source", "files", "--path", str(texts), "--name", "mine", *extra])


def hash_shards(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.parquet"))}


def make_loader(shards: ShardList, ranks: Ranks = ALONE, **options) -> TrainLoader:
    group_options = {key: options.pop(key) for key in ("packing", "long_docs") if key in options}
    groups = TextGroups(shards, BYTE_TOKENIZER, options.pop("T", 32), **group_options)
    return order_rows(groups, ranks, {"rows_per_step": 24, "seed": 1} | options)


def order_rows(groups: Groups, ranks: Ranks, options: dict) -> TrainLoader:
    """A loader whose options are those of RowOrder and its own, by default without threads."""
    order = {key: value for key, value in options.items() if key in RowOrder.__dataclass_fields__}
    return TrainLoader(groups, RowOrder(**order), ranks, **({"num_threads": 0} | {
        key: value for key, value in options.items() if key not in order}))


WORDS = ["strawberry", "banana", "mississippi", "apple", "harbour", "quay", "yellow", "winter", "letter", "cloud",
         "engine", "garden", "pepper", "silver", "ribbon", "coffee", "rabbit", "summer", "tunnel", "window", "zebra",
         "orange", "purple", "basket", "cotton", "dinner", "flower", "guitar", "hammer", "island", "jacket", "kitten"]


def parts_of(conversation):
    content = conversation["messages"][-1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def decode_answer(conversation):
    """The reference answer as the engine's tokens would be decoded."""
    forms = {"text": "{}", "python": "<|python_start|>{}<|python_end|>",
             "python_output": "<|output_start|>{}<|output_end|>"}
    return "".join(forms[part["type"]].format(part["text"]) for part in parts_of(conversation))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compress_zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def read_texts(folder, text_column="text", account=None):
    """The documents of a folder or file in the order of its files, and the account."""
    account = account or Account()
    files = find_text_files(folder, account)
    return [text for file in files for text in read_documents(file, text_column, account)], account
