"""A loopback stand-in for the Hub, so that the real `datasets` streams against faults that one can order.

    with HubStandIn() as hub:                      # hub.endpoint is what HF_ENDPOINT must say
        hub.add("owner/name", {"data/train-00000-of-00001.parquet": data})
        hub.fault("owner/name", "train-00000", 503, times=3)

It answers what `huggingface_hub` asks of a data set: `api/datasets/ID[/revision/REV]`, `.../tree/SHA[/FOLDER]`,
`.../paths-info/SHA`, and HEAD and GET (with Range) of `datasets/ID/resolve/REV/FILE`.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

API = re.compile(
    r"/api/datasets/(?P<id>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<rev>[^/]+)(?:/(?P<path>.+))?)?$"
)
FILE = re.compile(r"/datasets/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)$")


class HubStandIn:
    """Serves the data sets given to `add` on 127.0.0.1, from a thread, until the `with` block ends."""

    def __init__(self):
        self.repos, self.faults, self.requests = {}, [], []
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo, files):
        """Files of a data set, path -> bytes; adding again makes a new revision, older ones stay reachable."""
        sha = hashlib.sha1(b"".join(path.encode() + data for path, data in sorted(files.items()))).hexdigest()
        self.repos.setdefault(repo, {})[sha] = files
        self.repos[repo]["main"] = files
        self.repos[repo, "head"] = sha
        return sha

    def fault(self, repo, where, kind, times=1_000_000, after=0):
        """Spoil `times` requests for `repo` whose address contains `where`, after letting `after` of them pass.

        `kind` is a status code, or: "reset", "stall" (both in mid-body), "close" (early, the length promised more),
        "trickle" (a byte now and then), "short" (a well-formed answer with half the bytes), "no range" (the whole
        file whatever was asked), "truncated" and "garbage" (of the file as a whole).
        """
        self.faults.append({"repo": repo, "where": where, "kind": kind, "times": times, "after": after})

    def heal(self):
        """Take all faults back."""
        self.faults.clear()

    def due(self, path, body):
        """The fault that spoils a request, if any; faults of a body wait for a request that has one."""
        with self.lock:
            for fault in self.faults:
                if f"/{fault['repo']}/" not in path + "/" or fault["where"] not in path or not fault["times"]:
                    continue
                if isinstance(fault["kind"], str) and not body:
                    continue
                if fault["after"]:
                    fault["after"] -= 1
                    continue
                fault["times"] -= 1
                return fault["kind"]
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_GET

    def route(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.form = parse_qs(self.rfile.read(length).decode()) if length else {}
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        file, api = FILE.match(path), API.match(path)
        fault = self.hub.due(path, body=bool(file) and self.command == "GET")
        if isinstance(fault, int):
            return self.reply(fault, b"ordered fault")
        found = file or api
        versions = self.hub.repos.get(found["id"]) if found else None
        if versions is None:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        rev = found["rev"] or "main"
        if rev not in versions:
            return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        sha = self.hub.repos[found["id"], "head"] if rev == "main" else rev
        if file:
            return self.file(versions[rev], sha, file["path"], fault)
        return self.api(found, versions[rev], sha)

    def api(self, found, files, sha):
        entries = [_entry(path, data) for path, data in files.items()]
        if found["what"] == "paths-info":
            return self.json([entry for entry in entries if entry["path"] in self.form.get("paths", [])])
        if found["what"] == "tree":
            folder = f"{found['path']}/" if found["path"] else ""
            inside = [entry for entry in entries if entry["path"].startswith(folder)]
            if not inside:
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            if "recursive=True" not in self.path and "recursive=true" not in self.path:
                inside = _one_level(inside, folder)
            return self.json(inside)
        siblings = [{"rfilename": path} for path in files]
        return self.json({"id": found["id"], "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def file(self, files, sha, path, fault):
        if path not in files:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        data = files[path]
        if fault == "truncated":
            data = data[: len(data) // 2]
        if fault == "garbage":
            data = b"<html>Bad gateway</html>".ljust(len(data), b" ")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, body = 200, data
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and fault != "no range":
            start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            status, body = 206, data[start:stop]
            if not body:
                return self.reply(416, b"")
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(data)}"
        if fault == "short":
            body = body[: len(body) // 2]
        if fault in ("reset", "stall", "close", "trickle"):
            return self.break_off(status, body, headers, fault)
        return self.reply(status, body, headers)

    def break_off(self, status, body, headers, fault):
        """Promise the whole body, send a part, then reset, close, trickle or fall silent."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.hub.closing.wait(60)
        for byte in body[len(body) // 2 :] if fault == "trickle" else b"":
            if self.hub.closing.wait(0.2):
                break
            self.wfile.write(bytes([byte]))
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.05)
        self.close_connection = True
        self.connection.close()

    def json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, status, body, headers=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(path, data):
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _one_level(entries, folder):
    """What a listing that is not recursive shows: the files of a folder and the names of its folders."""
    shown = {}
    for entry in entries:
        name, _, rest = entry["path"][len(folder) :].partition("/")
        shown[name] = {"type": "directory", "path": folder + name, "oid": "0" * 40, "size": 0} if rest else entry
    return list(shown.values())


def numbered_png(number, side=40, compress_level=1):
    """A PNG whose colour says its number (below 65,536); `numbers` reads it back. Level 0 makes the file large."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 77)).save(file, "PNG", compress_level=compress_level)
    return file.getvalue()


def numbers(images):
    """uint8 [N, 3, H, W] made from `numbered_png` -> [N] numbers."""
    centre = images[:, :, images.shape[2] // 2, images.shape[3] // 2].astype(int)  # [N, 3]
    return (centre[:, 0] + 256 * centre[:, 1]).tolist()


def parquet_bytes(pictures, group=10):
    """Picture files (bytes, or None) -> a parquet file as the Hub has them: `image` of type Image, and `label`."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(pictures)]
    table = pa.table({"label": pa.array(range(len(cells)), pa.int64()), "image": pa.array(cells, struct)})
    features = {"image": {"_type": "Image"}, "label": {"dtype": "int64", "_type": "Value"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=group, compression="none")
    return file.getvalue()
