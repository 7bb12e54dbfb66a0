// The low-rank updates of adapters.
#pragma once

#include "vectors.h"

// The rows of one adapter, and its update of this layer: y[first:last] += scale * (x aᵀ) b. Rank 0:
// none. Rows with several adapters are in several groups, and each adds its own update.
struct AdapterRows {
  int64_t first, last, rank;
  const float* a;  // [in, rank], and 16 floats more that may be read and are not used
  const float* b;  // [out / 16 rounded up, rank, 16], with the scaling in it: read in one sweep
  float scale;     // the request's own factor
};

namespace {

// A piece of the low-rank products: up to 16 components of some rows of one group.
struct LowItem {
  int64_t layer, group, component, first, last;
  float* low;  // of the group's first row: [rows, rank]
};

// Sums that the components of a row are spread over: one row alone would wait for each of its sums. As
// many for any number of rows, so that a row's result is the same to the last bit in any company.
constexpr int kSums = 4;

// Floats by which the memory is asked ahead for an adapter's first matrix: 4 kB.
constexpr int64_t kLowAhead = 1024;

template <int ROWS>
inline void low_rows(const float* x, int64_t in, const float* a, int64_t rank, int64_t width,
                     float* low) {
  Vector sums[ROWS][kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= in; i += kSums)
    for (int k = 0; k < kSums; ++k) {
      const Vector weights = load(a + (i + k) * rank);
      __builtin_prefetch(a + (i + k) * rank + kLowAhead, 0, 2);
      for (int r = 0; r < ROWS; ++r) sums[r][k] += weights * x[r * in + i + k];
    }
  for (; i < in; ++i)
    for (int r = 0; r < ROWS; ++r) sums[r][0] += load(a + i * rank) * x[r * in + i];
  for (int r = 0; r < ROWS; ++r) {
    Vector total = sums[r][0];
    for (int k = 1; k < kSums; ++k) total += sums[r][k];
    float whole[kWidth];
    store(whole, total);
    std::memcpy(low + r * rank, whole, width * sizeof(float));
  }
}

constexpr int64_t kLowRows = 6;  // times kSums: in the registers

template <int ROWS>
void low_remaining(const float* x, int64_t rows, int64_t in, const float* a, int64_t rank,
                   int64_t width, float* low) {
  if constexpr (ROWS > 0) {
    if (rows == ROWS) return low_rows<ROWS>(x, in, a, rank, width, low);
    low_remaining<ROWS - 1>(x, rows, in, a, rank, width, low);
  }
}

// low = x a, for the item's rows and components.
inline void low_product(const float* x, int64_t in, const AdapterRows& group,
                        const LowItem& item) {
  const int64_t rows = item.last - item.first, width = std::min(kWidth, group.rank - item.component);
  low_remaining<kLowRows>(x + item.first * in, rows, in, group.a + item.component, group.rank,
                          width, item.low + (item.first - group.first) * group.rank + item.component);
}

// Adds one group's update of the `width` outputs from `at` to ROWS rows.
template <int ROWS>
inline void update_rows(const float* low, int64_t rank, const float* b, float scale, float* y,
                        int64_t out, int64_t width) {
  Vector sums[ROWS][kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= rank; c += kSums)
    for (int k = 0; k < kSums; ++k) {
      const Vector weights = load(b + (c + k) * kWidth);
      for (int r = 0; r < ROWS; ++r) sums[r][k] += weights * low[r * rank + c + k];
    }
  for (; c < rank; ++c)
    for (int r = 0; r < ROWS; ++r) sums[r][0] += load(b + c * kWidth) * low[r * rank + c];
  for (int r = 0; r < ROWS; ++r, y += out) {
    Vector total = sums[r][0];
    for (int k = 1; k < kSums; ++k) total += sums[r][k];
    total *= scale;
    if (width == kWidth) {
      store(y, load(y) + total);
    } else {
      for (int64_t j = 0; j < width; ++j) y[j] += total[j];
    }
  }
}

constexpr int64_t kUpdatedRows = 4;

// Adds one group's update of the `width` outputs from `at`, a multiple of 16, to all its rows.
inline void add_update(const AdapterRows& group, const float* low, float* y, int64_t out,
                       int64_t at, int64_t width) {
  const float* b = group.b + at * group.rank;
  const int64_t rank = group.rank;
  y += group.first * out + at;
  int64_t rows = group.last - group.first;
  for (; rows >= kUpdatedRows; rows -= kUpdatedRows) {
    update_rows<kUpdatedRows>(low, rank, b, group.scale, y, out, width);
    low += kUpdatedRows * rank;
    y += kUpdatedRows * out;
  }
  for (; rows > 0; --rows, low += rank, y += out)
    update_rows<1>(low, rank, b, group.scale, y, out, width);
}

// Asks for what a chunk's updates will read, while its main product is computed.
inline void fetch_updates(const AdapterRows* groups, int64_t count, int64_t first, int64_t last) {
  for (int64_t g = 0; g < count; ++g) {
    const int64_t rank = groups[g].rank;
    for (int64_t at = first * rank; at < last * rank; at += kWidth)
      __builtin_prefetch(groups[g].b + at, 0, 2);
  }
}

}  // namespace
