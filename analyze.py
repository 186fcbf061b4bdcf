"""Measure and show: how well each way to think does, what a latent holds, whether latents matter.

    python analyze.py                                # the test problems: report.html, report.json
    python analyze.py --ask "Ann has 6 pens and …"   # one question, in the terminal

report.json (shares are 0 … 1; lists go by position, K, k or i; null: not trained, or not defined):

problems, config   how many of the split; of this run and of every model in it: settings, what
                   it was made of (ids), made_by {commit, torch, python}
accuracy, interval (95 %), steps, seconds, unparseable, capped (problems)
                   of {warm_up, explicit, no_cot, latent, gold}
unseen             {split: {problems; accuracy, interval: of the same}} of the held-out and the test
                   problems, where the split is of training problems with new numbers
controls           accuracy, interval of {own, zeroed, shuffled, random}: the latent model when it
                   is given such a chain; donor: the share of the shuffled in which it writes the
                   answer of the problem whose chain it is; cut {problems, k, accuracy}: it is given
                   z_0 … z_{k-1} alone
errors             {warm_up, explicit: {type: problems}}: the wrong answers: see error_type
continuation       {problems, i, accuracy, next_chunk}: z_0 … z_{i-1} are given and the rest is
                   written as text; right answers, and problems in which S_i comes next, token for
                   token
ecr                K; encoder, latent: {own, chance, maximum}: see measure_ecr
parallelism        problems, paths (mean number); encoder, latent: {covered, covered_most,
                   covered_random, above_1.7 (share of the problems), n_eff, n_eff_random,
                   histogram (shares of 0 … 0.5, 0.5 … 1, … covered), by_latent, most_by_latent}:
                   see covered_chunks, effective_paths; random: with another problem's paths
collapse           accuracy, interval of {own, top 1, top c, first path, last path}: the latent
                   model thinks in its own z, or in z of q's largest entries or of one path's
                   tokens alone; null for hidden latents, which have no such entries
curves             {sft, sup, latent, explicit, no_cot: {step, score, loss}}: see lab/run.py

`encoder`: what phase 1's encoder makes of the true chain; `latent`: what the latent model thinks.
With compress.py --paths parallel, a chunk or a path of `latent` is what is left of it where the
latents of parallel steps are left out.
The functions named are in lab/metrics.py.
"""
import json
from functools import partial

import numpy as np
import torch

from data import Problems
from encoder import chunk_tokens, count_chunks, split_chunks
from lab.evaluate import gold_prompt
from lab.files import UserError, build, load, write, write_json
from lab.flags import PROBLEMS, usual_split
from lab.metrics import count_errors, mean, measure_ecr, measure_parallelism, wilson
from lab.numbers import to_number
from lab.paths import chain_of_latents
from lab.probes import (FEW, RECORDED, Setting, decode_after_latents, decode_after_prefixes,
                        decode_along_path, decode_split, record_latents, record_summaries)
from lab.report import FIGURES, LABELS, heaviest_tokens, page, pictures
from lab.run import read_curves
from lab.setup import setup, start
from lab.sources import known_paths, splits

WAYS = {  # of thinking, and the file whose LLM does it
    "warm_up": "sft",
    "explicit": "explicit",
    "no_cot": "no_cot",
    "latent": "latent",
    "gold": "sup",
}
UNSEEN = ["test", "held-out"]  # splits of problems whose words are new, besides the numbers
KS = (1, 2, 5, 10, 50, 100, RECORDED)  # ECR@K, and at K = c


# ------------------------------------------------------------------------------------------- load

def load_models(args, env, data):
    """{file: checkpoint}: sup and latent, and those of sft, explicit and no_cot that were trained.

    data: the fingerprint of the training problems. Raises UserError where one was made of other
    problems or models than the rest.
    """
    sup = env.parent
    found = {"sup": sup, "latent": load(args.out / "latent.pt", data=data, sup=sup["id"])}
    settings = {field: sup["settings"][field] for field in PROBLEMS}
    sft = sup["made_of"]["sft"]
    same = {"sft": {"id": sft}, "explicit": {"sft": sft}, "no_cot": {}}
    for file, made_of in same.items():
        path = args.out / f"{file}.pt"
        if not path.is_file():
            hint = "" if file == "sft" else " (python train_sup.py --baselines makes it)"
            print(f"left out: there is no {path}{hint}")
            continue
        found[file] = load(path, settings, **made_of)
        if file == "sft":  # no_cot.pt starts from the weights that sft.pt started from
            same["no_cot"]["start"] = found["sft"]["made_of"]["start"]
    return found


def make_setting(args, env, latent, problems, batch_size):
    """What all measurements share. latent: the checkpoint of phase 3."""
    settings = latent["settings"]
    R = min(len(problems), args.limit or len(problems))
    return Setting(
        problems, R, args.chunk_size, settings["caps"],
        top_k=settings["store_top_k"] if args.top_k is None else args.top_k,
        batch_size=batch_size, env=env)


def stood_for(problems, known, how, tokenizer, c):
    """What the latents of each problem stand for: its chain's chunks, and its known paths' tokens.

    known: for each problem the texts of its paths; how: --paths of compress.py. Returns
    (int64 (R, chunks, c), for each problem a list of lists of ids).
    """
    own, paths = [], []
    for problem, chains in zip(problems, known):
        own.append(chain_of_latents(problem, problem["chain"], tokenizer, c, how))
        paths.append([chain_of_latents(problem, text, tokenizer, c, how) for text in chains])
    return chunk_tokens(own, c), paths


# ---------------------------------------------------------------------------------------- measure

def measure(setting, llms, encoder, paths, chunks, seed):
    """(report.json's sections, {whose: Latents}).

    llms {file: GPT}; paths {whose: for each problem the tokens of its known paths}; chunks {whose:
    the chunks that the latents stand for, int64 (R, chunks, c)}.
    """
    R, c = setting.R, setting.c
    llm = llms["latent"]
    report = measure_ways(setting, llms, encoder)
    chains = {"encoder": record_summaries(setting, llms["sup"], encoder),
              "latent": record_latents(setting, llm)}
    ks = sorted({*KS, c})
    report |= {
        "problems": R,
        "controls": measure_controls(setting, llm, chains["latent"], seed),
        "collapse": measure_collapse(setting, llm, chains["latent"], paths["latent"]),
        "continuation": measure_continuation(setting, llms["sup"], chains["encoder"]),
        "ecr": {whose: measure_ecr(x.ids, x.n, chunks[whose], ks) for whose, x in chains.items()},
        "parallelism": measure_parallelism(chains, paths, c)}
    report["ecr"]["K"] = ks
    return report, chains


def measure_ways(setting, llms, encoder):
    """{figure: {way: value}} for every way to think, on the same problems; None: not trained."""
    R, c, problems = setting.R, setting.c, setting.problems
    gold = partial(gold_prompt, llm=llms["sup"], encoder=encoder, env=setting.env, c=c)
    options = {"latent": {"c": c, "top_k": setting.top_k},
               # fewer, since the encoder's α (B, N, V) is large
               "gold": {"prompt": gold, "batch_size": -(-setting.batch_size // 4)}}
    section = {figure: dict.fromkeys(WAYS) for figure in FIGURES}
    section["errors"] = {}
    for way, file in WAYS.items():
        if file not in llms:
            continue
        found = decode_split(setting, llms[file], **options.get(way, {}))
        found["interval"] = wilson(found["accuracy"] * R, R)
        if way == "gold":
            found["steps"] = int(count_chunks(problems.s.length[:R], c).sum()) / R
        print(f"{LABELS[way]:26} accuracy {found['accuracy']:.3f}, steps {found['steps']:.1f}, "
              f"{found['seconds']:.1f} s")
        for figure in FIGURES:
            section[figure][way] = found[figure]
        if way in ("warm_up", "explicit"):
            section["errors"][way] = count_errors(problems.problems, found["answers"])
    return section


def measure_unseen(settings, llms, encoder):
    """The section `unseen`. settings {split: Setting}."""
    section = {}
    for split, setting in settings.items():
        print(f"{split}: {setting.R} problems whose words are new to the models")
        found = measure_ways(setting, llms, encoder)
        section[split] = {"problems": setting.R, "accuracy": found["accuracy"],
                          "interval": found["interval"]}
    return section


def with_intervals(accuracy, R):
    """{"accuracy", "interval": {name: …}} of {name: accuracy}."""
    return {"accuracy": accuracy, "interval": {name: wilson(a * R, R)
                                               for name, a in accuracy.items()}}


def measure_controls(setting, llm, latents, seed):
    """The accuracy of the latent model when it is given a chain: its own, or one that holds less.

    zeroed    as many vectors of zeros
    shuffled  problem r is given the chain of problem r - 1, the first that of the last
    random    as many embeddings of tokens, as frequent as in true chains
    """
    R, problems, n, z = setting.R, setting.problems, latents.n, latents.z
    tokens = np.random.default_rng([seed, 7]).choice(problems.s.flat, z.shape[:2])
    E = llm.wte.weight.detach().cpu()
    chains = {"own": (z, n), "zeroed": (torch.zeros_like(z), n),
              "shuffled": (z.roll(1, 0), n.roll(1)), "random": (E[torch.from_numpy(tokens)], n)}
    found = {name: decode_after_latents(setting, llm, *chain) for name, chain in chains.items()}
    donor = 0
    for row, (text, _, _) in found["shuffled"]["answers"].items():
        donor += to_number(text) == to_number(problems.problems[(row - 1) % R]["answer"])
    ks, cut = decode_after_prefixes(setting, llm, latents)
    return {**with_intervals({name: f["accuracy"] for name, f in found.items()}, R),
            "donor": donor / R,
            "cut": {"problems": min(R, FEW), "k": ks, "accuracy": [f["accuracy"] for f in cut]}}


def measure_collapse(setting, llm, latents, paths):
    """The accuracy of the latent model when each z, as it is fed back, holds less than its own q.

    latents: its own chains, with their answers; paths: for each problem the tokens of its known
    paths; a chain is forced along the first or last. None for hidden latents.
    """
    if setting.env.settings["latents"] == "hidden":
        return None
    right = sum(right for _, right, _ in latents.answers.values())
    accuracy = {"own": right / setting.R}
    for name, k in (("top 1", 1), ("top c", setting.c)):
        accuracy[name] = decode_split(setting, llm, c=setting.c, top_k=k)["accuracy"]
    for name, m in (("first path", 0), ("last path", -1)):
        tokens = [known[m] if known else [] for known in paths]
        accuracy[name] = decode_along_path(setting, llm, tokens)["accuracy"]
    return with_intervals(accuracy, setting.R)


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


# ------------------------------------------------------------------------------------------ write

def rounded(report):
    """The report as JSON holds it: floats to four places, None for what is not finite."""
    return json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4),
                      parse_constant=lambda text: None)


def describe(train, saved, env):
    """The config section: what this run and each of its models was made with, of, and by."""
    made_of = {"data": train.fingerprint, **{file: of["id"] for file, of in saved.items()}}
    config = {"analyze": {"settings": env.settings, "made_of": made_of, "made_by": env.made_by}}
    for file, checkpoint in saved.items():
        config[file] = {key: checkpoint[key] for key in ("settings", "made_of", "made_by")}
    return config


def write_report(args, report, shown):
    """report.json and report.html, or report-SPLIT where that is not the split by default."""
    html = page(report, shown).encode("utf-8", "replace")  # a question may hold half a character
    path = args.out / ("report" if args.split == usual_split(args) else f"report-{args.split}")
    write_json(path.with_suffix(".json"), report)
    write(path.with_suffix(".html"), lambda file: file.write(html))
    print(f"wrote {path}.html and .json")


# ----------------------------------------------------------------------------------- one question

def ask(args, env):
    """Print the latents of one question, each as its heaviest tokens, and the answer."""
    latent = load(args.out / "latent.pt", sup=env.parent["id"])
    question = {"question": args.ask, "chain": "", "answer": "0"}
    try:
        problem = Problems([question], env.tokenizer, args.block_size)
    except UserError:
        raise UserError(f"--ask: the question has {len(env.tokenizer.encode(args.ask))} tokens; "
                        f"with its answer it must fit the model's {args.block_size} positions "
                        "(--block-size of train_sup.py): ask a shorter one")
    setting = make_setting(args, env, latent, problem, batch_size=1)
    latents = record_latents(setting, build(latent, "llm", env.device))
    n = latents.n[0]
    columns = heaviest_tokens(latents.values[0, :n], latents.ids[0, :n], env.tokenizer)
    for i, tokens in enumerate(columns):
        shaded = [f"{' ░▒▓█'[int(4 * w + 0.8)]} {text[:8]:8} {w:.2f}" for text, w in tokens]
        print(f"z_{i:<3}" + "  ".join(shaded))
    print(latents.answers[0][0].removeprefix("<eot>"))


# ------------------------------------------------------------------------------------- the script

def main(argv=None):
    args, env = setup(__doc__, "analyze", argv)
    if args.ask is not None:
        ask(args, env)
        return

    # load
    also = UNSEEN if args.split == "renumbered" else []
    train, test, *unseen = splits(args, env, ["train", args.split, *also])
    saved = load_models(args, env, train.fingerprint)
    llms = {file: build(checkpoint, "llm", env.device) for file, checkpoint in saved.items()}
    encoder = build(env.parent, "encoder", env.device)
    setting, *others = [make_setting(args, env, saved["latent"], split, args.batch_size)
                        for split in (test, *unseen)]
    problems = test.problems[:setting.R]
    known = known_paths(problems)
    how = {"encoder": "own", "latent": saved["latent"]["settings"]["paths"]}
    chunks, paths = {}, {}
    for whose, kind in how.items():
        chunks[whose], paths[whose] = stood_for(problems, known, kind, env.tokenizer,
                                                args.chunk_size)

    # measure
    report, chains = measure(setting, llms, encoder, paths, chunks, args.seed)
    report["unseen"] = measure_unseen(dict(zip(also, others)), llms, encoder)
    report["curves"] = read_curves(args.out)

    # write
    report = rounded(report) | {"config": describe(train, saved, env)}  # flags as they are
    write_report(args, report, pictures(problems, chains, chunks, env.tokenizer))


if __name__ == "__main__":
    start(main)
