"""Downloading from the hub, against a server on this machine that speaks as much of it as is used."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storylab.data import builtin
from storylab.data.dataset import load_dataset
from storylab.data.layout import TRAIN, VALIDATION
from storylab.data.sources import HUB_DATASETS

pytestmark = pytest.mark.slow
COMMIT = HUB_DATASETS["tinystories"].revision
CUT = 11_000_000  # the client counts what it has in blocks of 10 MiB


def parquet(first: int, count: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": list(builtin.stories(0, first, count))}), buffer)
    return buffer.getvalue()


class Hub(ThreadingHTTPServer):
    """Serves the files of the data set of the original log, and V2's; V2's first answer breaks off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        names = HUB_DATASETS["tinystories"].files
        self.contents = {name: parquet(i * 400, 400) for i, name in enumerate(names[TRAIN])}
        self.contents[names[VALIDATION][0]] = parquet(5000, 50)
        text = "\n<|endoftext|>\n".join(builtin.stories(0, 0, 1000)) + "\n<|endoftext|>\n"
        (train,), (validation,) = HUB_DATASETS["tinystories-v2"].files.values()
        self.contents |= {train: text.encode() * 31, validation: b"A story."}
        assert len(self.contents[train]) > CUT
        self.to_break: str | None = train
        self.requests: list[tuple[str, str | None]] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        prefix = f"/datasets/roneneldan/TinyStories/resolve/{COMMIT}/"
        name = self.path.removeprefix(prefix)
        content = self.server.contents.get(name)
        if not self.path.startswith(prefix) or content is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        if body:
            self.server.requests.append((name, wanted))
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        breaks = name == self.server.to_break
        self.wfile.write(content[start : CUT if breaks else None])
        if breaks:
            self.server.to_break = None
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def prepare(folder: Path, endpoint: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        env.pop(name, None)
    command = [sys.executable, "-m", "storylab", "prepare", "--tokenizer", "bpe:300"]
    command += args
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)


def test_the_data_set_of_the_original_log_comes_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    result = prepare(tmp_path, endpoint)
    assert result.returncode == 0, result.stderr
    data = load_dataset(tmp_path / "data/tinystories-bpe300")
    assert data.manifest["splits"]["train"]["stories"] == 1600
    held_out = (data.manifest["splits"][name]["stories"] for name in ("validation", "test"))
    assert sum(held_out) == 50
    source = data.manifest["request"]["source"]
    assert source["repo"] == "roneneldan/TinyStories" and source["revision"] == COMMIT
    hashes = [entry["sha256"] for entry in source["files"]["train"]]
    expected = [hashlib.sha256(hub.contents[n]).hexdigest() for n in hub.contents][:4]
    assert hashes == expected
    asked = len(hub.requests)
    again = prepare(tmp_path, endpoint)
    assert again.returncode == 0 and data.fingerprint in again.stdout
    assert len(hub.requests) == asked  # all of it was in the cache


def test_a_file_that_the_hub_lacks_is_one_line(hub: Hub, tmp_path: Path) -> None:
    hub.contents.pop(HUB_DATASETS["tinystories"].files[VALIDATION][0])
    result = prepare(tmp_path, f"http://127.0.0.1:{hub.server_address[1]}")
    assert result.returncode == 2
    assert "storylab: cannot get" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "data").exists()


def test_a_broken_transfer_is_continued(hub: Hub, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    result = prepare(tmp_path, endpoint, "--source", "tinystories-v2")
    assert result.returncode == 0, result.stderr
    (train,) = HUB_DATASETS["tinystories-v2"].files[TRAIN]
    ranges = [wanted for name, wanted in hub.requests if name == train]
    assert ranges == [None, f"bytes={10 * 2**20}-"]
    data = load_dataset(tmp_path / "data/tinystories-v2-bpe300")
    entry = data.manifest["splits"]["train"]
    assert (entry["stories"], entry["duplicate_stories"]) == (31_000, 30_000)
    (file,) = data.manifest["request"]["source"]["files"]["train"]
    assert file["sha256"] == hashlib.sha256(hub.contents[train]).hexdigest()
