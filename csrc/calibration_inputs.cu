#include "calibration_inputs.h"

namespace easyspec {

void calibration_inputs_cuda(const CalibrationInputs& args, void* stream) { launch_rows(args, stream); }

}  // namespace easyspec
