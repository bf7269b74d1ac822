// The schemas of the extension's ops, which are the same for the CPU and for CUDA; the dispatcher chooses. Python calls
// them as torch.ops.dpo_fast_csrc.* in dpo_fast/backends/extension.py, whose functions are the launchers that eager.py
// describes.
//
// logits are [N, V]: the entries of a row are adjacent, and rows have any stride. targets are [N] int64, in [0, V) or
// ignore_index; another target reads nothing outside its row and makes the row NaN. Log-probs, sums and statistics are
// float32; statistics are [4, N] in the order of eager.OUTPUTS, or [0, N]. `out` may be `logits`. `blocks_per_sm` is
// used on CUDA only and changes no number.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/rows.h"
#include "losses.h"

TORCH_LIBRARY(dpo_fast_csrc, m) {
  m.def(
      "logps_fwd(Tensor logits, Tensor targets, int ignore_index, float scale, float? softcap, float temperature, "
      "bool statistics) -> (Tensor logps, Tensor lse, Tensor statistics)");
  m.def(
      "logps_bwd(Tensor logits, Tensor targets, Tensor lse, Tensor coef, int ignore_index, float scale, "
      "float? softcap, float temperature, Tensor(a!) out) -> ()");
  m.def(
      "residual_(Tensor(a!) logits, Tensor targets, int ignore_index, float scale, float? softcap, float temperature, "
      "bool statistics, int blocks_per_sm) -> (Tensor logps, Tensor statistics)");
  m.def(
      "dpo_fused(Tensor logits, Tensor targets, Tensor cu_rows, Tensor? ref_logps, float grad_scale, int loss, "
      "float beta, float label_smoothing, float tau, float gamma, int ignore_index, Tensor(a!) out, int blocks_per_sm) "
      "-> (Tensor losses, Tensor logps)");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
  m.def("new_empty(Tensor like, int[] size) -> Tensor");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Registers torch.ops.dpo_fast_csrc, and says how it was built.";
  std::vector<std::string> losses(std::begin(dpo_fast::kLossNames), std::end(dpo_fast::kLossNames));
  m.attr("losses") = losses;
  m.attr("torch_version") = TORCH_VERSION;
  m.attr("instruction_set") = dpo_fast::instruction_set();
#ifdef _OPENMP
  m.attr("threads") = true;
#else
  m.attr("threads") = false;
#endif
#ifdef DPO_FAST_CUDA
  m.attr("cuda") = true;
#else
  m.attr("cuda") = false;
#endif
}
