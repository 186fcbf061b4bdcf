"""A run that was killed and goes on ends bit for bit as one that never was."""
import json
import signal

import pytest
import torch

import common
import compress
import data
import train_latent
import train_sup

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8",
        "--sft-steps", "4", "--steps", "4", "--bag-steps", "1", "--eval-every", "2"]
LATENT = ["--batch-size", "8", "--steps", "4", "--eval-every", "2"]
LOOPS = ("sft", "sup", "latent")
ARRAYS = ("values.npy", "ids.npy", "offsets.npy")


class Killed(BaseException):
    """As sudden as a signal: nothing in the project catches it."""


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", {"train": 64, "val": 8, "test": 8})


def pipeline(out, *flags):
    train_sup.main([*TINY, "--out", str(out), *flags])
    compress.main(["--batch-size", "8", "--out", str(out), *flags])
    train_latent.main([*LATENT, "--out", str(out), *flags])


def test_figures_are_read_one_update_late_but_all_before_an_evaluation(tmp_path, monkeypatch):
    original, rows = common.Run.log, []

    def log(run, **figures):
        original(run, **figures)
        rows.append(len((tmp_path / "sft.jsonl").read_text("utf-8").splitlines()))

    monkeypatch.setattr(common.Run, "log", log)
    train_sup.main([*TINY, "--sft-steps", "5", "--steps", "0", "--eval-every", "3",
                    "--out", str(tmp_path)])
    assert rows == [0, 1, 3, 1 + 3, 1 + 5]  # an evaluation has a row, too


def dies_after(patch, method, when):
    """From now on `method` of a Run ends the program where `when(run)`, once a loop and step."""
    original, died = getattr(common.Run, method), []

    def dying(run, *args, **kwargs):
        result = original(run, *args, **kwargs)
        if (run.name, run.step) not in died and when(run):
            died.append((run.name, run.step))
            raise Killed
        return result

    patch.setattr(common.Run, method, dying)
    return died


def until_it_ends(out, monkeypatch, method, when):
    """Run the pipeline, dying as above, until it gets through; how often it died."""
    with monkeypatch.context() as patch:
        died = dies_after(patch, method, when)
        for _ in range(99):
            try:
                pipeline(out, "--resume")
                break
            except Killed:
                pass
    return len(died)


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[k], b[k]) for k in a if k not in ("out", "resume"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def log(path):
    """The rows of a log, without the time they took."""
    rows = [json.loads(row) for row in path.read_text("utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def right_after_a_save(run):
    return run.step == 2


def between_two_saves(run):
    return run.step in (1, 3)  # what was not saved happens again


@pytest.mark.parametrize("method, when, times", [
    ("save", right_after_a_save, 3),
    ("log", between_two_saves, 6),
])
def test_a_killed_run_ends_as_one_that_never_was(tmp_path, monkeypatch, method, when, times):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pipeline(whole)
    assert until_it_ends(killed, monkeypatch, method, when) == times
    for name in LOOPS:
        for file in (f"{name}.pt", f"{name}.state.pt"):
            assert same(load(whole / file), load(killed / file)), file
        assert log(whole / f"{name}.jsonl") == log(killed / f"{name}.jsonl")
    for file in ARRAYS:
        assert (whole / "latents" / file).read_bytes() == (killed / "latents" / file).read_bytes()


def press_once(monkeypatch, pressed):
    """Ctrl-C, the signal itself, after each loop's first update and in compress's first batch."""
    original_log, original_states = common.Run.log, compress.summary_states

    def press(name):
        if name not in pressed:
            pressed.append(name)
            signal.raise_signal(signal.SIGINT)

    def pressed_log(run, **figures):
        original_log(run, **figures)
        if run.step == 1:
            press(run.name)

    def pressed_states(*args):
        press("compress")
        return original_states(*args)

    monkeypatch.setattr(common.Run, "log", pressed_log)
    monkeypatch.setattr(compress, "summary_states", pressed_states)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    """Interrupted once in every loop, between two saves, and gone on with: nothing is lost."""
    whole, stopped, said = tmp_path / "whole", tmp_path / "stopped", []
    before = signal.getsignal(signal.SIGINT)  # of tests in the background it is ignored
    pipeline(whole)
    press_once(monkeypatch, [])
    for _ in range(9):
        try:
            pipeline(stopped, "--resume")
            break
        except data.UserError as error:
            said.append(str(error))
    assert [text.split(" and saved")[0] for text in said] == [
        "stopped after 1 of 4 updates of sft", "stopped after 1 of 4 updates of sup",
        "stopped after 1 of 8 batches", "stopped after 1 of 4 updates of latent"]
    assert all("--resume" in text for text in said)
    for name in LOOPS:
        assert same(load(whole / f"{name}.pt"), load(stopped / f"{name}.pt")), name
    values = [out / "latents" / "values.npy" for out in (whole, stopped)]
    assert values[0].read_bytes() == values[1].read_bytes()
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------- what a run must remember

def scores_fall(monkeypatch):
    """Every evaluation is worse than the one before: 0.8 after two updates, 0.6 after four."""
    original = common.Run.save

    def save(run, score, **figures):
        original(run, 1 - run.step / 10, **figures)

    monkeypatch.setattr(common.Run, "save", save)


def only_the_first_was_kept(whole, out):
    for name in LOOPS:
        best, state = load(out / f"{name}.pt"), load(out / f"{name}.state.pt")
        assert (best["step"], best["score"], state["step"], state["best"]) == (2, 0.8, 4, 0.8), name
        assert same(best["models"], load(whole / f"{name}.pt")["models"]), name
        assert not same(best["models"], state["models"]), name


@pytest.mark.parametrize("method, when, times", [
    ("save", right_after_a_save, 3),
    ("log", between_two_saves, 6),
])
def test_a_resumed_run_remembers_its_best_score(tmp_path, monkeypatch, method, when, times):
    """Where the score falls after the kill, the earlier and better model stays."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    scores_fall(monkeypatch)
    pipeline(whole)
    assert until_it_ends(killed, monkeypatch, method, when) == times
    only_the_first_was_kept(whole, whole)
    only_the_first_was_kept(whole, killed)


def test_a_stopped_run_remembers_its_best_score(tmp_path, monkeypatch):
    """The same after Ctrl-C, which saves the state between two evaluations."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    scores_fall(monkeypatch)
    pipeline(whole)
    original = common.Run.log

    def pressed_log(run, **figures):
        original(run, **figures)
        if run.step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(common.Run, "log", pressed_log)
    stops = 0
    for _ in range(9):
        try:
            pipeline(stopped, "--resume")
            break
        except data.UserError:
            stops += 1
    assert stops == 3
    only_the_first_was_kept(whole, stopped)


def test_a_new_warm_up_leaves_no_old_phase_1(tmp_path, monkeypatch):
    """Interrupted in the warm-up, a run that starts over does not go on with what was before."""
    longer = [*TINY, "--sft-steps", "6", "--out", str(tmp_path)]
    train_sup.main([*TINY, "--out", str(tmp_path)])
    with monkeypatch.context() as patch:
        press_once(patch, [])
        with pytest.raises(data.UserError, match="--resume in place of --overwrite"):
            train_sup.main([*longer, "--overwrite"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, "save", lambda run: run.name == "sft")
        train_sup.main([*longer, "--resume"])
    assert not list(tmp_path.glob("sup*.pt"))
    train_sup.main([*longer, "--resume"])
    warm_up = common.identity(load(tmp_path / "sft.pt")["models"]["llm"])
    assert load(tmp_path / "sup.pt")["config"]["initial_weights"] == warm_up
    another = load(tmp_path / "sft.pt")
    another["models"]["llm"]["wte.weight"] += 1
    torch.save(another, tmp_path / "sft.pt")
    with pytest.raises(data.UserError, match="sup.state.pt was made with initial_weights"):
        train_sup.main([*longer, "--resume"])


def test_phase_1_goes_on_behind_a_warm_up_without_updates(tmp_path, monkeypatch):
    command = [*TINY, "--sft-steps", "0", "--out", str(tmp_path), "--resume"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, "log", lambda run: run.name == "sup" and run.step == 3)
        train_sup.main(command)
    steps = []
    dies_after(monkeypatch, "log", lambda run: steps.append(run.step) or True)
    with pytest.raises(Killed):
        train_sup.main(command)
    assert steps == [3]  # the third update once more, as the state is that of the second


@pytest.mark.parametrize("flags, says", [
    (["--bag", "0.5"], "bag = 0.5, here it is 1.0"),
    (["--bag-steps", "2"], "bag_steps = 2, here it is 1"),
    (["--follow", "0"], "follow = 0.0, here it is 1.0"),
    (["--encoder-first", "1"], "encoder_first = 1, here it is 0"),
    (["--ltsum", "off"], "ltsum = off, here it is on"),
    (["--top-k", "5"], "top_k = 5, here it is 0"),
], ids=["bag", "bag-steps", "follow", "encoder-first", "ltsum", "top-k"])
def test_a_loop_checks_only_what_made_it(tmp_path, monkeypatch, flags, says):
    """Flags of ℓ_sup may change while only SFT is done, and not once ℓ_sup has begun."""
    command = [*TINY, "--out", str(tmp_path), "--resume"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, "save", lambda run: run.name == "sft" and run.step == 4)
        train_sup.main(command)
    explicit = (tmp_path / "sft.pt").read_bytes()
    assert not (tmp_path / "sup.state.pt").exists()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, "log", lambda run: run.name == "sup" and run.step == 3)
        train_sup.main([*command, *flags])
    begun = (tmp_path / "sup.state.pt").read_bytes()
    assert load(tmp_path / "sup.state.pt")["step"] == 2

    with pytest.raises(data.UserError, match=says):
        train_sup.main(command)
    assert (tmp_path / "sup.state.pt").read_bytes() == begun
    train_sup.main([*command, *flags])
    assert load(tmp_path / "sup.state.pt")["step"] == 4
    assert (tmp_path / "sft.pt").read_bytes() == explicit


@pytest.mark.parametrize("flags, says", [
    (["--as-told", "0.5"], "as_told = 0.9, here it is 0.5"),
    (["--lr", "0.1"], "lr = .*, here it is 0.1"),
], ids=["as-told", "lr"])
def test_a_loop_checks_all_that_made_it(tmp_path, monkeypatch, flags, says):
    """Flags of the warm-up may not change once it has begun."""
    command = [*TINY, "--out", str(tmp_path), "--resume"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dies_after(patch, "save", right_after_a_save)
        train_sup.main(command)
    with pytest.raises(data.UserError, match=says):
        train_sup.main([*command, *flags])
    train_sup.main(command)


def test_an_interrupted_store_is_finished_byte_for_byte(tmp_path, monkeypatch):
    pipeline(tmp_path)
    files = [tmp_path / "latents" / file for file in (*ARRAYS, "meta.json")]
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(compress, "SAVE_EVERY", 2)
    original, written = common.write, []

    def write(path, content):
        original(path, content)
        written.append(path)
        if path.name == "meta.json" and len(written) == 3:
            raise Killed

    monkeypatch.setattr(common, "write", write)
    with pytest.raises(Killed):
        compress.main(["--out", str(tmp_path), "--batch-size", "8", "--overwrite"])
    monkeypatch.setattr(common, "write", original)
    with pytest.raises(data.UserError, match="unfinished"):
        train_latent.main(["--out", str(tmp_path), "--steps", "1", "--overwrite"])
    compress.main(["--out", str(tmp_path), "--batch-size", "8", "--resume"])
    assert before == [file.read_bytes() for file in files]
