#include "emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

namespace saw_int4::emulator {

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // touched lazily: a kernel's locals and the emulator's own frames

size_t page_bytes() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

FiberStack::FiberStack() {
  void* memory = mmap(nullptr, kStackBytes + page_bytes(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("emulator: mmap of a fiber stack failed: out of address space");
  memory_ = static_cast<char*>(memory);
  if (mprotect(memory_, page_bytes(), PROT_NONE) != 0) throw std::runtime_error("emulator: mprotect failed");
}

FiberStack::~FiberStack() {
  if (memory_ != nullptr) munmap(memory_, kStackBytes + page_bytes());
}

#if defined(__x86_64__)

extern "C" void saw_emulator_switch(void** save, void* load);

asm(R"(
.text
.p2align 4
.globl saw_emulator_switch
.type saw_emulator_switch, @function
saw_emulator_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size saw_emulator_switch, .-saw_emulator_switch
)");

void FiberStack::prepare(Context& context, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(memory_ + page_bytes() + kStackBytes) & ~uintptr_t{15};
  auto* stack = reinterpret_cast<uintptr_t*>(top);
  *--stack = 0;                                   // where entry would return to; keeps rsp = 8 (mod 16) at its start
  *--stack = reinterpret_cast<uintptr_t>(entry);  // popped by ret
  for (int saved = 0; saved < 6; ++saved) *--stack = 0;
  context.stack_pointer = stack;
}

void switch_context(Context& from, const Context& to) {
  saw_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void FiberStack::prepare(Context& context, void (*entry)()) {
  if (getcontext(&context.state) != 0) throw std::runtime_error("emulator: getcontext failed");
  context.state.uc_stack.ss_sp = memory_ + page_bytes();
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, const Context& to) {
  swapcontext(&from.state, &to.state);
}

#endif

}  // namespace saw_int4::emulator
