"""Measure: accuracy, steps and time of every way to think, on the test split; and answer one question by hand.

    python analyze.py
    python analyze.py --ask "Ann has 7 pens and buys 5 more. …"
"""
import json

import torch

import common
from encoder import decode, keep_top


def main(argv=None):
    p = common.parser(__doc__, "analyze")
    p.add_argument("--limit", type=int, help="how many test problems (default: all)")
    p.add_argument("--ask", metavar="QUESTION", help="answer this question in latents and show each of them")
    args, env = common.setup(p, "analyze", argv)
    latent = common.load_checkpoint(args.out / "latent.pt")
    top_k = latent["config"]["store_top_k"]
    caps = latent["config"]["caps"]
    llm = common.build(latent, "llm", env.device)
    test, = common.splits(args, env, ["test"])
    report = {"accuracy": {}, "steps": {}, "seconds": {}}
    rows = {"explicit": ("sft", "llm", "text"), "no_cot": ("no_cot", "llm", "text"), "latent": (None, None, "latent"), "gold": ("sup", "llm", "gold")}
    for name, (file, model, thought) in rows.items():
        if file and not (args.out / f"{file}.pt").exists():
            report["accuracy"][name] = None
            continue
        model = common.build(common.load_checkpoint(args.out / f"{file}.pt"), model, env.device) if file else llm
        encoder = common.build(env.parent, "encoder", env.device) if name == "gold" else None
        r = common.evaluate(model, test, env, thought, caps, encoder, args.chunk_size, top_k if name == "latent" else args.top_k, args.limit)
        print(name, {k: v for k, v in r.items() if k != "answers"})
        for k in report:
            report[k][name] = r[k]
    common.write(args.out / "report.json", lambda f: f.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    main()
