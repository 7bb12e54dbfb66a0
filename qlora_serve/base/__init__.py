"""What a base model is.

Doors: `source.locate_base` (name → files), `load.load_base` (the only `from_pretrained` of
weights), `skeleton.build_skeleton` (shapes without weights), `tokenizer` (chat template,
stop tokens), `identity.fingerprint`, `prepare.prepare_base`.
"""
