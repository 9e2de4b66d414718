"""graphs.py - CUDA graphs: the kernels of a function are captured once, then launched together.

Python needs more time to launch a small kernel than it takes to run. Captured code must not synchronise, has static
shapes, and reads and writes the same memory at every replay.
"""
import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat

WARM = 2    # eager calls before the capture: they create gradients, optimizer states, workspaces
MODE = "thread_local"    # other threads may use CUDA during a capture: those that pin memory
COMPILED = 20e6    # parameters from which compiling pays for a minute of it


def compiled(loss_of, **options):
    """The loss as fused kernels. A call of einops is one node of the graph: tracing is three times as fast."""
    torch._dynamo.allow_in_graph([rearrange, reduce, repeat])
    return torch.compile(loss_of, fullgraph=True, **options)


class Replayed:
    """A function of whole numbers, the key, that works in place, on static tensors. If `active`, one CUDA graph a key.
    torch.manual_seed before a call seeds the replay, too."""

    def __init__(self, function, active):
        self.function, self.active, self.calls, self.graphs = function, active, {}, {}
        if active:
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, *key):
        if not self.active:
            return self.function(*key)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARM:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.function(*key)
            torch.cuda.current_stream().wait_stream(self.stream)
            return
        if key not in self.graphs:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool, stream=self.stream, capture_error_mode=MODE):
                self.function(*key)
        self.graphs[key].replay()


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
