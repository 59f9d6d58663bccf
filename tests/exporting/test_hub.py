"""An export is sent to the hub through its own client, to a server of ours that speaks as much of its HTTP API."""

import base64
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from typer.testing import CliRunner

import expertune
from expertune.cli import app
from expertune.errors import ConfigError, ExportError
from expertune.exporting.export import export
from expertune.exporting.formats import Verdict
from expertune.exporting.hub import _public
from tests.processes import BENEATH, run_program
from tests.train.conftest import rows_file, small_mixtral, three_steps

__all__ = ["rows_file", "small_mixtral", "three_steps"]  # fixtures

# The client hands a commit's lines to httpx by an argument of an older name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

TOKEN, READER, XET_TOKEN = "hf_writes", "hf_reads", "xet_writes"


class Hub:
    """Users, repositories and their files; large files by Git LFS or by Xet, as on the hub.

    Xet's client sends blocks and then an index of them; they stay as they are, for what is in them is the client's.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool | None] = {}
        self.large: dict[str, bytes] = {}
        self.blocks: list[bytes] = []
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.full = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                hub.answer(self, b"")

            def do_POST(self) -> None:
                hub.answer(self, self.rfile.read(int(self.headers.get("Content-Length") or 0)))

            do_PUT = do_POST

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.requests.append(f"{request.command} {request.path}")
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        status, values = self.respond(request.path.split("?")[0], token, body)
        content = json.dumps(values).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def respond(self, path: str, token: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/upload/"):
            self.large[path.removeprefix("/upload/")] = body
            return 200, {}
        if token == XET_TOKEN and path.startswith("/v1/xorbs/"):
            self.blocks.append(body)
            return 200, {"was_inserted": True}
        if token == XET_TOKEN:
            return (200, {"result": 1}) if path == "/v1/shards" else (404, {"error": "no such block is here"})
        if token not in (TOKEN, READER):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "ada", "type": "user", "auth": {"accessToken": {"role": "write"}}}
        if token == READER:
            return 403, {"error": "You don't have the rights to create a model under the namespace ada"}
        if path == "/api/validate-yaml":
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return (200, {"errors": [], "warnings": []}) if metadata["tags"] else (400, {"errors": ["no tags"]})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = {}
            self.private[name] = asked.get("private")
            if "visibility" in asked:
                self.private[name] = asked["visibility"] == "private"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if found := re.fullmatch(r"/api/models/(.+)/xet-write-token/main", path):
            return 200, {"accessToken": XET_TOKEN, "exp": int(time.time()) + 3600, "casUrl": self.url}
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = json.loads(body)["files"]
            modes = [(file["path"], "lfs" if file["path"].endswith(".safetensors") else "regular") for file in files]
            return 200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]}
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.url}/upload/{each['oid']}"}}
            return 200, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            if self.full:
                return 507, {"error": "No space left in your namespace"}
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no {path} here"}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.large.get(value["oid"]) or f"Xet {value['oid']}".encode()
        address = f"{self.url}/{name}/commit/{'0' * 40}"
        return 200, {"commitUrl": address, "commitOid": "0" * 40, "hookOutput": "", "success": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and the client as `HF_ENDPOINT` and `HF_TOKEN` set it up."""
    made = Hub()
    for name, value in (("ENDPOINT", made.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.utils.close_session()
    yield made
    huggingface_hub.utils.close_session()
    made.close()


def test_export_is_sent_in_one_commit_with_its_card_and_without_paths_of_this_machine(
    hub: Hub, three_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    exported = export(three_steps, "peft", out=out, verify=False, push_to_hub="ada/mine", private=True)
    assert exported.url == f"{hub.url}/ada/mine"
    assert hub.commits == ["Export by Expertune"]
    assert hub.private == {"ada/mine": True}
    sent = hub.repositories["ada/mine"]
    assert sorted(sent) == sorted(path.name for path in out.iterdir())
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(sent)
    weights = (out / "adapter_model.safetensors").read_bytes()
    assert sent["adapter_model.safetensors"] == weights
    assert hashlib.sha256(weights).hexdigest() in hub.large
    here = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    there = json.loads(sent["adapter_config.json"])
    assert there == here | {"base_model_name_or_path": "small-mixtral"}
    machine = str(Path(here["base_model_name_or_path"]).parent)
    assert not [name for name, content in sent.items() if machine.encode() in content]
    assert b'PeftModel.from_pretrained(model, "ada/mine")' in sent["README.md"]
    monkeypatch.setattr("expertune.exporting.export.run_engines", lambda *_: [Verdict("engine", "verified")])
    assert (expertune.verify(out, three_steps).verification or {})["hub"] == "ada/mine"
    assert 'PeftModel.from_pretrained(model, "ada/mine")' in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow  # the client of Xet needs seconds to start; by default files go by Git LFS
@pytest.mark.skipif(find_spec("hf_xet") is None, reason="hf_xet is not installed: pip install hf_xet")
def test_large_files_go_by_xet_where_its_client_is_installed(hub: Hub, tmp_path: Path) -> None:
    weights = random.Random(0).randbytes(2**18)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text("{}")
    # In a process of its own, for its client starts threads.
    code = "import sys; from pathlib import Path; from expertune.exporting.hub import push; "
    code += "print(push(Path(sys.argv[1]), 'ada/mine', None))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    ended = run_program(code, str(folder), imports=BENEATH, **settings)
    assert (ended.status, ended.out) == (0, f"{hub.url}/ada/mine\n"), ended.err
    assert hub.repositories["ada/mine"] == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": f"Xet {hashlib.sha256(weights).hexdigest()}".encode(),
    }
    assert any(weights[:1000] in block for block in hub.blocks)
    assert hub.large == {}


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("tokenizer_config.json", {"name_or_path": "/home/ada/base"}, {"name_or_path": "base"}),
        ("tokenizer_config.json", {"eos": "</s>", "t": "{{ a }}</s> /no_think"}, None),
        ("adapter_config.json", {"base_model_name_or_path": "../private/base"}, {"base_model_name_or_path": "base"}),
        ("config.json", {"_name_or_path": "ada/base"}, None),
        ("verification.json", {"reason": "no file at ../private/base/x, sorry"}, {"reason": "no file at x, sorry"}),
    ],
)
def test_paths_are_cut_down_and_everything_else_is_sent_as_it_is(
    name: str, here: dict[str, str], there: dict[str, str] | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(json.dumps(here))
    sent = _public(tmp_path / name)
    if there is None:
        assert sent == tmp_path / name
    else:
        assert isinstance(sent, bytes)
        assert json.loads(sent) == there


def test_command_prints_folder_and_address_and_may_send_to_a_repository_that_exists(
    hub: Hub, three_steps: Path, tmp_path: Path
) -> None:
    hub.repositories["ada/mine"] = {"old.txt": b"kept"}
    arguments = ["export", str(three_steps), "--to", "peft", "--no-verify", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--push-to-hub", "ada/mine"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'out'}\n{hub.url}/ada/mine\n"
    assert {"old.txt", "adapter_model.safetensors"} <= set(hub.repositories["ada/mine"])


def refused(three_steps: Path, out: Path, why: str, name: str = "ada/mine") -> None:
    with pytest.raises((ConfigError, ExportError), match=why):
        export(three_steps, "peft", out=out, verify=False, push_to_hub=name)


def test_without_a_token_a_name_or_a_connection_nothing_is_written(
    hub: Hub, three_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(three_steps, tmp_path / "out", "push_to_hub: a/b/c is no name of a repository", name="a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(three_steps, tmp_path / "out", "push_to_hub: the hub does not accept the token")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused(three_steps, tmp_path / "out", "push_to_hub: no token of the hub is here; log in with `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(three_steps, tmp_path / "out", "push_to_hub: the hub was not reached, or broke off")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils.close_session()
    refused(three_steps, tmp_path / "out", "push_to_hub: HF_HUB_OFFLINE is set")
    with pytest.raises(ConfigError, match="private: nothing is sent to the hub; add --push-to-hub NAME"):
        export(three_steps, "peft", out=tmp_path / "out", verify=False, private=True)
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


def test_what_the_hub_refuses_at_the_end_leaves_a_whole_export_and_how_to_send_it(
    hub: Hub, three_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    out = tmp_path / "reader"
    refused(
        three_steps, out, f"the token may not write to ada/mine; .*The export is whole in {out}: `hf upload ada/mine"
    )
    assert (out / "adapter_model.safetensors").is_file()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.full = True
    refused(three_steps, tmp_path / "full", "the hub refuses ada/mine .*507.*The export is whole in")
    assert expertune.RunRecord.load(three_steps).status == "finished"
