"""Does this code compute what a commit before it computed? Small runs in both trees, bit for bit.

    python tests/gate.py 6f07684                   # every case, some minutes
    python tests/gate.py 6f07684 --only ltsum      # the default, and cases with this in their name
    python tests/gate.py 6f07684 --keep runs       # keep what is trained; the commit's is reused

A case is a row of commands with a tiny model and few problems. In each of the two trees one process
of one thread runs it, both at once. Compared are tensors and figures, not files, so that a file may
change its form: the best and the last weights of every loop, the store's arrays, and the reports
but for `config` and `seconds`. A line a case says what differs and by how much. Exit status 0 says
that nothing does. What needs GPT-2's vocabulary or GSM8K is left out where it is not to be had.
"""
import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tiktoken
import torch
from conftest import ROOT, SHARED

SHOWN = 4  # differences of a case
SIZE = {"train": 160, "val": 16, "test": 16}  # of the toy task
START = """
import json, runpy, sys

size, commands = map(json.loads, sys.argv[1:])
try:
    from lab.sources import TOY_SIZE
except ImportError:  # an older commit
    from data import TOY_SIZE
TOY_SIZE.update(size)
for command in commands:
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
"""
SUP = ("train_sup.py --n-layer 2 --n-head 2 --n-embd 32 --batch-size 8 --sft-steps 12 --steps 12 "
       "--bag-steps 4 --eval-every 6")
COMPRESS = "compress.py --batch-size 16"
LATENT = "train_latent.py --batch-size 8 --steps 8 --eval-every 4"
ANALYZE = "analyze.py --batch-size 8 --limit 12"
ABLATIONS = ["--bag 0", "--continuation 0", "--encoder-first 3", "--ltim off", "--ltsum local",
             "--ltsum off", "--latents hidden", "--top-k 3", "--chunk-size 4", "--as-told 0.167"]


def cases():
    """{name: (the case that it goes on from, or None; its commands)}."""
    found = {"default": (None, [SUP, COMPRESS, LATENT, ANALYZE])}
    for flags in ABLATIONS:
        found[flags] = None, [f"{SUP} {flags}", COMPRESS, LATENT, ANALYZE]
    later = [f"{COMPRESS} --top-k 5 --overwrite", f"{LATENT} --overwrite", ANALYZE]
    found["compress --top-k 5"] = "default", later
    for flags in ("--noise 0", "--noise 1", "--start sft"):
        found[f"latent {flags}"] = "default", [f"{LATENT} {flags} --overwrite", ANALYZE]
    found["--baselines"] = "default", [f"{SUP} --baselines", ANALYZE]
    try:
        tiktoken.get_encoding("gpt2")
    except Exception as error:  # a download fails in many ways
        print(f"left out: what needs GPT-2's vocabulary ({type(error).__name__})")
        return found
    if not (SHARED / "gsm8k").is_dir():
        print("left out: GSM8K, which is not in ../shared/data/gsm8k")
        return found
    easy = f"--data easy --data-dir {shlex.quote(str(SHARED / 'gsm8k'))} --renumber 5"
    found["easy problems"] = None, [f"{SUP} {easy}", COMPRESS, LATENT, ANALYZE]
    return found


def start(tree, out, commands, size, said=subprocess.PIPE):
    """The process that runs these commands with the code of `tree`; they write to `out`.

    size: how many problems of the toy task; said: where what they print goes.
    """
    rows = []
    for command in commands:
        script, *flags = shlex.split(command)
        rows.append([str(tree / script), *flags, "--out", str(out)])
    command = [sys.executable, "-c", START, json.dumps(size), json.dumps(rows)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=out, env=env, stdout=said, stderr=subprocess.STDOUT)


def run(name, parent, commands, trees):
    """Run a case, side by side, in those of the trees that have no result of it yet.

    trees {folder of a tree's results: folder of its files}; parent: the case to go on from.
    """
    processes = {}
    for kept, tree in trees.items():
        if (kept / name).exists():
            continue
        out = kept / "unfinished"
        shutil.rmtree(out, ignore_errors=True)
        if parent:
            shutil.copytree(kept / parent, out)
        else:
            out.mkdir(parents=True)
        processes[out] = start(tree, out, commands, SIZE)
    said = {out: process.communicate()[0] for out, process in processes.items()}
    for out, process in processes.items():
        if process.returncode:
            last = said[out].decode(errors="replace")[-2000:]
            raise SystemExit(f"{name}, {out.parent.name}: status {process.returncode}\n{last}")
        out.rename(out.with_name(name))


def leaves(x, name):
    """{where it stands: value} of nested dicts and lists."""
    if isinstance(x, list):
        x = dict(enumerate(x))
    if not isinstance(x, dict):
        return {name: x}
    found = {}
    for key, value in x.items():
        found.update(leaves(value, f"{name} {key}"))
    return found


def results(out):
    """{where it stands: tensor or figure} of all that is compared in a case's folder."""
    found = {}
    files = [*out.glob("*.pt"), *out.glob("latents/*.npy"), *out.glob("report*.json")]
    for path in sorted(files, key=os.path.getmtime):  # what was made first is shown first
        if path.suffix == ".npy":
            content = torch.from_numpy(np.load(path))
        elif path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            content = {key: saved[key] for key in ("step", "models")}
        else:
            content = json.loads(path.read_text("utf-8"))
            content = {key: content[key] for key in content if key not in ("config", "seconds")}
        found.update(leaves(content, path.name))
    return found


def difference(old, new):
    """What differs between two values, in words; "" where nothing does."""
    if not (torch.is_tensor(old) and torch.is_tensor(new)):
        return "" if old == new else f"{old}, now {new}"
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        return f"{old.dtype} {tuple(old.shape)}, now {new.dtype} {tuple(new.shape)}"
    if old.numpy().tobytes() == new.numpy().tobytes():
        return ""
    return f"by up to {(old.double() - new.double()).abs().max():.1e}"


def compare(name, old, new):
    """Print what differs between a case's results in two folders. Returns whether anything does."""
    old, new = results(old), results(new)
    found = []
    for key in {**old, **new}:
        words = difference(old.get(key, "nothing"), new.get(key, "nothing"))
        if words:
            found.append(f"{key}: {words}")
    more = "; …" if len(found) > SHOWN else ""
    said = f"{len(found)} of {len(old)} differ: " + "; ".join(found[:SHOWN]) + more
    print(f"{name:20}", said if found else f"same ({len(old)} tensors and figures)", flush=True)
    return bool(found)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("commit", help="what this code is compared with")
    p.add_argument("--only", default="", help="the default, and cases with this in their name")
    p.add_argument("--keep", type=Path, help="a folder to keep what is trained")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tree, keep = folder / "tree", args.keep.resolve() if args.keep else folder / "keep"
        tree.mkdir()
        files = subprocess.check_output(["git", "archive", args.commit], cwd=ROOT)
        subprocess.run(["tar", "x"], cwd=tree, input=files, check=True)
        shutil.rmtree(keep / "now", ignore_errors=True)
        trees = {keep / args.commit: tree, keep / "now": ROOT}
        chosen = {name: case for name, case in cases().items()
                  if args.only in name or name == "default"}
        differ = 0
        for name, (parent, commands) in chosen.items():
            run(name, parent, commands, trees)
            differ += compare(name, *(kept / name for kept in trees))
    raise SystemExit(f"{differ} of {len(chosen)} cases differ" if differ else 0)


if __name__ == "__main__":
    main()
