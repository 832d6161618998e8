"""Make conversations that teach a model its own identity or a skill, as .jsonl for tasks.customjson.

python -m dev.gen_synthetic_data --out me.jsonl --name Ada --author "Eve Moss"            offline, from templates
python -m dev.gen_synthetic_data --out me.jsonl --templates mine.json --set city=Oslo     offline, from your own
python -m dev.gen_synthetic_data --out me.jsonl --about me.md --endpoint http://localhost:8000/v1 --model NAME

mine.json is [{"questions": ["Where is {{name}} from?", ...], "answers": ["From {{city}}.", ...]}, ...]. An endpoint is
any server with OpenAI's chat completions; it invents conversations about the text of --about. Finished ones are kept
in me.jsonl.part, and the same command continues there.
"""

import argparse
import json
import re
import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import requests

from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, hash_file, print0, write_atomic
from nanochat.conversations import parse_conversation
from nanochat.download import PASSING_STATUS, describe_error, read_retry_after
from tasks.common import make_rng
from tasks.embedded import DEFAULT_FIELDS, Template, choose_questions, make_conversation

TIMEOUT_SECONDS = (10, 300)     # to connect, and for an answer
BACKOFF_SECONDS = 1.0           # doubles with each failure in a row
MAX_WAIT_SECONDS = 60.0         # between two attempts, even where the server asks for more
MAX_ATTEMPTS    = 6             # per conversation; malformed answers count, too
MAX_FAILURES    = 3             # failed conversations in a row: then the endpoint is down
MAX_REPEATS     = 100           # repeated conversations in a row: then the templates are used up

# Requests vary: a model that gets the same request again writes the same conversation
PERSONAS = ("a curious child", "a busy engineer", "a sceptical journalist", "a friendly neighbour", "a student",
            "someone who writes in short fragments", "someone who makes typing mistakes", "a patient teacher",
            "someone new to computers", "an expert who tests the assistant", "a person in a hurry", "a chatty visitor")
OPENINGS = ("a plain greeting", "a direct question", "a request for help", "a wrong claim about the assistant",
            "a comparison with another assistant", "a joke", "a very broad question", "a question about a detail")
PROMPT = """Write one conversation between a user and an assistant, to train the assistant on what follows.

<about>
{about}
</about>

The user is {persona} and begins with {opening}. Each of them speaks {num_turns} times, the user first. The answers are
short, true to the text above, and don't invent facts. Reply with JSON only:
{{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}, ...]}}"""


class BadAnswer(Exception):
    """A failed attempt that may be repeated, after `wait_seconds` if the server asked for them."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


# ---------------------------------------------------------------------------------------------------------------------
# Offline


def read_templates(path: Path, fields: dict[str, str]) -> list[Template]:
    """The templates of a file; UserError where its form isn't as above, or a field has no value."""
    try:
        templates = [(entry["questions"], entry["answers"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
        texts = [text for template in templates for side in template for text in side]
        if not templates or not all(isinstance(side, list) and side for template in templates for side in template) \
                or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("questions and answers must be lists of texts, none of them empty")
    except OSError as error:
        raise UserError(f"--templates {path} can't be read ({error.strerror}); give a .json file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'--templates {path} is not [{{"questions": [...], "answers": [...]}}, ...] ({error}); '
                        "correct it") from None
    if unknown := sorted({key for text in texts for key in re.findall(r"\{\{(\w+)\}\}", text)} - fields.keys()):
        raise UserError(f"{path} has {{{{{unknown[0]}}}}}, which has no value; add --set {unknown[0]}=VALUE")
    return templates


def fill_templates(templates: list[Template], fields: dict[str, str], num: int, seed: int) -> list[dict]:
    """`num` different conversations."""
    found, index, last_new = {}, 0, 0
    while len(found) < num:
        messages = make_conversation(templates, fields, make_rng(seed, index))["messages"]
        last_new = index if found.setdefault(json.dumps(messages), messages) is messages else last_new
        if index - last_new > MAX_REPEATS:
            raise UserError(f"the templates give about {len(found)} different conversations; ask for fewer than "
                            f"--num {num}, or write more templates")
        index += 1
    return [{"messages": messages} for messages in found.values()]


# ---------------------------------------------------------------------------------------------------------------------
# From an endpoint


@dataclass(frozen=True)
class Endpoint:
    """A server, one of its models, and the event that asks the threads to stop."""
    url:     str
    model:   str
    headers: dict[str, str]
    stop:    threading.Event = field(default_factory=threading.Event)


def request_conversation(endpoint: Endpoint, prompt: str) -> dict:
    """One request; BadAnswer where another may succeed, UserError where none will."""
    url = endpoint.url
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}], "temperature": 1.0}
    try:
        response = requests.post(url, json=body, headers=endpoint.headers, timeout=TIMEOUT_SECONDS)
    except (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL):
        raise UserError(f"--endpoint {url} is no address; give one such as http://localhost:8000/v1") from None
    except requests.RequestException as error:
        raise BadAnswer(describe_error(error)) from None
    if response.status_code in PASSING_STATUS:
        raise BadAnswer(f"the server answered {response.status_code}", read_retry_after(response))
    if not response.ok:
        advice = "check --api-key-file" if response.status_code in (401, 403) else "check --endpoint and --model"
        raise UserError(f"{url} answered {response.status_code} {response.reason}: {response.text[:200]!r}; {advice}")
    try:
        return read_conversation(response.json()["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadAnswer(f"the answer is no conversation ({error})") from None


def read_conversation(text: str) -> dict:
    """The conversation in a model's answer, which may be fenced or between sentences."""
    messages = parse_conversation(json.loads(text[text.index("{"):text.rindex("}") + 1]))
    if messages[-1]["role"] != "assistant" or any("weight" in message for message in messages):
        raise ValueError("it doesn't end with an answer, or one has no text")
    return {"messages": messages}


def ask(endpoint: Endpoint, about: str, seed: int, index: int) -> dict | None:
    """Conversation number `index`; None when MAX_ATTEMPTS have failed. CancelledError when asked to stop."""
    for attempt in range(MAX_ATTEMPTS):
        if endpoint.stop.is_set():
            raise CancelledError
        rng = make_rng(seed, index, attempt)
        prompt = PROMPT.format(about=about, persona=rng.choice(PERSONAS), opening=rng.choice(OPENINGS),
                               num_turns=rng.randint(1, 3))
        try:
            return request_conversation(endpoint, prompt)
        except BadAnswer as problem:
            print0(f"conversation {index}, attempt {attempt + 1} of {MAX_ATTEMPTS}: {problem}")
            wait_seconds = min(MAX_WAIT_SECONDS, max(BACKOFF_SECONDS * 2 ** attempt, problem.wait_seconds or 0))
            if attempt + 1 < MAX_ATTEMPTS:
                endpoint.stop.wait(wait_seconds)
        except UserError:
            endpoint.stop.set()     # the other requests would fail in the same way
            raise
    return None


def read_part(part: Path, settings: dict) -> dict[int, dict]:
    """The conversations of an earlier run with the same settings, by index; a half-written last line is dropped."""
    lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{part} is damaged ({error}); delete it") from None
    if rows and rows[0] != settings:
        raise UserError(f"{part} was begun with other settings ({json.dumps(rows[0])}); delete it, or repeat them")
    content = b"".join(line + b"\n" for line in lines) or json.dumps(settings).encode() + b"\n"
    write_atomic(part, content)
    return {row["index"]: row["conversation"] for row in rows[1:]}


def generate(args: argparse.Namespace, about: str) -> list[dict]:
    """Request the missing conversations, several at a time; each answer is written as soon as it arrives."""
    part = args.out.with_name(args.out.name + ".part")
    done = read_part(part, {"model": args.model, "seed": args.seed, "about": hash_file(args.about)})
    key = read_text("--api-key-file", args.api_key_file).strip() if args.api_key_file else None
    endpoint = Endpoint(args.endpoint.rstrip("/") + "/chat/completions", args.model,
                        {"Authorization": f"Bearer {key}"} if key else {})
    todo, failures = [index for index in range(args.num) if index not in done], 0
    with ThreadPoolExecutor(args.num_workers) as pool, open(part, "ab", buffering=0) as file:
        futures = {pool.submit(ask, endpoint, about, args.seed, index): index for index in todo}
        try:
            for future in as_completed(futures):
                try:
                    conversation = future.result()
                except CancelledError:
                    continue    # the future that raised the UserError is still to come
                failures = 0 if conversation else failures + 1
                if failures == MAX_FAILURES:
                    break
                if conversation:
                    done[futures[future]] = conversation
                    row = {"index": futures[future], "conversation": conversation}
                    file.write(json.dumps(row).encode() + b"\n")
                    print0(f"{len(done)}/{args.num} conversations")
        finally:
            endpoint.stop.set()
            pool.shutdown(cancel_futures=True)
    if missing := args.num - len([index for index in done if index < args.num]):
        raise UserError(f"{missing} of {args.num} conversations are missing, for the reasons above; the others are "
                        f"kept in {part}, run the same command again")
    return [done[index] for index in range(args.num)]


# ---------------------------------------------------------------------------------------------------------------------


def read_text(flag: str, path: Path) -> str:
    """The content of a text file named by a flag."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} can't be read ({error}); give a text file") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl file to write; must not exist")
    parser.add_argument("--num", type=int, default=500, help="conversations")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other conversations")
    parser.add_argument("--name", help=f"{{{{name}}}} in templates (default: {DEFAULT_FIELDS['name']})")
    parser.add_argument("--author", help=f"{{{{author}}}} in templates (default: {DEFAULT_FIELDS['author']})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="{{KEY}} in templates")
    parser.add_argument("--templates", type=Path, help="a .json file of yours (default: the built-in identity)")
    parser.add_argument("--endpoint", help="address that ends before /chat/completions; without it, templates")
    parser.add_argument("--model", help="name of the endpoint's model")
    parser.add_argument("--api-key-file", type=Path, help="file that holds the endpoint's key (default: none)")
    parser.add_argument("--about", type=Path, help="text file on the identity or skill that the endpoint writes about")
    parser.add_argument("--num-workers", type=int, default=4, help="requests at a time")
    args = parser.parse_args(argv)
    if bad := next((pair for pair in args.set if not re.match(r"\w+=", pair)), None):
        raise UserError(f"--set {bad} is not KEY=VALUE; write for example --set city=Oslo")
    for flag, most in (("num", 10**7), ("num_workers", 1000)):
        if not 1 <= getattr(args, flag) <= most:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be from 1 to {most:,}")
    if args.endpoint and not (args.model and args.about):
        raise UserError("--endpoint needs --model NAME and --about FILE")
    if args.endpoint and (args.name or args.author or args.set or args.templates):
        raise UserError("--name, --author, --set and --templates are for templates; with --endpoint, say it in --about")
    if not args.endpoint and (args.model or args.about or args.api_key_file):
        raise UserError("--model, --about and --api-key-file are for an endpoint; add --endpoint URL")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.out.exists():
        raise UserError(f"--out {args.out} is there already; delete it or choose another name")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} can't be made ({error.strerror}); choose another folder") from None
    if args.endpoint:
        conversations = generate(args, read_text("--about", args.about))
    else:
        named = {key: value for key, value in (("name", args.name), ("author", args.author)) if value}
        fields = DEFAULT_FIELDS | named | dict(pair.split("=", 1) for pair in args.set)
        if blank := next((key for key, value in fields.items() if not value.strip()), None):
            raise UserError(f"{{{{{blank}}}}} would be filled with nothing; give it a value")
        templates = read_templates(args.templates, fields) if args.templates else choose_questions("train")
        conversations = fill_templates(templates, fields, args.num, args.seed)
    lines = [json.dumps({"messages": parse_conversation(row)}, ensure_ascii=False) + "\n" for row in conversations]
    write_atomic(args.out, "".join(lines))
    args.out.with_name(args.out.name + ".part").unlink(missing_ok=True)
    print0(f"{len(conversations)} conversations written to {args.out}")
    return {"out": str(args.out), "num_conversations": len(conversations)}


if __name__ == "__main__":
    run_script(main)
