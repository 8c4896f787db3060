#include <cstring>
#include <vector>

#include "abi.h"
#include "gemm.h"
#include "parallel.h"

using namespace foretoken;

namespace {

// silu(gate) * up on `count` values.
void swiglu(const float* gate, const float* up, float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec g = load(gate + i);
    store(y + i, g / (vexp(-g) + 1.0f) * load(up + i));
  }
  if (i < count) {
    const Vec g = load_some(gate + i, count - i);
    store_some(y + i, g / (vexp(-g) + 1.0f) * load_some(up + i, count - i), count - i);
  }
}

struct Expert {
  int64_t id;
  int64_t first;  // of its rows, in the order sorted by expert
  int64_t count;
};

}  // namespace

void foretoken_swiglu(const float* gate_up, float* y, int64_t num_rows, int64_t size, int64_t num_threads) {
  parallel_ranges(num_rows, 16384 / size, static_cast<int>(num_threads), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      swiglu(gate_up + r * 2 * size, gate_up + r * 2 * size + size, y + r * size, size);
  });
}

namespace {

// A token's expert outputs, rows[place[t * top_k + j]], weighted and added in the order of its top-k.
void combine(const float* const* rows, const int64_t* place, const float* topk_weights, float* out, int64_t num_tokens,
             int64_t top_k, int64_t hidden_size, int threads) {
  parallel_ranges(num_tokens, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* y = out + t * hidden_size;
      std::memset(y, 0, hidden_size * sizeof(float));
      for (int64_t j = 0; j < top_k; ++j) {
        const float weight = topk_weights[t * top_k + j];
        const float* row = rows[place[t * top_k + j]];
        int64_t n = 0;
        for (; n + kLanes <= hidden_size; n += kLanes) store(y + n, load(y + n) + splat(weight) * load(row + n));
        if (n < hidden_size) {
          const int64_t rest = hidden_size - n;
          store_some(y + n, load_some(y + n, rest) + splat(weight) * load_some(row + n, rest), rest);
        }
      }
    }
  });
}

// Tokens of a call are taken in runs of about this many (token, choice) rows, which bounds the memory between products.
constexpr int64_t kRunRows = 4096;

void moe_run(const float* hidden, const int64_t* topk_ids, const float* topk_weights,
             const float* gate_up, const float* down, float* out, int64_t num_tokens, int64_t top_k,
             int64_t num_experts, int64_t hidden_size, int64_t intermediate, int64_t num_threads) {
  const int64_t num_rows = num_tokens * top_k;
  std::vector<int64_t> first(num_experts + 1, 0), place(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) ++first[topk_ids[i] + 1];
  for (int64_t e = 0; e < num_experts; ++e) first[e + 1] += first[e];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  std::vector<const float*> inputs(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    place[i] = next[topk_ids[i]]++;
    inputs[place[i]] = hidden + i / top_k * hidden_size;
  }
  std::vector<Expert> active;
  for (int64_t e = 0; e < num_experts; ++e)
    if (first[e + 1] > first[e]) active.push_back({e, first[e], first[e + 1] - first[e]});

  static thread_local std::vector<float> wide, inner, results;
  wide.resize(num_rows * 2 * intermediate);
  inner.resize(num_rows * intermediate);
  results.resize(num_rows * hidden_size);
  std::vector<float*> wide_rows(num_rows), result_rows(num_rows);
  std::vector<const float*> inner_rows(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    wide_rows[i] = wide.data() + i * 2 * intermediate;
    inner_rows[i] = inner.data() + i * intermediate;
    result_rows[i] = results.data() + i * hidden_size;
  }
  // The caller's buffers, by their address: a `thread_local` name means another object on another thread.
  float* const inner_data = inner.data();

  // Few experts over many threads: each is cut into parts of its columns.
  const int64_t num_active = static_cast<int64_t>(active.size());
  int64_t parts = 1;
  while (parts * num_active < 2 * num_threads && intermediate / (parts * 2) >= kStrip) parts *= 2;
  const int64_t work = num_rows * hidden_size * intermediate * 3;
  const int threads = work < kWorthThreads ? 1 : static_cast<int>(num_threads);

  parallel_for(num_active * parts, threads, [&](int64_t task) {
    thread_local std::vector<float> buffer;
    const Expert& expert = active[task / parts];
    const int64_t part = (intermediate / parts + kLanes - 1) / kLanes * kLanes;
    const int64_t begin = std::min(intermediate, task % parts * part);
    const int64_t end = task % parts == parts - 1 ? intermediate : std::min(intermediate, begin + part);
    if (begin >= end) return;
    const float* weight = gate_up + expert.id * hidden_size * 2 * intermediate;
    const float* const* x = inputs.data() + expert.first;
    float* const* y = wide_rows.data() + expert.first;
    if (parts == 1) {
      gemm_packed(x, expert.count, weight, 2 * intermediate, hidden_size, y, 0, 2 * intermediate, buffer);
    } else {
      gemm_packed(x, expert.count, weight, 2 * intermediate, hidden_size, y, begin, end, buffer);
      gemm_packed(x, expert.count, weight, 2 * intermediate, hidden_size, y, intermediate + begin, intermediate + end,
                  buffer);
    }
    for (int64_t r = 0; r < expert.count; ++r)
      swiglu(y[r] + begin, y[r] + intermediate + begin, inner_data + (expert.first + r) * intermediate + begin,
             end - begin);
  });

  parallel_for(num_active * parts, threads, [&](int64_t task) {
    thread_local std::vector<float> buffer;
    const Expert& expert = active[task / parts];
    const int64_t part = (hidden_size / parts + kLanes - 1) / kLanes * kLanes;
    const int64_t begin = std::min(hidden_size, task % parts * part);
    const int64_t end = task % parts == parts - 1 ? hidden_size : std::min(hidden_size, begin + part);
    if (begin >= end) return;
    gemm_packed(inner_rows.data() + expert.first, expert.count, down + expert.id * intermediate * hidden_size,
                hidden_size, intermediate, result_rows.data() + expert.first, begin, end, buffer);
  });

  combine(result_rows.data(), place.data(), topk_weights, out, num_tokens, top_k, hidden_size, threads);
}

}  // namespace

void foretoken_moe_experts(const float* hidden, const int64_t* topk_ids, const float* topk_weights,
                           const float* gate_up, const float* down, float* out, int64_t num_tokens, int64_t top_k,
                           int64_t num_experts, int64_t hidden_size, int64_t intermediate, int64_t num_threads) {
  const int64_t run = std::max<int64_t>(1, kRunRows / top_k);
  for (int64_t t = 0; t < num_tokens; t += run)
    moe_run(hidden + t * hidden_size, topk_ids + t * top_k, topk_weights + t * top_k, gate_up, down,
            out + t * hidden_size, std::min(run, num_tokens - t), top_k, num_experts, hidden_size, intermediate,
            num_threads);
}

void foretoken_moe_combine(const float* by_choice, const float* topk_weights, float* out, int64_t num_tokens,
                           int64_t top_k, int64_t hidden_size, int64_t num_threads) {
  std::vector<const float*> rows(num_tokens * top_k);
  std::vector<int64_t> place(num_tokens * top_k);
  for (int64_t i = 0; i < num_tokens * top_k; ++i) {
    rows[i] = by_choice + i * hidden_size;
    place[i] = i;
  }
  combine(rows.data(), place.data(), topk_weights, out, num_tokens, top_k, hidden_size, static_cast<int>(num_threads));
}

void foretoken_moe_route(const float* logits, int64_t* topk_ids, float* topk_weights, int64_t num_tokens,
                         int64_t num_experts, int64_t top_k, int64_t norm_topk_prob, int64_t num_threads) {
  const int64_t grain = 16384 / num_experts;
  parallel_ranges(num_tokens, grain, static_cast<int>(num_threads), [&](int64_t begin, int64_t end) {
    std::vector<float> probabilities(num_experts);
    for (int64_t t = begin; t < end; ++t) {
      const float* row = logits + t * num_experts;
      float top = row[0];
      for (int64_t e = 1; e < num_experts; ++e) top = row[e] > top ? row[e] : top;
      float total = 0;
      for (int64_t e = 0; e < num_experts; e += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, num_experts - e);
        store_some(probabilities.data() + e, vexp(load_some(row + e, count) - splat(top)), count);
      }
      for (int64_t e = 0; e < num_experts; ++e) total += probabilities[e];
      int64_t* ids = topk_ids + t * top_k;
      float* weights = topk_weights + t * top_k;
      float kept = 0;
      for (int64_t j = 0; j < top_k; ++j) {
        int64_t best = 0;
        for (int64_t e = 1; e < num_experts; ++e)
          if (probabilities[e] > probabilities[best]) best = e;
        ids[j] = best;
        weights[j] = probabilities[best] / total;
        kept += weights[j];
        probabilities[best] = -1.0f;  // taken
      }
      if (norm_topk_prob)
        for (int64_t j = 0; j < top_k; ++j) weights[j] /= kept;
    }
  });
}
