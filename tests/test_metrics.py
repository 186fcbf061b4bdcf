"""Every metric on an α written by hand, where the right value is known."""
import itertools
import math

import pytest
import torch

from metrics import (calculate, chain_shape, covered_spans, ecr, effective_paths, error_type, mean,
                     measure_ecr, span_mass, span_shares, spans, token_mass, wilson)

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
    """A problem's paths, one list of spans each: int64 (1, M, N, W) as `spans` makes them."""
    W = max(len(span) for spans in paths for span in spans)
    padded = []
    for spans in paths:
        padded.append([list(span) + [-1] * (W - len(span)) for span in spans])
    return torch.tensor([padded])


A, B = [[1, 2], [3, 4], [9, 8]], [[5, 6], [7, 8], [9, 8]]  # two paths that end alike
N3, PATHS = torch.tensor([3]), path(A, B)


def follow(*latents, paths=PATHS, n=N3):
    mass = token_mass(*top(*latents), paths)
    return effective_paths(mass, paths, n).item(), covered_spans(mass, paths).item()


# ----------------------------------------------------------------------------------- small things

def test_wilson_against_the_textbook():
    low, high = wilson(8, 10)  # 0.4902 to 0.9433, as in any table
    assert abs(low - 0.4902) < 1e-3 and abs(high - 0.9433) < 1e-3
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(0, 10)[1] > 0.2
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_mean_of_nothing_is_none():
    assert mean(torch.tensor([])) is None and mean(torch.tensor([math.nan])) is None
    assert mean(torch.tensor([1.0, math.nan, 3.0])) == 2


# -------------------------------------------------------------------------------------------- ECR

BAG, REAL = torch.tensor([[[1, 2], [3, 4], [5, -1]]]), torch.ones(1, 3, dtype=torch.bool)


def test_ecr_of_alpha_on_the_chunk():
    """On the chunk's first token: one at K = 1. On both: both at K = 2; the last chunk has one."""
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
    real = torch.ones(2000, 1, dtype=torch.bool)
    assert ecr(ids, bag, real, [10])[0] == pytest.approx(2 * 10 / V, abs=0.05)


def test_ecr_maximum_and_chance():
    """A token that stands twice counts twice; chance is the chunk of the problem before.

    Where that has fewer chunks they are repeated from the first.
    """
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


# ------------------------------------------------------------------------------------------ spans

def spans_of(length, n, c, N):
    tokens = torch.arange(100, 100 + length)[None]
    found = spans(tokens, torch.tensor([length]), torch.tensor([n]), c, N)[0].tolist()
    return [[i - 100 for i in span if i >= 0] for span in found]


def test_spans_are_the_chunks_where_their_number_is_that_of_the_latents():
    for c in (2, 3, 4, 5):
        for length in range(1, 40):
            n = -(-length // c)
            chunks = [list(range(length))[i * c:i * c + c] for i in range(n)]
            assert spans_of(length, n, c, n) == chunks


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
    tokens, none, two = torch.tensor([[7, 7]]), torch.tensor([0]), torch.tensor([2])
    assert (spans(tokens, none, two, 2, 2) == -1).all()
    assert (spans(tokens, two, none, 2, 2) == -1).all()


# ------------------------------------------------------------------------------------ parallelism

def test_one_path_followed():
    n_eff, covered = follow(even(1, 2), even(3, 4), even(9, 8))
    assert n_eff == pytest.approx(1, abs=0.01) and covered == 1


def test_two_paths_followed_alike():
    n_eff, covered = follow(even(1, 2, 5, 6), even(3, 4, 7, 8), even(9, 8))
    assert n_eff == pytest.approx(2) and covered == 2


def test_three_to_one_is_between():
    # two of two positions tell the paths apart, and their scores are means over the positions
    p = 0.75 ** 2 / (0.75 ** 2 + 0.25 ** 2)
    p = math.sqrt(p / (1 - p)) / (1 + math.sqrt(p / (1 - p)))
    first = {1: .375, 2: .375, 5: .125, 6: .125}
    second = {3: .375, 4: .375, 7: .125, 8: .125}
    n_eff, covered = follow(first, second, paths=path(A[:2], B[:2]), n=torch.tensor([2]))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert n_eff == pytest.approx(math.exp(entropy), abs=1e-5) and covered == 2


def test_no_path_followed_is_high_in_n_eff_and_nothing_in_covered():
    n_eff, covered = follow(even(30), even(31), even(32))
    assert n_eff == pytest.approx(2) and covered == 0


def test_uniform_follows_all_alike_and_covers_none():
    n_eff, covered = follow(*[even(*range(V))] * 3)
    assert n_eff == pytest.approx(2) and covered == 0  # 1/40 a token is less than COVER


def test_a_span_half_there_is_not_covered():
    assert follow(even(1), even(3, 4), even(9, 8))[1] == 0.5


def test_two_paths_that_share_a_span_are_one_there():
    """Where one path is followed, what the other shares with it covers no other path.

    That holds whatever the order of the tokens in the span.
    """
    paths = path([[1, 2], [3, 4]], [[2, 1], [5, 6]], [[1, 2], [5, 6]])
    n_eff, covered = follow(even(1, 2), even(5, 6), paths=paths, n=torch.tensor([2]))
    assert covered == 1
    assert n_eff == pytest.approx(2, abs=0.02)  # the second and third are the same path


def test_positions_past_the_chain_and_paths_that_are_not_there():
    latents = even(1, 2), even(3, 4), even(9, 8)
    paths = torch.cat([PATHS, torch.full_like(PATHS[:, :1], -1)], 1)
    assert follow(*latents, paths=paths) == pytest.approx(follow(*latents))
    longer = torch.cat([paths, torch.full_like(paths[:, :, :1], -1)], 2)
    assert follow(*latents, {}, paths=longer) == pytest.approx(follow(*latents))


def test_nothing_that_tells_the_paths_apart_is_undefined():
    _, covered = follow(even(1, 2), paths=path([[1, 2]], [[2, 1]]), n=torch.tensor([1]))
    assert math.isnan(covered)


def on_spans(paths, *latents):
    return span_mass(token_mass(*top(*latents), paths), paths)


def test_the_mass_of_tokens_is_that_of_a_plain_search():
    """With ids that no path has, tokens that are not among the entries, and padding."""
    g = torch.Generator().manual_seed(0)
    R, M, N, W, K, V = 3, 2, 4, 3, 5, 9
    ids = torch.rand(R, N, V, generator=g).topk(K).indices.int()
    values = torch.rand(R, N, K, generator=g)
    tokens = torch.randint(-1, V + 3, (R, M, N, W), generator=g)
    mass = token_mass(values, ids, tokens)
    for r, m, t, w in itertools.product(range(R), range(M), range(N), range(W)):
        alpha = dict(zip(ids[r, t].tolist(), values[r, t].tolist()))
        assert mass[r, m, t, w].item() == alpha.get(tokens[r, m, t, w].item(), 0)


def test_span_mass():
    """The mass on the tokens that no different span has; NaN where the paths do not differ."""
    mass = on_spans(path(A, B), {1: .5, 2: .2, 5: .2, 6: .1}, {3: 1}, even(9, 8))
    assert mass[0, :, 0].tolist() == pytest.approx([.7, .3])
    assert mass[0, :, 1].tolist() == pytest.approx([1, 0])
    assert mass[0, :, 2].isnan().all()
    shared = on_spans(path([[1, 2]], [[1, 6]]), {1: .5, 2: .5})  # token 1 is of both
    assert shared[0, :, 0].tolist() == pytest.approx([.5, 0])
    inside = on_spans(path([[1]], [[1, 6]]), {1: .5, 2: .5})  # the first has none
    assert inside.isnan().all()


def test_paths_of_one_span_have_its_mass_together():
    """Six orders of three steps begin with only three different spans."""
    three = path([[1], [2]], [[1], [3]], [[2], [1]], [[2], [3]], [[3], [1]], [[3], [2]])
    mass = on_spans(three, {1: .6, 2: .3, 3: .1}, even(2))
    assert mass[0, :, 0].tolist() == pytest.approx([.6, .6, .3, .3, .1, .1])
    leading, effective = span_shares(mass, three)
    entropy = -sum(p * math.log(p) for p in (.6, .3, .1))
    assert leading[0].tolist() == pytest.approx([.6, 1])
    assert effective[0].tolist() == pytest.approx([math.exp(entropy), 1])


def test_shares_of_no_mass_are_undefined():
    mass = on_spans(path(A, B), {7: 1}, {3: .5, 7: .5}, even(9, 8))
    leading, effective = span_shares(mass, path(A, B))
    assert leading[0].isnan().tolist() == effective[0].isnan().tolist() == [True, False, True]
    assert leading[0, 1] == 0.5 and effective[0, 1] == pytest.approx(2)



# ------------------------------------------------------------------------------------------ shape

def test_shape():
    z = torch.tensor([[[3.0, 4.0], [4.0, -3.0], [0.0, 0.0]],
                      [[6.0, 8.0], [6.0, 8.0], [3.0, 4.0]]])
    values = torch.tensor([[[0.5], [1.0], [9.0]], [[0.7], [1.0], [0.2]]])
    entropy = torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 5.0]])
    found = chain_shape(torch.tensor([2, 3]), values, entropy, z)
    assert found["count"] == [2, 2, 1]
    assert found["entropy"] == [2, 3, 5] and found["top1"] == pytest.approx([0.6, 1, 0.2])
    assert found["norm"] == pytest.approx([7.5, 7.5, 5])
    assert found["cosine"] == pytest.approx([0.5, 1])


# -------------------------------------------------------------------------------- errors of a chain

QUESTION = "Of Ida's 14 pens 25% are red. She buys 3 boxes of 6, and loses half a dozen."


@pytest.mark.parametrize("chain, why", [
    ("<<3*6=18>> <<14+18=32>>#### ", "no number"),
    ("<<3*6=18>> <<14+18=31>>#### 31", "arithmetic"),
    ("<<3*6=18>> <<14+=32>>#### 32", "arithmetic"),
    ("<<3*6>> #### 18", "arithmetic"),
    ("<<14/3=4.67>> <<4.67*3=14.01>>#### 14", "steps"),  # rounded to two places
    ("<<14/3=4.6>>#### 4.6", "arithmetic"),
    ("<<3*7=21>> <<14+21=35>>#### 35", "operand"),
    ("<<18+14=32>> <<3*6=18>>#### 32", "operand"),  # a result that is not there yet
    ("<<3*7=21>> <<14+21=36>>#### 36", "operand"),  # the first fault counts
    ("<<3*7=22>>#### 22", "arithmetic"),            # and of one step its equation
    ("<<14-3=11>>#### 11", "steps"),
    ("<<14*.25=3.5>> <<14*25/100=3.5>> <<3*6/2=9>> <<9+12=21>>#### 21", "steps"),
    ("<<3-14=-11>> <<14-11=3>> <<3,000/3=1,000>>#### 3", "operand"),
    ("<<3-14=-11>> <<14-11=3>>#### 3", "steps"),
    ("It is #### 5", "steps"),
])
def test_the_first_fault_of_a_chain(chain, why):
    assert error_type(QUESTION, "<eot>" + chain) == why


@pytest.mark.parametrize("text", [
    "", "(", "1/0", "1(2)", "2**9", "9//2", "1.2.3", "x", "()", "1 2", "٣", "-" * 199, "(" * 199,
    "(" * 90 + "1" + ")" * 90 + "2", "9" * 201])
def test_what_is_no_arithmetic_has_no_value(text):
    assert calculate(text) is None
