// A recorded sequence of kernel calls, made again by one call from Python.
//
// Between two kernels of a decoding step Python takes a tenth of a millisecond a layer to find out what
// comes next, which is the same in every step.

#include "linear.h"

struct Span;

extern "C" {

void rms_norm_f32(const float*, int64_t, int64_t, const float*, float, float, float*);
void silu_product_f32(const float*, const float*, int64_t, float*);
void add_f32(const float*, const float*, float*, int64_t);
void rotate_f32(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, const float*,
                const float*, float*);
void attention_f32(const float*, int64_t, int64_t, const float*, int64_t, int64_t, const float*,
                   int64_t, int64_t, float*, float*, int64_t, int64_t, int64_t, float, int64_t, float,
                   const Span*, int64_t);
}

namespace {

// One call: its whole numbers and pointers in order, and its floats in order; replay.py has the same.
struct Call {
  int64_t kind;
  int64_t a[17];
  float f[2];

  const float* in(int at) const { return reinterpret_cast<const float*>(a[at]); }
  float* out(int at) const { return reinterpret_cast<float*>(a[at]); }
  const AdapterRows* groups(int at) const { return reinterpret_cast<const AdapterRows*>(a[at]); }

  bool is_linear() const { return kind <= 2; }

  Linear linear() const {
    switch (kind) {
      case 0:
        return Linear::row_major(in(0), a[1], a[2], in(3), in(4), out(5), a[6], groups(7), a[8]);
      case 1:
        return Linear::panels(in(0), a[1], a[2], in(3), in(4), out(5), a[6], groups(7), a[8]);
      default:
        const Coded codes{reinterpret_cast<const int32_t*>(a[5]), in(6), in(7), in(8), a[3], a[9], a[10]};
        return Linear::coded(in(0), in(1), a[2], codes, a[4], in(11), out(12), a[13], groups(14), a[15]);
    }
  }
};

constexpr int64_t kTogether = 4;  // layers in one job

// The layers from `call` on that multiply the same rows as it does, such as queries, keys and values; how many.
int64_t layers_of(const Call* call, const Call* end, Linear* layers) {
  int64_t count = 0;
  for (; count < kTogether && call < end && call->is_linear(); ++call) {
    layers[count] = call->linear();
    if (layers[count].low_x != layers[0].low_x || layers[count].rows != layers[0].rows) break;
    ++count;
  }
  return count;
}

}  // namespace

extern "C" {

void replay_calls(const Call* calls, int64_t count) {
  for (const Call *call = calls, *end = calls + count; call < end; ++call) {
    const int64_t* a = call->a;
    const float* f = call->f;
    if (call->is_linear()) {
      Linear layers[kTogether];
      const int64_t together = layers_of(call, end, layers);
      compute(layers, together);
      call += together - 1;
      continue;
    }
    switch (call->kind) {
      case 3:
        rms_norm_f32(call->in(0), a[1], a[2], call->in(3), f[0], f[1], call->out(4));
        break;
      case 4:
        silu_product_f32(call->in(0), call->in(1), a[2], call->out(3));
        break;
      case 5:
        rotate_f32(call->in(0), a[1], a[2], a[3], a[4], a[5], call->in(6), call->in(7), call->out(8));
        break;
      case 6:
        attention_f32(call->in(0), a[1], a[2], call->in(3), a[4], a[5], call->in(6), a[7], a[8], call->out(9),
                      call->out(10), a[11], a[12], a[13], f[0], a[14], f[1], reinterpret_cast<const Span*>(a[15]),
                      a[16]);
        break;
      case 7:
        add_f32(call->in(0), call->in(1), call->out(2), a[3]);
        break;
    }
  }
}

}  // extern "C"
