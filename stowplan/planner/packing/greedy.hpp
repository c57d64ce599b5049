// Packings in one go: the best of several orders.
#pragma once

#include <cmath>

#include "placing.hpp"

namespace packing {

// How a buffer ranks among those to be placed: log size + crowding weight * log crowding + width weight * log width.
// Crowding (the most that is alive in any of its sections) puts those first that must fit where there is no room to
// spare.
class Ranking {
 public:
  explicit Ranking(const Instance& in) : size_(in.n), crowding_(in.n), width_(in.n) {
    vector<i64> crowding = in.crowding();
    for (int i = 0; i < in.n; i++) {
      size_[i] = std::log(double(in.size[i]));
      crowding_[i] = std::log(double(crowding[i]));
      width_[i] = std::log(std::max(1.0, in.width[i]));
    }
  }
  double operator()(int i, double crowding_weight, double width_weight) const {
    return size_[i] + crowding_weight * crowding_[i] + width_weight * width_[i];
  }

 private:
  vector<double> size_, crowding_, width_;
};

template <class Key>
void sort_by(Order& order, Key key) {
  std::vector<std::pair<double, int>> keys;
  keys.reserve(order.size());
  for (int i : order) keys.push_back({-key(i), i});
  std::sort(keys.begin(), keys.end());  // the greatest key first, then the first buffer
  for (size_t k = 0; k < order.size(); k++) order[k] = keys[k].second;
}

// Orders, one after the other, until `keep` says that what it is told is enough, the time is over, or a share of it;
// first fit by size is not left out for the share. The first order always comes to its end.
class Greedy {
 public:
  Greedy(const Instance& in, const Ranking& ranking, Board& board, Watch& watch)
      : in_(in), ranking_(ranking), board_(board), watch_(watch), skyline_(in), crowding_(in.crowding()), order_(in.n),
        offset_(in.fixed), turn_(in.n) {
    std::iota(order_.begin(), order_.end(), 0);
  }

  template <class Keep>
  void run(double share, Keep keep) {
    const double until = watch_.elapsed() + share * watch_.left();
    auto over = [&] { return watch_.over() || watch_.elapsed() >= until; };
    for (Key key : {kWidth, kCrowding, kArea, kSize})
      if (along_skyline(key, keep)) return;
    if (by_first_fit(0, keep)) return;
    for (int k = 1; k < kFirstFitOrders; k++)
      if (over() || by_first_fit(k, keep)) return;
    for (int round = 0; !in_.any_fixed && round < kPromotions; round++)
      if (over() || promoted(keep)) return;
  }

 private:
  enum Key { kWidth, kCrowding, kArea, kSize };
  static constexpr int kFirstFitOrders = 8, kPromotions = 16;
  // (crowding, width) weights: plain greedy by size, then what did best on churn of several distributions.
  static constexpr double kWeights[kFirstFitOrders][2] = {{0, 0},  {8, .2},  {5, .75}, {3, 0},
                                                          {1, .3}, {20, .7}, {0, 1},   {12, .4}};

  const Instance& in_;
  const Ranking& ranking_;
  Board& board_;
  Watch& watch_;
  Skyline skyline_;
  const vector<i64> crowding_;
  Order order_;
  vector<i64> offset_;   // of the last skyline
  vector<double> turn_;  // of each buffer in the best order of skylines
  i64 best_ = kFar;      // of skylines

  double value(int i, Key key) const {
    switch (key) {
      case kWidth: return in_.width[i];
      case kCrowding: return double(crowding_[i]);
      case kArea: return in_.area(i);
      default: return double(in_.size[i]);
    }
  }

  // True, as below: enough, or no time is left.
  template <class Keep>
  bool along_skyline(Key key, Keep keep) {
    sort_by(order_, [&](int i) { return value(i, key); });
    return fill(keep);
  }

  template <class Keep>
  bool by_first_fit(int k, Keep keep) {
    sort_by(order_, [&](int i) { return ranking_(i, kWeights[k][0], kWeights[k][1]); });
    return !first_fit(in_, order_, board_, watch_) || keep(board_.offset);
  }

  // Those that ended above the bound come twice as early as in the round before.
  template <class Keep>
  bool promoted(Keep keep) {
    for (int i = 0; i < in_.n; i++)
      if (offset_[i] + in_.size[i] > in_.bound) turn_[i] /= 2;
    sort_by(order_, [&](int i) { return -turn_[i]; });
    for (int k = 0; k < in_.n; k++) turn_[order_[k]] = k + 1;
    return fill(keep);
  }

  template <class Keep>
  bool fill(Keep keep) {
    if (!skyline_.fill(order_, offset_, best_ == kFar ? nullptr : &watch_)) return true;
    i64 height = in_.height(offset_);
    if (height < best_) {
      best_ = height;
      for (int k = 0; k < in_.n; k++) turn_[order_[k]] = k + 1;
    }
    return keep(offset_);
  }
};

}  // namespace packing
