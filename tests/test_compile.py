"""With torch.compile two graphs serve a kind of mask, whatever the width; decoding makes none.

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
from encoder import Parts, count_chunks
from lab.flags import fill_in, parser
from model import GPT, GPTConfig

BATCH, K = 4, 5            # batch size, entries of α
LAYERS, CHANNELS = 3, 20   # CHANNELS is no width: a graph for widths of its own kind is one more
STEPS, BAG_STEPS = 12, 6   # updates: two epochs, the first of them those of the bags


@pytest.fixture
def tokenizer():
    """Each word is the token 1; what is decoded is no number."""
    return SimpleNamespace(**vars(VOCAB), name="words", vocabulary={}, decode=str,
                           encode=lambda text: [1] * len(text.split()))


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
    """torch.compile that counts its graphs, and compares each compiled call to a plain one.

    calls: of each call its slots, whether it is in training, and how many graphs there were
    """

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
            self.calls.append((x.size(1), torch.is_grad_enabled(), len(self.graphs)))
            return found

        return compared


class EvenStore:
    """α that are the same everywhere: K ids of equal mass."""

    values = torch.full((1, K), 1 / K)

    def __init__(self, problems, c):
        self.n = count_chunks(problems.s.length, c)

    def read(self, rows, N):
        shape = len(rows), N, K
        return torch.full(shape, 1 / K), torch.arange(K).expand(shape).contiguous()


def run(loop, problems, tokenizer, out):
    """The script's own loop with new models; it evaluates every six updates."""
    config = GPTConfig(VOCAB.n_vocab, 64, LAYERS, n_head=2, n_embd=CHANNELS)
    llm, encoder = GPT(config), GPT(config)
    args = parser("", "sup").parse_args(
        f"--batch-size {BATCH} --steps {STEPS} --bag-steps {BAG_STEPS} --eval-every 6 --compile "
        f"--out {out}".split())
    fill_in(args, "sup", None)
    vars(args).update(noise=1.0, start="sup", on_policy=0.5)
    env = SimpleNamespace(
        device=torch.device("cpu"), tokenizer=tokenizer, parts=Parts(), made_by={},
        settings=vars(args) | {"out": None}, autocast=lambda: torch.autocast("cpu", enabled=False))
    if loop == "sup":
        train_sup.train_superposition(encoder, llm, problems, problems, args, env)
    elif loop == "latent":
        store = EvenStore(problems, args.chunk_size)
        train_latent.train_latent(llm, store, problems.caps(args.chunk_size), problems, problems,
                                  args, env)
    else:
        train_sup.train_explicit(loop, llm, problems, problems, STEPS, args, env)


def test_two_graphs_serve_all_layers_widths_and_models(problems, tokenizer, tmp_path, monkeypatch):
    """One for the last block, which goes on with a few slots alone, and one for the others.

    Both are made in a loop's first update: the causal mask's in the first loop, those of the masks
    of phase 1, one a problem, in that one; those of on-policy passes, without gradient, in phase 3.
    """
    torch.manual_seed(0)
    watch = Watch(monkeypatch)
    # in phase 1 the LLM is idle as long as there are bags; then it reads either half of a batch
    in_sup = STEPS + 2 * (STEPS - BAG_STEPS)
    for loop, passes, graphs in (("sft", STEPS, 2), ("no_cot", STEPS, 2), ("sup", in_sup, 4),
                                 ("latent", STEPS, 6)):
        watch.calls.clear()
        run(loop, problems, tokenizer, tmp_path)
        calls = [(width, made) for width, training, made in watch.calls if training]
        assert len(calls) == passes * LAYERS < len(watch.calls)  # and those of the evaluations
        assert len({width for width, _ in calls}) >= 3
        assert {made for _, made in calls[LAYERS:]} == {len(watch.graphs)} == {graphs}
    assert not dynamo.utils.counters["graph_break"]
