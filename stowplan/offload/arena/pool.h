// What is not planned, on devices where asking the runtime is slow: best fit over cached segments, split and joined.
//
// A segment belongs to the stream that it was first asked for, and so do its blocks for ever: work on one stream is in
// order, so a block may be given out again while its last use is still on its way.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>

#include "arena.h"

class Pool {
 public:
  explicit Pool(const ArenaRuntime& runtime) : runtime_(runtime) {}
  Pool(const Pool&) = delete;
  ~Pool() { trim(); }

  void* allocate(int64_t bytes, void* stream) {
    bytes = round_up(bytes, kGranule);
    const bool small = bytes <= kSmall;
    auto found = idle_.lower_bound({stream, small, bytes, nullptr});
    if (found == idle_.end() || std::get<0>(*found) != stream || std::get<1>(*found) != small) {
      Block* segment = new_segment(bytes, stream, small);
      if (!segment) return nullptr;
      found = idle_.find(key(segment));
    }
    Block* block = std::get<3>(*found);
    idle_.erase(found);
    const int64_t rest = block->bytes - bytes;
    if (small ? rest >= kGranule : rest > kSmall) split(block, bytes);
    block->used = true;
    used_.emplace(block->start, block);
    return block->start;
  }

  bool release(void* pointer) {
    auto found = used_.find(pointer);
    if (found == used_.end()) return false;
    Block* block = found->second;
    used_.erase(found);
    block->used = false;
    if (block->after && !block->after->used) join(block, block->after);
    if (block->before && !block->before->used) {
      block = block->before;
      join(block, block->after);
    }
    idle_.insert(key(block));
    return true;
  }

  // Segments without a block in use go back to the runtime.
  void trim() {
    for (auto entry = idle_.begin(); entry != idle_.end();) {
      Block* block = std::get<3>(*entry);
      if (block->before || block->after) {
        ++entry;
        continue;
      }
      entry = idle_.erase(entry);
      runtime_.release(runtime_.context, block->start);
      reserved_ -= block->bytes;
      delete block;
    }
  }

  int64_t reserved_bytes() const { return reserved_; }

 private:
  static constexpr int64_t kMiB = 1 << 20;
  static constexpr int64_t kGranule = 512;
  static constexpr int64_t kSmall = kMiB;               // up to here, blocks share segments of
  static constexpr int64_t kSmallSegment = 2 * kMiB;
  static constexpr int64_t kMedium = 10 * kMiB;         // up to here, of
  static constexpr int64_t kMediumSegment = 20 * kMiB;  // and above, of the size asked for, rounded up to
  static constexpr int64_t kRounding = 2 * kMiB;

  struct Block {
    char* start;
    int64_t bytes;
    void* stream;
    bool small;
    bool used = false;
    Block* before = nullptr;  // neighbours in the segment
    Block* after = nullptr;
  };

  using Key = std::tuple<void*, bool, int64_t, Block*>;

  static int64_t round_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }
  static Key key(Block* block) { return {block->stream, block->small, block->bytes, block}; }

  Block* new_segment(int64_t bytes, void* stream, bool small) {
    const int64_t least = round_up(bytes, kRounding);
    bytes = small ? kSmallSegment : bytes < kMedium ? kMediumSegment : least;
    void* start = runtime_.allocate(runtime_.context, bytes);
    if (!start) {
      trim();
      start = runtime_.allocate(runtime_.context, bytes = least);
    }
    if (!start) return nullptr;
    reserved_ += bytes;
    Block* block = new Block{static_cast<char*>(start), bytes, stream, small};
    idle_.insert(key(block));
    return block;
  }

  void split(Block* block, int64_t bytes) {
    Block* rest = new Block{block->start + bytes, block->bytes - bytes, block->stream, block->small};
    rest->before = block;
    rest->after = block->after;
    if (rest->after) rest->after->before = rest;
    block->after = rest;
    block->bytes = bytes;
    idle_.insert(key(rest));
  }

  // `next` follows `block` in memory, and is gone afterwards; neither is in use.
  void join(Block* block, Block* next) {
    idle_.erase(key(block));
    idle_.erase(key(next));
    block->bytes += next->bytes;
    block->after = next->after;
    if (block->after) block->after->before = block;
    delete next;
  }

  const ArenaRuntime& runtime_;
  std::set<Key> idle_;
  std::unordered_map<void*, Block*> used_;
  int64_t reserved_ = 0;
};
