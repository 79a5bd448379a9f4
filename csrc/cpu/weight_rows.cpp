#include "cpu/weight_rows.h"

#include "cpu/double_lanes.h"

namespace tq {
namespace TQ_ISA {

void exp_in_place(double* x, int64_t count) {
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    F64su* const at = reinterpret_cast<F64su*>(x + i);
    *at = exp_nonpositive(*at);
  }
  const F64s last = exp_nonpositive(load_doubles(x + i, count - i));
  for (int64_t lane = 0; lane < count - i; ++lane) x[i + lane] = last[lane];
}

}  // namespace TQ_ISA
}  // namespace tq
