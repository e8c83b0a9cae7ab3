"""A stand-in for the Hub's HTTP API: repositories in memory, for the real `huggingface_hub`."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_test"
OWNER = "owner"


class Hub:
    """Repositories by id: branches by name, and the files of each commit."""

    def __init__(self):
        self.branches, self.commits, self.private = {}, {}, {}
        self.messages, self.stored, self.url = [], {}, ""

    def add(self, repo_id, files, branch="main", message=""):
        """A commit with all files of a branch, some of them new."""
        before = self.commits.get(self.branches.setdefault(repo_id, {}).get(branch), {})
        files = before | files
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.branches[repo_id][branch] = digest
        self.messages.append(message)
        return digest

    def files(self, repo_id, branch="main"):
        return self.commits[self.branches[repo_id][branch]]


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=b"", **headers):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.reply(404, {"error": code}, X_Error_Code=code)

    def commit_of(self, repo_id, revision):
        branches = self.hub.branches.get(repo_id)
        if branches is None:
            return self.missing("RepoNotFound")
        commit = branches.get(revision, revision)
        return commit if commit in self.hub.commits else self.missing("RevisionNotFound")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            repo_id, what, revision = "/".join(path[2:4]), *(path[4:6] or ("revision", "main"))
            commit = self.commit_of(repo_id, revision)
            if commit is None:
                return
            files = self.hub.commits[commit]
            if what == "tree":
                listed = [
                    {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                    for name, content in files.items()
                ]
                folder = "/".join(path[6:])
                if folder:
                    return self.missing("EntryNotFound")
                return self.reply(200, listed)
            self.reply(
                200,
                {
                    "id": repo_id,
                    "sha": commit,
                    "private": self.hub.private.get(repo_id, False),
                    "siblings": [{"rfilename": name} for name in files],
                },
            )
        elif path[2:3] == ["resolve"]:
            commit = self.commit_of("/".join(path[:2]), path[3])
            if commit is None:
                return
            content = self.hub.commits[commit].get("/".join(path[4:]))
            if content is None:
                return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            self.reply(200, content, ETag=f'"{etag(content)}"', X_Repo_Commit=commit)
        else:
            self.missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.stored[hashlib.sha256(content).hexdigest()] = content
        self.reply(200)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        address = urlsplit(self.path)
        path = unquote(address.path).strip("/").split("/")
        repo_id = "/".join(path[2:4])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif path == ["api", "repos", "create"]:
            wanted = json.loads(body)
            repo_id = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            url = f"{self.hub.url}/{repo_id}"
            if repo_id in self.hub.branches:
                return self.reply(409, {"error": "You already created this repo", "url": url})
            self.hub.private[repo_id] = wanted.get("visibility") == "private"
            self.hub.add(repo_id, {}, message="initial commit")
            self.reply(200, {"url": url})
        elif path == ["api", "validate-yaml"]:
            data = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            is_valid = "pipeline_tag" in data and "license" in data
            message = "empty or missing yaml metadata in repo card"
            self.reply(200, {"warnings": [] if is_valid else [{"message": message}], "errors": []})
        elif path[4:5] == ["branch"]:
            branches = self.hub.branches[repo_id]
            if path[5] in branches:
                return self.reply(409, {"error": "Reference already exists"})
            branches[path[5]] = branches["main"]
            self.reply(200, {})
        elif path[4:5] == ["preupload"]:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply(200, {"files": files})
        elif path[-4:] == ["info", "lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            for stored in objects:
                href = f"{self.hub.url}/lfs/{stored['oid']}"
                stored["actions"] = {"upload": {"href": href, "header": {}}}
            self.reply(200, {"transfer": "basic", "objects": objects})
        elif path[4:5] == ["commit"]:
            files, message = {}, ""
            for line in body.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header":
                    message = value["summary"]
                elif entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
            branch, pull_request = path[5], "create_pr=1" in address.query
            if pull_request:
                self.hub.branches[repo_id]["refs/pr/1"] = self.hub.branches[repo_id][branch]
                branch = "refs/pr/1"
            commit = self.hub.add(repo_id, files, branch, message)
            url = f"{self.hub.url}/{repo_id}"
            made = {"commitOid": commit, "commitUrl": f"{url}/commit/{commit}"}
            if pull_request:
                made["pullRequestUrl"] = f"{url}/discussions/1"
            self.reply(200, made)
        else:
            self.missing("RepoNotFound")


def etag(content):
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serve_hub():
    """A running stand-in."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
