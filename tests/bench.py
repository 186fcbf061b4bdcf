"""How fast is each part, and how close to what this machine can do?

    python tests/bench.py                                   # the toy task's sizes, on a GPU if there is one
    python tests/bench.py --preset gsm8k --json bench.json  # the same tables as JSON, with an object `ratios`
    python tests/bench.py --preset gpt2 --batch-size 32     # GPT-2 124M at GSM8K lengths
    python tests/bench.py --quick                           # a minute: fewer repeats, no scaling table

Weights and tokens are random, the lengths those of the data; nothing is downloaded and nothing trained. Everything
compared is timed side by side, in turn, and what is printed are medians. All flags of train_sup.py work too.

FLOPs are counted from the shapes: 2 m k n for every product of an (m, k) and a (k, n) matrix that runs, forward and
backward, padding and masked pairs included, and nothing for the rest (softmax, GELU, norms, Adam). For a model that is
24 C² + 4 S C a layer and position (12 C² weights; scores and weighted sum over S positions), less in the last layer,
where only the positions asked for go on from their keys and values; 2 C V for each position with logits, as much for a z
over the whole vocabulary; and three times that for a training step.
tokens/s counts what is real: tokens and latents, without padding.
"""
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
from compress import Store
from data import Problems
from encoder import (chunks, decode, encoder_layout, explicit_layout, llm_layout, ordinary_softmax, place, summarize,
                     supervision_mask)
from model import GPT, GPTConfig
from train_latent import LatentReasoner, gumbel_noise
from train_sup import Explicit, Superposition, bags, weighted_nll

GSM8K = dict(x=(56, 21), s=(24, 11), a=(4, 0), n_ordinary=50256)  # tokens: mean and spread, as measured
LENGTHS = {"toy": dict(x=(36, 1.5), s=(34, 3), a=(4, 0), n_ordinary=403), "gsm8k": GSM8K, "gpt2": GSM8K}
PRESETS = dict(common.PRESETS, gpt2=dict(common.PRESETS["gsm8k"], n_layer=12, n_head=12, n_embd=768, block_size=1024))


# ------------------------------------------------------------------------------------------------- measuring

def timed(jobs, repeats, device):
    """{name: seconds of every repeat}: all jobs in turn; a first round, which compiles, is not counted."""
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
    return lambda: a @ a, 2 * n ** 3


def peak_memory(device):
    """MiB: on a GPU what the tensors took at most since the last reset, on a CPU the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ------------------------------------------------------------------------------------------ what is measured

def stand_in(n_ordinary):
    """A tokenizer whose texts are numbers, each a token."""
    def encode(text):
        return [int(word) for word in text.replace("#### ", "").split()]
    ids = dict(zip(("eos", "bot", "eot", "sum"), range(n_ordinary, n_ordinary + 4)))
    return SimpleNamespace(encoding=SimpleNamespace(encode_ordinary=encode), name="stand-in", **ids,
                           n_ordinary=n_ordinary, n_vocab=-(-(n_ordinary + 4) // 64) * 64)


def some_problems(tokenizer, count, block_size, x, s, a, scale=1):
    """Problems of random tokens; lengths with that mean and spread, X and S `scale` times as long."""
    rng = np.random.default_rng(0)

    def text(mean, spread, scale, extra, least):
        length = max(least, round(rng.normal(mean, spread) * scale) - extra)
        return " ".join(map(str, rng.integers(0, tokenizer.n_ordinary, length)))
    rows = [dict(question=text(*x, scale, 1, 4), chain=text(*s, scale, 0, 2), answer=text(*a, 1, 2, 1))
            for _ in range(count)]
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

    def tokens(self, name):
        """Real tokens and latents a job reads, or writes."""
        c, total = self.args.chunk_size, 0
        for b in self.batches:
            n, rest = chunks(b.ns, c), np.maximum(b.ns - c, 0)
            latents, written = self.caps(b, name.startswith("latent"))
            total += {"sft": b.nx + b.ns + b.na, "phase 1": 2 * b.nx + b.ns + rest + 2 * n + b.na,
                      "compress": b.nx + b.ns + n, "phase 3": b.nx + n + b.na,
                      }.get(name, np.full(len(b.rows), latents + written)).sum()
        return int(total)


# ------------------------------------------------------------------------- what the layouts and the cache replace

class Loops(Bench):
    """The same results the plain way, on the largest bucket; `ratios` checks that they are the same."""

    def __init__(self, args, env):
        super().__init__(args, env)
        batch, c, t, device = self.batches[-1], args.chunk_size, self.env.tokenizer, env.device
        self.e, self.l = encoder_layout(batch, c, t.sum).to(device), llm_layout(batch, c).to(device)
        n = chunks(batch.ns, c)
        B, N = self.e.mark.shape
        self.z = torch.randn(B, N, args.n_embd, device=device, requires_grad=True)
        self.encoder_passes, self.llm_passes = [], []
        for i in range(n.max()):  # pass i: the rows that have a chunk i
            rows, read = (n > i).nonzero()[0], np.minimum((i + 1) * c, batch.ns)
            texts = [[*batch.x[r, :batch.nx[r]], *batch.s[r, :read[r]], t.sum] for r in rows]
            self.encoder_passes.append((self.pad(texts), self.pad([[len(text) - 1] for text in texts])))
            nexts = [batch.s[r, (i + 1) * c:min((i + 2) * c, batch.ns[r])] if i + 1 < n[r] else batch.a[r, :batch.na[r]]
                     for r in rows]
            x = [batch.x[r, :batch.nx[r]] for r in rows]
            ids = self.pad([[*a, *[0] * (i + 1), *b] for a, b in zip(x, nexts)])
            latent = self.pad([[*a * 0, *range(1, i + 2)] for a in x], ids.size(1))
            target = self.pad(nexts)
            at = self.pad([[len(a) + i] for a in x]) + torch.arange(target.size(1), device=device)
            at = at.clamp(max=ids.size(1) - 1)
            weight = self.pad([[1 / n[r] / len(b)] * len(b) for r, b in zip(rows, nexts)]).float()
            self.llm_passes.append((self.pad([rows])[0], ids, latent, at, target, weight))

    def pad(self, rows, width=0):
        width = max(width, *map(len, rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.env.device)

    def summaries(self):
        with self.env.autocast():
            alpha = summarize(self.encoder, self.e, self.env.tokenizer.n_ordinary)  # (B, N, n_ordinary)
        real = torch.arange(alpha.size(1), device=alpha.device) < self.e.n[:, None]
        return self.backward(alpha.square().sum(2).where(real, 0).sum())

    def summaries_loop(self):
        total = 0
        for ids, at in self.encoder_passes:
            with self.env.autocast():
                logits = self.encoder.head(self.encoder(self.encoder.wte(ids), at=at))
            total += self.backward(ordinary_softmax(logits, self.env.tokenizer.n_ordinary).square().sum())
        return total

    def ltsum(self):
        seq = self.l
        with self.env.autocast():
            x = place(self.llm.wte(seq.ids), self.z, seq.latent)
            logits = self.llm.head(self.llm(x, seq.pos, supervision_mask(seq.seg), at=seq.at))
        return self.backward(weighted_nll(logits, seq.target, seq.weight))

    def ltsum_loop(self):
        total = 0
        for rows, ids, latent, at, target, weight in self.llm_passes:
            with self.env.autocast():
                logits = self.llm.head(self.llm(place(self.llm.wte(ids), self.z[rows], latent), at=at))
            total += self.backward(weighted_nll(logits, target, weight) * len(rows) / self.args.batch_size)
        return total

    def backward(self, loss):
        loss.backward()
        for p in (self.z, *self.llm.parameters(), *self.encoder.parameters()):
            p.grad = None
        return loss.detach()

    @torch.no_grad()
    def cached(self, cached=True, B=16, prompt=56, steps=28):
        """Explicit decoding at GSM8K's mean lengths, with the KV cache or reading everything again at every step."""
        ids = torch.arange(B * prompt, device=self.env.device).view(B, prompt) % self.env.tokenizer.n_ordinary
        with self.env.autocast():
            x, out = self.llm.wte(ids), []
            if cached:
                length = torch.full_like(ids[:, 0], prompt)
                return decode(self.llm, self.env.tokenizer, x, length, max_tokens=steps).tokens
            for _ in range(steps):
                last = torch.full_like(ids[:, :1], x.size(1) - 1)
                out.append(self.llm.head(self.llm(x, at=last))[:, 0].argmax(1))
                x = torch.cat([x, self.llm.wte(out[-1])[:, None]], 1)
        return torch.stack(out, 1).tolist()

    def ratios(self, repeats):
        tolerance = 1e-3 if self.args.dtype == "float32" else 5e-2
        for one, loop in (self.summaries(), self.summaries_loop()), (self.ltsum(), self.ltsum_loop()):
            torch.testing.assert_close(one, loop, rtol=tolerance, atol=0)
        assert self.args.dtype != "float32" or self.cached() == self.cached(False)
        many = [self.problems.batch(np.resize(self.problems.buckets[1], 64), self.problems.buckets[1])]
        times = timed({
            "summaries": self.summaries, "summaries loop": self.summaries_loop,
            "ltsum": self.ltsum, "ltsum loop": self.ltsum_loop,
            "cached": self.cached, "uncached": lambda: self.cached(False),
            "latent": lambda: self.decode(True, batches=many), "explicit": lambda: self.decode(False, batches=many),
            "one latent": lambda: [self.decode(True, slice(i, i + 1), many) for i in range(4)],
            "one explicit": lambda: [self.decode(False, slice(i, i + 1), many) for i in range(4)],
        }, repeats, self.env.device)
        return {"one_pass_summaries": quotient(times["summaries loop"], times["summaries"]),
                "one_pass_ltsum": quotient(times["ltsum loop"], times["ltsum"]),
                "cached_decoding": quotient(times["uncached"], times["cached"]),
                "batched_decoding": 16 * quotient(times["one latent"], times["latent"]),
                "latent_over_explicit": quotient(times["latent"], times["explicit"]),
                "latent_over_explicit_one": quotient(times["one latent"], times["one explicit"])}


# ------------------------------------------------------------------------------------------------ the tables

def parts_table(bench, repeats):
    """Speed of every part, and the data path's share of a training step."""
    matmul, matmul_flops = matmul_job(bench.args, bench.env.device)
    jobs = {"matmul": matmul, **bench.jobs()}
    jobs |= {"data " + name: lambda name=name: bench.data_path(name) for name in bench.runs}
    times, passes, table = timed(jobs, repeats, bench.env.device), len(bench.batches), {}
    rate = matmul_flops / statistics.median(times["matmul"])
    print(f"\n{bench.args.dtype} matmul: {rate / 1e9:.1f} GFLOP/s\n\n{'':18}{'ms':>9}{'tokens/s':>11}{'GFLOP':>9}"
          f"{'GFLOP/s':>9}{'of matmul':>11}{'peak MiB':>10}{'data, ms':>10}{'of a step':>11}")
    for name, job in bench.jobs().items():
        flops, tokens = count_flops(job), bench.tokens(name)
        seconds = statistics.median(times[name])
        row = table[name] = dict(ms=1e3 * seconds / passes, tokens_per_s=tokens / seconds, gflop=flops / passes / 1e9,
                                 gflops=flops / seconds / 1e9, peak_mib=job_memory(bench, name, job),
                                 of_matmul=quotient(times["matmul"], times[name]) * flops / matmul_flops)
        print(f"{name:18}{row['ms']:9.2f}{row['tokens_per_s']:11,.0f}{row['gflop']:9.2f}{row['gflops']:9.1f}"
              f"{row['of_matmul']:11.1%}{row['peak_mib']:10,.0f}", end="")
        if name in bench.runs:
            row["data_ms"] = 1e3 * statistics.median(times["data " + name]) / passes
            row["data_share"] = quotient(times["data " + name], times[name])
            print(f"{row['data_ms']:10.2f}{row['data_share']:11.1%}", end="")
        print()
    return rate, table


def job_memory(bench, name, job):
    """MiB at most. On a GPU as if this part ran alone: its weights and Adam's two moments, and what it allocates."""
    device = bench.env.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        run = bench.runs.get(name)
        own = sum(12 * p.numel() for p in run.parameters) if run else sum(4 * p.numel() for p in bench.llm.parameters())
        return peak_memory(device) + (own - before) / 2 ** 20
    return peak_memory(device)


def scaling_table(args, env, repeats):
    """One size at a time, all others as they are. Under every axis: time and FLOPs of its last row over its first."""
    axes = {"length": [1, 2, 4], "chunk size": [8, 4, 2, 1], "batch": [8, 32, 128], "width": [64, 128, 256]}
    scaling = {}
    for axis, values in axes.items():
        benches = {}
        for v in values:
            mine = SimpleNamespace(**vars(args))
            if axis == "length":
                mine.block_size *= v
            else:
                setattr(mine, {"chunk size": "chunk_size", "batch": "batch_size", "width": "n_embd"}[axis], v)
            benches[v] = Bench(mine, env, scale=v if axis == "length" else 1, count=3 * mine.batch_size)
        jobs = {(v, name): job for v, b in benches.items() for name, job in b.jobs().items()}
        times = timed(jobs, repeats, env.device)
        names = list(benches[values[0]].jobs())
        print(f"\n{axis + ', ms':18}" + "".join(f"{name:>19}" for name in names))
        for v in values:
            row = {name: 1e3 * statistics.median(times[v, name]) / 3 for name in names}
            scaling.setdefault(axis, {})[v] = row
            print(f"{'×' * (axis == 'length') + str(v):18}" + "".join(f"{ms:19.2f}" for ms in row.values()))
        first, last = values[0], values[-1]
        print(f"{'time, FLOPs':18}" + "".join("{:>19}".format(
            f"×{quotient(times[last, name], times[first, name]):.1f}, ×"
            f"{count_flops(jobs[last, name]) / count_flops(jobs[first, name]):.1f}") for name in names))
    return scaling


def main():
    p = common.parser(__doc__, "sup")
    p.add_argument("--preset", choices=PRESETS, default="toy", help="sizes of model, batch and data (default: toy)")
    p.add_argument("--json", type=Path, help="write the tables there, too")
    p.add_argument("--quick", action="store_true", help="fewer repeats, no scaling table")
    preset = PRESETS[p.parse_known_args()[0].preset]
    p.set_defaults(**{k: v for k, v in preset.items() if not isinstance(v, dict)})
    args, env = common.setup(p, "sup")
    repeats = 3 if args.quick else 7
    cuda = env.device.type == "cuda"
    machine = torch.cuda.get_device_name(env.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}")
    rate, parts = parts_table(Bench(args, env), repeats)
    ratios = Loops(args, env).ratios(repeats)
    print("\nratios " + "  ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    scaling = {} if args.quick else scaling_table(args, env, 3)
    if args.json:
        content = dict(machine=machine, config=env.config, matmul_gflops=rate / 1e9, parts=parts, ratios=ratios,
                       scaling=scaling)
        args.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    common.start(main)
