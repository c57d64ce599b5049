// What every solver reads: the buffers, their sections, and the clock that stops them.
//
// Sizes and offsets are in units that the caller chose (the alignment): whole numbers, limited so that no sum
// overflows. Times may be any 64-bit numbers: only their order and, as doubles, their differences are used.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

namespace packing {

using i64 = std::int64_t;
using u64 = std::uint64_t;
using std::vector;

constexpr i64 kFree = -1;             // instead of a fixed offset
constexpr i64 kMostBytes = i64(1) << 61;   // of all sizes together
constexpr i64 kMostFixed = i64(1) << 60;   // of a fixed offset
constexpr i64 kFar = i64(1) << 62;    // above every offset

// A section is a time at which no other live set contains this one: what fits in every section fits at all times.
// Buffer i is alive in sections [first[i], last[i]).
struct Instance {
  int n;
  const i64 *lower, *upper, *size;
  vector<i64> fixed;       // offset, or kFree
  vector<double> width;    // of lifetimes
  vector<int> first, last;
  vector<i64> live;        // in each section
  i64 bound = 0;           // proved: no packing is lower
  bool any_fixed = false;

  Instance(int count, const i64* begins, const i64* ends, const i64* sizes, const i64* offsets)
      : n(count), lower(begins), upper(ends), size(sizes), fixed(count, kFree), width(count), first(count), last(count) {
    struct Event { i64 time; bool begins; int buffer; };
    vector<Event> events;
    events.reserve(2 * size_t(n));
    for (int i = 0; i < n; i++) {
      events.push_back({lower[i], true, i});
      events.push_back({upper[i], false, i});
      width[i] = double(upper[i]) - double(lower[i]);
      if (offsets && offsets[i] != kFree) {
        fixed[i] = offsets[i];
        any_fixed = true;
        bound = std::max(bound, offsets[i] + sizes[i]);
      }
    }
    std::sort(events.begin(), events.end(), [](const Event& a, const Event& b) {
      return a.time != b.time ? a.time < b.time : a.begins < b.begins;  // lifetimes are half-open: ends go first
    });
    bool grown = false;  // a buffer began since the last section was closed
    i64 now = 0;
    for (const Event& e : events) {
      if (e.begins) {
        first[e.buffer] = sections();
        now += size[e.buffer];
        grown = true;
        continue;
      }
      if (grown) live.push_back(now);
      grown = false;
      last[e.buffer] = sections();
      now -= size[e.buffer];
    }
    for (i64 bytes : live) bound = std::max(bound, bytes);
  }

  int sections() const { return int(live.size()); }
  double span(int i) const { return double(last[i] - first[i]); }
  double area(int i) const { return width[i] * double(size[i]); }

  i64 height(const vector<i64>& offset) const {
    i64 top = 0;
    for (int i = 0; i < n; i++) top = std::max(top, offset[i] + size[i]);
    return top;
  }

  // Pairs of buffers that are alive together, counted without listing them.
  i64 pairs() const {
    vector<int> begins(first);
    std::sort(begins.begin(), begins.end());
    i64 count = 0;
    for (int i = 0; i < n; i++) count += std::lower_bound(begins.begin(), begins.end(), last[i]) - begins.begin();
    return count - i64(n) * (n + 1) / 2;  // of the k-th by beginning, k - 1 began before it and it is one itself
  }

  // The most that is alive in any section of each buffer: a sparse table of maxima.
  vector<i64> crowding() const {
    vector<vector<i64>> most{live};
    for (int span = 1; 2 * span <= sections(); span *= 2) {
      const vector<i64>& half = most.back();
      vector<i64> next(sections() - 2 * span + 1);
      for (size_t s = 0; s < next.size(); s++) next[s] = std::max(half[s], half[s + span]);
      most.push_back(std::move(next));
    }
    vector<i64> result(n);
    for (int i = 0; i < n; i++) {
      int power = 0;
      while (2 << power <= last[i] - first[i]) power++;
      result[i] = std::max(most[power][first[i]], most[power][last[i] - (1 << power)]);
    }
    return result;
  }
};

// The best height (kFar: none yet), the bound and the seconds since the start.
struct Report { i64 height, bound; double seconds; };

// Called with how far it is; nonzero stops the solver.
using Progress = int (*)(const Report*);

// The deadline, and the reports on the way to it.
class Watch {
 public:
  i64 height = kFar, bound = 0;

  Watch(double seconds, Progress progress) : progress_(progress), seconds_(seconds) {}

  double elapsed() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
  double left() const { return seconds_ - elapsed(); }

  // True from the deadline on, or once a report was answered with "stop". Cheap enough for every node of a search.
  bool over() {
    if (stopped_) return true;
    double now = elapsed();
    if (progress_ && now >= next_report_) {
      next_report_ = now + kReportSeconds;
      const Report report{height, bound, now};
      stopped_ = progress_(&report) != 0;
    }
    return stopped_ |= now >= seconds_;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr double kReportSeconds = 0.1;
  Progress progress_;
  Clock::time_point start_ = Clock::now();
  double seconds_, next_report_ = 0;
  bool stopped_ = false;
};

// Small, fast and the same everywhere (splitmix64, Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(u64 seed) : state_(seed) {}
  u64 next() {
    u64 x = state_ += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  }
  double uniform() { return double(next() >> 11) / double(u64(1) << 53); }
  int below(int count) { return int(next() % u64(count)); }

 private:
  u64 state_;
};

}  // namespace packing
