#include <cmath>
#include <vector>

#include "abi.h"
#include "gemm.h"
#include "parallel.h"

using namespace foretoken;

namespace {

// y = x / rms(x) * weight, on `size` values; the order of additions depends on `size` alone.
void rms_norm(const float* x, const float* weight, float* y, int64_t size, double eps) {
  Vec squares{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) squares += load(x + i) * load(x + i);
  if (i < size) {
    const Vec rest = load_some(x + i, size - i);
    squares += rest * rest;
  }
  const float scale = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + static_cast<float>(eps));
  for (i = 0; i + kLanes <= size; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < size) {
    const int64_t rest = size - i;
    store_some(y + i, load_some(x + i, rest) * scale * load_some(weight + i, rest), rest);
  }
}

}  // namespace

void foretoken_rms_norm(const float* x, const float* weight, float* y, int64_t num_rows, int64_t size, double eps,
                        int64_t num_threads) {
  parallel_ranges(num_rows, 65536 / size, static_cast<int>(num_threads), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) rms_norm(x + r * size, weight, y + r * size, size, eps);
  });
}

void foretoken_norm_rope_append(const float* qkv, const float* q_norm, const float* k_norm, int64_t norm_dim,
                                double eps, const float* cos, const float* sin, float* k_cache, float* v_cache,
                                const int64_t* kv_slots, double clip, float* q, int64_t num_tokens, int64_t num_heads,
                                int64_t num_kv_heads, int64_t head_dim, int64_t page_size, int64_t num_threads) {
  const int64_t q_width = num_heads * head_dim, kv_width = num_kv_heads * head_dim;
  const int64_t half = head_dim / 2;
  // A task is a run of tokens: neighbours share a page's cache lines.
  parallel_ranges(num_tokens, 16, static_cast<int>(num_threads), [&](int64_t begin, int64_t end) {
    std::vector<float> row(q_width + 2 * kv_width);
    for (int64_t t = begin; t < end; ++t) {
      const float* source = qkv + t * (q_width + 2 * kv_width);
      std::copy(source, source + row.size(), row.begin());
      float* const k = row.data() + q_width;
      float* const v = k + kv_width;
      if (norm_dim == head_dim) {
        for (int64_t h = 0; h < num_heads; ++h)
          rms_norm(row.data() + h * head_dim, q_norm, row.data() + h * head_dim, head_dim, eps);
        for (int64_t h = 0; h < num_kv_heads; ++h) rms_norm(k + h * head_dim, k_norm, k + h * head_dim, head_dim, eps);
      } else if (norm_dim > 0) {
        rms_norm(row.data(), q_norm, row.data(), q_width, eps);
        rms_norm(k, k_norm, k, kv_width, eps);
      }
      if (clip > 0) {
        const float bound = static_cast<float>(clip);
        for (float& x : row) x = x > bound ? bound : (x < -bound ? -bound : x);
      }
      const float* c = cos + t * head_dim;
      const float* s = sin + t * head_dim;
      for (int64_t h = 0; h < num_heads + num_kv_heads; ++h) {
        float* x = row.data() + h * head_dim;
        for (int64_t i = 0; i < half; ++i) {
          const float low = x[i], high = x[i + half];
          x[i] = low * c[i] + high * s[i];
          x[i + half] = high * c[i + half] + low * s[i + half];
        }
      }
      std::copy(row.data(), row.data() + q_width, q + t * q_width);
      const int64_t page = kv_slots[t] / page_size, offset = kv_slots[t] % page_size;
      for (int64_t h = 0; h < num_kv_heads; ++h) {
        float* k_page = k_cache + (page * num_kv_heads + h) * head_dim * page_size;
        float* v_page = v_cache + (page * num_kv_heads + h) * head_dim * page_size;
        for (int64_t i = 0; i < head_dim; ++i) k_page[i * page_size + offset] = k[h * head_dim + i];
        std::copy(v + h * head_dim, v + (h + 1) * head_dim, v_page + offset * head_dim);
      }
    }
  });
}
