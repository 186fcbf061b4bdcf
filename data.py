"""Problems in, batches out: GSM8K's loader, the tokenizer, and what makes a batch.

A problem is a question, a chain of thought S and an answer. As tokens:

    X <bot> = question <bot>        S = chain        <eot> Ans = <eot> #### answer <|endoftext|>

Everything is tokenized once. A batch holds problems of like length, so that little is computed for
padding. Other data than GSM8K's: lab/sources.py.
"""
import functools
import hashlib
import http.client
import json
import re
import urllib.request

import numpy as np
import tiktoken

import toy
from encoder import Batch, Tokens, count_chunks
from lab.files import UserError, write
from lab.numbers import numbers

GSM8K_URL = ("https://raw.githubusercontent.com/openai/grade-school-math/master/"
             "grade_school_math/data/")
GSM8K_SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
POOL = 16  # batches whose problems are sorted by length together


# ----------------------------------------------------------------------------------------- problems

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

    cot  'steps': the chain is the calculator annotations, '<<48/2=24>>\\n<<48+24=72>>'. A step of
         two numbers is, with its line end, eight of GPT-2's tokens, so that chunks of 2 or 4 end
         where it ends. 'text': it is the whole solution
    """
    question = question.strip()
    solution, hashes, answer = text.rpartition("####")
    if not question:
        raise ValueError("the question is empty")
    found = numbers(answer)
    if not hashes or len(found) != 1 or found[0] is None:
        raise ValueError(f"expected one number after '####', found {answer.strip()[:40]!r}")
    steps = re.findall(r"<<[^<>]*>>", solution)
    chain = "\n".join(steps) if cot == "steps" else solution.strip()
    return {"question": question, "chain": chain, "answer": answer.strip().replace(",", "")}


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
    """The ordinary ids 0, 1, …, then <|endoftext|> <bot> <eot> <sum>, then padding.

    name  "toy", or "gpt2" for GPT-2's byte-pair encoding
    kept  ids of that encoding, all bytes among them, which become 0, 1, …; other tokens are spelled
          with these. None: all ids are kept
    So `logits[..., :n_ordinary]` is the ordinary vocabulary, the only place where α has mass, and
    `n_vocab`, a multiple of 64, is the width of the model's head.
    """

    SPECIAL = ["<|endoftext|>", "<bot>", "<eot>", "<sum>"]

    def __init__(self, name, kept=None):
        self.name, self.encoding = name, gpt2_encoding() if name == "gpt2" else toy_encoding()
        self.vocabulary = {"name": name, "kept": kept}  # of which it can be made again
        ids = range(len(self.encoding._mergeable_ranks)) if kept is None else kept
        pieces = [self.encoding.decode_single_token_bytes(i) for i in ids]
        self.dense = {i: [new] for new, i in enumerate(ids)}  # of each token its new ids
        self.id_of = {piece: new for new, piece in enumerate(pieces)}
        self.pieces = pieces + [text.encode() for text in self.SPECIAL]
        self.n_ordinary = len(pieces)
        self.n_vocab = -(-len(self.pieces) // 64) * 64
        self.eos, self.bot, self.eot, self.sum = range(self.n_ordinary, len(self.pieces))
        if kept is not None:  # what was made with other tokens is refused
            digest = hashlib.sha256(repr(kept).encode()).hexdigest()
            self.name = f"{name}-{self.n_ordinary}-{digest[:8]}"

    def encode(self, text):
        """Ordinary ids only: '<eot>' in a text is five characters, never the control token."""
        ids = []
        for i in self.encoding.encode_ordinary(text):
            if i not in self.dense:
                self.dense[i] = self.spell(self.encoding.decode_single_token_bytes(i))
            ids += self.dense[i]
        return ids

    def spell(self, token):
        """The ids of a token that is not kept: of its longest beginning that is, and so on."""
        ids = []
        while token:
            end = max(k for k in range(1, len(token) + 1) if token[:k] in self.id_of)
            ids.append(self.id_of[token[:end]])
            token = token[end:]
        return ids

    def decode(self, ids):
        """The text of these ids; ids of the head's padding are left out."""
        pieces = [self.pieces[i] for i in ids if i < len(self.pieces)]
        return b"".join(pieces).decode("utf-8", errors="replace")


def gpt2_encoding():
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a wrong checksum
        raise UserError(
            "GPT-2's vocabulary could not be downloaded; set TIKTOKEN_CACHE_DIR to a folder that "
            f"has tiktoken's copy of it ({type(error).__name__})")


def tokens_in_use(problems):
    """The ids of GPT-2's encoding that a model of these problems needs, a rising list of int.

    All bytes, the tokens of the problems, and the numbers that they may lack. A third of GPT-2's
    vocabulary or less: that makes the embeddings, and the output head, so much smaller.
    """
    encoding = gpt2_encoding()
    texts = ["".join(f"{n} {n}=" for n in range(1000))]  # with a space before them, and without
    for p in problems:
        texts += [p["question"], p["chain"], "#### " + p["answer"]]
    ids = {encoding.encode_single_token(bytes([byte])) for byte in range(256)}
    return sorted(ids.union(*encoding.encode_ordinary_batch(texts, num_threads=1)))


@functools.cache
def toy_encoding():
    """Whole words and whole numbers are tokens; 256 bytes spell whatever else there is.

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
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("toy", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# ------------------------------------------------------------------------------------------ batches

class Ragged:
    """Rows of different length in one flat int32 array: a tenth of the room that lists take."""

    def __init__(self, rows):
        self.length = np.array([len(row) for row in rows], dtype=np.int64)
        self.start = np.concatenate([[0], self.length.cumsum()])
        tokens = [token for row in rows for token in row]
        self.flat = np.array(tokens + [0], dtype=np.int32)  # never empty; the 0 is in no row

    def __getitem__(self, row):
        return self.flat[self.start[row]:self.start[row + 1]].tolist()


class Problems:
    """A split, tokenized once. Problems longer than the model are dropped and counted in `dropped`.

    Which problems make batch t is a function of (seed, t) alone: to resume is to go on counting.
    Raises UserError where no problem is left.
    """

    def __init__(self, problems, tokenizer, block_size, chunk_size=1, no_cot=False):
        t, encode = tokenizer, tokenizer.encode
        x = [encode(p["question"]) + [t.bot] for p in problems]
        s = [[] if no_cot else encode(p["chain"]) for p in problems]
        a = [[t.eot] + encode("#### " + p["answer"]) + [t.eos] for p in problems]
        whole = [count_chunks(len(chain), chunk_size) * chunk_size for chain in s]  # as latents end
        fits = [i for i in range(len(x)) if len(x[i]) + whole[i] + len(a[i]) <= block_size]
        self.dropped = len(x) - len(fits)
        self.problems = [problems[i] for i in fits]
        self.x, self.s, self.a = (Ragged([rows[i] for i in fits]) for rows in (x, s, a))
        if not fits:
            raise UserError(f"no problem is left: all {len(x)} are longer than --block-size "
                            f"{block_size}, counted in whole chunks of {chunk_size} tokens")
        parts = [r.flat.tobytes() + r.length.tobytes() for r in (self.x, self.s, self.a)]
        self.fingerprint = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        self.order = np.argsort(self.lengths(1), kind="stable")  # rows, the shortest first
        self.laid_out = None  # the (epoch, size, seed, chain_slots) of self.batches

    def __len__(self):
        return len(self.problems)

    def lengths(self, chain_slots):
        """How many slots each problem takes, (R,).

        chain_slots: those of a token of its chain in a loop's sequences: 1 in SFT, 1 + 1/c in phase
        1, where a chunk has a <sum> or a latent beside it, and 1/c in phase 3.
        """
        return self.x.length + chain_slots * self.s.length + self.a.length

    def batch(self, rows):
        return Batch(rows, [Tokens(self.x[row], self.s[row], self.a[row]) for row in rows])

    def train_batch(self, step, size, seed, chain_slots=1.0):
        """Batch number `step`: every problem once an epoch, beside others of like length.

        So that all batches are full, a few chosen at random come twice. chain_slots: see `lengths`.
        """
        epoch, number = divmod(step, -(-len(self) // size))
        if self.laid_out != (epoch, size, seed, chain_slots):
            self.laid_out = (epoch, size, seed, chain_slots)
            rng = np.random.default_rng([seed, epoch])
            self.batches = self.shuffle(rng, size, self.lengths(chain_slots))
        return self.batch(self.batches[number])

    def shuffle(self, rng, size, length):
        """An epoch's batches, int64 (batches, size): drawn, then sorted by length in pools."""
        rows = np.resize(rng.permutation(len(self)), -(-len(self) // size) * size)
        for i in range(0, len(rows), POOL * size):
            pool = rows[i:i + POOL * size]
            rows[i:i + POOL * size] = pool[np.argsort(length[pool], kind="stable")]
        return rng.permutation(rows.reshape(-1, size))

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
        return count_chunks(longest, c), longest + int(self.a.length.max()) + 4

    def eval_batches(self, size, limit=None):
        """Every problem once (or the first `limit` problems), the shortest first."""
        rows = self.order if limit is None else self.order[self.order < limit]
        for i in range(0, len(rows), size):
            yield self.batch(rows[i:i + size])
