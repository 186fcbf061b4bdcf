"""Renumbered problems: the same words, other numbers, true steps; what falls out, and why."""
import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from data import load
from renumber import ALWAYS, BRINGS, choices, parse, renumber, renumbered, similar, templates, write

NUMBER = r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+"


def problem(question, chain, answer):
    return {"question": question, "chain": chain, "answer": answer}


PENS = problem("Ida has 14 pens and buys 3 boxes of 6. How many pens has she?",
               "<<3*6=18>> <<14+18=32>>", "32")
FIT = {
    "steps": PENS,
    "text": dict(PENS, chain="In boxes: 3*6=<<3*6=18>>18.\nSo it's 14+18 = <<14+18=32>>32."),
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
    "a number that the question does not say": problem("Ida has 14 pens and buys 3 boxes.",
                                                       "<<3*6=18>> <<14+18=32>>", "32"),
    "a step that is not exact": problem("25 cakes go to 3 boys.", "<<25/3=8>>", "8"),
    "a step that is no plain arithmetic": problem("Ida has 14 pens.", "<<14**2=196>>", "196"),
    "a result that is no plain number": problem("Ida has 14 pens; 19 are lost.",
                                                "<<14-19=-5>>", "-5"),
    "an answer that is not the last result": problem("Ida has 14 pens and buys 16.",
                                                     "<<14+16=30>>", "31"),
    "a number that the answer does not need": problem("At 25 Ida has 14 pens and buys 16.",
                                                      "<<14+16=30>>", "30"),
    "no number that is certain": problem("Ida has 14 pens and Bo has 14.", "<<14+14=28>>", "28"),
    "a number in an unusual form": problem("Ida has 014 pens and buys 16.", "<<14+16=30>>", "30"),
    "no other numbers that fit": problem("1/887 of 1774 pens write.", "<<1774/887=2>>", "2"),
}


def fractions(text):
    return [Fraction(n.replace(",", "")) for n in re.findall(NUMBER, text)]


def check(new, old):
    """`new` has the words of `old`, and every step is true and uses what is given."""
    for field in ("question", "chain", "answer"):
        assert re.sub(NUMBER, "#", new[field]) == re.sub(NUMBER, "#", old[field])
    words = re.findall("[a-z]+|%", old["question"].lower())
    given = ALWAYS.union(fractions(new["question"]), *(BRINGS.get(w, set()) for w in words),
                         *(BRINGS.get(w[:-1], set()) for w in words))
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


def test_other_forms_stay():
    for seed in range(50):
        p = renumber(parse(FIT["commas, decimals"]), Random(seed))
        assert re.match(r"A boat costs \$\d(,\d)?\d\d and each of its \d oars \$\d\d?\.\d\d\. ",
                        p["question"])
        assert re.fullmatch(r"<<\d\*\d\d?\.\d\d=\d+>> <<\d+\+\d+=\d+\.\d\d>>", p["chain"])
        p = renumber(parse(FIT["percent"]), Random(seed))
        assert re.search(r"\*\.\d\d?=", p["chain"]) and 10 <= fractions(p["question"])[1] <= 50


@pytest.mark.parametrize("reason", UNFIT)
def test_what_is_not_certain_falls_out(reason):
    with pytest.raises(ValueError, match=reason):
        parse(UNFIT[reason])


def test_reasons_are_counted():
    reasons = ["no steps", "a step that is not exact", "no steps"]
    found, counted = templates([PENS, *(UNFIT[reason] for reason in reasons)])
    assert [template is None for template in found] == [False, True, True, True]
    assert counted == Counter(reasons)
    assert len(list(renumbered(found, 0, 0))) == 1


@pytest.mark.parametrize("chain", [
    "<<>>", "<<=>>", "<<14=>>", "<<14+=14>>", "<<14/0=1>>", "<<14(2)=28>>", "<<14//3=4>>",
    "<<1.4.5=1>>", "<<14+x=15>>", "<<14+14=28", ">>14<<",
    "<<" + "(" * 150 + "14=14>>", "<<" + "(" * 999 + "=1>>"])
def test_no_chain_is_too_strange(chain):
    with pytest.raises(ValueError):
        parse(dict(PENS, chain=chain))


def drawn(question, chain, answer):
    """The numbers of the question that change."""
    template = parse(problem(question, chain, answer))
    return {int(template.values[index]) for index in template.choices}


def test_numbers_in_doubt_keep_their_values():
    for question, chain, answer, changed in (
            ("Ida halves 14 pens; 2 are lost", "<<14/2=7>> <<7-2=5>>", "5", {14}),  # which 2?
            ("6 pens of 6 cents, 5 of 9", "<<6*6=36>> <<5*9=45>> <<36+45=81>>", "81", {5, 9}),
            ("5 and 8, and 13 more, less 7", "<<5+8=13>> <<13+13=26>> <<26-7=19>>", "19", {7}),
            ("4 cats of 15 women have legs", "<<4*4=16>> <<16*15=240>>", "240", {15}),
            ("40% of 30, 60%", "<<30*.4=12>> <<30*.6=18>> <<18-12=6>>", "6", {30})):
        assert drawn(question, chain, answer) == changed


def test_names_and_fixed_numbers_stay():
    for text in ("the 3rd of 9", "at 8:30 of 9", "at 8 pm, 9", "2/3 of 9", "3-4 of 9", "in 1998, 9",
                 "Chapter 3, 9", "an 8, 9", "#4, 9", "these 3, 9", "1 of 9", "1 1/2 of 9"):
        assert drawn(f"{text} and 75", "<<9+75=84>>", "84") == {9, 75}


def test_words_bring_constants():
    chain = "<<14*2=28>> <<28*12=336>> <<336/7=48>>"
    assert drawn("Twice 14 a week for a dozen weeks", chain, "48") == {14}
    with pytest.raises(ValueError, match="does not say"):
        drawn("Twice 14 every evening", "<<14*2=28>> <<28*7=196>>", "196")


def test_a_comparison_keeps_the_order_of_size():
    template = parse(problem("Ida has 9 pens, Bo 11, Cy 12. How many have all but the least?",
                             "<<9+11=20>> <<20+12=32>> <<32-9=23>>", "23"))
    for seed in range(50):
        ida, bo, cy = fractions(renumber(template, Random(seed))["question"])
        assert ida <= bo <= cy


@pytest.mark.parametrize("text, after, low, high, step", [
    ("14", " pens", 7, 28, 1), ("100", " pens", 50, 200, 10), ("20", "% of", 10, 40, 5),
    ("60", "% of", 30, 90, 10), ("5", " days", 3, 7, 1), ("10", " hours", 5, 20, 1),
    ("15", "-hour", 8, 24, 1), ("2", " pens", 2, 4, 1), ("3,000", " pens", 1500, 6000, 500)])
def test_choices_are_like_the_number(text, after, low, high, step):
    assert choices(text, after) == list(range(low, high + 1, step))


def test_choices_that_are_not_whole():
    assert choices("2.50", "") == [Fraction(3, 2), Fraction(5, 2), Fraction(7, 2), Fraction(9, 2)]
    assert len(choices("0.99", "")) > 50 and Fraction(1) not in choices("0.99", "")
    assert len(choices("123,457", " people")) <= 200


@pytest.mark.parametrize("value, like, text", [
    ("24", "7", "24"), ("1200", "3,000", "1,200"), ("1200", "950", "1200"), ("2.5", "1.25", "2.50"),
    ("0.35", ".2", ".35"), ("0.05", "0.2", "0.05"), ("144", "9.00", "144.00"), ("1.5", ".5", "1.5"),
    ("0", "0", "0")])
def test_a_number_is_written_like_another(value, like, text):
    assert write(Fraction(value), like) == text


def test_similar():
    for new, old in (("24", "18"), ("99", "10"), ("12", "9"), ("0", "0"), (".2", ".5"), ("3", "2")):
        assert similar(Fraction(new), Fraction(old))
    for new, old in (("0", "4"), ("-3", "3"), ("1.5", "2"), ("1/3", ".5"), ("30", "9")):
        assert not similar(Fraction(new), Fraction(old))


def test_a_copy_is_a_function_of_seed_number_and_place():
    problems = [PENS, UNFIT["no steps"], PENS, FIT["percent"]]
    found, _ = templates(problems)
    first = list(renumbered(found, 0, 0))
    assert first == list(renumbered(found, 0, 0)) == list(renumbered(templates(problems)[0], 0, 0))
    assert first[0] != first[1]  # the same problem in two places
    assert first != list(renumbered(found, 0, 1)) and first != list(renumbered(found, 1, 0))
    assert list(renumbered(found[2:], 0, 0)) != first[1:]


@pytest.mark.parametrize("cot", ["steps", "text"])
def test_all_of_gsm8k(gsm8k, cot):
    problems = load("gsm8k", "train", gsm8k, cot) + load("gsm8k", "val", gsm8k, cot)
    problems = problems if cot == "steps" else problems[::5]  # one of the two in full is enough
    found, reasons = templates(problems)
    usable = [p for p, template in zip(problems, found) if template]
    assert len(usable) + reasons.total() == len(found) and len(usable) > 0.55 * len(found)
    new = list(renumbered(found, 0, 0))
    for p, old in list(zip(new, usable))[::9]:
        check(p, old)
    assert sum(p["question"] != old["question"] for p, old in zip(new, usable)) > 0.9 * len(usable)
    for template in filter(None, found):
        template.choices.clear()
    assert list(renumbered(found, 0, 0)) == usable
