// The arena: who is served from the plan, what happens beside it, and what is counted. See arena.h.
#include "arena.h"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "follower.h"
#include "pool.h"
#include "slab.h"

namespace {

constexpr size_t kMostBytes = size_t{1} << 60;  // requests above cannot be met, and sums stay far from overflow

int64_t this_thread() {
  static std::atomic<int64_t> num_threads{0};
  thread_local const int64_t number = num_threads++;
  return number;
}

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

}  // namespace

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
  void log(int64_t kind, int64_t block, int64_t size, const Lane& lane);
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

void* Arena::allocate(size_t bytes, void* stream) {
  if (!bytes) return nullptr;
  const Lane lane{this_thread(), reinterpret_cast<int64_t>(stream)};
  std::unique_lock lock(mutex);
  ++stats_.requests;
  if (bytes > kMostBytes) {
    ++stats_.out_of_memory;
    return nullptr;
  }
  const auto size = static_cast<int64_t>(bytes);
  if (size < least_bytes_) {
    ++stats_.small;
  } else {
    ++step_.requests;
    if (serving_)
      if (void* pointer = at_planned_address(lane, size, stream)) return pointer;
  }
  return beside_plan(lock, lane, size, stream);
}

void* Arena::at_planned_address(const Lane& lane, int64_t size, void* stream) {
  if (!follower_.knows(lane)) {
    ++step_.strangers;
    return nullptr;
  }
  const PlannedRequest* request = follower_.next(lane, size);
  if (request && request->offset < 0) {
    ++step_.unplanned;
    return nullptr;
  }
  const int64_t start = request ? request->offset : 0, end = start + aligned(size);
  auto wait_for = [&](void* working) { return order(stream, working); };
  if (!request || !slab_ || end > slab_->bytes()) {
    ++step_.misses;
    return nullptr;
  }
  if (slab_->in_use(start, end)) {
    ++step_.overlaps;
    ++step_.misses;
    return nullptr;
  }
  if (!slab_->pass_to(stream, start, end, wait_for)) {
    ++step_.misses;
    return nullptr;
  }
  ++step_.hits;
  step_.peak_bytes = std::max(step_.peak_bytes, end);
  slab_->take(start, {end, num_blocks_, size, stream});
  log(ARENA_ALLOCATE, num_blocks_++, size, lane);
  stats_.planned_bytes += size;
  note_peak();
  void* pointer = slab_->base() + start;
  if (runtime_.observe) runtime_.observe(runtime_.context, pointer, size);
  return pointer;
}

void* Arena::beside_plan(std::unique_lock<std::mutex>& lock, const Lane& lane, int64_t size, void* stream) {
  void* pointer = nullptr;
  if (pooled_) {
    pointer = from_pool(size, stream);
  } else {
    lock.unlock();
    pointer = runtime_.allocate(runtime_.context, size);
    lock.lock();
  }
  if (!pointer) {
    ++stats_.out_of_memory;
    return nullptr;
  }
  freed_.remove(pointer);
  const bool logged = size >= least_bytes_;
  beside_[pointer] = {logged ? num_blocks_ : -1, size, stream};
  if (logged) log(ARENA_ALLOCATE, num_blocks_++, size, lane);
  stats_.fallback_bytes += size;
  note_peak();
  return pointer;
}

void* Arena::from_pool(int64_t size, void* stream) {
  void* pointer = pool_.allocate(size, stream);
  if (pointer || !slab_ || !slab_->idle()) return pointer;
  release(*slab_);
  slab_.reset();
  return pool_.allocate(size, stream);
}

int Arena::free(void* pointer) {
  if (!pointer) return ARENA_FREED;
  void* to_runtime = nullptr;
  int outcome = ARENA_FREED;
  {
    std::lock_guard lock(mutex);
    auto shared = shared_.find(pointer);
    if (shared == shared_.end()) outcome = give_back(pointer, &to_runtime);
    else if (std::exchange(shared->second.freed, true)) outcome = ARENA_DOUBLE;
    stats_.double_frees += outcome == ARENA_DOUBLE;
    stats_.unknown_frees += outcome == ARENA_UNKNOWN;
  }
  if (to_runtime) runtime_.release(runtime_.context, to_runtime);
  return outcome;
}

int Arena::give_back(void* pointer, void** to_runtime) {
  auto leave = [&](Slab& slab) {
    const LiveRange* range = slab.find(pointer);
    if (!range) return ARENA_DOUBLE;
    if (runtime_.observe) runtime_.observe(runtime_.context, pointer, -range->size);
    log(ARENA_FREE, range->block, range->size, {this_thread(), reinterpret_cast<int64_t>(range->stream)});
    stats_.planned_bytes -= range->size;
    slab.give_back(pointer);
    return ARENA_FREED;
  };
  if (slab_ && slab_->holds(pointer)) return leave(*slab_);
  for (auto slab = retired_.begin(); slab != retired_.end(); ++slab) {
    if (!(*slab)->holds(pointer)) continue;
    const int outcome = leave(**slab);
    if ((*slab)->idle()) {
      release(**slab);
      retired_.erase(slab);
    }
    return outcome;
  }
  auto found = beside_.find(pointer);
  if (found == beside_.end()) return freed_.has(pointer) ? ARENA_DOUBLE : ARENA_UNKNOWN;
  const Beside block = found->second;
  beside_.erase(found);
  freed_.add(pointer);
  if (block.block >= 0)
    log(ARENA_FREE, block.block, block.size, {this_thread(), reinterpret_cast<int64_t>(block.stream)});
  stats_.fallback_bytes -= block.size;
  if (!pooled_) *to_runtime = pointer;
  else pool_.release(pointer);
  return ARENA_FREED;
}

void* Arena::stream_of(void* pointer, bool* known) {
  *known = true;
  if (slab_ && slab_->holds(pointer))
    if (auto* range = slab_->find(pointer)) return range->stream;
  for (auto& slab : retired_)
    if (auto* range = slab->holds(pointer) ? slab->find(pointer) : nullptr) return range->stream;
  auto found = beside_.find(pointer);
  *known = found != beside_.end();
  return *known ? found->second.stream : nullptr;
}

void Arena::record_stream(void* pointer, void* stream) {
  std::lock_guard lock(mutex);
  bool known;
  if (stream_of(pointer, &known) == stream || !known) return;
  auto& streams = shared_[pointer].streams;
  if (std::find(streams.begin(), streams.end(), stream) == streams.end()) streams.push_back(stream);
}

// What was shared and is freed: its own stream waits for the others, so that it may be given out again.
void Arena::give_back_shared(std::vector<void*>* to_runtime) {
  for (auto shared = shared_.begin(); shared != shared_.end();) {
    bool known, done = shared->second.freed;
    void* own = stream_of(shared->first, &known);
    for (void* stream : shared->second.streams) done = done && order(own, stream);
    if (!done) {
      ++shared;
      continue;
    }
    void* rest = nullptr;
    give_back(shared->first, &rest);
    if (rest) to_runtime->push_back(rest);
    shared = shared_.erase(shared);
  }
}

void Arena::step(ArenaStep* ended) {
  std::vector<void*> to_runtime;
  {
    std::lock_guard lock(mutex);
    give_back_shared(&to_runtime);
    step_.plan = follower_.key();
    step_.thread = this_thread();
    step_.resynchronisations = follower_.resynchronisations() - stats_.resynchronisations;
    step_.slab_bytes = slab_ ? slab_->bytes() : 0;
    step_.num_events = static_cast<int64_t>(logs_[0].size());
    if (ended) *ended = step_;
    ++stats_.steps;
    stats_.hits += step_.hits;
    stats_.misses += step_.misses;
    stats_.unplanned += step_.unplanned;
    stats_.strangers += step_.strangers;
    stats_.overlaps += step_.overlaps;
    stats_.resynchronisations = follower_.resynchronisations();
    stats_.peak_bytes = std::max(stats_.peak_bytes, step_.peak_bytes);
    step_ = {};
    std::rotate(logs_.begin(), logs_.end() - 1, logs_.end());
    logs_[0].clear();
    follower_.restart();
  }
  for (void* pointer : to_runtime) runtime_.release(runtime_.context, pointer);
}

bool Arena::reserve(int64_t bytes) {
  std::lock_guard lock(mutex);
  bytes = aligned(bytes);
  if (slab_ && slab_->bytes() >= bytes) return true;
  pool_.trim();
  if (slab_ && slab_->idle()) {
    release(*slab_);
    slab_.reset();
  }
  void* base = bytes ? runtime_.allocate_slab(runtime_.context, bytes) : nullptr;
  if (!base) return !bytes;
  if (slab_) retired_.push_back(std::move(slab_));
  slab_ = std::make_unique<Slab>(static_cast<char*>(base), bytes);
  return true;
}

bool Arena::add_plan(ArenaPlan plan) {
  std::lock_guard lock(mutex);
  for (auto& lane : plan.lanes)
    for (auto& request : lane.requests) {
      if (request.offset == -1) continue;
      const bool room = slab_ && request.size > 0 && request.size <= slab_->bytes() && request.offset >= 0 &&
                        request.offset <= slab_->bytes() - request.size;
      if (!room || request.offset % alignment_) return false;
    }
  follower_.add(std::move(plan));
  return true;
}

void Arena::drop_plan(int64_t key) {
  std::lock_guard lock(mutex);
  follower_.drop(key);
}

void Arena::serve(bool on) {
  std::lock_guard lock(mutex);
  serving_ = on;
}

void Arena::record(int64_t most_events) {
  std::lock_guard lock(mutex);
  most_events_ = most_events;
}

void Arena::log(int64_t kind, int64_t block, int64_t size, const Lane& lane) {
  if (static_cast<int64_t>(logs_[0].size()) < most_events_)
    logs_[0].push_back({kind, block, size, lane.thread, lane.stream});
  else if (most_events_)
    ++step_.dropped_events;
}

int64_t Arena::read_log(int steps_ago, ArenaEvent* events, int64_t most) {
  std::lock_guard lock(mutex);
  if (steps_ago < 0 || steps_ago >= static_cast<int>(logs_.size())) return 0;
  const auto& log = logs_[steps_ago];
  const auto count = std::min<int64_t>(std::max<int64_t>(most, 0), static_cast<int64_t>(log.size()));
  std::copy_n(log.begin(), count, events);
  return count;
}

void Arena::note_peak() {
  stats_.fallback_peak_bytes = std::max(stats_.fallback_peak_bytes, stats_.fallback_bytes);
  stats_.live_peak_bytes = std::max(stats_.live_peak_bytes, stats_.fallback_bytes + stats_.planned_bytes);
}

void Arena::stats(ArenaStats* stats) {
  std::lock_guard lock(mutex);
  *stats = stats_;
  stats->hits += step_.hits;
  stats->misses += step_.misses;
  stats->unplanned += step_.unplanned;
  stats->strangers += step_.strangers;
  stats->overlaps += step_.overlaps;
  stats->resynchronisations = follower_.resynchronisations();
  stats->plan_changes = follower_.plan_changes();
  stats->peak_bytes = std::max(stats_.peak_bytes, step_.peak_bytes);
  stats->slab_bytes = slab_ ? slab_->bytes() : 0;
  stats->reserved_bytes = stats->slab_bytes + (pooled_ ? pool_.reserved_bytes() : stats_.fallback_bytes);
  for (auto& slab : retired_) stats->reserved_bytes += slab->bytes();
}

void Arena::reset_peak() {
  std::lock_guard lock(mutex);
  stats_.live_peak_bytes = stats_.fallback_bytes + stats_.planned_bytes;
}

void Arena::forget() {
  std::lock_guard lock(mutex);
  follower_ = Follower();
  serving_ = false;
  most_events_ = 0;
  for (auto& log : logs_) log = {};
  step_ = {};
  stats_ = {.planned_bytes = stats_.planned_bytes, .fallback_bytes = stats_.fallback_bytes};
  note_peak();
  if (slab_ && slab_->idle()) release(*slab_);
  else if (slab_) retired_.push_back(std::move(slab_));
  slab_.reset();
}

void Arena::trim() {
  std::lock_guard lock(mutex);
  pool_.trim();
}

// Note: fork
//   A child gets the memory as it was and no other thread, so every arena is between two calls while a process forks.
namespace {

std::mutex all_mutex;
std::vector<Arena*> all_arenas;

void before_fork() {
  all_mutex.lock();
  for (Arena* arena : all_arenas) arena->mutex.lock();
}

void after_fork() {
  for (Arena* arena : all_arenas) arena->mutex.unlock();
  all_mutex.unlock();
}

void after_fork_in_child() {
  for (Arena* arena : all_arenas) arena->detach_child();
  after_fork();
}

}  // namespace

Arena* arena_create(const ArenaRuntime* runtime, int64_t alignment, int64_t least_bytes, int pooled) {
  static const int registered = pthread_atfork(before_fork, after_fork, after_fork_in_child);
  (void)registered;
  auto* arena = new Arena(*runtime, alignment, least_bytes, pooled != 0);
  std::lock_guard lock(all_mutex);
  all_arenas.push_back(arena);
  return arena;
}

void arena_destroy(Arena* arena) {
  {
    std::lock_guard lock(all_mutex);
    std::erase(all_arenas, arena);
  }
  delete arena;
}

void* arena_allocate(Arena* arena, size_t bytes, void* stream) { return arena->allocate(bytes, stream); }
int arena_free(Arena* arena, void* pointer) { return arena->free(pointer); }
void arena_record_stream(Arena* arena, void* pointer, void* stream) { arena->record_stream(pointer, stream); }
void arena_step(Arena* arena, ArenaStep* ended) { arena->step(ended); }
int arena_reserve(Arena* arena, int64_t bytes) { return arena->reserve(bytes) ? 0 : -1; }

int arena_add_plan(Arena* arena, int64_t key, int64_t count, const int64_t* threads, const int64_t* streams,
                   const int64_t* sizes, const int64_t* offsets) {
  ArenaPlan plan{key, {}};
  for (int64_t i = 0; i < count; ++i) {
    const Lane lane{threads[i], streams[i]};
    if (!plan.find(lane)) plan.lanes.push_back({lane, {}});
    for (auto& planned : plan.lanes)
      if (planned.lane == lane) planned.requests.push_back({sizes[i], offsets[i]});
  }
  return arena->add_plan(std::move(plan)) ? 0 : -1;
}

void arena_drop_plan(Arena* arena, int64_t key) { arena->drop_plan(key); }
void arena_serve(Arena* arena, int on) { arena->serve(on != 0); }
void arena_record(Arena* arena, int64_t most_events) { arena->record(most_events); }
int64_t arena_read_log(Arena* arena, int steps_ago, ArenaEvent* events, int64_t most) {
  return arena->read_log(steps_ago, events, most);
}
void arena_stats(Arena* arena, ArenaStats* stats) { arena->stats(stats); }
void arena_reset_peak(Arena* arena) { arena->reset_peak(); }
void arena_forget(Arena* arena) { arena->forget(); }
void arena_trim(Arena* arena) { arena->trim(); }
