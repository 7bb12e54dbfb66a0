"""Models and adapters as GGUF, for llama.cpp and Ollama.

Doors: `model.write_model`, `adapter.write_adapter`, `check.check_model`,
`modelfile.write_modelfile`. Names and quantizers are the `gguf` library's own.
"""
