"""GPT-2's byte-pair vocabulary, and the part of it that a training text needs.

Of GPT-2's 50,256 tokens a model from scratch would see most never or seldom: a smaller vocabulary
makes its embeddings and its output head a third as large, and the training text stays the same.
"""
import tiktoken

from lab.files import UserError


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
