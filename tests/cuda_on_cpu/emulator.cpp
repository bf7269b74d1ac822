// The scheduler of emulator.h, and the few functions of CUDA's library that the extension calls.

#include "emulator.h"

#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

// ThreadSanitizer, where the kernels are built with it (this file is not): each CUDA thread is a thread of its own to it, and
// what orders them is said here. Switching to another orders nothing, nor does a shuffle; a barrier does.
#ifdef EMULATOR_SEES_RACES
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
inline void* __tsan_get_current_fiber() { return nullptr; }
inline void* __tsan_create_fiber(unsigned) { return nullptr; }
inline void __tsan_destroy_fiber(void*) {}
inline void __tsan_switch_to_fiber(void*, unsigned) {}
inline void __tsan_acquire(void*) {}
inline void __tsan_release(void*) {}
#endif

namespace dpo_fast {
const char* instruction_set() { return "emulated"; }  // what csrc/ops.cpp asks of the CPU's part
}  // namespace dpo_fast

namespace emulated {

thread_local Index thread, block, threads, blocks;

namespace {

constexpr int kWarp = 32, kMultiprocessors = 2, kBlocksAtOnce = 5;
constexpr size_t kStack = 64 << 10;

enum class State { ready, at_barrier, at_shuffle, ended };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  uint64_t bits;
  int other;
  void* tsan_fiber;
};

// The block that a thread of the CPU runs.
struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  const std::function<void()>* kernel;
  std::mt19937 random{1};
  void* scheduler_tsan_fiber;
  // ThreadSanitizer is told of a barrier by an address: two take turns, since one thread may reach the next barrier before
  // another leaves this one.
  char barriers[2];
  int barrier = 0;
  char end;
};

// Stacks are kept from launch to launch.
Block block_slots[kBlocksAtOnce];
thread_local Block* here;

constexpr unsigned kOrdersNothing = 1;

void leave(Fiber& fiber, State state) {
  fiber.state = state;
  __tsan_switch_to_fiber(here->scheduler_tsan_fiber, kOrdersNothing);
  swapcontext(&fiber.context, &here->scheduler);
}

void enter() {
  (*here->kernel)();
  __tsan_release(&here->end);
  leave(here->fibers[thread.x], State::ended);
}

void wait_as(State state) {
  const Index mine = thread;
  leave(here->fibers[mine.x], state);
  thread = mine;
}

int count(int begin, int end, State state) {
  int found = 0;
  for (int i = begin; i < end; i++) found += here->fibers[i].state == state;
  return found;
}

// Lets those go on that have what they wait for; returns whether there are any.
bool release(int n) {
  bool some = false;
  for (int warp = 0; warp < n; warp += kWarp) {
    if (count(warp, warp + kWarp, State::at_shuffle) != kWarp) continue;
    uint64_t brought[kWarp];
    for (int lane = 0; lane < kWarp; lane++) brought[lane] = here->fibers[warp + lane].bits;
    for (int lane = 0; lane < kWarp; lane++) {
      Fiber& fiber = here->fibers[warp + lane];
      fiber.bits = brought[lane ^ fiber.other];
      fiber.state = State::ready;
    }
    some = true;
  }
  const int waiting = count(0, n, State::at_barrier);
  if (waiting && waiting + count(0, n, State::ended) == n) {
    for (int i = 0; i < n; i++) {
      if (here->fibers[i].state == State::at_barrier) here->fibers[i].state = State::ready;
    }
    here->barrier++;
    some = true;
  }
  return some;
}

void run_block(int n) {
  if (n % kWarp != 0) std::abort();
  if (int(here->fibers.size()) < n) here->fibers.resize(n);
  for (int i = 0; i < n; i++) {
    Fiber& fiber = here->fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::ready;
    fiber.tsan_fiber = __tsan_create_fiber(0);
  }
  here->scheduler_tsan_fiber = __tsan_get_current_fiber();
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  do {
    std::shuffle(order.begin(), order.end(), here->random);
    for (int i : order) {
      if (here->fibers[i].state != State::ready) continue;
      thread.x = i;
      __tsan_switch_to_fiber(here->fibers[i].tsan_fiber, kOrdersNothing);
      swapcontext(&here->scheduler, &here->fibers[i].context);
    }
  } while (release(n));
  if (count(0, n, State::ended) != n) {
    std::fprintf(stderr, "threads of a block wait at different barriers\n");
    std::abort();
  }
  __tsan_acquire(&here->end);
  for (int i = 0; i < n; i++) __tsan_destroy_fiber(here->fibers[i].tsan_fiber);
}

}  // namespace

bool has_fault(const char* name) {
  const char* asked = std::getenv("EMULATOR_FAULT");
  return asked && std::strcmp(asked, name) == 0;
}

void barrier() {
  static const bool orders = !has_fault("barriers order nothing");
  char* const barrier_tag = &here->barriers[here->barrier % 2];
  if (orders) __tsan_release(barrier_tag);
  wait_as(State::at_barrier);
  if (orders) __tsan_acquire(barrier_tag);
}

uint64_t exchange(uint64_t bits, int other) {
  here->fibers[thread.x].bits = bits;
  here->fibers[thread.x].other = other;
  wait_as(State::at_shuffle);
  return here->fibers[thread.x].bits;
}

void launch(int64_t grid, int threads_per_block, const std::function<void()>& thread_of_kernel) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  std::atomic<int64_t> next{0};
  std::vector<std::thread> workers;
  for (int w = 0; w < std::min<int64_t>(grid, kBlocksAtOnce); w++) {
    workers.emplace_back([&, w] {
      here = &block_slots[w];
      here->kernel = &thread_of_kernel;
      threads.x = threads_per_block;
      blocks.x = unsigned(grid);
      for (int64_t b; (b = next++) < grid;) {
        block.x = unsigned(b);
        run_block(threads_per_block);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace emulated

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* p, int value, size_t count, cudaStream_t) {
  std::memset(p, value, count);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::kMultiprocessors;
  return cudaSuccess;
}

}  // extern "C"
