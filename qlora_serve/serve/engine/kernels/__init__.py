"""Own CPU kernels for decoding in float32, built on first use.

Door: `native.load_kernels`. `kernels.cpp` says what each computes; torch is the reference and the
fallback wherever they cannot be built.
"""
