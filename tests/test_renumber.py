"""Renumbered problems: the same words, other numbers, true steps; what falls out, and why."""
import re
from fractions import Fraction
from random import Random

import pytest

from data import parse_gsm8k, read
from lab.renumber import (ALWAYS, choices, constants_of, parse, renumber, renumbered, similar,
                          templates, write)

NUMBER = r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+"


def problem(question, chain, answer):
    return {"question": question, "chain": chain, "answer": answer}


PENS = problem("Ida has 14 pens and buys 3 boxes of 6. How many pens has she?",
               "<<3*6=18>> <<14+18=32>>", "32")
FIT = {
    "steps": PENS,
    "text": dict(PENS, chain="In a 4th box: 3*6=<<3*6=18>>18.\nSo it's 14+18 = <<14+18=32>>32."),
    "commas, decimals": problem(
        "A boat costs $1,250 and each of its 4 oars $17.50. What is it together?",
        "<<4*17.50=70>> <<1250+70=1320.00>>", "1320"),
    "percent": problem("Of 80 seeds 25% fail and the rest grow. Half of these bloom. How many?",
                       "<<80*.25=20>> <<80-20=60>> <<60/2=30>>", "30"),
    "percent of 100": problem("A $60 coat is 30% off. What does it cost?",
                              "<<60*30/100=18>> <<60-18=42>>", "42"),
    "brackets": problem("Rooms of 9 and 15 square feet get tiles, 8 for a square foot. How many?",
                        "<<(9+15)*8=192>>", "192"),
    "a result that is used twice": problem(
        "Bo bakes 45 rolls an hour for 6 hours and sells half. How many are left?",
        "<<45*6=270>> <<270/2=135>> <<270-135=135>>", "135"),
}
UNFIT = {
    "no steps": problem("Ida has 14 pens.", "She has 14 pens.", "14"),
    "a number that the question does not say": problem("14 and 3 pens.", "<<14*4=56>>", "56"),
    "a step that is not exact": problem("25 cakes go to 3 boys.", "<<25/3=8>>", "8"),
    "a step that is no plain arithmetic": problem("Ida has 14 pens.", "<<14**2=196>>", "196"),
    "an answer that is not the last result": problem("14 and 16 pens.", "<<14+16=30>>", "31"),
    "a number that the answer does not need": problem("At 25, 14 and 16.", "<<14+16=30>>", "30"),
    "no number that is certain": problem("14 pens, and Bo has 14.", "<<14+14=28>>", "28"),
    "a number in an unusual form": problem("014 pens and 16.", "<<14+16=30>>", "30"),
    "no other numbers that fit": problem("1/887 of 1774 pens write.", "<<1774/887=2>>", "2"),
}


def fractions(text):
    return [Fraction(n.replace(",", "")) for n in re.findall(NUMBER, text)]


def check(new, old):
    """`new` has the words of `old`, and every step is true and uses what is given."""
    for field in ("question", "chain", "answer"):
        assert re.sub(NUMBER, "#", new[field]) == re.sub(NUMBER, "#", old[field])
    given = ALWAYS | constants_of(old["question"]) | set(fractions(new["question"]))
    given |= {Fraction(n) / 100 for n in re.findall(r"([\d.]+)(?: ?%| percent)", new["question"])}
    for step, before in zip(*(re.findall(r"<<(.*?)>>", p["chain"]) for p in (new, old))):
        left, right = step.split("=")
        assert given.issuperset(fractions(left)), (step, new)
        assert eval(re.sub(NUMBER, r"Fraction('\g<0>')", left)) == Fraction(right), (step, new)
        assert similar(Fraction(right), Fraction(before.split("=")[1]))
        given.add(Fraction(right))
    assert Fraction(new["answer"]) == Fraction(right)


@pytest.mark.parametrize("name", FIT)
def test_words_stay_and_steps_are_true(name):
    """A template with its own numbers is the problem again; with others it is as true."""
    old = FIT[name]
    template, rng = parse(old), Random(0)
    new = [renumber(template, rng) for _ in range(50)]
    for p in new:
        check(p, old)
    assert len({p["question"] for p in new}) > 10
    template.choices.clear()
    assert renumber(template, rng) == old


@pytest.mark.parametrize("reason", UNFIT)
def test_what_is_not_certain_falls_out(reason):
    with pytest.raises(ValueError, match=reason):
        parse(UNFIT[reason])


@pytest.mark.parametrize("chain", [
    "<<>>", "<<=>>", "<<14=>>", "<<14+=14>>", "<<14/0=1>>", "<<14(2)=28>>", "<<14//3=4>>",
    "<<14-20=-6>>", "<<1.4.5=1>>", "<<14+x=15>>", "<<14+14=28", ">>14<<",
    "<<" + "(" * 150 + "14=14>>", "<<" + "-" * 9999 + "14=14>>"])
def test_no_chain_is_too_strange(chain):
    with pytest.raises(ValueError) as error:
        parse(dict(PENS, chain=chain))
    assert str(error.value) in UNFIT


def changed(question, chain, answer):
    """The numbers of the question that change."""
    template = parse(problem(question, chain, answer))
    return {int(template.values[index]) for index in template.choices}


@pytest.mark.parametrize("question, chain, answer, numbers", [
    ("Ida halves 14 pens; 2 are lost", "<<14/2=7>> <<7-2=5>>", "5", {14}),  # which 2?
    ("6 pens of 6 cents, 5 of 9", "<<6*6=36>> <<5*9=45>> <<36+45=81>>", "81", {5, 9}),
    ("5 and 8, and 13 more, less 7", "<<5+8=13>> <<13+13=26>> <<26-7=19>>", "19", {7}),
    ("4 cats of 15 women have legs", "<<4*4=16>> <<16*15=240>>", "240", {15}),
    ("40% of 30, 60%", "<<30*.4=12>> <<30*.6=18>> <<18-12=6>>", "6", {30}),  # the parts of a whole
    ("100% of 30, 40% of 15", "<<15*.4=6>> <<30+6=36>>", "36", {30, 40, 15}),
    ("14 pens, and 7 more in a week", "<<14+7=21>>", "21", {14}),
    ("21 pens, 14 go in a week", "<<21-14=7>>7 pens", "7", {21, 14}),  # the last 7 is the result
    ("14 and 9 pens of 2 cents", "<<14*2=28>> <<9*2=18>> <<28+18=46>>", "46", {14, 9}),
    ("14 pens, 56, and 9", "<<14*2=28>> <<56/28=2>> <<9+2=11>>", "11", {14, 56, 9}),
    ("Twice 14, for a dozen weeks", "<<14*2=28>> <<28*12=336>> <<336/7=48>>", "48", {14})])
def test_numbers_in_doubt_keep_their_values(question, chain, answer, numbers):
    assert changed(question, chain, answer) == numbers


def test_names_and_fixed_numbers_stay():
    for text in ("the 3rd of 9", "at 8:30 of 9", "at 8 pm, 9", "2/3 of 9", "3-4 of 9", "in 1998, 9",
                 "Chapter 3, 9", "an 8, 9", "#4, 9", "these 3, 9", "1 of 9", "1 1/2 of 9"):
        assert changed(f"{text} and 75", "<<9+75=84>>", "84") == {9, 75}


def test_a_comparison_keeps_the_order_of_size():
    template = parse(problem("Ida has 9 pens, Bo 11, Cy 12. How many have all but the least?",
                             "<<9+11=20>> <<20+12=32>> <<32-9=23>>", "23"))
    for seed in range(50):
        ida, bo, cy = fractions(renumber(template, Random(seed))["question"])
        assert ida <= bo <= cy


@pytest.mark.parametrize("text, after, expected", [
    ("14", " pens", range(7, 29)), ("100", " pens", range(50, 201, 10)), ("2", " pens", [2, 3, 4]),
    ("3,000", " pens", range(1500, 6001, 500)), ("20", "% of", range(10, 41, 5)),
    ("60", "% of", range(30, 91, 10)), ("15", "% of", range(10, 31, 5)),
    ("5", " days", range(3, 8)), ("10", " hours", range(5, 21)), ("15", "-hour", range(8, 25)),
    ("2.50", "", [Fraction(n, 2) for n in (3, 5, 7, 9)]),
    ("0.99", "", [Fraction(n, 100) for n in range(50, 199) if n != 100]),
    ("123,457", "", range(62934, 246915, 1234))])
def test_choices_are_like_the_number(text, after, expected):
    assert choices(text, after) == list(expected)


@pytest.mark.parametrize("value, like, text", [
    ("24", "7", "24"), ("1200", "3,000", "1,200"), ("1200", "950", "1200"), ("2.5", "1.25", "2.50"),
    ("0.35", ".2", ".35"), ("0.05", "0.2", "0.05"), ("144", "9.00", "144.00"), ("1.5", ".5", "1.5"),
    ("0", "0", "0"), ("1234.5", "1,000.00", "1,234.50")])
def test_a_number_is_written_like_another(value, like, text):
    assert write(Fraction(value), like) == text


def test_similar():
    for new, old in (("24", "18"), ("99", "10"), ("12", "9"), ("0", "0"), (".2", ".5"), ("3", "2")):
        assert similar(Fraction(new), Fraction(old))
    for new, old in (("0", "4"), ("-3", "3"), ("1.5", "2"), ("1/3", ".5"), ("30", "9")):
        assert not similar(Fraction(new), Fraction(old))


def test_a_copy_is_a_function_of_seed_number_and_place():
    found, reasons = templates([PENS, UNFIT["no steps"], PENS, FIT["percent"], UNFIT["no steps"]])
    assert [template is None for template in found] == [False, True, False, False, True]
    assert reasons == {"no steps": 2}
    first = list(renumbered(found, 0, 0))
    assert first == list(renumbered(found, 0, 0)) and len(first) == 3
    assert first[0] != first[1]  # the same problem in two places
    assert first != list(renumbered(found, 0, 1)) and first != list(renumbered(found, 1, 0))
    assert list(renumbered(found[2:], 0, 0)) != first[1:]
    assert list(renumbered(found, 0, 0, lambda question: "Ida" not in question)) == first[2:]


def test_all_of_gsm8k(gsm8k):
    """Every second chain as steps, the others as text; what is published never changes."""
    steps, text = (read(gsm8k / "train.jsonl", parse_gsm8k, cot) for cot in ("steps", "text"))
    problems = steps[::2] + text[1::2]
    found, reasons = templates(problems)
    usable = [p for p, template in zip(problems, found) if template]
    assert len(usable) == 4345 and reasons.keys() <= UNFIT.keys()
    new = list(renumbered(found, 0, 0))
    for p, old in list(zip(new, usable))[::9]:
        check(p, old)
    assert sum(p["question"] != old["question"] for p, old in zip(new, usable)) > 0.9 * len(usable)
