// Which planned request is this? Plans are sequences of sizes for each lane; a follower keeps its place in them.
//
// Note: insertion first
//   A request that is not the next one of the plan is taken for an extra one, and the place stays: one stray request
//   costs one miss. Only when the last three together are found ahead does the place move there (the step has left
//   some out). Skipping ahead at once, by size alone, costs hundreds of misses in models whose layers are alike.
//   A wrong guess costs misses and never more: whoever serves checks that the planned bytes are free.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <list>
#include <vector>

struct Lane {
  int64_t thread;
  int64_t stream;
  bool operator==(const Lane&) const = default;
};

struct PlannedRequest {
  int64_t size;
  int64_t offset;  // -1: known to come, and not planned
};

struct PlannedLane {
  Lane lane;
  std::vector<PlannedRequest> requests;
};

struct ArenaPlan {
  int64_t key;
  std::vector<PlannedLane> lanes;

  const std::vector<PlannedRequest>* find(const Lane& lane) const {
    for (auto& planned : lanes)
      if (planned.lane == lane) return &planned.requests;
    return nullptr;
  }
};

class Follower {
 public:
  // Is there any plan for this thread and stream?
  bool knows(const Lane& lane) const {
    return std::any_of(plans_.begin(), plans_.end(), [&](const ArenaPlan& plan) { return plan.find(lane); });
  }

  // The planned request that this one, in a lane that is known, is; or null. Valid until plans change.
  const PlannedRequest* next(const Lane& lane, int64_t size) {
    if (!plan_) plan_ = &plans_.front();
    const auto* requests = plan_->find(lane);
    Place& place = place_of(lane);
    if (place.begin.size() < kBeginning) place.begin.push_back(size);
    if (requests && place.cursor < requests->size() && (*requests)[place.cursor].size == size) {
      place.num_recent = 0;
      return &(*requests)[place.cursor++];
    }
    place.remember(size);
    if (!place.departed && switch_by_beginning(lane, place)) return take(lane, place);
    place.departed = true;
    if (place.num_recent < kEvidence) return nullptr;
    if (requests && find_recent(*requests, place, place.cursor, kAhead)) return resynchronised(lane, place);
    for (auto& plan : plans_) {  // the step has begun again, or a stray beginning hid which plan it follows
      const auto* other = plan.find(lane);
      if (!other || !find_recent(*other, place, 0, kBeginning)) continue;
      follow(plan);
      return resynchronised(lane, place);
    }
    return nullptr;
  }

  // A step begins. The plan that was followed last is expected first.
  void restart() {
    for (auto& place : places_) place = Place(place.lane);
  }

  void add(ArenaPlan plan) {
    drop(plan.key);
    plans_.push_front(std::move(plan));
  }

  void drop(int64_t key) {
    if (plan_ && plan_->key == key) plan_ = nullptr;
    std::erase_if(plans_, [key](const ArenaPlan& plan) { return plan.key == key; });
  }

  int64_t key() const { return plan_ ? plan_->key : -1; }
  int64_t resynchronisations() const { return resynchronisations_; }
  int64_t plan_changes() const { return plan_changes_; }

 private:
  static constexpr size_t kEvidence = 3;     // requests in a row that must be found elsewhere in a plan
  static constexpr size_t kAhead = 512;      // planned requests that are searched for them
  static constexpr size_t kBeginning = 256;  // requests of a step that tell plans apart

  struct Place {
    explicit Place(const Lane& its) : lane(its) {}

    Lane lane;
    size_t cursor = 0;
    std::vector<int64_t> begin;  // the step's first requests
    bool departed = false;       // from every plan with this beginning
    std::array<int64_t, kEvidence> recent{};
    size_t num_recent = 0;

    void remember(int64_t size) {
      if (num_recent == kEvidence) std::rotate(recent.begin(), recent.begin() + 1, recent.end());
      else ++num_recent;
      recent[num_recent - 1] = size;
    }
  };

  Place& place_of(const Lane& lane) {
    for (auto& place : places_)
      if (place.lane == lane) return place;
    return places_.emplace_back(lane);
  }

  // Another plan whose beginning is all that this step has asked for so far.
  bool switch_by_beginning(const Lane& lane, Place& place) {
    if (place.begin.size() != place.cursor + 1) return false;  // longer than what is kept
    for (auto& plan : plans_) {
      const auto* other = plan.find(lane);
      if (!other || other->size() < place.begin.size()) continue;
      auto same = [](const PlannedRequest& planned, int64_t size) { return planned.size == size; };
      if (!std::equal(other->begin(), other->begin() + place.begin.size(), place.begin.begin(), same)) continue;
      follow(plan);
      return true;
    }
    return false;
  }

  // Leaves the cursor at the last of the recent sizes.
  bool find_recent(const std::vector<PlannedRequest>& requests, Place& place, size_t from, size_t most) {
    for (size_t i = from; i + kEvidence <= requests.size() && i < from + most; ++i) {
      size_t k = 0;
      while (k < kEvidence && requests[i + k].size == place.recent[k]) ++k;
      if (k < kEvidence) continue;
      place.cursor = i + kEvidence - 1;
      return true;
    }
    return false;
  }

  void follow(ArenaPlan& plan) {
    if (plan_ != &plan) ++plan_changes_;
    plan_ = &plan;
  }

  const PlannedRequest* resynchronised(const Lane& lane, Place& place) {
    ++resynchronisations_;
    return take(lane, place);
  }

  const PlannedRequest* take(const Lane& lane, Place& place) {
    place.num_recent = 0;
    return &(*plan_->find(lane))[place.cursor++];
  }

  std::list<ArenaPlan> plans_;  // a list: what plan_ points to stays where it is
  ArenaPlan* plan_ = nullptr;
  std::vector<Place> places_;
  int64_t resynchronisations_ = 0;
  int64_t plan_changes_ = 0;
};
