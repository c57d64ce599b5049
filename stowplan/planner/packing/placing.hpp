// Two ways to place buffers in a given order: first fit, and along a skyline.
#pragma once

#include "instance.hpp"

namespace packing {

using Order = vector<int>;  // buffers, the first to be placed first

// Buffers in the order in which they begin.
inline vector<int> by_first(const Instance& in) {
  vector<int> order(in.n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int a, int b) {
    return in.first[a] != in.first[b] ? in.first[a] < in.first[b] : a < b;
  });
  return order;
}

// Who is placed where. Buffers lie in the order in which they begin, in buckets under a tree that knows the last end of
// the placed ones below each node: all placed neighbours of a buffer are found without a list of pairs.
class Board {
 public:
  vector<i64> offset;

  explicit Board(const Instance& in)
      : offset(in.n, 0), in_(in), by_first_(by_first(in)), position_(in.n), first_(in.n), last_(in.n, 0) {
    for (int p = 0; p < in.n; p++) {
      position_[by_first_[p]] = p;
      first_[p] = in.first[by_first_[p]];
    }
    while (leaves_ * kBucket < in.n) leaves_ *= 2;
    tree_.assign(2 * size_t(leaves_), 0);
  }

  void clear() {
    std::fill(last_.begin(), last_.end(), 0);
    std::fill(tree_.begin(), tree_.end(), 0);
    for (int i = 0; i < in_.n; i++)
      if (in_.fixed[i] != kFree) put(i, in_.fixed[i]);
  }

  void put(int i, i64 where) {
    offset[i] = where;
    int p = position_[i];
    last_[p] = in_.last[i];
    for (int v = leaves_ + p / kBucket; v && tree_[v] < in_.last[i]; v /= 2) tree_[v] = in_.last[i];
  }

  void take(int i) {
    int p = position_[i], leaf = p / kBucket, most = 0;
    last_[p] = 0;
    for (int q = leaf * kBucket; q < std::min(in_.n, (leaf + 1) * kBucket); q++) most = std::max(most, last_[q]);
    tree_[leaves_ + leaf] = most;
    for (int v = (leaves_ + leaf) / 2; v; v /= 2) {
      int now = std::max(tree_[2 * v], tree_[2 * v + 1]);
      if (tree_[v] == now) break;
      tree_[v] = now;
    }
  }

  // The placed buffers that are alive with sections [from, to), in no order.
  template <class Visit>
  void each(int from, int to, Visit visit) const {
    int end = int(std::lower_bound(first_.begin(), first_.end(), to) - first_.begin());
    int stack[64], depth = 0;
    stack[depth++] = 1;
    while (depth) {
      int v = stack[--depth];
      if (tree_[v] <= from) continue;
      if (v < leaves_) {
        stack[depth++] = 2 * v + 1;
        stack[depth++] = 2 * v;
        continue;
      }
      int begin = (v - leaves_) * kBucket;
      if (begin >= end) return;  // so do all buckets after it
      for (int p = begin; p < std::min(end, begin + kBucket); p++)
        if (last_[p] > from) visit(by_first_[p]);
    }
  }

  // The least offset at which buffer i fits among those placed.
  i64 lowest(int i) {
    taken_.clear();
    each(in_.first[i], in_.last[i], [&](int j) { taken_.push_back({offset[j], offset[j] + in_.size[j]}); });
    std::sort(taken_.begin(), taken_.end());
    i64 at = 0;
    for (auto& [bottom, top] : taken_) {
      if (bottom - at >= in_.size[i]) break;
      at = std::max(at, top);
    }
    return at;
  }

 private:
  static constexpr int kBucket = 16;
  const Instance& in_;
  vector<int> by_first_, position_, first_, last_;  // last_: 0 where not placed
  vector<int> tree_;
  int leaves_ = 1;
  vector<std::pair<i64, i64>> taken_;
};

// Places all free buffers in `order`, each at its least offset; false if time ran out.
inline bool first_fit(const Instance& in, const Order& order, Board& board, Watch& watch) {
  board.clear();
  for (int i : order) {
    if (in.fixed[i] != kFree) continue;
    if (watch.over()) return false;
    board.put(i, board.lowest(i));
  }
  return true;
}

// The tops of what is placed so far, as stretches of sections of equal height. The lowest stretch gets the first buffer
// in the order whose lifetime lies inside it, or else is raised to its lower neighbour. Needs no look at neighbours:
// layered traces of 100,000 buffers take a fraction of a second. Fixed buffers are left out: all others come above
// them.
class Skyline {
 public:
  explicit Skyline(const Instance& in) : in_(in), by_first_(by_first(in)), position_(in.n), first_(in.n) {
    for (int p = 0; p < in.n; p++) {
      position_[by_first_[p]] = p;
      first_[p] = in.first[by_first_[p]];
      if (in.fixed[p] != kFree) base_ = std::max(base_, in.fixed[p] + in.size[p]);
    }
    while (leaves_ < in.n) leaves_ *= 2;
  }

  // False if time ran out; without a watch it does not.
  bool fill(const Order& order, vector<i64>& offset, Watch* watch) {
    int left = load(order);
    stretches_.assign(size_t(in_.sections()) + 1, {});
    stretches_[0] = {in_.sections(), -1, base_};
    heap_.clear();
    push(0);
    while (left) {
      if (watch && watch->over()) return false;
      std::pop_heap(heap_.begin(), heap_.end());
      auto [negative_height, negative_begin] = heap_.back();
      heap_.pop_back();
      int begin = -negative_begin;
      const Stretch here = stretches_[begin];
      if (!here.end || here.height != -negative_height) continue;  // it was joined or cut since
      best_ = kNobody;
      find(1, 0, leaves_, begin, here.end);
      if (best_ == kNobody) {
        raise(begin);
        continue;
      }
      int i = order[best_];
      offset[i] = here.height;
      remove(i);
      left--;
      cut(begin, in_.first[i], in_.last[i], here.height + in_.size[i]);
    }
    return true;
  }

 private:
  static constexpr int kNobody = std::numeric_limits<int>::max();
  struct Node { int rank = kNobody, last = kNobody; };           // the least of those below
  struct Stretch { int end = 0, before = -1; i64 height = 0; };  // by its first section; end 0: none begins there

  const Instance& in_;
  vector<int> by_first_, position_, first_;
  i64 base_ = 0;
  int leaves_ = 1, best_ = kNobody;
  vector<Node> tree_;
  vector<Stretch> stretches_;
  vector<std::pair<i64, int>> heap_;  // (-height, -begin): the lowest, then the earliest

  int load(const Order& order) {
    int count = 0;
    tree_.assign(2 * size_t(leaves_), {});
    for (int rank = 0; rank < in_.n; rank++) {
      int i = order[rank];
      if (in_.fixed[i] != kFree) continue;
      tree_[leaves_ + position_[i]] = {rank, in_.last[i]};
      count++;
    }
    for (int v = leaves_ - 1; v; v--) pull(v);
    return count;
  }

  void pull(int v) {
    const Node &a = tree_[2 * v], &b = tree_[2 * v + 1];
    tree_[v] = {std::min(a.rank, b.rank), std::min(a.last, b.last)};
  }

  void remove(int i) {
    int v = leaves_ + position_[i];
    tree_[v] = {};
    while (v /= 2) pull(v);
  }

  void push(int begin) {
    heap_.push_back({-stretches_[begin].height, -begin});
    std::push_heap(heap_.begin(), heap_.end());
  }

  // The least rank among those that begin at `from` or later and end by `to`.
  void find(int v, int left, int right, int from, int to) {
    if (tree_[v].rank >= best_ || tree_[v].last > to) return;
    if (first_[std::min(right, in_.n) - 1] < from || first_[left] >= to) return;
    if (right - left == 1) {
      best_ = tree_[v].rank;
      return;
    }
    int middle = (left + right) / 2;
    find(2 * v, left, middle, from, to);
    if (middle < in_.n) find(2 * v + 1, middle, right, from, to);
  }

  // Nothing fits: the stretch joins its lower neighbour, or both.
  void raise(int begin) {
    Stretch& here = stretches_[begin];
    const int end = here.end, before = here.before;
    const bool has_next = end < in_.sections();
    i64 previous = before >= 0 ? stretches_[before].height : kFar, next = has_next ? stretches_[end].height : kFar;
    here.height = std::min(previous, next);
    if (next == here.height) {
      here.end = stretches_[end].end;
      stretches_[end].end = 0;
      if (here.end < in_.sections()) stretches_[here.end].before = begin;
    }
    if (previous == here.height) {
      stretches_[before].end = here.end;
      if (here.end < in_.sections()) stretches_[here.end].before = before;
      here.end = 0;
      begin = before;
    }
    push(begin);
  }

  // Sections [from, to) of the stretch at `begin` get a new height; what is left on either side stays.
  void cut(int begin, int from, int to, i64 height) {
    const Stretch here = stretches_[begin];
    int before = here.before;
    if (begin < from) {
      stretches_[begin].end = from;
      push(begin);
      before = begin;
    }
    if (here.end < in_.sections()) stretches_[here.end].before = to < here.end ? to : from;
    if (to < here.end) {
      stretches_[to] = {here.end, from, here.height};
      push(to);
    }
    stretches_[from] = {to, before, height};
    push(from);
  }
};

}  // namespace packing
