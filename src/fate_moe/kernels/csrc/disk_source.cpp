#include "disk_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "checksum.h"

namespace fate {
namespace {

constexpr int64_t kAlignment = 4096;       // core.SLOT_ALIGNMENT
constexpr int64_t kAtOnce = int64_t(1) << 30;  // a single pread gives no more than 2 GiB
constexpr int64_t kBits = 64;              // sections whose check is remembered; a blob has at most four

}  // namespace

DiskSource::DiskSource(std::unique_ptr<Owner> owner, std::vector<Layout> layouts, std::vector<std::vector<Place>> places,
                       std::vector<std::string> paths, const std::vector<int>& files, const std::vector<bool>& direct, std::string advice)
    : owner_(std::move(owner)), layouts_(std::move(layouts)), places_(std::move(places)), advice_(std::move(advice)) {
  for (size_t i = 0; i < files.size(); ++i) shards_.push_back({std::move(paths.at(i)), files[i], direct.at(i), state_of(files[i])});
  for (const std::vector<Place>& of_layer : places_) {
    verified_.emplace_back(of_layer.size());
    for (const Place& one : of_layer)
      if (layouts_.at(size_t(one.layout)).sections.empty() || one.checksums.size() != layouts_[size_t(one.layout)].sections.size() || one.shard < 0 || one.shard >= int64_t(shards_.size()))
        throw std::invalid_argument("a blob without sections, checksums or a file");
  }
}

int64_t DiskSource::read(const ExpertKey& key, int64_t, uint8_t* memory, int64_t first, int64_t last) {
  const Place& where = place(key);
  const Layout& layout = layouts_[size_t(where.layout)];
  last = std::min(last, int64_t(layout.sections.size()));
  if (first < 0 || first >= last) throw std::out_of_range("no such sections");
  const int64_t start = layout.sections[size_t(first)].offset / kAlignment * kAlignment, stop = end_of(key, last);
  int error = 0;
  const int64_t got = fill(where.shard, memory + start, stop - start, where.offset + start, error);
  if (error || got < stop - start) {
    std::string what = "layer " + std::to_string(key.layer) + " expert " + std::to_string(key.expert);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      what = shards_[size_t(where.shard)].path + ": " + what;
    }
    if (error) throw StoreFailure(what + " cannot be read (" + std::strerror(error) + "); check the disk, then " + advice_);
    throw StoreFailure(what + " ends after " + std::to_string(got) + " of " + std::to_string(stop - start) + " bytes; the file is incomplete, " + advice_);
  }
  uint64_t verified;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Shard& shard = shards_[size_t(where.shard)];
    if (const State state = state_of(shard.file); !(state == shard.state)) {  // it was written to: nothing is known of its bytes
      shard.state = state;
      for (size_t layer = 0; layer < places_.size(); ++layer)
        for (size_t expert = 0; expert < places_[layer].size(); ++expert)
          if (places_[layer][expert].shard == where.shard) verified_[layer][expert] = 0;
    }
    verified = verified_[size_t(key.layer)][size_t(key.expert)];
  }
  for (int64_t number = first; number < last; ++number) {
    const uint64_t bit = number < kBits ? uint64_t(1) << number : 0;
    if (verified & bit) continue;
    if (!is_right(where, memory, number)) owner_->check(key, memory, layout.length, number);
    const std::lock_guard<std::mutex> lock(mutex_);
    verified_[size_t(key.layer)][size_t(key.expert)] |= bit;
  }
  return stop - start;
}

int64_t DiskSource::end_of(const ExpertKey& key, int64_t last) const {
  const Layout& layout = layouts_[size_t(place(key).layout)];
  if (last < 1 || last >= int64_t(layout.sections.size())) return layout.length;
  const Section& section = layout.sections[size_t(last) - 1];
  return (section.offset + section.length + kAlignment - 1) / kAlignment * kAlignment;
}

const DiskSource::Place& DiskSource::place(const ExpertKey& key) const {
  if (key.layer < 0 || key.layer >= int64_t(places_.size()) || key.expert < 0 || key.expert >= int64_t(places_[size_t(key.layer)].size()))
    throw std::out_of_range("no such expert");
  return places_[size_t(key.layer)][size_t(key.expert)];
}

// Whether a section has its checksum, as far as that is known here.
bool DiskSource::is_right(const Place& where, const uint8_t* blob, int64_t section) const {
  const Section& of = layouts_[size_t(where.layout)].sections[size_t(section)];
  return of.length >= kShortest && xxh3_64(blob + of.offset, of.length) == where.checksums[size_t(section)];
}

DiskSource::State DiskSource::state_of(int file) {
  struct stat status = {};
  if (fstat(file, &status)) return {-1, 0, 0};
#if defined(__APPLE__)
  return {int64_t(status.st_size), int64_t(status.st_mtimespec.tv_sec), int64_t(status.st_mtimespec.tv_nsec)};
#else
  return {int64_t(status.st_size), int64_t(status.st_mtim.tv_sec), int64_t(status.st_mtim.tv_nsec)};
#endif
}

// Fill `memory` from `offset` on; the bytes read, fewer only at the file's end. `error`: errno of a device that fails.
int64_t DiskSource::fill(int64_t number, uint8_t* memory, int64_t length, int64_t offset, int& error) {
  int64_t done = 0;
  while (done < length) {
    int file;
    bool direct;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      file = shards_[size_t(number)].file;
      direct = shards_[size_t(number)].direct;
    }
    const ssize_t got = pread(file, memory + done, size_t(std::min(length - done, kAtOnce)), off_t(offset + done));
    if (got < 0) {
      if (errno == EINTR) continue;
      if (!direct || errno != EINVAL) {
        error = errno;
        return done;
      }
      const int other = owner_->reopen(number);  // without our lock: it asks for the interpreter's
      const std::lock_guard<std::mutex> lock(mutex_);
      shards_[size_t(number)].file = other;
      shards_[size_t(number)].direct = false;
      continue;
    }
    done += got;
    if (!got) break;
    if (direct && done % kAlignment && done < length) {
      // The next read has to begin at a multiple of 4096: go back to one, unless the file ends here.
      if (offset + done >= state_of(file).size) break;
      done -= done % kAlignment;
    }
  }
  return done;
}

}  // namespace fate
