// Delays value i of a vector by i % 4 cycles: the inputs of m3vit_products.
module m3vit_skew #(
    parameter int BITS = 8,
    parameter int COUNT = 16
) (
    input  logic                  clk,
    input  logic [COUNT*BITS-1:0] in,
    output logic [COUNT*BITS-1:0] out
);
    for (genvar i = 0; i < COUNT; i++) begin : value
        if (i % 4 == 0) begin : none
            assign out[i*BITS+:BITS] = in[i*BITS+:BITS];
        end else begin : delayed
            m3vit_delay #(
                .BITS  (BITS),
                .CYCLES(i % 4)
            ) delay (
                .clk(clk),
                .reset(1'b0),
                .in(in[i*BITS+:BITS]),
                .out(out[i*BITS+:BITS])
            );
        end
    end
endmodule
