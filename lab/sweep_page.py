"""What a sweep has found: the table, sweep.md, and the page, sweep.html.

Both have a row for each setting, {head: entry}, made from the report.json of its analyses: besides
the columns of the table its group, and page, a link to the report of its first seed.
"""
from html import escape
from pathlib import Path
from string import Template

from lab.files import read_json, write
from lab.report import cell, table

TEMPLATE = Path(__file__).with_name("sweep.html")
FIRST_STEP = 6  # tokens of the toy task's first step, which can be any of three
BASELINES = {"explicit": "explicit", "no-CoT": "no_cot"}  # the rows of --baselines
HEADS = ("seeds", "accuracy", "range", "steps", "explicit", "gold", "lowest continuation",
         "from none", "ECR@c", "paths", "seconds", "flags")
NOTES = (
    "A figure is the mean over seeds. Explicit: the warm-up, thinking in text. Gold: given the "
    "encoder’s latents. Continuation: right answers when the LLM of phase 1 writes on as text "
    "after some of these. ECR@c: tokens of a chunk among the c heaviest of its α. Paths: among how "
    "many steps the latents of the first step are shared. Seconds: from the warm-up to phase 3, "
    "shared stages included. * One seed alone: the range is then the 95 % interval (Wilson) of its "
    "test problems.")
LINE = 22  # height of a line of the plot, in pixels; widths are in percent, so text keeps its size


# -------------------------------------------------------------------------------------- the figures

def mean(values):
    """None where all are None."""
    known = [x for x in values if x is not None]
    return sum(known) / len(known) if known else None


def figures(analysis, way):
    """{head of a column: figure} of one report.json; way: latent, explicit or no_cot."""
    report = read_json(analysis.folder / "report.json")
    found = {figure: report[figure][way] for figure in ("accuracy", "interval", "steps")}
    if way != "latent":
        return found
    c, ecr = report["config"]["sup"]["settings"]["chunk_size"], report["ecr"]
    continued = report["continuation"]["accuracy"]
    orders = (report["parallelism"] or {}).get("orders")  # those of the toy task
    effective = orders["latent"]["effective"] if orders else []
    return found | {
        "explicit": report["accuracy"]["warm_up"], "gold": report["accuracy"]["gold"],
        "lowest continuation": min(continued), "from none": continued[0],
        "ECR@c": ecr["encoder"]["own"][ecr["K"].index(c)],
        "paths": mean(effective[:-(-FIRST_STEP // c)]),
        "seconds": sum(need.seconds for need in analysis.needs if need.kind != "baselines")}


def row_of(analyses, way):
    """{head of a column: entry}, the means over these analyses, one of each seed."""
    found = [figures(analysis, way) for analysis in analyses]
    accuracies = [one["accuracy"] for one in found]
    row = {head: mean([one[head] for one in found]) for head in found[0] if head != "interval"}
    if way == "latent":
        row["seconds"] = round(row["seconds"])
    if len(found) == 1:
        return row | {"seeds": "1*", "range": found[0]["interval"]}
    return row | {"seeds": str(len(found)), "range": [min(accuracies), max(accuracies)]}


def in_words(flags):
    """The flags of a setting, {stage: flags}, as one line."""
    return ", ".join(f"{kind} {words}" for kind, words in flags.items())


def rows_of(settings, analyses, out):
    """{name: row}, of the settings with an analysis that is done."""
    rows = {}
    for name, group, flags in settings:
        done = [stage for (of, _), stage in analyses.items() if of == name and stage.done]
        ways = {name: "latent"}
        if "baselines" in flags:
            ways = {row + name.removeprefix("baselines"): way for row, way in BASELINES.items()}
        for label, way in ways.items() if done else ():
            page = (done[0].folder / "report.html").relative_to(out).as_posix()
            rows[label] = row_of(done, way) | {"group": group, "flags": in_words(flags),
                                               "page": page}
    return rows


def write_results(analyses, args):
    """Table and page. analyses {(setting, seed): its Stage}; args: settings, out and smoke."""
    rows = rows_of(args.settings, analyses, args.out)
    done = sum(analysis.done for analysis in analyses.values())
    state = f"{done} of {len(analyses)} runs are done: a run is a setting with a seed."
    if args.smoke:
        state += " They had tiny budgets, and the figures mean nothing."
    lines = [["setting", *HEADS], ["---", *["---:"] * len(HEADS)]]
    lines += [[name, *(cell(row.get(head)) for head in HEADS)] for name, row in rows.items()]
    lines = ["| " + " | ".join(line) + " |" for line in lines]
    text = "\n".join(["# The ablations", "", state, "", *lines, "", NOTES, ""])
    html = page(rows, state)
    write(args.out / "sweep.md", lambda file: file.write(text.encode()))
    write(args.out / "sweep.html", lambda file: file.write(html.encode()))


# ----------------------------------------------------------------------------------------- the page

def dots(rows):
    """{name: row} as lines, each group below its name: (SVG, its height)."""
    svg, y, group = "", 0, None
    for name, row in rows.items():
        if row["group"] != group:
            group = row["group"]
            y += 1.5 * LINE
            svg += f'<text class="group" x="-12" y="{y}" text-anchor="end">{escape(group)}</text>'
        y += LINE
        low, at, high = (f"{100 * x:.1f}%" for x in (row["range"][0], row["accuracy"],
                                                     row["range"][1]))
        dot = f'<circle class="seeds-{row["seeds"].rstrip("*")}" cx="{at}" cy="{y - 4}" r="4"/>'
        svg += f'<text x="-12" y="{y}" text-anchor="end">{escape(name)}</text>'
        svg += f'<line class="range" x1="{low}" x2="{high}" y1="{y - 4}" y2="{y - 4}"/>'
        svg += f'<a href="{escape(row["page"])}">{dot}</a>'
        svg += f'<text x="100%" dx="12" y="{y}">{row["accuracy"]:.3f}, {row["steps"]:.1f}</text>'
    return svg, y + LINE / 2


def dot_plot(rows):
    """{name: row} with ranges, as SVG; a dashed line at the accuracy of `default`."""
    svg, bottom = dots(rows)
    grid = ""
    for i in range(5):
        grid += f'<line x1="{25 * i}%" x2="{25 * i}%" y1="0" y2="{bottom}"/>'
        grid += f'<text x="{25 * i}%" y="{bottom + 16}" text-anchor="middle">{i / 4:g}</text>'
    if "default" in rows:
        at = f"{100 * rows['default']['accuracy']:.1f}%"
        grid += f'<line class="default" x1="{at}" x2="{at}" y1="0" y2="{bottom}"/>'
    return f'<svg height="{bottom + 20}">{grid}{svg}</svg>'


def page(rows, state):
    """sweep.html as text: one file, no script, no request. state: how much is done, a sentence."""
    columns = {head: {name: row.get(head) for name, row in rows.items()} for head in HEADS}
    return Template(TEMPLATE.read_text("utf-8")).substitute(
        state=state, notes=NOTES, plot=dot_plot(rows), table=table(columns))
