// Exact search: a packing within a capacity, or the proof that there is none.
//
// What is searched. Of all packings within the capacity take one whose sum of offsets is least. There, each free buffer
// stands on offset 0 or on a neighbour (else it could be lowered), and none could be put into a hole below it. The
// search places buffers by non-decreasing offset, ties by rank: so each goes to its `low`, the highest top of the
// neighbours placed so far, and an offset once passed (`floor`) is not used again. A prefix of such a least packing is
// never cut off by the rules below, so a search that comes to its end without a packing is a proof. Fixed buffers are
// placed when their turn comes; they keep none of the promises of a least packing, so no rule concludes anything from
// those about them.
#pragma once

#include "rules.hpp"

namespace packing {

enum class Outcome { packed, impossible, unknown };

class Search : private Rules {
 public:
  using Rules::offset;

  static constexpr int kRankings = 10;                // the later ones are drawn anew each time
  static constexpr int kMostBuffers = 4000;           // the recursion is as deep
  static constexpr i64 kMostEntries = i64(1) << 22;   // of the lists of neighbours and of sections

  // Whether the problem is small enough for the lists and the stack.
  static bool takes(const Instance& in) {
    i64 alive = 0;
    for (int i = 0; i < in.n; i++) alive += in.last[i] - in.first[i];
    return in.n <= kMostBuffers && alive <= kMostEntries && in.pairs() <= kMostEntries / 2;
  }

  Search(const Instance& in, unsigned rules, Watch& watch)
      : Rules(in, rules, watch), total_(in.n), blur_(2 * size_t(in.n), 1.0) {}

  // Ranks by one of kRankings and searches `limit` nodes, until `until` seconds; to come to its end decides.
  Outcome attempt(i64 capacity, int ranking, i64 limit, double until) {
    choose(ranking);
    limit_ = limit;
    until_ = until;
    nodes_ = 0;
    cut_ = false;
    if (!start(capacity)) return cut_ ? Outcome::unknown : Outcome::impossible;
    vector<int> all(in_.n);
    std::iota(all.begin(), all.end(), 0);
    if (split(all, 0, -1, true)) return Outcome::packed;
    return cut_ ? Outcome::unknown : Outcome::impossible;
  }

 private:
  // Total: the most bytes that are unplaced in any of its sections. Span: how many sections; unlike the width it does
  // not change when time runs unevenly. Area and spread: the size times the width, the span.
  enum Key { kTotal, kWidth, kArea, kSpan, kSpread, kSize };
  static constexpr int kPlain = 7, kByTotal = 4;  // rankings as they are; those of them that total leads
  static constexpr Key kKeys[kPlain][3] = {{kTotal, kSpan, kSpread}, {kTotal, kWidth, kArea}, {kTotal, kSpread, kSpan},
                                           {kTotal, kArea, kWidth},  {kSpan, kSpread, kTotal},
                                           {kSpread, kSpan, kTotal}, {kSize, kWidth, kTotal}};
  static constexpr double kBlur = 0.2;  // of totals, widths and spans, up to this share

  vector<i64> total_;
  vector<double> blur_;  // of totals, of widths and spans
  const Key* keys_ = nullptr;
  i64 limit_ = 0, nodes_ = 0;
  Random random_{1};

  void choose(int ranking) {
    std::fill(blur_.begin(), blur_.end(), 1.0);
    keys_ = kKeys[ranking < kPlain ? ranking : random_.below(kByTotal + 1)];
    if (ranking < kPlain) return;
    for (double& b : blur_) b = 1 - kBlur + 2 * kBlur * random_.uniform();
  }

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
      case kSpan: return in_.span(i) * blur_[2 * i + 1];
      case kSpread: return in_.span(i) * double(in_.size[i]);
      default: return double(in_.size[i]);
    }
  }

  // Packs the unplaced of `members`, which live in sections [from, to): `left` of them, none below `floor`, and at the
  // floor only such as rank above `after`.
  bool place(const vector<int>& members, int from, int to, i64 floor, int after, int left) {
    if (!left) return true;
    if (++nodes_ > limit_ || late()) {
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
      const size_t before = mark();
      bool divided = false;
      if (put(c, members, from, to, divided)) {
        bool packed = divided && has(kSplit) ? split(members, c.offset, c.rank, has(kRerank))
                                             : place(members, from, to, c.offset, c.rank, left - 1);
        if (packed) return true;
      }
      undo(c.buffer, before);
      if (cut_) return false;
    }
    return false;
  }
};

}  // namespace packing
