"""Numbers as people, data sets and models write them: 1,000.50, −3, $-3, 1 1/2, ½, 2.0107e-06."""
import re
import unicodedata
from decimal import Decimal

DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
NUMBER = re.compile(rf"""
    (?<![\d^])                                 # the 2 of m^2 is no number
    (?P<sign>(?<![\w)])-)?                     # a minus after a word or ')' is subtraction
    (?:(?P<whole>\d+)\ +(?=\d+\ */\ *\d))?     # the 1 of 1 1/2
    (?P<top>{DECIMAL})
    (?:\ */\ *(?P<bottom>-?{DECIMAL}))?
    (?P<excess>(?:[.,/]|\^-?)*\d[\d.,/^]*|[¹²³⁰-⁻])?  # 1.2.3, 1,2, 10^-3, 5² are no numbers
    """, re.VERBOSE)
FRACTION = "[¼-¾⅐-⅞]"
PLAIN = str.maketrans({"−": "-", "–": "-", "⁄": "/", "$": "", "%": ""})


def numbers(text):
    """The numbers in a text, in order, as Decimal; None for what only looks like one (1.2.3)."""
    text = re.sub(rf"(?<=\d)(?={FRACTION})", " ", text)  # 1½ is 1 1/2
    text = re.sub(FRACTION, lambda match: unicodedata.normalize("NFKC", match[0]), text)
    return [number_value(match) for match in NUMBER.finditer(text.translate(PLAIN))]


def number_value(match):
    if match["excess"]:
        return None
    sign, whole, top, bottom = ((match[name] or "").replace(",", "")
                                for name in ("sign", "whole", "top", "bottom"))
    try:
        value = Decimal(sign + top)
        if bottom:
            value /= Decimal(bottom)
        return value + Decimal(sign + whole) if whole else value
    except ArithmeticError:  # 1/0, or an exponent beyond Decimal's
        return None


def to_number(text):
    """The number that a text says, as Decimal, or None.

    After '####', else anywhere, the last one counts. What only looks like a number is None.
    """
    found = numbers(text.rpartition("####")[2])
    return found[-1] if found else None
