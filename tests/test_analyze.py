"""The analysis: chains recorded and given back, controls, known paths, the report of a run."""
import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import analyze
import common
import compress
import data
import probes
import toy
import train_latent
import train_sup
from analyze import control_chains, measure_controls, pad_paths, paths_of_next_problems
from data import UserError, known_paths, parse_solved
from encoder import count_chunks
from model import GPT, GPTConfig
from probes import (Setting, decode_after_latents, decode_after_prefixes, decode_along_path,
                    decode_split, record_latents, record_summaries)
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
    env = SimpleNamespace(tokenizer=toy_tokenizer, device=torch.device("cpu"),
                          autocast=contextlib.nullcontext)
    return Setting(problems, 6, c=2, caps=(5, 8), batch_size=4, env=env)


def texts(answers):
    """The ids that were written, the <eot> before them aside."""
    written = [answers[row][2] for row in range(6)]
    eot = data.Tokenizer("toy").eot
    return [tuple(ids[ids[:1] == [eot]:]) for ids in written]


def test_a_chain_forced_along_a_path_holds_its_tokens_alone(setting):
    """With a token a chunk each z is that token's embedding, past the path q is as it was."""
    llm = random_model(setting.env.tokenizer, seed=0)
    path = torch.randint(0, setting.env.tokenizer.n_ordinary, (6, 3, 1))
    fed = []
    llm.register_forward_pre_hook(lambda module, args: fed.append(args[0]))
    one = setting._replace(batch_size=6)  # rows come as the batch has them: the shortest first
    decode_along_path(one, llm, path)
    order = next(one.problems.eval_batches(6)).rows
    E = llm.wte.weight
    for step in range(3):
        x = fed[1 + step][:, 0]
        thinking = (x - E[path[order, step, 0]]).abs().amax(1) < 1e-5
        assert thinking.any()
    x = fed[4][:, 0]
    assert not ((x[:, None] - E[None]).abs().amax(2).amin(1) < 1e-5).all()  # superposed again


def test_a_model_given_its_own_chain_writes_what_it_wrote(setting):
    """`record_latents` has the z that were fed, and they stand where they stood, before <eot>.

    Without any of them it is plain decoding.
    """
    llm = random_model(setting.env.tokenizer, seed=0)
    latents = record_latents(setting, llm, top_k=0)
    written = texts(latents.answers)
    assert latents.n.max() == 5 and len(set(written)) > 1
    latents = latents._replace(z=latents.z.double())
    again = texts(decode_after_latents(setting, llm, latents.z, latents.n)["answers"])
    # the <eot> that the model wrote itself was one of its 8 tokens
    assert all(a[:len(b)] == b for a, b in zip(again, written))
    nothing = decode_after_latents(setting, llm, latents.z, 0 * latents.n, end_of_thought=False)
    assert texts(nothing["answers"]) == texts(decode_split(setting, llm, "text")["answers"])
    ks, found = decode_after_prefixes(setting, llm, latents)
    cut = [texts(after["answers"]) for after in found]
    assert ks == [0, 1, 2, 3, 4, 5]
    assert cut[5] == again and cut[2] not in (cut[0], cut[5])


def test_the_summaries_recorded_are_those_of_gold_prompts(setting):
    llm, encoder = (random_model(setting.env.tokenizer, seed) for seed in (0, 1))
    summaries = record_summaries(setting, llm, encoder, top_k=3)
    lengths = torch.from_numpy(setting.problems.s.length)
    assert summaries.n.tolist() == count_chunks(lengths, 2).tolist()
    after = decode_after_latents(setting, llm, summaries.z, summaries.n)
    gold = decode_split(setting, llm, "gold", encoder=encoder, top_k=3)
    assert texts(after["answers"]) == texts(gold["answers"])
    assert len(set(texts(gold["answers"]))) > 1


# --------------------------------------------------------------------------------------- controls

def test_control_chains():
    """Shuffled: problem r gets the chain of problem r - 1, with the length that it has there."""
    z, n = torch.randn(3, 4, 2), torch.tensor([4, 2, 3])
    tokens, E = torch.tensor([[0, 1, 2, 0]] * 3), torch.randn(5, 2)
    chains = control_chains(z, n, tokens, E)
    assert torch.equal(chains["own"][0], z) and torch.equal(chains["own"][1], n)
    shuffled, lengths = chains["shuffled"]
    for r in range(3):
        assert torch.equal(shuffled[r], z[r - 1]) and lengths[r] == n[r - 1]
    assert not chains["zeroed"][0].any() and torch.equal(chains["zeroed"][1], n)
    assert torch.equal(chains["random"][0], E[tokens]) and torch.equal(chains["random"][1], n)


def test_a_model_that_only_reads_its_chain_gives_the_donors_answer(setting, monkeypatch):
    """A stand-in for the model answers as the problem whose chain it is given does."""
    problems = setting.problems.problems
    true = [problem["answer"] for problem in problems]

    def read_the_chain(setting, llm, z, n):
        donors = [int(chain[0, 0]) - 1 for chain in z]
        answers = {}
        for row, donor in enumerate(donors):
            text = true[donor] if 0 <= donor < 6 else ""
            answers[row] = (text, text == true[row], [])
        return {"answers": answers, "accuracy": sum(right for _, right, _ in answers.values()) / 6}

    monkeypatch.setattr(analyze, "decode_after_latents", read_the_chain)
    monkeypatch.setattr(analyze, "decode_after_prefixes", lambda *_: ([0], [{"accuracy": 0.0}]))
    z = torch.arange(1.0, 7)[:, None, None].expand(6, 3, 16)  # problem r's chain says r + 1
    latents = SimpleNamespace(z=z, n=torch.full((6,), 3))
    llm = random_model(setting.env.tokenizer, seed=0)
    llm.wte.weight.fill_(-1)
    found = measure_controls(setting, llm, latents, seed=0)
    same = sum(true[r] == true[r - 1] for r in range(6))
    assert same < 6 and found["donor"] == 1
    assert found["accuracy"] == {"own": 1, "zeroed": 0, "shuffled": same / 6, "random": 0}


# ------------------------------------------------------------------------------------------ paths

def test_random_paths_are_those_of_the_next_problems():
    own = [[[1], [2, 3]], [[4, 4, 4], [5], [6]], [[7], [8]]]
    others = paths_of_next_problems(own)
    assert others == [[[4, 4, 4], [5]], [[7], [8], [1]], [[1], [2, 3]]]
    tokens, length = pad_paths(own)
    assert tokens.shape == (3, 3, 3) and length.tolist() == [[1, 2, 0], [3, 1, 1], [1, 1, 0]]
    assert tokens[0].tolist() == [[1, 0, 0], [2, 3, 0], [0, 0, 0]]


def solved(*texts):
    models = {f"m{i}": {"is_correct": ok, "solution": text} for i, (text, ok) in enumerate(texts)}
    return json.dumps({"question": " Q? ", "ground_truth": "x", **models})


def test_the_right_chains_of_a_published_line():
    line = solved(("1+1 = <<1+1=2>>2\nA: 2", True), ("<<3-1=2>>2\nA: 2", True),
                  ("<<9-1=8>>8\nA: 8", False))
    assert parse_solved(line, "steps") == ("Q?", ["<<1+1=2>>", "<<3-1=2>>"])
    with pytest.raises(ValueError):
        parse_solved('{"question": "Q?", "m": {"solution": "x"}}', "steps")


def test_known_paths(tmp_path, capsys):
    own = {"question": "Q?", "chain": "<<1+1=2>>", "answer": "2"}
    (tmp_path / "example_model_solutions.jsonl").write_text(solved(
        ("<<1+1=2>>\nA: 2", True), ("<<3-1=2>>\nA: 2", True), ("no steps\nA: 2", True)) + "\n")
    assert known_paths([own], str(tmp_path), None, "steps") == [["<<1+1=2>>", "<<3-1=2>>"]]
    assert known_paths([own], str(tmp_path / "nowhere"), None, "steps") == [["<<1+1=2>>"]]
    assert "example_model_solutions.jsonl" in capsys.readouterr().out


def test_gsm8k_has_810_problems_of_several_chains(gsm8k):
    if not (gsm8k / "example_model_solutions.jsonl").is_file():
        pytest.skip("example_model_solutions.jsonl is not in the folder of GSM8K")
    problems = data.load("gsm8k", "test", gsm8k)
    assert sum(len(p) > 1 for p in known_paths(problems, "gsm8k", gsm8k, "steps")) == 810


# ------------------------------------------------------------------------------- a run, all of it

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8",
        "--sft-steps", "1", "--steps", "1", "--bag-steps", "0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An --out folder after one update of each phase, and without the no-CoT baseline."""
    out, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    patch.setattr(data, "TOY_SIZE", {"train": 64, "val": 8, "test": 12})
    train_sup.main(["--out", str(out), *TINY])
    compress.main(["--out", str(out)])
    train_latent.main(["--out", str(out), "--steps", "1"])
    yield out
    patch.undo()


def report_of(out, *flags):
    def refuse(name):
        pytest.fail(f"{name} in report.json")

    analyze.main(["--out", str(out), *flags])
    return json.loads((out / "report.json").read_text(), parse_constant=refuse)


def test_report_has_its_sections_and_no_nan(run, capsys):
    r = report_of(run)
    assert {"accuracy", "interval", "steps", "seconds", "unparseable", "capped", "controls",
            "collapse", "continuation", "curves", "ecr", "parallelism", "shape"} <= set(r)
    assert r["accuracy"]["explicit"] is None and r["accuracy"]["no_cot"] is None
    assert "train_sup.py --baselines" in capsys.readouterr().out
    for way in ("warm_up", "latent", "gold"):
        low, high = r["interval"][way]
        assert low <= r["accuracy"][way] <= high
    assert sum(r["errors"]["warm_up"].values()) == round(12 * (1 - r["accuracy"]["warm_up"])) > 0
    assert r["errors"]["warm_up"]["no number"] <= r["unparseable"]["warm_up"]
    assert set(r["errors"]) == {"warm_up"}
    assert r["parallelism"]["problems"] == 12 and r["parallelism"]["paths"] == 6
    # given its own chain, it answers as it did; so it does when nothing is taken from its z
    assert r["controls"]["accuracy"]["own"] == r["accuracy"]["latent"]
    assert r["collapse"]["accuracy"]["own"] == r["accuracy"]["latent"]
    for section, axis in (("controls", "k"), ("continuation", "i")):
        curve = r[section].get("cut", r[section])
        assert len(curve[axis]) == len(curve["accuracy"]) and curve[axis][0] == 0


def test_one_command_trains_the_baselines_and_the_report_has_them(run, tmp_path):
    """explicit.pt goes on from sft.pt, no_cot.pt starts anew; both have latent's updates in all."""
    out = shutil.copytree(run, tmp_path / "run")
    before = (out / "sup.pt").read_bytes(), (out / "sft.pt").read_bytes()
    train_sup.main([*TINY, "--out", str(out), "--baselines"])
    assert before == ((out / "sup.pt").read_bytes(), (out / "sft.pt").read_bytes())
    steps = {name: torch.load(out / f"{name}.state.pt", weights_only=True)["step"]
             for name in ("sft", "explicit", "no_cot")}
    assert steps == {"sft": 1, "explicit": 2, "no_cot": 3}
    accuracy = report_of(out)["accuracy"]
    assert accuracy["explicit"] is not None and accuracy["no_cot"] is not None


def test_a_learning_curve_is_what_the_log_says(tmp_path, capsys):
    rows = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 2.0}, {"step": 2, "score": 0.5},
            {"step": 3, "loss": 1.0}, {"step": 3, "score": 0.75}]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sup.jsonl").write_text("")
    (tmp_path / "latent.jsonl").write_text('{"step": 1, "lo')
    curves = common.read_curves(tmp_path)
    assert curves == {"sft": {"step": [2, 3], "score": [0.5, 0.75], "loss": [3.0, 1.0]}}
    assert "latent.jsonl is damaged" in capsys.readouterr().out


def test_another_split_has_a_report_of_its_own(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    analyze.main(["--out", str(out), "--split", "held-out"])
    assert json.loads((out / "report-held-out.json").read_text())["problems"] == 8


def test_what_the_report_says_of_a_run_is_not_rounded(run, tmp_path):
    out = shutil.copytree(run, tmp_path / "run")
    train_latent.main(["--out", str(out), "--steps", "1", "--lr", "2e-5", "--overwrite"])
    assert report_of(out, "--limit", "2")["config"]["latent"]["lr"] == 2e-5


def test_paths_of_other_problems_are_never_its_own():
    """Also where one problem has most of them."""
    paths = [[[1], [2]], [[3], [4], [5], [6], [7]]]
    assert paths_of_next_problems(paths) == [[[3], [4]], [[1], [2], [1], [2], [1]]]


def test_page_holds_what_the_report_says(run):
    report_of(run, "--limit", "10")
    html = (run / "report.html").read_text()
    page = Page(html)
    assert not page.open and "script" not in page.tags and "http" not in html.lower()
    assert page.tags.count("details") == 10
    for p in data.load("toy", "test")[:10]:
        assert p["question"] in page.text


def test_report_is_the_same_whatever_the_batch(run):
    one, other = report_of(run, "--batch-size", "3"), report_of(run, "--batch-size", "64")
    assert one["config"]["analyze"].pop("batch_size") == 3
    assert other["config"]["analyze"].pop("batch_size") == 64
    assert one.pop("seconds").keys() == other.pop("seconds").keys() and one == other


def test_report_says_how_everything_in_it_was_made(run):
    config = report_of(run, "--limit", "2")["config"]
    assert set(config) == {"analyze", "sft", "sup", "latent"}
    for made in config.values():
        assert {"seed", "commit", "torch", "python", "device", "dtype", "batch_size"} <= set(made)
    assert config["analyze"]["limit"] == 2
    assert config["sup"]["bag"] == 1 and config["latent"]["noise"] == 0.1
    assert len({config[phase]["fingerprint"] for phase in ("sft", "sup", "latent")}) == 1
    page = Page((run / "report.html").read_text())
    assert config["sup"]["fingerprint"] in page.text and config["analyze"]["commit"] in page.text


def test_ask_shows_a_chain_of_unknown_words(run, capsys):
    analyze.main(["--out", str(run), "--ask", "Zörg <script> has 7 naïve\x1b quaggas?"])
    said = capsys.readouterr().out
    latents = said.split("ask=")[1].split("\n", 1)[1].rsplit("\n", 2)[0]
    assert "z_0" in said and "\x1b" not in latents
    with pytest.raises(UserError, match="--block-size"):
        analyze.main(["--out", str(run), "--ask", "pens " * 500])


def test_a_toy_task_that_changed_is_refused(run, monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", {"train": 63, "val": 8, "test": 12})
    with pytest.raises(UserError, match="fingerprint"):
        analyze.main(["--out", str(run)])


def test_gsm8k_from_end_to_end(gsm8k, gpt2_tokenizer, tmp_path, monkeypatch):
    """A few of GSM8K's own lines, without and with the published solutions, which have paths."""
    monkeypatch.setattr(probes, "POINTS", 2)
    for name in ("train", "test"):
        lines = (gsm8k / f"{name}.jsonl").read_text("utf-8").splitlines()
        lines = lines[:8] if name == "test" else [x for x in lines[:100] if len(x) < 500]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    train_sup.main([*flags, *TINY, "--block-size", "384"])
    compress.main(flags)
    train_latent.main([*flags, "--steps", "1"])
    without = report_of(tmp_path / "out", *flags[:2], "--limit", "2")
    assert without["parallelism"] is None
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert '"charts" hidden' in page and ".charts[hidden]" in page  # `display: grid` would show it
    solutions = gsm8k / "example_model_solutions.jsonl"
    if solutions.is_file():
        lines = solutions.read_text("utf-8").splitlines()[:8]
        (tmp_path / solutions.name).write_text("\n".join(lines), "utf-8")
        assert report_of(tmp_path / "out", *flags[:2])["parallelism"]["problems"] > 1
