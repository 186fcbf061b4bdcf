"""Measure and show: how well each way to think does, what the latents hold, and whether they do the work.

    python analyze.py                                         # the test split: report.html and report.json in --out
    python analyze.py --ask "Ann has 6 pens and buys 2. …"    # one question, in the terminal

report.json (shares are 0 … 1; lists go by position, K, k or i; null: not trained, or not defined here):
    problems, config   how many of the test split; the flags, versions, commit and data of this run and of every model in it
    accuracy, interval (95 %), steps, seconds, unparseable, capped (problems)     {explicit, no_cot, latent, gold}
    controls      accuracy, interval {own, zeroed, shuffled, random}: of the latent model when its chain is given so; donor:
                  the shuffled that give the other problem's answer; cut {problems, k, accuracy}: z_0 … z_{k-1} alone
    continuation  {problems, i, accuracy, next_chunk}: z_0 … z_{i-1} given, the rest written as text: right answers, and
                  problems in which S_i comes next, token for token
    ecr           K; encoder, latent: {own, chance, maximum}: see compress.py
    parallelism   problems, paths; encoder, latent: {n_eff, above_1.7, covered, and each with _random}; orders (toy task),
                  encoder, latent: {mass [order][position], leading [position]: the larger order's share of the mass}
    shape         token_norm {low, mean, high}; encoder, latent: {count, entropy, top1, norm, cosine}
"""
import json
from functools import partial
from html import escape
from pathlib import Path
from string import Template
from types import SimpleNamespace

import numpy as np
import torch

import common
from compress import identity, measure_ecr
from data import Problems, Ragged, known_paths, splits, to_number
from encoder import chunks, encoder_layout, evaluate, place, summarize, superpose
from train_sup import bags

KS = (1, 2, 5, 10, 50, 100, 300)  # ECR@K; the largest is also how much of each α is kept
TOP, FLOOR = 100, 1e-6            # entries of α that count for a path; the mass of a span that has none of them
COVER = 0.03                      # a span is covered where each of its tokens has this much (the toy task's rarer order, c = 4: 0.05)
FEW, POINTS, SHOWN = 128, 25, 12  # for curves that decode anew at every point: problems, points; problems in the page
WAYS = {"explicit": ("Explicit chain of thought", "sft", "text"), "no_cot": ("No chain of thought", "no_cot", "text"),
        "latent": ("Latent chain", "latent", "latent"), "gold": ("Summaries by the encoder", "sup", "gold")}
FIGURES = ("accuracy", "interval", "steps", "seconds", "unparseable", "capped")


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


def weight(values, ids, tokens):
    """α of these tokens, 0 past its K entries: (..., K), (..., K), int (..., W) -> float32 (..., W)."""
    return ((ids[..., None, :] == tokens[..., :, None]) * values[..., None, :]).sum(-1)


def spans(tokens, length, n, c, N):
    """A path in as many spans as there are latents, as sets: its chunks where that is their number, else equal parts of
    a token at least. tokens int64 (..., L), length, n int64 (...) -> int64 (..., N, W)."""
    t, n, length = torch.arange(N + 1), n[..., None], length[..., None]
    fits = chunks(length, c) == n
    edge = -(-t * torch.where(fits, c, length) // torch.where(fits, 1, n.clamp(min=1)))  # (..., N + 1): ⌈t · L / n⌉
    start = edge[..., :-1].minimum(length - 1).clamp(min=0)
    end = edge[..., 1:].maximum(start + 1).minimum(length).where(t[:-1] < n, start)      # (..., N)
    at = start[..., None] + torch.arange(max(1, int((end - start).max())))               # (..., N, W)
    span = tokens[..., None, :].expand(*at.shape[:-1], -1).gather(-1, at.clamp(max=tokens.size(-1) - 1))
    again = (span[..., :, None] == span[..., None, :]).tril(-1).any(-1)
    return span.where((at < end[..., None]) & ~again, -1)


def parallelism(values, ids, path, n):
    """(N_eff, covered), how many of its paths a chain follows: float (R,) each. path int64 (R, M, N, W): from `spans`.

    N_eff = exp(H(softmax_m score_m)), score_m = mean_t log Σ_{v ∈ S_mt} α_t[v]: one path followed makes 1, M alike
    make M, and so do M of which none is. covered = the different spans covered at t, mean over the t where the paths
    differ (NaN without any): one path followed makes 1, none makes 0.
    """
    w, tokens, M = weight(values[:, None], ids[:, None], path), path.sort(3)[0], path.size(1)  # (R, M, N, W)
    known = (path >= 0).flatten(2).any(2)                                                      # (R, M)
    score = w.sum(3).clamp(min=FLOOR).log().sum(2) / n[:, None]  # past n the same for all: softmax doesn't see it
    n_eff = torch.special.entr(score.masked_fill(~known, -torch.inf).softmax(1)).sum(1).exp()
    same = (tokens[:, :, None] == tokens[:, None]).all(4)                                      # (R, M, M, N)
    first = ~(same & torch.ones(M, M).tril(-1).bool()[:, :, None]).any(2) & known[:, :, None]  # (R, M, N)
    differ = first.sum(1) > 1                                                                  # (R, N)
    full = w.where(path >= 0, torch.inf).amin(3) >= COVER
    return n_eff, ((full & first).sum(1) * differ).sum(1) / differ.sum(1)


def orders(values, ids, path):
    """α on each path's own tokens, those of no other path in that span: (R, M, N); NaN where a path has none."""
    shared = (path[:, :, None, :, :, None] == path[:, None, :, :, None, :]).any(5)  # (R, M, M, N, W)
    own = (path >= 0) & ~(shared & ~torch.eye(path.size(1)).bool()[:, :, None, None]).any(2)
    mass = (weight(values[:, None], ids[:, None], path) * own).sum(3)
    return mass.masked_fill(~own.any(3).all(1)[:, None], torch.nan)


def shape(lat):
    """Entropy in nats, top-1 mass, norm of z, cosine of z_t and z_{t+1}: at each position, mean of the chains so long."""
    real = torch.arange(lat.ids.size(1)) < lat.n[:, None]
    cosine = torch.cosine_similarity(lat.z[:, :-1], lat.z[:, 1:], dim=2).where(real[:, 1:], torch.nan)
    columns = {"entropy": lat.entropy, "top1": lat.values[:, :, 0], "norm": lat.z.norm(dim=2)}
    return {"count": real.sum(0).tolist(), "cosine": [mean(x) for x in cosine.T],
            **{name: [mean(x) for x in value.where(real, torch.nan).T] for name, value in columns.items()}}


# ------------------------------------------------- what the models do; env: also the test split, caps, batch size, c

@torch.no_grad()
def observe(llm, env, top_k, R, encoder=None):
    """The chains of R problems, those the LLM thinks or, with an `encoder`, what that makes of the true chains:
    n (R,), values, ids (R, N, K), entropy (R, N), z (R, N, C), and the answers."""
    n = torch.from_numpy(chunks(env.test.s.length[:R], env.c) if encoder else np.zeros(R, int))
    N, K = max(env.caps[0], int(n.max())), min(max(KS), env.tokenizer.n_ordinary)
    kept = {"values": torch.zeros(R, N, K), "ids": torch.zeros(R, N, K, dtype=torch.int32),
            "entropy": torch.zeros(R, N), "z": torch.zeros(R, N, llm.config.n_embd)}

    def keep(rows, t, alpha):  # alpha (..., V) of the problems `rows` at positions t
        new = *alpha.topk(K), torch.special.entr(alpha).sum(-1), superpose(alpha, llm.wte.weight, top_k)
        for array, value in zip(kept.values(), new):
            array[rows, t] = value.to("cpu", array.dtype)

    def watch(batch, step, q, on):
        rows = torch.from_numpy(batch.rows)[on.cpu()]
        keep(rows, step, q[on])
        n[rows] = step + 1

    answers = env.evaluate(llm, thought="latent", top_k=top_k, limit=R, watch=watch)["answers"] if not encoder else {}
    for batch in env.test.eval_batches(-(-env.size // 8), R) if encoder else ():  # few: (B, N, V) is large for GPT-2's V
        with env.autocast():
            seq = encoder_layout(batch, env.c, env.tokenizer.sum).to(env.device)
            alpha = summarize(encoder, seq, env.tokenizer.n_ordinary)[:, :N]
        keep(torch.from_numpy(batch.rows)[:, None], torch.arange(alpha.size(1)), alpha)
    return SimpleNamespace(n=n, answers=answers, **{name: array[:, :max(1, int(n.max()))] for name, array in kept.items()})


def given(llm, env, z, n, end=True):
    """The LLM writes on after X <bot> z_0 … z_{n-1} (end: and <eot>): what `evaluate` finds. z (R, N, C), n (R,)."""
    def prompt(batch):
        rows, nx = torch.from_numpy(batch.rows), torch.from_numpy(batch.nx)[:, None]
        k = n[rows, None].minimum(llm.config.block_size - 1 - nx)  # (B, 1)
        at = torch.arange(int((nx + k).max()) + 1) - nx            # (B, T): 0 where z_0 stands
        ids = torch.from_numpy(env.test.x.pad(batch.rows, at.size(1))).masked_fill(at == k, env.tokenizer.eot)
        latent = (at + 1).where((at >= 0) & (at < k), 0).to(env.device)
        return place(llm.wte(ids.to(env.device)), z[rows].to(env.device), latent), (nx + k + end)[:, 0].to(env.device)
    return env.evaluate(llm, thought="text", limit=len(n), prompt=prompt)


def prefixes(llm, env, lat, end=True):
    """(k, what is found after z_0 … z_{k-1}), k = 0 … N or POINTS of them, for the first FEW problems."""
    n = lat.n[:FEW]
    ks = np.linspace(0, int(n.max()), min(POINTS, int(n.max()) + 1)).round().astype(int).tolist()
    return ks, [given(llm, env, lat.z[:FEW], n.clamp(max=k), end) for k in ks]


# ---------------------------------------------------------------------------------------------- the report's sections

def measure_controls(llm, env, lat):
    """Accuracy of the latent model when its chain is given to it: its own, or one that holds less."""
    R, problems, (ks, cut) = len(lat.n), env.test.problems, prefixes(llm, env, lat)
    tokens = np.random.default_rng([env.config["seed"], 7]).choice(env.test.s.flat, lat.z.shape[:2])  # such as chains have
    chains = {"own": (lat.z, lat.n), "zeroed": (0 * lat.z, lat.n), "shuffled": (lat.z.roll(1, 0), lat.n.roll(1)),
              "random": (llm.wte.weight.detach().cpu()[torch.from_numpy(tokens)], lat.n)}
    found = {name: given(llm, env, *chain) for name, chain in chains.items()}
    donor = sum(to_number(text) == to_number(problems[(row or R) - 1]["answer"])
                for row, (text, *_) in found["shuffled"]["answers"].items())
    return {"accuracy": {name: f["accuracy"] for name, f in found.items()}, "donor": donor / R,
            "interval": {name: wilson(f["accuracy"] * R, R) for name, f in found.items()},
            "cut": {"problems": min(R, FEW), "k": ks, "accuracy": [f["accuracy"] for f in cut]}}


def measure_continuation(llm, env, lat):
    """The LLM of phase 1 gets z_0 … z_{i-1} for the first i chunks (or all there are) and writes the rest as text."""
    points, found = prefixes(llm, env, lat, end=False)
    chunk = lambda row, i: env.test.s.flat[env.test.s.start[row] + i * env.c:env.test.s.start[row + 1]][:env.c].tolist()
    exact = [[ids[:len(s := chunk(row, i))] == s for row, (*_, ids) in f["answers"].items() if i < lat.n[row]]
             for i, f in zip(points, found)]
    return {"problems": min(len(lat.n), FEW), "i": points, "accuracy": [f["accuracy"] for f in found],
            "next_chunk": [mean(torch.tensor(e)) for e in exact]}


def measure_parallelism(env, lats, paths):
    """Both measures for every problem with two paths or more, and for as many paths of other problems; None without."""
    rows = torch.tensor([r for r, known in enumerate(paths) if len(known) > 1])
    if len(rows) < 2:
        return None
    count = torch.tensor([len(paths[r]) for r in rows])[:, None]  # (R, 1)
    text = Ragged(env.tokenizer.encoding.encode_ordinary_batch([s for r in rows for s in paths[r]] + [""]))
    total, length, j = len(text.length) - 1, torch.from_numpy(text.length), torch.arange(int(count.max()))
    tokens = torch.from_numpy(text.pad(np.arange(total + 1), int(length.max())))  # (all paths and an empty one, L)
    own = count.cumsum(0) - count + j                                        # (R, M): whose are which
    report = {"problems": len(rows), "paths": mean(count), "orders": {} if count.min() == len(j) else None}
    for name, lat in lats.items():
        report[name] = {}
        for suffix, which in ("_random", own + count), ("", own):            # random: those of the problems after it
            which, parts = (which % total).where(j < count, total), []
            for some in torch.arange(len(rows)).split(64):                   # (R, M, N, W, K) is large
                r, n = rows[some], lat.n[rows[some]]
                path = spans(tokens[which[some]], length[which[some]], n[:, None], env.c, lat.ids.size(1))
                alpha = lat.values[r, :, :TOP], lat.ids[r, :, :TOP]
                parts.append((*parallelism(*alpha, path, n), orders(*alpha, path)))
            n_eff, covered, mass = (torch.cat(x)[lat.n[rows] > 0] for x in zip(*parts))  # (R,), (R,), (R, M, N)
            report[name] |= {"n_eff" + suffix: mean(n_eff), "above_1.7" + suffix: mean(n_eff > 1.7), "covered" + suffix: mean(covered)}
        if report["orders"] is not None:
            report["orders"][name] = {"mass": [[mean(x) for x in m.T] for m in mass.unbind(1)],
                                      "leading": [mean(x) for x in (mass.amax(1) / mass.sum(1)).T]}
    return report


# ------------------------------------------------------------------------------------------------------- the picture

PAGE = Path(__file__).with_name("assets") / "report.html"  # `page` puts a figure, a table or a chart for every $name


def table(columns):
    """{head: {row: figure}} as HTML; a list is an interval, None a dash."""
    text = lambda x: (" – ".join(map(text, x)) if isinstance(x, list) else "–" if x is None else
                      f"{x:.{1 if abs(x) >= 10 else 3}f}" if isinstance(x, float) else escape(str(x)))
    html = "<tr><th>" + "".join(f"<th>{escape(head)}" for head in columns)
    for row in next(iter(columns.values())):
        html += f"<tr><td>{escape(str(row))}" + "".join(f"<td>{text(column[row])}" for column in columns.values())
    return f'<div class="wide"><table>{html}</table></div>'


def chart(series, x=None, top=None):
    """A line chart and its key. series {name: figures, None where there is none}; x: 1 … where not given; top: of the axis."""
    ys = [y for ys in series.values() for y in ys if y is not None] or [0]
    x = x or list(range(1, 2 + max((i for ys in series.values() for i, y in enumerate(ys) if y is not None), default=0)))
    top = top or next(a * 10.0 ** e for e in range(-3, 7) for a in (1, 2, 4, 8) if a * 10.0 ** e >= max(map(abs, ys)))
    low = -top if min(ys) < 0 else 0
    px, py = (lambda v: 36 + 316 * (v - x[0]) / (x[-1] - x[0] or 1)), (lambda v: 172 - 160 * (v - low) / (top - low))
    art = "".join(f'<line x1="36" x2="352" y1="{py(y)}" y2="{py(y)}"/><text x="30" y="{py(y) + 4}" text-anchor="end">{y:g}</text>'
                  for y in np.linspace(low, top, 5).tolist())
    art += "".join(f'<text x="{px(v):.0f}" y="190" text-anchor="middle">{v}</text>' for v in x[::-(-len(x) // 7) or 1])
    for i, ys in enumerate(series.values()):
        dots = [(f"{px(a):.1f}", f"{py(y):.1f}") for a, y in zip(x, ys) if y is not None]
        art += f'<polyline stroke="var(--c{i})" points="{" ".join(map(",".join, dots))}"/>'
        art += "".join(f'<circle cx="{a}" cy="{b}" r="2.5" fill="var(--c{i})"/>' for a, b in dots)
    return f'<svg viewBox="0 0 360 196">{art}</svg>' + "".join(
        f'<b class="key" style="color:var(--c{i})">{name}</b>' for i, name in enumerate(series))


def visible(tokenizer, ids):
    """Tokens as text, a · for every space and whatever can't be printed."""
    return "".join(a if a.isprintable() and a != " " else "·" for a in tokenizer.decode(ids))


def heaviest(lat, row, tokenizer):
    """The five heaviest tokens of each latent of a chain: [[(text, weight)]]."""
    top = zip(lat.ids[row, :lat.n[row], :5].tolist(), lat.values[row, :, :5].tolist())
    return [[(visible(tokenizer, [i]), w) for i, w in zip(*pair)] for pair in top]


def picture(lats, row, p, tokenizer, bag, unfold=False):
    """A problem, to unfold: question, answers, and each chain as columns, one a latent, the tokens shaded by weight."""
    text, right, *_ = lats["latent"].answers[row]
    html = (f"<details{' open' * unfold}><summary>{'<b>✓</b>' if right else '<b class=no>✗</b>'} {escape(p['question'])}</summary>"
            f"<p>{escape(p['chain'])} #### {escape(p['answer'])}<br>the model: {escape(text.removeprefix('<eot>'))}</p>")
    for name, lat in lats.items():
        html += f'<small>{name}</small><div class="strip">'
        for t, tokens in enumerate(heaviest(lat, row, tokenizer)):
            chunk = visible(tokenizer, [i for i in bag[row, t].tolist() if i >= 0] if t < bag.size(1) else [])
            html += f"<div><b>{escape(chunk) or '–'}<small>{t + 1}</small></b>" + "".join(
                f'<span style="background:rgba(70,120,230,{0.6 * w:.2f})">{escape(token)}<small>{100 * w:.0f}</small></span>'
                for token, w in tokens) + "</div>"
        html += "</div>"
    return html + "</details>"


def page(r, pictures):
    """report.html: one file, no script, no request. r: the report; pictures: the problems."""
    con, go, par, form, kinds = r["controls"], r["continuation"], r["parallelism"], r["shape"], ("encoder", "latent")
    made = {key: escape(str(value)) for key, value in {**r["config"]["sup"], **r["config"]["analyze"]}.items()}
    lost, sure = con["accuracy"]["own"] - con["accuracy"]["shuffled"], con["interval"]["shuffled"][1] < con["interval"]["own"][0]
    shapes = {f: chart({w: form[w][f] for w in kinds}) for f in ("entropy", "top1", "norm", "cosine")}
    known = par and par["orders"]
    two = known or dict.fromkeys(kinds, {"mass": [], "leading": []})
    shapes |= {f"order_{w}": chart({**{f"order {m}": ys for m, ys in enumerate(two[w]["mass"], 1)},
                                    "share of the larger": two[w]["leading"]}, top=1) for w in kinds}
    made |= {key: f"{x:.2f}" for key, x in form["token_norm"].items()}
    return Template(PAGE.read_text("utf-8")).substitute(
        made, **shapes, problems=r["problems"],
        accuracy=table({key: {label: r[key][way] for way, (label, *_) in WAYS.items()} for key in FIGURES}),
        first=pictures[0], more="\n".join(pictures[1:]), few=go["problems"], donor=f"{100 * con['donor']:.0f}",
        verdict=f"costs {100 * lost:.0f} points" if sure else "does as well, as far as so many problems tell: these latents do nothing",
        controls=table({key: con[key] for key in ("accuracy", "interval")}),
        cut=chart({"accuracy": con["cut"]["accuracy"]}, con["cut"]["k"], 1),
        continued=chart({"answer": go["accuracy"], "next chunk": go["next_chunk"]}, go["i"], 1),
        ecr=table({f"{w}, {f}": dict(zip(r["ecr"]["K"], r["ecr"][w][f])) for w in kinds for f in r["ecr"][w]}),
        paths="{problems} problems with {paths:.2f} valid paths on average.".format(**par) if par else "None are known here.",
        parallelism=table({w: dict(sorted(par[w].items())) for w in kinds}) if par else "", hide="" if known else "hidden")


def main(argv=None):
    p = common.parser(__doc__, "analyze")
    p.add_argument("--limit", type=int, help="how many test problems (default: all)")
    p.add_argument("--ask", metavar="QUESTION", help="answer this question in latents and show each of them")
    p.set_defaults(batch_size=128)
    args, env = common.setup(p, "analyze", argv)
    sup, latent = env.parent, common.load_checkpoint(args.out / "latent.pt")
    common.require_same(args.out / "latent.pt", latent["config"], fingerprint=sup["config"]["fingerprint"],
                        chunk_size=args.chunk_size, encoder=identity(sup["models"]["encoder"]))
    llm, llm1, encoder = (common.build(m, name, env.device) for m, name in ((latent, "llm"), (sup, "llm"), (sup, "encoder")))
    top_k = {"text": 0, "latent": latent["config"]["store_top_k"] if args.top_k is None else args.top_k, "gold": sup["config"]["top_k"]}
    env.c, env.caps, env.size = args.chunk_size, latent["config"]["caps"], args.batch_size
    if args.ask is None:
        train, env.test = splits(args, env, ["train", "test"])
        common.require_same(args.out / "sup.pt", sup["config"], fingerprint=train.fingerprint)
    else:
        env.test = Problems([{"question": args.ask, "chain": "", "answer": "0"}], env.tokenizer, args.block_size)
    env.evaluate = partial(evaluate, problems=env.test, env=env, caps=env.caps, chunk_size=env.c, batch_size=env.size)

    if args.ask is not None:
        lat = observe(llm, env, top_k["latent"], 1)
        for i, tokens in enumerate(heaviest(lat, 0, env.tokenizer)):
            print(f"z_{i:<3}" + "  ".join(f"{' ░▒▓█'[int(4 * w + 0.8)]} {token[:8]:8} {w:.2f}" for token, w in tokens))
        return print(lat.answers[0][0].removeprefix("<eot>"))

    # every way to think, on the same problems
    R = min(len(env.test), args.limit or len(env.test))
    report, saved, models = {key: dict.fromkeys(WAYS) for key in FIGURES}, {"latent": latent, "sup": sup}, {"latent": llm, "sup": llm1}
    for way, (label, file, thought) in WAYS.items():
        path = args.out / f"{file}.pt"
        if file not in saved:
            if not path.is_file():
                print(f"{label}: left out, there is no {path}")
                continue
            saved[file] = common.load_checkpoint(path)
            common.require_same(path, saved[file]["config"], **{f: env.config[f] for f in ("data", "cot", "seed")})
            models[file] = common.build(saved[file], "llm", env.device)
        found = env.evaluate(models[file], thought=thought, encoder=encoder, top_k=top_k[thought], limit=R)
        found["interval"] = wilson(found["accuracy"] * R, R)
        print(f"{label:26} accuracy {found['accuracy']:.3f}, steps {found['steps']:.1f}, {found['seconds']:.1f} s")
        for key in FIGURES:
            report[key][way] = found[key]

    # what the latents hold, and whether they matter
    lats = {"encoder": observe(llm1, env, top_k["gold"], R, encoder), "latent": observe(llm, env, top_k["latent"], R)}
    bag = bags(env.test.batch(np.arange(R), np.arange(R)), env.c)  # (R, N, c)
    norm = llm.wte.weight.detach()[:env.tokenizer.n_ordinary].float().norm(dim=1).cpu()
    report |= {"problems": R, "config": {"analyze": env.config, **{file: model["config"] for file, model in saved.items()}},
               "controls": measure_controls(llm, env, lats["latent"]),
               "continuation": measure_continuation(llm1, env, lats["encoder"]),
               "ecr": {"K": KS, **{name: measure_ecr(lat.ids, lat.n, bag, KS) for name, lat in lats.items()}},
               "parallelism": measure_parallelism(env, lats, known_paths(env.test.problems[:R], args.data, args.data_dir, args.cot)),
               "shape": {"token_norm": {"low": norm.quantile(0.05).item(), "mean": mean(norm), "high": norm.quantile(0.95).item()},
                         **{name: shape(lat) for name, lat in lats.items()}}}
    report = json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 4), parse_constant=lambda _: None)
    shown = [row for ok in (True, False) for row in [r for r in range(R) if lats["latent"].answers[r][1] == ok][:SHOWN]]
    pictures = [picture(lats, row, env.test.problems[row], env.tokenizer, bag, row == shown[0]) for row in shown]
    html = page(report, pictures).encode("utf-8", "replace")  # a question may hold half a character
    common.write(args.out / "report.json", lambda f: f.write(json.dumps(report, indent=1).encode()))
    common.write(args.out / "report.html", lambda f: f.write(html))
    print(f"wrote {args.out / 'report.html'} and report.json")


if __name__ == "__main__":
    common.start(main)
