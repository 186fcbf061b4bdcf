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

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8", "--sft-steps", "4", "--eval-every", "2"]


class Killed(BaseException):
    """As sudden as a signal: nothing in the project catches it."""


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", {"train": 64, "val": 8, "test": 8})


def pipeline(out, *flags):
    train_sup.main([*TINY, "--steps", "4", "--out", str(out), *flags])
    compress.main(["--out", str(out), "--batch-size", "8", *flags])
    train_latent.main(["--out", str(out), "--steps", "4", "--eval-every", "2", "--batch-size", "8", *flags])


def until_it_ends(out, monkeypatch, cls, method, when):
    """Run the pipeline, dying each time `method` meets `when`, until it gets through; how often it died."""
    original, died = getattr(cls, method), []

    def dying(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if (self.name, self.step) not in died and when(self):
            died.append((self.name, self.step))
            raise Killed
        return result

    monkeypatch.setattr(cls, method, dying)
    for _ in range(99):
        try:
            pipeline(out, "--resume")
            break
        except Killed:
            pass
    monkeypatch.undo()
    return died


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("out", "resume"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("method, when, times", [
    ("keep", lambda run: run.step == 2, 3),         # right after a save
    ("update", lambda run: run.step in (1, 3), 6),  # between two saves: what was not saved happens again
])
def test_a_killed_run_ends_as_one_that_never_was(tmp_path, monkeypatch, method, when, times):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    pipeline(whole)
    assert len(until_it_ends(killed, monkeypatch, common.Run, method, when)) == times
    for name in ("sft", "sup", "latent"):
        for file in (f"{name}.pt", f"{name}.state.pt"):
            assert same(*(torch.load(out / file, weights_only=True) for out in (whole, killed))), file
        logs = [[{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in open(out / f"{name}.jsonl")]
                for out in (whole, killed)]
        assert logs[0] == logs[1]
    for file in ("values.npy", "ids.npy", "offsets.npy"):
        assert (whole / "latents" / file).read_bytes() == (killed / "latents" / file).read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    """Every loop is interrupted once, between two saves, by the signal itself; gone on with, it ends as if it had not been."""
    whole, stopped, said = tmp_path / "whole", tmp_path / "stopped", []
    before = signal.getsignal(signal.SIGINT)  # a shell that puts the tests in the background has it ignored
    pipeline(whole)
    update, summarize, met = common.Run.update, compress.summarize, set()

    def press(name):
        if name not in met:
            met.add(name)
            signal.raise_signal(signal.SIGINT)

    def pressed_update(run, *args):
        update(run, *args)
        if run.step == 1:
            press(run.name)

    def pressed_summarize(*args):
        press("compress")
        return summarize(*args)

    monkeypatch.setattr(common.Run, "update", pressed_update)
    monkeypatch.setattr(compress, "summarize", pressed_summarize)
    for _ in range(9):
        try:
            pipeline(stopped, "--resume")
            break
        except data.UserError as error:
            said.append(str(error))
    assert [text.split(" and saved")[0] for text in said] == [
        "stopped after 1 of 4 updates of sft", "stopped after 1 of 4 updates of sup", "stopped after 1 of 8 batches",
        "stopped after 1 of 4 updates of latent"] and all("--resume" in text for text in said)
    for name in ("sft.pt", "sup.pt", "latent.pt"):
        assert same(*(torch.load(out / name, weights_only=True) for out in (whole, stopped))), name
    assert (whole / "latents" / "values.npy").read_bytes() == (stopped / "latents" / "values.npy").read_bytes()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupted_store_is_finished_byte_for_byte(tmp_path, monkeypatch):
    pipeline(tmp_path)
    before = {f: (tmp_path / "latents" / f).read_bytes() for f in ("values.npy", "ids.npy", "offsets.npy", "meta.json")}
    monkeypatch.setattr(compress, "SAVE_EVERY", 2)
    original, calls = common.write, []

    def write(path, content):
        original(path, content)
        calls.append(path)
        if path.name == "meta.json" and len(calls) == 3:
            raise Killed

    monkeypatch.setattr(common, "write", write)
    with pytest.raises(Killed):
        compress.main(["--out", str(tmp_path), "--batch-size", "8", "--overwrite"])
    monkeypatch.setattr(common, "write", original)
    with pytest.raises(data.UserError, match="unfinished"):
        train_latent.main(["--out", str(tmp_path), "--steps", "1", "--overwrite"])
    compress.main(["--out", str(tmp_path), "--batch-size", "8", "--resume"])
    assert before == {f: (tmp_path / "latents" / f).read_bytes() for f in before}
