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

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--batch-size", "8", "--lr", "1e-3",
        "--sft-steps", "4", "--steps", "4", "--bag-steps", "1", "--eval-every", "2"]
FEW = {"train": 64, "val": 8, "test": 8}
START = f"""
import atexit, common, data, os, sys, time, train_latent, train_sup

atexit.register(os.abort)  # as now and then a thread of PyTorch's does at an ordinary exit

class LateRun(common.Run):
    def __init__(self, *args, **kwargs):
        time.sleep(float(os.environ.get("LATE", 0)) * int(os.environ["RANK"]))
        super().__init__(*args, **kwargs)

def main():
    for phase, flags in zip(sys.argv[1::2], sys.argv[2::2]):
        {{"sup": train_sup, "latent": train_latent}}[phase].main(flags.split())

data.TOY_SIZE.update({FEW})
common.Run = LateRun
common.start(main)
"""


def spawn(world, phases, cwd):
    """Start `world` processes that run these phases: 'sup' or 'latent', then its flags."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
           "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [subprocess.Popen([sys.executable, "-c", START, *phases], cwd=cwd, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)]


def processes(world, *phases, cwd, until=None, pressed=()):
    """Run these phases in `world` processes: [(exit status, output)].

    until: a log; once there is something in it, the processes `pressed` get what Ctrl-C sends.
    """
    started = spawn(world, phases, cwd)
    try:
        while until and all(p.poll() is None for p in started):
            if until.is_file() and until.stat().st_size:
                break
            time.sleep(0.1)
        for rank in pressed:
            started[rank].send_signal(signal.SIGINT)
        said = [p.communicate(timeout=300)[0] for p in started]
        return [(p.returncode, output) for p, output in zip(started, said)]
    finally:
        for p in started:
            p.kill()


def curve(file):
    """What a log says of every update, without its number."""
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

    sup = " ".join([*TINY, "--out", "two_sup"])
    ended = processes(2, "sup", sup, "latent", latent + "two", cwd=tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended[0][1] + ended[1][1]
    # the first process says and writes it all
    assert "validation" in ended[0][1] and "validation" not in ended[1][1]
    for name, folder in ("sft", "two_sup"), ("sup", "two_sup"), ("latent", "two"):
        one = curve(tmp_path / "one" / f"{name}.jsonl")
        two = curve(tmp_path / folder / f"{name}.jsonl")
        assert len(one) == 4
        np.testing.assert_allclose(two, one, rtol=1e-4, err_msg=name)
    for name, folder in ("sft", "two_sup"), ("sup", "two_sup"), ("latent", "two"):
        one = common.load_checkpoint(tmp_path / "one" / f"{name}.pt")["models"]
        two = common.load_checkpoint(tmp_path / folder / f"{name}.pt")["models"]
        for model in one:
            for key, weight in one[model].items():
                # where a gradient is next to nothing, AdamW makes much of how it was added up
                far = (two[model][key] - weight).abs()
                assert (far > 1e-4).float().mean() < 1e-3 and far.max() < 1e-3, f"{name} {key}"


def test_a_process_may_come_late(tmp_path, monkeypatch):
    """Where a loop has no updates the first process is done with it before the second begins."""
    monkeypatch.setenv("LATE", "2")
    flags = " ".join([*TINY, "--sft-steps", "0", "--out", "run"])
    ended = processes(2, "sup", flags, cwd=tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended[0][1] + ended[1][1]


@pytest.mark.parametrize("pressed", [(0, 1), (1,)], ids=["both", "the second alone"])
def test_ctrl_c_stops_all_processes_after_the_same_update(tmp_path, pressed):
    flags = " ".join([*TINY, "--sft-steps", "100000", "--eval-every", "100000", "--out", "run"])
    log = tmp_path / "run" / "sft.jsonl"
    ended = processes(2, "sup", flags, cwd=tmp_path, until=log, pressed=pressed)
    sentence = r"stopped after (\d+) of 100000 updates of sft and saved"
    said = [re.search(sentence, output) for _, output in ended]
    assert [status for status, _ in ended] == [1, 1], ended
    assert said[0] and said[1] and said[0][0] == said[1][0], ended
    assert "Traceback" not in ended[0][1] + ended[1][1]
    state = common.load_checkpoint(tmp_path / "run" / "sft.state.pt")
    assert state["step"] == int(said[0][1]) > 0


# ---------------------------------------------------- what torchrun says, or somebody in its place

TWO = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """environment(RANK=…): of torchrun's variables these alone; to wait for others is to fail."""
    def no_waiting(*_):
        pytest.fail("refuse before waiting for other processes")

    def only(**values):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(common.dist, "init_process_group", no_waiting)
    return only


@pytest.mark.parametrize("phase, says", [
    ("sup", "--batch-size 7 .*2 processes"),
    ("compress", "one process"),
])
def test_what_cannot_be_shared_out_is_said_in_one_sentence(
        phase, says, environment, monkeypatch, tmp_path):
    environment(**TWO)
    parent = {"config": dict.fromkeys((*common.INHERITED, "top_k", "ltim", "model"), 1),
              "models": {"encoder": {}}}
    monkeypatch.setattr(common, "load_checkpoint", lambda path: parent)
    flags = ["--batch-size", "7", "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(data.UserError, match=says):
        common.setup(common.parser("", phase), phase, flags)


@pytest.mark.parametrize("wrong, says", [
    (dict(RANK="first"), "RANK, .*whole numbers.*'first'"),
    (dict(RANK="0.5"), "whole numbers.*'0.5'"),
    (dict(RANK=""), "whole numbers"),
    (dict(WORLD_SIZE="two"), "whole numbers.*'two'"),
    (dict(LOCAL_RANK="gpu0"), "whole numbers.*'gpu0'"),
    (dict(LOCAL_RANK="-1"), "cannot be"),
    (dict(RANK="-1"), "RANK -1 of WORLD_SIZE 2 cannot be"),
    (dict(RANK="2"), "RANK 2 of WORLD_SIZE 2 cannot be"),
    (dict(WORLD_SIZE="0"), "RANK 0 of WORLD_SIZE 0 cannot be"),
    (dict(RANK=None), "RANK is not set; start .*torchrun"),
    (dict(MASTER_ADDR=None), "MASTER_ADDR is not set; start .*torchrun"),
    (dict(MASTER_PORT=None), "MASTER_PORT is not set; start .*torchrun"),
], ids=str)
def test_variables_that_cannot_be_are_said_in_one_sentence(wrong, says, environment, tmp_path):
    environment(**{name: value for name, value in {**TWO, **wrong}.items() if value is not None})
    with pytest.raises(data.UserError, match=says) as stop:
        train_sup.main([*TINY, "--out", str(tmp_path / "run")])
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variables, says", [
    (dict(RANK="first"), "RANK"),
    (dict(RANK="1", WORLD_SIZE="2"), "MASTER_ADDR is not set"),
    (dict(TWO, MASTER_PORT="a door"), "MASTER_PORT"),
], ids=str)
def test_and_a_script_ends_on_that_sentence(variables, says, tmp_path):
    """The same as the reader meets it: exit status 1, the sentence on stderr, no traceback."""
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env.update(variables, OMP_NUM_THREADS="1")
    command = [sys.executable, str(ROOT / "train_sup.py"), *TINY]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
