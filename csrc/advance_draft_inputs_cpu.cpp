#include "advance_draft_inputs.h"

namespace easyspec {

void advance_draft_inputs_cpu(const AdvanceDraftInputs& args) {
  for (int64_t row = 0; row < args.rows; ++row) do_row(args, row);
}

}  // namespace easyspec
