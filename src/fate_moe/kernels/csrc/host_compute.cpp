#include "host_compute.h"

#include <chrono>
#include <cstring>

#include "threads.h"

namespace fate {
namespace {

constexpr int64_t kRows = 16;
constexpr int64_t kMostTokens = 16;  // of a question
constexpr int kPatience = 1 << 12;  // looks between two looks at the clock

uint64_t look(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

uint32_t number_of(uint64_t word) { return uint32_t(word >> 32); }

// The lower half of `word` once its upper half is `question`.
uint32_t read(const uint64_t* word, uint32_t question) {
  for (;;) {
    const uint64_t found = look(word);
    if (number_of(found) == question) return uint32_t(found);
    pause();
  }
}

// `count` numbers, once every word has the question's number. The reads are plain, so that they become vectors: a word
// that changes meanwhile has another number. ThreadSanitizer is told so (tests/kernels/csrc/tsan.supp).
void take(const uint64_t* words, int64_t count, uint32_t question, float* numbers) {
  for (;;) {
    uint64_t strange = 0;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t word = words[i];
      const uint32_t bits = uint32_t(word);
      strange |= (word >> 32) ^ question;
      std::memcpy(numbers + i, &bits, 4);
    }
    if (!strange) return;
    pause();
    std::atomic_signal_fence(std::memory_order_seq_cst);  // look again, not at what was read before
  }
}

// Start to bring rows [begin, end) to this core's cache.
void bring(const Matrix& m, int64_t begin, int64_t end) {
  const auto rows = [&](const void* memory, int64_t row_bytes) {
    const char* const bytes = static_cast<const char*>(memory);
    for (int64_t at = begin * row_bytes; at < end * row_bytes; at += 64) __builtin_prefetch(bytes + at, 0, 2);
  };
  if (m.kind == Kind::kBf16) return rows(m.planes[0], m.cols * 2);
  if (m.kind == Kind::kInt8) rows(m.planes[0], m.groups * m.group);
  for (int i = 0; m.kind != Kind::kInt8 && i < int(m.kind); ++i) rows(m.planes[i], m.groups * m.group / (i ? 8 : 4));
  rows(m.scale, m.groups * 2);
  rows(m.zero, m.groups * 2);
}

// The next piece of question `turn`'s phase; a number beyond all pieces if others are at a later question already.
int64_t claim(std::atomic<uint64_t>& next, uint64_t turn) {
  uint64_t seen = next.load(std::memory_order_relaxed);
  for (;;) {
    if (seen >> 32 > turn) return INT32_MAX;
    const uint64_t piece = seen >> 32 == turn ? uint32_t(seen) : 0;
    if (next.compare_exchange_weak(seen, turn << 32 | (piece + 1), std::memory_order_relaxed)) return int64_t(piece);
  }
}

// Rows of all experts of a question in units of kRows. Two thirds are divided evenly, in runs that a core's prefetcher follows; free
// threads take the rest unit by unit. With all rows divided evenly, threads waited 31 of 181 us for the slowest (14 on a 16-core VM).
class Split {
 public:
  Split(int64_t count, int64_t rows) : rows_(rows), units_((rows + kRows - 1) / kRows), all_(count * units_), even_(all_ * 2 / 3) {}

  // Calls each(expert, begin, end) for the runs that thread `number` alone computes.
  template <class Each>
  void own(int64_t number, int64_t num_threads, Each each) const {
    const int64_t end = even_ * (number + 1) / num_threads;
    for (int64_t at = even_ * number / num_threads; at < end;) {
      const int64_t to = std::min(end, (at / units_ + 1) * units_);
      run(at, to, each);
      at = to;
    }
  }

  template <class Each>
  void rest(std::atomic<uint64_t>& next, uint64_t turn, Each each) const {
    for (int64_t at; (at = even_ + claim(next, turn)) < all_;) run(at, at + 1, each);
  }

 private:
  template <class Each>
  void run(int64_t at, int64_t to, Each each) const {
    const int64_t expert = at / units_;
    each(expert, (at - expert * units_) * kRows, std::min(rows_, (to - expert * units_) * kRows));
  }

  const int64_t rows_, units_, all_, even_;
};

}  // namespace

// What a question asks of one expert: tokens[k]'s output is row first + k of the answer.
struct HostCompute::Asked {
  uint64_t blob;
  int64_t first, count;
  int64_t tokens[kMostTokens];
};

struct HostCompute::Own {
  Inputs token, inner;
  std::vector<float> rows, pair;  // what products write, of each token; gate and up rows side by side
  std::vector<Asked> asked;
  int64_t gated;  // the expert whose inner values are in `inner`
};

HostCompute::HostCompute(const Ops& ops, const ExpertPlace& place, uint64_t arena, int64_t blob_bytes, const Mail& mail,
                         int num_threads)
    : ops_(ops), place_(place), arena_(arena), blob_bytes_(blob_bytes), mail_(mail),
      integers_(place.up.kind != Kind::kBf16), num_threads_(num_threads), inner_(mail.most * place.down.cols) {
  for (int64_t i = 0; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
}

HostCompute::~HostCompute() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
}

// The first word of the question after `last`; false when it is time to stop.
bool HostCompute::await(uint32_t last, uint64_t& head) const {
  using clock = std::chrono::steady_clock;
  const clock::time_point began = clock::now();
  for (bool idle = false;;) {
    for (int i = 0; i < (idle ? 1 : kPatience); ++i) {
      head = look(mail_.questions);
      if (number_of(head) != last) return true;
      pause();
    }
    if (stop_.load(std::memory_order_relaxed)) return false;
    idle = idle || clock::now() - began > std::chrono::milliseconds(20);
    if (idle) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void HostCompute::serve(int64_t number) {
  Own own;
  own.token.resize(mail_.tokens, place_.up.cols, place_.up.group);
  own.inner.resize(mail_.tokens, place_.down.cols, place_.down.group);
  own.rows.resize(mail_.tokens * std::max(place_.up.rows, place_.down.rows));
  own.pair.resize(place_.up.rows);
  uint64_t head = 0;
  uint32_t last = 0;
  for (int64_t turn = 1; await(last, head); ++turn) {
    last = number_of(head);
    answer(own, number, last, int64_t(head & 0xFFFF), int64_t(head >> 16 & 0xFFFF), turn);
  }
}

// `own.rows` of the tokens that `inputs` has at `places`: rows [begin, end) of `m` times each.
void HostCompute::multiply(Own& own, const Inputs& inputs, const int64_t* places, int64_t count, const Matrix& m, int64_t begin,
                           int64_t end) const {
  constexpr int64_t kAtOnce = 4;
  for (int64_t first = 0; first < count; first += kAtOnce) {
    Token tokens[kAtOnce];
    const int64_t n = std::min(kAtOnce, count - first);
    for (int64_t k = 0; k < n; ++k) {
      tokens[k] = inputs.token(places[first + k], integers_, own.rows.data() + (first + k) * (own.rows.size() / mail_.tokens));
    }
    ops_.product(m, tokens, n, begin, end);
  }
}

void HostCompute::answer(Own& own, int64_t number, uint32_t question, int64_t count, int64_t tokens, int64_t turn) {
  const int64_t inner = place_.down.cols, stride = int64_t(own.rows.size()) / mail_.tokens;
  own.asked.resize(count);
  int64_t pairs = 0;
  for (int64_t e = 0; e < count; ++e) {
    Asked& asked = own.asked[e];
    asked.blob = arena_ + uint64_t(read(mail_.questions + 1 + e, question)) * blob_bytes_;
    const uint32_t mask = read(mail_.questions + 1 + mail_.most + e, question);
    asked.first = pairs, asked.count = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (mask >> t & 1) asked.tokens[asked.count++] = t;
    }
    pairs += asked.count;
  }
  for (int64_t t = 0; t < tokens; ++t) {
    take(mail_.questions + 1 + 2 * mail_.most + t * place_.up.cols, place_.up.cols, question, own.token.x(t));
    own.token.finish(ops_, t, place_.up.kind, integers_);
  }
  const auto up = [&](int64_t e, int64_t begin, int64_t end) {
    const Asked& asked = own.asked[e];
    const Matrix m = place_.up.at(asked.blob, int(place_.up.kind));
    const int64_t n = end - begin;
    const int64_t each = place_.activation.gated && place_.activation.interleaved ? 2 : 1;  // rows side by side in the matrix too
    const bool apart = place_.activation.gated && each == 1;
    multiply(own, own.token, asked.tokens, asked.count, m, each * begin, each * end);
    if (apart) multiply(own, own.token, asked.tokens, asked.count, m, inner + begin, inner + end);
    for (int64_t k = 0; k < asked.count; ++k) {
      const float* const rows = own.rows.data() + k * stride;
      std::copy_n(rows + each * begin, each * n, own.pair.data());
      if (apart) std::copy_n(rows + inner + begin, n, own.pair.data() + n);
      ops_.activate(place_.activation, own.pair.data(), n, inner_.data() + (asked.first + k) * inner + begin);
    }
  };
  const Split ups(count, inner), downs(count, place_.down.rows);
  ups.own(number, num_threads_, up);
  ups.rest(next_up_, uint64_t(turn), up);
  met_.fetch_add(1, std::memory_order_acq_rel);
  // The others' last rows take a while: memory need not wait for them.
  downs.own(number, num_threads_, [&](int64_t e, int64_t begin, int64_t end) {
    bring(place_.down.at(own.asked[e].blob, int(place_.down.kind)), begin, end);
  });
  while (met_.load(std::memory_order_acquire) < turn * num_threads_) pause();
  own.gated = -1;
  const auto down = [&](int64_t e, int64_t begin, int64_t end) {
    static constexpr int64_t kInOrder[kMostTokens] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Asked& asked = own.asked[e];
    for (int64_t k = 0; k < asked.count && own.gated != e; ++k) {
      std::copy_n(inner_.data() + (asked.first + k) * inner, inner, own.inner.x(k));
      own.inner.finish(ops_, k, place_.down.kind, integers_);
    }
    own.gated = e;
    multiply(own, own.inner, kInOrder, asked.count, place_.down.at(asked.blob, int(place_.down.kind)), begin, end);
    for (int64_t k = 0; k < asked.count; ++k) {
      uint64_t* const answers = mail_.answers + (asked.first + k) * place_.down.rows;
      for (int64_t row = begin; row < end; ++row) {
        uint32_t bits;
        std::memcpy(&bits, own.rows.data() + k * stride + row, 4);
        // Release: the next question, which overwrites inner_, comes after all answers.
        __atomic_store_n(answers + row, uint64_t(question) << 32 | bits, __ATOMIC_RELEASE);
      }
    }
  };
  downs.own(number, num_threads_, down);
  downs.rest(next_down_, uint64_t(turn), down);
}

}  // namespace fate
