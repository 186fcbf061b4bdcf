"""The built-in task: grade-school word problems of eight or nine steps, made by a seeded generator.

    python toy.py            # print three problems

    Mia has 5 books and loses 1. Eva has 10 books and wins 2. Tom has 3 books and loses 1. They pool
    their books, drop 2, halve them and find 4. How many books do they have?
    <<5-1=4>> <<10+2=12>> <<3-1=2>> <<4+12=16>> <<16+2=18>> <<18-2=16>> <<16/2=8>> <<8+4=12>>

The first three steps are free: they can be taken in any order. Then their results are added up, in
the order in which they were computed, and a chain of dependent steps follows. So a problem has
3! = 6 valid paths to its answer. One of them, drawn at random, is its chain of thought: with
probability `as_told` the one in the order of the question, otherwise one of the other five.
"""
import random
from itertools import permutations

NAMES = "Ann Ben Eva Leo Mia Sam Tom Zoe".split()
THINGS = "apples beads books cards coins eggs pens shells".split()
GAIN = ["buy", "find", "get", "win"]
LOSS = ["drop", "lose", "sell", "use"]
TOP = 20        # no value is larger: arithmetic is a small table, and the steps are what is hard
LINKS = (3, 4)  # the fewest and the most dependent steps after the sum
AS_TOLD = 0.9


def free_step(rng, name, things, start):
    """One of the three free steps: (sentence, expression, value)."""
    k = rng.randint(1, 4)
    if rng.random() < 0.5 or start <= k:
        verb, expression, value = rng.choice(GAIN), f"{start}+{k}", start + k
    else:
        verb, expression, value = rng.choice(LOSS), f"{start}-{k}", start - k
    return f"{name} has {start} {things} and {verb}s {k}.", expression, value


def free_steps(rng, things):
    """Three of them, whose sum is small. No two start from one number: it so names its step."""
    while True:
        names, starts = rng.sample(NAMES, 3), rng.sample(range(2, 11), 3)
        steps = [free_step(rng, name, things, start) for name, start in zip(names, starts)]
        if sum(value for _, _, value in steps) <= TOP:
            return steps


def next_step(rng, value, done):
    """One link of the chain that follows the sum: (clause, operation, result).

    No operation comes twice: it would be open which of the two clauses a step has taken.
    """
    while True:
        k = rng.randint(1, 4)
        clause, operation, result = rng.choice([
            (f"{rng.choice(GAIN)} {k}", f"+{k}", value + k),
            (f"{rng.choice(LOSS)} {k}", f"-{k}", value - k),
            ("double them", "*2", value * 2),
            ("halve them", "/2", value / 2),
        ])
        if operation not in done and result == int(result) and 1 <= result <= TOP:
            return clause, operation, int(result)


def make(rng):
    """A problem: (question, paths, answer). A path is a list of steps such as '<<7+5=12>>'.

    The first path takes the free steps in the order in which the question tells them.
    """
    things = rng.choice(THINGS)
    free = free_steps(rng, things)
    total = value = sum(value for _, _, value in free)
    clauses, operations, links = [], [], []
    for _ in range(rng.randint(*LINKS)):
        clause, operation, result = next_step(rng, value, operations)
        clauses.append(clause)
        operations.append(operation)
        links.append(f"<<{value}{operation}={result}>>")
        value = result
    told = " ".join(sentence for sentence, _, _ in free)
    clauses = ", ".join(clauses[:-1]) + " and " + clauses[-1]
    question = f"{told} They pool their {things}, {clauses}. How many {things} do they have?"
    paths = []
    for order in permutations(free):
        first = [f"<<{expression}={result}>>" for _, expression, result in order]
        a, b, c = (result for _, _, result in order)
        paths.append([*first, f"<<{a}+{b}={a + b}>>", f"<<{a + b}+{c}={total}>>", *links])
    return question, paths, str(value)


def problems(seed, count, wanted, as_told=AS_TOLD):
    """`count` different problems whose question satisfies `wanted`.

    Dicts with question, chain, answer (str) and paths (list of str, the first in the order of the
    question).
    """
    rng = random.Random(f"toy-{seed}")
    seen = set()
    while len(seen) < count:
        question, paths, answer = make(rng)
        paths = [" ".join(steps) for steps in paths]
        chain = paths[0] if rng.random() < as_told else rng.choice(paths[1:])
        if wanted(question) and question not in seen:
            seen.add(question)
            yield {"question": question, "chain": chain, "answer": answer, "paths": paths}


if __name__ == "__main__":
    for problem in problems(0, 3, lambda question: True):
        print(problem["question"], *problem["paths"], "#### " + problem["answer"], "", sep="\n")
