#include "team.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <climits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace l4d {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int LOOKS = 1000;  // some 60 us at most: a step that is shared out well ends for all at once
constexpr int OFFERS = 500;  // of the processor to others; some 200 us on an idle one, as long as Python takes between passes
constexpr auto LATE = std::chrono::microseconds(100);  // an offer that took so long was accepted
constexpr int SLEEPS_ON_BUSY_PROCESSOR = 64;           // waits without offers: who offers comes last where others want it

inline void pause_a_little() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// A number that threads wait to see changed. `std::atomic::wait` offers the processor by itself before it sleeps.
struct alignas(64) Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> num_asleep{0};

    void advance() {
        value.fetch_add(1);
        wake();
    }

    void wake() {
        if (num_asleep.load()) syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
    }

    void wait_while(uint32_t seen) {
        for (int i = 0; i < LOOKS; ++i) {
            if (value.load(std::memory_order_acquire) != seen) return;
            pause_a_little();
        }
        static thread_local int num_sleeps = 0;
        if (num_sleeps) --num_sleeps;
        auto offered = Clock::now();
        for (int i = 0; i < OFFERS && !num_sleeps; ++i) {
            if (value.load(std::memory_order_acquire) != seen) return;
            sched_yield();
            const auto now = Clock::now();
            if (now - offered > LATE) num_sleeps = SLEEPS_ON_BUSY_PROCESSOR;
            offered = now;
        }
        ++num_asleep;  // before the value is compared again: who changes it counts afterwards
        while (value.load() == seen) syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
        --num_asleep;
    }
};

}  // namespace

class Team {
public:
    explicit Team(int num_threads) : num_threads(num_threads), process(getpid()) {
        for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { serve(); });
    }

    ~Team() {
        pass_ = nullptr;
        passes_.advance();
        for (auto& thread : threads_) thread.join();
    }

    void run(const std::function<void(Member&)>& pass) {
        pass_ = &pass;
        step_.value.store(0, std::memory_order_relaxed);
        taken_[0].store(0, std::memory_order_relaxed);
        num_waiting_.store(0, std::memory_order_relaxed);
        num_left_.value.store(num_threads, std::memory_order_relaxed);
        passes_.advance();
        Member member(this);
        pass(member);
        leave();
        for (uint32_t left = num_left_.value.load(std::memory_order_acquire); left;
             left = num_left_.value.load(std::memory_order_acquire))
            num_left_.wait_while(left);
    }

    int64_t take(uint32_t step) { return taken_[step % 2].fetch_add(1, std::memory_order_relaxed); }

    // The last to come prepares the step after next and lets the others go on.
    void finish(uint32_t step) {
        if (num_waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 < uint32_t(num_threads)) {
            step_.wait_while(step);
            return;
        }
        num_waiting_.store(0, std::memory_order_relaxed);
        taken_[(step + 1) % 2].store(0, std::memory_order_relaxed);
        step_.advance();
    }

    const int num_threads;
    const pid_t process;  // a fork has none of its parent's threads

private:
    void serve() {
        for (uint32_t seen = 0;;) {
            passes_.wait_while(seen);
            seen = passes_.value.load(std::memory_order_acquire);
            if (!pass_) return;
            Member member(this);
            (*pass_)(member);
            leave();
        }
    }

    void leave() {
        num_left_.value.fetch_sub(1);
        num_left_.wake();
    }

    std::vector<std::thread> threads_;
    const std::function<void(Member&)>* pass_ = nullptr;
    Signal passes_, step_, num_left_;
    alignas(64) std::atomic<uint32_t> num_waiting_{0};
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
