"""The sweep: stages shared, stopped, killed, gone on with; one that fails; the table, the page."""
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

import common
import data
import sweep
import train_latent
import train_sup
from conftest import ROOT
from data import UserError
from test_report import Page

SETTINGS = [
    ("default", "default", "", "", ""),
    ("broken", "phase 3", "", "", "--top-k 7"),  # the store has 50
    ("noise-0", "phase 3", "", "", "--noise 0"),
    ("c=4", "chunk size", "--chunk-size 4", "", ""),
    ("baselines", "baselines", "--baselines", "", ""),
    ("baselines-c=4", "baselines", "--baselines --chunk-size 4", "", ""),
]
FLAGS = ["--smoke", "--jobs", "2", "--sup=--sft-steps 120 --steps 120 --eval-every 10"]
START = f"""
import signal
import common, sweep

signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may have had it ignored
sweep.SETTINGS = {SETTINGS}
common.start(sweep.main)
"""


def start(out):
    """The sweep of one seed, in a process of its own: this one has trained, and can't be forked."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", START, *FLAGS, "--seeds", "0", "--out", str(out)]
    with open(f"{out}.said", "wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env=env)


def until(condition):
    """Wait for it, five minutes at most."""
    end = time.time() + 300
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def is_free(out):
    """Whether no sweep and no stage of one is alive."""
    with open(out / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def end_of(process, out):
    """(exit status, what it said)."""
    return process.wait(), (out.parent / f"{out.name}.said").read_text("utf-8")


def rows_of(out):
    """sweep.md as {setting: {head: entry}}."""
    lines = [line.strip("| \n").split(" | ") for line in open(out / "sweep.md", encoding="utf-8")
             if line.startswith("|")]
    return {line[0]: dict(zip(lines[0], line)) for line in lines[2:]}


def report_of(out, seed, flags):
    return json.loads((out / f"seed-{seed}" / "analysis" / flags / "report.json").read_text())


# ------------------------------------------------------------------------------------- it runs

@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder, what it said at last) of a sweep that was stopped, then killed, then left alone."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    warm_up, phase_1 = (out / "seed-0" / kind / "default" for kind in ("warm-up", "phase-1"))

    process = start(out)
    until((warm_up / "sft.state.pt").exists)
    os.kill(process.pid, signal.SIGINT)
    code, said = end_of(process, out)
    assert code == 1 and said.endswith("stopped; the same command goes on from here\n")
    assert is_free(out) and "updates of sft and saved" in sweep.last_line(warm_up)

    process = start(out)
    until((phase_1 / "sup.state.pt").exists)
    process.kill()
    until(lambda: is_free(out))
    assert not common.read_json(phase_1 / "stage.json")["done"]
    assert '"step": 120,' not in (phase_1 / "sup.jsonl").read_text()  # it died with the sweep

    code, said = end_of(start(out), out)
    assert code == 1 and said.endswith("1 stages failed, see above; the same command tries "
                                       "again\n")
    return out, said


def test_a_stopped_stage_goes_on_and_a_finished_one_is_left_alone(swept):
    out, said = swept
    for kind, loop in (("warm-up", "sft"), ("phase-1", "sup")):
        log = (out / "seed-0" / kind / "default" / "stage.log").read_text("utf-8")
        assert log.count("python train_sup.py") == 2
        assert log.count(f"{loop}    10  validation") == 1
        assert log.count(f"{loop}   120  validation") == 1
    assert "default, seed 0: warm-up" not in said  # the second start had finished it
    assert "default, seed 0: phase-1 done" in said


def test_settings_share_what_they_agree_on(swept):
    out, _ = swept
    folder = out / "seed-0"
    names = {kind: sorted(path.name for path in (folder / kind).iterdir())
             for kind in sweep.STAGES}
    two = ["default", "train_sup-chunk-size-4"]
    assert names["warm-up"] == ["default"]
    assert names["phase-1"] == names["store"] == names["baselines"] == two
    assert len(names["phase-3"]) == 4
    warm_up, phase_1, noise = (folder / path for path in (
        "warm-up/default", "phase-1/default", "phase-3/train_latent-noise-0"))
    assert (warm_up / "sft.pt").samefile(phase_1 / "sft.pt")
    assert (phase_1 / "sup.pt").samefile(noise / "sup.pt")
    assert (folder / "store/default/latents/ids.npy").samefile(noise / "latents/ids.npy")
    made_by = report_of(out, 0, "train_latent-noise-0")["config"]
    assert made_by["latent"]["noise"] == 0 and made_by["sup"]["steps"] == 120


def test_a_setting_that_fails_is_told_in_a_line_and_stops_no_other(swept):
    out, said = swept
    lines = [line for line in said.splitlines() if "FAILED" in line]
    assert len(lines) == 1 and lines[0].startswith("broken, seed 0: phase-3 FAILED after ")
    assert "was made with top_k = 50, here it is 7" in lines[0]
    assert lines[0].endswith("needed by broken")
    assert list(rows_of(out)) == ["default", "noise-0", "c=4", "explicit", "no-CoT", "explicit-c=4",
                                "no-CoT-c=4"]


def test_the_table_says_what_the_reports_say(swept):
    out, _ = swept
    rows = rows_of(out)
    report = report_of(out, 0, "train_sup-chunk-size-4")
    continued, ecr, row = report["continuation"]["accuracy"], report["ecr"], rows["c=4"]
    orders = report["parallelism"]["orders"]["latent"]["effective"][:2]  # of six tokens
    orders = [x for x in orders if x is not None]
    expected = {"seeds": "1*", "accuracy": report["accuracy"]["latent"],
                "range": report["interval"]["latent"], "steps": report["steps"]["latent"],
                "explicit": report["accuracy"]["warm_up"], "gold": report["accuracy"]["gold"],
                "lowest continuation": min(continued), "from none": continued[0],
                "ECR@c": ecr["encoder"]["own"][ecr["K"].index(4)],
                "paths": sum(orders) / len(orders)}
    for head, figure in expected.items():
        assert row[head] == sweep.cell(figure), head
    made_by = ["warm-up/default", *(f"{kind}/train_sup-chunk-size-4" for kind in (
        "phase-1", "store", "phase-3"))]
    seconds = math.fsum(common.read_json(out / "seed-0" / folder / "stage.json")["seconds"]
                        for folder in made_by)
    assert row["seconds"] == str(round(seconds))
    report = report_of(out, 0, "train_sup-baselines")
    assert rows["no-CoT"]["steps"] == sweep.cell(report["steps"]["no_cot"])
    assert rows["explicit"]["accuracy"] == sweep.cell(report["accuracy"]["explicit"])


def test_the_page_is_whole_and_asks_for_nothing(swept):
    out, _ = swept
    html = (out / "sweep.html").read_text("utf-8")
    page = Page(html)
    assert page.open == [] and "$" not in html and "http" not in html
    assert "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("circle") == 2 * 7  # in the chart of all, and in that of the group
    assert html.count('fill="var(--page)"') == 2 * 7
    links = [value for name, value in page.attributes if name == "href"]
    assert links and all((out / link).is_file() for link in links)


def test_a_second_seed_makes_a_mean_and_a_range(swept, monkeypatch):
    """Of reports made up for it: all is done then, and nothing runs."""
    out, _ = swept
    monkeypatch.setattr(sweep, "SETTINGS", SETTINGS)
    monkeypatch.setattr(data, "TOY_SIZE", {})
    shutil.copytree(out / "seed-0", out / "seed-1")
    for path in out.glob("seed-1/*/*/stage.json"):
        path.write_text(path.read_text().replace('"--seed",\n  "0"', '"--seed",\n  "1"'))
    for seed, accuracy, steps in ((0, 0.5, 20.0), (1, 0.75, 23.0)):
        report = report_of(out, seed, "default")
        report["accuracy"]["latent"], report["steps"]["latent"] = accuracy, steps
        common.write_json(out / f"seed-{seed}/analysis/default/report.json", report)
    sweep.main([*FLAGS, "--only", "default", "--seeds", "0", "1", "--out", str(out)])
    row, = rows_of(out).values()
    assert row["seeds"] == "2" and row["range"] == "0.500 – 0.750"
    assert row["accuracy"] == "0.625" and row["steps"] == "21.5"
    assert 'fill="var(--page)"' not in (out / "sweep.html").read_text("utf-8")

    with pytest.raises(UserError, match="--steps 7 --seed 0 --steps 0'; choose another"):
        sweep.main([*FLAGS, "--only", "default", "--sup=--steps 7", "--out", str(out)])


# --------------------------------------------------------------------------------- it does not run

def test_every_setting_has_flags_that_the_scripts_know():
    for _, _, *flags in sweep.SETTINGS:
        for script, phase, words in zip((train_sup, None, train_latent),
                                        ("sup", "compress", "latent"), flags):
            p = common.parser("", phase)
            if script:
                script.add_flags(p)
            p.parse_args(shlex.split(words))


def test_flags_that_the_warm_up_does_not_read_are_left_out():
    words = "--bag 0 --as-told 1 --chunk-size 4 --ltsum local --lr 0.5 --steps=3".split()
    assert sweep.without(words, sweep.LATE) == "--as-told 1 --lr 0.5".split()


def test_the_rest_takes_as_long_as_what_is_done(tmp_path):
    """Warm-ups took 3 and 5 minutes: one more takes 4, two stages of another kind 4 as well."""
    kinds = ["warm-up"] * 3 + ["phase-1"] * 2
    stages = {i: sweep.Stage(kind, 0, [], [], []) for i, kind in enumerate(kinds)}
    records = {i: {"done": i < 2, "seconds": 180 + 120 * i} for i in stages}
    assert sweep.time_left(stages, records, jobs=2) == "0 h 6 min"
    records[3] = {"done": True, "seconds": 7200}
    assert sweep.time_left(stages, records, jobs=1) == "2 h 4 min"


def test_a_damaged_report_is_one_sentence(tmp_path):
    for content in "[]", '{"accuracy": null}', '{"accuracy": {}}', '{"accuracy": "?"}':
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(UserError, match="report.json is not as analyze.py writes it"):
            sweep.read_figures(tmp_path, "latent")


def test_a_damaged_record_of_a_stage_is_one_sentence(tmp_path):
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(UserError, match="stage.json is damaged; delete "):
        sweep.read_record(tmp_path, sweep.Stage("warm-up", 0, [], [], []))


def test_what_makes_no_sense_is_refused(tmp_path):
    with pytest.raises(UserError, match="--only c=3: no such setting; there are default, "):
        sweep.main(["--only", "c=3"])
    for flags in "--split easy", "--ask=Why?", "--out=there":
        with pytest.raises(UserError, match="--analyze --.*: a sweep compares the reports of"):
            sweep.main([f"--analyze={flags}", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="--jobs 0"):
        sweep.main(["--jobs", "0"])
    held = sweep.lock(tmp_path)
    with pytest.raises(UserError, match="another sweep writes to"):
        sweep.lock(tmp_path)
    held.close()
