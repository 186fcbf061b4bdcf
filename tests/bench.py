"""How fast is each part, and how close to what this machine can do?

    python tests/bench.py                                # the toy task's sizes, on a GPU if any
    python tests/bench.py --preset gsm8k --json b.json   # the same tables as JSON, too
    python tests/bench.py --preset gpt2 --batch-size 32  # GPT-2 124M at GSM8K lengths
    python tests/bench.py --preset easy --tokens 50256   # with GPT-2's whole vocabulary
    python tests/bench.py --quick                        # a minute: fewer repeats, no scaling table

Weights and tokens are random, the lengths those of the data; nothing is downloaded and nothing
trained. Everything compared is timed side by side, in turn, and what is printed are medians. All
flags of train_sup.py work too.

FLOPs are counted from the shapes: 2 m k n for every product of an (m, k) and a (k, n) matrix that
runs, forward and backward, padding and masked pairs included, and nothing for the rest (softmax,
GELU, norms, Adam). For a model that is 24 C² + 4 S C a layer and position (12 C² weights; scores
and weighted sum over S positions), less in the last layer, where only the positions asked for go on
from their keys and values; 2 C V for each position with logits, as much for a z over the whole
vocabulary; and three times that for a training step. tokens/s counts what is real: tokens and
latents, without padding. `data` is the building of batches, a Python loop over the problems that
the device waits for, and its share of a whole training step, which should stay under 3 %.
"""
import json
import math
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402  (the path is set above)
from data import Problems  # noqa: E402
from decode import decode, question_prompt  # noqa: E402
from encoder import (Layout, chunk_tokens, count_chunks, draw_followed, encoder_batch,  # noqa: E402
                     explicit_batch, insert_latents, latent_batch, latent_pos, llm_batch,
                     ordinary_softmax, pad, split_chunks, summarize, supervision_mask)
from losses import gumbel_noise, weighted_nll  # noqa: E402
from model import GPT, Attention, GPTConfig, gather_slots  # noqa: E402
from optim import Optimizer, schedule  # noqa: E402
from train_latent import latent_loss  # noqa: E402
from train_sup import explicit_loss, sup_loss  # noqa: E402

# tokens of a question, a chain and an answer: mean and spread, as measured
GSM8K = dict(x=(56, 21), s=(24, 11), a=(4, 0))
LENGTHS = {
    "toy": dict(x=(55.6, 1.5), s=(55, 6), a=(4, 0), n_ordinary=410),
    "easy": dict(x=(40, 8), s=(18, 5), a=(4, 0), n_ordinary=5761),
    "gsm8k": dict(GSM8K, n_ordinary=16461),
    "gpt2": dict(GSM8K, n_ordinary=50256),
}
GPT2 = dict(common.PRESETS["gsm8k"], n_layer=12, n_head=12, n_embd=768, block_size=1024)
PRESETS = dict(common.PRESETS, gpt2=GPT2)
AXES = {
    "length": [1, 2, 4],
    "chunk size": [8, 4, 2, 1],
    "batch": [8, 32, 128],
    "width": [64, 128, 256],
}
TRAINING = ("sft", "phase 1", "phase 3")


# ---------------------------------------------------------------------------------------- measuring

def timed(jobs, repeats, device):
    """{name: seconds of every repeat}, all jobs in turn; a first round is not counted."""
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


def count_flops(job):
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def matmul_job(args, device):
    """A square product, large enough that nothing larger is faster: (job, FLOPs)."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=getattr(torch, args.dtype))
    return partial(torch.matmul, a, a), 2 * n ** 3


def peak_memory(device):
    """MiB: on a GPU, of the tensors since the last reset; else of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --------------------------------------------------------------------------------- what is measured

def stand_in(n_ordinary):
    """A tokenizer whose texts are numbers, each a token."""
    def encode(text):
        return [int(word) for word in text.replace("#### ", "").split()]

    ids = dict(zip(("eos", "bot", "eot", "sum"), range(n_ordinary, n_ordinary + 4)))
    return SimpleNamespace(
        encoding=SimpleNamespace(encode_ordinary=encode), name="stand-in", **ids,
        n_ordinary=n_ordinary, n_vocab=-(-(n_ordinary + 4) // 64) * 64)


def some_problems(tokenizer, count, args, x, s, a, scale=1):
    """Problems of random tokens, their lengths as said; X and S are `scale` times as long."""
    rng = np.random.default_rng(0)

    def text(mean, spread, scale, extra, least):
        length = max(least, round(rng.normal(mean, spread) * scale) - extra)
        return " ".join(map(str, rng.integers(0, tokenizer.n_ordinary, length)))

    rows = []
    for _ in range(count):
        question, chain = text(*x, scale, 1, 4), text(*s, scale, 0, 2)
        rows.append(dict(question=question, chain=chain, answer=text(*a, 1, 2, 1)))
    whole = math.lcm(args.chunk_size, *AXES["chunk size"])  # the same problems for all of these
    return Problems(rows, tokenizer, args.block_size, whole)


def random_store(folder, problems, c, n_ordinary):
    """The store that phase 2 would write, with random α."""
    n = count_chunks(problems.s.length, c)
    K, total = min(50, n_ordinary), int(n.sum())
    rng = np.random.default_rng(0)
    folder.mkdir()
    np.save(folder / "values.npy", rng.dirichlet([0.1] * K, total).astype(np.float32))
    np.save(folder / "ids.npy", rng.integers(0, n_ordinary, (total, K)).astype(np.int32))
    np.save(folder / "offsets.npy", n.cumsum() - n)
    common.write_json(folder / "meta.json", dict(
        complete=True, top_k=K, latents=total, problems=len(problems)))
    return common.Store(folder)


class Bench:
    """Models, data and jobs of one size. Each job runs the batches of about an epoch."""

    def __init__(self, args, env, scale=1, count=None, attention=Attention):
        lengths = dict(LENGTHS[args.preset])
        n_ordinary = lengths.pop("n_ordinary")
        tokenizer = stand_in(args.tokens or n_ordinary)
        self.args, self.env = args, SimpleNamespace(**{**vars(env), "tokenizer": tokenizer})
        count = count or 6 * args.batch_size
        self.problems = some_problems(tokenizer, count, args, scale=scale, **lengths)
        self.passes = count // args.batch_size
        c = args.chunk_size
        self.chain_slots = {"sft": 1, "phase 1": 1.5 + 1 / c, "phase 3": 1 / c}
        self.batches = {name: list(self.draw_batches(name)) for name in TRAINING}
        config = GPTConfig(tokenizer.n_vocab, *(getattr(args, field) for field in (
            "block_size", "n_layer", "n_head", "n_embd")))
        self.llm, self.encoder = GPT(config).to(env.device), GPT(config).to(env.device)
        for block in (*self.llm.h, *self.encoder.h):
            block.attn.__class__ = attention
        with torch.no_grad():
            # logits of <eot> and <|endoftext|> are 0 and never the largest: only the caps end a row
            self.llm.wte.weight[[tokenizer.eot, tokenizer.eos]] = 0
        self.folder = tempfile.TemporaryDirectory()
        out = Path(self.folder.name)
        self.store = random_store(out / "latents", self.problems, args.chunk_size,
                                  tokenizer.n_ordinary)
        self.open_runs(SimpleNamespace(**{**vars(args), "out": out, "lr": 1e-6, "overwrite": True}))

    def open_runs(self, args):
        """What each phase's loop holds: the optimizer with its parameters, the Run."""
        common.compile_blocks([self.encoder, self.llm], args)
        self.optimizers, self.runs = {}, {}
        for name in TRAINING:
            models = [self.encoder, self.llm] if name == "phase 1" else [self.llm]
            rates = dict.fromkeys(models, args.lr)
            self.optimizers[name] = Optimizer(rates, self.env.device)
            self.runs[name] = common.Run(name, args, self.env, {"llm": self.llm},
                                         self.optimizers[name], self.problems, 10 ** 6)
            self.runs[name].bar = tqdm(disable=True)

    def draw_batches(self, name):
        """The batches of a phase's loop."""
        self.problems.make_buckets(self.chain_slots[name])
        for step in range(self.passes):
            yield self.problems.train_batch(step, self.args.batch_size, 0)

    # a training step, as in the scripts' loops

    def inputs(self, name, batch):
        """The data path: what the phase's loop makes of a batch."""
        c, tokenizer = self.args.chunk_size, self.env.tokenizer
        if name == "sft":
            return (explicit_batch(batch),)
        if name == "phase 1":
            followed = draw_followed(batch, c, 0, 1)                                 # (B,)
            seq = llm_batch(batch, c, followed)
            return encoder_batch(batch, c, tokenizer.sum), seq, chunk_tokens(batch, c)
        seq = latent_batch(batch, c)
        values, ids = self.store.read(batch.rows, seq.summary_index.size(1))      # (B, N, K)
        return seq, values, ids, gumbel_noise(0, 1, values.shape)

    def losses(self, name, inputs):
        inputs = [x.to(self.env.device) for x in inputs]
        with self.env.autocast():
            if name == "sft":
                return dict(loss=explicit_loss(self.llm, *inputs))
            if name == "phase 1":
                sup, kl = sup_loss(self.encoder, self.llm, *inputs,
                                   self.env.tokenizer.n_ordinary, self.args.top_k)
                return dict(loss=sup + 0.5 * kl, sup=sup, bag=kl)
            exp, lat = latent_loss(self.llm, *inputs)
            return dict(loss=exp + lat, exp=exp, lat=lat)

    def update(self, name, batch):
        run, optimizer = self.runs[name], self.optimizers[name]
        losses = self.losses(name, self.inputs(name, batch))
        losses["loss"].backward()
        common.average_gradients(optimizer.parameters, self.env.world)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule(run.step, run.steps)
        optimizer.step()
        optimizer.zero_grad()
        run.log(**losses, norm=norm)

    # the jobs

    def train(self, name):
        for batch in self.batches[name]:
            self.update(name, batch)

    def data_path(self, name):
        for batch in self.draw_batches(name):
            self.inputs(name, batch)

    @torch.no_grad()
    def compress(self):
        for batch in self.batches["sft"]:
            enc = encoder_batch(batch, self.args.chunk_size, self.env.tokenizer.sum)
            enc = enc.to(self.env.device)
            with self.env.autocast(), torch.compiler.set_stance("force_eager"):
                alpha = summarize(self.encoder, enc, self.env.tokenizer.n_ordinary)
            for tensor in alpha.topk(self.store.top_k):
                tensor.cpu().numpy()

    def caps(self, batch, latent):
        """(latents, tokens): as many as the batch's longest chain and answer need."""
        chain = max(len(p.chain) for p in batch.problems)
        answer = max(len(p.answer) for p in batch.problems)
        if latent:
            return count_chunks(chain, self.args.chunk_size), answer
        return 0, chain + answer

    @torch.no_grad()
    def decode(self, latent, batches, caps_of=None):
        """caps_of: the batch whose caps are kept to (None: each its own)."""
        for batch in batches:
            with self.env.autocast(), torch.compiler.set_stance("force_eager"):
                prompt = question_prompt(self.llm, batch, self.env)
                max_latents, max_tokens = self.caps(caps_of or batch, latent)
                decode(self.llm, self.env.tokenizer, *prompt,
                       c=self.args.chunk_size if latent else 0,
                       max_latents=max_latents, max_tokens=max_tokens)

    def jobs(self):
        return {"sft": partial(self.train, "sft"),
                "phase 1": partial(self.train, "phase 1"),
                "compress": self.compress,
                "phase 3": partial(self.train, "phase 3"),
                "latent decoding": partial(self.decode, True, self.batches["sft"]),
                "explicit decoding": partial(self.decode, False, self.batches["sft"])}

    def tokens(self, name):
        """Real tokens and latents a job reads, or writes."""
        if name.endswith("decoding"):
            latent = name.startswith("latent")
            return sum(len(batch.rows) * sum(self.caps(batch, latent))
                       for batch in self.batches["sft"])
        total = 0
        for batch in self.batches["sft" if name == "compress" else name]:
            if name == "compress":
                inputs = [encoder_batch(batch, self.args.chunk_size, self.env.tokenizer.sum)]
            else:
                inputs = self.inputs(name, batch)
            for x in inputs:
                if isinstance(x, Layout):  # but for a row's first slot, only padding stands at 0
                    total += len(x.pos) + int((x.pos > 0).sum())
        return total


# --------------------------------------------------------- what the layouts and the cache replace

class Loops(Bench):
    """The same results the plain way, on the longest problems; `check` sees that they are."""

    def __init__(self, args, env):
        super().__init__(SimpleNamespace(**{**vars(args), "compile": False}), env)
        rows, c, device = self.problems.order[-args.batch_size:], args.chunk_size, env.device
        batch = self.problems.batch(rows, rows)
        self.enc = encoder_batch(batch, c, self.env.tokenizer.sum).to(device)
        self.seq = llm_batch(batch, c).to(device)
        B, N = self.enc.summary_index.shape
        self.z = torch.randn(B, N, args.n_embd, device=device, requires_grad=True)
        longest = int(self.enc.n.max())
        self.encoder_passes = [self.encoder_pass(batch, i) for i in range(longest)]
        self.llm_passes = [self.llm_pass(batch, i) for i in range(longest)]

    def encoder_pass(self, batch, i):
        """X <bot> S₀ … S_i L of the problems that have a chunk i, and where α_i is predicted."""
        texts = []
        for p in batch.problems:
            chunks = split_chunks(p.chain, self.args.chunk_size)
            if i < len(chunks):
                texts.append(p.question + sum(chunks[:i + 1], []) + [self.env.tokenizer.sum])
        return self.tensor(texts), self.tensor([[len(text) - 1] for text in texts])

    def llm_pass(self, batch, i):
        """X <bot> z₀ … z_i S_{i+1} (or Ans) of these problems, and what is predicted there."""
        rows, ids, pos, latent, index, target, weight = [], [], [], [], [], [], []
        c = self.args.chunk_size
        for row, p in enumerate(batch.problems):
            chunks = split_chunks(p.chain, c)
            if i < len(chunks):
                text = (chunks[1:] + [p.answer])[i]
                nx, size = len(p.question), len(text)
                rows.append(row)
                ids.append(p.question + [0] * (i + 1) + text)
                z_pos = [latent_pos(nx, j, c) for j in range(i + 1)]
                pos.append([*range(nx), *z_pos, *range(z_pos[-1] + 1, z_pos[-1] + 1 + size)])
                latent.append([0] * nx + list(range(1, i + 2)) + [0] * size)
                index.append(list(range(nx + i, nx + i + size)))
                target.append(text)
                weight.append([1 / (len(chunks) * size)] * size)
        tensors = (self.tensor(lists) for lists in (ids, pos, latent, index, target))
        return torch.tensor(rows), *tensors, self.tensor(weight, np.float32)

    def tensor(self, lists, dtype=np.int64):
        return pad(lists, max(map(len, lists)), dtype=dtype).to(self.env.device)

    def summaries(self):
        with self.env.autocast():
            alpha = summarize(self.encoder, self.enc, self.env.tokenizer.n_ordinary)
        real = torch.arange(alpha.size(1), device=alpha.device) < self.enc.n[:, None]  # (B, N)
        return self.backward(alpha.square().sum(2).where(real, 0).sum())

    def summaries_loop(self):
        total = 0
        for ids, index in self.encoder_passes:
            with self.env.autocast():
                logits = self.encoder.head(self.encoder(self.encoder.wte(ids), index=index))
            alpha = ordinary_softmax(logits, self.env.tokenizer.n_ordinary)
            total += self.backward(alpha.square().sum())
        return total

    def ltsum(self):
        seq = self.seq
        with self.env.autocast():
            x = insert_latents(self.llm.wte(seq.ids), self.z, seq.latent)
            mask = supervision_mask(seq.segment)
            logits = self.llm.head(self.llm(x, seq.pos, mask, index=seq.predict_index))
        return self.backward(weighted_nll(logits, seq.target, seq.loss_weight))

    def ltsum_loop(self):
        total = 0
        for rows, ids, pos, latent, index, target, weight in self.llm_passes:
            with self.env.autocast():
                x = insert_latents(self.llm.wte(ids), self.z[rows], latent)
                logits = self.llm.head(self.llm(x, pos, index=index))
            share = len(rows) / self.args.batch_size
            total += self.backward(weighted_nll(logits, target, weight) * share)
        return total

    def backward(self, loss):
        loss.backward()
        for p in (self.z, *self.llm.parameters(), *self.encoder.parameters()):
            p.grad = None
        return loss.detach()

    @torch.no_grad()
    def cached(self, cached=True, B=16, prompt=56, steps=28):
        """Explicit decoding at GSM8K's mean lengths, on the cache or reading all anew each step."""
        llm, out = self.llm, []
        ids = torch.arange(B * prompt, device=self.env.device) % self.env.tokenizer.n_ordinary
        ids = ids.view(B, prompt)
        with self.env.autocast():
            x = llm.wte(ids)
            if cached:
                length = torch.full_like(ids[:, 0], prompt)
                pos = torch.arange(prompt, device=ids.device).expand(B, -1)
                return decode(llm, self.env.tokenizer, x, pos, length, max_tokens=steps).tokens
            for _ in range(steps):
                last = torch.full_like(ids[:, :1], x.size(1) - 1)
                out.append(llm.head(llm(x, index=last))[:, 0].argmax(1))
                x = torch.cat([x, llm.wte(out[-1])[:, None]], 1)
        return torch.stack(out, 1).tolist()

    def check(self):
        """The loops give what the one pass gives, the cache what reading all again gives."""
        tolerance = 1e-3 if self.args.dtype == "float32" else 5e-2
        for one, loop in (self.summaries, self.summaries_loop), (self.ltsum, self.ltsum_loop):
            torch.testing.assert_close(one(), loop(), rtol=tolerance, atol=0)
        assert self.args.dtype != "float32" or self.cached() == self.cached(False)

    def ratios(self, repeats):
        self.check()
        third = len(self.problems) // 3
        middle = self.problems.order[third:-third]  # by length
        rows = np.resize(middle, 64)
        many = self.problems.batch(rows, middle)
        single = [self.problems.batch(rows[i:i + 1], middle) for i in range(4)]
        times = timed({
            "summaries": self.summaries, "summaries loop": self.summaries_loop,
            "ltsum": self.ltsum, "ltsum loop": self.ltsum_loop,
            "cached": self.cached, "uncached": partial(self.cached, False),
            "latent": partial(self.decode, True, [many]),
            "explicit": partial(self.decode, False, [many]),
            "one latent": partial(self.decode, True, single, many),
            "one explicit": partial(self.decode, False, single, many),
        }, repeats, self.env.device)
        return {"one_pass_summaries": quotient(times["summaries loop"], times["summaries"]),
                "one_pass_ltsum": quotient(times["ltsum loop"], times["ltsum"]),
                "cached_decoding": quotient(times["uncached"], times["cached"]),
                "batched_decoding": 16 * quotient(times["one latent"], times["latent"]),
                "latent_over_explicit": quotient(times["latent"], times["explicit"]),
                "latent_over_explicit_one": quotient(times["one latent"], times["one explicit"])}


class FusedAttention(Attention):
    """Attention by torch's own function, to compare the handwritten one with in training."""

    def forward(self, x, bias, cache, index):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = (y.view(B, T, H, D).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if index is not None:
            q = gather_slots(q, index)                                       # (B, H, P, D)
            bias = gather_slots(bias.expand(B, 1, T, -1), index)             # (B, 1, P, T)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        return self.c_proj(y.transpose(1, 2).reshape(B, -1, C))              # (B, T or P, C)


def attention_ratios(bench, repeats):
    """Time of a training step by hand over that with torch's attention, for each loop."""
    fused = Bench(bench.args, bench.env, attention=FusedAttention)
    jobs = {(kind, name): partial(b.train, name)
            for name in TRAINING for kind, b in (("by hand", bench), ("torch", fused))}
    times = timed(jobs, repeats, bench.env.device)
    return {f"attention_{name.replace(' ', '_')}":
            quotient(times["by hand", name], times["torch", name]) for name in TRAINING}


# --------------------------------------------------------------------------------------- the tables

def parts_table(bench, repeats):
    """Speed of every part, and the data path's share of a step: (FLOP/s of a matmul, table)."""
    matmul, matmul_flops = matmul_job(bench.args, bench.env.device)
    jobs, passes, table = bench.jobs(), bench.passes, {}
    data = {"data " + name: partial(bench.data_path, name) for name in TRAINING}
    times = timed({"matmul": matmul, **jobs, **data}, repeats, bench.env.device)
    rate = matmul_flops / statistics.median(times["matmul"])
    for name, job in jobs.items():
        flops, seconds = count_flops(job), statistics.median(times[name])
        row = table[name] = {
            "ms": 1e3 * seconds / passes,
            "tokens_per_s": bench.tokens(name) / seconds,
            "gflop": flops / passes / 1e9,
            "gflops": flops / seconds / 1e9,
            "of_matmul": quotient(times["matmul"], times[name]) * flops / matmul_flops,
            "peak_mib": job_memory(bench, name, job)}
        if name in TRAINING:
            row["data_ms"] = 1e3 * statistics.median(times["data " + name]) / passes
            row["data_share"] = quotient(times["data " + name], times[name])
    print(f"\n{bench.args.dtype} matmul: {rate / 1e9:.1f} GFLOP/s\n")
    print_parts(table)
    return rate, table


def print_parts(table):
    columns = {"ms": ("ms", 9, ".2f"), "tokens_per_s": ("tokens/s", 11, ",.0f"),
               "gflop": ("GFLOP", 9, ".2f"), "gflops": ("GFLOP/s", 9, ".1f"),
               "of_matmul": ("of matmul", 11, ".1%"), "peak_mib": ("peak MiB", 10, ",.0f"),
               "data_ms": ("data, ms", 10, ".2f"), "data_share": ("of a step", 11, ".1%")}
    print(" " * 18 + "".join(f"{title:>{width}}" for title, width, _ in columns.values()))
    for name, row in table.items():
        cells = [f"{row[key]:{width}{style}}"
                 for key, (_, width, style) in columns.items() if key in row]
        print(f"{name:18}" + "".join(cells))


def job_memory(bench, name, job):
    """MiB at most. On a GPU as if it ran alone: weights, the optimizer's state, what it uses."""
    device = bench.env.device
    if device.type != "cuda":
        return peak_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    job()
    own = list(bench.llm.parameters())
    if name in TRAINING:
        own = list(bench.optimizers[name].parameters)
        for half in bench.optimizers[name].both:
            own += [value for state in half.state.values() for value in state.values()]
    return peak_memory(device) + (sum(tensor.nbytes for tensor in own) - before) / 2 ** 20


def scaled_bench(axis, value, args, env):
    """A Bench that is larger in one respect: batches of `value` problems, a width of `value`, …"""
    mine = SimpleNamespace(**vars(args))
    if axis == "length":
        mine.block_size *= value
    else:
        field = {"chunk size": "chunk_size", "batch": "batch_size", "width": "n_embd"}[axis]
        setattr(mine, field, value)
    scale = value if axis == "length" else 1
    return Bench(mine, env, scale, count=3 * mine.batch_size)


def scaling_table(args, env, repeats):
    """One size at a time, all others as they are: {axis: {size: {part: ms}}}.

    Under every axis: time and FLOPs of its last row over its first.
    """
    scaling = {}
    for axis, values in AXES.items():
        benches = {value: scaled_bench(axis, value, args, env) for value in values}
        jobs = {(value, name): job
                for value in values for name, job in benches[value].jobs().items()}
        names = list(benches[values[0]].jobs())
        times = timed(jobs, repeats, env.device)
        print(f"\n{axis + ', ms':18}" + "".join(f"{name:>19}" for name in names))
        for value in values:
            row = {name: 1e3 * statistics.median(times[value, name]) / 3 for name in names}
            scaling.setdefault(axis, {})[value] = row
            label = f"×{value}" if axis == "length" else str(value)
            print(f"{label:18}" + "".join(f"{ms:19.2f}" for ms in row.values()))
        first, last = values[0], values[-1]
        cells = []
        for name in names:
            longer = quotient(times[last, name], times[first, name])
            more = count_flops(jobs[last, name]) / count_flops(jobs[first, name])
            cells.append(f"×{longer:.1f}, ×{more:.1f}")
        print(f"{'time, FLOPs':18}" + "".join(f"{cell:>19}" for cell in cells))
    return scaling


def setup(argv=None):
    """(args, env), as of the scripts; the sizes are those of --preset where no flag says more."""
    p = common.parser(__doc__, "sup")
    p.add_argument("--preset", choices=PRESETS, default="toy",
                   help="sizes of model, batch and data (default: toy)")
    p.add_argument("--tokens", type=int, help="ordinary tokens of the vocabulary (default: as many "
                   "as the data has)")
    p.add_argument("--json", type=Path, help="write the tables there, too")
    p.add_argument("--quick", action="store_true", help="fewer repeats, no scaling table")
    preset = PRESETS[p.parse_known_args(argv)[0].preset]
    p.set_defaults(**{k: v for k, v in preset.items() if not isinstance(v, dict)})
    return common.setup(p, "sup", argv)


def main():
    args, env = setup()
    repeats = 3 if args.quick else 7
    machine = f"CPU, {torch.get_num_threads()} threads"
    if env.device.type == "cuda":
        machine = torch.cuda.get_device_name(env.device)
    print(f"{machine}, torch {torch.__version__}")
    bench = Bench(args, env)
    rate, parts = parts_table(bench, repeats)
    ratios = {**Loops(args, env).ratios(repeats), **attention_ratios(bench, repeats)}
    print("\nratios " + "  ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    scaling = {} if args.quick else scaling_table(args, env, 3)
    if args.json:
        content = dict(machine=machine, config=env.config, matmul_gflops=rate / 1e9, parts=parts,
                       ratios=ratios, scaling=scaling)
        args.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    common.start(main)
