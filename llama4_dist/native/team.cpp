#include "team.h"

#include <sched.h>
#include <unistd.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace l4d {
namespace {

constexpr int LOOKS = 1000;  // some 60 us at most: a step that is shared out well ends for all at once
constexpr int OFFERS = 500;  // of the processor to others; some 200 us on an idle one, as long as Python takes between passes

inline void pause_a_little() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// Wait until `word` is no longer `seen`.
void wait_while(std::atomic<uint32_t>& word, uint32_t seen) {
    for (int i = 0; i < LOOKS; ++i) {
        if (word.load(std::memory_order_acquire) != seen) return;
        pause_a_little();
    }
    for (int i = 0; i < OFFERS; ++i) {
        if (word.load(std::memory_order_acquire) != seen) return;
        sched_yield();
    }
    while (word.load(std::memory_order_acquire) == seen) word.wait(seen, std::memory_order_acquire);
}

void advance(std::atomic<uint32_t>& word) {
    word.fetch_add(1, std::memory_order_release);
    word.notify_all();
}

}  // namespace

class Team {
public:
    explicit Team(int num_threads) : num_threads(num_threads), process(getpid()) {
        for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { serve(); });
    }

    ~Team() {
        pass_ = nullptr;
        advance(passes_);
        for (auto& thread : threads_) thread.join();
    }

    void run(const std::function<void(Member&)>& pass) {
        pass_ = &pass;
        step_.store(0, std::memory_order_relaxed);
        taken_[0].store(0, std::memory_order_relaxed);
        num_waiting_.store(0, std::memory_order_relaxed);
        num_left_.store(num_threads, std::memory_order_relaxed);
        advance(passes_);
        Member member(this);
        pass(member);
        leave();
        for (uint32_t left = num_left_.load(std::memory_order_acquire); left;
             left = num_left_.load(std::memory_order_acquire))
            wait_while(num_left_, left);
    }

    int64_t take(uint32_t step) { return taken_[step % 2].fetch_add(1, std::memory_order_relaxed); }

    // The last to come prepares the step after next and lets the others go on.
    void finish(uint32_t step) {
        if (num_waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 < uint32_t(num_threads)) {
            wait_while(step_, step);
            return;
        }
        num_waiting_.store(0, std::memory_order_relaxed);
        taken_[(step + 1) % 2].store(0, std::memory_order_relaxed);
        advance(step_);
    }

    const int num_threads;
    const pid_t process;  // a fork has none of its parent's threads

private:
    void serve() {
        for (uint32_t seen = 0;;) {
            wait_while(passes_, seen);
            seen = passes_.load(std::memory_order_acquire);
            if (!pass_) return;
            Member member(this);
            (*pass_)(member);
            leave();
        }
    }

    void leave() {
        num_left_.fetch_sub(1, std::memory_order_acq_rel);
        num_left_.notify_all();
    }

    std::vector<std::thread> threads_;
    const std::function<void(Member&)>* pass_ = nullptr;
    alignas(64) std::atomic<uint32_t> passes_{0};
    alignas(64) std::atomic<uint32_t> step_{0};
    alignas(64) std::atomic<uint32_t> num_waiting_{0};
    alignas(64) std::atomic<uint32_t> num_left_{0};
    alignas(64) std::atomic<int64_t> taken_[2] = {};
};

int64_t Member::take() { return team_->take(step_); }

void Member::finish() { team_->finish(step_++); }

void together(int num_threads, const std::function<void(Member&)>& pass) {
    if (num_threads <= 1) {
        Member alone(nullptr);
        pass(alone);
        return;
    }
    static thread_local std::unique_ptr<Team> team;
    if (team && team->process != getpid()) team.release();  // its threads live in the parent: nothing to join
    if (!team || team->num_threads != num_threads) {
        team.reset();
        team = std::make_unique<Team>(num_threads);
    }
    team->run(pass);
}

}  // namespace l4d
