// Vectors of floats, by GCC's and Clang's own extension, so that the same source serves AVX-512, AVX2
// and NEON. Plain C interfaces and no torch headers: everything compiles in a few seconds.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kWidth = 16;          // floats in a vector
constexpr int64_t kPanel = 2 * kWidth;  // outputs whose weights lie together, see panels.h
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kWidth * sizeof(int32_t))));

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// 0, 1, ..., 15
inline Integers lanes() {
  Integers numbers;
  for (int j = 0; j < kWidth; ++j) numbers[j] = j;
  return numbers;
}

// By halves: adding one element after the other would take longer than the products of a tile.
inline float sum(Vector v) {
  const auto eight = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                     __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto four = __builtin_shufflevector(eight, eight, 0, 1, 2, 3) +
                    __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The largest number, by halves as well; a NaN may be left out.
inline float largest(Vector v) {
  const auto more = [](auto a, auto b) { return a > b ? a : b; };
  const auto eight = more(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                          __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const auto four = more(__builtin_shufflevector(eight, eight, 0, 1, 2, 3),
                         __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  return std::max(std::max(four[0], four[2]), std::max(four[1], four[3]));
}

// e^x in each lane for x ≤ 0, to about 1e-7 of its value; 0 below -87, NaN for NaN. The range is cut
// to ±ln(2)/2 and the rest is the polynomial of Cephes' expf.
inline Vector exponential(Vector x) {
  const Vector shift = Vector{} + 12582912.0f;  // adding it rounds to a whole number
  const Vector inside = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector n = (inside * 1.44269504088896341f + shift) - shift;
  const Vector r = inside - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = Vector{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof scale);
  return x < -87.0f ? Vector{} : p * scale;
}

}  // namespace
