"""The analysis: chains recorded and given back, controls, known paths, the report of a run."""
import contextlib
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import analyze
import data
import toy
from conftest import FEW, LATENT, pipeline, run_script
from encoder import Parts, count_chunks, superpose_sparse
from lab import probes, sources
from lab.evaluate import gold_prompt
from lab.probes import (Setting, decode_after_latents, decode_after_prefixes, decode_along_path,
                        decode_split, record_latents, record_summaries)
from lab.run import read_curves
from lab.sources import known_paths
from model import GPT, GPTConfig
from test_report import Page


# ----------------------------------------------------------------- chains recorded and given back

def random_model(tokenizer, seed):
    """Weights so large that each question has an answer of its own."""
    torch.manual_seed(seed)
    llm = GPT(GPTConfig(tokenizer.n_vocab, 128, 1, 2, 16)).double().requires_grad_(False)
    for p in llm.parameters():
        p.add_(0.5 * torch.randn_like(p))
    return llm


@pytest.fixture
def setting(toy_tokenizer):
    """Six problems of the toy task; at most 5 latents and 8 tokens."""
    problems = data.Problems(list(toy.problems(1, 6, lambda question: True)), toy_tokenizer, 128)
    env = SimpleNamespace(tokenizer=toy_tokenizer, device=torch.device("cpu"), parts=Parts(),
                          autocast=contextlib.nullcontext)
    return Setting(problems, 6, c=2, caps=(5, 8), top_k=3, batch_size=4, env=env)


def texts(found):
    """The ids that were written, the <eot> before them aside."""
    written = [found["answers"][row][2] for row in range(6)]
    eot = data.Tokenizer("toy").eot
    return [tuple(ids[ids[:1] == [eot]:]) for ids in written]


def z_of(latents, llm, K=3):
    """z of the K largest entries recorded; the fixture `setting` has K = 3 for the latent model."""
    values = latents.values[:, :, :K]
    return superpose_sparse(values / values.sum(2, keepdim=True), latents.ids[:, :, :K].long(),
                            llm.wte.weight)


def test_a_chain_forced_along_a_path_holds_its_tokens_alone(setting):
    """With a token a chunk each z is that token's embedding; past the path q is as it was."""
    llm = random_model(setting.env.tokenizer, seed=0)
    path = torch.randint(0, setting.env.tokenizer.n_ordinary, (6, 3))
    fed = []
    llm.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    one = setting._replace(c=1, batch_size=6)  # rows come as the batch has them: the shortest first
    decode_along_path(one, llm, path.tolist())
    order = next(one.problems.eval_batches(6)).rows
    E = llm.wte.weight
    for step in range(3):
        assert ((fed[1 + step][:, 0] - E[path[order, step]]).abs().amax(1) < 1e-5).any()
    x = fed[4][:, 0]
    assert not ((x[:, None] - E[None]).abs().amax(2).amin(1) < 1e-5).all()  # superposed again


def test_a_model_given_its_own_chain_writes_what_it_wrote(setting):
    """`record_latents` has the z that were fed, and they stand where they stood, before <eot>.

    Without any of them it is plain decoding.
    """
    llm = random_model(setting.env.tokenizer, seed=0)
    latents = record_latents(setting, llm)
    written = texts({"answers": latents.answers})
    assert latents.n.max() == 5 and len(set(written)) > 1
    torch.testing.assert_close(latents.z.double(), z_of(latents, llm), rtol=0, atol=1e-5)
    again = texts(decode_after_latents(setting, llm, latents.z, latents.n))
    # the <eot> that the model wrote itself was one of its 8 tokens
    assert all(a[:len(b)] == b for a, b in zip(again, written))
    _, found = decode_after_prefixes(setting, llm, latents, end_of_thought=False)
    assert texts(found[0]) == texts(decode_split(setting, llm))
    ks, found = decode_after_prefixes(setting, llm, latents)
    cut = [texts(after) for after in found]
    assert ks == [0, 1, 2, 3, 4, 5]
    assert cut[5] == again and cut[2] not in (cut[0], cut[5])


def test_the_summaries_recorded_are_those_of_gold_prompts(setting, monkeypatch):
    monkeypatch.setattr(probes, "RECORDED", 10 ** 6)  # all of α
    llm, encoder = (random_model(setting.env.tokenizer, seed) for seed in (0, 1))
    summaries = record_summaries(setting, llm, encoder)
    lengths = torch.from_numpy(setting.problems.s.length)
    assert summaries.n.tolist() == count_chunks(lengths, 2).tolist()
    real = torch.arange(summaries.z.size(1)) < summaries.n[:, None]
    mixed = z_of(summaries, llm, K=10 ** 6)
    torch.testing.assert_close(summaries.z.double()[real], mixed[real], rtol=0, atol=1e-5)
    prompt = partial(gold_prompt, llm=llm, encoder=encoder, env=setting.env, c=2)
    gold = texts(decode_split(setting, llm, prompt=prompt))
    assert texts(decode_after_latents(setting, llm, summaries.z, summaries.n)) == gold
    assert len(set(gold)) > 1


def test_a_model_that_only_reads_its_chain_gives_the_donors_answer(setting, monkeypatch):
    """A stand-in for the model answers as the problem whose chain it is given does.

    Shuffled: problem r gets the chain of problem r - 1, with the length that it has there.
    """
    problems = setting.problems.problems
    true = [problem["answer"] for problem in problems]
    given = []

    def read_the_chain(setting, llm, z, n):
        given.append((z, n.tolist()))
        answers = {}
        for row, donor in enumerate(int(chain[0, 0]) - 1 for chain in z):
            text = true[donor] if 0 <= donor < 6 else ""
            answers[row] = (text, text == true[row], [])
        return {"answers": answers, "accuracy": sum(right for _, right, _ in answers.values()) / 6}

    monkeypatch.setattr(analyze, "decode_after_latents", read_the_chain)
    monkeypatch.setattr(analyze, "decode_after_prefixes", lambda *_: ([0], [{"accuracy": 0.0}]))
    z = torch.arange(1.0, 7)[:, None, None].expand(6, 3, 16)  # problem r's chain says r + 1
    latents = SimpleNamespace(z=z, n=torch.tensor([3, 2, 1, 3, 2, 2]))
    llm = random_model(setting.env.tokenizer, seed=0)
    llm.wte.weight[:, 0] = -1
    found = analyze.measure_controls(setting, llm, latents, seed=0)
    same = sum(true[r] == true[r - 1] for r in range(6))
    assert same < 6 and found["donor"] == 1
    assert found["accuracy"] == {"own": 1, "zeroed": 0, "shuffled": same / 6, "random": 0}
    own = [3, 2, 1, 3, 2, 2]
    assert [n for _, n in given] == [own, own, [2, 3, 2, 1, 3, 2], own]
    zeroed, random = given[1][0], given[3][0]
    assert not zeroed.any() and zeroed.shape == z.shape
    E = llm.wte.weight[torch.from_numpy(setting.problems.s.flat).unique().long()]
    assert (random[:, :, None] == E).all(3).any(2).all() and len(random.unique(dim=1)) > 1


# ------------------------------------------------------------------------------------ known paths

def test_known_paths():
    """The problem's own chain, and those of its equals."""
    own = {"question": "Q?", "chain": "<<1+1=2>>", "answer": "2"}
    other = {**own, "chain": "<<4-2=2>>"}  # the same problem again; and one of another answer
    assert known_paths([own, other, {**own, "answer": "3", "chain": "<<1+2=3>>"}]) == [
        ["<<1+1=2>>", "<<4-2=2>>"], ["<<4-2=2>>", "<<1+1=2>>"], ["<<1+2=3>>"]]


# ------------------------------------------------------------------------------- a run, all of it

@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A copy of `finished`, a baseline missing; only three prefixes of each chain are measured."""
    out = shutil.copytree(finished, tmp_path_factory.mktemp("analyze") / "run")
    (out / "no_cot.pt").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "POINTS", 3)
        yield out


def report_of(out, *flags):
    def refuse(name):
        pytest.fail(f"{name} in report.json")

    run_script("analyze", "--out", out, *flags)
    return json.loads((out / "report.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def made(run):
    """(report.json, report.html) of this run."""
    return report_of(run), (run / "report.html").read_text("utf-8")


def test_the_figures_of_a_report_agree(made):
    r, R = made[0], FEW["test"]
    assert r["accuracy"]["no_cot"] is r["interval"]["no_cot"] is None
    for way in ("warm_up", "explicit", "latent", "gold"):
        low, high = r["interval"][way]
        assert low <= r["accuracy"][way] <= high
    assert set(r["errors"]) == {"warm_up", "explicit"}
    for way, types in r["errors"].items():
        assert sum(types.values()) == R - round(R * r["accuracy"][way])
        assert types["no number"] <= r["unparseable"][way]
    assert (r["problems"], r["parallelism"]["problems"], r["parallelism"]["paths"]) == (R, R, 6)
    # given its own chain, it answers as it did; so it does when nothing is taken from its z
    for section in ("controls", "collapse"):
        assert r[section]["accuracy"]["own"] == r["accuracy"]["latent"]
        assert r[section]["interval"]["own"] == r["interval"]["latent"]
    for curve, axis in ((r["controls"]["cut"], "k"), (r["continuation"], "i")):
        assert len(curve[axis]) == len(curve["accuracy"]) == 3 and curve[axis][0] == 0


def test_the_page_shows_the_problems_and_how_everything_in_it_was_made(made):
    report, html = made
    config, page = report["config"], Page(html)
    assert not page.open and "script" not in page.tags and "http" not in html.lower()
    assert page.tags.count("details") == FEW["test"]
    for problem in sources.load_problems("toy", "test"):
        assert problem["question"] in page.text
    assert set(config) == {"analyze", "sft", "sup", "latent", "explicit"}
    for of in config.values():
        assert {"seed", "device", "dtype", "batch_size", "data"} <= set(of["settings"])
        assert {"commit", "torch", "python"} <= set(of["made_by"])
    assert config["sup"]["settings"]["bag"] == 1 and config["latent"]["settings"]["noise"] == 0.1
    assert config["latent"]["made_of"]["sup"] == config["analyze"]["made_of"]["sup"]
    assert len({of["made_of"]["data"] for of in config.values()}) == 1
    assert config["sup"]["made_of"]["data"] in page.text
    assert config["analyze"]["made_by"]["commit"] in page.text


def test_figures_are_rounded_and_flags_are_not(copy):
    run_script("train_latent", *LATENT, "--out", copy, "--lr", 2.00001e-5, "--overwrite")
    run_script("analyze", "--out", copy, "--limit", 3, "--split", "held-out")
    report = json.loads((copy / "report-held-out.json").read_text())  # a report of its own
    assert report["problems"] == 3 and report["config"]["latent"]["settings"]["lr"] == 2.00001e-5
    assert all(round(x, 4) == x for interval in report["interval"].values() for x in interval)
    assert analyze.rounded({"a": [1 / 3, float("nan"), float("inf")]}) == {"a": [.3333, None, None]}
    assert set(report["curves"]) == {"sft", "sup", "latent", "explicit", "no_cot"}
    assert not (copy / "report.json").exists()


def test_a_report_is_the_same_whatever_the_batch(run, made, capsys):
    one, other = report_of(run, "--batch-size", 3), dict(made[0])
    assert "no_cot.pt (python train_sup.py --baselines" in capsys.readouterr().out
    for report in (one, other):
        assert report.pop("config") and report.pop("seconds")
    assert one == other


def test_ask_shows_a_chain_of_unknown_words(run, capsys):
    run_script("analyze", "--out", run, "--ask", "Zörg <script> has 7 naïve\x1b quaggas?")
    said = capsys.readouterr().out
    latents = said.split("ask=")[1].split("\n", 1)[1].rsplit("\n", 2)[0]
    assert "z_0" in said and "\x1b" not in latents


def test_a_learning_curve_is_what_the_log_says(tmp_path):
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0}, {"step": 2, "score": 0.5},
            {"step": 3, "loss": 1.0}, {"step": 3, "score": 0.75}]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sup.jsonl").write_text("")
    assert read_curves(tmp_path) == {
        "sft": {"step": [2, 3], "score": [0.5, 0.75], "loss": [3.0, 1.0]}}


def test_gsm8k_from_end_to_end(gsm8k, gpt2_tokenizer, tmp_path, monkeypatch):
    """A few of GSM8K's own lines."""
    monkeypatch.setattr(probes, "POINTS", 2)
    monkeypatch.setattr(sources, "fetch", lambda file: None)  # which would miss the other lines
    for name in ("train", "test"):
        lines = (gsm8k / f"{name}.jsonl").read_text("utf-8").splitlines()
        lines = lines[:8] if name == "test" else [x for x in lines[:100] if len(x) < 500]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    out = tmp_path / "out"
    pipeline(out, sup=["--data", "gsm8k", "--data-dir", tmp_path, "--renumber", 0])
    assert report_of(out, "--limit", 2)["parallelism"] is None
    page = (out / "report.html").read_text("utf-8")
    assert '"charts" hidden' in page and ".charts[hidden]" in page  # `display: grid` would show it
