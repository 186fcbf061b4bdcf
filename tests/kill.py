"""Kill every script at random moments, also while it writes, and go on: all ends as if nothing had happened.

    python tests/kill.py                # 20 SIGKILLs a script, a few minutes
    python tests/kill.py --kills 3

Tiny models, and a save after every update, so that a third of the time is spent in writing. Each script runs once
undisturbed; then again with --resume, killed at a random moment and started again until it was killed often enough and
has come to its end. What the two leave behind must be the same: checkpoints and arrays bit for bit, logs and reports
but for the seconds in them. Exit status 0 says so.
"""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SIZE = {"train": 1600, "val": 8, "test": 40}  # of the toy task
START = f"import data, runpy, sys; data.TOY_SIZE.update({SIZE}); sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
TINY = "--n-layer 1 --n-embd 16 --n-head 1 --batch-size 8 --sft-steps 60 --steps 60 --eval-every 1"
SCRIPTS = {"train_sup.py": TINY, "compress.py": "--batch-size 8", "train_latent.py": "--steps 120 --batch-size 8 --eval-every 1",
           "analyze.py": "--batch-size 4"}


def start(script, out, *flags):
    """The process, once it has said its first word, which comes after the imports; what it says goes to `said`."""
    said = tempfile.TemporaryFile("w+")
    process = subprocess.Popen([sys.executable, "-c", START, str(ROOT / script), "--out", str(out), *SCRIPTS[script].split(), *flags],
                               stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    process.said, process.script = said, script
    while process.poll() is None and not os.fstat(said.fileno()).st_size:
        time.sleep(0.01)
    return process


def finish(process, timeout=None):
    if process.wait(timeout):
        process.said.seek(0)
        raise SystemExit(f"{process.script} ended with {process.returncode}:\n{process.said.read()[-2000:]}")


def killed(script, out, seconds, kills, rng):
    """Run it with that many kills, each within a fifth of the time it takes; start over where it ends before."""
    again = () if script == "analyze.py" else ("--resume",)
    fresh, left = Path(f"{out}.fresh"), kills
    shutil.copytree(out, fresh)
    while left:
        process = start(script, out, *again)
        try:
            finish(process, rng.uniform(0, seconds / 5))
            shutil.rmtree(out)
            shutil.copytree(fresh, out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            left -= 1
    finish(start(script, out, *again))
    shutil.rmtree(fresh)


def content(path):
    """What is compared of a file."""
    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items() if k not in ("seconds", "out", "resume")}
        if torch.is_tensor(x):
            return x.numpy().tobytes()
        return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix in (".json", ".jsonl"):
        return [plain(json.loads(text)) for text in (path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()])]
    return None if path.suffix == ".html" else path.read_bytes()  # the page shows the seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=20, help="of every script (default: 20)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        whole.mkdir(), cut.mkdir()
        for script in SCRIPTS:
            process, began = start(script, whole), time.time()
            finish(process)
            seconds = time.time() - began
            killed(script, cut, seconds, args.kills, rng)
            files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
            differ = [str(f) for f in files if not (cut / f).is_file() or content(whole / f) != content(cut / f)]
            if differ:
                raise SystemExit(f"{script}: after {args.kills} kills these are not the same: {', '.join(differ)}")
            left = [f.name for f in cut.rglob("*.part")]
            print(f"{script}: killed {args.kills} times in {seconds:.1f} s of work, {len(files)} files the same"
                  + (f"; left behind: {', '.join(left)}" if left else ""))


if __name__ == "__main__":
    main()
