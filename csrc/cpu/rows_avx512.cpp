#if defined(__x86_64__)
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#include "rows_kernel.h"

const dpo_fast::RowKernels* dpo_fast::rows_avx512() { return dpo_fast::AVX512::kRows; }
#endif
