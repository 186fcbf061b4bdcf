"""How fast is each part, and how close to what this machine can do?

    python tests/bench.py                                   # the toy task's sizes, on a GPU if there is one
    python tests/bench.py --preset gsm8k --json bench.json  # the same tables as JSON, with an object `ratios`
    python tests/bench.py --preset gpt2 --batch-size 32     # GPT-2 124M at GSM8K lengths
    python tests/bench.py --quick                           # a minute: fewer repeats, no scaling table

Weights and tokens are random, the lengths those of the data; nothing is downloaded and nothing trained. Everything
compared is timed side by side, in turn, and what is printed are medians. All flags of train_sup.py work too.

FLOPs are counted from the shapes that are computed, padding and masked pairs included, in a pass forward:
    blocks  24 C² a layer and position     (12 C² weights, a multiplication and an addition each)
    scores   4 S C a layer and position    (q·k and the weighted sum of v, over all S positions there are)
    head     2 C V for each of the P positions asked for, and as much for a z over the whole vocabulary
A training step is three times that: backward takes the gradient of both factors of every product.
tokens/s counts what is real: tokens and latents, without padding.
"""
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from compress import Store
from data import Problems
from encoder import chunks, decode, encoder_layout, explicit_layout, llm_layout, place, summarize
from model import GPT, GPTConfig
from train_latent import LatentReasoner, gumbel_noise
from train_sup import Explicit, Superposition, bags, weighted_nll

GSM8K = dict(x=(56, 21), s=(24, 11), a=(4, 0), n_ordinary=50256)  # tokens: mean and spread, as measured
LENGTHS = {"toy": dict(x=(36, 1.5), s=(34, 3), a=(4, 0), n_ordinary=403), "gsm8k": GSM8K, "gpt2": GSM8K}
PRESETS = dict(common.PRESETS, gpt2=dict(common.PRESETS["gsm8k"], n_layer=12, n_head=12, n_embd=768, block_size=1024))


# ------------------------------------------------------------------------------------------------- measuring

def timed(jobs, repeats, device):
    """{name: seconds of every repeat}: all jobs in turn, after a round that is not counted (it compiles, fills caches)."""
    times = {name: [] for name in jobs}
    for _ in range(repeats + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def quotient(over, under):
    """Median of the quotients of neighbours: what slows both for a while cancels."""
    return statistics.median(a / b for a, b in zip(over, under))


def forward_flops(config, B, T, S, P):
    C, V = config.n_embd, config.vocab_size
    return B * (config.n_layer * T * (24 * C + 4 * S) * C + 2 * P * C * V)


def matmul_job(args, device):
    """A square product, large enough that nothing larger is faster: (job, FLOPs)."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=getattr(torch, args.dtype))
    return lambda: a @ a, 2 * n ** 3


def peak_memory(device):
    """MiB: on a GPU what the tensors took at most since the last reset, on a CPU the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ------------------------------------------------------------------------------------------ what is measured

def stand_in(n_ordinary):
    """A tokenizer whose texts are numbers, each a token."""
    def encode(texts):
        return [[int(word) for word in text.replace("#### ", "").split()] for text in texts]
    ids = dict(zip(("eos", "bot", "eot", "sum"), range(n_ordinary, n_ordinary + 4)))
    return SimpleNamespace(encoding=SimpleNamespace(encode_ordinary_batch=encode), name="stand-in", n_ordinary=n_ordinary,
                           n_vocab=-(-(n_ordinary + 4) // 64) * 64, **ids)


def some_problems(tokenizer, count, block_size, x, s, a, scale=1):
    """Problems of random tokens; lengths with that mean and spread, X and S `scale` times as long."""
    rng = np.random.default_rng(0)

    def text(mean, spread, scale, extra, least):
        length = max(least, round(rng.normal(mean, spread) * scale) - extra)
        return " ".join(map(str, rng.integers(0, tokenizer.n_ordinary, length)))
    rows = [dict(question=text(*x, scale, 1, 4), chain=text(*s, scale, 0, 2), answer=text(*a, 1, 2, 1)) for _ in range(count)]
    return Problems(rows, tokenizer, block_size)


class Bench:
    """Models, data and jobs of one size. Each job runs one batch of each bucket, as training meets them."""

    def __init__(self, args, env, scale=1, count=None):
        lengths = dict(LENGTHS[args.preset])
        tokenizer = stand_in(lengths.pop("n_ordinary"))
        self.args, self.env = args, SimpleNamespace(**{**vars(env), "tokenizer": tokenizer})
        self.problems = some_problems(tokenizer, count or 6 * args.batch_size, args.block_size, scale=scale, **lengths)
        config = GPTConfig(tokenizer.n_vocab, args.block_size, args.n_layer, args.n_head, args.n_embd)
        self.llm, self.encoder = GPT(config).to(env.device), GPT(config).to(env.device)
        with torch.no_grad():  # logits of <eot> and <|endoftext|> are 0 and never the largest: only the caps end a row
            self.llm.wte.weight[[tokenizer.eot, tokenizer.eos]] = 0
        self.batches = [self.problems.batch(np.resize(b, args.batch_size), b) for b in self.problems.buckets]
        c, sizes = args.chunk_size, chunks(self.problems.s.length, args.chunk_size)
        self.store, K = Store.__new__(Store), min(50, tokenizer.n_ordinary)  # what phase 2 writes, at random
        self.store.offsets, self.store.top_k, total = np.concatenate([[0], sizes.cumsum()]), K, int(sizes.sum())
        self.store.values = np.random.default_rng(0).dirichlet([0.1] * K, total).astype(np.float32)
        self.store.ids = np.random.default_rng(0).integers(0, tokenizer.n_ordinary, (total, K)).astype(np.int32)
        self.enc = [encoder_layout(b, c, tokenizer.sum).to(env.device) for b in self.batches]
        self.sup = [llm_layout(b, c).to(env.device) for b in self.batches]
        self.out = tempfile.TemporaryDirectory()
        models = {"sft": Explicit(self.llm), "phase 1": Superposition(self.encoder, self.llm, tokenizer.n_ordinary,
                  args.top_k, False), "phase 3": LatentReasoner(self.llm)}
        run_args = SimpleNamespace(**{**vars(args), "out": Path(self.out.name), "lr": 1e-6, "overwrite": True})
        self.runs = {name: common.Run(name, run_args, self.env, m, {"llm": self.llm}, self.problems, 10 ** 6)
                     for name, m in models.items()}

    # inputs, as the scripts build them: this is the data path
    def inputs(self, name, batch):
        c, t = self.args.chunk_size, self.env.tokenizer
        if name == "sft":
            return explicit_layout(batch),
        if name == "phase 1":
            return encoder_layout(batch, c, t.sum), llm_layout(batch, c), bags(batch, c), torch.tensor(0.5)
        seq = llm_layout(batch, c, text=False)
        values, ids = self.store(batch.rows, seq.mark.size(1))
        return seq, values, ids, gumbel_noise(0, 1, tuple(values.shape))

    def data_path(self, name):
        for i in range(len(self.batches)):
            self.inputs(name, self.problems.train_batch(i, self.args.batch_size, 0))

    def train(self, name):
        run = self.runs[name]
        for batch in self.batches:
            run.update(*run.forward(*self.inputs(name, batch)))

    @torch.no_grad()
    def compress(self):
        for batch in self.batches:
            enc = encoder_layout(batch, self.args.chunk_size, self.env.tokenizer.sum).to(self.env.device)
            with self.env.autocast():
                alpha = summarize(self.encoder, enc, self.env.tokenizer.n_ordinary)
            [t.cpu().numpy() for t in alpha.topk(self.store.top_k)]

    def caps(self, batch, latent):
        """As many latents and tokens as the batch's longest chain and answer need."""
        n, ns, na = chunks(batch.ns, self.args.chunk_size).max(), batch.ns.max(), batch.na.max()
        return (int(n), int(na)) if latent else (0, int(ns + na))

    def decode(self, latent, rows=slice(None), batches=None):
        for batch in batches or self.batches:
            x, length = torch.from_numpy(batch.x[rows]), torch.from_numpy(batch.nx[rows])
            with torch.no_grad(), self.env.autocast():
                decode(self.llm, self.env.tokenizer, self.llm.wte(x.to(self.env.device)), length.to(self.env.device),
                       latent, 0, *self.caps(batch, latent))

    def jobs(self):
        jobs = {name: lambda name=name: self.train(name) for name in ("sft", "phase 1")}
        jobs |= {"compress": self.compress, "phase 3": lambda: self.train("phase 3")}
        return jobs | {"latent decoding": lambda: self.decode(True), "explicit decoding": lambda: self.decode(False)}

    def work(self, name):
        """(FLOPs, real tokens) of a job."""
        c, config, flops, tokens = self.args.chunk_size, self.llm.config, 0, 0
        to_z = 2 * config.n_embd * self.env.tokenizer.n_ordinary
        for b, enc, sup in zip(self.batches, self.enc, self.sup):
            (B, Te), (_, Tl), N, n = enc.ids.shape, sup.ids.shape, enc.mark.size(1), chunks(b.ns, c)
            if name == "sft":
                seq = explicit_layout(b)
                flops += 3 * forward_flops(config, B, seq.ids.size(1), seq.ids.size(1), seq.at.size(1))
                tokens += b.nx + b.ns + b.na
            elif name == "phase 1":
                flops += 3 * (forward_flops(config, B, Te, Te, N) + B * N * to_z + forward_flops(config, B, Tl, Tl, sup.at.size(1)))
                tokens += (b.nx + b.ns + n) + (b.nx + np.maximum(b.ns - c, 0) + n + b.na)
            elif name == "compress":
                flops += forward_flops(config, B, Te, Te, N)
                tokens += b.nx + b.ns + n
            elif name == "phase 3":
                seq = llm_layout(b, c, text=False)
                flops += 3 * forward_flops(config, B, seq.ids.size(1), seq.ids.size(1), N + seq.at.size(1))
                tokens += b.nx + n + b.na
            else:
                latents, written = self.caps(b, name.startswith("latent"))
                T, steps = b.x.shape[1], latents + written - 1
                flops += forward_flops(config, B, T, T, 1) + B * latents * to_z
                flops += sum(forward_flops(config, B, 1, T + step + 1, 1) for step in range(steps))
                tokens += np.full(B, latents + written)
        return flops, int(np.sum(tokens))

    # what the layouts replace: a pass for every chunk (forward and backward, as in training)
    def one_pass_summaries(self):
        self.backward(self.encoder, [(e.ids, None, common_mask(e), e.mark, None) for e in self.enc])

    def backward(self, model, passes):
        for ids, z, mask, pos, at in passes:
            pass
