#if defined(__x86_64__)
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#include "rows_kernel.h"

const dpo_fast::RowKernels* dpo_fast::rows_avx2() { return dpo_fast::AVX2::kRows; }
#endif
