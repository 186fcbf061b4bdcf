"""Where problems come from: every --data, GSM8K with new numbers, the splits, known other paths."""
import re
import zlib
from itertools import islice
from pathlib import Path

import toy
from data import Problems, fetch, make_problem, parse_gsm8k, read
from lab.files import UserError
from lab.numbers import numbers, to_number
from lab.renumber import NUMBER, STEP, parse, renumbered, templates

TOY_SIZE = {"train": 16000, "val": 256, "test": 1000}
MAX_PROBLEMS = {"val": 400}   # validation decodes its problems again and again
COPIES = {"easy": 200, "gsm8k": 20}  # of each training problem, with other numbers
EASY = 600  # problems that --data easy trains on; each of them has at most so many steps,
EASY_STEPS, EASY_LENGTH, EASY_NUMBER = 4, 240, 60  # characters, and so large whole numbers


def split_of(question):
    """'val', 'test' (5 % each) or 'train', by the question's hash, where the data does not say."""
    bucket = zlib.crc32(question.encode(errors="surrogatepass")) % 20
    return {0: "val", 1: "test"}.get(bucket, "train")


def is_easy(problem):
    """Whether --data easy may take a problem: few steps, a short question, small whole numbers.

    Each step is of two numbers, so that with its line end it is eight tokens. And all numbers are
    certain, so that --renumber can change some of them.
    """
    steps = STEP.findall(problem["chain"])
    if len(steps) > EASY_STEPS or len(problem["question"]) > EASY_LENGTH:
        return False
    if any(len(NUMBER.findall(step)) != 3 for step in steps):  # the third is the result
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


def load_problems(name, split, data_dir=None, cot="steps", seed=0, as_told=toy.AS_TOLD):
    """A list of {question, chain, answer[, paths]}, all str, for split 'train', 'val' or 'test'.

    name   toy | easy | gsm8k | gsm8k-aug | a .jsonl file in GSM8K's form | a folder with
           train.jsonl and test.jsonl. easy: of GSM8K 'train' is the first EASY easy problems, 'val'
           its easy ones; 'test' is whole
    cot    'steps': the calculator annotations in order, '<<48/2=24>>\\n<<48+24=72>>'; 'text': the
           whole solution
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
    elif name in COPIES:
        file = Path(data_dir or "data/gsm8k") / f"{part}.jsonl"
        fetch(file)
    elif Path(name).is_dir():
        file = Path(name) / f"{part}.jsonl"
    elif Path(name).is_file():
        file, taken = Path(name), (split,)
    else:
        raise UserError(f"--data {name}: not toy, easy, gsm8k or gsm8k-aug, and no such file or "
                        "folder")
    rows = read(file, parse_aug if name == "gsm8k-aug" else parse_gsm8k, cot)
    rows = [row for row in rows if split_of(row["question"]) in taken]
    if name == "easy" and split != "test":
        easy = [row for row in rows if is_easy(row)]
        rows = easy[:EASY] if split == "train" else easy
    if not rows:
        raise UserError(f"{file}: no problem falls to the {split} split, which here is 5 % by "
                        "hash; it takes more problems")
    return rows


def parse_aug(line, cot):
    """One line of GSM8K-Aug: 'question||<<a>> <<b>> #### answer'."""
    question, bars, solution = line.partition("||")
    if not bars:
        raise ValueError("expected 'question||<<step>> <<step>> #### answer', found no '||'")
    return make_problem(question, solution, cot)


def known_paths(problems):
    """For each problem a list of the different chains that are known to be right.

    The toy task makes all of its own; otherwise they are those of the problems with the same
    question and answer.
    """
    alike = {}
    for p in problems:
        alike.setdefault((p["question"], p["answer"]), []).append(p["chain"])
    paths = []
    for p in problems:
        chains = p.get("paths") or [p["chain"], *alike[p["question"], p["answer"]]]
        paths.append([chain for chain in dict.fromkeys(chains) if chain])
    return paths


def load_split(args, split):
    """The problems of a split, with the flags of a script: those of load_problems and more splits.

        train        the training problems, and --renumber copies of each
        val          training problems that are kept out whole; with --renumber the training
                     problems instead, with numbers that no copy has
        held-out     training problems that are kept out whole
        renumbered   the training problems with numbers that neither a copy nor val has
        test         the test problems

    args: data, data_dir, cot, seed, as_told, renumber.
    """
    if split == "renumbered" and args.data == "toy":
        raise UserError("--split renumbered: the toy task's test problems are new already")
    source = {"renumbered": "train", "held-out": "val"}.get(split, split)
    if split == "val" and args.renumber:
        source = "train"
    rows = load_problems(args.data, source, args.data_dir, args.cot, args.seed, args.as_told)
    if source == "train" and (args.renumber or split == "renumbered"):
        rows = new_numbers(rows, split, args)
    if not rows:
        raise UserError(f"--data {args.data}, split {split}: no training problem has enough new "
                        "numbers for it")
    return rows[:MAX_PROBLEMS.get(split)]


def new_numbers(rows, split, args):
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
    print(f"{len(rows) - reasons.total()} of {len(rows)} training problems can be given new "
          "numbers", *(f"; {why}: {n}" for why, n in reasons.items()), sep="")
    return [*rows, *drawn]


def splits(args, env, names=("train", "val"), no_cot=False):
    """The Problems of these splits; says how many there are, and what is amiss with some.

    args: those of load_split, block_size and chunk_size; env: tokenizer.
    """
    found = []
    for split in names:
        rows = load_split(args, split)
        p = Problems(rows, env.tokenizer, args.block_size, args.chunk_size, no_cot=no_cot)
        found.append(p)
        empty = 0 if no_cot else int((p.s.length == 0).sum())
        note = f", {empty} without a chain of thought (see --cot text)" if empty else ""
        print(f"{split}: {len(p)} problems, {p.dropped} dropped as longer than --block-size "
              f"{args.block_size}, counted in whole chunks{note}")
    return found
