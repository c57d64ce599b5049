// Offline dynamic storage allocation: offsets for buffers with known lifetimes. A plain C interface, no dependencies.
//
//   instance.hpp  buffers, sections, bound, deadline
//   placing.hpp   first fit, skyline                       greedy.hpp   by several orders
//   improve.hpp   local search
//   rules.hpp     what cuts the exact search off           search.hpp   exact search, proofs
//   portfolio.hpp exact search by several rankings, and of chains
//
// No globals: any number of threads may call. Memory: O(n), and lists of neighbours where the exact search takes part.
#include <new>

#include "improve.hpp"
#include "portfolio.hpp"

namespace packing {
namespace {

enum Solver { kGreedy = 0, kExact = 1, kAuto = 2 };
enum Status { kPacked = 0, kTooLarge = 1, kInvalid = 2, kNoMemory = 3 };

constexpr int kMostCount = 1 << 28;

struct Best {
  const Instance& in;
  Watch& watch;
  i64 capacity;  // low enough; kFree: none is but the bound
  vector<i64> offset;

  bool keep(const vector<i64>& found) {
    i64 height = in.height(found);
    if (height < watch.height) {
      watch.height = height;
      offset = found;
    }
    return enough();
  }
  bool enough() const { return watch.height <= std::max(capacity, watch.bound); }
};

// What an exact search, where the problem is small enough for it, and the local search can do in turns that grow
// longer. With a capacity the one question is whether it can be met. Without, the search is for the bound, and for
// heights halfway to it.
class Descent {
 public:
  Descent(const Instance& in, i64 capacity, Solver solver, unsigned rules, Best& best, Watch& watch)
      : in_(in), decides_(capacity != kFree), solver_(solver), best_(best), watch_(watch), search_(in, rules, watch),
        lowest_{decides_ ? capacity : watch.bound}, tried_(watch.bound) {}

  template <class Improve>
  void run(Improve improve) {
    for (double slice = kFirstSlice; !watch_.over(); slice *= kGrowth) {
      Outcome outcome = at(lowest_, slice);
      if (best_.enough() || (decides_ && outcome == Outcome::impossible)) return;
      if (solver_ == kAuto) improve(watch_.elapsed() + kImproveShare * slice);
      if (best_.enough()) return;
      if (!decides_) bisect(slice);
      if (best_.enough()) return;
    }
  }

 private:
  static constexpr double kFirstSlice = 0.05, kGrowth = 1.3;  // seconds; of each turn to the next
  static constexpr double kImproveShare = 0.4, kBisectShare = 0.5;

  const Instance& in_;
  const bool decides_;
  const Solver solver_;
  Best& best_;
  Watch& watch_;
  Portfolio search_;
  Portfolio::Effort lowest_;
  i64 tried_;  // heights below were not reached in the time that they had

  Outcome at(Portfolio::Effort& effort, double seconds) {
    Outcome outcome = search_.run(effort, watch_.elapsed() + seconds);
    if (outcome == Outcome::packed) best_.keep(search_.offset);
    if (outcome == Outcome::impossible) {
      watch_.bound = std::max(watch_.bound, effort.capacity + 1);
      lowest_ = {watch_.bound};
    }
    return outcome;
  }

  void bisect(double slice) {
    if (tried_ >= watch_.height) tried_ = 0;
    tried_ = std::max(tried_, watch_.bound);
    Portfolio::Effort middle{tried_ + (watch_.height - tried_) / 2};
    if (at(middle, kBisectShare * slice) == Outcome::unknown) tried_ = middle.capacity + 1;
  }
};

Status solve(const Instance& in, i64 capacity, Solver solver, unsigned rules, Best& best, Watch& watch) {
  constexpr double kGreedyShare = 0.25;  // of the time, at most
  auto keep = [&](const vector<i64>& offset) { return best.keep(offset); };
  const Ranking ranking(in);
  Board board(in);
  Greedy(in, ranking, board, watch).run(solver == kGreedy ? 1.0 : kGreedyShare, keep);
  if (best.enough() || solver == kGreedy) return kPacked;
  if (capacity != kFree && in.bound > capacity) return kPacked;  // the bound says it all

  Improver improver(in, ranking, board);
  auto improve = [&](double until) { improver.run(best.offset, until, watch, keep); };
  if (Search::takes(in)) {
    Descent(in, capacity, solver, rules, best, watch).run(improve);
  } else if (solver == kExact) {
    return kTooLarge;
  } else {
    improve(double(kFar));
  }
  return kPacked;
}

bool valid(int n, const i64* lower, const i64* upper, const i64* size, const i64* fixed) {
  i64 sum = 0;
  for (int i = 0; i < n; i++) {
    if (upper[i] <= lower[i] || size[i] <= 0 || size[i] > kMostBytes - sum) return false;
    if (fixed && fixed[i] != kFree && (fixed[i] < 0 || fixed[i] > kMostFixed)) return false;
    sum += size[i];
  }
  return true;
}

}  // namespace
}  // namespace packing

// Packs n buffers: lifetimes [lower, upper), sizes, and offsets that are given (`fixed`: null, or -1 where free; those
// that are given must not overlap). `capacity`: good enough; -1 for the least height. Writes `offset` [n] of the lowest
// packing found in `seconds`, or until `progress` says stop, its height, and a proved bound: one above the capacity is
// the proof that no packing is within it. Gives 0, or: 1 too large for the exact search, 2 invalid arguments, 3 no
// memory.
extern "C" __attribute__((visibility("default"))) int stowplan_pack(
    int n, const std::int64_t* lower, const std::int64_t* upper, const std::int64_t* size, const std::int64_t* fixed,
    std::int64_t capacity, double seconds, int solver, unsigned rules, packing::Progress progress, std::int64_t* offset,
    std::int64_t* height, std::int64_t* bound) {
  using namespace packing;
  *height = *bound = 0;
  if (n < 0 || n > kMostCount || solver < kGreedy || solver > kAuto) return kInvalid;
  if (!valid(n, lower, upper, size, fixed)) return kInvalid;
  if (n == 0) return kPacked;
  try {
    const Instance in(n, lower, upper, size, fixed);
    Watch watch(seconds > 0 ? seconds : 0, progress);
    watch.bound = in.bound;
    Best best{in, watch, capacity, {}};
    const Status status = solve(in, capacity, Solver(solver), rules, best, watch);
    std::copy(best.offset.begin(), best.offset.end(), offset);
    *height = watch.height;
    *bound = watch.bound;
    return status;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}
