"""How fast is each part, and how close to what this machine can do?

    python -m lab.bench                                # the toy task's sizes, on a GPU if any
    python -m lab.bench --preset gsm8k --json b.json   # 96M parameters, for a GPU; as JSON, too
    python -m lab.bench --preset easy --tokens 50256   # with GPT-2's whole vocabulary
    python -m lab.bench --quick                        # three minutes on one core: fewer repeats

Weights and tokens are random, the lengths are those of the data; nothing is downloaded and nothing
trained. What is compared is timed in turn, and what is printed are medians. train_sup.py's flags
for model and training work, too: GPT-2 is --preset gsm8k --tokens 50256, and how a part scales is
asked with --batch-size 128 or --chunk-size 4.

FLOPs are counted from the shapes: 2 m k n for every product of an (m, k) and a (k, n) matrix,
forward, backward and in Muon, padding and masked pairs included, and nothing for the rest
(softmax, GELU, norms, AdamW). tokens/s counts what is real: tokens and latents, without padding.
Memory is what a part needs on a GPU besides weights and optimizer. `data` is the making of batches,
a Python loop that the device waits for; its share of a training step should stay under 3 %.
"""
import argparse
import contextlib
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import lab.setup
from data import Problems
from decode import decode, question_prompt
from encoder import (chain_batch, chunk_tokens, count_chunks, draw_continuations,
                     encoder_batch, latent_batch, ordinary_softmax, summary_states, sup_batch,
                     superpose_sparse, text_batch, top_k_renormalized)
from lab.files import Store
from lab.flags import SHAPE, flags_of
from lab.optim import Optimizer
from losses import (bag_kl, gumbel_noise, gumbel_perturb, latent_loss, sup_losses, text_loss)
from model import GPT, Attention, GPTConfig, gather_slots

# as measured: ordinary tokens; tokens of a question and of a chain, their mean and spread
PRESETS = {
    "toy": (410, (54.6, 1.5), (55, 6)),
    "easy": (4432, (40, 9), (19, 5)),
    "gsm8k": (13837, (55, 21), (26, 13)),
}
TRAINING = ("sft", "phase 1", "phase 3")
PASSES = 6  # batches that a job runs, about an epoch


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


def added_memory(job, device):
    """MiB that a job needs on a GPU at most, besides what is there before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    job()
    return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20


# ----------------------------------------------------------------------------------- what is timed

def stand_in(n_ordinary):
    """A tokenizer whose texts are numbers, each a token."""
    def encode(text):
        return [int(word) for word in text.replace("#### ", "").split()]

    ids = dict(zip(("eos", "bot", "eot", "sum"), range(n_ordinary, n_ordinary + 4)))
    return SimpleNamespace(encode=encode, **ids, n_ordinary=n_ordinary,
                           n_vocab=-(-(n_ordinary + 4) // 64) * 64)


def some_problems(tokenizer, count, args, x, s):
    """Problems of random tokens; x, s: mean and spread of the lengths of question and chain."""
    rng = np.random.default_rng(0)

    def text(mean, spread):
        length = max(2, round(rng.normal(mean, spread)))
        return " ".join(map(str, rng.integers(0, tokenizer.n_ordinary, length)))

    rows = [{"question": text(*x), "chain": text(*s), "answer": "1 2"} for _ in range(count)]
    return Problems(rows, tokenizer, args.block_size, args.chunk_size)


def random_store(problems, c, n_ordinary):
    """The store that phase 2 would write, with random α."""
    n = torch.from_numpy(count_chunks(problems.s.length, c))
    K, total = min(50, n_ordinary), int(n.sum())
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.dirichlet([0.1] * K, total)).float()
    ids = torch.from_numpy(rng.integers(0, n_ordinary, (total, K), dtype=np.int32))
    return Store(values, ids, n, offsets=n.cumsum(0) - n)


class Bench:
    """Models, data, and a job for each part."""

    def __init__(self, args, env, attention=Attention):
        n_ordinary, x, s = PRESETS[args.preset]
        tokenizer = stand_in(args.tokens or n_ordinary)
        self.args, self.env = args, SimpleNamespace(**vars(env) | {"tokenizer": tokenizer})
        self.problems = some_problems(tokenizer, PASSES * args.batch_size, args, x, s)
        self.batches = {name: list(self.draw_batches(name)) for name in TRAINING}
        config = GPTConfig(tokenizer.n_vocab, args.block_size, args.n_layer, args.n_head,
                           args.n_embd)
        self.llm, self.encoder = GPT(config).to(env.device), GPT(config).to(env.device)
        for block in (*self.llm.h, *self.encoder.h):
            block.attn.__class__ = attention
        with torch.no_grad():
            # logits of <eot> and <|endoftext|> are 0 and never the largest: only the caps end a row
            self.llm.wte.weight[[tokenizer.eot, tokenizer.eos]] = 0
        lab.setup.compile_blocks([self.encoder, self.llm], args)
        models = {"sft": [self.llm], "phase 1": [self.encoder, self.llm], "phase 3": [self.llm]}
        self.optimizers = {name: Optimizer(models[name], peak_lr=1e-6) for name in TRAINING}
        self.store = random_store(self.problems, args.chunk_size, tokenizer.n_ordinary)

    def draw_batches(self, name):
        """The batches of a phase's loop."""
        c = self.args.chunk_size
        chain_slots = {"sft": 1, "phase 1": 1 + 1 / c, "phase 3": 1 / c}[name]
        for step in range(PASSES):
            yield self.problems.train_batch(step, self.args.batch_size, 0, chain_slots)

    def inputs(self, name, batch):
        """The data path: what the phase's loop makes of a batch."""
        c, tokenizer = self.args.chunk_size, self.env.tokenizer
        if name == "sft":
            return (text_batch(batch),)
        if name == "phase 1":
            chunks = chunk_tokens([p.chain for p in batch.problems], c)
            return encoder_batch(batch, c, tokenizer.sum), chunks
        if name == "compress":
            return (encoder_batch(batch, c, tokenizer.sum),)
        seq = latent_batch(batch, c, self.store.n[batch.rows].tolist())
        values, ids = self.store.read(batch.rows, seq.alpha_index.size(1))     # (B, N, K)
        return seq, values, ids, gumbel_noise(0, 1, values.shape)

    def loss(self, name, batch):
        """What the phase's loop makes of a batch."""
        inputs = [x.to(self.env.device) for x in self.inputs(name, batch)]
        with self.env.autocast():
            if name == "sft":
                return text_loss(self.llm, *inputs)
            if name == "phase 1":
                return self.phase_1_loss(batch, *inputs)
            seq, values, ids, noise = inputs
            p = gumbel_perturb(values, noise)                                  # (B, N, K)
            z = superpose_sparse(p, ids, self.llm.wte.weight)                  # (B, N, C)
            return sum(latent_loss(self.llm, seq, z, p, ids))

    def phase_1_loss(self, batch, enc, chunks):
        c, parts = self.args.chunk_size, self.env.parts
        states = summary_states(self.encoder, enc, parts.encoder_mask)         # (B, N, C)
        alpha, z = parts.latent(self.encoder, states, self.llm.wte.weight,
                                self.env.tokenizer.n_ordinary)
        continued, k = draw_continuations(batch, c, self.args.continuation, seed=0, step=1)
        sup, cont = sup_losses(self.llm, z, batch, c, continued, k, parts.llm_mask)
        return sup + cont + bag_kl(alpha, chunks, enc.n)

    # the jobs

    def train(self, name, passes=PASSES):
        for batch in self.batches[name][:passes]:
            self.loss(name, batch).backward()
            self.optimizers[name].step(1.0)

    def data_path(self, name):
        for batch in self.draw_batches(name):
            self.inputs(name, batch)
            if name == "phase 1":  # sup_losses lays out a half of the batch in each way
                half, c = len(batch.rows) // 2, self.args.chunk_size
                sup_batch(batch.some(np.arange(half)), c)
                chain_batch(batch.some(np.arange(half)), c, [0] * half)

    @contextlib.contextmanager
    def eager(self):
        """As the scripts decode and compress: without the graphs that are made for training."""
        with self.env.autocast(), torch.compiler.set_stance("force_eager"):
            yield

    @torch.no_grad()
    def compress(self):
        tokenizer, K = self.env.tokenizer, self.store.values.size(1)
        for batch in self.batches["sft"]:
            enc = self.inputs("compress", batch)[0].to(self.env.device)
            with self.eager():
                hidden = summary_states(self.encoder, enc, self.env.parts.encoder_mask)
                alpha = ordinary_softmax(self.encoder.head(hidden), tokenizer.n_ordinary)
                for tensor in top_k_renormalized(alpha, K):
                    tensor.cpu()

    def caps(self, batch, latent):
        """(latents, tokens): as many as the batch's longest chain and answer need."""
        chain = max(len(p.chain) for p in batch.problems)
        answer = max(len(p.answer) for p in batch.problems)
        if latent:
            return count_chunks(chain, self.args.chunk_size), answer
        return 0, chain + answer

    def decode(self, latent, batches):
        """The tokens written, a list for each problem."""
        written, c = [], self.args.chunk_size if latent else 0
        for batch in batches:
            max_latents, max_tokens = self.caps(batch, latent)
            with self.eager():
                prompt = question_prompt(self.llm, batch)
                written += decode(self.llm, self.env.tokenizer, *prompt, c=c,
                                  max_latents=max_latents, max_tokens=max_tokens,
                                  latent=self.env.parts.latent).tokens
        return written

    def jobs(self):
        return {"sft": partial(self.train, "sft"),
                "phase 1": partial(self.train, "phase 1"),
                "compress": self.compress,
                "phase 3": partial(self.train, "phase 3"),
                "latent decoding": partial(self.decode, True, self.batches["sft"]),
                "explicit decoding": partial(self.decode, False, self.batches["sft"])}

    def tokens(self, name):
        """Real tokens and latents that a job reads, or writes."""
        batches = self.batches.get(name, self.batches["sft"])
        if name.endswith("decoding"):
            latent = name.startswith("latent")
            return sum(len(batch.rows) * sum(self.caps(batch, latent)) for batch in batches)
        c = self.args.chunk_size
        n = sum(count_chunks(len(p.chain), c) for batch in batches for p in batch.problems)
        x, s, a = (sum(len(p[i]) for batch in batches for p in batch.problems) for i in range(3))
        return {"sft": x + s + a, "compress": x + s + n, "phase 3": x + n + a,
                "phase 1": 2 * (x + s + n) + a}[name]


class FusedAttention(Attention):
    """Attention by torch's own function, to compare the handwritten one with in training."""

    def forward(self, x, bias, cache, index):
        B, T, C = x.shape
        H, D = self.n_head, C // self.n_head
        q, k, v = (y.view(B, T, H, D).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if index is not None:
            q = gather_slots(q, index)                                         # (B, H, P, D)
            bias = gather_slots(bias.expand(B, 1, T, -1), index)               # (B, 1, P, T)
        y = F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
        return self.c_proj(y.transpose(1, 2).reshape(B, -1, C))                # (B, T or P, C)


# -------------------------------------------------------------------------------------- the figures

def measure_parts(bench, repeats):
    """(FLOP/s of a large matrix product, {part: {figure: number}})."""
    device, dtype = bench.env.device, getattr(torch, bench.args.dtype)
    size = 8192 if device.type == "cuda" else 1536  # nothing larger is faster
    square = torch.randn(size, size, device=device, dtype=dtype)
    jobs, table = bench.jobs(), {}
    data = {"data " + name: partial(bench.data_path, name) for name in TRAINING}
    times = timed({"matmul": lambda: square @ square, **jobs, **data}, repeats, device)
    for name, job in jobs.items():
        flops, seconds = count_flops(job), statistics.median(times[name])
        row = table[name] = {
            "ms": 1e3 * seconds / PASSES,
            "tokens_per_s": bench.tokens(name) / seconds,
            "gflop": flops / PASSES / 1e9,
            "of_matmul": quotient(times["matmul"], times[name]) * flops / (2 * size ** 3)}
        if device.type == "cuda":
            row["added_mib"] = added_memory(job, device)
        if name in TRAINING:
            row["data_ms"] = 1e3 * statistics.median(times["data " + name]) / PASSES
            row["data_share"] = quotient(times["data " + name], times[name])
    return 2 * size ** 3 / statistics.median(times["matmul"]), table


def compare_attention(bench, repeats):
    """{loop: time of a training step with attention by hand over that with torch's}."""
    fused = Bench(bench.args, bench.env, FusedAttention)
    jobs = {(name, one): partial(one.train, name, passes=2)
            for name in TRAINING for one in (bench, fused)}
    times = timed(jobs, repeats, bench.env.device)
    return {name: quotient(times[name, bench], times[name, fused]) for name in TRAINING}


def print_parts(table):
    columns = {"ms": ".2f", "tokens_per_s": ",.0f", "gflop": ".2f", "of_matmul": ".1%",
               "added_mib": ",.0f", "data_ms": ".2f", "data_share": ".1%"}
    columns = {key: style for key, style in columns.items() if key in table["sft"]}
    print("\n" + " " * 18 + "".join(f"{key:>13}" for key in columns))
    for name, row in table.items():
        cells = [f"{row[key]:13{style}}" for key, style in columns.items() if key in row]
        print(f"{name:18}" + "".join(cells))


# --------------------------------------------------------------------------------------- the script

def setup(out, argv=None):
    """(args, env), as of the scripts, with the flags of the bench; out: a folder to lock."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    p.add_argument("--preset", choices=PRESETS, default="toy",
                   help="sizes of model, batch and data (default: toy)")
    p.add_argument("--tokens", type=int,
                   help="ordinary tokens of the vocabulary (default: as many as the data has)")
    p.add_argument("--json", type=Path, help="write all figures there, too")
    p.add_argument("--quick", action="store_true", help="fewer repeats")
    own, rest = p.parse_known_args(argv)
    flags = flags_of("sup")
    sizes = [f"--{flags[field].name}={flags[field].default[own.preset]}"
             for field in ("batch_size", *SHAPE)]
    args, env = lab.setup.setup(f"{__doc__}\n{p.format_help()}", "sup",
                                [*sizes, *rest, "--data", "toy", "--out", str(out)])
    return SimpleNamespace(**vars(args) | vars(own)), env


def main(argv=None):
    with tempfile.TemporaryDirectory() as out:
        args, env = setup(out, argv)
        repeats = 3 if args.quick else 7
        machine = f"CPU, {torch.get_num_threads()} threads"
        if env.device.type == "cuda":
            machine = torch.cuda.get_device_name(env.device)
        bench = Bench(args, env)
        rate, parts = measure_parts(bench, repeats)
        print(f"{machine}, torch {torch.__version__}; a matrix product of {args.dtype} runs at "
              f"{rate / 1e9:.1f} GFLOP/s")
        print_parts(parts)
        attention = compare_attention(bench, repeats)
        print("\nattention by hand over torch's:",
              *(f"{name} {value:.2f}" for name, value in attention.items()))
        if args.json:
            content = dict(machine=machine, settings=env.settings, matmul_gflops=rate / 1e9,
                           parts=parts, attention=attention)
            args.json.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    lab.setup.start(main)
