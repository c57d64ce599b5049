// Exact search: a packing within a capacity, or the proof that there is none.
//
// What is searched. Of all packings within the capacity take one whose sum of offsets is least. There, each free buffer
// stands on offset 0 or on a neighbour (else it could be lowered), and none could be put into a hole below it. The search
// places buffers by non-decreasing offset, ties by rank: so each goes to its `low`, the highest top of the neighbours placed
// so far, and an offset once passed (`floor`) is not used again. A prefix of such a least packing is never cut off by the
// rules below, so a search that comes to its end without a packing is a proof. Fixed buffers are placed when their turn
// comes; they keep none of the promises of a least packing, so no rule concludes anything from those about them.
#pragma once

#include "instance.hpp"

namespace packing {

// Each may be switched off; packings and proofs stay right, and take longer.
enum Rule : unsigned {
  // No buffer is placed at or above a place in which another, still unplaced, would fit altogether: the other could be lowered.
  kDominance = 1,
  // All that is unplaced comes at or above the floor: floor + its bytes must be within the capacity, in each section.
  kFloor = 2,
  // A section is a machine, its unplaced buffers are jobs released at their least offsets: in the order of release they
  // end as early as they can, which must be within the capacity.
  kRelease = 4,
  // A buffer that, begun at its release, could not be followed by all of a set of others within the capacity comes after
  // one of them: its release is at least the earliest end in that set.
  kNotFirst = 8,
  // A buffer whose low the search has passed must stand on a neighbour that is still unplaced: its release is at least the
  // earliest end of those.
  kBlocked = 16,
  // Where no unplaced lifetime crosses, what is before and what is after are searched apart.
  kSplit = 32,
  // The parts of a split rank their buffers anew, by what is left.
  kRerank = 64,
  kAllRules = 127,
};

enum class Outcome { packed, impossible, unknown };

class Search {
 public:
  vector<i64> offset;

  static constexpr int kMostBuffers = 4000;           // the recursion is as deep
  static constexpr i64 kMostEntries = i64(1) << 24;   // of the lists of neighbours and of sections

  // Whether the problem is small enough for the lists and the stack.
  static bool takes(const Instance& in) {
    i64 alive = 0;
    for (int i = 0; i < in.n; i++) alive += in.last[i] - in.first[i];
    return in.n <= kMostBuffers && alive <= kMostEntries && in.pairs() <= kMostEntries / 2;
  }

  Search(const Instance& in, unsigned rules, Watch& watch)
      : offset(in.n), in_(in), rules_(rules), watch_(watch), near_(in.n), in_section_(in.sections()),
        crossing_(in.sections()), rank_(in.n), low_(in.n), total_(in.n), blur_(2 * size_t(in.n), 1.0) {
    vector<int> by_first(in.n), alive;
    std::iota(by_first.begin(), by_first.end(), 0);
    std::sort(by_first.begin(), by_first.end(), [&](int a, int b) { return in.first[a] < in.first[b]; });
    for (int i : by_first) {
      alive.erase(std::remove_if(alive.begin(), alive.end(), [&](int j) { return in.last[j] <= in.first[i]; }), alive.end());
      for (int j : alive) {
        near_[i].push_back(j);
        near_[j].push_back(i);
      }
      alive.push_back(i);
      for (int s = in.first[i]; s < in.last[i]; s++) in_section_[s].push_back(i);
    }
  }

  // How far the search at one capacity has come.
  struct Effort {
    i64 capacity;
    int turn = 0;    // which ranking is next
    i64 limit = 0;   // of nodes
  };

  // Round robin over rankings, until `until` seconds: each from the start, in each round with twice as many nodes as in the
  // one before. A ranking that comes to its end decides. An effort may be gone on with.
  Outcome run(Effort& effort, double until) {
    capacity_ = effort.capacity;
    effort.limit = std::max<i64>(effort.limit, 2 * i64(in_.n));
    while (!watch_.over() && watch_.elapsed() < until) {
      choose_ranking(effort.turn);
      Outcome outcome = attempt(effort.limit, until);
      if (outcome != Outcome::unknown) return outcome;
      if (++effort.turn == kRankings + kBlurred) {
        effort.turn = 0;
        effort.limit = std::min(2 * effort.limit, kFar);
      }
    }
    return Outcome::unknown;
  }

 private:
  enum Key { kTotal, kWidth, kArea, kSize };  // total: the most bytes that are unplaced in any of its sections
  static constexpr int kRankings = 5, kBlurred = 3;
  static constexpr Key kKeys[kRankings][3] = {{kTotal, kWidth, kArea}, {kTotal, kArea, kWidth}, {kWidth, kArea, kTotal},
                                              {kArea, kWidth, kTotal}, {kSize, kWidth, kTotal}};
  static constexpr double kBlur = 0.2;  // totals and widths are blurred by up to this share

  struct Candidate { i64 offset; int rank, buffer; };
  struct Change { int buffer; bool of_release; i64 before; };

  const Instance& in_;
  const unsigned rules_;
  Watch& watch_;
  vector<vector<int>> near_;        // alive together with each buffer
  vector<vector<int>> in_section_;  // buffers by release, the placed ones first
  vector<int> crossing_;            // unplaced buffers alive in section s and in s + 1
  vector<int> rank_;
  vector<i64> low_;                 // the highest top of placed neighbours
  vector<i64> release_;             // proved: an unplaced buffer's offset is at least this; kPlaced
  vector<i64> total_;
  vector<double> blur_;             // of totals, of widths
  vector<i64> left_;                // unplaced bytes in each section
  vector<int> open_;                // unplaced buffers in each section
  vector<char> dirty_;              // sections whose releases have risen
  int dirty_from_ = 0, dirty_to_ = 0;
  vector<Change> trail_;
  vector<char> placed_;
  vector<Candidate> ends_;          // of one section; scratch
  const Key* keys_ = nullptr;
  i64 capacity_ = 0, limit_ = 0, nodes_ = 0;
  double until_ = 0;
  bool cut_ = false;
  Random random_{1};

  static constexpr i64 kPlaced = -1;

  bool has(Rule rule) const { return rules_ & rule; }
  bool is_fixed(int i) const { return in_.fixed[i] != kFree; }

  void choose_ranking(int turn) {
    std::fill(blur_.begin(), blur_.end(), 1.0);
    keys_ = kKeys[turn < kRankings ? turn : random_.below(3)];
    if (turn < kRankings) return;
    for (double& b : blur_) b = 1 - kBlur + 2 * kBlur * random_.uniform();
  }

  Outcome attempt(i64 limit, double until) {
    limit_ = limit;
    until_ = until;
    nodes_ = 0;
    cut_ = false;
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
      if (release_[i] + in_.size[i] > capacity_) return Outcome::impossible;
    }
    vector<int> all(in_.n);
    std::iota(all.begin(), all.end(), 0);
    if (!propagate(0)) return Outcome::impossible;
    if (split(all, 0, -1, true)) return Outcome::packed;
    return cut_ ? Outcome::unknown : Outcome::impossible;
  }

  void count_open() {
    std::fill(crossing_.begin(), crossing_.end(), 0);
    open_.assign(in_.sections(), 0);
    for (int i = 0; i < in_.n; i++)
      for (int s = in_.first[i]; s < in_.last[i]; s++) {
        open_[s]++;
        if (s + 1 < in_.last[i]) crossing_[s]++;
      }
  }

  // ---- branching -------------------------------------------------------------------------------------------------------

  // Packs the unplaced of `members` at or above `floor`, each part between empty cuts by itself, small ones first.
  bool split(const vector<int>& members, i64 floor, int after, bool rerank) {
    struct Part { vector<int> members; int from, to; };
    vector<int> rest;
    for (int i : members)
      if (!placed_[i]) rest.push_back(i);
    std::sort(rest.begin(), rest.end(), [&](int a, int b) {
      return in_.first[a] != in_.first[b] ? in_.first[a] < in_.first[b] : a < b;
    });
    vector<Part> parts;
    for (int i : rest) {
      if (parts.empty() || in_.first[i] >= parts.back().to) parts.push_back({{}, in_.first[i], 0});
      parts.back().members.push_back(i);
      parts.back().to = std::max(parts.back().to, in_.last[i]);
    }
    std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
      return a.members.size() < b.members.size();
    });
    vector<i64> low;
    vector<int> rank;
    for (int i : rest) {
      low.push_back(low_[i]);
      rank.push_back(rank_[i]);
    }
    bool packed = true;
    for (Part& part : parts) {
      if (rerank) rank_anew(part.members);
      packed = place(part.members, part.from, part.to, floor, rerank ? -1 : after, int(part.members.size()));
      if (!packed) break;
    }
    for (size_t k = 0; k < rest.size(); k++) rank_[rest[k]] = rank[k];
    if (packed) return true;
    for (size_t k = 0; k < rest.size(); k++) {  // releases are on the trail
      if (placed_[rest[k]]) unplace(rest[k]);
      low_[rest[k]] = low[k];
    }
    return false;
  }

  void rank_anew(vector<int>& members) {
    for (int i : members) {
      total_[i] = 0;
      for (int s = in_.first[i]; s < in_.last[i]; s++) total_[i] = std::max(total_[i], left_[s]);
    }
    std::sort(members.begin(), members.end(), [&](int a, int b) {
      for (int k = 0; k < 3; k++) {
        double of_a = value(a, keys_[k]), of_b = value(b, keys_[k]);
        if (of_a != of_b) return of_a > of_b;
      }
      return a < b;
    });
    for (size_t k = 0; k < members.size(); k++) rank_[members[k]] = int(k);
  }

  double value(int i, Key key) const {
    switch (key) {
      case kTotal: return double(total_[i]) * blur_[2 * i];
      case kWidth: return in_.width[i] * blur_[2 * i + 1];
      case kArea: return in_.area(i);
      default: return double(in_.size[i]);
    }
  }

  // Packs the unplaced of `members`, which live in sections [from, to): `left` of them, none below `floor`, and at the floor
  // only such as rank above `after`.
  bool place(const vector<int>& members, int from, int to, i64 floor, int after, int left) {
    if (!left) return true;
    if (++nodes_ > limit_ || ((nodes_ & 7) == 0 && (watch_.over() || watch_.elapsed() >= until_))) {
      cut_ = true;
      return false;
    }
    vector<Candidate> candidates;
    i64 ceiling = kFar;  // from here on placing is dominated
    for (int i : members) {
      if (placed_[i]) continue;
      i64 at = low_[i];
      if (is_fixed(i)) {
        at = in_.fixed[i];
        if (at < floor || at < low_[i]) return false;
        ceiling = std::min(ceiling, at + 1);
      } else if (has(kDominance)) {
        ceiling = std::min(ceiling, at + in_.size[i]);
      }
      bool in_turn = at > floor || (at == floor && rank_[i] > after);
      if (in_turn && release_[i] <= at) candidates.push_back({at, rank_[i], i});
    }
    if (ceiling <= floor) return false;
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
      return a.offset != b.offset ? a.offset < b.offset : a.rank < b.rank;
    });
    for (const Candidate& c : candidates) {
      if (c.offset >= ceiling) break;
      const size_t mark = trail_.size();
      bool divided = false;
      bool open = put(c, divided) && room(from, to, c.offset) && block(members, c) && propagate(has(kFloor) ? c.offset : 0);
      clean();
      if (open) {
        open = divided && has(kSplit) ? split(members, c.offset, c.rank, has(kRerank))
                                      : place(members, from, to, c.offset, c.rank, left - 1);
        if (open) return true;
      }
      for (; trail_.size() > mark; trail_.pop_back()) {
        const Change& change = trail_.back();
        (change.of_release ? release_ : low_)[change.buffer] = change.before;
      }
      unplace(c.buffer);
      if (cut_) return false;
    }
    return false;
  }

  // Places a candidate and raises its neighbours; false if one of them is out of room. `divided`: a cut became empty.
  bool put(const Candidate& c, bool& divided) {
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

  void unplace(int i) {
    placed_[i] = 0;
    for (int s = in_.first[i]; s < in_.last[i]; s++) {
      left_[s] += in_.size[i];
      open_[s]++;
      if (s + 1 < in_.last[i]) crossing_[s]++;
    }
  }

  // ---- rules -----------------------------------------------------------------------------------------------------------

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
    if (!has(kFloor)) floor = 0;
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
        if (other.offset > begin && other.offset > release_[job.buffer] && !raise(job.buffer, other.offset)) return false;
        break;
      }
    }
    return true;
  }
};

}  // namespace packing
