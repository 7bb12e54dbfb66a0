"""The front door: one module a command, each importing its room only when it is called.

Door: `main.main`.
"""
