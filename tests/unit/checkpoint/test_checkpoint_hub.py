"""Hub ids: the cache without a network, and a hub on this machine. No part of huggingface_hub is replaced."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from dcp_boxes import save as save_dcp
from safetensors.torch import save, save_file

SHA = "0123456789abcdef0123456789abcdef01234567"
CODE = """
import sys, json
from weightlift.checkpoint import open_checkpoint
from weightlift.errors import CheckpointError
options = json.loads(sys.argv[2])
try:
    c = open_checkpoint(sys.argv[1], **options)
    print(json.dumps([[k, c.read(k).tolist()] for k in c] + [c.source, sorted(f.path.name for f in c.files)]))
except CheckpointError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""

LEFT = """
import gc, sys
from weightlift.checkpoint import open_checkpoint
from weightlift.errors import CheckpointNotFound
def traced(error):
    trace = error.__traceback__
    while trace is not None and not trace.tb_frame.f_globals["__name__"].startswith("weightlift"):
        trace = trace.tb_next
    return trace is not None
gc.disable()
for repo in ("org/tiny", "org/none"):
    try:
        open_checkpoint(repo)
    except CheckpointNotFound:
        pass
    print([type(it).__name__ for it in gc.get_objects() if isinstance(it, BaseException) and traced(it)])
"""


def run(cache: Path, repo: str, environment: dict[str, str] | None = None, **options: object) -> list[object]:
    answer: list[object] = json.loads(output(CODE, cache, environment or {}, repo, json.dumps(options))[-1])
    return answer


def output(code: str, cache: Path, environment: dict[str, str], *arguments: str) -> list[str]:
    """The lines that a program prints which sees this cache alone."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {
        "HF_HUB_CACHE": str(cache),
        "HF_HOME": str(cache / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cache,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cached(cache: Path, files: dict[str, bytes], repo: str = "models--org--tiny") -> Path:
    """A cache as huggingface_hub lays it out: refs, blobs, and snapshots of links."""
    root = cache / repo
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(SHA)
    (root / "blobs").mkdir()
    snapshot = root / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def sharded() -> dict[str, bytes]:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = json.dumps({"weight_map": {"a": one, "b": two}}).encode()
    return {
        one: save({"a": torch.ones(2)}),
        two: save({"b": torch.zeros(1)}),
        "model.safetensors.index.json": index,
        "pytorch_model.bin": b"not needed",
        "config.json": b"{}",
    }


ANSWER = [
    ["a", [1.0, 1.0]],
    ["b", [0.0]],
    "org/tiny",
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
]


@pytest.mark.parametrize("options", [{"local_files_only": True}, {"local_files_only": True, "revision": SHA}, {}])
def test_cache_without_network(tmp_path: Path, options: dict[str, object]) -> None:
    cached(tmp_path, sharded())
    environment = {} if options else {"HF_HUB_OFFLINE": "1"}
    assert run(tmp_path, "org/tiny", environment, **options) == ANSWER


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_no_error_is_left_when_the_hub_cannot_be_reached(tmp_path: Path, environment: dict[str, str]) -> None:
    """One that is kept in a cycle keeps the frames that it came through, and what they hold, until a collection."""
    cached(tmp_path, sharded())
    assert output(LEFT, tmp_path, environment) == ["[]", "[]"], "from the cache, and from nowhere"


def test_not_cached(tmp_path: Path) -> None:
    kind, text = run(tmp_path, "org/none", local_files_only=True)
    assert kind == "CheckpointNotFound" and "no checkpoint 'org/none' here" in str(text) and "no network" in str(text)
    kind, text = run(tmp_path, "org/none", {"HF_HUB_OFFLINE": "1"})
    assert kind == "CheckpointNotFound" and "'org/none'" in str(text)


def test_cache_lacks_a_shard_file(tmp_path: Path) -> None:
    files = sharded()
    del files["model-00002-of-00002.safetensors"]
    cached(tmp_path, files)
    kind, text = run(tmp_path, "org/tiny", local_files_only=True)
    assert kind == "CheckpointError" and "a missing file, 'model-00002-of-00002.safetensors'" in str(text)


def test_link_out_of_the_cache(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, sharded())
    save_file({"b": torch.zeros(1)}, tmp_path / "outside.safetensors")
    link = snapshot / "model-00002-of-00002.safetensors"
    link.unlink()
    link.symlink_to(tmp_path / "outside.safetensors")
    kind, text = run(tmp_path, "org/tiny", local_files_only=True)
    assert kind == "CheckpointError" and "which is not allowed: it is a link to" in str(text)


def test_a_path_wins_over_a_hub_id(tmp_path: Path) -> None:
    cached(tmp_path, sharded())
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    save_file({"local": torch.ones(1)}, tmp_path / "org" / "tiny" / "model.safetensors")
    assert run(tmp_path, "org/tiny", local_files_only=True)[0] == ["local", [1.0]]


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server with a repository; its address, and what it was asked."""
    with serving(sharded()) as found:
        yield found


@contextlib.contextmanager
def serving(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """A server with as much of the hub's interface as a download needs."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != "Bearer hf_secret":
                self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif (
                path.startswith(("/api/models/org/tiny/revision/", "/api/models/org/tiny/tree/"))
                or path == "/api/models/org/tiny"
            ):
                tree = [
                    {"type": "file", "path": n, "rfilename": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
                info: object = {"id": "org/tiny", "modelId": "org/tiny", "sha": SHA, "siblings": tree}
                if "/tree/" in path:
                    info = tree
                self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif path.startswith("/org/tiny/resolve/") and path.rpartition("/")[2] in files:
                content = files[path.rpartition("/")[2]]
                etag = hashlib.sha1(content).hexdigest()
                self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
            else:
                self.reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_download(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    address, asked = hub
    assert run(tmp_path, "org/tiny", {"HF_ENDPOINT": address}, token="hf_secret") == ANSWER
    fetched = {line.rpartition("/")[2] for line in asked if line.startswith("GET /org/tiny/resolve/")}
    assert fetched == set(sharded()) - {"pytorch_model.bin", "config.json"}, "only the files of the checkpoint"
    # What was fetched by a branch is found again without a network.
    assert run(tmp_path, "org/tiny", local_files_only=True) == ANSWER
    count = len(asked)
    kind, text = run(tmp_path, "org/other", {"HF_ENDPOINT": address}, token="hf_secret")
    assert kind == "CheckpointNotFound" and "'org/other'" in str(text) and len(asked) > count


def test_wrong_token(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    kind, text = run(tmp_path, "org/tiny", {"HF_ENDPOINT": hub[0]}, token="hf_wrong")
    assert kind == "CheckpointNotFound" and "check the name, the revision and the token" in str(text)


def test_what_ranks_saved_together(tmp_path: Path) -> None:
    """A folder of torch.distributed.checkpoint: its metadata first, then the files that it names."""
    folder = save_dcp({"a": torch.ones(2), "b": torch.zeros(1)}, tmp_path / "saved", files=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"meta.pt": b"not needed"}
    names = sorted(name for name in files if name.endswith(".distcp"))
    answer = [["a", [1.0, 1.0]], ["b", [0.0]], "org/tiny", names]
    (tmp_path / "cached").mkdir()
    with serving(files) as (address, asked):
        found = run(tmp_path / "cached", "org/tiny", {"HF_ENDPOINT": address}, token="hf_secret")
    assert sorted(found, key=str) == sorted(answer, key=str) and len(names) == 2
    fetched = {line.rpartition("/")[2] for line in asked if line.startswith("GET /org/tiny/resolve/")}
    assert fetched == {".metadata", *names}
    assert run(tmp_path / "cached", "org/tiny", local_files_only=True) == found
