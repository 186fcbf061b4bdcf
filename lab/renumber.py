"""GSM8K with new numbers: a problem's words stay, its numbers are drawn, its steps worked again.

    Ida has 14 pens and buys 3 boxes of 6. How many has she?    <<3*6=18>> <<14+18=32>>    32
    Ida has 11 pens and buys 5 boxes of 4. How many has she?    <<5*4=20>> <<11+20=31>>    31

The calculator steps of a solution say how the numbers of its question make the answer. `parse`
follows them and makes a Template: texts with slots for numbers, and the steps as arithmetic on
numbered values. `renumber` draws, works the steps and fills the slots.

A wrong guess of what a number means would make a wrong problem, so nothing is guessed. A number in
a step is one of these:

    that of the question, or the result, that alone has its value;
    the constant that a word of the question brings in: 2 for half, 7 for week, 5 for five;
    either, and nobody knows which: then all of them keep their values, and any reading is right;
    neither, worked out in somebody's head: then the problem falls out, as a ValueError says.
"""
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

TRIES = 500  # draws after which a problem keeps its own numbers
DRAWS = 100  # of whole problems, to find one that is wanted

STEP = re.compile(r"<<([^<>]*)>>")
NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+")
PERCENT = re.compile(r" ?%| percent")
# What stands around a number that is a name, a part of one, or known already, and keeps its value:
# 3rd, 10k, 8:30, 7 pm, 2/3, 1 1/2, 5-6, #4, -5, an 8, Chapter 2, these 3; and what may be a year.
KEPT_BEFORE = re.compile(
    r"(?:[\w#:/^*+.–-]|\b(?:an|the|these|those|all|other|chapter|day|game|grade|level|number|page|"
    r"room|round|step|week|year) )$", re.I)
KEPT_AFTER = re.compile(
    r"[a-z]|[:/^*+=.]\d|(?:/|-|–| - )\d| \d+/\d| ?[ap]\.?m\b| o'clock", re.I)
KEPT = re.compile(r"0|1|(?:19|20)\d\d")
NO_QUANTITY = re.compile(r"(?:st|nd|rd|th)\b|:\d| ?[ap]\.?m\b", re.I)  # after a number in prose

# Who has most? With its values in another order of size, a solution would not fit such a question.
COMPARES = re.compile(
    r"\b(?:least|most|best|cheaper|better|either|chooses?|whichever|(?:fast|slow|larg|small|high|"
    r"low|old|young|tall|short|long|cheap|bigg|great|few|heavi|light|new|near|far)e?st)\b", re.I)

# At most so many come in the next larger unit: 5 days of a week may become 7, not 9.
CAPS = {"day": 7, "month": 12, "hour": 24, "week": 52, "minute": 60, "second": 60, "year": 100}

ALWAYS = {Fraction(c) for c in ("0", "1", "2", "100", "1/100")}  # constants that need no word
WORDS = {  # words for numbers, units, and what comes in fixed numbers: the constants they bring in
    "two twice double doubled half halve halved pair couple both average perimeter": "2 1/2",
    "half": "3/2", "three thrice triple tripled third yard feet foot": "3",
    "four quadruple quadrupled quarter fourth square gallon month": "4",
    "quarter fourth": "1/4 3/4",
    "five fifth nickel weekday": "5", "six sixth": "6", "seven seventh week weekly daily": "7",
    "eight eighth": "8", "nine ninth": "9", "ten tenth dime decade": "10", "eleven": "11",
    "twelve dozen year yearly annual annually month monthly foot feet inch inche": "12",
    "thirteen": "13", "fourteen": "14", "fifteen": "15", "sixteen pound ounce": "16",
    "seventeen": "17", "eighteen": "18", "nineteen": "19", "twenty": "20", "day hour daily": "24",
    "quarter": "25", "thirty month monthly": "30", "forty": "40", "fifty": "50",
    "sixty hour minute second": "60", "seventy": "70", "eighty": "80", "ninety": "90",
    "year yearly annual annually": "52 365", "hundred century % percent cent": "100",
    "thousand kilometer kilogram kg km liter": "1000",
}


class Slot(NamedTuple):
    """A place for a number in a text."""

    index: int  # which value
    like: str   # the original number as written, whose form the new one takes


class Template(NamedTuple):
    """A problem taken apart. Values are Fractions: a step is exact, or it is refused."""

    texts: dict     # question, chain and answer, each a list of str and Slot
    values: list    # the original values: numbers of the question, constants and results
    steps: list     # (index of the result, code that computes it), in the order of the chain
    choices: dict   # index of a number that is drawn: the values it may take
    order: list     # indices in order of size, where the question compares; else []


# ---------------------------------------------------------------------------------- one number

def value_of(text):
    return Fraction(text.replace(",", ""))


def is_arithmetic(text):
    """Whether a text has nothing but digits, points, parentheses and + - * /: safe to evaluate."""
    plain = re.fullmatch(r"[-+*/().\d]{1,200}", text, re.ASCII)
    return bool(plain) and "**" not in text and "//" not in text


def constants_of(question):
    """The constants that its words bring in: the 7 of a week, the 12 of a dozen."""
    words = set(re.findall("[a-z]+|%", question.lower()))
    words |= {word.removesuffix("s") for word in words}
    return {Fraction(constant) for group, constants in WORDS.items()
            if not words.isdisjoint(group.split()) for constant in constants.split()}


def places(value):
    """How many digits after the point a value needs, at most 28."""
    return next((n for n in range(28) if 10 ** n % value.denominator == 0), 28)


def write(value, like):
    """A value in the form of the text `like`: its commas, at least its decimals, .5 or 0.5."""
    n = max(places(value), len(like.partition(".")[2]))
    comma = "," if "," in like else ""
    text = f"{Decimal(value.numerator) / value.denominator:{comma}.{n}f}"
    return text.removeprefix("0") if like.startswith(".") else text


def similar(new, old):
    """Whether one result may take the place of another: alike in sign, wholeness and size."""
    decimals = 0 if old.denominator == 1 else max(2, places(old))
    if new.numerator * old.numerator <= 0 or 10 ** decimals % new.denominator:
        return new == old
    return old <= 2 * new <= 4 * old or len(str(int(new))) == len(str(int(old)))


def choices(text, after):
    """The values that a number of the question may take: from half to twice it, as round as it is.

    text: the number as written; after: the text after it, which says what it counts.
    """
    one, percent = 10 ** len(text.partition(".")[2]), PERCENT.match(after)
    size = int(value_of(text) * one)  # 350 for 3.50, where `one` is 100
    round_steps = [s for k in range(9) for s in (10 ** k, 5 * 10 ** k) if size % s == 0]
    step = max([s for s in round_steps if size >= 4 * s or percent and s == 5], default=1)
    step *= max(1, size // (100 * step))  # a hundred values are enough
    sizes = range(-(-size // (2 * step)) * step, 2 * size + 1, step)
    thing = re.match(r"[- ]([a-z]+?)s?\b", after)
    cap = one * (99 if percent else CAPS.get(thing and thing[1], 0))
    return [Fraction(s, one) for s in sizes if s != one and (s % one == 0) == (size % one == 0)
            and (s <= cap or cap < size)]


# ---------------------------------------------------------------------- taking a problem apart

class Parser:
    """What is known so far of the numbers of a problem while its texts are cut up."""

    def __init__(self, question):
        self.brought = constants_of(question)
        self.values = []
        self.sources = []    # for each value the indices that it is made of, its own included
        self.constants = {}  # value: its index
        self.choices = {}    # index of a number of the question: the values it may take
        self.percents = []   # indices of the question's percentages
        self.steps = {}      # code: (index of its result, the code compiled)
        self.used = set()    # operands of the steps
        self.pinned = set()  # indices that keep their values

    def add(self, value, operands=()):
        index = len(self.values)
        self.values.append(value)
        self.sources.append({index}.union(*(self.sources[operand] for operand in operands)))
        return index

    def compute(self, code, operands):
        """The index of a result. `code` holds nothing but digits, v[…] and + - * / ( )."""
        if code not in self.steps:
            try:
                compiled = compile(code, "step", "eval")  # once, to be run at every draw
                value = eval(compiled, {"v": self.values})
            except (SyntaxError, TypeError, ZeroDivisionError):
                raise ValueError("a step that is no plain arithmetic")
            self.steps[code] = (self.add(value, operands), compiled)
        return self.steps[code][0]

    def question_number(self, match):
        """The Slot of a number of the question; what it may become is noted."""
        before, after = match.string[:match.start()][-10:], match.string[match.end():]
        kept = KEPT_BEFORE.search(before) or KEPT_AFTER.match(after) or KEPT.fullmatch(match[0])
        index = self.add(value_of(match[0]))
        if PERCENT.match(after):
            self.percents.append(index)
            self.compute(f"v[{index}]/100", [index])  # 20 % may be written 0.2 in a step
            kept = kept or self.values[index] == 100
        if not kept:
            self.choices[index] = choices(match[0], after)
        return Slot(index, match[0])

    def chain_number(self, match):
        """The Slot of a number in the chain, or None for 2nd or 8 pm, which stay text.

        Raises ValueError where the number comes from nowhere.
        """
        if NO_QUANTITY.match(match.string, match.end()):
            return None
        value, constants = value_of(match[0]), self.constants
        found = [i for i, v in enumerate(self.values) if v == value and i != constants.get(v)]
        if len(found) == 1 and value not in self.brought:
            return Slot(found[0], match[0])
        if not found and value not in self.brought | ALWAYS:
            raise ValueError("a number that the question does not say")
        for index in found:
            self.pinned |= self.sources[index]
        if value not in constants:
            constants[value] = self.add(value)
        return Slot(constants[value], match[0])

    def step(self, text):
        """The parts of a step '48/2=24'; the last is the Slot of its result, known from here on."""
        left, _, right = text.rpartition("=")
        if not (is_arithmetic(left) and NUMBER.fullmatch(right)):
            raise ValueError("a step that is no plain arithmetic")
        parts = cut(left, self.chain_number)
        operands = [part.index for part in parts if isinstance(part, Slot)]
        for index in operands:  # 4 dogs have 4*4 legs, and the 2 of a sum of two may be any 2
            again = index in self.used and self.values[index] in ALWAYS
            if again or operands.count(index) > 1:
                self.pinned |= self.sources[index]
        self.used.update(operands)
        code = "".join(part if isinstance(part, str) else f"v[{part.index}]" for part in parts)
        index = self.compute(code, operands)
        if self.values[index] != value_of(right):
            raise ValueError("a step that is not exact")
        return parts + ["=", Slot(index, right)]

    def chain(self, text):
        """(the parts of a chain, index of its last result): steps in << >>, maybe prose between."""
        pieces = STEP.split(text)
        steps = [self.step(piece) for piece in pieces[1::2]]  # first: prose may run ahead of them
        if not steps:
            raise ValueError("no steps")
        parts = cut(pieces[0], self.chain_number)
        for step, prose in zip(steps, pieces[2::2]):
            result, again = step[-1].index, NUMBER.match(prose)
            parts += ["<<", *step, ">>"]
            if again and value_of(again[0]) == self.values[result]:  # the last 24 of <<48/2=24>>24
                parts.append(Slot(result, again[0]))
                prose = prose[again.end():]
            parts += cut(prose, self.chain_number)
        return parts, result


def cut(text, slot_of):
    """The parts of a text: slot_of(match) stands in place of a number, unless it is None."""
    parts, end = [], 0
    for match in NUMBER.finditer(text):
        slot = slot_of(match)
        if slot:
            parts += [text[end:match.start()], slot]
            end = match.end()
    return parts + [text[end:]]


def parse(problem):
    """The Template of {question, chain, answer}. Raises ValueError with the reason it has none."""
    question, answer = problem["question"], problem["answer"]
    p = Parser(question)
    texts = {"question": cut(question, p.question_number)}
    texts["chain"], last = p.chain(problem["chain"])
    texts["answer"] = [Slot(last, answer)]
    if not NUMBER.fullmatch(answer) or value_of(answer) != p.values[last]:
        raise ValueError("an answer that is not the last result")
    if sum(p.values[index] for index in p.percents) == 100:  # the parts of a whole
        p.pinned.update(p.percents)
    drawn = {index: possible for index, possible in p.choices.items()
             if index not in p.pinned and len(possible) > 1}
    if not drawn:
        raise ValueError("no number that is certain")
    if not drawn.keys() <= p.sources[last]:
        raise ValueError("a number that the answer does not need")
    by_size = sorted(range(len(p.values)), key=p.values.__getitem__)
    order = by_size if COMPARES.search(question) else []
    template = Template(texts, p.values, list(p.steps.values()), drawn, order)
    if fill(template, p.values) != {name: problem[name] for name in texts}:
        raise ValueError("a number in an unusual form")
    if draw(template, random.Random(0)) is None:
        raise ValueError("no other numbers that fit")
    return template


def templates(problems):
    """(for each problem its Template or None, a Counter of the reasons why not)."""
    found, reasons = [], Counter()
    for problem in problems:
        try:
            found.append(parse(problem))
        except ValueError as reason:
            found.append(None)
            reasons[str(reason)] += 1
    return found, reasons


# --------------------------------------------------------------------------------- new numbers

def draw(template, rng):
    """New values, all results `similar` to the original ones; None where TRIES draws had none."""
    for _ in range(TRIES):
        values = list(template.values)
        for index, possible in template.choices.items():
            values[index] = rng.choice(possible)
        if work(template, values):
            return values


def work(template, values):
    """Work the steps, in place; False as soon as a result is unlike the original one."""
    for index, code in template.steps:
        try:
            values[index] = eval(code, {"v": values})
        except ZeroDivisionError:
            return False
        if not similar(values[index], template.values[index]):
            return False
    ordered = [values[index] for index in template.order]
    return ordered == sorted(ordered)


def fill(template, values):
    """The texts {question, chain, answer} with these values in their slots."""
    def text_of(part):
        return part if isinstance(part, str) else write(values[part.index], part.like)
    return {name: "".join(map(text_of, parts)) for name, parts in template.texts.items()}


def renumber(template, rng):
    """A problem {question, chain, answer} with other numbers; its own where none were found."""
    return fill(template, draw(template, rng) or template.values)


def renumbered(found, seed, number, wanted=lambda question: True):
    """Copy `number` of all that has a Template, a generator: by (seed, number, place in `found`).

    Of a problem's first DRAWS draws the first is taken whose question is `wanted`; where none is,
    the copy lacks that problem.
    """
    for index, template in enumerate(found):
        if template:
            rng = random.Random(f"{seed} {number} {index}")
            for _ in range(DRAWS):
                copy = renumber(template, rng)
                if wanted(copy["question"]):
                    yield copy
                    break
