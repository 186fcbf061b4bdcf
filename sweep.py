"""Every ablation over several seeds in one command, as a table (sweep.md) and a page (sweep.html).

    python sweep.py                                   # all settings, seeds 0, 1 and 2
    python sweep.py --list                            # the settings and their flags
    python sweep.py --only default c=4 --seeds 0      # some of them
    python sweep.py --sup="--sft-steps 500 --steps 200" --latent="--steps 400" --out out/short
    python sweep.py --smoke                           # all of it with tiny budgets, to try it out

A setting is one line of SETTINGS: the flags that it adds to train_sup, compress and train_latent.
It takes five stages: warm-up, phase 1, store, phase 3, analysis; the baselines are one more before
the last. Each stage has a folder in --out, named after the flags that led to it, and is one run of
one script there: the files of the earlier stages are linked into it, then the script goes on from
them. So settings that agree up to a stage
share it. What the script says is in the folder's stage.log, with its command on top.

Stages run side by side, each in a process of its own (forked: on Linux or macOS). After Ctrl-C, or
a crash, the same command goes on where it stopped. Table and page are written anew after every
analysis, from the figures in its report.json.
"""
import argparse
import fcntl
import importlib
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch

import common
import data
from data import UserError
from report import cell, sweep_page

SETTINGS = [
    # name, group, flags of train_sup, of compress, of train_latent
    ("default", "default", "", "", ""),
    ("baselines", "baselines", "--baselines", "", ""),
    ("baselines-c=4", "baselines", "--baselines --chunk-size 4", "", ""),  # more updates
    ("c=1", "chunk size", "--chunk-size 1", "", ""),
    ("c=4", "chunk size", "--chunk-size 4", "", ""),
    ("c=8", "chunk size", "--chunk-size 8", "", ""),
    ("top-1", "entries of α", "", "--top-k 1", ""),  # tokens in place of superpositions
    ("top-5", "entries of α", "", "--top-k 5", ""),
    ("top-10", "entries of α", "", "--top-k 10", ""),
    ("top-all", "entries of α", "", "--top-k 0", ""),
    ("noise-0", "Gumbel noise", "", "", "--noise 0"),
    ("noise-0.25", "Gumbel noise", "", "", "--noise 0.25"),
    ("noise-0.5", "Gumbel noise", "", "", "--noise 0.5"),
    ("noise-1", "Gumbel noise", "", "", "--noise 1"),
    ("noise-2", "Gumbel noise", "", "", "--noise 2"),
    ("c=4-noise-0.5", "Gumbel noise", "--chunk-size 4", "", "--noise 0.5"),
    ("no-bag", "phase 1", "--bag 0", "", ""),
    ("no-follow", "phase 1", "--follow 0", "", ""),
    ("encoder-first", "phase 1", "--encoder-first 200", "", ""),
    ("no-LTIM", "masks", "--ltim off", "", ""),
    ("no-LTSuM", "masks", "--ltsum off", "", ""),
    ("local", "masks", "--ltsum local", "", ""),
    ("hidden", "latents", "--latents hidden", "", ""),
    ("from-explicit", "latents", "", "", "--start sft"),
    ("one-order", "orders told", "--as-told 1", "", ""),
    ("even-orders", "orders told", "--as-told 0.167", "", ""),
    ("even-noise-1", "orders told", "--as-told 0.167", "", "--noise 1"),
]
# flags of train_sup that its warm-up does not read: settings that differ in these share it. (It is
# not quite so with --chunk-size: a problem too long at one c may fit at another. Then phase 1
# refuses the warm-up, and the setting needs an --out of its own.)
LATE = ("--baselines", "--steps", "--chunk-size", "--top-k", "--bag", "--bag-steps", "--follow",
        "--encoder-first", "--ltim", "--ltsum", "--latents")
STAGES = {  # the script that a stage runs, and the files that it makes for later ones
    "warm-up": ("train_sup", ["sft.*"]),
    "phase-1": ("train_sup", ["sup.*"]),
    "store": ("compress", ["latents/*"]),
    "phase-3": ("train_latent", ["latent.*"]),
    "baselines": ("train_sup", ["explicit.*", "no_cot.*"]),
    "analysis": ("analyze", ["report.*"]),
}
SMOKE = {
    "train_sup": "--n-layer 1 --n-head 1 --n-embd 16 --batch-size 8 --sft-steps 4 --steps 4 "
                 "--bag-steps 1",
    "train_latent": "--steps 4",
    "analyze": "--limit 4",
}
SMOKE_SIZE = {"train": 64, "val": 8, "test": 8}  # of the toy task
FIRST_STEP = 6   # tokens of the toy task's first step, which can be any of three
NOTE_EVERY = 10  # seconds between two notes of how long the running stages have taken
BASELINES = {"explicit": "explicit", "no-CoT": "no_cot"}  # the rows of --baselines
EXTRA = {"--sup": "train_sup", "--compress": "compress", "--latent": "train_latent",
         "--analyze": "analyze"}
HEADS = ("seeds", "accuracy", "range", "steps", "explicit", "gold", "lowest continuation",
         "from none", "ECR@c", "paths", "seconds", "flags")
NOTES = (
    "A figure is the mean over seeds. Explicit: the warm-up, thinking in text. Gold: given the "
    "encoder’s latents. Continuation: right answers when the LLM of phase 1 writes on as text "
    "after some of these. ECR@c: tokens of a chunk among the c heaviest of its α. Paths: among how "
    "many steps the latents of the first step are shared. Seconds: from the warm-up to phase 3, "
    "shared stages included. * One seed alone: the range is then the 95 % interval (Wilson) of its "
    "test problems.")


# ----------------------------------------------------------------------------------------- the plan

class Stage(NamedTuple):
    kind: str
    seed: int
    flags: list     # of its script, but for --out and --resume
    needs: list     # the folders of earlier stages
    settings: list  # the names of those that share it


def without(flags, names):
    """The words of a command line, but for the flags called `names` and their values."""
    kept, keep = [], True
    for word in flags:
        if word.startswith("--"):
            keep = word.split("=")[0] not in names
        if keep:
            kept.append(word)
    return kept


def in_words(flags):
    """The three strings of a setting as one."""
    scripts = zip(("train_sup", "compress", "train_latent"), flags)
    return ", ".join(f"{script} {words}" for script, words in scripts if words)


def plan(settings, seeds, extra, out):
    """({folder: Stage}, {(setting, seed): folder of its analysis}), in the order of the work.

    extra {script: flags that every stage of it gets}; a setting's own outdo them.
    """
    stages, analyses = {}, {}

    def stage(kind, needs, flags, *last):
        """The folder of a stage of the setting `name`; flags {script: words} that led to it."""
        script, _ = STAGES[kind]
        words = [re.sub(r"[^\w.]+", "-", " ".join([s, *f])) for s, f in flags.items() if f]
        folder = out / f"seed-{seed}" / kind / (",".join(words) or "default")
        command = [*extra.get(script, []), *flags.get(script, []), *last]
        stages.setdefault(folder, Stage(kind, seed, command, needs, [])).settings.append(name)
        return folder

    for seed in seeds:
        for name, _, *texts in settings:
            sup, compress, latent = map(shlex.split, texts)
            early = {"train_sup": without(sup, LATE)}
            flags = {"train_sup": without(sup, ["--baselines"])}
            seeded = "--seed", str(seed)
            warm_up = stage("warm-up", [], early, *seeded, "--steps", "0")
            phase_1 = stage("phase-1", [warm_up], flags, *seeded)
            flags = {**flags, "compress": compress}
            store = stage("store", [phase_1], flags)
            flags = {**flags, "train_latent": latent}
            phase_3 = stage("phase-3", [warm_up, phase_1, store], flags)
            needs = [warm_up, phase_1, phase_3]
            if "--baselines" in sup:
                budget = {"train_sup": without(sup, set(LATE) - {"--chunk-size"})}
                # it counts the updates of what the analysis needs besides
                needs = [*needs, stage("baselines", needs, budget, *seeded, "--baselines")]
            analyses[name, seed] = stage("analysis", needs, {**flags, "train_sup": sup})
    return stages, analyses


# ---------------------------------------------------------------------------------------- one stage

def link_files(folder, stages):
    """Put into a stage's folder what the stages before it have made, where it isn't there yet.

    A hard link takes no room. The scripts put a new file in the place of an old one and do not
    change it, so that the earlier stage keeps its own.
    """
    for need in stages[folder].needs:
        _, patterns = STAGES[stages[need].kind]
        for file in [file for pattern in patterns for file in need.glob(pattern)]:
            mine = folder / file.relative_to(need)
            mine.parent.mkdir(exist_ok=True)
            if not mine.exists():
                try:
                    os.link(file, mine)
                except OSError:  # a file system without links
                    common.write(mine, lambda copy: shutil.copyfileobj(open(file, "rb"), copy))


def end_with_the_sweep():
    """When the sweep is killed nobody may go on writing where the next one will go on."""
    multiprocessing.parent_process().join()
    os._exit(1)


def work(folder, stages, threads):
    """A stage, in a process of its own: its script, as the command line would start it."""
    os.setsid()  # Ctrl-C reaches the sweep alone, which passes it on
    threading.Thread(target=end_with_the_sweep, daemon=True).start()
    with open(folder / "stage.log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(threads)
    link_files(folder, stages)
    script, _ = STAGES[stages[folder].kind]
    again = [] if script == "analyze" else ["--resume"]
    sys.argv = [f"{script}.py", *stages[folder].flags, "--out", str(folder), *again]
    print("python", shlex.join(sys.argv))
    common.start(importlib.import_module(script).main)


def read_record(folder, stage):
    """{flags, seconds, done} of a stage. Raises UserError where its folder has other flags."""
    path = folder / "stage.json"
    if not path.exists():
        return {"flags": stage.flags, "seconds": 0.0, "done": False}
    record = common.read_json(path)
    if not {"flags", "seconds", "done"} <= record.keys():
        raise UserError(f"{path} is damaged; delete {folder}, and the same command makes it again")
    if record["flags"] != stage.flags:
        raise UserError(f"{folder} was made with the flags '{shlex.join(record['flags'])}', here "
                        f"they are '{shlex.join(stage.flags)}'; choose another --out")
    return record


def last_line(folder):
    lines = re.split(r"[\r\n]+", (folder / "stage.log").read_text("utf-8", "replace").strip())
    return lines[-1].strip() or "it said nothing"


def outcome(folder, stage):
    """The accuracy of what a stage has made, in words."""
    if stage.kind == "analysis":
        accuracy = common.read_json(folder / "report.json")["accuracy"]["latent"]
        return f", latent accuracy {accuracy:.3f}"
    _, made = STAGES[stage.kind]
    curves = common.read_curves(folder)
    scores = [f"{max(curves[loop]['score']):.3f}" for loop in curves if f"{loop}.*" in made]
    return ", validation " + " and ".join(scores) if scores else ""


# --------------------------------------------------------------------------------------- all stages

def note(folder, record, started, done=False):
    """Keep how long a stage has taken so far, its earlier starts included."""
    record.update(seconds=round(time.time() - started, 1), done=done)
    common.write_json(folder / "stage.json", record)


def cores():
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def start_stages(stages, records, running, failed, jobs):
    """Start what can start, as long as there is room."""
    threads = max(1, cores() // jobs)
    busy = {folder for folder, _ in running.values()}
    for folder, stage in stages.items():
        ready = all(records[need]["done"] for need in stage.needs)
        over = records[folder]["done"] or folder in failed
        if len(running) < jobs and ready and not over and folder not in busy:
            folder.mkdir(parents=True, exist_ok=True)
            # torch is imported once, here; this process never trains, or it could not be forked
            context = multiprocessing.get_context("fork")
            process = context.Process(target=work, args=(folder, stages, threads))
            started = time.time() - records[folder]["seconds"]
            process.start()
            running[process] = folder, started
            note(folder, records[folder], started)


def time_left(stages, records, jobs):
    """How long the rest may take, if every stage takes as long as those of its kind did."""
    taken = {kind: [] for kind in STAGES}
    for folder, stage in stages.items():
        if records[folder]["done"]:
            taken[stage.kind].append(records[folder]["seconds"])
    known = sum(taken.values(), [])
    left = sum(mean(taken[stage.kind] or known) for folder, stage in stages.items()
               if not records[folder]["done"])
    hours, minutes = divmod(math.ceil(left / jobs / 60), 60)
    return f"{hours} h {minutes} min"


def say_end(folder, stages, records, failed, jobs):
    """One line about a stage that has ended, well or not."""
    stage = stages[folder]
    who, seconds = f"{stage.settings[0]}, seed {stage.seed}", f"{records[folder]['seconds']:.0f} s"
    if folder in failed:
        print(f"{who}: {stage.kind} FAILED after {seconds}: {failed[folder]} ({folder}/stage.log); "
              f"needed by {', '.join(stage.settings)}", flush=True)
        return
    left = sum(not record["done"] for record in records.values())
    print(f"{who}: {stage.kind} done in {seconds}{outcome(folder, stage)}; {left} of {len(stages)} "
          f"stages left, about {time_left(stages, records, jobs)}", flush=True)


def run_stages(stages, analyses, records, args):
    """Run what is not done yet; returns {folder: why} of the stages that failed."""
    running, failed = {}, {}  # {process: (folder, when it would have begun without a break)}
    try:
        while True:
            start_stages(stages, records, running, failed, args.jobs)
            if not running:
                return failed
            wait([process.sentinel for process in running], NOTE_EVERY)
            for process, (folder, started) in list(running.items()):
                code = process.exitcode  # None as long as it runs
                note(folder, records[folder], started, done=code == 0)
                if code is None:
                    continue
                del running[process]
                if code:
                    failed[folder] = last_line(folder) if code > 0 else f"signal {-code} ended it"
                say_end(folder, stages, records, failed, args.jobs)
                if code == 0 and stages[folder].kind == "analysis":
                    write_results(stages, analyses, records, args)
    except KeyboardInterrupt:
        for process in running:
            os.kill(process.pid, signal.SIGINT)  # its script saves and ends
        for process, (folder, started) in running.items():
            process.join()
            note(folder, records[folder], started)
        raise UserError("stopped; the same command goes on from here")
    finally:
        for process in running:
            process.kill()


# ------------------------------------------------------------------------------------- the results

def figures(report, way):
    """{head of a column: figure} of one report.json; way: latent, explicit or no_cot."""
    found = {figure: report[figure][way] for figure in ("accuracy", "interval", "steps")}
    if way != "latent":
        return found
    c, ecr = report["config"]["sup"]["chunk_size"], report["ecr"]
    continued = report["continuation"]["accuracy"]
    orders = (report["parallelism"] or {}).get("orders")  # those of the toy task
    effective = orders["latent"]["effective"] if orders else []
    return found | {
        "explicit": report["accuracy"]["warm_up"], "gold": report["accuracy"]["gold"],
        "lowest continuation": min(continued), "from none": continued[0],
        "ECR@c": ecr["encoder"]["own"][ecr["K"].index(c)],
        "paths": mean(effective[:-(-FIRST_STEP // c)])}


def read_figures(folder, way):
    """`figures` of an analysis. Raises UserError where its report is damaged."""
    path = folder / "report.json"
    try:
        return figures(common.read_json(path), way)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not as analyze.py writes it ({type(error).__name__}); delete "
                        f"{folder}, and the same command makes it again")


def mean(values):
    """None where all are None."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def training_seconds(folder, stages, records):
    """Of the stages that led to the latent model of an analysis."""
    before = {need for near in stages[folder].needs for need in (near, *stages[near].needs)}
    made_it = [need for need in before if stages[need].kind != "baselines"]
    return math.fsum(records[need]["seconds"] for need in made_it)  # alike in whatever order


def row_of(folders, way, stages, records):
    """{head of a column: entry}, the means over the seeds whose analyses are in `folders`."""
    found = [read_figures(folder, way) for folder in folders]
    accuracies = [one["accuracy"] for one in found]
    row = {head: mean([one[head] for one in found]) for head in found[0] if head != "interval"}
    if way == "latent":
        row["seconds"] = round(mean([training_seconds(f, stages, records) for f in folders]))
    if len(found) == 1:
        return row | {"seeds": "1*", "range": found[0]["interval"]}
    return row | {"seeds": str(len(found)), "range": [min(accuracies), max(accuracies)]}


def write_results(stages, analyses, records, args):
    """The table and the page, of the analyses that are done."""
    rows = {}
    for name, group, *flags in args.settings:
        folders = [analyses[name, seed] for seed in args.seeds]
        folders = [folder for folder in folders if records[folder]["done"]]
        ways = {name: "latent"}
        if "--baselines" in flags[0]:
            ways = {row + name.removeprefix("baselines"): way for row, way in BASELINES.items()}
        for label, way in ways.items() if folders else ():
            page = folders[0].relative_to(args.out) / "report.html"
            rows[label] = {"group": group, "flags": in_words(flags), "page": page.as_posix(),
                           **row_of(folders, way, stages, records)}
    done = sum(records[folder]["done"] for folder in analyses.values())
    state = f"{done} of {len(analyses)} runs are done: a run is a setting with a seed."
    if args.smoke:
        state += " They had tiny budgets, and the figures mean nothing."
    lines = [["setting", *HEADS], ["---", *["---:"] * len(HEADS)]]
    lines += [[name, *(cell(row.get(head)) for head in HEADS)] for name, row in rows.items()]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    text = "\n".join(["# The ablations", "", state, "", *lines, "", NOTES, ""])
    html = sweep_page(rows, HEADS, {"state": state, "notes": NOTES})
    common.write(args.out / "sweep.md", lambda file: file.write(text.encode()))
    common.write(args.out / "sweep.html", lambda file: file.write(html.encode()))


# --------------------------------------------------------------------------------------- the script

def parse(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--only", nargs="+", metavar="NAME", help="these settings (default: all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--jobs", type=int, default=cores(),
        help="stages that run side by side (default: number of cores; fewer on a GPU)")
    for flag, script in EXTRA.items():
        add(flag, type=shlex.split, default=[], metavar='"FLAGS"',
            help=f'flags for every {script}.py, written {flag}="…"')
    add("--out", type=Path, help="folder to write to (default: out/sweep)")
    add("--list", action="store_true", help="print the settings and end")
    add("--smoke", action="store_true", help="tiny model, few problems and updates")
    args = p.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.out = args.out or Path("out/sweep-smoke" if args.smoke else "out/sweep")
    names = [name for name, *_ in SETTINGS]
    unknown = set(args.only or []) - set(names)
    if unknown:
        raise UserError(f"--only {sorted(unknown)[0]}: no such setting; there are "
                        + ", ".join(names))
    for flag in ("--split", "--ask", "--out"):
        if any(len(word) > 2 and flag.startswith(word.split("=")[0]) for word in args.analyze):
            raise UserError(f"--analyze {flag}: a sweep compares the reports of the test split; "
                            "call analyze.py itself in the folder of an analysis")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: must be a number from 1 up")
    args.settings = [setting for setting in SETTINGS if setting[0] in (args.only or names)]
    return args


def lock(out):
    """The open file that no second sweep may lock as long as this one, or a stage of it, lives."""
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another sweep writes to {out}; wait for its end, or choose another --out")
    return file


def main(argv=None):
    args = parse(argv)
    if args.list:
        for name, group, *flags in args.settings:
            print(f"{name:14} {group:14} {in_words(flags)}")
        return
    extra = {script: vars(args)[flag.strip("-")] for flag, script in EXTRA.items()}
    if args.smoke:
        data.TOY_SIZE.update(SMOKE_SIZE)
        extra = {script: SMOKE.get(script, "").split() + words for script, words in extra.items()}
    stages, analyses = plan(args.settings, args.seeds, extra, args.out)
    held = lock(args.out)  # noqa: F841
    records = {folder: read_record(folder, stage) for folder, stage in stages.items()}
    done = sum(record["done"] for record in records.values())
    print(f"{len(analyses)} runs, {len(stages)} stages, {done} of them done before; {args.jobs} go "
          "side by side", flush=True)
    # what takes a while the first time: here once, not in every stage. So all stages have the code
    # that there is now, whatever becomes of the files
    torch.optim.AdamW([torch.zeros(1)])
    data.toy_vocabulary()
    common.commit()
    for script, _ in STAGES.values():
        importlib.import_module(script)
    failed = run_stages(stages, analyses, records, args)
    if any(records[folder]["done"] for folder in analyses.values()):
        write_results(stages, analyses, records, args)
        print(f"wrote {args.out}/sweep.md and sweep.html")
    if failed:
        raise UserError(f"{len(failed)} stages failed, see above; the same command tries again")


if __name__ == "__main__":
    common.start(main)
