"""The page: that what is shown is text, and that tables and charts stand up to what is missing."""
from html.parser import HTMLParser

import torch

from lab.report import chart, heaviest_tokens, picture, printable, strip, table, verdict


class Page(HTMLParser):
    """Tags opened and closed, and the text."""

    CLOSED = ("details", "div", "svg", "table", "figure", "style")

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag in self.CLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.CLOSED:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text


def test_a_problem_full_of_markup_is_text(toy_tokenizer):
    """Question, chain, answer, tokens, what the model says: none becomes a tag or an attribute."""
    evil = '<script>alert("1")</script> \'&amp; </details>'
    ids = torch.tensor([toy_tokenizer.encode('<>"&\'')])  # (1, 5): a chain of one latent
    columns = strip(torch.full((1, 5), 0.2), ids, ids[:, :2], toy_tokenizer)
    problem = {"question": evil, "chain": evil, "answer": evil}
    html = picture(problem, (evil, False, []), {"encoder": columns, "latent": columns})
    page = Page(html)
    assert "&lt;<small>20" in html and "&lt;&gt;<small>1<" in html
    assert "script" not in page.tags and page.tags.count("details") == 1 and not page.open
    assert page.text.count(evil) == 4
    assert {name for name, _ in page.attributes} <= {"class", "style"}


def test_the_columns_of_a_chain(toy_tokenizer):
    """What cannot be printed is a dot; a latent beyond the chunks stands for none."""
    ids = toy_tokenizer.encode("a\x1b[2J b\n")
    assert printable(toy_tokenizer, ids) == "a·[2J·b·"
    columns = heaviest_tokens(torch.full((1, 3), 0.2), torch.tensor([ids[:3]]), toy_tokenizer)
    assert [text for text, _ in columns[0]] == ["a", "·", "["]
    ids = torch.tensor([[40, 41], [42, 43]])
    html = strip(torch.full((2, 2), 0.5), ids, torch.tensor([[40, -1]]), toy_tokenizer)
    assert "<b>(<small>1</small></b>" in html and "<b>–<small>2</small></b>" in html


def test_a_table_has_a_dash_for_nothing_and_text_for_markup():
    html = table({"<a>": {"x": None, "y": [0.25, 12.5]}, "b": {"x": 3, "y": "<b>"}})
    assert "<td>x<td>–<td>3" in html and "<td>y<td>0.250 – 12.5<td>&lt;b&gt;" in html
    assert "<th>&lt;a&gt;" in html and not Page(html).open


def test_chart_breaks_at_nothing():
    svg = chart({"a": [None, 0.5, 1.0], "b": [None] * 3}, [0, 1, 2])
    assert svg.count("<circle") == 2 and "nan" not in svg.lower()
    assert Page(chart({"a": []})).open == []
    svg = chart({"a": [0.2, 0.6]}, [1, 2])  # the axis goes from 0 to 0.8
    assert ">0.8<" in svg and 'points="36.0,132.0 352.0,52.0"' in svg


def test_latents_do_the_work_only_where_the_intervals_are_apart():
    controls = {"accuracy": {"own": 0.75, "shuffled": 0.25},
                "interval": {"own": [0.5, 0.9], "shuffled": [0.1, 0.4]}}
    assert verdict(controls) == "costs 50 points"
    controls["interval"]["shuffled"][1] = 0.5
    assert "do nothing" in verdict(controls)
