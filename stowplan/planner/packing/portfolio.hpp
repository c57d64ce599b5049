// The exact search by several rankings, of the problem and of easier ones that stand for it.
#pragma once

#include <map>
#include <memory>

#include "search.hpp"

namespace packing {

// Chains of buffers of one size, each of which begins when the one before it ends, taken for one buffer. A packing of
// the chains is one of the buffers, with fewer to place; that there is none says nothing about the buffers.
class Chains {
 public:
  enum Link {
    kNone,
    kQuiet,  // where nothing else begins or ends
    kAny,
  };

  Chains(const Instance& in, Link link) : chain_of_(in.n) {
    const vector<int> next = followers(in, link);
    vector<char> follows(in.n, 0);
    for (int i : next)
      if (i != kNobody) follows[i] = 1;
    for (int head = 0; head < in.n; head++) {
      if (follows[head]) continue;
      int tail = head;
      for (int i = head; i != kNobody; i = next[i]) {
        chain_of_[i] = int(size_.size());
        tail = i;
      }
      lower_.push_back(in.lower[head]);
      upper_.push_back(in.upper[tail]);
      size_.push_back(in.size[head]);
      fixed_.push_back(in.fixed[head]);
    }
  }

  int count() const { return int(size_.size()); }
  Instance instance() const { return {count(), lower_.data(), upper_.data(), size_.data(), fixed_.data()}; }

  // Offsets of the buffers, given those of the chains.
  vector<i64> unchained(const vector<i64>& offset) const {
    vector<i64> result;
    for (int chain : chain_of_) result.push_back(offset[chain]);
    return result;
  }

 private:
  static constexpr int kNobody = -1;
  vector<i64> lower_, upper_, size_, fixed_;
  vector<int> chain_of_;

  // Who comes next in the chain of each free buffer.
  static vector<int> followers(const Instance& in, Link link) {
    vector<int> next(in.n, kNobody);
    if (link == kNone) return next;
    std::multimap<std::pair<i64, i64>, int> begins;  // by time and size
    std::map<i64, int> events;
    for (int i = 0; i < in.n; i++) {
      events[in.lower[i]]++;
      events[in.upper[i]]++;
      if (in.fixed[i] == kFree) begins.insert({{in.lower[i], in.size[i]}, i});
    }
    for (int i = 0; i < in.n; i++) {
      auto found = begins.find({in.upper[i], in.size[i]});
      if (in.fixed[i] != kFree || found == begins.end() || (link == kQuiet && events[in.upper[i]] > 2)) continue;
      next[i] = found->second;
      begins.erase(found);
    }
    return next;
  }
};

class Portfolio {
 public:
  vector<i64> offset;

  Portfolio(const Instance& in, unsigned rules, Watch& watch) : watch_(watch), first_limit_(2 * i64(in.n)) {
    for (Chains::Link link : {Chains::kNone, Chains::kQuiet, Chains::kAny}) {
      Chains chains(in, link);
      if (!views_.empty() && chains.count() == views_.back()->chains.count()) continue;
      views_.push_back(std::make_unique<View>(std::move(chains), rules, watch));
    }
  }

  // How far the search at one capacity has come.
  struct Effort {
    i64 capacity;
    int turn = 0;            // which view by which ranking is next
    i64 limit = 0;           // of nodes
    unsigned hopeless = 0;   // views with chains that cannot be packed
  };

  // Round robin over rankings and views, until `until` seconds: each from the start, in each round with twice as many
  // nodes as in the one before. An effort may be gone on with.
  Outcome run(Effort& effort, double until) {
    const int count = int(views_.size());
    effort.limit = std::max(effort.limit, first_limit_);
    while (!watch_.over() && watch_.elapsed() < until) {
      const int which = effort.turn % count, ranking = effort.turn / count;
      if (!(effort.hopeless >> which & 1)) {
        View& view = *views_[which];
        Outcome outcome = view.search.attempt(effort.capacity, ranking, effort.limit, until);
        if (outcome == Outcome::packed) offset = view.chains.unchained(view.search.offset);
        if (outcome == Outcome::packed || (outcome == Outcome::impossible && which == 0)) return outcome;
        if (outcome == Outcome::impossible) effort.hopeless |= 1u << which;
      }
      if (++effort.turn == count * Search::kRankings) {
        effort.turn = 0;
        effort.limit = std::min(2 * effort.limit, kFar);
      }
    }
    return Outcome::unknown;
  }

 private:
  struct View {
    const Chains chains;
    const Instance in;
    Search search;
    View(Chains&& given, unsigned rules, Watch& watch)
        : chains(std::move(given)), in(chains.instance()), search(in, rules, watch) {}
  };

  Watch& watch_;
  const i64 first_limit_;
  vector<std::unique_ptr<View>> views_;  // the first is the problem itself
};

}  // namespace packing
