"""A stand-in for the Hub, in memory: enough of its HTTP interface to push a model and load it again."""

import base64
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


class HubServer(ThreadingHTTPServer):
    """Use as a context manager; `repos` maps a repository id to its files, `cards` are the READMEs it was shown.

    What it refuses may be set at any time: `read_only` repositories, `broken` ones whose commits end with an error of
    the server, `unplugged` ones whose commits end the connection. `private` and `tokens` are what it was asked with.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cards: list[str] = []
        self.private: dict[str, object] = {}
        self.tokens: set[str] = set()
        self.read_only: set[str] = set()
        self.broken: set[str] = set()
        self.unplugged: set[str] = set()
        self.commits: list[tuple[str, str]] = []  # repository and message
        self.seen: list[tuple[str, list[str]]] = []  # what each commit left in its repository
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def sha(self, repo: str) -> str:
        content = b"".join(name.encode() + data for name, data in sorted(self.repos[repo].items()))
        return hashlib.sha1(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, what="EntryNotFound"):
        self.answer({"error": what}, 404, X_Error_Code=what)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = urlsplit(self.path).path.strip("/").split("/")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if path == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
            status = 409 if repo in self.server.repos else 200
            self.server.repos.setdefault(repo, {})
            self.server.private.setdefault(repo, wanted.get("visibility", wanted.get("private")))
            return self.answer({"url": f"{self.server.url}/{repo}"}, status)
        if path == ["api", "validate-yaml"]:
            card = json.loads(body)["content"]
            self.server.cards.append(card)
            try:
                yaml.safe_load(card.split("---\n")[1])
            except (IndexError, yaml.YAMLError) as error:
                return self.answer({"errors": [{"message": str(error)}]}, 400)
            return self.answer({"errors": [], "warnings": []})
        repo = "/".join(path[2:4])
        if repo not in self.server.repos:
            return self.missing("RepoNotFound")
        if path[4] == "branch":
            return self.answer({})
        if path[4] == "commit" and repo in self.server.broken:
            return self.answer({"error": "out of order"}, 500)
        if path[4] == "commit" and repo in self.server.unplugged:
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if path[4] == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        for line in map(json.loads, body.decode().splitlines()):  # path[4] == "commit"
            if line["key"] == "header":
                self.server.commits.append((repo, line["value"]["summary"]))
            if line["key"] == "file":
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                del self.server.repos[repo][line["value"]["path"]]
        self.server.seen.append((repo, sorted(self.server.repos[repo])))
        sha = self.server.sha(repo)
        return self.answer({"commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}", "success": True})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[0] == "control":  # of the tests: control/broken/owner/name
            getattr(self.server, path[1]).add("/".join(path[2:]))
            return self.answer({})
        repo = "/".join(path[2:4] if path[0] == "api" else path[:2])
        files = self.server.repos.get(repo)
        if files is None:
            return self.missing("RepoNotFound")
        if path[4:5] == ["auth-check"]:
            return self.answer({"error": "forbidden"}, 403) if repo in self.server.read_only else self.answer({})
        if path[0] != "api":  # owner/name/resolve/revision/file
            name = "/".join(path[4:])
            if name not in files:
                return self.missing()
            tag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
            return self.answer(files[name], ETag=tag, X_Repo_Commit=self.server.sha(repo))
        if path[4:5] == ["tree"]:
            inside = "/".join([*path[6:], ""])
            rows = [{"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                    for name, data in files.items() if name.startswith(inside)]  # fmt: skip
            return self.answer(rows) if rows or not inside else self.missing()
        siblings = [{"rfilename": name} for name in files]
        return self.answer({"id": repo, "modelId": repo, "sha": self.server.sha(repo), "private": False, "tags": [],
                            "siblings": siblings})  # fmt: skip

    do_HEAD = do_GET
