"""The analysis: every metric on an α written by hand, where the right value is known; the page; the report of a small run."""
import contextlib
import functools
import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

import analyze
import compress
import data
import toy
import train_latent
import train_sup
from analyze import mean, orders, parallelism, shape, spans, wilson
from compress import ecr, measure_ecr
from data import UserError, known_paths, parse_solved
from encoder import evaluate
from model import GPT, GPTConfig

V = 40  # ids of the vocabulary here


def top(*latents, K=V):
    """values, ids (1, N, K) of one chain, from one {token: weight} a latent; the rest of the vocabulary gets nothing."""
    dense = torch.zeros(1, len(latents), V)
    for t, alpha in enumerate(latents):
        for token, w in alpha.items():
            dense[0, t, token] = w
    return dense.topk(K)


def even(*tokens):
    return {token: 1 / len(tokens) for token in tokens}


def path(*rows):
    """A problem's paths, one list of spans each: int64 (1, M, N, W) as `spans` makes them."""
    W = max(len(s) for row in rows for s in row)
    return torch.tensor([[[list(s) + [-1] * (W - len(s)) for s in row] for row in rows]])


A, B = [[1, 2], [3, 4], [9, 8]], [[5, 6], [7, 8], [9, 8]]  # two paths that end alike
N3, PATHS = torch.tensor([3]), path(A, B)


def follow(*latents, paths=PATHS, n=N3):
    n_eff, covered = parallelism(*top(*latents), paths, n)
    return n_eff.item(), covered.item()


# ------------------------------------------------------------------------------------------------------- small things

def test_wilson_against_the_textbook():
    low, high = wilson(8, 10)  # 0.4902 to 0.9433, as in any table
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(0, 10)[1] > 0.2
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_mean_of_nothing_is_none():
    assert mean(torch.tensor([])) is None and mean(torch.tensor([math.nan])) is None
    assert mean(torch.tensor([1.0, math.nan, 3.0])) == 2


# ---------------------------------------------------------------------------------------------------------------- ECR

BAG, REAL = torch.tensor([[[1, 2], [3, 4], [5, -1]]]), torch.ones(1, 3, dtype=torch.bool)


def test_ecr_of_alpha_on_the_chunk():
    """All on the chunk's first token: one at K = 1. On both: both at K = 2; the short last chunk has but one."""
    one = top({1: 1}, {3: 1}, {5: 1})[1]
    assert ecr(one, BAG, REAL, [1]) == [1]
    both = top({1: .6, 2: .4}, {4: .6, 3: .4}, {5: 1})[1]
    assert ecr(both, BAG, REAL, [1, 2, V]) == pytest.approx([1, 5 / 3, 5 / 3])


def test_ecr_elsewhere_and_of_latents_that_do_not_count():
    assert ecr(top({8: 1}, {8: 1}, {8: 1}, K=1)[1], BAG, REAL, [1]) == [0]
    real = torch.tensor([[True, False, False]])
    assert ecr(top({1: 1}, {8: 1}, {8: 1})[1], BAG, real, [1]) == [1]
    assert math.isnan(ecr(top({1: 1}, {8: 1}, {8: 1})[1], BAG, ~REAL, [1])[0])


def test_ecr_of_uniform_alpha_is_chance():
    """A random order of the vocabulary: c · K / V tokens on average."""
    torch.manual_seed(0)
    ids = torch.rand(2000, 1, V).argsort(2)
    bag = torch.tensor([[[1, 2]]]).expand(2000, 1, 2)
    assert ecr(ids, bag, torch.ones(2000, 1, dtype=torch.bool), [10])[0] == pytest.approx(2 * 10 / V, abs=0.05)


def test_ecr_maximum_and_chance():
    """A token that stands twice counts twice; chance is the next problem's chunk, from the start again where it ends."""
    bag = torch.tensor([[[1, 1, 2], [3, 4, 6]], [[7, 8, -1], [-1, -1, -1]]])
    ids = torch.stack([torch.tensor([[7, 1], [8, 3]]), torch.tensor([[1, 2], [3, 4]])])
    found = measure_ecr(ids, torch.tensor([2, 1]), bag, [1, 2, 3])
    # the latents: problem 0's two and problem 1's first
    assert found["maximum"] == pytest.approx([(2 + 1 + 1) / 3, (3 + 2 + 2) / 3, (3 + 3 + 2) / 3])
    assert found["own"][:2] == pytest.approx([0, (2 + 1 + 0) / 3])
    assert found["chance"][:2] == pytest.approx([(1 + 1 + 2) / 3, (1 + 1 + 3) / 3])
    short = measure_ecr(ids, torch.tensor([1, 1]), bag, [1])  # a chain that ends before its chunks
    assert short["maximum"] == pytest.approx([(2 + 1) / 2])


def test_ecr_maximum_of_a_short_chunk():
    """The padding of a short last chunk is no token that stands there often."""
    bag, ids = torch.tensor([[[5, -1, -1, -1]]]), torch.tensor([[[5]]])
    found = measure_ecr(ids, torch.tensor([1]), bag, [1, 2])
    assert found["own"] == found["maximum"] == [1, 1]


# -------------------------------------------------------------------------------------------------------------- spans

def spans_of(length, n, c, N):
    tokens = torch.arange(100, 100 + length)[None]
    found = spans(tokens, torch.tensor([length]), torch.tensor([n]), c, N)[0].tolist()
    return [[i - 100 for i in span if i >= 0] for span in found]


def test_spans_are_the_chunks_where_their_number_is_that_of_the_latents():
    for c in (2, 3, 4, 5):
        for length in range(1, 40):
            n = -(-length // c)
            assert spans_of(length, n, c, n) == [list(range(length))[i * c:i * c + c] for i in range(n)]


def test_spans_are_equal_else_and_never_empty():
    assert spans_of(6, 2, 2, 4) == [[0, 1, 2], [3, 4, 5], [], []]  # two latents of four positions
    for length in range(1, 20):
        for n in range(1, 20):
            found = spans_of(length, n, 2, n)
            assert all(found) and set(sum(found, [])) == set(range(length))
            assert max(map(len, found)) - min(map(len, found)) <= 1 or -(-length // 2) == n


def test_spans_are_sets_and_an_empty_path_has_none():
    found = spans(torch.tensor([[7, 7, 8, 9]]), torch.tensor([4]), torch.tensor([2]), 2, 2)
    assert found.tolist() == [[[7, -1], [8, 9]]]
    assert (spans(torch.tensor([[7, 7]]), torch.tensor([0]), torch.tensor([2]), 2, 2) == -1).all()
    assert (spans(torch.tensor([[7, 7]]), torch.tensor([2]), torch.tensor([0]), 2, 2) == -1).all()


# -------------------------------------------------------------------------------------------------------- parallelism

def test_one_path_followed():
    n_eff, covered = follow(even(1, 2), even(3, 4), even(9, 8))
    assert n_eff == pytest.approx(1, abs=0.01) and covered == 1


def test_two_paths_followed_alike():
    n_eff, covered = follow(even(1, 2, 5, 6), even(3, 4, 7, 8), even(9, 8))
    assert n_eff == pytest.approx(2) and covered == 2


def test_three_to_one_is_between():
    p = 0.75 ** 2 / (0.75 ** 2 + 0.25 ** 2)  # two of two positions tell the paths apart, their scores are means
    p = math.sqrt(p / (1 - p)) / (1 + math.sqrt(p / (1 - p)))
    n_eff, covered = follow({1: .375, 2: .375, 5: .125, 6: .125}, {3: .375, 4: .375, 7: .125, 8: .125},
                            paths=path(A[:2], B[:2]), n=torch.tensor([2]))
    assert n_eff == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)), abs=1e-5) and covered == 2


def test_no_path_followed_is_high_in_n_eff_and_nothing_in_covered():
    n_eff, covered = follow(even(30), even(31), even(32))
    assert n_eff == pytest.approx(2) and covered == 0


def test_uniform_follows_all_alike_and_covers_none():
    n_eff, covered = follow(*[even(*range(V))] * 3)
    assert n_eff == pytest.approx(2) and covered == 0  # 1/40 a token is less than COVER


def test_a_span_half_there_is_not_covered():
    assert follow(even(1), even(3, 4), even(9, 8))[1] == 0.5


def test_two_paths_that_share_a_span_are_one_there():
    """Where one path is followed, the other is not covered by what they share, whatever the order of the tokens."""
    paths = path([[1, 2], [3, 4]], [[2, 1], [5, 6]], [[1, 2], [5, 6]])
    n_eff, covered = follow(even(1, 2), even(5, 6), paths=paths, n=torch.tensor([2]))
    assert covered == 1 and n_eff == pytest.approx(2, abs=0.02)  # the second and third are the same path


def test_positions_past_the_chain_and_paths_that_are_not_there():
    paths = torch.cat([PATHS, torch.full_like(PATHS[:, :1], -1)], 1)
    assert follow(even(1, 2), even(3, 4), even(9, 8), paths=paths) == pytest.approx(follow(even(1, 2), even(3, 4), even(9, 8)))
    longer = torch.cat([paths, torch.full_like(paths[:, :, :1], -1)], 2)
    same = follow(even(1, 2), even(3, 4), even(9, 8), {}, paths=longer)
    assert same == pytest.approx(follow(even(1, 2), even(3, 4), even(9, 8)))


def test_nothing_that_tells_the_paths_apart_is_undefined():
    assert math.isnan(follow(even(1, 2), paths=path([[1, 2]], [[2, 1]]), n=torch.tensor([1]))[1])


def test_orders():
    """The mass on each path's own tokens; NaN where they have none."""
    mass = orders(*top({1: .5, 2: .2, 5: .2, 6: .1}, {3: 1}, even(9, 8)), path(A, B))
    assert mass[0, :, 0].tolist() == pytest.approx([.7, .3]) and mass[0, :, 1].tolist() == pytest.approx([1, 0])
    assert mass[0, :, 2].isnan().all()
    shared = orders(*top({1: .5, 2: .5}), path([[1, 2]], [[1, 6]]))  # token 1 is of both
    assert shared[0, :, 0].tolist() == pytest.approx([.5, 0])


# -------------------------------------------------------------------------------------------------------------- shape

def test_shape():
    z = torch.tensor([[[3.0, 4.0], [4.0, -3.0], [0.0, 0.0]], [[6.0, 8.0], [6.0, 8.0], [3.0, 4.0]]])
    values = torch.tensor([[[0.5], [1.0], [9.0]], [[0.7], [1.0], [0.2]]])
    lat = SimpleNamespace(n=torch.tensor([2, 3]), ids=torch.zeros(2, 3, 1), values=values, z=z,
                          entropy=torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]]))
    found = shape(lat)
    assert found["count"] == [2, 2, 1]
    assert found["entropy"] == [2, 3, 5] and found["top1"] == pytest.approx([0.6, 1, 0.2])
    assert found["norm"] == pytest.approx([7.5, 7.5, 5]) and found["cosine"] == pytest.approx([0.5, 1])


# ----------------------------------------------------------------------------------------------- chains handed over

def test_a_model_handed_its_own_chain_writes_what_it_wrote(toy_tokenizer):
    """`observe` keeps the z that were fed; `given` puts them, and <eot>, where they stood. Without any it is plain decoding."""
    t = toy_tokenizer
    torch.manual_seed(0)
    llm = GPT(GPTConfig(t.n_vocab, 96, 1, 2, 16)).double().requires_grad_(False)
    for p in llm.parameters():
        p.add_(0.5 * torch.randn_like(p))
    test = data.Problems(list(toy.problems(1, 6, lambda question: True)), t, 96)
    env = SimpleNamespace(tokenizer=t, device=torch.device("cpu"), autocast=contextlib.nullcontext, test=test, c=2, caps=(5, 8), size=4)
    env.evaluate = functools.partial(evaluate, problems=test, env=env, caps=env.caps, batch_size=4)
    said = lambda answers: [answers[row][0].removeprefix("<eot>") for row in range(6)]

    lat = analyze.observe(llm, env, 0, 6)
    assert lat.n.max() == 5 and len(set(said(lat.answers))) > 1
    lat.z = lat.z.double()
    handed = said(analyze.given(llm, env, lat.z, lat.n)["answers"])
    assert all(a.startswith(b) for a, b in zip(handed, said(lat.answers)))  # its own <eot> was one of the 8 tokens it had
    assert said(analyze.given(llm, env, lat.z, 0 * lat.n, end=False)["answers"]) == said(env.evaluate(llm, thought="text")["answers"])
    cut = [said(found["answers"]) for found in analyze.prefixes(llm, env, lat)[1]]
    assert len(cut) == 6 and cut[5] == handed and cut[2] not in (cut[0], cut[5])


# -------------------------------------------------------------------------------------------------------------- paths

def solved(*texts):
    models = {f"m{i}": {"is_correct": ok, "solution": text} for i, (text, ok) in enumerate(texts)}
    return json.dumps({"question": " Q? ", "ground_truth": "x", **models})


def test_the_right_chains_of_a_published_line():
    line = solved(("1+1 = <<1+1=2>>2\nA: 2", True), ("<<3-1=2>>2\nA: 2", True), ("<<9-1=8>>8\nA: 8", False))
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


# ----------------------------------------------------------------------------------------------------------- the page

class Page(HTMLParser):
    """Tags opened and closed, and the text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag in ("details", "div", "svg", "table", "figure", "style"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("details", "div", "svg", "table", "figure", "style"):
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def test_a_problem_full_of_markup_is_text(toy_tokenizer):
    """Question, chain, answer, tokens and what the model says: nothing of it becomes a tag or an attribute."""
    evil = '<script>alert("1")</script> \'&amp; </details>'
    ids = torch.tensor([toy_tokenizer.encode('<>"&\'')])
    lat = SimpleNamespace(ids=ids[:, None], values=torch.full((1, 1, 5), 0.2), n=torch.tensor([1]), answers={0: (evil, False)})
    problem = {"question": evil, "chain": evil, "answer": evil}
    html = analyze.picture({"encoder": lat, "latent": lat}, 0, problem, toy_tokenizer, ids[:, None, :2])
    page = Page(html)
    assert "&lt;<small>20" in html and "&lt;&gt;<small>1<" in html
    assert "script" not in page.tags and page.tags.count("details") == 1 and not page.open
    assert page.text.count(evil) == 4 and {name for name, _ in page.attributes} <= {"class", "style"}


def test_what_cannot_be_printed_is_a_dot(toy_tokenizer):
    ids = toy_tokenizer.encode("a\x1b[2J b\n")
    assert analyze.visible(toy_tokenizer, ids) == "a·[2J·b·"
    lat = SimpleNamespace(ids=torch.tensor([[ids[:3]]]), values=torch.full((1, 1, 3), 0.2), n=torch.tensor([1]))
    assert [text for text, _ in analyze.heaviest(lat, 0, toy_tokenizer)[0]] == ["a", "·", "["]


def test_chart_breaks_at_nothing():
    svg = analyze.chart({"a": [None, 0.5, 1.0], "b": [None] * 3}, [0, 1, 2])
    assert svg.count("<circle") == 2 and "nan" not in svg.lower()
    assert Page(analyze.chart({"a": [-0.5]}, [1])).open == []
    assert Page(analyze.chart({"a": []})).open == []


# ------------------------------------------------------------------------------------------------------ a run, all of it

TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "1", "--batch-size", "8", "--sft-steps", "1", "--steps", "1"]


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


def report(out, *flags):
    analyze.main(["--out", str(out), *flags])
    strict = lambda name: pytest.fail(f"{name} in report.json")
    return json.loads((out / "report.json").read_text(), parse_constant=strict)


def test_report_has_its_sections_and_no_nan(run, capsys):
    r = report(run)
    assert {"accuracy", "interval", "steps", "seconds", "unparseable", "capped", "controls", "continuation", "ecr",
            "parallelism", "shape"} <= set(r)
    assert r["accuracy"]["no_cot"] is None and "no_cot.pt" in capsys.readouterr().out
    for way in ("explicit", "latent", "gold"):
        low, high = r["interval"][way]
        assert low <= r["accuracy"][way] <= high
    assert r["parallelism"]["problems"] == 12 and r["parallelism"]["paths"] == 2
    assert r["controls"]["accuracy"]["own"] == r["accuracy"]["latent"]  # handed its own chain, it answers as it did
    for section, axis in (("controls", "k"), ("continuation", "i")):
        curve = r[section].get("cut", r[section])
        assert len(curve[axis]) == len(curve["accuracy"]) and curve[axis][0] == 0


def test_page_holds_what_the_report_says(run):
    report(run, "--limit", "10")
    html = (run / "report.html").read_text()
    page = Page(html)
    assert not page.open and "script" not in page.tags and "http" not in html.lower() and page.tags.count("details") == 10
    for p in data.load("toy", "test")[:10]:
        assert p["question"] in page.text


def test_report_is_the_same_whatever_the_batch(run):
    one, other = report(run, "--batch-size", "3"), report(run, "--batch-size", "64")
    assert (one["config"]["analyze"].pop("batch_size"), other["config"]["analyze"].pop("batch_size")) == (3, 64)
    assert one.pop("seconds").keys() == other.pop("seconds").keys() and one == other


def test_report_says_how_everything_in_it_was_made(run):
    config = report(run, "--limit", "2")["config"]
    assert set(config) == {"analyze", "sft", "sup", "latent"}
    for made in config.values():
        assert {"seed", "commit", "torch", "python", "device", "dtype", "batch_size"} <= set(made)
    assert config["analyze"]["limit"] == 2 and config["sup"]["bag"] == 1 and config["latent"]["noise"] == 0.25
    assert len({config[phase]["fingerprint"] for phase in ("sft", "sup", "latent")}) == 1
    page = Page((run / "report.html").read_text())
    assert config["sup"]["fingerprint"] in page.text and config["analyze"]["commit"] in page.text


def test_ask_shows_a_chain_of_unknown_words(run, capsys):
    analyze.main(["--out", str(run), "--ask", "Zörg <script> has 7 naïve\x1b quaggas?"])
    said = capsys.readouterr().out
    assert "z_0" in said and "\x1b" not in said.split("ask=")[1].split("\n", 1)[1].rsplit("\n", 2)[0]
    with pytest.raises(UserError, match="--block-size"):
        analyze.main(["--out", str(run), "--ask", "pens " * 500])


def test_a_toy_task_that_changed_is_refused(run, monkeypatch):
    monkeypatch.setattr(data, "TOY_SIZE", {"train": 63, "val": 8, "test": 12})
    with pytest.raises(UserError, match="fingerprint"):
        analyze.main(["--out", str(run)])


def test_gsm8k_from_end_to_end(gsm8k, gpt2_tokenizer, tmp_path, monkeypatch):
    """GSM8K's own lines, few of them: paths come from the published solutions, or there are none and the rest is there."""
    monkeypatch.setattr(analyze, "POINTS", 2)
    for name in ("train", "test"):
        lines = (gsm8k / f"{name}.jsonl").read_text("utf-8").splitlines()[:100 if name == "train" else 8]
        lines = [line for line in lines if len(line) < 500 or name == "test"]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    flags = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    train_sup.main([*flags, *TINY, "--block-size", "384"])
    compress.main(flags)
    train_latent.main([*flags, "--steps", "1"])
    assert report(tmp_path / "out", *flags[:2], "--limit", "2")["parallelism"] is None
    solutions = gsm8k / "example_model_solutions.jsonl"
    if solutions.is_file():
        (tmp_path / solutions.name).write_text("\n".join(solutions.read_text("utf-8").splitlines()[:8]), "utf-8")
        assert report(tmp_path / "out", *flags[:2])["parallelism"]["problems"] > 1
