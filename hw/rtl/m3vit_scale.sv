// One value of the residual stream: old + round(result * weight * 2^-17), held to 32 bits. The router's weight is
// 2^17 at most: that one is not multiplied, so that the others have the 18 bits of a DSP's port.
// LATENCY: 7 cycles; `old` is wanted after 5.
module m3vit_scale (
    input  logic               clk,
    input  logic signed [31:0] result,
    input  logic        [17:0] weight,
    input  logic signed [31:0] old,
    output logic signed [31:0] sum
);
    localparam int FRAC = 17;
    logic signed [31:0] result_1, result_2, result_3;
    logic signed [17:0] weight_1;
    logic signed [49:0] product, product_3;
    logic signed [32:0] scaled, scaled_5;
    logic signed [33:0] added;
    logic one_1, one_2, one_3;
    always_ff @(posedge clk) begin
        result_1 <= result;
        weight_1 <= {1'b0, weight[16:0]};
        one_1 <= weight[FRAC];

        product <= result_1 * weight_1;
        result_2 <= result_1;
        one_2 <= one_1;

        product_3 <= product;
        result_3 <= result_2;
        one_3 <= one_2;

        scaled <= one_3 ? 33'(result_3) : 33'((product_3 + (1 << (FRAC - 1))) >>> FRAC);

        scaled_5 <= scaled;

        added <= 34'(scaled_5) + 34'(old);

        sum <= added > 34'sd2147483647 ? 32'sh7fff_ffff : added < -34'sd2147483648 ? 32'sh8000_0000 : added[31:0];
    end
endmodule
