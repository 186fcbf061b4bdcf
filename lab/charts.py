"""The README's charts as SVG, drawn from figures that are committed: assets/figures.json.

    python -m lab.charts                       # draw them all
    python -m lab.charts out/sweep/sweep.json  # take over the settings of a sweep first

figures.json has three sections; a list of accuracies has one entry a seed.
settings  {name: {flags, commit, seeds {seed: figures}}}, as lab/sweep.py writes them
easy      GSM8K's easy problems, by hand: text {steps, accuracy}, latent [{c, steps, accuracy}],
          no_cot, false (false latents), unseen wordings {text, latent, gold}
chain     a problem, by hand: question, the tokens of its chain, and the names of those whose steps
          come first, in any order
chain.txt and parallel.txt are what analyze.py --ask prints about that question: of a model of one
path, and of one made with compress.py --paths parallel, both with c = 2.
"""
import argparse
import math
import re
from html import escape
from pathlib import Path
from string import Template
from textwrap import shorten

from lab.files import read_json, write, write_json
from lab.report import scale
from lab.setup import start
from lab.sweep import mean

ASSETS = Path("assets")
TEMPLATE = Path(__file__).with_suffix(".svg")
TOP, BOTTOM = 84, 364               # of a panel: accuracies 1 and 0
LONGEST, SHORTEST = 60, 5           # steps at its left and its right edge
BAR_LEFT, BAR_RIGHT = 300, 690      # of a row of bars: 0, and the most
EDGE, CELL = 24, 16.4               # the left edge of the three chains, the width of a step
PEOPLE = ("blue", "warm", "green")  # whose step it is
SHORT = {"<<": "«", ">>": "»", ">>·<<": "»«"}
LEAST = 0.1                         # weight of a token that is named


# ------------------------------------------------------------------------------------------- marks

def tag(name, words=None, **attributes):
    """One element of SVG. class_ is its class; fractions are rounded to a tenth."""
    svg = f"<{name}"
    for key, value in attributes.items():
        value = f"{value:.1f}" if isinstance(value, float) else value
        svg += f' {key.strip("_").replace("_", "-")}="{value}"'
    return svg + ("/>\n" if words is None else f">{escape(words)}</{name}>\n")


def text(x, y, words, kind="ink", anchor="start"):
    return tag("text", words, x=x, y=y, class_=kind, text_anchor=anchor)


def box(x, y, width, height, kind):
    return tag("rect", x=x, y=y, width=width, height=height, class_=kind)


def dot(x, y, kind):
    return tag("circle", cx=x, cy=y, r=5.5, class_=kind)


def picture(height, says, body):
    """The whole file; `says` is for those who cannot see it."""
    template = Template(TEMPLATE.read_text("utf-8"))
    return template.substitute(height=height, says=escape(says), body=body)


def taken(settings, figure, *names):
    """A figure of all seeds of these settings."""
    return [one[figure] for name in names for one in settings[name]["seeds"].values()]


# ------------------------------------------------------------------------- accuracy against steps

def place(steps, accuracy, left, right):
    """Where a panel from `left` to `right` has this point: x, on a log scale, and y."""
    x = scale(math.log(steps), math.log(LONGEST), math.log(SHORTEST), left, right)
    return x, scale(accuracy, 0, 1, BOTTOM, TOP)


def frame(left, right, title, data):
    """A panel's title, its axes, and a band each for no chain of thought and for false latents."""
    svg = text(left - 14, 32, title, "head")
    for accuracy in (0, 0.5, 1):
        _, y = place(SHORTEST, accuracy, left, right)
        svg += tag("line", x1=left - 14, x2=right + 14, y1=y, y2=y)
        svg += text(left - 22, y + 6, f"{accuracy:g}", "soft", "end")
    for steps in (50, 20, 10, 5):
        svg += text(place(steps, 0, left, right)[0], BOTTOM + 30, f"{steps}", "soft", "middle")
    for words, kind, found in (("no chain of thought", "soft", data["no_cot"]),
                               ("false latents", "warm", data["false"])):
        low, high = (place(1, a, left, right)[1] for a in (min(found), max(found)))
        svg += box(left - 14, high, right - left + 28, max(low - high, 2.0), f"band {kind}")
        svg += text(left - 8, high - 8, words, kind)
    return svg


def panel(left, right, title, data):
    """Text and latents, a dot a seed and a line through the means. data: a section like `easy`."""
    points = [("text", "ink", data["text"])]
    points += [(f"c = {point['c']}", "blue", point) for point in data["latent"]]
    means = (place(point["steps"], mean(point["accuracy"]), left, right) for *_, point in points)
    svg = frame(left, right, title, data)
    svg += tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in means))
    for words, kind, point in points:
        places = [place(point["steps"], accuracy, left, right) for accuracy in point["accuracy"]]
        svg += "".join(dot(x, y, kind) for x, y in places)
        svg += text(places[0][0], min(y for _, y in places) - 16, words, kind, "middle")
    return svg


def unseen(left, right, data):
    """Hollow dots: problems whose wording training did not have."""
    steps = {"text": data["text"]["steps"], "latent": data["latent"][0]["steps"]}
    steps["gold"] = steps["latent"]
    at = {way: place(steps[way], accuracy, left, right)
          for way, accuracy in data["unseen wordings"].items()}
    svg = "".join(dot(*at[way], f"{kind} hollow") for way, kind in (
        ("text", "ink"), ("latent", "blue"), ("gold", "green")))
    svg += text(right + 14, at["latent"][1] - 20, "unseen wordings", "ink", "end")
    return svg + text(right + 14, at["gold"][1] + 36, "unseen, given true latents", "green", "end")


def built_in(settings):
    """The built-in task's figures in the form of the section `easy`."""
    def point(name):
        steps, accuracy = (taken(settings, figure, name) for figure in ("steps", "accuracy"))
        return {"steps": mean(steps), "accuracy": accuracy}

    sizes = {2: "default", 4: "c=4", 8: "c=8"}
    return {"text": point("explicit"),
            "latent": [{"c": c} | point(name) for c, name in sizes.items()],
            "no_cot": taken(settings, "accuracy", "no-CoT"),
            "false": taken(settings, "controls", *sizes.values())}


def steps(figures):
    """steps.svg: what the shorter chains cost, on both kinds of problems."""
    easy = figures["easy"]
    body = panel(78, 424, "Built-in task", built_in(figures["settings"]))
    body += panel(522, 868, "GSM8K’s easy problems", easy) + unseen(522, 868, easy)
    body += text(450, BOTTOM + 64, "share of right answers by steps; a latent stands for c tokens",
                 "soft", "middle")
    return picture(448, "Right answers against steps: text and latents, beside no chain of thought "
                   "and false latents.", body)


# -------------------------------------------------------------------------------------------- bars

BARS = {  # file: what it says, and its groups: title, the longest bar, {head: figure}, the bars
    "parts.svg": ("What is lost without one of the method’s parts.", [
        ("Can the LLM finish in text, after any number of latents?", 1,
         {"right": "lowest continuation"},
         [("all parts", "blue", "default"), ("without LTSuM", "warm", "no-LTSuM"),
          ("without bag loss", "warm", "no-bag"),
          ("without continuations", "warm", "no-continuation")]),
        ("How many of its chunk’s two tokens does a latent hold?", 2, {"tokens": "held"},
         [("all parts", "blue", "default"), ("without bag loss", "warm", "no-bag")]),
        ("Can the model answer after latents alone?", 1, {"right": "accuracy"},
         [("superpositions", "blue", "default"), ("one token each", "warm", "top-1")])]),
    "paths.svg": ("Parallel steps make the chain shorter, and need their superposition.", [
        ("Steps between question and answer", LONGEST, {"steps": "steps", "right": "accuracy"},
         [("text", "soft", "explicit"),
          ("one path, c = 2", "blue", "default"), ("parallel, c = 2", "green", "parallel"),
          ("one path, c = 4", "blue", "c=4"), ("parallel, c = 4", "green", "parallel-c=4")]),
        ("Right when latents keep two tokens", 1, {"cut": "cut to c", "whole": "accuracy"},
         [("one path", "blue", "default"), ("all paths", "green", "all-paths"),
          ("parallel", "green", "parallel"),
          ("any order, on-policy", "green", "even-on-policy")])])}


def bars(settings, says, groups):
    """Groups of bars as in BARS: a mean each, with a dot a seed, and means in columns beside it."""
    svg, y = "", 40
    for title, most, columns, entries in groups:
        svg += text(EDGE, y, title, "head")
        places = (786, 876)[-len(columns):]
        svg += "".join(text(x, y, head, "soft", "end") for x, head in zip(places, columns))
        for name, kind, setting in entries:
            found = [taken(settings, figure, setting) for figure in columns.values()]
            y += 38
            at = [scale(value, 0, most, BAR_LEFT, BAR_RIGHT) for value in found[0]]
            svg += text(EDGE, y, name)
            svg += box(BAR_LEFT, y - 14, mean(at) - BAR_LEFT, 16, f"bar {kind}")
            svg += "".join(dot(x, y - 6, kind) for x in at)
            for x, a in zip(places, map(mean, found)):
                svg += text(x, y, f"{a:.1f}" if a > 1 else f"{a:.3f}", "ink", "end")
        y += 54
    return picture(y - 30, says, svg)


# ------------------------------------------------------------------------------------ three chains

def read_ask(path):
    """([[(token, weight), …] of each latent], the answer), as analyze.py --ask prints them."""
    *lines, answer = path.read_text("utf-8").splitlines()
    found = (re.findall(r"[ ░▒▓█] (\S+) +(\d\.\d\d)(?:  |$)", line[4:])
             for line in lines if line.startswith("z_"))
    latents = [[(token, float(weight)) for token, weight in pairs] for pairs in found]
    return latents, answer.removeprefix("#### ")


def holders(tokens, people):
    """Whose steps' tokens belong into each place of text, of latents and of parallel latents.

    Three lists of {token: [index of a person, …]}, with c = 2. The first steps are theirs.
    """
    starts = [i for i, token in enumerate(tokens) if token.endswith("<<")] + [len(tokens)]
    steps = [tokens[a:b] for a, b in zip(starts, starts[1:])]
    whose = [[s] if s < people else [] for s, step in enumerate(steps) for _ in step]
    written = [{token: who} for token, who in zip(tokens, whose)]
    latents = [dict.fromkeys(tokens[i:i + 2], whose[i]) for i in range(0, len(tokens), 2)]
    parallel = [{} for _ in latents]
    for who, step in enumerate(steps[:people]):
        for i, token in enumerate(["<<", *step[1:]]):
            parallel[i // 2].setdefault(token, []).append(who)
    return written, latents, parallel


def shared_box(x, y, width, height, people, kind=""):
    """A box in equal strips of these people's colors."""
    each = width / max(1, len(people))
    return "".join(box(x + i * each, y, each, height, f"{kind} {color}")
                   for i, color in enumerate([PEOPLE[who] for who in people] or ["soft"]))


def strip(y, height, chain, held, answer):
    """A chain: a column for each step, filled by its tokens according to their weights."""
    svg = ""
    for i, tokens in enumerate(chain):
        x, top = EDGE + i * CELL, float(y)
        people = held[i] if i < len(held) else {}
        order = {token: place for place, token in enumerate(people)}
        svg += box(x, y, CELL - 1.5, height, "rest")
        for token, weight in sorted(tokens, key=lambda pair: order.get(pair[0], len(order))):
            if weight >= LEAST:
                share = height * weight
                svg += shared_box(x, top, CELL - 1.5, share - 1, people.get(token, []), "cell")
                svg += text(x + CELL / 2 - 0.7, top + share / 2 + 4, SHORT.get(token, token),
                            "mono tiny", "middle")
                top += share
    return svg + text(EDGE + len(chain) * CELL + 8, y + height / 2 + 7, f"→ {answer}", "head")


def close_up(x, y, tokens, people, names):
    """The heaviest tokens of one latent as bars, with the name of the one whose step they are."""
    svg = text(x, y, "its first latent", "head")
    for i, (token, weight) in enumerate(tokens):
        if weight >= LEAST:
            who, bottom = people.get(token, []), y + 30 + 25 * i
            svg += text(x + 44, bottom, token, "mono", "end")
            svg += shared_box(x + 54, bottom - 15, 300 * weight, 18, who)
            name = names[who[0]] if len(who) == 1 else ""
            svg += text(x + 62 + 300 * weight, bottom, f"{weight:.2f} {name}", "soft")
    return svg


def question(problem):
    """The first sentences in the colors of their people, and the rest in a second line."""
    first = problem["question"].split(". ")[:len(problem["names"])]
    svg = "".join(tag("tspan", f"{sentence}. ", class_=PEOPLE[i]).strip()
                  for i, sentence in enumerate(first))
    rest = problem["question"].removeprefix(". ".join(first) + ". ")
    return (f'<text x="{EDGE}" y="36" class="fit">{svg}</text>\n'
            + text(EDGE, 62, shorten(rest, 90, placeholder=" …"), "soft fit"))


def chain(figures, one_path, in_parallel):
    """chain.svg: a problem's chain as text, in latents, and in parallel latents; one scale."""
    problem = figures["chain"]
    names, tokens = problem["names"], [token.replace(" ", "·") for token in problem["tokens"]]
    written, latents, parallel = holders(tokens, len(names))
    (path, answer), (short, short_answer) = one_path, in_parallel
    body = question(problem)
    for y, height, words, steps, held, end in (
            (104, 30, f"{len(tokens)} tokens of text", [[(token, 1.0)] for token in tokens],
             written, answer),
            (180, 64, f"{len(path)} latents of two tokens each", path, latents, answer),
            (290, 84, f"{len(short)} latents, steps in parallel", short, parallel, short_answer)):
        body += text(EDGE, y, words, "head") + strip(y + 10, height, steps, held, end)
    body += close_up(520, 180, path[0], latents[0], names)
    body += close_up(520, 290, short[0], parallel[0], names)
    return picture(412, f"A chain of thought of {len(tokens)} tokens becomes {len(path)} latents, "
                   f"and {len(short)} when steps share a latent.", body)


# -------------------------------------------------------------------------------------- the script

def draw(figures, one_path, in_parallel):
    """{file name: SVG}; the last two as `read_ask` returns them."""
    drawn = {name: bars(figures["settings"], *content) for name, content in BARS.items()}
    return {"chain.svg": chain(figures, one_path, in_parallel), "steps.svg": steps(figures)} | drawn


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sweeps", nargs="*", type=Path, metavar="SWEEP.json",
                   help="written by lab.sweep; its settings replace those of the same name")
    args = p.parse_args(argv)
    figures = read_json(ASSETS / "figures.json")
    for sweep in args.sweeps:
        figures["settings"] |= read_json(sweep)
    drawn = draw(figures, *(read_ask(ASSETS / name) for name in ("chain.txt", "parallel.txt")))
    if args.sweeps:
        write_json(ASSETS / "figures.json", figures)
    for name, svg in drawn.items():
        write(ASSETS / name, lambda file: file.write(svg.encode()))
    print(f"wrote {', '.join(drawn)} to {ASSETS}")


if __name__ == "__main__":
    start(main)
