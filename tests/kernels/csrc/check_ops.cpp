// Every operation of instruction sets of this processor against the portable one and against double, without Python: for
// processors that are only emulated (`make test-arm`). Arguments: the sets that are checked, of which the first must be the best that
// there is; without any, all that there are.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "inputs.h"
#include "products.h"
#include "threads.h"

using namespace fate;

namespace {

int num_checks = 0, num_failures = 0;
std::mt19937 generator(1);

void check(bool right, const char* ops, const std::string& what) {
  ++num_checks;
  if (right) return;
  if (++num_failures <= 20) std::printf("FAILED %s: %s\n", ops, what.c_str());
}

float normal() { return std::normal_distribution<float>()(generator); }

uint16_t half_of(double value) {  // of magnitudes from 2^-14 to 2^15, to nearest
  int exponent;
  const double fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
  return uint16_t((value < 0 ? 0x8000 : 0) + ((exponent + 14) << 10) + int(std::lround((fraction - 0.5) * 2048)));
}

double of_half(uint16_t bits) { return std::ldexp(1024 + (bits & 1023), (bits >> 10 & 31) - 25) * (bits & 0x8000 ? -1 : 1); }
double of_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Memory that ends with its last element, before a page that nobody may read (masked loads are not seen by the sanitizers).
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count = 0) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_t(count) * sizeof(T);
    size_ = (bytes + page - 1) / page * page + page;
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + size_ - page, page, PROT_NONE)) std::abort();
    first_ = reinterpret_cast<T*>(memory_ + size_ - page - bytes);
  }
  Guarded(Guarded&& other) : memory_(std::exchange(other.memory_, nullptr)), size_(other.size_), first_(other.first_) {}
  Guarded& operator=(Guarded&& other) {
    std::swap(memory_, other.memory_), std::swap(size_, other.size_), std::swap(first_, other.first_);
    return *this;
  }
  ~Guarded() {
    if (memory_) munmap(memory_, size_);
  }
  T* get() const { return first_; }
  T& operator[](int64_t i) const { return first_[i]; }

 private:
  char* memory_;
  size_t size_;
  T* first_;
};

struct Example {
  Guarded<uint8_t> planes[3];
  Guarded<uint16_t> scale, zero, bias;
  Matrix m;

  Example(Kind kind, int64_t rows, int64_t cols, int64_t group)
      : m{kind, rows, cols, group, groups_of(cols, group), {}, nullptr, nullptr, nullptr, Dtype::kF16} {
    const int64_t groups = rows * m.groups;
    const int num_planes = kind == Kind::kInt8 || kind == Kind::kBf16 ? 1 : int(kind);
    for (int i = 0; i < num_planes; ++i) {
      const int64_t bytes = kind == Kind::kBf16 ? rows * cols * 2 : groups * group / (kind == Kind::kInt8 ? 1 : i ? 8 : 4);
      planes[i] = Guarded<uint8_t>(bytes);
      for (int64_t j = 0; j < bytes; ++j) planes[i][j] = uint8_t(generator());
      m.planes[i] = planes[i].get();
    }
    if (kind == Kind::kBf16) {
      for (int64_t i = 0; i < rows * cols; ++i) {
        const float value = normal();
        std::memcpy(planes[0].get() + 2 * i, reinterpret_cast<const char*>(&value) + 2, 2);
      }
    } else {
      scale = Guarded<uint16_t>(groups), zero = Guarded<uint16_t>(groups);
      for (int64_t i = 0; i < groups; ++i) {
        scale[i] = half_of(0.01 + 0.01 * std::fabs(normal()));
        zero[i] = half_of(0.1 + 0.1 * std::fabs(normal()));
      }
      m.scale = scale.get(), m.zero = zero.get();
    }
    bias = Guarded<uint16_t>(rows);
    for (int64_t i = 0; i < rows; ++i) bias[i] = half_of(normal() + 3);
    m.bias = bias.get();
  }

  // The weight, and the magnitude of the terms that it is made of.
  std::pair<double, double> weight(int64_t row, int64_t col) const {
    if (m.kind == Kind::kBf16) {
      uint16_t bits;
      std::memcpy(&bits, planes[0].get() + 2 * (row * m.cols + col), 2);
      return {of_bf16(bits), std::fabs(of_bf16(bits))};
    }
    const int64_t group = row * m.groups + col / m.group, e = col % m.group, quarter = m.group / 4;
    double code = 0;
    if (m.kind == Kind::kInt8) {
      code = m.planes[0][group * m.group + e];
    } else {
      code = 4 * (m.planes[0][group * quarter + e % quarter] >> (2 * (e / quarter)) & 3);
      if (m.kind != Kind::kPlanes1) code += 2 * (m.planes[1][group * quarter / 2 + e / 8] >> (e % 8) & 1);
      if (m.kind == Kind::kPlanes3) code += m.planes[2][group * quarter / 2 + e / 8] >> (e % 8) & 1;
      code += m.kind == Kind::kPlanes1 ? 1.5 : m.kind == Kind::kPlanes2 ? 0.5 : 0;
    }
    const double scaled = code * of_half(m.scale[group]), zero = of_half(m.zero[group]);
    return {scaled - zero, scaled + std::fabs(zero)};
  }
};

struct Products {
  std::vector<float> out;  // [tokens, rows]
  std::vector<double> error, rounding;
};

// One product with `ops`, and how far it is from double with the activations that it saw.
Products product_of(const Ops& ops, const Example& of, const std::vector<float>& x, int64_t tokens, bool exact) {
  const Matrix& m = of.m;
  const bool integers = !exact && m.kind != Kind::kBf16;
  Inputs inputs;
  inputs.resize(tokens, m.cols, m.group);
  Products made{std::vector<float>(size_t(tokens * m.rows)), {}, {}};
  std::vector<Token> seen;
  for (int64_t t = 0; t < tokens; ++t) {
    std::memcpy(inputs.x(t), x.data() + t * m.cols, size_t(m.cols) * 4);
    inputs.finish(ops, t, m.kind, integers);
    seen.push_back(inputs.token(t, integers, made.out.data() + t * m.rows));
  }
  ops.product(m, seen.data(), tokens, 0, m.rows);
  std::vector<int8_t> q(size_t(m.groups * m.group));
  std::vector<float> scale(size_t(m.groups)), sum(size_t(m.groups));
  for (int64_t t = 0; t < tokens; ++t) {
    portable_ops()->quantize(inputs.x(t), m.groups, m.group, false, q.data(), nullptr, scale.data(), sum.data());
    for (int64_t row = 0; row < m.rows; ++row) {
      const double bias = of_half(of.bias[row]);
      double want = bias, terms = std::fabs(bias);
      for (int64_t i = 0; i < m.cols; ++i) {
        const double value = integers ? double(q[size_t(i)]) * scale[size_t(i / m.group)] : x[size_t(t * m.cols + i)];
        const auto [weight, magnitude] = of.weight(row, i);
        want += value * weight, terms += std::fabs(value) * magnitude;
      }
      made.error.push_back(std::fabs(made.out[size_t(t * m.rows + row)] - want));
      made.rounding.push_back(terms * std::numeric_limits<float>::epsilon());
    }
  }
  return made;
}

std::vector<float> numbers(int64_t count, float size = 1) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = size * normal();
  return values;
}

void check_products(const Ops& ops, Kind kind, int64_t group) {
  int64_t tokens = 0;
  for (const int64_t cols : {1, 15, 63, 64, 65, 96, 130, 192, 250, 256, 320, 530, 1408}) {
    tokens = tokens % 9 + 1;
    const Example example(kind, 7, cols, group);
    const std::vector<float> x = numbers(tokens * cols);
    const std::string matrix =
        " kind " + std::to_string(int(kind)) + ", groups of " + std::to_string(group) + ", " + std::to_string(cols) + " columns";
    for (const bool exact : {false, true}) {
      const std::string what = "product of" + matrix + ", " + std::to_string(tokens) + " tokens" + (exact ? ", exact" : "");
      const Products plain = product_of(*portable_ops(), example, x, tokens, exact), made = product_of(ops, example, x, tokens, exact);
      double most = 0;
      for (const double error : plain.error) most = std::max(most, error);
      bool right = true;
      for (size_t i = 0; i < made.error.size(); ++i) right = right && made.error[i] <= 2 * most + made.rounding[i];
      check(right, ops.name, what);
      if (!exact || kind == Kind::kBf16) check(plain.out == made.out, ops.name, what + ", portable's bits");
      const std::vector<float> last(x.end() - cols, x.end());  // a token's result does not depend on its company
      const Products alone = product_of(ops, example, last, 1, exact);
      check(!std::memcmp(alone.out.data(), &made.out[made.out.size() - 7], 7 * 4), ops.name, what + ", the last one alone");
    }
    if (kind == Kind::kBf16) continue;
    const int64_t many = 5 + cols % 40;  // rows of the matrix and tokens to the edge of what is theirs
    std::vector<float> plain_out(size_t(many * 7)), out(plain_out.size());
    const std::vector<float> rows = numbers(many * cols);
    run_linear(*portable_ops(), example.m, rows.data(), Dtype::kF32, many, plain_out.data(), Dtype::kF32, false, 2);
    run_linear(ops, example.m, rows.data(), Dtype::kF32, many, out.data(), Dtype::kF32, false, 2);
    check(plain_out == out, ops.name, "product of" + matrix + ", " + std::to_string(many) + " tokens, portable's bits");
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
      std::vector<char> want(size_t(7 * cols * size_of(dtype))), got(want.size());
      portable_ops()->expand(example.m, 0, 7, want.data(), dtype);
      ops.expand(example.m, 0, 7, got.data(), dtype);
      check(want == got, ops.name, "expand of" + matrix);
    }
    for (const float strange : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
      std::vector<float> y = numbers(cols);
      y[size_t(cols / 2)] = strange;
      for (const float value : product_of(ops, example, y, 1, false).out) check(std::isnan(value), ops.name, "infinity shows");
    }
  }
}

void check_loops(const Ops& ops) {
  const Ops& plain = *portable_ops();
  const auto same = [&](const void* a, const void* b, int64_t bytes, const char* what) {
    check(!std::memcmp(a, b, size_t(bytes)), ops.name, what);
  };
  for (const float size : {1e-38f, 1e-3f, 1.0f, 1e30f})
    for (const int64_t group : {32, 64, 128}) {
      const std::vector<float> x = numbers(17 * group, size);
      std::vector<int8_t> q[2];
      std::vector<float> made[2];
      for (int i = 0; i < 2; ++i) {
        q[i].resize(size_t(17 * group)), made[i].resize(3 * 17);
        (i ? ops : plain).quantize(x.data(), 17, group, false, q[i].data(), nullptr, made[i].data(), made[i].data() + 17);
        (i ? ops : plain).sum_groups(x.data(), 17, group, made[i].data() + 34);
      }
      same(q[0].data(), q[1].data(), 17 * group, "quantize");
      same(made[0].data(), made[1].data(), 3 * 17 * 4, "quantize's scales and sums");
    }
  for (int activation = 0; activation < 5; ++activation)
    for (const bool interleaved : {false, true}) {
      const std::vector<float> x = numbers(2 * 101, 8);
      const ActivationSpec spec = {Activation(activation), true, interleaved, 1.702f, 7.0f, 1.0f};
      std::vector<float> want(101), got(101);
      plain.activate(spec, x.data(), 101, want.data());
      ops.activate(spec, x.data(), 101, got.data());
      same(want.data(), got.data(), 101 * 4, "activation");
    }
  std::vector<uint16_t> patterns;  // every half, subnormals, infinities and NaN among them
  for (int bits = 0; bits < 1 << 16; ++bits) patterns.push_back(uint16_t(bits));
  patterns.resize(patterns.size() - 3);
  for (const Dtype dtype : {Dtype::kF16, Dtype::kBf16}) {
    std::vector<float> want(patterns.size()), got(patterns.size());
    plain.to_float(patterns.data(), dtype, int64_t(patterns.size()), want.data());
    ops.to_float(patterns.data(), dtype, int64_t(patterns.size()), got.data());
    for (size_t i = 0; i < want.size(); ++i)
      check(std::isnan(want[i]) ? std::isnan(got[i]) : !std::memcmp(&want[i], &got[i], 4), ops.name, "to_float");
  }
  const std::vector<float> rows = numbers(5 * 131), weights = numbers(5);
  std::vector<float> want(131), got(131);
  plain.combine(rows.data(), weights.data(), 5, 131, want.data());
  ops.combine(rows.data(), weights.data(), 5, 131, got.data());
  same(want.data(), got.data(), 131 * 4, "combine");
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    plain.from_float(rows.data(), 131, want.data(), dtype);
    ops.from_float(rows.data(), 131, got.data(), dtype);
    same(want.data(), got.data(), 131 * size_of(dtype), "from_float");
  }
}

void check_steps(const Ops& ops) {
  const Steps &plain = *portable_ops()->steps, &steps = *ops.steps;
  for (const int64_t n : {1, 15, 16, 100}) {
    const std::vector<float> x = numbers(n), weight = numbers(n);
    std::vector<float> want(x.size()), got(x.size());
    for (const bool rounds : {false, true}) {
      plain.normalize(x.data(), weight.data(), n, 1e-6f, rounds, want.data());
      steps.normalize(x.data(), weight.data(), n, 1e-6f, rounds, got.data());
      check(want == got, ops.name, "normalize");
    }
    want = got = x;
    plain.softmax(want.data(), n), steps.softmax(got.data(), n);
    check(want == got, ops.name, "softmax");
    want = got = x;
    plain.add(0.3f, weight.data(), n, want.data()), steps.add(0.3f, weight.data(), n, got.data());
    check(want == got, ops.name, "add");
    want = got = x;
    plain.unit(want.data(), n, 0.3f), steps.unit(got.data(), n, 0.3f);
    check(want == got, ops.name, "unit");
    plain.decays(x.data(), weight.data(), x.data(), n, want.data()), steps.decays(x.data(), weight.data(), x.data(), n, got.data());
    check(want == got, ops.name, "decays");
    const float* const inputs[] = {x.data(), weight.data(), x.data()};
    const std::vector<float> kernel = numbers(3 * n);
    plain.convolve(inputs, kernel.data(), n, 3, n, want.data()), steps.convolve(inputs, kernel.data(), n, 3, n, got.data());
    check(want == got, ops.name, "convolve");
    for (const bool silu : {false, true}) {
      want = got = x;
      plain.gate(weight.data(), silu, n, want.data()), steps.gate(weight.data(), silu, n, got.data());
      check(want == got, ops.name, "gate");
    }
  }
  for (const int64_t columns : {16, 64, 112}) {
    const int64_t num_rows = 5, key_dim = 24;
    const std::vector<float> keys = numbers(num_rows * key_dim), values = numbers(num_rows * columns), decays(num_rows, 0.9f), first = numbers(key_dim * columns);
    std::vector<float> states[2] = {first, first}, out[2] = {std::vector<float>(values.size()), std::vector<float>(values.size())};
    for (int i = 0; i < 2; ++i) {
      DeltaRows of = {};
      of.q = of.k = keys.data(), of.v = values.data(), of.decay = of.beta = decays.data();
      of.key_stride = key_dim, of.value_stride = of.out_stride = of.state_stride = of.columns = columns, of.gate_stride = 1;
      of.out = out[i].data(), of.state = states[i].data(), of.num_rows = num_rows, of.key_dim = key_dim;
      (i ? steps : plain).delta(of);
    }
    check(out[0] == out[1] && states[0] == states[1], ops.name, "delta, " + std::to_string(columns) + " columns");
  }
  for (const int64_t dim : {8, 24, 32, 100, 128})
    for (const int64_t num_tokens : {1, 7, 40}) {
      const int64_t heads = 1 + dim % 3, count = 75 + num_tokens;
      const std::vector<float> q = numbers(num_tokens * heads * dim);
      Guarded<uint16_t> states[2] = {Guarded<uint16_t>(count * dim), Guarded<uint16_t>(count * dim)};
      for (const auto& each : states)
        for (int64_t i = 0; i < count * dim; ++i) {
          const float value = normal();
          std::memcpy(&each[i], reinterpret_cast<const char*>(&value) + 2, 2);
        }
      std::vector<float> out[2], scratch(size_t(attend_floats(num_tokens * heads, dim)));
      for (int i = 0; i < 2; ++i) {
        out[i].resize(q.size());
        Queries of = {};
        of.q = q.data(), of.out = out[i].data(), of.stride = heads * dim, of.num_tokens = num_tokens, of.heads = heads, of.dim = dim;
        of.first = 75, of.window = dim == 24 ? 70 : 0, of.scaling = 0.3f, of.cap = dim == 100 ? 5.0f : 0.0f;
        of.keys = states[0].get(), of.values = states[1].get(), of.scratch = scratch.data();
        (i ? steps : plain).attend(of);
      }
      check(out[0] == out[1], ops.name, "attend, " + std::to_string(dim) + " channels, " + std::to_string(num_tokens) + " tokens");
      const int64_t row = kv_row(KvFormat::kInt8, dim);
      const std::vector<float> x = numbers(count * dim);
      Guarded<uint8_t> coded[2] = {Guarded<uint8_t>(count * row), Guarded<uint8_t>(count * row)};
      for (int i = 0; i < 2; ++i)
        for (int64_t t = 0; t < count; ++t) (i ? steps : plain).put_codes(x.data() + t * dim, dim, &coded[i][t * row]);
      check(!std::memcmp(coded[0].get(), coded[1].get(), size_t(count * row)), ops.name, "put_codes");
      for (int i = 0; i < 2; ++i) {
        Queries of = {};
        of.q = q.data(), of.out = out[i].data(), of.stride = heads * dim, of.num_tokens = num_tokens, of.heads = heads, of.dim = dim;
        of.first = 75, of.scaling = 0.3f, of.format = KvFormat::kInt8, of.block_stride = kPositions * row;
        of.keys = coded[0].get(), of.values = coded[1].get(), of.scratch = scratch.data();
        (i ? steps : plain).attend(of);
      }
      check(out[0] == out[1], ops.name, "attend on int8, " + std::to_string(dim) + " channels, " + std::to_string(num_tokens) + " tokens");
    }
}

// Several threads (the extension's own: there is no OpenMP here) make the same bits as one.
void check_threads(const Ops& ops) {
  const Example example(Kind::kPlanes3, 700, 320, 64);
  const std::vector<float> x = numbers(3 * 320);
  std::vector<float> out[2] = {std::vector<float>(3 * 700), std::vector<float>(3 * 700)};
  for (int i = 0; i < 2; ++i)
    run_linear(ops, example.m, x.data(), Dtype::kF32, 3, out[i].data(), Dtype::kF32, false, i ? 3 : 1);
  check(out[0] == out[1], ops.name, std::string("linear on ") + team_name());
}

}  // namespace

int main(int count, char** wanted) {
  std::vector<const Ops*> found;
  for (const Ops* ops : {amx_ops(), avx512_ops(), avx_vnni_ops(), avx2_ops(), neon_i8mm_ops(), neon_dot_ops(), neon_ops(), portable_ops()})
    if (ops) found.push_back(ops);
  if (count > 1) {
    check(!std::strcmp(found[0]->name, wanted[1]), wanted[1], "is not the best");
    std::vector<const Ops*> named;
    for (int i = 1; i < count; ++i) {
      const auto at = std::find_if(found.begin(), found.end(), [&](const Ops* ops) { return !std::strcmp(ops->name, wanted[i]); });
      check(at != found.end(), wanted[i], "is not there");
      if (at != found.end()) named.push_back(*at);
    }
    found = named;
  }
  for (const Ops* ops : found) {
    for (const Kind kind : {Kind::kPlanes1, Kind::kPlanes2, Kind::kPlanes3, Kind::kInt8})
      for (const int64_t group : {32, 64, 128}) check_products(*ops, kind, group);
    check_products(*ops, Kind::kBf16, 64);
    check_loops(*ops);
    check_steps(*ops);
    check_threads(*ops);
    std::printf("%s: checked\n", ops->name);
  }
  std::printf("%d passed, %d failed\n", num_checks - num_failures, num_failures);
  return num_failures != 0;
}
