"""qlora-serve: train, serve and merge LoRA adapters."""

__version__ = "0.1.0"
