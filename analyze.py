"""Measure and show: how well each way to think does, what the latents hold, and whether they do the work.

    python analyze.py                           # the test split: report.html to read, report.json to compute with
    python analyze.py --limit 200               # its first 200 problems
    python analyze.py --ask "Ann has 7 pens and buys 5. …"     # one question, in the terminal

report.json (shares are 0 … 1; lists go by position, K or k; null: not trained, or not defined here):
    accuracy, interval, steps, seconds, unparseable, capped
                  {explicit, no_cot, latent, gold}; interval: 95 %, Wilson; unparseable, capped: counts of problems
    controls      problems; own, zeroed, shuffled, random: accuracy when the chain is given so; interval; donor: share of
                  the shuffled that give the other problem's answer; cut {problems, k, accuracy}: z_0 … z_{k-1} alone
    continuation  {problems, i, accuracy, next_chunk}: z_0 … z_{i-1} given, the rest written as text: how many answers
                  are right, and in how many problems S_i comes next, token for token
    ecr           K; encoder, latent: {own, chance, maximum}
    parallelism   problems, paths; encoder, latent: {n_eff, above_1.7, covered and all three with _random}; orders (toy
                  task), encoder, latent: {mass [order][position], leading [position], histogram}; see `orders`
    shape         token_norm {mean, low, high}; encoder, latent: {count, entropy, top1, norm, cosine}
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
FEW, POINTS = 256, 25             # the curves that decode again at every point: problems, and points at most
SHOWN = 12                        # problems right, and wrong, in report.html
WAYS = {"explicit": "Explicit chain of thought", "no_cot": "No chain of thought", "latent": "Latent chain",
        "gold": "Encoder’s summaries"}


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


def exists(n, N):
    """Which latents there are: bool (R, N)."""
    return torch.arange(N) < n[:, None]


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
    w, fresh, M = weight(values[:, None], ids[:, None], path), distinct(path), path.size(1)  # (R, M, N, W) each
    real, known = exists(n, path.size(2)), (path >= 0).flatten(2).any(2)                     # (R, N), (R, M)
    score = (w * fresh).sum(3).clamp(min=FLOOR).log().where(real[:, None], 0).sum(2) / n[:, None]
    n_eff = torch.special.entr(score.masked_fill(~known, -math.inf).softmax(1)).sum(1).exp()
    tokens = path.where(fresh, -1).sort(3)[0]
    same = (tokens[:, :, None] == tokens[:, None]).all(4)                                    # (R, M, M, N)
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
    real = exists(lat.n, lat.ids.size(1))
    cosine = torch.cosine_similarity(lat.z[:, :-1], lat.z[:, 1:], dim=2).where(real[:, 1:], math.nan)
    columns = {"entropy": lat.entropy, "top1": lat.values[:, :, 0], "norm": lat.z.norm(dim=2)}
    return {"count": real.sum(0).tolist(), "cosine": [mean(x) for x in cosine.T],
            **{name: [mean(x) for x in value.where(real, math.nan).T] for name, value in columns.items()}}


# ---------------------------------------------------------------------------------------------- what the models do

@torch.no_grad()
def observe(llm, test, env, top_k, R, size, caps=(0, 0), encoder=None, c=1):
    """The chains of R problems: those the LLM thinks, or with an `encoder`, what that makes of the true chains.

    Has n (R,), values, ids (R, N, K), entropy (R, N), z (R, N, C), and the LLM's texts.
    """
    t, n = env.tokenizer, torch.from_numpy(chunks(test.s.length[:R], c)) if encoder else torch.zeros(R, dtype=torch.int64)
    N, K, texts = max(1, caps[0], int(n.max())), min(max(KS), t.n_ordinary), [""] * R
    lat = {"values": torch.zeros(R, N, K), "ids": torch.zeros(R, N, K, dtype=torch.int32),
           "entropy": torch.zeros(R, N), "z": torch.zeros(R, N, llm.config.n_embd)}

    def keep(rows, step, alpha):
        values, ids = alpha.topk(K)
        for name, new in zip(lat, (values, ids, torch.special.entr(alpha).sum(-1), superpose(alpha, llm.wte.weight, top_k))):
            lat[name][rows, step] = new.to("cpu", lat[name].dtype)

    for batch in test.eval_batches(max(1, size // 8) if encoder else size, R):  # (B, N, V) is large for GPT-2's V
        rows, x, nx = (torch.from_numpy(a) for a in (batch.rows, batch.x, batch.nx))
        with env.autocast():
            if encoder:
                alpha = summarize(encoder, encoder_layout(batch, c, t.sum).to(env.device), t.n_ordinary)[:, :N]
                keep(rows[:, None], torch.arange(alpha.size(1)), alpha)
            else:
                out = decode(llm, t, llm.wte(x.to(env.device)), nx.to(env.device), True, top_k, *caps,
                             watch=lambda step, q, on: keep(rows[on.cpu()], step, q[on]))
                n[rows] = out.latents.cpu()
                for row, tokens in zip(batch.rows, out.tokens):
                    texts[row] = t.decode(tokens).removeprefix("<eot>")
    N = max(1, int(n.max()))
    return SimpleNamespace(n=n, texts=texts, **{name: value[:, :N] for name, value in lat.items()})


@torch.no_grad()
def write_on(llm, test, env, z, n, caps, size, end=True):
    """What the LLM writes after X <bot> z_0 … z_{n-1} (end: and <eot>): R token lists. z (R, N, C), n (R,)."""
    written = [None] * len(n)
    for batch in test.eval_batches(size, len(n)):
        rows, nx = torch.from_numpy(batch.rows), torch.from_numpy(batch.nx)[:, None]
        k = n[rows, None].minimum(llm.config.block_size - 1 - nx)  # (B, 1)
        at = torch.arange(int((nx + k).max()) + 1) - nx            # (B, T): 0 where z_0 stands
        ids = torch.from_numpy(test.x.pad(batch.rows, at.size(1))).masked_fill(at == k, env.tokenizer.eot)
        latent = (at + 1).where((at >= 0) & (at < k), 0)
        with env.autocast():
            x = place(llm.wte(ids.to(env.device)), z[rows].to(env.device), latent.to(env.device))
            out = decode(llm, env.tokenizer, x, (nx + k + end)[:, 0].to(env.device), max_tokens=caps[1])
        for row, tokens in zip(batch.rows, out.tokens):
            written[row] = tokens
    return written


def score(written, problems, env):
    """How many of these answers (token lists) are right."""
    return sum(to_number(env.tokenizer.decode(w)) == to_number(p["answer"]) for w, p in zip(written, problems))


def points(n):
    return sorted({round(k) for k in np.linspace(0, int(n.max()), min(int(n.max()) + 1, POINTS))})


# ----------------------------------------------------------------------------------------- sections of the report

def measure_controls(llm, lat, test, env, caps, size, seed):
    """Accuracy of the latent model when its chain is given to it: its own, or one that holds less."""
    R, few, p, ks = len(lat.n), min(len(lat.n), FEW), test.problems, points(lat.n[:FEW])
    ids = torch.from_numpy(np.random.default_rng([seed, 7]).integers(env.tokenizer.n_ordinary, size=lat.z.shape[:2]))
    chains = {"own": (lat.z, lat.n), "zeroed": (torch.zeros_like(lat.z), lat.n), "shuffled": (lat.z.roll(1, 0), lat.n.roll(1)),
              "random": (llm.wte.weight.detach().cpu()[ids], lat.n)}
    written = {name: write_on(llm, test, env, *chain, caps, size) for name, chain in chains.items()}
    right = {name: score(w, p, env) for name, w in written.items()}
    cut = [score(write_on(llm, test, env, lat.z[:few], lat.n[:few].clamp(max=k), caps, size), p, env) / few for k in ks]
    return {"problems": R, **{name: r / R for name, r in right.items()},
            "interval": {name: wilson(r, R) for name, r in right.items()},
            "donor": score(written["shuffled"], [p[R - 1], *p[:R - 1]], env) / R,
            "cut": {"problems": few, "k": ks, "accuracy": cut}}


def measure_continuation(llm, lat, test, env, caps, c, size):
    """The LLM of phase 1 gets z_0 … z_{i-1} for the first i chunks (or all there are) and writes the rest as text."""
    z, n = lat.z[:FEW], lat.n[:FEW]
    chains = [test.s.flat[a:a + l].tolist() for a, l in zip(test.s.start[:len(n)], test.s.length)]
    report = {"problems": len(n), "i": points(n), "accuracy": [], "next_chunk": []}
    for i in report["i"]:
        written = write_on(llm, test, env, z, n.clamp(max=i), caps, size, end=False)
        report["accuracy"].append(score(written, test.problems, env) / len(n))
        chunk = [s[i * c:i * c + c] for s in chains]
        report["next_chunk"].append(mean(torch.tensor([float(w[:len(s)] == s) for w, s in zip(written, chunk) if s])))
    return report


def published(line, cot):
    """A line of GSM8K's example_model_solutions.jsonl: (question, the chains of its correct solutions)."""
    try:
        row = json.loads(line)
        right = [m["solution"].rpartition("\nA:") for m in row.values() if isinstance(m, dict) and m["is_correct"]]
        return row["question"].strip(), [problem(row["question"], a, b, cot)["chain"] for a, _, b in right]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("expected 'question' and objects with 'is_correct' and 'solution'")


def all_paths(args, problems):
    """Each problem's chains known to be right, all different: the toy task's own, or those published for GSM8K."""
    if "paths" in problems[0]:
        return [p["paths"] for p in problems]
    folder, known = Path(args.data_dir or "data/gsm8k" if args.data == "gsm8k" else args.data), {}
    try:
        if args.data == "gsm8k":
            fetch(folder / "example_model_solutions.jsonl")
        known = dict(read(folder / "example_model_solutions.jsonl", published, args.cot))
    except UserError as error:
        print(f"parallelism: left out ({error})")
    return [[s for s in dict.fromkeys([p["chain"], *known.get(p["question"], [])]) if s] for p in problems]


def measure_parallelism(lats, paths, env, c, toy):
    """Both measures for every problem with two paths or more, and for as many paths of other problems; None without."""
    rows = torch.tensor([r for r, known in enumerate(paths) if len(known) > 1])
    if len(rows) < 2:
        return None
    count = torch.tensor([len(paths[r]) for r in rows])
    text = Ragged(env.tokenizer.encoding.encode_ordinary_batch([s for r in rows for s in paths[r]]))
    tokens = torch.from_numpy(text.pad(np.arange(len(text.length)), text.length.max()))  # (all paths, L)
    j = torch.arange(int(count.max()))
    own = (count.cumsum(0) - count)[:, None] + j                                         # (R, M): whose are which
    report = {"problems": len(rows), "paths": mean(count.double()), "orders": {} if toy else None}
    for name, lat in lats.items():
        top, n, report[name] = (lat.values[:, :, :TOP], lat.ids[:, :, :TOP]), lat.n[rows], {}
        for suffix, which in ("", own), ("_random", own + count[:, None]):               # the next problems' paths
            found, mass = [], []
            for some in torch.arange(len(rows)).split(64):                               # (R, M, N, W, K) is large
                p, l = which[some] % len(tokens), n[some, None].expand(-1, len(j))
                path = spans(tokens[p], torch.from_numpy(text.length)[p], l, c, lat.ids.size(1))
                path = path.masked_fill((j >= count[some, None])[:, :, None, None], -1)  # (R, M, N, W)
                alpha = [a[rows[some]] for a in top]
                found.append(torch.stack(parallelism(*alpha, path, n[some])))
                mass += [orders(*alpha, path)] if toy and not suffix else []
            n_eff, covered = torch.cat(found, 1)[:, n > 0]
            report[name] |= {"n_eff" + suffix: mean(n_eff), "above_1.7" + suffix: mean((n_eff > 1.7).double()),
                             "covered" + suffix: mean(covered)}
            if mass:
                mass = torch.cat(mass)                                                   # (R, M, N)
                share = mass / mass.sum(1, keepdim=True)
                report["orders"][name] = {"mass": [[mean(x) for x in m.T] for m in mass.unbind(1)],
                                          "leading": [mean(x) for x in share.amax(1).T],  # 1: one alone, 1 / M: even
                                          "histogram": torch.histc(share[:, 0, 0], 20, 0, 1).int().tolist()}
    return report


def tidy(x):
    """Ready for JSON: six digits… NaN becomes null."""
    if isinstance(x, dict):
        return {k: tidy(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [tidy(v) for v in x]
    return (round(x, 4) if math.isfinite(x) else None) if isinstance(x, float) else x


# ------------------------------------------------------------------------------------------------------- the picture

STYLE = """
:root{color-scheme:light dark;--ink:#1d2330;--soft:#667085;--line:#e3e6ec;--page:#fff;--card:#f7f8fa;--c0:#2f6fdb;--c1:#d9822b;--c2:#2b9a66;--c3:#9b51c9}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ee;--soft:#98a2b3;--line:#2d3442;--page:#12151c;--card:#1a1f29;--c0:#6ea4ff;--c1:#f0a75a;--c2:#5cc998;--c3:#c58bea}}
body{font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:0 auto;padding:1rem 1rem 4rem}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.15rem;margin:2.6rem 0 .4rem}p,figcaption{color:var(--soft);max-width:44rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}td,th{padding:.35rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{font-weight:500;color:var(--soft)}tr>:first-child{text-align:left;padding-left:0}td:first-child{color:var(--ink)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1.2rem;margin:1.2rem 0}figure{margin:0}figcaption{font-size:.85rem}
svg{width:100%;height:auto;display:block}svg text{font-size:11px;fill:var(--soft)}svg .g{stroke:var(--line)}svg path{fill:none;stroke-width:2}b.k{font-weight:500;margin-right:.9rem}
details{border-bottom:1px solid var(--line);padding:.6rem 0}summary{cursor:pointer}summary b{color:var(--c2)}summary b.no{color:var(--c1)}
.strip{display:flex;gap:4px;overflow-x:auto;padding-bottom:.6rem;font:12px/1.7 ui-monospace,monospace}.strip div{flex:0 0 4.6rem;background:var(--card);border-radius:4px;padding:.2rem}
.strip span{display:flex;justify-content:space-between;padding:0 .25rem;border-radius:3px;white-space:pre;overflow:hidden}.strip small{color:var(--soft)}.strip .s{color:var(--soft);border-bottom:1px solid var(--line);border-radius:0}
"""


def show(x):
    """A figure as a reader wants it."""
    return "–" if x is None else f"{x:.3g}" if isinstance(x, float) and x >= 100 else f"{x:.3f}" if isinstance(x, float) else str(x)


def table(*rows):
    cells = ("".join(f"<{tag}>{escape(show(c))}</{tag}>" for c in row) for row, tag in zip(rows, ["th"] + ["td"] * len(rows)))
    return f'<div class="wide"><table><tr>{"</tr><tr>".join(cells)}</tr></table></div>'


def chart(title, x, series, note="", top=None):
    """A line chart in SVG. series: {name: as many figures as x, None where there is none}; top: of the axis."""
    ys = [y for ys in series.values() for y in ys if y is not None] or [0]
    top = top or next(a * 10.0 ** e for e in range(-3, 7) for a in (1, 2, 4, 8) if a * 10.0 ** e >= max(ys))
    low = -top if min(ys) < 0 else 0
    px, py = (lambda v: 36 + 316 * (v - x[0]) / (x[-1] - x[0] or 1)), (lambda v: 172 - 160 * (v - low) / (top - low))
    art = "".join(f'<line class="g" x1="36" x2="352" y1="{py(y):.0f}" y2="{py(y):.0f}"/><text x="30" y="{py(y) + 4:.0f}" '
                  f'text-anchor="end">{y:g}</text>' for y in np.linspace(low, top, 5))
    art += "".join(f'<text x="{px(v):.0f}" y="190" text-anchor="middle">{v:g}</text>' for v in x[::max(1, len(x) // 6)])
    for i, ys in enumerate(series.values()):
        dots = [(px(a), py(y), f"{a:g}: {y:.3f}") for a, y in zip(x, ys) if y is not None]
        art += f'<path stroke="var(--c{i})" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b, _ in dots)}"/>' if dots else ""
        art += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="var(--c{i})"><title>{t}</title></circle>' for a, b, t in dots)
    names = "".join(f'<b class="k" style="color:var(--c{i})">{escape(name)}</b>' for i, name in enumerate(series))
    return (f'<figure><strong>{escape(title)}</strong><svg viewBox="0 0 360 196" role="img" aria-label="{escape(title)}">{art}</svg>'
            f'<figcaption>{names}{escape(note)}</figcaption></figure>')


def top_tokens(lat, row, t, tokenizer, k=5):
    """The heaviest tokens of a latent as [(text, weight)]; a space shows as ·."""
    return [(tokenizer.decode([i]).replace(" ", "·"), w) for i, w in zip(lat.ids[row, t, :k].tolist(), lat.values[row, t, :k].tolist())]


def strip(lat, row, tokenizer, bag):
    """A chain as columns, one a latent: the chunk it stands for, then its top tokens, shaded by weight."""
    columns = []
    for t in range(int(lat.n[row])):
        chunk = tokenizer.decode([i for i in bag[row, t].tolist() if i >= 0]).replace(" ", "·") if t < bag.size(1) else ""
        cells = "".join(f'<span style="background:rgba(70,120,230,{0.6 * w:.2f})">{escape(text)}<small>{100 * w:.0f}</small></span>'
                        for text, w in top_tokens(lat, row, t, tokenizer))
        columns.append(f'<div><span class="s">{escape(chunk) or "&nbsp;"}<small>{t + 1}</small></span>{cells}</div>')
    return f'<div class="strip">{"".join(columns)}</div>'


def picture(lat, row, p, right, pictures):
    """One problem, folded: question, chain, answers, and its strips."""
    return (f'<details><summary><b{"" if right else " class=no"}>{"✓" if right else "✗"}</b> {escape(p["question"])}</summary>'
            f'<p>{escape(p["chain"])} → {escape(p["answer"])}<br>the model: {escape(lat.texts[row])}</p>{pictures}</details>')


def page(report, lats, test, right, tokenizer, bag):
    """report.html: one file, no script, no request."""
    r, acc, con, cut, go = report, report["accuracy"], report["controls"], report["controls"]["cut"], report["continuation"]
    body = [f"<h1>Latent reasoning on {escape(r['config']['data'])}</h1><p>{r['config']['problems']} test problems, chunks of "
            f"{r['config']['chunk_size']} tokens. A step is one forward pass between question and answer.</p><h2>Accuracy and steps</h2>",
            table(["", "accuracy", "95 % interval", "steps", "seconds", "unparseable", "capped"],
                  *([name, acc[w], "{:.3f} – {:.3f}".format(*r["interval"][w]), r["steps"][w], r["seconds"][w], r["unparseable"][w],
                     r["capped"][w]] for w, name in WAYS.items() if acc[w] is not None))]
    works = con["interval"]["shuffled"][1] < con["interval"]["own"][0]
    body += ["<h2>Do the latents do the work?</h2><p>The latent model answers after a chain that is handed to it. " + (
             f"Another problem’s chain costs {100 * (con['own'] - con['shuffled']):.0f} points" if works else
             "Another problem’s chain does as well as its own: the latents do nothing here") +
             f"; {100 * con['donor']:.0f} % then give that other problem’s answer.</p>",
             table(["chain", "accuracy", "95 % interval"], *([name, con[name], "{:.3f} – {:.3f}".format(*con["interval"][name])]
                   for name in con["interval"])), '<div class="charts">',
             chart("Chain cut to its first k latents", cut["k"], {"accuracy": cut["accuracy"]}, f"k; {cut['problems']} problems", 1),
             chart("First i chunks as latents, the rest as text", go["i"], {"answer": go["accuracy"], "next chunk": go["next_chunk"]},
                   f"i; {go['problems']} problems, the LLM of phase 1", 1), "</div>"]
    e = r["ecr"]
    body += ["<h2>What a latent holds: ECR@K</h2><p>How many tokens of chunk i are among the top K of α_i. Chance: another "
             "problem’s chunk i. The paper, Llama-1B, c = 2 and 4: 1.169 and 2.385 at K = 50, 1.866 and 3.640 at 300.</p>",
             table(["K", *(f"{w}, {f}" for w in lats for f in ("own", "chance", "maximum"))],
                   *([k, *(e[w][f][i] for w in lats for f in ("own", "chance", "maximum"))] for i, k in enumerate(e["K"])))]
    q = r["parallelism"]
    if q:
        rows = ("n_eff", "above_1.7", "covered")
        body += [f"<h2>Parallel paths</h2><p>{q['problems']} problems with {q['paths']:.2f} valid paths on average. N_eff: the effective "
                 "number of paths followed, high also when none is, so that random paths stand beside it. Covered: the paths whose "
                 "tokens are there, where paths differ; 1 is one path. The paper: N_eff 3.60 (c = 2), 4.61 (c = 4).</p>",
                 table(["", *(f"{w}{s}" for w in lats for s in ("", ", random paths"))],
                       *([f, *(q[w][f + s] for w in lats for s in ("", "_random"))] for f in rows))]
        for w, o in (q["orders"] or {}).items():
            x = list(range(1, len(o["leading"]) + 1))
            body += ['<div class="charts">', chart(f"{w}: mass on each order’s own tokens", x, {f"order {i + 1}": m for i, m in
                     enumerate(o["mass"])} | {"share of the larger": o["leading"]}, "by latent; share 1: one order alone", 1),
                     chart(f"{w}: share of order 1 in the first latent", list(np.arange(20) / 20 + 0.025), {"problems": o["histogram"]},
                           "problems; in the middle both orders, at the ends one"), "</div>"]
    s = r["shape"]
    body += ["<h2>Shape of the latents</h2>" + '<div class="charts">', *(chart(title, list(range(1, 1 + max(len(s[w][f]) for w in lats))),
             {w: s[w][f] for w in lats}, note) for f, title, note in (
             ("entropy", "Entropy of α, nats", "by latent"), ("top1", "Weight of the heaviest token", "by latent"),
             ("norm", "Norm of z", "tokens: {low:.2f} – {high:.2f}, mean {mean:.2f}".format(**s["token_norm"])),
             ("cosine", "Cosine of successive z", "by latent"))), "</div>"]
    body += ["<h2>Problems</h2><p>Columns are latents: the chunk each stands for, then its heaviest tokens in percent.</p>"]
    for wanted in (True, False):
        for row in [i for i, ok in enumerate(right) if ok == wanted][:SHOWN]:
            body += [picture(lats["latent"], row, test.problems[row], wanted, "".join(
                     f"{'Thought by the model' if w == 'latent' else 'Written by the encoder'}{strip(lat, row, tokenizer, bag)}"
                     for w, lat in reversed(lats.items())))]
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>Latent reasoning</title><style>{STYLE}</style><body>{''.join(body)}</body></html>")


def main(argv=None):
    p = common.parser(__doc__, "analyze")
    p.add_argument("--limit", type=int, help="how many test problems (default: all)")
    p.add_argument("--ask", metavar="QUESTION", help="answer this question in latents and show each of them")
    p.set_defaults(batch_size=128)
    args, env = common.setup(p, "analyze", argv)
    c, size, t = args.chunk_size, args.batch_size, env.tokenizer

    # the models
    saved, phase1 = common.load_checkpoint(args.out / "latent.pt"), env.parent["config"]
    common.require_same(args.out / "latent.pt", saved["config"], fingerprint=phase1["fingerprint"], chunk_size=c)
    llm, llm1, encoder = (common.build(s, name, env.device) for s, name in (
        (saved, "llm"), (env.parent, "llm"), (env.parent, "encoder")))
    caps, top_k, top_k1 = saved["config"]["caps"], saved["config"]["store_top_k"], phase1["top_k"]

    if args.ask is not None:
        asked = Problems([{"question": args.ask, "chain": "", "answer": "0"}], t, args.block_size)
        lat = observe(llm, asked, env, top_k, 1, 1, caps)
        for i in range(int(lat.n[0])):
            print(f"z_{i:<3}" + "  ".join(f"{' ░▒▓█'[min(4, round(4 * w + 0.4))]} {text[:8]:8} {w:.2f}" for text, w in top_tokens(lat, 0, i, t)))
        return print(lat.texts[0])

    # every way to think, on the same problems
    test, = common.splits(args, env, ["test"])
    R = min(len(test), args.limit or len(test))
    keys = ("accuracy", "interval", "steps", "seconds", "unparseable", "capped")
    report = {"config": {k: env.config[k] for k in ("data", "chunk_size", "seed", "commit", "torch")} | {"problems": R},
              **{key: dict.fromkeys(WAYS) for key in keys}}
    for name, file in {"explicit": "sft", "no_cot": "no_cot", "latent": "", "gold": ""}.items():
        if file and not (args.out / f"{file}.pt").is_file():
            print(f"{name}: left out, no {file}.pt in {args.out}")
            continue
        model = common.build(common.load_checkpoint(args.out / f"{file}.pt"), "llm", env.device) if file else {"latent": llm, "gold": llm1}[name]
        found = common.evaluate(model, test, env, {"latent": "latent", "gold": "gold"}.get(name, "text"), caps, encoder, c,
                                {"latent": top_k, "gold": top_k1}.get(name, 0), args.limit, size)
        found["interval"] = wilson(round(found["accuracy"] * R), R)
        for key in keys:
            report[key][name] = found[key]
        print(f"{WAYS[name]:28} {found['accuracy']:.3f}  steps {found['steps']:.2f}  {found['seconds']:.1f} s")

    # what the latents hold, and whether they matter
    lats = {"encoder": observe(llm1, test, env, top_k1, R, size, encoder=encoder, c=c), "latent": observe(llm, test, env, top_k, R, size, caps)}
    report["steps"]["gold"] = mean(lats["encoder"].n.float())
    bag = bags(test.batch(np.arange(R), np.arange(R)), c)  # (R, N, c)
    report["controls"] = measure_controls(llm, lats["latent"], test, env, caps, size, args.seed)
    report["continuation"] = measure_continuation(llm1, lats["encoder"], test, env, caps, c, size)
    ks = [k for k in KS if k <= t.n_ordinary]
    report["ecr"], report["shape"] = {"K": ks}, {}
    for name, lat in lats.items():
        N = min(lat.ids.size(1), bag.size(1))
        real = exists(lat.n, N) & (bag[:, :N, 0] >= 0)
        other = real & real.roll(1, 0)
        report["ecr"][name] = {"own": ecr(lat.ids[:, :N], bag[:, :N], real, ks), "maximum": ecr_maximum(bag[:, :N], real, ks),
                               "chance": ecr(lat.ids[:, :N], bag[:, :N].roll(1, 0), other, ks)}
        report["shape"][name] = shape(lat)
    norm = llm.wte.weight.detach()[:t.n_ordinary].float().norm(dim=1)
    report["shape"]["token_norm"] = {"mean": norm.mean().item(), "low": norm.quantile(0.05).item(), "high": norm.quantile(0.95).item()}
    report["parallelism"] = measure_parallelism(lats, all_paths(args, test.problems[:R]), env, c, "paths" in test.problems[0])

    report = tidy(report)
    right = [to_number(text) == to_number(q["answer"]) for text, q in zip(lats["latent"].texts, test.problems)]
    common.write(args.out / "report.json", lambda f: f.write(json.dumps(report, indent=1, allow_nan=False).encode()))
    common.write(args.out / "report.html", lambda f: f.write(page(report, lats, test, right, t, bag).encode()))
    print(f"wrote {args.out / 'report.html'} and report.json")


if __name__ == "__main__":
    main()
