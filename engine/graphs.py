"""graphs.py - CUDA graphs: the kernels of a function are captured once, then launched together.

Python needs more time to launch a small kernel than it takes to run. Captured code must not synchronise, has static
shapes, and reads and writes the same memory at every replay.
"""
import sys
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

MODE = "thread_local"    # other threads may use CUDA during a capture: those that pin memory
KEPT = 8    # graphs of sampling
INDUCTOR = {"triton.cudagraphs": True, "fallback_random": True}      # the random numbers are those of eager code


def compiled(net, **options):
    """A loss as fused kernels, launched as CUDA graphs. A call of einops is one node of the graph: tracing is three
    times as fast. Only the number of known tokens differs between calls: at most three graphs are traced."""
    torch._dynamo.allow_in_graph([rearrange, reduce, repeat])
    return torch.compile(net, fullgraph=True, **(options or {"options": INDUCTOR}))


class ReplayedSampling:
    """Sampler.shape_tokens: of each combination of shapes and options, the first call is eager, the second is captured
    and replayed, and so are later ones; of the KEPT combinations used last. If a capture fails, one line says so, and
    all calls are eager: random numbers depend on keys alone, so samples are the same."""

    def __init__(self, function):
        self.function, self.graphs, self.failed = function, OrderedDict(), False
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, condition, keys, **options):
        condition = {kind: (F.pad(x, (0, 0, 0, -x.shape[1] % 8)), F.pad(mask, (0, -x.shape[1] % 8), value=False))
                     for kind, (x, mask) in condition.items()}                    # few lengths of prompts: few graphs
        tensors = [keys, *(x for pair in condition.values() for x in pair)]
        key = repr(([*condition], [x.shape for x in tensors], sorted(options.items(), key=str)))
        graph = self.graph_of(key, condition, tensors, options)
        if graph is None:
            return self.function(condition, keys, **options)
        graph, inputs, output = graph
        for own, x in zip(inputs, tensors):
            own.copy_(x)
        graph.replay()
        return output.clone()

    def graph_of(self, key, condition, tensors, options):
        """-> a captured graph, its inputs and its output; None for an eager call."""
        if self.failed:
            return None
        if key not in self.graphs:
            self.graphs[key] = None
            if len(self.graphs) > KEPT:
                self.graphs.popitem(last=False)
            return None
        self.graphs.move_to_end(key)
        if self.graphs[key] is None:
            try:
                self.graphs[key] = self.capture(condition, tensors, options)
            except RuntimeError as error:                     # also when memory is too small for a graph
                self.failed = True
                self.graphs.clear()
                print(f"CUDA graphs cannot be used here ({first_line(error)}); sampling goes on without them, as with "
                      "--no-compile", file=sys.stderr)
        return self.graphs.get(key)

    def capture(self, condition, tensors, options):
        inputs, graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
        condition = dict(zip(condition, zip(inputs[1::2], inputs[2::2])))
        with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails leaves its own stream current
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode=MODE):
                output = self.function(condition, inputs[0], **options)
        return graph, inputs, output


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:100]
