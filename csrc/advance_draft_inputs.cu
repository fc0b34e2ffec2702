#include "advance_draft_inputs.h"

namespace easyspec {

void advance_draft_inputs_cuda(const AdvanceDraftInputs& args, void* stream) { launch_rows(args, stream); }

}  // namespace easyspec
