"""Every ablation over several seeds in one command, as a table: sweep.md, and sweep.json.

    python -m lab.sweep                               # all settings, seeds 0, 1 and 2
    python -m lab.sweep --list                        # the settings and their flags
    python -m lab.sweep --only default c=4 --seeds 0  # some of them
    python -m lab.sweep --sup="--sft-steps 500 --steps 200" --latent="--steps 400" --out out/short

A setting is one line of SETTINGS. It takes five stages: warm-up, phase 1, store, phase 3, analysis;
the baselines are one more before the last. A stage is one run of one script in a folder of its own
in --out. The files of the earlier stages are linked into that folder, and the script goes on from
them. The folder is named after the flags that led to it, so settings that agree up to a stage share
it. What the script says is in stage.log.

Stages run side by side. After Ctrl-C, or a crash, the same command goes on where it stopped. The
table is written anew after every analysis, and so are the figures of each seed, sweep.json, from
which lab/charts.py draws.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from lab.files import UserError, lock, read_json, write, write_json
from lab.report import cell
from lab.setup import start

SETTINGS = [
    # name, the flags that it adds to a stage
    ("default", {}),
    ("baselines", {"baselines": "--baselines"}),
    ("baselines-c=4", {"phase-1": "--chunk-size 4", "baselines": "--baselines"}),
    ("c=1", {"phase-1": "--chunk-size 1"}),
    ("c=4", {"phase-1": "--chunk-size 4"}),
    ("c=8", {"phase-1": "--chunk-size 8"}),
    ("top-1", {"store": "--top-k 1"}),  # tokens in place of superpositions
    ("top-all", {"store": "--top-k 0"}),
    ("noise-0", {"phase-3": "--noise 0"}),
    ("noise-1", {"phase-3": "--noise 1"}),
    ("no-bag", {"phase-1": "--bag 0"}),
    ("no-continuation", {"phase-1": "--continuation 0"}),
    ("no-LTIM", {"phase-1": "--ltim off"}),
    ("no-LTSuM", {"phase-1": "--ltsum off"}),
    ("hidden", {"phase-1": "--latents hidden"}),
    ("all-paths", {"store": "--paths all"}),
    ("parallel", {"store": "--paths parallel"}),
    ("all-paths-c=4", {"phase-1": "--chunk-size 4", "store": "--paths all"}),
    ("parallel-c=4", {"phase-1": "--chunk-size 4", "store": "--paths parallel"}),
    ("even-orders", {"warm-up": "--as-told 0.167"}),
    ("even-on-policy", {"warm-up": "--as-told 0.167", "phase-3": "--on-policy 0.5"}),
    ("even-on-policy-c=4", {"warm-up": "--as-told 0.167", "phase-1": "--chunk-size 4",
                            "phase-3": "--on-policy 0.5"}),
]
STAGES = {  # in this order: the script that it runs, and the files that it makes for later ones
    "warm-up": ("train_sup", ["sft.*"]),
    "phase-1": ("train_sup", ["sup.*"]),
    "store": ("compress", ["latents.*"]),
    "phase-3": ("train_latent", ["latent.*"]),
    "baselines": ("train_sup", ["explicit.*", "no_cot.*"]),
    "analysis": ("analyze", []),
}
EXTRA = {"--sup": "train_sup", "--compress": "compress", "--latent": "train_latent",
         "--analyze": "analyze"}
BASELINES = {"explicit": "explicit", "no-CoT": "no_cot"}  # the rows of --baselines
HEADS = ("seeds", "accuracy", "range", "steps", "explicit", "gold", "lowest continuation",
         "from none", "controls", "held", "covered", "cut to c", "seconds", "flags")
NOTES = (
    "A figure is the mean over seeds, the range from the lowest to the highest. Explicit: the "
    "warm-up, thinking in text. Gold: given the encoder’s latents. Continuation: right answers "
    "when the LLM of phase 1 writes on as text after some of these. Controls: the best of three "
    "false chains. Held: how many tokens of its chunk are among a latent’s c heaviest (ECR@c). "
    "Covered: how many of the paths’ steps a latent holds, of how many. Cut to c: right answers "
    "when each latent is cut to its c heaviest tokens. Seconds: from the warm-up to phase 3, "
    "shared stages included. * One seed: the range is the 95 % interval (Wilson).")


# ----------------------------------------------------------------------------------------- the plan

@dataclass(eq=False)
class Stage:
    folder: Path
    kind: str
    flags: list     # of its script, but for --out and --resume
    needs: list     # the stages before it
    seconds: float = 0.0
    done: bool = False


def plan(settings, seeds, extra, out):
    """([Stage], {(setting, seed): the Stage of its analysis}), in the order of the work.

    extra {script: flags that every stage of it gets}; a setting's own outdo them. Phase 1 and the
    baselines get the flags of the stages before them, since they run the same script.
    """
    stages, analyses = {}, {}
    for seed in seeds:
        for name, flags in settings:
            words, path, needs = {**extra}, [], []
            words["train_sup"] = [*extra["train_sup"], "--seed", str(seed)]
            for kind, (script, _) in STAGES.items():
                if kind in flags:
                    words[script] = words[script] + shlex.split(flags[kind])
                    path.append(re.sub(r"[^\w.]+", "-", f"{kind} {flags[kind]}"))
                elif kind == "baselines":
                    continue
                folder = out / f"seed-{seed}" / kind / (",".join(path) or "default")
                last = ["--steps", "0"] if kind == "warm-up" else []
                stage = Stage(folder, kind, words[script] + last, needs[:])
                needs.append(stages.setdefault(folder, stage))
            analyses[name, seed] = needs[-1]
    return list(stages.values()), analyses


# ---------------------------------------------------------------------------------------- one stage

def link_files(stage):
    """Put into a stage's folder what the stages before it have made, where it isn't there yet.

    A hard link takes no room. The scripts put a new file in the place of an old one and do not
    change it, so the earlier stage keeps its own.
    """
    for need in stage.needs:
        _, patterns = STAGES[need.kind]
        for file in [file for pattern in patterns for file in need.folder.glob(pattern)]:
            mine = stage.folder / file.name
            if not mine.exists():
                try:
                    os.link(file, mine)
                except OSError:  # a file system without links
                    shutil.copy(file, mine)


def read_note(stage):
    """How far an earlier sweep got with a stage. Raises UserError where it had other flags."""
    path = stage.folder / "stage.json"
    if path.exists():
        note = read_json(path)
        if note["flags"] != stage.flags:
            raise UserError(f"{stage.folder} was made with the flags '{shlex.join(note['flags'])}'"
                            f", here they are '{shlex.join(stage.flags)}'; choose another --out")
        stage.seconds, stage.done = note["seconds"], note["done"]


def write_note(stage):
    note = {"flags": stage.flags, "seconds": round(stage.seconds, 1), "done": stage.done}
    write_json(stage.folder / "stage.json", note)


def run_stage(stage, args):
    """Run the script of a stage in its folder, until it ends, well or not."""
    write_note(stage)
    link_files(stage)
    script, _ = STAGES[stage.kind]
    again = [] if script == "analyze" else ["--resume"]
    words = [f"{script}.py", *stage.flags, "--out", str(stage.folder), *again]
    env = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // args.jobs))}
    began = time.time()
    with open(stage.folder / "stage.log", "a", encoding="utf-8") as log:
        print("python", shlex.join(words), file=log, flush=True)
        code = subprocess.run([sys.executable, *words], env=env, stdout=log, stderr=log).returncode
    stage.seconds += time.time() - began
    stage.done = code == 0
    write_note(stage)


# --------------------------------------------------------------------------------------- all stages

def cores():
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run_stages(stages, analyses, args):
    """Run what is not done yet, several at a time; returns the stages that failed."""
    running, failed = {}, []  # {future: stage}
    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            over = [*failed, *running.values()]
            ready = [stage for stage in stages if not stage.done and stage not in over
                     and all(need.done for need in stage.needs)]
            for stage in ready[:args.jobs - len(running)]:  # the first ones of the plan
                running[pool.submit(run_stage, stage, args)] = stage
            if not running:
                return failed
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                stage = running.pop(future)
                future.result()  # raises what it raised
                if not stage.done:
                    failed.append(stage)
                elif stage.kind == "analysis":
                    write_results(analyses, args)
                say_end(stage, stages, args)


def say_end(stage, stages, args):
    """One line about a stage that has ended, well or not."""
    name = stage.folder.relative_to(args.out)
    if stage.done:
        left = sum(not stage.done for stage in stages)
        print(f"{name}: done in {stage.seconds:.0f} s; {left} of {len(stages)} stages left",
              flush=True)
    else:
        log = stage.folder / "stage.log"
        why = log.read_text("utf-8", "replace").strip().splitlines()[-1]
        print(f"{name}: FAILED after {stage.seconds:.0f} s: {why} ({log})", flush=True)


# ---------------------------------------------------------------------------------------- the table

def mean(values):
    """None where all are None."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def figures(report, way, seconds):
    """{head of a column: figure} of one report.json; way: latent, explicit or no_cot."""
    found = {figure: report[figure][way] for figure in ("accuracy", "interval", "steps")}
    if way != "latent":
        return found
    controls, continued = report["controls"]["accuracy"], report["continuation"]["accuracy"]
    paths, collapse, ecr = report["parallelism"], report["collapse"], report["ecr"]
    c = report["config"]["sup"]["settings"]["chunk_size"]
    return found | {
        "explicit": report["accuracy"]["warm_up"], "explicit steps": report["steps"]["warm_up"],
        "gold": report["accuracy"]["gold"],
        "lowest continuation": min(continued), "from none": continued[0],
        "controls": max(controls[name] for name in ("zeroed", "shuffled", "random")),
        "held": ecr["latent"]["own"][ecr["K"].index(c)],
        "covered": paths and paths["latent"]["covered"],
        "most": paths and paths["latent"]["covered_most"],
        "cut to c": collapse and collapse["accuracy"]["top c"],
        "seconds": seconds}


def by_seed(settings, analyses):
    """{row of the table: {flags, commit, seeds {seed: figures}}}, of the analyses that are done."""
    rows = {}
    for name, flags in settings:
        ways = {name: "latent"}
        if "baselines" in flags:
            ways = {row + name.removeprefix("baselines"): way for row, way in BASELINES.items()}
        for (of, seed), stage in analyses.items():
            if of != name or not stage.done:
                continue
            report = read_json(stage.folder / "report.json")
            commit = report["config"]["analyze"]["made_by"]["commit"]
            seconds = sum(need.seconds for need in stage.needs if need.kind != "baselines")
            for label, way in ways.items():
                row = rows.setdefault(label, {"flags": flags, "commit": "", "seeds": {}})
                row["seeds"][str(seed)] = figures(report, way, seconds)
                if commit not in row["commit"]:
                    row["commit"] = f"{row['commit']} {commit}".strip()
    return rows


def in_words(flags):
    """The flags of a setting, {stage: flags}, as one line."""
    return ", ".join(f"{kind} {words}" for kind, words in flags.items())


def row_of(setting):
    """{head: entry}, the means over the seeds of an entry of `by_seed`."""
    found = list(setting["seeds"].values())
    accuracies = [one["accuracy"] for one in found]
    row = {head: mean([one[head] for one in found]) for head in found[0] if head != "interval"}
    row["flags"] = in_words(setting["flags"])
    if "seconds" in row:
        row["seconds"] = round(row["seconds"])
    if row.get("covered") is not None:
        row["covered"] = f"{row['covered']:.2f} of {row['most']:.2f}"
    if len(found) == 1:
        return row | {"seeds": "1*", "range": found[0]["interval"]}
    return row | {"seeds": str(len(found)), "range": [min(accuracies), max(accuracies)]}


def write_results(analyses, args):
    """Write sweep.md and sweep.json. analyses {(setting, seed): its Stage}; args: as parsed."""
    found = by_seed(args.settings, analyses)
    rows = {label: row_of(setting) for label, setting in found.items()}
    done = sum(analysis.done for analysis in analyses.values())
    state = f"{done} of {len(analyses)} runs are done: a run is a setting with a seed."
    lines = [["setting", *HEADS], ["---", *["---:"] * len(HEADS)]]
    lines += [[name, *(cell(row.get(head)) for head in HEADS)] for name, row in rows.items()]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    text = "\n".join(["# The ablations", "", state, "", *lines, "", NOTES, ""])
    write(args.out / "sweep.md", lambda file: file.write(text.encode()))
    write_json(args.out / "sweep.json", found)


# --------------------------------------------------------------------------------------- the script

def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    names = [name for name, *_ in SETTINGS]
    add("--only", nargs="+", metavar="NAME", choices=names, default=names,
        help="these settings (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--jobs", type=int, default=cores(),
        help="stages that run side by side (default: number of cores; fewer on a GPU)")
    for flag, script in EXTRA.items():
        add(flag, type=shlex.split, default=[], metavar='"FLAGS"',
            help=f'flags for every {script}.py, written {flag}="…"')
    add("--out", type=Path, default=Path("out/sweep"),
        help="folder to write to (default: out/sweep)")
    add("--list", action="store_true", help="print the settings and end")
    args = p.parse_args(argv)
    if args.jobs < 1:
        p.error("--jobs: must be 1 or more")
    if {"--split", "--ask"} & {word.split("=")[0] for word in args.analyze}:
        p.error("--analyze: a sweep compares the reports of the default split; for anything else "
                "run analyze.py itself in the folder of an analysis")
    args.settings = [setting for setting in SETTINGS if setting[0] in args.only]
    return args


def main(argv=None):
    args = parse(argv)
    if args.list:
        for name, flags in args.settings:
            print(f"{name:20} {in_words(flags)}")
        return
    extra = {script: vars(args)[flag.strip("-")] for flag, script in EXTRA.items()}
    stages, analyses = plan(args.settings, args.seeds, extra, args.out)
    held = lock(args.out)  # noqa: F841
    for stage in stages:
        read_note(stage)
    print(f"{len(analyses)} runs, {len(stages)} stages, {sum(stage.done for stage in stages)} of "
          f"them done before; {args.jobs} go side by side", flush=True)
    try:
        failed = run_stages(stages, analyses, args)
    except KeyboardInterrupt:  # the scripts got it, too, and have ended
        raise UserError("stopped; the same command goes on from here")
    if any(analysis.done for analysis in analyses.values()):
        write_results(analyses, args)
        print(f"wrote {args.out}/sweep.md and sweep.json")
    if failed:
        raise UserError(f"{len(failed)} stages failed, see above; the same command tries again")


if __name__ == "__main__":
    start(main)
