"""The built-in task: grade-school word problems of eight or ten steps, made by a seeded generator.

    python toy.py            # print three problems

    Mia has 5 books and loses 1. Eva has 10 books and wins 4. Tom has 2 books and loses 1. They pool
    their books, halve them and double them. After each of these, if even halve them, else drop 1.
    How many books do they have?
    <<5-1=4>> <<10+4=14>> <<2-1=1>> <<4+14=18>> <<18+1=19>>
    <<19-1=18>> <<18/2=9>> <<9-1=8>> <<8*2=16>> <<16/2=8>>

The first three steps are free: they can be taken in any order. Next their results are added up, in
the order in which they were computed. Then a rule is applied to the sum, and again after each of
one or two clauses. What the rule does depends on whether the number is even: without it the answer
would be a weighted sum of the question's numbers, which a model can learn to compute without any
steps.

So a problem has 3! = 6 valid paths to its answer. One of them, drawn at random, is its chain of
thought: with probability `as_told` the one in the order of the question, otherwise one of the other
five.
"""
import random
from itertools import permutations

NAMES = "Ann Ben Eva Leo Mia Sam Tom Zoe".split()
THINGS = "apples beads books cards coins eggs pens shells".split()
GAIN = ["buy", "find", "get", "win"]
LOSS = ["drop", "lose", "sell", "use"]
TOP = 20          # no value is larger: arithmetic is a small table, and the steps are what is hard
CLAUSES = (1, 2)  # the fewest and the most after the sum
AS_TOLD = 0.9
FREE = 3          # steps that need nothing of each other, the first ones


def free_step(rng, name, things, start):
    """One of the three free steps: (sentence, expression, value)."""
    k = rng.randint(1, 4)
    if rng.random() < 0.5 or start <= k:
        verb, expression, value = rng.choice(GAIN), f"{start}+{k}", start + k
    else:
        verb, expression, value = rng.choice(LOSS), f"{start}-{k}", start - k
    return f"{name} has {start} {things} and {verb}s {k}.", expression, value


def free_steps(rng, things):
    """Three of them, whose sum is small. No two start from one number: so it names its step."""
    while True:
        names, starts = rng.sample(NAMES, FREE), rng.sample(range(2, 11), FREE)
        steps = [free_step(rng, name, things, start) for name, start in zip(names, starts)]
        if sum(value for _, _, value in steps) <= TOP:
            return steps


def draw_change(rng):
    """What a clause does with the number of things: (words, operation)."""
    k = rng.randint(1, 4)
    return rng.choice([(f"{rng.choice(GAIN)} {k}", f"+{k}"), (f"{rng.choice(LOSS)} {k}", f"-{k}"),
                       ("double them", "*2"), ("halve them", "/2")])


def draw_links(rng, total, count):
    """What they do with the sum, in `count` clauses and a rule: (clauses, rule, steps, result)."""
    while True:
        clauses = [draw_change(rng) for _ in range(count)]
        (even, if_even), (odd, if_odd) = draw_change(rng), draw_change(rng)
        operations = [operation for _, operation in clauses]
        if len(set(operations)) < count:
            continue  # it would be open which of the two clauses a step has taken
        if if_odd == "/2" or if_odd[0] == if_even[0]:
            continue  # an odd number has no half, and the two must differ in kind
        todo = [(if_even, if_odd)]
        for operation in operations:
            todo += [(operation, operation), (if_even, if_odd)]
        steps, result = take_steps(total, todo)
        if result:
            clauses = "".join(f", {words}" for words, _ in clauses[:-1]) + " and " + clauses[-1][0]
            return clauses, f"if even {even}, else {odd}", steps, result


def take_steps(value, todo):
    """([step, …], result) of pairs of operations: for an even and an odd number of things.

    The result is None where some value is not a whole number in 1 … TOP.
    """
    steps = []
    for if_even, if_odd in todo:
        operation = if_odd if value % 2 else if_even
        sign, k = operation[0], int(operation[1:])
        result = {"+": value + k, "-": value - k, "*": value * k, "/": value / k}[sign]
        if result not in range(1, TOP + 1):
            return steps, None
        steps.append(f"<<{value}{operation}={int(result)}>>")
        value = int(result)
    return steps, value


def make(rng):
    """A problem: (question, paths, answer). A path is a list of steps such as '<<7+5=12>>'.

    The first path takes the free steps in the order in which the question tells them.
    """
    things = rng.choice(THINGS)
    free = free_steps(rng, things)
    total = sum(value for _, _, value in free)
    clauses, rule, links, answer = draw_links(rng, total, rng.randint(*CLAUSES))
    told = " ".join(sentence for sentence, _, _ in free)
    question = (f"{told} They pool their {things}{clauses}. After each of these, {rule}. "
                f"How many {things} do they have?")
    paths = []
    for order in permutations(free):
        first = [f"<<{expression}={result}>>" for _, expression, result in order]
        a, b, c = (result for _, _, result in order)
        paths.append([*first, f"<<{a}+{b}={a + b}>>", f"<<{a + b}+{c}={total}>>", *links])
    return question, paths, str(answer)


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
