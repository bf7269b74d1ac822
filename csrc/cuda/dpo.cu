// Loss and gradient of every pair from logits in one launch: 2 reads and 1 write of the scored rows.
//
//   rows       logp[row] = x[target] - logsumexp(x)                            1 read
//   pair       logps = sums over each sequence's rows; loss(logps) and its two derivatives
//   gradient   out[row] = dloss/dlogps[sequence] * (onehot - softmax(x))       1 read, 1 write
//
// The grid is persistent: a block takes the next ticket (tickets.h) from one counter until there is none. A row ticket
// stores its results and counts itself done; the one that completes the pair sums them in a fixed order (the same bits
// on every run; in double, as segment_sum does), evaluates the loss and publishes two coefficients. A gradient ticket
// waits for its pair's coefficients. They come from smaller tickets, and every block that holds a ticket is running, so
// there is no deadlock, however many blocks are resident, and no need for a cooperative launch.
//
// Data that one block writes and another reads is ordered by the pair's counter. Only thread 0 stores, and it then adds
// to the counter with release; thread 0 of the reader acquires, and a barrier joins its other threads. The row ticket
// that completes a pair does both: all writes of the counter are read-modify-writes, so it follows the releases of all
// the pair's rows. In place, the same order keeps a gradient from overwriting a row that is still read. Tickets carry no
// data, so taking one is relaxed.

#include <algorithm>

#include "rows.cuh"
#include "tickets.h"

namespace dpo_fast::cuda {
namespace {

// Three blocks per SM fit with 80 registers per thread, and more would only wait for a place. One block of twice the
// threads has fewer rows between their two reads, so that more second reads can come from L2. Neither has been measured.
constexpr int threads_of(int blocks_per_sm) { return blocks_per_sm == 3 ? 256 : 512; }

struct Work {
  Logits x;
  Targets targets;
  Pairs pairs;
  float *losses, *logps;
  void* out;
  int64_t stride_out;
  float *top, *log_total, *row_logps;  // [N]
  float* coef;                         // [2B]
  int* counters;                       // [B + 1]: one per pair, and the next ticket
};

struct SequenceSum {
  float logps, length;
};

// The sum of the log-probs of a sequence's scored rows, and the number of those rows (at least 1).
__device__ __forceinline__ SequenceSum sum_sequence(const Work& work, int sequence) {
  double sum = 0;
  int scored = 0;
  const int end = work.pairs.cu_rows[sequence + 1];
  for (int row = work.pairs.cu_rows[sequence] + int(threadIdx.x); row < end; row += blockDim.x) {
    if (work.targets.data[row] == work.targets.ignore_index) continue;
    sum += load_shared_number(work.row_logps + row);
    scored++;
  }
  sum = block_join(sum, Sum());
  return {float(sum), float(max(block_join(scored, Sum()), 1))};
}

// Log-probs, loss and the two coefficients of a pair whose rows are done.
__device__ __forceinline__ void finish_pair(const Work& work, int w) {
  const Pairs& pairs = work.pairs;
  const int l = pairs.B + w;
  const SequenceSum chosen = sum_sequence(work, w), rejected = sum_sequence(work, l);
  if (threadIdx.x != 0) return;
  const float* ref = pairs.ref_logps;
  const float ref_w = ref ? ref[w] : 0.0f, ref_l = ref ? ref[l] : 0.0f;
  const Pair pair{chosen.logps, rejected.logps, ref_w, ref_l, chosen.length, rejected.length};
  const PairLoss found = pair_loss(pair, pairs.options);
  work.losses[w] = found.loss;
  work.logps[w] = pair.pw;
  work.logps[l] = pair.pl;
  work.coef[w] = found.gw * pairs.grad_scale;
  work.coef[l] = found.gl * pairs.grad_scale;
  add_acq_rel(work.counters + w, 1);
}

template <class T, int kBlocks>
__global__ void __launch_bounds__(threads_of(kBlocks), kBlocks) dpo_kernel(const __grid_constant__ Work work) {
  const Logits& x = work.x;
  const int *cu_rows = work.pairs.cu_rows, B = work.pairs.B, places = int(x.N) + B;
  int largest = 0;
  for (int pair = threadIdx.x; pair < B; pair += blockDim.x) largest = max(largest, pair_rows(cu_rows, B, pair));
  const int lead = lead_of(block_join(largest, Max()), gridDim.x, places);

  while (true) {
    const int ticket = from_first([&] { return add_relaxed(work.counters + B, 1); });
    if (ticket >= 2 * places) return;
    const Turn turn = turn_of(ticket, places, lead);
    const Place place = place_of(cu_rows, B, turn.place);
    const int64_t n = place.row;
    const int64_t target = n >= 0 ? work.targets.data[n] : work.targets.ignore_index;
    const bool scored = target != work.targets.ignore_index;
    const T* row = static_cast<const T*>(x.data) + n * x.stride;
    int* counter = work.counters + place.pair;

    if (turn.is_row) {
      if (scored) {
        const Target word = checked(target, x.V);
        const float picked = to_float(row[word.index]) + word.fault;
        const Row found = reduce_row<false>(row, x.V, Plain());
        if (threadIdx.x == 0) {
          work.top[n] = found.top;
          work.log_total[n] = found.log_total;
          work.row_logps[n] = (picked - found.top) - found.log_total;
        }
      }
      const int done = from_first([&] { return add_acq_rel(counter, 1); });
      if (done == place.rows) finish_pair(work, place.pair);
    } else if (n >= 0) {
      T* out = static_cast<T*>(work.out) + n * work.stride_out;
      float coef = 0;
      if (scored) {
        // The count of a finished pair: its rows, the place without a row, and the published coefficients.
        if (threadIdx.x == 0) {
          while (load_acquire(counter) < place.rows + 2) wait_a_little();
        }
        __syncthreads();
        coef = load_shared_number(work.coef + place.sequence);
      }
      if (coef != 0) {
        const float top = load_shared_number(work.top + n), log_total = load_shared_number(work.log_total + n);
        // A target outside the vocabulary has already made the coefficient NaN.
        write_gradient(row, out, x.V, checked(target, x.V).index, coef, top, log_total, Plain());
      } else {
        write_zeros(out, x.V);
      }
    }
  }
}

}  // namespace

cudaError_t dpo_fused(const Logits& x, const Targets& targets, const Pairs& pairs, float* losses, float* logps,
                      void* out, int64_t stride_out, void* workspace, int blocks_per_sm, cudaStream_t stream) {
  const int64_t N = x.N, B = pairs.B;
  float* numbers = static_cast<float*>(workspace);
  int* counters = reinterpret_cast<int*>(numbers + 3 * N + 2 * B);
  cudaError_t error = cudaMemsetAsync(counters, 0, (B + 1) * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  int device = 0, sms = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const Work work{x,          targets,     pairs,           losses,          logps,   out,
                  stride_out, numbers,     numbers + N,     numbers + 2 * N, numbers + 3 * N, counters};
  return with_type(x.dtype, [&](auto word) {
    using T = decltype(word);
    const int most = threads_of(blocks_per_sm), threads = threads_for<T>(x.V, most);
    const int64_t resident = int64_t(sms) * blocks_per_sm * (most / threads);
    const auto kernel = blocks_per_sm == 3 ? dpo_kernel<T, 3> : dpo_kernel<T, 1>;
    kernel<<<std::min(resident, 2 * (N + B)), threads, 0, stream>>>(work);
  });
}

}  // namespace dpo_fast::cuda
