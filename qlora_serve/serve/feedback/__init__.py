"""What people say of answers: experiments, votes and scores, kept in SQLite.

The doors: `experiment.Experiment` says who gets which variant, `store.FeedbackStore` keeps answers
and what was said of them, `results` counts, `export` gives rows to train on.
"""
