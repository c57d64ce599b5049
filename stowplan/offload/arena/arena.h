// A training step's allocations at planned addresses: the C interface. No torch, no CUDA.
//
// Sizes and offsets are bytes. A stream is an opaque handle of the device's runtime, null for the default one. Every
// function may be called from any thread at any time.
#pragma once

#include <cstddef>
#include <cstdint>

#define ARENA_API extern "C" __attribute__((visibility("default")))

struct Arena;

// Where memory comes from: torch's previous allocator on the CPU, the CUDA runtime, or a stand-in.
struct ArenaRuntime {
  void* context;
  void* (*allocate)(void* context, size_t bytes);           // beside the plan; null: out of memory
  void (*release)(void* context, void* pointer);            // waits for work on the device that may still use it
  void* (*allocate_slab)(void* context, size_t bytes);      // null: out of memory
  void (*release_slab)(void* context, void* pointer, size_t bytes);
  // What `waiting` is given from now on starts after all that `working` has been given so far. 0: done. May be null
  // where there are no streams.
  int (*order)(void* context, void* waiting, void* working);
  // A block from the plan comes (bytes > 0) or goes (bytes < 0). May be null.
  void (*observe)(void* context, void* pointer, int64_t bytes);
};

struct ArenaStats {
  int64_t steps;             // markers
  int64_t requests;          // all that were not empty
  int64_t small;             // of these: below the least planned size
  int64_t hits;              // served at a planned address
  int64_t misses;            // should or could have been planned, and were not served so
  int64_t unplanned;         // known to the plan as blocks that it has no address for
  int64_t strangers;         // of threads and streams that no plan knows
  int64_t overlaps;          // of the misses: the planned bytes were still in use
  int64_t resynchronisations;
  int64_t plan_changes;      // within steps: another plan fits what was asked for
  int64_t unknown_frees;
  int64_t double_frees;
  int64_t out_of_memory;
  int64_t stream_waits;      // bytes went from one stream to another
  int64_t reserved_bytes;    // slabs, and what the pool holds
  int64_t slab_bytes;
  int64_t planned_bytes;     // live at planned addresses
  int64_t peak_bytes;        // highest end of a planned address that was served
  int64_t fallback_bytes;    // live beside the plan
  int64_t fallback_peak_bytes;
  int64_t live_peak_bytes;   // of both, since arena_reset_peak
};

// What happened between two markers, of requests that may be planned.
struct ArenaStep {
  int64_t plan;    // key of the plan that was followed last, -1: none
  int64_t thread;  // that set the marker
  int64_t requests, hits, misses, unplanned, strangers, overlaps, resynchronisations, peak_bytes;
  int64_t slab_bytes;  // 0: given back, as memory ran out beside the plan
  int64_t num_events;  // in its log
  int64_t dropped_events;
};

enum ArenaEventKind : int64_t { ARENA_FREE = -1, ARENA_ALLOCATE = 1 };

struct ArenaEvent {
  int64_t kind, block /* its number, never used again */, size, thread /* by first request */, stream;
};

enum ArenaFreed : int { ARENA_FREED = 0, ARENA_DOUBLE = 1, ARENA_UNKNOWN = 2 };

// `pooled`: what is not planned comes from a caching pool over the runtime, instead of the runtime itself. Requests below
// `least_bytes` are never planned.
ARENA_API Arena* arena_create(const ArenaRuntime* runtime, int64_t alignment, int64_t least_bytes, int pooled);
ARENA_API void arena_destroy(Arena* arena);  // no block may be alive

// Null: nothing was asked for, or out of memory even after cached memory was given back.
ARENA_API void* arena_allocate(Arena* arena, size_t bytes, void* stream);
ARENA_API int arena_free(Arena* arena, void* pointer);
// `stream` uses the block, too: its bytes go to nobody before the first marker after it is freed.
ARENA_API void arena_record_stream(Arena* arena, void* pointer, void* stream);

ARENA_API void arena_step(Arena* arena, ArenaStep* ended);  // a step ends, and the next begins
// At least `bytes` for plans; memory that is only cached goes first. 0, or -1: out of memory, and plans may be without
// any until it is asked for again.
ARENA_API int arena_reserve(Arena* arena, int64_t bytes);
// What is asked for, in order, by lanes (thread, stream): sizes, and offsets or -1. Followed from the next request on.
// 0; -1: an offset is misaligned or ends beyond what is reserved; -2: no memory for it. A plan with the same key goes.
ARENA_API int arena_add_plan(Arena* arena, int64_t key, int64_t count, const int64_t* threads, const int64_t* streams,
                             const int64_t* sizes, const int64_t* offsets);
ARENA_API void arena_drop_plan(Arena* arena, int64_t key);
ARENA_API void arena_serve(Arena* arena, int on);

ARENA_API void arena_record(Arena* arena, int64_t most_events);  // of each step; 0: no log
// The log of the step before the last `steps_ago` markers: 1 is the last whole step, 2 the one before it.
ARENA_API int64_t arena_read_log(Arena* arena, int steps_ago, ArenaEvent* events, int64_t most);

ARENA_API void arena_stats(Arena* arena, ArenaStats* stats);
ARENA_API void arena_reset_peak(Arena* arena);
// Every plan, log and counter goes, and the slab as soon as no block is in it; blocks that are alive stay.
ARENA_API void arena_forget(Arena* arena);
ARENA_API void arena_trim(Arena* arena);  // gives cached memory back
