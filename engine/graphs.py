"""graphs.py - CUDA graphs: the kernels of a function are captured once, then launched together.

Python needs more time to launch a small kernel than it takes to run. Captured code must not synchronise, has static
shapes, and reads and writes the same memory at every replay.
"""
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

MODE = "thread_local"    # other threads may use CUDA during a capture: those that pin memory
INDUCTOR = {"triton.cudagraphs": True, "fallback_random": True}      # the random numbers are those of eager code


def compiled(net, **options):
    """A loss as fused kernels, launched as CUDA graphs. A call of einops is one node of the graph: tracing is three
    times as fast. Only the number of known tokens differs between calls: at most three graphs are traced."""
    torch._dynamo.allow_in_graph([rearrange, reduce, repeat])
    return torch.compile(net, fullgraph=True, **(options or {"options": INDUCTOR}))


class ReplayedSampling:
    """Sampler.shape_tokens: of each combination of shapes and options, the first call is eager, the second is captured
    and replayed, and so are later ones."""

    def __init__(self, function):
        self.function, self.graphs, self.pool = function, {}, torch.cuda.graph_pool_handle()

    def __call__(self, condition, keys, **options):
        condition = {kind: (F.pad(x, (0, 0, 0, -x.shape[1] % 8)), F.pad(mask, (0, -x.shape[1] % 8), value=False))
                     for kind, (x, mask) in condition.items()}                    # few lengths of prompts: few graphs
        tensors = [keys, *(x for pair in condition.values() for x in pair)]
        key = repr(([*condition], [x.shape for x in tensors], sorted(options.items(), key=str)))
        if key not in self.graphs:
            self.graphs[key] = None
            return self.function(condition, keys, **options)
        if self.graphs[key] is None:
            inputs, graph = [x.clone() for x in tensors], torch.cuda.CUDAGraph()
            own = dict(zip(condition, zip(inputs[1::2], inputs[2::2])))
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode=MODE):
                output = self.function(own, inputs[0], **options)
            self.graphs[key] = graph, inputs, output
        graph, inputs, output = self.graphs[key]
        for own, x in zip(inputs, tensors):
            own.copy_(x)
        graph.replay()
        return output.clone()
