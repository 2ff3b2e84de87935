"""Publishing an export, against a server on this machine that speaks as much of the hub as is used."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from storylab.cli import main
from storylab.export.folder import RECORD, export_run
from storylab.record.run import Run

TOKEN = "hf_" + "secretsecret" * 2
LARGE = "model.safetensors"


class Hub(ThreadingHTTPServer):
    """Keeps one model: its visibility, and the files that commits and uploads bring."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: bool | None = None
        self.stored: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.token = TOKEN

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def do_PUT(self) -> None:
        data = self.content()
        self.server.stored[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_GET(self) -> None:
        assert self.path.startswith("/api/models/me/first")
        if self.server.private is None or not self.allowed():
            self.answer({"error": "Repository not found"}, 404)
            return
        self.answer({"id": "me/first", "modelId": "me/first", "private": self.server.private})

    def do_POST(self) -> None:
        data = self.content()
        if not self.allowed():
            self.answer({"error": f"no such token: {self.headers.get('Authorization')}"}, 401)
        elif self.path == "/api/repos/create":
            known, asked = self.server.private, json.loads(data)
            assert asked["name"] == "first" and asked["organization"] == "me"
            if known is None:
                self.server.private = asked.get("private", False) or (
                    asked.get("visibility") == "private"
                )
            self.answer({"url": f"{self.server.url}/me/first"}, 200 if known is None else 409)
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(data)["files"]]
            mode = {name: "lfs" if name == LARGE else "regular" for name in names}
            self.answer(
                {
                    "files": [
                        {"path": n, "uploadMode": mode[n], "shouldIgnore": False} for n in names
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            (entry,) = json.loads(data)["objects"]
            upload = {"href": f"{self.server.url}/upload"}
            self.answer(
                {"transfer": "basic", "objects": [{**entry, "actions": {"upload": upload}}]}
            )
        elif self.path.endswith("/commit/main"):
            self.commit([json.loads(line) for line in data.splitlines()])
        else:
            self.answer({"error": self.path}, 404)

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.stored[value["oid"]]
        url = f"{self.server.url}/me/first/commit/{'0' * 40}"
        self.answer({"commitUrl": url, "commitOid": "0" * 40})


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "first"
    with pytest.MonkeyPatch.context() as patch:  # the program itself is not needed here
        patch.setattr("storylab.export.folder.installed", lambda module: False)
        export_run(run.folder, "hf", None, "last", folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, with a file in it that is not part of it."""
    copy = tmp_path / "first"
    copy.mkdir()
    for path in exported.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "notes.txt").write_text("private")
    return copy


def publish(hub: Hub, folder: Path, *flags: str, token: str = TOKEN) -> Any:
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder.parent / "hf"), "HF_TOKEN": token}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "storylab", "publish", str(folder), "--repo", "me/first"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, env=env)
    assert token not in result.stdout + result.stderr
    return result


@pytest.mark.slow
def test_the_files_of_the_export_and_no_others_arrive(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n\nMy own card.\n")
    result = publish(hub, folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{hub.url}/me/first (private)\n"
    assert hub.private is True
    names = {*json.loads((folder / RECORD).read_text())["files"], RECORD}
    assert hub.files == {name: (folder / name).read_bytes() for name in names}
    assert hub.stored and "notes.txt" not in hub.files
    # No token in anything that was sent as a file.
    assert not any(TOKEN.encode() in data for data in hub.files.values())


@pytest.mark.slow
def test_a_public_model_needs_the_flag(hub: Hub, folder: Path) -> None:
    hub.private = False
    result = publish(hub, folder)
    assert result.returncode == 2 and hub.files == {}
    assert "me/first exists and is public: give --public" in result.stderr
    assert publish(hub, folder, "--public").stdout.endswith("(public)\n")
    assert LARGE in hub.files


@pytest.mark.slow
def test_a_refused_token_is_one_line_without_it(hub: Hub, folder: Path) -> None:
    result = publish(hub, folder, token="hf_" + "otherother" * 3)
    assert result.returncode == 2 and hub.files == {}
    (line,) = result.stderr.splitlines()
    assert "hf auth login" in line and "cannot publish me/first" in line


def test_a_dry_run_lists_files_and_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(folder), "--repo", "me/first", "--dry_run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    listed = {name: int(size.replace(",", "")) for size, name in map(parts, lines)}
    names = {*json.loads((folder / RECORD).read_text())["files"], RECORD}
    assert listed == {name: (folder / name).stat().st_size for name in names}
    assert int(parts(total)[0].replace(",", "")) == sum(listed.values())
    assert "me/first, private" in total


def parts(line: str) -> tuple[str, str]:
    found = re.fullmatch(r" *([\d,]+) bytes +(.*)", line)
    assert found
    return found[1], found[2]


@pytest.mark.parametrize("name", ["config.json", LARGE, "tokenizer.json"])
def test_altered_files_are_not_published(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    assert main(["publish", str(folder), "--repo", "me/first", "--dry_run"]) == 2
    assert f"{name} has been altered" in capsys.readouterr().err


@pytest.mark.posix
def test_a_link_is_not_followed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card may be edited, so its hash protects nothing."""
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert main(["publish", str(folder), "--repo", "me/first", "--dry_run"]) == 2
    assert "README.md is missing or a link" in capsys.readouterr().err


@pytest.mark.parametrize("repo", ["first", "me/first/again", "../first", "me/", "me/fir st"])
def test_a_repository_has_an_owner_and_a_name(
    repo: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(folder), "--repo", repo, "--dry_run"]) == 2
    assert "is not of the form owner/name" in capsys.readouterr().err


def test_a_run_is_no_export(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(run.folder), "--repo", "me/first", "--dry_run"]) == 2
    assert "is not an export" in capsys.readouterr().err
