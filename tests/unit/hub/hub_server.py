"""A Hugging Face Hub on loopback: as much of its HTTP as `huggingface_hub` asks of it to push and to load.

`python hub_server.py FOLDER` prints its port. It stores commits as files in FOLDER/<repo>, and each request in
FOLDER/requests.jsonl. It is strict where the Hub is: tokens, order of the calls, digests of LFS objects, metadata.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(sys.argv[1])
LICENCES = {"apache-2.0", "mit", "other", "llama3"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
GATED, PRIVATE = "owner/gated", "owner/private"
CARD = "---\nlicense: mit\nlanguage: [en, de]\n---\n# A model\n"


class Hub(BaseHTTPRequestHandler):
    repos: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    objects: dict[str, bytes] = {}  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def url(self, repo: str) -> str:
        return f"http://{self.headers['Host']}/{repo}"

    def begin(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
        with (FOLDER / "requests.jsonl").open("a") as file:
            file.write(json.dumps([self.command, self.path]) + "\n")
        return body

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.begin()
        repo = "/".join(self.path.split("/")[1:3])
        if repo == GATED:
            self.refuse(403, "GatedRepo")
        elif repo == "owner/open" and self.path.endswith("README.md"):
            text = CARD.encode()
            etag = f'"{hashlib.sha256(text).hexdigest()}"'
            self.answer(200, text, {"ETag": etag, "X-Repo-Commit": "c" * 40, "Content-Type": "text/plain"})
        else:
            self.refuse(401, "RepoNotFound")  # the Hub does not say whether a private one exists

    def do_POST(self) -> None:
        body = self.begin()
        if self.path == "/api/validate-yaml":
            self.validate(json.loads(body))
        elif self.headers.get("Authorization") != "Bearer hf_write":
            self.refuse(401 if "Authorization" not in self.headers else 403, "Unauthorized")
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            kind = asked.get("type") or "model"
            is_new = name not in self.repos
            self.repos.setdefault(name, {"type": kind, "visibility": asked.get("visibility")})
            (FOLDER / "repos.json").write_text(json.dumps(self.repos))
            self.answer(
                200 if is_new else 409, {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": "1"}
            )
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": mode_of(f), "shouldIgnore": False} for f in files]
            self.answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            assert "basic" in json.loads(body)["transfers"]
            host = self.headers["Host"]
            objects = [
                {**each, "actions": {"upload": {"href": f"http://{host}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            self.commit(body)
        else:
            self.refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        body, oid = self.begin(), self.path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self.refuse(422, "digest")
        else:
            self.objects[oid] = body
            self.answer(200)

    def commit(self, body: bytes) -> None:
        repo = "/".join(self.path.split("/")[3:5])
        if repo not in self.repos:
            self.refuse(404, "RepoNotFound")
            return
        for line in body.splitlines():
            part = json.loads(line)
            value = part["value"]
            if part["key"] == "header":
                (FOLDER / "message.txt").write_text(value["summary"])
                continue
            path = FOLDER / repo / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            is_lfs = part["key"] == "lfsFile"
            path.write_bytes(self.objects[value["oid"]] if is_lfs else base64.b64decode(value["content"]))
        self.answer(
            200, {"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/1", "commitOid": "1" * 40, "success": True}
        )

    def validate(self, asked: dict[str, Any]) -> None:
        """Refuse metadata as the Hub does: what is no YAML, and values that are none of its own."""
        errors = []
        try:
            data = yaml.safe_load(asked["content"].split("---\n")[1])
            if data.get("license", "mit") not in LICENCES:
                errors.append("license must be one of the Hub's")
            if data.get("base_model_relation", "finetune") not in RELATIONS:
                errors.append("base_model_relation must be one of the Hub's")
            for model in data.get("model-index", ()):
                for result in model["results"]:
                    assert result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
                    assert all(metric["type"] and metric["value"] is not None for metric in result["metrics"])
        except (IndexError, KeyError, AssertionError, AttributeError, yaml.YAMLError) as error:
            errors.append(f"metadata: {error!r}")
        messages = {"errors": [{"message": text} for text in errors], "warnings": []}
        self.answer(400 if errors else 200, messages)


def mode_of(file: dict[str, Any]) -> str:
    return "lfs" if file["path"].endswith((".safetensors", ".arrow")) else "regular"


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_port, flush=True)
    server.serve_forever()
