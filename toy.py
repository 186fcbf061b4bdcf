"""The built-in task: grade-school word problems of five or six dependent steps, made by a seeded generator.

    python toy.py            # print three problems

    Eva has 6 cards and wins 2. Ann has 10 cards and sells 6. They pool their cards, use 4, halve them and buy 3. How many
    cards do they have?
    <<6+2=8>> <<10-6=4>> <<8+4=12>> <<12-4=8>> <<8/2=4>> <<4+3=7>>     or, as well,
    <<10-6=4>> <<6+2=8>> <<4+8=12>> <<12-4=8>> <<8/2=4>> <<4+3=7>>
    #### 7

The first two steps are free: either may come first. Then they meet, and a chain follows. So a problem has
two valid paths to its answer, and one of them, drawn at random, is its chain of thought: mostly the order as told.
"""
import random

NAMES = "Ann Ben Eva Leo Mia Sam Tom Zoe".split()
THINGS = "apples beads books cards coins eggs pens shells".split()
TOP = 15  # no value is larger: the arithmetic is a small table, so that the steps are the difficulty
AS_TOLD = (4, 1)  # four chains in five take the free steps as the question tells them, one the other way round
GAIN = ["buy", "find", "get", "win"]
LOSS = ["drop", "lose", "sell", "use"]


def small_and_gains(rng, name, things):
    """One of the two free steps: (sentence, expression, value)."""
    a, b = rng.randint(2, 6), rng.randint(1, 3)
    return f"{name} has {a} {things} and {rng.choice(GAIN)}s {b}.", f"{a}+{b}", a + b


def large_and_loses(rng, name, things):
    """The other one. It starts above all the small ones: a step's first number says which of the two it is."""
    a, b = rng.randint(7, 12), rng.randint(2, 6)
    return f"{name} has {a} {things} and {rng.choice(LOSS)}s {b}.", f"{a}-{b}", a - b


def next_step(rng, value):
    """One link of the chain that follows the merge: (clause, expression, value)."""
    while True:
        k = rng.randint(1, 4)
        clause, expression, result = rng.choice([
            (f"{rng.choice(GAIN)} {k}", f"{value}+{k}", value + k),
            (f"{rng.choice(LOSS)} {k}", f"{value}-{k}", value - k),
            ("double them", f"{value}*2", value * 2),
            ("halve them", f"{value}/2", value / 2),
        ])
        if result == int(result) and 1 <= result <= TOP:
            return clause, expression, int(result)


def make(rng):
    """A problem: (question, paths, answer). Every path is a list of steps such as '<<7+5=12>>'."""
    things, (one, two) = rng.choice(THINGS), rng.sample(NAMES, 2)
    text1, expr1, a = small_and_gains(rng, one, things)
    text2, expr2, b = large_and_loses(rng, two, things)
    while a + b > TOP:
        text2, expr2, b = large_and_loses(rng, two, things)
    value, clauses, rest = a + b, [], []
    for _ in range(rng.randint(2, 3)):
        clause, expression, value = next_step(rng, value)
        clauses.append(clause)
        rest.append(f"<<{expression}={value}>>")
    clauses = ", ".join(clauses[:-1]) + " and " + clauses[-1]
    question = f"{text1} {text2} They pool their {things}, {clauses}. How many {things} do they have?"
    first, second = f"<<{expr1}={a}>>", f"<<{expr2}={b}>>"
    paths = [[first, second, f"<<{a}+{b}={a + b}>>", *rest], [second, first, f"<<{b}+{a}={a + b}>>", *rest]]
    return question, paths, str(value)


def problems(seed, count, wanted):
    """`count` different problems whose question satisfies `wanted`, as dicts with question, chain, answer, paths."""
    rng, seen = random.Random(f"toy-{seed}"), set()
    while len(seen) < count:
        question, paths, answer = make(rng)
        chain = " ".join(rng.choices(paths, AS_TOLD)[0])
        if wanted(question) and question not in seen:
            seen.add(question)
            yield {"question": question, "chain": chain, "answer": answer, "paths": [" ".join(p) for p in paths]}


if __name__ == "__main__":
    for p in problems(0, 3, lambda question: True):
        print(p["question"], *p["paths"], "#### " + p["answer"], "", sep="\n")
