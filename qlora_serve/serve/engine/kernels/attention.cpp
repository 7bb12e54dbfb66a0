// Attention over a paged cache for float32 on a CPU: decoding and prompts alike.
//
// A block of the cache holds 16 tokens, as many as a vector has floats. Its keys are stored dimension
// by dimension, [dim, 16], so that one product gives a query's scores of 16 tokens and nothing is added
// up across a vector; its values are stored token by token, [16, dim].

#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t kBlock = kWidth;  // tokens of a block; scheduler.py has the same number

// The new tokens of one sequence.
struct Span {
  int64_t first;         // its first row in the flat query, key, value and output
  int64_t count;         // new tokens
  int64_t start;         // the position of the first of them
  const int64_t* table;  // the block of the cache that holds each kBlock positions
};

struct Cache {
  float* data;  // [blocks, 2, kv_heads, kBlock * dim]: keys, then values
  int64_t kv_heads, dim;

  float* keys(int64_t block, int64_t head) const {
    return data + (block * 2 * kv_heads + head) * kBlock * dim;
  }
  float* values(int64_t block, int64_t head) const {
    return data + ((block * 2 + 1) * kv_heads + head) * kBlock * dim;
  }
};

// A tensor of heads and rows whose last dimension is contiguous.
struct Rows {
  const float* data;
  int64_t head, row;  // floats from one to the next

  const float* at(int64_t h, int64_t r) const { return data + h * head + r * row; }
};

// Scores of ROWS queries for BLOCKS blocks in a row. The queries lie side by side, [dim, ROWS]. Meanwhile the memory is
// asked for `next`, as large: blocks lie anywhere, so that the processor cannot know.
template <int ROWS, int BLOCKS>
inline void score(const float* queries, const float* const* keys, const float* const* next,
                  int64_t dim, float scale, float* const* scores) {
  Vector sums[BLOCKS][ROWS] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Vector key[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) {
      key[b] = load(keys[b] + d * kBlock);
      __builtin_prefetch(next[b] + d * kBlock);
    }
    for (int r = 0; r < ROWS; ++r) {
      const float number = queries[d * ROWS + r];
      for (int b = 0; b < BLOCKS; ++b) sums[b][r] += key[b] * number;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int b = 0; b < BLOCKS; ++b) store(scores[r] + b * kBlock, sums[b][r] * scale);
}

#if defined(__AVX512F__)
constexpr int kRegisters = 24;  // sums at a time
#else
constexpr int kRegisters = 8;
#endif

// Scores of `rows` ≤ ROWS queries for all their blocks. `packed` has room for dim * ROWS floats.
template <int ROWS>
void score_all(int64_t rows, const float* const* queries, float* packed, const Cache& cache, int64_t head,
               const int64_t* table, int64_t blocks, float scale, float* const* scores) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS)
      return score_all<ROWS - 1>(rows, queries, packed, cache, head, table, blocks, scale, scores);
    constexpr int kTogether = ROWS * 4 <= kRegisters ? 4 : ROWS * 2 <= kRegisters ? 2 : 1;
    for (int64_t d = 0; d < cache.dim; ++d)
      for (int r = 0; r < ROWS; ++r) packed[d * ROWS + r] = queries[r][d];
    // What is needed after the keys of the block before `b`: the next keys, and then the first values.
    const auto after = [&](int64_t b) -> const float* {
      return b < blocks ? cache.keys(table[b], head) : cache.values(table[(b - blocks) % blocks], head);
    };
    const float *keys[kTogether], *next[kTogether];
    float* to[ROWS];
    std::copy(scores, scores + ROWS, to);
    int64_t b = 0;
    for (; b + kTogether <= blocks; b += kTogether) {
      for (int k = 0; k < kTogether; ++k) {
        keys[k] = cache.keys(table[b + k], head);
        next[k] = after(b + kTogether + k);
      }
      score<ROWS, kTogether>(packed, keys, next, cache.dim, scale, to);
      for (int r = 0; r < ROWS; ++r) to[r] += kTogether * kBlock;
    }
    for (; b < blocks; ++b) {
      keys[0] = cache.keys(table[b], head);
      next[0] = after(b + 1);
      score<ROWS, 1>(packed, keys, next, cache.dim, scale, to);
      for (int r = 0; r < ROWS; ++r) to[r] += kBlock;
    }
  }
}

// What ROWS queries see of VECTORS * 16 dimensions of the values from `d`, times 1 / total.
template <int ROWS, int VECTORS>
inline void weigh(const float* const* weights, const float* totals, const Cache& cache, int64_t head,
                  const int64_t* table, int64_t blocks, int64_t d, float* const* outputs) {
  Vector sums[ROWS][VECTORS] = {};
  for (int64_t b = 0; b < blocks; ++b) {
    const float* values = cache.values(table[b], head) + d;
    const float* next = cache.values(table[std::min(b + 1, blocks - 1)], head) + d;
    for (int64_t t = 0; t < kBlock; ++t, values += cache.dim, next += cache.dim)
      for (int v = 0; v < VECTORS; ++v) {
        const Vector value = load(values + v * kWidth);
        __builtin_prefetch(next + v * kWidth);
        for (int r = 0; r < ROWS; ++r) sums[r][v] += value * weights[r][b * kBlock + t];
      }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      store(outputs[r] + d + v * kWidth, sums[r][v] / totals[r]);
}

template <int ROWS>
void weigh_all(int64_t rows, const float* const* weights, const float* totals, const Cache& cache,
               int64_t head, const int64_t* table, int64_t blocks, float* const* outputs) {
  if constexpr (ROWS > 0) {
    if (rows < ROWS)
      return weigh_all<ROWS - 1>(rows, weights, totals, cache, head, table, blocks, outputs);
    constexpr int kVectors = ROWS * 4 <= kRegisters ? 4 : 2;
    int64_t d = 0;
    for (; d + kVectors * kWidth <= cache.dim; d += kVectors * kWidth)
      weigh<ROWS, kVectors>(weights, totals, cache, head, table, blocks, d, outputs);
    for (; d < cache.dim; d += kWidth)
      weigh<ROWS, 1>(weights, totals, cache, head, table, blocks, d, outputs);
  }
}

constexpr int kRows = kRegisters / 2;     // queries that are scored together
constexpr int kWeighed = kRegisters / 4;  // and whose values are added up together

// Turns the scores of the tokens [begin, end) of a row of `length` scores into weights, unseen ones
// into 0; returns their sum.
float soften(float* scores, int64_t length, int64_t begin, int64_t end, float softcap) {
  if (softcap > 0)
    for (int64_t t = begin; t < end; ++t) scores[t] = std::tanh(scores[t] / softcap) * softcap;
  const Integers from = Integers{} + static_cast<int32_t>(begin), to = Integers{} + static_cast<int32_t>(end);
  Integers places = lanes();
  Vector most = Vector{} - INFINITY;
  for (int64_t t = 0; t < length; t += kWidth, places += static_cast<int32_t>(kWidth)) {
    const Vector seen = places >= from && places < to ? load(scores + t) : Vector{} - INFINITY;
    store(scores + t, seen);
    most = seen > most ? seen : most;
  }
  const float above = largest(most);
  Vector total = {};
  for (int64_t t = 0; t < length; t += kWidth) {
    const Vector weights = exponential(load(scores + t) - above);
    store(scores + t, weights);
    total += weights;
  }
  return sum(total);
}

// Attends for the queries [begin, end) of a span and the heads that share one head of the cache.
void attend(const Span& span, int64_t begin, int64_t end, int64_t kv, int64_t group,
            const Rows& query, const Cache& cache, float* output, int64_t heads, float scale,
            int64_t window, float softcap, std::vector<float>& scratch) {
  const int64_t first = span.start + begin, last = span.start + end - 1;  // positions
  const int64_t seen = window > 0 ? std::max<int64_t>(0, first - window + 1) : 0;
  const int64_t skipped = seen / kBlock, blocks = last / kBlock + 1 - skipped;
  const int64_t length = blocks * kBlock, offset = skipped * kBlock;
  const int64_t total = (end - begin) * group;
  scratch.resize(kRows * (length + cache.dim));
  float* packed = scratch.data() + kRows * length;
  for (int64_t at = 0; at < total; at += kRows) {
    const int64_t rows = std::min<int64_t>(kRows, total - at);
    const float* queries[kRows];
    float *scores[kRows], *outputs[kRows], totals[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = span.first + begin + (at + r) / group, h = kv * group + (at + r) % group;
      queries[r] = query.at(h, row);
      scores[r] = scratch.data() + r * length;
      outputs[r] = output + (row * heads + h) * cache.dim;
    }
    score_all<kRows>(rows, queries, packed, cache, kv, span.table + skipped, blocks, scale, scores);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t position = first + (at + r) / group;
      const int64_t from = window > 0 ? std::max<int64_t>(0, position - window + 1) : 0;
      totals[r] = soften(scores[r], length, std::max<int64_t>(0, from - offset),
                         position + 1 - offset, softcap);
    }
    for (int64_t r = 0; r < rows; r += kWeighed)
      weigh_all<kWeighed>(std::min<int64_t>(kWeighed, rows - r), scores + r, totals + r, cache, kv,
                          span.table + skipped, blocks, outputs + r);
  }
}

// Stores a span's keys and values of one head.
void remember(const Span& span, int64_t kv, const Rows& key, const Rows& value,
              const Cache& cache) {
  for (int64_t t = 0; t < span.count; ++t) {
    const int64_t block = span.table[(span.start + t) / kBlock];
    const int64_t place = (span.start + t) % kBlock;
    const float* from = key.at(kv, span.first + t);
    float* keys = cache.keys(block, kv) + place;
    for (int64_t d = 0; d < cache.dim; ++d) keys[d * kBlock] = from[d];
    float* values = cache.values(block, kv);
    // Weights of places that nobody has written are 0, which NaN would survive.
    if (place == 0) std::fill(values, values + kBlock * cache.dim, 0.0f);
    std::memcpy(values + place * cache.dim, value.at(kv, span.first + t),
                cache.dim * sizeof(float));
  }
}

// Queries of one head that one thread attends for at a time.
constexpr int64_t kQueries = 2 * kRows;

struct Item {
  int64_t span, kv, begin, end;
};

}  // namespace

extern "C" {

// Stores the new tokens' keys and values in the blocks of their sequences and attends to them.
//   query [heads, dim], key and value [kv_heads, dim] of a row, `*_head` and `*_row` apart
//   cache [blocks, 2, kv_heads, kBlock * dim], see above; dim is a multiple of 16
//   output [rows, heads, dim]
//   window: tokens that a query sees, 0 for all; softcap: 0 for none
void attention_f32(const float* query, int64_t query_head, int64_t query_row, const float* key,
                   int64_t key_head, int64_t key_row, const float* value, int64_t value_head,
                   int64_t value_row, float* cache_data, float* output, int64_t heads,
                   int64_t kv_heads, int64_t dim, float scale, int64_t window, float softcap,
                   const Span* spans, int64_t count) {
  const Cache cache{cache_data, kv_heads, dim};
  const Rows queries{query, query_head, query_row}, keys{key, key_head, key_row};
  const Rows values{value, value_head, value_row};
  const int64_t group = heads / kv_heads, together = std::max<int64_t>(1, kQueries / group);
  std::vector<Item> items;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t end = spans[s].count; end > 0; end -= together)  // the longest first
      for (int64_t kv = 0; kv < kv_heads; ++kv)
        items.push_back({s, kv, std::max<int64_t>(0, end - together), end});
  // With one piece for each sequence and head, as in decoding, who attends has stored what is new.
  const bool is_whole = static_cast<int64_t>(items.size()) == count * kv_heads;
  if (!is_whole)
    team::parallel(count * kv_heads, [&](int64_t n) {
      remember(spans[n / kv_heads], n % kv_heads, keys, values, cache);
    });
  team::parallel(items.size(), [&](int64_t n) {
    thread_local std::vector<float> scratch;
    const Item& item = items[n];
    if (is_whole) remember(spans[item.span], item.kv, keys, values, cache);
    attend(spans[item.span], item.begin, item.end, item.kv, group, queries, cache, output, heads, scale, window,
           softcap, scratch);
  });
}

}  // extern "C"
