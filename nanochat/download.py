"""Download files over HTTPS so that every file under its final name is complete.

A file grows as NAME.part, with the server's ETag beside it, and continues after a dropped connection or a kill (Range,
If-Range). It gets its final name after its size, its sha256 (where the server states one) and the caller's check agree.
"""

import email.utils
import os
import random
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from nanochat.common import hash_file, print0

CHUNK_BYTES     = 2**16      # the most that a dropped connection loses
TIMEOUT_SECONDS = (10, 60)   # to connect, and between two chunks
MAX_FAILURES    = 5          # in a row; a new chunk of the file starts the count again
NO_ADDRESS = (requests.exceptions.MissingSchema, requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL)
BACKOFF_SECONDS = 1.0        # doubles with each failure in a row, with jitter so that workers don't return together
MAX_WAIT_SECONDS = 600.0     # the longest Retry-After that is honoured
REPORT_SECONDS  = 5.0
# Retried. Any other status from 400 up is final.
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(Exception):
    """A download failed for good; the message is a phrase with the reason."""


class CorruptFile(Exception):
    """A file's content is wrong, by the caller's check; the message is a phrase with the reason."""


class TryAgain(Exception):
    """A failure worth a retry, after the `wait_seconds` that the server asked for, if any."""

    def __init__(self, reason: str, wait_seconds: float = 0):
        super().__init__(reason)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class Job:
    """One file to fetch: from a URL, or from a local copy."""
    source: str | Path
    path:   Path


@dataclass
class Transfer:
    """What the threads of one download share."""
    new_bytes: Counter[Path] = field(default_factory=Counter)   # of each file; one thread alone writes each count
    stop:      threading.Event = field(default_factory=threading.Event)


def download_all(jobs: list[Job], num_workers: int, check: Callable[[Path], Any],
                 on_done: Callable[[Job, str, Any], None], token: str | None = None) -> dict[str, str]:
    """Fetch all files with `num_workers` threads; returns the failures as {file name: reason}.

    check:   inspects a complete file before it gets its final name; raises CorruptFile
    on_done: called in this thread for each finished file, with its sha256 and the result of `check`
    """
    transfer, failed, num_done, start = Transfer(), {}, 0, time.perf_counter()
    last_report = start
    with ThreadPoolExecutor(num_workers) as pool:
        running = {pool.submit(fetch, job, check, transfer, token): job for job in jobs}
        try:
            while running:
                done, _ = wait(running, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    try:
                        on_done(job, *future.result())
                        num_done += 1
                    except DownloadError as error:
                        failed[job.path.name] = str(error)
                        print0(f"{job.path.name}: failed, {error}")
                if not running or time.perf_counter() - last_report >= REPORT_SECONDS:
                    last_report = time.perf_counter()
                    seconds, num_mb = last_report - start, sum(list(transfer.new_bytes.values())) / 1e6
                    left = len(jobs) - num_done     # assumed to be as long as the finished ones
                    eta = f", ETA {seconds / num_done * left:,.0f} s" if num_done and left else ""
                    print0(f"{num_done}/{len(jobs)} files, {num_mb:,.0f} MB, {num_mb / seconds:.1f} MB/s{eta}")
        finally:  # Ctrl-C or a full disk: the threads end at their next chunk, the .part files stay
            transfer.stop.set()
            pool.shutdown(cancel_futures=True)
    return failed


def fetch(job: Job, check: Callable[[Path], Any], transfer: Transfer, token: str | None) -> tuple[str, Any]:
    """Fetch one file; returns its sha256 and the result of `check`. Raises DownloadError."""
    if isinstance(job.source, Path):
        return copy_local(job, check, transfer)
    part, failures = job.path.with_name(job.path.name + ".part"), 0
    while True:
        had_bytes = count_bytes(part)
        try:
            sha256 = fetch_rest(job.source, part, transfer, token)
            try:
                return complete(part, job.path, check, sha256)
            except CorruptFile as error:
                part.unlink()
                raise TryAgain(f"what came is corrupt ({error})") from None
        except TryAgain as problem:
            failures = 1 if count_bytes(part) - had_bytes >= CHUNK_BYTES else failures + 1
            if failures >= MAX_FAILURES:
                raise DownloadError(f"{problem} ({failures} times in a row, {job.source})") from None
            backoff_seconds = BACKOFF_SECONDS * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
            wait_seconds = min(MAX_WAIT_SECONDS, max(backoff_seconds, problem.wait_seconds))
            print0(f"{job.path.name}: {problem}; trying again in {wait_seconds:.1f} s")
            if transfer.stop.wait(wait_seconds):
                raise DownloadError("stopped") from None


def copy_local(job: Job, check: Callable[[Path], Any], transfer: Transfer) -> tuple[str, Any]:
    """Offline: copy the file from a mirror folder, with the same checks."""
    if not job.source.is_file():
        raise DownloadError(f"{job.source} isn't there")
    part = job.path.with_name(job.path.name + ".copy")
    try:
        shutil.copyfile(job.source, part)
        transfer.new_bytes[part] = count_bytes(part)
        return complete(part, job.path, check, None)
    except CorruptFile as error:
        raise DownloadError(f"{job.source} is corrupt ({error})") from None
    finally:
        part.unlink(missing_ok=True)


def complete(part: Path, path: Path, check: Callable[[Path], Any], expected_sha256: str | None) -> tuple[str, Any]:
    """Check a whole file and give it its final name; its sha256 and the result of `check`. Raises CorruptFile."""
    sha256 = hash_file(part)
    if expected_sha256 not in (None, sha256):
        raise CorruptFile(f"its sha256 is {sha256[:12]}..., not {expected_sha256[:12]}...")
    checked = check(part)
    put_in_place(part, path)
    etag_path(part).unlink(missing_ok=True)
    return sha256, checked


def put_in_place(part: Path, path: Path) -> None:
    """Sync a complete file to the disk, then rename it: after a power cut it is whole or absent."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def fetch_rest(url: str, part: Path, transfer: Transfer, token: str | None) -> str | None:
    """Append the missing bytes to `part`; returns the server's sha256, if it states one. Raises TryAgain."""
    etag = etag_path(part).read_text(encoding="utf-8") if etag_path(part).exists() else ""
    have_bytes = count_bytes(part) if etag else 0
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
    if have_bytes:
        # With If-Range a server whose file has changed sends the whole new file, so that two versions never mix
        headers |= {"Range": f"bytes={have_bytes}-", "If-Range": etag}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            size_bytes, sha256 = read_facts(response)
            if response.status_code == 416 and size_bytes == have_bytes:
                return sha256  # complete: killed between the last byte and the rename
            require_success(response, part, have_bytes)
            with open(part, "ab" if response.status_code == 206 else "wb") as file:
                if response.status_code == 200:  # for a later If-Range; without a strong ETag the file starts again
                    etag = response.headers.get("ETag", "")
                    etag_path(part).write_text(etag if etag.startswith('"') else "", encoding="utf-8")
                for chunk in response.iter_content(CHUNK_BYTES):
                    if transfer.stop.is_set():
                        raise DownloadError("stopped")
                    file.write(chunk)
                    transfer.new_bytes[part] += len(chunk)
    except NO_ADDRESS as error:
        raise DownloadError(str(error)) from None  # a retry can't mend a malformed address
    except requests.RequestException as error:
        raise TryAgain(describe_error(error)) from None
    if size_bytes not in (None, arrived_bytes := count_bytes(part)):
        if arrived_bytes > size_bytes:
            part.unlink()
        raise TryAgain(f"{arrived_bytes:,} bytes came where {size_bytes:,} were announced")
    return sha256


def read_facts(response: requests.Response) -> tuple[int | None, str | None]:
    """The whole file's size and sha256 by the headers, None where they lack it. The hub states both on the redirect to
    its storage: X-Linked-Etag is the file's sha256 in its large-file store."""
    size_bytes = sha256 = None
    for headers in [answer.headers for answer in [response, *response.history]]:
        if re.fullmatch(r"\d+", headers.get("X-Linked-Size", "")):
            size_bytes = int(headers["X-Linked-Size"])
        if re.fullmatch(r'"?[0-9a-f]{64}"?', headers.get("X-Linked-Etag", "")):
            sha256 = headers["X-Linked-Etag"].strip('"')
    stated = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    if not stated and response.status_code == 200:
        stated = re.fullmatch(r"(\d+)", response.headers.get("Content-Length", ""))
    return int(stated[1]) if size_bytes is None and stated else size_bytes, sha256


def require_success(response: requests.Response, part: Path, have_bytes: int) -> None:
    """Check that the body is the file or the requested range of it; else raise DownloadError (final) or TryAgain."""
    status = response.status_code
    starts_right = response.headers.get("Content-Range", "").startswith(f"bytes {have_bytes}-")
    if status == 200 or status == 206 and starts_right:
        return
    if status in (206, 416):
        part.unlink(missing_ok=True)
        raise TryAgain("the server can't continue the file from here, starting again")
    if status in PASSING_STATUS:
        raise TryAgain(f"the server answered {status} {response.reason}", read_retry_after(response) or 0)
    advice = "; set HF_TOKEN to a token that may read it" if status in (401, 403) else ""
    raise DownloadError(f"the server answered {status} {response.reason} for {response.url}{advice}")


def read_retry_after(response: requests.Response) -> float | None:
    """Seconds to wait by the server's Retry-After, which holds seconds or a date."""
    value = response.headers.get("Retry-After", "")
    if re.fullmatch(r"\d+", value):
        return float(value)
    try:
        return max(0.0, email.utils.mktime_tz(email.utils.parsedate_tz(value)) - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def describe_error(error: requests.RequestException) -> str:
    """The last, most specific phrase of a nested network error."""
    cause: BaseException = error
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__} ({str(cause) or type(cause).__name__})"


def etag_path(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def count_bytes(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
