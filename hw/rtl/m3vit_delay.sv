// A vector some cycles later.
module m3vit_delay #(
    parameter int BITS = 1,
    parameter int CYCLES = 1
) (
    input  logic            clk,
    input  logic            reset,
    input  logic [BITS-1:0] in,
    output logic [BITS-1:0] out
);
    logic [CYCLES*BITS-1:0] held;  // the latest lowest
    assign out = held[(CYCLES-1)*BITS+:BITS];
    if (CYCLES == 1) begin : one
        always_ff @(posedge clk) held <= reset ? 0 : in;
    end else begin : several
        always_ff @(posedge clk) held <= reset ? 0 : {held[0+:(CYCLES-1)*BITS], in};
    end
endmodule
