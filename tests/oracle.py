"""The oracle: what another implementation says about the same checkpoint and tokens.

r1's own tests compare its two twins with each other, so an error in the maths that both share would
pass them. This script asks Hugging Face transformers' DeepseekV3ForCausalLM, in float32 on the CPU,
and writes its answers to small files that test_oracle.c reads. It shares no code with r1.

    python3 tests/oracle.py --nasty                  makes the random checkpoint tests/golden/nasty
    python3 tests/oracle.py --model tests/golden/nasty --out tests/golden/nasty.bin
    python3 tests/oracle.py --model tiny-r1 --out tests/golden/tiny-r1.bin      after each training

It needs torch, transformers, safetensors, numpy and, for a checkpoint with a tokenizer, tokenizers.

A golden file holds two sets of answers: set 0 without any activation quantisation, set 1 ("w8a8")
with the inputs of every FP8 linear quantised as r1 does it. Little-endian, nothing is padded:

    char  magic[8]                            "R1GOLD1\\0"
    i32   tokens, wanted, layers, moe_layers, top_k, hidden, vocab, prompt
    i32   ids[tokens]                         `prompt` of them were given, the others are the
                                              oracle's own greedy continuation
    i32   position[wanted]                    positions whose numbers are stored in full, ascending
    then for each of the two sets:
    u8    expert[moe_layers][tokens][top_k]   best choice first
    f32   margin[moe_layers][tokens]          what a choice would have to move by to alter `expert`
    f32   weight[moe_layers][wanted][top_k]
    f32   state[layers][wanted][hidden]       the residual stream after the layer
    f32   logits[wanted][vocab]
"""
import argparse
import json
import math
import os
import struct
import types

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

BLOCK = 128        # side of a weight's scale block, and columns of an activation's scale group
E4M3_MAX = 448.0
AMAX_MIN = 1e-4    # the smallest amax that an activation's scale is made from
LONG = 4170        # tokens where there is no tokenizer: past YaRN's original 4,096
NEAR = 1e-5        # margins below this may be decided otherwise by another order of summing in f32
DTYPES = {"F8_E4M3": (np.uint8, 1), "BF16": (np.uint16, 2), "F32": (np.float32, 4)}


# ---- the checkpoint's formats -------------------------------------------------------------------


def e4m3_table():
    """The value of each byte, by the definition in words: sign, 4 bits of exponent with bias 7, 3
    bits of mantissa, subnormals, no infinities, and NaN where all seven low bits are set."""
    byte = np.arange(256)
    sign, e, m = np.where(byte & 128, -1.0, 1.0), byte >> 3 & 15, byte & 7
    value = sign * np.where(e == 0, m * 2.0**-9, (1 + m / 8) * 2.0 ** (e - 7.0))
    value[[0x7F, 0xFF]] = np.nan
    return value.astype(np.float32)


E4M3 = e4m3_table()


def e4m3_round(x):
    """The nearest e4m3 value, ties to even, saturating: where torch's cast alone gives NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def check_e4m3():
    """torch's idea of e4m3 must be the table's, and its rounding to nearest, ties to even."""
    bytes_ = torch.arange(256, dtype=torch.uint8)
    ours, theirs = torch.from_numpy(E4M3), bytes_.view(torch.float8_e4m3fn).float()
    assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1)) and ours.isnan().sum() == 2
    low, high = ours[0:126], ours[1:127]
    middle = (low + high) / 2
    even = torch.where(bytes_[0:126] % 2 == 0, low, high)
    assert torch.equal(e4m3_round(middle).float(), even)
    assert torch.equal(e4m3_round(torch.nextafter(middle, low)).float(), low)
    assert torch.equal(e4m3_round(torch.nextafter(middle, high)).float(), high)


def bf16_bits(x):
    return torch.from_numpy(np.asarray(x, np.float32)).bfloat16().view(torch.uint16).numpy()


def read_shard(path):
    """name -> (dtype, shape, bytes) of a safetensors file, read by hand."""
    data = open(path, "rb").read()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    tensors = {}
    for name, t in header.items():
        begin, end = (8 + n + o for o in t["data_offsets"])
        assert end - begin == math.prod(t["shape"]) * DTYPES[t["dtype"]][1] and end <= len(data)
        tensors[name] = (t["dtype"], t["shape"], data[begin:end])
    return tensors


def read_checkpoint(directory):
    """name -> f32 tensor, all FP8 weights multiplied by their scales; and the names of those."""
    index = os.path.join(directory, "model.safetensors.index.json")
    names = ["model.safetensors"]
    if os.path.exists(index):
        names = sorted(set(json.load(open(index))["weight_map"].values()))
    raw = {}
    for name in names:
        raw.update(read_shard(os.path.join(directory, name)))
    values, quantised = {}, set()
    for name, (dtype, shape, data) in raw.items():
        if name.endswith("_scale_inv"):
            continue
        a = np.frombuffer(data, DTYPES[dtype][0]).reshape(shape)
        if dtype == "BF16":
            a = (a.astype(np.uint32) << 16).view(np.float32)
        if dtype == "F8_E4M3":
            _, _, scale = raw[name + "_scale_inv"]
            blocks = [-(-side // BLOCK) for side in shape]
            scale = np.frombuffer(scale, np.float32).reshape(blocks)
            scale = scale.repeat(BLOCK, 0)[: shape[0]].repeat(BLOCK, 1)[:, : shape[1]]
            a = E4M3[a] * scale
            quantised.add(name.removesuffix(".weight"))
        values[name] = torch.from_numpy(a.copy())
    return values, quantised


def hashed_ids(n, vocab):
    """n ids from a linear congruential generator (Knuth's MMIX): the upper 31 bits modulo vocab."""
    state, ids = 671, []
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab)
    return ids


# ---- the nasty checkpoint -----------------------------------------------------------------------
#
# R1's attention geometry with small numbers, random, and made to break what a trained model never
# touches. It has two layers, as 3 MB allow: one dense, one MoE of 12 experts in 4 groups.

HIDDEN, HEADS, Q_LORA, EXPERTS, WIDTH, VOCAB = 256, 2, 128, 12, 128, 256

NASTY_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": VOCAB,
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "intermediate_size": 256,
    "moe_intermediate_size": WIDTH, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": Q_LORA,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    "max_position_embeddings": 163840, "tie_word_embeddings": False, "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "bfloat16",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [BLOCK, BLOCK]},
}


def nasty_linear(rng, out, in_, gains):
    """Bytes and scales of a random matrix. Each 128x128 block draws two things: how large its
    weights are, and which part of e4m3's range its bytes use: all of it up to +-448, the middle, or
    nothing but subnormals under a scale that is 2^15 times as large. So a wrong scale, or a
    subnormal read as zero, is a large error, and yet the activations stay of order one."""
    blocks = (-(-out // BLOCK), in_ // BLOCK)
    bytes_ = np.empty((out, in_), np.uint8)
    scales = np.empty(blocks, np.float32)
    for i, j in np.ndindex(blocks):
        rows, cols = slice(i * BLOCK, min((i + 1) * BLOCK, out)), slice(j * BLOCK, (j + 1) * BLOCK)
        w = rng.standard_normal(bytes_[rows, cols].shape).astype(np.float32)
        w *= np.float32(rng.choice(gains) / math.sqrt(in_))
        top = rng.choice([E4M3_MAX, 20.0, 7 * 2.0**-9], p=[0.5, 0.25, 0.25])
        scales[i, j] = np.abs(w).max() / np.float32(top)
        q = e4m3_round(torch.from_numpy(w / scales[i, j]))
        bytes_[rows, cols] = q.view(torch.uint8).numpy()
    return bytes_, scales


def nasty_router(rng):
    """Weight and bias of the router: 4 groups of 3 experts.

    Ties: experts 4 and 5 are the same row and bias, 9 and 10 are copies of 3 and 4; so whole groups
    tie (1 and 3) and experts tie, inside a group and across. All biases are near -1, so that nearly
    all choices are negative: masking the other groups with 0.0 instead of -inf would choose from
    those. And they differ by more than the scores often do, so that they change who is chosen."""
    weight = rng.standard_normal((EXPERTS, HIDDEN)) * 1.5 / math.sqrt(HIDDEN)
    bias = (-1.0 + 0.25 * rng.standard_normal(EXPERTS)).astype(np.float32)
    for copy, original in ((5, 4), (9, 3), (10, 4)):
        weight[copy], bias[copy] = weight[original], bias[original]
    return weight, bias


def nasty_tensors(rng):
    """name -> (dtype, array)"""
    t = {}

    def bf16(name, x):
        t[name + ".weight"] = ("BF16", bf16_bits(x))

    def fp8(name, out, in_):
        # The queries are kept small: with scores of a few units the softmax stays soft. A sharp one
        # magnifies each rounding until the numbers say nothing about it any more.
        gains = (0.2, 0.4, 0.6) if name.endswith("q_b_proj") else (0.5, 1.0, 1.5)
        bytes_, scales = nasty_linear(rng, out, in_, gains)
        if name.endswith("kv_a_proj_with_mqa"):
            # The fifth row of scales covers 64 rows only, the k_pe part. It gets other magnitudes
            # than the fourth, so that they can't be confused; k_pe is not normed, so it reaches
            # the scores.
            scales[4] *= np.float32(2.0)
        t[name + ".weight"] = ("F8_E4M3", bytes_)
        t[name + ".weight_scale_inv"] = ("F32", scales)

    def mlp(name, width):
        fp8(name + ".gate_proj", width, HIDDEN)
        fp8(name + ".up_proj", width, HIDDEN)
        fp8(name + ".down_proj", HIDDEN, width)

    # Two tokens, both at positions whose logits are compared: one is all zero, and one is so small
    # that the norm's epsilon is as large as its mean square.
    embedding = rng.standard_normal((VOCAB, HIDDEN))
    ids = hashed_ids(LONG, VOCAB)
    embedding[ids[64]] = 0
    embedding[ids[127]] *= 1e-3
    bf16("model.embed_tokens", embedding)
    for i in range(2):
        layer = f"model.layers.{i}"
        for norm, dim in (("input_layernorm", HIDDEN), ("post_attention_layernorm", HIDDEN),
                          ("self_attn.q_a_layernorm", Q_LORA), ("self_attn.kv_a_layernorm", 512)):
            gain = 1 + 0.2 * rng.standard_normal(dim)
            if i == 0 and norm == "input_layernorm":
                gain[BLOCK:] = 0  # an all-zero activation group: no 0/0 may come of it
            bf16(f"{layer}.{norm}", gain)
        for name, out, in_ in (("q_a_proj", Q_LORA, HIDDEN), ("q_b_proj", HEADS * 192, Q_LORA),
                               ("kv_a_proj_with_mqa", 576, HIDDEN),
                               ("kv_b_proj", HEADS * 256, 512), ("o_proj", HIDDEN, HEADS * 128)):
            fp8(f"{layer}.self_attn.{name}", out, in_)
    mlp("model.layers.0.mlp", NASTY_CONFIG["intermediate_size"])
    weight, bias = nasty_router(rng)
    bf16("model.layers.1.mlp.gate", weight)
    t["model.layers.1.mlp.gate.e_score_correction_bias"] = ("F32", bias)
    for e in range(EXPERTS):
        mlp(f"model.layers.1.mlp.experts.{e}", WIDTH)
    mlp("model.layers.1.mlp.shared_experts", WIDTH)
    bf16("model.norm", 1 + 0.2 * rng.standard_normal(HIDDEN))
    bf16("lm_head", 2 * rng.standard_normal((VOCAB, HIDDEN)) / math.sqrt(HIDDEN))
    return t


def write_shard(path, tensors, odd, metadata):
    """`odd`: pads the header with spaces to an odd file offset, so that no tensor is aligned. The
    format allows it, and a reader that casts a mapped pointer to float * breaks on it."""
    header, data = dict(metadata), b""
    for name, (dtype, a) in tensors.items():
        begin = len(data)
        data += np.ascontiguousarray(a).tobytes()
        header[name] = {"dtype": dtype, "shape": a.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8) + b" " * (3 if odd else 0)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
    return len(data)


def write_nasty(directory):
    os.makedirs(directory, exist_ok=True)
    tensors = nasty_tensors(np.random.default_rng(671))
    shards = [{}, {}, {}]
    linears = -1
    for name, t in tensors.items():
        # FP8 weights alternate between the first two shards, everything else goes round all three:
        # so most scales lie in another shard than their weights, some beside them.
        linears += t[0] == "F8_E4M3"
        shards[linears % (2 if t[0] == "F8_E4M3" else 3)][name] = t
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):06}.safetensors"
        metadata = {"__metadata__": {"format": "pt"}} if i == 1 else {}
        total += write_shard(os.path.join(directory, file), shard, i >= 1, metadata)
        weight_map.update({name: file for name in shard})
        with safetensors.safe_open(os.path.join(directory, file), "np") as f:
            assert set(f.keys()) == set(shard)  # the library, too, calls the file legal
    split = [n for n in weight_map if n.endswith("_scale_inv")
             and weight_map[n] != weight_map[n.removesuffix("_scale_inv")]]
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=1)
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(NASTY_CONFIG, f, indent=1)
    bytes_ = np.concatenate([a.ravel() for d, a in tensors.values() if d == "F8_E4M3"])
    scales = np.concatenate([a.ravel() for n, (d, a) in tensors.items() if n.endswith("_inv")])
    e4m3 = {"subnormal": (bytes_ & 0x78 == 0) & (bytes_ & 7 != 0), "+448": bytes_ == 0x7E,
            "-448": bytes_ == 0xFE, "-0": bytes_ == 0x80}
    print(f"{directory}: {len(tensors)} tensors, {total} bytes,",
          f"{len(split)} scales in another shard, scales {scales.min():.3g} to {scales.max():.3g},",
          ", ".join(f"{int(v.sum())} x {k}" for k, v in e4m3.items()))
    assert all(v.any() for v in e4m3.values()) and split and total < 3_000_000


# ---- transformers' model ------------------------------------------------------------------------


def check_yarn(model):
    """What transformers makes of rope_scaling, against the paper's formulas. Several of its
    versions had the ramp's dimension or the factor on cos and sin wrong."""
    c, rope = model.config, model.model.rotary_emb
    assert c.rope_interleave and c.rope_parameters["rope_type"] == "yarn"
    i = np.arange(32)
    extra = 10000.0 ** (-2 * i / 64)
    ramp = np.clip((i - 10) / 13, 0, 1)  # from floor(10.47) to ceil(22.51): 32 and 1 turns in 4,096
    want = extra / 40 * ramp + extra * (1 - ramp)
    error = np.abs(rope.inv_freq.double().numpy() / want - 1).max()
    scale = model.model.layers[0].self_attn.scaling
    assert error < 3e-7 and rope.attention_scaling == 1.0
    assert abs(scale - 0.1352337788608801) < 1e-15
    # The angle is an f32 product at every position, also past 4,096; and neighbours form the pairs.
    position, one = torch.tensor([[5000]]), torch.zeros(1, 1, 1, 64)
    cos, sin = rope(one, position)
    angle = torch.tensor(5000.0) * rope.inv_freq
    assert torch.equal(cos[0, 0, :32], angle.cos()) and torch.equal(sin[0, 0, :32], angle.sin())
    one[..., 6] = 1  # x[6], the even one of pair 3: transformers returns evens, then odds
    turned = hf.apply_rotary_pos_emb_interleave(one, one, cos, sin)[0].flatten()
    assert turned[3] == angle[3].cos() and turned[32 + 3] == angle[3].sin()
    print(f"yarn: softmax scale {scale!r}, cos/sin factor {rope.attention_scaling},",
          f"inv_freq within {error:.1e} of the formula")


def best_first(v):
    """Indices along the last dimension, the largest value first, of equal ones the lower index."""
    return v.sort(dim=-1, descending=True, stable=True)[1]


def route(router, x):
    """DeepseekV3TopkRouter.forward with what it leaves open settled as r1 does: groups are masked
    with -inf (older transformers took 0.0) and of equal choices the lower index wins (torch.topk
    promises nothing). It calculates in f64, and row by row, so that two experts tie only where
    their rows and biases are equal, and then always. Keeps all it went through for the checks."""
    r = types.SimpleNamespace()
    x = x.view(-1, router.hidden_dim).double()
    r.logit = torch.stack([(x * row).sum(-1) for row in router.weight.double()], -1)
    r.score = r.logit.sigmoid()
    r.choice = r.score + router.e_score_correction_bias.double()
    grouped = r.choice.view(len(x), router.num_group, -1)
    r.group = grouped.topk(2, -1)[0].sum(-1)
    r.group_rank = best_first(r.group)
    losers = r.group_rank[:, router.topk_group :, None].expand(-1, -1, grouped.shape[-1])
    r.masked = grouped.scatter(1, losers, -math.inf).flatten(1)
    r.expert = best_first(r.masked)[:, : router.top_k]
    weight = r.score.gather(1, r.expert)
    r.weight = weight / weight.sum(-1, keepdim=True) * router.routed_scaling_factor
    r.margin = margins(router, r)
    return r


def margins(router, r):
    """By how much two different choices, or two groups' scores, of a row stand apart where swapping
    them would alter `expert`: the smallest of all such. Exact ties are settled and don't count."""

    def smallest(sorted_, chosen, first_loser):
        gap = sorted_[:, :chosen, None] - sorted_[:, None, :]
        place = torch.arange(sorted_.shape[1])
        counts = place[None, :] > torch.clamp(place[:chosen, None], min=first_loser)
        return gap.masked_fill(~counts | (gap == 0) | gap.isnan(), math.inf).flatten(1).amin(-1)

    best = r.masked.sort(-1, descending=True)[0]
    inner = smallest(best, router.top_k, 0)
    outer = smallest(r.group.gather(1, r.group_rank), router.topk_group, router.topk_group - 1)
    return torch.minimum(inner, outer)


def compare_with_stock(router, stock, r):
    """Transformers' own function must choose equally good experts where nothing is tied or near,
    and give them the same weights. Returns the fraction of rows of which that can be said."""
    last, next_ = (r.group.gather(1, r.group_rank[:, [k]])[:, 0] for k in
                   (router.topk_group - 1, router.topk_group))
    clear = (r.margin > NEAR) & (last != next_)
    _, weight, expert = stock
    ours, theirs = (r.choice.gather(1, e).sort(-1)[0] for e in (r.expert, expert))
    same = (ours - theirs).abs().amax(-1) < NEAR
    assert same[clear].all(), "this transformers version routes differently (0.0-masking?)"
    ours, theirs = r.weight.sort(-1)[0], weight.double().sort(-1)[0]
    assert ((ours - theirs).abs().amax(-1) < 10 * NEAR)[clear].all()
    return clear.double().mean()


def coverage(router, r):
    """The fraction of rows in which each classic mistake would have chosen other experts."""
    n = len(r.choice)

    def chosen(choice, group=None, fill=-math.inf, flip=False):
        grouped = choice.view(n, router.num_group, -1)
        group = grouped.topk(2, -1)[0].sum(-1) if group is None else group

        def order(v):
            return v.shape[-1] - 1 - best_first(v.flip(-1)) if flip else best_first(v)

        out = order(group)[:, router.topk_group :, None].expand(-1, -1, grouped.shape[-1])
        return order(grouped.scatter(1, out, fill).flatten(1))[:, : router.top_k].sort(-1)[0]

    right = chosen(r.choice)
    assert torch.equal(right, r.expert.sort(-1)[0])
    wrong = {
        "no bias": chosen(r.score),
        "no groups": best_first(r.choice)[:, : router.top_k].sort(-1)[0],
        "groups by their best": chosen(r.choice, r.choice.view(n, router.num_group, -1).amax(-1)),
        "masked with 0.0": chosen(r.choice, fill=0.0),
        "ties to the higher index": chosen(r.choice, flip=True),
    }
    return {k: (v != right).any(-1).double().mean().item() for k, v in wrong.items()}


def act_quant(x):
    """Rounds to what r1's quantised activations hold: per row and 128 columns, s = amax/448."""
    groups = x.unflatten(-1, (-1, BLOCK))
    s = groups.abs().amax(-1, keepdim=True).clamp(min=AMAX_MIN) / E4M3_MAX
    return (e4m3_round(groups / s).float() * s).flatten(-2)


def quantised_experts(self, x, expert, weight):
    """DeepseekV3Experts.forward with both inputs of each expert quantised."""
    y = torch.zeros_like(x)
    x = act_quant(x)
    for e in range(self.num_experts):
        row, place = torch.where(expert == e)
        gate, up = F.linear(x[row], self.gate_up_proj[e]).chunk(2, -1)
        h = act_quant(self.act_fn(gate) * up)
        y.index_add_(0, row, F.linear(h, self.down_proj[e]) * weight[row, place, None])
    return y


class Oracle:
    """DeepseekV3ForCausalLM with a checkpoint's weights, and what was seen in its last run."""

    def __init__(self, directory):
        config = json.load(open(os.path.join(directory, "config.json")))
        for key in ("quantization_config", "auto_map", "architectures", "torch_dtype"):
            config.pop(key, None)
        # transformers gives q_a_layernorm and kv_a_layernorm its own default instead of the
        # config's.
        assert config["rms_norm_eps"] == 1e-6
        config = hf.DeepseekV3Config(**config)
        config._attn_implementation = config._experts_implementation = "eager"
        self.model = hf.DeepseekV3ForCausalLM(config).float().eval()
        self.config, self.w8a8, self.quiet = self.model.config, False, True
        self.load(*read_checkpoint(directory))
        check_yarn(self.model)

    def load(self, values, quantised):
        """Every parameter comes from the checkpoint; the MTP layer's tensors are left out."""
        state = {}
        for name in self.model.state_dict():
            stem = name.rsplit(".", 1)[0]
            experts = range(self.config.n_routed_experts)
            if name.endswith("experts.gate_up_proj"):
                state[name] = torch.stack([torch.cat([values[f"{stem}.{e}.{p}_proj.weight"]
                                                      for p in ("gate", "up")]) for e in experts])
            elif name.endswith("experts.down_proj"):
                state[name] = torch.stack([values[f"{stem}.{e}.down_proj.weight"] for e in experts])
            else:
                state[name] = values[name]
        self.model.load_state_dict(state, strict=True)
        for name, module in self.model.named_modules():
            # kv_b_proj has no place here: r1 absorbs it, so that its input is never quantised.
            if name in quantised and not name.endswith("kv_b_proj"):
                module.register_forward_pre_hook(
                    lambda _, args: (act_quant(args[0]),) if self.w8a8 else None)
        for i, layer in enumerate(self.model.model.layers):
            layer.register_forward_hook(lambda _, args, out: self.states.append(out[0]))
            if i >= self.config.first_k_dense_replace:
                self.patch_moe(layer.mlp)

    def patch_moe(self, moe):
        stock_route, stock_experts = moe.gate.forward, moe.experts.forward

        def patched(x):
            r = route(moe.gate, x)
            self.experts.append(r.expert), self.margins.append(r.margin)
            self.weights.append(r.weight)
            if not self.quiet:
                clear = compare_with_stock(moe.gate, stock_route(x), r)
                self.coverage = coverage(moe.gate, r)
                wrong = ", ".join(f"{k} {v:.1%}" for k, v in self.coverage.items())
                print(f"  router: {clear:.1%} of rows equal transformers' own, the others tie;",
                      f"nearest margin {r.margin.min():.1e}; chosen otherwise with: {wrong}")
            return r.logit.float(), r.weight.float(), r.expert

        moe.gate.forward = patched
        moe.experts.forward = lambda *args: (
            quantised_experts(moe.experts, *args) if self.w8a8 else stock_experts(*args))

    @torch.no_grad()
    def run(self, ids, w8a8, quiet):
        """Logits [tokens][vocab] of the whole sequence; the rest is left in self."""
        self.w8a8, self.quiet = w8a8, quiet
        self.experts, self.margins, self.weights, self.states = [], [], [], []
        position = torch.arange(len(ids))[None]
        return self.model(input_ids=torch.tensor([ids]), position_ids=position,
                          use_cache=False).logits[0]


# ---- the golden file ----------------------------------------------------------------------------


def chat_ids(oracle, directory, question, limit):
    """The question in R1's template, and the model's greedy answer: (ids, length of the prompt)."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    text = f"<｜begin▁of▁sentence｜><｜User｜>{question}<｜Assistant｜><think>\n"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompt = len(ids)
    while len(ids) < prompt + limit and ids[-1] != oracle.config.eos_token_id:
        ids.append(int(oracle.run(ids, False, True)[-1].argmax()))
    print(tokenizer.decode(ids, skip_special_tokens=False))
    return ids, prompt


def write_set(f, oracle, ids, wanted, w8a8):
    """Runs the model and appends one set of answers. Returns the logits of the wanted positions."""
    print(f"set {int(w8a8)}: activations {'quantised (w8a8)' if w8a8 else 'not quantised'}")
    logits = oracle.run(ids, w8a8, False)[wanted]
    assert logits.isfinite().all()
    f.write(torch.stack(oracle.experts).to(torch.uint8).numpy().tobytes())
    for stack in (torch.stack(oracle.margins), torch.stack(oracle.weights)[:, wanted],
                  torch.stack(oracle.states)[:, wanted], logits):
        f.write(stack.float().numpy().astype("<f4").tobytes())
    return logits


def write_golden(directory, out, question):
    torch.manual_seed(0)
    check_e4m3()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    oracle = Oracle(directory)
    c = oracle.config
    if os.path.exists(os.path.join(directory, "tokenizer.json")):
        ids, prompt = chat_ids(oracle, directory, question, 200)
        wanted = sorted({round(x) for x in np.linspace(0, len(ids) - 1, 12)})
    else:
        # Positions around the ends of cache pages (64) and of YaRN's original context (4,096).
        ids, prompt = hashed_ids(LONG, c.vocab_size), LONG
        wanted = [0, 1, 63, 64, 65, 127, 1000, 4095, 4096, 4097, LONG - 1]
    moe_layers = c.num_hidden_layers - c.first_k_dense_replace
    with open(out, "wb") as f:
        f.write(b"R1GOLD1\0")
        f.write(struct.pack("<8i", len(ids), len(wanted), c.num_hidden_layers, moe_layers,
                            c.num_experts_per_tok, c.hidden_size, c.vocab_size, prompt))
        f.write(struct.pack(f"<{len(ids) + len(wanted)}i", *ids, *wanted))
        plain = write_set(f, oracle, ids, wanted, False)
        experts = torch.stack(oracle.experts)
        if prompt == LONG:
            assert all(v > 0 for v in oracle.coverage.values()), "not nasty enough"
        w8a8 = write_set(f, oracle, ids, wanted, True)
    same = (experts == torch.stack(oracle.experts)).all(-1).double().mean()
    rms = (plain - w8a8).square().mean().sqrt() / plain.square().mean().sqrt()
    print(f"w8a8 against plain: logits {rms:.2e} relative rms, {same:.1%} of choices are equal")
    print(f"{out}: {os.path.getsize(out)} bytes, {len(ids)} tokens, {len(wanted)} of them in full")


def main():
    parser = argparse.ArgumentParser(description="Writes what test_oracle.c reads.")
    parser.add_argument("--nasty", action="store_true", help="make tests/golden/nasty")
    parser.add_argument("--model", help="directory of a checkpoint")
    parser.add_argument("--out", help="golden file to write")
    parser.add_argument("--question", default="How many r are there in strawberry ?",
                        help="for a checkpoint with a tokenizer")
    args = parser.parse_args()
    if args.nasty:
        write_nasty("tests/golden/nasty")
    if args.model and args.out:
        write_golden(args.model, args.out, args.question)
    elif not args.nasty:
        parser.error("nothing to do: give --nasty, or --model and --out")


if __name__ == "__main__":
    main()
