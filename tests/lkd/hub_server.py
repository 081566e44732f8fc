"""As much of the Hugging Face Hub's API as one repository needs: make it, commit files, and give them out."""

import base64
import hashlib
import json
from typing import Any

from benchmarks.local_server import QuietHandler, start_server

COMMIT = "0" * 40


class StandIn:
    """A server on this host.

    Attributes:
        address: What HF_ENDPOINT is to be.
        files: Repository → file → content.
        tokens: The tokens that requests brought.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, Any]] = {}  # what was asked for, by a repository's name
        self.tokens: set[str | None] = set()
        stand_in = self

        class Handler(QuietHandler):
            def do_POST(self) -> None:
                stand_in.tokens.add(self.headers.get("authorization"))
                lines = self.rfile.read(int(self.headers.get("content-length", 0))).decode().splitlines()
                contents = [json.loads(line) for line in lines]
                if self.path == "/api/repos/create":
                    name = f"{contents[0].get('organization') or 'me'}/{contents[0]['name']}"
                    stand_in.files.setdefault(name, {})
                    stand_in.created[contents[0]["name"]] = contents[0]
                    self.answer({"url": f"{stand_in.address}/{name}"})
                elif self.path == "/api/validate-yaml":
                    self.answer({"errors": [], "warnings": []})
                elif "/preupload/" in self.path:
                    named = [{"path": file["path"], "uploadMode": "regular"} for file in contents[0]["files"]]
                    self.answer({"files": [{**file, "shouldIgnore": False} for file in named]})
                elif "/commit/" in self.path:
                    repository = "/".join(self.path.split("/")[3:5])
                    for line in contents:
                        if line["key"] == "file":
                            content = base64.b64decode(line["value"]["content"])
                            stand_in.files[repository][line["value"]["path"]] = content
                    self.answer({"commitUrl": f"{stand_in.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

            def do_HEAD(self) -> None:
                self.give(with_content=False)

            def do_GET(self) -> None:
                self.give(with_content=True)

            def give(self, with_content: bool) -> None:
                if self.path == "/api/whoami-v2":
                    self.answer({"name": "me", "type": "user", "orgs": []})
                    return
                owner, repository, _, _, *parts = self.path.strip("/").split("/")
                files = stand_in.files.get(f"{owner}/{repository}")
                content = (files or {}).get("/".join(parts))
                if content is None:
                    self.answer({}, 404, {"X-Error-Code": "RepoNotFound" if files is None else "EntryNotFound"})
                    return
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if with_content:
                    self.wfile.write(content)

            def answer(self, content: Any, code: int = 200, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(content).encode()
                self.send_response(code)
                for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self.server, self.address = start_server(Handler)
