#include <cstring>
#include <limits>

#include "abi.h"
#include "parallel.h"
#include "vec.h"

using namespace foretoken;

namespace {

typedef uint64_t WordVec __attribute__((vector_size(kLanes * 8)));

// ln x for positive normal x (Cephes' logf).
inline Vec vlog(Vec x) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof(bits));
  IntVec exponent = (bits >> 23) - 126;
  const IntVec mantissa_bits = (bits & 0x007fffff) | 0x3f000000;  // in [0.5, 1)
  Vec m;
  std::memcpy(&m, &mantissa_bits, sizeof(m));
  const IntVec low = m < splat(0.707106781186547524f);
  exponent += low;  // a comparison gives -1
  m = low ? m + m - 1.0f : m - 1.0f;
  const Vec e = __builtin_convertvector(exponent, Vec);
  const Vec z = m * m;
  Vec p = splat(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  p += e * -2.12194440e-4f;
  p -= z * 0.5f;
  return m + p + e * 0.693359375f;
}

// The noise of `workers/sampling/gumbel.py`: hashes of key xor salt -> Gumbel values.
inline Vec gumbel(uint64_t key, const uint64_t* salts) {
  WordVec words;
  std::memcpy(&words, salts, sizeof(words));
  words ^= key;
  words = (words ^ (words >> 30)) * 0xBF58476D1CE4E5B9ull;
  words = (words ^ (words >> 27)) * 0x94D049BB133111EBull;
  words &= 0x7fffffffffffffffull;
  Vec v = __builtin_convertvector(words, Vec) * 0x1p-63f;
  const Vec largest = splat(1.0f - 0x1p-24f), smallest = splat(0x1p-64f);
  v = v > largest ? largest : (v < smallest ? smallest : v);
  // -log1p(-v), with the error of u = 1 - v taken back out (Kahan): the smallest values are the ones that win
  const Vec u = 1.0f - v;
  const IntVec exact = u == splat(1.0f);
  const Vec safe = exact ? splat(0.5f) : u;
  const Vec exponential = exact ? v : -vlog(safe) * (v / (1.0f - safe));
  return -vlog(exponential);
}

}  // namespace

void foretoken_gumbel_argmax(const float* logits, const uint64_t* salts, const int64_t* keys, const float* temperatures,
                             float* values, int64_t* ids, int64_t num_rows, int64_t vocab_size, int64_t num_threads) {
  parallel_ranges(num_rows, keys == nullptr ? 16 : 2, static_cast<int>(num_threads), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = logits + r * vocab_size;
      constexpr float kNothing = -std::numeric_limits<float>::infinity();
      Vec best = splat(kNothing);
      IntVec best_at{}, not_a_number{}, at_lane;
      for (int i = 0; i < kLanes; ++i) at_lane[i] = i;
      const auto take = [&](Vec x) {
        const IntVec larger = x > best;
        best = larger ? x : best;
        best_at = larger ? at_lane : best_at;
        not_a_number |= x != x;
        at_lane += kLanes;
      };
      int64_t at = 0;
      for (; at + kLanes <= vocab_size; at += kLanes) {
        Vec x = load(row + at);
        if (keys != nullptr) x = gumbel(static_cast<uint64_t>(keys[r]), salts + at) * temperatures[r] + x;
        take(x);
      }
      if (at < vocab_size) {
        const int64_t count = vocab_size - at;
        Vec x = load_some(row + at, count);
        if (keys != nullptr) {
          uint64_t some[kLanes] = {};
          std::memcpy(some, salts + at, count * sizeof(uint64_t));
          x = gumbel(static_cast<uint64_t>(keys[r]), some) * temperatures[r] + x;
        }
        for (int64_t i = count; i < kLanes; ++i) x[i] = kNothing;
        take(x);
      }
      // Of equal scores the first token's wins, as in torch.
      int lane = 0;
      bool any_not_a_number = false;
      for (int i = 0; i < kLanes; ++i) {
        any_not_a_number |= not_a_number[i] != 0;
        if (best[i] > best[lane] || (best[i] == best[lane] && best_at[i] < best_at[lane])) lane = i;
      }
      const int64_t best_id = best_at[lane];
      values[r] = any_not_a_number ? std::numeric_limits<float>::quiet_NaN() : best[lane];
      ids[r] = best_id;
    }
  });
}
