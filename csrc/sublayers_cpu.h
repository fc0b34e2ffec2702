// A sublayer's dense work in one call, for few tokens on the host, where launching each part costs more than its work.
// The phases of a struct run one after another, the tasks of a phase side by side.
#pragma once

#include "packed_matmul.h"
#include "rotate_and_store.h"
#include "skinny_matmul.h"

namespace easyspec {

// A shard's rows of the embedding table, zeros for the tokens of other shards.
struct EmbedShard {
  const int64_t* ids;  // [tokens], stride ids_stride
  int64_t ids_stride;
  const void* table;  // [rows, row_bytes]
  void* out;          // [tokens, row_bytes]
  int64_t first;      // the shard's first token
  int64_t rows;       // its tokens; the table may have more rows, which pad it
  int64_t row_bytes;
};

void embed_shard_phase(const EmbedShard& args, int64_t begin, int64_t end);  // tokens

// Norm and projection of a group's queries, keys and values, from one input or one a layer.
struct NormAndProject {
  const void* x;           // [tokens, hidden], or [layers, tokens, hidden]
  int64_t layer_step;      // elements from a layer's input to the next one's, 0 for one input
  const void* norms;       // [layers, hidden]
  PackedMatrices weights;  // of the layers, [hidden, columns]
  const void* bias;        // [layers, columns], or none
  void* out;               // [layers, tokens, columns]
  Rows normed;             // [layers * tokens]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  float eps;
  DType dtype;
};

void norm_phase(const NormAndProject& args, int64_t begin, int64_t end);     // tokens
void project_phase(const NormAndProject& args, int64_t begin, int64_t end);  // layers x tiles of columns

// The output projections of the layers of a group that live here, among zeros for the others.
struct ProjectAmongZeros {
  const void* x;           // [layers, tokens, inner]
  PackedMatrices weights;  // of the layers, [inner, columns]
  const void* bias;        // [layers, columns], or none
  void* out;               // [group, tokens, columns]
  Rows rows;               // [layers * tokens]
  int64_t layers;
  int64_t group;
  int64_t first;  // the group's first layer here
  int64_t step;   // to the next
  int64_t tokens;
  int64_t inner;
  DType dtype;
};

void rows_phase(const ProjectAmongZeros& args, int64_t begin, int64_t end);     // layers x tokens
void project_phase(const ProjectAmongZeros& args, int64_t begin, int64_t end);  // group x tiles of columns

// The sum of several layers' gated MLPs, each on its own input.
struct SumOfMlps {
  const void* inputs;        // [layers, tokens, hidden]
  const void* norms;         // [layers, hidden]
  PackedMatrices gate_up;    // of the layers, [hidden, 2 * width]: a tile of gates and a tile of what they gate in turn
  const void* gate_up_bias;  // [layers, 2 * width], or none
  PackedMatrices down;       // of the layers, [width, hidden]
  const void* residual;      // [tokens, hidden], or none: added to the sum
  void* out;                 // [tokens, hidden]
  Rows normed;               // [layers * tokens]
  Rows wide;                 // [layers * tokens]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  int64_t width;
  float eps;
  DType dtype;
};

void norm_phase(const SumOfMlps& args, int64_t begin, int64_t end);     // layers x tokens
void gate_up_phase(const SumOfMlps& args, int64_t begin, int64_t end);  // layers x tiles of the width
void down_phase(const SumOfMlps& args, int64_t begin, int64_t end);     // tiles of columns

// What layers of a group read in place of x: x + [known (, x / rms(x))] times down times up + bias.
struct LookAhead {
  const void* x;       // [tokens, hidden], or [layers, tokens, hidden]
  int64_t layer_step;  // elements from a layer's x to the next one's, 0 for one x
  const void* known;   // [tokens, known_size]
  const void* down;    // [layers, inputs, rank] maps_dtype
  const void* up;      // [layers, rank, hidden] maps_dtype
  const void* bias;    // [layers, hidden] maps_dtype
  void* out;           // [layers, tokens, hidden]
  float* features;     // [layers or 1, tokens, inputs]
  float* thin;         // [layers, tokens, rank]
  int64_t layers;
  int64_t tokens;
  int64_t hidden;
  int64_t known_size;
  int64_t inputs;  // known_size, or hidden more
  int64_t rank;
  float eps;
  DType dtype;
  DType maps_dtype;
};

void features_phase(const LookAhead& args, int64_t begin, int64_t end);  // layers x tokens, or tokens
void thin_phase(const LookAhead& args, int64_t begin, int64_t end);      // layers x tiles of the rank
void up_phase(const LookAhead& args, int64_t begin, int64_t end);        // layers x tiles of columns

}  // namespace easyspec
