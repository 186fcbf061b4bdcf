"""What a user gets wrong: one clear sentence, exit status 1, no traceback, and nothing is lost."""
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import lab.sources
import train_latent
from conftest import FEW, LATENT, ROOT, TINY, pipeline, run_script
from lab.files import UserError, lock
from lab.setup import start

SAMPLE = ROOT / "tests" / "sample.jsonl"


def contents(folder):
    """{path: bytes} of all files but the lock."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "lock"}


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(script, flag, …, says=…): it stops with one sentence and changes no file."""
    def check(script, *flags, says):
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            start(lambda: run_script(script, *flags))
        sentence = stop.value.code
        if sentence == 2:  # argparse has printed it, below the usage
            sentence = capsys.readouterr().err.splitlines()[-1]
        assert says in sentence and "\n" not in sentence and "Traceback" not in sentence, sentence
        assert contents(tmp_path) == before
    return check


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """As `finished`, with another learning rate: each loop has learned something else."""
    out = tmp_path_factory.mktemp("other")
    pipeline(out, sup=["--lr", 0.1])
    run_script("train_sup", *TINY, "--lr", 0.1, "--baselines", "--baseline-steps", 6, "--out", out)
    return out


# ---------------------------------------------------------------------------------- flags and data

@pytest.mark.parametrize("flags, says", [
    (["--device", "tpu9000"], "--device tpu9000: "),
    (["--device", "cuda:99"], "--device cuda:99: "),
    (["--device", "meta"], "--device meta: "),
    (["--device", "hpu"], "--device hpu: "),
    (["--lr", "nan"], "--lr nan: must be a number from 0.0 up"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--chunk-size", "two"], "argument --chunk-size: invalid int value: 'two'"),
    (["--block-size", 5], "no problem is left: all 64 are longer than --block-size 5"),
    (["--baselines"], "sft.pt: no such file; run train_sup.py first, with the same --out"),
    (["--init", "nowhere.pt"], "nowhere.pt: no such file"),  # says so before it looks at others
    (["--init", ROOT / "README.md"], "README.md: not a file of this project"),
    (["--data", "gsm9k"], "--data gsm9k: not toy, easy, gsm8k or gsm8k-aug, and no such file"),
    (["--data", "gsm8k-aug", "--data-dir", "nowhere"], "nowhere/train.txt: no such file"),
])
def test_a_flag_that_makes_no_sense(tmp_path, refused, flags, says):
    refused("train_sup", *TINY, "--out", tmp_path / "run", *flags, says=says)


def test_gsm8k_on_a_cpu_takes_a_size_of_ones_own(tmp_path, refused):
    flags = ["--data", "gsm8k", "--device", "cpu", "--data-dir", tmp_path, "--out", tmp_path]
    refused("train_sup", *flags, says="minutes on a GPU and days on a CPU; take --data easy")
    (tmp_path / "train.jsonl").write_text("{}")
    for size in ["--n-layer", 2], ["--n-embd", 96]:
        refused("train_sup", *flags, *size, says="train.jsonl: not GSM8K as published")


def test_a_question_that_is_too_long(copy, refused, capsys):
    refused("analyze", "--out", copy, "--ask", "Why? " * 200, says="ask a shorter one")
    run_script("analyze", "--out", copy, "--ask", "What is <eot> #### 5 <|endoftext|>?")
    assert "z_0" in capsys.readouterr().out  # the words of a control token are data


# ---------------------------------------------------------------------------------- what is missing

@pytest.mark.parametrize("gone, script, flags, says", [
    ("sup.pt", "compress", [], "sup.pt: no such file; run train_sup.py first"),
    ("sup.pt", "train_latent", [], "sup.pt: no such file; run train_sup.py first"),
    ("sup.pt", "analyze", [], "sup.pt: no such file; run train_sup.py first"),
    ("latents.pt", "train_latent", [], "latents.pt: no such file; run compress.py first"),
    ("latent.pt", "analyze", [], "latent.pt: no such file; run train_latent.py first"),
    ("latent.pt", "train_sup", [*TINY, "--baselines", "--overwrite"], "run train_latent.py first"),
    ("sft.pt", "train_sup", [*TINY, "--resume"], "sft.pt: no such file; run train_sup.py first"),
    ("latent.state.pt", "train_latent", ["--resume"], "without it latent.pt cannot be trained on"),
    (None, "train_sup", TINY, "already holds a run (sft.pt); go on with --resume"),
    (None, "train_sup", [*TINY, "--baselines"], "already holds a run (explicit.pt)"),
    (None, "compress", [], "already holds a store; start over with --overwrite"),
    (None, "train_latent", LATENT, "already holds a run (latent.pt)"),
    (None, "analyze", ["--split", "renumbered"], "the toy task's test problems are new already"),
    (None, "train_sup", [*TINY, "--baselines", "--seed", 1], "sft.pt was made with seed = 0"),
])
def test_a_phase_before_its_time_or_once_more(copy, refused, gone, script, flags, says):
    if gone:
        (copy / gone).unlink()
    refused(script, "--out", copy, *flags, says=says)


# ------------------------------------------------------------------------ what is of something else

SUP, AGAIN = [*TINY, "--resume"], "; make it again with: python "


@pytest.mark.parametrize("file, script, flags, says", [
    ("sft.pt", "train_sup", SUP, "sft.pt was made with lr = 0.1, here it is 0.004"),
    ("sft.state.pt", "train_sup", SUP, "sft.state.pt was made with lr = 0.1, here it is 0.004"),
    ("sft.pt", "train_sup", [*TINY, "--baselines", "--overwrite"], "lr = 0.1, here it is 0.004"),
    ("sft.pt", "analyze", [],
     "sft.pt is not the one that the files beside it were made of" + AGAIN + "train_sup.py"),
    ("sup.pt", "train_latent", ["--overwrite"],
     "latents.pt belongs to another sup than the one beside it" + AGAIN + "compress.py"),
    ("sup.pt", "compress", ["--resume"], "latents.pt belongs to another sup"),
    ("sup.pt", "analyze", [], "latent.pt belongs to another sup"),
    ("sup.pt", "analyze", ["--ask", "1 + 1?"], "latent.pt belongs to another sup"),
    ("latents.pt", "train_latent", ["--overwrite"], "latents.pt belongs to another sup"),
    ("latents.pt", "compress", ["--resume"], "latents.pt belongs to another sup"),
    ("latent.pt", "analyze", [], "latent.pt belongs to another sup"),
    ("latent.state.pt", "train_latent", [*LATENT, "--resume"],
     "latent.state.pt started from other weights" + AGAIN + "train_latent.py"),
    ("explicit.pt", "analyze", [], "explicit.pt belongs to another sft"),
])
def test_files_of_two_runs_are_not_mixed(copy, other, refused, file, script, flags, says):
    shutil.copy(other / file, copy / file)
    refused(script, "--out", copy, *flags, says=says)


@pytest.mark.parametrize("file, field, script, flags, says", [
    ("sup.state.pt", "sft", "train_sup", SUP, "belongs to another sft than the one beside it"),
    ("latent.state.pt", "latents", "train_latent", [*LATENT, "--resume"],
     "belongs to another latents than"),
    ("explicit.state.pt", "sft", "train_sup",
     [*SUP, "--baselines", "--baseline-steps", 6], "belongs to another sft than"),
    ("no_cot.pt", "start", "analyze", [],
     "started from other weights" + AGAIN + "train_sup.py --baselines"),
    ("no_cot.pt", "seed", "analyze", [], "was made with seed = another, here it is 0"),
])
def test_a_file_that_says_it_is_of_another_run(copy, refused, file, field, script, flags, says):
    edit(copy / file, **{field: "another"})
    refused(script, "--out", copy, *flags, says=f"{file} {says}")


@pytest.mark.parametrize("script, flags, file", [
    ("train_sup", SUP, "sft.state.pt"),
    ("train_sup", [*TINY, "--baselines", "--overwrite"], "sft.pt"),
    ("compress", ["--overwrite"], "sup.pt"),
    ("train_latent", ["--overwrite"], "latents.pt"),
    ("analyze", [], "latent.pt"),
])
def test_no_phase_goes_on_with_other_problems(copy, refused, monkeypatch, script, flags, file):
    monkeypatch.setattr(lab.sources, "TOY_SIZE", {**FEW, "train": 60})
    refused(script, "--out", copy, *flags, says=f"{file} was made of other problems than there are")


def test_no_model_goes_on_with_other_tokens(copy, refused, gpt2_tokenizer):
    flags = [*TINY[6:], "--data", SAMPLE, "--init", copy / "sft.pt", "--out", copy / "new"]
    refused("train_sup", *flags, says="sft.pt reads other tokens than --data")


# ------------------------------------------------------------------------------- what is damaged

class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


def edit(path, **changes):
    """Change what a checkpoint says of itself, its settings and what it was made of."""
    saved = torch.load(path, weights_only=True)
    for part in saved, saved["settings"], saved["made_of"]:
        part.update({key: value for key, value in changes.items() if key in part})
    torch.save(saved, path)


@pytest.mark.parametrize("spoil, says", [
    (lambda path: path.write_bytes(b""), "not a file of this project (EOFError); make it again"),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "not a file of this project"),
    (lambda path: path.write_bytes(pickle.dumps(Malice(), 2)), "not a file of this project"),
    (lambda path: torch.save({"models": Malice()}, path), "not a file of this project"),
    (lambda path: torch.save([1], path), "not a file of this project"),
    (lambda path: torch.save({"model": {}}, path), "not a file of this project (KeyError)"),
    (lambda path: edit(path, version=2), "of version 2 of this project, not 4; make it again with"),
], ids=["empty", "cut", "pickle", "pickle in it", "a list", "another project's", "old"])
def test_a_broken_or_malicious_checkpoint(copy, refused, monkeypatch, spoil, says):
    monkeypatch.chdir(copy)
    spoil(copy / "latents.pt")
    refused("train_latent", "--out", copy, "--overwrite", says="latents.pt: " + says)
    spoil(copy / "sup.pt")
    refused("compress", "--out", copy, "--overwrite", says=f"{copy / 'sup.pt'}: {says}")
    refused("train_sup", "--init", copy / "sup.pt", "--out", copy / "new", says="sup.pt: " + says)
    assert not (copy / "malice").exists()


# ---------------------------------------------------------------------------- what goes wrong in it

def no_number(llm, *_):
    return 2 * [llm.wte.weight.sum() * torch.nan]


def no_slope(llm, *_):
    """0, and a gradient that is no number."""
    return 2 * [(llm.wte.weight.sum() * 0).sqrt()]


@pytest.mark.parametrize("loss, says", [(no_number, "loss = nan"), (no_slope, "norm = nan")])
def test_a_loss_that_is_no_number_replaces_no_model(copy, call, monkeypatch, loss, says):
    before = contents(copy)
    monkeypatch.setattr(train_latent, "latent_loss", loss)
    with pytest.raises(UserError, match=rf"latent went astray after 1 updates \(.*{says}.*\); what "
                                        "was saved before stays.* smaller --lr than 0.004"):
        call("train_latent", *LATENT, "--overwrite", "--out", copy)
    after = contents(copy)
    changed = {path.name for path in before if after.get(path) != before[path]}
    assert changed == {"latent.state.pt", "latent.jsonl"}  # those of the run that went astray


@pytest.mark.parametrize("fault", [
    lambda: torch.empty(2 ** 60),
    lambda: np.empty(2 ** 57),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")),
], ids=["torch", "numpy", "a GPU"])
def test_too_little_memory_is_one_sentence(fault):
    with pytest.raises(UserError, match="not enough memory; choose a smaller --batch-size or"):
        start(fault)


def test_a_fault_of_ours_is_not_hidden():
    with pytest.raises(RuntimeError, match="must match the size"):
        start(lambda: torch.zeros(2) + torch.zeros(3))


@pytest.mark.parametrize("script, flags", [
    ("train_sup", TINY), ("compress", []), ("train_latent", LATENT)])
def test_a_full_disk_leaves_what_was_there(copy, script, flags):
    """While no file may be larger than 16 kB, which the system refuses as it does a full disk."""
    resource = pytest.importorskip("resource")
    before = contents(copy)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        with pytest.raises((UserError, RuntimeError)):
            start(lambda: run_script(script, "--out", copy, *flags, "--overwrite"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    after = contents(copy)
    assert before == {path: after[path] for path in before}


def test_an_output_folder_that_cannot_be(tmp_path, refused):
    (tmp_path / "a file").write_text("")
    refused("train_sup", *TINY, "--out", tmp_path / "a file" / "run", says="run: Not a directory")


def test_another_process_in_the_folder(copy):
    """In a process of its own, as a user sees it."""
    pytest.importorskip("fcntl")
    before, held = contents(copy), lock(copy)
    command = [sys.executable, "compress.py", "--overwrite", "--out", str(copy)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and contents(copy) == before
    assert done.stderr == (f"another process writes to {copy}; wait for its end, or choose another "
                           "--out\n")
    held.close()
