// The Python face: addresses and sizes as numbers. kernels/cpu.py checks what it passes; nothing here does.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>

#include "layers.h"
#include "module.h"
#include "products.h"
#include "host_compute.h"
#include "threads.h"
#include "module_residency.h"

namespace nb = nanobind;
using namespace fate;

namespace {

// Best first.
const Ops* const kCandidates[] = {amx_ops(),       avx512_ops(),   avx_vnni_ops(), avx2_ops(),
                                 neon_i8mm_ops(), neon_dot_ops(), neon_ops(),     portable_ops()};

const Ops* best() {
  for (const Ops* ops : kCandidates)
    if (ops) return ops;
  return nullptr;
}

const Ops* chosen = best();

std::vector<std::string> names() {
  std::vector<std::string> found;
  for (const Ops* ops : kCandidates)
    if (ops) found.push_back(ops->name);
  return found;
}

void choose(const std::string& name) {
  for (const Ops* ops : kCandidates)
    if (ops && name == ops->name) {
      chosen = ops;
      return;
    }
  throw std::invalid_argument("no kernels called " + name);
}

Place make_place(int kind, int64_t rows, int64_t cols, const std::vector<int64_t>& planes, int64_t scale, int64_t zero,
                 int64_t bias, int bias_dtype, int64_t group) {
  Place place = {Kind(kind), rows, cols, group, {0, 0, 0}, scale, zero, bias, Dtype(bias_dtype)};
  for (size_t i = 0; i < planes.size() && i < 3; ++i) place.planes[i] = planes[i];
  return place;
}

void experts(const ExpertPlace& place, std::vector<uint64_t> addresses, std::vector<int> num_planes, std::vector<int64_t> starts,
             std::vector<int64_t> choices, uintptr_t x, int x_dtype, int64_t num_tokens, int64_t top_k, uintptr_t out, bool exact,
             int num_threads) {
  const Batch batch = {std::move(addresses), std::move(num_planes), std::move(starts), std::move(choices),
                       reinterpret_cast<const void*>(x), Dtype(x_dtype), num_tokens, top_k, reinterpret_cast<float*>(out)};
  const Unlocked unlocked;
  run_experts(*chosen, place, batch, exact, num_threads);
}

void linear(const Place& place, uintptr_t address, int num_planes, uintptr_t x, int x_dtype, int64_t num_tokens, uintptr_t out,
            int out_dtype, bool exact, int num_threads) {
  const Unlocked unlocked;
  run_linear(*chosen, place.at(address, num_planes), reinterpret_cast<const void*>(x), Dtype(x_dtype), num_tokens,
             reinterpret_cast<void*>(out), Dtype(out_dtype), exact, num_threads);
}

void expand(const Place& place, uintptr_t address, int num_planes, uintptr_t out, int dtype, int num_threads) {
  const Unlocked unlocked;
  run_expand(*chosen, place.at(address, num_planes), reinterpret_cast<void*>(out), Dtype(dtype), num_threads);
}

void combine(uintptr_t rows, uintptr_t weights, int weights_dtype, int64_t num_tokens, int64_t top_k, int64_t hidden, uintptr_t out,
             int out_dtype, int num_threads) {
  const Unlocked unlocked;
  run_combine(*chosen, reinterpret_cast<const float*>(rows), reinterpret_cast<const void*>(weights), Dtype(weights_dtype),
              num_tokens, top_k, hidden, reinterpret_cast<void*>(out), Dtype(out_dtype), num_threads);
}

void activate_rows(const ActivationSpec& spec, uintptr_t gate_up, int64_t n, uintptr_t inner) {
  chosen->activate(spec, reinterpret_cast<const float*>(gate_up), n, reinterpret_cast<float*>(inner));
}

uint64_t read_memory(uintptr_t address, int64_t num_bytes, int num_threads) {
  const Unlocked unlocked;
  return read_all(reinterpret_cast<const void*>(address), num_bytes, num_threads);
}

void norm(const Norm& of, uintptr_t x, int dtype, int64_t num_tokens, int64_t n, uintptr_t out, int num_threads) {
  const Unlocked unlocked;
  run_norm(*chosen, of, reinterpret_cast<const void*>(x), Dtype(dtype), num_tokens, n, reinterpret_cast<void*>(out), num_threads);
}

std::vector<int64_t> route(const Router& of, uintptr_t logits, int64_t num_experts, uintptr_t weights) {
  std::vector<int64_t> experts(static_cast<size_t>(of.top_k));
  run_route(*chosen, of, reinterpret_cast<float*>(logits), num_experts, experts.data(), reinterpret_cast<float*>(weights));
  return experts;
}

// Steps one by one, for tests: in place.
void turn(uintptr_t head, int64_t n, uintptr_t cos, uintptr_t sin) {
  chosen->steps->turn(reinterpret_cast<float*>(head), n, reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin));
}

void turn_pairs(uintptr_t head, int64_t n, uintptr_t cos, uintptr_t sin, bool parts) {
  chosen->steps->turn_pairs(reinterpret_cast<float*>(head), n, reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin), parts);
}

void sigmoids(uintptr_t x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) reinterpret_cast<float*>(x)[i] = chosen->steps->sigmoid(reinterpret_cast<float*>(x)[i]);
}

void mlp(const Mlp& of, uintptr_t x, int dtype, int64_t num_tokens, uintptr_t out, bool exact, int num_threads) {
  const Unlocked unlocked;
  run_mlp(*chosen, of, reinterpret_cast<const void*>(x), Dtype(dtype), num_tokens, reinterpret_cast<void*>(out), exact, num_threads);
}

void attention(const Attention& of, uintptr_t x, int dtype, const Spans& rows, uintptr_t cos, uintptr_t sin, const Kv& kv, uintptr_t out,
               bool exact, int num_threads) {
  const Unlocked unlocked;
  run_attention(*chosen, of, reinterpret_cast<const void*>(x), Dtype(dtype), rows.spans, reinterpret_cast<const float*>(cos),
                reinterpret_cast<const float*>(sin), kv, reinterpret_cast<void*>(out), exact, num_threads);
}

// Attention alone, for tests and benchmarks: queries and out fp32 [num_tokens, heads, dim] of one head of `length` keys and values.
void attend(uintptr_t queries, int64_t num_tokens, int64_t heads, int64_t dim, uintptr_t keys, uintptr_t values, int64_t length,
            float scaling, int64_t window, float cap, uintptr_t sinks, uintptr_t out, int format) {
  const Unlocked unlocked;
  std::vector<float> scratch(static_cast<size_t>(attend_floats(num_tokens * heads, dim)));
  Queries of = {};
  of.q = reinterpret_cast<const float*>(queries), of.out = reinterpret_cast<float*>(out);
  of.stride = heads * dim, of.num_tokens = num_tokens, of.heads = heads, of.dim = dim, of.first = length - num_tokens;
  of.window = window, of.scaling = scaling, of.cap = cap, of.sinks = reinterpret_cast<const float*>(sinks);
  of.format = KvFormat(format), of.block_stride = kPositions * kv_row(of.format, dim), of.scratch = scratch.data();
  of.keys = reinterpret_cast<const void*>(keys), of.values = reinterpret_cast<const void*>(values);
  chosen->steps->attend(of);
}

// `count` rows of keys or values fp32 [n] as the KV cache has them in int8, one after the other.
void put_codes(uintptr_t x, int64_t count, int64_t n, uintptr_t to) {
  const Unlocked unlocked;
  for (int64_t i = 0; i < count; ++i)
    chosen->steps->put_codes(reinterpret_cast<const float*>(x) + i * n, n, reinterpret_cast<uint8_t*>(to) + i * kv_row(KvFormat::kInt8, n));
}

void layer_end(uintptr_t residual, uintptr_t rows, uintptr_t weights, int64_t num_tokens, int64_t num_rows, uintptr_t shared,
               uintptr_t factors, float residual_scale, const Norm& block_norm, int64_t n, uintptr_t out, int num_threads) {
  const Unlocked unlocked;
  run_layer_end(*chosen, reinterpret_cast<const void*>(residual), reinterpret_cast<const float*>(rows),
                reinterpret_cast<const float*>(weights), num_tokens, num_rows, reinterpret_cast<const void*>(shared),
                reinterpret_cast<const float*>(factors), residual_scale, block_norm, n, reinterpret_cast<void*>(out), num_threads);
}

void bind_layers(nb::module_& m) {
  nb::class_<Weight>(m, "Weight").def_static("make", [](const Place& place, uint64_t address, uintptr_t bias, int bias_dtype) {
    return Weight{place, address, reinterpret_cast<const void*>(bias), Dtype(bias_dtype)};
  }).def_ro("place", &Weight::place);
  nb::class_<Mlp>(m, "Mlp").def_static("make", [](const Weight& gate, const Weight& up, const Weight& down, const ActivationSpec& how) {
    return Mlp{gate, up, down, how};
  });
  nb::class_<Norm>(m, "Norm").def_static("make", [](uintptr_t weight, uintptr_t bias, int dtype, float eps, float offset, bool rounds_first, bool centered) {
    return Norm{reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias), Dtype(dtype), eps, offset, rounds_first, centered};
  });
  nb::class_<Router>(m, "Router").def_static(
      "make",
      [](int64_t top_k, int scores, bool normalize, float floor, float scale, uintptr_t correction, int correction_dtype, int64_t groups,
         int64_t top_groups, int64_t group_best, float spread, bool rounds_logits, bool rounds_weights) {
        return Router{top_k, Scores(scores), normalize, floor, scale, reinterpret_cast<const void*>(correction), Dtype(correction_dtype),
                      groups, top_groups, group_best, spread, rounds_logits, rounds_weights};
      });
  nb::class_<Latent>(m, "Latent").def_static("make", [](const Weight& q_a, const Weight& kv_a, const Weight& kv_b, int64_t nope, int64_t value_dim) {
    return Latent{q_a, kv_a, kv_b, nope, value_dim};
  });
  nb::class_<Delta>(m, "Delta").def_static(
      "make", [](const std::vector<const Weight*>& inputs, int64_t key_heads, int64_t value_heads, int64_t key_dim, int64_t value_dim, int64_t kernel,
                 std::vector<int64_t> starts, std::vector<int64_t> steps, std::vector<float> convolution, std::vector<float> biases,
                 std::vector<float> rates, const Norm& norm) {
        Delta made = {{}, key_heads, value_heads, key_dim, value_dim, kernel, std::move(starts), std::move(steps), std::move(convolution),
                      std::move(biases), std::move(rates), norm};
        for (const Weight* const weight : inputs) made.inputs.push_back(*weight);
        return made;
      });
  nb::class_<Attention>(m, "Attention")
      .def_static(
          "make",
          [](const Weight& q, const Weight& k, const Weight& v, const Weight& o, int64_t heads, int64_t kv_heads, int64_t dim,
             int64_t rotary_dim, int64_t num_angles, int rope, float scaling, const Norm& q_norm, const Norm& k_norm,
             bool norm_over_heads, float clip, int64_t window, uintptr_t sinks, int sinks_dtype, const Latent* latent, bool norm_after_rope,
             bool gated, std::vector<float> scales, int64_t scale_every, const Delta* delta) {
            return Attention{q, k, v, o, heads, kv_heads, dim, rotary_dim, num_angles, Rope(rope), scaling, q_norm, k_norm, norm_over_heads,
                             clip, window, reinterpret_cast<const void*>(sinks), Dtype(sinks_dtype), latent ? *latent : Latent{}, norm_after_rope, gated,
                             std::move(scales), scale_every, delta ? *delta : Delta{}};
          },
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg("latent").none() = nb::none(), nb::arg("norm_after_rope") = false,
          nb::arg("gated") = false, nb::arg("scales") = std::vector<float>(), nb::arg("scale_every") = 1, nb::arg("delta").none() = nb::none());
  nb::class_<Layer>(m, "Layer").def_static(
      "make", [](const Norm& norm, const Norm& post_norm, const Attention& attention, const Weight& router, const Weight& shared_gate,
                 const Router& routing, float residual_scale, const Norm& block_norm) {
        return Layer{norm, post_norm, attention, router, shared_gate, routing, residual_scale, block_norm};
      });
  m.def("layer_end", &layer_end);
  m.def("norm", &norm);
  m.def("route", &route);
  m.def("turn", &turn);
  m.def("turn_pairs", &turn_pairs);
  m.def("sigmoid", &sigmoids);
  m.def("mlp", &mlp);
  m.def("attention", &attention);
  m.def("attend", &attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg("format") = 0);
  m.def("put_codes", &put_codes);
}

}  // namespace

const Ops& fate::used_ops() { return *chosen; }

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // at exit a traceback or a global may still hold what the interpreter never frees
  m.doc() = "Expert kernels on raw addresses; use fate_moe.kernels.cpu.";
  m.def("end_threads", &Unlocked::end, "The interpreter is about to end.");
  m.def("instruction_sets", &names, "What this processor can run, best first.");
  m.def("instruction_set", [] { return std::string(chosen->name); }, "What is used.");
  m.def("choose", &choose, "Use another instruction set (tests and benchmarks).");
  m.def("team", [] { return std::string(team_name()); }, "Whose threads are used.");
  nb::class_<Place>(m, "Place")
      .def_static("make", &make_place, nb::arg("kind"), nb::arg("rows"), nb::arg("cols"), nb::arg("planes"), nb::arg("scale"),
                  nb::arg("zero"), nb::arg("bias"), nb::arg("bias_dtype"), nb::arg("group") = kGroup);
  nb::class_<ActivationSpec>(m, "ActivationSpec").def_static("make", [](int activation, bool gated, bool interleaved, float alpha, float limit, float up_offset) {
    return ActivationSpec{Activation(activation), gated, interleaved, alpha, limit, up_offset};
  });
  nb::class_<ExpertPlace>(m, "ExpertPlace").def_static("make", [](const Place& up, const Place& down, const ActivationSpec& activation) {
    return ExpertPlace{up, down, activation};
  });
  nb::class_<HostCompute>(m, "HostCompute").def_static("make", [](const ExpertPlace& place, uint64_t arena, int64_t blob_bytes, uintptr_t questions,
                                                      uintptr_t answers, int64_t most, int64_t tokens, int num_threads) {
    const Mail mail = {reinterpret_cast<const uint64_t*>(questions), reinterpret_cast<uint64_t*>(answers), most, tokens};
    return std::make_unique<HostCompute>(*chosen, place, arena, blob_bytes, mail, num_threads);
  });
  m.def("experts", &experts);
  m.def("linear", &linear);
  m.def("expand", &expand);
  m.def("combine", &combine);
  m.def("activate", &activate_rows);
  m.def("read_memory", &read_memory);
  bind_layers(m);
  bind_residency(m);
  bind_step(m);
  bind_predict(m);
  bind_watch(m);
}
