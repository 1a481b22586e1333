// Fibers: a CUDA thread of the emulated block is a stack and the point where it stopped.
//
// x86-64 saves the six callee-saved registers and swaps the stack pointer, a few nanoseconds; other machines use
// ucontext, which also saves the signal mask with a system call. Fibers never leave the OS thread that made them.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace saw_int4::emulator {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
#else
struct Context {
  ucontext_t state;
};
#endif

// Memory for one fiber, with an unmapped page below it: an overflow faults instead of corrupting a neighbour.
class FiberStack {
 public:
  FiberStack();
  ~FiberStack();
  FiberStack(FiberStack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }
  FiberStack(const FiberStack&) = delete;
  FiberStack& operator=(const FiberStack&) = delete;
  FiberStack& operator=(FiberStack&&) = delete;

  // A context that runs entry() from its start; entry must never return.
  void prepare(Context& context, void (*entry)());

 private:
  char* memory_ = nullptr;
};

// Stores the running context into `from` and continues `to`. Returns when something switches back to `from`.
void switch_context(Context& from, const Context& to);

}  // namespace saw_int4::emulator
