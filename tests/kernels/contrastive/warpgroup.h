// A warpgroup of 128 threads on the CPU, as the CUDA kernels' collective functions want it.
//
// Threads are contexts of which a random one runs until it waits: what does not wait where it must
// soon reads what is not there yet. Threads that wait for others that never come end the test.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace carillon::test {

constexpr int kNumThreads = 128;
constexpr size_t kStackBytes = 128 * 1024;

class Scheduler {
 public:
  // Runs work(thread) for every thread, to the end.
  void run(const std::function<void(int)>& work) {
    work_ = &work;
    for (int thread = 0; thread < kNumThreads; ++thread) {
      prepare(thread);
      ready_.push_back(thread);
    }
    num_done_ = 0;
    while (!ready_.empty()) {
      std::swap(ready_[random_() % ready_.size()], ready_.back());
      current_ = ready_.back();
      ready_.pop_back();
      swapcontext(&main_, &contexts_[current_].at);
    }
    if (num_done_ == kNumThreads) return;
    std::cerr << "threads wait for others that never come\n";
    std::exit(1);
  }

  int current() const { return current_; }
  void wake(int thread) { ready_.push_back(thread); }
  void sleep() { swapcontext(&contexts_[current_].at, &main_); }

 private:
  struct Context {
    ucontext_t at;
    std::unique_ptr<char[]> stack;
  };

  void prepare(int thread) {
    Context& context = contexts_[thread];
    if (!context.stack) context.stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&context.at);
    context.at.uc_stack.ss_sp = context.stack.get();
    context.at.uc_stack.ss_size = kStackBytes;
    context.at.uc_link = &main_;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context.at, reinterpret_cast<void (*)()>(&Scheduler::start), 3,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self), thread);
  }

  static void start(unsigned high, unsigned low, int thread) {
    auto* self = reinterpret_cast<Scheduler*>(uintptr_t{high} << 32 | low);
    (*self->work_)(thread);
    ++self->num_done_;
  }

  Context contexts_[kNumThreads];
  ucontext_t main_;
  const std::function<void(int)>* work_ = nullptr;
  std::vector<int> ready_;
  int current_ = 0;
  int num_done_ = 0;
  std::minstd_rand random_{7};
};

class Barrier {
 public:
  // The last to come goes on at once, the others once their turn comes.
  void wait(Scheduler& scheduler, size_t num_threads) {
    if (waiting_.size() + 1 < num_threads) {
      waiting_.push_back(scheduler.current());
      scheduler.sleep();
      return;
    }
    for (const int thread : waiting_) scheduler.wake(thread);
    waiting_.clear();
  }

 private:
  std::vector<int> waiting_;
};

struct GroupMemory {
  Scheduler scheduler;
  Barrier whole;
  Barrier warps[kNumThreads / 32];
  uint64_t slots[2][kNumThreads];
  bool flags[3] = {false, false, false};
  std::vector<float> values;
};

// One thread's view. `Value` is float, or uint16_t for bfloat16's bits.
template <typename Value>
struct HostThreads {
  using Element = Value;
  int thread;
  GroupMemory& memory;
  int num_exchanges = 0;
  int num_votes = 0;

  float* shared() { return memory.values.data(); }

  template <typename T>
  T exchange(T value, int mask) {
    uint64_t(&slots)[kNumThreads] = memory.slots[num_exchanges++ % 2];
    std::memcpy(&slots[thread], &value, sizeof(value));
    memory.warps[thread / 32].wait(memory.scheduler, 32);
    T got;
    std::memcpy(&got, &slots[thread ^ mask], sizeof(got));
    return got;
  }

  void wait() { memory.whole.wait(memory.scheduler, kNumThreads); }

  bool any(bool flag) {
    const int now = num_votes++ % 3;
    memory.flags[(now + 1) % 3] = false;  // of the vote before the last, which all have read
    memory.flags[now] |= flag;
    wait();
    return memory.flags[now];
  }

  void store(uint16_t* to, const uint32_t (&words)[4]) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0) std::abort();
    std::memcpy(to, words, sizeof(words));
  }
  void store(float* to, float first, float second) {
    to[0] = first;
    to[1] = second;
  }
};

}  // namespace carillon::test
