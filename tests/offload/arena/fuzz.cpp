// Random use of an arena from several threads, over malloc with failures, and failures of what the arena asks for itself:
// no block may ever share bytes with another.
// Usage: fuzz SEED THREADS OPERATIONS POOLED. Prints counters; aborts where a block's bytes have changed.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <random>
#include <thread>
#include <vector>

#include "arena.h"

namespace {

std::mutex injection;
std::mt19937 failures;
std::atomic<int> failure_percent = 0;
bool pools = false;

void* allocate(void*, size_t bytes) {
  {
    std::lock_guard lock(injection);
    if (static_cast<int>(failures() % 100) < failure_percent || bytes > (size_t{1} << 30)) return nullptr;
  }
  return std::aligned_alloc(512, (bytes + 511) / 512 * 512);
}
void release(void*, void* pointer) { std::free(pointer); }
void release_slab(void*, void* pointer, size_t) { std::free(pointer); }
int order(void*, void*, void*) { return 0; }

thread_local bool noting = false;  // what the arena itself asks for, once in a while, is not there

struct Noting {
  explicit Noting(bool often) { noting = often; }
  ~Noting() { noting = false; }
};

struct Block {
  unsigned char* bytes;
  size_t size;
  unsigned char mark;
};

void check_and_free(Arena* arena, const Block& block) {
  if (block.bytes[0] != block.mark || std::memcmp(block.bytes, block.bytes + 1, block.size - 1)) {
    std::fprintf(stderr, "a block of %zu bytes has changed\n", block.size);
    std::abort();
  }
  std::memset(block.bytes, 0xdd, block.size);
  Noting fails(!pools);
  if (arena_free(arena, block.bytes) != ARENA_FREED) std::abort();
}

// Sizes that a step asks for, nearly: some left out, some extra, some others.
void train(Arena* arena, unsigned seed, int operations) {
  std::mt19937 random(seed);
  const std::vector<size_t> sizes{64, 4096, 700, 4096, 20000, 512, 4096, 1 << 16, 9000, 1 << 18};
  std::vector<Block> alive;
  size_t place = 0;
  for (int i = 0; i < operations; ++i) {
    const auto chance = random() % 100;
    void* stream = reinterpret_cast<void*>(static_cast<uintptr_t>(random() % 10 ? 0 : 64 * (1 + random() % 2)));
    if (chance < 50) {
      const auto departure = random() % 20;
      size_t size = sizes[place % sizes.size()];
      if (departure == 0) size = 1 + random() % 5000;
      else place += departure == 1 ? 2 : 1;
      if (departure == 2) size = size_t{1} << 61;
      if (departure == 3) size = 0;
      unsigned char* bytes;
      {
        Noting fails(!pools);
        bytes = static_cast<unsigned char*>(arena_allocate(arena, size, stream));
      }
      if (bytes) {
        if (size == 0 || size >> 60) std::abort();
        alive.push_back({bytes, size, static_cast<unsigned char>(random())});
        std::memset(bytes, alive.back().mark, size);
      }
    } else if (chance < 96 && !alive.empty()) {
      const size_t which = random() % 3 ? alive.size() - 1 : random() % alive.size();
      const Block block = alive[which];
      alive.erase(alive.begin() + which);
      // Shared blocks are freed at a marker that another thread sets: their bytes are not to be touched any more.
      if (random() % 10 == 0) arena_record_stream(arena, block.bytes, reinterpret_cast<void*>(uintptr_t{640}));
      check_and_free(arena, block);
    } else if (chance == 96) {
      int other = 0;
      arena_free(arena, &other);  // never one of the arena's
    } else if (chance == 97) {
      ArenaStats stats;
      arena_stats(arena, &stats);
      std::vector<ArenaEvent> events(100);
      arena_read_log(arena, static_cast<int>(random() % 4), events.data(), 100);
    }
  }
  for (auto& block : alive) check_and_free(arena, block);
}

void plan_at_random(Arena* arena, std::mt19937& random) {
  const std::vector<int64_t> sizes{4096, 700, 4096, 20000, 4096, 1 << 16, 9000, 1 << 18};
  std::vector<int64_t> threads, streams, planned, offsets;
  for (int64_t thread = 0; thread < 6; ++thread)
    for (int i = 0; i < 40; ++i) {
      threads.push_back(thread);
      streams.push_back(0);
      planned.push_back(sizes[i % sizes.size()]);
      offsets.push_back(random() % 8 ? static_cast<int64_t>(random() % 8000) * 512 : -1);  // overlaps are likely
    }
  const auto count = static_cast<int64_t>(planned.size());
  arena_add_plan(arena, random() % 3, count, threads.data(), streams.data(), planned.data(), offsets.data());
}

}  // namespace

__attribute__((noinline)) void* operator new(size_t bytes) {
  thread_local std::minstd_rand chance;
  if (noting && chance() % 50 == 0) throw std::bad_alloc();
  if (void* pointer = std::malloc(bytes)) return pointer;
  throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* pointer) noexcept { std::free(pointer); }
__attribute__((noinline)) void operator delete(void* pointer, size_t) noexcept { std::free(pointer); }

int main(int, char** arguments) {
  const auto seed = static_cast<unsigned>(std::atoi(arguments[1]));
  const int num_threads = std::atoi(arguments[2]), operations = std::atoi(arguments[3]);
  const int pooled = std::atoi(arguments[4]);
  pools = pooled != 0;
  const ArenaRuntime runtime{nullptr, allocate, release, allocate, release_slab, order, nullptr};
  Arena* arena = arena_create(&runtime, 512, 512, pooled);
  arena_record(arena, 200);
  arena_serve(arena, 1);
  std::mt19937 random(seed);
  failures.seed(seed);
  arena_reserve(arena, 8 << 20);
  plan_at_random(arena, random);
  std::atomic<int> num_done = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i)
    threads.emplace_back([&, i] {
      train(arena, seed * 100 + i, operations);
      ++num_done;
    });
  while (num_done < num_threads) {
    failure_percent = random() % 4 ? 0 : 20;
    ArenaStep ended;
    arena_step(arena, &ended);
    if (random() % 3 == 0) plan_at_random(arena, random);
    if (random() % 30 == 0) arena_drop_plan(arena, random() % 3);
    if (random() % 30 == 0) arena_trim(arena);
    if (random() % 10 == 0) arena_reserve(arena, static_cast<int64_t>(4 + random() % 6) << 20);
    std::this_thread::sleep_for(std::chrono::microseconds(300));
  }
  for (auto& thread : threads) thread.join();
  arena_step(arena, nullptr);
  ArenaStats stats;
  arena_stats(arena, &stats);
  std::printf("{\"hits\": %ld, \"misses\": %ld, \"overlaps\": %ld, \"out_of_memory\": %ld, \"unknown_frees\": %ld, ",
              long(stats.hits), long(stats.misses), long(stats.overlaps), long(stats.out_of_memory),
              long(stats.unknown_frees));
  std::printf("\"planned_bytes\": %ld, \"fallback_bytes\": %ld, \"stream_waits\": %ld}\n", long(stats.planned_bytes),
              long(stats.fallback_bytes), long(stats.stream_waits));
  arena_forget(arena);
  arena_destroy(arena);
}
