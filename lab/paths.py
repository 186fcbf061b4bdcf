"""The chains that a problem's α may be a mean over, and the latents that parallel steps leave out.

Steps in a row that need none of each other's results are *parallel*: they can be taken in any
order, or at once. The toy task says which those are. In other data a step needs an earlier one if
that one's result stands among its numbers.
"""
import re
from itertools import permutations

import numpy as np

import toy
from lab.renumber import NUMBER, STEP, value_of

MAX_ORDERS = 24  # of a problem's steps


def parallel_runs(problem):
    """[(first, count)]: the steps first … first + count − 1 are parallel, count ≥ 2."""
    if "paths" in problem:
        return [(0, toy.FREE)]
    runs, first, results = [], 0, set()
    steps = STEP.findall(problem["chain"])
    for i, step in enumerate([*steps, None]):
        numbers = [value_of(text) for text in NUMBER.findall(step)] if step else []
        if step is None or results.intersection(numbers[:-1]):
            runs.append((first, i - first))
            first, results = i, set()
        results.update(numbers[-1:])
    return [(first, count) for first, count in runs if count > 1]


def orders(problem):
    """The texts of a problem's chain with its parallel steps in every order, its own first.

    Those of the toy task are its paths: there the steps that follow name the results in this order.
    """
    pieces = re.split(r"(<<[^<>]*>>)", problem["chain"])  # steps, and what stands around them
    steps, chains, place = pieces[1::2], [[]], 0
    runs = {} if "paths" in problem else dict(parallel_runs(problem))
    while place < len(steps):
        count = runs.get(place, 1)
        tails = list(permutations(steps[place:place + count]))[:MAX_ORDERS]
        chains = [[*chain, *tail] for chain in chains for tail in tails][:MAX_ORDERS]
        place += count
    between = pieces[2::2]
    return [pieces[0] + "".join(map("".join, zip(chain, between))) for chain in chains]


def with_same_places(chains, tokenizer):
    """Those of a problem's chains, lists of ids, whose tokens and step ends lie as in the first."""
    def places(chain):
        return len(chain), [i for i, token in enumerate(chain) if b">>" in tokenizer.pieces[token]]
    return [chain for chain in chains if places(chain) == places(chains[0])]


def chain_of_latents(problem, chain, tokenizer, c, paths):
    """The tokens that the latents of a problem's chain, a text, stand for: a list of ids.

    With paths = "parallel" those of the latents that are left out are missing.
    """
    tokens = tokenizer.encode(chain)
    if paths != "parallel":
        return tokens
    out = left_out({**problem, "chain": chain}, tokens, tokenizer, c)
    return [token for i, token in enumerate(tokens) if not out[i // c]]


def left_out(problem, tokens, tokenizer, c):
    """Which latents a chain does without when its parallel steps share a place: bool (n,).

    Of k parallel steps of t tokens each, the next (k − 1) · t / c latents after the first step's
    are left out, if that is a whole number. (Of the latents that straddle two of them the last one
    stays: in the mean over all orders they hold the same.) tokens: the ids of the problem's chain.
    """
    out = np.zeros(-(-len(tokens) // c), dtype=bool)
    starts = [i for i, token in enumerate(tokens) if b"<<" in tokenizer.pieces[token]]
    starts.append(len(tokens))
    for first, k in parallel_runs(problem):
        lengths = np.diff(starts[first:first + k + 1])
        t = lengths[0]
        if (lengths == t).all() and (k - 1) * t % c == 0:
            begin = (starts[first] + t) // c
            out[begin:begin + (k - 1) * t // c] = True
    return out
