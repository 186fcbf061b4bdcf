"""Every script for two steps with the smallest of models, and the flags that change its path."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import common
import data
import train_sup
from conftest import ROOT, easy_file
from data import Problems, UserError, load
from encoder import encoder_batch, summarize, top_k_renormalized

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8",
        "--sft-steps", "2", "--steps", "2", "--bag-steps", "1"]
# of the toy task: drawing all its problems takes longer than two steps
FEW = {"train": 64, "val": 8, "test": 8}
START = f"""
import data, runpy, sys

data.TOY_SIZE.update({FEW})
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(script, *flags, cwd):
    """A script in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", START, str(ROOT / script), *flags]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scripts_in_a_row(tmp_path):
    """The quick start, and the baselines, with nothing said about data or output."""
    start("train_sup.py", *TINY, cwd=tmp_path)
    start("train_sup.py", "--baselines", "--baseline-steps", "5", *TINY, cwd=tmp_path)
    start("compress.py", cwd=tmp_path)
    start("train_latent.py", "--steps", "2", cwd=tmp_path)
    start("analyze.py", "--limit", "4", cwd=tmp_path)

    out = tmp_path / "out" / "toy"
    # explicit.pt goes on from sft.pt: it has three updates more
    for phase, steps in dict(sft=2, explicit=3, no_cot=5, sup=2, latent=2).items():
        log = [json.loads(row) for row in (out / f"{phase}.jsonl").read_text("utf-8").splitlines()]
        losses = [row["loss"] for row in log if "loss" in row]
        assert len(losses) == steps and np.isfinite(losses).all()
        assert [row["step"] for row in log if "score" in row] == [steps]
        assert torch.load(out / f"{phase}.pt", weights_only=True)["step"] == steps
    report = json.loads((out / "report.json").read_text("utf-8"))
    for figure in ("accuracy", "steps", "seconds"):
        assert all(report[figure][way] is not None for way in ("explicit", "latent"))
    assert all(0 <= share <= 1 for share in report["accuracy"].values())


# -------------------------------------------------------- the same in this process, which is faster

@pytest.fixture
def call(monkeypatch, tmp_path):
    """call('train_sup', …): a script's main with these flags, in an empty folder."""
    def run(script, *flags):
        importlib.import_module(script).main([str(flag) for flag in flags])

    monkeypatch.setattr(data, "TOY_SIZE", FEW)
    monkeypatch.chdir(tmp_path)
    return run


def pipeline(call, *sup, latent=()):
    call("train_sup", *TINY, *sup, "--out", "run")
    call("compress", "--out", "run")
    call("train_latent", "--steps", 2, *latent, "--out", "run")
    return {name: np.load(f"run/latents/{name}.npy") for name in ("values", "ids", "offsets")}


@pytest.mark.parametrize("flags, latent, K", [
    (["--chunk-size", 4], [], 50),
    (["--chunk-size", 1, "--ltsum", "local", "--bag", 0, "--follow", 0], ["--noise", 0], 50),
    (["--top-k", 5], [], 5),
    (["--sft-steps", 0], [], 50),
    (["--dtype", "bfloat16"], ["--dtype", "bfloat16"], 50),
], ids=["c=4", "ablations", "top-k", "no-sft", "bfloat16"])
def test_flags_that_change_the_path(call, flags, latent, K):
    store = pipeline(call, *flags, latent=latent)
    assert len(store["offsets"]) == 64 and (np.diff(store["offsets"]) > 0).all()
    assert store["values"].shape == store["ids"].shape and store["ids"].shape[1] == K
    np.testing.assert_allclose(store["values"].sum(1), 1, atol=1e-5)
    assert (np.diff(store["values"], axis=1) <= 0).all()


@pytest.mark.parametrize("cot", ["steps", "text"])
def test_a_file_of_your_own(call, gpt2_tokenizer, cot, capsys):
    pipeline(call, "--data", ROOT / "tests" / "sample.jsonl", "--cot", cot, "--chunk-size", 8,
             "--block-size", 192)
    call("analyze", "--out", "run")
    capsys.readouterr()
    call("analyze", "--out", "run", "--ask", "How many quaggas, 𝔸nn?")
    assert "z_0" in capsys.readouterr().out


def test_easy_problems_have_a_preset(gpt2_tokenizer, tmp_path):
    p = common.parser("", "sup")
    train_sup.add_flags(p)
    flags = ["--data", easy_file(tmp_path), "--easy", "9", "--n-head", "4"]
    args, _ = common.setup(p, "sup", flags)
    easy = common.PRESETS["easy"]
    assert (args.n_embd, args.n_head, args.steps) == (easy["n_embd"], 4, easy["steps"]["sup"])
    assert args.sft_steps == easy["sft_steps"]


@pytest.mark.parametrize("flags, c", [([], 2), (["--chunk-size", "4"], 4)])
def test_phase_3_takes_its_steps_for_each_token_of_a_chunk(flags, c):
    args = common.parser("", "latent").parse_args(flags)
    common.fill_in_defaults(args, "latent", None)
    assert args.steps == common.PRESETS["toy"]["steps"]["latent"] * c


def test_later_phases_keep_to_the_easy_problems(call, gpt2_tokenizer, tmp_path):
    store = pipeline(call, "--data", easy_file(tmp_path), "--easy", 12, "--renumber", 2)
    assert len(store["offsets"]) == 3 * 12 and store["offsets"].max() < len(store["ids"])
    call("analyze", "--split", "easy", "--limit", 4, "--out", "run")
    report = json.loads(Path("run/report-easy.json").read_text("utf-8"))
    configs = report["config"].values()
    assert {config["easy"] for config in configs} == {12}
    assert len({config["tokenizer"] for config in configs}) == 1
    with pytest.raises(data.UserError, match="easy = 12, here it is 13"):
        call("train_sup", *TINY, "--data", easy_file(tmp_path), "--easy", 13, "--renumber", 2,
             "--resume", "--out", "run")


def test_what_the_bench_compares_is_equal():
    """And what it times runs; the sizes are tiny, and nothing is timed."""
    flags = "--n-layer 1 --n-head 1 --n-embd 16 --batch-size 4 --dtype float32 --device cpu"
    args, env = bench.setup(flags.split())
    loops = bench.Loops(args, env)
    loops.check()
    for job in loops.jobs().values():
        job()
    fused = bench.Bench(args, env, attention=bench.FusedAttention)
    for mine, theirs in (loops.llm, fused.llm), (loops.encoder, fused.encoder):
        theirs.load_state_dict(mine.state_dict())
    for name in bench.TRAINING:
        inputs = loops.inputs(name, loops.batches[name][0])
        torch.testing.assert_close(fused.losses(name, inputs), loops.losses(name, inputs))


@pytest.mark.parametrize("c", [1, 2, 8])
def test_the_bench_has_no_problem_that_is_too_long(c):
    args, _ = bench.setup(["--chunk-size", str(c), "--device", "cpu"])
    p = bench.some_problems(bench.stand_in(100), 500, args, x=(56, 20), s=(56, 20), a=(4, 0))
    latents = bench.count_chunks(p.s.length, c)
    assert 0 < p.dropped and (p.x.length + c * latents + p.a.length).max() <= args.block_size


def test_problems_without_a_chain_of_thought(call, gpt2_tokenizer, tmp_path):
    for split in ("train", "test"):
        rows = [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(40)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    store = pipeline(call, "--data", tmp_path)
    assert (store["offsets"] == 0).all()
    call("analyze", "--limit", 4, "--out", "run")


def test_the_store_holds_the_summaries_of_its_problems(call, toy_tokenizer):
    """Row by row what the encoder says of each problem alone, whatever the batches of phase 2."""
    c = 3
    store = pipeline(call, "--chunk-size", c)
    encoder = common.build(common.load_checkpoint(Path("run/sup.pt")), "encoder", "cpu")
    train = Problems(load("toy", "train"), toy_tokenizer, 128)
    for row in range(len(train)):
        alone = np.array([row])
        with torch.no_grad():
            enc = encoder_batch(train.batch(alone, alone), c, toy_tokenizer.sum)
            alpha = summarize(encoder, enc, toy_tokenizer.n_ordinary)[0]          # (n, n_ordinary)
        values, _ = top_k_renormalized(alpha, 50)                                 # (n, K)
        mine = slice(store["offsets"][row], store["offsets"][row] + len(alpha))
        np.testing.assert_allclose(store["values"][mine], values, atol=1e-5)
        ids = torch.from_numpy(store["ids"][mine].astype(np.int64))               # (n, K)
        theirs = alpha.gather(1, ids)                                             # (n, K)
        theirs = theirs / theirs.sum(1, keepdim=True)
        np.testing.assert_allclose(store["values"][mine], theirs, atol=1e-5)


def test_equal_problems_share_their_place_in_the_store(call, gpt2_tokenizer, tmp_path):
    different = [{"question": f"What is {i} + {i}?", "answer": f"<<{i}+{i}={2 * i}>> #### {2 * i}"}
                 for i in range(40)]
    for split in ("train", "test"):
        lines = map(json.dumps, 3 * different)
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    store = pipeline(call, "--data", tmp_path)
    meta = json.loads(Path("run/latents/meta.json").read_text())
    train = load(str(tmp_path), "train")
    again = [row["question"] for row in train]
    assert len(store["offsets"]) == len(train) == meta["problems"] > len(set(again))
    places = dict(zip(again, store["offsets"]))
    assert [places[question] for question in again] == store["offsets"].tolist()
    assert len(set(places.values())) == len(places)
    assert len(store["values"]) == meta["latents"]


def test_what_contradicts_an_earlier_phase_is_refused(call):
    with pytest.raises(UserError, match="run train_sup.py first"):
        call("compress", "--out", "run")
    call("train_sup", *TINY, "--out", "run")
    with pytest.raises(UserError, match="--overwrite"):
        call("train_sup", *TINY, "--out", "run")
    with pytest.raises(UserError, match="--chunk-size 4 contradicts"):
        call("compress", "--out", "run", "--chunk-size", 4)
    with pytest.raises(UserError, match="latents"):
        call("train_latent", "--out", "run", "--steps", 2)
    call("compress", "--out", "run")
    call("train_sup", *TINY, "--out", "run", "--overwrite", "--lr", 0.1)  # another encoder
    with pytest.raises(UserError, match="encoder = "):
        call("train_latent", "--out", "run", "--steps", 2)


def test_the_same_seed_gives_the_same_model(call):
    found = []
    for seed in (0, 0, 1):
        folder = f"run{len(found)}"
        call("train_sup", *TINY, "--out", folder, "--seed", seed)
        saved = torch.load(f"{folder}/sup.pt", weights_only=True)
        found.append(common.identity(saved["models"]["encoder"]))
    assert found[0] == found[1] != found[2]
