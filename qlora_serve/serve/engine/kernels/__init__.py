"""Own CPU kernels for decoding in float32, built on first use.

Door: `native.load_kernels`. the sources say what each computes; torch is the reference and the
fallback wherever they cannot be built.
"""
