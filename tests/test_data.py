"""Problems: the toy task, the loaders, the tokenizers, and what makes a batch."""
import hashlib
import http.client
import io
import itertools
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import data
import lab.sources
import toy
from conftest import ROOT
from data import Problems, Tokenizer, make_problem, parse_gsm8k, tokens_in_use
from encoder import count_chunks, encoder_batch, latent_batch, text_batch
from lab.files import UserError
from lab.numbers import to_number
from lab.sources import is_easy, load_problems, load_split, new_numbers, split_of, splits

SAMPLE = ROOT / "tests" / "sample.jsonl"
GOOD = '{"question": "What is 1 + 1?", "answer": "<<1+1=2>>\\n#### 2"}'
SPLITS = ("train", "val", "test")


# ------------------------------------------------------------------------------------- the toy task

@pytest.fixture(scope="module")
def toy_problems():
    return list(toy.problems(1, 500, lambda question: True))


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
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[op]
    assert result in range(1, toy.TOP + 1)  # so it is a whole number, too
    return int(result)


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


def test_the_toy_paths_are_what_the_question_says(toy_problems):
    """First in the order of the question. All lead to the answer, and one of them is the chain."""
    assert {p["chain"].count("<<") for p in toy_problems} == {8, 10}
    for p in toy_problems:
        free, links = steps_by_hand(p["question"])
        paths = [path_by_hand(order, links) for order in itertools.permutations(free)]
        assert paths == p["paths"] and len(set(paths)) == 6 and p["chain"] in paths
        assert all(path.endswith(f"={p['answer']}>>") for path in paths)


@pytest.mark.parametrize("as_told", [0.0, 0.3, 0.8, 1.0])
def test_a_share_of_the_toy_chains_is_as_told(as_told):
    chains = list(toy.problems(3, 1000, lambda question: True, as_told))
    told = sum(p["chain"] == p["paths"][0] for p in chains) / len(chains)
    assert abs(told - as_told) < 0.05
    others = {p["paths"].index(p["chain"]) for p in chains} - {0}
    assert others == (set() if as_told == 1 else {1, 2, 3, 4, 5})


def test_toy_splits_are_seeded_and_share_no_question(monkeypatch):
    monkeypatch.setattr(lab.sources, "TOY_SIZE", {"train": 1500, "val": 60, "test": 80})
    questions = {split: {p["question"] for p in load_problems("toy", split)} for split in SPLITS}
    assert [len(found) for found in questions.values()] == [1500, 60, 80]
    assert len(set.union(*questions.values())) == 1500 + 60 + 80
    val, again, other = (load_problems("toy", "val", seed=seed) for seed in (0, 0, 1))
    assert val == again != other
    other_seed = {p["question"] for p in load_problems("toy", "test", seed=1)}
    assert not other_seed & questions["train"]  # whatever the seed


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


SOME = [{"question": "Ida has 14 pens, and Bo's aunt buys 3 boxes of 6.",
         "chain": "<<3*6=18>> <<14+18=32>>", "answer": "32"}]


def test_a_vocabulary_cut_to_what_is_in_use(gpt2_tokenizer):
    """Its own texts get GPT-2's tokens; any other text is spelled, and comes back."""
    kept = tokens_in_use(SOME)
    t = Tokenizer("gpt2", kept)
    assert kept == sorted(set(kept)) and 256 < t.n_ordinary == len(kept) < 2500
    for text in SOME[0].values():
        assert [kept[i] for i in t.encode(text)] == gpt2_tokenizer.encode(text)
    assert len(t.encode(" 999=0 7")) == 4  # the numbers that new problems may have
    for text in [*TEXTS, "".join(map(chr, range(32, 400))), "0123456789" * 9]:
        ids = t.encode(text)
        assert t.decode(ids) == text and all(0 <= i < t.n_ordinary for i in ids)
    t.id_of |= {b"qu": 1, b"qua": 2, b"uagga": 3}
    assert t.spell(b"quaggq") == [2, *(t.id_of[bytes([byte])] for byte in b"ggq")]
    assert [t.eos, t.bot, t.eot, t.sum] == list(range(t.n_ordinary, t.n_ordinary + 4))
    assert t.n_vocab % 64 == 0 and t.n_ordinary + 4 <= t.n_vocab < t.n_ordinary + 4 + 64


def test_a_vocabulary_is_named_after_what_it_keeps_and_made_again_of_it(gpt2_tokenizer):
    other = [dict(SOME[0], question=SOME[0]["question"].replace("pens", "cups"))]
    one, two = (Tokenizer("gpt2", tokens_in_use(rows)) for rows in (SOME, other))
    assert one.name != two.name and one.name.startswith(f"gpt2-{one.n_ordinary}-")
    again = Tokenizer(**json.loads(json.dumps(one.vocabulary)))
    assert again.name == one.name and again.encode("3 cups") == one.encode("3 cups")
    assert gpt2_tokenizer.name == "gpt2" and gpt2_tokenizer.n_ordinary == 50256


def test_a_vocabulary_cut_to_gsm8k(gsm8k, gpt2_tokenizer):
    train, test = (load_problems("gsm8k", split, gsm8k, "text") for split in ("train", "test"))
    t = Tokenizer("gpt2", tokens_in_use(train))
    assert 13000 < t.n_ordinary < 18000
    length, whole = (sum(len(tokenizer.encode(p["question"])) for p in test)
                     for tokenizer in (t, gpt2_tokenizer))
    assert whole < length < 1.04 * whole  # some words of the test split are spelled


# ------------------------------------------------------------------------------------------ loaders

def test_all_of_gsm8k_parses_and_tokenizes(gsm8k, gpt2_tokenizer):
    size = {split: len(load_problems("gsm8k", split, gsm8k)) for split in SPLITS}
    assert size["train"] + size["val"] == 7473 and size["test"] == 1319
    assert 0.03 < size["val"] / 7473 < 0.07
    for cot in ("steps", "text"):
        every = [p for split in SPLITS for p in load_problems("gsm8k", split, gsm8k, cot)]
        assert all(to_number(p["answer"]) is not None for p in every)
        done = Problems(every, gpt2_tokenizer, block_size=1024)
        assert (len(done), done.dropped) == (8792, 0)
        for row in range(0, 8792, 97):
            assert gpt2_tokenizer.decode(done.s[row]) == every[row]["chain"]


def test_a_step_of_gsm8k_is_eight_tokens(gpt2_tokenizer):
    """So that chunks of two or four end where steps end."""
    text = "It is 48/2=<<48/2=24>>24, and 48+24=<<48+24=72>>72. #### 72"
    assert len(gpt2_tokenizer.encode(make_problem("Q", text, "steps")["chain"])) == 8 + 7


def test_own_jsonl_in_the_form_of_gsm8k():
    found = {split: load_problems(str(SAMPLE), split) for split in SPLITS}
    assert all(found.values()) and sum(map(len, found.values())) == 16
    assert all(split_of(p["question"]) == split for split, rows in found.items() for p in rows)
    rows = {p["question"].split()[0]: p for rows in found.values() for p in rows}
    assert rows["Rosa"]["chain"] == "<<12*2=24>>\n<<12+24=36>>" and rows["Rosa"]["answer"] == "36"
    assert rows["How"]["chain"] == ""  # no calculator step, no chain
    text = {p["question"].split()[0]: p for p in load_problems(str(SAMPLE), "train", cot="text")}
    assert text["How"]["chain"] == "Eight legs three times over."


def test_folder_with_train_and_test(tmp_path):
    """A byte order mark, line ends of Windows and blank lines are nothing."""
    lines = SAMPLE.read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:14]), "utf-8")
    windows = "\ufeff\n" + "\r\n".join(lines[14:]) + "\n\n"
    (tmp_path / "test.jsonl").write_text(windows, "utf-8")
    both = load_problems(str(tmp_path), "train") + load_problems(str(tmp_path), "val")
    test = load_problems(str(tmp_path), "test")
    for rows, part in (both, lines[:14]), (test, lines[14:]):
        assert {p["question"] for p in rows} == {json.loads(line)["question"] for line in part}


def test_gsm8k_aug(tmp_path):
    question = "Out of 600 employees, 30% got a rise. How many did not?"
    chain = "<<600*30/100=180>> <<600-180=420>>"
    (tmp_path / "test.txt").write_text(f"{question}||{chain} #### 420\n")
    assert load_problems("gsm8k-aug", "test", tmp_path) == [
        {"question": question, "chain": chain.replace(" ", "\n"), "answer": "420"}]


OBJECT, NUMBER = "expected a JSON object with the texts", "expected one number after '####'"


@pytest.mark.parametrize("content, says", [
    (b"", ": no problems in it"),
    (b"\n \n\n", ": no problems in it"),
    (GOOD.encode("utf-16"), ": not UTF-8 text"),
    (GOOD.replace("What", "Wh\xe4t").encode("latin-1"), ": not UTF-8 text"),
    (GOOD[:40], f", line 1: {OBJECT}"),
    (f"{GOOD}\n\n{GOOD[:-1]}", f", line 3: {OBJECT}"),
    ("[1, 2]", f", line 1: {OBJECT}"),
    ('{"question": "x"}', f", line 1: {OBJECT}"),
    ('{"question": 5, "answer": "#### 5"}', f", line 1: {OBJECT}"),
    ('{"question": " ", "answer": "#### 5"}', ", line 1: the question is empty"),
    ('{"question": "x", "answer": "it is 5"}', f", line 1: {NUMBER}, found 'it is 5'"),
    ('{"question": "x", "answer": "#### many"}', f", line 1: {NUMBER}, found 'many'"),
    ('{"question": "x", "answer": "#### 1,2"}', f", line 1: {NUMBER}, found '1,2'"),
    ('{"question": "x", "answer": "#### 5 or 6"}', f", line 1: {NUMBER}, found '5 or 6'"),
], ids=range(14))
def test_a_malformed_line_is_named(tmp_path, content, says):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as stop:
        load_problems(str(file), "train")
    assert str(stop.value).startswith(f"{file}{says}") and "\n" not in str(stop.value)


def test_files_that_are_not_there_or_of_another_form(tmp_path):
    for name, data_dir in (("gsm8k-aug", tmp_path), (str(tmp_path), None)):
        with pytest.raises(UserError, match="train.*: no such file; it should be in the folder of"):
            load_problems(name, "train", data_dir)
    with pytest.raises(UserError, match="nothing: not toy, .* and no such file or folder"):
        load_problems(str(tmp_path / "nothing"), "train")
    (tmp_path / "test.txt").write_text("no bars #### 1")
    with pytest.raises(UserError, match=r"test.txt, line 1: .*, found no '\|\|'"):
        load_problems("gsm8k-aug", "test", tmp_path)
    (tmp_path / "one.jsonl").write_text(GOOD)
    with pytest.raises(UserError, match="one.jsonl: no problem falls to the val split"):
        load_problems(str(tmp_path / "one.jsonl"), "val")


@pytest.mark.parametrize("answer, kept", [
    ("1,234", "1234"), ("1 1/2", "1 1/2"), ("2.5e-06", "2.5e-06"), ("-$3.50", "-$3.50"),
    ("18 dollars", "18 dollars"), ("1½", "1½"),
])
def test_an_answer_of_one_number_is_kept_as_written(answer, kept):
    """But for the commas; and it is the same number without them."""
    line = json.dumps({"question": " x ", "answer": f"<<1+1=2>> #### {answer}"})
    assert parse_gsm8k(line, "steps") == {"question": "x", "chain": "<<1+1=2>>", "answer": kept}
    assert to_number(kept) == to_number(answer) is not None


def settings(name, data_dir=None, **flags):
    """The flags of a script that decide what its problems are."""
    return SimpleNamespace(**{"data": name, "data_dir": data_dir, "cot": "steps", "seed": 0,
                              "as_told": 0.8, "renumber": 0, **flags})


def test_what_has_no_chain_is_said(tmp_path, toy_tokenizer, capsys):
    """Solutions without calculator steps are no chain of thought, unless the whole text is one."""
    lines = [json.dumps({"question": f"{i} + 1?", "answer": f"It is {i + 1}. #### {i + 1}"})
             for i in range(60)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    env = SimpleNamespace(tokenizer=toy_tokenizer)
    for cot, note in ("steps", ", {} without a chain of thought (see --cot text)"), ("text", ""):
        args = settings(str(tmp_path), cot=cot, block_size=64, chunk_size=2)
        train, = splits(args, env, ["train"])
        assert capsys.readouterr().out == (
            f"train: {len(train)} problems, 0 dropped as longer than --block-size 64, counted in "
            f"whole chunks{note.format(len(train))}\n")
        assert (train.s.length > 0).all() == (cot == "text")


def test_half_a_character_is_no_reason_to_stop(tmp_path, toy_tokenizer):
    # JSON can say it, UTF-8 can't
    (tmp_path / "test.jsonl").write_text('{"question": "\\ud83d?", "answer": "<<1+1=2>> #### 2"}')
    assert len(Problems(load_problems(str(tmp_path), "test"), toy_tokenizer, 120)) == 1


def easy_problem(question="Ida has 14 pens and buys 3 boxes of 6. How many has she?",
                 chain="<<3*6=18>> <<14+18=32>>", answer="32"):
    return {"question": question, "chain": chain, "answer": answer}


@pytest.mark.parametrize("easy, problem", [
    (True, easy_problem()),
    (True, easy_problem(chain="In boxes: <<3*6=18>>18.\nSo it's <<14+18=32>>32.")),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 6." + " Why?" * 50)),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 6 in 1998.")),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 6.5.",
                         chain="<<3*6.5=19.5>> <<14+19.5=33.5>>", answer="33.5")),
    (False, easy_problem(question="Ida has 14 pens and buys 3 boxes of 16.",
                         chain="<<3*16=48>> <<14+48=62>>", answer="62")),
    (False, easy_problem(chain="<<3*6=18>> <<3*6=18>> <<3*6=18>> <<3*6=18>> <<14+18=32>>")),
    (False, easy_problem(chain="<<14+3*6=32>>")),
    (False, easy_problem(chain="<<3*7=21>> <<14+21=35>>", answer="35")),  # where from is the 7?
    (False, easy_problem(chain="")),
])
def test_what_is_easy(easy, problem):
    assert is_easy(problem) == easy


def test_easy_problems_alone_are_trained_on_and_none_that_is_held_out(easy_folder):
    whole = {split: load_problems("gsm8k", split, easy_folder) for split in SPLITS}
    easy = {split: load_problems("easy", split, easy_folder) for split in SPLITS}
    assert easy["train"] == [p for p in whole["train"] if is_easy(p)][:12]
    assert easy["val"] == [p for p in whole["val"] if is_easy(p)] != whole["val"]
    assert easy["test"] == whole["test"]
    args = settings("easy", easy_folder, renumber=3)
    trained = [p["question"] for p in load_split(args, "train")]
    assert len(trained) == 12 * 4 and {p["question"] for p in easy["train"]} < set(trained)
    held_out = {p["question"] for p in whole["val"] + whole["test"]}
    assert not held_out & set(trained)
    with_new_numbers = [{p["question"] for p in load_split(args, split)}
                        for split in ("val", "renumbered")]
    assert all(with_new_numbers) and not with_new_numbers[0] & with_new_numbers[1]
    assert not set.union(*with_new_numbers) & {*trained}
    assert load_split(args, "held-out") == easy["val"]


def test_nothing_that_gsm8k_holds_out_is_in_its_easy_part(gsm8k):
    """Not with other numbers either: the words of a copy are those of a training problem."""
    def words(rows):
        return {re.sub(r"[\d,.]+", "#", p["question"]) for p in rows}

    train = load_problems("easy", "train", gsm8k)
    held_out = load_problems("gsm8k", "val", gsm8k) + load_problems("gsm8k", "test", gsm8k)
    assert len(train) == 600 and not words(train) & words(held_out)
    copies = new_numbers(train[:100], "train", settings("gsm8k", gsm8k, renumber=2))
    assert len(copies) == 300 and words(copies) == words(train[:100])


# ------------------------------------------------------------------------------------------ batches

@pytest.fixture(scope="module")
def problems(toy_tokenizer, toy_problems):
    short = [dict(p, chain=p["chain"][:k]) for p, k in zip(toy_problems[:101], [0, 7, 30, 99] * 26)]
    return Problems(short, toy_tokenizer, block_size=128)


@pytest.mark.parametrize("size", [8, 40, 150])
def test_every_problem_once_an_epoch(problems, size):
    """Of 101 problems a few come twice where the last batch is filled up, other ones each epoch."""
    batches = -(-101 // size)
    epochs, twice = [], []
    for epoch in range(2):
        steps = range(epoch * batches, (epoch + 1) * batches)
        rows = np.concatenate([problems.train_batch(step, size, seed=0).rows for step in steps])
        count = np.bincount(rows, minlength=101)
        assert count.min() == 1 and count.max() <= 2 and count.sum() == batches * size
        epochs.append(rows.tolist())
        twice.append(np.flatnonzero(count == 2).tolist())
    assert epochs[0] != epochs[1] and twice[0] != twice[1]


def test_no_length_is_drawn_more_often(problems):
    """Over many epochs that are not full, short and long problems come equally often."""
    rows = [problems.train_batch(step, 8, seed=0).rows for step in range(13 * 100)]
    count = np.bincount(np.concatenate(rows))  # of each problem: 100, and 3 in 101 for each epoch
    for part in np.array_split(count[problems.order], 4):
        assert abs(part.mean() - 100 * 104 / 101) < 3 * (3 / len(part)) ** 0.5


def test_a_batch_is_a_function_of_seed_and_step(problems, toy_tokenizer):
    """In any order, with or without a history, and whatever another loop was given."""
    fresh = Problems(problems.problems, toy_tokenizer, block_size=128)
    found = {}
    for place in ((0, 40), (1, 3), (0, 3), (0, 40), (1, 40)):
        a, b = (p.train_batch(place[1], 8, place[0]).rows.tolist() for p in (problems, fresh))
        assert a == b == found.setdefault(place, a)
        fresh.train_batch(place[1], 8, place[0], chain_slots=0)
    assert len(set(map(tuple, found.values()))) == 4


def test_a_batch_has_problems_of_like_length_and_little_padding(toy_tokenizer):
    """In each loop at c = 2, with lengths as GSM8K's: many middling ones, and a few long."""
    rng = np.random.default_rng(0)
    x, s = np.exp(rng.normal([[3.9], [3.1]], [[0.4], [0.5]], (2, 1000))).astype(int)
    rows = [dict(question="1 " * (i // 2), chain="1 " * (j // 2), answer="1") for i, j in zip(x, s)]
    uneven = Problems(rows, toy_tokenizer, block_size=512)
    loops = {1.0: text_batch, 1.5: lambda batch: encoder_batch(batch, 2, 0),
             0.5: lambda batch: latent_batch(
                 batch, 2, [count_chunks(len(p.chain), 2) for p in batch.problems])}
    for chain_slots, lay_out in loops.items():
        layouts = [lay_out(uneven.train_batch(step, 16, 0, chain_slots)) for step in range(63)]
        slots = sum(layout.pos.numel() for layout in layouts)
        real = sum(len(layout.pos) + int((layout.pos > 0).sum()) for layout in layouts)
        assert real > 0.75 * slots
        assert all(layout.pos.size(1) - layout.pos.argmax(1).max() <= 8 for layout in layouts)


def test_a_batch_holds_the_problems_it_names(problems, toy_tokenizer):
    t = toy_tokenizer
    for batch in (problems.train_batch(1, 8, 0), *problems.eval_batches(40)):
        assert len(batch.rows) == len(batch.problems)
        for row, (question, chain, answer) in zip(batch.rows, batch.problems):
            p = problems.problems[row]
            assert question == t.encode(p["question"]) + [t.bot]
            assert chain == t.encode(p["chain"])
            assert answer == [t.eot] + t.encode("#### " + p["answer"]) + [t.eos]
        some = batch.some(np.array([3, 0]))
        assert some.rows.tolist() == batch.rows[[3, 0]].tolist()
        assert some.problems == [batch.problems[3], batch.problems[0]]


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

def breaks_off(error):
    """A connection of which nothing can be read."""
    def read():
        raise error
    return nullcontext(SimpleNamespace(read=read))


@pytest.mark.parametrize("connection, says", [
    (io.BytesIO(b"half of it"), "not GSM8K as published"),
    (breaks_off(OSError("connection reset")), "its download failed .connection reset.; put"),
    (breaks_off(http.client.IncompleteRead(b"half")), "its download failed .IncompleteRead"),
], ids=["half", "reset", "incomplete"])
def test_a_download_that_is_not_whole_leaves_nothing(tmp_path, monkeypatch, connection, says):
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: connection)
    with pytest.raises(UserError, match=says):
        load_problems("gsm8k", "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_what_has_the_right_checksum_is_taken_for_gsm8k(tmp_path, monkeypatch):
    """A download is kept then; another file in its place is not read."""
    content = f"{GOOD}\n".encode()
    monkeypatch.setitem(data.GSM8K_SHA256, "train.jsonl", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content))
    assert load_problems("gsm8k", "train", tmp_path) == load_problems(str(tmp_path), "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
    (tmp_path / "train.jsonl").write_bytes(content + b"\n")
    with pytest.raises(UserError, match="train.jsonl: not GSM8K as published .*say --data"):
        load_problems("gsm8k", "train", tmp_path)
