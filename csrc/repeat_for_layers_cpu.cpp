#include "repeat_for_layers.h"

namespace easyspec {

void repeat_for_layers_cpu(const RepeatForLayers& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) repeat_at(args, i);
}

}  // namespace easyspec
