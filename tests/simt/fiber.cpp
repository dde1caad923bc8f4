// fiber.cpp: guarded stacks, and the context switch (assembly on x86-64, ucontext elsewhere).
#include "fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(KVC_SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(KVC_SIMT_UCONTEXT)
// rdi: where to leave our stack pointer; rsi: the stack pointer to take over. What the ABI lets a call clobber need not
// be saved, and neither side changes the floating-point control words.
extern "C" void kvc_simt_swap(void** save, void* load);
asm(R"(
    .text
    .p2align 4
    .globl kvc_simt_swap
    .hidden kvc_simt_swap
    .type kvc_simt_swap, @function
kvc_simt_swap:
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
    .size kvc_simt_swap, .-kvc_simt_swap
)");
#endif

namespace kvc_simt {
namespace {

[[maybe_unused]] constexpr size_t kEntryBytes = 8 * 1024;  // of the frames of entry() and what it calls last, and of the stagger below

// Where the scheduler stands while a fibre runs. Its stack is whichever called the launch, learnt on the first switch.
struct Scheduler {
#if defined(KVC_SIMT_UCONTEXT)
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif
    void* fake_stack = nullptr;
    const void* low = nullptr;
    size_t bytes = 0;
};

Scheduler scheduler;
void (*entry_of_next)() = nullptr;

// The two halves of a switch as the sanitizer wants to hear of them; nothing without it.
void announce_switch([[maybe_unused]] void** fake, [[maybe_unused]] const void* low, [[maybe_unused]] size_t bytes) {
#if defined(KVC_SIMT_ASAN)
    __sanitizer_start_switch_fiber(fake, low, bytes);
#endif
}
void complete_switch([[maybe_unused]] void* fake, [[maybe_unused]] const void** low, [[maybe_unused]] size_t* bytes) {
#if defined(KVC_SIMT_ASAN)
    __sanitizer_finish_switch_fiber(fake, low, bytes);
#endif
}

void first_frame() {
    complete_switch(nullptr, &scheduler.low, &scheduler.bytes);
    entry_of_next();
}

}  // namespace

void StackPool::reserve(size_t n_stacks) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = (KVC_SIMT_STACK_BYTES + page - 1) / page * page;
    while (stacks_.size() < n_stacks) {
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* p = mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        char* low = static_cast<char*>(p) + page;
        if (mprotect(p, page, PROT_NONE) != 0) throw std::bad_alloc();
        stacks_.push_back({low, bytes});
    }
}

void Fiber::prepare(Stack stack, size_t index, void (*entry)()) {
    stack_ = stack;
    fake_stack_ = nullptr;
    entry_of_next = entry;
#if defined(KVC_SIMT_ASAN)
    // A fibre leaves the red zones of its frames behind: of entry() alone, or, abandoned, of any. The whole stack each
    // time would cost more than all that most threads do.
    const size_t used = is_clean_ ? kEntryBytes : stack.bytes;
    __asan_unpoison_memory_region(stack.low + stack.bytes - used, used);
    is_clean_ = false;
#endif
    const size_t usable = stack.bytes - index % 32 * 128;
#if defined(KVC_SIMT_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.low;
    context_.uc_stack.ss_size = usable;
    context_.uc_link = nullptr;
    makecontext(&context_, first_frame, 0);
#else
    // From the top: a null return address, where unwinders stop; first_frame, to which the switch returns; six
    // callee-saved registers. first_frame then starts 8 bytes past a multiple of 16, as after a call.
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.low + usable) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(first_frame);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
}

void Fiber::resume() {
    announce_switch(&scheduler.fake_stack, stack_.low, stack_.bytes);
#if defined(KVC_SIMT_UCONTEXT)
    swapcontext(&scheduler.context, &context_);
#else
    kvc_simt_swap(&scheduler.stack_pointer, stack_pointer_);
#endif
    complete_switch(scheduler.fake_stack, nullptr, nullptr);
}

void Fiber::leave(bool for_good) {
    announce_switch(for_good ? nullptr : &fake_stack_, scheduler.low, scheduler.bytes);
#if defined(KVC_SIMT_UCONTEXT)
    swapcontext(&context_, &scheduler.context);
#else
    kvc_simt_swap(&stack_pointer_, scheduler.stack_pointer);
#endif
    complete_switch(fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() { leave(false); }
void Fiber::abandon() { leave(true); }
void Fiber::finish() {
    is_clean_ = true;
    leave(true);
}

}  // namespace kvc_simt
