"""Every script with the smallest of models, and the flags that change its path."""
import json
import runpy
import sys

import numpy as np
import pytest
import torch

from conftest import FEW, LATENT, ROOT, TINY, load_store, pipeline
from data import Problems
from encoder import encoder_batch, ordinary_softmax, summary_states, top_k_renormalized
from lab.files import build, load
from lab.sources import load_problems


def test_the_scripts_in_a_row(monkeypatch, tmp_path):
    """The quick start and the baselines as a user types them, with nothing said about output."""
    monkeypatch.chdir(tmp_path)
    first = "train_sup.py --n-layer 1 --n-embd 16 --n-head 1 --batch-size 8 --sft-steps 3 --steps 8"
    for command in (first, "compress.py", "train_latent.py --steps 2", "analyze.py --limit 2",
                    "analyze.py --ask 1+1?", f"{first} --baselines"):
        script, *flags = command.split()
        monkeypatch.setattr(sys, "argv", [script, *flags])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    out = tmp_path / "out" / "toy"
    # explicit.pt goes on from sft.pt: then it has as many updates as no_cot.pt, and all phases
    for loop, steps in dict(sft=3, sup=8, latent=2, explicit=10, no_cot=13).items():
        log = [json.loads(row) for row in (out / f"{loop}.jsonl").read_text("utf-8").splitlines()]
        losses = [row["loss"] for row in log if "loss" in row]
        assert len(losses) == steps and np.isfinite(losses).all()
        assert [row["step"] for row in log if "score" in row] == [steps]
        assert torch.load(out / f"{loop}.pt", weights_only=True)["step"] == steps
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert all(0 <= report["accuracy"][way] <= 1 for way in ("warm_up", "latent", "gold"))
    assert report["accuracy"]["explicit"] is None  # it was not trained yet


@pytest.mark.parametrize("flags, latent", [
    (["--chunk-size", 4], []),
    (["--chunk-size", 1, "--bag", 0, "--continuation", 0], ["--noise", 0]),
    (["--sft-steps", 0], []),
    (["--dtype", "bfloat16"], ["--dtype", "bfloat16", "--on-policy", 0.5]),
], ids=["c=4", "ablations", "no-sft", "bfloat16"])
def test_flags_that_change_the_path(tmp_path, flags, latent):
    pipeline(tmp_path, sup=flags, latent=latent)
    store = load_store(tmp_path)
    assert len(store.offsets) == FEW["train"] and (store.offsets.diff() > 0).all()
    assert store.values.shape == store.ids.shape and store.ids.shape[1] == 50
    np.testing.assert_allclose(store.values.sum(1), 1, atol=1e-5)
    assert (store.values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("top_k", [99999, 0])
def test_top_k_beyond_the_vocabulary_is_all_of_it(copy, call, toy_tokenizer, top_k):
    call("compress", "--out", copy, "--top-k", top_k, "--overwrite")
    assert load_store(copy).ids.shape[1] == toy_tokenizer.n_ordinary
    call("train_latent", *LATENT, "--steps", 1, "--out", copy)


def test_the_store_holds_the_summaries_of_its_problems(tmp_path, toy_tokenizer):
    """Row by row what the encoder says of each problem alone, whatever the batches of phase 2."""
    c = 3
    pipeline(tmp_path, sup=["--chunk-size", c])
    store, encoder = load_store(tmp_path), build(load(tmp_path / "sup.pt"), "encoder", "cpu")
    train = Problems(load_problems("toy", "train"), toy_tokenizer, 128)
    for row in range(len(train)):
        alone = np.array([row])
        enc = encoder_batch(train.batch(alone), c, toy_tokenizer.sum)
        with torch.no_grad():
            hidden = summary_states(encoder, enc)                                 # (1, n, C)
            alpha = ordinary_softmax(encoder.head(hidden), toy_tokenizer.n_ordinary)
        values, _ = top_k_renormalized(alpha, 50)                                 # (1, n, K)
        mine, ids = store.read(alone, alpha.size(1))                              # (1, n, K)
        theirs = alpha.gather(2, ids)  # by their ids: of equal entries the order is open
        for found in values, theirs / theirs.sum(2, keepdim=True):
            torch.testing.assert_close(mine, found, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_model(finished, call):
    ids = [load(finished / "sup.pt")["id"]]
    for seed in (0, 1):
        call("train_sup", *TINY, "--out", f"run{seed}", "--seed", seed)
        ids.append(torch.load(f"run{seed}/sup.pt", weights_only=True)["id"])
    assert ids[0] == ids[1] != ids[2]


# ------------------------------------------------------------------------------- data of one's own

def own_data(folder, chain, copies=1):
    """A folder with 40 problems, each so many times, to train on and to test."""
    rows = [{"question": f"What is {i} + {i}?", "answer": f"{chain.format(i, 2 * i)} #### {2 * i}"}
            for i in range(40)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, copies * rows)))
    return folder


@pytest.mark.parametrize("cot", ["steps", "text"])
def test_a_file_of_your_own(call, gpt2_tokenizer, cot, capsys):
    call("train_sup", *TINY, "--data", ROOT / "tests" / "sample.jsonl", "--cot", cot,
         "--chunk-size", 8, "--block-size", 192, "--out", "run")
    call("compress", "--out", "run")
    call("train_latent", *LATENT, "--out", "run")
    capsys.readouterr()
    call("analyze", "--out", "run", "--ask", "How many quaggas, 𝔸nn?")
    assert "z_0" in capsys.readouterr().out


def test_one_report_of_new_numbers_and_of_new_words(call, gpt2_tokenizer, easy_folder, tmp_path):
    """Where training had other numbers; the later phases keep to the same problems."""
    out = tmp_path / "run"
    pipeline(out, sup=["--data", "easy", "--data-dir", easy_folder, "--renumber", 2])
    store = load_store(out)
    assert len(store.offsets) == 3 * 12 and store.offsets.max() < len(store.ids)
    call("analyze", "--limit", 3, "--out", out)
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["config"]["analyze"]["settings"]["split"] == "renumbered"
    assert {split: unseen["problems"] for split, unseen in report["unseen"].items()} == {
        "test": 3, "held-out": 3}
    call("analyze", "--split", "test", "--limit", 3, "--out", out)
    alone = json.loads((out / "report-test.json").read_text("utf-8"))
    for figure in "accuracy", "interval":
        assert alone[figure] == report["unseen"]["test"][figure]
    assert alone["unseen"] == {} and alone["problems"] == 3


def test_problems_without_a_chain_of_thought(call, gpt2_tokenizer, tmp_path):
    pipeline("run", sup=["--data", own_data(tmp_path, "")])
    assert (load_store(tmp_path / "run").offsets == 0).all()
    call("analyze", "--limit", 4, "--out", "run")


def test_equal_problems_share_their_place_in_the_store(call, gpt2_tokenizer, tmp_path):
    call("train_sup", *TINY, "--data", own_data(tmp_path, "<<{0}+{0}={1}>>", 3), "--out", "run")
    call("compress", "--out", "run")
    questions = [row["question"] for row in load_problems(str(tmp_path), "train")]
    store = load_store(tmp_path / "run")
    places = dict(zip(questions, store.offsets.tolist()))
    assert len(store.offsets) == len(questions) == 3 * len(places)
    assert [places[question] for question in questions] == store.offsets.tolist()
    assert len(set(places.values())) == len(places)
    ends = [*sorted(places.values())[1:], len(store.values)]
    assert max(np.diff([0, *ends])) <= 4  # a place for each different problem, and no room beside
