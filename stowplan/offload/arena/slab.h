// One piece of memory that planned addresses are offsets into: which bytes are in use, and by which stream last.
#pragma once

#include <cstdint>
#include <iterator>
#include <map>

struct LiveRange {
  int64_t end;
  int64_t block;
  int64_t size;
  void* stream;
};

class Slab {
 public:
  Slab(char* base, int64_t bytes) : base_(base), bytes_(bytes) {}

  char* base() const { return base_; }
  int64_t bytes() const { return bytes_; }
  bool idle() const { return live_.empty(); }
  bool holds(const void* pointer) const {
    return static_cast<const char*>(pointer) >= base_ && static_cast<const char*>(pointer) < base_ + bytes_;
  }

  // The overlap guard: are any of [start, end) in use?
  bool in_use(int64_t start, int64_t end) const {
    auto after = live_.lower_bound(start);
    if (after != live_.end() && after->first < end) return true;
    return after != live_.begin() && std::prev(after)->second.end > start;
  }

  void take(int64_t start, LiveRange range) { live_.emplace(start, range); }

  LiveRange* find(const void* pointer) {
    auto found = live_.find(static_cast<const char*>(pointer) - base_);
    return found == live_.end() ? nullptr : &found->second;
  }

  void give_back(const void* pointer) { live_.erase(static_cast<const char*>(pointer) - base_); }

  // Bytes [start, end) are for `stream` from now on: `order(previous)` for each other stream that used some of them,
  // true if that stream's work is waited for. False, and nothing is changed, if one is not.
  template <typename Order>
  bool pass_to(void* stream, int64_t start, int64_t end, Order order) {
    auto use = first_use_after(start);
    if (use != uses_.end() && use->second.stream == stream && use->first <= start && use->second.end >= end) return true;
    for (; use != uses_.end() && use->first < end; ++use)
      if (use->second.stream != stream && !order(use->second.stream)) return false;
    set_use(stream, start, end);
    return true;
  }

 private:
  struct Use {
    int64_t end;
    void* stream;
  };

  std::map<int64_t, Use>::iterator first_use_after(int64_t start) {
    auto use = uses_.upper_bound(start);
    if (use != uses_.begin() && std::prev(use)->second.end > start) --use;
    return use;
  }

  void set_use(void* stream, int64_t start, int64_t end) {
    cut(start);
    cut(end);
    auto placed = uses_.try_emplace(start).first;  // from here on there is nothing to run out of memory
    placed->second = {end, stream};
    for (auto use = std::next(placed); use != uses_.end() && use->first < end;) use = uses_.erase(use);
    join(placed);
  }

  // No entry goes across `at`.
  void cut(int64_t at) {
    auto use = first_use_after(at);
    if (use == uses_.end() || use->first >= at) return;
    uses_.emplace(at, use->second);
    use->second.end = at;
  }

  // Neighbours of one stream become one entry: with a single stream there is one in all.
  void join(std::map<int64_t, Use>::iterator use) {
    auto after = std::next(use);
    if (after != uses_.end() && after->first == use->second.end && after->second.stream == use->second.stream) {
      use->second.end = after->second.end;
      uses_.erase(after);
    }
    if (use == uses_.begin()) return;
    auto before = std::prev(use);
    if (before->second.end == use->first && before->second.stream == use->second.stream) {
      before->second.end = use->second.end;
      uses_.erase(use);
    }
  }

  char* base_;
  int64_t bytes_;
  std::map<int64_t, LiveRange> live_;  // by offset
  std::map<int64_t, Use> uses_;        // by offset, disjoint: who was given these bytes last
};
