"""Measure and show: how well each way to think does, what a latent holds, whether latents matter.

    python analyze.py                                # the test split: report.html, report.json
    python analyze.py --ask "Ann has 6 pens and …"   # one question, in the terminal

report.json (shares are 0 … 1; lists go by position, K, k or i; null: not trained, or not defined):

problems, config   how many of the test split; the flags, versions, commit and data of this run and
                   of every model in it
accuracy, interval (95 %), steps, seconds, unparseable, capped (problems)
                   of {warm_up, explicit, no_cot, latent, gold}
controls           accuracy, interval of {own, zeroed, shuffled, random}: the latent model when it
                   is given such a chain; donor: the share of the shuffled in which it writes the
                   answer of the problem whose chain it is; cut {problems, k, accuracy}: it is given
                   z_0 … z_{k-1} alone
errors             {warm_up, explicit: {type: problems}}: the wrong answers: see metrics.error_type
continuation       {problems, i, accuracy, next_chunk}: z_0 … z_{i-1} are given and the rest is
                   written as text; right answers, and problems in which S_i comes next, token for
                   token
ecr                K; encoder, latent: {own, chance, maximum}: see metrics.measure_ecr
parallelism        problems, paths (mean number); encoder, latent: {n_eff, above_1.7, covered, and
                   each with _random}: see metrics.effective_paths, metrics.covered_spans; orders
                   (toy task): encoder, latent: {mass [order][position], leading, effective
                   [position]}: α on the span of the m-th order of the free steps, the largest
                   span's share of it, and among how many spans it is shared: see
                   metrics.span_mass, metrics.span_shares
collapse           accuracy, interval of {own, top 1, top c, first path, last path}: the latent
                   model thinks in its own z, or in z of q's largest entries or of one path's
                   tokens alone; null for hidden latents, which have no such entries
curves             {sft, sup, latent, explicit, no_cot: {step, score, loss}}: see common.read_curve
shape              token_norm {low, mean, high}, of the ordinary tokens' embeddings, 5 and 95 %;
                   encoder, latent: {count, entropy, top1, norm, cosine}: see metrics.chain_shape

`encoder`: what phase 1's encoder makes of the true chain; `latent`: what the latent model thinks.
"""
import json
from collections import Counter

import numpy as np
import torch

import common
from data import Problems, UserError, known_paths, splits, to_number
from encoder import chunk_tokens, count_chunks, pad, split_chunks
from metrics import (ERRORS, chain_shape, covered_spans, effective_paths, error_type, mean,
                     measure_ecr, span_mass, span_shares, spans, token_mass, wilson)
from probes import (FEW, RECORDED, Setting, decode_after_latents, decode_after_prefixes,
                    decode_along_path, decode_split, record_latents, record_summaries)
from report import FIGURES, LABELS, heaviest_tokens, page, picture, strip

WAYS = {  # of thinking: the checkpoint whose LLM does it, and how `decode.evaluate` calls it
    "warm_up": ("sft", "text"),
    "explicit": ("explicit", "text"),
    "no_cot": ("no_cot", "text"),
    "latent": ("latent", "latent"),
    "gold": ("sup", "gold"),
}
KS = (1, 2, 5, 10, 50, 100, RECORDED)  # ECR@K, and at K = c
PATH_TOP_K = 100  # entries of α that count for a path
PATH_BATCH = 8    # problems whose paths are compared at once: α is made dense for it, (B, N, V)
SHOWN = 12        # problems in the page that were solved, and as many that were not


# --------------------------------------------------------------------------------- models at work

def measure_ways(setting, checkpoints, encoder, top_k):
    """{figure: {way: value}} for every way to think, on the same problems; None: not trained.

    checkpoints {file: checkpoint}; top_k {how `decode.evaluate` calls the way: entries of α in z}.
    """
    section = {figure: dict.fromkeys(WAYS) for figure in FIGURES}
    section["errors"] = {}
    for way, (file, thought) in WAYS.items():
        if file not in checkpoints:
            continue
        llm = common.build(checkpoints[file], "llm", setting.env.device)
        found = decode_split(setting, llm, thought, encoder=encoder, top_k=top_k[thought])
        found["interval"] = wilson(found["accuracy"] * setting.R, setting.R)
        print(f"{LABELS[way]:26} accuracy {found['accuracy']:.3f}, steps {found['steps']:.1f}, "
              f"{found['seconds']:.1f} s")
        for figure in FIGURES:
            section[figure][way] = found[figure]
        if way in ("warm_up", "explicit"):
            section["errors"][way] = count_errors(setting.problems.problems, found["answers"])
    return section


def count_errors(problems, answers):
    """{type: how many} of the wrong ones among `answers`, {problem: (text, right, its ids)}."""
    types = Counter(error_type(problems[row]["question"], text)
                    for row, (text, right, _) in answers.items() if not right)
    return {name: types[name] for name in ERRORS}


def control_chains(z, n, tokens, E):
    """{name: (z, n)}: each problem's own chain, and three that hold less of it.

    zeroed    as many vectors of zeros
    shuffled  problem r is given the chain of problem r - 1, the first that of the last
    random    the embeddings of `tokens`
    z float (R, N, C), n int64 (R,): the chains; tokens int64 (R, N); E float (V, C): embeddings.
    """
    return {"own": (z, n), "zeroed": (torch.zeros_like(z), n),
            "shuffled": (z.roll(1, 0), n.roll(1)), "random": (E[tokens], n)}


def with_intervals(found, R):
    """{"accuracy", "interval": {name: …}} of {name: what `decode.evaluate` returns}."""
    return {"accuracy": {name: f["accuracy"] for name, f in found.items()},
            "interval": {name: wilson(f["accuracy"] * R, R) for name, f in found.items()}}


def measure_controls(setting, llm, latents, seed):
    """The accuracy of the latent model when it is given a chain: its own, or another."""
    R, problems = setting.R, setting.problems
    ks, cut = decode_after_prefixes(setting, llm, latents)
    # random tokens are as frequent as in true chains
    tokens = np.random.default_rng([seed, 7]).choice(problems.s.flat, latents.z.shape[:2])
    E = llm.wte.weight.detach().cpu()
    chains = control_chains(latents.z, latents.n, torch.from_numpy(tokens), E)
    found = {name: decode_after_latents(setting, llm, *chain) for name, chain in chains.items()}
    donor = 0
    for row, (text, _, _) in found["shuffled"]["answers"].items():
        donor += to_number(text) == to_number(problems.problems[(row - 1) % R]["answer"])
    return {**with_intervals(found, R), "donor": donor / R,
            "cut": {"problems": min(R, FEW), "k": ks, "accuracy": [f["accuracy"] for f in cut]}}


def path_chunks(paths, tokenizer, c):
    """The chunks of one path a problem, texts, as int64 (R, chunks, c), padded with -1."""
    tokens = [tokenizer.encode(path) for path in paths]
    N = max(1, max(count_chunks(len(row), c) for row in tokens))
    return pad(tokens, N * c, value=-1).view(-1, N, c)  # (R, chunks, c)


def measure_collapse(setting, llm, latents, top_k, paths):
    """The accuracy of the latent model when each z, as it is fed back, holds less than its own q.

    latents: its own chains, with their answers; paths: for each problem the texts of its known
    paths; a chain is forced along the first or last.
    """
    right = sum(right for _, right, _ in latents.answers.values())
    found = {"own": {"accuracy": right / setting.R}}
    for name, k in (("top 1", 1), ("top c", setting.c)):
        found[name] = decode_split(setting, llm, "latent", top_k=k)
    for name, m in (("first path", 0), ("last path", -1)):
        texts = [known[m] if known else "" for known in paths]
        chunks = path_chunks(texts, setting.env.tokenizer, setting.c)
        found[name] = decode_along_path(setting, llm, chunks, top_k)
    return with_intervals(found, setting.R)


def measure_continuation(setting, llm, latents):
    """Phase 1's LLM reads z_0 … z_{i-1} in place of the first i chunks, and writes on as text."""
    points, found = decode_after_prefixes(setting, llm, latents, end_of_thought=False)
    next_chunk = []
    for i, after in zip(points, found):
        exact = []
        for row, (_, _, written) in after["answers"].items():
            if i < latents.n[row]:
                chunk = split_chunks(setting.problems.s[row], setting.c)[i]
                exact.append(written[:len(chunk)] == chunk)
        next_chunk.append(mean(torch.tensor(exact)))
    return {"problems": min(setting.R, FEW), "i": points,
            "accuracy": [after["accuracy"] for after in found], "next_chunk": next_chunk}


# ---------------------------------------------------------------------------- the chains recorded

def measure_shape(llm, n_ordinary, chains):
    """The norms of the ordinary tokens' embeddings, and metrics.chain_shape of {whose: Latents}."""
    norm = llm.wte.weight.detach()[:n_ordinary].float().norm(dim=1).cpu()
    low, high = norm.quantile(0.05).item(), norm.quantile(0.95).item()
    section = {"token_norm": {"low": low, "mean": mean(norm), "high": high}}
    for whose, latents in chains.items():
        section[whose] = chain_shape(latents.n, latents.values, latents.entropy, latents.z)
    return section


def pad_paths(token_paths):
    """For each problem a list of paths, as tensors: tokens int64 (R, M, L), length int64 (R, M)."""
    M = max(len(paths) for paths in token_paths)
    flat = []
    for paths in token_paths:
        flat += paths + [[]] * (M - len(paths))
    length = torch.tensor([len(path) for path in flat])
    L = int(length.max())
    return pad(flat, L).view(-1, M, L), length.view(-1, M)  # (R, M, L), (R, M)


def paths_of_next_problems(token_paths):
    """For each problem as many paths as it has, taken from the problems after it, in a circle."""
    flat = sum(token_paths, [])
    end, found = 0, []
    for paths in token_paths:
        end += len(paths)
        others = len(flat) - len(paths)  # where they are fewer than its own, they come again
        found.append([flat[(end + m % others) % len(flat)] for m in range(len(paths))])
    return found


def score_paths(latents, rows, token_paths, c, orders=False):
    """[N_eff (R,), covered (R,)] of those problems `rows` that have any latent, as in metrics.py.

    With orders, [mass (R, M, N), leading (R, N), effective (R, N)] of the same problems as well.
    rows int64 (R,); token_paths: for each of them a list of paths.
    """
    tokens, length = pad_paths(token_paths)
    found = []
    for index in torch.arange(len(rows)).split(PATH_BATCH):
        r = rows[index]
        n, values = latents.n[r], latents.values[r, :, :PATH_TOP_K]
        ids = latents.ids[r, :, :PATH_TOP_K]
        path = spans(tokens[index], length[index], n[:, None], c, ids.size(1))  # (B, M, N, W)
        mass = token_mass(values, ids, path)                                    # (B, M, N, W)
        figures = [effective_paths(mass, path, n), covered_spans(mass, path)]
        if orders:
            on_span = span_mass(mass, path)                                     # (B, M, N)
            figures += [on_span, *span_shares(on_span, path)]
        found.append(figures)
    has_latents = latents.n[rows] > 0
    return [torch.cat(parts)[has_latents] for parts in zip(*found)]


def measure_parallelism(chains, paths, tokenizer, c, orders):
    """Both measures for the problems of two paths or more; None where fewer than two have them.

    chains {whose: Latents}; paths: for each problem the texts of its known paths; orders: whether
    the m-th path is the same order of steps in all of them, as in the toy task.
    """
    rows = [r for r, known in enumerate(paths) if len(known) > 1]
    if len(rows) < 2:
        return None
    own = [[tokenizer.encode(path) for path in paths[r]] for r in rows]
    others = paths_of_next_problems(own)
    rows, count = torch.tensor(rows), torch.tensor([len(known) for known in own])
    section = {"problems": len(rows), "paths": mean(count), "orders": {} if orders else None}
    for whose, latents in chains.items():
        n_eff, covered, *by_order = score_paths(latents, rows, own, c, orders)
        n_eff_random, covered_random = score_paths(latents, rows, others, c)
        section[whose] = {
            "n_eff": mean(n_eff), "n_eff_random": mean(n_eff_random),
            "above_1.7": mean(n_eff > 1.7), "above_1.7_random": mean(n_eff_random > 1.7),
            "covered": mean(covered), "covered_random": mean(covered_random)}
        if orders:
            mass, leading, effective = by_order
            section["orders"][whose] = {
                "mass": [[mean(x) for x in order.T] for order in mass.unbind(1)],
                "leading": [mean(x) for x in leading.T],
                "effective": [mean(x) for x in effective.T]}
    return section


# ------------------------------------------------------------------------------------- the script

def load_latent_model(args, env):
    """Phase 3's checkpoint. Raises UserError where it does not follow from --out's phase 1."""
    path, sup = args.out / "latent.pt", env.parent
    checkpoint = common.load_checkpoint(path)
    common.require_same(path, checkpoint["config"], fingerprint=sup["config"]["fingerprint"],
                        chunk_size=args.chunk_size,
                        encoder=common.identity(sup["models"]["encoder"]))
    return checkpoint


def load_baselines(args, env):
    """{file: checkpoint} of those trained. Raises UserError where one does not fit phase 1."""
    checkpoints = {}
    for file in ("sft", "explicit", "no_cot"):
        path = args.out / f"{file}.pt"
        if not path.is_file():
            hint = "" if file == "sft" else " (python train_sup.py --baselines makes it)"
            print(f"left out: there is no {path}{hint}")
            continue
        checkpoints[file] = common.load_checkpoint(path)
        fields = (*common.PROBLEMS, *common.SHAPE, "tokenizer")
        same = {field: env.config[field] for field in fields}
        common.require_same(path, checkpoints[file]["config"], **same)
    if "sft" in checkpoints:
        common.require_one_warm_up(args.out, {**checkpoints, "sup": env.parent})
    return checkpoints


def ask(args, env, llm, caps, top_k):
    """Print the latents of one question, each as its heaviest tokens, and the answer."""
    question = {"question": args.ask, "chain": "", "answer": "0"}
    try:
        problem = Problems([question], env.tokenizer, args.block_size, args.chunk_size)
    except UserError:
        length = len(env.tokenizer.encode(args.ask))
        raise UserError(f"--ask: the question has {length} tokens; with its answer it must fit the "
                        f"model's {args.block_size} positions (--block-size of train_sup.py): ask "
                        "a shorter one")
    latents = record_latents(Setting(problem, 1, args.chunk_size, caps, 1, env), llm, top_k)
    n = latents.n[0]
    columns = heaviest_tokens(latents.values[0, :n], latents.ids[0, :n], env.tokenizer)
    for i, tokens in enumerate(columns):
        shaded = [f"{' ░▒▓█'[int(4 * w + 0.8)]} {text[:8]:8} {w:.2f}" for text, w in tokens]
        print(f"z_{i:<3}" + "  ".join(shaded))
    print(latents.answers[0][0].removeprefix("<eot>"))


def pictures(setting, chains, chunks):
    """As HTML, the first problems that the latent model solved, then those that it did not."""
    answers = chains["latent"].answers
    solved = [row for row in range(setting.R) if answers[row][1]]
    unsolved = [row for row in range(setting.R) if not answers[row][1]]
    html = []
    for row in solved[:SHOWN] + unsolved[:SHOWN]:
        text, right, _ = answers[row]
        strips = {}
        for whose, latents in chains.items():
            n = latents.n[row]
            strips[whose] = strip(latents.values[row, :n], latents.ids[row, :n], chunks[row],
                                  setting.env.tokenizer)
        html.append(picture(setting.problems.problems[row], text.removeprefix("<eot>"), right,
                            strips, unfold=not html))
    return html


def rounded(report):
    """The report as JSON holds it: floats to four places, None for what is not finite."""
    return json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4),
                      parse_constant=lambda text: None)


def add_flags(p):
    add = p.add_argument_group("analysis").add_argument
    add("--split", choices=["test", "easy", "held-out", "renumbered"], default="test",
        help="test (default); easy: those test problems that train_sup.py --easy would take; "
        "held-out: training problems that are kept out whole; renumbered: the training problems "
        "with numbers that training never had (GSM8K)")
    add("--limit", type=int, help="how many problems (default: all)")
    add("--ask", metavar="QUESTION", help="answer this question in latents and show each of them")
    p.set_defaults(batch_size=128)


def measure(setting, checkpoints, paths, top_k, seed):
    """(the report's sections, {whose: Latents}, the chunks int64 (R, chunks, c))."""
    env, R, c = setting.env, setting.R, setting.c
    llm = common.build(checkpoints["latent"], "llm", env.device)
    phase1_llm = common.build(checkpoints["sup"], "llm", env.device)
    encoder = common.build(checkpoints["sup"], "encoder", env.device)
    hidden = llm.config.hidden_latents  # a hidden state cannot be cut to tokens
    orders = "paths" in setting.problems.problems[0]
    report = measure_ways(setting, checkpoints, encoder, top_k)
    chains = {"encoder": record_summaries(setting, phase1_llm, encoder, top_k["gold"]),
              "latent": record_latents(setting, llm, top_k["latent"])}
    rows = np.arange(R)
    chunks = chunk_tokens(setting.problems.batch(rows, rows), c)  # (R, chunks, c)
    ks = sorted({*KS, c})
    ecr = {whose: measure_ecr(chain.ids, chain.n, chunks, ks) for whose, chain in chains.items()}
    report |= {"problems": R,
               "controls": measure_controls(setting, llm, chains["latent"], seed),
               "collapse": None if hidden else
               measure_collapse(setting, llm, chains["latent"], top_k["latent"], paths),
               "continuation": measure_continuation(setting, phase1_llm, chains["encoder"]),
               "ecr": {"K": ks, **ecr},
               "parallelism": measure_parallelism(chains, paths, env.tokenizer, c, orders),
               "shape": measure_shape(llm, env.tokenizer.n_ordinary, chains)}
    return report, chains, chunks


def main(argv=None):
    p = common.parser(__doc__, "analyze")
    add_flags(p)
    args, env = common.setup(p, "analyze", argv)

    # load
    sup, latent = env.parent, load_latent_model(args, env)
    caps, stored = latent["config"]["caps"], latent["config"]["store_top_k"]
    top_k = {"text": 0, "gold": sup["config"]["top_k"],
             "latent": stored if args.top_k is None else args.top_k}
    if args.ask is not None:
        ask(args, env, common.build(latent, "llm", env.device), caps, top_k["latent"])
        return
    train, test = splits(args, env, ["train", args.split])
    common.require_same(args.out / "sup.pt", sup["config"], fingerprint=train.fingerprint)
    checkpoints = {"latent": latent, "sup": sup, **load_baselines(args, env)}
    paths = known_paths(test.problems[:args.limit], args.data, args.data_dir, args.cot)

    # measure
    R = min(len(test), args.limit or len(test))
    setting = Setting(test, R, args.chunk_size, caps, args.batch_size, env)
    report, chains, chunks = measure(setting, checkpoints, paths, top_k, args.seed)
    configs = {file: checkpoint["config"] for file, checkpoint in checkpoints.items()}
    report["curves"] = common.read_curves(args.out)

    # write
    report = rounded(report) | {"config": {"analyze": env.config, **configs}}  # flags as they are
    html = page(report, pictures(setting, chains, chunks))
    html = html.encode("utf-8", "replace")  # a question may hold half of a character
    path = args.out / ("report" if args.split == "test" else f"report-{args.split}")
    common.write_json(path.with_suffix(".json"), report)
    common.write(path.with_suffix(".html"), lambda file: file.write(html))
    print(f"wrote {path}.html and .json")


if __name__ == "__main__":
    common.start(main)
