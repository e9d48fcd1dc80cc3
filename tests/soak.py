#!/usr/bin/env python3
"""tests/soak.py: r1 under load, for minutes. Run by `make soak`; needs Python 3.8 and nothing else.

It starts ./r1 serve with tiny-r1 and asks of it what a bad day would: 1,100 connections at once,
clients that vanish, one that does not read, 10,000 random requests of which many are cancelled, and
signals. After each part no page of the cache may be held and no request be left; in the end the
process may not have grown. Prints `N passed, N failed, N skipped`.

usage: soak.py [--requests N] [--program ./r1]
"""
import argparse
import asyncio
import json
import random
import re
import signal
import sys
import time

PROMPT = "How many r are there in strawberry ?"
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(("  ok      " if ok else "  FAILED  ") + what, flush=True)


class Server:
    """The program, and the few requests that look at it from outside."""

    async def start(self, program, *flags):
        self.process = await asyncio.create_subprocess_exec(
            program, "serve", "--host", "127.0.0.1", "--port", "0", "--model-path", "tiny-r1",
            "--log-level", "warning", *flags, stderr=asyncio.subprocess.PIPE, limit=1 << 20)
        self.port = None
        while line := (await self.process.stderr.readline()).decode():
            found = re.search(r"running on http://127.0.0.1:(\d+)", line)
            if found:
                self.port = int(found.group(1))
            if "ready to roll" in line:
                self.log = asyncio.ensure_future(self.process.stderr.read())
                return self
        sys.exit("the server did not start")

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    async def get(self, path):
        reader, writer = await self.connect()
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return json.loads(answer.split(b"\r\n\r\n", 1)[1])

    async def state(self):
        """Sequences that run and wait, and tokens of the cache that they hold."""
        s = (await self.get("/get_server_info"))["internal_states"][0]
        return s["num_running_reqs"], s["num_queue_reqs"], s["num_used_tokens"]

    async def settled(self, seconds=10.0):
        """Waits until nothing runs; how long that took, or None."""
        begin = time.time()
        while time.time() - begin < seconds:
            if await self.state() == (0, 0, 0):
                return time.time() - begin
            await asyncio.sleep(0.01)
        return None

    def memory(self):
        """Resident bytes that no file backs."""
        text = open(f"/proc/{self.process.pid}/status").read()
        return int(re.search(r"RssAnon:\s+(\d+)", text).group(1)) * 1024


def post(path, body):
    data = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: r1\r\nContent-Length: {len(data)}\r\n"
            "Connection: close\r\n\r\n").encode() + data


def chat(**more):
    return post("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], **more})


async def ask(server, request):
    """Sends one request on a connection of its own; the whole answer."""
    reader, writer = await server.connect()
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def crowd(server):
    print("1,100 connections at once")
    requests = [chat(temperature=0, max_tokens=20, stream=i % 2 == 0) for i in range(1100)]
    answers = await asyncio.gather(*(ask(server, r) for r in requests))
    ok = [b" 200 OK" in a and (b"[DONE]" in a if i % 2 == 0 else b'"usage"' in a)
          for i, a in enumerate(answers)]
    check(all(ok), f"{sum(ok)} of 1100 were answered")
    check(await server.settled() is not None, "nothing is held afterwards")


async def vanish(server):
    print("64 clients vanish in the middle of their streams")
    conns = []
    for i in range(64):
        reader, writer = await server.connect()
        writer.write(chat(max_tokens=15000, ignore_eos=True, stream=True))
        conns.append((reader, writer))
    for reader, _ in conns:
        await reader.readuntil(b'"content":"<think>')
    running, _, used = await server.state()
    check(running == 64 and used >= 64 * 64, f"{running} run and hold {used} tokens")
    before = (await server.get("/health"))["steps"]
    for _, writer in conns:
        writer.transport.abort()
    took = await server.settled()
    steps = (await server.get("/health"))["steps"] - before
    check(took is not None, f"all pages are free {took} s and {steps} steps later")


async def slow_reader(server):
    print("a client that does not read")
    request = chat(max_tokens=3000, ignore_eos=True, temperature=1, stream=True, logprobs=True,
                   top_logprobs=20)
    begin = time.time()
    await ask(server, chat(temperature=0, stream=True))
    alone = time.time() - begin
    reader, writer = await server.connect()
    writer.transport.pause_reading()
    writer.write(request)
    await asyncio.sleep(0.2)
    begin = time.time()
    answer = await ask(server, chat(temperature=0, stream=True))
    beside = time.time() - begin
    check(b"[DONE]" in answer, f"another stream: {beside:.2f} s beside it, {alone:.2f} alone")
    writer.transport.resume_reading()
    answer = await reader.read()
    check(answer.count(b'"token":') > 3000 and answer.endswith(b"0\r\n\r\n"),
          "when it reads at last, nothing is lost")
    writer.close()


def random_request(rng):
    """Some request: any endpoint, any length, a few of them wrong."""
    sampling = {"temperature": rng.choice([0, 0.6, 1, 2]), "top_p": rng.choice([0.5, 0.95, 1]),
                "seed": rng.randrange(1 << 40)}
    n, length = rng.choice([1, 1, 1, 1, 3]), rng.choice([0, 1, 5, 20, 20, 60])
    words = " ".join(rng.choice(["count", "the", "r", "in", "berry", "9.11"]) for _ in range(
        rng.choice([1, 5, 5, 30])))
    text = rng.choice(["", "", "You are helpful. " * rng.choice([1, 4, 20])]) + words
    kind = rng.randrange(10)
    if kind < 4:
        return post("/v1/chat/completions", {
            "messages": [{"role": "user", "content": text}], "max_tokens": length, "n": n,
            "stream": rng.random() < 0.5, "logprobs": rng.random() < 0.2, **sampling})
    if kind < 6:
        return post("/v1/completions", {
            "prompt": [text, words], "max_tokens": length, "n": n, "stream": rng.random() < 0.5,
            "echo": rng.random() < 0.3, "logprobs": rng.choice([None, 2]), **sampling})
    if kind < 9:
        return post("/generate", {
            "text": text, "stream": rng.random() < 0.5, "return_logprob": rng.random() < 0.3,
            "logprob_start_len": rng.choice([-1, 0]),
            "sampling_params": {"max_new_tokens": length, "n": n, **sampling}})
    return post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}],
                                         "top_p": 7})


async def storm(server, count, rng):
    print(f"{count} random requests, a third of them cut off")
    left, seen = iter(range(count)), {"done": 0, "cut": 0, "refused": 0, "bad": 0}

    async def client():
        for _ in left:
            reader, writer = await server.connect()
            writer.write(random_request(rng))
            try:
                if rng.random() < 0.33:
                    await asyncio.wait_for(reader.read(rng.choice([1, 300])), rng.random() * 0.2)
                    writer.transport.abort()
                    seen["cut"] += 1
                    continue
                answer = await reader.read()
                kind = "done" if b" 200 OK" in answer[:20] else "refused"
                seen[kind if b" 200 " in answer[:20] or b" 400 " in answer[:20] else "bad"] += 1
            except asyncio.TimeoutError:
                writer.transport.abort()
                seen["cut"] += 1
            finally:
                writer.close()

    await asyncio.gather(*(client() for _ in range(64)))
    check(seen["bad"] == 0 and sum(seen.values()) == count, f"{seen}")
    check(await server.settled() is not None, "nothing is held afterwards")


async def drains(program):
    print("signals")
    server = await Server().start(program)
    long = chat(max_tokens=2000, ignore_eos=True, stream=True)
    streams = [asyncio.ensure_future(ask(server, long)) for _ in range(8)]
    while (await server.state())[0] < 8:
        await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    answers = await asyncio.gather(*streams)
    code = await asyncio.wait_for(server.process.wait(), 60)
    check(all(b"[DONE]" in a for a in answers) and code == 0,
          f"SIGTERM: all 8 streams end as they should, exit code {code}")
    server = await Server().start(program)
    streams = [asyncio.ensure_future(ask(server, chat(max_tokens=15000, ignore_eos=True)))
               for _ in range(8)]
    while (await server.state())[0] < 8:
        await asyncio.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    begin = time.time()
    server.process.send_signal(signal.SIGTERM)
    code = await asyncio.wait_for(server.process.wait(), 60)
    check(code == 130 and time.time() - begin < 3,
          f"a second one: exit code {code} after {time.time() - begin:.2f} s")
    await asyncio.gather(*streams, return_exceptions=True)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--program", default="./r1")
    args = parser.parse_args()
    rng = random.Random(1)
    # A cache that is soon full: what grows after the first storm is lost memory.
    server = await Server().start(args.program, "--max-total-tokens", "40000",
                                  "--context-length", "20000")
    await crowd(server)
    await vanish(server)
    await slow_reader(server)
    await storm(server, args.requests // 5, rng)
    before = server.memory()
    await storm(server, args.requests, rng)
    growth = (server.memory() - before) / 1e6
    check(growth < 8, f"{server.memory() / 1e6:.1f} MB of memory, {growth:+.1f} in the last storm")
    server.process.send_signal(signal.SIGTERM)
    code = await server.process.wait()
    check(code == 0, f"exit code {code}")
    await drains(args.program)
    print(f"{passed} passed, {failed} failed, 0 skipped")
    sys.exit(failed != 0)


asyncio.run(main())
