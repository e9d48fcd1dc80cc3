"""Asks a running r1 the evaluation conversations of tiny-r1 and counts exact answers per task.

    python3 tests/accuracy.py [--seed 999] [--per-task 200] [--server ./r1]

Starts `./r1 serve` on a free port, sends every conversation of `tiny-r1/data.py eval` greedily
through /v1/chat/completions, and prints for each task how many answers were right (the text behind
</think>) and how many were the expected text to the letter, reasoning included. Exit 1 below 99 %
right.
"""
import argparse
import collections
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import urllib.request

HERE = os.path.dirname(os.path.abspath(__file__))
BAR = 0.99


def start(binary):
    """The server's process and its address, once it is ready."""
    process = subprocess.Popen([binary, "serve", "--host", "127.0.0.1", "--port", "0"],
                               stderr=subprocess.PIPE, text=True)
    address = None
    for line in process.stderr:
        found = re.search(r"running on (http://\S+)", line)
        address = found.group(1) if found else address
        if "ready to roll" in line:
            return process, address
    sys.exit("the server did not start")


def ask(address, conversation):
    body = {"model": "default", "messages": conversation["messages"], "temperature": 0,
            "max_tokens": 2048}
    request = urllib.request.Request(address + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", default="999")
    parser.add_argument("--per-task", default="200")
    parser.add_argument("--server", default=os.path.join(HERE, "..", "r1"))
    parser.add_argument("--show", type=int, default=3, help="wrong answers to print")
    options = parser.parse_args()
    data = os.path.join(HERE, "..", "tiny-r1", "data.py")
    command = [sys.executable, data, "eval", "--seed", options.seed, "--per-task", options.per_task]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    conversations = [json.loads(line) for line in text.splitlines()]
    process, address = start(options.server)
    # The log goes on and nobody reads it: a thread keeps the pipe from filling up.
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        pool.submit(process.stderr.read)
        answers = list(pool.map(lambda c: ask(address, c), conversations))
        process.terminate()
    right, exact, total = (collections.Counter() for _ in range(3))
    for conversation, answer in zip(conversations, answers):
        task = conversation["task"]
        want = "<think>\n" + conversation["answer"].removeprefix("<think>\n")
        total[task] += 1
        exact[task] += answer == want
        good = answer.split("</think>")[-1].strip() == conversation["final"].strip()
        right[task] += good
        if not good and options.show > 0:
            options.show -= 1
            print("wrong:", json.dumps(conversation["messages"], ensure_ascii=False), "\n", answer,
                  "\nwanted:", conversation["final"])
    for task in total:
        share = right[task] / total[task]
        print(f"{task:20} right {right[task]:4} of {total[task]} ({share:7.2%}), to the letter"
              f" {exact[task]:4}")
    sys.exit(any(right[task] < BAR * total[task] for task in total))


if __name__ == "__main__":
    main()
