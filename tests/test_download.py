"""nanochat/download.py against a local server that behaves badly."""

import email.utils
import hashlib
import threading
import time

import pytest

from nanochat import download
from nanochat.download import CorruptFile, DownloadError, Job, Transfer, download_all, fetch
from tests.data_helpers import CONTENT, Server


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def no_check(path):
    return path.stat().st_size


def get(server, folder, check=no_check, token=None):
    path = folder / "file.bin"
    sha256, checked = fetch(Job(server.url, path), check, Transfer(), token)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in folder.iterdir()) == ["file.bin"]
    assert checked == path.stat().st_size
    return path.read_bytes()


def test_plain(server, tmp_path):
    assert get(server, tmp_path, token="secret") == CONTENT
    assert server.requests[0]["Authorization"] == "Bearer secret"


def test_dropped_connection_continues_where_it_was(server, tmp_path):
    server.script = ["drop", "drop"]
    assert get(server, tmp_path) == CONTENT
    starts = [int(request["Range"][6:-1]) for request in server.requests[1:]]
    assert len(starts) == 2 and 0 < starts[0] < starts[1]


def test_server_that_ignores_range(server, tmp_path):
    server.script = ["drop", "ignore-range"]
    assert get(server, tmp_path) == CONTENT


def test_changed_file_never_mixes_with_the_old(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"old" * 1000)
    (tmp_path / "file.bin.part.etag").write_text('"v0"')
    assert get(server, tmp_path) == CONTENT
    assert server.requests[0]["If-Range"] == '"v0"'


def test_part_without_strong_etag_starts_again(server, tmp_path):
    server.etag, server.script = 'W/"weak"', ["drop"]
    assert get(server, tmp_path) == CONTENT
    assert "Range" not in server.requests[1]


def test_part_that_was_complete_already(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    (tmp_path / "file.bin.part.etag").write_text('"v1"')
    assert get(server, tmp_path) == CONTENT
    assert len(server.requests) == 1


def test_part_longer_than_the_file(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.bin.part.etag").write_text('"v1"')
    assert get(server, tmp_path) == CONTENT


@pytest.mark.parametrize("status", ["429", "500", "503"])
def test_passing_errors_are_retried(server, tmp_path, status):
    server.script = [status, status]
    assert get(server, tmp_path) == CONTENT
    assert len(server.requests) == 3


def test_retry_after_is_honoured(server, tmp_path):
    server.script, server.extra_headers = ["429"], {"Retry-After": "1"}
    get(server, tmp_path)
    assert server.requests[1]["time"] - server.requests[0]["time"] >= 1


def test_retry_after_as_a_date():
    response = download.requests.Response()
    response.headers["Retry-After"] = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < download.read_retry_after(response) <= 30
    response.headers["Retry-After"] = "soon"
    assert download.read_retry_after(response) is None


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_final_errors_are_not_retried(server, tmp_path, status):
    server.script = [status]
    with pytest.raises(DownloadError, match=status):
        get(server, tmp_path)
    assert len(server.requests) == 1 and not list(tmp_path.iterdir())


def test_gives_up_with_the_reason(server, tmp_path):
    server.script = ["500"] * 50
    with pytest.raises(DownloadError, match="500"):
        get(server, tmp_path)
    assert len(server.requests) == download.MAX_FAILURES


def test_wrong_sha256_is_fetched_anew_then_refused(server, tmp_path):
    server.extra_headers = {"X-Linked-Etag": f'"{hashlib.sha256(CONTENT).hexdigest()}"'}
    server.script = ["truncate"]
    assert get(server, tmp_path) == CONTENT
    (tmp_path / "file.bin").unlink()
    server.extra_headers = {"X-Linked-Etag": "0" * 64}
    with pytest.raises(DownloadError, match="sha256"):
        get(server, tmp_path)
    assert not (tmp_path / "file.bin").exists()


def test_linked_size_finds_a_truncated_file(server, tmp_path):
    server.extra_headers, server.script = {"X-Linked-Size": str(len(CONTENT))}, ["truncate"]
    assert get(server, tmp_path) == CONTENT
    assert server.requests[1]["Range"] == f"bytes={len(CONTENT) - 100}-"


def test_check_decides(server, tmp_path):
    def check(path):
        if path.stat().st_size != len(CONTENT):
            raise CorruptFile("too short")
        return len(CONTENT)
    server.script = ["truncate"]
    assert get(server, tmp_path, check) == CONTENT
    server.script = ["truncate"] * 50
    (tmp_path / "file.bin").unlink()
    with pytest.raises(DownloadError, match="too short"):
        get(server, tmp_path, check)
    assert not (tmp_path / "file.bin").exists()


def test_nobody_listens(tmp_path):
    with pytest.raises(DownloadError, match="refused"):
        fetch(Job("http://127.0.0.1:9/file.bin", tmp_path / "file.bin"), no_check, Transfer(), None)


def test_download_all_keeps_the_good_ones(server, tmp_path, capsys):
    server.content = lambda path: path.encode() * 1000
    server.script = ["404"]
    jobs = [Job(server.url + str(idx), tmp_path / f"{idx}.bin") for idx in range(5)]
    done = []
    failed = download_all(jobs, 1, no_check, lambda job, sha256, size: done.append((job.path.name, size)))
    assert list(failed) == ["0.bin"] and "404" in failed["0.bin"]
    assert done == [(f"{idx}.bin", 10_000) for idx in range(1, 5)]
    assert "4/5 files" in capsys.readouterr().out


def test_an_error_of_ours_stops_the_other_threads(server, tmp_path):
    server.delay_seconds = 0.05
    server.content = lambda path: CONTENT * 20 if path.endswith("1") else b"x"
    jobs = [Job(server.url + str(idx), tmp_path / f"{idx}.bin") for idx in range(2)]

    def full_disk(job, sha256, size):
        raise OSError(28, "No space left on device")
    start = time.monotonic()
    with pytest.raises(OSError, match="No space"):
        download_all(jobs, 2, no_check, full_disk)
    assert time.monotonic() - start < 6  # the whole of file 1 takes 12 s
    assert not (tmp_path / "1.bin").exists()
