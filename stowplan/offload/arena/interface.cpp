// The C interface, and what happens at a fork.
#include <pthread.h>

#include <new>
#include <utility>

#include "core.h"

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

void* arena_allocate(Arena* arena, size_t bytes, void* stream) try {
  return arena->allocate(bytes, stream);
} catch (const std::bad_alloc&) {  // for what the arena notes of a block, which was not taken
  return nullptr;
}
int arena_free(Arena* arena, void* pointer) { return arena->free(pointer); }
void arena_record_stream(Arena* arena, void* pointer, void* stream) { arena->record_stream(pointer, stream); }
void arena_step(Arena* arena, ArenaStep* ended) { arena->step(ended); }
int arena_reserve(Arena* arena, int64_t bytes) { return arena->reserve(bytes) ? 0 : -1; }

int arena_add_plan(Arena* arena, int64_t key, int64_t count, const int64_t* threads, const int64_t* streams,
                   const int64_t* sizes, const int64_t* offsets) try {
  ArenaPlan plan{key, {}};
  for (int64_t i = 0; i < count; ++i) {
    const Lane lane{threads[i], streams[i]};
    if (!plan.find(lane)) plan.lanes.push_back({lane, {}});
    for (auto& planned : plan.lanes)
      if (planned.lane == lane) planned.requests.push_back({sizes[i], offsets[i]});
  }
  return arena->add_plan(std::move(plan)) ? 0 : -1;
} catch (const std::bad_alloc&) {
  return -2;
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
