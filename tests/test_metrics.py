"""Every metric on an α written by hand, where the right value is known, or beside a plain loop."""
import itertools
import math
from collections import Counter

import pytest
import torch

import toy
from encoder import pad
from lab.metrics import (Latents, calculate, count_errors, covered_chunks,
                         effective_paths, error_type, mean, measure_ecr, measure_parallelism,
                         chunked_paths, paths_of_next_problems, token_mass, wilson)

V = 40  # ids of the vocabulary here


def top(*latents, K=V):
    """values, ids (1, N, K) of one chain, given {token: weight} for each latent, else 0."""
    dense = torch.zeros(1, len(latents), V)
    for t, alpha in enumerate(latents):
        for token, weight in alpha.items():
            dense[0, t, token] = weight
    return dense.topk(K)


def even(*tokens):
    return {token: 1 / len(tokens) for token in tokens}


def path(*paths):
    """A problem's paths, one list of chunks each: int64 (1, M, N, c)."""
    c = max(len(chunk) for chunks in paths for chunk in chunks)
    return torch.stack([pad(chunks, c, value=-1) for chunks in paths])[None]


A, B = [[1, 2], [3, 4], [9, 8]], [[5, 6], [7, 8], [9, 8]]  # two paths that end alike


def follow(*latents, paths=path(A, B), n=3):
    """(N_eff, covered) of one chain."""
    mass = token_mass(*top(*latents), paths)
    n_eff = effective_paths(mass, paths, torch.tensor([n]))
    covered, most = covered_chunks(mass, paths)
    return n_eff.item(), covered[most > 1].float().mean().item()  # where the paths differ


def test_an_interval_and_a_mean():
    low, high = wilson(8, 10)  # 0.4902 to 0.9433, as in any table
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)
    assert mean(torch.tensor([])) is None and mean(torch.tensor([math.nan])) is None
    assert mean(torch.tensor([1.0, math.nan, 3.0])) == 2


def test_ecr_beside_a_plain_loop():
    """Tokens that repeat, short last chunks, chains that are shorter or longer than the text's."""
    g = torch.Generator().manual_seed(0)
    c, ks, n = 3, [1, 2, 3, 8], [3, 2, 2, 1, 0]
    text = [torch.randint(0, 6, (length,), generator=g).tolist() for length in (7, 3, 10, 1, 5)]
    chunks = [[row[i:i + c] for i in range(0, len(row), c)] for row in text]
    ids = torch.rand(5, 4, 12, generator=g).argsort(2)[:, :, :8]
    padded = pad(text, 4 * c, value=-1).view(5, 4, c)
    found = measure_ecr(ids, torch.tensor(n), padded, ks)
    counted = [(r, t) for r in range(5) for t in range(min(n[r], len(chunks[r])))]

    def held(chunk, r, t, k):
        return sum(token in ids[r, t, :k].tolist() for token in chunk)

    for i, k in enumerate(ks):
        own = [held(chunks[r][t], r, t, k) for r, t in counted]
        # the problem before may have fewer chunks: they are repeated from the first
        chance = [held(chunks[r - 1][t % len(chunks[r - 1])], r, t, k) for r, t in counted]
        most = [sum(count for _, count in Counter(chunks[r][t]).most_common(k)) for r, t in counted]
        for name, counts in (("own", own), ("chance", chance), ("maximum", most)):
            assert found[name][i] == pytest.approx(sum(counts) / len(counted))
    assert math.isnan(measure_ecr(ids, torch.zeros(5).long(), padded, [1])["own"][0])


# ---------------------------------------------------------------------------- one chain's paths

@pytest.mark.parametrize("latents, n_eff, covered", [
    ([even(1, 2), even(3, 4), even(9, 8)], 1, 1),              # one is followed
    ([even(1, 2, 5, 6), even(3, 4, 7, 8), even(9, 8)], 2, 2),  # both alike
    ([even(30), even(31), even(32)], 2, 0),  # none: high in N_eff, nothing in covered
    ([even(*range(V))] * 3, 2, 0),           # all tokens alike: 1/40 is less than COVER
    ([even(1), even(3, 4), even(9, 8)], 1, 0.5),  # a chunk half there
])
def test_paths_followed(latents, n_eff, covered):
    found = follow(*latents)
    assert found == (pytest.approx(n_eff, abs=0.01), covered)
    # a path that is not there and positions past the chain change nothing
    paths = torch.cat([path(A, B), torch.full((1, 1, 3, 2), -1)], 1)
    paths = torch.cat([paths, torch.full((1, 3, 1, 2), -1)], 2)
    assert follow(*latents, {}, paths=paths) == pytest.approx(found)


def test_three_to_one_is_between():
    """Both positions tell the paths apart, and a score is the mean over them: shares 3/4, 1/4."""
    first, second = ({a: .375, b: .375, x: .125, y: .125} for a, b, x, y in
                     ((1, 2, 5, 6), (3, 4, 7, 8)))
    n_eff, covered = follow(first, second, paths=path(A[:2], B[:2]), n=2)
    entropy = -sum(p * math.log(p) for p in (0.75, 0.25))
    assert n_eff == pytest.approx(math.exp(entropy), abs=1e-5) and covered == 2


def test_paths_that_share_a_span_are_one_there():
    """What a path shares with the one that is followed, in any order, covers no other path."""
    paths = path([[1, 2], [3, 4]], [[2, 1], [5, 6]], [[1, 2], [5, 6]])
    n_eff, covered = follow(even(1, 2), even(5, 6), paths=paths, n=2)
    assert covered == 1
    assert n_eff == pytest.approx(2, abs=0.02)  # the second and third are the same path
    assert math.isnan(follow(even(1, 2), paths=path([[1, 2]], [[2, 1]]), n=1)[1])  # no difference


def test_the_mass_of_tokens_is_that_of_a_plain_search():
    """With ids that no path has, tokens that are not among the entries, and padding."""
    g = torch.Generator().manual_seed(0)
    R, M, N, c, K, V = 3, 2, 4, 3, 5, 9
    ids = torch.rand(R, N, V, generator=g).topk(K).indices.int()
    values = torch.rand(R, N, K, generator=g)
    tokens = torch.randint(-1, V + 3, (R, M, N, c), generator=g)
    mass = token_mass(values, ids, tokens)
    for r, m, t, w in itertools.product(range(R), range(M), range(N), range(c)):
        alpha = dict(zip(ids[r, t].tolist(), values[r, t].tolist()))
        assert mass[r, m, t, w].item() == alpha.get(tokens[r, m, t, w].item(), 0)


# -------------------------------------------------------------------------- the paths of a split

def test_random_paths_are_those_of_the_next_problems_and_never_its_own():
    own = [[[1], [2, 3]], [[4, 4, 4], [5], [6]], [[7], [8]]]
    assert paths_of_next_problems(own) == [[[4, 4, 4], [5]], [[7], [8], [1]], [[1], [2, 3]]]
    most = [[[1], [2]], [[3], [4], [5], [6], [7]]]  # one problem has most of them
    assert paths_of_next_problems(most) == [[[3], [4]], [[1], [2], [1], [2], [1]]]
    assert chunked_paths(own, 2).tolist() == [
        [[[1, -1], [-1, -1]], [[2, 3], [-1, -1]], 2 * [[-1, -1]]],
        [[[4, 4], [4, -1]], [[5, -1], [-1, -1]], [[6, -1], [-1, -1]]],
        [[[7, -1], [-1, -1]], [[8, -1], [-1, -1]], 2 * [[-1, -1]]]]


def plain_covered(alpha, paths, c):
    """(covered, most) of one chain, means over the latents where its paths differ."""
    held, most = [], []
    for t, at in enumerate(alpha.tolist()):
        chunks = {frozenset(tokens[t * c:t * c + c]) for tokens in paths}
        if len(chunks) > 1:
            held.append(sum(all(at[token] >= 0.03 for token in chunk) for chunk in chunks))
            most.append(len(chunks))
    return sum(held) / len(held), sum(most) / len(most)


def test_parallelism_beside_a_plain_search(toy_tokenizer):
    """Ten of the toy task's problems. One path: the m-th. All: α is the mean of the six."""
    c, m = 2, 3
    paths = [[toy_tokenizer.encode(text) for text in problem["paths"]]
             for problem in toy.problems(0, 10, lambda question: True)]
    n = torch.tensor([-(-len(known[m]) // c) for known in paths])
    one = torch.zeros(10, int(n.max()), toy_tokenizer.n_ordinary)
    every = torch.zeros_like(one)
    for r, k in itertools.product(range(10), range(6)):
        for i, token in enumerate(paths[r][k]):
            one[r, i // c, token] += (k == m) / 2
            every[r, i // c, token] += 0.5 / 6 * (r < 5 or k < 1)  # five follow one path alone
    chains = {}
    for whose, alpha in (("encoder", one), ("latent", every)):
        values, ids = alpha.topk(50)
        chains[whose] = Latents(n, values, ids.int(), None, {})
    both = {whose: [*paths, [[1, 2]]] for whose in chains}
    found = measure_parallelism(chains, both, c)
    assert (found["problems"], found["paths"]) == (10, 6)
    assert found["encoder"]["covered"] == 1 > found["encoder"]["covered_random"]
    plain = [plain_covered(alpha, known, c) for alpha, known in zip(every, paths)]
    covered, most = (sum(column) / 10 for column in zip(*plain))
    assert found["latent"]["covered"] == pytest.approx(covered)
    assert found["latent"]["covered_most"] == pytest.approx(most) and most > covered > 1
    assert found["latent"]["above_1.7"] == sum(one > 1.7 for one, _ in plain) / 10 < 1
    bins = [sum(int(2 * one) == k for one, _ in plain) / 10 for k in range(8)]
    assert found["latent"]["histogram"] == pytest.approx(bins)
    assert found["latent"]["n_eff"] > found["encoder"]["n_eff"]
    # the first latent is << and one of three numbers: two orders begin with each
    assert found["latent"]["most_by_latent"][0] == 3 and found["latent"]["by_latent"][0] == 2
    assert measure_parallelism(chains, {**both, "latent": [paths[0]] + [[[1]]] * 9}, c) is None


# ------------------------------------------------------------------------------ errors of a chain

QUESTION = "Of Ida's 14 pens 25% are red. She buys 3 boxes of 6, and loses half a dozen."


@pytest.mark.parametrize("chain, why", [
    ("<<3*6=18>> <<14+18=32>>#### ", "no number"),
    ("<<3*6=18>> <<14+18=31>>#### 31", "arithmetic"),
    ("<<14+=32>>#### 32", "arithmetic"),
    ("<<3*6>> #### 18", "arithmetic"),
    ("<<14/3=4.67>> <<4.67*3=14.01>>#### 14", "steps"),  # rounded to two places
    ("<<14/3=4.6>>#### 4.6", "arithmetic"),
    ("<<18+14=32>> <<3*6=18>>#### 32", "operand"),  # a result that is not there yet
    ("<<3*7=21>> <<14+21=36>>#### 36", "operand"),  # the first fault counts
    ("<<3*7=22>>#### 22", "arithmetic"),            # and of one step its equation
    ("<<14*.25=3.5>> <<14*25/100=3.5>> <<3*6/2=9>> <<9+12=21>>#### 21", "steps"),
    ("<<3-14=-11>> <<14-11=3>> <<3,000/3=1,000>>#### 3", "operand"),
    ("<<3-14=-11>> <<14-11=3>>#### 3", "steps"),
    ("It is #### 5", "steps"),
])
def test_the_first_fault_of_a_chain(chain, why):
    assert error_type(QUESTION, "<eot>" + chain) == why
    answers = {0: (chain, False, []), 1: (chain, True, [])}  # the second one is right
    assert count_errors(2 * [{"question": QUESTION}], answers)[why] == 1


@pytest.mark.parametrize("text", [
    "", "(", "1/0", "1(2)", "2**9", "9//2", "1.2.3", "x", "()", "1 2", "٣", "-" * 199, "(" * 199,
    "(" * 90 + "1" + ")" * 90 + "2", "9" * 201])
def test_what_is_no_arithmetic_has_no_value(text):
    assert calculate(text) is None
