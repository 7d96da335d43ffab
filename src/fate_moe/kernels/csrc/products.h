// Whole operations on several threads, from the functions of one instruction set.
#pragma once
#include <cstdint>
#include <vector>

#include "ops.h"

namespace fate {

// Where a matrix lies, counted from the address that is given at the call. `bias` is -1 where there is none.
struct Place {
  Kind kind;
  int64_t rows, cols, group;
  int64_t planes[3], scale, zero, bias;
  Dtype bias_dtype;

  Matrix at(uint64_t address, int num_planes) const;
};

// One expert's two matrices; `up` is gate and up together.
struct ExpertPlace {
  Place up, down;
  ActivationSpec activation;
};

// One call's experts and their tokens: expert e has the (token, choice) rows choices[starts[e] .. starts[e + 1]), a row's token is
// row / top_k, and its output goes to out[row * hidden].
struct Batch {
  std::vector<uint64_t> addresses;
  std::vector<int> num_planes;
  std::vector<int64_t> starts, choices;
  const void* x;  // [num_tokens, hidden] of x_dtype
  Dtype x_dtype;
  int64_t num_tokens, top_k;
  float* out;
};

void run_experts(const Ops&, const ExpertPlace&, const Batch&, bool exact, int num_threads);

// out [num_tokens, rows] of out_dtype = x [num_tokens, cols] times the matrix.
void run_linear(const Ops&, const Matrix&, const void* x, Dtype x_dtype, int64_t num_tokens, void* out, Dtype out_dtype, bool exact,
                int num_threads);

// The matrix as numbers of dtype, [rows, cols].
void run_expand(const Ops&, const Matrix&, void* out, Dtype dtype, int num_threads);

// out [num_tokens, hidden] of out_dtype: rows [num_tokens, top_k, hidden] weighted and summed in order.
void run_combine(const Ops&, const float* rows, const void* weights, Dtype weights_dtype, int64_t num_tokens, int64_t top_k,
                 int64_t hidden, void* out, Dtype out_dtype, int num_threads);

// Reads every byte once; the sum keeps the compiler honest.
uint64_t read_all(const void* memory, int64_t num_bytes, int num_threads);

}  // namespace fate
