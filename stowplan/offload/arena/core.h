// What an arena holds. How it works is in arena.cpp; its C interface, and what happens at a fork, in interface.cpp.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "arena.h"
#include "follower.h"
#include "pool.h"
#include "slab.h"

// Pointers that were freed not long ago: who frees one of them again made a mistake, and it is nobody else's block.
class RecentlyFreed {
 public:
  void add(void* pointer) { slot(pointer) = pointer; }
  void remove(void* pointer) {
    if (slot(pointer) == pointer) slot(pointer) = nullptr;
  }
  bool has(void* pointer) { return slot(pointer) == pointer; }

 private:
  void*& slot(void* pointer) { return slots_[(reinterpret_cast<uintptr_t>(pointer) >> 6) % slots_.size()]; }
  std::array<void*, 4096> slots_{};
};

struct Arena {
 public:
  Arena(const ArenaRuntime& runtime, int64_t alignment, int64_t least_bytes, bool pooled)
      : runtime_(runtime), alignment_(alignment), least_bytes_(least_bytes), pooled_(pooled), pool_(runtime_) {}
  ~Arena() {
    if (slab_) release(*slab_);
  }

  void* allocate(size_t bytes, void* stream);
  int free(void* pointer);
  void record_stream(void* pointer, void* stream);
  void step(ArenaStep* ended);
  bool reserve(int64_t bytes);
  bool add_plan(ArenaPlan plan);
  void drop_plan(int64_t key);
  void serve(bool on);
  void record(int64_t most_events);
  int64_t read_log(int steps_ago, ArenaEvent* events, int64_t most);
  void stats(ArenaStats* stats);
  void reset_peak();
  void forget();
  void trim();

  std::mutex mutex;
  void detach_child() {  // after fork: plans and logs are about the parent's steps
    serving_ = false;
    most_events_ = 0;
  }

 private:
  struct Beside {  // a block that is not at a planned address
    int64_t block;
    int64_t size;
    void* stream;
  };
  struct Shared {  // a block that other streams use, too
    std::vector<void*> streams;
    bool freed = false;
  };

  int64_t aligned(int64_t bytes) const { return (bytes + alignment_ - 1) / alignment_ * alignment_; }
  bool order(void* waiting, void* working) {
    ++stats_.stream_waits;
    return runtime_.order && runtime_.order(runtime_.context, waiting, working) == 0;
  }
  void* at_planned_address(const Lane& lane, int64_t size, void* stream);
  void* beside_plan(std::unique_lock<std::mutex>& lock, const Lane& lane, int64_t size, void* stream);
  void* from_pool(int64_t size, void* stream);
  int give_back(void* pointer, void** to_runtime);
  void give_back_shared(std::vector<void*>* to_runtime);
  void* stream_of(void* pointer, bool* known);
  void log(int64_t kind, int64_t block, int64_t size, const Lane& lane) noexcept;
  void note_peak();
  void release(Slab& slab) { runtime_.release_slab(runtime_.context, slab.base(), slab.bytes()); }

  const ArenaRuntime runtime_;
  const int64_t alignment_, least_bytes_;
  const bool pooled_;
  Pool pool_;
  Follower follower_;
  std::unique_ptr<Slab> slab_;                  // that plans are about
  std::vector<std::unique_ptr<Slab>> retired_;  // with blocks still alive
  std::unordered_map<void*, Beside> beside_;
  std::unordered_map<void*, Shared> shared_;
  RecentlyFreed freed_;
  bool serving_ = false;
  int64_t num_blocks_ = 0;
  int64_t most_events_ = 0;
  std::array<std::vector<ArenaEvent>, 3> logs_;  // this step, the one before, and the one before that
  ArenaStep step_{};
  ArenaStats stats_{};
};
