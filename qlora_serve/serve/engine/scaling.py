"""Working a scale into an adapter's weights, where it cannot be applied on top."""

from dataclasses import replace

from qlora_serve.adapters.weights import AdapterWeights


def scaled(weights: AdapterWeights, scale: float) -> AdapterWeights:
    """The adapter with every low-rank update's scaling multiplied, as PEFT's `scale_layer` does.

    For DoRA (arXiv:2402.09353): its gain, magnitude / ‖W + scaling * B A‖, holds for one scaling.
    """
    if scale == 1:
        return weights
    modules = {
        name: replace(pair, scaling=pair.scaling * scale) for name, pair in weights.modules.items()
    }
    return replace(weights, modules=modules)
