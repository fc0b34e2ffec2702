#include "calibration_inputs.h"

namespace easyspec {

void calibration_inputs_cpu(const CalibrationInputs& args) {
  for (int64_t row = 0; row < args.rows; ++row) do_row(args, row);
}

}  // namespace easyspec
