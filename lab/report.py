"""The page of a run: tables, charts and problems as HTML.

    html = page(report, pictures(problems, chains, chunks, tokenizer))

`report` is what analyze.py writes to report.json; its docstring says what is in it. Every $name in
the template, report.html, becomes a figure, a table or a chart. Nothing is measured here.
"""
from html import escape
from pathlib import Path
from string import Template

TEMPLATE = Path(__file__).with_suffix(".html")
LABELS = {"warm_up": "Explicit, the warm-up", "explicit": "Explicit chain of thought",
          "no_cot": "No chain of thought", "latent": "Latent chain",
          "gold": "Summaries by the encoder"}
LOOPS = {"sft": "Warm-up (sft)", "sup": "Phase 1 (sup)", "latent": "Phase 3 (latent)",
         "explicit": "Baseline: explicit", "no_cot": "Baseline: no chain of thought"}
FIGURES = ("accuracy", "interval", "steps", "seconds", "unparseable", "capped")
CHAINS = ("encoder", "latent")  # the encoder's summaries of the true chain; what the model thinks
PATHS = ("covered", "covered_most", "covered_random", "above_1.7", "n_eff", "n_eff_random")
HEAVIEST = 5                    # tokens of each latent that are shown
SHOWN = 12                      # problems that were solved, and as many that were not
LEFT, RIGHT, TOP, BOTTOM = 36, 352, 12, 172  # the edges of a chart, in units of its viewBox


# ----------------------------------------------------------------------------------------- tables

def cell(x):
    """One entry of a table: a list is an interval, None a dash, and text is escaped."""
    if x is None:
        return "–"
    if isinstance(x, list):
        return " – ".join(map(cell, x))
    if isinstance(x, float):
        return f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"
    return escape(str(x))


def table(columns):
    """{head of the column: {head of the row: entry}} as HTML; entries as `cell` takes them."""
    html = "<tr><th>" + "".join(f"<th>{escape(head)}" for head in columns)
    for row in next(iter(columns.values()), ()):
        html += f"<tr><td>{escape(str(row))}"
        html += "".join(f"<td>{cell(column[row])}" for column in columns.values())
    return f'<div class="wide"><table>{html}</table></div>'


# ----------------------------------------------------------------------------------------- charts

def scale(value, low, high, start, end):
    """The linear map that takes low to start and high to end."""
    return start + (end - start) * (value - low) / (high - low or 1)


def axis_top(largest):
    """The smallest of 0.001, 0.002, 0.004, 0.008, 0.01, … that is no less than `largest`."""
    tops = (digit * 10.0 ** exponent for exponent in range(-3, 300) for digit in (1, 2, 4, 8))
    return next(top for top in tops if top >= largest)


def grid(top):
    """Five horizontal lines with their labels, as SVG."""
    svg = ""
    for i in range(5):
        value = i * top / 4
        y = scale(value, 0, top, BOTTOM, TOP)
        svg += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'
        svg += f'<text x="30" y="{y + 4}" text-anchor="end">{value:g}</text>'
    return svg


def curve(points, color):
    """A line through the points [(x, y)], and a dot at each, as SVG."""
    points = [(f"{x:.1f}", f"{y:.1f}") for x, y in points]
    path = " ".join(f"{x},{y}" for x, y in points)
    svg = f'<polyline stroke="{color}" points="{path}"/>'
    return svg + "".join(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{color}"/>' for x, y in points)


def chart(series, x=None, top=None):
    """A line chart and its key, as SVG and HTML.

    series  {name: figures}, at most three; None where there is no figure
    x       the place of each figure; left out: 1, 2, …, as far as there are figures
    top     of the vertical axis, which starts at 0; left out: the next round number
    """
    figures = [y for ys in series.values() for y in ys if y is not None] or [0]
    if not x:
        indices = [i for ys in series.values() for i, y in enumerate(ys) if y is not None]
        x = list(range(1, 2 + max(indices, default=0)))
    top = top or axis_top(max(figures))
    svg = grid(top)
    stride = -(-len(x) // 7)  # seven labels at most
    for value in x[::stride]:
        at = scale(value, x[0], x[-1], LEFT, RIGHT)
        svg += f'<text x="{at:.0f}" y="190" text-anchor="middle">{value}</text>'
    key = ""
    for i, (name, ys) in enumerate(series.items()):
        points = [(scale(a, x[0], x[-1], LEFT, RIGHT), scale(y, 0, top, BOTTOM, TOP))
                  for a, y in zip(x, ys) if y is not None]
        svg += curve(points, f"var(--c{i})")
        key += f'<b class="key" style="color:var(--c{i})">{name}</b>'
    return f'<svg viewBox="0 0 360 196">{svg}</svg>{key}'


# ---------------------------------------------------------------------- a problem and its latents

def printable(tokenizer, ids):
    """Tokens as text, with a · for every space and whatever cannot be printed."""
    text = tokenizer.decode(ids)
    return "".join(a if a.isprintable() and a != " " else "·" for a in text)


def heaviest_tokens(values, ids, tokenizer):
    """The heaviest tokens of each latent of a chain: [[(text, weight), …], …].

    values float (n, K), ids int (n, K): the entries of α in falling order.
    """
    columns = []
    for weights, tokens in zip(values[:, :HEAVIEST].tolist(), ids[:, :HEAVIEST].tolist()):
        columns.append([(printable(tokenizer, [i]), w) for i, w in zip(tokens, weights)])
    return columns


def strip(values, ids, chunks, tokenizer):
    """A chain as columns, one a latent: the chunk it stands for, and its heaviest tokens shaded.

    values, ids (n, K) as above; chunks int (chunks, c): their tokens, -1 past a chunk's end.
    """
    texts = [printable(tokenizer, [i for i in chunk if i >= 0]) for chunk in chunks.tolist()]
    html = ""
    for t, tokens in enumerate(heaviest_tokens(values, ids, tokenizer)):
        chunk = escape(texts[t]) if t < len(texts) else ""
        html += f"<div><b>{chunk or '–'}<small>{t + 1}</small></b>"
        for text, weight in tokens:
            shade = f"background:rgba(70,120,230,{0.6 * weight:.2f})"
            html += f'<span style="{shade}">{escape(text)}<small>{100 * weight:.0f}</small></span>'
        html += "</div>"
    return f'<div class="strip">{html}</div>'


def picture(problem, answer, strips, unfold=False):
    """A problem as HTML to unfold: the question, the true chain, what the model wrote, its chains.

    problem  {question, chain, answer}, all str
    answer   (the text that the latent model wrote after its chain, whether it is right, its ids)
    strips   {whose chain: HTML, from `strip`}
    unfold   the problem is shown unfolded at first
    """
    written, right, _ = answer
    state = " open" if unfold else ""
    sign = "<b>✓</b>" if right else "<b class=no>✗</b>"
    question, chain, answer = (escape(problem[key]) for key in ("question", "chain", "answer"))
    html = f"<details{state}><summary>{sign} {question}</summary>"
    html += f"<p>{chain} #### {answer}<br>the model: {escape(written.removeprefix('<eot>'))}</p>"
    html += "".join(f"<small>{name}</small>{columns}" for name, columns in strips.items())
    return html + "</details>"


def pictures(problems, chains, chunks, tokenizer):
    """As HTML, the first problems that the latent model solved, then those that it did not.

    chains {whose: Latents}; chunks {whose: int (R, chunks, c)}: the true chains' tokens that the
    latents stand for.
    """
    answers = chains["latent"].answers
    solved = [row for row in range(len(problems)) if answers[row][1]]
    unsolved = [row for row in range(len(problems)) if not answers[row][1]]
    html = []
    for row in solved[:SHOWN] + unsolved[:SHOWN]:
        strips = {}
        for whose, latents in chains.items():
            n = latents.n[row]
            strips[whose] = strip(latents.values[row, :n], latents.ids[row, :n], chunks[whose][row],
                                  tokenizer)
        html.append(picture(problems[row], answers[row], strips, unfold=not html))
    return html


# --------------------------------------------------------------------------------------- the page

def verdict(controls):
    """What it costs the latent model to be handed another problem's chain, in words."""
    lost = controls["accuracy"]["own"] - controls["accuracy"]["shuffled"]
    if controls["interval"]["shuffled"][1] < controls["interval"]["own"][0]:
        return f"costs {100 * lost:.0f} points"
    return "does as well, as far as so many problems tell: these latents do nothing"


def prefix_charts(controls, continuation):
    """The two charts of what happens when a chain is cut, or goes on as text."""
    cut = controls["cut"]
    written = {"answer": continuation["accuracy"], "next chunk": continuation["next_chunk"]}
    return {"cut": chart({"accuracy": cut["accuracy"]}, cut["k"], top=1),
            "continued": chart(written, continuation["i"], top=1),
            "few": continuation["problems"]}


def ecr_table(ecr):
    columns = {}
    for whose in CHAINS:
        for name, figures in ecr[whose].items():
            columns[f"{whose}, {name}"] = dict(zip(ecr["K"], figures))
    return table(columns)


def path_figures(parallelism):
    """The section on parallel paths, which is empty where no problem has several (None)."""
    if parallelism is None:
        return {"paths": "None are known here.", "parallelism": "", "hide": "hidden",
                "by_latent": "", "histogram": ""}
    latent = parallelism["latent"]
    text = (f"{parallelism['problems']} problems have {parallelism['paths']:.2f} valid paths on "
            f"average. Where these differ, a latent of the model holds the steps of "
            f"{latent['covered']:.2f} of them, and {latent['covered_most']:.2f} is the most there "
            f"can be; in {100 * latent['above_1.7']:.0f} % of the problems it is more than 1.7.")
    by_latent = {"encoder": parallelism["encoder"]["by_latent"], "latent": latent["by_latent"],
                 "most": latent["most_by_latent"]}
    halves = [i / 2 for i in range(len(latent["histogram"]))]
    return {
        "paths": text, "hide": "",
        "parallelism": table({whose: {name: parallelism[whose][name] for name in PATHS}
                              for whose in CHAINS}),
        "by_latent": chart(by_latent),
        "histogram": chart({whose: parallelism[whose]["histogram"] for whose in CHAINS}, halves,
                           top=1)}


def learning_curves(loops):
    """A chart for each loop: its validation score and its loss, by updates."""
    html = ""
    for name, loop in loops.items():
        svg = chart({"validation": loop["score"], "loss": loop["loss"]}, loop["step"])
        html += f"<figure><strong>{LOOPS[name]}</strong>{svg}"
        html += "<figcaption>by updates</figcaption></figure>"
    return html


def accuracy_table(section):
    """The table of a section that has accuracies with intervals, if it was measured."""
    if section is None:
        return "<p>Not measured: a hidden state cannot be cut to tokens.</p>"
    return table({key: section[key] for key in ("accuracy", "interval")})


def unseen_table(unseen):
    """The accuracies on problems whose words training never had, if they were measured."""
    if not unseen:
        return ""
    columns = {}
    for split, section in unseen.items():
        for key in ("accuracy", "interval"):
            columns[f"{split} ({section['problems']}), {key}"] = {
                label: section[key][way] for way, label in LABELS.items()}
    return table(columns) + (
        "<p>Problems that training never had, words and all. There the models fail, in text as in "
        "latents: from so few wordings nobody learns to read, and choosing the steps takes "
        "reading. Summaries are of the true chain: that they can be read carries over. What "
        "follows is of problems that training had, with numbers that it never had.</p>")


def page(report, shown):
    """report.html as text: one file, no script, no request.

    report  what report.json holds
    shown   the problems shown, one at least, as `pictures` makes them
    """
    controls, config = report["controls"], report["config"]["analyze"]
    made = {**config["settings"], **config["made_by"], "fingerprint": config["made_of"]["data"]}
    accuracy = {figure: {label: report[figure][way] for way, label in LABELS.items()}
                for figure in FIGURES}
    content = {
        "problems": report["problems"],
        "accuracy": table(accuracy),
        "unseen": unseen_table(report["unseen"]),
        "errors": table({LABELS[way]: types for way, types in report["errors"].items()}),
        "first": shown[0],
        "verdict": verdict(controls),
        "donor": f"{100 * controls['donor']:.0f}",
        "controls": accuracy_table(controls),
        "collapse": accuracy_table(report["collapse"]),
        "ecr": ecr_table(report["ecr"]),
        "curves": learning_curves(report["curves"]),
        "more": "\n".join(shown[1:])}
    content |= prefix_charts(controls, report["continuation"])
    content |= path_figures(report["parallelism"])
    content |= {name: escape(str(value)) for name, value in made.items()}
    return Template(TEMPLATE.read_text("utf-8")).substitute(content)

