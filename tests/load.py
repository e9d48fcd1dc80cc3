#!/usr/bin/env python3
"""A checkpoint in R1's sizes, cut short, to time loading with.

    tests/load.py write DIR    7.3 GB: three layers, 64 of R1's 256 experts, random bytes
    tests/load.py read DIR     reads its files with O_DIRECT, 16 threads, 8 MB each: the ceiling
"""
import json
import mmap
import os
import sys
import threading
import time

import numpy as np

HIDDEN, Q_LORA, HEADS, EXPERTS, VOCAB = 7168, 1536, 128, 64, 16384
PIECE, THREADS = 8 << 20, 16


def tensors():
    """(name, dtype, shape) in the order of the files, which end before each layer."""
    def quantised(name, rows, columns):
        yield name + ".weight", "F8_E4M3", [rows, columns]
        yield name + ".weight_scale_inv", "F32", [-(-rows // 128), columns // 128]

    def mlp(prefix, width):
        yield from quantised(prefix + "gate_proj", width, HIDDEN)
        yield from quantised(prefix + "up_proj", width, HIDDEN)
        yield from quantised(prefix + "down_proj", HIDDEN, width)

    yield "model.embed_tokens.weight", "BF16", [VOCAB, HIDDEN]
    for layer in range(3):
        prefix = f"model.layers.{layer}."
        attention = prefix + "self_attn."
        yield prefix + "input_layernorm.weight", "BF16", [HIDDEN]
        yield from quantised(attention + "q_a_proj", Q_LORA, HIDDEN)
        yield attention + "q_a_layernorm.weight", "BF16", [Q_LORA]
        yield from quantised(attention + "q_b_proj", HEADS * 192, Q_LORA)
        yield from quantised(attention + "kv_a_proj_with_mqa", 576, HIDDEN)
        yield attention + "kv_a_layernorm.weight", "BF16", [512]
        yield from quantised(attention + "kv_b_proj", HEADS * 256, 512)
        yield from quantised(attention + "o_proj", HIDDEN, HEADS * 128)
        yield prefix + "post_attention_layernorm.weight", "BF16", [HIDDEN]
        if layer == 0:
            yield from mlp(prefix + "mlp.", 18432)
            continue
        yield prefix + "mlp.gate.weight", "BF16", [EXPERTS, HIDDEN]
        yield prefix + "mlp.gate.e_score_correction_bias", "F32", [EXPERTS]
        for expert in range(EXPERTS):
            yield from mlp(f"{prefix}mlp.experts.{expert}.", 2048)
        yield from mlp(prefix + "mlp.shared_experts.", 2048)
    yield "model.norm.weight", "BF16", [HIDDEN]
    yield "lm_head.weight", "BF16", [VOCAB, HIDDEN]


def random_bytes(dtype):
    """64 MB and a bit: e4m3 without its NaN codes, small numbers of the others."""
    rng, n = np.random.default_rng(1), (64 << 20) + 4096
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 256, n, np.uint8)
        codes[codes & 0x7f == 0x7f] = 0
        return codes.tobytes()
    values = rng.normal(0, 0.02, n // 4).astype(np.float32)
    if dtype == "F32":
        return (np.abs(values) / 1000).tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes() * 2


def write(directory):
    os.makedirs(directory, exist_ok=True)
    with open("tiny-r1/config.json") as f:
        config = json.load(f)
    config |= {
        "hidden_size": HIDDEN, "q_lora_rank": Q_LORA, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "n_routed_experts": EXPERTS, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "vocab_size": VOCAB, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 3, "num_nextn_predict_layers": 0}
    with open(f"{directory}/config.json", "w") as f:
        json.dump(config, f)
    data = {dtype: memoryview(random_bytes(dtype)) for dtype in ("F8_E4M3", "BF16", "F32")}
    files, turn = [[]], 0
    for tensor in tensors():
        if tensor[0].endswith("input_layernorm.weight"):
            files.append([])
        files[-1].append(tensor)
    index = {}
    for i, file in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):06d}.safetensors"
        header, at = {}, 0
        for tensor, dtype, shape in file:
            size = int(np.prod(shape)) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            index[tensor] = name
            at += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(f"{directory}/{name}", "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for tensor in header.values():
                left = tensor["data_offsets"][1] - tensor["data_offsets"][0]
                while left:
                    turn = (turn + 4) % 4096
                    n = min(left, 64 << 20)
                    f.write(data[tensor["dtype"]][turn:turn + n])
                    left -= n
            f.flush()
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(f"{directory}/model.safetensors.index.json", "w") as f:
        json.dump({"metadata": {}, "weight_map": index}, f)


def read(directory):
    names = [f"{directory}/{n}" for n in sorted(os.listdir(directory)) if n.endswith("tensors")]
    fds = [os.open(n, os.O_RDONLY | os.O_DIRECT) for n in names]
    sizes = [os.fstat(fd).st_size for fd in fds]
    jobs = iter([(fd, at) for fd, size in zip(fds, sizes) for at in range(0, size, PIECE)])
    lock = threading.Lock()

    def reader():
        buffer = mmap.mmap(-1, PIECE)
        while True:
            with lock:
                job = next(jobs, None)
            if job is None:
                return
            os.preadv(job[0], [buffer], job[1])

    threads = [threading.Thread(target=reader) for _ in range(THREADS)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    print(f"read {sum(sizes) / 1e9:.2f} GB in {seconds:.2f} s, {sum(sizes) / 1e9 / seconds:.2f} GB/s")


{"write": write, "read": read}[sys.argv[1]](sys.argv[2])
