// The arena: who is served from the plan, what happens beside it, and what is counted. See arena.h.
#include <algorithm>
#include <atomic>
#include <new>
#include <utility>

#include "core.h"

namespace {

constexpr size_t kMostBytes = size_t{1} << 60;  // requests above cannot be met, and sums stay far from overflow

int64_t this_thread() {
  static std::atomic<int64_t> num_threads{0};
  thread_local const int64_t number = num_threads++;
  return number;
}

}  // namespace

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
  slab_->take(start, {end, num_blocks_, size, stream});
  ++step_.hits;
  step_.peak_bytes = std::max(step_.peak_bytes, end);
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
  const bool logged = size >= least_bytes_;
  try {
    beside_[pointer] = {logged ? num_blocks_ : -1, size, stream};
  } catch (const std::bad_alloc&) {
    ++stats_.out_of_memory;
    if (!pooled_) runtime_.release(runtime_.context, pointer);
    else pool_.release(pointer);
    return nullptr;
  }
  freed_.remove(pointer);
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

// Never fails: blocks are freed by destructors.
void Arena::log(int64_t kind, int64_t block, int64_t size, const Lane& lane) noexcept {
  if (!most_events_) return;
  if (static_cast<int64_t>(logs_[0].size()) < most_events_) {
    try {
      logs_[0].push_back({kind, block, size, lane.thread, lane.stream});
      return;
    } catch (const std::bad_alloc&) {
    }
  }
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
