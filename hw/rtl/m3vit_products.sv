// The sum of four products, in a cascade of four DSPs: product i enters i cycles after product 0, so x and y come skewed
// by as much. LATENCY: cycles from product 0's inputs to the sum.
module m3vit_products #(
    parameter int X_BITS = 8,
    parameter int Y_BITS = 27,
    parameter int SUM_BITS = 38
) (
    input  logic                       clk,
    input  logic        [4*X_BITS-1:0] x,
    input  logic        [4*Y_BITS-1:0] y,
    output logic signed [SUM_BITS-1:0] sum
);
    for (genvar i = 0; i < 4; i++) begin : dsp
        logic signed [X_BITS-1:0] a;
        logic signed [Y_BITS-1:0] b;
        logic signed [X_BITS+Y_BITS-1:0] m;
        logic signed [SUM_BITS-1:0] p;
        always_ff @(posedge clk) begin
            a <= x[i*X_BITS+:X_BITS];
            b <= y[i*Y_BITS+:Y_BITS];
            m <= a * b;
        end
        if (i == 0) begin : first
            always_ff @(posedge clk) p <= SUM_BITS'(m);
        end else begin : next
            always_ff @(posedge clk) p <= dsp[i-1].p + SUM_BITS'(m);
        end
    end
    assign sum = dsp[3].p;
endmodule
