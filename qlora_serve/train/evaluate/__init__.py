"""Base and adapters on held-out rows.

Door: `run.evaluate`, which takes a `config.EvalSettings`. `answers` asks the models, `scores` looks
at each row, `statistics` says what the differences are worth.
"""
