"""Kill every script at random moments, also while it writes, and go on: all ends as if undisturbed.

    python tests/kill.py                # 20 SIGKILLs a script, a few minutes
    python tests/kill.py --kills 3

Tiny models, and a save after every update, so that a third of the time is spent in writing. Each
script runs once undisturbed; then again with --resume, killed at a random moment and started again
until it was killed often enough and has come to its end. What the two leave behind must be the
same: checkpoints and arrays bit for bit, logs and reports but for the seconds in them. Exit status
0 says so.
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
START = f"""
import data, runpy, sys

data.TOY_SIZE.update({SIZE})
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = {
    "train_sup.py": "--n-layer 1 --n-embd 16 --n-head 1 --batch-size 8 --sft-steps 60 --steps 60 "
                    "--bag-steps 20 --eval-every 1",
    "compress.py": "--batch-size 8",
    "train_latent.py": "--steps 120 --batch-size 8 --eval-every 1",
    "analyze.py": "--batch-size 4",
}


def start(script, out, *flags):
    """The process, once it has said its first word, which comes after the imports."""
    said = tempfile.TemporaryFile("w+")
    command = [sys.executable, "-c", START, str(ROOT / script), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [*SCRIPTS[script].split(), *flags]
    process = subprocess.Popen(command, stdout=said, stderr=said, env=env)
    process.said, process.script = said, script
    while process.poll() is None and not os.fstat(said.fileno()).st_size:
        time.sleep(0.01)
    return process


def finish(process, timeout=None):
    """Wait for its end, which must be a good one. Raises TimeoutExpired where it takes longer."""
    if process.wait(timeout):
        process.said.seek(0)
        said = process.said.read()[-2000:]
        raise SystemExit(f"{process.script} ended with {process.returncode}:\n{said}")


def killed(script, out, seconds, kills, rng):
    """Run it with that many kills, each within a fifth of its time; if it ends before, all over."""
    again = () if script == "analyze.py" else ("--resume",)
    fresh = Path(f"{out}.fresh")
    shutil.copytree(out, fresh)
    while kills:
        process = start(script, out, *again)
        try:
            finish(process, rng.uniform(0, seconds / 5))
            shutil.rmtree(out)
            shutil.copytree(fresh, out)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills -= 1
    finish(start(script, out, *again))
    shutil.rmtree(fresh)


def plain(x):
    """A checkpoint or a row of a log, its tensors as bytes, without the fields that may differ."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items() if k not in ("seconds", "out", "resume")}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if torch.is_tensor(x):
        return x.numpy().tobytes()
    return x


def content(path):
    """What is compared of a file."""
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return plain(json.loads(path.read_text("utf-8")))
    if path.suffix == ".jsonl":
        return [plain(json.loads(row)) for row in path.read_text("utf-8").splitlines()]
    if path.suffix == ".html":
        return None  # the page shows the seconds
    return path.read_bytes()


def differences(whole, cut):
    """The files of the undisturbed run, and those of them that the killed one has not so."""
    files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
    differ = []
    for file in files:
        if not (cut / file).is_file() or content(whole / file) != content(cut / file):
            differ.append(str(file))
    return files, differ


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
            process, began = start(script, whole), time.time()
            finish(process)
            seconds = time.time() - began
            killed(script, cut, seconds, args.kills, rng)
            files, differ = differences(whole, cut)
            if differ:
                raise SystemExit(f"{script}: after {args.kills} kills these are not the same: "
                                 + ", ".join(differ))
            left = ", ".join(f.name for f in cut.rglob("*.part"))
            print(f"{script}: killed {args.kills} times in {seconds:.1f} s of work, "
                  f"{len(files)} files the same" + (f"; left behind: {left}" if left else ""))


if __name__ == "__main__":
    main()
