#include "share.h"

#include <chrono>
#include <cstring>

#include "inputs.h"
#include "threads.h"

namespace fate {
namespace {

constexpr int64_t kRows = 8;  // threads' shares begin on multiples of this
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

// `count` numbers, once every word has the question's number.
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
  if (m.kind == Kind::kInt8) rows(m.planes[0], m.groups * 64);
  static constexpr int64_t widths[] = {16, 8, 8};
  for (int i = 0; m.kind != Kind::kInt8 && i < int(m.kind); ++i) rows(m.planes[i], m.groups * widths[i]);
  rows(m.scale, m.groups * 2);
  rows(m.zero, m.groups * 2);
}

// Calls each(expert, begin, end) for thread `number`'s share of `count` experts' `rows`.
template <class Each>
void share_of(int64_t number, int64_t num_threads, int64_t count, int64_t rows, Each each) {
  const int64_t units = (rows + kRows - 1) / kRows, all = count * units;
  const int64_t end = all * (number + 1) / num_threads;
  for (int64_t at = all * number / num_threads; at < end;) {
    const int64_t expert = at / units, to = std::min(end, (expert + 1) * units);
    each(expert, (at - expert * units) * kRows, std::min(rows, (to - expert * units) * kRows));
    at = to;
  }
}

}  // namespace

struct Share::Own {
  Inputs token, inner;
  std::vector<float> rows, pair;  // what products write; gate and up rows side by side
};

Share::Share(const Ops& ops, const ExpertPlace& place, uint64_t arena, int64_t blob_bytes, const Mail& mail, bool exact,
             int num_threads)
    : ops_(ops), place_(place), arena_(arena), blob_bytes_(blob_bytes), mail_(mail),
      integers_(!exact && place.up.kind != Kind::kBf16), num_threads_(num_threads), inner_(mail.most * place.down.cols) {
  for (int64_t i = 0; i < num_threads; ++i) threads_.emplace_back([this, i] { serve(i); });
}

Share::~Share() {
  stop_ = true;
  for (std::thread& thread : threads_) thread.join();
}

// The first word of the question after `last`; false when it is time to stop.
bool Share::await(uint32_t last, uint64_t& head) const {
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

void Share::serve(int64_t number) {
  Own own;
  own.token.resize(1, place_.up.cols);
  own.inner.resize(1, place_.down.cols);
  own.rows.resize(std::max(place_.up.rows, place_.down.rows));
  own.pair.resize(place_.up.rows);
  uint64_t head = 0;
  uint32_t last = 0;
  for (int64_t meetings = 1; await(last, head); ++meetings) {
    last = number_of(head);
    answer(own, number, last, int64_t(uint32_t(head)), meetings);
  }
}

void Share::answer(Own& own, int64_t number, uint32_t question, int64_t count, int64_t meetings) {
  const int64_t hidden = place_.up.cols, inner = place_.down.cols;
  const auto blob = [&](int64_t e) { return arena_ + uint64_t(read(mail_.questions + 1 + e, question)) * blob_bytes_; };
  take(mail_.questions + 1 + mail_.most, hidden, question, own.token.x(0));
  own.token.finish(ops_, 0, place_.up.kind, integers_);
  const Token token = own.token.token(0, integers_, own.rows.data());
  share_of(number, num_threads_, count, inner, [&](int64_t e, int64_t begin, int64_t end) {
    const Matrix up = place_.up.at(blob(e), int(place_.up.kind));
    const int64_t n = end - begin;
    ops_.product(up, &token, 1, begin, end);
    if (place_.gate.gated) ops_.product(up, &token, 1, inner + begin, inner + end);
    std::copy_n(own.rows.data() + begin, n, own.pair.data());
    if (place_.gate.gated) std::copy_n(own.rows.data() + inner + begin, n, own.pair.data() + n);
    ops_.gate(place_.gate, own.pair.data(), n, inner_.data() + e * inner + begin);
  });
  met_.fetch_add(1, std::memory_order_acq_rel);
  // The others' last rows take a while: memory need not wait for them.
  share_of(number, num_threads_, count, place_.down.rows, [&](int64_t e, int64_t begin, int64_t end) {
    bring(place_.down.at(blob(e), int(place_.down.kind)), begin, end);
  });
  while (met_.load(std::memory_order_acquire) < meetings * num_threads_) pause();
  share_of(number, num_threads_, count, place_.down.rows, [&](int64_t e, int64_t begin, int64_t end) {
    std::copy_n(inner_.data() + e * inner, inner, own.inner.x(0));
    own.inner.finish(ops_, 0, place_.down.kind, integers_);
    const Token gated = own.inner.token(0, integers_, own.rows.data());
    ops_.product(place_.down.at(blob(e), int(place_.down.kind)), &gated, 1, begin, end);
    uint64_t* const answers = mail_.answers + e * place_.down.rows;
    for (int64_t row = begin; row < end; ++row) {
      uint32_t bits;
      std::memcpy(&bits, own.rows.data() + row, 4);
      __atomic_store_n(answers + row, uint64_t(question) << 32 | bits, __ATOMIC_RELAXED);
    }
  });
}

}  // namespace fate
