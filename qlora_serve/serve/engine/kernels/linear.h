// A linear layer with the updates of adapters.
#pragma once

#include "coded.h"
#include "updates.h"

// y = x wᵀ + bias, plus each adapter's update of its own rows: x [rows, in], y [rows, out].
struct Linear {
  enum Kind : int64_t { kNone, kRowMajor, kPanels, kCoded } kind;  // of the weights; kNone for the updates alone
  const float* x;
  const float* low_x;  // what the adapters multiply: x, unless the weights are for its columns in another order
  int64_t rows, in;
  const float* weights;  // [out, in], or in panels
  Coded codes;
  int64_t bits;
  const float* bias;  // [out], or null
  float* y;
  int64_t out;
  const AdapterRows* groups;  // [count]
  int64_t count;

  static Linear row_major(const float* x, int64_t rows, int64_t in, const float* w, const float* bias, float* y,
                          int64_t out, const AdapterRows* groups, int64_t count) {
    return {kRowMajor, x, x, rows, in, w, {}, 0, bias, y, out, groups, count};
  }
  static Linear panels(const float* x, int64_t rows, int64_t in, const float* panels, const float* bias, float* y,
                       int64_t out, const AdapterRows* groups, int64_t count) {
    return {kPanels, x, x, rows, in, panels, {}, 0, bias, y, out, groups, count};
  }
  static Linear coded(const float* x, const float* low_x, int64_t rows, const Coded& codes, int64_t bits,
                      const float* bias, float* y, int64_t out, const AdapterRows* groups, int64_t count) {
    return {kCoded, x, low_x, rows, codes.in, nullptr, codes, bits, bias, y, out, groups, count};
  }
  static Linear updates(const float* x, int64_t rows, int64_t in, float* y, int64_t out, const AdapterRows* groups,
                        int64_t count) {
    return {kNone, x, x, rows, in, nullptr, {}, 0, nullptr, y, out, groups, count};
  }
};

// Computes layers that do not need each other's outputs, as one job.
void compute(const Linear* layers, int64_t count);
