"""One base model, many adapters, behind an OpenAI-style endpoint.

Doors: `config.ServeSettings`, `run.serve`.
"""
