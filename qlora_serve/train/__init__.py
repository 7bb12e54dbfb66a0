"""Training: chats in, a checked adapter directory out.

Door: `run.train`, which takes a `config.TrainSettings`. `masks.tokenize_row` decides which tokens
count in the loss.
"""
