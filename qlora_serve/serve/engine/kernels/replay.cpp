// A recorded sequence of kernel calls, made again by one call from Python.
//
// Between two kernels of a decoding step Python takes a tenth of a millisecond a layer to find out what
// comes next, which is the same in every step.

#include <omp.h>

#include "vectors.h"

struct AdapterRows;
struct Span;

extern "C" {

void linear_f32(const float*, int64_t, int64_t, const float*, const float*, float*, int64_t,
                const AdapterRows*, int64_t, float*);
void linear_panels(const float*, int64_t, int64_t, const float*, const float*, float*, int64_t,
                   const AdapterRows*, int64_t, float*);
void linear_coded(const float*, const float*, int64_t, int64_t, int64_t, const int32_t*, const float*,
                  const float*, const float*, int64_t, int64_t, const float*, float*, int64_t,
                  const AdapterRows*, int64_t, float*);
void rms_norm_f32(const float*, int64_t, int64_t, const float*, float, float, float*);
void silu_product_f32(const float*, const float*, int64_t, float*);
void rotate_f32(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                const float*, float*);
void attention_f32(const float*, int64_t, int64_t, const float*, int64_t, int64_t, const float*,
                   int64_t, int64_t, float*, float*, int64_t, int64_t, int64_t, float, int64_t, float,
                   const Span*, int64_t);

// One call: its whole numbers and pointers in order, and its floats in order; replay.py has the same.
struct Call {
  int64_t kind;
  int64_t a[17];
  float f[2];
};

// out = left + right; all [count]
void add_f32(const float* left, const float* right, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(left + i) + load(right + i));
  for (; i < count; ++i) out[i] = left[i] + right[i];
}

void replay_calls(const Call* calls, int64_t count) {
  for (const Call* call = calls; call < calls + count; ++call) {
    const int64_t* a = call->a;
    const float* f = call->f;
    const auto in = [&](int at) { return reinterpret_cast<const float*>(a[at]); };
    const auto out = [&](int at) { return reinterpret_cast<float*>(a[at]); };
    const auto groups = [&](int at) { return reinterpret_cast<const AdapterRows*>(a[at]); };
    switch (call->kind) {
      case 0:
        linear_f32(in(0), a[1], a[2], in(3), in(4), out(5), a[6], groups(7), a[8], out(9));
        break;
      case 1:
        linear_panels(in(0), a[1], a[2], in(3), in(4), out(5), a[6], groups(7), a[8], out(9));
        break;
      case 2:
        linear_coded(in(0), in(1), a[2], a[3], a[4], reinterpret_cast<const int32_t*>(a[5]), in(6),
                     in(7), in(8), a[9], a[10], in(11), out(12), a[13], groups(14), a[15], out(16));
        break;
      case 3:
        rms_norm_f32(in(0), a[1], a[2], in(3), f[0], f[1], out(4));
        break;
      case 4:
        silu_product_f32(in(0), in(1), a[2], out(3));
        break;
      case 5:
        rotate_f32(in(0), a[1], a[2], a[3], a[4], a[5], in(6), in(7), out(8));
        break;
      case 6:
        attention_f32(in(0), a[1], a[2], in(3), a[4], a[5], in(6), a[7], a[8], out(9), out(10), a[11],
                      a[12], a[13], f[0], a[14], f[1], reinterpret_cast<const Span*>(a[15]), a[16]);
        break;
      case 7:
        add_f32(in(0), in(1), out(2), a[3]);
        break;
    }
  }
}

}  // extern "C"
