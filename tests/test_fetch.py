"""tests/test_fetch.py: k8s/fetch.yaml's script against a hub that has bad days. Run by `make test`.

Needs Python 3, bash and curl, and skips, saying so, without them. The hub is two servers on this
machine, as Hugging Face's is two hosts: one that knows the files, answers small ones itself and
redirects for large ones; and one that has the bytes and may not see the token. `sleep` is replaced,
so that pauses are short; how long they were meant to be is written down.
"""
import hashlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

os.chdir(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
counts = {"passed": 0, "failed": 0, "skipped": 0}


def check(ok, what):
    counts["passed" if ok else "failed"] += 1
    if not ok:
        print("FAILED:", what)


def finish():
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**counts))
    sys.exit(counts["failed"] > 0)


if not shutil.which("bash") or not shutil.which("curl"):
    counts["skipped"] += 1
    print("skipped: test_fetch needs bash and curl")
    finish()

REPO, COMMIT, OTHER, TOKEN = "someone/model", "a" * 40, "b" * 40, "hf_secret"
SHARDS = [f"model-{i:05d}-of-00008.safetensors" for i in range(1, 9)]
INDEX = "model.safetensors.index.json"
SMALL = [INDEX, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def content(commit, name):
    """A file's bytes: those of a shard are 200 kB that look random."""
    if name == INDEX:
        return ('{"weight_map": {%s}}' % ", ".join(
            f'"model.layers.{i}.{w}": "{s}"' for i, s in enumerate(SHARDS) for w in "ab")).encode()
    if name in SMALL:
        return f'{{"{name}": "{commit}"}}'.encode()
    block = hashlib.sha256(f"{commit} {name}".encode()).digest()
    return b"".join(hashlib.sha256(block + bytes([i])).digest() for i in range(250)) * 25


class Hub:
    """`faults` has what happens next to a file: a status, or how the bytes are spoiled."""

    def __init__(self):
        self.faults, self.requests = {}, []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):  # whoever leaves in the middle is no error
                pass

        self.front, self.store = (Server(("127.0.0.1", 0), Handler) for _ in range(2))
        for server in (self.front, self.store):
            threading.Thread(target=server.serve_forever, daemon=True).start()

    def answer(self, to):
        front = to.server is self.front
        repo, commit, name = to.path[1:].replace("/resolve/", "/").rsplit("/", 2)
        self.requests.append(("front" if front else "store", to.command, name,
                              to.headers.get("Range"), to.headers.get("Authorization")))
        large, data = name in SHARDS, content(commit, name)
        queue = self.faults.get(name, [])
        # A status is the answer to HEAD. What is else befalls the bytes, wherever they come from.
        if queue and isinstance(queue[0], int):
            mine = to.command == "HEAD"
        else:
            mine = queue and to.command == "GET" and front != large
        fault = queue.pop(0) if mine else None
        if repo != REPO or isinstance(fault, int):
            return self.send(to, fault or 404, b"no")
        if not (front and large):
            return self.send_bytes(to, data, fault)
        to.send_response(302)
        to.send_header("Location", f"http://127.0.0.1:{self.store.server_port}{to.path}")
        to.send_header("X-Linked-Size", str(len(data)))
        to.send_header("X-Linked-ETag", '"%s"' % hashlib.sha256(data).hexdigest())
        to.send_header("Content-Length", "0")
        to.end_headers()

    def send(self, to, status, data, *headers, length=None):
        to.send_response(status)
        to.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in headers:
            to.send_header(name, value)
        to.end_headers()
        if to.command != "HEAD":
            to.wfile.write(data)

    def send_bytes(self, to, data, fault):
        if fault == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "short":
            data = data[:1000]
        start, range_ = 0, to.headers.get("Range")
        if range_ and fault != "norange":
            start = int(range_[len("bytes="):].rstrip("-"))
            if start >= len(data):
                return self.send(to, 416, b"")
        part = data[start:]
        status = 206 if start else 200
        about = [("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")] if start else []
        if fault not in ("cut", "stall"):
            return self.send(to, status, part, *about)
        self.send(to, status, part[:len(part) // 2], *about, length=len(part))
        to.close_connection = True
        if fault == "stall":  # until curl is gone
            to.wfile.flush()
            to.connection.settimeout(30)
            to.connection.recv(1)


class Fetch:
    """The script in a folder of its own, with the manifest's variables and this hub."""

    def __init__(self, hub):
        self.hub, self.home = hub, tempfile.mkdtemp()
        self.dir, self.stage = f"{self.home}/ssd/model", f"{self.home}/gcs/model"
        self.script, self.pauses = f"{self.home}/fetch.sh", f"{self.home}/pauses"
        text = open("k8s/fetch.yaml").read().split("  fetch.sh: |\n")[1]
        with open(self.script, "w") as f:
            f.writelines(line[4:] or "\n" for line in text.splitlines(keepends=True))
        os.makedirs(f"{self.home}/bin")
        with open(f"{self.home}/bin/sleep", "w") as f:
            f.write(f"#!/bin/sh\necho $1 >>{self.pauses}\nexec /bin/sleep 0.05\n")
        os.chmod(f"{self.home}/bin/sleep", 0o755)

    def start(self, *before, **env):
        env = {"PATH": f"{self.home}/bin:{os.environ['PATH']}", "MODEL_REPO": REPO,
               "MODEL_REVISION": COMMIT, "MODEL_DIR": self.dir, "MODEL_STAGE": self.stage,
               "FETCH_JOBS": "4", "HF_TOKEN": TOKEN,
               "HF_ENDPOINT": f"http://127.0.0.1:{self.hub.front.server_port}", **env}
        self.log = open(f"{self.home}/log", "w+")
        self.process = subprocess.Popen([*before, "bash", self.script], stdout=self.log,
                                        stderr=subprocess.STDOUT, start_new_session=True, env=env)

    def survivors(self):
        """The processes of its session: the script's, and all that it has started."""
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                # After the name in brackets: state, parent, group, session.
                state, _, _, session = open(f"/proc/{pid}/stat").read().rsplit(")",
                                                                               1)[1].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(pid))
        return found

    def end(self, seconds):
        """Its exit status, None if it had to be killed; what it said. Leaves no process behind."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        for pid in self.survivors():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.seek(0)
        with self.log:
            return status, self.log.read()[-5000:]

    def run(self, **env):
        self.start(**env)
        return self.end(60)

    def write(self, name, data, folder=None):
        os.makedirs(folder or self.dir, exist_ok=True)
        with open(f"{folder or self.dir}/{name}", "wb") as f:
            f.write(data)

    def read(self, name):
        try:
            with open(f"{self.dir}/{name}", "rb") as f:
                return f.read()
        except OSError:
            return None

    def check_whole(self, what, commit=COMMIT, but=()):
        wrong = [n for n in SMALL + SHARDS if n not in but and self.read(n) != content(commit, n)]
        check(not wrong, f"{what}: {wrong} are missing or wrong")
        check(
            self.read(".complete") == f"{REPO}@{commit}\n".encode(),
            f"{what}: .complete has {self.read('.complete')}")
        strangers = set(os.listdir(
            self.dir)) - {*SMALL, *SHARDS, ".complete", ".source", "chat.jinja"}
        check(not strangers, f"{what}: {strangers} are left")

    def remove(self):
        shutil.rmtree(self.home)


def check_bad_day():
    """All that can go wrong with a file, at once; in the end all is right."""
    hub = Hub()
    f = Fetch(hub)
    whole = [content(COMMIT, s) for s in SHARDS]
    f.write(SHARDS[4] + ".part", whole[4])                       # complete, but for its name
    f.write(SHARDS[5] + ".part", whole[5] + b"and more")
    f.write(SHARDS[6] + ".part", b"\0" * 50000)                  # not how this file begins
    f.write(SHARDS[7] + ".part", whole[7][:70000])
    hub.faults = {
        SHARDS[0]: ["cut", "cut"],
        SHARDS[1]: [429, 429, 503],
        SHARDS[2]: ["wrong"],
        SHARDS[3]: ["short"],
        SHARDS[7]: ["norange"],
        INDEX: ["cut"],
        "config.json": [503, 404],
        "tokenizer.json": ["cut", 500]
    }
    status, said = f.run()
    check(status == 0, f"a bad day: exit status {status}: {said}")
    f.check_whole("a bad day")
    left = {name: q for name, q in hub.faults.items() if q}
    check(not left, f"these faults did not happen: {left}")

    def asked(name, where="store", method="GET"):
        return [range_ for w, m, n, range_, _ in hub.requests if (w, m, n) == (where, method, name)]

    half = len(whole[0]) // 2
    quarters = f"bytes={half}-", f"bytes={half + (len(whole[0]) - half) // 2}-"
    check(asked(SHARDS[0]) == [None, *quarters], f"cut twice: asked for {asked(SHARDS[0])}")
    check(len(asked(SHARDS[1], "front", "HEAD")) == 4, "429 and 503 are not asked again")
    check(asked(SHARDS[2]) == [None, None], f"a wrong sha256: asked for {asked(SHARDS[2])}")
    check(asked(SHARDS[3]) == [None, None], f"a wrong size: asked for {asked(SHARDS[3])}")
    check(asked(SHARDS[4]) == [], f"a whole part: asked for {asked(SHARDS[4])}")
    check(asked(SHARDS[5]) == [None], f"an oversized part: asked for {asked(SHARDS[5])}")
    check(
        asked(SHARDS[6]) == ["bytes=50000-", None], f"a foreign part: asked for {asked(SHARDS[6])}")
    check(asked(SHARDS[7]) == ["bytes=70000-", None], f"no ranges: asked for {asked(SHARDS[7])}")
    tokens = {(w, a) for w, _, _, _, a in hub.requests}
    check(tokens == {("front", f"Bearer {TOKEN}"), ("store", None)}, f"who saw the token: {tokens}")
    for words in ("error: 429", "error: 503", "error: 404", "trying again in 15 s",
                  "got 1000 bytes, want 200000", f"{SHARDS[2]}: its sha256 is not",
                  "files are whole, ", f"{SHARDS[7]} is whole"):
        check(words in said, f"the log lacks {words!r}: {said}")
    pauses = set(open(f.pauses).read().split())
    check(pauses == {"5", "10", "15", "30"}, f"pauses: {pauses}")
    last = max(os.stat(f"{f.dir}/{n}").st_mtime_ns for n in SMALL + SHARDS)
    check(os.stat(f"{f.dir}/.complete").st_mtime_ns >= last, ".complete is older than a file")

    hub.requests.clear()
    status, said = f.run()
    check(status == 0 and not hub.requests, f"all there: {status}, {hub.requests}")
    # Another commit: nothing of the first may stay.
    status, said = f.run(MODEL_REVISION=OTHER)
    check(status == 0 and "deleting" in said, f"another commit: {status}: {said}")
    f.check_whole("another commit", OTHER)
    f.remove()


def check_stage():
    """A copy in the bucket is taken if it says that it is whole and of the same commit."""
    hub = Hub()
    f = Fetch(hub)
    for name in SMALL + SHARDS:
        f.write(name, content(COMMIT, name), f.stage)
    f.write(".complete", f"{REPO}@{COMMIT}\n".encode(), f.stage)
    status, said = f.run()
    check(status == 0 and not hub.requests, f"a stage: {status}, {hub.requests}: {said}")
    f.check_whole("a stage")
    shutil.rmtree(f.dir)
    os.unlink(f"{f.stage}/{SHARDS[3]}")  # it isn't whole, for all that it says
    status, said = f.run()
    check({n
           for _, _, n, _, _ in hub.requests} == {SHARDS[3]},
          f"a stage with a hole: {hub.requests}")
    f.check_whole("a stage with a hole")
    for mark in (f"{REPO}@{OTHER}\n", ""):
        shutil.rmtree(f.dir)
        f.write(".complete", mark.encode(), f.stage)
        f.write("config.json", b"foreign", f.stage)
        status, said = f.run(HF_TOKEN="")
        check(status == 0, f"a stage that says {mark!r}: {status}: {said}")
        f.check_whole(f"a stage that says {mark!r}")
    check({a for _, _, _, _, a in hub.requests[-5:]} == {None}, "without a token none is sent")
    f.remove()


def check_brought():
    """Files that a user brought stay as they are; what is missing comes from the hub."""
    hub = Hub()
    f = Fetch(hub)
    for name in (INDEX, *SHARDS[:3]):
        f.write(name, content(COMMIT, name))
    f.write("config.json", b"edited by hand")
    f.write("chat.jinja", b"a file that no hub has")
    status, said = f.run()
    check(status == 0, f"brought files: {status}: {said}")
    f.check_whole("brought files", but=["config.json"])
    check(
        f.read("config.json") == b"edited by hand" and f.read("chat.jinja"),
        "a brought file has changed")
    names = {n for _, _, n, _, _ in hub.requests}
    check(names == {*SMALL[2:], *SHARDS[3:]}, f"brought files: asked for {names}")
    f.remove()


def check_signal(*before):
    """SIGTERM in the middle of a download: it ends at once, and later goes on where it was."""
    hub = Hub()
    f = Fetch(hub)
    hub.faults = {SHARDS[0]: ["stall"]}
    f.start(*before, FETCH_JOBS="1")
    part, end = SHARDS[0] + ".part", time.monotonic() + 20
    while len(f.read(part) or b"") < 50000 and time.monotonic() < end:
        time.sleep(0.02)
    begin, pid = time.monotonic(), f.process.pid
    if before:  # the script is unshare's child
        pid = int(open(f"/proc/{pid}/task/{pid}/children").read())
    os.kill(pid, signal.SIGTERM)
    while f.survivors() and time.monotonic() < begin + 5:
        time.sleep(0.02)
    took = time.monotonic() - begin
    check(took < 2, f"SIGTERM {before}: after {took:.1f} s {len(f.survivors())} processes run on")
    status, said = f.end(1)
    check(status == 143, f"SIGTERM {before}: {status}: {said}")
    check(f.read(".complete") is None, f"SIGTERM {before}: .complete is there")
    size = len(f.read(part) or b"")
    hub.requests.clear()
    status, said = f.run()
    check(status == 0, f"after SIGTERM: {status}: {said}")
    f.check_whole("after SIGTERM")
    ranges = [r for w, _, n, r, _ in hub.requests if w == "store" and n == SHARDS[0]]
    check(size >= 50000 and ranges == [f"bytes={size}-"], f"after SIGTERM: asked for {ranges}")
    f.remove()


check_bad_day()
check_stage()
check_brought()
check_signal()
# As process 1, as in a container; root alone may try that here.
unshare = ["unshare", "--fork", "--pid"]
if shutil.which("unshare") and subprocess.run([*unshare, "true"],
                                              capture_output=True).returncode == 0:
    check_signal(*unshare)
else:
    counts["skipped"] += 1
    print("skipped: fetch.sh as process 1: it needs unshare, and root")
finish()
