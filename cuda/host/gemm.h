// The one product: y[m][n] (+)= sum over k, ascending, of x[m][k] * w[k][n].
//
// Each output is one chain of fused multiply-adds in the order of k, whatever the number of rows, the width of a
// strip or the thread: a row's result is the same at any batch size by construction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vec.h"

namespace foretoken {

constexpr int kMaxRows = kRegisters == 32 ? 6 : 4;  // rows a tile
constexpr int kStripVecs = kRegisters == 32 ? 4 : 2;
constexpr int64_t kStrip = kStripVecs * kLanes;  // columns a tile

// R rows by V vectors of columns, in registers.
template <int R, int V>
inline void tile(const float* const* x, const float* w, int64_t ldw, int64_t num_k, float* const* y, int64_t column,
                 bool accumulate) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = accumulate ? load(y[r] + column + v * kLanes) : Vec{};
  const float* row = w + column;
  for (int64_t k = 0; k < num_k; ++k, row += ldw) {
    Vec weights[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) weights[v] = load(row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec value = splat(x[r][k]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[r][v] += value * weights[v];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(y[r] + column + v * kLanes, acc[r][v]);
}

// The last columns, fewer than a vector.
inline void tail(const float* const* x, int64_t num_rows, const float* w, int64_t ldw, int64_t num_k, float* const* y,
                 int64_t column, int64_t count, bool accumulate) {
  for (int64_t r = 0; r < num_rows; ++r) {
    Vec acc = accumulate ? load_some(y[r] + column, count) : Vec{};
    for (int64_t k = 0; k < num_k; ++k) acc += splat(x[r][k]) * load_some(w + k * ldw + column, count);
    store_some(y[r] + column, acc, count);
  }
}

template <int R>
inline void rows_by_columns(const float* const* x, const float* w, int64_t ldw, int64_t num_k, float* const* y,
                            int64_t begin, int64_t end, bool accumulate) {
  constexpr int kWide = R == 1 ? kRegisters / 2 : R == 2 ? kRegisters / 4 : kStripVecs;
  int64_t column = begin;
  for (; column + kWide * kLanes <= end; column += kWide * kLanes)
    tile<R, kWide>(x, w, ldw, num_k, y, column, accumulate);
  for (; column + kLanes <= end; column += kLanes) tile<R, 1>(x, w, ldw, num_k, y, column, accumulate);
  if (column < end) tail(x, R, w, ldw, num_k, y, column, end - column, accumulate);
}

// Columns begin … end - 1 of the product; x and y are arrays of row pointers.
inline void gemm(const float* const* x, int64_t num_rows, const float* w, int64_t ldw, int64_t num_k, float* const* y,
                 int64_t begin, int64_t end, bool accumulate = false) {
  int64_t r = 0;
  for (; r + kMaxRows <= num_rows; r += kMaxRows)
    rows_by_columns<kMaxRows>(x + r, w, ldw, num_k, y + r, begin, end, accumulate);
  switch (num_rows - r) {
    case 1: rows_by_columns<1>(x + r, w, ldw, num_k, y + r, begin, end, accumulate); break;
    case 2: rows_by_columns<2>(x + r, w, ldw, num_k, y + r, begin, end, accumulate); break;
    case 3: rows_by_columns<3>(x + r, w, ldw, num_k, y + r, begin, end, accumulate); break;
    case 4: rows_by_columns<4>(x + r, w, ldw, num_k, y + r, begin, end, accumulate); break;
    case 5: rows_by_columns<5>(x + r, w, ldw, num_k, y + r, begin, end, accumulate); break;
    default: break;
  }
}

// The same for many rows: a block of w is laid out densely once, small enough for the first cache, then read by all.
inline void gemm_packed(const float* const* x, int64_t num_rows, const float* w, int64_t ldw, int64_t num_k,
                        float* const* y, int64_t begin, int64_t end, std::vector<float>& buffer) {
  constexpr int64_t kBlock = 256;  // of k
  if (num_rows < 2 * kMaxRows || ldw <= kStrip) {
    gemm(x, num_rows, w, ldw, num_k, y, begin, end);
    return;
  }
  buffer.resize(kBlock * kStrip);
  std::vector<float*> outputs(num_rows);
  std::vector<const float*> inputs(num_rows);
  for (int64_t column = begin; column < end; column += kStrip) {
    const int64_t count = std::min(kStrip, end - column);
    for (int64_t r = 0; r < num_rows; ++r) outputs[r] = y[r] + column;
    for (int64_t first = 0; first < num_k; first += kBlock) {
      const int64_t block = std::min(kBlock, num_k - first);
      for (int64_t k = 0; k < block; ++k) {
        const float* source = w + (first + k) * ldw + column;
        float* target = buffer.data() + k * kStrip;
        if (count == kStrip)
          std::memcpy(target, source, kStrip * sizeof(float));  // of known size: a few vector moves, no call
        else
          std::memcpy(target, source, count * sizeof(float));
      }
      for (int64_t r = 0; r < num_rows; ++r) inputs[r] = x[r] + first;
      gemm(inputs.data(), num_rows, buffer.data(), kStrip, block, outputs.data(), 0, count, first > 0);
    }
  }
}

}  // namespace foretoken
