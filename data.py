"""Problems in, batches out: GSM8K, its relatives and the toy task; tokenizers; scoring.

A problem is a question, a chain of thought S and an answer. As tokens:

    X <bot> = question <bot>        S = chain        <eot> Ans = <eot> #### answer <|endoftext|>

Everything is tokenized once. A batch holds problems of like length and is padded to one of a few
fixed widths, so that little is computed for padding.
"""
import functools
import hashlib
import http.client
import json
import os
import re
import unicodedata
import urllib.request
import zlib
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

import toy
from renumber import parse, renumbered, templates

GSM8K_URL = ("https://raw.githubusercontent.com/openai/grade-school-math/master/"
             "grade_school_math/data/")
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "example_model_solutions.jsonl":
        "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b",
}
TOY_SIZE = {"train": 16000, "val": 256, "test": 1000}
MAX_PROBLEMS = {"val": 400}   # validation decodes its problems again and again
MAX_LINE = 100_000            # characters in a line of a data file
EASY_STEPS, EASY_LENGTH, EASY_NUMBER = 4, 220, 60  # at most: see is_easy
WIDTHS = 10                   # different widths of a loop's batches at most


class UserError(SystemExit):
    """What the user can mend: one sentence on stderr, exit status 1, no traceback."""


# --------------------------------------------------------------------------------------- tokenizers

class Tokenizer:
    """A tiktoken encoding: its ordinary ids, then <|endoftext|> <bot> <eot> <sum>, then padding.

    So `logits[..., :n_ordinary]` is the ordinary vocabulary, the only place where α has mass, and
    `n_vocab`, a multiple of 64, is the width of the model's head.
    """

    SPECIAL = ["<|endoftext|>", "<bot>", "<eot>", "<sum>"]

    def __init__(self, name, texts=None):
        """name: "toy" or "gpt2"; texts: prune it to what they need, and name it by what is kept.

        Raises UserError where GPT-2's vocabulary cannot be had.
        """
        pattern, ranks = gpt2_vocabulary() if name == "gpt2" else toy_vocabulary()
        if texts is not None:
            ranks = prune_ranks(ranks, pattern, texts)
            digest = hashlib.sha256(repr(list(ranks)).encode()).hexdigest()
            name = f"{name}-{len(ranks)}-{digest[:8]}"  # what was made with another one is refused
        self.name = name
        self.n_ordinary = len(ranks)
        self.n_vocab = -(-(self.n_ordinary + len(self.SPECIAL)) // 64) * 64
        special = {text: self.n_ordinary + i for i, text in enumerate(self.SPECIAL)}
        self.eos, self.bot, self.eot, self.sum = special.values()
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text):
        """Ordinary ids only: '<eot>' in a text is five characters, never the control token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """The text of these ids; ids of the head's padding are left out."""
        return self.encoding.decode([i for i in ids if i < self.n_ordinary + len(self.SPECIAL)])


def gpt2_vocabulary():
    """(pattern, ranks) of GPT-2's byte-pair encoding."""
    try:
        base = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a wrong checksum
        raise UserError(
            "GPT-2's vocabulary could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder that "
            f"has tiktoken's copy of it ({type(error).__name__})")
    return base._pat_str, base._mergeable_ranks


def prune_ranks(ranks, pattern, texts):
    """The part of a byte-pair vocabulary that `texts` need: {token: rank}, ranks 0, 1, 2, … again.

    BPE starts from the bytes of a piece of text and joins, again and again, those neighbours whose
    union has the lowest rank. Kept are all 256 bytes, so that any text can be written, the tokens
    of `texts`, and the unions on the way to them. So `texts` get the same tokens as before: at each
    step the union of lowest rank is part of a token at the end, hence kept, and none was added that
    could come before it.
    """
    whole = tiktoken.Encoding("whole", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ids = set().union(*whole.encode_ordinary_batch(texts, num_threads=1))
    kept = {bytes([b]) for b in range(256)}
    for token in map(whole.decode_single_token_bytes, ids):
        kept |= unions(token, ranks)
    return {token: rank for rank, token in enumerate(sorted(kept, key=ranks.get))}


def unions(token, ranks):
    """All that BPE joins on its way from the bytes of a token to the token itself, as a set.

    Within a longer piece of text it joins the same: nothing was joined across the token's ends, or
    they would not be its ends, and between them the unions to choose from are the same.
    """
    parts, found = [bytes([b]) for b in token], {token}
    while len(parts) > 1:
        pairs = [left + right for left, right in zip(parts, parts[1:])]
        first = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        if pairs[first] not in ranks:
            break  # tiktoken takes a piece that is a token as it is, even where BPE ends elsewhere
        parts[first:first + 2] = [pairs[first]]
        found.add(pairs[first])
    return found


def vocabulary_texts(problems):
    """What a Tokenizer is pruned to: the training split, and the numbers that it may lack."""
    numbers = " ".join(f"{n}={n}" for n in range(1000))  # with a space before them, and without
    fields = [(p["question"], p["chain"], "#### " + p["answer"]) for p in problems]
    return [numbers, *(text for field in fields for text in field)]


@functools.cache
def toy_vocabulary():
    """(pattern, ranks): whole words and whole numbers; 256 bytes spell whatever else there is.

    A word takes the space on its left, and the one on its right before a number, so that the 7 of
    ' has 7 pens' is the token of '<<7+5=12>>'. A step is six tokens: 7 + 5 = 12 and the '>> <<'
    between.
    """
    pattern = r" ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]+|>> <<|<<|>>|#### ?|\s+|[^\sA-Za-z0-9]"
    pieces = {str(n) for n in range(100)} | {"#### "}
    for problem in toy.problems(0, 2000, lambda question: True):
        pieces.update(re.findall(pattern, problem["question"]))
        pieces.update(re.findall(pattern, problem["chain"]))
    words = sorted(piece for piece in pieces if len(piece) > 1)
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for word in words]
    return pattern, {token: rank for rank, token in enumerate(tokens)}


# ------------------------------------------------------------------------------------------ sources

def split_of(question):
    """'val', 'test' (5 % each) or 'train', by the question's hash, where the data does not say."""
    bucket = zlib.crc32(question.encode(errors="surrogatepass")) % 20
    return {0: "val", 1: "test"}.get(bucket, "train")


def is_easy(problem):
    """Whether --easy takes a problem: few steps, a short question, no number but small whole ones.

    And all of its numbers are certain, so that --renumber can change some of them.
    """
    if problem["chain"].count("<<") > EASY_STEPS or len(problem["question"]) > EASY_LENGTH:
        return False
    said = numbers(problem["question"])
    said += map(to_number, re.findall(r"\.?\d[\d.,]*", problem["chain"]))
    if not all(n is not None and 0 <= n <= EASY_NUMBER and n % 1 == 0 for n in said):
        return False
    try:
        parse(problem)
        return True
    except ValueError:
        return False


def load(name, split, data_dir=None, cot="steps", seed=0, as_told=toy.AS_TOLD, easy=0):
    """A list of {question, chain, answer[, paths]}, all str, for split 'train', 'val' or 'test'.

    name   toy | gsm8k | gsm8k-aug | a .jsonl file in GSM8K's form | a folder with train.jsonl and
           test.jsonl
    cot    'steps': the calculator annotations in order, '<<48/2=24>> <<48+24=72>>'; 'text': the
           whole solution
    easy   > 0: 'train' is the first so many easy problems, 'val' its easy ones; 'test' is whole
    'val', and where there is one file only 'test', are cut out of it by `split_of`: 5 % each.
    Raises UserError naming the file, the line and what was expected there.
    """
    if name == "toy":
        return list(toy.problems(seed, TOY_SIZE[split], lambda q: split_of(q) == split, as_told))
    part = "test" if split == "test" else "train"
    # the hash splits that this split takes from its file
    taken = {"train": ("train", "test"), "val": ("val",), "test": ("train", "val", "test")}[split]
    if name == "gsm8k-aug":
        file = Path(data_dir or "data/gsm8k-aug") / f"{part}.txt"
    elif name == "gsm8k":
        file = Path(data_dir or "data/gsm8k") / f"{part}.jsonl"
        fetch(file)
    elif Path(name).is_dir():
        file = Path(name) / f"{part}.jsonl"
    elif Path(name).is_file():
        file, taken = Path(name), (split,)
    else:
        raise UserError(f"--data {name}: not toy, gsm8k or gsm8k-aug, and no such file or folder")
    rows = read(file, parse_aug if name == "gsm8k-aug" else parse_gsm8k, cot)
    rows = [row for row in rows if split_of(row["question"]) in taken]
    if easy and split != "test":
        rows = [row for row in rows if is_easy(row)]
        if split == "train" and len(rows) < easy:
            raise UserError(f"--easy {easy}: only {len(rows)} of the training problems in {file} "
                            "are easy")
        rows = rows[:easy] if split == "train" else rows
    if not rows:
        raise UserError(f"{file}: no problem falls to the {split} split, which here is 5 % by "
                        "hash; it takes more problems")
    return rows


def read(file, parse, cot):
    """parse(line, cot) of every line of a text file. Raises UserError naming file and line."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; it should be in the folder of --data-dir, or that "
                        "of --data")
    rows = []
    try:
        with open(file, encoding="utf-8-sig", newline=None) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(parse_line(f"{file}, line {number}", line, parse, cot))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start} of what was being read: "
                        f"{error.reason})")
    if not rows:
        raise UserError(f"{file}: no problems in it")
    return rows


def parse_line(place, line, parse, cot):
    length = len(line.strip())
    if length > MAX_LINE:
        raise UserError(f"{place}: {length} characters are no problem of grade school; the limit "
                        f"is {MAX_LINE}")
    try:
        return parse(line, cot)
    except ValueError as error:
        raise UserError(f"{place}: {error}")


def refuse_repeated_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise LookupError
    return dict(pairs)


def parse_gsm8k(line, cot):
    """One line of GSM8K's files: a JSON object with the texts 'question' and 'answer'."""
    expected = "expected a JSON object with the texts 'question' and 'answer'"
    try:
        row = json.loads(line, object_pairs_hook=refuse_repeated_keys)
    except LookupError:
        raise ValueError("a key stands twice in the JSON object")
    except (ValueError, RecursionError):
        raise ValueError(expected + ", found no JSON")
    texts = [row.get(key) for key in ("question", "answer")] if isinstance(row, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(expected)
    return make_problem(row["question"], row["answer"], cot)


def parse_aug(line, cot):
    """One line of GSM8K-Aug: 'question||<<a>> <<b>> #### answer'."""
    question, bars, solution = line.partition("||")
    if not bars:
        raise ValueError("expected 'question||<<step>> <<step>> #### answer', found no '||'")
    return make_problem(question, solution, cot)


def parse_solved(line, cot):
    """One line of example_model_solutions.jsonl: (question, chains of the right solutions)."""
    try:
        row = json.loads(line)
        models = [value for value in row.values() if isinstance(value, dict)]
        texts = [model["solution"] for model in models if model["is_correct"]]
        question = row["question"].strip()
        return question, [chain_of(text.rpartition("\nA:")[0], cot) for text in texts]
    except (LookupError, TypeError, AttributeError):
        raise ValueError("expected 'question' and solutions with 'is_correct' and 'solution'")


def chain_of(solution, cot):
    """The chain of thought in a solution: its calculator steps, or all of its text."""
    return " ".join(re.findall(r"<<[^<>]*>>", solution)) if cot == "steps" else solution.strip()


def make_problem(question, text, cot):
    """A problem as a dict, from its question and 'solution #### answer'."""
    solution, hashes, answer = text.rpartition("####")
    answer = answer.strip()
    if not question.strip():
        raise ValueError("the question is empty")
    found = numbers(answer)
    if not hashes or len(found) != 1 or found[0] is None:
        raise ValueError(f"expected one number after '####', found {answer[:40]!r}")
    return {"question": question.strip(), "chain": chain_of(solution, cot),
            "answer": answer.replace(",", "")}


def known_paths(problems, name, data_dir, cot):
    """For each problem a list of the different chains that are known to be right.

    The toy task makes all of its own; for GSM8K's test split OpenAI published solutions.
    """
    folder = Path(data_dir or f"data/{name}" if name in ("gsm8k", "gsm8k-aug") else name)
    file = folder / "example_model_solutions.jsonl"
    solved = {}
    try:
        if name == "gsm8k":
            fetch(file)
        if file.is_file():
            solved = dict(read(file, parse_solved, cot))
        elif name != "toy":
            print(f"no chains but the given ones are known (there is no {file})")
    except UserError as error:
        print(f"no chains but the given ones are known ({error})")
    paths = []
    for problem in problems:
        chains = problem.get("paths") or [problem["chain"], *solved.get(problem["question"], [])]
        paths.append([chain for chain in dict.fromkeys(chains) if chain])
    return paths


def fetch(file):
    """Download one of GSM8K's files beside its final name, check it, then move it there."""
    expected = GSM8K_SHA256[file.name]
    if file.is_file():
        if hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise UserError(f"{file}: not GSM8K as published (its checksum differs); for data of "
                            f"your own say --data {file.parent}")
        return
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(GSM8K_URL + file.name, timeout=60) as response:
            part.write_bytes(response.read())
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{file}: not there, and its download failed ({error}); put GSM8K's files "
                        "in a folder and name it with --data-dir")
    if hashlib.sha256(part.read_bytes()).hexdigest() != expected:
        part.unlink()
        raise UserError(f"{file}: the download does not have the expected checksum; try again")
    part.replace(file)


# ------------------------------------------------------------------------------------------ scoring

DECIMAL = r"(?:(?:(?!0)\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
NUMBER = re.compile(rf"""
    (?P<sign>(?<![\w)])[-+])?                           # a minus after a word or ')' is subtraction
    (?:(?P<whole>\d+)\ +(?=\d+\ */\ *\d))?               # the 1 of 1 1/2
    (?P<top>{DECIMAL})
    (?:\ *(?:[x×*·]\ *10\ *(?:\^|\*\*)\ *\(?(?P<power>[-+]?\d+)\)?|/\ *(?P<bottom>[-+]?{DECIMAL})))?
    (?P<excess>(?:[.,/]*\d[\d.,/]*)?                     # 1.2.3, 1,2: no number at all,
        (?:\ *(?:\^|\*\*(?=\(?[-+]?\d))\ *\(?[-+]?[\d.,/]*\)?)*)   # nor 5^2, 10^-3
    """, re.VERBOSE)
SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
PLAIN = str.maketrans({"−": "-", "–": "-", "⁄": "/", "∕": "/", "$": "", "%": ""})


def numbers(text):
    """The numbers in a text, in order, as Decimal; None for what only looks like one (1.2.3)."""
    text = re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞↉])", " ", text)  # 1½ is 1 1/2
    text = "".join(plain_character(character) for character in text).translate(PLAIN)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", lambda match: "^" + match[0].translate(SUPERSCRIPT), text)
    text = re.sub(r"(?<![\d )])\^\(?[-+]?\d+\)?", "", text)  # the square of cm² is no number
    return [number_value(match) for match in NUMBER.finditer(text)]


def plain_character(character):
    """1⁄2 for ½, 1 for the full-width digit, a space for the one that does not break."""
    if unicodedata.decomposition(character).startswith(("<fraction>", "<wide>", "<noBreak>")):
        return unicodedata.normalize("NFKC", character)
    return character


def number_value(match):
    if match["excess"]:
        return None
    try:
        value = Decimal(match["top"].replace(",", ""))
        if match["bottom"]:
            value /= Decimal(match["bottom"].replace(",", ""))
        if match["power"]:
            value = value.scaleb(int(match["power"]))
        if match["whole"]:
            value += Decimal(match["whole"])
        return value.copy_negate() if match["sign"] == "-" else value
    except (ArithmeticError, ValueError):  # 1/0, or an exponent beyond Decimal's
        return None


def to_number(text):
    """The number that a text says, as Decimal, or None.

    After '####', else anywhere, the last one counts. $ and % are dropped, commas between thousands
    too; exponents (2.5e-06, 2.5 x 10^-6), fractions and mixed numbers (1 1/2, ½) and the Unicode
    minus are read. What only looks like a number (1.2.3, 1,2) is None.
    """
    found = numbers(text.rpartition("####")[2])
    return found[-1] if found else None


# ------------------------------------------------------------------------------------------ batches

class Tokens(NamedTuple):
    """One problem as lists of ids."""

    question: list  # X, which ends in <bot>
    chain: list     # S
    answer: list    # Ans, from <eot> to <|endoftext|>


class Ragged:
    """Rows of different length in one flat int32 array: a tenth of the room that lists take."""

    def __init__(self, rows):
        self.length = np.array([len(row) for row in rows], dtype=np.int64)
        self.start = np.concatenate([[0], self.length.cumsum()])
        tokens = [token for row in rows for token in row]
        self.flat = np.array(tokens + [0], dtype=np.int32)  # never empty; the 0 is in no row

    def __getitem__(self, row):
        return self.flat[self.start[row]:self.start[row + 1]].tolist()


@dataclass
class Batch:
    """The problems of one batch, and how long those are that it may be made of."""

    rows: np.ndarray  # (B,) which problems
    problems: list    # their Tokens
    lengths: tuple    # token counts (question, chain, answer) of all it may be made of: arrays


def choose_widths(length):
    """A few widths, multiples of 8: the lengths rounded up to them make little padding.

    One after the other comes the width that saves the most. length (R,) -> a sorted list, of
    WIDTHS entries at most, the last for the longest.
    """
    values, count = np.unique(-(-length // 8) * 8, return_counts=True)
    widths = [values[-1]]
    for _ in range(WIDTHS - 1):
        more = [sorted({*widths, value}) for value in values]
        widths = min(more, key=lambda w: count @ np.take(w, np.searchsorted(w, values)))
    return widths


class Problems:
    """A split, tokenized once. Problems longer than the model are dropped and counted in `dropped`.

    Problems of like length share a bucket, and a training batch is padded as the longest problem of
    its bucket, or of a shorter one, needs, so that a loop sees as many widths as there are buckets.
    A loop first calls make_buckets, since its sequences have lengths of their own. Which problems
    make batch t is a function of (seed, t) alone: to resume is to go on counting. Raises UserError
    where no problem is left.
    """

    def __init__(self, problems, tokenizer, block_size, chunk_size=1, no_cot=False):
        t, encode = tokenizer, tokenizer.encoding.encode_ordinary
        x = [encode(p["question"]) + [t.bot] for p in problems]
        s = [[] if no_cot else encode(p["chain"]) for p in problems]
        a = [[t.eot] + encode("#### " + p["answer"]) + [t.eos] for p in problems]
        whole = [-(-len(chain) // chunk_size) * chunk_size for chain in s]  # as latents end it
        fits = [i for i in range(len(x)) if len(x[i]) + whole[i] + len(a[i]) <= block_size]
        self.dropped = len(x) - len(fits)
        self.problems = [problems[i] for i in fits]
        self.x, self.s, self.a = (Ragged([rows[i] for i in fits]) for rows in (x, s, a))
        if not fits:
            raise UserError(f"no problem is left: all {len(x)} are longer than --block-size "
                            f"{block_size}, counted in whole chunks of {chunk_size} tokens")
        parts = [r.flat.tobytes() + r.length.tobytes() for r in (self.x, self.s, self.a)]
        self.fingerprint = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        total = self.x.length + self.s.length + self.a.length
        self.order = np.argsort(total, kind="stable")  # rows, the shortest first
        self.make_buckets(chain_slots=1)

    def __len__(self):
        return len(self.problems)

    def make_buckets(self, chain_slots):
        """Sort the problems into buckets by the length that they have in a loop's sequences.

        chain_slots: how many slots a token of the chain takes there, its latent tokens included.
        """
        length = self.x.length + chain_slots * self.s.length + self.a.length
        self.bucket = np.searchsorted(choose_widths(length), length)  # of each problem: 0, 1, …
        self.epoch = None  # the one whose batches are laid out

    def batch(self, rows, like):
        """The Batch of these rows, padded as the rows `like` need."""
        tokens = [Tokens(self.x[row], self.s[row], self.a[row]) for row in rows]
        return Batch(rows, tokens, tuple(r.length[like] for r in (self.x, self.s, self.a)))

    def train_batch(self, step, size, seed, rank=0, world=1):
        """Batch number `step`: every problem once an epoch, in a new order each.

        Of several processes rank r gets the rows r::world.
        """
        epoch, number = divmod(step, -(-len(self) // size))
        if self.epoch != (seed, size, epoch):
            self.epoch = (seed, size, epoch)
            self.batches = self.shuffle(np.random.default_rng([seed, epoch]), size)
        rows = self.batches[number]
        # the first rows may be of a shorter bucket, but none is of a longer one than the last
        like = np.flatnonzero(self.bucket <= self.bucket[rows[-1]])
        return self.batch(rows[rank::world], like)

    def shuffle(self, rng, size):
        """An epoch's batches in random order, each sorted by bucket: int64 (batches, size).

        Some problems come twice, chosen at random, so that all batches are full.
        """
        rows = np.resize(rng.permutation(len(self)), -(-len(self) // size) * size)
        rows = rows[np.argsort(self.bucket[rows], kind="stable")]
        return rng.permutation(rows.reshape(-1, size))  # (batches, size)

    def first_equal(self):
        """For each problem the first with its question and chain, int64 (R,).

        It is the problem itself, but for the copies of --renumber, some of which repeat.
        """
        first = {}
        keys = ((p["question"], p["chain"]) for p in self.problems)
        return np.array([first.setdefault(key, row) for row, key in enumerate(keys)])

    def caps(self, c):
        """(latents, tokens) at which decoding stops: the longest chain, and some for an answer."""
        longest = int(self.s.length.max())
        return -(-longest // c), longest + int(self.a.length.max()) + 4

    def eval_batches(self, size, limit=None):
        """Every problem once (or the first `limit` problems), the shortest first."""
        rows = self.order if limit is None else self.order[self.order < limit]
        for i in range(0, len(rows), size):
            yield self.batch(rows[i:i + size], rows[i:i + size])


def load_split(args, split, rank=0):
    """The problems of a split, with the flags of a script: those of `load` and more splits.

        train        the training problems, and with --renumber so many copies of each
        val          training problems that are kept out whole; with --renumber the training
                     problems instead, with numbers that no copy has
        held-out     training problems that are kept out whole
        renumbered   the training problems with numbers that neither a copy nor val has
        test         the test problems
        easy         those test problems that --easy would take

    args: data, data_dir, cot, seed, as_told, easy, renumber.
    """
    source = {"renumbered": "train", "held-out": "val", "easy": "test"}.get(split, split)
    if split == "val" and args.renumber:
        source = "train"
    rows = load(args.data, source, args.data_dir, args.cot, args.seed, args.as_told, args.easy)
    if split == "easy":
        rows = [row for row in rows if is_easy(row)]
    if source == "train" and (args.renumber or split == "renumbered"):
        rows = new_numbers(rows, split, args, rank)
    if not rows:
        raise UserError(f"--data {args.data}, split {split}: " + (
            "none of the test problems is easy" if split == "easy" else
            "no training problem has enough new numbers for it"))
    return rows[:MAX_PROBLEMS.get(split)]


def new_numbers(rows, split, args, rank):
    """The training problems `rows` and their copies (train), or one copy alone (val, renumbered).

    Which of the three may have a copy is decided by its question's hash, so they share none.
    """
    found, reasons = templates(rows)
    own = {row["question"] for row in rows}
    kind = {"renumbered": "test"}.get(split, split)

    def wanted(question):
        return split_of(question) == kind and question not in own

    copies = range(args.renumber if split == "train" else 1)
    drawn = (problem for copy in copies for problem in renumbered(found, args.seed, copy, wanted))
    if split != "train":
        return list(islice(drawn, MAX_PROBLEMS.get(split)))  # few draws are wanted: no more of them
    if rank == 0:
        print(f"{len(rows) - reasons.total()} of {len(rows)} training problems can be given new "
              "numbers", *(f"; {why}: {n}" for why, n in reasons.items()), sep="")
    return [*rows, *drawn]


def splits(args, env, names=("train", "val"), no_cot=False):
    """The Problems of these splits; says how many there are, and what is amiss with some.

    args: those of load_split, and block_size; env: tokenizer, rank.
    """
    found = []
    for split in names:
        rows = load_split(args, split, env.rank)
        p = Problems(rows, env.tokenizer, args.block_size, args.chunk_size, no_cot=no_cot)
        found.append(p)
        if env.rank > 0:
            continue
        empty = 0 if no_cot else int((p.s.length == 0).sum())
        note = f", {empty} without a chain of thought (see --cot text)" if empty else ""
        print(f"{split}: {len(p)} problems, {p.dropped} dropped as longer than --block-size "
              f"{args.block_size}, counted in whole chunks{note}")
    return found
