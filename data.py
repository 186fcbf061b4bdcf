"""Problems in, batches out: GSM8K, its relatives and the toy task; tokenizers; how an answer is scored.

A problem is a question, a chain of thought S and an answer. As tokens:

    X   = question <bot>            S = chain            Ans = <eot> #### answer <|endoftext|>

Everything is tokenized once into flat arrays; a batch is a few vectorised gathers from them. Batches come in
a few fixed widths (see Problems), so that a compiled model is compiled a few times and never again.
"""
import hashlib
import http.client
import json
import os
import re
import urllib.request
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

import numpy as np
import tiktoken

import toy

GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "example_model_solutions.jsonl": "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b",
}
TOY_SIZE = {"train": 16000, "val": 256, "test": 1000}
MOST = {"val": 1000}    # of a large file the first so many: they are decoded again and again
LONGEST_LINE = 100_000  # characters
NUMBER = re.compile(r"(?:(?<![\w)])[-+])?(?:\d[\d,]*)?\.?\d+(?:\s*/\s*\d+)?")


class UserError(SystemExit):
    """What the user can mend: one sentence on stderr, exit status 1, no traceback."""


# ---------------------------------------------------------------------------------------------- tokenizers

class Tokenizer:
    """A tiktoken encoding whose ordinary ids come first; then <|endoftext|> <bot> <eot> <sum>, then padding.

    So `logits[..., :n_ordinary]` is the ordinary vocabulary, the only place where α has mass, and `n_vocab`,
    a multiple of 64, is the width of the model's head.
    """

    SPECIAL = ["<|endoftext|>", "<bot>", "<eot>", "<sum>"]

    def __init__(self, name):
        self.name = name  # "toy" or "gpt2"
        if name == "gpt2":
            try:
                base = tiktoken.get_encoding("gpt2")
            except (OSError, ValueError) as error:  # of requests, or of a checksum
                raise UserError("GPT-2's vocabulary could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder that "
                                f"has tiktoken's copy of it ({type(error).__name__})")
            pattern, ranks = base._pat_str, base._mergeable_ranks
        else:
            pattern, ranks = toy_vocabulary()
        self.n_ordinary = len(ranks)
        self.eos, self.bot, self.eot, self.sum = range(self.n_ordinary, self.n_ordinary + 4)
        self.n_vocab = -(-(self.n_ordinary + 4) // 64) * 64
        special = {text: self.n_ordinary + i for i, text in enumerate(self.SPECIAL)}
        self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text):
        """Ordinary ids only: '<eot>' in a text is five characters of data, never the control token."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i < self.n_ordinary + 4])


def toy_vocabulary():
    """(pattern, ranks): whole words and whole numbers; the 256 bytes spell whatever else a question holds.

    A word takes the space on its left, and the one on its right before a number, so that the 7 of
    ' has 7 pens' is the token of '<<7+5=12>>'. A step is six tokens: 7 + 5 = 12 and the '>> <<' between.
    """
    pattern = r" ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]+|>> <<|<<|>>|#### ?|\s+|[^\sA-Za-z0-9]"
    pieces = {str(n) for n in range(100)} | {"#### "}
    for p in toy.problems(0, 2000, lambda question: True):
        pieces.update(re.findall(pattern, p["question"]) + re.findall(pattern, p["chain"]))
    pieces = sorted(p for p in pieces if len(p) > 1)
    ranks = [bytes([b]) for b in range(256)] + [p.encode() for p in pieces]
    return pattern, {token: rank for rank, token in enumerate(ranks)}


# ------------------------------------------------------------------------------------------------- sources

def split_of(question):
    """Which split a question belongs to where the data does not say: by its own hash, so never to two."""
    return {0: "val", 1: "test"}.get(zlib.crc32(question.encode(errors="surrogatepass")) % 20, "train")


def load(name, split, data_dir=None, cot="steps", seed=0):
    """A list of {question, chain, answer[, paths]}, all str, for split 'train', 'val' or 'test'.

    name   toy | gsm8k | gsm8k-aug | a .jsonl file in GSM8K's form | a folder with train.jsonl and test.jsonl
    cot    'steps': the calculator annotations in order, '<<48/2=24>> <<48+24=72>>'; 'text': the whole solution
    'val', and where there is one file only 'test', are cut out of it by `split_of`: 5 % each.
    Raises UserError naming the file, the line and what was expected there.
    """
    if name == "toy":
        return list(toy.problems(seed, TOY_SIZE[split], lambda question: split_of(question) == split))
    here = "test" if split == "test" else "train"
    mine = {"train": ("train", "test"), "val": ("val",), "test": ("train", "val", "test")}[split]  # of that file
    parse = parse_aug if name == "gsm8k-aug" else parse_gsm8k
    if name == "gsm8k-aug":
        file = Path(data_dir or "data/gsm8k-aug") / f"{here}.txt"
    elif name == "gsm8k":
        file = Path(data_dir or "data/gsm8k") / f"{here}.jsonl"
        fetch(file)
    elif Path(name).is_dir():
        file = Path(name) / f"{here}.jsonl"
    elif Path(name).is_file():
        file, mine = Path(name), (split,)
    else:
        raise UserError(f"--data {name}: not toy, gsm8k or gsm8k-aug, and no such file or folder")
    rows = [r for r in read(file, parse, cot) if split_of(r["question"]) in mine]
    if not rows:
        raise UserError(f"{file}: no problem falls to the {split} split, which here is 5 % by hash; it takes more problems")
    return rows


def read(file, parse, cot):
    if not file.is_file():
        raise UserError(f"{file}: no such file; it should be in the folder of --data-dir, or that of --data")
    rows = []
    try:
        with open(file, encoding="utf-8-sig", newline=None) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        if len(line.strip()) > LONGEST_LINE:
                            raise ValueError(f"{len(line.strip())} characters are no problem of grade school; the limit is {LONGEST_LINE}")
                        rows.append(parse(line, cot))
                    except ValueError as error:
                        raise UserError(f"{file}, line {number}: {error}")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start} of what was being read: {error.reason})")
    if not rows:
        raise UserError(f"{file}: no problems in it")
    return rows


def once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise LookupError
    return dict(pairs)


def parse_gsm8k(line, cot):
    try:
        row = json.loads(line, object_pairs_hook=once)
    except LookupError:
        raise ValueError("a key stands twice in the JSON object")
    except (ValueError, RecursionError):
        raise ValueError("expected a JSON object with the texts 'question' and 'answer', found no JSON")
    if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in ("question", "answer")):
        raise ValueError("expected a JSON object with the texts 'question' and 'answer'")
    return problem(row["question"], row["answer"], cot)


def parse_aug(line, cot):
    """GSM8K-Aug: 'question||<<a>> <<b>> #### answer'."""
    question, bars, rest = line.partition("||")
    if not bars:
        raise ValueError("expected 'question||<<step>> <<step>> #### answer', found no '||'")
    return problem(question, rest, cot)


def parse_solved(line, cot):
    """A line of example_model_solutions.jsonl: (question, the chains of the models' right solutions)."""
    try:
        row = json.loads(line)
        texts = [m["solution"] for m in row.values() if isinstance(m, dict) and m["is_correct"]]
        return row["question"].strip(), [problem(row["question"], s.replace("\nA:", "####"), cot)["chain"] for s in texts]
    except (LookupError, TypeError, AttributeError):
        raise ValueError("expected 'question' and solutions with 'is_correct' and 'solution'")


def problem(question, text, cot):
    solution, hashes, answer = text.rpartition("####")
    if not question.strip():
        raise ValueError("the question is empty")
    if not hashes or to_number(answer) is None:
        raise ValueError(f"expected a number after '####', found {answer.strip()[:40]!r}")
    chain = " ".join(re.findall(r"<<[^<>]*>>", solution)) if cot == "steps" else solution.strip()
    return {"question": question.strip(), "chain": chain, "answer": answer.strip().replace(",", "")}


def known_paths(problems, name, data_dir, cot):
    """Each problem's different chains known to be right: the toy task's own, or those OpenAI published for GSM8K's test."""
    folder, known = Path(data_dir or f"data/{name}" if name in ("gsm8k", "gsm8k-aug") else name), {}
    file = folder / "example_model_solutions.jsonl"
    try:
        if name == "gsm8k":
            fetch(file)
        if file.is_file():
            known = dict(read(file, parse_solved, cot))
        elif name != "toy":
            print(f"no chains but the given ones are known (there is no {file})")
    except UserError as error:
        print(f"no chains but the given ones are known ({error})")
    return [p.get("paths") or [s for s in dict.fromkeys([p["chain"], *known.get(p["question"], [])]) if s] for p in problems]


def fetch(file):
    """Download one of GSM8K's files beside its final name, check it, then move it there."""
    wanted = GSM8K_SHA256[file.name]
    if not file.is_file():
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(GSM8K_URL + file.name, timeout=60) as response:
                part.write_bytes(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{file}: not there, and its download failed ({error}); put GSM8K's files in a folder and "
                            "name it with --data-dir")
        if hashlib.sha256(part.read_bytes()).hexdigest() != wanted:
            part.unlink()
            raise UserError(f"{file}: the download does not have the expected checksum; try again")
        part.replace(file)
    elif hashlib.sha256(file.read_bytes()).hexdigest() != wanted:
        raise UserError(f"{file}: not GSM8K as published (its checksum differs); for data of your own say --data "
                        f"{file.parent}")


# ------------------------------------------------------------------------------------------------- scoring

def to_number(text):
    """The number a text says, as Decimal, or None. After '####', else the last one; $ , % are dropped."""
    text = text.rpartition("####")[2] if "####" in text else text
    found = NUMBER.findall(text.replace("$", "").replace("%", ""))
    if not found:
        return None
    try:
        top, _, bottom = found[-1].replace(",", "").partition("/")
        return Decimal(top) / Decimal(bottom) if bottom else Decimal(top)
    except (InvalidOperation, ZeroDivisionError):
        return None


# ------------------------------------------------------------------------------------------------- batches

class Ragged:
    """Rows of different length in one flat int32 array."""

    def __init__(self, rows):
        self.length = np.array([len(r) for r in rows], dtype=np.int64)
        self.start = np.concatenate([[0], self.length.cumsum()])
        self.flat = np.array([t for r in rows for t in r] + [0], dtype=np.int32)

    def pad(self, rows, width):
        """int64 (B, width): the rows asked for; past a row's end stands whatever follows, to be masked."""
        return self.flat[np.minimum(self.start[rows][:, None] + np.arange(width), len(self.flat) - 1)].astype(np.int64)


@dataclass
class Batch:
    """Token arrays int64 (B, width) padded on the right, and their lengths (B,)."""

    rows: np.ndarray  # (B,) which problems
    x: np.ndarray     # X with <bot>
    s: np.ndarray     # the chain
    a: np.ndarray     # Ans
    nx: np.ndarray
    ns: np.ndarray
    na: np.ndarray
    bucket: tuple     # (nx, ns, na) of every problem this one may be batched with

    def width(self, length):
        """The fixed width of a layout of `length(nx, ns, na)` tokens a row: the bucket's largest, rounded up to 8."""
        return -(-int(length(*self.bucket).max()) // 8) * 8


class Problems:
    """A split, tokenized once. Problems longer than the model are dropped and counted in `dropped`.

    Problems of like length share a bucket, and a batch is drawn from one bucket, so that a run sees as many
    widths as there are buckets. Which problems make batch t is a function of (seed, t) alone: to resume is to
    go on counting.
    """

    def __init__(self, problems, tokenizer, block_size, buckets=3, no_cot=False):
        t, encode = tokenizer, tokenizer.encoding.encode_ordinary  # its _batch hands every text to a thread: slower
        x = [encode(p["question"]) + [t.bot] for p in problems]
        s = [[] if no_cot else encode(p["chain"]) for p in problems]
        a = [[t.eot] + encode("#### " + p["answer"]) + [t.eos] for p in problems]
        keep = [i for i in range(len(x)) if len(x[i]) + len(s[i]) + len(a[i]) <= block_size]
        self.dropped = len(x) - len(keep)
        self.problems = [problems[i] for i in keep]
        self.x, self.s, self.a = (Ragged([r[i] for i in keep]) for r in (x, s, a))
        self.fingerprint = hashlib.sha256(b"".join(
            r.flat.tobytes() + r.length.tobytes() for r in (self.x, self.s, self.a))).hexdigest()[:16]
        if not keep:
            raise UserError(f"no problem is left: all {len(x)} are longer than --block-size {block_size}")
        total = self.x.length + self.s.length + self.a.length
        self.order = np.argsort(total, kind="stable")  # rows, the shortest first
        self.buckets = [rows for rows in np.array_split(self.order, buckets) if len(rows)]
        self.epoch = None  # the one whose batches are laid out

    def __len__(self):
        return len(self.problems)

    def batch(self, rows, bucket):
        """The Batch of these rows, as wide as the bucket (an array of rows) needs."""
        lengths = tuple(r.length[bucket] for r in (self.x, self.s, self.a))
        x, s, a = (r.pad(rows, n.max()) for r, n in zip((self.x, self.s, self.a), lengths))
        return Batch(rows, x, s, a, self.x.length[rows], self.s.length[rows], self.a.length[rows], lengths)

    def train_batch(self, step, size, seed, rank=0, world=1):
        """Batch number `step`: every problem once an epoch, in a new order each time. Rank r gets rows r::world."""
        per_epoch = sum(-(-len(b) // size) for b in self.buckets)
        epoch, at = divmod(step, per_epoch)
        if self.epoch != (seed, size, epoch):
            self.epoch, rng = (seed, size, epoch), np.random.default_rng([seed, epoch])
            batches = []
            for bucket in self.buckets:  # the last batch is filled up from the start
                rows = np.resize(rng.permutation(bucket), -(-len(bucket) // size) * size)
                batches += [(r, bucket) for r in rows.reshape(-1, size)]
            self.batches = [batches[i] for i in rng.permutation(per_epoch)]
        rows, bucket = self.batches[at]
        return self.batch(rows[rank::world], bucket)

    def caps(self, c):
        """(latents, tokens) that decoding stops at: the longest chain here, and a few tokens more for the answer."""
        longest = int(self.s.length.max())
        return -(-longest // c), longest + int(self.a.length.max()) + 4

    def eval_batches(self, size, limit=None):
        """Every problem once (or the first `limit` problems), the shortest first."""
        rows = self.order if limit is None else self.order[self.order < limit]
        for i in range(0, len(rows), size):
            yield self.batch(rows[i:i + size], rows[i:i + size])


def splits(args, env, names=("train", "val"), no_cot=False):
    """The Problems of these splits; says how many there are, and what is amiss with some."""
    rows = {split: load(args.data, split, args.data_dir, args.cot, args.seed)[:MOST.get(split)] for split in names}
    found = [Problems(rows[split], env.tokenizer, args.block_size, no_cot=no_cot) for split in names]
    for split, p in zip(names, found if env.rank == 0 else ()):
        empty = 0 if no_cot else int((p.s.length == 0).sum())
        print(f"{split}: {len(p)} problems, {p.dropped} dropped as longer than --block-size {args.block_size}"
              + f", {empty} without a chain of thought (--cot text: their whole solutions)" * (empty > 0))
    return found
