// Everything in the extension that runs on several threads, for ThreadSanitizer (`make tsan`), without Python: the thread team, phases,
// products and experts called by several threads at once, and host compute with its mail.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host_compute.h"
#include "products.h"
#include "threads.h"

using namespace fate;

namespace {

std::atomic<int> num_failures{0};

void check(bool right, const char* what) {
  if (!right && num_failures.fetch_add(1) < 20) std::printf("FAILED: %s\n", what);
}

std::vector<float> numbers(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> made(static_cast<size_t>(count));
  for (float& value : made) value = normal(generator);
  return made;
}

std::vector<uint16_t> bf16s(int64_t count, unsigned seed) {
  std::vector<uint16_t> made(static_cast<size_t>(count));
  const std::vector<float> values = numbers(count, seed);
  for (size_t i = 0; i < made.size(); ++i) std::memcpy(&made[i], reinterpret_cast<const char*>(&values[i]) + 2, 2);
  return made;
}

// What one phase wrote, every thread reads in the next, without atomics: only the end of a phase orders them.
struct Sums {
  Phases phases;
  std::vector<int64_t> first, second;

  Sums(int num_threads, int64_t count) : phases(num_threads), first(size_t(count)), second(size_t(count)) {}

  void operator()() {
    const int64_t count = int64_t(first.size());
    phases.each(0, count, [&](int64_t i) { first[size_t(i)] = i; });
    phases.each(1, count, [&](int64_t i) { second[size_t(i)] = first[size_t(count - 1 - i)] + first[size_t((i * 7) % count)]; });
    phases.each(2, count, [&](int64_t i) { first[size_t(i)] = second[size_t((i + 1) % count)]; });
  }
};

void check_team(int num_threads) {
  for (int64_t count : {1, 2, 3, 17, 64}) {
    Sums work(num_threads, count);
    run_phases(num_threads, work);
    bool right = true;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t of = (i + 1) % count;
      right = right && work.first[size_t(i)] == count - 1 - of + (of * 7) % count;
    }
    check(right, "phases");
  }
}

// Calls of several threads share one team.
template <class Call>
void from_threads(int callers, Call call) {
  std::vector<std::thread> threads;
  for (int i = 0; i < callers; ++i) threads.emplace_back([&, i] { call(i); });
  for (std::thread& thread : threads) thread.join();
}

constexpr int64_t kRowsUp = 96, kHidden = 64, kInner = 48, kExperts = 6, kMostChosen = 4;

struct Experts {
  std::vector<uint16_t> arena = bf16s(kExperts * blob(), 1);
  ExpertPlace place = {};

  static int64_t blob() { return 2 * kInner * kHidden + kHidden * kInner; }
  Experts() {
    place.up = {Kind::kBf16, kRowsUp, kHidden, kGroup, {0, 0, 0}, 0, 0, -1, Dtype::kF32};
    place.down = {Kind::kBf16, kHidden, kInner, kGroup, {kRowsUp * kHidden * 2, 0, 0}, 0, 0, -1, Dtype::kF32};
    place.activation = {Activation::kSilu, true, false, 1.0f, INFINITY, 0.0f};
  }
  uint64_t address(int64_t expert) const { return reinterpret_cast<uint64_t>(arena.data()) + uint64_t(expert * blob() * 2); }

  std::vector<float> run(const Ops& ops, const std::vector<float>& x, const std::vector<int64_t>& chosen, int num_threads) const {
    Batch batch = {};
    for (size_t i = 0; i < chosen.size(); ++i) {
      batch.addresses.push_back(address(chosen[i]));
      batch.num_planes.push_back(int(Kind::kBf16));
      batch.starts.push_back(int64_t(i));
      batch.choices.push_back(int64_t(i));
    }
    batch.starts.push_back(int64_t(chosen.size()));
    std::vector<float> out(chosen.size() * kHidden);
    batch.x = x.data(), batch.x_dtype = Dtype::kF32, batch.num_tokens = 1, batch.top_k = int64_t(chosen.size()), batch.out = out.data();
    run_experts(ops, place, batch, false, num_threads);
    return out;
  }
};

void check_products(const Ops& ops) {
  const std::vector<uint16_t> weights = bf16s(kRowsUp * kHidden, 2);
  Matrix m = {Kind::kBf16, kRowsUp, kHidden, kGroup, 1, {reinterpret_cast<const uint8_t*>(weights.data()), nullptr, nullptr}, nullptr, nullptr,
              nullptr, Dtype::kF32};
  const std::vector<float> x = numbers(20 * kHidden, 3);
  std::vector<float> want(20 * kRowsUp);
  run_linear(ops, m, x.data(), Dtype::kF32, 20, want.data(), Dtype::kF32, false, 1);
  const Experts experts;
  const std::vector<float> want_experts = experts.run(ops, x, {5, 0, 3}, 1);
  from_threads(3, [&](int caller) {
    for (int turn = 0; turn < 10; ++turn) {
      check_team(1 + (caller + turn) % 4);
      std::vector<float> got(want.size());
      run_linear(ops, m, x.data(), Dtype::kF32, 20, got.data(), Dtype::kF32, false, 1 + turn % 4);
      check(got == want, "linear on several threads");
      check(experts.run(ops, x, {5, 0, 3}, 1 + turn % 4) == want_experts, "experts on several threads");
    }
  });
}

// The other side of the mail, as the GPU is: words in any order, each with the question's number.
void check_host_compute(const Ops& ops, int num_threads) {
  constexpr size_t kTokens = 6, kMost = kTokens * kMostChosen;
  const Experts experts;
  std::vector<uint64_t> questions(1 + 2 * kMost + kTokens * kHidden), answers(kMost * kHidden);
  const HostCompute computing(ops, experts.place, experts.address(0), Experts::blob() * 2,
                              {questions.data(), answers.data(), kMost, kTokens}, num_threads);
  for (uint64_t question = 1; question <= 40; ++question) {
    const size_t tokens = question % 3 ? 1 : kTokens;
    const std::vector<float> x = numbers(tokens * kHidden, unsigned(question));
    std::vector<int64_t> chosen;
    for (uint64_t i = 0; i <= question % kMostChosen; ++i) chosen.push_back(int64_t((question + i * 5) % kExperts));
    const auto put = [&](size_t at, uint32_t bits) { __atomic_store_n(&questions[at], question << 32 | bits, __ATOMIC_RELEASE); };
    for (size_t i = 0; i < tokens * kHidden; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &x[i], 4);
      put(1 + 2 * kMost + i, bits);
      if (i == kHidden / 2) put(0, uint32_t(tokens << 16 | chosen.size()));
    }
    std::vector<float> want;
    for (size_t e = 0; e < chosen.size(); ++e) {
      const uint32_t mask = tokens == 1 ? 1 : uint32_t(0x2F >> e | 1 << e);
      put(1 + e, uint32_t(chosen[e]));
      put(1 + kMost + e, mask & ((1u << tokens) - 1));
      for (size_t t = 0; t < tokens; ++t) {
        if (!(mask >> t & 1)) continue;
        const std::vector<float> one(x.begin() + int64_t(t * kHidden), x.begin() + int64_t((t + 1) * kHidden));
        const std::vector<float> its = experts.run(ops, one, {chosen[e]}, 1);
        want.insert(want.end(), its.begin(), its.end());
      }
    }
    std::vector<float> got(want.size());
    for (size_t i = 0; i < got.size(); ++i) {
      uint64_t word;
      while ((word = __atomic_load_n(&answers[i], __ATOMIC_ACQUIRE)) >> 32 != question) std::this_thread::yield();
      const uint32_t bits = uint32_t(word);
      std::memcpy(&got[i], &bits, 4);
    }
    check(got == want, "host compute");
  }
}

}  // namespace

int main() {
  const Ops& ops = *portable_ops();
  for (int num_threads : {1, 2, 3, 5}) check_team(num_threads);
  from_threads(4, [](int caller) {
    for (int turn = 0; turn < 50; ++turn) check_team(1 + (caller + turn) % 5);
  });
  check_products(ops);
  for (int num_threads : {1, 2, 3}) check_host_compute(ops, num_threads);
  std::printf("%s, %s: %d failed\n", ops.name, team_name(), num_failures.load());
  return num_failures != 0;
}
