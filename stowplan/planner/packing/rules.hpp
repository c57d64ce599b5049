// What an unfinished packing says about the rest of it. search.hpp tells what is searched, and why these rules are sound.
#pragma once

#include "instance.hpp"

namespace packing {

// Each may be switched off; packings and proofs stay right, and take longer.
enum Rule : unsigned {
  // No buffer is placed at or above a place in which another, still unplaced, would fit altogether: the other could be
  // lowered.
  kDominance = 1,
  // All that is unplaced comes at or above the floor: floor + its bytes must be within the capacity, in each section.
  kFloor = 2,
  // A section is a machine, its unplaced buffers are jobs released at their least offsets: in the order of release they
  // end as early as they can, which must be within the capacity.
  kRelease = 4,
  // A buffer that, begun at its release, could not be followed by all of a set of others within the capacity comes
  // after one of them: its release is at least the earliest end in that set.
  kNotFirst = 8,
  // A buffer whose low the search has passed must stand on a neighbour that is still unplaced: its release is at least
  // the earliest end of those.
  kBlocked = 16,
  // Where no unplaced lifetime crosses, what is before and what is after are searched apart.
  kSplit = 32,
  // The parts of a split rank their buffers anew, by what is left.
  kRerank = 64,
  kAllRules = 127,
};

struct Candidate { i64 offset; int rank, buffer; };

class Rules {
 public:
  vector<i64> offset;

 protected:
  static constexpr i64 kPlaced = -1;

  const Instance& in_;
  i64 capacity_ = 0;
  vector<vector<int>> near_;  // alive together with each buffer
  vector<int> rank_;
  vector<i64> low_;           // the highest top of placed neighbours
  vector<i64> release_;       // proved: an unplaced buffer's offset is at least this; kPlaced
  vector<i64> left_;          // unplaced bytes in each section
  vector<char> placed_;

  Rules(const Instance& in, unsigned rules)
      : offset(in.n), in_(in), near_(in.n), rank_(in.n), rules_(rules), in_section_(in.sections()),
        crossing_(in.sections()) {
    vector<int> by_first(in.n), alive;
    std::iota(by_first.begin(), by_first.end(), 0);
    std::sort(by_first.begin(), by_first.end(), [&](int a, int b) { return in.first[a] < in.first[b]; });
    for (int i : by_first) {
      auto over = [&](int j) { return in.last[j] <= in.first[i]; };
      alive.erase(std::remove_if(alive.begin(), alive.end(), over), alive.end());
      for (int j : alive) {
        near_[i].push_back(j);
        near_[j].push_back(i);
      }
      alive.push_back(i);
      for (int s = in.first[i]; s < in.last[i]; s++) in_section_[s].push_back(i);
    }
  }

  bool has(Rule rule) const { return rules_ & rule; }
  bool is_fixed(int i) const { return in_.fixed[i] != kFree; }

  // Nothing is placed; false if that cannot be packed.
  bool start(i64 capacity) {
    capacity_ = capacity;
    trail_.clear();
    low_.assign(in_.n, 0);
    release_.assign(in_.n, 0);
    placed_.assign(in_.n, 0);
    left_ = in_.live;
    count_open();
    dirty_.assign(in_.sections(), 1);
    dirty_from_ = 0;
    dirty_to_ = in_.sections();
    for (int i = 0; i < in_.n; i++) {
      if (is_fixed(i)) release_[i] = in_.fixed[i];
      if (release_[i] + in_.size[i] > capacity_) return false;
    }
    return propagate(0);
  }

  // Places a candidate and says what follows for the unplaced `members` in sections [from, to): false if none fits.
  // `divided`: a cut became empty.
  bool put(const Candidate& c, const vector<int>& members, int from, int to, bool& divided) {
    const i64 floor = has(kFloor) ? c.offset : 0;
    bool open = place_on(c, divided) && room(from, to, floor) && block(members, c) && propagate(floor);
    clean();
    return open;
  }

  size_t mark() const { return trail_.size(); }

  void undo(int i, size_t mark) {
    for (; trail_.size() > mark; trail_.pop_back()) {
      const Change& change = trail_.back();
      (change.of_release ? release_ : low_)[change.buffer] = change.before;
    }
    unplace(i);
  }

  void unplace(int i) {
    placed_[i] = 0;
    for (int s = in_.first[i]; s < in_.last[i]; s++) {
      left_[s] += in_.size[i];
      open_[s]++;
      if (s + 1 < in_.last[i]) crossing_[s]++;
    }
  }

 private:
  struct Change { int buffer; bool of_release; i64 before; };

  const unsigned rules_;
  vector<vector<int>> in_section_;  // buffers by release, the placed ones first
  vector<int> crossing_;            // unplaced buffers alive in section s and in s + 1
  vector<int> open_;                // unplaced buffers in each section
  vector<char> dirty_;              // sections whose releases have risen
  int dirty_from_ = 0, dirty_to_ = 0;
  vector<Change> trail_;
  vector<Candidate> ends_;          // of one section; scratch

  void count_open() {
    std::fill(crossing_.begin(), crossing_.end(), 0);
    open_.assign(in_.sections(), 0);
    for (int i = 0; i < in_.n; i++)
      for (int s = in_.first[i]; s < in_.last[i]; s++) {
        open_[s]++;
        if (s + 1 < in_.last[i]) crossing_[s]++;
      }
  }

  // Raises the neighbours of what is placed; false if one of them is out of room.
  bool place_on(const Candidate& c, bool& divided) {
    const int i = c.buffer;
    const i64 top = c.offset + in_.size[i];
    offset[i] = c.offset;
    placed_[i] = 1;
    raise(i, kPlaced);
    for (int s = in_.first[i]; s < in_.last[i]; s++) {
      left_[s] -= in_.size[i];
      open_[s]--;
      if (s + 1 < in_.last[i] && --crossing_[s] == 0) divided = true;
    }
    bool fits = top <= capacity_;
    for (int j : near_[i]) {
      if (placed_[j] || low_[j] >= top) continue;
      trail_.push_back({j, false, low_[j]});
      low_[j] = top;
      if (release_[j] < top) fits &= raise(j, top);
    }
    return fits;
  }

  // A higher release for buffer i; false if it then ends above the capacity, or above where it is fixed.
  bool raise(int i, i64 release) {
    trail_.push_back({i, true, release_[i]});
    release_[i] = release;
    if (release == kPlaced) return true;
    for (int s = in_.first[i]; s < in_.last[i]; s++) dirty_[s] = 1;
    dirty_from_ = std::min(dirty_from_, in_.first[i]);
    dirty_to_ = std::max(dirty_to_, in_.last[i]);
    return release + in_.size[i] <= capacity_ && !(is_fixed(i) && release > in_.fixed[i]);
  }

  void clean() {
    if (dirty_from_ < dirty_to_) std::fill(dirty_.begin() + dirty_from_, dirty_.begin() + dirty_to_, 0);
    dirty_from_ = in_.sections();
    dirty_to_ = 0;
  }

  bool room(int from, int to, i64 floor) const {
    for (int s = from; s < to; s++)
      if (left_[s] && floor + left_[s] > capacity_) return false;
    return true;
  }

  bool block(const vector<int>& members, const Candidate& c) {
    if (!has(kBlocked)) return true;
    for (int i : members) {
      if (placed_[i] || is_fixed(i) || release_[i] > std::max(c.offset, low_[i])) continue;
      bool passed = low_[i] < c.offset || (low_[i] == c.offset && rank_[i] <= c.rank);
      if (!passed) continue;
      i64 earliest = kFar;
      for (int j : near_[i]) {
        if (placed_[j]) continue;
        earliest = std::min(earliest, std::max(release_[j], c.offset) + in_.size[j]);
        if (earliest <= release_[i]) break;
      }
      if (earliest == kFar) return false;  // nothing is left that it could stand on
      if (earliest > release_[i] && !raise(i, earliest)) return false;
    }
    return true;
  }

  // Applies the rules of sections until nothing rises; false if some section cannot be packed.
  bool propagate(i64 floor) {
    while (dirty_from_ < dirty_to_) {
      const int from = dirty_from_, to = dirty_to_;
      for (int s = from; s < to; s++) {
        if (dirty_[s] && covered(s)) dirty_[s] = 0;
        if (dirty_[s] && !fits(s, floor)) return false;
      }
      vector<int> again;
      for (int s = from; s < to; s++)
        if (dirty_[s]) again.push_back(s);
      clean();
      if (!has(kNotFirst)) return true;
      for (int s : again)
        if (!not_first(s, floor)) return false;
    }
    return true;
  }

  // All that is unplaced in section s is unplaced in a neighbouring one, too, which says all that s could say. Of equal
  // sections the later one speaks.
  bool covered(int s) const {
    if (!open_[s] || (s + 1 < in_.sections() && crossing_[s] == open_[s])) return true;
    return s > 0 && crossing_[s - 1] == open_[s] && open_[s - 1] > open_[s];
  }

  bool fits(int s, i64 floor) {
    vector<int>& jobs = in_section_[s];
    const int count = int(jobs.size()), placed = count - open_[s];
    for (int k = 1; k < count; k++) {  // nearly sorted already, by release
      int i = jobs[k], to = k;
      for (; to && release_[jobs[to - 1]] > release_[i]; to--) jobs[to] = jobs[to - 1];
      jobs[to] = i;
    }
    if (!has(kRelease)) return std::max(floor, release_[jobs[placed]]) + left_[s] <= capacity_;
    i64 end = floor;
    for (int k = placed; k < count; k++) end = std::max(end, release_[jobs[k]]) + in_.size[jobs[k]];
    return end <= capacity_;
  }

  bool not_first(int s, i64 floor) {
    const vector<int>& jobs = in_section_[s];
    i64 latest = floor;
    ends_.clear();
    for (int i : jobs) {
      if (placed_[i]) continue;
      latest = std::max(latest, release_[i]);
      ends_.push_back({std::max(release_[i], floor) + in_.size[i], 0, i});
    }
    if (latest + left_[s] <= capacity_) return true;  // even the last could be first
    std::sort(ends_.begin(), ends_.end(), [](const Candidate& a, const Candidate& b) { return a.offset > b.offset; });
    for (const Candidate& job : ends_) {
      const i64 begin = job.offset - in_.size[job.buffer];
      if (begin + left_[s] <= capacity_) continue;
      i64 end = job.offset;
      for (const Candidate& other : ends_) {  // the latest ends first: their set has the highest earliest end
        if (other.buffer == job.buffer) continue;
        end += in_.size[other.buffer];
        if (end <= capacity_) continue;
        bool later = other.offset > begin && other.offset > release_[job.buffer];
        if (later && !raise(job.buffer, other.offset)) return false;
        break;
      }
    }
    return true;
  }
};

}  // namespace packing
