"""The engine: requests in, events out.

Door: `engine.Engine`, with `request` for what goes in and comes out and `registry` for adapters.
"""
