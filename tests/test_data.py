"""Problems: the toy task, the loaders, the tokenizers, scoring, and what makes a batch."""
import hashlib
import http.client
import io
import itertools
import json
import re
import time
from collections import Counter
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest

import data
import toy
from conftest import ROOT, easy_file
from data import TOY_SIZE, Problems, UserError, load, numbers, split_of, to_number
from encoder import (Layout, draw_followed, encoder_batch, explicit_batch, latent_batch,
                     llm_batch)

SAMPLE = ROOT / "tests" / "sample.jsonl"


# ------------------------------------------------------------------------------------- the toy task

@pytest.fixture(scope="module")
def toy_problems():
    return list(toy.problems(1, 500, lambda question: True))


def test_every_toy_path_leads_to_the_answer(toy_problems):
    """Each step is true and uses only numbers that the question or an earlier step gave.

    The last result is the answer.
    """
    for p in toy_problems:
        assert p["chain"] in p["paths"] and len(set(p["paths"])) == 6
        for path in p["paths"]:
            known = set(re.findall(r"\d+", p["question"]))
            if re.search("double|halve", p["question"]):
                known.add("2")
            steps = path.split(" ")
            assert len(steps) in (8, 10)
            for step in steps:
                expression, result = re.fullmatch(r"<<([\d+*/-]+)=(\d+)>>", step).groups()
                assert set(re.findall(r"\d+", expression)) <= known
                assert eval(expression) == int(result) and 1 <= int(result) <= toy.TOP
                known.add(result)
            assert result == p["answer"]


def change_by_hand(words):
    """(op, k) of 'find 3', 'lose 3', 'double them' or 'halve them'."""
    verb, k = words.split(" ")
    known = {"double": ("*", 2), "halve": ("/", 2)}
    if verb in known:
        return known[verb]
    return {**dict.fromkeys(toy.GAIN, "+"), **dict.fromkeys(toy.LOSS, "-")}[verb], int(k)


def steps_by_hand(question):
    """(free, links) as the words say: the free steps, and what comes after the sum.

    A free step is (number, op, k), and a link a pair of (op, k): for even numbers and for odd ones.
    """
    free = []
    for start, verb, k in re.findall(r"has (\d+) \w+ and (\w+)s (\d+)\.", question):
        free.append((int(start), *change_by_hand(f"{verb} {k}")))
    clauses, even, odd = re.search(r"They pool their \w+,? (.*)\. After each of these, "
                                   r"if even (.*), else (.*)\. How", question).groups()
    rule = change_by_hand(even), change_by_hand(odd)
    links = [rule]
    for clause in clauses.removeprefix("and ").split(" and "):
        links += [(change_by_hand(clause),) * 2, rule]
    return free, links


def calculate(a, op, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


def path_by_hand(free, links):
    """The chain that takes these free steps in this order."""
    results = [calculate(*step) for step in free]
    texts = [f"<<{a}{op}{k}={result}>>" for (a, op, k), result in zip(free, results)]
    value = results[0]
    for if_even, if_odd in [*((("+", k),) * 2 for k in results[1:]), *links]:
        op, k = if_odd if value % 2 else if_even
        texts.append(f"<<{value}{op}{k}={calculate(value, op, k)}>>")
        value = calculate(value, op, k)
    return " ".join(texts)


def test_the_toy_chain_is_what_the_question_says(toy_problems):
    assert {p["chain"].count("<<") for p in toy_problems} == {8, 10}
    for p in toy_problems:
        assert path_by_hand(*steps_by_hand(p["question"])) == p["paths"][0]


def test_no_toy_path_is_missed(toy_problems):
    """Brute force: all orders of the steps in which each comes after those it uses results of.

    For problems of eight steps; ten can be put in 3,628,800 orders.
    """
    short = [p for p in toy_problems if p["chain"].count("<<") == 8]
    for p in short[:5]:
        free, links = steps_by_hand(p["question"])
        total = len(free) + 2 + len(links)
        found = set()
        for order in itertools.permutations(range(total)):
            place = {step: i for i, step in enumerate(order)}
            if any(place[step] > place[3] for step in range(3)):
                continue  # they pool what all three have
            if any(place[step - 1] > place[step] for step in range(4, total)):
                continue  # each step from then on needs the result before it
            found.add(path_by_hand([free[step] for step in order[:3]], links))
        assert found == set(p["paths"])


@pytest.mark.parametrize("as_told", [0.0, 0.3, 0.8, 1.0])
def test_a_share_of_the_toy_chains_is_as_told(as_told):
    chains = list(toy.problems(3, 1000, lambda question: True, as_told))
    told = sum(p["chain"] == p["paths"][0] for p in chains) / len(chains)
    assert abs(told - as_told) < 0.05
    others = {p["paths"].index(p["chain"]) for p in chains} - {0}
    assert others == (set() if as_told == 1 else {1, 2, 3, 4, 5})


def test_toy_splits_are_seeded_and_share_no_question():
    questions = {split: [p["question"] for p in load("toy", split)] for split in TOY_SIZE}
    assert {split: len(set(q)) for split, q in questions.items()} == TOY_SIZE
    assert not set(questions["train"]) & set(questions["val"] + questions["test"])
    assert not set(questions["val"]) & set(questions["test"])
    assert load("toy", "val") == load("toy", "val") != load("toy", "val", seed=1)
    other_seed = {p["question"] for p in load("toy", "test", seed=1)}
    assert not other_seed & set(questions["train"])  # whatever the seed


# --------------------------------------------------------------------------------------- tokenizers

TEXTS = ["", " ", "Ann has 7 pens.", "zebras  &\n\tquaggas", "naïve café: 12½ €, 汉字 🙂",
         "<<7+5=12>> <<9-8=1>>#### 1", "####", "<eot> <bot><sum><|endoftext|>", "1234567 x07",
         "e\u0301\u200b\x00"]


@pytest.mark.parametrize("name", ["toy", "gpt2"])
def test_any_text_survives_and_is_data(name, request):
    """Whatever the text, the ids spell it again, and none of them is a control token."""
    t = request.getfixturevalue(f"{name}_tokenizer")
    for text in TEXTS:
        ids = t.encode(text)
        assert t.decode(ids) == text and all(0 <= i < t.n_ordinary for i in ids)
    assert [t.eos, t.bot, t.eot, t.sum] == list(range(t.n_ordinary, t.n_ordinary + 4))
    assert t.n_vocab % 64 == 0 and t.n_ordinary + 4 <= t.n_vocab < t.n_ordinary + 4 + 64
    assert t.decode([t.bot, t.eot, t.n_vocab - 1]) == "<bot><eot>"


def test_toy_words_and_numbers_are_tokens_and_unknown_words_are_bytes(toy_tokenizer, toy_problems):
    t = toy_tokenizer
    assert t.encode("ζ") == list("ζ".encode()) and t.encode("QQQ") == list(b"QQQ")
    for p in toy_problems[:100]:
        for step in p["chain"].split(" "):
            numbers_and_signs = re.findall(r"\d+|[^\d<>]", step)
            length = len(numbers_and_signs) + 2  # << and >>; between two steps one token is both
            assert len(t.encode(step)) == length
            assert len(t.encode(f"{step} {step}")) == 2 * length - 1
        tokens = [t.decode([i]) for i in t.encode(p["question"])]
        assert all(len(token) > 1 for token in tokens if token.isalpha())


# ------------------------------------------------------------------------------------------ loaders

def test_all_of_gsm8k_parses_and_tokenizes(gsm8k, gpt2_tokenizer):
    splits = {split: load("gsm8k", split, gsm8k) for split in ("train", "val", "test")}
    assert len(splits["train"]) + len(splits["val"]) == 7473 and len(splits["test"]) == 1319
    assert 0.03 < len(splits["val"]) / 7473 < 0.07
    for cot in ("steps", "text"):
        every = [p for split in splits for p in load("gsm8k", split, gsm8k, cot)]
        assert len(every) == 8792
        assert all(to_number(p["answer"]) is not None for p in every)
        done = Problems(every, gpt2_tokenizer, block_size=1024)
        assert done.dropped == 0
        for row in range(0, 8792, 97):
            assert gpt2_tokenizer.decode(done.s[row]) == every[row]["chain"]


def test_own_jsonl_in_the_form_of_gsm8k():
    splits = {split: load(str(SAMPLE), split) for split in ("train", "val", "test")}
    assert all(splits.values()) and sum(map(len, splits.values())) == 16
    assert all(split_of(p["question"]) == split for split, rows in splits.items() for p in rows)
    rows = {p["question"].split()[0]: p for rows in splits.values() for p in rows}
    assert rows["Rosa"]["chain"] == "<<12*2=24>> <<12+24=36>>" and rows["Rosa"]["answer"] == "36"
    assert rows["How"]["chain"] == ""  # no calculator step, no chain
    text = {p["question"].split()[0]: p for p in load(str(SAMPLE), "train", cot="text")}
    assert text["How"]["chain"] == "Eight legs three times over."


def test_folder_with_train_and_test(tmp_path):
    lines = SAMPLE.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:14]), "utf-8")
    windows = "\ufeff" + "\r\n".join(lines[14:]) + "\n\n"
    (tmp_path / "test.jsonl").write_text(windows, "utf-8")
    assert len(load(str(tmp_path), "test")) == 2
    both = load(str(tmp_path), "train") + load(str(tmp_path), "val")
    assert {p["question"] for p in both} == {json.loads(line)["question"] for line in lines[:14]}


def test_gsm8k_aug(tmp_path):
    question = "Out of 600 employees, 30% got a rise. How many did not?"
    chain = "<<600*30/100=180>> <<600-180=420>>"
    (tmp_path / "test.txt").write_text(f"{question}||{chain} #### 420\n")
    assert load("gsm8k-aug", "test", tmp_path) == [
        {"question": question, "chain": chain, "answer": "420"}]


GOOD = '{"question": "1 + 1?", "answer": "<<1+1=2>> #### 2"}'


MALFORMED = [
    ("{", "no JSON"),
    ("[1, 2]", "'question' and 'answer'"),
    ('{"question": "x"}', "'question' and 'answer'"),
    ('{"question": 5, "answer": "#### 5"}', "'question' and 'answer'"),
    ("[" * 100000, "no JSON"),
    ('{"question": " ", "answer": "#### 5"}', "question is empty"),
    ('{"question": "x", "answer": "#### many"}', "'many'"),
    ('{"question": "x", "answer": "it is 5"}', "after '####'"),
    ('{"question": "x", "answer": "5 ####"}', "after '####'"),
    ('{"question": "x", "answer": "#### 1.2.3"}', "one number after '####', found '1.2.3'"),
    ('{"question": "x", "answer": "#### 1,2"}', "one number after '####', found '1,2'"),
    ('{"question": "x", "answer": "#### 1/0"}', "one number after '####', found '1/0'"),
    ('{"question": "x", "answer": "#### 5 or 6"}', "one number after '####', found '5 or 6'"),
    ('{"question": "x", "answer": "#### 5 and 1.2.3"}', "one number after '####'"),
]


@pytest.mark.parametrize("bad, complaint", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_line_is_named(tmp_path, bad, complaint):
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{GOOD}\n\n{bad}\n")
    with pytest.raises(UserError) as error:
        load(str(file), "train")
    assert str(error.value).startswith(f"{file}, line 3: ") and complaint in str(error.value)


@pytest.mark.parametrize("answer, kept", [
    ("1,234", "1234"), ("1 1/2", "1 1/2"), ("2.5e-06", "2.5e-06"), ("-$3.50", "-$3.50"),
    ("18 dollars", "18 dollars"), ("1½", "1½"), ("2 x 10^3", "2 x 10^3"),
])
def test_an_answer_of_one_number_is_kept_as_written(tmp_path, answer, kept):
    """But for the commas; and it is the same number without them."""
    line = {"question": "x", "answer": f"<<1+1=2>> #### {answer}"}
    (tmp_path / "test.jsonl").write_text(json.dumps(line))
    problem, = load(str(tmp_path), "test")
    assert problem["answer"] == kept
    assert to_number(kept) == to_number(answer) is not None


def test_what_has_no_chain_is_said(tmp_path, capsys):
    """Solutions without calculator steps are no chain of thought, unless the whole text is one."""
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"It is {i + 1}. #### {i + 1}"})
             for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    args = SimpleNamespace(data=str(tmp_path), data_dir=None, cot="steps", seed=0, as_told=0.8,
                           easy=0, renumber=0, block_size=64, chunk_size=2)
    env = SimpleNamespace(tokenizer=data.Tokenizer("toy"), rank=0)
    train, val = data.splits(args, env)
    said = capsys.readouterr().out.split(f"{len(train)} without a chain")[0]
    assert f"train: {len(train)} problems" in said
    args.cot = "text"
    assert (data.splits(args, env)[0].s.length > 0).all()
    assert "without" not in capsys.readouterr().out


def test_half_a_character_is_no_reason_to_stop(tmp_path, toy_tokenizer):
    # JSON can say it, UTF-8 can't
    (tmp_path / "test.jsonl").write_text('{"question": "\\ud83d?", "answer": "<<1+1=2>> #### 2"}')
    assert len(Problems(load(str(tmp_path), "test"), toy_tokenizer, 120)) == 1


def test_files_that_are_not_there_or_not_text(tmp_path):
    for name, data_dir in (("gsm8k-aug", tmp_path), (str(tmp_path), None)):
        with pytest.raises(UserError, match="train.*no such file"):
            load(name, "train", data_dir)
    with pytest.raises(UserError, match="no such file or folder"):
        load(str(tmp_path / "nothing"), "train")
    (tmp_path / "test.txt").write_bytes(b"caf\xe9||#### 1")
    with pytest.raises(UserError, match="not UTF-8"):
        load("gsm8k-aug", "test", tmp_path)
    (tmp_path / "test.txt").write_text("no bars #### 1")
    with pytest.raises(UserError, match=r"test.txt, line 1: .*\|\|"):
        load("gsm8k-aug", "test", tmp_path)
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="checksum"):
        load("gsm8k", "train", tmp_path)  # never taken for the published data
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no problems"):
        load(str(tmp_path / "empty.jsonl"), "train")
    (tmp_path / "one.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="no problem falls to the val split"):
        load(str(tmp_path / "one.jsonl"), "val")


def easy_problem(question="Ida has 14 pens and buys 3 boxes of 6. How many has she?",
                 chain="<<3*6=18>> <<14+18=32>>", answer="32"):
    return {"question": question, "chain": chain, "answer": answer}


@pytest.mark.parametrize("easy, problem", [
    (True, easy_problem()),
    (True, easy_problem(chain="In boxes: <<3*6=18>>18.\nSo it's <<14+18=32>>32.")),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 6." + " Why?" * 40)),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 6.50 in year 1998.")),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 61.",
                         chain="<<3*61=183>> <<14+183=197>>", answer="197")),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 16.",
                         chain="<<3*16=48>> <<14+48=62>>", answer="62")),
    (False, easy_problem(chain="<<3*6=18>> <<3*6=18>> <<3*6=18>> <<3*6=18>> <<14+18=32>>")),
    (False, easy_problem(chain="<<3*7=21>> <<14+21=35>>", answer="35")),  # where from is the 7?
    (False, easy_problem(chain="")),
])
def test_what_is_easy(easy, problem):
    assert data.is_easy(problem) == easy


def test_easy_problems_alone_are_trained_on_and_none_that_is_held_out(tmp_path):
    name = easy_file(tmp_path)
    whole = {split: load(name, split) for split in ("train", "val", "test")}
    easy = {split: load(name, split, easy=9) for split in whole}
    assert easy["train"] == [p for p in whole["train"] if data.is_easy(p)][:9]
    assert easy["val"] == [p for p in whole["val"] if data.is_easy(p)] != whole["val"]
    assert easy["test"] == whole["test"]
    args = SimpleNamespace(data=name, data_dir=None, cot="steps", seed=0, as_told=0.8, easy=9,
                           renumber=3)
    trained = [p["question"] for p in data.load_split(args, "train")]
    assert len(trained) == 9 * 4 and {p["question"] for p in easy["train"]} < set(trained)
    held_out = {p["question"] for p in whole["val"] + whole["test"]}
    assert not held_out & set(trained)
    with_new_numbers = [{p["question"] for p in data.load_split(args, split)}
                        for split in ("val", "renumbered")]
    assert all(with_new_numbers) and not with_new_numbers[0] & with_new_numbers[1]
    assert not set.union(*with_new_numbers) & {*trained}
    assert data.load_split(args, "held-out") == easy["val"]
    only = data.load_split(args, "easy")
    assert only == [p for p in whole["test"] if data.is_easy(p)] and 0 < len(only) < len(held_out)


def test_nothing_that_gsm8k_holds_out_is_in_its_easy_part(gsm8k):
    """Not with other numbers either: the words of a copy are those of a training problem."""
    def words(rows):
        return {re.sub(r"[\d,.]+", "#", p["question"]) for p in rows}

    train = load("gsm8k", "train", gsm8k, easy=600)
    held_out = load("gsm8k", "val", gsm8k) + load("gsm8k", "test", gsm8k)
    assert len(train) == 600 and not words(train) & words(held_out)
    args = SimpleNamespace(data="gsm8k", data_dir=gsm8k, cot="steps", seed=0, as_told=0.8, easy=600,
                           renumber=2)
    trained = data.load_split(args, "train")
    assert len(trained) == 600 + 2 * 597 and words(trained) == words(train)
    new = {split: data.load_split(args, split) for split in ("val", "renumbered")}
    questions = [{p["question"] for p in rows} for rows in (trained, *new.values())]
    assert sum(map(len, questions)) == len(set.union(*questions))
    assert all(len(rows) >= 400 and words(rows) <= words(train) for rows in new.values())


# ------------------------------------------------------------------------------------------ scoring

SCORES = {
    "where": [
        ("#### 10", "10"), ("<eot>#### 10", "10"), ("first 3, then 7", "7"),
        ("#### 1 #### 2", "2"), ("7 and #### 8 of 9", "9"), ("12 apples and 3", "3"),
        ("x = 5.", "5"), ("It is 5.", "5"), ("5, or so", "5"), ("**18**", "18"),
        ("5^2 = 25", "25"), ("½ of 8 is 4", "4"), ("1, 2", "2"), ("x₁ = 5", "5"),
        ("in 2½ days\n#### 3", "3"), ("1/0 and 5", "5"),
    ],
    "whole numbers": [
        ("0", "0"), ("007", "7"), ("5.", "5"), ("10.0", "10"), ("1,000", "1000"),
        ("#### 1,000", "1000"), ("1,000,000", "1000000"), ("#### 1,234,567.50", "1234567.5"),
        ("1,234.", "1234"), ("٤٢", "42"), ("१२३", "123"), ("１２", "12"),
    ],
    "decimals": [
        (".5", "0.5"), ("-.5", "-0.5"), ("00.50", "0.5"), ("3.14159", "3.14159"),
    ],
    "signs": [
        ("-3", "-3"), ("−3", "-3"), ("+4", "4"), ("#### -1,234", "-1234"), ("x = -3", "-3"),
        ("(-3)", "-3"), ("-0", "0"), ("3-2", "2"), ("5-3", "3"), ("5−3", "3"), ("(5)-3", "3"),
    ],
    "money and shares": [
        ("$5.00", "5"), ("-$3", "-3"), ("$-3", "-3"), ("$1,234.50", "1234.5"), ("50%", "50"),
        ("20%", "20"), ("20 %", "20"), ("$18.00 in all", "18"), ("€7", "7"),
    ],
    "fractions": [
        ("1/2", "0.5"), ("3 / 4", "0.75"), ("1 / 2", "0.5"), ("-1/2", "-0.5"), ("1⁄2", "0.5"),
        ("1,234/2", "617"), ("1/1,000", "0.001"), (".5/2", "0.25"), ("½", "0.5"), ("¾ cup", "0.75"),
    ],
    "mixed numbers": [
        ("1 1/2", "1.5"), ("1 1 / 2", "1.5"), ("-1 1/2", "-1.5"), ("1½", "1.5"), ("1 ½", "1.5"),
        ("-1½", "-1.5"), ("−1½", "-1.5"), ("10 3/4 cups", "10.75"), ("2 1⁄4", "2.25"),
    ],
    "exponents": [
        ("1e6", "1000000"), ("1E+3", "1000"), ("2.0107e-06", "0.0000020107"), ("-1e-3", "-0.001"),
        ("1e400", "1e400"), ("2.5 x 10^-6", "0.0000025"), ("2.5×10⁻⁶", "0.0000025"),
        ("2.5 · 10^6", "2500000"), ("2 × 10³", "2000"), ("3x10^(-2)", "0.03"), ("2*10**3", "2000"),
        ("-2 x 10^3.", "-2000"),
    ],
    "no number": [
        ("", None), ("####", None), ("7 ####", None), ("no number", None), ("-", None),
        ("...", None), ("#", None), ("$", None), ("①", None), ("Ⅳ", None),
        ("e", None), ("/", None), ("^", None),
    ],
    "only like a number": [
        ("1.2.3", None), ("1,2", None), ("1,00", None), ("1,0000", None), ("1,234,56", None),
        ("1234,567", None), ("1.000,50", None), ("1.000.000", None), ("1..2", None), ("5.,6", None),
        ("1/2/3", None), ("10/2/2024", None), ("3 1/2/4", None), ("1/0", None), ("0/0", None),
        ("5 1/0", None), ("5 and 1/0", None), ("5^2", None), ("5²", None), ("10^3", None),
        ("10³", None), ("1.5e6.5", None), ("1.5 x 10^6.5", None), ("2*10^2/4", None),
        ("5¼/2", None), ("2½²", None), ("1e99999999999999999999", None),
        ("1 x 10^99999999999999999999", None),
    ],
}


@pytest.mark.parametrize("text, number", [
    pytest.param(text, number, id=f"{kind}: {text}")
    for kind, cases in SCORES.items() for text, number in cases])
def test_answers_as_people_write_them(text, number):
    assert to_number(text) == (None if number is None else Decimal(number))


def test_all_numbers_of_a_text_in_order():
    found = numbers("From 1,000 he gave 1/2 on 1.2.3, then -7 and $2½; 5/0 is none")
    expected = ["1000", "0.5", None, "-7", "2.5", None]
    assert found == [number and Decimal(number) for number in expected]


@pytest.mark.parametrize("text", [
    "1" * 50_000, "1 " * 25_000, "1,111" * 10_000, "1/" * 25_000, "9^" * 25_000, "." * 50_000,
    "1" + " " * 50_000 + "/", ("1" + " " * 300) * 150, "1e" * 25_000, "10 x 10^" * 6_000,
    "½" * 10_000, "²" * 50_000, "-" * 50_000, "1e" + "9" * 50_000, "1 x 10^" + "9" * 50_000,
], ids=range(15))
def test_no_text_takes_long_to_score(text):
    """A model can write anything: a pattern that goes back over it again would take minutes."""
    start = time.process_time()
    to_number(text)
    assert time.process_time() - start < 2


# ------------------------------------------------------------------------------------------ batches

@pytest.fixture(scope="module")
def problems(toy_tokenizer, toy_problems):
    short = [dict(p, chain=p["chain"][:k]) for p, k in zip(toy_problems[:101], [0, 7, 30, 99] * 26)]
    return Problems(short, toy_tokenizer, block_size=128)


@pytest.mark.parametrize("size", [8, 40, 150])
def test_every_problem_once_an_epoch(problems, size):
    """Of 101 problems a few come twice where the last batch is filled up, other ones each epoch."""
    epochs, batches = [], -(-101 // size)
    for epoch in range(2):
        steps = range(epoch * batches, (epoch + 1) * batches)
        rows = np.concatenate([problems.train_batch(step, size, seed=0).rows for step in steps])
        count = np.bincount(rows, minlength=len(problems))
        assert count.min() == 1 and count.sum() == batches * size
        assert count.max() <= 2
        epochs.append((rows.tolist(), np.flatnonzero(count == 2).tolist()))
    assert epochs[0][0] != epochs[1][0] and epochs[0][1] != epochs[1][1]


def test_no_length_is_drawn_more_often(problems):
    """Over many epochs that are not full, short and long problems come equally often."""
    rows = [problems.train_batch(step, 8, seed=0).rows for step in range(13 * 100)]
    count = np.bincount(np.concatenate(rows))  # of each problem: 100, and 3 in 101 for each epoch
    for bucket in range(problems.bucket.max() + 1):
        of_bucket = count[problems.bucket == bucket]
        expected = 104 / 101 * 100
        assert abs(of_bucket.mean() - expected) < 3 * (3 / len(of_bucket)) ** 0.5


def test_a_batch_is_a_function_of_seed_and_step(problems, toy_tokenizer):
    fresh = Problems(problems.problems, toy_tokenizer, block_size=128)
    # in any order, with or without a history
    for seed, step in ((0, 40), (1, 3), (0, 3), (0, 40), (1, 40)):
        a = problems.train_batch(step, 8, seed)
        b = fresh.train_batch(step, 8, seed)
        assert a.rows.tolist() == b.rows.tolist()
        fresh.make_buckets(0)  # as another loop might do
        assert fresh.train_batch(step, 8, seed).rows.tolist() != b.rows.tolist()
        fresh.make_buckets(1)
    other_seed = problems.train_batch(3, 8, 1)
    assert problems.train_batch(3, 8, 0).rows.tolist() != other_seed.rows.tolist()


def test_ranks_share_one_global_batch(problems):
    whole = problems.train_batch(5, 8, 0)
    parts = [problems.train_batch(5, 8, 0, rank, 2) for rank in range(2)]
    assert sorted(np.concatenate([p.rows for p in parts])) == sorted(whole.rows)
    width = encoder_batch(whole, 2, 0).ids.shape[1]
    assert all(encoder_batch(part, 2, 0).ids.shape[1] == width for part in parts)


LOOPS = {  # the slots that a token of the chain takes at c = 2, and a loop's layouts of a batch
    "warm-up": (1, lambda batch, n: [explicit_batch(batch)]),
    "phase 1": (2, lambda batch, n: [
        encoder_batch(batch, 2, 0),
        llm_batch(batch, 2, draw_followed(batch, 2, 0, n, from_start=0.25))]),
    "phase 3": (0.5, lambda batch, n: [latent_batch(batch, 2)]),
}


@pytest.fixture(scope="module")
def uneven(toy_tokenizer):
    """Lengths that are spread as GSM8K's are: many middling ones, and a few long."""
    rng = np.random.default_rng(0)
    x, s = np.exp(rng.normal([[3.9], [3.1]], [[0.4], [0.5]], (2, 400))).astype(int)
    rows = [dict(question="1 " * (i // 2), chain="1 " * (j // 2), answer="1") for i, j in zip(x, s)]
    return Problems(rows, toy_tokenizer, block_size=512)


@pytest.mark.parametrize("loop", LOOPS)
def test_few_widths_and_little_padding(uneven, loop):
    chain_slots, lay_out = LOOPS[loop]
    uneven.make_buckets(chain_slots)
    shapes, slots, real = set(), Counter(), Counter()
    for step in range(75):  # three epochs
        layouts = lay_out(uneven.train_batch(step, 16, 0), step)
        shapes.add(tuple(t.shape for layout in layouts for t in layout))
        for i, layout in enumerate(layouts):
            slots[i] += layout.pos.numel()
            real[i] += len(layout.pos) + int((layout.pos > 0).sum())  # a row's first one is at 0
    assert len(shapes) <= data.WIDTHS == 10
    assert all(real[i] > 0.75 * slots[i] for i in slots)


def test_widths_are_chosen_where_they_save_most():
    assert data.choose_widths(np.array([86, 95] * 9)) == [88, 96]
    assert data.choose_widths(np.array([5.5])) == [8]
    length = np.array([8] * 50 + [16] * 3 + [*range(40, 97, 8)] * 9 + [200, 208])
    widths = data.choose_widths(length)
    assert len(widths) == 10 and widths[-1] == 208 and {8, 96} <= set(widths)
    assert 200 not in widths  # for one problem more or less it is not worth while


def test_a_few_long_problems_are_padded_for_and_fit(toy_tokenizer):
    """A batch that joins two buckets has room for both, and the shape of the longer one's."""
    sizes = [(2, 30)] * 13 + [(60, 1)] * 5 + [(90, 2)]
    rows = [dict(question="1 " * x, chain="1 " * s, answer="1") for x, s in sizes]
    few = Problems(rows, toy_tokenizer, 512)
    shapes = {}
    for step in range(30):
        batch = few.train_batch(step, 4, 0)
        seq = encoder_batch(batch, 2, 0)
        assert (seq.n.numpy() == [-(-len(p.chain) // 2) for p in batch.problems]).all()
        shapes.setdefault(few.bucket[batch.rows].max(), set()).add((seq.ids.shape, seq[7].shape))
    assert len(shapes) > 1 and all(len(found) == 1 for found in shapes.values())


def test_a_batch_holds_the_problems_it_names(problems, toy_tokenizer):
    t = toy_tokenizer
    for batch in (problems.train_batch(1, 8, 0), *problems.eval_batches(40)):
        assert len(batch.rows) == len(batch.problems)
        for row, (question, chain, answer) in zip(batch.rows, batch.problems):
            p = problems.problems[row]
            assert question == t.encode(p["question"]) + [t.bot]
            assert chain == t.encode(p["chain"])
            assert answer == [t.eot] + t.encode("#### " + p["answer"]) + [t.eos]
            lengths = len(question), len(chain), len(answer)
            assert lengths in zip(*(column.tolist() for column in batch.lengths))


def test_evaluation_meets_every_problem_once(problems):
    for limit, count in (None, 101), (20, 20):
        batches = problems.eval_batches(16, limit=limit)
        assert sorted(np.concatenate([batch.rows for batch in batches])) == list(range(count))


def test_what_is_too_long_is_dropped_and_counted(problems, toy_tokenizer):
    length = problems.x.length + problems.s.length + problems.a.length
    longest = int(length.max())
    fewer = Problems(problems.problems, toy_tokenizer, longest - 1)
    assert fewer.dropped == (length == longest).sum() > 0 and len(fewer) + fewer.dropped == 101
    assert Problems(problems.problems, toy_tokenizer, longest).dropped == 0
    assert Problems(problems.problems, toy_tokenizer, longest, chunk_size=64).dropped > 0
    assert fewer.fingerprint != problems.fingerprint
    with pytest.raises(UserError, match="all 101 are longer"):
        Problems(problems.problems, toy_tokenizer, 5)


# ---------------------------------------------------------------------------------------- downloads

@pytest.mark.parametrize("arrives, says", [
    (lambda: io.BytesIO(b"half of it"), "checksum"),
    (lambda: Broken(OSError("connection reset")), "connection reset"),
    (lambda: Broken(http.client.IncompleteRead(b"half")), "IncompleteRead"),
])
def test_a_download_that_is_not_whole_leaves_nothing(tmp_path, monkeypatch, arrives, says):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: arrives())
    with pytest.raises(UserError, match=says):
        load("gsm8k", "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_the_right_checksum_is_kept(tmp_path, monkeypatch):
    content = f"{GOOD}\n".encode()
    monkeypatch.setitem(data.GSM8K_SHA256, "train.jsonl", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    assert load("gsm8k", "train", tmp_path) == load(str(tmp_path), "train")
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="not GSM8K as published"):
        load("gsm8k", "train", tmp_path)


class Broken(io.BytesIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def read(self, *_):
        raise self.error
