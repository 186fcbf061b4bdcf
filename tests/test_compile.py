"""With torch.compile two graphs serve a kind of mask, whatever the width; decoding makes none.

The scripts run as they are, evaluations included. The backend here runs the captured graphs as they
are: what is counted is Dynamo's work, which no backend changes.
"""
from typing import NamedTuple

import torch
import torch._dynamo as dynamo

from conftest import pipeline


class Call(NamedTuple):
    width: int      # slots
    training: bool
    graphs: int     # that there were after it


class Watch:
    """torch.compile that counts its graphs, and compares each compiled call to a plain one."""

    def __init__(self, monkeypatch):
        self.compiler, self.graphs, self.calls = torch.compile, [], []
        dynamo.reset()
        dynamo.utils.counters.clear()
        monkeypatch.setattr(torch, "compile", self.compile)

    def backend(self, graph, inputs):
        self.graphs.append(graph)
        return graph

    def compile(self, function, **options):
        compiled = self.compiler(function, backend=self.backend, **options)

        def compared(x, *others):
            with torch.no_grad():
                plain = function(x, *others)
            found = compiled(x, *others)
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)
            self.calls.append(Call(x.size(1), torch.is_grad_enabled(), len(self.graphs)))
            return found

        return compared


def test_two_graphs_serve_all_layers_widths_and_models(tmp_path, monkeypatch):
    """One for the last block, which goes on with a few slots alone, and one for the others.

    Both are made in a loop's first update: the causal mask's in the first loop, those of the masks
    of phase 1, one a problem, in that one; those of on-policy passes, without gradient, in phase 3.
    """
    watch = Watch(monkeypatch)
    pipeline(tmp_path, sup=["--n-layer", 3, "--compile"],
             latent=["--on-policy", 0.5, "--compile"])
    training = [call for call in watch.calls if call.training]
    assert any(call.width == 1 for call in watch.calls)  # decoding went through them, too
    # passes: of 4 updates; of the encoder in 4, and of the LLM in each half of the batch in 3; of 4
    loops = training[:4 * 3], training[4 * 3:14 * 3], training[14 * 3:]
    for loop, graphs in zip(loops, ([1] * 2 + [2] * 10, [3] * 2 + [4] * 28, [6] * 12)):
        assert [call.graphs for call in loop] == graphs
        assert len({call.width for call in loop}) > 1
    assert len(watch.graphs) == 6 and not dynamo.utils.counters["graph_break"]
