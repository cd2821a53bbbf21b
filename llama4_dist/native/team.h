// Threads that compute one pass together, and wait for each other in a way that suits busy processors.
//
// OpenMP's threads either sleep at once, which costs a wake-up at each of a pass's steps, or look for the others in a
// loop that gives its processor to nobody: when processes outnumber processors, each step then lasts a time slice.
// These look for a moment, then offer their processor to others between looks, and sleep after a while.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace l4d {

class Team;

// What a thread sees of a pass: parts of it to take, and a place to wait for the others.
class Member {
public:
    Member(Team* team) : team_(team) {}

    // Call part(i) for each i < count, in whichever thread is free, and wait until all are done.
    template <typename F>
    void each(int64_t count, const F& part) {
        if (!team_) {
            for (int64_t i = 0; i < count; ++i) part(i);
            return;
        }
        for (int64_t i = take(); i < count; i = take()) part(i);
        finish();
    }

private:
    int64_t take();
    void finish();

    Team* team_;
    uint32_t step_ = 0;
};

// Run `pass` in `num_threads` threads, the caller's among them; the others belong to the caller's thread and stay.
void together(int num_threads, const std::function<void(Member&)>& pass);

}  // namespace l4d
