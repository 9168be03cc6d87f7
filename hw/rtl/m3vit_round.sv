// One result: round((sum + bias * 2^bias_shift) * 2^-shift), half up, held to 32 bits. `distance` is shift + 31, 0 to 79.
// LATENCY: 5 cycles.
module m3vit_round #(
    parameter int SUM_BITS = 48
) (
    input  logic                       clk,
    input  logic signed [SUM_BITS-1:0] sum,
    input  logic signed [        31:0] bias,
    input  logic        [         5:0] bias_shift,
    input  logic        [         6:0] distance,
    output logic signed [        31:0] result
);
    localparam int WIDE = SUM_BITS + 32;  // 32 bits below the sum: it may go to the left
    localparam int KEPT = 33 + 15;        // after the coarse shift, those that the fine one leaves in range, and a sign
    logic signed [SUM_BITS-1:0] shifted, sum_1, total;
    logic [6:0] distance_1, distance_2;
    logic [3:0] distance_3;
    logic signed [WIDE-1:0] coarse;
    logic signed [KEPT:0] kept;
    logic signed [KEPT:0] fine;
    logic beyond, beyond_4, negative, negative_4;
    logic signed [KEPT:0] rounded;

    assign coarse = $signed({total, 32'd0}) >>> {distance_2[6:4], 4'd0};
    assign rounded = (fine + 1) >>> 1;
    always_ff @(posedge clk) begin
        shifted <= SUM_BITS'(bias) <<< bias_shift;
        sum_1 <= sum;
        distance_1 <= distance;

        total <= sum_1 + shifted;
        distance_2 <= distance_1;

        kept <= coarse[KEPT:0];
        beyond <= coarse[WIDE-1:KEPT] != {(WIDE - KEPT) {total[SUM_BITS-1]}};
        negative <= total[SUM_BITS-1];
        distance_3 <= distance_2[3:0];

        fine <= kept >>> distance_3;  // twice the result
        beyond_4 <= beyond;
        negative_4 <= negative;

        if (beyond_4 || rounded > 49'sd2147483647 || rounded < -49'sd2147483648)
            result <= negative_4 ? 32'sh8000_0000 : 32'sh7fff_ffff;
        else result <= rounded[31:0];
    end
endmodule
