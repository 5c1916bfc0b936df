"""checkpoint.push_to_hub, against an HTTP server that takes what the hub takes."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers.ranks import run_on_ranks
from helpers.runs import Settings, learned, said_by, write_run
from titan_ulysses.checkpoint.push import card, push
from titan_ulysses.config.schema import Config

IMAGES, REWARDS = {"vision": "frozen"}, {"name": "reward"}
MINE = "https://huggingface.co/me/mine"


class Hub(ThreadingHTTPServer):
    """The calls of an upload: make a repository, ask how to send files, and send them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.fails = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self._reply(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.server.tokens.add(self.headers["Authorization"])
        path = self.path.split("?")[0]
        if self.server.fails:
            return self._reply(403, {"error": "no write access"})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            return self._reply(200, {"commitUrl": f"{MINE}/commit/1", "commitOid": "1"})
        given = json.loads(body)
        self.server.calls.append((path, given))
        if "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in given["files"]
            ]
            return self._reply(200, {"files": files})
        return self._reply(200, {"url": MINE, "name": "me/mine"})

    def _reply(self, code: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()
    server.server_close()


def config_of(**lora: Any) -> Config:
    return Config.model_validate(
        {
            "job": {"name": "mine"},
            "model": {"path": "org/base"},
            "lora": lora,
            "checkpoint": {"push_to_hub": "me/mine"},
        }
    )


@pytest.mark.parametrize(("lora", "folder"), [({}, "export"), ({"rank": 4}, "adapter")])
def test_the_files_and_a_card_are_uploaded(
    lora: dict[str, Any], folder: str, hub: Hub, tmp_path: Path
) -> None:
    for name in ("export", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    said = push(config_of(**lora), tmp_path, results={"loss": "2.5"})
    assert said == f"Uploaded {tmp_path / folder} to the hub: {MINE}/commit/1"
    assert hub.files["config.json"] == folder.encode()
    card = hub.files["README.md"].decode()
    assert "base_model: org/base\n" in card and "| loss | 2.5 |" in card
    assert 'push_to_hub = "me/mine"' in card and "hf_secret" not in card
    made = next(given for path, given in hub.calls if path == "/api/repos/create")
    # Newer versions of the library have another name for it.
    assert (made.get("private"), made.get("visibility")) in ((True, None), (None, "private"))
    assert hub.tokens == {"Bearer hf_secret"}


def test_the_card_says_what_kind_of_model_it_is() -> None:
    config = config_of()
    of_images = config.model_copy(update={"model": config.model.model_copy(update=IMAGES)})
    rewards = config.model_copy(update={"loss": config.loss.model_copy(update=REWARDS)})
    for kind, one in {
        "A causal language model": config,
        "A model of images and text": of_images,
        "A reward model": rewards,
        "A LoRA adapter of org/base": config_of(rank=4),
    }.items():
        assert f"\n{kind}.\n" in card(one, {})


def train_and_push(config: Path, endpoint: str) -> str:
    """A run that uploads what it exports; what it says."""
    settings: Settings = {"training.steps": 1, "lr_scheduler.warmup_steps": 0}
    settings |= {"checkpoint.export": True, "checkpoint.push_to_hub": "me/mine"}
    with pytest.MonkeyPatch.context() as patch:
        # The ranks of the tests have imported it without a network.
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        patch.setenv("HF_ENDPOINT", endpoint)
        patch.setenv("HF_TOKEN", "hf_secret")
        return said_by(config, settings)


def test_a_run_uploads_what_it_exports(hub: Hub, tmp_path: Path) -> None:
    config, run = write_run(tmp_path), tmp_path / "outputs" / "run"
    (said,) = run_on_ranks(1, train_and_push, config, os.environ["HF_ENDPOINT"])
    assert f"Uploaded {run / 'export'} to the hub: {MINE}/commit/1" in said, said
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert hub.files[file] == (run / "export" / file).read_bytes()
    assert f"| loss | {learned(run)[-1][1]:.4f} |" in hub.files["README.md"].decode()


def test_errors_end_nothing_and_without_a_token_nothing_is_asked(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export").mkdir()
    hub.fails = True
    said = push(config_of(), tmp_path, results={})
    assert said.startswith('WARNING: checkpoint.push_to_hub = "me/mine": ') and "403" in said
    assert "hf_secret" not in said
    hub.tokens.clear()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    said = push(config_of(), tmp_path, results={})
    assert "there is no token for the hub" in said and not hub.tokens
