"""With torch.compile a loop makes two graphs, both in its first update, and decoding makes none.

The loops are the scripts' own, evaluations included. The backend here runs the captured graphs as
they are: what is counted is Dynamo's work, which no backend changes.
"""
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch._dynamo as dynamo

import common
import train_latent
import train_sup
from conftest import VOCAB
from data import Problems
from model import GPT, GPTConfig

C, BATCH, K = 2, 4, 5      # chunk size, batch size, entries of α
LAYERS, CHANNELS = 3, 20   # CHANNELS is no width: a graph for widths of its own kind is one more
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


class Call(NamedTuple):
    """A call of a block: with how many slots, in training or not, how many graphs there were."""

    width: int
    training: bool
    graphs: int


class Watch:
    """torch.compile that counts its graphs, and compares each compiled call to a plain one."""

    def __init__(self, monkeypatch):
        self.compiler, self.graphs, self.calls = torch.compile, [], []
        dynamo.reset()
        dynamo.utils.counters.clear()
        monkeypatch.setattr(torch, "compile", self.compile)

    def backend(self, graph, inputs):
        self.graphs.append(graph)
        return graph

    def compile(self, function, **options):
        compiled = self.compiler(function, backend=self.backend, **options)

        def compared(x, *others):
            with torch.no_grad():
                plain = function(x, *others)
            found = compiled(x, *others)
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
            self.calls.append(Call(x.size(1), torch.is_grad_enabled(), len(self.graphs)))
            return found

        return compared


def run(phase, problems, tokenizer, out):
    """The script's own loop, which evaluates every ten updates."""
    config = GPTConfig(VOCAB.n_vocab, 64, LAYERS, n_head=2, n_embd=CHANNELS)
    llm, encoder = GPT(config), GPT(config)
    args = SimpleNamespace(
        out=out, lr=1e-3, resume=False, overwrite=False, compile=True, seed=0,
        batch_size=BATCH, eval_every=10, steps=STEPS, chunk_size=C, top_k=0, bag=1.0,
        bag_steps=BAG_STEPS, encoder_first=0, follow=1.0, ltsum="on",
        noise=1.0, start="sup")
    env = SimpleNamespace(
        device=torch.device("cpu"), rank=0, world=1, tokenizer=tokenizer,
        config=dict.fromkeys(common.Run.DEPENDS),
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


@pytest.mark.parametrize("phase, blocks", [
    ("sft", STEPS * LAYERS),
    ("sup", (STEPS + STEPS - BAG_STEPS) * LAYERS),  # the LLM is idle as long as there are bags
    ("latent", STEPS * LAYERS),
])
def test_two_graphs_serve_all_layers_and_widths(
        phase, blocks, problems, tokenizer, tmp_path, monkeypatch):
    """One for the last block, which goes on with a few slots alone, and one for the others."""
    torch.manual_seed(0)
    watch = Watch(monkeypatch)
    run(phase, problems, tokenizer, tmp_path)
    training = [call for call in watch.calls if call.training]
    assert len(training) == blocks < len(watch.calls)  # the others are those of the evaluations
    assert len({call.width for call in training}) >= 3
    assert {call.graphs for call in training[LAYERS:]} == {len(watch.graphs)} == {2}
    assert not dynamo.utils.counters["graph_break"]


def test_and_the_models_that_come_after(problems, tokenizer, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    for name in "explicit", "no_cot":
        run("sft", problems, tokenizer, tmp_path / name)
    assert len(watch.graphs) == 2
