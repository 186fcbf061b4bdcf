"""Several paths at once: their mean, steps that are parallel, and chains that the model thinks."""
import itertools
import re

import numpy as np
import pytest
import torch

from compress import mean_alpha
from conftest import VOCAB, close, random_batch, tiny
from decode import decode, question_prompt
from encoder import Batch, Parts, encoder_batch, latent_batch, ordinary_softmax, summary_states
from lab.paths import left_out, orders, parallel_runs, with_same_places
from lab.renumber import NUMBER, value_of
from losses import own_latents

ENV = type("Env", (), {"tokenizer": VOCAB, "device": torch.device("cpu"), "parts": Parts()})


# ------------------------------------------------------------------------------ the mean over paths

def test_the_mean_over_paths_is_that_of_a_plain_loop():
    batch, encoder = random_batch([5, 7, 4], seed=1), tiny(0)
    rng = np.random.default_rng(2)
    chains = [[p.chain, *(rng.permutation(p.chain).tolist() for _ in range(m))]
              for p, m in zip(batch.problems, (2, 0, 1))]
    found = mean_alpha(encoder, batch, chains, 2, ENV)                      # (B, N, V)
    for row, mine in enumerate(chains):
        each = []
        for chain in mine:
            problem = batch.problems[row]._replace(chain=chain)
            layout = encoder_batch(Batch(batch.rows[[row]], [problem]), 2, VOCAB.sum)
            hidden = summary_states(encoder, layout)
            each.append(ordinary_softmax(encoder.head(hidden), VOCAB.n_ordinary)[0])
        mean = torch.stack(each).mean(0)                                    # (n, V)
        close(found[row, :len(mean)], mean, 1e-6)


def test_paths_are_averaged_where_their_tokens_and_step_ends_lie_alike(toy_tokenizer):
    chains = ["<<1+2=3>> <<4+5=9>>", "<<4+5=9>> <<1+2=3>>", "<<1+2+3=6>> <<4=4>>", "<<1+2=3>>"]
    tokens = [toy_tokenizer.encode(chain) for chain in chains]
    assert with_same_places(tokens, toy_tokenizer) == tokens[:2]


# ----------------------------------------------------------------------------------- parallel steps

CHAINS = ["<<1+2=3>>\n<<4+5=9>>\n<<3+9=12>>",
          "<<90-30=60>> <<60*2=120>> <<8/2=4>> <<12/2=6>> <<4+6=10>>", "<<2*3=6>>",
          "<<1+1=2>> <<3+3=6>> <<4+4=8>> <<6+8=14>> <<2+14=16>>"]


def valid(steps):
    """Whether each step's numbers that are results at all are results of steps before it."""
    results = {value_of(step.rpartition("=")[2]) for step in steps}
    known = set()
    for step in steps:
        left, _, right = step.rpartition("=")
        if not results.intersection(map(value_of, NUMBER.findall(left))) <= known:
            return False
        known.add(value_of(right))
    return True


@pytest.mark.parametrize("chain", CHAINS)
def test_parallel_steps_against_all_orders(chain):
    """Steps in a row are parallel just where every order of them is valid."""
    steps = re.findall("<<(.*?)>>", chain)
    runs = parallel_runs({"chain": chain})
    covered = {step for first, count in runs for step in range(first, first + count)}
    for first, count in runs:
        for order in itertools.permutations(steps[first:first + count]):
            assert valid([*steps[:first], *order, *steps[first + count:]])
        if first + count < len(steps):  # it can't be longer
            longer = itertools.permutations(steps[first:first + count + 1])
            assert not all(valid([*steps[:first], *order]) for order in longer)
    for step in set(range(len(steps) - 1)) - covered:
        swapped = [steps[step + 1], steps[step]]
        assert step + 1 in covered or not valid([*steps[:step], *swapped, *steps[step + 2:]])
    for text in orders({"chain": chain}):
        assert valid(re.findall("<<(.*?)>>", text)) and sorted(text) == sorted(chain)


@pytest.mark.parametrize("c, places", [
    (2, range(3, 9)), (4, range(1, 4)), (8, []), (1, range(6, 18))])
def test_the_toy_tasks_free_steps_share_the_place_of_the_first(toy_tokenizer, c, places):
    chain = "<<5-2=3>> <<10+2=12>> <<4-3=1>> <<3+12=15>> <<15+1=16>>"
    tokens = toy_tokenizer.encode(chain)
    out = left_out({"chain": chain, "paths": [chain]}, tokens, toy_tokenizer, c)
    assert np.flatnonzero(out).tolist() == list(places) and len(out) == -(-len(tokens) // c)


# -------------------------------------------------------------------------------- on-policy latents

@pytest.mark.parametrize("passes", [1, 3, 5])
@pytest.mark.parametrize("c, top_k", [(1, 0), (2, 4)])
def test_the_first_latents_are_those_that_decoding_feeds(c, top_k, passes):
    """As many as there are passes; no gradient flows through them."""
    batch, llm, N = random_batch([6, 9, 3, 8], seed=3), tiny(5), 5
    fed = {}

    def watch(step, q, z, active):
        for row in active.nonzero()[:, 0].tolist():
            fed[row, step] = z[row].double()

    with torch.no_grad():
        llm.wte.weight[VOCAB.eot] = 0  # so that no chain ends before the cap
    decode(llm, VOCAB, *question_prompt(llm, batch), c=c, top_k=top_k, max_latents=N,
           max_tokens=3, on_latent=watch)
    seq = latent_batch(batch, c, np.full(4, N))
    z = torch.randn(4, N, 16, dtype=torch.float64, requires_grad=True)
    own = own_latents(llm, seq, z, VOCAB.n_ordinary, top_k, passes)
    assert not own.requires_grad and len(fed) == 4 * N
    for row in range(4):
        for step in range(passes):
            close(own[row, step], fed[row, step], 1e-6)
