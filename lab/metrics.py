"""What is measured: pure functions of α, of chains and of paths. No model runs here.

    measure_ecr          how much of its chunk a summary holds
    measure_parallelism  how many reasoning paths one chain of latents follows: covered_chunks, and
                         effective_paths
    count_errors         why answers written after a chain of text are wrong

Shapes here, beside those of model.py:
    R  problems             M  paths of a problem            c  tokens of a chunk
    N  latents at most      K  entries of α that are kept

Arrays of tokens are padded with -1.
"""
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import torch

from encoder import chunk_tokens
from lab.numbers import to_number
from lab.renumber import ALWAYS, NUMBER, PERCENT, STEP, constants_of, is_arithmetic, value_of

FLOOR = 1e-6      # the mass of a chunk at least, since its logarithm is taken
HALVES = 8        # bins of the histogram of covered chunks: 0 … 0.5, 0.5 … 1, … 4
COVER = 0.03      # a chunk is covered where each of its tokens has as much of α
PATH_TOP_K = 100  # entries of α that count for a path
PATH_BATCH = 8    # problems whose paths are compared at once: α is made dense for it, (B, N, V)


class Latents(NamedTuple):
    """The chains of R problems. Past the end of a chain stands anything, to be masked."""

    n: torch.Tensor        # int64 (R,) latents of each chain
    values: torch.Tensor   # float32 (R, N, K): α's largest entries in falling order,
    ids: torch.Tensor      # int32 (R, N, K): and whose they are
    z: torch.Tensor        # float32 (R, N, C)
    answers: dict          # {problem: (text, right, its ids)}; empty for the encoder's chains


# ----------------------------------------------------------------------------------- small things

def wilson(right, n):
    """The 95 % interval [low, high] of a share: `right` of n."""
    p, z2 = right / n, 1.96 ** 2
    center = p + z2 / n / 2
    half = (z2 * p * (1 - p) / n + (z2 / n) ** 2 / 4) ** 0.5
    return [(center - half) / (1 + z2 / n), (center + half) / (1 + z2 / n)]


def mean(x):
    """The mean of a tensor's finite entries (any shape, any dtype), a float; None without any."""
    x = x[x.isfinite()].double()
    return x.mean().item() if len(x) else None


# ---------------------------------------------------------------- ECR: effective compression rate

def ecr(ids, chunks, real, ks):
    """ECR@K: how many tokens of S_i are among the top K of α_i, mean over latents.

    ids     int (R, N, K): α's largest entries in falling order
    chunks  int (R, N, c): the tokens of each, -1 past its end, from `encoder.chunk_tokens`
    real    bool (R, N): the latents that count
    ks      the values of K
    Returns a list of floats, one for each of ks; NaN where no latent counts.
    """
    match = ids[:, :, None, :] == chunks[:, :, :, None]                # (R, N, c, K)
    match &= (chunks >= 0)[:, :, :, None]
    match = match[real]                                                # (latents, c, K)
    return [match[:, :, :k].any(2).sum(1).double().mean().item() for k in ks]


def chunks_of_previous_problem(chunks):
    """For problem r the chunks of problem r - 1, repeated from the first where there are too few.

    chunks int (R, N, c) -> int (R, N, c).
    """
    _, N, c = chunks.shape
    count = (chunks[:, :, 0] >= 0).sum(1)                              # (R,) chunks of each problem
    count = count.roll(1).clamp(min=1)[:, None]                        # (R, 1)
    index = torch.arange(N) % count                                    # (R, N)
    return chunks.roll(1, 0).gather(1, index[:, :, None].expand(-1, -1, c))


def most_frequent_tokens(chunks):
    """Each chunk's different tokens, the most frequent first: the α of the highest ECR.

    chunks int (R, N, c) -> int (R, N, c); then come the chunk's repetitions, and its padding last.
    """
    same = chunks[:, :, :, None] == chunks[:, :, None, :]              # (R, N, c, c)
    repeated = same.tril(-1).any(3)                                    # (R, N, c)
    frequency = (same.sum(3) * ~repeated).where(chunks >= 0, -1)       # (R, N, c)
    return chunks.gather(2, frequency.argsort(2, descending=True))


def measure_ecr(ids, n, chunks, ks):
    """ECR of R chains: {"own", "chance", "maximum"}, each a list over ks.

    own      with the chunks that the latents stand for
    chance   with the chunks of another problem
    maximum  as if each α had its largest entries at its chunk's most frequent tokens
    ids int (R, N, K); n int64 (R,): latents of each chain; chunks int (R, chunks, c): the problems'
    chunks. A latent beyond its problem's chunks does not count.
    """
    N = min(ids.size(1), chunks.size(1))
    count = (chunks[:, :, 0] >= 0).sum(1)                              # (R,) chunks of each problem
    real = torch.arange(N) < n.minimum(count)[:, None]                 # (R, N)
    ids, own = ids[:, :N], chunks[:, :N]
    other = chunks_of_previous_problem(chunks)[:, :N]
    return {"own": ecr(ids, own, real, ks),
            "chance": ecr(ids, other, real, ks),
            "maximum": ecr(most_frequent_tokens(own), own, real, ks)}


# --------------------------------------------------------------------------- the paths of one chain

def token_mass(values, ids, path):
    """α of the tokens of `path`, 0 beyond its K entries and where there is none.

    values, ids (R, N, K); path int64 (R, M, N, c) -> float (R, M, N, c).
    """
    V = 1 + int(max(ids.max(), path.max()))
    alpha = values.new_zeros(*ids.shape[:2], V + 1).scatter(2, ids.long(), values)  # (R, N, V + 1)
    index = path.where(path >= 0, V)                                   # (R, M, N, c); V: no token
    return alpha[:, None].expand(-1, path.size(1), -1, -1).gather(3, index)


def effective_paths(mass, path, n):
    """N_eff = exp(H(softmax_m score_m)), score_m = mean_t log Σ_{v ∈ S_mt} α_t[v]: float (R,).

    One path followed makes 1. M paths followed alike make M, and so do M paths none of which is
    followed: beside it belongs N_eff with random paths.
    mass float (R, M, N, c): α of path's tokens, from `token_mass`; path int64 (R, M, N, c); n int64
    (R,). NaN where n is 0.
    """
    known = (path >= 0).flatten(2).any(2)                              # (R, M)
    log_mass = mass.sum(3).clamp(min=FLOOR).log()                      # (R, M, N)
    # past n all paths have log FLOOR, which the softmax does not see
    score = log_mass.sum(2) / n[:, None]                               # (R, M)
    share = score.masked_fill(~known, -torch.inf).softmax(1)
    return torch.special.entr(share).sum(1).exp()


def distinct_chunks(path):
    """Whether no earlier path has the same chunk at t, as a set: bool (R, M, N).

    False in the rows of a problem that has fewer than M paths. The paths differ at t where more
    than one is True.
    """
    M, tokens = path.size(1), path.sort(3)[0]
    same = (tokens[:, :, None] == tokens[:, None]).all(4)              # (R, M, M, N)
    earlier = torch.ones(M, M).tril(-1).bool()[:, :, None]             # (M, M, 1)
    known = (path >= 0).flatten(2).any(2)                              # (R, M)
    return ~(same & earlier).any(2) & known[:, :, None]                # (R, M, N)


def covered_chunks(mass, path):
    """(covered, most), int (R, N): the different chunks that are covered at t, and all of them.

    A chunk is covered if each of its tokens has the mass COVER. One path followed makes 1, none
    makes 0. mass, path (R, M, N, c) as in `effective_paths`.
    """
    distinct = distinct_chunks(path)                                   # (R, M, N)
    covered = mass.where(path >= 0, torch.inf).amin(3) >= COVER        # (R, M, N)
    return (covered & distinct).sum(1), distinct.sum(1)


# ------------------------------------------------------------------------ the paths of many chains

def chunked_paths(token_paths, c):
    """For each problem a list of paths, as their chunks: int64 (R, M, N, c), padded with -1."""
    M = max(len(paths) for paths in token_paths)
    flat = []
    for paths in token_paths:
        flat += paths + [[]] * (M - len(paths))
    return chunk_tokens(flat, c).view(len(token_paths), M, -1, c)


def paths_of_next_problems(token_paths):
    """For each problem as many paths as it has, taken from the problems after it, in a circle."""
    flat = sum(token_paths, [])
    end, found = 0, []
    for paths in token_paths:
        end += len(paths)
        others = len(flat) - len(paths)  # where they are fewer than its own, they come again
        found.append([flat[(end + m % others) % len(flat)] for m in range(len(paths))])
    return found


def along_paths(latents, rows, token_paths, c):
    """[covered, most (R, N), N_eff (R,)] of those problems `rows` that have any latent.

    covered and most are NaN where the paths do not differ. rows int64 (R,); token_paths: for each
    of them a list of paths.
    """
    chunks, found = chunked_paths(token_paths, c), []
    N = min(chunks.size(2), latents.ids.size(1))
    for index in torch.arange(len(rows)).split(PATH_BATCH):
        r = rows[index]
        n, ids = latents.n[r], latents.ids[r, :N, :PATH_TOP_K]
        path = chunks[index, :, :N]                                    # (B, M, N, c)
        path = path.where((torch.arange(N) < n[:, None])[:, None, :, None], -1)
        mass = token_mass(latents.values[r, :N, :PATH_TOP_K], ids, path)
        covered, most = covered_chunks(mass, path)                     # (B, N)
        found.append((covered.where(most > 1, torch.nan), most.where(most > 1, torch.nan),
                      effective_paths(mass, path, n)))
    has_latents = latents.n[rows] > 0
    return [torch.cat(parts)[has_latents] for parts in zip(*found)]


def by_latent(x):
    """x (R, N) as the means over the chains, a list."""
    return [mean(column) for column in x.T]


def measure_parallelism(chains, paths, c):
    """How many paths the chains of those problems follow that have two or more: a section.

    None where fewer than two problems have them. chains {whose: Latents}; paths {whose: for each
    problem the tokens of its known paths}.
    """
    count = torch.tensor([len(known) for known in paths["latent"]])
    rows = (count > 1).nonzero()[:, 0]
    if len(rows) < 2:
        return None
    section = {"problems": len(rows), "paths": mean(count[rows])}
    for whose, latents in chains.items():
        own = [paths[whose][r] for r in rows]
        covered, most, n_eff = along_paths(latents, rows, own, c)
        random, _, n_eff_random = along_paths(latents, rows, paths_of_next_problems(own), c)
        each = covered.nanmean(1)                                      # (R,)
        bins = torch.histc(each[each.isfinite()], HALVES, 0, HALVES / 2)
        section[whose] = {
            "covered": mean(each), "covered_most": mean(most.nanmean(1)),
            "covered_random": mean(random.nanmean(1)), "above_1.7": mean(each > 1.7),
            "n_eff": mean(n_eff), "n_eff_random": mean(n_eff_random),
            "histogram": (bins / bins.sum()).tolist(),
            "by_latent": by_latent(covered), "most_by_latent": by_latent(most)}
    return section


# -------------------------------------------------------------------------------- errors of a chain

ERRORS = ("no number", "arithmetic", "operand", "steps")


def count_errors(problems, answers):
    """{type: how many} of the wrong ones among `answers`, {problem: (text, right, its ids)}."""
    types = Counter(error_type(problems[row]["question"], text)
                    for row, (text, right, _) in answers.items() if not right)
    return {name: types[name] for name in ERRORS}


def error_type(question, text):
    """Why the answer in `text`, known to be wrong, is wrong: the first fault in its chain.

    no number   there is no answer
    arithmetic  a step's equation is false, by more than rounding to two places, or none at all
    operand     a number in a step is not in the question, no earlier result, and no constant that
                a word of the question brings in (see renumber.py)
    steps       all steps are true, and lead elsewhere
    """
    if to_number(text) is None:
        return "no number"
    known = ALWAYS | constants_of(question)
    for match in NUMBER.finditer(question):
        share = PERCENT.match(question, match.end())
        known |= {value_of(match[0]), value_of(match[0]) / (100 if share else 1)}
    for step in STEP.findall(text):
        left, _, right = step.rpartition("=")
        value, result = calculate(left), calculate(right)
        if value is None or result is None or abs(value - result) > 0.01:
            return "arithmetic"
        if not known.issuperset(map(value_of, NUMBER.findall(left))):
            return "operand"
        known.add(abs(result))  # a sign is no part of the numbers that are found in a step
    return "steps"


def calculate(text):
    """The value of a text such as (16-3)*.5, a Fraction; None where it is no plain arithmetic."""
    text = text.replace(",", "")
    if not is_arithmetic(text):
        return None
    try:
        value = eval(NUMBER.sub(r"Fraction('\g<0>')", text))
        return value if isinstance(value, Fraction) else None
    except (SyntaxError, TypeError, ZeroDivisionError, MemoryError, RecursionError):
        return None
