// Weights of 4 or 8 bits, in panels.
#pragma once

#include "stream.h"

// A panel of codes with a scale for each group of inputs: the weight of input i and an output is
// table[code] * scale + offset, or code * scale + offset with 8 bits. That is NF4 (arXiv:2305.14314),
// where there is no offset, and GPTQ (arXiv:2210.17323), where it is -scale * zero point and the table
// counts; there the product is exact in float32, since scales have 11 bits and codes at most 8.
struct Coded {
  // [in * BITS / 32, 2, 16]: a word holds 32 / BITS inputs of one output, the first in its lowest bits.
  const int32_t* codes;
  const float* scales;       // [count, 32]
  const float* offsets;      // [count, 32], or null for none
  const float* table;        // [16]
  int64_t in, count, shift;  // input i is in group i >> shift

  // These are of the first panel; gives another.
  Coded panel(int64_t p, int64_t bits) const {
    const int64_t groups = p * count * kPanel;
    return {codes + p * in * kPanel * bits / 32, scales + groups,
            offsets ? offsets + groups : nullptr, table, in, count, shift};
  }
};

// The outputs of one panel, `width` of them, for all rows; `bits` is 4 or 8. While those beyond the first
// few are computed, the memory is asked for what `stream` holds.
void coded_product(const float* x, int64_t rows, const Coded& w, int64_t bits, Stream& stream, const float* bias,
                   float* y, int64_t out, int64_t width);

// The weights of one panel as floats: [in, 32].
void decode_panel(const Coded& w, int64_t bits, float* panel);
