// A queue in LUTs. Its first word is at `out` while it is not empty. DEPTH is a power of two; the user never writes into a
// full one: `held` counts words.
module m3vit_fifo #(
    parameter int WIDTH = 128,
    parameter int DEPTH = 128,
    localparam int ADDRESS = $clog2(DEPTH)
) (
    input  logic             clk,
    input  logic             reset,
    input  logic             push,
    input  logic [WIDTH-1:0] in,
    input  logic             pop,
    output logic [WIDTH-1:0] out,
    output logic             empty,
    output logic [ADDRESS:0] held
);
    (* ram_style = "distributed" *) logic [WIDTH-1:0] store[0:DEPTH-1];
    logic [ADDRESS-1:0] write_at, read_at;
    assign out = store[read_at];
    assign empty = held == 0;
    always_ff @(posedge clk) begin
        if (push) store[write_at] <= in;
        if (reset) begin
            write_at <= 0;
            read_at <= 0;
            held <= 0;
        end else begin
            write_at <= write_at + ADDRESS'(push);
            read_at <= read_at + ADDRESS'(pop);
            held <= held + (ADDRESS + 1)'(push) - (ADDRESS + 1)'(pop);
        end
    end
endmodule
