"""A run that was killed and goes on ends bit for bit as one that never was."""
import pytest

import compress
from conftest import TINY, pipeline, run_script, same
from kill import contents
from lab.files import UserError, load
from lab.run import Run
from lab.setup import start


class Killed(BaseException):
    """As sudden as a signal: nothing in the project catches it."""


def dies_after(patch, owner, method, when):
    """From now on `method` ends the program where `when(self)`: once at each step of each loop."""
    original, died = getattr(owner, method), set()

    def dying(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        place = getattr(self, "name", "store"), getattr(self, "step", 0)
        if when(self) and place not in died:
            died.add(place)
            raise Killed
        return result

    patch.setattr(owner, method, dying)
    return died


def until_it_ends(command):
    for _ in range(99):
        try:
            return command()
        except Killed:
            pass
    raise AssertionError("it never ends")


def require_same(whole, cut):
    """All files, but for the seconds in them."""
    whole, cut = contents(whole), contents(cut)
    assert not [name for name in {**whole, **cut} if not same(whole.get(name), cut.get(name))]


def made_up_scores(patch):
    """Tiny models answer nothing: say that those of sft are alike, of sup fall, of latent rise."""
    original, slope = Run.save, {"sft": 0, "sup": -0.1, "latent": 0.1}
    patch.setattr(Run, "save", lambda run, score, **figures: original(
        run, 0.5 + slope[run.name] * run.step, **figures))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        made_up_scores(patch)
        pipeline(out)
    return out


MOMENTS = {  # it dies in what, after which function, and when; how often in three loops and a store
    "before the first save, and between two": (
        [(Run, "log", lambda run: run.step in (1, 3))], 6),
    "after the model, its state, amid phase 2": (
        [(Run, "save_models", lambda run: True), (Run, "save_state", lambda run: True),
         (compress, "count_chunks", lambda length: True)], 5 + 9 + 1),
    "after the row of an evaluation, the store": (
        [(Run, "record", lambda run: run.step % 2 == 0), (compress, "save", lambda path: True)],
        6 + 1),
}


@pytest.mark.parametrize("moments, times", MOMENTS.values(), ids=MOMENTS)
def test_a_killed_run_ends_as_one_that_never_was(whole, tmp_path, monkeypatch, moments, times):
    """With what it must remember: how good the best model was, and how long the log."""
    made_up_scores(monkeypatch)
    died = [dies_after(monkeypatch, *moment) for moment in moments]
    until_it_ends(lambda: pipeline(tmp_path, "--resume"))
    assert sum(map(len, died)) == times
    require_same(whole, tmp_path)
    best = [load(tmp_path / f"{name}.pt")["step"] for name in ("sft", "sup", "latent")]
    assert best == [4, 2, 4]  # of equally good ones the last


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    def pressed(run, **figures):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", pressed)
    with pytest.raises(SystemExit) as stop:
        start(lambda: run_script("train_sup", *TINY, "--out", tmp_path))
    assert "--resume" in stop.value.code and "\n" not in stop.value.code


def test_a_finished_run_stays_as_it_is(copy):
    """Also with a log that is shorter than it was: what is gone is not made up for."""
    (copy / "sft.jsonl").write_bytes(b"")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    pipeline(copy, "--resume")
    run_script("train_sup", *TINY, "--baselines", "--baseline-steps", 6, "--out", copy, "--resume")
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", ["save_state", "save_models"])
def test_a_warm_up_without_updates_is_gone_on_with(tmp_path, monkeypatch, method):
    """Wherever it is killed; and phase 1, which follows from it, does not start over each time."""
    moments = (method, lambda run: run.name == "sft"), ("log", lambda run: run.step == 3)
    for method, when in moments:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies_after(patch, Run, method, when)
            run_script("train_sup", *TINY, "--sft-steps", 0, "--out", tmp_path, "--resume")
    steps = []
    dies_after(monkeypatch, Run, "log", lambda run: steps.append(run.step))
    run_script("train_sup", *TINY, "--sft-steps", 0, "--out", tmp_path, "--resume")
    assert steps == [3, 4]  # the third update once more, as the state is that of the second


def test_figures_are_read_one_update_late_but_all_before_an_evaluation(
        tmp_path, monkeypatch):
    original, rows = Run.log, []

    def log(run, **figures):
        original(run, **figures)
        rows.append(len((tmp_path / "sft.jsonl").read_text("utf-8").splitlines()))

    monkeypatch.setattr(Run, "log", log)
    run_script("train_sup", *TINY, "--sft-steps", 5, "--steps", 0, "--eval-every", 3,
               "--out", tmp_path)
    assert rows == [0, 1, 3, 1 + 3, 1 + 5]  # an evaluation has a row, too


# --------------------------------------------------------------------------- what takes whose place

MADE = ("sft", "sup", "explicit", "no_cot", "latents", "latent")
ANEW = {  # how it is made anew, when it is in its place, and what stays then
    "sft": (["train_sup", *TINY, "--seed", 1, "--overwrite"], (Run, "save_models"), ["sft"]),
    "sup": (["train_sup", *TINY, "--resume"], (Run, "save_models"), MADE[:4]),
    "latents": (["compress", "--overwrite"], (compress, "remove"), MADE[:5]),
}


@pytest.mark.parametrize("name", ANEW)
def test_what_was_made_of_the_old_one_goes_when_a_new_one_is_there(copy, monkeypatch, name):
    command, moment, stays = ANEW[name]
    if name == "sup":  # without it a run goes on after the warm-up
        for path in copy.glob("sup*"):
            path.unlink()

    def left():
        return {path.name.split(".")[0] for path in copy.iterdir() if path.name != "lock"}

    begun = (compress, "choose_chains") if name == "latents" else (Run, "log")
    for moment, expected in (begun, MADE), (moment, stays):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dies_after(patch, *moment, lambda one: not isinstance(one, Run) or one.name == name)
            run_script(*command, "--out", copy)
        assert left() == set(expected)


def test_a_finished_store_is_kept_and_another_is_not_gone_on_with(copy):
    store = copy / "latents.pt"
    place = store.stat().st_ino
    run_script("compress", "--out", copy, "--resume")
    assert store.stat().st_ino == place
    with pytest.raises(UserError, match="latents.pt was made with top_k = 50, here it is 7"):
        run_script("compress", "--out", copy, "--resume", "--top-k", 7)
    run_script("compress", "--out", copy, "--overwrite", "--top-k", 7)
    assert load(store)["values"].size(1) == 7
    run_script("compress", "--out", copy, "--resume", "--top-k", 7)
