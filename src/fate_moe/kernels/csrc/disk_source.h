// Reads experts from a store's shards past the page cache: the twin of store/reader.py and io/direct.py.
#pragma once
#include <deque>
#include <string>

#include "residency.h"

namespace fate {

class DiskSource final : public Source {
 public:
  struct Section {
    int64_t offset, length;  // in the blob
  };
  struct Layout {
    std::vector<Section> sections;
    int64_t length;
  };
  struct Place {
    int64_t layout, shard, offset;  // offset: of the blob in its file
    std::vector<uint64_t> checksums;  // of its sections
  };

  // What Python does: it owns the files, and says what is wrong with bytes.
  class Owner {
   public:
    virtual ~Owner() = default;
    virtual void check(const ExpertKey& key, const uint8_t* blob, int64_t length, int64_t section) = 0;  // throws if its checksum differs
    virtual int reopen(int64_t shard) = 0;  // its file, without O_DIRECT
  };

  // `places` by layer and expert; `files` and `direct` by shard: open for reading, and whether with O_DIRECT. `advice` ends each message.
  DiskSource(std::unique_ptr<Owner> owner, std::vector<Layout> layouts, std::vector<std::vector<Place>> places,
             std::vector<std::string> paths, const std::vector<int>& files, const std::vector<bool>& direct, std::string advice);

  int64_t read(const ExpertKey& key, int64_t slot, uint8_t* memory, int64_t first, int64_t last) override;
  // Where in the blob a read of these sections ends; Python checks its buffers with it.
  int64_t end_of(const ExpertKey& key, int64_t last) const;

 private:
  struct State {
    int64_t size, seconds, nanoseconds;  // of the last write
    bool operator==(const State& other) const { return size == other.size && seconds == other.seconds && nanoseconds == other.nanoseconds; }
  };
  struct Shard {
    std::string path;
    int file;
    bool direct;
    State state;  // while it stays, the bytes are taken to be unchanged
  };

  const Place& place(const ExpertKey& key) const;
  bool is_right(const Place& where, const uint8_t* blob, int64_t section) const;
  static State state_of(int file);
  int64_t fill(int64_t shard, uint8_t* memory, int64_t length, int64_t offset, int& error);

  std::unique_ptr<Owner> owner_;
  const std::vector<Layout> layouts_;
  const std::vector<std::vector<Place>> places_;
  const std::string advice_;
  std::mutex mutex_;  // of what follows
  std::vector<Shard> shards_;
  std::vector<std::vector<uint64_t>> verified_;  // by layer and expert, a bit a section
};

}  // namespace fate
