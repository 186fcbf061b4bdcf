"""Numbers as people, data sets and models write them."""
import re
import time
from decimal import Decimal

import pytest

from lab.numbers import numbers, to_number

READ = {
    "where": {"#### 1 #### 2": 2, "7 and #### 8 of 9": 9, "in 2½ days\n#### 3": 3, "1, 2": 2,
              "½ of 8 is 4": 4, "1/0 and 5": 5, "5^2 = 25": 25, "9 m^2": 9, "9 cm²": 9,
              "x₁ = 5": 5},
    "digits": {"007": 7, "00.50": "0.5", ".5": "0.5", "٤٢": 42, "１２": 12, "1E+3": 1000,
               "1e400": "1e400"},
    "signs": {"−3": -3, "–3": -3, "+4": 4, "-0": 0, "-.5": "-0.5", "-$3": -3, "3-2": 2, "5−3": 3,
              "(5)-3": 3},
    "fractions": {"1/2": "0.5", "3 / 4": "0.75", "-1/2": "-0.5", "1⁄2": "0.5", "1,234/2": 617,
                  "1/1,000": "0.001", ".5/2": "0.25", "3/-2": "-1.5", "¾ cup": "0.75",
                  "50%/20%": "2.5"},
    "mixed": {"1 1/2": "1.5", "-1 1 / 2": "-1.5", "1½": "1.5", "1 ½": "1.5", "−1½": "-1.5",
              "10 3/4 cups": "10.75", "2 1⁄4": "2.25"},
}
NONE = ["", "####", "7 ####", "no number", "-", "...", "$", "①", "Ⅳ", "e", "/", "^", "1.2.3", "1,2",
        "1,00", "1,0000", "1,234,56", "1234,567", "0,500", "1.000,50", "1..2", "5.,6", "1/2/3",
        "10/2/2024", "3 1/2/4", "1/0", "0/0", "5 1/0", "5^2", "5²", "10^-3", "10⁻³", "1.5e6.5",
        "5¼/2", "1e99999999999999999999"]


@pytest.mark.parametrize("form", [
    "{}", "{}.", "#### {}", "<eot>#### {}", "first 3, then {} cups", "x = {}", "({})", "{}, or so",
    "**{}**", "${}", "€{}", "{}%", "{} %", "{:,}", "${:,} in all"])
def test_a_number_in_all_its_forms(form):
    for number in ("0", "7", "-3", "0.5", "10.0", "145.0", "-9867630.0", "1234567.50", "1e6",
                   "-1e-3", "2.0107e-06", "1" * 40):
        assert to_number(form.format(Decimal(number))) == Decimal(number), number


@pytest.mark.parametrize("kind", READ)
def test_answers_as_people_write_them(kind):
    found = {text: to_number(text) for text in READ[kind]}
    assert found == {text: Decimal(number) for text, number in READ[kind].items()}


def test_what_only_looks_like_a_number():
    assert [text for text in NONE if to_number(text) is not None] == []


def test_all_numbers_of_a_text_in_order():
    found = numbers("From 1,000 he gave 1/2 on 1.2.3, then -7 and $2½; 5/0 is none")
    expected = ["1000", "0.5", None, "-7", "2.5", None]
    assert found == [number and Decimal(number) for number in expected]


def test_all_of_gsm8k(gsm8k):
    """What is written after <<48/2=24>> is 24, however it is written."""
    text = (gsm8k / "train.jsonl").read_text("utf-8")
    pairs = re.findall(r"=([\d.]+)>>(-?[\d,.]*\d)", text)
    assert len(pairs) > 20_000
    assert [pair for pair in pairs if to_number(pair[0]) != to_number(pair[1])] == []


@pytest.mark.parametrize("text", [
    "1" * 50_000, "1 " * 25_000, "1,111" * 10_000, "1/" * 25_000, "9^" * 25_000, "." * 50_000,
    "1" + " " * 50_000 + "/", ("1" + " " * 300) * 150, "1e" * 25_000, "½" * 10_000, "-" * 50_000,
    "1e" + "9" * 50_000], ids=range(12))
def test_no_text_takes_long(text):
    """A model can write anything: a pattern that goes back over it again would take minutes."""
    start = time.process_time()
    to_number(text)
    assert time.process_time() - start < 2
