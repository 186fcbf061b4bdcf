"""With torch.compile a run makes as many graphs as its batches have widths, all in the warm-up, and without a break.

The backend here runs the captured graphs as they are: what is counted is Dynamo's work, which no backend changes.
"""
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo as dynamo

import common
import train_latent
import train_sup
from conftest import VOCAB
from data import Problems
from encoder import encoder_layout, explicit_layout, llm_layout
from model import GPT, GPTConfig

C, BATCH, K = 2, 4, 5  # chunk size, batch size, entries of α


@pytest.fixture
def problems():
    """Three buckets of problems of quite different lengths, some with a chain that ends in a short chunk."""
    def text(n):
        return " ".join(["1"] * n)
    words = SimpleNamespace(encode_ordinary=lambda text: [1] * len(text.split()))
    sizes = [(4, 5), (5, 6), (4, 6), (6, 5),
             (9, 11), (10, 12), (9, 12), (10, 10), (16, 20), (17, 20), (17, 21), (18, 22)]
    rows = [dict(question=text(q), chain=text(s), answer=text(1)) for q, s in 2 * sizes]
    return Problems(rows, SimpleNamespace(**vars(VOCAB), encoding=words), 64)


def module_and_inputs(phase):
    """The phase's module, and the function from a batch to what its forward takes, as in the script's loop."""
    llm, encoder = (GPT(GPTConfig(VOCAB.n_vocab, 64, n_layer=2, n_head=2, n_embd=16)) for _ in range(2))
    if phase == "sft":
        return train_sup.Explicit(llm), lambda batch, step: (explicit_layout(batch),)
    if phase == "sup":
        return (train_sup.Superposition(encoder, llm, VOCAB.n_ordinary, 0, False), lambda batch, step: (
            encoder_layout(batch, C, VOCAB.sum), llm_layout(batch, C), train_sup.bags(batch, C),
            torch.tensor(1 - step / 30)))

    def inputs(batch, step):
        seq = llm_layout(batch, C, text=False)
        shape = (BATCH, seq.mark.size(1), K)
        values, ids = torch.full(shape, 1 / K), torch.zeros(shape, dtype=torch.int64)
        return seq, values, ids, train_latent.gumbel_noise(0, step, shape)
    return train_latent.LatentReasoner(llm), inputs


@pytest.mark.parametrize("phase", ["sft", "sup", "latent"])
def test_as_many_graphs_as_widths(phase, problems, tmp_path, monkeypatch):
    made, compiler = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda m, **kw: compiler(m, backend=backend, **kw))
    dynamo.reset()
    dynamo.utils.counters.clear()
    torch.manual_seed(0)
    module, inputs = module_and_inputs(phase)
    args = SimpleNamespace(out=tmp_path, lr=1e-3, resume=False, overwrite=False, compile=True, batch_size=BATCH,
                           seed=0, eval_every=10)
    env = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, config={},
                          autocast=lambda: torch.autocast("cpu", enabled=False))
    run, widths, graphs = common.Run(phase, args, env, module, {"llm": module.llm}, problems, 30), set(), []
    for batch in run:
        layouts = inputs(batch, run.step)
        with torch.no_grad():
            plain = module(*layouts)[0]
        loss, figures = run.forward(*layouts)
        assert abs(float(loss.detach() - plain)) < 1e-5
        run.update(loss, figures)
        widths.add(layouts[0].ids.shape)
        graphs.append(len(made))
        if run.step % 10 == 0:  # what an evaluation does in between: another mode, no gradients, the cache
            module.llm.eval(), module.llm.train()
    assert len(widths) == len(problems.buckets) == 3
    assert not dynamo.utils.counters["graph_break"]
    assert graphs[-1] == 3, "one graph a width"
    per_epoch = len(problems) // BATCH
    assert set(graphs[per_epoch - 1:]) == {3}, "and none after each was met once"
