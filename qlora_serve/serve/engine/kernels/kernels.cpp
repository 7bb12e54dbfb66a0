// Decoding kernels for float32 on a CPU.
//
// A decoding step multiplies every weight of the model with a handful of rows, one a sequence. The
// libraries behind torch are made for larger matrices; here each weight is read from memory once and
// multiplied with all rows while it is in a register, which comes close to what the memory allows.
//
// Plain C interface, no torch headers: it compiles in a second and is called through ctypes. The
// vectors are GCC's and Clang's own extension, so the same source serves AVX-512, AVX2 and NEON.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kWidth = 16;  // floats in a vector
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// By halves: adding one element after the other would take longer than the products of a tile.
inline float sum(Vector v) {
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vector total = {};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) total += load(a + i) * load(b + i);
  float s = sum(total);
  for (; i < n; ++i) s += a[i] * b[i];
  return s;
}

// y += factor * x
inline void add_scaled(float* y, const float* x, float factor, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, load(y + i) + load(x + i) * factor);
  for (; i < n; ++i) y[i] += x[i] * factor;
}

// Where a tile's weights come from: 16 neighbours of one output's row, as floats.
struct FloatWeights {
  const float* w;  // [out, in]
  int64_t in;

  Vector at(int64_t o, int64_t i) const { return load(w + o * in + i); }
  float one(int64_t o, int64_t i) const { return w[o * in + i]; }
  void prefetch(int64_t o, int64_t i) const { __builtin_prefetch(w + o * in + i); }
};

// NF4 (arXiv:2305.14314) as bitsandbytes stores it: two codes a byte, the first in the high half, and
// a scale for each 64 weights. `in` is a multiple of 64.
struct Nf4Weights {
  const uint8_t* codes;  // [out, in / 2]
  const float* scales;   // [out, in / 64]
  const float* table;    // [16]
  int64_t in;

  Vector at(int64_t o, int64_t i) const {
    typedef uint64_t Longs __attribute__((vector_size(64)));
    typedef int32_t Ints __attribute__((vector_size(64)));
    uint64_t eight;  // bytes: the codes of 16 weights
    std::memcpy(&eight, codes + (o * in + i) / 2, sizeof eight);
    const Longs first = {4, 12, 20, 28, 36, 44, 52, 60}, second = {0, 8, 16, 24, 32, 40, 48, 56};
    const Longs all = Longs{} + eight;
    // A lane of 64 bits holds two neighbours, the first in its lower half.
    const Longs pairs = ((all >> first) & 15) | (((all >> second) & 15) << 32);
    Ints index;
    std::memcpy(&index, &pairs, sizeof index);
#if defined(__clang__)
    Vector value;
    for (int64_t j = 0; j < kWidth; ++j) value[j] = table[index[j]];
#else
    const Vector value = __builtin_shuffle(load(table), index);
#endif
    return value * scales[(o * in + i) / 64];
  }
  float one(int64_t, int64_t) const { return 0; }  // `in` leaves no rest
  void prefetch(int64_t, int64_t) const {}
};

// ROWS inputs times OUTS weight rows, with every partial sum in a register.
template <int ROWS, int OUTS, typename Weights>
inline void tile(const float* x, const Weights& w, const float* bias, float* y, int64_t out,
                 int64_t first) {
  const int64_t in = w.in;
  Vector partial[OUTS][ROWS] = {};
  int64_t i = 0;
  for (; i + kWidth <= in; i += kWidth) {
    Vector weights[OUTS];
    for (int o = 0; o < OUTS; ++o) {
      weights[o] = w.at(first + o, i);
      // The next tile's weights: the processor's own prefetching does not see that far.
      w.prefetch(first + o + OUTS, i);
    }
    for (int r = 0; r < ROWS; ++r) {
      const Vector input = load(x + r * in + i);
      for (int o = 0; o < OUTS; ++o) partial[o][r] += weights[o] * input;
    }
  }
  for (int o = 0; o < OUTS; ++o)
    for (int r = 0; r < ROWS; ++r) {
      float s = sum(partial[o][r]);
      for (int64_t j = i; j < in; ++j) s += w.one(first + o, j) * x[r * in + j];
      y[r * out + first + o] = s + (bias ? bias[first + o] : 0.0f);
    }
}

template <int ROWS, typename Weights>
void outputs(const float* x, const Weights& w, const float* bias, float* y, int64_t out,
             int64_t first, int64_t last) {
  // As many weight rows at a time as leave the partial sums in 32 registers.
  constexpr int kOuts = ROWS <= 2 ? 8 : ROWS <= 4 ? 6 : ROWS <= 6 ? 4 : 3;
  for (; first + kOuts <= last; first += kOuts) tile<ROWS, kOuts>(x, w, bias, y, out, first);
  for (; first < last; ++first) tile<ROWS, 1>(x, w, bias, y, out, first);
}

template <typename Weights>
void outputs_of_rows(const float* x, int64_t rows, const Weights& w, const float* bias, float* y,
                     int64_t out, int64_t first, int64_t last) {
  for (; rows >= 8; rows -= 8, x += 8 * w.in, y += 8 * out)
    outputs<8>(x, w, bias, y, out, first, last);
  switch (rows) {
    case 7: return outputs<7>(x, w, bias, y, out, first, last);
    case 6: return outputs<6>(x, w, bias, y, out, first, last);
    case 5: return outputs<5>(x, w, bias, y, out, first, last);
    case 4: return outputs<4>(x, w, bias, y, out, first, last);
    case 3: return outputs<3>(x, w, bias, y, out, first, last);
    case 2: return outputs<2>(x, w, bias, y, out, first, last);
    case 1: return outputs<1>(x, w, bias, y, out, first, last);
    default: return;
  }
}

constexpr int64_t kChunk = 48;  // outputs that one thread computes at a time; a multiple of 16

// The rows of one adapter, and its update of this layer: y[first:last] += (x aᵀ) b. Rank 0: none.
struct AdapterRows {
  int64_t first, last, rank;
  const float* a;  // [rank, in]
  const float* b;  // [out / 16 rounded up, rank, 16], with the scaling in it: read in one sweep
};

// A piece of the low-rank products: some components of one group.
struct LowItem {
  int64_t group, first, last, offset;
};

// Adds one group's update of the `width` outputs from `at`, a multiple of 16.
inline void add_update(const AdapterRows& group, const float* low, float* y, int64_t out,
                       int64_t at, int64_t width) {
  const float* b = group.b + at * group.rank;
  for (int64_t row = group.first; row < group.last; ++row, low += group.rank) {
    Vector total = {};
    for (int64_t r = 0; r < group.rank; ++r) total += load(b + r * kWidth) * low[r];
    float* to = y + row * out + at;
    if (width == kWidth) {
      store(to, load(to) + total);
    } else {
      for (int64_t j = 0; j < width; ++j) to[j] += total[j];
    }
  }
}

constexpr int64_t kLowChunk = 8;

// y = x wᵀ + bias, plus each adapter's update of its own rows; see linear_f32.
template <typename Weights>
void linear(const float* x, int64_t rows, const Weights& w, const float* bias, float* y,
            int64_t out, const AdapterRows* groups, int64_t count, float* low) {
  const int64_t in = w.in;
  std::vector<LowItem> items;
  std::vector<int64_t> offsets(count);
  for (int64_t g = 0, offset = 0; g < count; ++g) {
    offsets[g] = offset;
    for (int64_t first = 0; first < groups[g].rank; first += kLowChunk)
      items.push_back({g, first, std::min(first + kLowChunk, groups[g].rank), offset});
    offset += (groups[g].last - groups[g].first) * groups[g].rank;
  }
#pragma omp parallel
  {
    if (!items.empty()) {
#pragma omp for schedule(static)
      for (size_t i = 0; i < items.size(); ++i) {
        const LowItem& item = items[i];
        const AdapterRows& group = groups[item.group];
        outputs_of_rows(x + group.first * in, group.last - group.first,
                        FloatWeights{group.a, in}, nullptr, low + item.offset, group.rank,
                        item.first, item.last);
      }
    }
    // Dynamic: on a shared machine one core may be slower than the other for a while.
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < (out + kChunk - 1) / kChunk; ++chunk) {
      const int64_t first = chunk * kChunk, last = std::min(first + kChunk, out);
      outputs_of_rows(x, rows, w, bias, y, out, first, last);
      for (int64_t g = 0; g < count; ++g)
        for (int64_t at = first; groups[g].rank > 0 && at < last; at += kWidth)
          add_update(groups[g], low + offsets[g], y, out, at, std::min(kWidth, last - at));
    }
  }
}

}  // namespace

extern "C" {

// y = x wᵀ + bias, plus each adapter's update of its own rows.
//   x [rows, in], w [out, in], bias [out] or null, y [rows, out]
//   groups [count]; low: scratch for the sum over groups of (last - first) * rank floats
void linear_f32(const float* x, int64_t rows, int64_t in, const float* w, const float* bias,
                float* y, int64_t out, const AdapterRows* groups, int64_t count, float* low) {
  linear(x, rows, FloatWeights{w, in}, bias, y, out, groups, count, low);
}

// The same for NF4 weights: codes [out, in / 2], scales [out, in / 64], table [16].
void linear_nf4(const float* x, int64_t rows, int64_t in, const uint8_t* codes,
                const float* scales, const float* table, const float* bias, float* y, int64_t out,
                const AdapterRows* groups, int64_t count, float* low) {
  linear(x, rows, Nf4Weights{codes, scales, table, in}, bias, y, out, groups, count, low);
}

// One new token of one sequence.
struct DecodeRow {
  int64_t row;           // in the flat query, key, value and output
  int64_t position;      // of the token
  const int64_t* table;  // the block of the cache that holds each kBlock positions of the sequence
};

constexpr int64_t kBlock = 16;  // tokens of a block; scheduler.py has the same number

// Stores each row's key and value in its sequence's blocks and attends to them.
//   query [heads, dim], key and value [kv_heads, dim] of a row, `*_head` and `*_row` apart
//   cache [blocks, 2, kv_heads, kBlock, dim]: keys, then values; output [row, heads, dim]
//   window: tokens that a query sees, 0 for all; softcap: 0 for none
void decode_attention_f32(const float* query, int64_t query_head, int64_t query_row,
                          const float* key, int64_t key_head, int64_t key_row, const float* value,
                          int64_t value_head, int64_t value_row, float* cache, float* output,
                          int64_t heads, int64_t kv_heads, int64_t dim, float scale,
                          int64_t window, float softcap, const DecodeRow* rows, int64_t count) {
  const int64_t group = heads / kv_heads;
  const int64_t half = kv_heads * kBlock * dim;  // from a block's keys to its values
#pragma omp parallel
  {
    std::vector<float> scores;
#pragma omp for collapse(2) schedule(static)
    for (int64_t r = 0; r < count; ++r)
      for (int64_t kv = 0; kv < kv_heads; ++kv) {
        const DecodeRow& row = rows[r];
        const auto at = [&](int64_t t) {  // the key of a token
          return cache + row.table[t / kBlock] * 2 * half + (kv * kBlock + t % kBlock) * dim;
        };
        float* own = at(row.position);
        std::memcpy(own, key + kv * key_head + row.row * key_row, dim * sizeof(float));
        std::memcpy(own + half, value + kv * value_head + row.row * value_row,
                    dim * sizeof(float));
        const int64_t end = row.position + 1;
        const int64_t begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
        scores.resize(end - begin);
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
          const float* q = query + h * query_head + row.row * query_row;
          float largest = -INFINITY;
          for (int64_t t = begin; t < end; ++t) {
            float s = dot(q, at(t), dim) * scale;
            if (softcap > 0) s = std::tanh(s / softcap) * softcap;
            scores[t - begin] = s;
            largest = std::max(largest, s);
          }
          float total = 0;
          for (float& s : scores) total += s = std::exp(s - largest);
          float* to = output + (row.row * heads + h) * dim;
          std::fill(to, to + dim, 0.0f);
          for (int64_t t = begin; t < end; ++t)
            add_scaled(to, at(t) + half, scores[t - begin] / total, dim);
        }
      }
  }
}

}  // extern "C"
