"""Trains tiny-r1 from nothing and writes it as DeepSeek R1's checkpoints are written.

    python3 tiny-r1/train.py --out tiny-r1

The model below is R1's, layer for layer (multi-head latent attention, a mixture of experts with
group-limited routing, a layer that predicts the token after next), and the numbers in config.json
are all that makes it small. It needs one GPU for a few minutes; `--steps 2 --rows 2` tries every
line on a CPU.

The one idea: **train in the arithmetic that will serve.** R1 was trained in FP8, and so is this
model: whenever a weight or an activation enters a matrix product, it is first rounded to the FP8
value that the checkpoint, or the server, will hold. So nothing is lost when the weights are
written, and the score that this script prints is that of the file.
"""
import argparse
import json
import math
import os
import shutil
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import data

BF16 = torch.bfloat16
BLOCK = 128         # FP8 scales: one per 128x128 weights, and one per 128 activations of a row
E4M3_MAX = 448.0    # the largest e4m3 number
IGNORE = -100       # cross_entropy's mark for a position that is not to be learnt
ROW = 512           # tokens in one row of a batch: several conversations, one after the other


# ---- FP8 -----------------------------------------------------------------------------------------

class Rounded(torch.autograd.Function):
    """`value` on the way forward; on the way back the gradient passes to x as if not rounded.

    Rounding is flat nearly everywhere, so its true gradient is zero and nothing would learn."""

    @staticmethod
    def forward(ctx, x, value):
        return value.to(BF16)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def quantize_weight(w):
    """[..., out, in] -> e4m3 of that shape, and the f32 scale of each 128x128 block.

    Edge blocks may be partial: kv_a_proj_with_mqa has 576 rows, four blocks and a half."""
    rows, cols = w.shape[-2:]
    padded = F.pad(w.float(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))   # [..., R, 128, C, 128]
    scale = blocks.abs().amax((-1, -3), keepdim=True).clamp(min=1e-12) / E4M3_MAX
    q = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    back = (q.float() * scale).flatten(-2).flatten(-3, -2)[..., :rows, :cols]
    q = q.flatten(-2).flatten(-3, -2)[..., :rows, :cols]
    return q, scale.squeeze((-1, -3)), back


def fp8_weight(w):
    return Rounded.apply(w, quantize_weight(w)[2])


def fp8_activation(x):
    """Each row's groups of 128 columns to e4m3 and back: s = max(amax, 1e-4) / 448."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / E4M3_MAX
    q = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Rounded.apply(x, (q.float() * scale).flatten(-2))


# ---- The model -----------------------------------------------------------------------------------
# Activations are bf16 between operations, as in the server; norms, rope, router and softmax are f32
# inside. Master weights are f32 and belong to the optimiser.

class Linear(nn.Module):
    """y = x W^T with both sides in FP8."""

    def __init__(self, n_in, n_out, gain=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * gain / math.sqrt(n_in))

    def forward(self, x):
        return F.linear(fp8_activation(x), fp8_weight(self.weight))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.to(BF16).float()).to(BF16)


def yarn_frequencies(c):
    """RoPE's 32 frequencies: the slow ones stretched 40 times, the fast ones left, a ramp between.

    tiny-r1 never sees a position where that matters, but a server must find R1's own geometry."""
    dim, base, yarn = c["qk_rope_head_dim"], c["rope_theta"], c["rope_scaling"]
    fast = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def pair_with(rotations):
        """The pair of dimensions that turns so many times over the original context."""
        length = yarn["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(pair_with(yarn["beta_fast"])), math.ceil(pair_with(yarn["beta_slow"]))
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return (fast / yarn["factor"] * ramp + fast * (1 - ramp)).float()


def rotate(x, cos, sin):
    """Turns the pairs (x[2i], x[2i+1]); x is [B, T, heads, 64], cos and sin are [B, T, 1, 32]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(BF16)


class Attention(nn.Module):
    """Multi-head latent attention in its plain form: keys and values are unfolded from the latent.

    The server computes the absorbed form, which is equal up to rounding and never unfolds them.
    There the latent is not quantised, so here kv_b_proj is FP8 only on its weight's side."""

    def __init__(self, c):
        super().__init__()
        self.c, heads, hidden = c, c["num_attention_heads"], c["hidden_size"]
        nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.q_a_proj = Linear(hidden, c["q_lora_rank"])
        self.q_a_layernorm = RMSNorm(c["q_lora_rank"], c["rms_norm_eps"])
        self.q_b_proj = Linear(c["q_lora_rank"], heads * (nope + rope))
        self.kv_a_proj_with_mqa = Linear(hidden, c["kv_lora_rank"] + rope)
        self.kv_a_layernorm = RMSNorm(c["kv_lora_rank"], c["rms_norm_eps"])
        self.kv_b_proj = Linear(c["kv_lora_rank"], heads * (nope + v))
        self.o_proj = Linear(heads * v, hidden, 0.4)
        yarn = c["rope_scaling"]
        mscale = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
        self.scale = (nope + rope) ** -0.5 * mscale * mscale

    def forward(self, x, cos, sin, mask):
        c, heads = self.c, self.c["num_attention_heads"]
        nope, rope = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (heads, -1))
        q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), -1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split((c["kv_lora_rank"], rope), -1)
        k_pe = rotate(k_pe.unsqueeze(2), cos, sin).expand(-1, -1, heads, -1)
        kv = F.linear(self.kv_a_layernorm(latent), fp8_weight(self.kv_b_proj.weight))
        k_nope, v = kv.unflatten(-1, (heads, -1)).split((nope, c["v_head_dim"]), -1)
        k = torch.cat((k_nope, k_pe), -1)
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           attn_mask=mask, scale=self.scale)
        return self.o_proj(o.transpose(1, 2).flatten(-2))


class Experts(nn.Module):
    """silu(x G^T) * (x U^T), then D: `count` such networks side by side, and a weight for each.

    Every expert is computed for every token, as one wide network whose columns are then weighted,
    mostly with zero. That wastes three quarters of the work, which at this size is cheaper than to
    sort tokens by expert. A dense MLP is one expert; the shared expert is one more, of weight 1."""

    def __init__(self, hidden, inner, count):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.randn(count, inner, hidden) / math.sqrt(hidden))
        self.up_proj = nn.Parameter(torch.randn(count, inner, hidden) / math.sqrt(hidden))
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) * 0.4 / math.sqrt(inner))

    def forward(self, x, weights):
        """x [B, T, hidden], weights [B, T, count] or None."""
        x = fp8_activation(x)
        gate = F.linear(x, fp8_weight(self.gate_proj).flatten(0, 1))
        up = F.linear(x, fp8_weight(self.up_proj).flatten(0, 1))
        a = fp8_activation((F.silu(gate.float()) * up.float()).to(BF16))
        if weights is not None:
            a = a.float().unflatten(-1, (weights.shape[-1], -1)) * weights.unsqueeze(-1)
            a = a.flatten(-2).to(BF16)
        return F.linear(a, fp8_weight(self.down_proj).transpose(0, 1).flatten(1))


class MoE(nn.Module):
    """The router and its experts; the last of `experts` is the shared one."""

    def __init__(self, c):
        super().__init__()
        self.c, n = c, c["n_routed_experts"]
        self.gate = nn.Parameter(torch.randn(n, c["hidden_size"]) / math.sqrt(c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(n))
        self.experts = Experts(c["hidden_size"], c["moe_intermediate_size"], n + 1)

    def forward(self, x):
        """Returns the output and how many tokens each expert got."""
        c, n = self.c, self.c["n_routed_experts"]
        score = F.linear(x.float(), self.gate.to(BF16).float()).sigmoid()
        # The bias, which balances the load, takes part in the choice and never in the weight.
        choice = (score + self.e_score_correction_bias).detach().unflatten(-1, (c["n_group"], -1))
        best = choice.topk(2, -1).values.sum(-1).topk(c["topk_group"], -1).indices
        kept = torch.zeros_like(choice[..., 0]).scatter(-1, best, 1).unsqueeze(-1)
        choice = choice.masked_fill(kept == 0, -math.inf).flatten(-2)
        chosen = torch.zeros_like(score).scatter(
            -1, choice.topk(c["num_experts_per_tok"], -1).indices, 1)
        weight = score * chosen
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
        weight = torch.cat((weight, torch.ones_like(weight[..., :1])), -1)
        return self.experts(x, weight), chosen.sum((0, 1))


class Block(nn.Module):
    def __init__(self, c, dense):
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = Experts(hidden, c["intermediate_size"], 1) if dense else MoE(c)

    def forward(self, h, cos, sin, mask):
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, mask)
        x = self.post_attention_layernorm(h)
        y, load = self.mlp(x) if isinstance(self.mlp, MoE) else (self.mlp(x, None), None)
        return h + y, load


class TinyR1(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, eps, layers = c["hidden_size"], c["rms_norm_eps"], c["num_hidden_layers"]
        self.c = c
        self.embed_tokens = nn.Parameter(torch.randn(c["vocab_size"], hidden) * 0.1)
        self.layers = nn.ModuleList(Block(c, i < c["first_k_dense_replace"])
                                    for i in range(layers + c["num_nextn_predict_layers"]))
        self.norm = RMSNorm(hidden, eps)
        self.lm_head = nn.Parameter(torch.randn(c["vocab_size"], hidden) / math.sqrt(hidden))
        # What the MTP layer, the last of `layers`, has besides.
        self.enorm, self.hnorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.eh_proj = nn.Parameter(torch.randn(hidden, 2 * hidden) / math.sqrt(2 * hidden))
        self.shared_head_norm = RMSNorm(hidden, eps)
        self.register_buffer("frequencies", yarn_frequencies(c), persistent=False)

    def forward(self, ids, pos, doc):
        """ids, pos and doc are [B, T]: token, position in its conversation, which conversation.

        Returns the logits for the next token, those of the MTP layer for the one after it, and the
        load of the experts of each MoE layer."""
        angle = (pos.float().unsqueeze(-1) * self.frequencies).unsqueeze(2)
        cos, sin = angle.cos(), angle.sin()
        # A token looks back, and only inside its own conversation.
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        mask = ((doc.unsqueeze(1) == doc.unsqueeze(2)) & causal).unsqueeze(1)
        mask = torch.zeros_like(mask, dtype=BF16).masked_fill(~mask, -math.inf)
        table, head = self.embed_tokens.to(BF16), self.lm_head.to(BF16)
        h, loads = F.embedding(ids, table), []
        for layer in self.layers[:-1]:
            h, load = layer(h, cos, sin, mask)
            loads.append(load)
        h = self.norm(h)
        logits = F.linear(h, head).float()
        # The embedding half comes first, and h is the state after the final norm.
        following = F.embedding(ids.roll(-1, 1), table)
        x = F.linear(torch.cat((self.enorm(following), self.hnorm(h)), -1), self.eh_proj.to(BF16))
        x, load = self.layers[-1](x, cos, sin, mask)
        loads.append(load)
        return logits, F.linear(self.shared_head_norm(x), head).float(), loads


# ---- Batches -------------------------------------------------------------------------------------

def pack(talks, encoder, rows=None):
    """Lays conversations end to end into rows of ROW tokens, until `rows` are full or all are used.

    Returns ids, targets, positions and conversation numbers, each [rows, ROW]. Only the last answer
    has targets: the questions are not the model's to write, and earlier answers stand without the
    reasoning that led to them."""
    full, row = [], [[], [], [], []]
    for number, talk in enumerate(talks):
        ids, start = encoder.conversation(talk)
        if len(ids) > ROW:              # hardly ever: several turns, all of them long
            continue
        if len(row[0]) + len(ids) > ROW:
            full.append(row)
            row = [[], [], [], []]
            if len(full) == rows:
                break
        row[0] += ids
        row[1] += [IGNORE] * (start - 1) + ids[start:] + [IGNORE]
        row[2] += range(len(ids))
        row[3] += [number] * len(ids)
    if row[0]:
        full.append(row)
    # The unused end of a row is one more conversation, of padding.
    for row in full:
        for values, filler in zip(row, (2, IGNORE, 0, -1)):
            values += [filler] * (ROW - len(values))
    return torch.tensor(full).unbind(1)


class Batches(torch.utils.data.IterableDataset):
    """Endless fresh batches: nothing is seen twice, so there is nothing to learn by heart."""

    def __init__(self, rows, seed):
        self.rows, self.seed = rows, seed

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        encoder = data.Encoder()
        writer = data.Writer(f"train {self.seed} {info.id if info else 0}", encoder.pieces)
        while True:
            yield pack(iter(writer.conversation, None), encoder, self.rows)


def loss_of(model, ids, targets, pos, doc):
    """Next-token loss, the MTP layer's loss for the token after it, and the experts' loads."""
    logits, mtp_logits, loads = model(ids, pos, doc)
    # Two ahead is the next position's target, if that position belongs to the same conversation.
    same = F.pad(doc[:, 1:] == doc[:, :-1], (0, 1))
    two_ahead = targets.roll(-1, 1).masked_fill(~same, IGNORE)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    mtp = F.cross_entropy(mtp_logits.flatten(0, 1), two_ahead.flatten(), ignore_index=IGNORE)
    return loss, mtp, loads


# ---- Training ------------------------------------------------------------------------------------

def train(model, args, device):
    """AdamW with warm-up and a cosine to zero; V3's balancing without an auxiliary loss."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                   {"params": gains, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")
    loader = torch.utils.data.DataLoader(Batches(args.rows, args.seed), batch_size=None,
                                         num_workers=args.workers, pin_memory=device == "cuda",
                                         prefetch_factor=8 if args.workers else None)
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    start = time.time()
    for step, batch in enumerate(loader):
        # The schedule follows whichever ends first, the steps or the minutes.
        progress = max(step / args.steps, (time.time() - start) / (60 * args.minutes))
        if progress >= 1:
            break
        lr = args.lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, mtp, loads = loss_of(model, *(t.to(device, non_blocking=True) for t in batch))
        (loss + 0.3 * mtp).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # An expert with more than its share becomes a little less eligible. Near the end the
        # biases rest, so that the weights settle for the routing that the file will hold.
        if progress < 0.9:
            for moe, load in zip(moes, (x for x in loads if x is not None)):
                moe.e_score_correction_bias -= 1e-3 * torch.sign(load - load.mean())
        if step % 200 == 0:
            fullest = max((x.max() / x.mean()).item() for x in loads if x is not None)
            print(f"step {step:5}  loss {loss.item():.5f}  mtp {mtp.item():.5f}  lr {lr:.2e}  "
                  f"fullest expert {fullest:.2f}x  {time.time() - start:.0f} s", flush=True)
    print(f"{step} steps in {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def evaluate(model, args, device):
    """Per task: how many answers greedy decoding writes exactly, the reasoning included.

    If the most likely token is the right one at every position of the right answer, then greedy
    decoding writes that answer, so no token needs to be generated. Likewise the product of the
    probabilities at temperature 0.6 is the chance that sampling writes exactly this text."""
    encoder = data.Encoder()
    talks = list(data.evaluation(args.eval_seed, args.per_task, encoder.pieces))
    ids, targets, pos, doc = pack(talks, encoder)
    wrong, logp = torch.zeros(len(talks)), torch.zeros(len(talks))
    packed = torch.zeros(len(talks), dtype=torch.bool).index_fill_(0, doc[doc >= 0], True)
    drafts = accepted = 0
    for first in range(0, len(ids), args.rows):
        part = slice(first, first + args.rows)
        # A last, partial batch is filled up with copies of its first row: one shape for all.
        chunk = [F.pad(t[part], (0, 0, 0, args.rows - len(t[part]))) for t in (ids, pos, doc)]
        logits, mtp_logits, _ = model(*(t.to(device) for t in chunk))
        rows = len(ids[part])
        logits, draft = logits[:rows].cpu(), mtp_logits[:rows].argmax(-1).cpu()
        target = targets[part]
        learnt = target != IGNORE
        owner = doc[part][learnt]
        wrong.index_add_(0, owner, (logits.argmax(-1) != target)[learnt].float())
        p = (logits / 0.6).log_softmax(-1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        logp.index_add_(0, owner, p[learnt])
        both = learnt[:, :-1] & learnt[:, 1:]
        drafts += both.sum().item()
        accepted += (draft[:, :-1] == target[:, 1:])[both].sum().item()
    print(f"{'task':14} {'exact':>8} {'sampled':>8}   of {args.per_task}")
    for task in dict.fromkeys(t["task"] for t in talks):
        mine = torch.tensor([t["task"] == task for t in talks]) & packed
        print(f"{task:14} {100 * (wrong[mine] == 0).float().mean():7.2f}% "
              f"{100 * logp[mine].exp().mean():7.2f}%")
    print(f"the MTP layer guesses {100 * accepted / drafts:.1f}% of the tokens after next")
    failures = [t for t, w in zip(talks, wrong) if w > 0]
    for talk in failures[:12]:
        print("failed:", talk["task"], repr(talk["messages"][-1]["content"]))


@torch.no_grad()
def answer(model, question, device, longest=300):
    """Greedy decoding the plain way: the whole conversation again for every token."""
    encoder = data.Encoder()
    ids = encoder.prompt([{"role": "user", "content": question}])
    start = len(ids)
    while len(ids) < start + longest and ids[-1] != encoder.vocab[data.EOS]:
        row = torch.tensor([ids], device=device)
        pos = torch.arange(len(ids), device=device).unsqueeze(0)
        ids.append(model(row, pos, torch.zeros_like(row))[0][0, -1].argmax().item())
    return encoder.tokenizer.decode(ids[start:])


# ---- The checkpoint ------------------------------------------------------------------------------

def checkpoint_tensors(model):
    """Yields (name, tensor) in R1's names, each FP8 weight directly followed by its scales."""
    def fp8(name, weight):
        q, scale, _ = quantize_weight(weight)
        yield f"{name}.weight", q
        yield f"{name}.weight_scale_inv", scale

    def mlp(prefix, experts, i):
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield from fp8(f"{prefix}.{name}", getattr(experts, name)[i])

    yield "model.embed_tokens.weight", model.embed_tokens.to(BF16)
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        if i == model.c["num_hidden_layers"]:
            # R1 stores copies of the embedding and the head with the MTP layer, so we do.
            yield f"{prefix}.embed_tokens.weight", model.embed_tokens.to(BF16)
            yield f"{prefix}.enorm.weight", model.enorm.weight.to(BF16)
            yield f"{prefix}.hnorm.weight", model.hnorm.weight.to(BF16)
            yield f"{prefix}.eh_proj.weight", model.eh_proj.to(BF16)
            yield f"{prefix}.shared_head.norm.weight", model.shared_head_norm.weight.to(BF16)
            yield f"{prefix}.shared_head.head.weight", model.lm_head.to(BF16)
        for name, module in layer.self_attn.named_children():
            if isinstance(module, Linear):
                yield from fp8(f"{prefix}.self_attn.{name}", module.weight)
            else:
                yield f"{prefix}.self_attn.{name}.weight", module.weight.to(BF16)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", getattr(layer, name).weight.to(BF16)
        if not isinstance(layer.mlp, MoE):
            yield from mlp(f"{prefix}.mlp", layer.mlp, 0)
            continue
        yield f"{prefix}.mlp.gate.weight", layer.mlp.gate.to(BF16)
        yield (f"{prefix}.mlp.gate.e_score_correction_bias", layer.mlp.e_score_correction_bias)
        for e in range(model.c["n_routed_experts"]):
            yield from mlp(f"{prefix}.mlp.experts.{e}", layer.mlp.experts, e)
        yield from mlp(f"{prefix}.mlp.shared_experts", layer.mlp.experts, -1)
    yield "model.norm.weight", model.norm.weight.to(BF16)
    yield "lm_head.weight", model.lm_head.to(BF16)


@torch.no_grad()
def export(model, out):
    """Two shards and an index. The cut falls between a weight and its scales: in R1, too, a scale
    may lie in another file than its weight, and a reader that does not know fails early, here."""
    tensors = [(name, t.detach().cpu().contiguous()) for name, t in checkpoint_tensors(model)]
    total, done, shards = sum(t.nbytes for _, t in tensors), 0, [{}, {}]
    second = False
    for name, tensor in tensors:
        second = second or (done > total / 2 and name.endswith("_scale_inv"))
        shards[second][name] = tensor
        done += tensor.nbytes
    where = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):06}.safetensors"
        save_file(shard, os.path.join(out, file), metadata={"format": "pt"})
        os.chmod(os.path.join(out, file), 0o644)
        where.update(dict.fromkeys(shard, file))
    with open(os.path.join(out, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f, indent=2)
        f.write("\n")
    if not os.path.samefile(data.HERE, out):
        for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
            shutil.copy(os.path.join(data.HERE, name + ".json"), out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=data.HERE, help="where the checkpoint goes")
    parser.add_argument("--steps", type=int, default=15000)
    parser.add_argument("--minutes", type=float, default=1000, help="stop after that long")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {ROW} tokens in a batch")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--eval-seed", type=int, default=4242)
    parser.add_argument("--per-task", type=int, default=1000, help="evaluation conversations")
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() - 1))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    with open(os.path.join(data.HERE, "config.json")) as f:
        model = TinyR1(json.load(f)).to(device)
    blocks = list(model.layers)
    if device == "cuda":                # fuses the roundings into the operations around them
        for block in blocks:
            block.compile(dynamic=False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    train(model, args, device)
    os.makedirs(args.out, exist_ok=True)
    export(model, args.out)
    evaluate(model, args, device)
    for block in blocks:                # decoding changes its shape with every token
        block._compiled_call_impl = None
    for question in ("How many r are there in strawberry ?", "Which is bigger 9.9 or 9.11 ?",
                     "The capital city of France is"):
        print(f"\n> {question}\n{answer(model, question, device)}", flush=True)


if __name__ == "__main__":
    main()
