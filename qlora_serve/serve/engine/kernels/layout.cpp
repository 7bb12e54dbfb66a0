// How an adapter's matrices come to lie where the kernels read them, for float32 on a CPU.

#include "vectors.h"

namespace {

// A low-rank update as it is stored, a [rank, in] and b [out, rank], and where it goes: a_to [in, rank], and b_to
// [out / 16 rounded up, rank, 16] multiplied by `scaling` and filled up with zeros.
struct Update {
  int64_t in, out, rank;
  const float *a, *b;
  float *a_to, *b_to;
  float scaling;
};

constexpr int64_t kBlock = 16;

void lay_out(const Update& one) {
  // A cache line of each of a's rows at a time, so that it is read once.
  for (int64_t i = 0; i < one.in; i += kBlock)
    for (int64_t r = 0; r < one.rank; ++r)
      for (int64_t k = i; k < std::min(one.in, i + kBlock); ++k)
        one.a_to[k * one.rank + r] = one.a[r * one.in + k];
  for (int64_t o = 0; o < one.out; o += kBlock) {
    float* block = one.b_to + o * one.rank;
    for (int64_t r = 0; r < one.rank; ++r)
      for (int64_t k = 0; k < kBlock; ++k)
        block[r * kBlock + k] = o + k < one.out ? one.b[(o + k) * one.rank + r] * one.scaling : 0.0f;
  }
}

}  // namespace

extern "C" {

// In the calling thread alone: it works beside the one that decodes.
void lay_out_updates(const Update* updates, int64_t count) {
  for (int64_t n = 0; n < count; ++n) lay_out(updates[n]);
}

}  // extern "C"
