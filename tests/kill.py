"""Kill every script at random moments, also while it writes, and go on: all ends as if undisturbed.

    python tests/kill.py                # 20 SIGKILLs a script, a few minutes
    python tests/kill.py --kills 3

Tiny models, and a save after every update, so that a third of the time is spent in writing. Each
script runs once undisturbed; then again with --resume, killed at a random moment and started again
until it was killed often enough and has come to its end. What the two leave behind must be the
same: checkpoints bit for bit, logs and reports but for the seconds in them. Exit status
0 says so.
"""
import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from conftest import ROOT, same

START = """
import runpy, sys
from lab import sources

sources.TOY_SIZE.update(train=1600, val=8, test=40)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MAY_DIFFER = ("seconds", "log_length")  # the seconds in a log make it longer or shorter
SCRIPTS = {
    "train_sup.py": "--n-layer 1 --n-embd 16 --n-head 1 --batch-size 8 --sft-steps 40 --steps 40 "
                    "--bag-steps 10 --eval-every 1",
    "compress.py": "--batch-size 8",
    "train_latent.py": "--steps 60 --batch-size 8 --eval-every 1",
    "analyze.py": "--batch-size 4",
}


def begin(script, out, again=""):
    """(the process, the file of what it says), once it has said a word, after the imports."""
    said = tempfile.TemporaryFile("w+")
    flags = shlex.split(f"{SCRIPTS[script]} {again} --out {shlex.quote(str(out))}")
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(ROOT / script), *flags], cwd=out, stdout=said,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not os.fstat(said.fileno()).st_size:
        time.sleep(0.01)
    return process, said


def finish(process, said, timeout=None):
    """Wait for its end, which must be a good one. Raises TimeoutExpired where it takes longer."""
    if process.wait(timeout):
        said.seek(0)
        raise SystemExit(f"status {process.returncode}:\n{said.read()[-2000:]}")


def killed(script, out, seconds, kills, rng, expected):
    """Run it to its end with so many kills, each within half of its time.

    Where it ends before it was killed often enough, it begins anew with the folder as it was.
    Raises SystemExit where after an end there is anything else than `expected`.
    """
    again = "" if script == "analyze.py" else "--resume"
    fresh = shutil.copytree(out, f"{out}.fresh")
    while kills:
        process, said = begin(script, out, again)
        try:
            finish(process, said, rng.uniform(0, seconds / 2))
            require_same(script, expected, contents(out))
            shutil.rmtree(out)
            shutil.copytree(fresh, out)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= 1
    finish(*begin(script, out, again))
    require_same(script, expected, contents(out))
    shutil.rmtree(fresh)


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


def contents(folder):
    """{where it stands: value} of all files; a page is left out, since it shows the seconds."""
    found = {}
    for path in folder.rglob("*"):
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            content = json.loads(path.read_text("utf-8"))
        elif path.suffix == ".jsonl":
            content = [json.loads(row) for row in path.read_text("utf-8").splitlines()]
        elif path.suffix in (".html", ".part"):
            continue
        else:
            content = path.read_bytes()
        found.update(leaves(content, path.name))
    return {name: x for name, x in found.items() if not set(MAY_DIFFER) & set(name.split())}


def require_same(script, expected, found):
    names = [name for name in {**expected, **found}
             if not same(expected.get(name), found.get(name))]
    if names:
        raise SystemExit(f"{script}, killed: these are not the same: {', '.join(names[:8])}")


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="of every script (default: 20)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        whole.mkdir()
        cut.mkdir()
        for script in SCRIPTS:
            process, said = begin(script, whole)
            began = time.time()
            finish(process, said)
            seconds = time.time() - began
            expected = contents(whole)
            killed(script, cut, seconds, args.kills, rng, expected)
            left = ", ".join(path.name for path in cut.rglob("*.part"))
            print(f"{script}: killed {args.kills} times in {seconds:.1f} s of work, "
                  f"{len(expected)} values the same" + (f"; left behind: {left}" if left else ""),
                  flush=True)


if __name__ == "__main__":
    main()
