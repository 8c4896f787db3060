#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "abi.h"
#include "gemm.h"
#include "parallel.h"

using namespace foretoken;

namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// A row's online softmax: the greatest score so far, and the sum of exponentials, lane by lane.
struct Row {
  float top;
  Vec total;
};

// Scores of one row against one page -> exponentials. Keys low … high - 1 of the page are seen.
// Returns what the sums so far must be multiplied with.
float exponentials(float* scores, int64_t page_size, int64_t low, int64_t high, Row& row) {
  std::fill(scores, scores + low, kNegInf);
  std::fill(scores + std::max(low, high), scores + page_size, kNegInf);
  Vec tops = splat(row.top);
  int64_t i = 0;
  for (; i + kLanes <= page_size; i += kLanes) {
    const Vec x = load(scores + i);
    tops = x > tops ? x : tops;
  }
  float best = max_lanes(tops);
  for (; i < page_size; ++i) best = scores[i] > best ? scores[i] : best;
  if (best == kNegInf) {  // nothing seen yet: a page before the sliding window
    std::fill(scores, scores + page_size, 0.0f);
    return 1.0f;
  }
  const float rescale = row.top == best ? 1.0f : vexp(splat(row.top - best))[0];
  row.top = best;
  Vec sums{};
  for (i = 0; i + kLanes <= page_size; i += kLanes) {
    const Vec weights = vexp(load(scores + i) - splat(best));
    store(scores + i, weights);
    sums += weights;
  }
  if (i < page_size) {
    store_some(scores + i, vexp(load_some(scores + i, page_size - i) - splat(best)), page_size - i);
    sums += load_some(scores + i, page_size - i);
  }
  row.total = row.total * rescale + sums;
  return rescale;
}

}  // namespace

// blocks [num_blocks, 5]: first row of q, index of its first query in the sequence, number of queries, first of its
// page_ids, number of pages.
void foretoken_paged_attention(const float* q, const float* k_cache, const float* v_cache, const int64_t* blocks,
                               int64_t num_blocks, const int64_t* page_ids, int64_t window, double scale, float* out,
                               int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t page_size,
                               int64_t num_threads) {
  const int64_t per_kv = num_heads / num_kv_heads;
  int64_t work = 0;
  for (int64_t b = 0; b < num_blocks; ++b) work += blocks[b * 5 + 2] * blocks[b * 5 + 4];
  const int threads = work * num_heads * head_dim * page_size * 2 < kWorthThreads ? 1 : static_cast<int>(num_threads);
  parallel_for(num_blocks * num_kv_heads, threads, [&](int64_t task) {
    thread_local std::vector<float> scaled, scores, sums;
    thread_local std::vector<Row> rows;
    thread_local std::vector<const float*> query_rows, weight_rows;
    thread_local std::vector<float*> score_rows, sum_rows;
    // Backwards: the longest blocks of a prompt come first, so that the last task is a short one.
    const int64_t* block = blocks + (num_blocks - 1 - task / num_kv_heads) * 5;
    const int64_t head = task % num_kv_heads, num_queries = block[2], num_pages = block[4];
    const int64_t num_rows = num_queries * per_kv;
    scaled.resize(num_rows * head_dim);
    scores.resize(num_rows * page_size);
    sums.assign(num_rows * head_dim, 0.0f);
    rows.assign(num_rows, Row{kNegInf, Vec{}});
    query_rows.resize(num_rows);
    weight_rows.resize(num_rows);
    score_rows.resize(num_rows);
    sum_rows.resize(num_rows);
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* source = q + ((block[0] + r / per_kv) * num_heads + head * per_kv + r % per_kv) * head_dim;
      for (int64_t i = 0; i < head_dim; ++i) scaled[r * head_dim + i] = source[i] * static_cast<float>(scale);
      query_rows[r] = scaled.data() + r * head_dim;
      score_rows[r] = scores.data() + r * page_size;
      weight_rows[r] = score_rows[r];
      sum_rows[r] = sums.data() + r * head_dim;
    }
    for (int64_t p = 0; p < num_pages; ++p) {
      const int64_t first_key = p * page_size;
      if (window > 0 && first_key + page_size <= block[1] - window + 1) continue;  // before every row's window
      const int64_t at = (page_ids[block[3] + p] * num_kv_heads + head) * head_dim * page_size;
      gemm(query_rows.data(), num_rows, k_cache + at, page_size, head_dim, score_rows.data(), 0, page_size);
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t query = block[1] + r / per_kv;
        const int64_t high = std::clamp<int64_t>(query + 1 - first_key, 0, page_size);
        const int64_t low = window > 0 ? std::clamp<int64_t>(query - window + 1 - first_key, 0, page_size) : 0;
        const float rescale = exponentials(score_rows[r], page_size, low, high, rows[r]);
        if (rescale != 1.0f)
          for (int64_t i = 0; i < head_dim; ++i) sum_rows[r][i] *= rescale;
      }
      // No further than the last query sees: what lies behind was somebody else's, and 0 * NaN is NaN.
      const int64_t num_keys = std::min(page_size, block[1] + num_queries - first_key);
      gemm(weight_rows.data(), num_rows, v_cache + at, head_dim, num_keys, sum_rows.data(), 0, head_dim, true);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
      float* target = out + ((block[0] + r / per_kv) * num_heads + head * per_kv + r % per_kv) * head_dim;
      const float inverse = 1.0f / sum_lanes(rows[r].total);
      for (int64_t i = 0; i < head_dim; ++i) target[i] = sum_rows[r][i] * inverse;
    }
  });
}
