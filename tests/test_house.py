"""The house: who may import whom."""
import ast

import pytest

from conftest import ROOT

METHOD = ("model", "encoder", "losses", "decode", "toy")
SCRIPTS = ("train_sup", "compress", "train_latent", "analyze")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for path in [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py")]}


def imports(path):
    """The modules of this project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update([node.module, *(f"{node.module}.{name.name}" for name in node.names)])
    return found & FILES.keys()


GRAPH = {name: imports(path) for name, path in FILES.items()}


def reached(name):
    """All modules that importing this one imports, over however many steps."""
    found, todo = set(), [name]
    while todo:
        for other in GRAPH[todo.pop()] - found:
            found.add(other)
            todo.append(other)
    return found


@pytest.mark.parametrize("name", METHOD)
def test_the_method_needs_nothing_but_the_method(name):
    assert reached(name) <= set(METHOD)


def test_no_line_is_too_long():
    long = [f"{path}:{number}" for path in [*FILES.values(), *ROOT.glob("tests/*.py")]
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
            if len(line) > 100]
    assert long == []


def test_there_is_no_circle_and_no_import_of_a_script():
    for name in FILES:
        assert name not in reached(name)
        assert not GRAPH[name] & set(SCRIPTS)
