"""Serve a model: OpenAI's API at /v1, a chat page at /, the legacy endpoint at /chat/completions.

    python -m scripts.chat_web                                  # the last trained stage, for this machine only
    python -m scripts.chat_web -i sft -g d12 -p 8080 --workers 8                            # one engine on each GPU
    python -m scripts.chat_web --host 0.0.0.0 --api-key-file key.txt                         # for others, with a key
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'

The base_url of a client ends with /v1, and GET /v1/models tells the limits. nanochat/server_api.py lists the fields of
OpenAI's reference that are ignored (the header X-Ignored-Fields names them) or refused.
SIGTERM, Ctrl-C and a closed terminal let running answers finish, up to --drain-seconds. The log has no contents without
--log-contents.
"""

import argparse
import errno
import functools
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from nanochat.checkpoint_manager import (
    add_model_flags,
    find_checkpoint,
    find_last_stage,
    get_step_name,
    load_run_tokenizer,
)
from nanochat.command_line import Parser, add_compute_flags, let_threads_spin, run_script
from nanochat.common import MAX_PROCESSES, MAX_ROWS, UserError, print0
from nanochat.server import ServerSettings, log_line, make_app
from nanochat.server_api import MAX_TEMPERATURE, MAX_TOP_K, Limits
from nanochat.server_engines import EnginePool, EngineSettings, start_process

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")    # names of this machine in URLs


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add_compute_flags(parser)
    add("-t", "--temperature", type=float, default=0.6, help="default of requests; 0 = greedy")
    add("-k", "--top-k", type=int, default=50, help="default of requests; 0 = all tokens")
    add("-m", "--max-tokens", type=int, default=512, help="length of an answer in tokens, default of requests")
    add("--compile", action="store_true", help="faster decoding on a CPU; the start takes up to half a minute longer")
    add("-p", "--port", type=int, default=8000, help="0 = any free port")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 admits other machines, :: by IPv6 as well")
    add("-n", "--workers", type=int, default=1, help="engine processes, distributed over the GPUs in turn")
    add("--max-answer-tokens", type=int, default=Limits.max_answer_tokens,
        help="longest answer in tokens; a request's max_tokens is cut to it, and to what the context leaves")
    add("--max-messages", type=int, default=Limits.max_messages, help="messages of a conversation, at most")
    add("--max-message-chars", type=int, default=Limits.max_message_chars,
        help="characters of a message, at most; the assistant's messages only count in the conversation")
    add("--max-conversation-chars", type=int, default=Limits.max_conversation_chars,
        help="characters of a conversation or of a prompt, at most")
    add("--max-choices", type=int, default=Limits.max_choices, help="answers to a prompt, at most: n of a request")
    add("--max-rows", type=int, default=32, help="rows of an engine's batch")
    add("--queue", type=int, default=64, help="answers that may wait for a row; further ones get 429")
    add("--request-timeout", type=float, default=300, help="seconds per answer, at most")
    add("--drain-seconds", type=int, default=30, help="seconds for running answers when the server is stopped")
    add("--api-key", help="clients must send Authorization: Bearer <key>")
    add("--api-key-file", help="the same from a file, which the list of processes doesn't show")
    add("--cors-origin", action="append", default=[], help="web site whose pages may use the API; may be repeated")
    add("--log-contents", action="store_true", help="log questions and answers, too")
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    if not (0 <= args.temperature <= MAX_TEMPERATURE and 0 <= args.top_k <= MAX_TOP_K
            and 1 <= args.max_tokens <= args.max_answer_tokens):
        raise UserError(f"--temperature must be from 0 to {MAX_TEMPERATURE}, --top-k from 0 to {MAX_TOP_K}, "
                        f"--max-tokens from 1 to --max-answer-tokens, which is {args.max_answer_tokens}")
    if min(args.max_messages, args.max_message_chars, args.max_conversation_chars, args.max_choices) < 1:
        raise UserError("--max-messages, --max-message-chars, --max-conversation-chars and --max-choices must be 1 or "
                        "more")
    if not 1 <= args.workers <= MAX_PROCESSES or not 1 <= args.max_rows <= MAX_ROWS or args.queue < 0:
        raise UserError(f"--workers must be from 1 to {MAX_PROCESSES}, --max-rows from 1 to {MAX_ROWS}, --queue 0 or "
                        "more")
    if not 0 < args.request_timeout < float("inf") or args.drain_seconds < 0:
        raise UserError("--request-timeout must be above 0, --drain-seconds 0 or more")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} must be from 0 to 65535")
    if args.api_key is not None and args.api_key_file is not None:
        raise UserError("--api-key and --api-key-file say the same thing; give one of them")


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    api_key = read_api_key(args)
    stage = args.source or find_last_stage(args.model_tag)
    found = find_checkpoint(stage, args.model_tag, args.step)
    tag, step, tokenizer = found.run_dir.name, found.step, load_run_tokenizer(found.meta)
    with open_socket(args.host, args.port) as listener:  # before the model is loaded, which takes longer to fail
        engine = EngineSettings(stage, tag, step, args.dtype, args.device_type, args.max_rows, args.workers,
                                args.compile)
        let_threads_spin()  # inherited by the engines, which only decode
        pool = EnginePool(functools.partial(start_process, settings=engine), args.workers, args.max_rows, args.queue,
                          log_line)
        host, port = listener.getsockname()[:2]
        is_local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
        url_host = args.host.strip("[]")
        url_host = f"[{url_host}]" if ":" in url_host else url_host  # IPv6 in brackets
        limits = Limits(args.max_messages, args.max_message_chars, args.max_conversation_chars,
                        args.max_answer_tokens, args.max_choices)
        settings = ServerSettings(
            f"{stage}/{tag}", stage, found.meta["model_config"]["sequence_len"], args.temperature, args.top_k,
            args.max_tokens, args.request_timeout, limits,
            created=int((found.run_dir / get_step_name(step)).stat().st_mtime), api_key=api_key,
            cors_origins=tuple(args.cors_origin), log_contents=args.log_contents,
            hosts=(*LOCAL_HOSTS, url_host.lower()) if is_local and api_key is None else ())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # ends the engines, too, even while they load
        hang_up = getattr(signal, "SIGHUP", None)              # not on Windows
        if hang_up and signal.getsignal(hang_up) != signal.SIG_IGN:  # which nohup sets
            signal.signal(hang_up, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            pool.start()
            if stage == "base":
                print0("warning: a base model only completes text, it wasn't taught to answer; see -i")
            if not is_local and api_key is None:
                print0(f"warning: anyone who reaches {args.host} can use this server; --api-key-file sets a key")
            print0(f"serving {settings.model_name}, step {step}, at http://{url_host}:{port}")
            serve(make_app(settings, pool, tokenizer), listener, args.drain_seconds)
        finally:
            pool.close()
    return {"source": stage, "tag": tag, "step": step}


def read_api_key(args: argparse.Namespace) -> str | None:
    """The key of --api-key or --api-key-file; None where neither is given."""
    key, source = args.api_key, "--api-key"
    if args.api_key_file is not None:
        source = f"--api-key-file {args.api_key_file}"
        try:
            key = Path(args.api_key_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UserError(f"{source} can't be read ({reason}); name a text file that holds the key") from None
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{source}: a key must be one word of printable ASCII characters")
    return key


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at a name or an address, an IPv6 address in brackets or not; UserError where it can't."""
    host = host.strip("[]")
    try:
        if not host:
            raise OSError("it is empty")
        addresses = {info[0]: info[4] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        if socket.AF_INET in addresses:  # of a name with both, since not every client tries ::1 for localhost
            return socket.create_server(addresses[socket.AF_INET])
        # :: stands for all addresses, those of IPv4, too
        return socket.create_server(addresses[socket.AF_INET6], family=socket.AF_INET6,
                                    dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6())
    except (OSError, UnicodeError) as error:  # UnicodeError: of a name that can't be encoded
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use; stop what uses it, or choose another with -p") from None
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise UserError(f"can't listen at --host {host} -p {port} ({reason}); 127.0.0.1 is this machine only, 0.0.0.0 "
                        "all of its addresses, :: those of IPv6 as well") from None


def serve(app, listener: socket.socket, drain_sec: int) -> None:
    """Serve until a signal, then let running answers finish."""
    config = uvicorn.Config(app, log_config=None, access_log=False, server_header=False,
                            timeout_graceful_shutdown=drain_sec)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run_script(main)
