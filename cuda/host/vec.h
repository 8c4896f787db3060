// Vectors of floats as the compiler sees them, and the few functions on them that the kernels need.
//
// Every function gives one lane the same bits whatever its neighbours are: rows are computed alike at any batch size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace foretoken {

#if defined(__AVX512F__)
constexpr int kLanes = 16;      // floats a vector
constexpr int kRegisters = 32;  // vector registers
#elif defined(__AVX__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load_some(const float* p, int64_t count) {
  Vec v{};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

inline void store_some(float* p, Vec v, int64_t count) { std::memcpy(p, &v, count * sizeof(float)); }

inline float sum_lanes(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// e^x: 2^n times a polynomial on [-ln2/2, ln2/2] (Cephes' expf; under 2 ulp). -inf gives 0, NaN gives NaN.
inline Vec vexp(Vec x) {
  const Vec low = splat(-87.3f), high = splat(88.3f);
  const Vec clamped = x < low ? low : (x > high ? high : x);
  const Vec n = [&] {
    const Vec shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    return (clamped * 1.44269504088896341f + shifter) - shifter;
  }();
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const IntVec exponent = __builtin_convertvector(n, IntVec) + 127;
  const IntVec bits = exponent << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  const Vec y = p * scale;
  const Vec zero{};
  return x < low ? zero : (x == x ? y : x);
}

inline float max_lanes(Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  float top = lanes[0];
  for (int i = 1; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

}  // namespace foretoken
