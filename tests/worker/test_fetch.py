"""A backbone of the hub: fetched once, at its revision and without pickles, and afterwards used without the hub."""

from __future__ import annotations

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

from tests.worker.backbones import make_wav2vec2

COMMIT = "c0ffee" * 6 + "beef"


class Hub:
    """As much of huggingface.co as has one model."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                name = self.path.rpartition("/")[2]
                if self.path.startswith("/api/models/us/model/revision/"):
                    names = [{"rfilename": p.name} for p in sorted(folder.iterdir())]
                    self.answer(json.dumps({"id": "us/model", "sha": COMMIT, "siblings": names}).encode())
                elif self.path.startswith(f"/api/models/us/model/tree/{COMMIT}"):
                    rows = [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())]
                    digests = [(name, data, hashlib.sha1(data).hexdigest()) for name, data in rows]
                    files = [{"type": "file", "path": n, "size": len(d), "oid": h} for n, d, h in digests]
                    self.answer(json.dumps(files).encode())
                elif self.path.startswith(f"/us/model/resolve/{COMMIT}/") and (folder / name).exists():
                    self.answer((folder / name).read_bytes())
                else:
                    self.send_error(404)

            do_HEAD = do_GET

            def answer(self, content: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model = make_wav2vec2(tmp_path / "model")
    (model / "pytorch_model.bin").write_bytes(b"a pickle")
    made = Hub(model)
    thread = threading.Thread(target=made.server.serve_forever)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def python(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    left_out = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY")
    env = {k: v for k, v in os.environ.items() if k not in left_out}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


BUILD = """
from launcher.recipe import Wav2Vec2
from launcher.worker.models import build
model = build(Wav2Vec2(kind="wav2vec2", source="us/model", revision="v1", mask_channel_length=8), seed=1)
print(model.backbone.source, sum(p.numel() for p in model.parameters()) > 0)
"""


def test_a_backbone_is_fetched_once_and_then_used_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    done = python(hub, tmp_path, "-m", "launcher.worker", "fetch", "us/model", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout.splitlines()[-1])["path"])
    assert folder.name == COMMIT and (folder / "model.safetensors").exists()
    assert not (folder / "pytorch_model.bin").exists(), "no pickle comes along"
    hub.asked.clear()
    done = python(hub, tmp_path, "-c", BUILD)
    assert done.stdout.split() == ["us/model", "True"], done.stderr
    assert hub.asked == [], "the ranks ask the hub for nothing"
    done = python(hub, tmp_path, "-m", "launcher.worker", "fetch", "us/other")
    assert done.returncode == 5 and "error: cannot fetch us/other at main: " in done.stderr
    assert "\nhint: " in done.stderr
