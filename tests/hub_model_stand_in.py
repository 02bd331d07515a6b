"""A loopback stand-in for the Hub's model repositories, so that the real `huggingface_hub` creates, uploads and downloads.

    with ModelHub(token="hf_test") as hub:         # hub.endpoint is what HF_ENDPOINT must say, with HF_HUB_DISABLE_XET=1
        ...                                        # hub.repos["owner/name"]["main"] holds the files, path -> bytes

Writing asks for the token. Uploads go the ways of the Hub: small files within the commit, large ones beside it (git LFS).
"""

from __future__ import annotations

import base64
import json
import re
from urllib.parse import unquote

from hub_stand_in import HubStandIn, _Handler

API = re.compile(r"/api/models/(?P<id>[^/]+/[^/]+)/(?P<what>preupload|commit|revision)/(?P<rev>[^/]+)$")
FILE = re.compile(r"/(?P<id>(?!api/|lfs/)[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")
LARGE = (".safetensors", ".png")


class ModelHub(HubStandIn):
    """Serves and takes model repositories on 127.0.0.1, from a thread, until the `with` block ends."""

    def __init__(self, token):
        super().__init__()
        self.token, self.blobs, self.commits, self.headers = token, {}, 0, []
        self.server.RequestHandlerClass = type("Handler", (_ModelHandler,), {"hub": self})


class _ModelHandler(_Handler):
    def route(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path))
        file = FILE.match(path)
        if file:
            return self.download(file)
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}" and not path.startswith("/lfs/"):
            return self.reply(401, b'{"error": "Invalid username or password."}', {"Content-Type": "application/json"})
        if self.command == "PUT":
            self.hub.blobs[path.rpartition("/")[2]] = self.body
            return self.reply(200, b"")
        if path == "/api/repos/create":
            return self.create()
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs_batch()
        found = API.match(path)
        return getattr(self, found["what"])(found["id"]) if found else self.reply(404, b"")

    do_GET = do_HEAD = do_POST = do_PUT = lambda self: self.route()

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        status = 409 if repo in self.hub.repos else 200
        self.hub.repos.setdefault(repo, {"main": {}})
        answer = json.dumps({"url": f"{self.hub.endpoint}/{repo}", "id": repo}).encode()
        self.reply(status, answer, {"Content-Type": "application/json"})

    def revision(self, repo):
        siblings = [{"rfilename": path} for path in self.hub.repos[repo]["main"]]
        self.json({"id": repo, "sha": "0" * 40, "siblings": siblings, "tags": [], "private": False})

    def preupload(self, repo):
        files = json.loads(self.body)["files"]
        mode = {True: "lfs", False: "regular"}
        self.json(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": mode[f["path"].endswith(LARGE)],
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for f in files
                ]
            }
        )

    def lfs_batch(self):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    def commit(self, repo):
        files = self.hub.repos[repo]["main"]
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.commits += 1
        sha = f"{self.hub.commits:040d}"
        self.json({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None})

    def download(self, found):
        repo = self.hub.repos.get(found["id"])
        if repo is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        self.file(repo["main"], f"{self.hub.commits:040d}", found["path"], None)
