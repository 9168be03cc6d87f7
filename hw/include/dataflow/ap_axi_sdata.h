// Words of AXI streams with their side channels, for timed C-simulation.
#ifndef M3VIT_DATAFLOW_AXI_SDATA_H_
#define M3VIT_DATAFLOW_AXI_SDATA_H_
#include "ap_int.h"
namespace hls {
template <class T, int USER = 0, int ID = 0, int DEST = 0> struct axis {
    T data;
    ap_int<8> keep, strb;
    ap_uint<1> last;
};
} // namespace hls
template <int BITS, int USER = 0, int ID = 0, int DEST = 0> using ap_axiu = hls::axis<ap_uint<BITS>, USER, ID, DEST>;
template <int BITS, int USER = 0, int ID = 0, int DEST = 0> using ap_axis = hls::axis<ap_int<BITS>, USER, ID, DEST>;
#endif
