"""Measure and show: how well each way to think does, what the latents hold, and whether they do the work.

    python analyze.py                                         # the test split: report.html and report.json in --out
    python analyze.py --ask "Ann has 7 pens and buys 5. …"    # one question, in the terminal

report.json (shares are 0 … 1; lists go by position, K, k or i; null: not trained, or not defined here):
    accuracy, interval (95 %), steps, seconds, unparseable, capped (problems)     {explicit, no_cot, latent, gold}
    controls      own, zeroed, shuffled, random: accuracy when the chain is given so, interval; donor: the shuffled that
                  give the other problem's answer; cut {problems, k, accuracy}: z_0 … z_{k-1} alone
    continuation  {problems, i, accuracy, next_chunk}: z_0 … z_{i-1} given, the rest written as text: right answers, and
                  problems in which S_i comes next, token for token
    ecr           K; encoder, latent: {own, chance, maximum}
    parallelism   problems, paths; encoder, latent: {n_eff, above_1.7, covered, and each with _random}; orders (toy task),
                  encoder, latent: {mass [order][position], leading [position]: the larger order's share of the mass}
    shape         token_norm {low, mean, high}; encoder, latent: {count, entropy, top1, norm, cosine}
"""
import json
import math
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
from data import Problems, Ragged, UserError, fetch, problem, read, to_number
from encoder import chunks, decode, encoder_layout, place, summarize, superpose
from train_sup import bags

KS = (1, 2, 5, 10, 50, 100, 300)  # ECR@K; the largest is also how much of each α is kept
TOP, FLOOR = 100, 1e-6            # entries of α that count for a path; the mass of a span that has none of them
COVER = 0.05                      # a span is covered where each of its tokens has this much (two paths, c = 4: 0.125)
FEW, POINTS, SHOWN = 256, 25, 12  # for curves that decode anew at every point: problems, points; problems in the page
WAYS = {"explicit": ("Explicit chain of thought", "sft", "text"), "no_cot": ("No chain of thought", "no_cot", "text"),
        "latent": ("Latent chain", "latent", "latent"), "gold": ("Summaries by the encoder", "sup", "gold")}


# ---------------------------------------------------------------------- metrics: pure functions of tensors (DESIGN 7)
#
# R problems, N latents at most, K entries kept, M paths, W tokens of a span; token arrays are padded with -1.
# values float32 (R, N, K), ids int (R, N, K): α's largest entries in falling order. n int64 (R,): latents.

def wilson(right, n):
    """The 95 % interval [low, high] of a share: `right` of n."""
    p, z2 = right / n, 1.96 ** 2
    half = (z2 * p * (1 - p) / n + (z2 / n) ** 2 / 4) ** 0.5
    return [(p + z2 / n / 2 + sign * half) / (1 + z2 / n) for sign in (-1, 1)]


def mean(x):
    """Mean of what is finite; None where nothing is."""
    x = x[x.isfinite()].double()
    return x.mean().item() if len(x) else None


def distinct(tokens):
    """The first of each token in a span: int (..., W) -> bool (..., W)."""
    return (tokens >= 0) & ~(tokens[..., :, None] == tokens[..., None, :]).tril(-1).any(-1)


def weight(values, ids, tokens):
    """α of these tokens, 0 past its K entries: (..., K), (..., K), int (..., W) -> float32 (..., W)."""
    return ((ids[..., None, :] == tokens[..., :, None]) * values[..., None, :]).sum(-1)


def ecr(ids, bag, real, ks):
    """ECR@K: tokens of S_i among the top K of α_i, mean over latents, a list over ks. bag int (R, N, c): the chunks."""
    match = (ids[:, :, None, :] == bag[..., None])[real]  # (latents, c, K)
    return [mean(match[..., :k].any(2).sum(1).double()) for k in ks]


def ecr_maximum(bag, real, ks):
    """The largest ECR@K possible: K ids cover no more than a chunk's K most frequent tokens."""
    times = ((bag[..., :, None] == bag[..., None, :]).sum(-1) * distinct(bag))[real]  # (latents, c)
    return [mean(times.sort(1, descending=True)[0][:, :k].sum(1).double()) for k in ks]


def spans(tokens, length, n, c, N):
    """A path in as many spans as there are latents: its chunks where that is their number, else equal parts of a token
    at least. tokens int64 (..., L), length, n int64 (...) -> int64 (..., N, W)."""
    t, n, length = torch.arange(N + 1), n[..., None], length[..., None]
    fits = chunks(length, c) == n
    edge = -(-t * torch.where(fits, c, length) // torch.where(fits, 1, n.clamp(min=1)))  # (..., N + 1): ⌈t · L / n⌉
    start = edge[..., :-1].minimum(length - 1).clamp(min=0)
    end = edge[..., 1:].maximum(start + 1).minimum(length).where(t[:-1] < n, start)      # (..., N)
    at = start[..., None] + torch.arange(max(1, int((end - start).max())))               # (..., N, W)
    span = tokens[..., None, :].expand(*at.shape[:-1], -1).gather(-1, at.clamp(max=tokens.size(-1) - 1))
    return span.where(at < end[..., None], -1)


def parallelism(values, ids, path, n):
    """(N_eff, covered), how many of its paths a chain follows: float (R,) each. path int64 (R, M, N, W): the spans.

    N_eff = exp(H(softmax_m score_m)), score_m = mean_t log Σ_{v ∈ S_mt} α_t[v]: one path followed makes 1, M alike
    make M, and so do M of which none is. covered = the different spans covered at t, mean over the t where the paths
    differ (NaN without any): one path followed makes 1, none makes 0.
    """
    w, fresh, M = weight(values[:, None], ids[:, None], path), distinct(path), path.size(1)    # (R, M, N, W) each
    real, known = torch.arange(path.size(2)) < n[:, None], (path >= 0).flatten(2).any(2)       # (R, N), (R, M)
    score = (w * fresh).sum(3).clamp(min=FLOOR).log().where(real[:, None], 0).sum(2) / n[:, None]
    n_eff = torch.special.entr(score.masked_fill(~known, -math.inf).softmax(1)).sum(1).exp()
    tokens = path.where(fresh, -1).sort(3)[0]
    same = (tokens[:, :, None] == tokens[:, None]).all(4)                                      # (R, M, M, N)
    first = ~(same & torch.ones(M, M).tril(-1).bool()[:, :, None]).any(2) & known[:, :, None]  # (R, M, N)
    differ = (first.sum(1) > 1) & real
    full = w.where(path >= 0, math.inf).amin(3) >= COVER
    return n_eff, ((full & first).sum(1) * differ).sum(1) / differ.sum(1)


def orders(values, ids, path):
    """α on each path's own tokens, those of no other path in that span: (R, M, N); NaN where a path has none."""
    shared = (path[:, :, None, :, :, None] == path[:, None, :, :, None, :]).any(5)  # (R, M, M, N, W)
    own = distinct(path) & ~(shared & ~torch.eye(path.size(1)).bool()[:, :, None, None]).any(2)
    mass = (weight(values[:, None], ids[:, None], path) * own).sum(3)
    return mass.masked_fill(~own.any(3).all(1)[:, None], math.nan)


def shape(lat):
    """Entropy in nats, top-1 mass, norm of z, cosine of z_t and z_{t+1}: at each position, mean of the chains so long."""
    real = torch.arange(lat.ids.size(1)) < lat.n[:, None]
    cosine = torch.cosine_similarity(lat.z[:, :-1], lat.z[:, 1:], dim=2).where(real[:, 1:], math.nan)
    columns = {"entropy": lat.entropy, "top1": lat.values[:, :, 0], "norm": lat.z.norm(dim=2)}
    return {"count": real.sum(0).tolist(), "cosine": [mean(x) for x in cosine.T],
            **{name: [mean(x) for x in value.where(real, math.nan).T] for name, value in columns.items()}}


# ------------------------------------------------- what the models do; env: also the test split, caps, batch size, c

@torch.no_grad()
def observe(llm, env, top_k, R, encoder=None):
    """The chains of R problems, those the LLM thinks or, with an `encoder`, what that makes of the true chains:
    n (R,), values, ids (R, N, K), entropy (R, N), z (R, N, C), and the texts the LLM answers."""
    t, texts = env.tokenizer, [""] * R
    n = torch.from_numpy(chunks(env.test.s.length[:R], env.c) if encoder else np.zeros(R, int))
    N, K = max(env.caps[0], int(n.max()), 1), min(max(KS), t.n_ordinary)
    kept = {"values": torch.zeros(R, N, K), "ids": torch.zeros(R, N, K, dtype=torch.int32),
            "entropy": torch.zeros(R, N), "z": torch.zeros(R, N, llm.config.n_embd)}

    def keep(rows, step, alpha):
        new = *alpha.topk(K), torch.special.entr(alpha).sum(-1), superpose(alpha, llm.wte.weight, top_k)
        for array, value in zip(kept.values(), new):
            array[rows, step] = value.to("cpu", array.dtype)

    for batch in env.test.eval_batches(-(-env.size // 8) if encoder else env.size, R):  # (B, N, V): large for GPT-2's V
        rows, x, nx = (torch.from_numpy(a) for a in (batch.rows, batch.x, batch.nx))
        with env.autocast():
            if encoder:
                alpha = summarize(encoder, encoder_layout(batch, env.c, t.sum).to(env.device), t.n_ordinary)[:, :N]
                keep(rows[:, None], torch.arange(alpha.size(1)), alpha)
                continue
            out = decode(llm, t, llm.wte(x.to(env.device)), nx.to(env.device), True, top_k, *env.caps,
                         watch=lambda step, q, on: keep(rows[on.cpu()], step, q[on]))
        n[rows] = out.latents.cpu()
        for row, tokens in zip(batch.rows, out.tokens):
            texts[row] = t.decode(tokens).removeprefix("<eot>")
    return SimpleNamespace(n=n, texts=texts, **{name: array[:, :max(1, int(n.max()))] for name, array in kept.items()})


@torch.no_grad()
def write_on(llm, env, z, n, end=True):
    """What the LLM writes after X <bot> z_0 … z_{n-1} (end: and <eot>): R token lists. z (R, N, C), n (R,)."""
    written = [None] * len(n)
    for batch in env.test.eval_batches(env.size, len(n)):
        rows, nx = torch.from_numpy(batch.rows), torch.from_numpy(batch.nx)[:, None]
        k = n[rows, None].minimum(llm.config.block_size - 1 - nx)  # (B, 1)
        at = torch.arange(int((nx + k).max()) + 1) - nx            # (B, T): 0 where z_0 stands
        ids = torch.from_numpy(env.test.x.pad(batch.rows, at.size(1))).masked_fill(at == k, env.tokenizer.eot)
        latent = (at + 1).where((at >= 0) & (at < k), 0)
        with env.autocast():
            x = place(llm.wte(ids.to(env.device)), z[rows].to(env.device), latent.to(env.device))
            out = decode(llm, env.tokenizer, x, (nx + k + end)[:, 0].to(env.device), max_tokens=env.caps[1])
        for row, tokens in zip(batch.rows, out.tokens):
            written[row] = tokens
    return written


def prefixes(llm, env, lat, end=True):
    """(k, what it writes after z_0 … z_{k-1}), k = 0 … N or POINTS of them, for the first FEW problems."""
    n = lat.n[:FEW]
    ks = np.unique(np.linspace(0, n.max(), POINTS).round().astype(int)).tolist()
    return ks, [write_on(llm, env, lat.z[:FEW], n.clamp(max=k), end) for k in ks]


def score(written, problems, env):
    """The share of these answers (token lists) that is right."""
    return mean(torch.tensor([to_number(env.tokenizer.decode(w)) == to_number(p["answer"]) for w, p in zip(written, problems)]))


# ---------------------------------------------------------------------------------------------- the report's sections

def measure_controls(llm, env, lat):
    """Accuracy of the latent model when its chain is given to it: its own, or one that holds less."""
    R, problems, (ks, cut) = len(lat.n), env.test.problems, prefixes(llm, env, lat)
    tokens = np.random.default_rng([env.config["seed"], 7]).integers(env.tokenizer.n_ordinary, size=lat.z.shape[:2])
    chains = {"own": (lat.z, lat.n), "zeroed": (0 * lat.z, lat.n), "shuffled": (lat.z.roll(1, 0), lat.n.roll(1)),
              "random": (llm.wte.weight.detach().cpu()[torch.from_numpy(tokens)], lat.n)}
    written = {name: write_on(llm, env, *chain) for name, chain in chains.items()}
    found = {name: score(w, problems, env) for name, w in written.items()}
    return found | {"interval": {name: wilson(right * R, R) for name, right in found.items()},
                    "donor": score(written["shuffled"], [problems[R - 1], *problems[:R - 1]], env),
                    "cut": {"problems": min(R, FEW), "k": ks, "accuracy": [score(w, problems, env) for w in cut]}}


def measure_continuation(llm, env, lat):
    """The LLM of phase 1 gets z_0 … z_{i-1} for the first i chunks (or all there are) and writes the rest as text."""
    points, texts = prefixes(llm, env, lat, end=False)
    chains = [env.test.s.flat[a:a + l].tolist() for a, l in zip(env.test.s.start[:len(texts[0])], env.test.s.length)]
    exact = [[w[:len(s)] == s for w, s in zip(written, [s[i * env.c:][:env.c] for s in chains]) if s]
             for i, written in zip(points, texts)]
    return {"problems": len(chains), "i": points, "accuracy": [score(w, env.test.problems, env) for w in texts],
            "next_chunk": [mean(torch.tensor(e)) for e in exact]}


def measure_ecr(lat, bag, ks):
    """ECR of a chain against the problem's chunks, bag (R, N, c), and against the next problem's: chance."""
    N, count = min(lat.ids.size(1), bag.size(1)), (bag[:, :, 0] >= 0).sum(1)
    real = torch.arange(N) < lat.n.minimum(count)[:, None]
    at = torch.arange(N) % count.roll(1).clamp(min=1)[:, None]  # (R, N): from the start again where its chain is shorter
    other = bag.roll(1, 0).gather(1, at[:, :, None].expand(-1, -1, bag.size(2)))
    ids, bag = lat.ids[:, :N], bag[:, :N]
    return {"own": ecr(ids, bag, real, ks), "chance": ecr(ids, other, real, ks), "maximum": ecr_maximum(bag, real, ks)}


def all_paths(args, problems):
    """Each problem's different chains known to be right: the toy task's own, or those published for GSM8K."""
    def published(line, cot):
        row = json.loads(line)
        return row["question"].strip(), [problem(row["question"], *m["solution"].rpartition("\nA:")[::2], cot)["chain"]
                                         for m in row.values() if isinstance(m, dict) and m["is_correct"]]
    file = Path(args.data_dir or "data/gsm8k" if args.data == "gsm8k" else args.data) / "example_model_solutions.jsonl"
    try:
        if args.data == "gsm8k":
            fetch(file)
        known = {} if args.data == "toy" else dict(read(file, published, args.cot))
    except (UserError, LookupError, TypeError) as error:
        print(f"parallelism: only the given chains, for want of others ({error})")
        known = {}
    return [p.get("paths") or [s for s in dict.fromkeys([p["chain"], *known.get(p["question"], [])]) if s] for p in problems]


def measure_parallelism(env, lats, paths):
    """Both measures for every problem with two paths or more, and for as many paths of other problems; None without."""
    rows = torch.tensor([r for r, known in enumerate(paths) if len(known) > 1])
    if len(rows) < 2:
        return None
    count = torch.tensor([len(paths[r]) for r in rows])[:, None]  # (R, 1)
    text = Ragged(env.tokenizer.encoding.encode_ordinary_batch([s for r in rows for s in paths[r]] + [""]))
    total, length, j = len(text.length) - 1, torch.from_numpy(text.length), torch.arange(int(count.max()))
    tokens = torch.from_numpy(text.pad(np.arange(total + 1), length.max()))  # (all paths and an empty one, L)
    own, toy = count.cumsum(0) - count + j, "paths" in env.test.problems[0]  # (R, M): whose are which
    report = {"problems": len(rows), "paths": mean(count), "orders": {} if toy else None}
    for name, lat in lats.items():
        n, report[name] = lat.n[rows], {}
        for suffix, which in ("_random", own + count), ("", own):            # random: those of the problems after it
            which, found, mass = (which % total).where(j < count, total), [], []
            for some in torch.arange(len(rows)).split(64):                   # (R, M, N, W, K) is large
                path = spans(tokens[which[some]], length[which[some]], n[some, None], env.c, lat.ids.size(1))
                alpha = lat.values[rows[some], :, :TOP], lat.ids[rows[some], :, :TOP]
                found.append(torch.stack(parallelism(*alpha, path, n[some])))
                mass += [orders(*alpha, path)] if toy else []
            n_eff, covered = torch.cat(found, 1)[:, n > 0]
            report[name] |= {"n_eff" + suffix: mean(n_eff), "above_1.7" + suffix: mean(n_eff > 1.7), "covered" + suffix: mean(covered)}
        if toy:
            mass = torch.cat(mass)                                           # (R, M, N)
            report["orders"][name] = {"mass": [[mean(x) for x in m.T] for m in mass.unbind(1)],
                                      "leading": [mean(x) for x in (mass.amax(1) / mass.sum(1)).T]}
    return report


# ------------------------------------------------------------------------------------------------------- the picture
