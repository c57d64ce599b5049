// Local search for large problems: what is too high is taken out with its surroundings, and placed anew.
#pragma once

#include "greedy.hpp"

namespace packing {

// Packings fail at a few crowded times, each apart from the others. So a move looks at one buffer that ends above the
// goal, takes out what is alive around it (a window somewhat longer than its lifetime, at times only from some level
// up), and lets first fit place that again by a ranking drawn anew, the offenders promoted. It is kept if the bytes
// above the goal, summed over buffers, have not become more.
class Improver {
 public:
  Improver(const Instance& in, const Ranking& ranking, Board& board) : in_(in), ranking_(ranking), board_(board) {}

  // Goes on from `offset`, the best packing known, until `until` seconds; tells `keep` what is better, which answers
  // true when that is enough.
  template <class Keep>
  void run(const vector<i64>& offset, double until, Watch& watch, Keep keep) {
    i64 best = load(offset);
    while (best > in_.bound && !watch.over() && watch.elapsed() < until) {
      goal_ = std::min(best - 1, in_.bound + i64(double(best - in_.bound) * ambition_));
      bool reached = settle(until, watch);
      ambition_ = reached ? ambition_ * 0.9 : 0.5 + ambition_ / 2;
      i64 height = in_.height(board_.offset);
      if (height < best) {
        best = height;
        if (keep(board_.offset)) return;
      }
    }
  }

 private:
  static constexpr int kPatience = 300;          // moves without gain before the goal is set nearer
  static constexpr double kMostCrowding = 24;    // weights and noise of rankings are drawn up to these
  static constexpr double kMostNoise = 0.5, kMostPromotion = 3;

  const Instance& in_;
  const Ranking& ranking_;
  Board& board_;
  Random random_{1};
  i64 goal_ = 0;
  double ambition_ = 0.9;  // the goal's share of the gap
  vector<int> high_, taken_;
  vector<i64> was_;
  Order again_;
  vector<std::pair<double, int>> keys_;

  i64 excess(int i) const { return std::max<i64>(0, board_.offset[i] + in_.size[i] - goal_); }

  i64 load(const vector<i64>& offset) {
    board_.clear();
    for (int i = 0; i < in_.n; i++) board_.put(i, offset[i]);
    return in_.height(offset);
  }

  bool settle(double until, Watch& watch) {
    high_.clear();
    for (int i = 0; i < in_.n; i++)
      if (in_.fixed[i] == kFree && excess(i)) high_.push_back(i);
    for (int patience = kPatience; patience && !high_.empty(); patience--) {
      if (watch.over() || watch.elapsed() >= until) return false;
      int k = random_.below(int(high_.size())), i = high_[k];
      if (!excess(i)) {
        high_[k] = high_.back();
        high_.pop_back();
        patience++;
      } else if (move(i)) {
        patience = kPatience + 1;
      }
    }
    return high_.empty();
  }

  // True if the bytes above the goal have become fewer.
  bool move(int offender) {
    take_around(offender);
    double before = 0, after = 0;
    for (int i : taken_) before += double(excess(i));
    for (int i : taken_) board_.take(i);
    rank(offender);
    size_t placed = 0;
    for (; placed < again_.size() && after <= before; placed++) {
      int i = again_[placed];
      board_.put(i, board_.lowest(i));
      after += double(excess(i));
    }
    if (after > before) {
      for (size_t k = 0; k < placed; k++) board_.take(again_[k]);
      for (size_t k = 0; k < taken_.size(); k++) board_.put(taken_[k], was_[k]);
      return false;
    }
    for (int i : taken_)
      if (i != offender && excess(i)) high_.push_back(i);
    return after < before;
  }

  void take_around(int offender) {
    const int first = in_.first[offender], last = in_.last[offender];
    const int reach = int((last - first) * random_.uniform());
    const i64 level = random_.uniform() < 0.5 ? i64(double(goal_) * random_.uniform()) : 0;
    taken_.clear();
    was_.clear();
    board_.each(std::max(0, first - reach), last + reach, [&](int i) {
      if (in_.fixed[i] != kFree || board_.offset[i] + in_.size[i] <= level) return;
      taken_.push_back(i);
      was_.push_back(board_.offset[i]);
    });
  }

  void rank(int offender) {
    const double u = random_.uniform(), crowding = kMostCrowding * u * u, width = random_.uniform();
    const bool strict = random_.uniform() < 0.5;  // offenders first and no noise, or both by chance
    const double noise = strict ? 0 : kMostNoise * random_.uniform();
    const double promotion = kMostPromotion * random_.uniform();
    keys_.clear();
    for (size_t k = 0; k < taken_.size(); k++) {
      int i = taken_[k];
      double key = ranking_(i, crowding, width) + noise * random_.uniform();
      if (was_[k] + in_.size[i] > goal_) key += strict ? 1e9 : promotion * (0.5 + random_.uniform());
      keys_.push_back({i == offender && strict ? -2e9 : -key, i});
    }
    std::sort(keys_.begin(), keys_.end());
    again_.clear();
    for (auto& [key, i] : keys_) again_.push_back(i);
  }
};

}  // namespace packing
