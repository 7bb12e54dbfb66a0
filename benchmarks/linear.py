"""The linear layers of SmolLM2-135M once, by different kernels, in turns: milliseconds by rows.

.venv/bin/python benchmarks/linear.py
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_serve.serve.engine.coded import CodedWeights
from qlora_serve.serve.engine.embedding import PanelEmbedding
from qlora_serve.serve.engine.host_memory import Arena
from qlora_serve.serve.engine.kernels.native import Kernels, load_kernels
from qlora_serve.serve.engine.linear import CodedLinear, FastLinear, NativeLinear, PanelLinear

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
SHAPES = [shape for _ in range(30) for shape in LAYER] + [(49152, 576)]
ROWS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 9


def main() -> None:
    """Prints a line for each number of rows."""
    kernels = load_kernels()
    assert kernels is not None, "the native kernels could not be built"
    layers = [FastLinear(nn.Linear(i, o, bias=False), kernels) for o, i in SHAPES]
    arena = Arena()
    layers[-1].weight.data = arena.copy(layers[-1].weight.data)
    panels = {id(layer): PanelLinear(layer, kernels, arena) for layer in layers}
    # The output head of a quantized base stays in float32.
    head = {id(layers[-1]): panels[id(layers[-1])]}
    coded = head | {id(layer): coded_like(layer, kernels, arena) for layer in layers[:-1]}

    def by(kind: Mapping[int, NativeLinear]) -> Callable[[FastLinear, Tensor], Tensor]:
        # Called directly, so that it is measured also where the engine would not use it.
        return lambda layer, x: kind.get(id(layer), layer).updated(x, None, 0)

    ways: dict[str, Callable[[FastLinear, Tensor], Tensor]] = {
        "F.linear": lambda layer, x: F.linear(x, layer.weight),
        "mm(W, x^T)": lambda layer, x: torch.mm(layer.weight, x[0].t()).t().contiguous(),
        "rows": by({}),
        "panels": by(panels),
        "4 bits": by(coded),
    }
    print("rows  " + "  ".join(f"{name:>10}" for name in ways))
    with torch.inference_mode():
        for rows in ROWS:
            inputs = {width: torch.randn(1, rows, width) for width in (576, 1536)}
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    start = time.perf_counter()
                    for layer in layers:
                        way(layer, inputs[layer.in_features])
                    times[name].append((time.perf_counter() - start) * 1e3)
            medians = "  ".join(f"{statistics.median(t):10.1f}" for t in times.values())
            print(f"{rows:>4}  {medians}")
        head_and_look_up(layers, panels, kernels)


def head_and_look_up(
    layers: list[FastLinear], panels: Mapping[int, PanelLinear], kernels: Kernels
) -> None:
    """Prints the times of the output head and of the input embedding that shares its weight.

    All other layers are computed before each, so that nothing of the weight is near.
    """
    *others, head = layers
    in_panels, embedding = panels[id(head)], nn.Embedding(*SHAPES[-1], _weight=head.weight)
    look_up = PanelEmbedding(embedding, in_panels.panels, kernels)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "head, rows": lambda x, _: head(x),
        "panels": lambda x, _: in_panels(x),
        "look up": lambda _, ids: embedding(ids),
        "in panels": lambda _, ids: look_up(ids),
    }
    print("\nrows  " + "  ".join(f"{name:>10}" for name in ways))
    for rows in (*ROWS, 192):
        inputs = {width: torch.randn(1, rows, width) for width in (576, 1536)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                for layer in others:
                    panels[id(layer)](inputs[layer.in_features][:, :1])
                ids = torch.randint(embedding.num_embeddings, (1, rows))
                start = time.perf_counter()
                way(inputs[head.in_features], ids)
                times[name].append((time.perf_counter() - start) * 1e3)
        print(f"{rows:>4}  " + "  ".join(f"{statistics.median(t):10.3f}" for t in times.values()))


def coded_like(layer: FastLinear, kernels: Kernels, arena: Arena) -> CodedLinear:
    """A layer of the same shape with random codes of 4 bits in groups of 64, as of GPTQ."""
    outside, inside = layer.out_features, layer.in_features
    weights = CodedWeights(
        bits=4,
        codes=arena.copy(torch.randint(2**31, (outside // 32, inside // 8, 32), dtype=torch.int32)),
        scales=arena.copy(torch.randn(outside // 32, inside // 64, 32)),
        offsets=arena.copy(torch.randn(outside // 32, inside // 64, 32)),
        table=torch.arange(16, dtype=torch.float32),
        shift=6,
        order=None,
        out_features=outside,
    )
    return CodedLinear(weights, None, kernels)


if __name__ == "__main__":
    main()
