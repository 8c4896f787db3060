// The C ABI of the host kernels: float32, row-major, int64 sizes and indices; the caller allocates everything.
//
// Each function's reference twin, with the same name, is in workers/kernels/<name>.py. Weights are [in, out], the
// transpose of what torch calls a linear weight, with a stride of `out`.
#pragma once

#include <cstdint>

#define FORETOKEN_ABI_VERSION 4

extern "C" {

int64_t foretoken_abi_version();

void foretoken_linear(const float* x, const float* weight, const float* bias, float* y, int64_t num_rows,
                      int64_t num_in, int64_t num_out, int64_t num_threads);

void foretoken_rms_norm(const float* x, const float* weight, float* y, int64_t num_rows, int64_t size, double eps,
                        int64_t num_threads);

void foretoken_norm_rope_append(const float* qkv, const float* q_norm, const float* k_norm, int64_t norm_dim,
                                double eps, const float* cos, const float* sin, float* k_cache, float* v_cache,
                                const int64_t* kv_slots, double clip, float* q, int64_t num_tokens, int64_t num_heads,
                                int64_t num_kv_heads, int64_t head_dim, int64_t page_size, int64_t num_threads);

void foretoken_paged_attention(const float* q, const float* k_cache, const float* v_cache, const int64_t* blocks,
                               int64_t num_blocks, const int64_t* page_ids, int64_t window, double scale, float* out,
                               int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t page_size,
                               int64_t num_threads);

void foretoken_moe_route(const float* logits, int64_t* topk_ids, float* topk_weights, int64_t num_tokens,
                         int64_t num_experts, int64_t top_k, int64_t norm_topk_prob, int64_t num_threads);

void foretoken_moe_experts(const float* hidden, const int64_t* topk_ids, const float* topk_weights,
                           const float* gate_up, const float* down, float* out, int64_t num_tokens, int64_t top_k,
                           int64_t num_experts, int64_t hidden_size, int64_t intermediate, int64_t num_threads);

void foretoken_moe_combine(const float* by_choice, const float* topk_weights, float* out, int64_t num_tokens,
                           int64_t top_k, int64_t hidden_size, int64_t num_threads);

void foretoken_swiglu(const float* gate_up, float* y, int64_t num_rows, int64_t size, int64_t num_threads);

void foretoken_gumbel_argmax(const float* logits, const uint64_t* salts, const int64_t* keys, const float* temperatures,
                             float* values, int64_t* ids, int64_t num_rows, int64_t vocab_size, int64_t num_threads);
}
