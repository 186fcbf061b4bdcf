"""The README's charts: where a mark stands, and that they show the committed figures."""
import json
import shutil
from xml.etree import ElementTree

import pytest

from conftest import ROOT
from lab import charts


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A folder with what the charts are drawn from."""
    for name in ("figures.json", "chain.txt", "parallel.txt"):
        shutil.copy(ROOT / "assets" / name, tmp_path)
    monkeypatch.setattr(charts, "ASSETS", tmp_path)
    return tmp_path


def dots(svg):
    return [(dot.get("cx"), dot.get("cy")) for dot in ElementTree.fromstring(svg).iter()
            if dot.tag.endswith("circle")]


def test_the_committed_charts_show_the_committed_figures(assets):
    charts.main([])
    assert len(list(assets.iterdir())) == 7
    for path in assets.iterdir():
        assert path.read_bytes() == (ROOT / "assets" / path.name).read_bytes()
        assert path.suffix != ".svg" or ElementTree.parse(path)


def test_a_dot_stands_where_the_scale_says():
    for accuracy, x in ((0.25, "397.5"), (0.5, "495.0")):  # between 300 and 690
        settings = {"top-1": {"seeds": {"0": {"accuracy": accuracy}}}}
        groups = [("Right?", 1, {"right": "accuracy"}, [("one token each", "warm", "top-1")])]
        assert [cx for cx, _ in dots(charts.bars(settings, "", groups))] == [x]
    at = charts.place
    assert at(60, 1, 0, 100) == (0, charts.TOP) and at(5, 0, 0, 100) == (100, charts.BOTTOM)
    assert at(30, 0, 0, 100)[0] == pytest.approx(100 - at(10, 0, 0, 100)[0])  # half is half
    data = {"text": {"steps": 60, "accuracy": [1]}, "no_cot": [0.3], "false": [0.1],
            "latent": [{"c": 4, "steps": 30, "accuracy": [0.5]}]}
    x, y = at(30, 0.5, 0, 100)
    assert dots(f"<svg>{charts.panel(0, 100, '', data)}</svg>")[1] == (f"{x:.1f}", f"{y:.1f}")


def test_a_sweep_replaces_its_settings_and_no_others(assets):
    before = json.loads((assets / "figures.json").read_text())
    new = {"top-1": {"flags": {}, "commit": "abc", "seeds": {"0": {"accuracy": 0.125}}}}
    (assets / "sweep.json").write_text(json.dumps(new))
    charts.main([str(assets / "sweep.json")])
    after = json.loads((assets / "figures.json").read_text())
    assert after == before | {"settings": before["settings"] | new}
    assert "0.125" in (assets / "parts.svg").read_text("utf-8")


def test_whose_tokens_stand_where():
    tokens = ["<<", "5", "-", "2", ">>·<<", "9", "+", "2", ">>·<<", "7", "=", "7", ">>"]
    written, latents, parallel = charts.holders(tokens, people=2)
    assert written[4:9] == [{">>·<<": [1]}, {"9": [1]}, {"+": [1]}, {"2": [1]}, {">>·<<": []}]
    assert latents[:3] == [{"<<": [0], "5": [0]}, {"-": [0], "2": [0]}, {">>·<<": [1], "9": [1]}]
    assert parallel[:3] == [{"<<": [0, 1], "5": [0], "9": [1]}, {"-": [0], "2": [0, 1], "+": [1]},
                            {}]
