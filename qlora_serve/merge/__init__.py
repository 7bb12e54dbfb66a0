"""The merge room: an adapter and its unquantized base become one proven full model.

Door: `run.merge_adapter`. `sources` chooses the base, `bake` puts the adapter into its weights,
`export` writes a model directory, `proof` compares what was written with the adapter.
"""
