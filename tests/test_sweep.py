"""The sweep: stages shared, side by side, stopped, killed, gone on with; the table.

Most of it with scripts that only pretend, and take no time; once with the real ones.
"""
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from conftest import ROOT, TINY, run_script
from lab import sweep
from lab.files import UserError
from lab.flags import parser
from lab.report import cell

SETTINGS = [
    ("default", {}),
    ("broken", {"phase-3": "--noise broken"}),
    ("noise-0", {"phase-3": "--noise 0"}),
    ("baselines-c=4", {"phase-1": "--chunk-size 4", "baselines": "--baselines"}),
]
PRETEND = """
import json, sys, time
from pathlib import Path

def until(condition):
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.01)

flags, out = sys.argv[1:], Path(sys.argv[sys.argv.index("--out") + 1])
kind, seed = out.parts[-2], int(out.parts[-3][-1])
(out / "began").write_text(str(time.time()))
makes = {"warm-up": "sft.pt", "phase-1": "sup.pt", "store": "latents.pt",
         "phase-3": "latent.pt", "baselines": "no_cot.pt", "analysis": "report.json"}
until(lambda: not Path("hold-" + kind).exists())
if kind == "warm-up" and "--both" in flags:
    until(lambda: len(list(Path().rglob("warm-up/*/began"))) == 2)
if "broken" in flags:
    sys.exit("working\\r--noise broken: no number")
for earlier in list(makes)[:list(makes).index(kind)]:
    assert earlier == "baselines" or (out / makes[earlier]).exists()
ways = dict(warm_up=0.1, explicit=0.2, no_cot=0.3, latent=0.5 + seed / 4, gold=0.9)
report = {"accuracy": ways, "interval": {way: [a - 0.1, a + 0.1] for way, a in ways.items()},
          "steps": {way: 20.0 + 3 * seed for way in ways},
          "continuation": {"accuracy": [0.25, 0.125, 1.0]},
          "controls": {"accuracy": dict(own=1, zeroed=0.0, shuffled=0.5, random=0.25)},
          "collapse": None if seed else {"accuracy": {"top c": 0.75}},
          "parallelism": {"latent": {"covered": 1.5 + seed, "covered_most": 2.75}},
          "ecr": {"K": [1, 2], "latent": {"own": [1.0, 1.5 + seed]}},
          "config": {"analyze": {"made_by": {"commit": f"abc{seed}"}},
                     "sup": {"settings": {"chunk_size": 2}}}}
(out / makes[kind]).write_text(json.dumps(report))
(out / "ended").write_text(str(time.time()))
"""


def rows_of(out):
    """sweep.md as {setting: {head: entry}}."""
    lines = [line.strip()[2:-2].split(" | ") for line in open(out / "sweep.md", encoding="utf-8")
             if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def starts(out):
    """{stage: how often its script was started}."""
    return {str(log.parent.relative_to(out)): log.read_text("utf-8").count("python ")
            for log in out.rglob("stage.log")}


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A folder with scripts that pretend, to sweep over SETTINGS in."""
    for script in ("train_sup", "compress", "train_latent", "analyze"):
        (tmp_path / f"{script}.py").write_text(PRETEND)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "SETTINGS", SETTINGS)
    return tmp_path


# ----------------------------------------------------------------------------------------- the plan

def test_every_setting_has_flags_that_the_scripts_know():
    phases = {"train_sup": "sup", "compress": "compress", "train_latent": "latent"}
    for _, flags in sweep.SETTINGS:
        for kind, words in flags.items():
            script, _ = sweep.STAGES[kind]
            parser("", phases[script]).parse_args(shlex.split(words))


def test_settings_share_what_they_agree_on(tmp_path):
    extra = {script: [] for script in sweep.EXTRA.values()}
    stages, analyses = sweep.plan(SETTINGS, [0, 1], extra | {"train_sup": ["--lr", "1"]}, tmp_path)
    kinds = [stage.kind for stage in stages]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "warm-up": 2, "phase-1": 4, "store": 4, "phase-3": 8, "baselines": 2, "analysis": 8}
    analysis = analyses["baselines-c=4", 1]
    assert [stage.flags for stage in analysis.needs] == [shlex.split(words) for words in (
        "--lr 1 --seed 1 --steps 0", "--lr 1 --seed 1 --chunk-size 4", "", "",
        "--lr 1 --seed 1 --chunk-size 4 --baselines")]
    assert analysis.needs[0] is analyses["default", 1].needs[0]
    assert str(analyses["noise-0", 0].folder).endswith("seed-0/analysis/phase-3-noise-0")


# ------------------------------------------------------------------------------------------ it runs

COMMAND = ["--seeds", "0", "1", "--jobs", "2", "--out", "out", "--sup=--both"]


@pytest.fixture
def swept(pretend):
    """--out of a sweep whose setting "broken" has failed."""
    with pytest.raises(UserError, match="2 stages failed, see above; the same command tries again"):
        sweep.main(COMMAND)
    return pretend / "out"


def test_stages_side_by_side(swept):
    """Each after those it needs, two at a time; one that fails stops no other.

    The warm-ups of the two seeds wait for each other, so they must run at the same time.
    """
    times = {path.parent: [float((path.parent / name).read_text()) for name in ("began", "ended")]
             for path in swept.rglob("ended")}
    stages, _ = sweep.plan(SETTINGS, [0, 1], dict.fromkeys(sweep.EXTRA.values(), []), swept)
    assert len(times) == len(stages) - 4  # neither "broken" nor its analysis
    for stage in stages:
        if stage.folder in times:
            began = times[stage.folder][0]
            assert all(times[need.folder][1] <= began for need in stage.needs)
            assert sum(a <= began < b for a, b in times.values()) <= 2
    assert (swept / "seed-0/warm-up/default/sft.pt").samefile(
        swept / "seed-0/analysis/phase-3-noise-0/sft.pt")


def test_means_and_ranges_over_seeds(swept):
    rows = rows_of(swept)
    assert list(rows) == ["default", "noise-0", "explicit-c=4", "no-CoT-c=4"]
    assert rows["no-CoT-c=4"]["accuracy"] == "0.300" and rows["no-CoT-c=4"]["covered"] == "–"
    assert rows["noise-0"] | {"seconds": ""} == {
        "setting": "noise-0", "seeds": "2", "accuracy": "0.625", "range": "0.500 – 0.750",
        "steps": "21.5", "explicit": "0.100", "gold": "0.900", "lowest continuation": "0.125",
        "from none": "0.250", "controls": "0.500", "held": "2.000", "covered": "2.00 of 2.75",
        "cut to c": "0.750", "seconds": "", "flags": "phase-3 --noise 0"}


def test_the_figures_of_each_seed(swept):
    found = json.loads((swept / "sweep.json").read_text())
    assert list(found) == ["default", "noise-0", "explicit-c=4", "no-CoT-c=4"]
    assert found["noise-0"]["commit"] == "abc0 abc1"
    assert found["noise-0"]["flags"] == {"phase-3": "--noise 0"}
    assert found["noise-0"]["seeds"]["1"].pop("seconds") > 0
    assert found["noise-0"]["seeds"]["1"] == {
        "accuracy": 0.75, "steps": 23.0, "explicit": 0.1, "explicit steps": 23.0, "gold": 0.9,
        "lowest continuation": 0.125, "from none": 0.25, "controls": 0.5, "held": 2.5,
        "covered": 2.5, "most": 2.75, "cut to c": None, "interval": [0.65, 0.85]}
    assert found["no-CoT-c=4"]["seeds"]["0"] == {
        "accuracy": 0.3, "interval": [0.3 - 0.1, 0.4], "steps": 20.0}


def test_the_same_command_again_tries_what_failed_and_nothing_else(swept, capsys):
    broken = [f"seed-{seed}/phase-3/phase-3-noise-broken" for seed in (0, 1)]
    before = starts(swept)
    with pytest.raises(UserError):
        sweep.main(COMMAND)
    assert starts(swept) == before | dict.fromkeys(broken, 2)
    said = sorted(line for line in capsys.readouterr().out.splitlines() if "FAILED" in line)
    assert len(said) == 2 and said[0].startswith(f"{broken[0]}: FAILED after ")
    assert said[0].endswith(f" s: --noise broken: no number (out/{broken[0]}/stage.log)")
    with pytest.raises(UserError, match="with the flags '--both --seed 0 --steps 0', here they"):
        sweep.main(["--only", "default", "--out", "out"])


def test_stopped_and_killed(pretend):
    """Ctrl-C, then the end of all its processes at once; the same command goes on each time."""
    start = f"from lab import sweep; sweep.SETTINGS = {SETTINGS[:1]}; sweep.main()"
    command = [sys.executable, "-c", start, "--seeds", "0", "--out", "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for kind, number in (("phase-1", signal.SIGINT), ("phase-3", signal.SIGKILL)):
        (pretend / f"hold-{kind}").touch()
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True)
        end = time.time() + 60
        while not (pretend / f"out/seed-0/{kind}/default/began").exists():
            assert time.time() < end
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process writes to out"):
            sweep.main(["--seeds", "0", "--out", "out"])
        os.killpg(process.pid, number)
        said = process.communicate()[1].decode()
        assert number == signal.SIGKILL or said == "stopped; the same command goes on from here\n"
        (pretend / f"hold-{kind}").unlink()
    sweep.main(["--only", "default", "--seeds", "0", "--out", "out"])
    assert starts(pretend / "out") == {f"seed-0/{kind}/default": 1 + kind.startswith("phase")
                                       for kind in sweep.STAGES if kind != "baselines"}


def test_with_the_real_scripts(tmp_path, monkeypatch):
    """Run in this process, which is faster. The table says what the report says."""
    def run(command, **_):
        python, script, *words = command
        run_script(script.removesuffix(".py"), *words)
        return SimpleNamespace(returncode=0)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "subprocess", SimpleNamespace(run=run))
    sweep.main(["--only", "default", "baselines", "--seeds", "0", "--jobs", "1",
                "--out", str(tmp_path), f"--sup={shlex.join(TINY)}", "--latent=--steps 4"])
    report = json.loads((tmp_path / "seed-0/analysis/default/report.json").read_text())
    rows = rows_of(tmp_path)
    row = rows["default"]
    assert list(rows) == ["default", "explicit", "no-CoT"]
    assert row["seeds"] == "1*" and row["range"] == cell(report["interval"]["latent"])
    assert row["gold"] == cell(report["accuracy"]["gold"])
    notes = [json.loads((tmp_path / f"seed-0/{kind}/default/stage.json").read_text())
             for kind in ("warm-up", "phase-1", "store", "phase-3")]
    assert all(note["seconds"] > 0 for note in notes)  # they are rounded to a tenth there
    assert abs(int(row["seconds"]) - sum(note["seconds"] for note in notes)) < 1


# ---------------------------------------------------------------------------------- it does not run

@pytest.mark.parametrize("words, says", [
    (["--only", "c=3"], "invalid choice: 'c=3'"),
    (["--analyze=--split easy"], "a sweep compares the reports of the default split"),
    (["--jobs", "0"], "must be 1 or more"),
])
def test_what_makes_no_sense_is_refused(words, says, capsys):
    with pytest.raises(SystemExit):
        sweep.main(words)
    assert says in capsys.readouterr().err
