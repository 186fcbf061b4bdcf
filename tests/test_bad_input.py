"""What a user gets wrong: one clear sentence, exit status not 0, no traceback, no file changed."""
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
import optim
import train_latent
import train_sup
from conftest import ROOT

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8",
        "--sft-steps", "1", "--steps", "1", "--bag-steps", "0"]
FEW = {"train": 32, "val": 8, "test": 8}
SAMPLE = ROOT / "tests" / "sample.jsonl"
GOOD = '{"question": "What is 1 + 1?", "answer": "<<1+1=2>>\\n#### 2"}'
SCRIPTS = {"train_sup": train_sup, "compress": compress, "train_latent": train_latent,
           "analyze": analyze}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", FEW)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which all phases are done."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOY_SIZE", FEW)
        train_sup.main([*TINY, "--out", str(out)])
        compress.main(["--out", str(out)])
        train_latent.main(["--out", str(out), "--steps", "1"])
    return out


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(script, flags, folder, says, capsys):
    """The script stops on these flags, says so in one sentence, and leaves the folder as it was."""
    before = contents(folder)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main([str(flag) for flag in flags])
    code = stop.value.code
    if isinstance(code, str):
        sentence = code
        assert "\n" not in sentence.strip()
    else:  # argparse prints its own, below the usage
        sentence = capsys.readouterr().err
    assert code not in (0, None)
    assert says in sentence and "Traceback" not in sentence, sentence
    assert contents(folder) == before


# -------------------------------------------------------------------------------------------- files

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
    (b'{"question": "a", "answer": "it is 5"}', "line 1: expected one number after '####'"),
    (b'{"question": "a", "answer": "5 ####"}', "line 1: expected one number after '####'"),
    (b'{"question": "a", "answer": "#### five"}', "line 1: expected one number after '####'"),
    (b'{"question": "a", "answer": "#### 5 or 6"}', "line 1: expected one number after '####'"),
    (b'{"question": "a", "answer": "#### 1/0"}', "line 1: expected one number after '####'"),
    (json.dumps({"question": "a" * 200_000, "answer": "#### 1"}).encode(), "line 1: 200"),
])
def test_a_malformed_file(tmp_path, content, says):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content)
    with pytest.raises(data.UserError) as stop:
        data.load(str(file), "train")
    assert str(file) in str(stop.value) and says in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + GOOD.encode(),
    GOOD.encode() + b"\r\n",
    b"\n\n" + GOOD.encode(),
])
def test_a_byte_order_mark_crlf_and_blank_lines_are_nothing(tmp_path, content):
    (tmp_path / "mine.jsonl").write_bytes(content)
    row, = data.read(tmp_path / "mine.jsonl", data.parse_gsm8k, "steps")
    assert row == {"question": "What is 1 + 1?", "chain": "<<1+1=2>>", "answer": "2"}


# -------------------------------------------------------------------------------------------- flags

@pytest.mark.parametrize("flags, says", [
    (["--chunk-size", 0], "--chunk-size 0"),
    (["--chunk-size", -2], "--chunk-size -2"),
    (["--chunk-size", "two"], "invalid int value"),
    (["--batch-size", 0], "--batch-size 0"),
    (["--steps", -1], "--steps -1"),
    (["--sft-steps", -5], "--sft-steps -5"),
    (["--baseline-steps", -1], "--baseline-steps -1"),
    (["--baselines"], "sft.pt: no such file; run train_sup.py first"),
    (["--as-told", 1.5], "--as-told 1.5"),
    (["--as-told", -0.5], "--as-told -0.5"),
    (["--follow", -1], "--follow -1"),
    (["--bag-steps", -1], "--bag-steps -1"),
    (["--as-told", 2], "--as-told 2"),
    (["--renumber", 3], "--renumber"),
    (["--easy", 3], "--easy"),
    (["--easy", -3, "--data", SAMPLE], "--easy -3"),
    (["--easy", 99, "--data", SAMPLE], "--easy 99: only 4 of the training problems"),
    (["--seed", -1], "--seed -1"),
    (["--top-k", -1], "--top-k -1"),
    (["--lr", "nan"], "--lr nan"),
    (["--lr", -1], "--lr -1"),
    (["--bag", "inf"], "--bag inf"),
    (["--eval-every", 0], "--eval-every 0"),
    (["--n-layer", 0], "--n-layer 0"),
    (["--block-size", 5], "no problem is left"),
    (["--n-embd", 16, "--n-head", 3], "multiple of --n-head"),
    (["--device", "tpu9000"], "--device tpu9000"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "meta"], "--device meta"),
    (["--device", "hpu"], "--device hpu"),
    (["--steps", 3, "--bag-steps", 3], "--steps 3: the first --bag-steps 3"),
    (["--dtype", "float8"], "invalid choice"),
    (["--data", "gsm9k"], "gsm9k"),
    (["--data", "gsm8k-aug", "--data-dir", "/nowhere"], "no such file"),
    (["--nonsense"], "unrecognized arguments"),
    (["--resume", "--overwrite"], "not allowed with"),
    (["--init", "nowhere.pt"], "a shape of its own"),
    (["--seed", 2 ** 70], "from 0 up, below 2 to the 63"),
    (["--latents", "hidden", "--top-k", 5], "a hidden state has no entries"),
    (["--cot", "poem"], "invalid choice"),
])
def test_a_flag_that_makes_no_sense(tmp_path, flags, says, capsys, request):
    if "--data" in flags:
        request.getfixturevalue("gpt2_tokenizer")  # anything but the toy task is read with it
    refused("train_sup", [*TINY, "--out", tmp_path / "run", *flags], tmp_path, says, capsys)


@pytest.mark.parametrize("init, says", [
    ("nowhere.pt", "nowhere.pt: no such file"),
    ("gpt2", "add --data gsm8k"),
])
def test_an_init_that_cannot_be(tmp_path, init, says, capsys):
    refused("train_sup", ["--init", init, "--out", tmp_path / "run"], tmp_path, says, capsys)


def test_an_init_of_another_project(tmp_path, capsys, gpt2_tokenizer):
    for number, config in enumerate([{"dataset": "x"}, 5]):
        torch.save({"model": {}, "config": config}, tmp_path / f"{number}.pt")
        says = "not a checkpoint of this project" if number else "tokenizer"
        for flags in [], ["--data", SAMPLE]:
            flags = [*TINY[6:], *flags, "--init", tmp_path / f"{number}.pt"]
            refused("train_sup", [*flags, "--out", tmp_path / "run"], tmp_path, says, capsys)


def test_a_folder_without_its_test_split_is_refused_before_training(
        tmp_path, capsys, gpt2_tokenizer):
    rows = [{"question": f"What is {i} + 1?", "answer": f"<<{i}+1={i + 1}>> #### {i + 1}"}
            for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [*TINY, "--data", tmp_path, "--out", tmp_path / "run"]
    refused("train_sup", flags, tmp_path, "test.jsonl: no such file", capsys)


@pytest.mark.parametrize("top_k", ["99999", "0"])
def test_top_k_beyond_the_vocabulary_is_all_of_it(tmp_path, top_k):
    """Phase 3 takes the same flag for the same store."""
    train_sup.main([*TINY, "--out", str(tmp_path)])
    compress.main(["--out", str(tmp_path), "--top-k", top_k])
    assert np.load(tmp_path / "latents" / "ids.npy").shape[1] == data.Tokenizer("toy").n_ordinary
    train_latent.main(["--out", str(tmp_path), "--top-k", top_k, "--steps", "1"])


# ------------------------------------------------------------------------------- folders and phases

@pytest.mark.parametrize("script, flags, says", [
    ("train_sup", TINY, "already holds a run"),
    ("compress", [], "already holds a store"),
    ("train_latent", ["--steps", 1], "already holds a run"),
    ("compress", ["--chunk-size", 4, "--overwrite"], "--chunk-size 4 contradicts"),
    ("train_latent", ["--data", "gsm8k", "--overwrite"], "--data gsm8k contradicts"),
    ("train_latent", ["--noise", -1, "--overwrite"], "--noise -1"),
    ("train_sup", [*TINY, "--batch-size", 4, "--resume"], "batch_size = 8, here it is 4"),
    ("train_sup", [*TINY, "--bag", 0.5, "--resume"], "bag = 1.0, here it is 0.5"),
    ("train_sup", [*TINY, "--baselines", "--seed", 1], "sft.pt was made with"),
    ("train_sup", [*TINY, "--baselines", "--as-told", 0.5], "sft.pt was made with"),
    ("train_sup", [*TINY, "--baselines", "--n-layer", 2], "n_layer = 1, here it is 2"),
    ("train_sup", [*TINY, "--baselines", "--lr", 0.5], "here it is 0.5"),
    ("train_latent", ["--noise", 1, "--steps", 1, "--resume"], "noise = 0.1, here it is 1"),
    ("train_latent", ["--steps", 2, "--resume"], "updates = 1, here it is 2"),
    ("train_latent", ["--steps", 1, "--dtype", "bfloat16", "--resume"], "dtype = float32, here"),
    ("analyze", ["--split", "renumbered"], "test problems are new already"),
    ("compress", ["--batch-size", 4, "--resume"], "batch_size = "),
    ("analyze", ["--limit", 0], "--limit 0"),
    ("train_latent", ["--seed", 1, "--overwrite"], "contradicts"),
    ("train_latent", ["--top-k", 7, "--steps", 1, "--overwrite"], "top_k = 50, here it is 7"),
])
def test_a_folder_that_holds_something_else(finished, script, flags, says, capsys):
    refused(script, ["--out", finished, *flags], finished, says, capsys)


def test_the_baselines_change_nothing_of_the_phases(copy):
    """Neither new ones nor, with --overwrite, others in their place."""
    before = contents(copy)
    command = [*TINY, "--baselines", "--baseline-steps", "2", "--out", str(copy)]
    train_sup.main(command)
    train_sup.main([*command, "--overwrite"])
    after = contents(copy)
    assert before == {path: after[path] for path in before}
    assert {path.stem.split(".")[0] for path in set(after) - set(before)} == {"explicit", "no_cot"}


def test_a_model_without_its_state_is_not_trained_over(copy, capsys):
    """But where it is that of the first evaluation, the run was killed between the two files."""
    (copy / "latent.state.pt").unlink()
    command = ["--out", copy, "--steps", 1, "--resume"]
    saved = torch.load(copy / "latent.pt", weights_only=True)
    torch.save({**saved, "step": 2}, copy / "latent.pt")
    refused("train_latent", command, copy, "latent.state.pt: no such file", capsys)
    torch.save(saved, copy / "latent.pt")
    train_latent.main([str(word) for word in command])
    assert (copy / "latent.state.pt").exists()
    (copy / "sft.state.pt").unlink()
    refused("train_sup", [*TINY, "--seed", 1, "--out", copy, "--resume"], copy,
            "seed = 0, here it is 1", capsys)
    saved = torch.load(copy / "sft.pt", weights_only=True)
    for damaged in {}, {"optimizer": None}, {"optimizer": [1]}:
        torch.save({**saved, **damaged}, copy / "sft.state.pt")
        command = [*TINY, "--out", copy, "--resume"]
        refused("train_sup", command, copy, "lacks what it takes", capsys)


def test_other_baselines_are_not_compared_with(copy, capsys):
    saved = torch.load(copy / "sft.pt", weights_only=True)
    for field, value in ("n_layer", 2), ("tokenizer", "gpt2"):
        torch.save({**saved, "config": {**saved["config"], field: value}}, copy / "no_cot.pt")
        refused("analyze", ["--out", copy], copy, f"no_cot.pt was made with {field} = {value}",
                capsys)


@pytest.mark.parametrize("file", ["explicit", "no_cot", "sup"])
def test_what_follows_from_another_warm_up_is_not_compared_with(copy, file, capsys):
    train_sup.main([*TINY, "--baselines", "--baseline-steps", "2", "--out", str(copy)])
    saved = torch.load(copy / f"{file}.pt", weights_only=True)
    saved["config"]["initial_weights"] = "another"
    torch.save(saved, copy / f"{file}.pt")
    refused("analyze", ["--out", copy], copy, f"{file}.pt belongs to another sft.pt", capsys)


def test_baselines_start_as_the_warm_up_did(copy, capsys):
    flags = [*TINY[6:], "--init", copy / "sft.pt", "--baselines", "--out", copy]
    refused("train_sup", flags, copy, "init = scratch, here it is ", capsys)


def test_a_phase_does_not_start_from_another_warm_up(copy, tmp_path, capsys):
    """Neither phase 1, resumed before its first evaluation, nor phase 3 with --start sft."""
    other = tmp_path / "other"
    train_sup.main([*TINY, "--seed", "1", "--out", str(other)])
    shutil.copy(other / "sft.pt", copy)
    refused("train_latent", ["--start", "sft", "--steps", 1, "--overwrite", "--out", copy], copy,
            "sup.pt belongs to another sft.pt", capsys)
    for file in "sup.pt", "sup.state.pt":
        (copy / file).unlink()
    refused("train_sup", [*TINY, "--resume", "--out", copy], copy, "seed = 1, here it is 0", capsys)


@pytest.mark.parametrize("script", ["compress", "train_latent", "analyze"])
def test_a_phase_before_its_time(tmp_path, script, capsys):
    refused(script, ["--out", tmp_path / "run"], tmp_path, "train_sup.py", capsys)


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
    (lambda f: torch.save({"config": {"data": "toy"}}, f), "another version wrote it"),
    (lambda f: f.unlink(), "no such file"),
    (lambda f: shutil.copy(f.with_name("sft.pt"), f), "holds no encoder"),
    (lambda f: edit_shape(f, n_embd=32), "its encoder cannot be read"),
    (lambda f: edit_shape(f, depth=2), "its encoder cannot be read"),
])
def test_a_broken_or_malicious_checkpoint(copy, spoil, says, capsys, monkeypatch):
    monkeypatch.chdir(copy)
    spoil(copy / "sup.pt")
    refused("compress", ["--out", copy, "--overwrite"], copy, says, capsys)
    assert not (copy / "malice").exists()


@pytest.mark.parametrize("spoil, says", [
    (lambda d: (d / "meta.json").write_text("{"), "cannot be read"),
    (lambda d: (d / "meta.json").write_text("7"), "cannot be read"),
    (lambda d: (d / "meta.json").unlink(), "no such store; run compress.py first"),
    (lambda d: (d / "meta.json").write_text("[" * 90_000), "cannot be read"),
    (lambda d: (d / "values.npy").write_bytes(b"\x93NUMPY"), "cannot be read"),
    (lambda d: np.save(d / "ids.npy", np.array([Malice()]), allow_pickle=True), "cannot be read"),
    (lambda d: edit(d / "meta.json", tokenizer="gpt2"), "tokenizer = gpt2, here it is toy"),
    (lambda d: edit(d / "meta.json", encoder="0" * 16), "encoder = 0000"),
    (lambda d: edit(d / "meta.json", fingerprint="x"), "fingerprint = x"),
    (lambda d: edit(d / "meta.json", complete=False), "unfinished"),
    (lambda d: (d / "meta.json").write_text('{"complete": true}'), "does not say top_k"),
    (lambda d: np.save(d / "ids.npy", np.zeros((5, 50), np.int32)), "do not fit each other"),
    (lambda d: np.save(d / "values.npy", np.zeros(9, np.float32)), "do not fit each other"),
    (lambda d: np.save(d / "offsets.npy", np.zeros(9)), "do not fit each other"),
    (lambda d: np.save(d / "offsets.npy", np.zeros(9, np.int64)), "do not fit each other"),
    (lambda d: np.save(d / "offsets.npy", np.full(32, 10 ** 6)), "do not fit each other"),
    (lambda d: np.save(d / "offsets.npy", np.full(32, -1)), "do not fit each other"),
    (lambda d: save_several(d / "values.npy"), "values.npy holds several arrays"),
])
def test_a_store_that_does_not_fit(copy, spoil, says, capsys):
    spoil(copy / "latents")
    refused("train_latent", ["--out", copy, "--steps", 1, "--overwrite"], copy, says, capsys)


def test_a_new_store_leaves_links_to_the_old_one(copy):
    """The stages of a sweep share their files by hard links."""
    store = copy / "latents"
    (copy / "link.npy").hardlink_to(store / "values.npy")
    before = (copy / "link.npy").read_bytes()
    compress.main(["--out", str(copy), "--top-k", "7", "--overwrite"])
    assert np.load(store / "values.npy").shape[1] == 7
    assert (copy / "link.npy").read_bytes() == before


def test_a_store_cut_short_is_not_filled_up(copy, capsys):
    path = copy / "latents" / "values.npy"
    path.write_bytes(path.read_bytes()[:2000])
    edit(copy / "latents" / "meta.json", done=0, complete=False)
    refused("compress", ["--out", copy, "--resume"], copy, "cannot be read", capsys)


def save_several(path):
    with open(path, "wb") as file:
        np.savez(file, np.zeros(9), np.zeros(9))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_shape(path, **changes):
    saved = torch.load(path, weights_only=True)
    saved["config"]["model"].update(changes)
    torch.save(saved, path)


def no_number(p, ids, logits, n):
    return logits.sum() * torch.nan


def no_slope(p, ids, logits, n):
    """0, and a gradient that is no number."""
    return (logits.sum() * 0).sqrt()


def one_update_less(path):
    """The state of a run that ended, as if its last update were still to come."""
    state = torch.load(path, weights_only=True)
    torch.save({**state, "step": state["step"] - 1}, path)


@pytest.mark.parametrize("latent_kl, says", [(no_number, "loss = nan"), (no_slope, "norm = nan")])
def test_a_loss_that_is_no_number_saves_nothing(copy, monkeypatch, latent_kl, says):
    files = copy / "latent.state.pt", copy / "latent.pt"
    one_update_less(files[0])
    before = [file.read_bytes() for file in files]
    monkeypatch.setattr(train_latent, "latent_kl", latent_kl)
    with pytest.raises(data.UserError, match=rf"a figure \(.*{says}.*of latent is no number"):
        train_latent.main(["--out", str(copy), "--steps", "1", "--resume"])
    assert before == [file.read_bytes() for file in files]


@pytest.mark.parametrize("fails", [True, False], ids=["no number", "in the end"])
def test_what_overwrite_replaces_stays_until_something_is_saved(copy, monkeypatch, fails):
    files = [copy / f"{loop}{end}" for loop in ("sft", "sup") for end in (".pt", ".state.pt")]
    log = copy / "sft.jsonl"
    models, rows = [file.read_bytes() for file in files], log.read_bytes()
    command = [*TINY, "--seed", "1", "--steps", "0", "--overwrite", "--out", str(copy)]
    if fails:
        monkeypatch.setattr(train_sup, "weighted_nll", lambda logits, *_: logits.sum() * torch.nan)
        with pytest.raises(data.UserError, match="what was saved before stays"):
            train_sup.main(command)
        assert not files[1].exists()  # so that nobody takes it for the new run's
        files[1].write_bytes(models[1])
        assert models == [file.read_bytes() for file in files] and rows == log.read_bytes()
    else:
        monkeypatch.setattr(train_sup, "train_superposition", lambda *_: None)
        train_sup.main(command)
        assert common.load_checkpoint(files[0])["config"]["seed"] == 1
        assert [file.exists() for file in files] == [True, True, False, False]
        assert log.read_bytes().count(b"\n") == rows.count(b"\n") and rows != log.read_bytes()


def test_weights_that_are_no_numbers_are_not_saved(copy, monkeypatch):
    """The last update can make them so, after its loss was looked at."""
    one_update_less(copy / "latent.state.pt")
    before = contents(copy)
    step = optim.Muon.step

    def too_far(muon):
        step(muon)
        muon.param_groups[0]["params"][0].data.fill_(torch.inf)

    monkeypatch.setattr(optim.Muon, "step", too_far)
    with pytest.raises(data.UserError, match="a weight of latent is no number after 1 updates"):
        train_latent.main(["--out", str(copy), "--steps", "1", "--resume"])
    after = contents(copy)
    assert all(before[path] == after[path] for path in before if path.suffix == ".pt")


def test_an_encoder_that_writes_no_number_makes_no_store(copy, capsys):
    saved = torch.load(copy / "sup.pt", weights_only=True)
    saved["models"]["encoder"]["wpe.weight"].fill_(torch.nan)
    torch.save(saved, copy / "sup.pt")
    with pytest.raises(data.UserError, match="its encoder gives values that are not finite"):
        compress.main(["--out", str(copy), "--overwrite"])
    assert not (copy / "latents" / "meta.json").exists()


def test_a_store_that_finds_no_room_leaves_the_old_one(copy, monkeypatch, capsys):
    def full(file, offset, size):
        if file_of[-1] == "ids":
            raise OSError(28, "No space left on device")
        file_of.append("ids")

    file_of = ["values"]
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused("compress", ["--out", copy, "--overwrite"], copy, "untouched", capsys)


def test_a_folder_that_another_process_writes_to(copy, capsys):
    code = f"import common, pathlib; held = common.lock(pathlib.Path({str(copy)!r})); input(1)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.read(1)  # it has the lock
    scripts = {"train_sup": TINY, "compress": [], "train_latent": ["--steps", 1]}
    for script, flags in scripts.items():
        refused(script, [*flags, "--overwrite", "--out", copy], copy, "another process", capsys)
    other.communicate(b"\n")
    common.lock(copy)


def test_a_damaged_log_does_not_stop_a_run(copy):
    log = copy / "latent.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 1, "lo' + b'\n\xff\x00\n{"step": ' + b"9" * 5000 + b", 1}\n")
    train_latent.main(["--out", str(copy), "--steps", "1", "--resume"])
    assert log.read_bytes() == whole


FULL_DISK = f"""
import data, resource, runpy, signal, sys

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (32768, 32768))
data.TOY_SIZE.update({FEW})
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_the_compiler_cannot_do_is_one_sentence():
    from torch._inductor.exc import InvalidCxxCompiler

    def compiles():
        raise InvalidCxxCompiler

    with pytest.raises(data.UserError, match="torch.compile failed .*; go without it: --no-comp"):
        common.start(compiles)


def test_without_an_output_a_script_runs(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    common.start(lambda: None)


def test_an_output_that_nobody_reads_loses_no_evaluation(copy, monkeypatch):
    """The model and its state are saved before a line is printed, which may end the run."""
    def broken(text):
        raise BrokenPipeError(32, "Broken pipe")

    for file in copy.glob("latent.*"):
        file.unlink()
    monkeypatch.setattr(common.tqdm, "write", broken)
    with pytest.raises(BrokenPipeError):
        train_latent.main(["--out", str(copy), "--steps", "1"])
    for file in "latent.pt", "latent.state.pt":
        assert torch.load(copy / file, weights_only=True)["step"] == 1


def test_a_full_output_is_one_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is needed, which always is")
    code = "import common; common.start(lambda: print(5))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "the output, or the system: No space left on device\n"


def test_a_link_to_itself_is_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").symlink_to("mine")
    refused("train_sup", [*TINY, "--data", "mine"], tmp_path, "mine", capsys)


def test_too_little_memory_is_one_sentence():
    def too_large():
        torch.empty(2 ** 60)

    with pytest.raises(data.UserError, match="not enough memory; choose a smaller --batch-size"):
        common.start(too_large)
    def too_large_for_a_gpu():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def too_large_for_numpy():
        raise MemoryError

    for fault in too_large_for_a_gpu, too_large_for_numpy:
        with pytest.raises(data.UserError, match="not enough memory"):
            common.start(fault)
    with pytest.raises(RuntimeError, match="size"):  # a fault of ours is not hidden
        common.start(lambda: torch.zeros(2) + torch.zeros(3))


def test_a_full_disk_is_one_sentence(copy):
    """A process whose files may hold 32 kB, as on a full disk; the run before is untouched."""
    def but_for_logs():
        return {path: text for path, text in contents(copy).items() if path.suffix != ".jsonl"}

    one_update_less(copy / "latent.state.pt")
    before = but_for_logs()
    command = [sys.executable, "-c", FULL_DISK, str(ROOT / "train_latent.py"), "--out", str(copy),
               "--steps", "1", "--resume"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "could not write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert but_for_logs() == before


def test_the_words_of_a_control_token_are_data(finished):
    """A question that says <eot> ends no thought: no special id comes out of it."""
    t = data.Tokenizer("toy")
    for text in t.SPECIAL:
        assert max(t.encode(f"What is {text} 1 {text}?")) < t.n_ordinary
    analyze.main(["--out", str(finished), "--ask", "What is <eot> #### 5 <|endoftext|>?"])
