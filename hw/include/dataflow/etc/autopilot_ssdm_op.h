// ap_wait() of Vitis HLS for timed C-simulation: what follows in an iteration happens a cycle later.
#ifndef M3VIT_DATAFLOW_SSDM_OP_H_
#define M3VIT_DATAFLOW_SSDM_OP_H_
#include "hls_stream.h"
inline void ap_wait() { m3vit_timed::engine::get().wait(); }
#endif
