"""Two processes on one CPU learn what one process learns from the same global batch."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

import common
import compress
import data
import train_latent
import train_sup
from conftest import ROOT

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--batch-size", "8", "--lr", "1e-3", "--sft-steps", "4",
        "--steps", "4", "--eval-every", "2"]
FEW = {"train": 64, "val": 8, "test": 8}
START = f"""import common, data, sys, train_latent, train_sup
data.TOY_SIZE.update({FEW})
common.start(lambda: [{{"sup": train_sup, "latent": train_latent}}[phase].main(flags.split()) for phase, flags in
                      zip(sys.argv[1::2], sys.argv[2::2])])"""


def processes(world, *phases, cwd, until=None):
    """Start `world` processes that run these phases, 'sup' or 'latent' and its flags; wait: [(exit status, output)].

    until: a log; once there is something in it, every process gets what Ctrl-C sends.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "WORLD_SIZE": str(world),
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [subprocess.Popen([sys.executable, "-c", START, *phases], cwd=cwd, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
               for r in range(world)]
    try:
        while until and not (until.is_file() and until.stat().st_size) and all(p.poll() is None for p in started):
            time.sleep(0.1)
        for p in started if until else ():
            p.send_signal(signal.SIGINT)
        return [(p.returncode, said) for p in started for said in [p.communicate(timeout=300)[0]]]
    finally:
        for p in started:
            p.kill()


def curve(file):
    rows = [json.loads(row) for row in file.read_text("utf-8").splitlines()]
    return [[v for k, v in sorted(row.items()) if k != "step"] for row in rows if "loss" in row]


def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", FEW)
    monkeypatch.chdir(tmp_path)
    train_sup.main([*TINY, "--out", "one"])
    compress.main(["--out", "one"])
    shutil.copytree("one", "two")
    latent = "--steps 4 --batch-size 8 --lr 1e-3 --out "
    train_latent.main([*latent.split(), "one"])

    ended = processes(2, "sup", " ".join([*TINY, "--out", "two_sup"]), "latent", latent + "two", cwd=tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended[0][1] + ended[1][1]
    assert "validation" in ended[0][1] and "validation" not in ended[1][1]  # the first process says and writes it all
    for name, folder in ("sft", "two_sup"), ("sup", "two_sup"), ("latent", "two"):
        one, two = (curve(tmp_path / where / f"{name}.jsonl") for where in ("one", folder))
        assert len(one) == 4
        np.testing.assert_allclose(two, one, rtol=1e-4, err_msg=name)
    for name in "sft", "sup":
        a, b = (common.load_checkpoint(tmp_path / where / f"{name}.pt")["models"] for where in ("one", "two_sup"))
        for model in a:
            for key in a[model]:
                np.testing.assert_allclose(b[model][key], a[model][key], atol=1e-4, err_msg=f"{name} {model} {key}")


def test_ctrl_c_stops_all_processes_after_the_same_update(tmp_path):
    flags = " ".join([*TINY, "--sft-steps", "100000", "--eval-every", "100000", "--out", "run"])
    ended = processes(2, "sup", flags, cwd=tmp_path, until=tmp_path / "run" / "sft.jsonl")
    said = [re.search(r"stopped after (\d+) of 100000 updates of sft and saved", output) for _, output in ended]
    assert [status for status, _ in ended] == [1, 1] and said[0] and said[0][0] == said[1][0], ended
    assert "Traceback" not in ended[0][1] + ended[1][1]
    assert common.load_checkpoint(tmp_path / "run" / "sft.state.pt")["step"] == int(said[0][1]) > 0


@pytest.mark.parametrize("phase", ["sup", "compress"])
def test_what_cannot_be_shared_out_is_said_in_one_sentence(phase, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(common.dist, "init_process_group", lambda *_: pytest.fail("refuse before waiting for others"))
    monkeypatch.setattr(common, "load_checkpoint", lambda path: {"config": dict.fromkeys(common.INHERITED)})
    with pytest.raises(data.UserError, match="--batch-size 7 .*2 processes" if phase == "sup" else "one process"):
        common.setup(common.parser("", phase), phase, ["--batch-size", "7", "--device", "cpu", "--out", str(tmp_path)])
