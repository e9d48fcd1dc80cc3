"""tests/test_group.py: k8s/r1.yaml's group as two processes on one machine. Run by `make test`.

Needs what test_k8s.py needs, and an r1 that takes --tp 2; it skips, saying so, without. Command
line and environment are the manifest's, with LeaderWorkerSet's variables. Only the model, --tp (16
becomes 2) and what must be free on one machine are replaced. So this tests what r1 promises to a
cluster (/health, SIGTERM, the end of a group that has lost a node), and that the manifest asks for
it.
"""
import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time

from test_k8s import (LWS_ENV, R1, argv_of, check, config_maps, environment, finish, parse, sent,
                      skip)


def free_ports(n):
    """So many ports that nobody has."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Group:
    """r1's container of k8s/r1.yaml, started for each node as its kubelet would start it."""

    def __init__(self):
        objects = [o for text in sent("k8s").values() for o in parse(text)]
        lws = next(o for o in objects if o["kind"] == "LeaderWorkerSet")
        template = lws["spec"]["leaderWorkerTemplate"]["workerTemplate"]
        self.container, self.maps = template["spec"]["containers"][0], config_maps(objects)
        *self.ports, self.meeting = free_ports(3)
        self.nodes, self.logs = {}, {}

    def argv(self, rank):
        env = environment(self.container, self.maps, {**LWS_ENV, "LWS_WORKER_INDEX": str(rank)})
        argv = [R1, *argv_of(self.container, env)[1:]]
        at = argv.index("--dist-init-addr") + 1
        argv[at] = argv[at].replace(":6002", f":{self.meeting}")
        for flag, value in (("--model-path", "tiny-r1"), ("--tp", "2"), ("--host", "127.0.0.1"),
                            ("--port", str(self.ports[rank]))):
            argv[argv.index(flag) + 1] = value
        return argv, env

    def start(self, rank):
        self.launch(rank, *self.argv(rank))

    def launch(self, rank, argv, env):
        self.logs[rank] = tempfile.TemporaryFile("w+")
        self.nodes[rank] = subprocess.Popen(argv, env={**os.environ, **env},
                                            stderr=self.logs[rank], start_new_session=True)

    def log(self, rank):
        self.logs[rank].seek(0)
        return self.logs[rank].read()

    def health(self, rank):
        """/health's status, or 0 where nobody listens."""
        try:
            c = http.client.HTTPConnection("127.0.0.1", self.ports[rank], timeout=5)
            c.request("GET", "/health")
            return c.getresponse().status
        except OSError:
            return 0
        finally:
            c.close()

    def until(self, status, rank, seconds):
        """Whether /health has this status in time; and all that was seen before."""
        seen, end = set(), time.monotonic() + seconds
        while time.monotonic() < end and self.nodes[rank].poll() is None:
            now = self.health(rank)
            if now == status:
                return True, seen
            seen.add(now)
            time.sleep(0.02)
        return False, seen

    def chat(self, rank=0, **more):
        """Status and text of an answer; a stream's whole text, its events not parsed."""
        c = http.client.HTTPConnection("127.0.0.1", self.ports[rank], timeout=120)
        question = {"role": "user", "content": "How many r are there in strawberry ?"}
        body = json.dumps({"messages": [question], "temperature": 0, **more})
        c.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = c.getresponse()
        try:
            return answer.status, answer.read().decode()
        except (http.client.IncompleteRead, ConnectionError) as error:
            return answer.status, getattr(error, "partial", b"").decode()
        finally:
            c.close()

    def status(self, rank, seconds):
        """The exit status, or None where the process still runs."""
        try:
            return self.nodes[rank].wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self):
        for process in self.nodes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
        for log in self.logs.values():
            log.close()


def check_drain(group, pool):
    """The worker first, the leader later; a chat; and SIGTERM to both in the middle of a stream."""
    group.start(1)
    ok, seen = group.until(503, 1, 30)
    check(ok and seen <= {0}, f"the worker's health before the leader is there: {seen}")
    time.sleep(5)
    check(group.nodes[1].poll() is None and group.health(1) == 503,
          f"the worker doesn't wait: {group.log(1)}")
    group.start(0)
    for rank in (0, 1):
        ok, seen = group.until(200, rank, 60)
        if not check(ok and seen <= {0, 503},
                     f"rank {rank} isn't ready: {seen}\n{group.log(0)}{group.log(1)}"):
            return
    status, text = group.chat()
    check(status == 200 and "**3** times" in text and '"finish_reason":"stop"' in text,
          f"chat: {status} {text}")
    check(group.chat(1)[0] == 503, "the worker takes a chat")
    stream = pool.submit(group.chat, stream=True, max_tokens=1500, ignore_eos=True)
    time.sleep(0.3)
    check(not stream.done(), "the stream was over before the signal came")
    for rank in (1, 0):
        group.nodes[rank].send_signal(signal.SIGTERM)
    status, text = stream.result()
    check(status == 200 and text.rstrip().endswith("data: [DONE]") and '"error"' not in text,
          f"the stream ends: {text[-300:]}")
    for rank in (0, 1):
        status = group.status(rank, 30)
        check(status == 0, f"rank {rank} ends with {status} after SIGTERM: {group.log(rank)}")


def check_loss(group, lost, pool):
    """The leader first, so that its 503 lasts; then one is killed, and the other must end, too."""
    group.start(0)
    ok, seen = group.until(503, 0, 30)
    time.sleep(1)
    check(ok and seen <= {0} and group.health(0) == 503,
          f"the leader's health before the worker is there: {seen}")
    group.start(1)
    for rank in (0, 1):
        if not check(group.until(200, rank, 60)[0],
                     f"rank {rank} isn't ready: {group.log(0)}{group.log(1)}"):
            return
    stream = pool.submit(group.chat, stream=True, max_tokens=100000, ignore_eos=True)
    time.sleep(0.3)
    check(not stream.done(), "the stream was over before the kill")
    group.nodes[lost].kill()
    status = group.status(1 - lost, 15)
    check(status is not None and status > 0,
          f"rank {lost} was killed, the other ends with {status}: {group.log(1 - lost)}")
    group.end()
    text = stream.result()[1]
    check(lost == 1 or "[DONE]" not in text, "a stream that was cut looks whole")
    check(lost == 0 or '"error"' in text, f"the leader doesn't tell the stream: {text[-300:]}")


def check_tiny(group):
    """tiny.yaml's container, which is one process on any machine."""
    deployment = parse(sent("k8s/tiny")["tiny.yaml"])[0]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    argv = [R1, *argv_of(container, environment(container, {}))[1:], "--model-path", "tiny-r1"]
    argv[argv.index("--host") + 1] = "127.0.0.1"
    argv[argv.index("--port") + 1] = str(group.ports[0])
    group.launch(0, argv, {})
    if not check(group.until(200, 0, 60)[0], f"tiny.yaml: not ready: {group.log(0)}"):
        return
    status, text = group.chat()
    check(status == 200 and "**3** times" in text, f"tiny.yaml: {status} {text}")
    group.nodes[0].terminate()
    status = group.status(0, 30)
    check(status == 0, f"tiny.yaml: ends with {status} after SIGTERM: {group.log(0)}")


def main():
    tiny = Group()
    try:
        check_tiny(tiny)
    finally:
        tiny.end()
    if os.path.basename(os.path.dirname(R1)) == "cuda":
        skip("two nodes on one machine: this build wants a GPU for each rank")
        finish()
    first = Group()
    first.start(0)
    first.until(503, 0, 30)  # or it has ended before
    status, log = first.nodes[0].poll(), first.log(0)
    first.end()
    if status == 2 and "--tp" in log:
        skip(f"the group as two processes, since r1 refuses --tp 2: {log.strip()}")
        finish()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for run in (check_drain, lambda g, p: check_loss(g, 1, p),
                    lambda g, p: check_loss(g, 0, p)):
            group = Group()
            try:
                run(group, pool)
            finally:
                group.end()
    finish()


main()
