"""Problems in, batches out: GSM8K's loader, the tokenizer, and what makes a batch.

A problem is a question, a chain of thought S and an answer. As tokens:

    X <bot> = question <bot>        S = chain        <eot> Ans = <eot> #### answer <|endoftext|>

Everything is tokenized once. A batch holds problems of like length and is padded to one of a few
fixed widths, so that little is computed for padding. Other data than GSM8K's: lab/sources.py.
"""
import functools
import hashlib
import http.client
import json
import re
import urllib.request
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import tiktoken

import toy
from lab.files import UserError, write
from lab.numbers import numbers
from lab.vocabulary import gpt2_vocabulary, prune_ranks

GSM8K_URL = ("https://raw.githubusercontent.com/openai/grade-school-math/master/"
             "grade_school_math/data/")
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "example_model_solutions.jsonl":
        "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b",
}
WIDTHS = 10                   # different widths of a loop's batches at most


# ------------------------------------------------------------------------------------------ problems

def read(file, parse, cot):
    """parse(line, cot) of every line of a text file. Raises UserError naming file and line."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; it should be in the folder of --data-dir, or that "
                        "of --data")
    rows = []
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    rows.append(parse(line, cot))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason})")
    except ValueError as error:
        raise UserError(f"{file}, line {number}: {error}")
    if not rows:
        raise UserError(f"{file}: no problems in it")
    return rows


def parse_gsm8k(line, cot):
    """A line of GSM8K's files, a JSON object with the texts 'question' and 'answer': a problem."""
    try:
        row = json.loads(line)
        question, answer = (row[key].strip() for key in ("question", "answer"))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError("expected a JSON object with the texts 'question' and 'answer'")
    return make_problem(question, answer, cot)


def make_problem(question, text, cot):
    """A problem {question, chain, answer}, all str, from its question and 'solution #### answer'.

    cot  'steps': the chain is the calculator annotations, '<<48/2=24>> <<48+24=72>>'; 'text': it is
         the whole solution
    """
    question = question.strip()
    solution, hashes, answer = text.rpartition("####")
    if not question:
        raise ValueError("the question is empty")
    found = numbers(answer)
    if not hashes or len(found) != 1 or found[0] is None:
        raise ValueError(f"expected one number after '####', found {answer.strip()[:40]!r}")
    return {"question": question, "chain": chain_of(solution, cot),
            "answer": answer.strip().replace(",", "")}


def chain_of(solution, cot):
    """The chain of thought in a solution: its calculator steps, or all of its text."""
    return " ".join(re.findall(r"<<[^<>]*>>", solution)) if cot == "steps" else solution.strip()


def fetch(file):
    """Download one of GSM8K's files to its place, if it is not there yet, and check it.

    Raises UserError where that fails.
    """
    content = file.read_bytes() if file.is_file() else None
    if content is None:
        try:
            with urllib.request.urlopen(GSM8K_URL + file.name, timeout=60) as response:
                content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{file}: not there, and its download failed ({error}); put GSM8K's "
                            "files in a folder and name it with --data-dir")
    if hashlib.sha256(content).hexdigest() != GSM8K_SHA256[file.name]:
        raise UserError(f"{file}: not GSM8K as published (its checksum differs); try again, or for "
                        f"data of your own say --data {file.parent}")
    if not file.is_file():
        write(file, lambda copy: copy.write(content))


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

    def train_batch(self, step, size, seed):
        """Batch number `step`: every problem once an epoch, in a new order each."""
        epoch, number = divmod(step, -(-len(self) // size))
        if self.epoch != (seed, size, epoch):
            self.epoch = (seed, size, epoch)
            self.batches = self.shuffle(np.random.default_rng([seed, epoch]), size)
        rows = self.batches[number]
        # the first rows may be of a shorter bucket, but none is of a longer one than the last
        like = np.flatnonzero(self.bucket <= self.bucket[rows[-1]])
        return self.batch(rows, like)

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
