"""What a user gets wrong: one clear sentence on stderr, an exit code that is not 0, no traceback, no file changed."""
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import analyze
import common
import compress
import data
import train_latent
import train_sup
from conftest import ROOT

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8", "--sft-steps", "1", "--steps", "1"]
GOOD = '{"question": "What is 1 + 1?", "answer": "<<1+1=2>>\\n#### 2"}'
MAIN = {"train_sup": train_sup, "compress": compress, "train_latent": train_latent, "analyze": analyze}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", {"train": 32, "val": 8, "test": 8})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all phases are done."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY_SIZE", {"train": 32, "val": 8, "test": 8})
        train_sup.main([*TINY, "--out", str(out)])
        compress.main(["--out", str(out)])
        train_latent.main(["--out", str(out), "--steps", "1"])
    return out


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(script, flags, folder, says, capsys):
    """The script stops on these flags with one sentence that says so, and leaves the folder as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit) as stop:
        MAIN[script].main([str(flag) for flag in flags])
    sentence = str(stop.value) if isinstance(stop.value.code, str) else capsys.readouterr().err  # argparse prints its own
    assert stop.value.code not in (0, None) and says in sentence and "Traceback" not in sentence, sentence
    assert not isinstance(stop.value.code, str) or "\n" not in sentence.strip()
    assert contents(folder) == before


# ---------------------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("content, says", [
    (b"", "no problems in it"),
    (b"\n \n\n", "no problems in it"),
    (GOOD.encode()[:40], "line 1: expected a JSON object"),
    (GOOD.encode() + b"\n" + GOOD.encode()[:-1], "line 2: expected a JSON object"),
    (b"\x00\x01\x02", "line 1: expected a JSON object"),
    (b"\x89PNG\r\n\x1a\n", "not UTF-8"),
    (GOOD.encode("utf-16"), "not UTF-8"),
    (GOOD.replace("What", "Wh\xe4t").encode("latin-1"), "not UTF-8"),
    (b"[1, 2]", "line 1: expected a JSON object with the texts"),
    (b"null", "line 1: expected a JSON object with the texts"),
    (b"7", "line 1: expected a JSON object with the texts"),
    (b"[" * 90_000, "line 1: expected a JSON object"),
    (b'{"question": "a", "question": "b", "answer": "#### 1"}', "line 1: a key stands twice"),
    (b'{"question": "a"}', "line 1: expected a JSON object with the texts"),
    (b'{"question": "a", "answer": 5}', "line 1: expected a JSON object with the texts"),
    (b'{"question": " ", "answer": "#### 5"}', "line 1: the question is empty"),
    (b'{"question": "a", "answer": "it is 5"}', "line 1: expected a number after '####'"),
    (b'{"question": "a", "answer": "5 ####"}', "line 1: expected a number after '####'"),
    (b'{"question": "a", "answer": "#### five"}', "line 1: expected a number after '####'"),
    (b'{"question": "a", "answer": "#### 1/0"}', "line 1: expected a number after '####'"),
    (json.dumps({"question": "a" * 200_000, "answer": "#### 1"}).encode(), "line 1: 200"),
])
def test_a_malformed_file(tmp_path, content, says):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(data.UserError) as stop:
        data.load(str(file), "train")
    assert str(file) in str(stop.value) and says in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD.encode(), GOOD.encode() + b"\r\n", b"\n\n" + GOOD.encode()])
def test_a_byte_order_mark_crlf_and_blank_lines_are_nothing(tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    row, = data.read(tmp_path / "mine.jsonl", data.parse_gsm8k, "steps")
    assert row == {"question": "What is 1 + 1?", "chain": "<<1+1=2>>", "answer": "2"}


# ---------------------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("flags, says", [
    (["--chunk-size", 0], "--chunk-size 0"), (["--chunk-size", -2], "--chunk-size -2"),
    (["--chunk-size", "two"], "invalid int value"), (["--batch-size", 0], "--batch-size 0"),
    (["--steps", -1], "--steps -1"), (["--sft-steps", -5], "--sft-steps -5"), (["--seed", -1], "--seed -1"),
    (["--top-k", -1], "--top-k -1"), (["--lr", "nan"], "--lr nan"), (["--lr", -1], "--lr -1"), (["--bag", "inf"], "--bag inf"),
    (["--eval-every", 0], "--eval-every 0"), (["--n-layer", 0], "--n-layer 0"), (["--block-size", 5], "no problem is left"),
    (["--n-embd", 16, "--n-head", 3], "multiple of --n-head"), (["--device", "tpu9000"], "--device tpu9000"),
    (["--device", "cuda:99"], "--device cuda:99"), (["--dtype", "float8"], "invalid choice"), (["--data", "gsm9k"], "gsm9k"),
    (["--data", "gsm8k-aug", "--data-dir", "/nowhere"], "no such file"), (["--nonsense"], "unrecognized arguments"),
    (["--resume", "--overwrite"], "not allowed with"), (["--init", "nowhere.pt"], "a shape of its own"), (["--seed", 2 ** 70], "--seed"),
    (["--cot", "poem"], "invalid choice"),
])
def test_a_flag_that_makes_no_sense(tmp_path, flags, says, capsys, request):
    if "--data" in flags:
        request.getfixturevalue("gpt2_tokenizer")  # anything but the toy task is read with it
    refused("train_sup", [*TINY, "--out", tmp_path / "run", *flags], tmp_path, says, capsys)


@pytest.mark.parametrize("init, says", [("nowhere.pt", "nowhere.pt: no such file"), ("gpt2", "add --data gsm8k")])
def test_an_init_that_cannot_be(tmp_path, init, says, capsys):
    refused("train_sup", ["--init", init, "--out", tmp_path / "run"], tmp_path, says, capsys)


def test_a_folder_without_its_test_split_is_refused_before_training(tmp_path, capsys, gpt2_tokenizer):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>> #### {i + 1}"})
                                                    for i in range(60)))
    refused("train_sup", [*TINY, "--data", tmp_path, "--out", tmp_path / "run"], tmp_path, "test.jsonl: no such file", capsys)


def test_top_k_beyond_the_vocabulary_is_all_of_it(tmp_path):
    train_sup.main([*TINY, "--out", str(tmp_path)])
    compress.main(["--out", str(tmp_path), "--top-k", "99999"])
    assert np.load(tmp_path / "latents" / "ids.npy").shape[1] == data.Tokenizer("toy").n_ordinary


# -------------------------------------------------------------------------------------------- folders and phases

@pytest.mark.parametrize("script, flags, says", [
    ("train_sup", TINY, "already holds a run"), ("compress", [], "already holds a store"),
    ("train_latent", ["--steps", 1], "already holds a run"),
    ("compress", ["--chunk-size", 4, "--overwrite"], "--chunk-size 4 contradicts"),
    ("train_latent", ["--data", "gsm8k", "--overwrite"], "--data gsm8k contradicts"),
    ("train_latent", ["--noise", -1, "--overwrite"], "--noise -1"),
    ("train_sup", [*TINY, "--batch-size", 4, "--resume"], "batch_size = 8, here it is 4"),
    ("train_sup", [*TINY, "--bag", 0.5, "--resume"], "bag = 1.0, here it is 0.5"),
    ("train_latent", ["--noise", 1, "--steps", 1, "--resume"], "noise = 0.25, here it is 1"),
    ("compress", ["--batch-size", 4, "--resume"], "batch_size = "), ("analyze", ["--limit", 0], "--limit 0"),
    ("train_latent", ["--seed", 1, "--overwrite"], "contradicts"),
    ("train_latent", ["--top-k", 7, "--steps", 1, "--overwrite"], "top_k = 50, here it is 7"),
])
def test_a_folder_that_holds_something_else(finished, script, flags, says, capsys):
    refused(script, ["--out", finished, *flags], finished, says, capsys)


def test_the_baseline_deletes_nothing_of_phase_1(copy):
    (copy / "sft.pt").unlink()
    before = (copy / "sup.pt").read_bytes()
    train_sup.main([*TINY, "--no-cot", "--overwrite", "--out", str(copy)])
    assert (copy / "sup.pt").read_bytes() == before


@pytest.mark.parametrize("script, says", [("compress", "train_sup.py"), ("train_latent", "train_sup.py"), ("analyze", "train_sup.py")])
def test_a_phase_before_its_time(tmp_path, script, says, capsys):
    refused(script, ["--out", tmp_path / "run"], tmp_path, says, capsys)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


class Malice:
    def __reduce__(self):
        return os.system, ("touch malice",)


@pytest.mark.parametrize("spoil, says", [
    (lambda f: f.write_bytes(b""), "not a checkpoint"),
    (lambda f: f.write_bytes(f.read_bytes()[:1000]), "not a checkpoint"),
    (lambda f: f.write_bytes(pickle.dumps(Malice(), 2)), "not a checkpoint"),
    (lambda f: torch.save({"models": Malice()}, f), "not a checkpoint"),
    (lambda f: torch.save({"hello": 1}, f), "not a checkpoint"),
    (lambda f: f.unlink(), "no such file"),
])
def test_a_broken_or_malicious_checkpoint(copy, spoil, says, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    spoil(copy / "sup.pt")
    refused("compress", ["--out", copy, "--overwrite"], copy, says, capsys)
    assert not (copy / "malice").exists()


@pytest.mark.parametrize("spoil, says", [
    (lambda d: (d / "meta.json").write_text("{"), "cannot be read"),
    (lambda d: (d / "meta.json").write_text("7"), "cannot be read"),
    (lambda d: (d / "meta.json").unlink(), "cannot be read"),
    (lambda d: (d / "values.npy").write_bytes(b"\x93NUMPY"), "cannot be read"),
    (lambda d: np.save(d / "ids.npy", np.array([Malice()]), allow_pickle=True), "cannot be read"),
    (lambda d: edit(d / "meta.json", tokenizer="gpt2"), "tokenizer = gpt2, here it is toy"),
    (lambda d: edit(d / "meta.json", encoder="0" * 16), "encoder = 0000"),
    (lambda d: edit(d / "meta.json", fingerprint="x"), "fingerprint = x"),
    (lambda d: edit(d / "meta.json", complete=False), "unfinished"),
])
def test_a_store_that_does_not_fit(copy, spoil, says, capsys):
    spoil(copy / "latents")
    refused("train_latent", ["--out", copy, "--steps", 1, "--overwrite"], copy, says, capsys)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_loss_that_is_no_number_saves_nothing(copy, capsys):
    before = (copy / "latent.state.pt").read_bytes(), (copy / "latent.pt").read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(data.UserError, match="loss of latent is nan at step 1"):
        patch.setattr(train_latent, "latent_kl", lambda *_: torch.tensor(float("nan"), requires_grad=True))
        train_latent.main(["--out", str(copy), "--steps", "3", "--resume"])
    assert before == ((copy / "latent.state.pt").read_bytes(), (copy / "latent.pt").read_bytes())


def test_a_damaged_log_does_not_stop_a_run(copy):
    log = copy / "latent.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 1, "lo' + b"\n\xff\x00\n")
    train_latent.main(["--out", str(copy), "--steps", "1", "--resume"])
    assert log.read_bytes() == whole


def test_a_full_disk_is_one_sentence(copy):
    """Files of at most 32 kB, as a process of its own would meet a full disk; the run before is untouched."""
    limit = ("import resource, signal, runpy, sys, data; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
             "resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768)); data.TOY_SIZE.update(train=32, val=8, test=8);"
             "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')")
    before = contents(copy)
    done = subprocess.run([sys.executable, "-c", limit, str(ROOT / "train_latent.py"), "--out", str(copy), "--steps", "2",
                           "--resume"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "could not write" in done.stderr and "Traceback" not in done.stderr, done.stderr
    after = contents(copy)
    assert {p: c for p, c in after.items() if p.suffix != ".jsonl"} == {p: c for p, c in before.items() if p.suffix != ".jsonl"}


def test_the_words_of_a_control_token_are_data(finished):
    """A question that says <eot> ends no thought: no special id comes out of it."""
    t = data.Tokenizer("toy")
    for text in t.SPECIAL:
        assert max(t.encode(f"What is {text} 1 {text}?")) < t.n_ordinary
    analyze.main(["--out", str(finished), "--ask", "What is <eot> #### 5 <|endoftext|>?"])
