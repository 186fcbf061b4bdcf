"""Every flag of the four scripts, in one table, and what follows from it.

`python train_sup.py --help` shows the flags of one script. A script first fills in what was not
given: what phase 1 was made with, then the preset of the data.
"""
import argparse
from pathlib import Path
from typing import NamedTuple

import toy
from lab.files import UserError
from lab.gpt2 import GPT2
from lab.sources import COPIES

SHAPE = ("n_layer", "n_head", "n_embd", "block_size")
SHARES = ("as-told", "continuation", "on-policy")
TRAINED = {"batch_size": 32, "lr": 1e-4}  # what suits GPT-2's own weights
PROBLEMS = ("data", "cot", "renumber", "as_told", "seed")  # they decide what these are


class Flag(NamedTuple):
    name: str
    scripts: str     # that have it, of sup, compress, latent and analyze
    loops: str       # whose results depend on it, of sft, sup, latent, explicit and no_cot
    kind: object     # the least value of a number, choices, or a type; bool: a switch
    default: object  # or one by preset, as by_data makes it
    help: str


ALL, LEARN = "sup compress latent analyze", "sft sup latent explicit no_cot"
TEXT = "sft explicit no_cot"  # the loops of the warm-up and of the baselines


def by_data(*values):
    """Of the built-in task; the easy problems, on a laptop; GSM8K, on a GPU; any other data."""
    return dict(zip(("toy", "easy", "gsm8k", "other"), values))


FLAGS = {
    "data": [
        Flag("data", "sup", LEARN, str, "toy", "toy (default); easy: the easy problems of GSM8K, "
             "for a laptop; gsm8k: all of them, for a GPU; gsm8k-aug; a .jsonl file in GSM8K's "
             "form, or a folder with train.jsonl and test.jsonl"),
        Flag("data-dir", ALL, "", Path, None, "folder with the files of GSM8K or GSM8K-Aug "
             "(default: data/gsm8k, to which it is downloaded, and data/gsm8k-aug)"),
        Flag("cot", "sup", LEARN, ("steps", "text"), "steps", "chain of thought: the calculator "
             "steps (default) or the whole solution"),
        Flag("renumber", "sup", LEARN, 0, by_data(0, COPIES["easy"], COPIES["gsm8k"], 0),
             "so many copies of each training problem with other numbers (default: "
             + ", ".join(f"{name} {copies}" for name, copies in COPIES.items()) + "; else 0)"),
        Flag("as-told", "sup", LEARN, 0.0, toy.AS_TOLD, "toy task: share of the chains that take "
             "the free steps in the order of the question (default: 0.9; 0.167 = all six orders "
             "alike)"),
        Flag("paths", "compress", "", ("own", "all", "parallel"), "own", "own: α of each problem's "
             "own chain (default); all: the mean over all its chains; parallel: and steps that "
             "need none of each other's results share their place"),
        Flag("batch-size", "sup compress latent", LEARN, 1, by_data(32, 32, 64, 16),
             "problems in a batch"),
        Flag("batch-size", "analyze", "", 1, 128, "problems in a batch"),
    ],
    "model": [
        Flag("chunk-size", "sup", "sup latent", 1, 2,
             "c, tokens of the chain in one latent token (default: 2)"),
        Flag("top-k", "compress", "", 0, 50, "entries of α in the store, which is held "
             "in memory, 0 = all (default: 50)"),
        Flag("top-k", "analyze", "", 0, None,
             "entries of q in z when decoding, 0 = all (default: as in the store)"),
        Flag("init", "sup", TEXT, str, "scratch", "scratch (default), " + ", ".join(GPT2)
             + ", or a checkpoint such as sft.pt"),
        Flag("n-layer", "sup", LEARN, 1, by_data(3, 3, 12, 4), "layers"),
        Flag("n-head", "sup", LEARN, 1, by_data(8, 8, 12, 4), "attention heads"),
        Flag("n-embd", "sup", LEARN, 1, by_data(128, 192, 768, 256), "channels"),
        Flag("block-size", "sup", LEARN, 1, by_data(128, 128, 384, 384), "positions"),
    ],
    "training": [
        Flag("lr", "sup latent", LEARN, 0.0, by_data(4e-3, 4e-3, 1e-3, 1e-3), "peak learning rate"),
        Flag("sft-steps", "sup", "", 0, by_data(600, 2400, 2600, 2000),
             "updates of the explicit warm-up"),
        Flag("steps", "sup", "", 0, by_data(400, 900, 800, 1000), "updates of phase 1"),
        Flag("steps", "latent", "", 0, by_data(250, 800, 800, 1000),
             "updates (default: for each token of a chunk 250 on the toy task, 800 of GSM8K, 1000 "
             "elsewhere; six times these where a chain follows several paths)"),
        Flag("eval-every", "sup latent", "", 1, by_data(200, 400, 650, 500),
             "updates between two evaluations, which also save"),
        Flag("compile", "sup latent", "", argparse.BooleanOptionalAction, None,
             "torch.compile the models' blocks in training (default: on cuda)"),
    ],
    "baselines": [
        Flag("baselines", "sup", "", bool, False, "train what latent reasoning is compared with "
             "instead: explicit.pt goes on from sft.pt, no_cot.pt answers at once, "
             "X <bot> <eot> Ans"),
        Flag("baseline-steps", "sup", "", 0, None, "updates of each baseline, those of sft.pt "
             "included (default: as many as sft.pt, sup.pt and latent.pt in --out had)"),
    ],
    "ablations": [
        Flag("bag", "sup", "sup", 0.0, 1.0, "bag-of-tokens loss on α: its weight λ, which falls to "
             "a half of this (default: 1; 0 = off)"),
        Flag("bag-steps", "sup", "sup", 0, by_data(60, 100, 100, 200), "the first of --steps, in "
             "which the encoder learns by that loss alone (default: a share of --steps)"),
        Flag("continuation", "sup", "sup", 0.0, 0.5, "share of the problems in which the LLM "
             "writes all the rest after some latents; ℓ_sup has the others (default: 0.5)"),
        Flag("ltim", "sup", "sup", ("on", "off"), "on",
             "off: a summary token sees the earlier ones"),
        Flag("ltsum", "sup", "sup", ("on", "off"), "on",
             "off: a chunk sees all text before it as well"),
        Flag("latents", "sup", "sup", ("superposition", "hidden"), "superposition", "hidden: z is "
             "the encoder's last hidden state, and phase 3 learns it by regression"),
        Flag("noise", "latent", "latent", 0.0, by_data(0.1, 0.1, 0.1, 1.0), "scale of the Gumbel "
             "noise (default: 0.1; with --on-policy, or other data than toy, easy and gsm8k, 1 as "
             "in the paper; 0 = off)"),
        Flag("on-policy", "latent", "latent", 0.0, 0.0, "share of the problems of a batch whose "
             "input is the latents that the model thinks itself (default: 0)"),
    ],
    "analysis": [
        Flag("split", "analyze", "", ("test", "held-out", "renumbered"), None, "test; held-out: "
             "training problems that are kept out whole; renumbered: training problems with "
             "numbers that training never had (default: renumbered after --renumber, else test)"),
        Flag("limit", "analyze", "", 1, None, "how many problems (default: all)"),
        Flag("ask", "analyze", "", str, None,
             "answer this question in latents and show each of them"),
    ],
    "run": [
        Flag("out", ALL, "", Path, None, "folder to write to, and to find the earlier phases in "
             "(default: out/<data>; after train_sup.py: out/toy)"),
        Flag("seed", "sup", LEARN, 0, 0,
             "of weights, toy problems, order of the data and noise (default: 0)"),
        Flag("device", ALL, "", str, None,
             "cpu, cuda, cuda:1, mps, … (default: cuda where there is one)"),
        Flag("dtype", ALL, LEARN, ("float32", "bfloat16"), None, "of the models' matrix products "
             "(default: bfloat16 on cuda, else float32; that is TF32 on cuda)"),
        Flag("resume", "sup compress latent", "", bool, False,
             "go on where an interrupted run stopped"),
        Flag("overwrite", "sup compress latent", "", bool, False,
             "start over, replacing what --out holds of this phase"),
    ],
}


def flags_of(phase):
    """{field: Flag} of a script."""
    return {flag.name.replace("-", "_"): flag for group in FLAGS.values() for flag in group
            if phase in flag.scripts.split()}


def settings_of(loop, args):
    """{field: value} of all that decides what a loop makes, but for how many updates it takes."""
    flags = [flag for group in FLAGS.values() for flag in group if loop in flag.loops.split()]
    fields = [flag.name.replace("-", "_") for flag in flags]
    return {field: getattr(args, field) for field in fields}


def parser(doc, phase):
    """The flags of a script. What is not given is None, or False."""
    p = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for flag in flags:
            if phase in flag.scripts.split():
                group.add_argument("--" + flag.name, help=flag.help, **how_to_read(flag.kind))
    return p


def how_to_read(kind):
    if kind is bool:
        return {"action": "store_true"}
    if kind is argparse.BooleanOptionalAction:
        return {"action": kind}
    if isinstance(kind, tuple):
        return {"choices": kind}
    return {"type": type(kind) if isinstance(kind, (int, float)) else kind}


def fill_in(args, phase, parent=None, store=None):
    """Fill in what was not given, in place.

    parent: phase 1's checkpoint, None in phase 1; store: that of phase 2, in phase 3, as `load`
    returns it. Raises UserError for a value out of range, or flags that make no sense together.
    """
    flags = flags_of(phase)
    for field, flag in flags.items():
        require_in_range(flag, getattr(args, field))
    if getattr(args, "resume", False) and args.overwrite:
        raise UserError("--resume goes on and --overwrite starts over; choose one of them")
    inherited = parent["settings"] if parent else {}
    for field, value in inherited.items():
        if field not in flags or field == "data_dir" and args.data_dir is None:
            setattr(args, field, value)
    preset = args.data or "toy"
    if preset not in ("toy", *COPIES):
        preset = "other"
    given = {field for field in flags if getattr(args, field) is not None}
    for field, flag in flags.items():
        if field not in given:
            by_data = isinstance(flag.default, dict)
            setattr(args, field, flag.default[preset] if by_data else flag.default)
    if args.init in GPT2:
        for field, value in TRAINED.items():
            if field in flags and field not in given:
                setattr(args, field, value)
    for field in ("top_k", "paths", "noise", "on_policy"):
        if field in given and args.latents == "hidden":
            raise UserError(f"--{field.replace('_', '-')} {getattr(args, field)}: a hidden state "
                            "has no entries to choose from; leave it out")
    if phase == "analyze":
        args.split = args.split or usual_split(args)
    if phase == "latent":
        args.paths = store["settings"]["paths"]
        if "noise" not in given and args.on_policy > 0:
            args.noise = 1.0
        if "steps" not in given:  # the more a latent token holds, the longer it takes
            several = args.paths != "own" or args.on_policy > 0
            args.steps *= 6 if several else args.chunk_size
    if phase == "sup":
        if "bag_steps" not in given:
            args.bag_steps = args.steps * args.bag_steps // flags["steps"].default[preset]
        require_sense(args, given)


def usual_split(args):
    """What analyze.py measures by default: after --renumber the problems with new numbers."""
    return "renumbered" if args.renumber else "test"


def require_in_range(flag, value):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not flag.kind <= value < 2 ** 63:
            raise UserError(f"--{flag.name} {value}: must be a number from {flag.kind} up")
        if flag.name in SHARES and value > 1:
            raise UserError(f"--{flag.name} {value}: must be a share, 0 to 1")


def require_sense(args, given):
    """Raises UserError for flags of phase 1 that contradict each other."""
    if args.data == "toy" and args.renumber:
        raise UserError("--renumber is for GSM8K; the toy task draws new problems already")
    if args.init != "scratch" and given.intersection(SHAPE):
        raise UserError(f"--init {args.init} has a shape of its own; leave out --n-layer, "
                        "--n-head, --n-embd and --block-size")
    if args.init in GPT2 and args.data == "toy":
        raise UserError(f"--init {args.init} reads GPT-2's tokens, which the toy task does not "
                        "have; add --data gsm8k")
    if args.n_embd % args.n_head:
        raise UserError(f"--n-embd {args.n_embd} must be a multiple of --n-head {args.n_head}")
    if args.bag and 0 < args.steps <= args.bag_steps:
        raise UserError(f"--steps {args.steps}: the first --bag-steps {args.bag_steps} of them are "
                        "for the encoder alone, so that nothing is left for the LLM; choose more "
                        "of the former, or fewer of the latter")
