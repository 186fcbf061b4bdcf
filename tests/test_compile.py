"""With torch.compile a loop makes as many graphs as its batches have widths, all in one epoch.

The loops are the scripts' own, evaluations included. The backend here runs the captured graphs as
they are: what is counted is Dynamo's work, which no backend changes.
"""
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo as dynamo

import train_latent
import train_sup
from conftest import VOCAB
from data import Problems
from encoder import Layout
from model import GPT, GPTConfig

C, BATCH, K = 2, 4, 5      # chunk size, batch size, entries of α
STEPS, BAG_STEPS = 30, 12  # updates: five epochs; those of the bags: two


@pytest.fixture
def tokenizer():
    """Each word is the token 1; what is decoded is no number."""
    words = SimpleNamespace(encode_ordinary=lambda text: [1] * len(text.split()))
    return SimpleNamespace(**vars(VOCAB), encoding=words, name="words", decode=str)


@pytest.fixture
def problems(tokenizer):
    """Of quite different lengths; some chains end in a short chunk."""
    def text(n):
        return " ".join(["1"] * n)

    sizes = [(4, 5), (5, 6), (4, 6), (6, 5),
             (9, 11), (10, 12), (9, 12), (10, 10),
             (16, 20), (17, 20), (17, 21), (18, 22)]
    rows = [dict(question=text(q), chain=text(s), answer=text(1)) for q, s in 2 * sizes]
    return Problems(rows, tokenizer, 64)


class Watch:
    """torch.compile that counts its graphs, and compares each compiled call to a plain one."""

    def __init__(self, monkeypatch):
        self.compiler = torch.compile
        self.calls = {}  # name of a function: for each of its calls (widths, graphs made so far)
        dynamo.reset()
        dynamo.utils.counters.clear()
        monkeypatch.setattr(torch, "compile", self.compile)

    def compile(self, function, **options):
        made, calls = [], []

        def backend(graph, inputs):
            made.append(graph)
            return graph

        def compared(*inputs):
            with torch.no_grad():
                plain = function(*inputs)
            found = compiled(*inputs)
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
            widths = tuple(t.shape for x in inputs if isinstance(x, Layout) for t in x)
            calls.append((widths, len(made)))
            return found

        compiled = self.compiler(function, backend=backend, **options)
        self.calls[function.__name__] = calls
        return compared


def run(phase, problems, tokenizer, out):
    """The script's own loop, which evaluates every ten updates."""
    config = GPTConfig(VOCAB.n_vocab, 64, n_layer=2, n_head=2, n_embd=16)
    llm, encoder = GPT(config), GPT(config)
    args = SimpleNamespace(
        out=out, lr=1e-3, resume=False, overwrite=False, compile=True, seed=0,
        batch_size=BATCH, eval_every=10, steps=STEPS, chunk_size=C, top_k=0, bag=1.0,
        bag_steps=BAG_STEPS, encoder_first=0, follow=1.0, ltsum="on",
            noise=1.0, start="sup")
    env = SimpleNamespace(
        device=torch.device("cpu"), rank=0, world=1, config={}, tokenizer=tokenizer,
        autocast=lambda: torch.autocast("cpu", enabled=False))
    if phase == "sft":
        train_sup.train_explicit(phase, llm, problems, problems, STEPS, args, env)
    elif phase == "sup":
        train_sup.train_superposition(encoder, llm, problems, problems, args, env)
    else:
        train_latent.train_latent(llm, EvenStore(), problems, problems, args, env)


class EvenStore:
    """α that are the same everywhere: K ids of equal mass."""

    top_k = K

    def read(self, rows, N):
        shape = len(rows), N, K
        return torch.full(shape, 1 / K), torch.arange(K).expand(shape).contiguous()


@pytest.mark.parametrize("phase, updates", [
    ("sft", {"explicit_loss": STEPS}),
    ("sup", {"bag_loss": BAG_STEPS, "sup_loss": STEPS - BAG_STEPS}),
    ("latent", {"latent_loss": STEPS}),
])
def test_as_many_graphs_as_widths(phase, updates, problems, tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(0)
    watch = Watch(monkeypatch)
    run(phase, problems, tokenizer, tmp_path)
    assert {name: len(calls) for name, calls in watch.calls.items()} == updates
    assert not dynamo.utils.counters["graph_break"]
    per_epoch = len(problems) // BATCH
    for name, calls in watch.calls.items():
        widths = len({widths for widths, _ in calls})
        assert 3 <= widths <= 1 + problems.bucket.max()
        graphs = [made for _, made in calls]
        assert graphs[-1] == widths, f"{name}: one graph a width"
        assert set(graphs[per_epoch - 1:]) == {widths}, f"{name}: and none after each was met once"


def test_a_second_model_is_compiled_too(tokenizer, tmp_path, monkeypatch):
    """The two baselines share a function: the second one still finds room for all its widths."""
    rows = [dict(question="1 1", chain=" ".join(["1"] * n), answer="1")
            for n in range(3, 43, 8) for _ in range(BATCH)]
    watch = Watch(monkeypatch)
    for name in "explicit", "no_cot":
        run("sft", Problems(rows, tokenizer, 64), tokenizer, tmp_path / name)
        calls = watch.calls["explicit_loss"]
        assert calls[-1][1] == len({widths for widths, _ in calls}) == 5  # together more than 8
