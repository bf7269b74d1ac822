// Memory for gradients of the size of logits. The kernel hands out fresh memory page by page and zeroed, which takes
// longer than the gradient's computation; so the largest piece that was given back is kept for the next gradient.
//
// While it is kept, the kernel may take its pages whenever it is short of memory (MADV_FREE): a process that needs them
// for something else gets them, and then the next gradient is as slow as the first.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dpo_fast {
namespace {

using at::Tensor;

#ifdef MADV_FREE

constexpr size_t kHugePage = 2 << 20;
constexpr size_t kLeast = 2 * kHugePage;  // less than this malloc keeps by itself

struct Piece {
  void* data = nullptr;
  size_t size = 0;
};

struct Kept {
  std::mutex lock;
  Piece piece;
};

// Never destroyed: tensors may outlive what is destroyed at the end of the process.
Kept& kept() {
  static Kept* const only = new Kept;
  return *only;
}

// What is kept and what is given, the larger one last.
Piece exchange(Piece given) {
  Kept& memory = kept();
  const std::lock_guard<std::mutex> guard(memory.lock);
  std::swap(memory.piece, given);
  return given;
}

void unmap(Piece piece) {
  if (piece.data != nullptr) munmap(piece.data, piece.size);
}

Piece take(size_t size) {
  const Piece found = exchange({});
  if (found.size >= size) return found;
  unmap(found);
  size = (size + kHugePage - 1) / kHugePage * kHugePage;
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return {};
  madvise(data, size, MADV_HUGEPAGE);
  return {data, size};
}

void give_back(Piece piece) {
  if (madvise(piece.data, piece.size, MADV_FREE) == 0) {
    const Piece other = exchange(piece);
    piece = other.size > piece.size ? exchange(other) : other;
  }
  unmap(piece);
}

Tensor new_empty(const Tensor& like, at::IntArrayRef size) {
  size_t bytes = like.element_size();
  for (int64_t n : size) bytes *= n;
  const Piece piece = bytes < kLeast ? Piece{} : take(bytes);
  if (piece.data == nullptr) return like.new_empty(size);
  return at::from_blob(piece.data, size, [piece](void*) { give_back(piece); }, like.options());
}

#else

Tensor new_empty(const Tensor& like, at::IntArrayRef size) { return like.new_empty(size); }

#endif

}  // namespace

TORCH_LIBRARY_IMPL(dpo_fast_csrc, CPU, m) { m.impl("new_empty", new_empty); }

}  // namespace dpo_fast
