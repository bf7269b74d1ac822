#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#include "rows_kernel.h"

const dpo_fast::RowKernels* dpo_fast::rows_default() { return dpo_fast::DEFAULT::kRows; }
