"""An adapter goes to the Hub, private by default; the token is written nowhere. A local stub stands for the Hub."""

import base64
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import builders
import huggingface_hub
import pytest

from peft_perta import AdapterError, ConfigError, OutputError, Unlearned, push_adapter, save_perta_adapter
from peft_perta.adapters import load_emitted
from peft_perta.cli import main
from peft_perta.job.recipe import recipe_of

TOKEN = "hf_aSecretOfTheTests0123456789"
NAME = "my-org/forgets-it"


class Hub:
    """What the stub holds: its repositories (name -> private, files), and every request for them."""

    def __init__(self):
        self.repositories = {}
        self.requests = []
        self.address = ""

    def answer(self, method, path, body, headers):
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if not path.startswith(("/api/models/", "/api/repos/")):  # what huggingface_hub asks for itself
            return 404, {}
        self.requests.append((method, path, headers.get("Authorization")))
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = {
                "private": asked.get("visibility") == "private" or asked.get("private"),
                "files": {},
            }
            return 200, {"url": f"{self.address}/{name}"}
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        repository = self.repositories[name]
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if "/commit/" in path:
            self.commit(repository["files"], [json.loads(line) for line in body.splitlines()])
            return 200, {"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1", "success": True}
        return 200, {
            "id": name, "private": repository["private"], "sha": "0",
            "siblings": [{"rfilename": file} for file in repository["files"]],
        }  # fmt: skip

    def commit(self, files, operations):
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del files[value["path"]]


@pytest.fixture
def hub(monkeypatch):
    """A stub that huggingface_hub talks to, in this process and in children."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = state.answer(self.command, self.path.partition("?")[0], body, self.headers)
            data = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = handle_any

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = state.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name, value in {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """An emitted adapter, with a report that quotes rows beside it."""
    path = tmp_path_factory.mktemp("emitted") / "out"
    save_perta_adapter(path, *builders.negate(builders.adapted_saved_llama(), weighting="uniform"))
    (path / "report.html").write_text("Who wrote Hatter? Basil Q. Khan")
    return path


@pytest.fixture
def adapter(emitted, tmp_path):
    """A copy of its own for each test."""
    return Path(shutil.copytree(emitted, tmp_path / "out"))


def everything_written(directory):
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


def test_the_command_makes_a_private_repository_of_the_adapters_files(hub, adapter, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    before = everything_written(adapter)
    assert main(["push", str(adapter), NAME]) == 0
    said = capfd.readouterr()
    assert f"/{NAME}, private" in said.out
    repository = hub.repositories[NAME]
    assert repository["private"] is True
    assert set(repository["files"]) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "perta_provenance.json",
    }  # fmt: skip
    for name, content in repository["files"].items():
        assert content == (adapter / name).read_bytes()
    assert "which is no name on the Hub" in said.err
    assert {token for *_, token in hub.requests} == {f"Bearer {TOKEN}"}
    sent = b"".join(repository["files"].values())
    for place in (sent, everything_written(adapter.parent), (said.out + said.err + caplog.text).encode()):
        assert TOKEN.encode() not in place
    assert everything_written(adapter) == before


@pytest.mark.slow
def test_in_a_process_of_its_own_the_token_is_written_nowhere(hub, adapter, tmp_path, monkeypatch):
    """Neither where it works, nor in the user's cache, nor in what it says with all its logs on."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_VERBOSITY", "debug")
    command = [sys.executable, "-m", "peft_perta", "push", str(adapter), NAME]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=here, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert hub.repositories[NAME]["private"] is True
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN.encode() not in everything_written(tmp_path)


def test_what_unlearn_returns_goes_there_without_its_report(hub, adapter):
    unlearned = Unlearned(
        adapter=load_emitted(adapter),
        evaluation={},
        missed={},
        recipe=recipe_of({}),
        lines={},
        report="Khan",
    )
    assert unlearned.push_to_hub(NAME).endswith(f"/{NAME}")
    repository = hub.repositories[NAME]
    assert repository["private"] is True
    assert repository["files"]["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()
    assert "report.html" not in repository["files"]


def test_public_is_asked_for(hub, adapter):
    push_adapter(adapter, NAME, public=True)
    assert not hub.repositories[NAME]["private"]
    with pytest.raises(OutputError, match="is public on the Hub, expected a private repository"):
        push_adapter(adapter, NAME)


def test_an_earlier_upload_is_replaced_and_files_of_others_are_not(hub, adapter):
    push_adapter(adapter, NAME)
    files = hub.repositories[NAME]["files"]
    files |= {"strength.json": b"of the earlier one", "notes.md": b"the user's"}
    push_adapter(adapter, NAME)
    assert "strength.json" not in files
    assert files["notes.md"] == b"the user's"
    del files["perta_provenance.json"]
    count = len(hub.requests)
    with pytest.raises(OutputError, match="holds files on the Hub that were not written by peft_perta"):
        push_adapter(adapter, NAME)
    assert [method for method, *_ in hub.requests[count:]] == ["GET"]


def test_a_bad_token_is_one_line_and_no_part_of_it_is_shown(hub, adapter, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong0123456789")
    assert main(["push", str(adapter), NAME]) == 2
    said = capfd.readouterr()
    assert "could not be uploaded" in said.err
    assert "hf auth login" in said.err
    assert "hf_wrong" not in said.out + said.err
    assert not hub.repositories


def test_what_is_refused_makes_no_request(hub, adapter, tmp_path):
    forget = tmp_path / "forget"
    builders.adapted_saved_llama().save_pretrained(tmp_path)
    for directory, name, error, message in (
        (adapter, "no-organisation", ConfigError, "expected ORG/NAME"),
        (adapter, "a b/c", ConfigError, "expected ORG/NAME"),
        (tmp_path / "nowhere", NAME, AdapterError, "is no directory"),
        (forget, NAME, AdapterError, "holds no perta_provenance.json"),
    ):
        with pytest.raises(error, match=message):
            push_adapter(directory, name)
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(AdapterError, match="is not uploaded"):
        push_adapter(adapter, NAME)
    assert not hub.requests


def test_offline_it_says_so(adapter, monkeypatch):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(OutputError, match=r"could not be uploaded .*HF_HUB_OFFLINE"):
        push_adapter(adapter, NAME)
